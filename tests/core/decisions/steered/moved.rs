//! Queues that can be moved to other workers.

use super::*;

fn moving() -> Lab {
    lab_with(|pool| pool.queues_move = true)
}

/// A worker in whose queue connections wait for longer than its patience.
fn hanging(lab: &mut Lab) -> WorkerId {
    let worker = lab.join();
    lab.counts(worker, counts(3, 3, 3));
    lab.idle(worker, ms(1_200));
    worker
}

#[test]
fn the_queue_of_a_suspect_goes_to_workers_that_are_trusted() {
    let mut lab = moving();
    let other = lab.join();
    let hanging = hanging(&mut lab);
    assert_eq!(lab.state(hanging), State::Suspect);
    assert!(lab.moves.iter().all(|worker| *worker == hanging) && !lab.moves.is_empty());
    let before = lab.core.totals();
    let moved = SteerCounts { moved_out: 3, ..counts(0, 3, 0) };
    lab.counts(hanging, moved);
    lab.counts(other, SteerCounts { moved_in: 3, ..counts(3, 0, 3) });
    assert_eq!((lab.core.load(hanging), lab.core.load(other)), (Some(0), Some(3)));
    let totals = lab.core.totals();
    assert_eq!((totals.accepted, totals.taken), (before.accepted, before.taken), "counted once");
    // An empty queue proves nothing now.
    lab.moves.clear();
    lab.idle(hanging, ms(5_000));
    assert_eq!(lab.state(hanging), State::Suspect);
    assert!(lab.moves.is_empty());
    // The other one accepts what has come: it waits no longer than its own connections.
    lab.counts(other, SteerCounts { moved_in: 3, ..counts(3, 0, 0) });
    assert_eq!(lab.state(other), State::Active);
    // A connection that it accepts makes it trusted.
    lab.counts(hanging, SteerCounts { moved_out: 3, ..counts(1, 4, 0) });
    assert_eq!(lab.state(hanging), State::Active);
}

#[test]
fn a_queue_stays_where_no_other_worker_is_trusted() {
    let mut lab = moving();
    let first = hanging(&mut lab);
    let second = hanging(&mut lab);
    assert_eq!((lab.state(first), lab.state(second)), (State::Suspect, State::Suspect));
    lab.moves.clear();
    lab.idle(first, ms(1_000));
    assert!(lab.moves.is_empty());
    let drained = lab.join();
    lab.core.drain_worker(lab.now, drained, None);
    lab.idle(first, ms(1_000));
    assert!(lab.moves.is_empty(), "a drained worker is no help");
    // One joins: what waits goes there.
    lab.join();
    lab.idle(first, ms(100));
    assert_eq!(lab.moves, [first]);
}

#[test]
fn a_queue_stays_where_trusted_workers_have_no_room_for_it() {
    let mut lab = lab_with(|pool| {
        (pool.queues_move, pool.max_connections_per_worker) = (true, 10);
    });
    let other = lab.join();
    lab.counts(other, counts(8, 8, 0));
    let hanging = hanging(&mut lab);
    assert_eq!(lab.state(hanging), State::Suspect);
    assert!(lab.moves.is_empty(), "three wait, and two have room");
    lab.counts(other, counts(7, 8, 0));
    lab.idle(hanging, ms(100));
    assert_eq!(lab.moves, [hanging]);
}

#[test]
fn the_queue_of_a_drained_worker_that_hangs_is_moved() {
    let mut lab = moving();
    lab.join();
    let worker = lab.join();
    lab.counts(worker, counts(3, 3, 3));
    lab.core.drain_worker(lab.now, worker, None);
    lab.pump();
    assert!(lab.moves.is_empty());
    lab.idle(worker, ms(1_200));
    assert!(lab.moves.contains(&worker));
}

#[test]
fn queues_of_workers_with_ports_of_their_own_stay() {
    let mut lab = lab();
    lab.join();
    let hanging = hanging(&mut lab);
    assert_eq!(lab.state(hanging), State::Suspect);
    assert!(lab.moves.is_empty());
    lab.counts(hanging, counts(0, 3, 0));
    assert_eq!(lab.state(hanging), State::Active);
}
