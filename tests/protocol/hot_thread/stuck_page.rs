//! Workers inside a system call on a missing page hold a lock of a socket of which the dispatcher
//! has a copy: a call of the dispatcher on that socket would block as long.

use std::thread::JoinHandle;

use test_support::stuck_page::StuckPage;

use super::*;

/// The lock is held for at least this long.
const BLOCK: Duration = Duration::from_secs(3);

/// At least this many clients come meanwhile.
const CLIENTS: usize = 50;

fn stuck_page() -> Option<StuckPage> {
    match StuckPage::new() {
        Ok(page) => Some(page),
        Err(error) => {
            skip(&format!("needs userfaultfd: {error}"));
            None
        }
    }
}

/// Receives on another copy, which blocks until the lock is free.
fn witness(fd: &OwnedFd) -> JoinHandle<()> {
    let copy = fd.try_clone().unwrap();
    std::thread::spawn(move || {
        let _ = rustix::net::recv(&copy, &mut [0; 1], RecvFlags::DONTWAIT);
    })
}

/// Serves other clients while the lock is held: the longest turn must be far shorter.
fn is_held_while_others_are_served(
    dispatcher: &Dispatcher,
    page: StuckPage,
    witness: &JoinHandle<()>,
    address: std::net::SocketAddr,
) {
    let begun = Instant::now();
    let mut served = 0;
    while served < CLIENTS || begun.elapsed() < BLOCK {
        Client::connect(address).unwrap().echo("served");
        served += 1;
    }
    assert_eq!(http_get(&dispatcher.admin(), "/healthz").unwrap().0, 200);
    let longest = Duration::from_micros(dispatcher.status().longest_turn_microseconds);
    let block = begun.elapsed();
    assert!(!witness.is_finished(), "the lock was held all the time");
    drop(page);
    assert!(longest < block / 2, "a turn took {longest:?}, the lock was held for {block:?}");
}

/// The rest of the answer to a client that a worker has disturbed: zeros of the page, up to `end`.
fn read_until(client: &mut TcpStream, end: &str) -> String {
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains(end) {
        let mut part = [0; 1024];
        let count = client.read(&mut part).unwrap();
        assert!(count > 0, "the end before {end:?}: {:?}", String::from_utf8_lossy(&text));
        text.extend(part[..count].iter().filter(|byte| **byte != 0));
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn the_lock_of_a_connection_that_moves_holds_nothing_up() {
    let Some(page) = stuck_page() else { return };
    let (mut dispatcher, address) = start_one_pool("handoff_timeout = \"200ms\"");
    let before = dispatcher.fds();
    let mallory = Mallory::join(&dispatcher);
    let mut victim = connect(address);
    let (_, mut fds) = mallory.next(RecvFlags::empty());
    let fd = Arc::new(fds.remove(0));
    let place = page.place();
    let sending = std::thread::spawn({
        let fd = Arc::clone(&fd);
        move || place.send(&*fd)
    });
    page.wait_touched();
    let witness = witness(&fd);
    let honest = dispatcher.worker("blocking", "web", "honest");
    // Taken there: the copy in flight is closed, too, while the lock is held.
    dispatcher.wait_status("the move", |s| worker(s, "honest").is_some_and(|w| w.taken >= 1));
    is_held_while_others_are_served(&dispatcher, page, &witness, address);
    assert_eq!(sending.join().unwrap(), 4096);
    witness.join().unwrap();
    // The client is served in the end. The bytes of the other worker are the documented exception.
    assert!(read_until(&mut victim, "\n").starts_with("honest "));
    drop((victim, mallory, fd));
    dispatcher.wait_joined("web", 1);
    drop(honest);
    wait_until("the descriptors to be closed", || dispatcher.fds() <= before);
    assert!(dispatcher.stop().success());
}

#[test]
fn the_lock_of_a_client_that_is_turned_away_holds_nothing_up() {
    let Some(page) = stuck_page() else { return };
    let other = "[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:0\"\npool = \"other\"\n[pool.other]\n";
    let keys = "handoff_timeout = \"200ms\"\nwait_for_worker = \"300ms\"\nunavailable_response = \"DIR/sorry\"";
    let temp = configure(&format!("{other}{}", one_pool(keys)));
    std::fs::write(temp.path().join("sorry"), "sorry").unwrap();
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let _honest = dispatcher.worker("blocking", "other", "honest");
    dispatcher.wait_joined("other", 1);
    let before = dispatcher.fds();
    let mallory = Mallory::join(&dispatcher);
    let mut victim = connect(dispatcher.address("web"));
    let (_, mut fds) = mallory.next(RecvFlags::empty());
    let fd = Arc::new(fds.remove(0));
    let place = page.place();
    let sending = std::thread::spawn({
        let fd = Arc::clone(&fd);
        move || place.send(&*fd)
    });
    page.wait_touched();
    let witness = witness(&fd);
    // It ends without a goodbye; no other worker can take the client.
    drop(mallory);
    dispatcher.wait_status("the refusal", |status| status.closed["no_worker"] == 1);
    is_held_while_others_are_served(&dispatcher, page, &witness, dispatcher.address("other"));
    assert_eq!(sending.join().unwrap(), 4096);
    witness.join().unwrap();
    assert_eq!(read_until(&mut victim, "sorry"), "sorry");
    drop((victim, fd));
    wait_until("the descriptors to be closed", || dispatcher.fds() <= before);
    assert!(dispatcher.stop().success());
}

#[test]
fn a_receive_on_the_channel_holds_nothing_up() {
    let Some(page) = stuck_page() else { return };
    let (mut dispatcher, address) = start_one_pool("handoff_timeout = \"200ms\"");
    let before = dispatcher.fds();
    let mallory = Mallory::join(&dispatcher);
    // A worker that takes nothing gets a probe first, or the connection itself; either is received.
    let victim = connect(address);
    let channel = mallory.lane[0].try_clone().unwrap();
    let place = page.place();
    let receiving = std::thread::spawn(move || {
        loop {
            match place.receive(&channel) {
                -1 => std::thread::sleep(Duration::from_millis(1)),
                count => return count,
            }
        }
    });
    page.wait_touched();
    let witness = witness(&mallory.lane[0]);
    let honest = dispatcher.worker("blocking", "web", "honest");
    dispatcher.wait_status("the move", |s| worker(s, "honest").is_some_and(|w| w.taken >= 1));
    // Its channel is to be purged, and then the worker ends, both while nothing can be received
    // there.
    rustix::net::shutdown(&mallory.peer.socket, rustix::net::Shutdown::Both).unwrap();
    dispatcher.wait_joined("web", 1);
    is_held_while_others_are_served(&dispatcher, page, &witness, address);
    assert!(receiving.join().unwrap() > 0);
    witness.join().unwrap();
    let mut victim = Client::greeted(victim).unwrap();
    victim.echo("served");
    drop((victim, mallory, honest));
    wait_until("the descriptors to be closed", || dispatcher.fds() <= before);
    assert!(dispatcher.stop().success());
}
