//! Workers that end and return, pools without workers, pins.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use dispatch_steer::{Error, Options, Steering, WorkerSettings};
use test_support::wait_until;

use crate::lab::*;

#[test]
fn a_killed_worker_is_left_out_and_returns_by_itself() {
    let Some(mut lab) = Lab::keepers(3) else { return };
    let mut held: Vec<TcpStream> = (0..30).map(|_| connect(V4)).collect();
    lab.kill(1);
    eventually("its connections to end", vec![10, 0, 10], || lab.live());
    held.extend((0..10).map(|_| connect(V4)));
    assert_eq!(lab.live(), [15, 0, 15]);
    lab.spawn(1, &["python3", "-c", KEEPER, "127.0.0.1", "PORT"]);
    lab.wait_listening(1);
    held.extend((0..15).map(|_| connect(V4)));
    assert_eq!(lab.live(), [15; 3]);
    lab.settled();
    drop(held);
    lab.empty();
}

#[test]
fn without_a_worker_clients_are_refused_at_once() {
    let Some(mut lab) = Lab::keepers(1) else { return };
    lab.kill(0);
    let refused = TcpStream::connect_timeout(&V4, Duration::from_secs(10)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let totals = lab.steering().totals().unwrap();
    assert_eq!((totals.unserved, totals.waited), (1, 0));
}

#[test]
fn clients_wait_for_a_worker_for_a_while() {
    let Some(mut lab) = Lab::with_wait(Duration::from_secs(60)) else { return };
    let worker = lab.announce();
    let client = std::thread::spawn({
        // A new thread is in the namespace of the one that starts it.
        || connect(V4)
    });
    wait_until("a SYN to be dropped", || lab.steering().totals().unwrap().waited > 0);
    lab.spawn(worker, &["python3", "-c", KEEPER, "127.0.0.1", "PORT"]);
    drop(client.join().unwrap());
    lab.empty();
    // The end of the wait.
    lab.kill(worker);
    lab.steering().set_wait(Duration::from_millis(1)).unwrap();
    let refused = TcpStream::connect_timeout(&V4, Duration::from_secs(20)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn when_all_workers_are_full_clients_wait_and_then_get_the_first_place() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    for worker in 0..2 {
        let limited = WorkerSettings { maximum: 3, ..WorkerSettings::new(1) };
        lab.steering().set_worker(worker, limited).unwrap();
    }
    let mut held: Vec<TcpStream> = (0..6).map(|_| connect(V4)).collect();
    let waiting = std::thread::spawn(|| connect(V4));
    wait_until("its SYN to be dropped", || lab.steering().totals().unwrap().full > 0);
    assert_eq!(lab.live(), [3, 3]);
    held.pop();
    held.push(waiting.join().unwrap());
    assert_eq!(lab.live(), [3, 3]);
    assert_eq!(lab.steering().totals().unwrap().no_sink, 0);
    drop(held);
    lab.empty();
}

#[test]
fn a_removed_workers_number_is_free_when_its_last_connection_ends() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    let held: Vec<TcpStream> = (0..2).map(|_| connect(V4)).collect();
    lab.steering().remove_worker(1).unwrap();
    let more: Vec<TcpStream> = (0..4).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [5, 1]);
    assert_eq!(lab.steering().listener(1, false).unwrap(), None);
    assert_eq!(lab.steering().addresses().unwrap().len(), 4, "those of the other worker");
    let refused = lab.steering().set_worker(1, WorkerSettings::new(1));
    assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
    lab.kill(1);
    drop((held, more));
    eventually("no connection to count", vec![0, 0], || lab.live());
    lab.steering().set_worker(1, WorkerSettings::new(1)).unwrap();
}

#[test]
fn values_out_of_range_are_refused_and_named() {
    let Some(mut lab) = Lab::new() else { return };
    let steering = lab.steering();
    let mut refused = Vec::new();
    let good = WorkerSettings::new(1);
    refused.push(steering.set_worker(1024, good));
    refused.push(steering.set_worker(0, WorkerSettings { weight: 0, ..good }));
    refused.push(steering.set_worker(0, WorkerSettings { weight: 65_536, ..good }));
    refused.push(steering.set_worker(0, WorkerSettings { slow_start: 1001, ..good }));
    refused.push(steering.add_port(0, 0));
    steering.add_port(0, 9000).unwrap();
    refused.push(steering.add_port(1, 9000));
    let texts: Vec<String> = refused.into_iter().map(|r| r.unwrap_err().to_string()).collect();
    assert_eq!(
        texts,
        [
            "worker number 1024: 0 to 1023",
            "weight 0: 1 to 65535",
            "weight 65536: 1 to 65535",
            "slow start 1001: 1 to 1000",
            "port 0: 1 to 65535",
            "127.0.0.1:9000 is the address of worker 0",
        ]
    );
}

#[test]
fn the_kernel_goes_on_choosing_and_the_next_process_adopts() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    let (_mounted, pins) = lab.pin();
    let again = Steering::load(&Options { cgroup: lab.cgroup().into(), wait: Duration::ZERO })
        .and_then(|other| other.pin(&pins));
    let text = again.unwrap_err().to_string();
    assert!(text.contains("File exists") && text.ends_with("adopt it, or remove it"), "{text}");

    let mut held: Vec<TcpStream> = (0..10).map(|_| connect(V4)).collect();
    lab.steering = None;
    held.extend((0..10).map(|_| connect(V4)));
    held.drain(..4);
    lab.steering = Some(Steering::adopt(&pins).unwrap());
    eventually("the counts to be right", 16, || lab.live().iter().sum());
    lab.settled();
    // Settings work as before, and so does the sink.
    for worker in 0..2 {
        let limited = WorkerSettings { maximum: 8, ..WorkerSettings::new(1) };
        lab.steering().set_worker(worker, limited).unwrap();
    }
    while lab.live().iter().sum::<i64>() < 16 {
        held.push(connect(V4));
    }
    let waiting = std::thread::spawn(|| connect(V4));
    wait_until("a SYN to be dropped", || lab.steering().totals().unwrap().full > 0);
    held.clear();
    drop(waiting.join().unwrap());
    lab.empty();

    lab.steering.take().unwrap().detach().unwrap();
    assert!(!pins.exists());
    let refused = TcpStream::connect_timeout(&V4, Duration::from_secs(10)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "nothing is attached");
}

#[test]
fn pins_of_another_version_are_refused_whatever_they_are() {
    let Some(mut lab) = Lab::new() else { return };
    let (_mounted, pins) = lab.pin();
    lab.steering = None;
    let pinned = |name| Map::from_map_data(MapData::from_pin(pins.join(name)).unwrap()).unwrap();
    let mut settings: Array<_, [u8; 40]> = pinned("settings").try_into().unwrap();
    let mut entry = settings.get(&0, 0).unwrap();
    entry[..4].copy_from_slice(&1u32.to_ne_bytes());
    settings.set(0, entry, 0).unwrap();
    // Version 1 had no pin of that name, and smaller settings.
    std::fs::remove_file(pins.join("owners")).unwrap();
    let text = Steering::adopt(&pins).unwrap_err().to_string();
    assert!(text.contains("its maps have version 1, this program needs version 4"), "{text}");
    dispatch_steer::remove_pins(&pins).unwrap();
    assert!(!pins.exists());
}

#[test]
fn pins_are_refused_elsewhere_and_of_others() {
    let Some(mut lab) = Lab::new() else { return };
    let text =
        lab.steering.take().unwrap().pin(&lab.files.path().join("x")).unwrap_err().to_string();
    assert!(text.contains("not on bpffs") && text.contains("mount -t bpf bpf"), "{text}");
    let text = Steering::adopt(&lab.files.path().join("absent")).unwrap_err().to_string();
    assert!(text.contains("absent: No such file"), "{text}");
    let open = lab.files.path().join("open");
    std::fs::create_dir(&open).unwrap();
    run(&format!("chmod 777 {}", open.display()));
    let text = Steering::adopt(&open).unwrap_err().to_string();
    assert!(text.contains("other users can change it"), "{text}");
    let options = Options { cgroup: lab.files.path().into(), wait: Duration::ZERO };
    let text = Steering::load(&options).unwrap_err().to_string();
    assert!(text.contains("not a directory of cgroup v2"), "{text}");
}

#[test]
fn without_steering_accepted_connections_go_on() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    let mut client = connect(V4);
    lab.steering = None;
    client.write_all(b"half\n").unwrap();
    client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let since = Instant::now();
    let answer = client.read(&mut [0; 1]);
    assert!(
        matches!(answer, Err(ref error) if error.kind() == ErrorKind::WouldBlock),
        "{answer:?} after {:?}",
        since.elapsed()
    );
    let refused = TcpStream::connect_timeout(&V4, Duration::from_secs(10)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

/// The variable that tells the test below that it is the steering process; its value is the cgroup.
const INNER: &str = "STEER_TEST_CGROUP";

#[test]
fn an_ordinary_user_with_two_capabilities_can_steer() {
    if let Some(cgroup) = std::env::var_os(INNER) {
        return steer_until_told(Path::new(&cgroup));
    }
    if !has(&["setpriv"]) {
        return;
    }
    let Some(mut lab) = Lab::new() else { return };
    lab.steering = None;
    let name = "life::an_ordinary_user_with_two_capabilities_can_steer";
    let mut steerer = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["--inh-caps=-all,+bpf,+net_admin", "--ambient-caps=-all,+bpf,+net_admin"])
        .args(["--bounding-set=-all,+bpf,+net_admin"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INNER, lab.cgroup())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(steerer.stdout.take().unwrap()).lines();
    let ready = said.by_ref().map(Result::unwrap).find(|line| line.starts_with("ready"));
    assert!(ready.is_some(), "{:?}", steerer.wait());
    let ports: Vec<u16> = (0..2).map(|worker| FIRST_PORT + worker).collect();
    let servers: Vec<_> = ports.iter().map(|&port| lab.server(port, KEEPER)).collect();
    wait_until("both to listen", || {
        ports.iter().all(|&port| TcpStream::connect((V4.ip(), port)).is_ok())
    });
    let held: Vec<TcpStream> = (0..20).map(|_| connect(V4)).collect();
    // What it says when its input ends.
    drop(steerer.stdin.take());
    // To the end: the test harness fails if it cannot print.
    let said: Vec<String> = said.map(Result::unwrap).collect();
    assert!(steerer.wait().unwrap().success());
    assert!(said.iter().any(|line| line == "live 10 10"), "{said:?}");
    drop((held, servers));
}

fn steer_until_told(cgroup: &Path) {
    let options = Options { cgroup: cgroup.into(), wait: Duration::ZERO };
    let mut steering = Steering::load(&options).unwrap();
    steering.add_public(V4).unwrap();
    for worker in 0..2 {
        steering.add_port(worker, FIRST_PORT + worker as u16).unwrap();
        steering.set_worker(worker, WorkerSettings::new(1)).unwrap();
    }
    println!("\nready");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    // Those that only looked whether the servers listen end first.
    wait_until("the probes to end", || {
        (0..2).map(|worker| steering.counts(worker).unwrap().live).sum::<i64>() == 20
    });
    let live = |worker| steering.counts(worker).unwrap().live;
    println!("live {} {}", live(0), live(1));
}
