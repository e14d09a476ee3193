//! Random faults, then a comparison with the kernel's list of sockets.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use dispatch_steer::{Policy, WorkerSettings};

use crate::lab::*;

const WORKERS: u32 = 4;
const STEPS: u32 = 1_500;

/// `STEER_SEED` repeats a run; `STEER_STEPS` makes a longer one.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn counts_equal_the_kernels_after_random_faults() {
    let Some(mut lab) = Lab::keepers(WORKERS) else { return };
    let seed = number("STEER_SEED", fastrand::u64(..));
    eprintln!("STEER_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut held: Vec<TcpStream> = Vec::new();
    let mut down: Option<u32> = None;
    for step in 0..number("STEER_STEPS", STEPS.into()) {
        let at = if held.is_empty() { None } else { Some(random.usize(..held.len())) };
        match (random.u8(..100), at) {
            (0..50, _) => held.push(connect(V4)),
            (50..70, Some(at)) => drop(held.swap_remove(at)),
            (70..80, Some(at)) => {
                let client = held.swap_remove(at);
                let reset = Some(Duration::ZERO);
                rustix::net::sockopt::set_socket_linger(&client, reset).unwrap();
            }
            (80..85, Some(at)) => {
                let _ = held[at].shutdown(Shutdown::Write);
            }
            (85..90, Some(at)) => {
                // The server keeps its side when this one ends, until it is killed.
                let _ = held[at].write_all(b"stay\n");
            }
            (90..95, Some(at)) => {
                let own = (V4.ip(), lab.servers[at % WORKERS as usize].port).into();
                if down != Some(at as u32 % WORKERS) {
                    held.push(connect(own));
                }
            }
            (95..98, _) => {
                let worker = random.u32(..WORKERS);
                let draining = random.bool().into();
                let weight = random.u16(1..4);
                let settings = WorkerSettings { draining, ..WorkerSettings::new(weight) };
                lab.steering().set_worker(worker, settings).unwrap();
                let policy = random.choice(Policy::ALL).unwrap();
                lab.steering().set_policy(policy).unwrap();
                // At least one worker must be usable.
                let other = (worker + 1) % WORKERS;
                lab.steering().set_worker(other, WorkerSettings::new(1)).unwrap();
                if down == Some(other) {
                    lab.steering()
                        .set_worker((worker + 2) % WORKERS, WorkerSettings::new(1))
                        .unwrap();
                }
            }
            (98.., _) if step % 4 == 0 => match down.take() {
                None => {
                    let worker = random.u32(..WORKERS);
                    lab.kill(worker);
                    for other in 0..WORKERS {
                        lab.steering().set_worker(other, WorkerSettings::new(1)).unwrap();
                    }
                    down = Some(worker);
                }
                Some(worker) => {
                    lab.spawn(worker, &["python3", "-c", KEEPER, "127.0.0.1", "PORT"]);
                    lab.wait_listening(worker);
                }
            },
            _ => {}
        }
    }
    if let Some(worker) = down {
        lab.spawn(worker, &["python3", "-c", KEEPER, "127.0.0.1", "PORT"]);
        lab.wait_listening(worker);
    }
    lab.settled();
    assert!(lab.live().iter().sum::<i64>() > 0, "something is held");
    held.clear();
    lab.settled();
    for worker in 0..WORKERS {
        lab.kill(worker);
    }
    eventually("no connection to count", vec![0; WORKERS as usize], || lab.live());
    let counts = lab.steering().totals().unwrap();
    assert_eq!((counts.full, counts.no_sink), (0, 0), "{counts:?}");
    // Those of stray segments, which the kernel forgets when it needs their room.
    let remembered = lab.steering().handshakes().unwrap();
    assert!((remembered as u64) < counts.chosen / 10 + 10, "{remembered} of {}", counts.chosen);
}
