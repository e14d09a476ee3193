//! The records between the dispatcher and a process that forks workers: fork, forked, not forked,
//! ended.

use super::codec::{Reader, WireError, header, name, once, put_tlv, short_text, text_of};
use super::{MAX_PREFORK_RECORD, Token, kind, tlv};

/// Dispatcher to parent: fork a worker.
///
/// One file descriptor or three come with it: a gate, and the worker's stdout and stderr if the
/// dispatcher reads them. The new process reads the gate. One byte means that the dispatcher has
/// recorded the process, which then runs the application; the end of the gate means that the
/// process is to exit.
///
/// ```
/// use dispatch_protocol::Token;
/// use dispatch_protocol::wire::{Fork, Prefork};
///
/// let fork = Fork {
///     id: 7,
///     name: "web-1".to_owned(),
///     token: Token([1; 16]),
///     variables: vec![("CACHE".to_owned(), "/var/cache/web/1".to_owned())],
/// };
/// let mut record = Vec::new();
/// fork.encode(&mut record);
/// assert_eq!(Prefork::decode(&record), Ok(Prefork::Fork(fork)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fork {
    /// Identifies the order in its answer.
    pub id: u64,
    /// For `DISPATCH_NAME`.
    pub name: String,
    /// For `DISPATCH_TOKEN`.
    pub token: Token,
    /// Names and values of further environment variables.
    pub variables: Vec<(String, String)>,
}

/// File descriptors that may come with a [`Fork`]: the gate, or gate, stdout and stderr.
pub const FORK_FDS: [usize; 2] = [1, 3];

impl Fork {
    /// Appends the record's bytes to `out`. The caller checks that they are at most
    /// [`MAX_PREFORK_RECORD`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::FORK);
        out.extend_from_slice(&self.id.to_le_bytes());
        put_tlv(out, tlv::NAME, self.name.as_bytes());
        put_tlv(out, tlv::TOKEN, &self.token.0);
        for (name, value) in &self.variables {
            put_tlv(out, tlv::VARIABLE, format!("{name}={value}").as_bytes());
        }
    }

    fn decode_body(reader: &mut Reader<'_>) -> Result<Fork, WireError> {
        let id = reader.u64("id")?;
        let (mut worker_name, mut token, mut variables) = (None, None, Vec::new());
        while let Some((kind, value)) = reader.tlv()? {
            match kind {
                tlv::NAME => once(&mut worker_name, name(value, "worker name")?, "worker name")?,
                tlv::TOKEN => {
                    let bytes = value.try_into().map_err(|_| WireError::Invalid("token"))?;
                    once(&mut token, Token(bytes), "token")?;
                }
                tlv::VARIABLE => variables.push(variable(value)?),
                _ => {}
            }
        }
        Ok(Fork {
            id,
            name: worker_name.ok_or(WireError::Missing("worker name"))?,
            token: token.ok_or(WireError::Missing("token"))?,
            variables,
        })
    }
}

/// `NAME=VALUE`, as the environment has it.
fn variable(bytes: &[u8]) -> Result<(String, String), WireError> {
    let invalid = WireError::Invalid("variable");
    let text = str::from_utf8(bytes).map_err(|_| invalid.clone())?;
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !text.contains('\0') => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(invalid),
    }
}

/// Parent to dispatcher: the worker waits at its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forked {
    /// The id of the order.
    pub id: u64,
    /// The process id of the worker, which leads a process group of its own.
    pub pid: u32,
}

impl Forked {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::FORKED);
        out.extend_from_slice(&self.id.to_le_bytes());
        out.extend_from_slice(&self.pid.to_le_bytes());
        out.extend_from_slice(&[0, 0, 0, 0]);
    }

    fn decode_body(reader: &mut Reader<'_>) -> Result<Forked, WireError> {
        let id = reader.u64("id")?;
        let pid = process_id(reader)?;
        reader.reserved32("forked")?;
        reader.skip_tlvs()?;
        Ok(Forked { id, pid })
    }
}

/// A process id is a positive number of 31 bits.
fn process_id(reader: &mut Reader<'_>) -> Result<u32, WireError> {
    match reader.u32("process id")? {
        pid @ 1..=0x7fff_ffff => Ok(pid),
        _ => Err(WireError::Invalid("process id")),
    }
}

/// Parent to dispatcher: there is no worker, for this reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotForked {
    /// The id of the order.
    pub id: u64,
    /// The reason and the remedy for people, one sentence. Cut at 1,024 bytes.
    pub reason: String,
}

impl NotForked {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::NOT_FORKED);
        out.extend_from_slice(&self.id.to_le_bytes());
        put_tlv(out, tlv::REASON, text_of(&self.reason));
    }

    fn decode_body(reader: &mut Reader<'_>) -> Result<NotForked, WireError> {
        let id = reader.u64("id")?;
        let mut reason = None;
        while let Some((kind, value)) = reader.tlv()? {
            if kind == tlv::REASON {
                once(&mut reason, short_text(value), "reason")?;
            }
        }
        Ok(NotForked { id, reason: reason.ok_or(WireError::Missing("reason"))? })
    }
}

/// Parent to dispatcher: a worker has ended, and the parent has reaped it. Its process id may
/// belong to another process from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The process id that the worker had.
    pub pid: u32,
    /// The status as `wait` returns it.
    pub status: u32,
}

impl Ended {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::ENDED);
        out.extend_from_slice(&self.pid.to_le_bytes());
        out.extend_from_slice(&self.status.to_le_bytes());
    }

    fn decode_body(reader: &mut Reader<'_>) -> Result<Ended, WireError> {
        let pid = process_id(reader)?;
        let status = reader.u32("status")?;
        reader.skip_tlvs()?;
        Ok(Ended { pid, status })
    }
}

/// A record between the dispatcher and a process that forks workers, in either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prefork {
    /// See [`Fork`].
    Fork(Fork),
    /// See [`Forked`].
    Forked(Forked),
    /// See [`NotForked`].
    NotForked(NotForked),
    /// See [`Ended`].
    Ended(Ended),
}

impl Prefork {
    /// Decodes one record.
    ///
    /// # Errors
    /// [`WireError`] if the bytes are not exactly one well-formed record.
    pub fn decode(record: &[u8]) -> Result<Prefork, WireError> {
        if record.len() > MAX_PREFORK_RECORD {
            return Err(WireError::TooLong { len: record.len(), max: MAX_PREFORK_RECORD });
        }
        let mut reader = Reader::new(record);
        match reader.kind()? {
            kind::FORK => Fork::decode_body(&mut reader).map(Prefork::Fork),
            kind::FORKED => Forked::decode_body(&mut reader).map(Prefork::Forked),
            kind::NOT_FORKED => NotForked::decode_body(&mut reader).map(Prefork::NotForked),
            kind::ENDED => Ended::decode_body(&mut reader).map(Prefork::Ended),
            other => Err(WireError::UnknownKind(other)),
        }
    }

    /// Whether so many file descriptors may come with this record.
    pub fn allows_fds(&self, count: usize) -> bool {
        match self {
            Prefork::Fork(_) => FORK_FDS.contains(&count),
            Prefork::Forked(_) | Prefork::NotForked(_) | Prefork::Ended(_) => count == 0,
        }
    }

    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Prefork::Fork(m) => m.encode(out),
            Prefork::Forked(m) => m.encode(out),
            Prefork::NotForked(m) => m.encode(out),
            Prefork::Ended(m) => m.encode(out),
        }
    }
}

#[cfg(test)]
mod tests;
