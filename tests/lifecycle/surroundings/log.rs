//! The log: its selection, and how programs parse it.

use std::process::Command;

use test_support::*;

#[test]
fn a_mistake_in_the_filter_silences_nothing() {
    for (variable, mistake, level) in [
        ("warning", "`warning` is neither a level nor a target", "info"),
        ("verbose", "`verbose` is neither a level nor a target", "info"),
        ("shel=debug", "unknown target `shel`", "info"),
        ("event_loop=loud", "unknown level `loud`", "info"),
        ("debug,hiper=warn", "unknown target `hiper`", "debug"),
    ] {
        let temp = configure(&one_pool(""));
        let mut command = Command::new("env");
        command.arg(format!("DISPATCHER_LOG={variable}")).arg(dispatcher_bin());
        let dispatcher = Dispatcher::start_as(temp.path(), &mut command);
        wait_for_log(&dispatcher, "event=ready");
        let log = dispatcher.log();
        let line = log.lines().find(|line| line.contains("event=log_filter_ignored")).unwrap();
        assert!(line.contains("logger: ") && line.contains(mistake), "{line}");
        let (_, body) = http_get(&dispatcher.admin(), "/v1/log_level").unwrap();
        assert!(body.contains(level), "{variable}: {body}");
    }
}

/// Parses a line like a shell: pairs of a key and a value without its quotes.
fn pairs(line: &str) -> Vec<(String, String)> {
    let (_, text) = line.split_once(": ").unwrap();
    let mut words = vec![String::new()];
    let (mut quoted, mut characters) = (false, text.chars());
    while let Some(c) = characters.next() {
        match c {
            '"' => quoted = !quoted,
            '\\' => words.last_mut().unwrap().push(characters.next().expect("something escaped")),
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    assert!(!quoted, "a quote is not closed: {line}");
    let pair = |word: &String| {
        let (key, value) = word.split_once('=').unwrap_or_else(|| panic!("{word:?} in {line}"));
        (key.to_owned(), value.to_owned())
    };
    words.iter().map(pair).collect()
}

#[test]
fn names_with_quotes_can_be_read_back() {
    let (dispatcher, _) = start_one_pool("");
    let names = ["\"q", "a=b", "back\\slash", "it's", "größe"];
    for (count, name) in names.iter().enumerate() {
        let _worker = dispatcher.worker("blocking", "web", name);
        dispatcher.wait_joined("web", 1);
        drop(_worker);
        dispatcher.wait_status("it to be gone", |status| pool(status, "web").workers.is_empty());
        wait_until("its line", || {
            dispatcher.log().matches("event=worker_joined").count() == count + 1
        });
    }
    let log = dispatcher.log();
    for event in ["event=worker_joined", "event=worker_gone"] {
        wait_until(event, || dispatcher.log().matches(event).count() == names.len());
        let lines = log.lines().filter(|line| line.contains(event));
        for (line, name) in lines.zip(names) {
            let pairs = pairs(line);
            assert!(pairs.contains(&("name".to_owned(), name.to_owned())), "{line}");
            assert_eq!(pairs[0].0, "event");
        }
    }
}
