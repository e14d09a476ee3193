//! The first bytes of a client, whatever they are: nothing panics, and however they are cut, the answer is the same.

use dispatcher::affinity::{KeySource, Look};

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
        let whole = source.of_first_bytes(data, false, &mut scratch);
        assert_ne!(source.of_first_bytes(data, true, &mut scratch), Look::More);
        // Every cut of what is short, and some of what is long.
        for cut in (0..data.len()).step_by(1 + data.len() / 500) {
            let said = source.of_first_bytes(&data[..cut], false, &mut scratch);
            assert!(said == Look::More || said == whole, "{source}: {said:?} of {cut}, {whole:?}");
        }
        source.of_value(data);
    }
}
