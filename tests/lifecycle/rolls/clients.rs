//! Clients that connect again when their worker ends their connection: how often one comes to an
//! old worker once more. The same without the rule for new connections is in the tests of the core.

use std::io::{Read, Write};
use std::time::Duration;

use super::*;

const CLIENTS: usize = 200;

/// One client: it connects again whenever its worker ends the connection. Returns the processes
/// that served it, one after another.
fn reconnects(address: SocketAddr, over: &AtomicBool) -> Vec<i32> {
    let mut served = Vec::new();
    while !over.load(Ordering::SeqCst) {
        let mut client = Client::connect(address).expect("neither refused nor reset");
        served.push(client.pid);
        let stream = client.stream.get_mut();
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        loop {
            if over.load(Ordering::SeqCst) {
                break;
            }
            match stream.read(&mut [0; 16]) {
                Ok(0) => break,
                Ok(_) => panic!("it asked for nothing"),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("it is closed, not reset: {error}"),
            }
        }
    }
    served
}

#[test]
fn clients_that_connect_again_come_to_new_workers() {
    let keys = "processes = 4\ndrain_timeout = \"200ms\"\nmin_ready = \"500ms\"\n\
                max_leaving_generations = 0";
    let dispatcher = Dispatcher::start(&spawning(&good("mio"), keys));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 4);
    let over = AtomicBool::new(false);
    let (old, all) = std::thread::scope(|scope| {
        let guard = Over(&over);
        let clients: Vec<_> =
            (0..CLIENTS).map(|_| scope.spawn(|| reconnects(address, &over))).collect();
        let status = dispatcher.wait_status("all clients", |status| {
            pool(status, "web").workers.iter().map(|it| it.load).sum::<u64>() == CLIENTS as u64
        });
        let old = pids(&status);
        order(&dispatcher, &["restart", "web", "--wait"]);
        dispatcher.wait_status("all clients at new workers", |status| {
            processes(status).leaving == 0
                && pool(status, "web").workers.iter().map(|it| it.load).sum::<u64>()
                    == CLIENTS as u64
        });
        drop(guard);
        let all: Vec<Vec<i32>> = clients.into_iter().map(|it| it.join().unwrap()).collect();
        (old, all)
    });
    let again: usize =
        all.iter().map(|served| served[1..].iter().filter(|pid| old.contains(pid)).count()).sum();
    let most = all.iter().map(|served| served.len() - 1).max().unwrap();
    let moves: usize = all.iter().map(|served| served.len() - 1).sum();
    let _ = writeln!(
        std::io::stderr(),
        "reconnecting clients: {CLIENTS} at 4 workers, a roll: {moves} reconnects, {again} to an old \
         worker again, most for one client {most}"
    );
    assert!(moves >= CLIENTS, "each was moved");
    // A client that came to an old worker by chance would be moved once more.
    assert!(again * 2 < CLIENTS, "{again}");
    let status = dispatcher.status();
    let (loads, spread) = loads(&status, "web");
    assert!(spread <= CLIENTS as u64 / 4, "the new workers share the clients: {loads:?}");
}
