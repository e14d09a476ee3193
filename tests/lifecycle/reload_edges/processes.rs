//! Processes of the dispatcher, in reloads and commands.

use std::time::Instant;

use super::*;

fn spawning(command: &str, keys: &str) -> String {
    one_pool(&format!("wait_for_worker = \"10m\"\n[pool.web.spawn]\ncommand = {command}\n{keys}\n"))
}

fn good() -> String {
    format!("[{:?}, \"blocking\"]", example("test-worker"))
}

#[test]
fn a_command_that_a_reload_corrects_is_started_at_once() {
    let dispatcher = Dispatcher::start(&spawning("[\"/nonexistent\"]", ""));
    let waiting = connect(dispatcher.address("web"));
    wait_for_log(&dispatcher, "event=process_restarting pool=web process=1 delay=6.4s");
    let began = Instant::now();
    reload(&dispatcher, &spawning(&good(), ""));
    assert_eq!(Client::greeted(waiting).unwrap().served_by, "web-1");
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}: it has waited for its turn");
}

#[test]
fn workers_that_are_wanted_again_are_resumed() {
    // They stay when they are drained.
    let stays = "processes = 4\nenvironment = { TEST_WORKER = \"stays\" }";
    let dispatcher = Dispatcher::start(&spawning(&good(), stays));
    dispatcher.wait_joined("web", 4);
    let scale = |to: &str| -> serde_json::Value {
        let output = run(&dispatcher, &["scale", "web", to, "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let counts = |answer: &serde_json::Value| {
        ["processes", "before", "active", "starting", "leaving"]
            .map(|key| answer[key].as_u64().unwrap())
    };
    assert_eq!(counts(&scale("1")), [1, 4, 1, 0, 3]);
    dispatcher.wait_status("three to drain", |status| {
        pool(status, "web").workers.iter().filter(|w| w.state == "draining").count() == 3
    });
    assert_eq!(counts(&scale("3")), [3, 1, 3, 0, 1]);
    // All three get connections and take them.
    let address = dispatcher.address("web");
    let clients: Vec<Client> = (0..6).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&clients).into_values().collect::<Vec<_>>(), [2, 2, 2]);
    assert_eq!(counts(&scale("+1")), [4, 3, 4, 0, 0]);
    let more = counts(&scale("5"));
    assert_eq!((more[2], more[3], more[4]), (4, 1, 0));
    dispatcher.wait_joined("web", 5);
}
