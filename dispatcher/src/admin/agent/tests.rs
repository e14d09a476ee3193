//! The agent over real sockets, with a test in place of the event loop.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use dispatcher_core::PoolId;
use dispatcher_core::advice::{PoolLoad, ServerState};

use super::*;
use crate::admin::start;
use crate::config::Address;
use crate::listen::bind;
use crate::mailbox::loads::{DeferredLoads, OwnLoads, OwnPoolLoad};
use crate::mailbox::{Request, SideThread, TcpListeners};

const LONG: Duration = Duration::from_secs(30);

fn ask(address: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).expect("connected");
    stream.set_read_timeout(Some(LONG)).expect("a timeout");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer and its end");
    text
}

fn socket(pool: &str) -> Arc<AgentSocket> {
    let any = "127.0.0.1:0".parse().expect("an address");
    let listening = bind::listen_here(any).expect("a port");
    Arc::new(AgentSocket { pool: pool.to_owned(), configured: Address::Tcp(any), listening })
}

fn loads(pool: &str, answer: AgentAnswer) -> OwnLoads {
    let load = PoolLoad {
        pool: PoolId(0),
        name: pool.to_owned(),
        state: ServerState::Ok,
        answer,
        load: 0,
        capacity: 0,
        weight: 0.0,
        workers: Vec::new(),
        advertised: Vec::new(),
    };
    let pool =
        OwnPoolLoad { load, gauges: Vec::new(), advertised: Vec::new(), workers: Vec::new() };
    OwnLoads { pools: vec![pool], ..OwnLoads::default() }
}

/// A side thread whose event loop answers nothing by itself.
fn side() -> (tempfile::TempDir, SideThread, mpsc::Receiver<()>) {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(directory.path().join("admin.sock")).expect("a socket");
    let (wake, woken) = mpsc::channel();
    let wake = Arc::new(move || {
        // At the end of a test no loop is woken.
        let _ = wake.send(());
    });
    let side = start(listener, TcpListeners::default(), wake, false).expect("a side thread");
    (directory, side, woken)
}

#[test]
fn an_event_loop_that_hangs_or_has_ended_is_down() {
    let (_directory, mut side, woken) = side();
    let (web, other) = (socket("web"), socket("other"));
    side.agents.send_replace(vec![Arc::clone(&web), Arc::clone(&other)]);
    assert_eq!(ask(web.address()), "down # the dispatcher does not answer\n");
    // It answers again. A pool that it does not know is gone.
    let asking = std::thread::spawn({
        let (web, other) = (web.address().to_owned(), other.address().to_owned());
        move || (ask(&web), ask(&other))
    });
    let ready = AgentAnswer::Ready { percent: 75, max_connections: 300 };
    while !asking.is_finished() {
        let _ = woken.recv_timeout(Duration::from_millis(5));
        while let Some(request) = side.request() {
            if let Request::Loads(answer) = request {
                let deferred = DeferredLoads(Box::new(move || loads("web", ready)));
                let _ = answer.send(deferred);
            }
        }
    }
    let answers = asking.join().expect("answers");
    assert_eq!(answers.0, "ready up 75% maxconn:300\n");
    assert_eq!(answers.1, "down # the pool was removed\n");
    drop(std::mem::replace(&mut side.requests, mpsc::channel().1));
    // What was answered a moment ago is answered for that moment.
    let deadline = std::time::Instant::now() + LONG;
    while ask(web.address()) != "down # the dispatcher is stopping\n" {
        assert!(std::time::Instant::now() < deadline);
    }
    side.finish();
}

#[test]
fn sockets_come_and_go() {
    let (_directory, mut side, _woken) = side();
    drop(std::mem::replace(&mut side.requests, mpsc::channel().1));
    let (one, two) = (socket("web"), socket("web"));
    let first = one.address().to_owned();
    side.agents.send_replace(vec![one]);
    assert_eq!(ask(&first), "down # the dispatcher is stopping\n");
    side.agents.send_replace(vec![Arc::clone(&two)]);
    assert_eq!(ask(two.address()), "down # the dispatcher is stopping\n");
    // The side thread had the last descriptor of it.
    let deadline = std::time::Instant::now() + LONG;
    while std::net::TcpStream::connect(&first).is_ok() {
        assert!(std::time::Instant::now() < deadline, "it is still open");
    }
    side.finish();
}
