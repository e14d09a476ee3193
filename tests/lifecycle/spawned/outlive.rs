//! The output of processes that outlive their dispatcher.

use super::*;

/// Ends a process group when the test ends.
struct Group(i32);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = nix::sys::signal::killpg(Pid::from_raw(self.0), Signal::SIGKILL);
    }
}

#[test]
fn a_writing_process_survives_a_crash_and_is_read_on() {
    let temp = directory();
    // A failed write would end the loop.
    let script = "(while echo tick; do echo x >> DIR/ticks; sleep 0.02; done) & WORKER";
    let mut keys = "output = \"log\"\non_dispatcher_loss = \"serve\"".to_owned();
    if geteuid().is_root() {
        keys.push_str("\nuser = \"nobody\"\ngroup = 65534");
        std::fs::File::create(temp.path().join("ticks")).unwrap();
        std::os::unix::fs::chown(temp.path().join("ticks"), Some(NOBODY), None).unwrap();
    }
    let mut dispatcher = start(temp, &scripted(Path::new("DIR"), script, &keys));
    dispatcher.wait_joined("web", 1);
    let pid = pid(&dispatcher, "web-1");
    let _group = Group(pid);
    let mut client = Client::connect(dispatcher.address("web")).unwrap();
    let line = format!("name=web-1 pid={pid} stream=stdout line=\"tick\"");
    wait_for_log(&dispatcher, &line);
    dispatcher.process.kill();
    let ticks = || std::fs::metadata(dispatcher.dir.join("ticks")).map_or(0, |file| file.len());
    let before = ticks();
    wait_until("it to write without a dispatcher", || ticks() > before + 20);
    client.echo("still served");

    // The next dispatcher reads on.
    let before = dispatcher.log().len();
    let mut next = Dispatcher::start_in(&dispatcher.dir);
    next.wait_joined("web", 1);
    assert_eq!(worker(&next.status(), "web-1").unwrap().pid, pid, "it is adopted");
    wait_until("its output in the log", || next.log()[before..].contains(&line));
    client.echo("still served");
    drop(client);
    assert!(next.stop().success());
    // Its parent is process 1 by now, which may not have reaped it.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(stat.is_empty() || stat.contains(") Z "), "the stop left it: {stat}");
}
