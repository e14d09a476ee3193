//! Rolls of pools with real processes: new versions that work and that do not, what clients see,
//! and dispatchers that end in the middle of a roll.

mod bad_versions;
mod checks;
mod clients;
mod generations;
mod interrupted;
mod journals;
mod meanwhile;
mod soak;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dispatcher::api::status::{ProcessesStatus, RollStatus, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_support::*;

use super::adoption::{Place, free_address, pids};

/// One listener and the pool `web`, whose processes are started by this command.
fn spawning(command: &str, keys: &str) -> String {
    one_pool(&format!(
        "wait_for_worker = \"10m\"\n[pool.web.spawn]\noutput = \"log\"\ncommand = {command}\n{keys}\n"
    ))
}

/// The command of a script, in which `DIR` is the directory of the test and `SERVER` the test
/// worker.
fn script(text: &str) -> String {
    let text = text.replace("SERVER", example("test-worker").to_str().unwrap());
    format!("[\"sh\", \"-c\", {text:?}]")
}

/// The command of a version that works.
fn good(kind: &str) -> String {
    format!("[{:?}, {kind:?}]", example("test-worker"))
}

/// What a command printed, and its exit code.
struct Outcome {
    code: i32,
    text: String,
}

fn outcome(output: std::process::Output) -> Outcome {
    let text = [output.stdout, output.stderr].concat();
    Outcome { code: output.status.code().expect("an exit"), text: String::from_utf8(text).unwrap() }
}

fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).arg("--admin").arg(dir.join("admin.sock"));
    command
}

fn run(dispatcher: &Dispatcher, arguments: &[&str]) -> Outcome {
    outcome(command(&dispatcher.dir, arguments).output().unwrap())
}

/// Runs a command that must succeed.
#[track_caller]
fn order(dispatcher: &Dispatcher, arguments: &[&str]) -> String {
    let Outcome { code, text } = run(dispatcher, arguments);
    assert_eq!(code, 0, "{arguments:?}: {text}\n{}", dispatcher.log());
    text
}

/// Reads another configuration; the processes stay.
#[track_caller]
fn reload(dispatcher: &Dispatcher, body: &str) -> String {
    write_config(&dispatcher.dir, body);
    order(dispatcher, &["reload"])
}

/// A command that goes on while the test does other things.
struct Running(Option<std::process::Child>);

impl Running {
    fn start(dir: &Path, arguments: &[&str]) -> Running {
        let mut command = command(dir, arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running(Some(command.spawn().unwrap()))
    }

    fn wait(mut self) -> Outcome {
        wait_until("the command to end", || self.0.as_mut().unwrap().try_wait().unwrap().is_some());
        outcome(self.0.take().unwrap().wait_with_output().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn processes(status: &Status) -> &ProcessesStatus {
    pool(status, "web").processes.as_ref().expect("it starts processes")
}

fn roll(status: &Status) -> &RollStatus {
    processes(status).roll.as_ref().expect("a roll")
}

/// The number of processes that the last roll has replaced, if there was one.
fn steps(status: &Status) -> Option<u32> {
    processes(status).roll.as_ref().map(|roll| roll.replaced)
}

/// Whether the last roll is in this state.
fn is(state: &str) -> impl Fn(&Status) -> bool {
    move |status| processes(status).roll.as_ref().is_some_and(|roll| roll.state == state)
}

/// The value of a variable in the environment of a process.
fn variable(pid: i32, name: &str) -> Option<String> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let environment = String::from_utf8_lossy(&environment).into_owned();
    let mut words = environment.split('\0');
    words.find_map(|word| Some(word.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}

/// The variable `VERSION` of each active worker, by name.
fn versions(status: &Status) -> Vec<(String, String)> {
    let active = pool(status, "web").workers.iter().filter(|worker| worker.state != "draining");
    let mut versions: Vec<_> = active
        .map(|worker| (worker.name.clone(), variable(worker.pid, "VERSION").unwrap_or_default()))
        .collect();
    versions.sort();
    versions
}

/// The versions alone, in the order of the places.
fn plain(status: &Status) -> Vec<String> {
    versions(status).into_iter().map(|(_, version)| version).collect()
}

/// `environment = …` with a version, and more keys.
fn version(version: &str, keys: &str) -> String {
    format!("environment = {{ VERSION = \"{version}\" }}\n{keys}")
}

/// Ends the clients of [`with_clients`], even if the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Does something while clients connect, talk and end, one after another in each of two threads.
/// Fails if one of them is refused, reset or closed. Returns how many there were.
fn with_clients<T>(address: SocketAddr, action: impl FnOnce() -> T) -> (T, u64) {
    let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    let result = std::thread::scope(|scope| {
        let _over = Over(&over);
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    let mut client = Client::connect(address).expect("neither refused nor reset");
                    client.echo("a question");
                    client.finish();
                    served.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        action()
    });
    (result, served.load(Ordering::SeqCst))
}
