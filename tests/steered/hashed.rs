//! Machines without the kernel's programs: processes that inherit their listeners start all the
//! same, and the kernel's own hash spreads connections over them.

use std::collections::HashMap;
use std::fs::File;
use std::net::TcpStream;
use std::process::{Command, Stdio};

use dispatcher::api::status::Status;
use nix::sys::signal::Signal;
use test_support::{Dispatcher, Process, configure, dispatcher_bin, wait_for, wait_until};

use crate::edges::without_capabilities;
use crate::place::*;
use crate::shared::*;

const HASH: &str = "fallback = \"hash\"\nhandoff_timeout = \"60s\"\n";

/// As [`KEEPER`], but with SIGTERM it closes its listeners and finishes its connections.
const GRACEFUL: &str = r#"
import selectors, signal, socket, sys, os, time
told, clients = [], 0
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
time.sleep(0.3)
listeners = [socket.socket(fileno=int(sys.argv[2]) + n) for n in range(int(os.environ["LISTEN_FDS"]))]
poll = selectors.DefaultSelector()
for listener in listeners:
    listener.setblocking(False)
    poll.register(listener, selectors.EVENT_READ)
while not told or listeners or clients:
    if told and listeners:
        for listener in listeners:
            poll.unregister(listener)
            listener.close()
        listeners = []
        continue
    for key, _ in poll.select(0.02):
        if key.fileobj in listeners:
            try: client, _ = key.fileobj.accept()
            except BlockingIOError: continue
            clients += 1
            client.sendall(b"hello %d\n" % os.getpid())
            poll.register(client, selectors.EVENT_READ)
            continue
        try: data = key.fileobj.recv(4096)
        except OSError: data = b""
        if not data:
            clients -= 1
            poll.unregister(key.fileobj)
            key.fileobj.close()
"#;

/// A dispatcher that cannot load programs.
fn start(config: &str) -> Dispatcher {
    let folder = configure(config);
    let mut dispatcher = Dispatcher::start_as(folder.path(), &mut without_capabilities());
    dispatcher.keep(folder);
    dispatcher
}

fn can_start() -> bool {
    enter() && has(&["setpriv"])
}

/// Waits until each process has the load that is expected of it.
fn wait_loads_by_pid(dispatcher: &Dispatcher, expected: &HashMap<i32, u64>) -> Status {
    dispatcher.wait_status("the loads", |status| {
        let load = |pid| status.pools[0].workers.iter().find(|it| it.pid == pid).map(|it| it.load);
        expected.iter().all(|(&pid, &expected)| load(pid) == Some(expected))
    })
}

#[test]
fn processes_start_without_capabilities_and_are_counted() {
    if !can_start() {
        return;
    }
    let mut dispatcher = start(&heirs(3, HASH));
    let pool = ready(&dispatcher, 3);
    let steer = pool.steer.clone().unwrap();
    assert!(steer.hashed.as_ref().unwrap().contains("CAP_BPF"), "{steer:?}");
    assert!(!steer.attached && !steer.pinned);
    assert!(pool.workers.iter().all(|worker| worker.shown_kind() == "active hashed"));
    let fault = dispatcher.status().faults.into_iter().find(|fault| fault.kind == "steering");
    assert!(fault.unwrap().text.contains("hash"));
    let log = dispatcher.log();
    assert!(log.contains("event=steering_not_possible pool=web mode=hash error="), "{log}");

    let mut held: Vec<TcpStream> = (0..120).map(|_| dial()).collect();
    let mut loads: HashMap<i32, u64> = HashMap::new();
    for client in &mut held {
        *loads.entry(answer(client)).or_default() += 1;
    }
    assert_eq!(loads.len(), 3, "each process has clients: {loads:?}");
    let status = wait_loads_by_pid(&dispatcher, &loads);
    test_support::assert_conserved(&status);
    assert_eq!(taken(&status).iter().sum::<u64>(), 120);
    let text = command(&dispatcher, &["status"]);
    assert!(text.contains("steering of web: by the kernel's hash: "), "{text}");

    for (words, what) in [
        (&["drain", "web/web-1"][..], "drain"),
        (&["drain", "--pool", "web"][..], "drain"),
        (&["resume", "web/web-1"][..], "resume"),
        (&["weight", "web/web-1", "2"][..], "weight"),
        (&["explain", "web"][..], "explain"),
    ] {
        let text = refused(&dispatcher, words);
        for part in [what, "is not possible in pool web", "hash", "CAP_BPF", "doctor"] {
            assert!(text.contains(part), "{words:?}: {text}");
        }
    }
    drop(held);
    wait_loads(&dispatcher, &[0; 3]);
    let processes = processes_of(&dispatcher.status().pools[0]);
    assert!(dispatcher.stop().success());
    assert!(processes.iter().all(|&pid| !is_alive(pid)));
    assert!(TcpStream::connect(PUBLIC).is_err(), "no listener is left");
}

/// What waits in the queue of a killed process is served by the next one.
#[test]
fn the_queue_of_a_killed_process_waits_for_the_next_one() {
    if !can_start() {
        return;
    }
    let dispatcher = start(&heirs(2, HASH));
    ready(&dispatcher, 2);
    for _ in 0..2 {
        let killed = pid_of(&dispatcher, "web-2");
        signal(killed, Signal::SIGSTOP);
        let mut clients: Vec<TcpStream> = (0..60).map(|_| dial()).collect();
        dispatcher.wait_status("clients to wait", |status| {
            let killed = status.pools[0].workers.iter().find(|it| it.pid == killed);
            let queued = killed.and_then(|it| it.steer.as_ref()).map_or(0, |it| it.queued);
            let load: u64 = active(&status.pools[0]).iter().map(|(_, load)| load).sum();
            queued > 0 && load == 60
        });
        signal(killed, Signal::SIGKILL);
        assert!(clients.iter_mut().all(|client| answer(client) != killed));
        ready(&dispatcher, 2);
        drop(clients);
        wait_loads(&dispatcher, &[0; 2]);
    }
}

/// A rolling restart loses no client: the next process has the same queue.
#[test]
fn processes_are_replaced_without_losing_a_client() {
    if !can_start() {
        return;
    }
    let mut dispatcher = start(&heirs_with(2, HASH, (GRACEFUL, &[])));
    ready(&dispatcher, 2);
    let descriptors = descriptors_of(&dispatcher);
    let first = processes_of(&dispatcher.status().pools[0]);
    let load = Load::begin();
    command(&dispatcher, &["restart", "web", "--wait"]);
    wait_until("the former ones to end", || first.iter().all(|&pid| !is_alive(pid)));
    command(&dispatcher, &["scale", "web", "4"]);
    ready(&dispatcher, 4);
    load.end();
    command(&dispatcher, &["scale", "web", "2"]);
    dispatcher.wait_status("two to end", |status| status.pools[0].workers.len() == 2);
    // The listeners of the others are closed: no client goes there.
    let mut all: Vec<TcpStream> = (0..60).map(|_| dial()).collect();
    let left = processes_of(&dispatcher.status().pools[0]);
    assert!(all.iter_mut().all(|client| left.contains(&answer(client))));
    drop(all);
    wait_loads(&dispatcher, &[0; 2]);
    // The first number may have one of a request that was just answered.
    wait_until("its descriptors to be as before", || descriptors_of(&dispatcher) <= descriptors);
    assert!(dispatcher.stop().success());
    assert!(left.iter().all(|&pid| !is_alive(pid)));
}

/// The load of a process whose descriptors may not be read is unknown, not 0.
#[test]
fn what_cannot_be_counted_is_unknown() {
    if !can_start() {
        return;
    }
    let folder = configure(&format!("{}user = \"nobody\"\n", heirs(1, HASH)));
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-bpf,-net_admin,-sys_admin,-sys_ptrace", "--inh-caps=-all"]);
    let dispatcher = Dispatcher::start_as(folder.path(), command.arg(dispatcher_bin()));
    let status = dispatcher.wait_status("what is unknown", |status| {
        let workers = &status.pools[0].workers;
        workers.iter().any(|it| it.steer.as_ref().is_some_and(|it| it.not_counted.is_some()))
    });
    assert_eq!(status.pools[0].workers[0].shown_load(), "?");
    drop(connect());
    let text = crate::place::command(&dispatcher, &["status"]);
    assert!(text.contains("not counted: web/web-1: the sockets of "), "{text}");
    assert!(dispatcher.log().contains("event=worker_not_counted pool=web worker="));
}

/// `dispatcher serve` picks the best way that the machine allows, and says which.
#[test]
fn serve_starts_servers_that_inherit_a_listener_in_every_case() {
    if !can_start() {
        return;
    }
    let program = KEEPER.replace('{', "{{").replace('}', "}}");
    for (mut command, steers) in
        [(without_capabilities(), false), (Command::new(dispatcher_bin()), true)]
    {
        let dir = tempfile::tempdir().unwrap();
        let (out, log) = (dir.path().join("out"), dir.path().join("log"));
        let listen = PUBLIC.to_string();
        command.args(["serve", "--listen", &listen, "--workers", "2", "--name", "web", "--"]);
        command.args(["python3", "-c", &program, "fd", "{fd}"]).stdin(Stdio::null());
        command.env_remove("NOTIFY_SOCKET").env("XDG_RUNTIME_DIR", dir.path());
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&log).unwrap());
        let mut process = Process::start("serve", &mut command);
        let log = || std::fs::read_to_string(&log).unwrap();
        wait_for("a server", || {
            assert!(process.running(), "{}", log());
            try_connect().ok()
        });
        wait_until("what to try", || std::fs::read_to_string(&out).unwrap().contains(" scale "));
        let text = log();
        let hash = "starting on the kernel's hash: it spreads connections over 2 processes";
        let parts = match steers {
            true => &["steering: the kernel chooses among 2 processes"][..],
            false => &["CAP_BPF is missing", "sudo setcap cap_bpf,cap_net_admin+ep", hash][..],
        };
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert_eq!(text.contains(hash), !steers, "{text}");
        process.signal(Signal::SIGTERM);
        assert!(process.wait().success(), "{}", log());
        assert!(TcpStream::connect(PUBLIC).is_err(), "no listener is left");
    }
}

/// The next dispatcher takes over the processes. One that ends after its last connection has closed
/// its listener: it is replaced.
#[test]
fn processes_outlive_their_dispatcher() {
    if !can_start() {
        return;
    }
    let config = format!("{}on_dispatcher_loss = \"serve\"\n", heirs(2, HASH));
    let folder = configure(&config);
    let mut dispatcher = Dispatcher::start_as(folder.path(), &mut without_capabilities());
    ready(&dispatcher, 2);
    let (leaves, stays) = (pid_of(&dispatcher, "web-1"), pid_of(&dispatcher, "web-2"));
    dispatcher.process.kill();
    let mut held: Vec<TcpStream> = (0..40).map(|_| dial()).collect();
    held.retain_mut(|client| answer(client) == leaves);
    assert!(!held.is_empty());
    signal(leaves, Signal::SIGUSR1);
    wait_until("its listener to be closed", || sockets(leaves) == held.len());

    let mut dispatcher = Dispatcher::start_as(folder.path(), &mut without_capabilities());
    let pids = processes_of(&ready(&dispatcher, 2));
    assert!(pids.contains(&stays) && !pids.contains(&leaves), "{pids:?}: not {leaves}");
    assert!(dispatcher.log().contains("event=process_leaves pool=web worker=web/web-1"));
    assert!((0..20).all(|_| pids.contains(&answer(&mut dial()))));
    held.iter_mut().for_each(assert_open);
    assert!(dispatcher.stop().success());
    wait_until("all to end", || pids.iter().chain([&leaves]).all(|&pid| !is_alive(pid)));
}
