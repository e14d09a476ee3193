//! Shared ports: random faults, then a comparison with the kernel's list of sockets.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use dispatch_steer::WorkerSettings;
use nix::sys::signal::Signal;

use crate::chaos::number;
use crate::lab::*;
use crate::shared_lab::*;

const WORKERS: u32 = 4;
const STEPS: u32 = 1_500;

/// What a fault did to a worker.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Stopped,
    StoppedAndEvicted,
    KilledAndEvicted,
}

#[test]
fn counts_equal_the_kernels_and_nothing_is_lost_after_random_faults() {
    let Some(mut lab) = Lab::sharing(WORKERS) else { return };
    let seed = number("STEER_SEED", fastrand::u64(..));
    eprintln!("STEER_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut held: Vec<TcpStream> = Vec::new();
    // Not answered yet, perhaps in the queue of a stopped worker.
    let mut waiting: Vec<TcpStream> = Vec::new();
    let mut fault: Option<(u32, Fault)> = None;
    for _ in 0..number("STEER_STEPS", STEPS.into()) {
        let at = if held.is_empty() { None } else { Some(random.usize(..held.len())) };
        match (random.u8(..100), at) {
            (0..50, _) => waiting.push(dial(V4)),
            (50..65, Some(at)) => drop(held.swap_remove(at)),
            (65..75, Some(at)) => {
                let client = held.swap_remove(at);
                let reset = Some(Duration::ZERO);
                rustix::net::sockopt::set_socket_linger(&client, reset).unwrap();
            }
            (75..80, Some(at)) => {
                let _ = held[at].shutdown(Shutdown::Write);
            }
            (80..85, Some(at)) => {
                let _ = held[at].write_all(b"stay\n");
            }
            (85..88, _) if !waiting.is_empty() => {
                // It ends in a queue, or before its answer is read.
                drop(waiting.swap_remove(random.usize(..waiting.len())));
            }
            (88..92, _) => {
                for worker in 0..WORKERS {
                    let weight = random.u16(1..4);
                    let draining = (worker > 1 && random.bool()).into();
                    let suspect = random.bool().into();
                    let settings =
                        WorkerSettings { draining, suspect, ..WorkerSettings::new(weight) };
                    lab.steering().set_worker(worker, settings).unwrap();
                }
            }
            (92.., _) => fault = fail(&mut lab, &mut random, fault),
            _ => {}
        }
        if fault.is_none() || fault.is_some_and(|(_, fault)| fault != Fault::Stopped) {
            waiting.iter_mut().for_each(read_hello);
            held.append(&mut waiting);
        }
    }
    while fault.is_some() {
        fault = fail(&mut lab, &mut random, fault);
    }
    waiting.iter_mut().for_each(read_hello);
    held.append(&mut waiting);
    lab.settled();
    assert!(lab.live().iter().sum::<i64>() > 0, "something is held");
    let moves = lab.steering().moves().unwrap();
    assert!(moves.migrated > 0 && moves.lost == 0, "{moves:?}");
    held.clear();
    lab.settled();
    for worker in 0..WORKERS {
        lab.slay(worker);
    }
    eventually("no connection to count", vec![0; WORKERS as usize], || lab.live());
    let counts = lab.steering().totals().unwrap();
    assert_eq!((counts.full, counts.unserved, counts.no_sink), (0, 0, 0), "{counts:?}");
    assert_eq!(lab.steering().handshakes().unwrap(), 0);
}

/// The next fault, or the mend of the last one.
fn fail(
    lab: &mut Lab,
    random: &mut fastrand::Rng,
    fault: Option<(u32, Fault)>,
) -> Option<(u32, Fault)> {
    match fault {
        None => {
            let worker = random.u32(..WORKERS);
            lab.signal(worker, Signal::SIGSTOP);
            Some((worker, Fault::Stopped))
        }
        Some((worker, Fault::Stopped)) => match random.u8(..3) {
            0 => {
                lab.signal(worker, Signal::SIGCONT);
                None
            }
            1 => {
                lab.steering().evict(worker).unwrap();
                Some((worker, Fault::StoppedAndEvicted))
            }
            _ => {
                lab.slay(worker);
                lab.steering().evict(worker).unwrap();
                Some((worker, Fault::KilledAndEvicted))
            }
        },
        Some((worker, Fault::StoppedAndEvicted)) => {
            lab.steering().restore(worker).unwrap();
            lab.signal(worker, Signal::SIGCONT);
            None
        }
        Some((worker, Fault::KilledAndEvicted)) => {
            lab.steering().restore(worker).unwrap();
            lab.inherit(worker, HEIR, &[V4]);
            None
        }
    }
}
