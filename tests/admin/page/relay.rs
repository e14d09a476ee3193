//! The section about messages between workers.

use dispatcher::api::status::{RelayProcess, RelayStatus};

use super::*;

#[test]
fn the_directory_is_shown_and_nothing_without_one() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    let hidden = "document.getElementById('relay').hidden";
    assert_eq!(browser.value(hidden), true);
    let mut status = crowd(3);
    status.relay = Some(RelayStatus {
        socket: "/run/dispatcher/relay.sock".to_owned(),
        state: "up".to_owned(),
        error: None,
        process: Some(RelayProcess { pid: Some(4711), starts: 2 }),
        numbers: [("ids".to_owned(), 12_345), ("lookups_found_total".to_owned(), 7)].into(),
    });
    pretend(&mut browser, &status);
    browser.wait_true(&format!("!{hidden}"));
    let said =
        |browser: &mut Browser| browser.text("document.getElementById('relay-text').innerText");
    assert_eq!(
        said(&mut browser),
        "The directory at /run/dispatcher/relay.sock is up, process 4711, started 2 times."
    );
    let numbers = cells(&mut browser, "relay-numbers");
    assert_eq!(numbers, [["ids", "12,345"], ["lookups found", "7"]]);
    let relay = status.relay.as_mut().unwrap();
    (relay.state, relay.error, relay.process) = ("down".to_owned(), Some(HOSTILE.to_owned()), None);
    pretend(&mut browser, &status);
    browser.wait_true("document.getElementById('relay-text').innerText.includes('down')");
    assert_eq!(
        said(&mut browser),
        format!("The directory at /run/dispatcher/relay.sock is down. {HOSTILE}")
    );
    status.relay = None;
    pretend(&mut browser, &status);
    browser.wait_true(hidden);
    assert_eq!(browser.complaints, [] as [Value; 0]);
}
