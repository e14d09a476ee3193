//! The chat behind a real dispatcher, on two workers, with a directory: raw WebSocket clients, and
//! a real browser.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use test_support::browser::Browser;
use test_support::{Dispatcher, PATIENCE, Process, wait_for, wait_until};
use tokio_tungstenite::tungstenite::{self, Message, WebSocket};

/// A program of this build.
fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_chat")).with_file_name(name);
    assert!(path.exists(), "{} is not built; run: cargo test --workspace", path.display());
    path
}

struct Service {
    dispatcher: Dispatcher,
    directory: Process,
    workers: Vec<Process>,
    address: std::net::SocketAddr,
}

impl Service {
    fn start() -> Service {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // The port stays the same over a restart.
        let temp = test_support::configure(&format!(
            "relay_ticket_key = \"DIR/relay.key\"\n[[listener]]\nname = \"http\"\n\
             address = \"127.0.0.1:{port}\"\npool = \"chat\"\n[pool.chat]\n"
        ));
        let dir = temp.path().to_owned();
        let mut dispatcher = Dispatcher::start_in(&dir);
        dispatcher.keep(temp);
        let text = "socket = \"DIR/relay.sock\"\nticket_key = \"DIR/relay.key\"\ngrace = \"10s\"\n\
                    [namespaces.chat]\npools = [\"chat\"]\n";
        let text = text.replace("DIR", dir.to_str().unwrap());
        std::fs::write(dir.join("directory.toml"), text).unwrap();
        let mut command = Command::new(program("dispatch-directory"));
        command.arg("--config").arg(dir.join("directory.toml")).stdin(Stdio::null());
        command.stderr(std::fs::File::create(dir.join("directory-log")).unwrap());
        let directory = Process::start("dispatch-directory", &mut command);
        let address = ([127, 0, 0, 1], port).into();
        let mut service = Service { dispatcher, directory, workers: Vec::new(), address };
        (0..2).for_each(|n| service.workers.push(service.worker(n)));
        service.dispatcher.wait_joined("chat", 2);
        service
    }

    fn worker(&self, number: usize) -> Process {
        let dir = &self.dispatcher.dir;
        let mut command = Command::new(env!("CARGO_BIN_EXE_chat"));
        command.env("DISPATCH_SOCKET", self.dispatcher.dispatch()).env("DISPATCH_POOL", "chat");
        command.env("DISPATCH_NAME", format!("chat-{number}"));
        command.env("DISPATCH_RELAY_SOCKET", dir.join("relay.sock")).stdin(Stdio::null());
        command.stderr(std::fs::File::create(dir.join(format!("chat-{number}-log"))).unwrap());
        Process::start("chat", &mut command)
    }

    fn restart_dispatcher(&mut self) {
        let dir = self.dispatcher.dir.clone();
        self.dispatcher.process.kill();
        let mut new = Dispatcher::start_in(&dir);
        std::mem::swap(&mut self.dispatcher.process, &mut new.process);
        drop(new);
        self.dispatcher.wait_joined("chat", 2);
    }

    /// What `dispatcher relay` says.
    fn ask(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(test_support::dispatcher_bin());
        command.arg("relay").args(arguments).args(["--namespace", "chat"]);
        command.arg("--socket").arg(self.dispatcher.dir.join("relay.sock"));
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    }

    /// The worker of a client, if it is logged in.
    fn worker_of(&self, name: &str) -> Option<String> {
        let answer = self.ask(&["who", &format!("user:{name}")]);
        answer.split(' ').nth(1).map(str::to_owned)
    }

    fn kill_worker(&mut self, name: &str) {
        let number: usize = name.strip_prefix("chat-").unwrap().parse().unwrap();
        self.workers[number].kill();
    }
}

struct Client {
    socket: WebSocket<TcpStream>,
}

impl Client {
    fn login(service: &Service, name: &str) -> Client {
        wait_for("a login", || {
            let stream = TcpStream::connect(service.address).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let url = format!("ws://{}/chat", service.address);
            let (socket, _) = tungstenite::client(url, stream).ok()?;
            let mut client = Client { socket };
            client.tell(&format!("{{\"login\": \"{name}\"}}"));
            client.try_hear().filter(|line| line.contains("welcome")).map(|_| client)
        })
    }

    fn tell(&mut self, text: &str) {
        let _ = self.socket.send(Message::text(text.to_owned()));
    }

    fn try_hear(&mut self) -> Option<String> {
        loop {
            match self.socket.read() {
                Ok(Message::Text(text)) => return Some(text.to_string()),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    fn hear(&mut self, wanted: &str) -> String {
        loop {
            let line = self.try_hear().unwrap_or_else(|| panic!("{wanted}: the connection ended"));
            if line.contains(wanted) {
                return line;
            }
        }
    }
}

/// Logs two clients in until they are at different workers.
fn apart(service: &Service) -> (Client, Client) {
    let alice = Client::login(service, "alice");
    let at = service.worker_of("alice").unwrap();
    let mut others = Vec::new();
    let bob = wait_for("bob at another worker", || {
        let bob = Client::login(service, "bob");
        let elsewhere = service.worker_of("bob").is_some_and(|worker| worker != at);
        if elsewhere {
            return Some(bob);
        }
        // Kept, so that the next one is given to the other worker.
        others.push(bob);
        None
    });
    (alice, bob)
}

#[test]
fn clients_of_two_workers_talk_over_deaths_and_restarts() {
    let mut service = Service::start();
    let (mut alice, mut bob) = apart(&service);
    alice.tell(r#"{"to": "bob", "text": "hello"}"#);
    assert_eq!(bob.hear("hello"), r#"{"from":"alice","text":"hello"}"#);
    alice.hear(r#""outcome":"Delivered""#);
    alice.tell(r#"{"to": "nobody", "text": "?"}"#);
    alice.tell(r#"{"watch": "bob"}"#);
    alice.hear(r#""online":true"#);
    for client in [&mut alice, &mut bob] {
        client.tell(r#"{"join": "lobby"}"#);
    }
    // Everyone in the room has it, the sender included.
    wait_until("both to be in the room", || service.ask(&["groups"]) == "room:lobby 2\n");
    bob.tell(r#"{"room": "lobby", "text": "all"}"#);
    for client in [&mut alice, &mut bob] {
        assert_eq!(client.hear("all"), r#"{"from":"bob","text":"all","room":"lobby"}"#);
    }

    // The worker of bob dies. The client connects again and is elsewhere, and what was sent
    // meanwhile arrives.
    let at = service.worker_of("bob").unwrap();
    service.kill_worker(&at);
    assert!(
        bob.try_hear().is_none() || bob.try_hear().is_none(),
        "the connection of bob has ended"
    );
    alice.hear(r#""online":false"#);
    alice.tell(r#"{"to": "bob", "text": "are you there?"}"#);
    let mut bob = Client::login(&service, "bob");
    assert_eq!(bob.hear("are you there?"), r#"{"from":"alice","text":"are you there?"}"#);
    assert_ne!(service.worker_of("bob").unwrap(), at);
    alice.hear(r#""online":true"#);
    let number: usize = at.strip_prefix("chat-").unwrap().parse().unwrap();
    service.workers[number] = service.worker(number);

    // The dispatcher restarts. Connections and messages go on.
    service.restart_dispatcher();
    bob.tell(r#"{"to": "alice", "text": "still here"}"#);
    alice.hear("still here");

    // A second login replaces the first one.
    let mut again = Client::login(&service, "bob");
    bob.hear("logged in elsewhere");
    alice.tell(r#"{"to": "bob", "text": "the new one"}"#);
    again.hear("the new one");
    assert!(service.directory.running());
}

#[test]
fn two_pages_talk_while_a_worker_dies_and_the_dispatcher_restarts() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let mut service = Service::start();
    browser.open(&format!("http://{}/", service.address));
    // Two pages in one window, each with its own document and connection.
    browser.value(
        "(async () => { document.body.innerHTML = '';
            for (const name of ['alice', 'bob']) {
                const frame = document.createElement('iframe');
                frame.src = '/'; frame.id = name;
                const loaded = new Promise(done => { frame.onload = done; });
                document.body.append(frame);
                await loaded;
                const page = frame.contentDocument;
                page.getElementById('name').value = name;
                page.getElementById('login').requestSubmit();
            } return true; })()",
    );
    let state = |name: &str| {
        format!(
            "document.getElementById('{name}').contentDocument.getElementById('state').textContent"
        )
    };
    let online = |browser: &mut Browser, name: &str| {
        browser.wait_true(&format!("{} === 'online as {name}'", state(name)));
    };
    let say = |browser: &mut Browser, from: &str, to: &str, text: &str| {
        browser.value(&format!(
            "(() => {{ const page = document.getElementById('{from}').contentDocument;
                page.getElementById('to').value = '{to}'; page.getElementById('text').value = '{text}';
                page.getElementById('private').requestSubmit(); return true; }})()"
        ));
        browser.wait_true(&format!(
            "document.getElementById('{to}').contentDocument.getElementById('log').textContent
                .includes('{from}: {text}')"
        ));
    };
    online(&mut browser, "alice");
    online(&mut browser, "bob");
    // Connects a page again until the two are at different workers.
    let mut others = Vec::new();
    wait_until("the pages to be at different workers", || {
        let workers = (service.worker_of("alice"), service.worker_of("bob"));
        if workers.0.is_some() && workers.1.is_some() && workers.0 != workers.1 {
            return true;
        }
        // The browser keeps connections to one worker, which may have more than alice's for that.
        others.push(TcpStream::connect(service.address));
        browser.value("document.getElementById('bob').contentWindow.eval('socket.close()'), true");
        online(&mut browser, "bob");
        false
    });
    say(&mut browser, "alice", "bob", "hello");
    say(&mut browser, "bob", "alice", "hello yourself");
    let at = service.worker_of("bob").unwrap();
    service.kill_worker(&at);
    say(&mut browser, "alice", "bob", "are you there?");
    online(&mut browser, "bob");
    let number: usize = at.strip_prefix("chat-").unwrap().parse().unwrap();
    service.workers[number] = service.worker(number);
    service.restart_dispatcher();
    say(&mut browser, "bob", "alice", "still here");
    say(&mut browser, "alice", "bob", "and I");
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}
