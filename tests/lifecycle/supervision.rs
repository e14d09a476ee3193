//! Processes that crash, do not join, hang, leave, or are replaced: bounded, visible, recovered
//! from.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use dispatcher::api::status::{ProcessesStatus, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_support::*;

fn spawning(command: &str, keys: &str) -> String {
    one_pool(&format!("wait_for_worker = \"10m\"\n[pool.web.spawn]\ncommand = {command}\n{keys}\n"))
}

fn worker(keys: &str) -> String {
    spawning(&format!("[{:?}, \"blocking\"]", example("test-worker")), keys)
}

fn processes(status: &Status) -> &ProcessesStatus {
    pool(status, "web").processes.as_ref().expect("it starts processes")
}

fn pids(status: &Status) -> BTreeSet<i32> {
    pool(status, "web").workers.iter().map(|worker| worker.pid).collect()
}

fn run(dispatcher: &Dispatcher, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(dispatcher_bin());
    let output = command.args(arguments).arg("--admin").arg(dispatcher.admin()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

fn lives(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None).is_ok()
}

#[test]
fn a_crash_loop_is_visible_and_ends_with_a_restart() {
    let temp = tempfile::tempdir().unwrap();
    let flag = temp.path().join("works");
    // Crashes until the file is there.
    let script = format!(
        "test -e {} && exec {} blocking; exit 3",
        flag.display(),
        example("test-worker").display()
    );
    let keys = "processes = 4\ncrash_loop_after = 3\nmax_restart_delay = \"1h\"";
    let dispatcher = Dispatcher::start(&spawning(&format!("[\"sh\", \"-c\", {script:?}]"), keys));
    let waiting = connect(dispatcher.address("web"));
    let status = dispatcher.wait_status("a crash loop", |status| processes(status).crash_loop);
    assert!(processes(&status).next_start_in_ms.is_some());
    dispatcher.wait_status("the fault", |status| {
        status.faults.iter().any(|fault| fault.kind == "crash_loop" && fault.ongoing)
    });
    assert_eq!(dispatcher.metric("dispatcher_process_crash_loop"), 1.0);
    let text = run(&dispatcher, &["status"]).1;
    assert!(
        text.contains("processes of web: 4 wanted, 0 active, crash loop, 4 starting"),
        "{text}"
    );
    assert!(dispatcher.log().contains("status=\"exit status 3\""), "{}", dispatcher.log());
    // Bounded: three starts of each place, and then one at a time, once in an hour.
    let starts = dispatcher.log().matches("event=process_started").count();
    assert!((4..=16).contains(&starts), "{starts}");
    std::fs::write(&flag, "").unwrap();
    assert!(run(&dispatcher, &["restart", "web"]).0);
    let status = dispatcher.wait_status("all to serve", |status| processes(status).active == 4);
    assert!(!processes(&status).crash_loop);
    wait_for_log(&dispatcher, "event=crash_loop_over pool=web");
    assert_eq!(dispatcher.metric("dispatcher_process_crash_loop"), 0.0);
    Client::greeted(waiting).unwrap().echo("it has waited");
}

#[test]
fn a_reload_that_changes_the_command_ends_a_crash_loop() {
    let keys = "processes = 2\ncrash_loop_after = 2\nmax_restart_delay = \"1h\"";
    let dispatcher = Dispatcher::start(&spawning("[\"false\"]", keys));
    dispatcher.wait_status("a crash loop", |status| processes(status).crash_loop);
    write_config(&dispatcher.dir, &worker(keys));
    assert!(run(&dispatcher, &["reload"]).0);
    let status = dispatcher.wait_status("both to serve", |status| processes(status).active == 2);
    assert!(!processes(&status).crash_loop);
}

#[test]
fn a_process_that_has_served_enough_is_replaced() {
    let keys = "max_connections_served = 20\njitter = \"50%\"";
    let dispatcher = Dispatcher::start(&worker(keys));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 1);
    let mut served = std::collections::BTreeMap::<i32, u32>::new();
    let mut held = Client::connect(address).unwrap();
    *served.entry(held.pid).or_default() += 1;
    while served.len() < 3 {
        let client = Client::connect(address).unwrap();
        *served.entry(client.pid).or_default() += 1;
        client.finish();
        // The replaced process keeps its connection, and with it the room for the next one.
        if served.len() == 2 && held.pid != 0 {
            held.echo("it goes on");
            held.stream.get_ref().shutdown(std::net::Shutdown::Both).unwrap();
            held.pid = 0;
        }
    }
    // At the latest at 20, and some more until the next process serves.
    let status = dispatcher.status();
    assert!(processes(&status).replaced >= 1, "{served:?}");
    assert_eq!(processes(&status).restarts, 0);
    assert!(!served.values().any(|count| (3..10).contains(count)), "{served:?}");
}

#[test]
fn a_process_that_never_joins_is_ended_and_counted() {
    // It ignores SIGTERM, too.
    let command = "[\"env\", \"--ignore-signal=TERM\", \"sleep\", \"1000\"]";
    let keys = "start_timeout = \"300ms\"\nstop_timeout = \"200ms\"";
    let dispatcher = Dispatcher::start(&spawning(command, keys));
    dispatcher.wait_status("three late ones", |status| {
        let processes = processes(status);
        assert!(processes.leaving <= 2, "one that ends, and its successor: {processes:?}");
        processes.ended_late >= 3
    });
    assert!(
        dispatcher.metric("dispatcher_processes_stopped_total{pool=\"web\",reason=\"late\"}")
            >= 3.0
    );
    let log = dispatcher.log();
    assert!(
        log.contains("event=process_stopping pool=web process=1 reason=\"its worker did not join")
    );
    assert!(log.contains("status=\"signal 9 (SIGKILL)\""), "{log}");
}

#[test]
fn a_hung_process_is_replaced_and_others_serve_meanwhile() {
    let keys = "processes = 2\nkill_hung_after = \"1s\"\nstop_timeout = \"200ms\"";
    let dispatcher = Dispatcher::start(&worker(keys));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 2);
    let clients: Vec<Client> = (0..2).map(|_| Client::connect(address).unwrap()).collect();
    let hung = clients[0].pid;
    kill(Pid::from_raw(hung), Signal::SIGSTOP).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while lives(hung) {
        assert!(Instant::now() < end, "{}", dispatcher.log());
        // Its untaken connections go to the other one.
        assert_ne!(Client::connect(address).unwrap().pid, hung);
    }
    let status = dispatcher.wait_status("a replacement", |status| {
        processes(status).active == 2 && !pids(status).contains(&hung)
    });
    assert_eq!(processes(&status).ended_hung, 1);
    assert!(status.faults.iter().any(|fault| fault.kind == "process_stopped"));
}

#[test]
fn a_worker_that_joins_and_takes_nothing_is_replaced_if_wanted() {
    let keys = "kill_hung_after = \"1s\"\nenvironment = { TEST_WORKER = \"never-take\" }";
    let dispatcher = Dispatcher::start(&worker(keys));
    dispatcher.wait_joined("web", 1);
    let _waiting = connect(dispatcher.address("web"));
    dispatcher.wait_status("it to be ended", |status| processes(status).ended_hung >= 1);
    assert!(dispatcher.status().closed.values().all(|&count| count == 0), "its client waits");
}

#[test]
fn the_replacement_is_up_while_the_old_one_leaves() {
    let dispatcher = Dispatcher::start(&worker("processes = 2\nmax_surge = \"50%\""));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 2);
    let mut client = Client::connect(address).unwrap();
    // It says goodbye and keeps its connection.
    kill(Pid::from_raw(client.pid), Signal::SIGTERM).unwrap();
    let status = dispatcher.wait_status("a replacement beside it", |status| {
        let processes = processes(status);
        (processes.wanted, processes.active, processes.leaving) == (2, 2, 1)
    });
    assert_eq!(pids(&status).len(), 3);
    client.echo("still here");
    client.finish();
    dispatcher.wait_status("it to end", |status| processes(status).leaving == 0);
    assert!(!lives(client_pid(&status, &dispatcher.status())));
}

/// The process that is only in the first status.
fn client_pid(before: &Status, after: &Status) -> i32 {
    *pids(before).difference(&pids(after)).next().expect("one has left")
}

#[test]
fn a_process_that_leaves_and_stays_is_ended() {
    // The server of the shell ends; the shell does not.
    let script = format!("{} blocking; exec sleep 1000", example("test-worker").display());
    let keys = "stop_timeout = \"300ms\"";
    let dispatcher = Dispatcher::start(&spawning(&format!("[\"sh\", \"-c\", {script:?}]"), keys));
    dispatcher.wait_joined("web", 1);
    let first = *pids(&dispatcher.status()).first().unwrap();
    kill(Pid::from_raw(first), Signal::SIGTERM).unwrap();
    dispatcher.wait_status("another one", |status| {
        let processes = processes(status);
        processes.active == 1 && processes.leaving == 0 && !pids(status).contains(&first)
    });
    assert!(dispatcher.log().contains("reason=\"it left and did not end by itself\""));
}

#[test]
fn max_memory_replaces_a_process_and_its_connections_go_on() {
    // What many test workers share counts little for each: so each has a table of its own.
    let keys = "processes = 2\nmax_memory = \"4MiB\"\nmax_surge = 2\n\
                environment = { TEST_TABLE = \"8\" }";
    let command = format!("[{:?}, \"loaded\", \"blocking\"]", example("test-worker"));
    let dispatcher = Dispatcher::start(&spawning(&command, keys));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 2);
    let mut client = Client::connect(address).unwrap();
    // Every process of this program uses more.
    let status =
        dispatcher.wait_status("both to be replaced", |status| processes(status).replaced >= 2);
    client.echo("it goes on");
    assert!(processes(&status).restarts == 0, "{:?}", processes(&status));
    wait_for_log(&dispatcher, "event=process_exceeds_memory pool=web");
    wait_for_log(&dispatcher, "reason=max_memory");
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

/// Ends the clients of a test, even if it fails.
struct Done<'a>(&'a std::sync::atomic::AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn a_restart_under_load_refuses_and_resets_nobody() {
    let keys = "processes = 3\nmax_connections_served = 1000000\nmax_age = \"1h\"";
    let dispatcher = Dispatcher::start(&worker(keys));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 3);
    let before = pids(&dispatcher.status());
    let mut held: Vec<Client> = (0..6).map(|_| Client::connect(address).unwrap()).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _done = Done(&done);
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let mut client = Client::connect(address).expect("not refused");
                    client.echo("short");
                    client.finish();
                }
            });
        }
        let (worked, text) = run(&dispatcher, &["restart", "web"]);
        assert!(worked, "{text}");
        assert_eq!(text, "pool web: generation 2: 3 processes to replace, 1 at a time\n");
        // The old ones keep their connections; the roll does not wait for that.
        dispatcher.wait_status("all to be replaced", |status| {
            let processes = processes(status);
            processes.replaced == 3 && processes.active == 3 && processes.leaving == 3
        });
        held.iter_mut().for_each(|client| client.echo("long"));
        drop(std::mem::take(&mut held));
        dispatcher.wait_status("the old ones to end", |status| {
            let processes = processes(status);
            processes.replaced == 3 && processes.active == 3 && processes.leaving == 0
        });
    });
    let status = dispatcher.status();
    assert!(pids(&status).is_disjoint(&before));
    assert_eq!(status.closed.values().sum::<u64>(), 0);
    assert_eq!(processes(&status).restarts, 0);
    // One worker.
    let name = "web/web-2";
    let (worked, text) = run(&dispatcher, &["restart", name]);
    assert!(worked, "{text}");
    dispatcher.wait_status("one more", |status| processes(status).replaced == 4);
    // What cannot be restarted.
    let _service = dispatcher.worker("blocking", "web", "service");
    dispatcher.wait_joined("web", 4);
    let (worked, text) = run(&dispatcher, &["restart", "web/service"]);
    assert!(!worked && text.contains("has not started worker"), "{text}");
}

#[test]
fn a_reload_names_outdated_processes_and_can_restart_them() {
    let with = |value: &str, processes: u32| {
        worker(&format!("environment = {{ VERSION = \"{value}\" }}\nprocesses = {processes}"))
    };
    let dispatcher = Dispatcher::start(&with("1", 2));
    dispatcher.wait_joined("web", 2);
    let before = pids(&dispatcher.status());
    let version = |pid: i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mut words = environment.split(|&byte| byte == 0);
        words.find_map(|word| word.strip_prefix(b"VERSION=")).map(<[u8]>::to_vec)
    };
    // Another number of processes outdates none.
    write_config(&dispatcher.dir, &with("1", 3));
    let (worked, text) = run(&dispatcher, &["reload"]);
    assert!(worked && !text.contains("former settings"), "{text}");
    dispatcher.wait_joined("web", 3);
    write_config(&dispatcher.dir, &with("2", 3));
    let (worked, text) = run(&dispatcher, &["reload"]);
    let hint = "pool web: its processes have the former settings until `dispatcher restart web`\n";
    assert!(worked && text.ends_with(hint), "{text}");
    assert!(before.is_subset(&pids(&dispatcher.status())), "nothing else happens");
    write_config(&dispatcher.dir, &with("3", 3));
    let (worked, text) = run(&dispatcher, &["reload", "--restart"]);
    assert!(worked && text.ends_with(": 3 processes to replace, 1 at a time\n"), "{text}");
    dispatcher.wait_status("all to have the new version", |status| {
        let versions = pids(status).into_iter().map(version);
        processes(status).active == 3 && versions.eq([(); 3].map(|()| Some(b"3".to_vec())))
    });
    // The signal does the same for all pools.
    let before = pids(&dispatcher.status());
    dispatcher.process.signal(Signal::SIGUSR2);
    dispatcher.wait_status("all to be replaced once more", |status| {
        processes(status).active == 3 && pids(status).is_disjoint(&before)
    });
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn restart_waits_for_the_new_processes_or_says_that_they_fail() {
    let temp = tempfile::tempdir().unwrap();
    let flag = temp.path().join("broken");
    let script = format!(
        "test -e {} && exit 9; exec {} blocking",
        flag.display(),
        example("test-worker").display()
    );
    let keys = "processes = 3\ncrash_loop_after = 2";
    let dispatcher = Dispatcher::start(&spawning(&format!("[\"sh\", \"-c\", {script:?}]"), keys));
    dispatcher.wait_joined("web", 3);
    let before = pids(&dispatcher.status());
    let (worked, text) = run(&dispatcher, &["restart", "web", "--wait"]);
    assert!(worked, "{text}");
    let now = dispatcher.wait_status("three", |status| processes(status).leaving == 0);
    assert_eq!((processes(&now).active, processes(&now).outdated), (3, 0));
    assert!(pids(&now).is_disjoint(&before));
    // A version that crashes at start: the old processes serve on.
    std::fs::write(&flag, "").unwrap();
    let output = Command::new(dispatcher_bin())
        .args(["restart", "web", "--wait", "--admin"])
        .arg(dispatcher.admin())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(70));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("ended before it was ready: exit status 9"), "{text}");
    let status = dispatcher.status();
    assert_eq!((processes(&status).active, pids(&status)), (3, pids(&now)));
    Client::connect(dispatcher.address("web")).unwrap().echo("served by an old one");
    // Corrected, they are replaced.
    std::fs::remove_file(&flag).unwrap();
    assert!(run(&dispatcher, &["restart", "web", "--wait"]).0);
    assert!(
        pids(&dispatcher.status()).is_disjoint(&pids(&now)) || {
            dispatcher
                .wait_status("the last to end", |status| pids(status).is_disjoint(&pids(&now)));
            true
        }
    );
}

#[test]
fn pools_without_processes_cannot_be_restarted() {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let (worked, text) = run(&dispatcher, &["restart", "web"]);
    assert!(!worked && text.contains("starts no processes"), "{text}");
    let (worked, text) = run(&dispatcher, &["restart", "nope"]);
    assert!(!worked && text.contains("nope"), "{text}");
}
