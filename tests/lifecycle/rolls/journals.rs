//! What the next dispatcher knows of a roll that is over, and what it says when it does not know
//! it.

use super::interrupted::{begin, gated, open_gate, serving};
use super::*;

/// The second version works in the first place only.
fn only_the_first() -> String {
    script("echo I am $DISPATCH_NAME; test $DISPATCH_NAME = web-1 || exit 4; exec SERVER blocking")
}

/// A dispatcher whose roll has stopped after one step, and the address of its listener.
fn stopped() -> (Place, Dispatcher, Vec<Client>) {
    let address = free_address();
    let place = Place::new(&serving(address, &good("blocking"), &version("1", "")));
    let next = serving(address, &only_the_first(), &version("2", ""));
    let (dispatcher, held) = begin(&place, address, &next);
    let Outcome { code, text } = run(&dispatcher, &["restart", "web", "--wait"]);
    assert_eq!(code, 70, "{text}");
    (place, dispatcher, held)
}

/// Kills the dispatcher, changes its journal, and starts the next one.
fn after_a_crash(
    place: &Place,
    mut dispatcher: Dispatcher,
    change: impl Fn(&str) -> String,
) -> Dispatcher {
    dispatcher.process.kill();
    drop(dispatcher);
    let journal = place.path().join("dispatch.sock.processes");
    let text = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, change(&text)).unwrap();
    let dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 4);
    dispatcher
}

const REASON: &str = "process 2 (web-2) ended before it was ready: exit status 4";

#[test]
fn the_next_dispatcher_tells_why_a_roll_stopped_and_undoes_it() {
    let (place, mut dispatcher, mut held) = stopped();
    for _ in 0..2 {
        dispatcher = after_a_crash(&place, dispatcher, str::to_owned);
        let Outcome { code, text } = run(&dispatcher, &["rollout", "status", "web"]);
        assert_eq!(code, 70, "{text}");
        for part in [REASON, "  I am web-2", "replaced: 1 of 4", "last roll from 1 to 2: stopped"] {
            assert!(text.contains(part), "{part:?} is missing in:\n{text}");
        }
        let status = dispatcher.status();
        assert_eq!(plain(&status), ["2", "1", "1", "1"]);
        assert!(processes(&status).restart_needed);
    }
    held.iter_mut().for_each(|client| client.echo("through it all"));
    // The journal has the former command; the configuration has the bad one.
    let text = order(&dispatcher, &["rollout", "undo", "web", "--wait"]);
    assert!(text.contains("back to generation 1: 1 process to replace"), "{text}");
    let status = dispatcher.wait_status("the former version", |status| plain(status) == ["1"; 4]);
    assert_eq!(processes(&status).generation, 1);
    // The next one knows that, too.
    let dispatcher = after_a_crash(&place, dispatcher, str::to_owned);
    let text = order(&dispatcher, &["rollout", "status", "web"]);
    assert!(text.contains("last return from 2 to 1: done"), "{text}");
    assert_eq!(plain(&dispatcher.status()), ["1"; 4]);
    drop(held);
}

#[test]
fn without_a_record_of_the_deploys_undo_says_what_to_do() {
    let (place, dispatcher, held) = stopped();
    let without = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with("deploys "));
        lines.map(|line| format!("{line}\n")).collect()
    };
    let dispatcher = after_a_crash(&place, dispatcher, without);
    assert_eq!(plain(&dispatcher.status()), ["2", "1", "1", "1"], "each keeps its process");
    let Outcome { code, text } = run(&dispatcher, &["rollout", "undo", "web"]);
    assert_eq!(code, 65, "{text}");
    assert!(text.contains("no restart of pool web is known"), "{text}");
    assert!(text.contains("dispatcher reload && dispatcher restart web"), "{text}");
    // That works, and the new generation is none of those that the processes have.
    write_config(
        place.path(),
        &std::fs::read_to_string(place.path().join("dispatcher.toml"))
            .unwrap()
            .lines()
            .skip(2)
            .map(|line| match line.strip_prefix("command = ") {
                Some(_) => format!("command = {}\n", good("blocking")),
                None => format!("{line}\n").replace("VERSION = \"2\"", "VERSION = \"3\""),
            })
            .collect::<String>(),
    );
    order(&dispatcher, &["reload"]);
    order(&dispatcher, &["restart", "web", "--wait"]);
    let status = dispatcher.status();
    assert_eq!(plain(&status), ["3"; 4]);
    assert!(processes(&status).generation > 2, "{:?}", processes(&status));
    drop(held);
}

#[test]
fn without_the_former_command_undo_says_what_to_do() {
    let (place, dispatcher, held) = stopped();
    let without = |text: &str| {
        let lines = text.lines().map(|line| match line.strip_prefix("deploys ") {
            Some(json) => {
                let mut json: serde_json::Value = serde_json::from_str(json).unwrap();
                json["versions"].as_object_mut().unwrap().remove("1");
                format!("deploys {json}\n")
            }
            None => format!("{line}\n"),
        });
        lines.collect()
    };
    let dispatcher = after_a_crash(&place, dispatcher, without);
    let Outcome { code, text } = run(&dispatcher, &["rollout", "status", "web"]);
    assert!(code == 70 && text.contains(REASON), "{text}");
    let Outcome { code, text } = run(&dispatcher, &["rollout", "undo", "web"]);
    assert_eq!(code, 65, "{text}");
    assert!(text.contains("the command of generation 1 is not known"), "{text}");
    assert!(text.contains("put it into the configuration again, then: "), "{text}");
    drop(held);
}

#[test]
fn a_roll_whose_command_is_lost_is_interrupted_and_says_so() {
    let address = free_address();
    let place = Place::new(&serving(address, &good("blocking"), &version("1", "")));
    let next = serving(address, &gated(), &version("2", ""));
    let (dispatcher, mut held) = begin(&place, address, &next);
    open_gate(&place, 1);
    order(&dispatcher, &["restart", "web"]);
    dispatcher.wait_status("one step", |status| steps(status) == Some(1));
    let without = |text: &str| {
        let lines = text.lines().map(|line| match line.strip_prefix("deploys ") {
            Some(json) => {
                let mut json: serde_json::Value = serde_json::from_str(json).unwrap();
                json["versions"].as_object_mut().unwrap().remove("2");
                format!("deploys {json}\n")
            }
            None => format!("{line}\n"),
        });
        lines.collect()
    };
    let dispatcher = after_a_crash(&place, dispatcher, without);
    let Outcome { code, text } = run(&dispatcher, &["rollout", "status", "web"]);
    assert_eq!(code, 70, "{text}");
    assert!(text.contains("it was interrupted: the dispatcher was started again"), "{text}");
    assert_eq!(plain(&dispatcher.status()).len(), 4);
    held.iter_mut().for_each(|client| client.echo("still there"));
    (1..=4).for_each(|number| open_gate(&place, number));
    order(&dispatcher, &["restart", "web", "--wait"]);
    assert_eq!(plain(&dispatcher.status()), ["2"; 4]);
}

#[test]
fn garbage_in_the_journal_is_no_obstacle() {
    let (place, dispatcher, held) = stopped();
    let broken = |text: &str| text.replace("\"versions\"", "\"verXions\"");
    let dispatcher = after_a_crash(&place, dispatcher, broken);
    assert_eq!(plain(&dispatcher.status()), ["2", "1", "1", "1"]);
    let Outcome { code, text } = run(&dispatcher, &["rollout", "undo", "web"]);
    assert!(code == 65 && text.contains("no restart of pool web is known"), "{text}");
    drop(held);
}
