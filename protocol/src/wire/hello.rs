//! hello: the first record on a control connection, from the worker to the dispatcher.

use super::codec::{Reader, WireError, header, name, once, put_tlv};
use super::{MAX_ADVERTISE, VERSION, kind, tlv};

/// Optional abilities, one bit each. A side uses only the bits that both sides have set.
///
/// ```
/// use dispatch_protocol::wire::Features;
///
/// let (mine, theirs) = (Features(0b011), Features(0b110));
/// assert_eq!(Features(mine.0 & theirs.0), Features(0b010));
/// assert_eq!(Features::default(), Features::NONE);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// No optional ability.
    pub const NONE: Features = Features(0);
    /// The worker understands [`Drain`](super::Drain) and [`Resume`](super::Resume).
    pub const DRAIN: Features = Features(1);

    /// The worker may send [`Claim`](super::Claim). The dispatcher sets it for pools with affinity.
    pub const CLAIM: Features = Features(2);

    /// The worker may send [`Update`](super::Update).
    pub const UPDATE: Features = Features(4);

    /// Whether every ability of `other` is set.
    pub fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The secret that a spawned worker finds in `DISPATCH_TOKEN` and returns in its hello: 16 bytes,
/// written as 32 hexadecimal digits. `Debug` hides it; `Display` shows it.
///
/// ```
/// use dispatch_protocol::Token;
///
/// # fn main() -> Result<(), dispatch_protocol::wire::WireError> {
/// let token: Token = "00112233445566778899aabbccddeeff".parse()?;
/// assert_eq!(token.0[1], 0x11);
/// assert_eq!(token.to_string(), "00112233445566778899aabbccddeeff");
/// assert!("secret".parse::<Token>().is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub [u8; 16]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl std::fmt::Display for Token {
    /// 32 hexadecimal digits, as in the environment.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::str::FromStr for Token {
    type Err = WireError;

    /// # Errors
    /// [`WireError::Invalid`] if the text is not exactly 32 hexadecimal digits.
    fn from_str(text: &str) -> Result<Token, WireError> {
        let mut token = [0; 16];
        // The number parser below also accepts a sign, so each digit is checked.
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(WireError::Invalid("token"));
        }
        for (i, byte) in token.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16)
                .map_err(|_| WireError::Invalid("token"))?;
        }
        Ok(Token(token))
    }
}

/// The worker's description of itself, sent when it joins.
///
/// ```
/// use dispatch_protocol::wire::{Control, Hello, WireError};
///
/// // A worker that joins again: it has taken 7 connections so far, 2 of them are live.
/// let hello = Hello { pool: "web".to_owned(), base: 7, finished: 5, ..Hello::default() };
/// let mut record = Vec::new();
/// hello.encode(&mut record);
/// assert_eq!(Control::decode(&record), Ok(Control::Hello(hello)));
///
/// let mut record = Vec::new();
/// Hello { weight: 0, ..Hello::default() }.encode(&mut record);
/// assert_eq!(Control::decode(&record), Err(WireError::Invalid("weight")));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Protocol version; see [`VERSION`].
    pub version: u16,
    /// Share relative to the other workers of the pool, 1 to 65,535.
    pub weight: u16,
    /// Priority for policies that prefer some workers; higher first.
    pub priority: u16,
    /// Abilities of this worker.
    pub features: Features,
    /// The largest number of connections that the worker holds at once; at least 1.
    pub max_connections: u32,
    /// Connections that the application has taken since the process started, over all dispatchers.
    pub base: u64,
    /// Those of them that are closed. `base - finished` are live now.
    pub finished: u64,
    /// The pool to join.
    pub pool: String,
    /// A name for people; it need not be unique.
    pub name: String,
    /// Only for workers that the dispatcher started.
    pub token: Option<Token>,
    /// An address at which clients reach the worker itself, `HOST:PORT`: 1 to [`MAX_ADVERTISE`]
    /// visible ASCII characters.
    pub advertise: Option<String>,
}

impl Default for Hello {
    fn default() -> Self {
        Hello {
            version: VERSION,
            weight: 1,
            priority: 0,
            features: Features::NONE,
            max_connections: 1,
            base: 0,
            finished: 0,
            pool: "default".to_owned(),
            name: "worker".to_owned(),
            token: None,
            advertise: None,
        }
    }
}

impl Hello {
    /// Appends the record's bytes to `out`. Decoding checks the values, encoding does not.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::HELLO);
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&self.weight.to_le_bytes());
        out.extend_from_slice(&self.priority.to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&self.features.0.to_le_bytes());
        out.extend_from_slice(&self.max_connections.to_le_bytes());
        out.extend_from_slice(&[0, 0, 0, 0]);
        out.extend_from_slice(&self.base.to_le_bytes());
        out.extend_from_slice(&self.finished.to_le_bytes());
        put_tlv(out, tlv::POOL, self.pool.as_bytes());
        put_tlv(out, tlv::NAME, self.name.as_bytes());
        if let Some(token) = self.token {
            put_tlv(out, tlv::TOKEN, &token.0);
        }
        if let Some(advertise) = &self.advertise {
            put_tlv(out, tlv::ADVERTISE, advertise.as_bytes());
        }
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Hello, WireError> {
        let version = reader.u16("version")?;
        let weight = reader.u16("weight")?;
        let priority = reader.u16("priority")?;
        reader.reserved16("hello")?;
        let features = Features(reader.u64("features")?);
        let max_connections = reader.u32("max_connections")?;
        reader.reserved32("hello")?;
        let base = reader.u64("base")?;
        let finished = reader.u64("finished")?;
        let (mut pool, mut worker_name, mut token, mut advertise) = (None, None, None, None);
        while let Some((kind, value)) = reader.tlv()? {
            match kind {
                tlv::POOL => once(&mut pool, name(value, "pool name")?, "pool name")?,
                tlv::NAME => once(&mut worker_name, name(value, "worker name")?, "worker name")?,
                tlv::TOKEN => {
                    let bytes = value.try_into().map_err(|_| WireError::Invalid("token"))?;
                    once(&mut token, Token(bytes), "token")?;
                }
                tlv::ADVERTISE => once(&mut advertise, address(value)?, "advertise")?,
                _ => {}
            }
        }
        if weight == 0 {
            return Err(WireError::Invalid("weight"));
        }
        if max_connections == 0 {
            return Err(WireError::Invalid("max_connections"));
        }
        if finished > base {
            return Err(WireError::Invalid("finished: more than base"));
        }
        Ok(Hello {
            version,
            weight,
            priority,
            features,
            max_connections,
            base,
            finished,
            pool: pool.ok_or(WireError::Missing("pool name"))?,
            name: worker_name.ok_or(WireError::Missing("worker name"))?,
            token,
            advertise,
        })
    }
}

fn address(value: &[u8]) -> Result<String, WireError> {
    let good = (1..=MAX_ADVERTISE).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic);
    let text = String::from_utf8(value.to_vec()).ok().filter(|_| good);
    text.ok_or(WireError::Invalid("advertise"))
}
