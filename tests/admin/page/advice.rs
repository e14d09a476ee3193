//! The section about advice.

use dispatcher::api::advice::{AddressRecord, AdvicePoolStatus, AdviceStatus, PeerStatus};

use super::*;

fn address(address: &str, state: &str) -> AddressRecord {
    AddressRecord {
        address: address.to_owned(),
        state: state.to_owned(),
        load: 12,
        capacity: Some(1000),
        score: 3.25,
        weight: 4.0,
        age_ms: 70,
        advised: 5,
        ..AddressRecord::default()
    }
}

#[test]
fn addresses_and_peers_are_shown_and_nothing_without_advice() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    let hidden = "document.getElementById('advice').hidden";
    assert_eq!(browser.value(hidden), true);
    let mut status = crowd(3);
    status.advice = Some(AdviceStatus {
        listen: "10.0.0.1:9901".to_owned(),
        mode: "interval".to_owned(),
        requests: [("best".to_owned(), 40), ("addresses".to_owned(), 2)].into(),
        refused: [("denied".to_owned(), 3)].into(),
        left_out: [("addresses".to_owned(), 0)].into(),
        peers: vec![PeerStatus {
            address: "10.0.0.2:9901".to_owned(),
            state: "silent".to_owned(),
            error: Some(HOSTILE.to_owned()),
            answers: 7,
            failures: [("silent".to_owned(), 4), ("slow".to_owned(), 1)].into(),
            age_ms: None,
        }],
        pools: vec![AdvicePoolStatus {
            pool: "web".to_owned(),
            addresses: vec![address("10.0.0.1:80", "ok"), address("10.0.0.2:80", "draining")],
        }],
    });
    pretend(&mut browser, &status);
    browser.wait_true(&format!("!{hidden}"));
    let text = browser.text("document.getElementById('advice-text').innerText");
    assert_eq!(text, "At 10.0.0.1:9901, mode interval: 42 requests, 3 without advice.");
    let shown = cells(&mut browser, "advised");
    assert_eq!(shown.len(), 2);
    assert_eq!(shown[0], ["10.0.0.1:80", "web", "● ok", "3.3", "12 of 1,000", "5", "4", "70 ms"]);
    assert_eq!(shown[1][2], "◐ draining");
    let peers = cells(&mut browser, "advice-peers");
    assert_eq!(peers, [["10.0.0.2:9901", "▲ silent", "7", "5", HOSTILE]]);
    status.advice = None;
    pretend(&mut browser, &status);
    browser.wait_true(hidden);
    assert_eq!(browser.complaints, [] as [Value; 0]);
}
