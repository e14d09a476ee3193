//! Rolls of a supervised pool under the shipped units while clients run, and a restart of the
//! dispatcher in the middle of one.

use std::collections::BTreeSet;
use std::process::Output;

use dispatcher::api::status::RollStatus;

use super::units::{WORKERS, machine_with};
use super::*;

/// A pool of three whose processes outlive the dispatcher. A process of the second version starts
/// once there is a file for it.
fn configuration(version: u32) -> String {
    let command = match version {
        2 => {
            "[\"sh\", \"-c\", \"while ! test -e /run/test/go-$DISPATCH_NAME; do sleep 0.05; done; \
             exec /run/bin/test-worker blocking\"]"
        }
        _ => "[\"/run/bin/test-worker\", \"blocking\"]",
    };
    format!(
        "{CONFIG}\n[pool.web.spawn]\ncommand = {command}\nprocesses = 3\n\
         on_dispatcher_loss = \"serve\"\nenvironment = {{ VERSION = \"{version}\" }}\n"
    )
}

fn dispatcher(machine: &Machine, arguments: &[&str]) -> Output {
    machine.run("/run/bin/dispatcher", arguments)
}

#[track_caller]
fn order(machine: &Machine, arguments: &[&str]) {
    let output = dispatcher(machine, arguments);
    assert!(output.status.success(), "{output:?}\n{}", machine.log());
}

fn roll(machine: &Machine) -> Option<RollStatus> {
    let status = machine.status()?;
    pool(&status, "web").processes.as_ref()?.roll.clone()
}

fn pids(machine: &Machine) -> BTreeSet<i32> {
    let status = machine.wait_joined(3);
    let active = pool(&status, "web").workers.iter().filter(|worker| worker.state != "draining");
    active.map(|worker| worker.pid).collect()
}

/// Clients come and go while something happens; none of them is refused or reset.
fn under_load(machine: &Machine, action: impl FnOnce()) -> u64 {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let end = Over(&over);
        let threads = [(); 2].map(|()| {
            scope.spawn(|| {
                let mut served = 0;
                while !over.load(Ordering::SeqCst) {
                    let mut client = Client::connect(machine.address).expect("served");
                    client.echo("short");
                    client.finish();
                    served += 1;
                }
                served
            })
        });
        action();
        drop(end);
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

#[test]
fn rolls_and_a_restart_in_the_middle_of_one() {
    let Some(machine) = machine_with(WORKERS, &configuration(1)) else { return };
    machine.order(&["start", WORKERS]);
    let mut all = pids(&machine);
    let mut held = clients(&machine, 6);
    let served = under_load(&machine, || {
        for _ in 0..2 {
            order(&machine, &["restart", "web", "--wait"]);
            let now = pids(&machine);
            assert!(all.is_disjoint(&now));
            all.extend(now);
            held.iter_mut().for_each(|client| client.echo("at an old worker"));
        }
        held.drain(..).for_each(Client::finish);
        machine.configure(&configuration(2));
        machine.order(&["reload", WORKERS]);
        std::fs::write(machine.shared().join("go-web-1"), "").unwrap();
        order(&machine, &["restart", "web"]);
        wait_until("one step", || roll(&machine).is_some_and(|roll| roll.replaced == 1));
        machine.order(&["restart", WORKERS]);
        wait_until("the roll to go on", || {
            roll(&machine).is_some_and(|roll| roll.state == "progressing" && roll.replaced == 1)
        });
        for number in 2..=3 {
            std::fs::write(machine.shared().join(format!("go-web-{number}")), "").unwrap();
        }
        order(&machine, &["rollout", "status", "web", "--wait"]);
        let now = pids(&machine);
        assert!(all.is_disjoint(&now));
        let state = roll(&machine).expect("a roll");
        assert_eq!((state.state.as_str(), state.replaced, state.generation), ("done", 3, 4));
        // The former command is known to the new dispatcher.
        order(&machine, &["rollout", "undo", "web", "--wait"]);
        assert!(pids(&machine).is_disjoint(&now));
    });
    assert!(served > 0);
    assert!(machine.log().contains("event=roll_resumed pool=web generation=4"));
    wait_until("the old ones to end", || {
        let status = machine.status().unwrap();
        pool(&status, "web").processes.as_ref().unwrap().leaving == 0
    });
    machine.order(&["stop", SOCKETS[0], SOCKETS[1], WORKERS]);
    assert_eq!(machine.state(WORKERS), "inactive");
}

#[test]
fn rolls_in_the_unit_without_surviving_workers() {
    let body = configuration(1).replace("\"serve\"", "\"drain\"");
    let Some(machine) = machine_with(SERVICE, &body) else { return };
    machine.order(&["start", SERVICE]);
    let before = pids(&machine);
    under_load(&machine, || {
        for _ in 0..3 {
            order(&machine, &["restart", "web", "--wait"]);
        }
    });
    assert!(pids(&machine).is_disjoint(&before));
    // After a restart all processes are new, and the status does not know of the roll.
    machine.order(&["restart", SERVICE]);
    pids(&machine);
    let output = dispatcher(&machine, &["rollout", "status", "web"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("not restarted since the dispatcher was started"), "{text}");
}
