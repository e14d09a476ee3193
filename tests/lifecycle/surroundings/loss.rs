//! Spawned processes whose dispatcher ends: by a crash, and in order.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::processes::{Ended, lives, worker_pids};
use test_support::*;

/// Two processes, and what they do when the dispatcher is lost; empty for the default.
fn started(action: &str, keys: &str) -> (Dispatcher, Vec<i32>, Vec<Client>) {
    let action = match action {
        "" => String::new(),
        action => format!("on_dispatcher_loss = \"{action}\"\n"),
    };
    let spawn = format!(
        "[pool.web.spawn]\ncommand = [{:?}, \"blocking\"]\nprocesses = 2\n{action}",
        example("test-worker")
    );
    let dispatcher = Dispatcher::start(&format!("{keys}{}", one_pool(&spawn)));
    dispatcher.wait_joined("web", 2);
    let pids = worker_pids(&dispatcher);
    let address = dispatcher.address("web");
    let clients = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    (dispatcher, pids, clients)
}

fn wait_for_their_end(pids: &[i32]) {
    wait_until("the end of the processes", || !pids.iter().any(|&pid| lives(pid)));
}

#[test]
fn drained_processes_end_with_their_clients_after_a_crash() {
    for action in ["", "drain"] {
        let (mut dispatcher, pids, mut clients) = started(action, "");
        let _ends = Ended(pids.clone());
        dispatcher.process.kill();
        clients.iter_mut().for_each(|client| client.echo("served on"));
        // Another dispatcher gets none of them back.
        let next = Dispatcher::start_in(&dispatcher.dir);
        next.wait_joined("web", 2);
        assert!(!worker_pids(&next).iter().any(|pid| pids.contains(pid)));
        clients.iter_mut().for_each(|client| client.echo("served on"));
        assert!(pids.iter().all(|&pid| lives(pid)));
        clients.into_iter().for_each(Client::finish);
        wait_for_their_end(&pids);
        let status = next.status();
        assert_eq!(pool(&status, "web").workers.len(), 2);
        assert!(!next.log().contains("event=worker_left_over"));
    }
}

#[test]
fn stopped_processes_of_a_crashed_dispatcher_end_at_once() {
    let (mut dispatcher, pids, clients) = started("stop", "");
    let _ends = Ended(pids.clone());
    dispatcher.process.kill();
    for mut client in clients {
        let end = std::io::Read::read(&mut client.stream, &mut [0; 16]);
        assert!(matches!(end, Ok(0)), "{end:?}");
    }
    wait_for_their_end(&pids);
}

#[test]
fn serving_processes_of_a_crashed_dispatcher_return() {
    let (mut dispatcher, pids, mut clients) = started("serve", "");
    let _ends = Ended(pids.clone());
    dispatcher.process.kill();
    clients.iter_mut().for_each(|client| client.echo("served on"));
    let next = Dispatcher::start_in(&dispatcher.dir);
    wait_until("them to return", || {
        let now = worker_pids(&next);
        pids.iter().all(|pid| now.contains(pid))
    });
    clients.iter_mut().for_each(|client| client.echo("served on"));
}

/// The connections of a process with "stop" have `stop_timeout` to end, as those of any other.
#[test]
fn an_orderly_stop_is_no_loss() {
    for action in ["drain", "stop", "serve"] {
        let (mut dispatcher, pids, mut clients) = started(action, "stop_timeout = \"1m\"\n");
        let _ends = Ended(pids.clone());
        dispatcher.process.signal(Signal::SIGTERM);
        // The channels end before the dispatch socket does.
        wait_until("the dispatch socket to be closed", || {
            let error = std::os::unix::net::UnixStream::connect(dispatcher.dispatch()).unwrap_err();
            error.kind() == std::io::ErrorKind::ConnectionRefused
        });
        // More than enough for a thread of the process to notice the end of the channel.
        for _ in 0..50 {
            clients.iter_mut().for_each(|client| client.echo("still here"));
        }
        assert!(pids.iter().all(|&pid| lives(pid)), "{action}");
        clients.into_iter().for_each(Client::finish);
        // Long before the deadline of a minute.
        let began = std::time::Instant::now();
        wait_for_their_end(&pids);
        assert!(dispatcher.process.wait().success(), "{action}");
        assert!(began.elapsed().as_secs() < 40, "{action}: {:?}", began.elapsed());
    }
}

#[test]
fn an_orderly_stop_ends_connections_at_its_deadline() {
    let (mut dispatcher, pids, clients) = started("stop", "stop_timeout = \"500ms\"\n");
    let _ends = Ended(pids.clone());
    kill(Pid::from_raw(dispatcher.process.pid()), Signal::SIGTERM).unwrap();
    for mut client in clients {
        let end = std::io::Read::read(&mut client.stream, &mut [0; 16]);
        assert!(matches!(end, Ok(0)), "{end:?}");
    }
    assert!(dispatcher.process.wait().success());
    wait_for_their_end(&pids);
}
