//! `dispatcher top`: one frame of a real dispatcher, and the live screen on a pseudo-terminal.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_support::*;

fn top(dispatcher: &Dispatcher, arguments: &[&str]) -> Output {
    let mut command = Command::new(dispatcher_bin());
    command.arg("top").args(arguments).arg("--admin").arg(dispatcher.admin());
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_snapshot_equals_the_status() {
    let (dispatcher, address) = start_one_pool("handoff_timeout = \"10m\"");
    let workers = dispatcher.workers("tokio", "web", 2);
    let clients: Vec<Client> = (0..10).map(|_| Client::connect(address).unwrap()).collect();
    workers[1].signal(Signal::SIGTERM);
    dispatcher
        .wait_status("one to drain", |status| worker(status, "w1").unwrap().state == "draining");
    // A connection that is not taken yet.
    workers[0].signal(Signal::SIGSTOP);
    let untaken = connect(address);
    let status = dispatcher.wait_status("one in flight", |status| status.in_flight == 1);
    let output = top(&dispatcher, &["--snapshot", "--size", "120x30"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let frame = String::from_utf8(output.stdout).unwrap();
    assert_eq!(frame.lines().count(), 30);
    assert!(
        frame.lines().all(|line| line.chars().count() <= 120) && !frame.contains('\x1b'),
        "{frame}"
    );
    // The cursor is on the worker that joined first.
    assert_eq!(frame.lines().filter(|line| line.starts_with("> ")).count(), 1, "{frame}");
    let words = |line: &'_ str| {
        line.trim_start_matches("> ").split_whitespace().map(str::to_owned).collect()
    };
    let rows: Vec<Vec<String>> = frame.lines().map(words).collect();
    let row = |start: &[&str]| {
        let row = rows
            .iter()
            .find(|row| row.iter().zip(start).filter(|(a, b)| a == b).count() == start.len());
        row.unwrap_or_else(|| panic!("{start:?}:\n{frame}")).clone()
    };
    let pid = status.pid.to_string();
    row(&["dispatcher", &status.version, "pid", &pid]);
    row(&["live", "11", "accepted", "11", "queued", "0", "in", "flight", "1", "taken", "10"]);
    row(&["web", "least-connections", "ready", "2", "11", "0"]);
    let of = |name: &str| worker(&status, name).unwrap();
    let (first, second) = (of("w0"), of("w1"));
    let (id, pid) = (first.id.to_string(), first.pid.to_string());
    let line = row(&["web", "w0", "active", &id, &pid, "1", "6"]);
    assert_eq!(line[line.len() - 3..], ["-", "1", "0"], "{line:?}");
    let (id, pid) = (second.id.to_string(), second.pid.to_string());
    row(&["web", "w1", "draining", &id, &pid, "1", "5"]);
    assert!(frame.contains("accepted per second: "), "{frame}");
    drop((clients, untaken));
}

#[test]
fn top_without_a_dispatcher_or_terminal_gives_a_hint() {
    let temp = tempfile::tempdir().unwrap();
    let socket = temp.path().join("admin.sock");
    let mut command = Command::new(dispatcher_bin());
    command.args(["top", "--snapshot", "--admin"]).arg(&socket);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(said.starts_with("dispatcher: is the dispatcher running? tried "), "{said}");
    let (dispatcher, _) = start_one_pool("");
    let output = top(&dispatcher, &[]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(64), &b""[..]), "{said}");
    assert!(said.contains("--snapshot") && said.contains("dispatcher status"), "{said}");
    assert_eq!(top(&dispatcher, &["--snapshot", "--size", "huge"]).status.code(), Some(64));
}

/// A pseudo-terminal of 100 columns and 30 lines with `top`, or with a shell to start it from.
struct Screen {
    process: Process,
    out: Arc<Mutex<Vec<u8>>>,
}

impl Screen {
    fn open(dispatcher: &Dispatcher, environment: &str) -> Option<Screen> {
        if Command::new("script").arg("--version").output().is_err() {
            skip("needs script");
            return None;
        }
        let top = Screen::command(dispatcher);
        Screen::of(&format!("stty cols 100 rows 30; echo pid $$ dip; {environment} exec {top}"))
    }

    fn command(dispatcher: &Dispatcher) -> String {
        let admin = dispatcher.admin();
        format!("'{}' top --interval 100ms --admin '{}'", dispatcher_bin(), admin.display())
    }

    /// A shell with job control.
    fn shell() -> Option<Screen> {
        if Command::new("bash").arg("--version").output().is_err() {
            skip("needs bash");
            return None;
        }
        if Command::new("script").arg("--version").output().is_err() {
            skip("needs script");
            return None;
        }
        Screen::of(
            "stty cols 100 rows 30; PS1='ready> ' exec bash --norc --noprofile --noediting -i",
        )
    }

    fn of(inner: &str) -> Option<Screen> {
        let mut command = Command::new("script");
        command.args(["-q", "-e", "-f", "-c", inner, "/dev/null"]).env("TERM", "xterm-256color");
        command.env("SHELL", "/bin/sh").env_remove("NO_COLOR");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = Process::start("top", &mut command);
        let mut read = process.child.stdout.take().unwrap();
        let out = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&out);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = read.read(&mut buffer) {
                seen.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Some(Screen { process, out })
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.out.lock().unwrap()).into_owned()
    }

    /// One word: `top` does not draw blanks that are already there.
    fn wait_for(&self, what: &str) {
        wait_until(what, || self.text().contains(what));
    }

    /// Number of occurrences in the output.
    fn count(&self, what: &str) -> usize {
        self.text().matches(what).count()
    }

    fn wait_for_more(&self, what: &str, than: usize) {
        wait_until(what, || self.count(what) > than);
    }

    fn press(&mut self, keys: &str) {
        let stdin = self.process.child.stdin.as_mut().unwrap();
        stdin.write_all(keys.as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    /// The process id of `top`.
    fn pid(&self) -> Pid {
        let text = self.text();
        let rest = text.split("pid ").nth(1).expect("its pid");
        Pid::from_raw(rest.split(" dip").next().unwrap().parse().unwrap())
    }

    /// Whether the last output restored the previous screen and its cursor.
    fn is_restored(&self) -> bool {
        let text = self.text();
        let (_, after) = text.rsplit_once("\x1b[?1049h").expect("a screen of its own");
        after.contains("\x1b[?1049l") && after.rfind("\x1b[?25h") > after.rfind("\x1b[?25l")
    }
}

#[test]
fn keys_drain_and_resume_and_quit_restores_the_terminal() {
    let (dispatcher, address) = start_one_pool("");
    let _workers = dispatcher.workers("tokio", "web", 2);
    // Without connections, a drained worker ends.
    let _clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    let Some(mut screen) = Screen::open(&dispatcher, "") else { return };
    screen.wait_for("quit");
    let is = |state: &'static str| {
        dispatcher.wait_status(state, |status| {
            let states: Vec<&str> = pool(status, "web").workers.iter().map(|w| &*w.state).collect();
            states.contains(&state) || state == "active" && states == ["active", "active"]
        })
    };
    screen.press("jd");
    screen.wait_for("connections.");
    screen.press("y");
    let status = is("draining");
    let drained = pool(&status, "web").workers.iter().find(|w| w.state == "draining").unwrap();
    assert_eq!(drained.id, pool(&status, "web").workers[1].id);
    screen.press("r");
    wait_until("both to be active", || {
        pool(&dispatcher.status(), "web").workers.iter().all(|w| w.state == "active")
    });
    // Colours depend on the environment.
    assert!(
        screen.text().contains("\x1b[38;5;") || screen.text().contains("\x1b[3"),
        "{:?}",
        screen.text()
    );
    screen.press("q");
    assert!(screen.process.wait().success());
    wait_until("its last words", || screen.is_restored());
}

#[test]
fn keys_scale_a_pool() {
    let program = example("test-worker");
    let spawn =
        format!("[pool.web.spawn]\ncommand = [{:?}, \"blocking\"]", program.to_str().unwrap());
    let (dispatcher, address) = start_one_pool(&format!("{spawn}\nprocesses = 1"));
    dispatcher.wait_joined("web", 1);
    let mut client = Client::connect(address).unwrap();
    let Some(mut screen) = Screen::open(&dispatcher, "") else { return };
    screen.wait_for("web-1");
    screen.press("+");
    dispatcher.wait_joined("web", 2);
    screen.wait_for("web-2");
    // Any other key cancels.
    screen.press("-");
    screen.wait_for("fewer");
    screen.press("n");
    screen.press("+");
    dispatcher.wait_joined("web", 3);
    screen.press("-");
    screen.press("y");
    dispatcher.wait_status("one to be gone", |status| pool(status, "web").workers.len() == 2);
    wait_for_log(&dispatcher, "event=pool_scaled pool=web processes=2 before=3");
    client.echo("still here");
    // The last process stays, and the screen shows the reason.
    screen.press("-");
    screen.press("y");
    dispatcher.wait_status("another to be gone", |status| pool(status, "web").workers.len() == 1);
    screen.press("-");
    screen.press("y");
    screen.wait_for("1024");
    wait_for_log(&dispatcher, "event=pool_scaled pool=web processes=1 before=2");
    assert_eq!(dispatcher.log().matches("event=pool_scaled").count(), 4);
    client.echo("to the end");
    screen.press("q");
    assert!(screen.process.wait().success());
}

#[test]
fn a_signal_restores_the_terminal_and_no_color_works() {
    let (dispatcher, _) = start_one_pool("");
    let _workers = dispatcher.workers("tokio", "web", 1);
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let Some(mut screen) = Screen::open(&dispatcher, "NO_COLOR=1") else { return };
        screen.wait_for("quit");
        kill(screen.pid(), signal).unwrap();
        assert!(screen.process.wait().success());
        wait_until("its last words", || screen.is_restored());
        let text = screen.text();
        for color in ["\x1b[31m", "\x1b[32m", "\x1b[34m", "\x1b[36m", "\x1b[38;5;"] {
            let resets = text.replace("\x1b[39m", "");
            assert!(!resets.contains(color), "{color:?}: {text:?}");
        }
    }
}

#[test]
fn top_ends_with_its_terminal() {
    let (dispatcher, _) = start_one_pool("");
    let Some(mut screen) = Screen::open(&dispatcher, "") else { return };
    screen.wait_for("quit");
    let top = screen.pid();
    // The terminal and the process that could pass on a signal are gone.
    kill(Pid::from_raw(screen.process.child.id() as i32), Signal::SIGKILL).unwrap();
    screen.process.wait();
    wait_until("top to end", || kill(top, None).is_err());
}

/// By Ctrl-Z, and by signals of other processes.
#[test]
fn top_redraws_after_stop_and_continue() {
    let (dispatcher, _) = start_one_pool("");
    let _workers = dispatcher.workers("tokio", "web", 1);
    let Some(mut screen) = Screen::shell() else { return };
    screen.wait_for("ready> ");
    screen.press(&format!("{}\n", Screen::command(&dispatcher)));
    screen.wait_for("quit");
    for by_key in [true, false, true] {
        let (drawn, stopped) = (screen.count("quit"), screen.count("Stopped"));
        if by_key {
            screen.press("\x1a");
        } else {
            let shell = children_of(screen.process.pid())[0];
            let top = children_of(shell)[0];
            kill(Pid::from_raw(top), Signal::SIGTSTP).unwrap();
        }
        screen.wait_for_more("Stopped", stopped);
        assert!(screen.is_restored(), "{:?}", screen.text());
        // The shell has restored its terminal modes.
        let modes = screen.count("modes icanon");
        screen.press("stty -a | grep -o -- '-*icanon' | sed 's/^/modes /'\n");
        screen.wait_for_more("modes icanon", modes);
        screen.press("fg\n");
        screen.wait_for_more("quit", drawn);
        // The sort order is shown at the bottom.
        screen.press("s");
        let ordered = screen.count("load");
        screen.wait_for_more("load", ordered.saturating_sub(1));
    }
    let prompts = screen.count("ready> ");
    screen.press("q");
    screen.wait_for_more("ready> ", prompts);
    screen.press("echo ended by $?; exit\n");
    screen.wait_for("ended by 0");
    assert!(screen.process.wait().success());
}

/// SIGSTOP cannot be handled, and another program used the terminal meanwhile.
#[test]
fn after_sigstop_top_takes_the_terminal_again() {
    let (dispatcher, _) = start_one_pool("");
    let Some(mut screen) = Screen::open(&dispatcher, "") else { return };
    screen.wait_for("quit");
    let top = screen.pid();
    let terminal = std::fs::read_link(format!("/proc/{top}/fd/0")).unwrap();
    let stty = |arguments: &[&str]| {
        let output =
            Command::new("stty").arg("-F").arg(&terminal).args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(stty(&["-a"]).contains("-icanon"));
    kill(top, Signal::SIGSTOP).unwrap();
    stty(&["sane"]);
    assert!(!stty(&["-a"]).contains("-icanon"));
    let drawn = screen.count("quit");
    kill(top, Signal::SIGCONT).unwrap();
    // Some versions of script stop together with their child, and perhaps only now.
    let script = Pid::from_raw(screen.process.pid());
    wait_until("the screen to be drawn again", || {
        kill(script, Signal::SIGCONT).unwrap();
        screen.count("quit") > drawn
    });
    assert!(stty(&["-a"]).contains("-icanon"));
    screen.press("q");
    assert!(screen.process.wait().success());
}

#[test]
fn a_terminal_hangup_ends_top_silently() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    if Command::new("setsid").arg("--version").output().is_err() {
        return skip("needs setsid");
    }
    let (dispatcher, _) = start_one_pool("");
    // With the SIGHUP that a terminal sends to its processes, and without it.
    for controlled in [true, false] {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let size = rustix::termios::Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let open = || {
            let mut options = std::fs::File::options();
            std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOCTTY);
            options.read(true).write(true).open(name.to_str().unwrap()).unwrap()
        };
        let mut command = Command::new(if controlled { "setsid" } else { "env" });
        if controlled {
            command.args(["--ctty", "--wait"]);
        }
        command.arg(dispatcher_bin()).args(["top", "--admin"]).arg(dispatcher.admin());
        command.stdin(open()).stdout(open()).stderr(open()).env("TERM", "xterm");
        let mut process = Process::start("top", &mut command);
        // The command's copies of the slave descriptor.
        drop(command);
        let mut master = std::fs::File::from(master);
        let mut seen = String::new();
        while !seen.contains("quit") {
            let mut bytes = [0; 4096];
            let count = master.read(&mut bytes).unwrap();
            seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        drop(master);
        assert_eq!(process.wait().code(), Some(0), "controlled: {controlled}");
    }
}
