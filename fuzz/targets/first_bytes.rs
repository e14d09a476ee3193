//! Any first bytes of a client: no parser panics, and the result does not depend on how the bytes
//! are split.

use dispatcher::preface::proxy::{self, Header};
use dispatcher::preface::{Parsed, read};
use dispatcher_core::KeySource;

pub fn first_bytes(data: &[u8]) {
    let name = || "id".to_owned();
    for source in [
        KeySource::Cookie(name()),
        KeySource::Url(name()),
        KeySource::Form(name()),
        KeySource::Header(name()),
        KeySource::Sni,
        KeySource::ClientIp { ipv4_prefix: 24, ipv6_prefix: 64 },
    ] {
        let mut scratch = Vec::new();
        let whole = read(&source, data, false, &mut scratch);
        assert_ne!(read(&source, data, true, &mut scratch), Parsed::Incomplete);
        // Every prefix of a short input, and some prefixes of a long one.
        for cut in (0..data.len()).step_by(1 + data.len() / 500) {
            let said = read(&source, &data[..cut], false, &mut scratch);
            assert!(
                said == Parsed::Incomplete || said == whole,
                "{source}: {said:?} of {cut}, {whole:?}"
            );
        }
        source.of_value(data);
    }
    let whole = proxy::read(data, 536);
    for cut in 0..data.len().min(700) {
        let said = proxy::read(&data[..cut], 536);
        assert!(
            matches!(said, Header::Unknown | Header::Begun) || said == whole,
            "{said:?} of {cut}, {whole:?}"
        );
    }
}
