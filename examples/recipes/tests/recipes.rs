//! Every recipe behind a real dispatcher, with a real client.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod support;
#[path = "recipes/workers.rs"]
mod workers;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use support::{Server, dispatcher, free_port, tls_files};
use tokio_tungstenite::tungstenite;

fn ask(address: impl std::net::ToSocketAddrs, path: &str) -> std::io::Result<String> {
    let mut client = TcpStream::connect(address)?;
    client.set_read_timeout(Some(support::PATIENCE))?;
    write!(client, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn hyper_answers_and_ends_at_sigterm_and_when_drained() {
    let Some(mut dispatcher) = dispatcher() else { return };
    for end in ["SIGTERM", "drain"] {
        let mut server = Server::behind(&mut dispatcher, "hyper", &[]);
        let answer = ask(dispatcher.address(), "/question").unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("/question for 127.0.0.1:"));
        // An idle client, which must not delay the end.
        let mut idle = TcpStream::connect(dispatcher.address()).unwrap();
        write!(idle, "GET / HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
        idle.set_read_timeout(Some(support::PATIENCE)).unwrap();
        idle.read_exact(&mut [0; 12]).unwrap();
        match end {
            "SIGTERM" => server.signal(Signal::SIGTERM),
            _ => drop(dispatcher.command(&["drain", "--pool", "default"]).unwrap()),
        }
        assert!(server.wait().success());
        idle.read_to_end(&mut Vec::new()).unwrap();
    }
}

#[test]
fn hyper_serves_alone() {
    let port = free_port();
    let mut server = Server::alone("hyper", &[], port);
    let end = Instant::now() + support::PATIENCE;
    let answer = loop {
        match ask(("127.0.0.1", port), "/alone") {
            Ok(answer) => break answer,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(answer.contains("/alone for 127.0.0.1:"), "{answer}");
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success());
}

/// The messages and the method, as generated code would have them for a client.
#[derive(Clone, PartialEq, prost::Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
}

#[test]
fn tonic_answers_a_tonic_client() {
    let Some(mut dispatcher) = dispatcher() else { return };
    let mut server = Server::behind(&mut dispatcher, "grpc", &[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(async {
        let to = format!("http://{}", dispatcher.address());
        let channel = tonic::transport::Endpoint::new(to).unwrap().connect().await.unwrap();
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<Text, Text>::default();
        let path = "/example.Greeter/Greet".parse().unwrap();
        let request = tonic::Request::new(Text { text: "world".to_owned() });
        client.unary(request, path, codec).await.unwrap().into_inner().text
    });
    assert!(answer.starts_with("hello world at 127.0.0.1:"), "{answer}");
    // The client's connection ends with the client.
    drop(runtime);
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success());
}

/// A client that trusts the certificate of the recipes.
fn tls_client() -> (Arc<ClientConfig>, ServerName<'static>) {
    let mut roots = RootCertStore::empty();
    let [certificate, _] = tls_files();
    roots.add(CertificateDer::from(std::fs::read(certificate).unwrap())).unwrap();
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    (Arc::new(config), ServerName::try_from("a.example.test").unwrap())
}

fn over_tls(address: std::net::SocketAddr) {
    let (config, name) = tls_client();
    let session = ClientConnection::new(config, name).unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let mut stream = BufReader::new(StreamOwned::new(session, socket));
    for word in ["one", "two"] {
        writeln!(stream.get_mut(), "{word}").unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        assert_eq!(line, format!("you said {word}\n"));
    }
    stream.get_mut().conn.send_close_notify();
    stream.get_mut().flush().unwrap();
    // Reads to the end, including the peer's close_notify; a truncated stream would be an error.
    assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
}

#[test]
fn rustls_serves_blocking_and_on_tokio() {
    let Some(mut dispatcher) = dispatcher() else { return };
    for server in ["tls", "tokio-tls"] {
        let mut server = Server::behind(&mut dispatcher, server, &tls_files());
        over_tls(dispatcher.address());
        over_tls(dispatcher.address());
        dispatcher.command(&["drain", "--pool", "default"]).unwrap();
        assert!(server.wait().success());
    }
}

/// The connector of the SDK on several servers, for a client with TLS: the session is new, and the
/// connection below it comes from the connector.
#[test]
fn tls_works_on_top_of_the_connector() {
    use worker_sdk::connector::{Addresses, Connection, Connector, ConnectorConfig, Selection};

    let ports = [free_port(), free_port()];
    let mut servers = ports.map(|port| Some(Server::alone("tls", &tls_files(), port)));
    let addresses = Addresses::list(ports.map(|port| format!("127.0.0.1:{port}"))).unwrap();
    let config = ConnectorConfig::new(addresses)
        .selection(Selection::InOrder)
        .total_timeout(support::PATIENCE)
        .back_off(Duration::from_millis(10), Duration::from_millis(100))
        // Until the servers listen.
        .retry_forever(true);
    let connector = Connector::new(config).unwrap();
    let talk = |connection: Connection| {
        let (config, name) = tls_client();
        let session = ClientConnection::new(config, name).unwrap();
        let stream = connection.into_stream();
        stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
        let mut stream = BufReader::new(StreamOwned::new(session, stream));
        let mut line = String::new();
        writeln!(stream.get_mut(), "hello").unwrap();
        stream.read_line(&mut line).unwrap();
        assert_eq!(line, "you said hello\n");
        stream
    };
    let connection = connector.connect().unwrap();
    let (address, peer) = (connection.address().clone(), connection.peer());
    let mut stream = talk(connection);

    // Its server ends.
    let place = usize::from(peer.port() == ports[1]);
    drop(servers[place].take());
    assert!(!matches!(stream.read_line(&mut String::new()), Ok(1..)));
    let connection = connector.reconnect(&address, peer).unwrap();
    assert_eq!(connection.peer().port(), ports[1 - place]);
    talk(connection);
}

#[test]
fn tls_works_on_top_of_the_connector_for_tokio() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use worker_sdk::connector::{Addresses, ConnectorConfig, tokio::Connector};

    let port = free_port();
    let _server = Server::alone("tokio-tls", &tls_files(), port);
    let addresses = Addresses::list([format!("127.0.0.1:{port}")]).unwrap();
    let config = ConnectorConfig::new(addresses).retry_forever(true);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let connection = Connector::new(config).unwrap().connect().await.unwrap();
        let (config, name) = tls_client();
        // On the connection itself, which reads and writes like a stream.
        let connector = tokio_rustls::TlsConnector::from(config);
        let mut stream = connector.connect(name, connection).await.unwrap();
        stream.write_all(b"hello\n").await.unwrap();
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"you said hello\n");
    });
}

#[test]
fn websockets_echo_and_close_in_order_at_a_drain() {
    let Some(mut dispatcher) = dispatcher() else { return };
    let mut server = Server::behind(&mut dispatcher, "websocket", &[]);
    let socket = TcpStream::connect(dispatcher.address()).unwrap();
    socket.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let (mut client, _) = tungstenite::client("ws://test/", socket).unwrap();
    for text in ["one", "two"] {
        client.send(tungstenite::Message::text(text)).unwrap();
        assert_eq!(client.read().unwrap().into_text().unwrap(), text);
    }
    dispatcher.command(&["drain", "--pool", "default"]).unwrap();
    assert!(client.read().unwrap().is_close(), "a close frame, not a truncated stream");
    while client.read().is_ok() {}
    assert!(server.wait().success());
}

#[test]
fn at_sigterm_live_connections_continue_until_the_deadline() {
    let Some(mut dispatcher) = dispatcher() else { return };
    let mut server = Server::behind(&mut dispatcher, "sigterm", &[]);
    let connect = || {
        let client = TcpStream::connect(dispatcher.address()).unwrap();
        client.set_read_timeout(Some(support::PATIENCE)).unwrap();
        client
    };
    let echoed = |mut client: &TcpStream| {
        client.write_all(b"x").is_ok() && client.read(&mut [0]).is_ok_and(|count| count == 1)
    };
    let (short, long) = (connect(), connect());
    assert!(echoed(&short) && echoed(&long));
    let began = Instant::now();
    server.signal(Signal::SIGTERM);
    assert!(echoed(&short), "still served");
    drop(short);
    assert_eq!((&long).read(&mut [0]).unwrap(), 0, "ended");
    assert!(began.elapsed() >= Duration::from_millis(1900));
    assert!(server.wait().success());
    assert_eq!(server.output(), "ended 1\n");
}

#[test]
fn a_child_with_the_connection_as_its_stdio_is_served_fully() {
    let Some(mut dispatcher) = dispatcher() else { return };
    let script = "read line; sleep 0.1; echo \"$line for $REMOTE_ADDR\"; sleep 0.1; echo end";
    let mut server = Server::behind(&mut dispatcher, "inetd", &["sh", "-c", script]);
    let mut clients: Vec<_> =
        (0..16).map(|_| TcpStream::connect(dispatcher.address()).unwrap()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.set_read_timeout(Some(support::PATIENCE)).unwrap();
        writeln!(client, "answer {n}").unwrap();
    }
    for (n, client) in clients.iter_mut().enumerate() {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let address = client.local_addr().unwrap();
        assert_eq!(answer, format!("answer {n} for {address}\nend\n"));
    }
    dispatcher.command(&["drain", "--pool", "default"]).unwrap();
    assert!(server.wait().success());
}

#[test]
fn a_fork_serves_its_connection_to_the_end() {
    let Some(mut dispatcher) = dispatcher() else { return };
    let mut server = Server::behind(&mut dispatcher, "fork", &[]);
    let mut pids = std::collections::HashSet::new();
    for _ in 0..16 {
        let mut client = TcpStream::connect(dispatcher.address()).unwrap();
        client.set_read_timeout(Some(support::PATIENCE)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let words: Vec<_> = answer.split_whitespace().collect();
        let address = client.local_addr().unwrap().to_string();
        assert_eq!(words[2..], ["serves", &address], "{answer}");
        pids.insert(words[1].to_owned());
    }
    assert_eq!(pids.len(), 16, "each by another process");
    dispatcher.command(&["drain", "--pool", "default"]).unwrap();
    assert!(server.wait().success());
}
