//! Processes that inherit their listeners: one public port, shared by all.

use std::io::Read;
use std::net::{Ipv6Addr, SocketAddr, TcpStream};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_support::{Dispatcher, PATIENCE, configure, wait_for, wait_until};

use crate::place::*;
use crate::{life, workers};

/// The configuration of a pool `web` at [`PUBLIC`] with so many keepers that inherit listeners.
pub fn heirs(processes: u32, more: &str) -> String {
    heirs_with(processes, more, (KEEPER, &[]))
}

pub fn heirs_with(processes: u32, more: &str, (program, arguments): (&str, &[&str])) -> String {
    let pool = format!("[pool.web]\nmode = \"steer\"\nwait_for_worker = \"5s\"\n{more}");
    let program = program.replace('{', "{{").replace('}', "}}");
    let words = ["python3", "-c", &program, "fd", "{fd}"];
    let words: Vec<String> =
        words.iter().chain(arguments).map(|word| format!("{word:?}")).collect();
    format!(
        "{}{pool}\n[pool.web.spawn]\nprocesses = {processes}\ncommand = [{}]\n",
        listener(),
        words.join(", ")
    )
}

/// Connects without waiting for an answer.
pub fn dial() -> TcpStream {
    let stream = TcpStream::connect_timeout(&PUBLIC, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The process that has answered.
pub fn answer(client: &mut TcpStream) -> i32 {
    let mut text = String::new();
    while !text.ends_with('\n') {
        let mut byte = [0];
        client.read_exact(&mut byte).expect("a client that is served");
        text.push(char::from(byte[0]));
    }
    text.trim().strip_prefix("hello ").unwrap().parse().unwrap()
}

pub fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
    if signal == Signal::SIGSTOP {
        wait_until("the process to stop", || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        });
    }
}

pub fn pid_of(dispatcher: &Dispatcher, name: &str) -> i32 {
    let status = dispatcher.status();
    status.pools[0].workers.iter().find(|worker| worker.name == name).unwrap().pid
}

/// How many sockets a process has.
pub fn sockets(pid: i32) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
}

#[test]
fn connections_are_shared_exactly() {
    if !enter() {
        return;
    }
    let dispatcher = Dispatcher::start(&heirs(4, ""));
    ready(&dispatcher, 4);
    let before = taken(&wait_loads(&dispatcher, &[0; 4]));
    let status = in_turn(&dispatcher, 200, before.iter().sum::<u64>() + 200);
    let now: Vec<u64> = taken(&status).iter().zip(before).map(|(now, then)| now - then).collect();
    assert_eq!(now, [50; 4]);
    let held: Vec<TcpStream> = (0..1_000).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[250; 4]);
    drop(held);
    wait_loads(&dispatcher, &[0; 4]);
}

#[test]
fn drain_resume_weight_and_maximum_apply_in_the_kernel() {
    if !enter() {
        return;
    }
    workers::limits_apply(&Dispatcher::start(&heirs(3, workers::LIMITED)));
}

/// What waits in the queue of a killed worker is served by the others.
#[test]
fn the_queue_of_a_killed_worker_goes_to_others() {
    if !enter() {
        return;
    }
    // Its patience is longer than this test.
    let dispatcher = Dispatcher::start(&heirs(4, "handoff_timeout = \"60s\"\n"));
    ready(&dispatcher, 4);
    let killed = pid_of(&dispatcher, "web-2");
    for round in 1..=3 {
        let killed = if round == 1 { killed } else { pid_of(&dispatcher, "web-2") };
        signal(killed, Signal::SIGSTOP);
        let mut clients: Vec<TcpStream> = (0..200).map(|_| dial()).collect();
        dispatcher.wait_status("50 to wait", |status| {
            let web_2 = status.pools[0].workers.iter().find(|it| it.name == "web-2");
            web_2.and_then(|it| it.steer.as_ref()).is_some_and(|it| it.queued == 50)
        });
        signal(killed, Signal::SIGKILL);
        assert!(clients.iter_mut().all(|client| answer(client) != killed));
        drop(clients);
        dispatcher.wait_status("another process", |status| {
            status.pools[0].workers.iter().all(|worker| worker.pid != killed)
                && active(&status.pools[0]).len() == 4
        });
        wait_loads(&dispatcher, &[0; 4]);
    }
}

/// The only process of a pool ends: the next one inherits its listener with all that waits.
#[test]
fn the_queue_of_the_only_worker_waits_for_the_next_process() {
    if !enter() {
        return;
    }
    let dispatcher = Dispatcher::start(&heirs(1, "handoff_timeout = \"60s\"\n"));
    let first = processes_of(&ready(&dispatcher, 1))[0];
    signal(first, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..20).map(|_| dial()).collect();
    signal(first, Signal::SIGKILL);
    let next = answer(&mut clients[0]);
    assert!(next != first && clients[1..].iter_mut().all(|client| answer(client) == next));
    wait_loads(&dispatcher, &[20]);
    drop(clients);
    wait_loads(&dispatcher, &[0]);
}

/// What waits in the queue of a worker that hangs is moved; it is trusted again when it accepts.
#[test]
fn the_queue_of_a_hanging_worker_is_moved() {
    if !enter() {
        return;
    }
    let dispatcher = Dispatcher::start(&heirs(3, "handoff_timeout = \"300ms\"\n"));
    ready(&dispatcher, 3);
    let hanging = pid_of(&dispatcher, "web-1");
    for _ in 0..3 {
        signal(hanging, Signal::SIGSTOP);
        let mut clients: Vec<TcpStream> = (0..30).map(|_| dial()).collect();
        assert!(clients.iter_mut().all(|client| answer(client) != hanging));
        dispatcher.wait_status("it to be suspect", |status| {
            status.pools[0].workers.iter().any(|it| it.name == "web-1" && it.state == "suspect")
        });
        // It is left out.
        clients.extend((0..10).map(|_| connect()));
        wait_loads(&dispatcher, &[20, 20]);
        signal(hanging, Signal::SIGCONT);
        dispatcher.wait_status("it to be trusted", |status| active(&status.pools[0]).len() == 3);
        clients.extend((0..20).map(|_| connect()));
        wait_loads(&dispatcher, &[20; 3]);
        drop(clients);
        wait_loads(&dispatcher, &[0; 3]);
    }
    assert_eq!(pid_of(&dispatcher, "web-1"), hanging, "it noticed nothing");
}

/// A drained worker that hangs has no connection when the queue was moved: it is ended.
#[test]
fn a_drained_worker_that_hangs_is_ended_without_connections() {
    if !enter() {
        return;
    }
    let config = heirs(2, "handoff_timeout = \"300ms\"\n");
    let dispatcher = Dispatcher::start(&format!("stop_timeout = \"1s\"\n{config}"));
    ready(&dispatcher, 2);
    let hanging = pid_of(&dispatcher, "web-1");
    signal(hanging, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..10).map(|_| dial()).collect();
    assert!(clients.iter_mut().all(|client| answer(client) != hanging));
    wait_loads(&dispatcher, &[10]);
    let status = dispatcher.status();
    let suspect = status.pools[0].workers.iter().find(|it| it.pid == hanging).unwrap();
    assert_eq!((suspect.state.as_str(), suspect.load), ("suspect", 0), "a probe is no load");
    command(&dispatcher, &["restart", "web", "--wait"]);
    wait_until("its end", || !is_alive(hanging));
    drop(clients);
}

/// A process that closes its listener and goes on is replaced, and what waits goes to others.
#[test]
fn a_worker_that_closes_its_listener_is_replaced() {
    if !enter() {
        return;
    }
    for processes in [1, 3] {
        let config = heirs(processes, "handoff_timeout = \"300ms\"\n");
        let dispatcher = Dispatcher::start(&config);
        ready(&dispatcher, processes as usize);
        let held = dial();
        let closes = pid_of(&dispatcher, "web-1");
        signal(closes, Signal::SIGUSR1);
        let mut clients: Vec<TcpStream> = (0..12).map(|_| dial()).collect();
        assert!(clients.iter_mut().all(|client| answer(client) != closes));
        dispatcher.wait_status("another process", |status| {
            active(&status.pools[0]).len() == processes as usize
                && status.pools[0].workers.iter().all(|it| it.pid != closes || it.state != "active")
        });
        drop((held, clients));
        wait_until("its end", || !is_alive(closes));
    }
}

/// Clients come without a pause while processes are replaced, added, removed and killed: each of
/// them is served, and none waits for a process that starts.
#[test]
fn processes_come_and_go_without_losing_a_client() {
    if !enter() {
        return;
    }
    let config = heirs_with(2, "handoff_timeout = \"60s\"\n", (KEEPER, &["0.7"]));
    let mut dispatcher = Dispatcher::start(&config);
    ready(&dispatcher, 2);
    let descriptors = descriptors_of(&dispatcher);
    let load = Load::begin();
    command(&dispatcher, &["restart", "web", "--wait"]);
    command(&dispatcher, &["scale", "web", "4"]);
    ready(&dispatcher, 4);
    signal(pid_of(&dispatcher, "web-3"), Signal::SIGTERM);
    dispatcher.wait_status("its end", |status| active(&status.pools[0]).len() == 3);
    ready(&dispatcher, 4);
    command(&dispatcher, &["scale", "web", "2"]);
    dispatcher.wait_status("two to end", |status| status.pools[0].workers.len() == 2);
    load.end();
    wait_loads(&dispatcher, &[0; 2]);
    wait_until("its descriptors to be as before", || descriptors_of(&dispatcher) == descriptors);
    let processes = processes_of(&dispatcher.status().pools[0]);
    assert!(dispatcher.stop().success());
    assert!(processes.iter().all(|&pid| !is_alive(pid)));
    assert!(TcpStream::connect(PUBLIC).is_err());
}

pub fn descriptors_of(dispatcher: &Dispatcher) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", dispatcher.process.pid())).unwrap().count()
}

/// A process that starts slowly gets no client before it accepts one.
#[test]
fn a_process_gets_no_client_before_it_accepts() {
    if !enter() {
        return;
    }
    let dispatcher = Dispatcher::start(&heirs_with(1, "", (KEEPER, &["1.5"])));
    let first = processes_of(&ready(&dispatcher, 1))[0];
    command(&dispatcher, &["scale", "web", "2"]);
    let held: Vec<i32> = wait_for("a second process that accepts", || {
        let answers: Vec<i32> = (0..4).map(|_| answer(&mut dial())).collect();
        let both = active(&dispatcher.status().pools[0]).len() == 2;
        assert!(both || answers.iter().all(|&pid| pid == first));
        both.then(|| (0..10).map(|_| answer(&mut dial())).collect())
    });
    assert!(held.iter().any(|&pid| pid != first));
}

#[test]
fn several_addresses_of_both_families_are_inherited() {
    if !enter() {
        return;
    }
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 9000);
    let more = format!("[[listener]]\nname = \"other\"\naddress = \"{any}\"\npool = \"web\"\n");
    let dispatcher = Dispatcher::start(&format!("{more}{}", heirs(2, "")));
    ready(&dispatcher, 2);
    let at = ["127.0.0.1:8000", "127.0.0.1:9000", "[::1]:9000"];
    let held: Vec<TcpStream> = (0..20)
        .flat_map(|_| at)
        .map(|address| {
            let mut client = TcpStream::connect(address).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            answer(&mut client);
            client
        })
        .collect();
    wait_loads(&dispatcher, &[30, 30]);
    drop(held);
    wait_loads(&dispatcher, &[0, 0]);
}

/// The processes know nothing of the dispatcher, and end with it nevertheless.
#[test]
fn a_killed_dispatcher_leaves_no_process_behind() {
    if !enter() {
        return;
    }
    let folder = configure(&heirs(2, ""));
    let mut dispatcher = Dispatcher::start_in(folder.path());
    let processes = processes_of(&ready(&dispatcher, 2));
    dispatcher.process.kill();
    wait_until("the processes to end", || processes.iter().all(|&pid| !is_alive(pid)));
    assert!(TcpStream::connect(PUBLIC).is_err());
    let dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 2);
    drop(connect());
}

/// With pins and `on_dispatcher_loss = "serve"`, nothing is noticed by clients.
#[test]
fn the_kernel_chooses_while_the_dispatcher_is_gone() {
    if !enter() {
        return;
    }
    let pool = heirs(3, "handoff_timeout = \"60s\"\n");
    life::chooses_without_dispatcher(&pool, |dispatcher| {
        // What waits in the queue of a worker that it has adopted is moved, too.
        let killed = pid_of(dispatcher, "web-2");
        signal(killed, Signal::SIGSTOP);
        let mut clients: Vec<TcpStream> = (0..20).map(|_| dial()).collect();
        signal(killed, Signal::SIGKILL);
        assert!(clients.iter_mut().all(|client| answer(client) != killed));
    });
}

/// A process that dies while there is no dispatcher leaves its queue to the others, and is
/// replaced.
#[test]
fn a_process_that_died_meanwhile_is_replaced() {
    if !enter() {
        return;
    }
    let (_pins, folder) = outliving(&heirs(3, "handoff_timeout = \"60s\"\n"));
    let mut dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 3);
    let dies = pid_of(&dispatcher, "web-2");
    dispatcher.process.kill();
    signal(dies, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..30).map(|_| dial()).collect();
    signal(dies, Signal::SIGKILL);
    assert!(clients.iter_mut().all(|client| answer(client) != dies));
    let dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 3);
    dispatcher.wait_status("all to be counted", |status| {
        active(&status.pools[0]).iter().map(|(_, load)| load).sum::<u64>() == 30
    });
    drop(clients);
    wait_loads(&dispatcher, &[0; 3]);
}

#[test]
fn a_process_that_closed_its_listener_meanwhile_keeps_its_connections_and_is_replaced() {
    if !enter() {
        return;
    }
    life::closes_without_dispatcher(&heirs(2, ""));
}

/// Its children have the listeners: they serve on.
#[test]
fn a_process_whose_children_have_the_listeners_is_adopted() {
    if !enter() {
        return;
    }
    let forks = "import os\nif os.fork():\n    os.closerange(3, 100)\n    os.wait()\n    os._exit(0)\n\
                 os.environ['LISTEN_PID'] = str(os.getpid())\n";
    let program = format!("{forks}{KEEPER}");
    life::stays_without_dispatcher(&heirs_with(2, "", (&program, &[])));
}

/// Without pins the kernel's hash takes over, and the next dispatcher takes over the listeners.
#[test]
fn without_pins_the_hash_of_the_kernel_goes_on() {
    if !enter() {
        return;
    }
    let config = format!(
        "steer_pins = false\n{}on_dispatcher_loss = \"serve\"\n",
        heirs(3, "handoff_timeout = \"60s\"\n")
    );
    let folder = configure(&config);
    let mut dispatcher = Dispatcher::start_in(folder.path());
    let processes = processes_of(&ready(&dispatcher, 3));
    assert!(!dispatcher.status().pools[0].steer.as_ref().unwrap().pinned);
    let before: Vec<TcpStream> = (0..9).map(|_| connect()).collect();
    dispatcher.process.kill();
    let mut between: Vec<TcpStream> = (0..200).map(|_| dial()).collect();
    let mut by_process = std::collections::BTreeMap::new();
    for client in &mut between {
        *by_process.entry(answer(client)).or_insert(0) += 1;
    }
    assert_eq!(by_process.len(), 3, "{by_process:?}");
    let mut dispatcher = Dispatcher::start_in(folder.path());
    let pool = ready(&dispatcher, 3);
    assert!(processes_of(&pool).iter().all(|pid| processes.contains(pid)));
    // What came before is not counted; what comes now is exact.
    let now: Vec<TcpStream> = (0..30).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[10; 3]);
    drop((before, between, now));
    wait_loads(&dispatcher, &[0; 3]);
    assert!(dispatcher.stop().success());
    assert!(processes.iter().all(|&pid| !is_alive(pid)));
}

/// A reload cannot change what the processes have inherited; the rest of it can.
#[test]
fn a_reload_keeps_the_listeners() {
    if !enter() {
        return;
    }
    let config = heirs(2, "");
    let folder = configure(&config);
    let file = folder.path().join("dispatcher.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 2);
    let more = "[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:9000\"\npool = \"web\"\n";
    std::fs::write(&file, format!("{text}\n{more}")).unwrap();
    let refused = refused(&dispatcher, &["reload"]);
    assert!(refused.contains("listener `other`: processes inherit the listeners"), "{refused}");
    std::fs::write(&file, text.replace("8000", "8001")).unwrap();
    assert!(crate::place::refused(&dispatcher, &["reload"]).contains("listener `web`"));
    std::fs::write(&file, text.replace("processes = 2", "processes = 3")).unwrap();
    command(&dispatcher, &["reload"]);
    ready(&dispatcher, 3);
    let held: Vec<TcpStream> = (0..9).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[3; 3]);
    drop(held);
}

/// Pins that cannot be made: the choice ends with the dispatcher, and ports are shared all the
/// same.
#[test]
fn without_bpffs_the_choice_is_not_pinned() {
    if !enter() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let keys = format!("steer_pins = \"{}/pins\"\n", place.path().display());
    let config = format!("{keys}{}on_dispatcher_loss = \"serve\"\n", heirs(2, ""));
    let dispatcher = Dispatcher::start(&config);
    let steer = ready(&dispatcher, 2).steer.unwrap();
    assert!(steer.attached && !steer.pinned, "{steer:?}");
    assert!(dispatcher.log().contains("event=steering_not_pinned"));
    let held: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[5, 5]);
    drop(held);
    // Its processes would serve on.
    let processes = processes_of(&dispatcher.status().pools[0]);
    drop(dispatcher);
    processes.into_iter().for_each(|pid| signal(pid, Signal::SIGKILL));
}

/// A pool that a reload removes refuses clients, and keeps those that it has.
#[test]
fn a_removed_pool_refuses_clients_at_once() {
    if !enter() {
        return;
    }
    let other = "[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:9000\"\npool = \"other\"\n\
                 [pool.other]\n";
    let config = heirs(2, "").replace("\"5s\"", "\"1h\"");
    let folder = configure(&format!("{config}{other}"));
    let file = folder.path().join("dispatcher.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let dispatcher = Dispatcher::start_in(folder.path());
    let web = |status: &dispatcher::api::status::Status| {
        status.pools.iter().find(|pool| pool.name == "web").cloned()
    };
    dispatcher.wait_status("the workers to listen", |status| {
        web(status).is_some_and(|pool| active(&pool).len() == 2)
    });
    let mut held = dial();
    answer(&mut held);
    std::fs::write(&file, text.replace(&config, "")).unwrap();
    command(&dispatcher, &["reload"]);
    wait_until("clients to be refused", || TcpStream::connect(PUBLIC).is_err());
    held.set_nonblocking(true).unwrap();
    let quiet = held.read(&mut [0]).unwrap_err();
    assert_eq!(quiet.kind(), std::io::ErrorKind::WouldBlock, "it is kept");
    drop(held);
    dispatcher.wait_status("the pool to be gone", |status| web(status).is_none());
}
