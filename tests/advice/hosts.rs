//! Hosts for these tests: dispatchers at loopback addresses of their own, and peers of a test.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use dispatcher::api::advice::{
    AddressRecord, AddressesAnswer, AdviceAnswer, AdviceStatus, BestAnswer,
};
use serde_json::Value;
use test_support::*;

/// A free address at a loopback address that no other test uses.
///
/// It is free only until something binds it, so its port is none that the kernel chooses: the
/// listeners of other hosts have those.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // The last byte is never 0.
        let [_, a, b, c] = (std::process::id() * 16 + 1 + number % 15).to_be_bytes();
        // Other tests use 127.0.x.x, and addresses with the highest bit set.
        let ip = Ipv4Addr::from([127, (a & 0x3f) | 0x40, b, c]);
        let port = 10_000 + u16::try_from(number / 15 % 10_000).unwrap();
        if let Ok(listener) = TcpListener::bind((ip, port)) {
            return listener.local_addr().unwrap();
        }
    }
}

/// A dispatcher with advice, and its workers.
pub struct Host {
    pub dispatcher: Dispatcher,
    pub advice: SocketAddr,
    pub workers: Vec<Process>,
    temp: tempfile::TempDir,
}

/// The tables of advice with these peers.
pub fn advice(listen: SocketAddr, keys: &str, peers: &[SocketAddr]) -> String {
    let peers = peers.iter().map(|peer| format!("[[advice_peer]]\naddress = \"{peer}\"\n"));
    let peers: String = peers.collect();
    format!("advice_listen = \"{listen}\"\n[advice]\n{keys}\n{peers}")
}

/// A configuration with one pool at the address of `listen`.
pub fn one_host(listen: SocketAddr, keys: &str, peers: &[SocketAddr], pool: &str) -> String {
    let web = one_pool(pool).replace("127.0.0.1", &listen.ip().to_string());
    format!("{}{web}", advice(listen, keys, peers))
}

impl Host {
    /// A dispatcher with one pool of `workers` workers.
    pub fn start(listen: SocketAddr, keys: &str, peers: &[SocketAddr], workers: usize) -> Host {
        Host::start_with(&one_host(listen, keys, peers, ""), listen, workers)
    }

    pub fn start_with(body: &str, advice: SocketAddr, workers: usize) -> Host {
        let temp = configure(body);
        let dispatcher = Dispatcher::start_in(temp.path());
        let workers = match workers {
            0 => Vec::new(),
            count => dispatcher.workers("tokio", "web", count),
        };
        let host = Host { dispatcher, advice, workers, temp };
        // With an interval, figures from before the workers joined are used until the next one.
        if !host.workers.is_empty() && !body.contains("mode = \"fresh\"") {
            host.dispatcher.wait_status("the workers to be known to advice", |status| {
                let advice = status.advice.as_ref().expect("advice in the status");
                let pool = advice.pools.iter().find(|pool| pool.pool == "web");
                pool.is_some_and(|pool| pool.addresses.iter().any(|one| one.state == "ok"))
                    || pool.is_some_and(|pool| pool.addresses.is_empty())
            });
        }
        host
    }

    pub fn kill(&mut self) {
        self.dispatcher.process.kill();
    }

    pub fn start_again(&mut self) {
        self.dispatcher = Dispatcher::start_in(self.temp.path());
    }

    pub fn web(&self) -> SocketAddr {
        self.dispatcher.address("web")
    }

    pub fn best(&self) -> BestAnswer {
        let (code, body) = ask(self.advice, "/v1/pools/web/best");
        assert_eq!(code, 200, "{body}");
        serde_json::from_value(body).unwrap()
    }

    pub fn addresses(&self, query: &str) -> AddressesAnswer {
        let (code, body) = ask(self.advice, &format!("/v1/pools/web/addresses{query}"));
        assert_eq!(code, 200, "{body}");
        serde_json::from_value(body).unwrap()
    }

    /// All addresses, without counting an advice.
    pub fn view(&self) -> Vec<AddressRecord> {
        let (code, body) = http_get(&self.dispatcher.admin(), "/v1/pools/web/advice").unwrap();
        assert_eq!(code, 200, "{body}");
        let answer: AdviceAnswer = serde_json::from_str(&body).unwrap();
        answer.addresses
    }

    pub fn status(&self) -> AdviceStatus {
        self.dispatcher.status().advice.expect("advice in the status")
    }

    /// Waits until the usable addresses are these, in any order.
    pub fn wait_addresses(&self, wanted: &[SocketAddr]) {
        let mut wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
        wanted.sort();
        wait_until(&format!("{wanted:?} to be advised"), || {
            let usable = self.view().into_iter().filter(|one| one.state == "ok");
            let mut known: Vec<String> = usable.map(|one| one.address).collect();
            known.sort();
            known == wanted
        });
    }

    /// Waits until the peer has this state.
    pub fn wait_peer(&self, peer: SocketAddr, state: &str) {
        let what = format!("peer {peer} to be {state}");
        self.dispatcher.wait_status(&what, |status| {
            let advice = status.advice.as_ref().unwrap();
            let peer = advice.peers.iter().find(|known| known.address == peer.to_string());
            peer.is_some_and(|peer| peer.state == state)
        });
    }
}

/// One request; the status code and the JSON.
pub fn ask(address: SocketAddr, path: &str) -> (u16, Value) {
    let (code, _, body) = request(address, &format!("GET {path} HTTP/1.1"));
    let json = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body:?}"));
    (code, json)
}

/// One request with this first line; status code, head and body.
pub fn request(address: SocketAddr, line: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "{line}\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (code, head.to_ascii_lowercase(), body.to_owned())
}

/// A peer that answers each question with `answer`, in a thread of its own.
pub struct FakePeer {
    pub address: SocketAddr,
    /// Questions that have arrived, and those whose answer has ended.
    pub asked: Arc<AtomicUsize>,
    pub over: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakePeer {
    /// `answer` gets the connection after the question was read.
    pub fn start(answer: impl Fn(&mut TcpStream) + Clone + Send + 'static) -> FakePeer {
        let address = free_address();
        let listener = TcpListener::bind(address).unwrap();
        let (asked, over, end) = <(Arc<AtomicUsize>, Arc<AtomicUsize>, Arc<AtomicBool>)>::default();
        let counts = (Arc::clone(&asked), Arc::clone(&over), Arc::clone(&end));
        let thread = std::thread::spawn(move || {
            let (asked, over, end) = counts;
            for stream in listener.incoming() {
                if end.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                let (answer, asked, over) = (answer.clone(), asked.clone(), over.clone());
                std::thread::spawn(move || {
                    if read_head(&mut stream) {
                        asked.fetch_add(1, Ordering::SeqCst);
                        answer(&mut stream);
                        over.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        FakePeer { address, asked, over, end, thread: Some(thread) }
    }

    /// It takes questions, and never answers; it notices when the other side gives up.
    pub fn silent() -> FakePeer {
        FakePeer::start(|stream| _ = stream.read(&mut [0; 64]))
    }

    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    pub fn over(&self) -> usize {
        self.over.load(Ordering::SeqCst)
    }
}

impl Drop for FakePeer {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_head(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) if head.len() < 4096 => head.push(byte[0]),
            _ => return false,
        }
    }
    head.starts_with(b"GET /v1/own HTTP/1.1\r\n")
}

/// An answer with this body.
pub fn say(stream: &mut TcpStream, body: &str) {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json";
    let _ = write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
}

/// The figures of a peer with one address.
pub fn figures(address: &str, load: u64, weight: &str) -> String {
    format!(
        "{{\"instance\":\"fake\",\"pools\":[{{\"pool\":\"web\",\"servers\":[{{\"addresses\":[\"{address}\"],\
         \"state\":\"ok\",\"load\":{load},\"capacity\":null,\"weight\":{weight},\"age_ms\":0}}]}}]}}"
    )
}
