//! HAProxy's agent check, asked for as HAProxy does it: every answer, hostile clients, reloads.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dispatcher::api::status::AgentStatus;
use nix::sys::signal::Signal;
use test_support::reloading::{names, reload, run};
use test_support::*;

/// A configuration with one pool that has an agent.
pub fn with_agent(keys: &str) -> String {
    one_pool(&format!("agent_listen = \"127.0.0.1:0\"\n{keys}"))
}

pub fn agent_status(dispatcher: &Dispatcher, name: &str) -> AgentStatus {
    pool(&dispatcher.status(), name).agent.clone().expect("an agent")
}

/// Where the agent of a pool answers.
pub fn agent_of(dispatcher: &Dispatcher, name: &str) -> SocketAddr {
    agent_status(dispatcher, name).listen[0].parse().unwrap()
}

/// One answer, which is a whole line and the end of the connection.
pub fn ask(agent: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(agent)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    match text.strip_suffix('\n') {
        Some(line) if !line.contains('\n') => Ok(line.to_owned()),
        _ => Err(std::io::Error::other(format!("no line: {text:?}"))),
    }
}

pub fn wait_answer(agent: SocketAddr, wanted: &str) {
    let mut last = None;
    wait_until(&format!("the answer {wanted}"), || {
        let answer = ask(agent).unwrap();
        let is_it = answer == wanted;
        last = Some(answer);
        is_it
    });
}

#[test]
fn every_answer_reaches_the_balancer() {
    let keys = "agent_workers = 4\nmax_connections_per_worker = 100";
    let mut dispatcher = Dispatcher::start(&with_agent(keys));
    let agent = agent_of(&dispatcher, "web");
    assert_eq!(ask(agent).unwrap(), "down # no usable worker");
    let mut workers = dispatcher.workers("tokio", "web", 4);
    wait_answer(agent, "ready up 100% maxconn:400");
    let _clients: Vec<Client> =
        (0..40).map(|_| Client::connect(dispatcher.address("web")).unwrap()).collect();
    assert_eq!(ask(agent).unwrap(), "ready up 100% maxconn:400", "not the free capacity");
    workers[0].kill();
    wait_answer(agent, "ready up 75% maxconn:300");
    assert!(run(&dispatcher, &["drain", "web/w1"]).status.success());
    wait_answer(agent, "ready up 50% maxconn:200");
    assert!(run(&dispatcher, &["drain", "--pool", "web"]).status.success());
    wait_answer(agent, "drain");
    assert!(run(&dispatcher, &["resume", "--pool", "web"]).status.success());
    wait_answer(agent, "ready up 75% maxconn:300");
    let status = agent_status(&dispatcher, "web");
    assert_eq!(status.answer, "ready up 75% maxconn:300");
    assert!(status.answers.values().all(|&count| count > 0), "{status:?}");
    assert_eq!(dispatcher.metric("dispatcher_agent_capacity_percent"), 75.0);
    wait_for_log(&dispatcher, "event=agent_answer pool=web answer=\"drain\"");
    // A stop waits for a connection in flight; until it is over, the answer tells of it.
    for worker in &workers[1..] {
        worker.signal(Signal::SIGSTOP);
    }
    let _untaken = connect(dispatcher.address("web"));
    dispatcher.wait_status("a connection in flight", |status| status.in_flight > 0);
    dispatcher.process.signal(Signal::SIGTERM);
    wait_answer(agent, "down # the dispatcher is stopping");
    for worker in &workers[1..] {
        worker.signal(Signal::SIGCONT);
    }
    dispatcher.process.wait();
}

#[test]
fn what_a_client_sends_does_not_cost_it_the_answer() {
    let dispatcher = Dispatcher::start(&with_agent(""));
    let agent = agent_of(&dispatcher, "web");
    let big = vec![b'x'; 64 * 1024];
    for sent in [&b""[..], b"web\n", b"GET / HTTP/1.1\r\n\r\n", &[0; 4096], &big] {
        let mut stream = TcpStream::connect(agent).unwrap();
        let _ = stream.write_all(sent);
        let mut text = [0; 24];
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"down # no usable worker\n", "{} bytes", sent.len());
    }
}

#[test]
fn hostile_clients_delay_no_other_client_and_leave_nothing() {
    let dispatcher = Dispatcher::start(&with_agent(""));
    let agent = agent_of(&dispatcher, "web");
    let _worker = dispatcher.workers("tokio", "web", 1);
    wait_answer(agent, "ready up 100% maxconn:10000");
    let before = dispatcher.fds();
    // Many that neither read nor close, from one address.
    let silent: Vec<TcpStream> = (0..400).map(|_| connect_from([127, 0, 0, 9], agent)).collect();
    for _ in 0..20 {
        assert_eq!(ask(agent).unwrap(), "ready up 100% maxconn:10000");
    }
    let bound = 64 + 16;
    assert!(dispatcher.fds() <= before + bound, "{} of {before}", dispatcher.fds());
    assert!(agent_status(&dispatcher, "web").refused > 0, "one address has a part of them");
    // Their time is bounded: the descriptors go although the clients stay.
    wait_until("all of them to be closed", || dispatcher.fds() <= before);
    drop(silent);
    // Some reset at once.
    for _ in 0..100 {
        let stream = TcpStream::connect(agent).unwrap();
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    }
    assert_eq!(ask(agent).unwrap(), "ready up 100% maxconn:10000");
    wait_until("nothing to be left", || dispatcher.fds() <= before);
}

fn connect_from(ip: [u8; 4], to: SocketAddr) -> TcpStream {
    let kind = rustix::net::SocketType::STREAM;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, kind, None).unwrap();
    rustix::net::bind(&socket, &SocketAddr::from((ip, 0))).unwrap();
    rustix::net::connect(&socket, &to).unwrap();
    TcpStream::from(socket)
}

#[test]
fn many_balancers_ask_at_once_and_the_event_loop_is_asked_rarely() {
    let dispatcher = Dispatcher::start(&with_agent(""));
    let agent = agent_of(&dispatcher, "web");
    let asking: Vec<_> = (0u8..8)
        .map(|thread| {
            std::thread::spawn(move || {
                for _ in 0..100 {
                    let mut stream = connect_from([127, 0, 1, thread + 1], agent);
                    let mut text = String::new();
                    stream.read_to_string(&mut text).unwrap();
                    assert_eq!(text, "down # no usable worker\n");
                }
            })
        })
        .collect();
    asking.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(agent_status(&dispatcher, "web").answers["down"], 800);
}

#[test]
fn a_reload_opens_changes_and_closes_agents() {
    let listener = "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n";
    let with = |pools: &str| format!("{listener}{pools}");
    let dispatcher = Dispatcher::start(&with("[pool.web]\n"));
    assert_eq!(pool(&dispatcher.status(), "web").agent, None);
    let before = dispatcher.fds();
    let one = free_address();
    let opened = with(&format!("[pool.web]\nagent_listen = \"{one}\"\n"));
    assert_eq!(names(&reload(&dispatcher, &opened)["changed"]), ["pool web"]);
    assert_eq!(ask(one).unwrap(), "down # no usable worker");
    // The same address for a pool of another name: its socket stays, so no client is refused.
    let steady = std::thread::scope(|scope| {
        let asking = scope.spawn(|| (0..200).map(|_| ask(one)).collect::<Result<Vec<_>, _>>());
        let moved = with(&format!("[pool.web]\n[pool.chat]\nagent_listen = \"{one}\"\n"));
        reload(&dispatcher, &moved);
        asking.join().unwrap()
    });
    assert_eq!(steady.unwrap().len(), 200);
    assert_eq!(agent_of(&dispatcher, "chat"), one);
    assert_eq!(pool(&dispatcher.status(), "web").agent, None);
    // Another address.
    let two = free_address();
    reload(&dispatcher, &with(&format!("[pool.web]\nagent_listen = \"{two}\"\n")));
    assert_eq!(ask(two).unwrap(), "down # no usable worker");
    wait_until("the former agent to be closed", || TcpStream::connect(one).is_err());
    // An address in use changes nothing.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|address| (address, taken)).unwrap();
    write_config(&dispatcher.dir, &with(&format!("[pool.web]\nagent_listen = \"{}\"\n", taken.0)));
    let refused = run(&dispatcher, &["reload"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{said}");
    assert!(said.contains("agent of pool `web`") && said.contains("nothing was changed"), "{said}");
    assert_eq!(ask(two).unwrap(), "down # no usable worker");
    reload(&dispatcher, &with("[pool.web]\n"));
    wait_until("the agent to be closed", || TcpStream::connect(two).is_err());
    wait_until("no descriptor to be left", || dispatcher.fds() <= before);
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The sockets stay open, so a balancer that asks meanwhile waits for its answer.
#[test]
fn a_take_over_passes_agents_on() {
    let two = "agent_listen = \"127.0.0.1:0\"\n[pool.chat]\nagent_listen = \"127.0.0.1:0\"";
    let temp = configure(&one_pool(two));
    let mut former = Dispatcher::start_in(temp.path());
    let _worker = former.workers("blocking", "web", 1);
    let (web, chat) = (agent_of(&former, "web"), agent_of(&former, "chat"));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut asked = 0;
            while !over.load(Ordering::Relaxed) {
                let answer = ask(chat).expect("neither refused nor reset");
                assert!(answer.starts_with("down # "), "{answer}");
                asked += 1;
            }
            asked
        });
        let mut command = Command::new(dispatcher_bin());
        let log = File::options().append(true).open(temp.path().join("log")).unwrap();
        command.args(["run", "--take-over", "--config"]).arg(temp.path().join("dispatcher.toml"));
        command.env_remove("NOTIFY_SOCKET").stderr(log);
        let new = Dispatcher::start_by(temp.path(), &mut command);
        assert!(former.process.wait().success());
        new.wait_joined("web", 1);
        wait_answer(web, "ready up 100% maxconn:10000");
        over.store(true, Ordering::Relaxed);
        assert!(asking.join().unwrap() > 0);
        // Each pool has its own socket again.
        assert_eq!((agent_of(&new, "web"), agent_of(&new, "chat")), (web, chat));
    });
}

#[test]
fn a_passed_socket_serves_an_agent_and_is_kept_for_it() {
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let agent = listening.local_addr().unwrap();
    let own = "agent_listen = \"systemd:agent\"";
    let temp = configure(&one_pool(own));
    let dispatcher = Dispatcher::start_with_socket(temp.path(), listening.into(), "agent");
    assert_eq!(ask(agent).unwrap(), "down # no usable worker");
    // Without the key the socket is kept, because systemd keeps it too; a reload can use it again.
    reload(&dispatcher, &one_pool(""));
    assert_eq!(pool(&dispatcher.status(), "web").agent, None);
    reload(&dispatcher, &one_pool(own));
    wait_answer(agent, "down # no usable worker");
    write_config(&dispatcher.dir, &one_pool("agent_listen = \"systemd:other\""));
    let refused = run(&dispatcher, &["reload"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("pool `web`: systemd:other is new"), "{said}");
}
