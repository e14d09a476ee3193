//! The part of the page that shows generations and rolls.

use dispatcher::api::status::{LeavingStatus, RollStatus};

use super::*;

/// The row of the only pool with processes: generation, last restart, leaving.
fn row(browser: &mut Browser) -> Option<[String; 3]> {
    let mut rows = cells(browser, "deploys");
    let row = rows.pop()?;
    assert!(rows.is_empty());
    let [_, generation, roll, leaving] = <[String; 4]>::try_from(row).unwrap();
    Some([generation, roll, leaving])
}

#[test]
fn generations_and_rolls_are_shown() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    let mut status = crowd(3);
    let hidden = "document.getElementById('deploys-section').hidden";
    pretend(&mut browser, &status);
    browser.wait_true("document.querySelectorAll('#workers > tr').length === 3");
    assert_eq!(browser.value(hidden), true, "no pool has processes");

    let mut show = |browser: &mut Browser, processes: &ProcessesStatus, said: [&str; 3]| {
        status.pools[0].processes = Some(processes.clone());
        pretend(browser, &status);
        let mut last = None;
        wait_until(&format!("{said:?}"), || {
            last = row(browser);
            last.as_ref().is_some_and(|row| row == &said)
        });
    };
    let mut processes = ProcessesStatus { wanted: 3, generation: 1, ..ProcessesStatus::default() };
    show(&mut browser, &processes, ["1", "○ none", "–"]);
    assert_eq!(browser.value(hidden), false);
    processes.restart_needed = true;
    let hint = "○ none The configuration has other settings: a restart applies them.";
    show(&mut browser, &processes, ["1", hint, "–"]);
    processes.restart_needed = false;

    let mut roll = RollStatus {
        generation: 2,
        former: 1,
        state: "progressing".to_owned(),
        replaced: 1,
        remaining: 2,
        seconds: 75,
        ..RollStatus::default()
    };
    processes.roll = Some(roll.clone());
    processes.leaving_generations =
        vec![LeavingStatus { generation: 1, processes: 2, connections: 1200 }];
    let said = "◐ progressing from generation 1 to 2: 1 of 3 replaced, begun 1 min 15 s ago";
    let leaving = "generation 1: 1,200 connections at 2 workers";
    show(&mut browser, &processes, ["1", said, leaving]);
    assert!(cells(&mut browser, "pools")[0][3].contains("3 processes wanted, 1 of 3 replaced"));

    // What a process wrote or did is only ever text.
    (roll.state, roll.reason) = ("stopped".to_owned(), Some(format!("it said {HOSTILE}")));
    roll.process = Some(3);
    processes.roll = Some(roll.clone());
    processes.leaving_generations = vec![
        LeavingStatus { generation: 1, processes: 1, connections: 1 },
        LeavingStatus { generation: 2, processes: 3, connections: 0 },
    ];
    let said = format!(
        "▲ stopped process 3 from generation 1 to 2: 1 of 3 replaced, begun 1 min 15 s ago. it said {HOSTILE}"
    );
    let leaving =
        "generation 1: 1 connection at 1 worker; generation 2: 0 connections at 3 workers";
    show(&mut browser, &processes, ["1", &said, leaving]);

    (roll.state, roll.undo, roll.process) = ("done".to_owned(), true, None);
    roll.reason = Some("it crashed".to_owned());
    processes.roll = Some(roll);
    processes.leaving_generations.clear();
    let said = "● done back from generation 1 to 2: 1 of 3 replaced, begun 1 min 15 s ago. The \
                restart before it stopped: it crashed";
    show(&mut browser, &processes, ["1", said, "–"]);
    assert_eq!(browser.value("document.images.length"), 0);
    assert_eq!(browser.complaints, [] as [Value; 0]);
}

#[test]
fn a_real_roll_is_followed() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let keys = format!(
        "[pool.web.spawn]\nprocesses = 2\ncommand = [{:?}, \"blocking\"]",
        example("test-worker")
    );
    let (dispatcher, address) = start_one_pool(&keys);
    dispatcher.wait_joined("web", 2);
    let mut old: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    let door = Door::open(dispatcher.admin());
    browser.open(&door.url);
    wait_until("the first generation", || {
        row(&mut browser) == Some(["1", "○ none", "–"].map(str::to_owned))
    });
    let mut cli = std::process::Command::new(dispatcher_bin());
    cli.args(["restart", "web", "--wait", "--admin"]).arg(dispatcher.admin());
    assert!(cli.output().unwrap().status.success());
    wait_until("the second one", || {
        row(&mut browser).is_some_and(|[generation, roll, leaving]| {
            generation == "2"
                && roll.starts_with("● done from generation 1 to 2: 2 of 2 replaced, begun ")
                && leaving == "generation 1: 4 connections at 2 workers"
        })
    });
    old.iter_mut().for_each(|client| client.echo("still there"));
    old.into_iter().for_each(Client::finish);
    wait_until("the end of the first one", || {
        row(&mut browser).is_some_and(|[_, _, leaving]| leaving == "–")
    });
    assert_eq!(browser.complaints, [] as [Value; 0]);
}
