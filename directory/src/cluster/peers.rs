//! What is known of the other directories: who is there, and whether an update was missed.

use std::collections::HashMap;

use dispatch_protocol::relay::{Shared, host_number};

use crate::registry::{Now, Registry};

/// Without a sign of life for this long a host is out of reach. Milliseconds.
const SILENT: u64 = 5000;

/// After this long what it had registered is forgotten. Milliseconds.
const FORGET: u64 = 300_000;

/// Between two requests for a snapshot of one host. Milliseconds.
const ASK_AGAIN: u64 = 500;

/// Records that wait for a snapshot; with more, another one is asked for.
const MAX_WAITING: usize = 262_144;

struct Peer {
    /// Its index in the registry.
    index: u16,
    run: u64,
    /// The largest message of its members.
    max_message: usize,
    /// The number of its last update that was applied; `None` until a snapshot has ended.
    sequence: Option<u64>,
    /// The number that the snapshot under way has.
    snapshot: Option<u64>,
    /// Updates after it.
    waiting: Vec<(u64, Vec<Shared>)>,
    waiting_records: usize,
    heard: u64,
    asked: u64,
}

#[derive(Default)]
pub(super) struct Peers {
    /// By the number of the host.
    hosts: HashMap<u64, Peer>,
    warned: u64,
}

impl Peers {
    /// Whether a host has said a moment ago that it is there.
    pub(super) fn is_reachable(&self, host: u64, now: u64) -> bool {
        self.hosts.get(&host).is_some_and(|peer| now < peer.heard + SILENT)
    }

    /// The largest message of a host's members.
    pub(super) fn max_message(&self, host: u64) -> Option<usize> {
        self.hosts.get(&host).map(|peer| peer.max_message)
    }

    /// Hosts that have been silent too long; they are no longer known.
    pub(super) fn forgotten(&mut self, now: u64) -> Vec<u16> {
        let mut gone = Vec::new();
        self.hosts.retain(|_, peer| {
            let silent = now >= peer.heard + FORGET;
            if silent {
                gone.push(peer.index);
            }
            !silent
        });
        gone
    }

    /// A message of another directory. Returns its host if a snapshot is needed, and puts hosts
    /// that ask for one into `asked`.
    pub(super) fn take(
        &mut self,
        registry: &mut Registry,
        now: Now,
        (own, run): (u64, u64),
        records: Vec<Shared>,
        asked: &mut Vec<u64>,
    ) -> Option<u64> {
        let mut records = records.into_iter();
        let Some(Shared::Host { host: name, run: other_run, sequence, wall, max_message, .. }) =
            records.next()
        else {
            return None;
        };
        let number = host_number(&name);
        if number == own {
            if other_run != run && now.steady >= self.warned {
                self.warned = now.steady + 60_000;
                log::error!(
                    "event=host_twice host={name} hint=\"give each directory a `host` of its own\""
                );
            }
            return None;
        }
        let index = registry.remote_host(&name)?;
        let new = Peer {
            index,
            run: other_run,
            max_message: 0,
            sequence: None,
            snapshot: None,
            waiting: Vec::new(),
            waiting_records: 0,
            heard: now.steady,
            asked: 0,
        };
        let peer = self.hosts.entry(number).or_insert_with(|| {
            log::info!("event=host_found host={name}");
            if wall.abs_diff(now.wall) > 1000 {
                log::warn!("event=clock_differs host={name} ms={}", wall.abs_diff(now.wall));
            }
            new
        });
        peer.heard = now.steady;
        if peer.max_message != max_message as usize {
            log::info!("event=host_limits host={name} max_message={max_message}");
            peer.max_message = max_message as usize;
        }
        if peer.run != other_run {
            peer.run = other_run;
            (peer.sequence, peer.snapshot) = (None, None);
            peer.clear_waiting();
        }
        let mut update = Vec::new();
        let mut direct = false;
        for record in records {
            match record {
                Shared::AskSnapshot { host } if host == own => {
                    direct = true;
                    asked.push(number);
                }
                Shared::SnapshotBegin { .. } => {
                    direct = true;
                    peer.snapshot = Some(sequence);
                    registry.begin_snapshot(index);
                }
                Shared::SnapshotEnd { .. } => {
                    direct = true;
                    peer.apply(registry, now, std::mem::take(&mut update));
                    registry.end_snapshot(now, index);
                    peer.sequence = peer.snapshot.take();
                    peer.waiting_records = 0;
                    for (sequence, records) in std::mem::take(&mut peer.waiting) {
                        peer.update(registry, now, sequence, records);
                    }
                }
                Shared::Leaving { run } if run == peer.run => {
                    log::info!("event=host_left host={name}");
                    registry.forget_host(now, index);
                    self.hosts.remove(&number);
                    return None;
                }
                other => update.push(other),
            }
        }
        if peer.snapshot == Some(sequence) && (direct || !update.is_empty()) {
            // A part of the snapshot; updates have later numbers.
            peer.apply(registry, now, update);
        } else if !update.is_empty() {
            peer.update(registry, now, sequence, update);
        } else if !direct && peer.sequence.is_some_and(|last| last != sequence) {
            // A heartbeat with the number of an update that has not come.
            peer.sequence = None;
        }
        let needs = peer.sequence.is_none() && now.steady >= peer.asked + ASK_AGAIN;
        needs.then(|| {
            peer.asked = now.steady;
            number
        })
    }
}

impl Peer {
    fn clear_waiting(&mut self) {
        self.waiting.clear();
        self.waiting_records = 0;
    }

    fn update(&mut self, registry: &mut Registry, now: Now, sequence: u64, records: Vec<Shared>) {
        match self.sequence {
            // The snapshot had it.
            Some(last) if sequence <= last => {}
            Some(last) if last.checked_add(1) == Some(sequence) => {
                self.sequence = Some(sequence);
                self.apply(registry, now, records);
            }
            Some(_) => self.sequence = None,
            None if self.waiting_records + records.len() < MAX_WAITING => {
                self.waiting_records += records.len();
                self.waiting.push((sequence, records));
            }
            None => self.clear_waiting(),
        }
    }

    fn apply(&self, registry: &mut Registry, now: Now, records: Vec<Shared>) {
        let all = records.len();
        let applied =
            records.into_iter().filter(|record| registry.apply(now, self.index, record.clone()));
        let left_out = all - applied.count();
        if left_out > 0 {
            log::warn!("event=updates_left_out count={left_out}");
        }
    }
}
