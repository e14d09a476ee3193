//! welcome: the positive answer to a hello, with three file descriptors.

use super::codec::{Reader, WireError, header, name, once, put_tlv};
use super::{Features, is_name, kind, tlv};
use crate::relay::ticket::MAX_TICKET;
use crate::scoreboard::gauge::GaugeName;

/// A listener of the worker's pool. Handoffs refer to it by its index. See [`Welcome`] for an
/// example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WelcomeListener {
    /// The index in handoffs.
    pub index: u16,
    /// The listener's name in the configuration.
    pub name: String,
}

/// The worker has joined. The channel, the scoreboard and the doorbell eventfd come with the
/// record, in this order.
///
/// ```
/// use dispatch_protocol::wire::{Control, Features, VERSION, WELCOME_FDS, Welcome, WelcomeListener};
///
/// let welcome = Control::Welcome(Welcome {
///     version: VERSION,
///     slots: 256,
///     worker_id: 42,
///     features: Features::NONE,
///     max_connections: 1000,
///     handoff_timeout_ms: 200,
///     listeners: vec![WelcomeListener { index: 0, name: "web".to_owned() }],
///     gauges: vec!["queue_wait".parse()?],
///     relay_ticket: Vec::new(),
/// });
/// let mut record = Vec::new();
/// welcome.encode(&mut record);
/// assert_eq!(welcome.fds(), WELCOME_FDS);
/// assert_eq!(Control::decode(&record), Ok(welcome));
/// # Ok::<(), dispatch_protocol::scoreboard::gauge::NoGaugeName>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Protocol version of the dispatcher.
    pub version: u16,
    /// Slots of the scoreboard: the largest number of connections sent and not yet taken.
    pub slots: u32,
    /// The worker's id at this dispatcher; it appears in the status and in logs.
    pub worker_id: u64,
    /// Abilities of both sides.
    pub features: Features,
    /// The largest number of connections for this worker: the smaller of its own maximum and the
    /// pool's.
    pub max_connections: u32,
    /// How long a connection may stay untaken before it goes to another worker, in milliseconds.
    pub handoff_timeout_ms: u32,
    /// The listeners of the pool.
    pub listeners: Vec<WelcomeListener>,
    /// Gauges that the pool uses for scores. A worker that does not set all of them gets few
    /// connections.
    pub gauges: Vec<GaugeName>,
    /// Proof for the relay's directory that this user has a worker in this pool; empty for none.
    pub relay_ticket: Vec<u8>,
}

impl Welcome {
    /// Appends the record's bytes to `out`. It leaves out listeners with an invalid name
    /// ([`is_name`]), and gauges and listeners for which the record has no room.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let most = out.len() + super::MAX_CONTROL_RECORD;
        header(out, kind::WELCOME);
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&self.slots.to_le_bytes());
        out.extend_from_slice(&self.worker_id.to_le_bytes());
        out.extend_from_slice(&self.features.0.to_le_bytes());
        out.extend_from_slice(&self.max_connections.to_le_bytes());
        out.extend_from_slice(&self.handoff_timeout_ms.to_le_bytes());
        // The gauges come first, because the listeners may fill the record.
        for gauge in &self.gauges {
            if out.len() + 4 + gauge.as_str().len() > most {
                break;
            }
            put_tlv(out, tlv::GAUGE, gauge.as_str().as_bytes());
        }
        let mut value = Vec::new();
        for listener in self.listeners.iter().filter(|l| is_name(&l.name)) {
            value.clear();
            value.extend_from_slice(&listener.index.to_le_bytes());
            value.extend_from_slice(listener.name.as_bytes());
            // In a pool with very many listeners, the others have only an index.
            // A ticket may follow.
            if out.len() + 4 + value.len() + 4 + MAX_TICKET > most {
                break;
            }
            put_tlv(out, tlv::LISTENER, &value);
        }
        Welcome::append_ticket(out, &self.relay_ticket);
    }

    /// Appends a ticket to an encoded welcome, which has room for it; nothing if it is empty or too
    /// long for a ticket.
    pub fn append_ticket(record: &mut Vec<u8>, ticket: &[u8]) {
        let room = record.len() + 4 + ticket.len() <= super::MAX_CONTROL_RECORD;
        if room && (1..=MAX_TICKET).contains(&ticket.len()) {
            put_tlv(record, tlv::RELAY_TICKET, ticket);
        }
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Welcome, WireError> {
        let version = reader.u16("version")?;
        reader.reserved16("welcome")?;
        let slots = reader.u32("slots")?;
        let worker_id = reader.u64("worker id")?;
        let features = Features(reader.u64("features")?);
        let max_connections = reader.u32("max_connections")?;
        let handoff_timeout_ms = reader.u32("handoff_timeout")?;
        let (mut listeners, mut gauges) = (Vec::new(), Vec::new());
        let mut relay_ticket = None;
        while let Some((kind, value)) = reader.tlv()? {
            match kind {
                tlv::LISTENER => {
                    let (index, rest) =
                        value.split_first_chunk().ok_or(WireError::TooShort("listener index"))?;
                    let index = u16::from_le_bytes(*index);
                    listeners.push(WelcomeListener { index, name: name(rest, "listener name")? });
                }
                tlv::GAUGE => {
                    let invalid = || WireError::Invalid("gauge name");
                    let text = str::from_utf8(value).map_err(|_| invalid())?;
                    gauges.push(text.parse().map_err(|_| invalid())?);
                }
                tlv::RELAY_TICKET if value.len() > MAX_TICKET => {
                    return Err(WireError::TooLong { len: value.len(), max: MAX_TICKET });
                }
                tlv::RELAY_TICKET => once(&mut relay_ticket, value.to_vec(), "relay ticket")?,
                _ => {}
            }
        }
        if slots == 0 {
            return Err(WireError::Invalid("slots"));
        }
        Ok(Welcome {
            version,
            slots,
            worker_id,
            features,
            max_connections,
            handoff_timeout_ms,
            listeners,
            gauges,
            relay_ticket: relay_ticket.unwrap_or_default(),
        })
    }
}
