//! Worker ids are valid only together with the instance of their dispatcher.

use super::*;

/// A dispatcher that has had several workers, and a worker with a client.
fn with_a_past() -> (tempfile::TempDir, Dispatcher, Process, Client) {
    let temp = configure(&one_pool(""));
    let dispatcher = Dispatcher::start_in(temp.path());
    for _ in 0..3 {
        let mut worker = dispatcher.worker("blocking", "web", "before");
        dispatcher.wait_joined("web", 1);
        worker.kill();
        dispatcher.wait_status("it to be gone", |s| pool(s, "web").workers.is_empty());
    }
    let worker = dispatcher.worker_with("blocking", "web", "w1", &[("TEST_WORKER", "stays")]);
    dispatcher.wait_joined("web", 1);
    let client = Client::connect(dispatcher.address("web")).unwrap();
    (temp, dispatcher, worker, client)
}

#[test]
fn waiting_for_a_drain_fails_after_a_restart() {
    let (temp, mut dispatcher, _worker, mut client) = with_a_past();
    let instance = dispatcher.status().instance;
    assert_eq!(instance.len(), 16, "{instance}");
    let words = "0 of 1 worker drained, 1 connection left";
    let (wait, mut progress) = waits(&dispatcher, &["drain", "web/w1", "--wait"], words);
    dispatcher.process.kill();
    let again = Dispatcher::start_in(temp.path());
    again.wait_joined("web", 1);
    let mut said = String::new();
    progress.read_to_string(&mut said).unwrap();
    let output = wait.wait_with_output().unwrap();
    // The command saw either no dispatcher or another instance.
    assert!(matches!(output.status.code(), Some(65 | 69)), "{output:?}: {said}");
    let expected = ["was started again", "has ended"].iter().any(|how| {
        said.contains(&format!("the dispatcher {how} before it reported that these workers"))
    });
    assert!(expected && said.contains("web/w1"), "{said}");
    client.echo("it serves on");
}

#[test]
fn an_id_of_another_instance_is_refused() {
    let (temp, mut dispatcher, _worker, _client) = with_a_past();
    let status = dispatcher.status();
    let id = pool(&status, "web").workers[0].id;
    let whole = format!("{id}@{}", status.instance);
    let answer: Value =
        serde_json::from_str(&done(&dispatcher, &["drain", &whole, "--json"])).unwrap();
    assert_eq!(answer["instance"].as_str(), Some(status.instance.as_str()));
    done(&dispatcher, &["resume", &whole]);
    dispatcher.process.kill();
    let again = Dispatcher::start_in(temp.path());
    again.wait_joined("web", 1);
    let now = again.status().instance;
    assert_ne!(now, status.instance);
    for command in ["drain", "resume"] {
        let (code, words) = failed(&again, &[command, &whole]);
        assert_eq!(code, 65, "{words}");
        assert!(words.contains(&format!("as instance {now}")), "{words}");
    }
    assert_eq!(worker(&again.status(), "w1").unwrap().state, "active");
    let (_, body) = http_get(&again.admin(), "/v1/workers").unwrap();
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["instance"], now);
}
