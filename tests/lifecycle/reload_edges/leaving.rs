//! Listeners that a reload removes: every connected client is served, and later clients are
//! refused.

use std::io::{BufRead, BufReader, ErrorKind};
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;

/// The outcomes of successive clients.
#[derive(Default)]
struct Outcomes {
    served: AtomicU32,
    refused: AtomicU32,
}

impl Outcomes {
    /// Connects again and again. Every connected client must be served.
    fn watch<S: Read>(&self, over: &AtomicBool, connect: impl Fn() -> std::io::Result<S>) {
        while !over.load(Ordering::SeqCst) {
            match connect() {
                Ok(stream) => {
                    let mut line = String::new();
                    let read = BufReader::new(stream).read_line(&mut line);
                    assert!(matches!(read, Ok(count) if count > 0), "{read:?}: {line:?}");
                    self.served.fetch_add(1, Ordering::SeqCst);
                }
                Err(error) => {
                    let refused = matches!(
                        error.kind(),
                        ErrorKind::ConnectionRefused
                            | ErrorKind::NotFound
                            | ErrorKind::TimedOut
                            | ErrorKind::WouldBlock
                            | ErrorKind::AddrNotAvailable
                    );
                    assert!(refused, "{error}");
                    self.refused.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
fn nobody_who_has_connected_is_reset() {
    let tcp = free_address();
    let with = one_pool("")
        + &listener("tcp", &tcp.to_string(), "web", "")
        + &listener("unix", "unix:DIR/ux.sock", "web", "");
    let dispatcher = Dispatcher::start(&with);
    let _workers = dispatcher.workers("tokio", "web", 2);
    let path = dispatcher.dir.join("ux.sock");
    let over = AtomicBool::new(false);
    let (by_tcp, by_unix) = (Outcomes::default(), Outcomes::default());
    std::thread::scope(|scope| {
        // A thread that fails ends the others, too.
        let _end = OnDrop(|| over.store(true, Ordering::SeqCst));
        for _ in 0..3 {
            scope.spawn(|| {
                let _end = OnDrop(|| over.store(true, Ordering::SeqCst));
                by_tcp
                    .watch(&over, || TcpStream::connect_timeout(&tcp, Duration::from_millis(200)));
            });
            scope.spawn(|| {
                let _end = OnDrop(|| over.store(true, Ordering::SeqCst));
                by_unix.watch(&over, || UnixStream::connect(&path));
            });
        }
        for round in 1..=40 {
            if over.load(Ordering::SeqCst) {
                break;
            }
            reload(&dispatcher, &one_pool(""));
            reload(&dispatcher, &with);
            // Clients can connect again each time.
            wait_until("more clients to be served", || {
                let served = [&by_tcp, &by_unix].map(|seen| seen.served.load(Ordering::SeqCst));
                over.load(Ordering::SeqCst) || served.iter().all(|&count| count >= round)
            });
        }
    });
    assert!(by_unix.refused.load(Ordering::SeqCst) > 0, "it was closed meanwhile");
    let status = dispatcher.status();
    assert_eq!(status.closed.values().sum::<u64>(), 0);
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn a_removed_listener_can_come_back_while_it_is_being_emptied() {
    let tcp = free_address();
    let with = one_pool("") + &listener("more", &tcp.to_string(), "web", "backlog = 64");
    let dispatcher = Dispatcher::start(&with);
    let waiting: Vec<TcpStream> = (0..3).map(|_| connect(tcp)).collect();
    reload(&dispatcher, &one_pool(""));
    assert_eq!(dispatcher.status().listeners.len(), 1);
    // A client that connects now is refused when the socket is closed.
    let refused = std::thread::spawn(move || TcpStream::connect(tcp).map_err(|e| e.kind()));
    assert_eq!(refused.join().unwrap().err(), Some(ErrorKind::ConnectionRefused));
    wait_for_log(&dispatcher, "event=listener_closed listener=more");
    // The same socket is used again at once, with the right options.
    reload(&dispatcher, &with);
    reload(&dispatcher, &one_pool(""));
    let done = reload(&dispatcher, &with.replace("backlog = 64", "backlog = 32"));
    assert_eq!(names(&done["added"]), ["listener more"]);
    assert_eq!(backlog(&listening_socket(&dispatcher, tcp)), 32);
    let late = connect(tcp);
    let _worker = dispatcher.workers("blocking", "web", 1);
    assert!(waiting.into_iter().all(|stream| served_by(stream) == "w0"));
    assert_eq!(served_by(late), "w0");
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

/// Resident memory, in KiB.
fn memory(pid: i32) -> u64 {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    let line = status.unwrap().lines().find(|line| line.starts_with("VmRSS:")).unwrap().to_owned();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn hundreds_of_reloads_leave_nothing_behind() {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let _workers = dispatcher.workers("blocking", "web", 1);
    let address = dispatcher.address("web");
    let mut client = Client::connect(address).unwrap();
    let rounds = |from: u32, to: u32| {
        for round in from..to {
            let pool = format!("pool{round}");
            let more = listener(&pool, &format!("unix:DIR/{}.sock", round % 3), &pool, "")
                + &listener(&format!("web{round}"), "127.0.0.1:0", "web", "")
                + &format!("[pool.{pool}]\nhistory = 100\n");
            let done = reload(&dispatcher, &(one_pool("") + &more));
            assert_eq!(names(&done["added"]).len(), 3, "{done}");
            assert_eq!(served_by(connect(dispatcher.address(&format!("web{round}")))), "w0");
        }
        reload(&dispatcher, &one_pool(""));
        wait_until("the last of them to be gone", || {
            let closed = dispatcher.log().matches("event=listener_closed").count();
            closed == 2 * to as usize
        });
    };
    rounds(0, 100);
    let pid = dispatcher.process.pid();
    let (memory_then, fds) = (memory(pid), dispatcher.fds());
    rounds(100, 400);
    let grown = memory(pid).saturating_sub(memory_then);
    assert!(grown < 512, "{grown} KiB in 300 reloads");
    assert!(dispatcher.fds() <= fds, "{} descriptors, {fds} before", dispatcher.fds());
    let status = dispatcher.status();
    assert_eq!((status.listeners.len(), status.pools.len(), status.taken), (1, 1, 401));
    client.echo("never noticed");
}
