//! Refused requests: the answer that the client reads.

use super::*;

#[test]
fn every_error_is_json() {
    let bench = Bench::new();
    let asked = |line: &str, more: &str| {
        let host = "Host: x\r\nConnection: close\r\n";
        let answer = bench.raw(&format!("{line} HTTP/1.1\r\n{host}{more}"));
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.contains("content-type: application/json"), "{line}: {head}");
        let body: serde_json::Value = serde_json::from_str(body).expect(line);
        assert!(body["error"].as_str().is_some_and(|text| !text.is_empty()), "{line}: {body}");
        (head[9..12].to_owned(), body["problem"].as_str().expect(line).to_owned())
    };
    let json = "Content-Type: application/json\r\nContent-Length: 3\r\n\r\n{]}";
    for (line, more, status, problem) in [
        ("GET /nope", "\r\n", "404", "not_found"),
        ("GET //", "\r\n", "404", "not_found"),
        ("GET /v1/pools/%ff", "\r\n", "400", "invalid"),
        ("GET /v1/pools/%ff/history", "\r\n", "400", "invalid"),
        ("GET /v1/workers/%ff", "\r\n", "400", "invalid"),
        ("GET /v1/workers/%C3%28", "\r\n", "400", "invalid"),
        ("GET /v1/pools/web/history?after=x", "\r\n", "400", "invalid"),
        ("GET /v1/pools/wep", "\r\n", "404", "not_found"),
        ("PUT /v1/status", "\r\n", "405", "method"),
        ("WHATEVER /metrics", "\r\n", "405", "method"),
        ("OPTIONS /", "\r\n", "405", "method"),
        ("GET /v1/status", "Content-Length: 65537\r\n\r\n", "413", "too_large"),
        ("POST /v1/workers", "Content-Length: 2\r\n\r\n{}", "415", "invalid"),
        ("POST /v1/workers", json, "400", "invalid"),
        ("POST /v1/reload", "Origin: http://evil.example\r\n\r\n", "403", "forbidden"),
    ] {
        let expected = (status.to_owned(), problem.to_owned());
        assert_eq!(asked(line, more), expected, "{line} {more}");
    }
    // Refusals of the HTTP library.
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(20_000));
    for (request, problem) in [
        ("what is this\r\n\r\n", "invalid"),
        ("GET /a b HTTP/9\r\n\r\n", "invalid"),
        (&long, "too_large"),
    ] {
        let answer = bench.raw(request);
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.1 4"), "{head}");
        assert!(head.contains("content-type: application/json"), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
        assert_eq!(body["problem"], problem);
    }
}

/// Closing a socket with unread bytes resets the connection, and the reset can overtake the answer.
#[test]
fn a_refusal_reaches_a_client_that_is_still_sending() {
    const MUCH: usize = 1024 * 1024;
    let bench = Bench::new();
    let much = "x".repeat(MUCH);
    let long_head = format!("GET /{much} HTTP/1.1\r\nHost: x\r\n\r\n");
    let long_field = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {much}\r\n\r\n");
    let no_request = format!("what is this\r\n\r\n{much}");
    let body = |line: &str, host: &str| {
        format!("{line} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {MUCH}\r\n\r\n{much}")
    };
    let chunked = format!(
        "POST /v1/workers HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n\
         {MUCH:x}\r\n{much}\r\n0\r\n\r\n"
    );
    for (request, status, problem) in [
        (long_head, "431", "too_large"),
        (long_field, "431", "too_large"),
        (no_request, "400", "invalid"),
        (body("GET /v1/status", "localhost"), "413", "too_large"),
        (body("POST /v1/reload", "evil.example"), "403", "forbidden"),
        (chunked, "413", "too_large"),
    ] {
        let what = request[..60].to_owned();
        let checked = |answer: String| {
            let (head, body) = answer.split_once("\r\n\r\n").expect(&what);
            let body: serde_json::Value = serde_json::from_str(body).expect(&what);
            (head[9..12].to_owned(), body["problem"].as_str().expect(&what).to_owned())
        };
        let expected = (status.to_owned(), problem.to_owned());
        assert_eq!(checked(bench.raw(&request)), expected, "{what}");
        // Over TCP only reads are allowed; this check comes first.
        let (head, _) = answer_over_tcp(bench.port, &request);
        assert!(head.starts_with("HTTP/1.1 4"), "{what}: {head}");
    }
}

/// Head and body of the answer; the body is JSON.
fn answer_over_tcp(port: u16, request: &str) -> (String, serde_json::Value) {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("no reset");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_owned(), serde_json::from_str(body).expect("JSON"))
}

#[test]
fn a_user_with_too_many_connections_gets_503() {
    let bench = Bench::new();
    let idle: Vec<UnixStream> =
        (0..client_limits::MOST_CONNECTIONS).map(|_| bench.open()).collect();
    // Connections are accepted in order, so this one is over the limit while the others exist.
    let request = format!(
        "POST /v1/workers HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{}",
        "x".repeat(9)
    );
    let answer = bench.raw(&request);
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("\"problem\":\"unavailable\""), "{answer}");
    let error = client::get(&bench.path(), "/healthz", PATIENCE).expect_err("too many");
    assert!(matches!(&error, ClientError::Busy(why) if why.contains("connections")), "{error}");
    drop(idle);
}

#[test]
fn a_slow_request_head_times_out() {
    let bench = Bench::new();
    let mut stream = bench.open();
    stream.write_all(b"GET /v1/st").expect("sent");
    let start = Instant::now();
    let mut rest = Vec::new();
    // Closed, with or without an answer.
    let _ = stream.read_to_end(&mut rest);
    assert!(start.elapsed() < PATIENCE, "it was waited for");
}
