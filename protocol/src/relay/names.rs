//! Ids of clients and names: bytes with bounds, which may be shown to people.

use std::fmt;
use std::sync::Arc;

use super::MAX_ID;
use crate::wire::WireError;

/// The id of a client or the name of a group: 1 to [`MAX_ID`] bytes of any value. A clone is cheap.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(Arc<[u8]>);

impl Id {
    /// An id of these bytes.
    ///
    /// # Errors
    /// [`WireError::Invalid`] if there are none, or more than [`MAX_ID`].
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<Id, WireError> {
        let bytes = bytes.as_ref();
        if (1..=MAX_ID).contains(&bytes.len()) {
            Ok(Id(bytes.into()))
        } else {
            Err(WireError::Invalid("id: 1 to 128 bytes"))
        }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::borrow::Borrow<[u8]> for Id {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Hidden characters and bytes that are not UTF-8 must not reach a terminal or a log.
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    c if crate::wire::is_hidden(c) => write!(f, "{}", c.escape_unicode())?,
                    c => write!(f, "{c}")?,
                }
            }
            write!(f, "{}", chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

/// The name of a namespace, worker or host, as [`is_name`](crate::wire::is_name) allows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// A name of this text.
    ///
    /// # Errors
    /// [`WireError::Invalid`] if [`is_name`](crate::wire::is_name) does not allow it.
    pub fn new(text: &str) -> Result<Name, WireError> {
        if crate::wire::is_name(text) {
            Ok(Name(text.to_owned()))
        } else {
            Err(WireError::Invalid("name: 1 to 64 bytes without spaces and hidden characters"))
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
