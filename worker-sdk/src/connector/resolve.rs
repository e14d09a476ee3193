//! Looking up host names with a time limit.
//!
//! The system's resolver blocks for as long as its servers are silent. So a look-up runs on a
//! thread of its own, which may outlive the wait for it; their number is bounded.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Instant;

/// The most look-ups under way in the process. Further ones fail until one of them ends.
const MOST: usize = 64;

static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// Resolves a host and a port.
pub(super) type Resolver = dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// The resolver of the system.
pub(super) fn system(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

struct UnderWay;

impl Drop for UnderWay {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Begins a look-up; `done` gets the result, on another thread. If the resolver panics, `done` is
/// dropped.
pub(super) fn begin(
    resolver: &Arc<Resolver>,
    host: &str,
    port: u16,
    done: impl FnOnce(io::Result<Vec<SocketAddr>>) + Send + 'static,
) -> io::Result<()> {
    let before = UNDER_WAY.fetch_add(1, Ordering::SeqCst);
    let under_way = UnderWay;
    if before >= MOST {
        let problem = format!("{MOST} look-ups of host names are under way without an answer");
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, problem));
    }
    let (resolver, host) = (Arc::clone(resolver), host.to_owned());
    let look_up = move || {
        let result = resolver(&host, port);
        // Before the result, so that the next look-up finds room.
        drop(under_way);
        done(result.map_err(|error| described(&host, &error)));
    };
    thread::Builder::new().name("name-lookup".to_owned()).spawn(look_up).map(drop)
}

fn described(host: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot resolve {host}: {error}"))
}

/// The error of a look-up without an answer in time.
pub(super) fn timed_out(host: &str) -> io::Error {
    let problem = format!("cannot resolve {host}: the resolver did not answer in time");
    io::Error::new(io::ErrorKind::TimedOut, problem)
}

/// Waits for a look-up until `deadline`.
pub(super) fn wait(
    resolver: &Arc<Resolver>,
    host: &str,
    port: u16,
    deadline: Instant,
) -> io::Result<Vec<SocketAddr>> {
    let (sender, receiver) = sync_channel(1);
    begin(resolver, host, port, move |result| drop(sender.send(result)))?;
    let left = deadline.saturating_duration_since(Instant::now());
    receiver.recv_timeout(left).unwrap_or_else(|_| Err(timed_out(host)))
}

#[test]
fn a_resolver_that_hangs_costs_its_time_limit_and_the_number_of_look_ups_is_bounded() {
    use std::sync::Mutex;
    use std::time::Duration;

    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().unwrap();
    let waiting = Arc::clone(&gate);
    let hangs: Arc<Resolver> = Arc::new(move |_: &str, _| {
        drop(waiting.lock());
        Ok(Vec::new())
    });
    let limit = Instant::now() + Duration::from_millis(20);
    let error = wait(&hangs, "h.example", 80, limit).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(error.to_string().contains("h.example"), "{error}");
    let mut refused = None;
    for _ in 0..MOST {
        refused = begin(&hangs, "h.example", 80, drop).err().or(refused);
    }
    assert_eq!(refused.unwrap().kind(), io::ErrorKind::ResourceBusy);
    drop(closed);
    let deadline = Instant::now() + Duration::from_secs(60);
    let answers: Arc<Resolver> = Arc::new(|_: &str, port| Ok(vec![([127, 0, 0, 1], port).into()]));
    while wait(&answers, "h.example", 80, deadline).is_err() {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
}
