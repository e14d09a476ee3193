//! The state of `top` and the effect of keys. It has no terminal, socket or clock: each answer
//! brings its time.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::api::status::{PoolStatus, Status, WorkerStatus};

/// Number of answers for which the load of a pool is kept.
const LOADS: usize = 300;

/// Shown when there are several pools and the cursor selects none.
const WHICH_POOL: &str = "there is no worker to choose a pool by: dispatcher scale POOL N";

/// Number of answers over which a rate is computed.
const SAMPLES: usize = 6;

/// A key, independent of the terminal library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Up,
    Down,
    PageUp,
    PageDown,
    First,
    Last,
    Escape,
    Interrupt,
    Character(char),
}

/// A command for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Quit,
    Drain(u64),
    Resume(u64),
    /// Change the number of processes of this pool.
    Scale(String, i32),
}

/// The sort order of the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Id,
    Load,
    Rate,
}

impl Order {
    fn next(self) -> Order {
        match self {
            Order::Id => Order::Load,
            Order::Load => Order::Rate,
            Order::Rate => Order::Id,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Order::Id => "id",
            Order::Load => "load",
            Order::Rate => "rate",
        }
    }
}

/// The message line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    Nothing,
    /// The result of a command.
    Done(String),
    Failed(String),
    /// Asks for confirmation of a drain.
    Confirm {
        id: u64,
        name: String,
    },
    /// Asks for confirmation of one process fewer.
    ConfirmFewer(String),
}

/// A row of the table.
#[derive(Clone, Debug)]
pub(super) struct Row<'a> {
    pub pool: &'a PoolStatus,
    pub worker: &'a WorkerStatus,
    /// Connections per second; `None` before the second answer.
    pub rate: Option<f64>,
}

struct Sample {
    at: Duration,
    sent: HashMap<u64, u64>,
}

/// The whole state.
pub(super) struct Model {
    pub status: Option<Status>,
    /// Why there is no newer answer.
    pub lost: Option<String>,
    pub notice: Notice,
    /// The result of an earlier command, while a question is open.
    later: Option<Notice>,
    pub order: Order,
    pub paused: bool,
    /// The id of the selected worker; the selection stays when the order changes.
    selected: Option<u64>,
    /// Rows per page, set by the view.
    pub page: usize,
    samples: VecDeque<Sample>,
    /// By pool: its load in the last answers, newest last.
    loads: HashMap<String, VecDeque<u64>>,
}

impl Model {
    pub(super) fn new() -> Model {
        Model {
            status: None,
            lost: None,
            notice: Notice::Nothing,
            later: None,
            order: Order::Id,
            paused: false,
            selected: None,
            page: 10,
            samples: VecDeque::new(),
            loads: HashMap::new(),
        }
    }

    /// Takes an answer, received at this time since the start of the program.
    pub(super) fn answer(&mut self, status: Status, at: Duration) {
        self.lost = None;
        if self.paused {
            return;
        }
        let restarted = self
            .status
            .as_ref()
            .is_some_and(|old| old.pid != status.pid || old.accepted > status.accepted);
        if restarted {
            self.samples.clear();
            self.loads.clear();
        }
        let workers = || status.pools.iter().flat_map(|pool| &pool.workers);
        self.samples.push_back(Sample {
            at,
            sent: workers().map(|worker| (worker.id, worker.sent)).collect(),
        });
        if self.samples.len() > SAMPLES {
            self.samples.pop_front();
        }
        self.loads.retain(|name, _| status.pools.iter().any(|pool| pool.name == *name));
        for pool in &status.pools {
            let loads = self.loads.entry(pool.name.clone()).or_default();
            loads.push_back(pool.workers.iter().map(|worker| worker.load).sum());
            if loads.len() > LOADS {
                loads.pop_front();
            }
        }
        self.status = Some(status);
        let ids: Vec<u64> = self.rows().iter().map(|row| row.worker.id).collect();
        if self.selected.is_none_or(|id| !ids.contains(&id)) {
            self.selected = ids.first().copied();
        }
        if let Notice::Confirm { id, .. } = &self.notice
            && !ids.contains(id)
        {
            self.notice = Notice::Failed("that worker has gone".to_owned());
        }
    }

    /// Records a failed request.
    pub(super) fn no_answer(&mut self, why: String) {
        self.lost = Some(why);
    }

    /// The workers in display order.
    pub(super) fn rows(&self) -> Vec<Row<'_>> {
        let Some(status) = &self.status else { return Vec::new() };
        let mut rows: Vec<Row<'_>> = status
            .pools
            .iter()
            .flat_map(|pool| {
                pool.workers.iter().map(move |worker| (pool, worker)).map(|(pool, worker)| Row {
                    pool,
                    worker,
                    rate: self.rate(worker),
                })
            })
            .collect();
        // A stable sort, so that equal rows keep their order.
        match self.order {
            Order::Id => {}
            Order::Load => rows.sort_by_key(|row| std::cmp::Reverse(row.worker.load)),
            Order::Rate => rows
                .sort_by(|a, b| b.rate.unwrap_or_default().total_cmp(&a.rate.unwrap_or_default())),
        }
        rows
    }

    fn rate(&self, worker: &WorkerStatus) -> Option<f64> {
        let now = self.samples.back()?;
        let then = self.samples.iter().find(|sample| sample.sent.contains_key(&worker.id))?;
        let seconds = now.at.saturating_sub(then.at).as_secs_f64();
        let sent = worker.sent.saturating_sub(*then.sent.get(&worker.id)?);
        (seconds > 0.0).then(|| sent as f64 / seconds)
    }

    /// The load of a pool in the last answers, newest last.
    pub(super) fn loads(&self, pool: &str) -> Vec<u64> {
        self.loads.get(pool).map(|loads| loads.iter().copied().collect()).unwrap_or_default()
    }

    /// The row of the cursor.
    pub(super) fn position(&self) -> Option<usize> {
        let selected = self.selected?;
        self.rows().iter().position(|row| row.worker.id == selected)
    }

    /// Shows the result of a command. An open question stays, because the user may be about to
    /// answer it.
    pub(super) fn notify(&mut self, notice: Notice) {
        match self.notice {
            Notice::Confirm { .. } | Notice::ConfirmFewer(_) => self.later = Some(notice),
            Notice::Nothing | Notice::Done(_) | Notice::Failed(_) => self.notice = notice,
        }
    }

    /// Handles a key.
    pub(super) fn key(&mut self, key: Key) -> Option<Action> {
        if key == Key::Interrupt {
            return Some(Action::Quit);
        }
        if let Notice::Confirm { id, .. } = self.notice {
            // Any other key cancels.
            self.notice = self.later.take().unwrap_or(Notice::Nothing);
            return (key == Key::Character('y')).then_some(Action::Drain(id));
        }
        if let Notice::ConfirmFewer(pool) = &self.notice {
            let order = Action::Scale(pool.clone(), -1);
            self.notice = self.later.take().unwrap_or(Notice::Nothing);
            return (key == Key::Character('y')).then_some(order);
        }
        self.notice = Notice::Nothing;
        let page = isize::try_from(self.page).unwrap_or(1).max(1);
        match key {
            Key::Up | Key::Character('k') => self.move_by(-1),
            Key::Down | Key::Character('j') => self.move_by(1),
            Key::PageUp => self.move_by(-page),
            Key::PageDown => self.move_by(page),
            Key::First | Key::Character('g') => self.move_by(isize::MIN),
            Key::Last | Key::Character('G') => self.move_by(isize::MAX),
            Key::Character('q') | Key::Escape => return Some(Action::Quit),
            Key::Character('s') => self.order = self.order.next(),
            Key::Character('p') => self.paused = !self.paused,
            Key::Character('d') => {
                if let Some((id, name)) = self.selected_worker() {
                    self.notice = Notice::Confirm { id, name };
                }
            }
            Key::Character('+') => match self.selected_pool() {
                Some(pool) => return Some(Action::Scale(pool, 1)),
                None => self.notice = Notice::Failed(WHICH_POOL.to_owned()),
            },
            Key::Character('-') => {
                self.notice = match self.selected_pool() {
                    Some(pool) => Notice::ConfirmFewer(pool),
                    None => Notice::Failed(WHICH_POOL.to_owned()),
                };
            }
            Key::Character('r') => return self.selected_worker().map(|(id, _)| Action::Resume(id)),
            Key::Interrupt | Key::Character(_) => {}
        }
        None
    }

    /// The pool of the selected worker; without workers, the only pool.
    fn selected_pool(&self) -> Option<String> {
        if let Some(position) = self.position() {
            return Some(self.rows().get(position)?.pool.name.clone());
        }
        match &self.status.as_ref()?.pools[..] {
            [only] => Some(only.name.clone()),
            [] | [_, _, ..] => None,
        }
    }

    fn selected_worker(&self) -> Option<(u64, String)> {
        let rows = self.rows();
        let row = rows.get(self.position()?)?;
        Some((row.worker.id, format!("{}/{}", row.pool.name, row.worker.name)))
    }

    fn move_by(&mut self, count: isize) {
        let ids: Vec<u64> = self.rows().iter().map(|row| row.worker.id).collect();
        let Some(last) = ids.len().checked_sub(1) else { return };
        let position = self.position().unwrap_or(0);
        self.selected = ids.get(position.saturating_add_signed(count).min(last)).copied();
    }
}
