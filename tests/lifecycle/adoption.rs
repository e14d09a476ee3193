//! Processes with `on_dispatcher_loss = "serve"` outlive the dispatcher, and the next one adopts
//! them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use dispatcher::api::status::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use test_support::*;

/// A directory whose processes are killed at the end of the test.
pub(super) struct Place(TempDir);

impl Place {
    pub(super) fn new(body: &str) -> Place {
        Place(configure(body))
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// The processes that were started with the socket of this directory in their environment.
    pub(super) fn processes(&self) -> BTreeSet<i32> {
        let socket = format!("DISPATCH_SOCKET={}", self.path().join("dispatch.sock").display());
        let has = |pid: &i32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|word| word == socket.as_bytes())
        };
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(has).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// A fixed address, so that clients find the next dispatcher.
pub(super) fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub(super) fn serving(address: SocketAddr, processes: u32, more: &str) -> String {
    let listener =
        format!("[[listener]]\nname = \"web\"\naddress = \"{address}\"\npool = \"web\"\n");
    let command = format!("command = [{:?}, \"blocking\"]", example("test-worker"));
    let spawn =
        format!("on_dispatcher_loss = \"serve\"\nprocesses = {processes}\n{command}\n{more}");
    format!("{listener}[pool.web]\nwait_for_worker = \"60s\"\n[pool.web.spawn]\n{spawn}\n")
}

pub(super) fn pids(status: &Status) -> BTreeSet<i32> {
    pool(status, "web").workers.iter().map(|worker| worker.pid).collect()
}

fn scale(dispatcher: &Dispatcher, processes: u32) {
    let mut command = std::process::Command::new(dispatcher_bin());
    command.args(["scale", "web", &processes.to_string(), "--admin"]).arg(dispatcher.admin());
    assert!(command.output().unwrap().status.success(), "{}", dispatcher.log());
}

pub(super) fn counts(status: &Status) -> (u32, u32, u32, u32) {
    let processes = pool(status, "web").processes.as_ref().expect("it starts processes");
    (processes.wanted, processes.active, processes.starting, processes.leaving)
}

#[test]
fn workers_of_a_killed_dispatcher_are_adopted_in_their_places() {
    // Workers of a killed dispatcher become children of this process, which reaps one of them.
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).unwrap();
    let address = free_address();
    let place = Place::new(&serving(address, 3, ""));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 3);
    let first = dispatcher.status();
    let names = |status: &Status| -> BTreeSet<(String, i32)> {
        pool(status, "web").workers.iter().map(|w| (w.name.clone(), w.pid)).collect()
    };
    let mut clients: Vec<Client> = (0..6).map(|_| Client::connect(address).unwrap()).collect();
    for round in 0..10 {
        dispatcher.process.kill();
        assert_eq!(place.processes(), pids(&first), "round {round}: they serve on");
        clients.iter_mut().for_each(|client| client.echo("without a dispatcher"));
        drop(dispatcher);
        dispatcher = Dispatcher::start_in(place.path());
        let status = dispatcher.wait_status("all to join again", |status| {
            assert!(place.processes().len() <= 3, "{}", dispatcher.log());
            counts(status) == (3, 3, 0, 0)
        });
        assert_eq!(names(&status), names(&first), "the same processes in the same places");
        let loads: u64 = pool(&status, "web").workers.iter().map(|worker| worker.load).sum();
        assert_eq!(loads, 6);
        clients.iter_mut().for_each(|client| client.echo("still there"));
    }
    let more = Client::connect(address).unwrap();
    assert!(pids(&first).contains(&more.pid));
    // The end of an adopted process is noticed, and the place is filled again.
    let victim = clients.pop().unwrap();
    kill(Pid::from_raw(victim.pid), Signal::SIGKILL).unwrap();
    nix::sys::wait::waitpid(Pid::from_raw(victim.pid), None).unwrap();
    let status = dispatcher.wait_status("a process in its place", |status| {
        counts(status) == (3, 3, 0, 0) && !pids(status).contains(&victim.pid)
    });
    assert_eq!(place.processes(), pids(&status));
    let line = format!("pid={} status=", victim.pid);
    let log = dispatcher.log();
    let ended = log.lines().find(|line| line.contains("event=process_ended")).unwrap();
    assert!(ended.contains(&line), "{ended}");
    // Linux 6.15 tells the status of a process that is not a child; before, only until it is
    // reaped.
    let (major, minor) = kernel();
    let known = ended.contains("signal 9 (SIGKILL)");
    assert!(known || (major, minor) < (6, 15) && ended.contains("unknown"), "{ended}");
    dispatcher.stop();
    wait_until("all processes to end", || place.processes().is_empty());
}

fn kernel() -> (u32, u32) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[test]
fn sigusr1_leaves_the_processes_and_sigterm_ends_them() {
    let address = free_address();
    let place = Place::new(&serving(address, 2, ""));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 2);
    let mut client = Client::connect(address).unwrap();
    let before = place.processes();
    dispatcher.process.signal(Signal::SIGUSR1);
    assert!(dispatcher.process.wait().success(), "{}", dispatcher.log());
    client.echo("alone");
    assert_eq!(place.processes(), before);
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_status("both to join again", |status| counts(status) == (2, 2, 0, 0));
    assert_eq!(place.processes(), before);
    client.echo("with the next one");
    // Its worker has stop_timeout for the connection.
    dispatcher.process.signal(Signal::SIGTERM);
    wait_for_log(&dispatcher, "event=stopping signal=SIGTERM");
    wait_until("the idle process to end", || place.processes().len() == 1);
    client.echo("in its own time");
    client.finish();
    assert!(dispatcher.process.wait().success(), "{}", dispatcher.log());
    assert_eq!(place.processes(), BTreeSet::new());
    assert!(!dispatcher.log().contains("event=processes_killed"), "{}", dispatcher.log());
}

#[test]
fn a_second_signal_ends_the_wait_for_processes() {
    let address = free_address();
    let place = Place::new(&serving(address, 1, "stop_timeout = \"10m\""));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 1);
    let mut client = Client::connect(address).unwrap();
    client.echo("before");
    dispatcher.process.signal(Signal::SIGTERM);
    wait_for_log(&dispatcher, "event=stopping signal=SIGTERM");
    client.echo("in its own time");
    dispatcher.process.signal(Signal::SIGTERM);
    assert!(dispatcher.process.wait().success(), "{}", dispatcher.log());
    assert_eq!(place.processes(), BTreeSet::new());
    assert!(dispatcher.log().contains("event=processes_killed count=1"), "{}", dispatcher.log());
}

#[test]
fn processes_that_were_surplus_for_a_while_are_adopted_active() {
    let address = free_address();
    // A worker that has ended its accepts for good cannot be resumed.
    let stays = "environment = { TEST_WORKER = \"stays\" }";
    let place = Place::new(&serving(address, 2, stays));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 2);
    // Their connections keep them from ending.
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    let before = place.processes();
    for (processes, expected) in [(1, (1, 1, 0, 1)), (2, (2, 2, 0, 0))] {
        scale(&dispatcher, processes);
        dispatcher.wait_status("the new number", |status| counts(status) == expected);
    }
    dispatcher.process.kill();
    drop(dispatcher);
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_status("both to join again", |status| {
        assert_eq!(place.processes(), before, "{}", dispatcher.log());
        counts(status) == (2, 2, 0, 0)
    });
    clients.iter_mut().for_each(|client| client.echo("still there"));
    drop(clients);
    dispatcher.stop();
}

#[test]
fn a_process_that_was_leaving_keeps_its_connections() {
    let address = free_address();
    let place = Place::new(&serving(address, 1, "stop_timeout = \"500ms\""));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 1);
    let mut client = Client::connect(address).unwrap();
    let mut command = std::process::Command::new(dispatcher_bin());
    command.args(["restart", "web", "--admin"]).arg(dispatcher.admin());
    assert!(command.output().unwrap().status.success(), "{}", dispatcher.log());
    dispatcher.wait_status("a replacement", |status| counts(status) == (1, 1, 0, 1));
    dispatcher.process.kill();
    drop(dispatcher);
    let mut dispatcher = Dispatcher::start_in(place.path());
    let begin = std::time::Instant::now();
    dispatcher.wait_status("more than stop_timeout", |status| {
        client.echo("still there");
        begin.elapsed() > Duration::from_secs(3) && counts(status) == (1, 1, 0, 1)
    });
    client.finish();
    dispatcher.wait_status("its end", |status| counts(status) == (1, 1, 0, 0));
    dispatcher.stop();
}

#[test]
fn a_journal_that_is_in_use_delays_neither_starts_nor_answers() {
    let address = free_address();
    let place = Place::new(&serving(address, 4, ""));
    let journal = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(place.path().join("dispatch.sock.processes"))
        .unwrap();
    rustix::fs::flock(&journal, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut dispatcher = Dispatcher::start_in(place.path());
    let begin = std::time::Instant::now();
    dispatcher.wait_joined("web", 4);
    // A wait for the lock before each start took 20 s.
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    let log = dispatcher.log();
    assert_eq!(log.matches("event=process_journal_not_opened").count(), 2, "{log}");
    dispatcher.stop();
}

#[test]
fn a_connection_that_lasts_longer_than_stop_timeout_is_ended() {
    let address = free_address();
    let place = Place::new(&serving(address, 1, "stop_timeout = \"1s\""));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 1);
    let mut client = Client::connect(address).unwrap();
    client.echo("before");
    assert!(dispatcher.stop().success(), "{}", dispatcher.log());
    assert_eq!(place.processes(), BTreeSet::new());
}

#[test]
fn processes_of_a_removed_pool_are_drained_and_ended() {
    let address = free_address();
    let place = Place::new(&serving(address, 2, ""));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 2);
    let mut client = Client::connect(address).unwrap();
    dispatcher.process.kill();
    drop(dispatcher);
    let other = "[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:0\"\npool = \"other\"\n";
    write_config(place.path(), &format!("{other}[pool.other]\n"));
    let mut dispatcher = Dispatcher::start_in(place.path());
    wait_until("the idle process to end", || place.processes().len() == 1);
    client.echo("drained");
    dispatcher.wait_status("the other one to be drained", |status| {
        status.pools.iter().any(|pool| pool.name == "web" && pool.workers[0].state == "draining")
    });
    client.finish();
    wait_until("the other one to end", || place.processes().is_empty());
    dispatcher.wait_status("the pool to vanish", |status| {
        status.pools.iter().all(|pool| pool.name == "other")
    });
    dispatcher.stop();
}

#[test]
fn a_dead_wrapper_leaves_no_second_server() {
    let address = free_address();
    let worker = example("test-worker");
    let script = format!("command = [\"sh\", \"-c\", \"{} blocking & wait\"]", worker.display());
    let body =
        serving(address, 1, "").replace(&format!("command = [{worker:?}, \"blocking\"]"), &script);
    let place = Place::new(&body);
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 1);
    let server = *pids(&dispatcher.status()).first().unwrap();
    let before = place.processes();
    let shell = *before.iter().find(|&&pid| pid != server).expect("a shell");
    // Adopted with its wrapper.
    dispatcher.process.kill();
    drop(dispatcher);
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_status("it to join again", |status| counts(status) == (1, 1, 0, 0));
    assert_eq!(place.processes(), before);
    // The wrapper ends while there is no dispatcher: its server is ended, and another one started.
    dispatcher.process.kill();
    kill(Pid::from_raw(shell), Signal::SIGKILL).unwrap();
    wait_until("the end of the wrapper", || !place.processes().contains(&shell));
    drop(dispatcher);
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_status("a new process", |status| {
        counts(status) == (1, 1, 0, 0) && !pids(status).contains(&server)
    });
    wait_until("the old server to end", || !place.processes().contains(&server));
    assert_eq!(place.processes().len(), 2, "one wrapper and one server");
    dispatcher.stop();
    assert_eq!(place.processes(), BTreeSet::new());
}

#[test]
fn a_crash_while_processes_are_replaced_leaves_no_surplus() {
    let address = free_address();
    let place = Place::new(&serving(address, 4, "max_age = \"1s\"\nmax_surge = 2"));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 4);
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    for _ in 0..4 {
        dispatcher.wait_status("a replacement", |status| {
            let processes = pool(status, "web").processes.as_ref().unwrap();
            processes.leaving > 0 || processes.replaced > 0
        });
        std::thread::sleep(Duration::from_millis(50));
        dispatcher.process.kill();
        drop(dispatcher);
        dispatcher = Dispatcher::start_in(place.path());
        dispatcher.wait_status("four active ones", |status| {
            assert!(place.processes().len() <= 4 + 2, "{}", dispatcher.log());
            counts(status).1 == 4
        });
        clients.iter_mut().for_each(|client| client.echo("it lasts"));
    }
    drop(clients);
    dispatcher.stop();
    wait_until("all processes to end", || place.processes().is_empty());
}
