//! The first bytes of a client, whatever they are: nothing panics, and however they are cut, the answer is the same.

use dispatcher::preface::{Look, read};
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
        assert_ne!(read(&source, data, true, &mut scratch), Look::More);
        // Every cut of what is short, and some of what is long.
        for cut in (0..data.len()).step_by(1 + data.len() / 500) {
            let said = read(&source, &data[..cut], false, &mut scratch);
            assert!(said == Look::More || said == whole, "{source}: {said:?} of {cut}, {whole:?}");
        }
        source.of_value(data);
    }
}
