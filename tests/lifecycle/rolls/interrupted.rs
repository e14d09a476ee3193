//! The dispatcher ends in the middle of a roll: by a crash, a restart or a take-over. With
//! `on_dispatcher_loss = "serve"` the next one goes on with the roll.

use super::super::take_over::replace;
use super::*;

/// A pool with processes that outlive the dispatcher.
pub(super) fn serving(address: SocketAddr, command: &str, keys: &str) -> String {
    let keys = format!("on_dispatcher_loss = \"serve\"\nprocesses = 4\n{keys}");
    spawning(command, &keys).replace("127.0.0.1:0", &address.to_string())
}

/// A version whose processes start once there is a file for them.
pub(super) fn gated() -> String {
    script("while ! test -e DIR/go-$DISPATCH_NAME; do sleep 0.05; done; exec SERVER blocking")
}

pub(super) fn open_gate(place: &Place, number: usize) {
    std::fs::write(place.path().join(format!("go-web-{number}")), "").unwrap();
}

/// A dispatcher with the first version, clients of it, and the configuration of the second one.
pub(super) fn begin(place: &Place, address: SocketAddr, next: &str) -> (Dispatcher, Vec<Client>) {
    let dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 4);
    dispatcher.prove_all(address);
    let mut held: Vec<Client> = Vec::new();
    wait_until("clients at every worker", || {
        held.push(Client::connect(address).unwrap());
        tally(&held).len() == 4
    });
    reload(&dispatcher, next);
    (dispatcher, held)
}

/// Waits until so many places have the second version, and the next process has been started.
fn wait_for_steps(dispatcher: &Dispatcher, place: &Place, count: usize) {
    dispatcher.wait_status("so many steps", |status| {
        steps(status) == Some(count as u32)
            && plain(status).iter().filter(|version| *version == "2").count() == count
            && is("progressing")(status)
    });
    wait_until("the next process", || {
        let of_it = |pid: &i32| variable(*pid, "VERSION").is_some_and(|version| version == "2");
        place.processes().iter().filter(|pid| of_it(pid)).count() > count
    });
}

/// The roll is over, every process is new, and the clients of old ones go on.
fn complete(dispatcher: &Dispatcher, place: &Place, waiting: Running, mut held: Vec<Client>) {
    (1..=4).for_each(|number| open_gate(place, number));
    let Outcome { code, text } = waiting.wait();
    assert_eq!(code, 0, "{text}\n{}", dispatcher.log());
    let status = dispatcher.wait_status("the end of the roll", |status| {
        is("done")(status) && plain(status) == ["2"; 4]
    });
    assert_eq!((processes(&status).generation, roll(&status).replaced), (2, 4));
    assert_eq!(roll(&status).remaining, 0);
    assert!(!processes(&status).restart_needed);
    // A worker that was leaving does not join again, so its connections are not known any more.
    let leaving = &processes(&status).leaving_generations;
    assert_eq!((leaving.len(), leaving[0].processes), (1, 4), "{leaving:?}");
    assert!(leaving[0].connections <= held.len() as u64, "{leaving:?}");
    held.iter_mut().for_each(|client| client.echo("at an old worker"));
    held.into_iter().for_each(Client::finish);
    dispatcher.wait_status("the old ones to end", |status| {
        processes(status).leaving == 0 && place.processes() == pids(status)
    });
}

fn goes_on_after(signal: Signal, steps: usize) {
    let address = free_address();
    let place = Place::new(&serving(address, &good("blocking"), &version("1", "")));
    let next = serving(address, &gated(), &version("2", ""));
    let (mut dispatcher, mut held) = begin(&place, address, &next);
    let waiting = Running::start(place.path(), &["restart", "web", "--wait"]);
    (1..=steps).for_each(|number| open_gate(&place, number));
    wait_for_steps(&dispatcher, &place, steps);
    dispatcher.process.signal(signal);
    dispatcher.process.wait();
    held.iter_mut().for_each(|client| client.echo("without a dispatcher"));
    drop(dispatcher);
    let dispatcher = Dispatcher::start_in(place.path());
    let status = dispatcher.wait_status("all to join again", |status| {
        processes(status).active == 4 && plain(status).len() == 4
    });
    assert!(is("progressing")(&status), "{:?}", processes(&status));
    assert_eq!((roll(&status).replaced, roll(&status).remaining), (steps as u32, 4 - steps as u32));
    assert_eq!(plain(&status).iter().filter(|version| *version == "2").count(), steps);
    assert!(dispatcher.log().contains("event=roll_resumed pool=web generation=2"));
    // The number of processes is bounded as before.
    assert!(place.processes().len() <= 4 + steps + 2, "{:?}", place.processes());
    complete(&dispatcher, &place, waiting, held);
}

#[test]
fn a_roll_goes_on_after_a_crash() {
    goes_on_after(Signal::SIGKILL, 0);
    goes_on_after(Signal::SIGKILL, 2);
    goes_on_after(Signal::SIGKILL, 3);
}

#[test]
fn a_roll_goes_on_after_a_restart() {
    goes_on_after(Signal::SIGUSR1, 0);
    goes_on_after(Signal::SIGUSR1, 2);
    goes_on_after(Signal::SIGUSR1, 3);
}

#[test]
fn a_roll_goes_on_after_a_take_over() {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root: without it this take-over is refused");
    }
    let address = free_address();
    let place = Place::new(&serving(address, &good("blocking"), &version("1", "")));
    let next = serving(address, &gated(), &version("2", ""));
    let (mut dispatcher, held) = begin(&place, address, &next);
    with_clients(address, || {
        let waiting = Running::start(place.path(), &["restart", "web", "--wait"]);
        for steps in 0..3 {
            if steps > 0 {
                open_gate(&place, steps);
            }
            wait_for_steps(&dispatcher, &place, steps);
            replace(&mut dispatcher);
        }
        dispatcher.wait_status("all to join again", |status| plain(status).len() == 4);
        complete(&dispatcher, &place, waiting, held);
    });
    dispatcher.stop();
    wait_until("all processes to end", || place.processes().is_empty());
}

#[test]
fn a_dispatcher_that_is_killed_at_any_moment_of_a_roll() {
    let address = free_address();
    let place = Place::new(&serving(address, &good("blocking"), &version("1", "")));
    let next = serving(address, &good("blocking"), &version("2", "min_ready = \"50ms\""));
    let (mut dispatcher, mut held) = begin(&place, address, &next);
    order(&dispatcher, &["restart", "web"]);
    let mut over = false;
    for round in 0..30u64 {
        // Another moment each time. The result does not depend on it.
        std::thread::sleep(std::time::Duration::from_millis(round * 37 % 101));
        over = is("done")(&dispatcher.status());
        dispatcher.process.kill();
        held.iter_mut().for_each(|client| client.echo("it lasts"));
        drop(dispatcher);
        dispatcher = Dispatcher::start_in(place.path());
        let status = dispatcher.status();
        assert!(is("progressing")(&status) || is("done")(&status), "{:?}", processes(&status));
        if over {
            break;
        }
    }
    assert!(over, "a roll makes progress although its dispatcher is killed again and again");
    let status = dispatcher.wait_status("the end", |status| plain(status) == ["2"; 4]);
    assert!(is("done")(&status) && processes(&status).generation == 2, "{:?}", processes(&status));
    held.into_iter().for_each(Client::finish);
    dispatcher.wait_status("the old ones to end", |status| {
        processes(status).leaving == 0 && place.processes() == pids(status)
    });
}

#[test]
fn processes_that_end_with_the_dispatcher_are_all_new_after_its_restart() {
    let address = free_address();
    let drain = |body: String| body.replace("\"serve\"", "\"drain\"");
    let place = Place::new(&drain(serving(address, &good("blocking"), &version("1", ""))));
    let next = drain(serving(address, &gated(), &version("2", "")));
    let (mut dispatcher, held) = begin(&place, address, &next);
    let waiting = Running::start(place.path(), &["restart", "web", "--wait"]);
    open_gate(&place, 1);
    wait_for_steps(&dispatcher, &place, 1);
    drop(held);
    assert!(dispatcher.stop().success());
    wait_until("all processes to end", || place.processes().is_empty());
    drop(dispatcher);
    (1..=4).for_each(|number| open_gate(&place, number));
    let dispatcher = Dispatcher::start_in(place.path());
    let Outcome { code, text } = waiting.wait();
    assert_eq!(code, 75, "{text}");
    assert!(text.contains("does not know the roll to generation 2 of pool web"), "{text}");
    assert!(text.contains("its processes were started from the configuration"), "{text}");
    let status = dispatcher.wait_status("all to be new", |status| plain(status) == ["2"; 4]);
    assert_eq!(place.processes(), pids(&status));
    let text = order(&dispatcher, &["rollout", "status", "web"]);
    assert!(text.contains("not restarted since the dispatcher was started"), "{text}");
}
