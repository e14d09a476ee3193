//! Decoding records of either socket, and encoding what was decoded.

use dispatch_protocol::wire::{
    Channel, Control, MAX_CHANNEL_RECORD, MAX_CONTROL_RECORD, MAX_PREFORK_RECORD, Prefork,
    WireError,
};

pub fn wire_control(data: &[u8]) {
    round(data, MAX_CONTROL_RECORD, Control::decode, |record, out| {
        assert!(record.fds() <= 3);
        record.encode(out);
    });
}

pub fn wire_channel(data: &[u8]) {
    round(data, MAX_CHANNEL_RECORD, Channel::decode, |record, out| {
        assert!(record.fds() <= 64);
        record.encode(out);
    });
}

pub fn wire_prefork(data: &[u8]) {
    round(data, MAX_PREFORK_RECORD, Prefork::decode, |record, out| {
        assert!((0..=3).any(|count| record.allows_fds(count)));
        record.encode(out);
    });
}

/// A decoded record can be encoded, is then no longer than the limit, and decodes to the same
/// value. Encoding it again gives the same bytes: a record without unknown TLVs has one encoding.
fn round<T: PartialEq + std::fmt::Debug>(
    data: &[u8],
    max: usize,
    decode: impl Fn(&[u8]) -> Result<T, WireError>,
    encode: impl Fn(&T, &mut Vec<u8>),
) {
    let record = match decode(data) {
        Ok(record) => record,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert!(data.len() <= max);
    let (mut once, mut twice) = (Vec::new(), Vec::new());
    encode(&record, &mut once);
    assert!(once.len() <= max, "{record:?} has {} bytes", once.len());
    let again = decode(&once).expect("what we encode decodes");
    assert_eq!(again, record);
    encode(&again, &mut twice);
    assert_eq!(twice, once);
}
