//! Keys, rates and frames with artificial answers. `tests/admin/top.rs` uses a real dispatcher.

use super::model::Order;
use super::*;
use crate::api::status::{
    FaultStatus, LeavingStatus, PoolStatus, ProcessesStatus, RollStatus, WorkerStatus,
};

fn worker(id: u64, load: u64, sent: u64) -> WorkerStatus {
    WorkerStatus {
        id,
        name: format!("w{id}"),
        pid: 100 + i32::try_from(id).expect("small"),
        state: "active".to_owned(),
        weight: 1,
        max_connections: 1000,
        load,
        sent,
        ..WorkerStatus::default()
    }
}

fn status(workers: Vec<WorkerStatus>) -> Status {
    Status {
        version: "1.2.3".to_owned(),
        pid: 42,
        uptime_seconds: 61,
        accepted: 1000,
        taken: 997,
        closed: [("no_worker".to_owned(), 3)].into(),
        accepted_per_second: vec![1, 5, 2, 8],
        pools: vec![PoolStatus {
            name: "web".to_owned(),
            policy: "least-connections".to_owned(),
            state: "ready".to_owned(),
            workers,
            ..PoolStatus::default()
        }],
        ..Status::default()
    }
}

fn three() -> Model {
    let mut model = Model::new();
    model.answer(
        status(vec![worker(1, 5, 100), worker(2, 9, 100), worker(3, 7, 100)]),
        Duration::ZERO,
    );
    model
}

fn order(model: &Model) -> Vec<u64> {
    model.rows().iter().map(|row| row.worker.id).collect()
}

fn press(model: &mut Model, keys: &str) -> Option<Action> {
    keys.chars().fold(None, |_, key| model.key(Key::Character(key)))
}

#[test]
fn the_cursor_stays_on_its_worker() {
    let mut model = three();
    assert_eq!(model.position(), Some(0));
    assert_eq!(model.key(Key::Up), None);
    assert_eq!(model.position(), Some(0));
    press(&mut model, "jj");
    assert_eq!(model.position(), Some(2));
    assert_eq!(model.key(Key::PageDown), None);
    assert_eq!(model.position(), Some(2));
    assert_eq!(press(&mut model, "g"), None);
    assert_eq!(model.position(), Some(0));
    // After sorting by load, the selected worker is on another line.
    press(&mut model, "s");
    assert_eq!(
        (model.order, order(&model), model.position()),
        (Order::Load, vec![2, 3, 1], Some(2))
    );
    // When the selected worker leaves, the cursor goes to the first one.
    model.answer(status(vec![worker(2, 9, 100), worker(3, 7, 100)]), Duration::from_secs(1));
    assert_eq!(model.position(), Some(0));
    let mut empty = Model::new();
    assert_eq!((press(&mut empty, "jkdr"), empty.key(Key::Last)), (None, None));
}

#[test]
fn draining_needs_a_confirmation_and_resuming_does_not() {
    let mut model = three();
    press(&mut model, "j");
    assert_eq!(press(&mut model, "d"), None);
    assert_eq!(model.notice, Notice::Confirm { id: 2, name: "web/w2".to_owned() });
    assert!(frame(&mut model, 80, 24).contains("drain web/w2? It gets no new connections.  y yes"));
    assert_eq!(press(&mut model, "y"), Some(Action::Drain(2)));
    // Any other key cancels and has no other effect.
    for no in [Key::Character('n'), Key::Character('q'), Key::Escape, Key::Down] {
        press(&mut model, "d");
        assert_eq!(model.key(no), None);
        assert_eq!((&model.notice, model.position()), (&Notice::Nothing, Some(1)));
    }
    assert_eq!(press(&mut model, "r"), Some(Action::Resume(2)));
    // The worker of the question leaves meanwhile.
    press(&mut model, "d");
    model.answer(status(vec![worker(1, 1, 1)]), Duration::from_secs(1));
    assert_eq!(press(&mut model, "y"), None);
    assert_eq!(press(&mut model, "q"), Some(Action::Quit));
    assert_eq!(model.key(Key::Escape), Some(Action::Quit));
    press(&mut model, "d");
    assert_eq!(model.key(Key::Interrupt), Some(Action::Quit));
}

#[test]
fn scaling_down_needs_a_confirmation() {
    let mut model = three();
    assert_eq!(press(&mut model, "+"), Some(Action::Scale("web".to_owned(), 1)));
    assert_eq!(press(&mut model, "-"), None);
    assert_eq!(press(&mut model, "n"), None);
    assert_eq!(press(&mut model, "-y"), Some(Action::Scale("web".to_owned(), -1)));
    assert_eq!(model.notice, Notice::Nothing);
}

#[test]
fn an_answer_keeps_the_open_question() {
    let mut model = three();
    for (keys, action) in [("-", Action::Scale("web".to_owned(), -1)), ("d", Action::Drain(1))] {
        press(&mut model, "+");
        press(&mut model, keys);
        let question = model.notice.clone();
        let done = Notice::Done("web: 4 processes".to_owned());
        model.notify(done.clone());
        assert_eq!(model.notice, question);
        assert_eq!(press(&mut model, "y"), Some(action));
        assert_eq!(model.notice, done, "told once the question is answered");
        press(&mut model, "s");
        assert_eq!(model.notice, Notice::Nothing);
    }
}

#[test]
fn a_pool_without_workers_can_be_scaled() {
    let mut model = Model::new();
    model.answer(status(vec![]), Duration::ZERO);
    assert_eq!(press(&mut model, "+"), Some(Action::Scale("web".to_owned(), 1)));
    assert_eq!(press(&mut model, "-y"), Some(Action::Scale("web".to_owned(), -1)));
    // With several pools and no selection, a message explains it.
    let mut two = status(vec![]);
    two.pools.push(PoolStatus { name: "chat".to_owned(), ..PoolStatus::default() });
    model.answer(two, Duration::from_secs(1));
    for key in ["+", "-"] {
        assert_eq!(press(&mut model, key), None);
        assert!(matches!(&model.notice, Notice::Failed(why) if why.contains("scale POOL N")));
    }
}

#[test]
fn rates_are_over_the_last_answers() {
    let mut model = three();
    assert!(model.rows().iter().all(|row| row.rate.is_none()));
    model.answer(
        status(vec![worker(1, 5, 110), worker(2, 9, 100), worker(4, 0, 50)]),
        Duration::from_secs(2),
    );
    let rates: Vec<_> = model.rows().iter().map(|row| row.rate).collect();
    assert_eq!(rates, [Some(5.0), Some(0.0), None]);
    assert_eq!(model.loads("web"), [21, 14]);
    press(&mut model, "ss");
    assert_eq!((model.order, order(&model)[0]), (Order::Rate, 1));
    // Another dispatcher starts its counters at zero.
    let fresh = Status { pid: 43, ..status(vec![worker(1, 5, 3)]) };
    model.answer(fresh, Duration::from_secs(3));
    assert_eq!((model.rows()[0].rate, model.loads("web")), (None, vec![5]));
    // A paused screen does not change.
    press(&mut model, "p");
    model.answer(status(vec![]), Duration::from_secs(4));
    assert_eq!(order(&model), [1]);
    assert!(frame(&mut model, 80, 24).contains("paused"));
}

#[test]
fn one_frame_without_a_terminal() {
    let mut model = Model::new();
    let mut shown = status(vec![
        WorkerStatus { in_flight: 2, ..worker(1, 4, 10) },
        WorkerStatus {
            state: "draining".to_owned(),
            name: "a\x1b[2J".to_owned(),
            ..worker(2, 2, 10)
        },
    ]);
    shown.pools[0].processes = Some(ProcessesStatus {
        wanted: 3,
        active: 2,
        starting: 1,
        leaving: 1,
        generation: 4,
        ..ProcessesStatus::default()
    });
    shown.faults = vec![FaultStatus {
        time: "2026-01-02T03:04:05.678Z".to_owned(),
        kind: "worker_gone".to_owned(),
        subject: "web/w0".to_owned(),
        text: "process 100 died".to_owned(),
        count: 2,
        ongoing: false,
    }];
    model.answer(shown, Duration::ZERO);
    assert_eq!(
        frame(&mut model, 100, 20),
        "\
dispatcher 1.2.3  pid 42  up 1m 1s
live 6  accepted 1000  queued 0  in flight 0  taken 997  closed 3
closed no_worker 3
accepted per second: 8 now, most 8 in the last 4 s
                                                                                                   █
                                                                                                 ▇ █
                                                                                                ▃█▆█
POOL         POLICY            STATE         WORKERS     LOAD QUEUED  GEN TREND
web          least-connections ready               2        6      0    4 1 starting, 1 leaving  █
  POOL         WORKER         STATE         ID      PID    LOAD                  PER SECOND INFLIGHT
> web          w1             active         1      101       4 ████████░░░░░░░░          -        2
  web          a\u{fffd}[2J          draining       2      102       2 ████████                  -        0





last faults
03:04:05 worker_gone web/w0: process 100 died (2 times)
q quit  ↑↓ choose  d drain  r resume  + - scale  s order: id  p pause
"
    );
}

#[test]
fn rolls_and_leaving_generations_have_lines() {
    let mut model = three();
    let mut shown = status(vec![worker(1, 5, 100)]);
    let mut roll = RollStatus {
        generation: 3,
        former: 2,
        state: "progressing".to_owned(),
        replaced: 1,
        remaining: 3,
        ..RollStatus::default()
    };
    let mut lines = |roll: &RollStatus, leaving: Vec<LeavingStatus>| {
        shown.pools[0].processes = Some(ProcessesStatus {
            generation: 2,
            outdated: 3,
            roll: Some(roll.clone()),
            leaving_generations: leaving,
            ..ProcessesStatus::default()
        });
        model.answer(shown.clone(), Duration::from_secs(1));
        let text = frame(&mut model, 100, 20);
        let head = text.lines().position(|line| line.starts_with("POOL ")).expect("the pools");
        let lines = text.lines().skip(head + 1).take_while(|line| !line.starts_with("  POOL"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let pool = "web          least-connections ready               1        5      0    2 ";
    let leaving = LeavingStatus { generation: 1, processes: 1, connections: 12 };
    let said = lines(&roll, vec![leaving.clone()]);
    assert!(said[0].starts_with(&format!("{pool}3 to be replaced  ")), "{said:?}");
    assert_eq!(
        said[1..],
        [
            "web: roll to generation 3 progressing, 1 of 4 replaced",
            "web: generation 1 leaves: 12 connections at 1 worker"
        ]
    );
    roll.state = "stopped".to_owned();
    roll.reason = Some("process 2 (web-2) ended before it was ready: \x1b[2J".to_owned());
    let said = lines(&roll, vec![]);
    assert_eq!(
        said[1..],
        [
            "web: roll to generation 3 stopped, 1 of 4 replaced: process 2 (web-2) ended before it was \
             ready:",
            "\u{fffd}[2J"
        ]
    );
    (roll.state, roll.reason, roll.process) = ("progressing".to_owned(), None, Some(2));
    assert_eq!(
        lines(&roll, vec![])[1],
        "web: roll of process 2 to generation 3 progressing, 1 of 4 replaced"
    );
    (roll.undo, roll.process) = (true, None);
    assert!(lines(&roll, vec![])[1].starts_with("web: return to generation 3 progressing"));
    // What is over needs no line.
    roll.state = "done".to_owned();
    assert_eq!(lines(&roll, vec![]).len(), 1);
    // Many of them leave room for the workers.
    let many = (1..50).map(|generation| LeavingStatus { generation, ..leaving.clone() });
    assert_eq!(lines(&roll, many.collect()).len(), 5);
}

#[test]
fn every_size_is_drawn() {
    let mut model = three();
    for (width, height) in [(20, 5), (40, 10), (80, 24), (300, 100)] {
        let text = frame(&mut model, width, height);
        assert_eq!(text.lines().count(), usize::from(height));
        assert!(text.contains("w1") || width < 40, "{text}");
    }
    model.no_answer("is the dispatcher running?".to_owned());
    assert!(frame(&mut model, 100, 24).contains("no answer, these are the last figures: is the"));
    let mut lost = Model::new();
    lost.no_answer("is the dispatcher running?".to_owned());
    assert!(frame(&mut lost, 100, 24).starts_with("is the dispatcher running?"));
    // With many workers, the selected one is visible.
    let mut crowd = Model::new();
    crowd.answer(status((1..=1000).map(|id| worker(id, id, id)).collect()), Duration::ZERO);
    crowd.key(Key::Last);
    assert!(
        frame(&mut crowd, 100, 24).contains("> web")
            && frame(&mut crowd, 100, 24).contains("w1000")
    );
}

#[test]
fn only_the_theme_with_colours_has_colours() {
    let mut model = three();
    for color in [false, true] {
        let Ok(mut terminal) = Terminal::new(TestBackend::new(80, 24));
        let Ok(drawn) = terminal.draw(|frame| view::draw(frame, &mut model, Theme { color }));
        let colored = drawn.buffer.content().iter().any(|cell| {
            cell.fg != ratatui::style::Color::Reset || cell.bg != ratatui::style::Color::Reset
        });
        assert_eq!(colored, color);
    }
}

#[test]
fn arguments() {
    assert_eq!(size("100x30"), Ok((100, 30)));
    for bad in ["", "100", "x", "10x10", "100x1", "501x30", "100x30x2", "-1x5"] {
        assert!(size(bad).is_err(), "{bad}");
    }
    assert_eq!(interval("1s"), Ok(Duration::from_secs(1)));
    assert!(interval("1ms").is_err() && interval("1").is_err());
}
