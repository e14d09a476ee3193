//! The directory's numbers over HTTP.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};

use test_support::{PATIENCE, dispatcher_bin, skip, wait_until};

use super::{Directory, id};

fn ask(address: SocketAddr, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn numbers(text: &str) -> BTreeMap<String, u64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.split_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

#[test]
fn prometheus_reads_what_the_command_shows() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let directory = Directory::start(&format!("metrics_listen = \"{free}\"\n"));
    let a = directory.relay("a");
    let _alice = a.register(&id("alice")).wait().unwrap();
    let get = "GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n";
    let (head, text) = ask(free, get);
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let over_http = numbers(&text);
    assert_eq!((over_http["dispatch_relay_ids"], over_http["dispatch_relay_members"]), (1, 1));
    assert_eq!(over_http["dispatch_relay_registered_total"], 1);

    let mut command = Command::new(dispatcher_bin());
    command.args(["relay", "stats", "--openmetrics", "--socket"]).arg(directory.socket());
    let shown = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let names = |numbers: BTreeMap<String, u64>| numbers.into_keys().collect::<Vec<_>>();
    assert_eq!(names(numbers(&shown)), names(over_http));

    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
        ("\r\n\r\n", "405"),
    ] {
        let (head, _) = ask(free, request);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {head}");
    }
    // Clients that say nothing take no more than their places, for a while.
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(free).unwrap()).collect();
    wait_until("too many to be closed", || {
        directory.count("scrapes_refused_total") >= 4 && a.is_joined()
    });
    drop(silent);
    wait_until("room again", || {
        let mut stream = TcpStream::connect(free).unwrap();
        let mut text = String::new();
        let asked =
            stream.write_all(get.as_bytes()).and_then(|()| stream.read_to_string(&mut text));
        asked.is_ok() && text.starts_with("HTTP/1.1 200 ")
    });

    if Command::new("promtool").arg("--version").output().is_err() {
        return skip("needs promtool, of Debian's package prometheus");
    }
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]);
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    // A remark of the linter is a failure as well.
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
}
