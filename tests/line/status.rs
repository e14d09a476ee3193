//! The status of line workers: acl's document, `dispatcher status`, metrics.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use test_support::*;

use super::worker::*;

/// A request with a header `Accept`; the head and the body of the answer.
fn get(dispatcher: &Dispatcher, path: &str, accept: &str) -> (String, String) {
    let mut stream = UnixStream::connect(dispatcher.admin()).unwrap();
    let close = "Connection: close";
    write!(stream, "GET {path} HTTP/1.1\r\nHost: d\r\nAccept: {accept}\r\n{close}\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_ascii_lowercase(), body.to_owned())
}

#[test]
fn the_status_document_is_that_of_acl() {
    let (dispatcher, address) = start("");
    let empty: serde_json::Value =
        serde_json::from_str(&get(&dispatcher, "/acl/status", "*/*").1).unwrap();
    assert_eq!(empty["server"], serde_json::json!([]));
    let worker = LineWorker::join(&dispatcher, 0, "chat", "chat-1");
    worker.write(
        "count=1&used=17&pid=9&type=chat&max_threads=8&curr_threads=4&busy_threads=2&qlen=3\r\n",
    );
    wait_until("the report", || {
        let status = dispatcher.status();
        worker_of(&status).line.as_ref().unwrap().qlen == Some(3)
    });
    wait_load(&dispatcher, "chat-1", 1);
    let client = connect(address);
    wait_load(&dispatcher, "chat-1", 2);

    let (head, body) = get(&dispatcher, "/acl/status", "*/*");
    assert!(head.contains("content-type: application/json"), "{head}");
    let document: serde_json::Value = serde_json::from_str(&body).unwrap();
    let server = serde_json::json!([{
        "conns": 2, "used": 17, "pid": std::process::id(), "max_threads": 8, "curr_threads": 4,
        "busy_threads": 2, "qlen": 3, "type": "chat",
    }]);
    assert_eq!(document["server"], server);
    assert_eq!((&document["conns"], &document["used"]), (&2.into(), &17.into()));
    assert_eq!(document["addr"], address.to_string());
    document["load"].as_str().unwrap().parse::<f64>().expect("a load average");

    for (path, accept) in [("/acl/status?format=xml", "*/*"), ("/acl/status", "application/xml")] {
        let (head, body) = get(&dispatcher, path, accept);
        assert!(head.contains("content-type: text/xml"), "{head}");
        assert!(body.starts_with("<?xml version=\"1.0\"?><server conns=\"2\" "), "{body}");
        assert!(body.contains("<type>chat</type></proc></server>"), "{body}");
    }
    let (head, body) = get(&dispatcher, "/acl/status?format=yaml", "*/*");
    assert!(head.starts_with("http/1.1 400") && body.contains("json, xml"), "{head} {body}");
    drop(client);
}

#[test]
fn commands_and_metrics_show_line_workers() {
    let (dispatcher, _) = start("");
    let _worker = LineWorker::join(&dispatcher, 0, "chat", "chat-1");
    let mut command = Command::new(dispatcher_bin());
    let output = command.args(["status", "--admin"]).arg(dispatcher.admin()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("active line"), "{text}");
    let exact = dispatcher.status().line.unwrap().exact;
    assert_eq!(text.contains("line protocol: loads exact"), exact, "{text}");
    assert_eq!(dispatcher.metric("dispatcher_line_workers"), 1.0);
    assert_eq!(dispatcher.metric("dispatcher_line_loads_exact"), f64::from(u8::from(exact)));
    assert_eq!(dispatcher.metric("dispatcher_connections_returned_total"), 0.0);
}

#[test]
fn without_a_line_socket_nothing_of_it_exists() {
    let (dispatcher, _) = start_one_pool("");
    let threads = std::fs::read_dir(format!("/proc/{}/task", dispatcher.process.pid())).unwrap();
    for thread in threads {
        let name = std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap();
        assert_ne!(name.trim(), "line");
    }
    assert!(dispatcher.status().line.is_none());
    let (_, metrics) = http_get(&dispatcher.admin(), "/metrics").unwrap();
    assert!(!metrics.contains("dispatcher_line_"), "{metrics}");
}
