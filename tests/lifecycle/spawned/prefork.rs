//! `fork = true`: one process loads the application and forks the workers.

mod fake;
mod figures;

use std::io::{Read, Write};

use super::*;

use test_support::children_of;

/// A pool with forked workers of this kind.
fn forking(kind: &str, keys: &str) -> String {
    one_pool(&format!(
        "[pool.web.spawn]\ncommand = [\"DIR/test-worker\", \"prefork\", {kind:?}]\nfork = true\n{keys}"
    ))
}

/// The parent of all workers of the pool.
fn parent(dispatcher: &Dispatcher) -> i32 {
    let status = dispatcher.status();
    let mut parents: Vec<i32> =
        pool(&status, "web").workers.iter().map(|worker| parent_of(worker.pid)).collect();
    parents.dedup();
    assert_eq!(parents.len(), 1, "{parents:?}");
    parents[0]
}

#[track_caller]
fn parent_of(pid: i32) -> i32 {
    words(pid, "status", "PPid:")[0].parse().unwrap()
}

fn pids(dispatcher: &Dispatcher) -> Vec<i32> {
    pool(&dispatcher.status(), "web").workers.iter().map(|worker| worker.pid).collect()
}

fn lives(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

fn end(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Waits until another process serves in this place.
fn replaced(dispatcher: &Dispatcher, name: &str, before: i32) -> i32 {
    let mut next = None;
    dispatcher.wait_status("a replacement", |status| {
        let mut workers = pool(status, "web").workers.iter();
        let serves = workers
            .find(|worker| worker.name == name && worker.pid != before && worker.state == "active");
        next = serves.map(|worker| worker.pid);
        next.is_some()
    });
    next.unwrap()
}

#[test]
fn workers_of_every_kind_are_forked_and_serve() {
    for kind in ["blocking", "tokio", "mio"] {
        let temp = directory();
        let keys = "processes = 3\noutput = \"log\"\n\
                    environment = { OWN = \"{name}/{n}\", SAME = \"{pool}\" }";
        let mut dispatcher = start(temp, &forking(kind, keys));
        dispatcher.wait_joined("web", 3);
        let parent = parent(&dispatcher);
        assert!(children_of(dispatcher.process.pid()).contains(&parent));
        let mut clients: Vec<Client> =
            (0..6).map(|_| Client::connect(dispatcher.address("web")).unwrap()).collect();
        clients.iter_mut().for_each(|client| client.echo("forked"));
        let all = pids(&dispatcher);
        assert!(clients.iter().all(|client| all.contains(&client.pid)), "{kind}");
        drop(clients);
        let mut sockets = open_files(parent);
        sockets.retain(|link| link.starts_with("socket:"));
        assert_eq!(sockets.len(), 1, "{sockets:?}");
        for pid in &all {
            assert_eq!(words(*pid, "stat", "")[4], pid.to_string(), "it leads a group");
            // A socket of its parent is the channel.
            let own = open_files(*pid);
            assert!(!own.iter().any(|link| link.contains("pidfd")), "{kind}: {own:?}");
            assert!(!own.iter().any(|link| sockets.contains(link)), "{kind}: {own:?}");
        }
        // The output of each worker has its name.
        let second = pid(&dispatcher, "web-2");
        let line = format!("event=process_output pool=web name=web-2 pid={second} stream=stdout");
        wait_for_log(&dispatcher, &format!("{line} line=\"forked web-2/2 web\""));
        let line = format!("pool=web name=web-parent pid={parent} stream=stdout line=\"loaded\"");
        wait_for_log(&dispatcher, &line);
        assert_eq!(dispatcher.log().matches("line=\"loaded\"").count(), 1);
        assert!(dispatcher.stop().success());
        assert!(!all.iter().any(|&pid| lives(pid)) && !lives(parent), "the stop left something");
        let log = dispatcher.log();
        assert_eq!(log.matches("event=prefork_parent_ended").count(), 1, "{log}");
        assert!(!log.contains("status=\"unknown"), "{log}");
    }
}

/// What the descriptors of a process refer to.
fn open_files(pid: i32) -> Vec<String> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
    links.map(|link| link.to_string_lossy().into_owned()).collect()
}

#[test]
fn a_killed_worker_is_replaced_by_a_fork_of_the_same_parent() {
    let dispatcher = start(directory(), &forking("blocking", "processes = 2"));
    dispatcher.wait_joined("web", 2);
    let parent = parent(&dispatcher);
    let first = pid(&dispatcher, "web-1");
    end(first, Signal::SIGKILL);
    let second = replaced(&dispatcher, "web-1", first);
    assert_eq!(parent_of(second), parent);
    let status = dispatcher.status();
    let fault = status.faults.iter().find(|fault| fault.kind == "process_ended").expect("a fault");
    let text = format!("process {first} ended: signal 9 (SIGKILL)");
    assert!(fault.text.contains(&text), "{}", fault.text);
    wait_for_log(&dispatcher, &format!("pid={first} status=\"signal 9 (SIGKILL)\""));
}

#[test]
fn workers_of_a_killed_parent_continue_and_get_a_new_parent() {
    let mut dispatcher = start(directory(), &forking("tokio", "processes = 2"));
    dispatcher.wait_joined("web", 2);
    let before = parent(&dispatcher);
    let workers = pids(&dispatcher);
    let address = dispatcher.address("web");
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    end(before, Signal::SIGKILL);
    wait_for_log(&dispatcher, &format!("event=prefork_parent_ended pool=web pid={before}"));
    clients.iter_mut().for_each(|client| client.echo("continues"));
    Client::connect(address).unwrap().echo("a new one, too");
    assert_eq!(pids(&dispatcher), workers);
    // The next one comes from a new parent.
    let first = pid(&dispatcher, "web-1");
    end(first, Signal::SIGTERM);
    let next = replaced(&dispatcher, "web-1", first);
    let after = parent_of(next);
    assert!(after != before && children_of(dispatcher.process.pid()).contains(&after));
    assert_ne!(parent_of(pid(&dispatcher, "web-2")), after);
    clients.iter_mut().for_each(|client| client.echo("still"));
    let second = pid(&dispatcher, "web-2");
    drop(clients);
    // Without its parent the kernel tells how a worker ended, from Linux 6.15 on.
    end(second, Signal::SIGKILL);
    replaced(&dispatcher, "web-2", second);
    wait_for_log(&dispatcher, "event=process_ended pool=web process=2");
    let log = dispatcher.log();
    let known = format!("pid={second} status=\"signal 9 (SIGKILL)\"");
    let unknown = format!("pid={second} status=\"unknown: the process that forked it has ended\"");
    assert!(log.contains(&known) || log.contains(&unknown), "{log}");
    assert!(dispatcher.stop().success());
    assert!(!lives(after) && !lives(next), "the stop left something");
}

#[test]
fn a_wrapper_may_start_the_parent() {
    let script = "DIR/test-worker prefork blocking; sleep 1000";
    let body = one_pool(&format!(
        "[pool.web.spawn]\ncommand = [\"/bin/sh\", \"-c\", {script:?}]\nfork = true\n"
    ));
    let mut dispatcher = start(directory(), &body);
    dispatcher.wait_joined("web", 1);
    let (before, worker) = (parent(&dispatcher), pid(&dispatcher, "web-1"));
    let wrapper = parent_of(before);
    assert!(children_of(dispatcher.process.pid()).contains(&wrapper));
    let mut client = Client::connect(dispatcher.address("web")).unwrap();
    // The wrapper alone forks nothing, so it is ended.
    end(before, Signal::SIGKILL);
    wait_until("the wrapper to end", || !lives(wrapper));
    client.echo("continues");
    end(worker, Signal::SIGTERM);
    let next = replaced(&dispatcher, "web-1", worker);
    client.echo("continues");
    drop(client);
    let (after, wrapper) = (parent_of(next), parent_of(parent_of(next)));
    assert!(children_of(dispatcher.process.pid()).contains(&wrapper));
    assert!(dispatcher.stop().success());
    assert!(![next, after, wrapper].into_iter().any(lives), "the stop left something");
}

#[test]
fn a_parent_that_is_told_to_end_leaves_its_workers() {
    let dispatcher = start(directory(), &forking("blocking", ""));
    dispatcher.wait_joined("web", 1);
    let (parent, worker) = (parent(&dispatcher), pid(&dispatcher, "web-1"));
    let mut client = Client::connect(dispatcher.address("web")).unwrap();
    end(parent, Signal::SIGTERM);
    wait_for_log(&dispatcher, "event=prefork_parent_ended");
    client.echo("continues");
    assert_eq!(pid(&dispatcher, "web-1"), worker);
}

#[test]
fn a_restart_with_another_command_leads_to_a_new_parent() {
    let dispatcher = start(directory(), &forking("blocking", "processes = 2"));
    dispatcher.wait_joined("web", 2);
    let before = parent(&dispatcher);
    let first = pid(&dispatcher, "web-1");
    reload(&dispatcher, &forking("mio", "processes = 2\nenvironment = { NEW = \"{n}\" }"));
    assert_eq!(pid(&dispatcher, "web-1"), first, "a reload ends no process");
    // Until a restart each process is forked from the former command.
    end(first, Signal::SIGKILL);
    let first = replaced(&dispatcher, "web-1", first);
    assert_eq!(parent_of(first), before);
    let second = pid(&dispatcher, "web-2");
    let output = run(&dispatcher, &["restart", "web/web-1"]);
    assert!(output.status.success(), "{output:?}");
    let next = replaced(&dispatcher, "web-1", first);
    let after = parent_of(next);
    assert_ne!(after, before);
    let command = std::fs::read(format!("/proc/{next}/cmdline")).unwrap();
    assert!(command.ends_with(b"prefork\0mio\0"));
    // The old parent still reports its worker, and ends with it.
    assert_eq!(parent_of(second), before);
    let output = run(&dispatcher, &["restart", "web/web-2"]);
    assert!(output.status.success(), "{output:?}");
    let last = parent_of(replaced(&dispatcher, "web-2", second));
    assert_ne!(last, before);
    wait_for_log(&dispatcher, &format!("pid={second} status=\"exit status 0\""));
    wait_until("the old parent to end", || !lives(before));
    wait_for_log(&dispatcher, &format!("event=prefork_parent_ended pool=web pid={before}"));
    assert!(lives(after) && lives(last));
}

#[test]
fn a_restart_leads_to_a_new_parent() {
    let dispatcher = start(directory(), &forking("mio", "processes = 2"));
    dispatcher.wait_joined("web", 2);
    let (before, workers) = (parent(&dispatcher), pids(&dispatcher));
    let output = run(&dispatcher, &["restart", "web"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    wait_until("the old parent to end", || !lives(before));
    assert!(!workers.iter().any(|&pid| lives(pid)));
    dispatcher.wait_joined("web", 2);
    let after = parent(&dispatcher);
    assert!(children_of(dispatcher.process.pid()).contains(&after));
    Client::connect(dispatcher.address("web")).unwrap().echo("renewed");
}

#[test]
fn scaling_forks_and_ends_workers() {
    let dispatcher = start(directory(), &forking("blocking", ""));
    dispatcher.wait_joined("web", 1);
    let parent = parent(&dispatcher);
    let scale = |count: &str| {
        let output = run(&dispatcher, &["scale", "web", count]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    scale("4");
    dispatcher.wait_joined("web", 4);
    let all = pids(&dispatcher);
    assert!(all.iter().all(|&pid| parent_of(pid) == parent));
    scale("1");
    wait_until("the others to end", || all.iter().filter(|&&pid| lives(pid)).count() == 1);
    assert!(lives(parent));
    // Without wanted processes the parent ends, too.
    reload(&dispatcher, &one_pool(""));
    wait_until("the workers to end", || !all.iter().any(|&pid| lives(pid)));
    wait_until("the parent to end", || !lives(parent));
    reload(&dispatcher, &forking("blocking", ""));
    dispatcher.wait_joined("web", 1);
    Client::connect(dispatcher.address("web")).unwrap().echo("again");
}

#[test]
fn a_parent_with_a_second_thread_is_refused_clearly() {
    let keys =
        "environment = { TEST_PREFORK = \"thread\", RUST_LOG = \"error\" }\noutput = \"log\"";
    let dispatcher = start(directory(), &forking("blocking", keys));
    let reason = "the parent has 2 threads; a process that forks workers must have one: start \
                  threads and runtimes in the closure of prefork";
    wait_for_log(&dispatcher, "event=process_not_started pool=web process=1");
    wait_for_log(&dispatcher, &format!("error=\"{reason}\""));
    // The log of the parent.
    wait_for_log(&dispatcher, &format!("worker web-1 is not forked: {reason}"));
    let status = dispatcher.status();
    assert!(status.faults.iter().any(|fault| fault.text.contains("has 2 threads")));
    assert!(pids(&dispatcher).is_empty());
}

#[test]
fn a_silent_parent_is_killed_and_disturbs_no_other_pool() {
    let temp = directory();
    let keys = "environment = { TEST_PREFORK = \"hang\" }\nstart_timeout = \"1s\"";
    let body = format!(
        "{}[[listener]]\nname = \"calm\"\naddress = \"127.0.0.1:0\"\npool = \"calm\"\n\n[pool.calm]\n\
         [pool.calm.spawn]\ncommand = [\"DIR/test-worker\", \"prefork\", \"blocking\"]\nfork = true\n",
        forking("blocking", &format!("{keys}\n"))
    );
    let dispatcher = start(temp, &body);
    dispatcher.wait_joined("calm", 1);
    let calm = worker(&dispatcher.status(), "calm-1").unwrap().pid;
    let mut client = Client::connect(dispatcher.address("calm")).unwrap();
    for count in 1..=2 {
        wait_until("a parent to be killed", || {
            dispatcher
                .log()
                .matches("error=\"the parent did not fork within start_timeout (1s)")
                .count()
                >= 2 * count
        });
        client.echo("not disturbed");
    }
    wait_for_log(&dispatcher, "event=process_not_started pool=web process=1");
    wait_for_log(&dispatcher, "calls worker_sdk::prefork");
    assert_eq!(worker(&dispatcher.status(), "calm-1").unwrap().pid, calm);
    // A reload mends it.
    let mended = body.replace("\"hang\"", "\"\"");
    reload(&dispatcher, &mended);
    dispatcher.wait_joined("web", 1);
}

#[test]
fn a_failing_parent_and_a_program_without_forks_are_reported() {
    let dispatcher =
        start(directory(), &forking("blocking", "environment = { TEST_TABLE = \"1\" }"));
    dispatcher.wait_joined("web", 1);
    let body = one_pool("[pool.web.spawn]\ncommand = [\"/bin/false\"]\nfork = true\n");
    let restart = || run(&dispatcher, &["restart", "web", "--wait"]).status.code();
    reload(&dispatcher, &body);
    assert_eq!(restart(), Some(70));
    wait_for_log(&dispatcher, "error=\"the process that forks the workers of the pool has ended");
    reload(&dispatcher, &forking("blocking", "environment = { TEST_PREFORK = \"fails\" }"));
    assert_eq!(restart(), Some(70));
    wait_for_log(&dispatcher, "status=\"exit status 1\"");
    // It writes this in two parts, and the log may come between them.
    wait_for_log(&dispatcher, "it was told to fail\"");
    reload(&dispatcher, &forking("blocking", ""));
    assert_eq!(restart(), Some(0));
    dispatcher.wait_joined("web", 1);
}

/// The same program is an ordinary worker without `fork = true`.
#[test]
fn without_the_key_the_process_itself_is_the_worker() {
    let body = forking("blocking", "processes = 2").replace("fork = true", "fork = false");
    let mut dispatcher = start(directory(), &body);
    dispatcher.wait_joined("web", 2);
    let own = dispatcher.process.pid();
    assert!(pids(&dispatcher).iter().all(|&pid| parent_of(pid) == own));
    Client::connect(dispatcher.address("web")).unwrap().echo("served");
    assert!(dispatcher.stop().success());
}

#[test]
fn account_limits_and_directory_reach_forked_workers() {
    if !is_root() {
        return;
    }
    let keys = "user = \"nobody\"\ngroup = 65534\numask = \"0027\"\ndirectory = \"DIR\"\n\
                limits = { nofile = \"500:600\" }\noutput = \"log\"";
    let mut dispatcher = start(directory(), &forking("blocking", keys));
    dispatcher.wait_joined("web", 1);
    let (worker, parent) = (pid(&dispatcher, "web-1"), parent(&dispatcher));
    for process in [worker, parent] {
        assert_eq!(words(process, "status", "Uid:"), ["65534"; 4]);
        assert_eq!(words(process, "status", "Umask:"), ["0027"]);
        assert_eq!(words(process, "limits", "Max open files")[..2], ["500", "600"]);
    }
    assert!(dispatcher.stop().success());
    assert!(!lives(worker) && !lives(parent));
}

#[test]
fn the_example_serves_from_one_table() {
    let program = example("prefork");
    let keys = format!("[pool.web.spawn]\ncommand = [{program:?}]\nfork = true\nprocesses = 2\n");
    let mut dispatcher = start(directory(), &one_pool(&format!("{keys}output = \"log\"\n")));
    dispatcher.wait_joined("web", 2);
    for number in 0..6u64 {
        let mut stream = connect(dispatcher.address("web"));
        let request = format!("GET /{number} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with(&format!("\r\n\r\n{}\n", number * number)), "{answer}");
    }
    wait_for_log(&dispatcher, "name=web-parent");
    assert_eq!(dispatcher.log().matches("line=\"loaded in").count(), 1);
    assert!(dispatcher.stop().success());
}

#[test]
fn forked_workers_outlive_the_dispatcher_and_are_adopted() {
    let keys = "processes = 2\non_dispatcher_loss = \"serve\"\noutput = \"log\"\n\
                environment = { OWN = \"{name}\" }";
    let mut dispatcher = start(directory(), &forking("blocking", keys));
    dispatcher.wait_joined("web", 2);
    let address = dispatcher.address("web");
    let (before, workers) = (parent(&dispatcher), pids(&dispatcher));
    let _ends = Ended(workers.clone());
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    let config = forking("blocking", keys).replace("127.0.0.1:0", &address.to_string());
    write_config(&dispatcher.dir, &config.replace("DIR", &dispatcher.dir.display().to_string()));
    dispatcher.process.kill();
    wait_until("the parent to end", || !lives(before));
    clients.iter_mut().for_each(|client| client.echo("without a dispatcher"));

    let mut next = Dispatcher::start_in(&dispatcher.dir);
    next.wait_joined("web", 2);
    let mut adopted = pids(&next);
    adopted.sort();
    assert_eq!(
        adopted,
        {
            let mut all = workers.clone();
            all.sort();
            all
        },
        "the same ones"
    );
    clients.iter_mut().for_each(|client| client.echo("adopted"));
    Client::connect(address).unwrap().echo("a new one");
    // A replacement is forked by a parent of the new dispatcher.
    let first = pid(&next, "web-1");
    end(first, Signal::SIGKILL);
    let replacement = replaced(&next, "web-1", first);
    assert!(children_of(next.process.pid()).contains(&parent_of(replacement)));
    wait_for_log(&next, &format!("pid={first} status=\""));
    let line = format!("name=web-1 pid={replacement} stream=stdout line=\"forked web-1 \"");
    wait_for_log(&next, &line);
    assert_eq!(pids(&next).len(), 2);
    assert!(next.stop().success());
    wait_until("all to end", || !workers.iter().any(|&pid| lives(pid)) && !lives(replacement));
}

/// Processes that end with the test, however it ends.
struct Ended(Vec<i32>);

impl Drop for Ended {
    fn drop(&mut self) {
        for &pid in self.0.iter().filter(|&&pid| lives(pid)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

#[test]
fn a_parent_that_loads_ends_with_its_dispatcher() {
    let dispatcher = start(
        directory(),
        &forking("blocking", "environment = { TEST_PREFORK = \"hang\" }\noutput = \"log\""),
    );
    wait_for_log(&dispatcher, "event=prefork_parent_started");
    let mut dispatcher = dispatcher;
    let all = children_of(dispatcher.process.pid());
    let _ends = Ended(all.clone());
    assert_eq!(all.len(), 1, "the parent");
    dispatcher.process.kill();
    wait_until("the parent to end", || !lives(all[0]));
}

#[test]
fn the_parent_ends_with_its_dispatcher() {
    let mut dispatcher = start(directory(), &forking("blocking", "processes = 2"));
    dispatcher.wait_joined("web", 2);
    let (parent, all) = (parent(&dispatcher), pids(&dispatcher));
    dispatcher.process.kill();
    // The workers are drained by default, and have no connection.
    wait_until("all to end", || !lives(parent) && !all.iter().any(|&pid| lives(pid)));
}
