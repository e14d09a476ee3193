//! Socket files that another program removes, and errors when a socket cannot be made.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use dispatcher::api::status::Status;
use nix::sys::signal::Signal;

use test_support::reloading::{self, names, reload};
use test_support::*;

const BODY: &str = "admin_http = \"127.0.0.1:0\"\n\
    [[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n\
    [[listener]]\nname = \"local\"\naddress = \"unix:DIR/local.sock\"\npool = \"web\"\nmode = \"0600\"\n\
    [pool.web]\n";

/// One request over TCP; returns the code and the body.
fn over_tcp(dispatcher: &Dispatcher, path: &str) -> (u16, String) {
    use std::io::{Read, Write};
    let log = dispatcher.log();
    let line = log.lines().find(|line| line.contains("event=admin_http ")).unwrap();
    let address = line.rsplit("address=").next().unwrap().to_owned();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn status(dispatcher: &Dispatcher) -> Status {
    let (code, body) = over_tcp(dispatcher, "/v1/status");
    assert_eq!(code, 200);
    serde_json::from_str(&body).unwrap()
}

fn missing(dispatcher: &Dispatcher) -> Vec<String> {
    status(dispatcher).socket_files_missing.into_iter().map(|file| file.socket).collect()
}

/// Faults about missing files: the file, whether it is still missing, and the text.
fn faults(dispatcher: &Dispatcher) -> Vec<(String, bool, String)> {
    let faults = status(dispatcher).faults.into_iter();
    let files = faults.filter(|fault| fault.kind == "socket_file_missing");
    files.map(|fault| (fault.subject, fault.ongoing, fault.text)).collect()
}

#[test]
fn a_removed_socket_file_is_reported_and_made_again_by_a_reload() {
    let dispatcher = Dispatcher::start(BODY);
    let _first = dispatcher.workers("blocking", "web", 1);
    let mut live = Client::connect(dispatcher.address("web")).unwrap();
    assert_eq!(over_tcp(&dispatcher, "/readyz").0, 200);
    let local = dispatcher.dir.join("local.sock");
    std::fs::remove_file(dispatcher.dispatch()).unwrap();
    std::fs::remove_file(&local).unwrap();
    wait_until("it to be noticed", || {
        missing(&dispatcher) == ["dispatch_socket", "listener local"]
    });
    wait_for_log(&dispatcher, "event=socket_file_missing socket=dispatch_socket path=");
    wait_until("two faults", || faults(&dispatcher).len() == 2);
    for ((subject, ongoing, text), file) in
        faults(&dispatcher).into_iter().zip(["dispatch.sock", "local.sock"])
    {
        assert!(subject == "dispatch_socket" || subject == "listener local", "{subject}");
        assert!(ongoing && text.contains(file) && text.contains("a reload creates it"), "{text}");
    }
    let (code, body) = over_tcp(&dispatcher, "/readyz");
    assert!(code == 503 && body.contains("dispatch.sock") && body.contains("reload"), "{body}");
    let shown = reloading::run(&dispatcher, &["status"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("socket file missing: dispatch_socket"), "{shown}");

    let done = reload(&dispatcher, BODY);
    assert_eq!(names(&done["added"]).len(), 2, "{done}");
    assert_eq!(names(&done["needs_restart"]), Vec::<&str>::new());
    wait_until("nothing to be missing", || missing(&dispatcher).is_empty());
    wait_until("the faults to be over", || {
        let faults = faults(&dispatcher);
        faults.len() == 2 && faults.iter().all(|(_, on, text)| !on && text.contains("was missing"))
    });
    assert_eq!(over_tcp(&dispatcher, "/readyz").0, 200);
    // The permissions are unchanged.
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dispatcher.dispatch()), mode(&local)), (0o666, 0o600));
    let _second = dispatcher.worker("blocking", "web", "second");
    dispatcher.wait_joined("web", 2);
    let mut line = String::new();
    let stream = UnixStream::connect(&local).unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stream), &mut line).unwrap();
    assert!(line.contains(" local "), "{line}");
    live.echo("all the while");
    // The socket is still locked.
    let output = run(&dispatcher.dir);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(69) && said.contains("is in use by another process, "),
        "{said}"
    );
    assert!(said.contains(&format!("{} (dispatcher)", dispatcher.process.pid())), "{said}");

    // The admin socket itself, with its lock file: only a signal can reload.
    for file in ["admin.sock", "admin.sock.lock"] {
        std::fs::remove_file(dispatcher.dir.join(file)).unwrap();
    }
    wait_until("it to be noticed", || missing(&dispatcher) == ["admin_socket"]);
    dispatcher.process.signal(Signal::SIGHUP);
    wait_until("it to answer", || {
        http_get(&dispatcher.admin(), "/healthz").is_ok_and(|(code, _)| code == 200)
    });
    wait_for_log(&dispatcher, "event=socket_file_back socket=admin_socket");
    // At the end only the lock files are left.
    let mut dispatcher = dispatcher;
    assert!(dispatcher.stop().success());
    for file in ["dispatch.sock", "admin.sock", "local.sock"] {
        assert!(!dispatcher.dir.join(file).exists(), "{file}");
    }
}

#[test]
fn a_socket_file_that_cannot_be_made_again_is_named() {
    let dispatcher = Dispatcher::start(BODY);
    std::fs::remove_file(dispatcher.dispatch()).unwrap();
    std::fs::write(dispatcher.dispatch(), "something else").unwrap();
    wait_until("it to be noticed", || missing(&dispatcher) == ["dispatch_socket"]);
    let done = reload(&dispatcher, &BODY.replace("[pool.web]", "[pool.web]\nhistory = 3"));
    let left = names(&done["needs_restart"]);
    assert!(left.len() == 1 && left[0].contains("not a socket"), "{done}");
    // The other changes are in force.
    assert_eq!(names(&done["changed"]), ["pool web"]);
    assert_eq!(std::fs::read_to_string(dispatcher.dispatch()).unwrap(), "something else");
}

/// `dispatcher run` with the configuration of a directory, which must fail.
fn run(dir: &Path) -> Output {
    let mut command = Command::new(dispatcher_bin());
    command.args(["run", "--config"]).arg(dir.join("dispatcher.toml")).stdin(Stdio::null());
    command.env_remove("NOTIFY_SOCKET").output().unwrap()
}

#[test]
fn a_lock_file_of_another_user_is_named_with_its_owner() {
    use std::os::unix::process::CommandExt;
    if !rustix::process::geteuid().is_root() {
        return skip("only root can make files for others");
    }
    let temp = configure(&one_pool(""));
    std::fs::write(temp.path().join("dispatch.sock.lock"), "").unwrap();
    let lock = temp.path().join("dispatch.sock.lock");
    std::fs::set_permissions(&lock, PermissionsExt::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(temp.path(), Some(65_534), Some(65_534)).unwrap();
    let mut command = unprivileged(temp.path());
    command.args(["run", "--config"]).arg(temp.path().join("dispatcher.toml"));
    let output = command.uid(65_534).gid(65_534).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(77), "{said}");
    let file = lock.display();
    assert!(
        said.contains(&format!("the lock file {file}, which belongs to user root, mode 0600")),
        "{said}"
    );
    assert!(said.contains("remove it"), "{said}");
    // In a directory without permission.
    std::fs::remove_file(&lock).unwrap();
    std::os::unix::fs::chown(temp.path(), Some(0), Some(0)).unwrap();
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(77), "{said}");
    assert!(said.contains("its directory ") && said.contains("belongs to user root"), "{said}");
}

#[test]
fn a_socket_of_the_dispatcher_is_not_blamed_on_another_process() {
    let dispatcher = Dispatcher::start(BODY);
    let refused = |body: &str| {
        write_config(&dispatcher.dir, body);
        let output = reloading::run(&dispatcher, &["reload"]);
        assert_eq!(output.status.code(), Some(78));
        String::from_utf8(output.stderr).unwrap()
    };
    // Another name for the same file that a comparison of paths cannot see: a hard link.
    std::fs::hard_link(dispatcher.dir.join("local.sock"), dispatcher.dir.join("link.sock"))
        .unwrap();
    let more = BODY.replace(
        "[pool.web]\n",
        "[[listener]]\nname = \"more\"\naddress = ADDRESS\npool = \"web\"\n[pool.web]\n",
    );
    let said = refused(&more.replace("ADDRESS", "\"unix:DIR/link.sock\""));
    assert!(said.contains("is in use by this dispatcher itself"), "{said}");
    // A port in use, with an overlapping address.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let fixed = |ip: &str| BODY.replace("127.0.0.1:0\"\npool", &format!("{ip}:{port}\"\npool"));
    let done = reload(&dispatcher, &fixed("127.0.0.1"));
    assert!(!names(&done["added"]).is_empty(), "{done}");
    let said = refused(&fixed("0.0.0.0"));
    assert!(said.contains("this dispatcher itself listens there, as listener `web`"), "{said}");
    assert!(!said.contains("another process"), "{said}");
}

#[test]
fn a_socket_that_systemd_has_passed_is_to_be_named_as_such() {
    let temp = configure(&one_pool(""));
    let path = temp.path().join("dispatch.sock");
    let kind = rustix::net::SocketType::SEQPACKET;
    let family = rustix::net::AddressFamily::UNIX;
    let socket: OwnedFd = rustix::net::socket(family, kind, None).unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 8).unwrap();
    let start = |socket: OwnedFd, name: &str| {
        let script = "exec 3<&0; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=\"$2\" exec \"$0\" run --config \"$1\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, dispatcher_bin()]).arg(temp.path().join("dispatcher.toml"));
        command.arg(name).stdin(Stdio::from(socket)).env_remove("NOTIFY_SOCKET");
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(78));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = start(socket, "dispatch");
    assert!(said.contains("write dispatch_socket = \"systemd:dispatch\""), "{said}");
    // The same for clients' addresses.
    std::fs::remove_file(&path).unwrap();
    let clients = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = clients.local_addr().unwrap().to_string();
    write_config(temp.path(), &one_pool("").replace("127.0.0.1:0", &address));
    let said = start(clients.into(), "web");
    assert!(said.contains("write address = \"systemd:web\""), "{said}");
}
