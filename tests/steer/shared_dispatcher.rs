//! Shared ports: dispatchers that end, and those that take over.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use dispatch_steer::{Error, Options, Steering, WorkerSettings};
use nix::sys::signal::Signal;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use test_support::{wait_for, wait_until};

use crate::lab::*;
use crate::shared_lab::*;

/// The listener that the process of a worker inherited.
fn listener_of(lab: &Lab, worker: u32) -> OwnedFd {
    let pid = rustix::process::Pid::from_child(&lab.servers[worker as usize].child);
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    // It is a shell first.
    wait_for("the process to have its listener", || {
        pidfd_getfd(&process, 3, PidfdGetfdFlags::empty()).ok()
    })
}

/// Connections at the server's side by process, when all are accepted.
fn shares(wanted: i64) -> BTreeMap<u32, i64> {
    let mut found = BTreeMap::new();
    wait_until("all to be accepted", || {
        found = sockets_by_process();
        !found.contains_key(&0) && found.values().sum::<i64>() == wanted
    });
    found
}

#[test]
fn without_a_dispatcher_the_kernel_spreads_alone() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    lab.steering().set_worker(1, draining).unwrap();
    let mut held: Vec<TcpStream> = (0..10).map(|_| connect(V4)).collect();
    assert_eq!(shares(10).len(), 1);
    lab.steering = None;
    held.extend((0..200).map(|_| connect(V4)));
    // By a hash of the addresses; settings do not matter any more.
    let found = shares(210);
    assert!(found.len() == 2 && found.values().all(|&many| many > 50), "{found:?}");
    // A worker that dies now leaves its queue to the other one.
    lab.signal(1, Signal::SIGSTOP);
    let mut waiting: Vec<TcpStream> = (0..40).map(|_| dial(V4)).collect();
    lab.slay(1);
    for client in &mut waiting {
        client.read_exact(&mut [0; 6]).unwrap();
    }
}

/// The next dispatcher takes over the listeners of so many workers, without pins.
fn take_over(lab: &mut Lab, workers: u32) {
    let cgroup = lab.home.as_ref().unwrap().path();
    let wait = Duration::ZERO;
    lab.steering = Some(Steering::load_shared(&Options { cgroup, wait }).unwrap());
    for worker in 0..workers {
        lab.steering().set_worker(worker, WorkerSettings::new(1)).unwrap();
        let listener = listener_of(lab, worker);
        lab.steering().take_listeners(worker, vec![listener]).unwrap();
    }
}

#[test]
fn the_next_dispatcher_takes_over_the_listeners() {
    let Some(mut lab) = Lab::sharing(3) else { return };
    let first: Vec<TcpStream> = (0..9).map(|_| connect(V4)).collect();
    lab.steering = None;
    let second: Vec<TcpStream> = (0..9).map(|_| connect(V4)).collect();
    // What waits in a queue during the change is not counted, and not lost.
    lab.signal(2, Signal::SIGSTOP);
    let mut waiting: Vec<TcpStream> = (0..30).map(|_| dial(V4)).collect();

    take_over(&mut lab, 3);
    let mut held: Vec<TcpStream> = (0..30).map(|_| dial(V4)).collect();
    eventually("new ones to be even", vec![10; 3], || lab.live());
    let queued = lab.steering().queue_len(2).unwrap();
    assert!(queued >= 10, "{queued}");
    lab.steering().evict(2).unwrap();
    for client in waiting.iter_mut().chain(&mut held) {
        client.read_exact(&mut [0; 6]).unwrap();
    }
    assert_eq!(lab.live(), [15, 15, 0], "only those that were counted are moved");
    assert_eq!(lab.steering().moves().unwrap().migrated, u64::from(queued));
    lab.steering().restore(2).unwrap();
    lab.signal(2, Signal::SIGCONT);
    held.extend((0..15).map(|_| connect(V4)));
    assert_eq!(lab.live(), [15; 3]);
    drop((first, second, waiting));
    lab.settled();
    drop(held);
    lab.empty();
}

/// A handshake that is under way when the listeners are taken over counts when it is complete.
#[test]
fn handshakes_of_a_takeover_count_once() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    lab.steering = None;
    for worker in 0..2 {
        drop(listener_of(&lab, worker));
        lab.signal(worker, Signal::SIGSTOP);
    }
    let waiting: Vec<TcpStream> = (0..10).map(|_| dial(V4)).collect();
    // The kernel completes a handshake only when data comes.
    let defer = "import socket\nsocket.socket(fileno=0).setsockopt(6, socket.TCP_DEFER_ACCEPT, 60)";
    for worker in 0..2 {
        let listener = Stdio::from(listener_of(&lab, worker));
        let mut python = Command::new("python3");
        assert!(python.args(["-c", defer]).stdin(listener).status().unwrap().success());
    }
    let mut under_way: Vec<TcpStream> = (0..10).map(|_| dial(V4)).collect();

    take_over(&mut lab, 2);
    assert_eq!(lab.live(), [0, 0]);
    under_way.iter_mut().for_each(|client| client.write_all(b"x").unwrap());
    eventually("them to count", 10, || lab.live().iter().sum::<i64>());
    for _ in 0..3 {
        assert_eq!(lab.steering().reconcile().unwrap(), []);
    }
    // They move with their counts, and what does not count moves without one.
    let queued = lab.steering().queue_len(0).unwrap();
    lab.steering().evict(0).unwrap();
    assert_eq!(lab.live(), [0, 10]);
    assert_eq!(lab.steering().moves().unwrap().migrated, u64::from(queued));
    for _ in 0..3 {
        assert_eq!(lab.steering().reconcile().unwrap(), []);
    }
    lab.signal(1, Signal::SIGCONT);
    drop((waiting, under_way));
    lab.steering().restore(0).unwrap();
    lab.signal(0, Signal::SIGCONT);
    lab.empty();
    assert_eq!(lab.steering().moves().unwrap().open, 0);
    // Nothing of them is remembered, also by the next process.
    let (_mounted, pins) = lab.pin();
    let map = Map::from_map_data(MapData::from_pin(pins.join("moved")).unwrap()).unwrap();
    assert_eq!(HashMap::<_, u64, u32>::try_from(&map).unwrap().keys().count(), 0);
}

#[test]
fn a_takeover_of_the_wrong_sockets_is_refused() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    let listener = listener_of(&lab, 0);
    let refused = lab.steering().take_listeners(1, vec![listener]).unwrap_err();
    assert!(refused.to_string().contains("another listener at 127.0.0.1:8000"), "{refused}");
    let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = lab.steering().take_listeners(1, vec![plain.into()]).unwrap_err();
    assert!(refused.to_string().contains("not a TCP listener of a shared port"), "{refused}");
    let listener = listener_of(&lab, 0);
    let refused = lab.steering().take_listeners(7, vec![listener]).unwrap_err();
    assert_eq!(refused.to_string(), "there is no worker 7: set it first");
    let refused = lab.steering().add_port(0, 9000).unwrap_err();
    assert!(refused.to_string().contains("share public ports"), "{refused}");
    let refused = lab.steering().open_listener(9, V4, BACKLOG).unwrap_err();
    assert_eq!(refused.to_string(), "there is no worker 9: set it first");
    let held: Vec<TcpStream> = (0..10).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [5, 5]);
    drop(held);
    lab.empty();

    // A cgroup without this process counts nothing.
    let options = Options { cgroup: lab.cgroup().into(), wait: Duration::ZERO };
    let mut other = Steering::load_shared(&options).unwrap();
    other.set_worker(0, WorkerSettings::new(1)).unwrap();
    let public = SocketAddr::new(V4.ip(), PUBLIC + 1);
    let refused = other.open_listener(0, public, BACKLOG).unwrap_err();
    assert!(refused.to_string().contains("give a cgroup that contains it"), "{refused}");
}

#[test]
fn the_kernel_goes_on_choosing_and_the_next_process_adopts() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    let (_mounted, pins) = lab.pin();
    let mut held: Vec<TcpStream> = (0..10).map(|_| connect(V4)).collect();
    lab.steering = None;
    held.extend((0..10).map(|_| connect(V4)));
    assert!(shares(20).values().all(|&many| many == 10), "the choice is exact without a process");
    // Without a sink, what would be dropped is reset.
    held.drain(..4);
    lab.steering = Some(Steering::adopt(&pins).unwrap());
    eventually("the counts to be right", 16, || lab.live().iter().sum());
    let again = lab.steering().open_listener(0, V4, BACKLOG).unwrap_err();
    assert!(again.to_string().contains("take it over"), "{again}");
    for worker in 0..2 {
        let listener = listener_of(&lab, worker);
        lab.steering().take_listeners(worker, vec![listener]).unwrap();
    }
    held.extend((0..14).map(|_| connect(V4)));
    assert_eq!(lab.live(), [15, 15]);
    lab.settled();
    // Queues move as before, counts included; and a new worker is added.
    lab.signal(0, Signal::SIGSTOP);
    let mut waiting: Vec<TcpStream> = (0..10).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![20; 2], || lab.live());
    lab.steering().evict(0).unwrap();
    for client in &mut waiting {
        client.read_exact(&mut [0; 6]).unwrap();
    }
    assert_eq!(lab.live(), [15, 25]);
    let third = lab.enlist();
    lab.inherit(third, HEIR, &[V4]);
    held.extend((0..25).map(|_| connect(V4)));
    assert_eq!(lab.live(), [15, 25, 25]);
    lab.steering().restore(0).unwrap();
    lab.signal(0, Signal::SIGCONT);
    // The sink works as before.
    for worker in 0..3 {
        let full = WorkerSettings { maximum: 1, ..WorkerSettings::new(1) };
        lab.steering().set_worker(worker, full).unwrap();
    }
    let client = std::thread::spawn(|| connect(V4));
    wait_until("a SYN to be dropped", || lab.steering().totals().unwrap().full > 0);
    drop((held, waiting));
    drop(client.join().unwrap());
    lab.empty();

    lab.steering.take().unwrap().detach().unwrap();
    assert!(!pins.exists());
    let held: Vec<TcpStream> = (0..100).map(|_| connect(V4)).collect();
    assert_eq!(shares(100).len(), 3, "the kernel chooses alone");
    drop(held);
}

#[test]
fn a_worker_cannot_change_the_program_of_its_group() {
    let Some(mut lab) = Lab::sharing(1) else { return };
    let code = r#"
import socket, sys, time
listener = socket.socket(fileno=3)
# SO_DETACH_REUSEPORT_BPF, SO_ATTACH_REUSEPORT_CBPF, SO_LOCK_FILTER
for option, value in ((68, bytes(4)), (51, bytes(16)), (44, bytes(4))):
    try: listener.setsockopt(socket.SOL_SOCKET, option, value)
    except PermissionError: print("not permitted", file=sys.stderr)
time.sleep(600)
"#;
    let hostile = lab.enlist();
    lab.inherit(hostile, code, &[V4]);
    wait_until("the worker to have tried", || {
        fs::read_to_string(lab.log_of(hostile)).unwrap() == "not permitted\n".repeat(3)
    });
    // The loader still can.
    lab.steering().attach_again().unwrap();
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    lab.steering().set_worker(hostile, draining).unwrap();
    let held: Vec<TcpStream> = (0..40).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [40, 0]);
    drop(held);
    lab.empty();
}

/// The variable that tells a test below that it is the dispatcher; its value is the cgroup.
const INNER: &str = "STEER_TEST_SHARED";

/// Runs a test of this file in a process of its own, as an ordinary user with two capabilities.
fn dispatcher(lab: &Lab, name: &str) -> Child {
    let script = "echo 0 > \"$0\"/cgroup.procs && exec setpriv --reuid=65534 --regid=65534 \
                  --clear-groups --inh-caps=-all,+bpf,+net_admin \
                  --ambient-caps=-all,+bpf,+net_admin --bounding-set=-all,+bpf,+net_admin \"$@\"";
    Command::new("sh")
        .args(["-c", script])
        .arg(lab.cgroup())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("shared_dispatcher::{name}"), "--nocapture"])
        .env(INNER, lab.cgroup())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn load_inner(cgroup: &std::ffi::OsStr) -> Steering {
    let options = Options { cgroup: Path::new(cgroup).into(), wait: Duration::ZERO };
    Steering::load_shared(&options).unwrap()
}

#[test]
fn a_killed_dispatcher_of_an_ordinary_user_leaves_the_service() {
    if let Some(cgroup) = std::env::var_os(INNER) {
        let mut steering = load_inner(&cgroup);
        let mut workers = Vec::new();
        for worker in 0..2 {
            steering.set_worker(worker, WorkerSettings::new(1)).unwrap();
            let listener = steering.open_listener(worker, V4, BACKLOG).unwrap();
            let script =
                "export LISTEN_PID=$$ LISTEN_FDS=1; exec python3 -c \"$0\" 3<&0 0</dev/null";
            let mut command = Command::new("sh");
            command.args(["-c", script, HEIR]).stdin(listener).stdout(Stdio::null());
            workers.push(command.spawn().unwrap());
        }
        println!("\nready {} {}", workers[0].id(), workers[1].id());
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let live = |worker| steering.counts(worker).unwrap().live;
        println!("live {} {}", live(0), live(1));
        // Until it is killed.
        std::thread::park();
        return;
    }
    if !has(&["setpriv"]) {
        return;
    }
    let Some(lab) = Lab::without_heirs(Duration::ZERO) else { return };
    let mut inner = dispatcher(&lab, "a_killed_dispatcher_of_an_ordinary_user_leaves_the_service");
    let mut said = BufReader::new(inner.stdout.take().unwrap()).lines().map(Result::unwrap);
    let ready = said.find(|line| line.starts_with("ready"));
    let ready = ready.unwrap_or_else(|| panic!("{:?}", inner.wait()));
    let workers: Vec<u32> = ready.split(' ').skip(1).map(|pid| pid.parse().unwrap()).collect();
    let mut held: Vec<TcpStream> = (0..20).map(|_| connect(V4)).collect();
    drop(inner.stdin.take());
    assert_eq!(said.find(|line| line.starts_with("live")).unwrap(), "live 10 10");
    inner.kill().unwrap();
    inner.wait().unwrap();
    held.extend((0..100).map(|_| connect(V4)));
    let found = shares(120);
    assert!(workers.iter().all(|pid| found[pid] > 20), "{found:?}");
    for pid in workers {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    }
    eventually("the service to end", ErrorKind::ConnectionRefused, || {
        TcpStream::connect_timeout(&V4, Duration::from_secs(10))
            .map_or_else(|e| e.kind(), |_| ErrorKind::Other)
    });
}

#[test]
fn descriptors_do_not_leak() {
    if let Some(cgroup) = std::env::var_os(INNER) {
        let open = || fs::read_dir("/proc/self/fd").unwrap().count();
        let mut before = 0;
        for round in 0..6 {
            let mut steering = load_inner(&cgroup);
            let ready = open();
            for _ in 0..4 {
                for worker in 0..2 {
                    steering.set_worker(worker, WorkerSettings::new(1)).unwrap();
                    drop(steering.open_listener(worker, V4, BACKLOG).unwrap());
                    drop(steering.open_listener(worker, V6, BACKLOG).unwrap());
                }
                for _ in 0..4 {
                    steering.evict(0).unwrap();
                    steering.restore(0).unwrap();
                }
                let refused = steering.take_listeners(7, Vec::new());
                assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
                steering.remove_worker(0).unwrap();
                steering.remove_worker(1).unwrap();
                steering.remove_public(V4).unwrap();
                steering.remove_public(V6).unwrap();
                assert_eq!(open(), ready);
            }
            drop(steering);
            if round == 0 {
                before = open();
            }
            assert_eq!(open(), before);
        }
        println!("\nno leak");
        return;
    }
    if !has(&["setpriv"]) {
        return;
    }
    let Some(lab) = Lab::without_heirs(Duration::ZERO) else { return };
    let inner = dispatcher(&lab, "descriptors_do_not_leak");
    let out = inner.wait_with_output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && said.contains("\nno leak"), "{said}");
}
