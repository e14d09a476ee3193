//! Take-overs that are refused: the running dispatcher serves on.

use std::os::unix::fs::PermissionsExt;

use super::deaths::Peer;
use super::*;

/// Runs a new dispatcher that is expected to fail. Returns its exit code and its message.
fn refused(dir: &Path, command: Command) -> (Option<i32>, String) {
    let output = taking_over(dir, command).stderr(Stdio::piped()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_foreign_user_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root, to be two users");
    }
    let address = free_address();
    let temp = configure(&one_listener(address, ""));
    let dispatcher = Dispatcher::start_in(temp.path());
    let _workers = dispatcher.workers("blocking", "web", 1);
    let socket = temp.path().join("dispatch.sock.take-over");
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (code, message) = refused(temp.path(), unprivileged(temp.path()));
    assert_eq!(code, Some(69), "{message}");
    assert!(message.contains("Permission denied"), "{message}");
    // The credentials are checked as well.
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
    let (code, message) = refused(temp.path(), unprivileged(temp.path()));
    assert_eq!(code, Some(69), "{message}");
    assert!(message.contains("user 65534 may not take over: only root and user 0"), "{message}");
    Client::connect(address).unwrap().finish();
}

#[test]
fn without_root_workers_of_the_same_user_forbid_it() {
    let address = free_address();
    let spawn = "[pool.web.spawn]\ncommand = [\"/bin/sleep\", \"1000\"]\nprocesses = 1\n";
    let temp = configure(&one_listener(address, spawn));
    let dir = temp.path();
    std::fs::set_permissions(dir, PermissionsExt::from_mode(0o777)).unwrap();
    let mut command = unprivileged(dir);
    std::fs::set_permissions(dir, PermissionsExt::from_mode(0o777)).unwrap();
    let mut dispatcher = Dispatcher::start_as(dir, command.env_remove("NOTIFY_SOCKET"));
    let (code, message) = refused(dir, unprivileged_again(dir));
    assert_eq!(code, Some(69), "{message}");
    assert!(message.contains("any of them could take its listeners"), "{message}");
    assert!(dispatcher.process.running());
    wait_for_log(&dispatcher, "event=take_over_refused");
    dispatcher.process.signal(Signal::SIGQUIT);
    dispatcher.process.signal(Signal::SIGQUIT);
    dispatcher.process.wait();
}

/// Like [`unprivileged`], with the program that is already there.
fn unprivileged_again(dir: &Path) -> Command {
    use std::os::unix::process::CommandExt;
    if !nix::unistd::geteuid().is_root() {
        return Command::new(dispatcher_bin());
    }
    let mut command = Command::new(dir.join("program"));
    command.uid(65_534).gid(65_534).current_dir("/");
    command
}

#[test]
fn nothing_to_take_over_and_a_service_manager_are_errors() {
    let address = free_address();
    let temp = configure(&one_listener(address, ""));
    let (code, message) = refused(temp.path(), Command::new(dispatcher_bin()));
    assert_eq!(code, Some(69), "{message}");
    assert!(message.contains("no running dispatcher offers a take-over"), "{message}");
    let mut command = taking_over(temp.path(), Command::new(dispatcher_bin()));
    command.env("NOTIFY_SOCKET", temp.path().join("notify")).stderr(Stdio::piped());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(69));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("systemctl restart"), "{message}");
    // A dispatcher under a service manager offers none.
    let mut managed = Command::new(dispatcher_bin());
    managed.env("NOTIFY_SOCKET", temp.path().join("notify"));
    let dispatcher = Dispatcher::start_as(temp.path(), &mut managed);
    assert!(dispatcher.dispatch().exists());
    let (code, message) = refused(temp.path(), Command::new(dispatcher_bin()));
    assert_eq!(code, Some(69), "{message}");
    assert!(message.contains("no running dispatcher offers a take-over"), "{message}");
}

#[test]
fn another_version_is_refused() {
    let temp = configure(&one_listener(free_address(), ""));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let peer = Peer::connect(temp.path());
    peer.send(r#"{"record":"hello","version":999,"program":"9.9.9"}"#);
    let answer = peer.receive().expect("an answer");
    assert!(answer.contains("has version 1 of the take-over"), "{answer}");
    assert!(answer.contains("dispatcher 9.9.9 has version 999"), "{answer}");
    for garbage in ["", "{}", "\u{0}\u{1}", r#"{"record":"commit"}"#] {
        let peer = Peer::connect(temp.path());
        peer.send(garbage);
        let answer = peer.receive().unwrap_or_default();
        assert!(answer.is_empty() || answer.contains("refused"), "{answer}");
    }
    assert!(dispatcher.process.running());
    replace(&mut dispatcher);
}

#[test]
fn a_stop_ends_a_take_over() {
    let temp = configure(&one_listener(free_address(), ""));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let peer = Peer::connect(temp.path());
    peer.hello();
    assert!(peer.receive().unwrap().contains("welcome"));
    dispatcher.process.signal(Signal::SIGTERM);
    assert!(dispatcher.process.wait().success());
    let rest: Vec<String> = std::iter::from_fn(|| peer.receive()).collect();
    assert!(rest.last().unwrap().contains("is being stopped"), "{rest:?}");
    assert!(!dispatcher.dispatch().exists());
}
