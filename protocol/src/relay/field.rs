//! The bytes of one field of a record. Independent of the kind of record.

use super::{Change, Id, MAX_TEXT, Name, Wish};
use crate::wire::WireError;

/// Takes fields from the front of a record.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(record: &'a [u8]) -> Self {
        Reader { rest: record }
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) =
            self.rest.split_at_checked(count).ok_or(WireError::TooShort("end of field"))?;
        self.rest = rest;
        Ok(head)
    }

    /// A u16 length and as many bytes.
    fn counted(&mut self, max: usize) -> Result<&'a [u8], WireError> {
        let len = usize::from(u16::take(self)?);
        if len > max {
            return Err(WireError::TooLong { len, max });
        }
        self.bytes(len)
    }

    pub(super) fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::Invalid("end of record")) }
    }
}

/// A value in a record.
pub(super) trait Field: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError>;
}

macro_rules! integers {
    ($($type:ty)+) => { $(
        impl Field for $type {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
                let bytes = reader.bytes(size_of::<Self>())?;
                let bytes = bytes.try_into().map_err(|_| WireError::TooShort("integer"))?;
                Ok(Self::from_le_bytes(bytes))
            }
        }
    )+ };
}

integers! { u8 u16 u32 u64 }

impl Field for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        match u8::take(reader)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Invalid("boolean")),
        }
    }
}

impl Field for Change {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(*self as u8);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        match u8::take(reader)? {
            0 => Ok(Change::Came),
            1 => Ok(Change::Went),
            2 => Ok(Change::Moved),
            3 => Ok(Change::Missed),
            _ => Err(WireError::Invalid("change")),
        }
    }
}

impl Field for Wish {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(*self as u8);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        match u8::take(reader)? {
            0 => Ok(Wish::Join),
            1 => Ok(Wish::Subscribe),
            2 => Ok(Wish::Watch),
            3 => Ok(Wish::WatchGroup),
            _ => Err(WireError::Invalid("wish")),
        }
    }
}

/// Appends a u16 length and the bytes. Types bound the length.
fn counted(bytes: &[u8], out: &mut Vec<u8>) {
    let len = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    len.put(out);
    out.extend_from_slice(&bytes[..usize::from(len)]);
}

impl Field for Id {
    fn put(&self, out: &mut Vec<u8>) {
        counted(self.as_bytes(), out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Id::new(reader.counted(super::MAX_ID)?)
    }
}

impl Field for Name {
    fn put(&self, out: &mut Vec<u8>) {
        counted(self.as_str().as_bytes(), out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let bytes = reader.counted(crate::wire::MAX_NAME)?;
        Name::new(str::from_utf8(bytes).map_err(|_| WireError::Invalid("name"))?)
    }
}

/// Text, a ticket, or a cursor: at most [`MAX_TEXT`] bytes.
impl Field for Vec<u8> {
    fn put(&self, out: &mut Vec<u8>) {
        counted(&self[..self.len().min(MAX_TEXT)], out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        reader.counted(MAX_TEXT).map(<[u8]>::to_vec)
    }
}

macro_rules! lists {
    ($($type:ty)+) => { $(
        impl Field for Vec<$type> {
            fn put(&self, out: &mut Vec<u8>) {
                let count = u16::try_from(self.len()).unwrap_or(u16::MAX);
                count.put(out);
                self.iter().take(usize::from(count)).for_each(|item| item.put(out));
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
                // The record bounds the number; nothing is reserved for a false one.
                (0..u16::take(reader)?).map(|_| <$type>::take(reader)).collect()
            }
        }
    )+ };
}

lists! { super::Location super::Membership super::Place super::GroupSize super::Count }
