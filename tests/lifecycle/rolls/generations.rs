//! Generations: how many may leave at a time, one process as a canary, and which command a process
//! is started from.

use std::io::Read;

use super::*;

/// Clients at every one of the two workers.
fn hold(dispatcher: &Dispatcher) -> Vec<Client> {
    let address = dispatcher.address("web");
    let mut held = Vec::new();
    wait_until("clients at both workers", || {
        held.push(Client::connect(address).unwrap());
        tally(&held).len() == 2
    });
    held
}

/// The worker ends the connection.
fn is_closed(mut client: Client) -> bool {
    let mut rest = Vec::new();
    matches!(client.stream.read_to_end(&mut rest), Ok(0))
}

#[test]
fn too_many_leaving_generations_are_refused_and_the_oldest_can_be_ended() {
    let keys = "processes = 2\nmax_leaving_generations = 2\nstop_timeout = \"1s\"";
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), keys));
    dispatcher.wait_joined("web", 2);
    let first = hold(&dispatcher);
    order(&dispatcher, &["restart", "web", "--wait"]);
    let mut second = hold(&dispatcher);
    order(&dispatcher, &["restart", "web", "--wait"]);
    let mut third = hold(&dispatcher);
    let before = pids(&dispatcher.status());
    let Outcome { code, text } = run(&dispatcher, &["restart", "web"]);
    assert_eq!(code, 65, "{text}");
    let refusal = format!(
        "pool web has 2 former generations with connections (max_leaving_generations): the oldest, \
         1, has {} at 2 workers",
        first.len()
    );
    assert!(text.contains(&refusal), "{text}");
    assert!(text.contains("or end them: dispatcher restart web --end-oldest"), "{text}");
    assert_eq!(pids(&dispatcher.status()), before, "nothing was done");
    assert_eq!(processes(&dispatcher.status()).leaving_generations.len(), 2);
    let Outcome { code, text } = run(&dispatcher, &["restart", "web/web-1", "--json"]);
    // One process more is of a generation that leaves anyway, but the limit is of the place.
    assert_eq!(code, 65, "{text}");
    assert!(text.contains("\"problem\":") && text.contains("conflict"), "{text}");
    dispatcher.process.signal(Signal::SIGUSR2);
    wait_for_log(&dispatcher, "event=pool_not_restarted pool=web error=");
    assert!(dispatcher.log().contains("the oldest, 1, has"), "{}", dispatcher.log());
    let ended = first.len() as u64;
    let text = order(&dispatcher, &["restart", "web", "--end-oldest", "--wait"]);
    assert!(text.contains("generation 4: 2 processes to replace"), "{text}");
    assert!(first.into_iter().all(is_closed), "they are closed, not reset");
    second.iter_mut().chain(&mut third).for_each(|client| client.echo("not concerned"));
    let status = dispatcher.wait_status("the first generation to end", |status| {
        let leaving = &processes(status).leaving_generations;
        status.ended_at_deadline == ended
            && leaving.iter().map(|leaving| leaving.generation).eq([2, 3])
    });
    assert_eq!(status.closed.values().sum::<u64>(), 0);
    // Once the clients have gone by themselves, there is room.
    second.into_iter().for_each(Client::finish);
    dispatcher
        .wait_status("one generation", |status| processes(status).leaving_generations.len() == 1);
    order(&dispatcher, &["restart", "web", "--wait"]);
    third.iter_mut().for_each(|client| client.echo("still not concerned"));
}

#[test]
fn zero_means_any_number_of_leaving_generations() {
    let keys = "processes = 2\nmax_leaving_generations = 0";
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), keys));
    dispatcher.wait_joined("web", 2);
    let mut held = Vec::new();
    for _ in 0..5 {
        held.extend(hold(&dispatcher));
        order(&dispatcher, &["restart", "web", "--wait"]);
    }
    held.iter_mut().for_each(|client| client.echo("at one of five generations"));
    assert_eq!(processes(&dispatcher.status()).leaving_generations.len(), 5);
}

#[test]
fn one_worker_is_a_canary_of_the_new_command() {
    let body = |number| spawning(&good("blocking"), &version(number, "processes = 3"));
    let dispatcher = Dispatcher::start(&body("1"));
    dispatcher.wait_joined("web", 3);
    let text = reload(&dispatcher, &body("2"));
    let hint = "pool web: its processes have the former settings until `dispatcher restart web`";
    assert!(text.contains(hint), "{text}");
    assert!(processes(&dispatcher.status()).restart_needed);
    let text = order(&dispatcher, &["rollout", "status", "web"]);
    assert!(text.contains("dispatcher restart web applies them"), "{text}");
    // A process that ends is started from its own command.
    let ended = worker(&dispatcher.status(), "web-1").unwrap().pid;
    kill(Pid::from_raw(ended), Signal::SIGKILL).unwrap();
    dispatcher.wait_status("another process", |status| {
        plain(status) == ["1"; 3] && !pids(status).contains(&ended)
    });
    let text = order(&dispatcher, &["restart", "web/web-2", "--wait"]);
    assert!(text.contains("1 process to replace"), "{text}");
    let status = dispatcher.status();
    assert_eq!(plain(&status), ["1", "2", "1"]);
    assert_eq!((roll(&status).process, roll(&status).state.as_str()), (Some(2), "done"));
    assert!(processes(&status).restart_needed, "of the others");
    // The canary, too, keeps its command.
    let ended = worker(&status, "web-2").unwrap().pid;
    kill(Pid::from_raw(ended), Signal::SIGKILL).unwrap();
    dispatcher.wait_status("another canary", |status| {
        plain(status) == ["1", "2", "1"] && !pids(status).contains(&ended)
    });
    let text = order(&dispatcher, &["rollout", "undo", "web", "--wait"]);
    assert!(text.contains("1 process to replace"), "{text}");
    assert_eq!(plain(&dispatcher.status()), ["1"; 3]);
    // A second canary, and then all.
    order(&dispatcher, &["restart", "web/web-3", "--wait"]);
    assert_eq!(plain(&dispatcher.status()), ["1", "1", "2"]);
    order(&dispatcher, &["restart", "web", "--wait"]);
    let status = dispatcher.status();
    assert_eq!(plain(&status), ["2"; 3]);
    assert!(!processes(&status).restart_needed);
    assert!(order(&dispatcher, &["rollout", "undo", "web", "--wait"]).contains("3 processes"));
    assert_eq!(plain(&dispatcher.status()), ["1"; 3]);
}

#[test]
fn reload_restart_does_both() {
    let body = |number| spawning(&good("blocking"), &version(number, "processes = 3"));
    let dispatcher = Dispatcher::start(&body("1"));
    dispatcher.wait_joined("web", 3);
    write_config(&dispatcher.dir, &body("2"));
    let text = order(&dispatcher, &["reload", "--restart"]);
    assert!(text.contains("pool web: generation "), "{text}");
    assert!(text.contains(": 3 processes to replace, 1 at a time"), "{text}");
    order(&dispatcher, &["rollout", "status", "web", "--wait"]);
    assert_eq!(plain(&dispatcher.status()), ["2"; 3]);
}

#[test]
fn a_crash_loop_starts_from_the_new_command_at_once() {
    let keys = "processes = 2\ncrash_loop_after = 2\nmax_restart_delay = \"1h\"";
    let temp = configure("");
    let flag = temp.path().join("broken");
    let text = format!("test -e {} && exit 9; exec SERVER blocking", flag.display());
    let body = |command: &str, number| spawning(command, &version(number, keys));
    write_config(temp.path(), &body(&script(&text), "1"));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    dispatcher.keep(temp);
    dispatcher.wait_joined("web", 2);
    let whole = worker(&dispatcher.status(), "web-2").unwrap().pid;
    std::fs::write(&flag, "").unwrap();
    let broken = worker(&dispatcher.status(), "web-1").unwrap().pid;
    kill(Pid::from_raw(broken), Signal::SIGKILL).unwrap();
    dispatcher.wait_status("a crash loop", |status| processes(status).crash_loop);
    // The place in the crash loop starts from the new command; the other one is not touched.
    reload(&dispatcher, &body(&good("blocking"), "2"));
    let status = dispatcher.wait_status("both", |status| plain(status) == ["2", "1"]);
    assert!(!processes(&status).crash_loop && processes(&status).restart_needed);
    assert_eq!(worker(&status, "web-2").unwrap().pid, whole);
    order(&dispatcher, &["restart", "web", "--wait"]);
    assert_eq!(plain(&dispatcher.status()), ["2"; 2]);
}
