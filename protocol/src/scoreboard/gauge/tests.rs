use super::super::*;
use super::*;

fn board() -> (Scoreboard, Scoreboard) {
    let (ours, fd) = Scoreboard::create(4, 0).unwrap();
    let theirs = Scoreboard::open(fd, 4).unwrap();
    (ours, theirs)
}

fn name(text: &str) -> GaugeName {
    text.parse().unwrap()
}

#[test]
fn the_dispatcher_sees_what_the_worker_sets() {
    let (ours, theirs) = board();
    assert_eq!((ours.gauges(), theirs.gauges()), (GAUGES, GAUGES));
    assert_eq!((ours.named_gauges(), ours.gauge(0)), (0, None));
    assert_eq!(theirs.name_gauge(&name("queue_wait")), Some(0));
    assert_eq!(theirs.name_gauge(&name("x")), Some(1));
    assert_eq!(ours.named_gauges(), 2);
    assert_eq!(ours.gauge_name(0), Some(Ok(name("queue_wait"))));
    assert_eq!(ours.gauge_name(1), Some(Ok(name("x"))));
    for (value, at) in [(1.5, 10), (-3.0, 11), (f64::MAX, 11)] {
        theirs.set_gauge(1, Reading { value, at });
        assert_eq!(ours.gauge(1), Some(Reading { value, at }));
    }
    assert_eq!(ours.gauge(0), None, "a gauge with a name has no value yet");
}

#[test]
fn there_is_room_for_all_fixed_names_and_16_more() {
    let (ours, theirs) = board();
    assert!(GAUGES as usize >= names::ALL.len() + 16);
    for gauge in 0..GAUGES {
        let text = format!("{gauge:0width$}", width = MAX_GAUGE_NAME);
        assert_eq!(theirs.name_gauge(&name(&text)), Some(gauge));
        theirs.set_gauge(gauge, Reading { value: f64::from(gauge), at: 1 });
    }
    assert_eq!(theirs.name_gauge(&name("one-more")), None);
    for gauge in 0..GAUGES {
        let found = ours.gauge_name(gauge).unwrap().unwrap();
        assert_eq!(found.as_str().parse(), Ok(gauge));
        assert_eq!(ours.gauge(gauge).unwrap().value, f64::from(gauge));
    }
    assert!(ours.gauge(GAUGES).is_none() && ours.gauge_name(GAUGES).is_none());
    theirs.set_gauge(u32::MAX, Reading { value: 1.0, at: 1 });
    // The gauges do not overlap the slots.
    for slot in 0..4 {
        assert_eq!(ours.slot(slot).unwrap().load(Ordering::Relaxed), 0);
    }
}

#[test]
fn the_time_never_goes_back() {
    let (ours, theirs) = board();
    theirs.set_gauge(0, Reading { value: 1.0, at: 20 });
    theirs.set_gauge(0, Reading { value: 2.0, at: 10 });
    assert_eq!(ours.gauge(0), Some(Reading { value: 2.0, at: 20 }));
}

#[test]
fn only_names_are_names() {
    for text in ["queue_wait", "a", "A.b-c_9", &"x".repeat(MAX_GAUGE_NAME)] {
        assert_eq!(name(text).as_str(), text);
    }
    for text in ["", "two words", "\u{e9}", "a\0b", "\0", "a\n", "a\"", &"x".repeat(49)] {
        assert_eq!(text.parse::<GaugeName>(), Err(NoGaugeName), "{text:?}");
    }
    for fixed in names::ALL {
        assert_eq!(name(fixed).as_str(), fixed);
    }
    let (ours, theirs) = board();
    for (word, bytes) in [(16, *b"bad name"), (16, [0xff; 8]), (24, *b"\0\0later\0")] {
        let at = ours.gauge_offset(0).unwrap();
        theirs.map.u64(at + word).store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        assert_eq!(ours.gauge_name(0), Some(Err(NoGaugeName)));
    }
    theirs.map.u32(OFFSET_NAMED).store(u32::MAX, Ordering::Relaxed);
    assert_eq!(ours.named_gauges(), GAUGES, "at most the number of gauges");
}

#[test]
fn an_older_dispatcher_has_none() {
    let (board, fd) = Scoreboard::create(4, 0).unwrap();
    board.map.u32(OFFSET_GAUGES).store(0, Ordering::Relaxed);
    let theirs = Scoreboard::open(fd, 4).unwrap();
    assert_eq!((theirs.gauges(), theirs.named_gauges()), (0, 0));
    assert_eq!(theirs.name_gauge(&name("x")), None);
    theirs.set_gauge(0, Reading { value: 1.0, at: 1 });
    assert_eq!(theirs.gauge(0), None);
}

#[test]
fn a_number_of_gauges_that_does_not_fit_is_refused() {
    for gauges in [MAX_GAUGES, MAX_GAUGES + 1, u32::MAX] {
        let (board, fd) = Scoreboard::create(4, 0).unwrap();
        board.map.u32(OFFSET_GAUGES).store(gauges, Ordering::Relaxed);
        let error = Scoreboard::open(fd, 4).unwrap_err();
        assert!(matches!(error, ScoreboardError::Malformed("number of gauges")), "{error}");
    }
}

#[test]
fn with_the_usual_slots_a_scoreboard_is_two_pages() {
    assert_eq!(size_with_gauges(256, GAUGES), 5888);
    assert_eq!(size_with_gauges(1, 1), 256 + 64 + 64);
    assert_eq!(size_with_gauges(7, 0), size(7), "as an older scoreboard");
}

mod model {
    //! Writes and reads under every interleaving, by a model checker.

    use loom::sync::Arc;
    use loom::sync::atomic::AtomicU64;
    use loom::thread;

    use super::super::super::tests::model::Modelled;
    use super::super::{Reading, read, write};
    use std::sync::atomic::Ordering;

    struct Gauge {
        value: Modelled<AtomicU64>,
        time: Modelled<AtomicU64>,
        clock: AtomicU64,
    }

    impl Gauge {
        fn new() -> Arc<Gauge> {
            let atomic = || Modelled(AtomicU64::new(0));
            Arc::new(Gauge { value: atomic(), time: atomic(), clock: AtomicU64::new(0) })
        }

        /// The value is the time of the write, so that a reader can tell whether the two belong
        /// together.
        fn set(&self) -> u64 {
            let at = self.clock.fetch_add(1, Ordering::SeqCst) + 1;
            write(&self.value, &self.time, Reading { value: at as f64, at });
            at
        }

        fn read(&self) -> Option<(u64, u64)> {
            read(&self.value, &self.time).map(|reading| (reading.value as u64, reading.at))
        }
    }

    /// This test fails if the two stores, or the two loads, change places.
    #[test]
    fn an_old_value_never_has_a_new_time() {
        loom::model(|| {
            let gauge = Gauge::new();
            let worker = {
                let gauge = Arc::clone(&gauge);
                thread::spawn(move || {
                    gauge.set();
                    gauge.set();
                })
            };
            let mut before = 0;
            for _ in 0..2 {
                if let Some((value, at)) = gauge.read() {
                    assert!(value >= at, "value {value} has the later time {at}");
                    assert!(at >= before, "the time decreased");
                    before = at;
                }
            }
            worker.join().unwrap();
            assert_eq!(gauge.read(), Some((2, 2)));
        });
    }

    #[test]
    fn two_writers_leave_the_later_time_and_one_value() {
        loom::model(|| {
            let gauge = Gauge::new();
            let other = {
                let gauge = Arc::clone(&gauge);
                thread::spawn(move || gauge.set())
            };
            let ours = gauge.set();
            // The stored value is this thread's or a later one, so its time is not earlier.
            let (_, at) = gauge.read().unwrap();
            assert!(at >= ours);
            let theirs = other.join().unwrap();
            let (value, at) = gauge.read().unwrap();
            assert_eq!(at, ours.max(theirs));
            assert!(value == ours || value == theirs);
        });
    }
}
