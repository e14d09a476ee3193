//! The streams of workers, before and after they have joined.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dispatch_protocol::line::{Lines, Report};
use rustix::io::Errno;

use super::super::control::Peer;
use super::super::peer_thread::receive;
use super::super::token::Key;
use super::Fault;
use crate::sys;
use dispatcher_core::{Time, WorkerId};

/// Room for bytes of a stream. Its reports come once a second and have about a hundred bytes each.
const BYTES: usize = 4096;

/// What is known about the peer of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It has not reported; refused at this time.
    New { until: Time },
    /// The hot thread decides.
    Asked,
    /// It has joined.
    Joined(WorkerId),
    /// It has joined, and has left or broken the protocol: nothing more is read.
    Over(WorkerId),
}

/// One stream.
#[derive(Debug)]
pub(super) struct Stream {
    serial: u64,
    pub(super) socket: OwnedFd,
    pub(super) peer: Peer,
    /// Readable once the process has ended; `None` if the kernel does not support it.
    pub(super) process: Option<OwnedFd>,
    pub(super) stage: Stage,
    /// The pool of the socket, and pools by type.
    pub(super) pool: String,
    pub(super) types: Arc<BTreeMap<String, String>>,
    lines: Lines,
    /// The time of the last read.
    pub(super) read_at: Time,
    /// It is in the queue of streams to read again.
    pub(super) again: bool,
    /// The end of the stream was seen, and the peer had read everything or not.
    pub(super) read_all: Option<bool>,
    /// Its end was seen: reported at this time, unless its process is seen to end first.
    pub(super) ended: Option<Time>,
}

/// The result of a read.
#[derive(Debug)]
pub(super) enum Received {
    /// Some bytes, with this last complete report.
    Bytes(Option<Report>),
    /// No bytes for now.
    Empty,
    /// The peer has closed it.
    End,
    /// Something else than reports.
    Broken(Fault),
}

impl Stream {
    pub(super) fn new(
        socket: OwnedFd,
        peer: Peer,
        pool: String,
        types: Arc<BTreeMap<String, String>>,
        until: Time,
    ) -> Stream {
        Stream {
            serial: 0,
            socket,
            peer,
            process: None,
            stage: Stage::New { until },
            pool,
            types,
            lines: Lines::default(),
            read_at: Time::default(),
            again: false,
            read_all: None,
            ended: None,
        }
    }

    /// The worker, if it has joined.
    pub(super) fn worker(&self) -> Option<WorkerId> {
        match self.stage {
            Stage::New { .. } | Stage::Asked => None,
            Stage::Joined(worker) | Stage::Over(worker) => Some(worker),
        }
    }

    /// Whether the hot thread has decided, and reads make sense.
    pub(super) fn is_readable(&self) -> bool {
        matches!(self.stage, Stage::New { .. } | Stage::Joined(_)) && self.ended.is_none()
    }

    /// Reads once. A later report replaces an earlier one. Descriptors are added to `rubbish`.
    pub(super) fn read(&mut self, rubbish: &mut Vec<OwnedFd>) -> Received {
        let mut buffer = [0; BYTES];
        let message = match receive(&self.socket, &mut buffer, rubbish) {
            Err(Errno::AGAIN) => return Received::Empty,
            // ECONNRESET: the peer has left something unread.
            Err(_) => {
                self.read_all = Some(false);
                return Received::End;
            }
            Ok(message) => message,
        };
        if message.had_fds {
            return Received::Broken(Fault::Descriptors);
        }
        let Some(mut bytes) = buffer.get(..message.bytes).filter(|bytes| !bytes.is_empty()) else {
            self.read_all = self.read_all.or(Some(true));
            return Received::End;
        };
        let mut last: Option<Report> = None;
        while let Some(report) = self.lines.next(&mut bytes) {
            match report {
                Ok(report) => last = Some(later(last, report)),
                Err(error) => return Received::Broken(Fault::Line(error)),
            }
        }
        Received::Bytes(last)
    }

    /// Whether the worker has read everything, once the end of the stream was seen. A stream that
    /// was only shut down has an end, too, while messages are in it; and a close that destroys
    /// messages is told once, by an error.
    pub(super) fn has_read_all(&mut self, rubbish: &mut Vec<OwnedFd>) -> bool {
        // In this order: what is destroyed between the two gives the error.
        let empty = sys::unread_by_peer(&self.socket).is_ok_and(|unread| unread == 0);
        let end = matches!(self.read(rubbish), Received::End);
        empty && end && self.read_all == Some(true)
    }
}

/// The later of two reports, with the type of the earlier one if it has none.
pub(super) fn later(earlier: Option<Report>, mut report: Report) -> Report {
    if let Some(earlier) = earlier.filter(|_| report.kind.is_empty()) {
        report.kind = earlier.kind;
    }
    report
}

/// All streams, and which of them belongs to which worker.
#[derive(Debug, Default)]
pub(super) struct Streams {
    places: Vec<Option<Stream>>,
    serial: u64,
    /// Streams that have not joined.
    new: usize,
    /// By `WorkerId::index`.
    workers: Vec<Option<Key>>,
}

impl Streams {
    pub(super) fn insert(&mut self, mut stream: Stream) -> Key {
        self.serial += 1;
        self.new += 1;
        stream.serial = self.serial;
        let index = match self.places.iter().position(Option::is_none) {
            Some(index) => {
                self.places[index] = Some(stream);
                index
            }
            None => {
                self.places.push(Some(stream));
                self.places.len() - 1
            }
        };
        Key { index: index as u32, serial: self.serial }
    }

    pub(super) fn get(&mut self, key: Key) -> Option<&mut Stream> {
        let stream = self.places.get_mut(key.index as usize)?.as_mut()?;
        key.is(stream.serial).then_some(stream)
    }

    /// Takes a stream out of the table.
    pub(super) fn take(&mut self, key: Key) -> Option<Stream> {
        self.get(key)?;
        let stream = self.places.get_mut(key.index as usize)?.take()?;
        match stream.worker() {
            None => self.new -= 1,
            Some(worker) => {
                if let Some(place) = self.workers.get_mut(worker.index as usize) {
                    place.take_if(|other| *other == key);
                }
            }
        }
        Some(stream)
    }

    /// The worker of a stream has joined.
    pub(super) fn joined(&mut self, key: Key, worker: WorkerId) -> Option<&mut Stream> {
        let index = worker.index as usize;
        if self.workers.len() <= index {
            self.workers.resize(index + 1, None);
        }
        let asked = self.get(key).is_some_and(|stream| stream.stage == Stage::Asked);
        if !asked {
            return None;
        }
        self.workers[index] = Some(key);
        self.new -= 1;
        let stream = self.get(key)?;
        stream.stage = Stage::Joined(worker);
        Some(stream)
    }

    /// The stream of a worker.
    pub(super) fn of(&mut self, worker: WorkerId) -> Option<Key> {
        let key = (*self.workers.get(worker.index as usize)?)?;
        (self.get(key)?.worker() == Some(worker)).then_some(key)
    }

    /// Streams that have not joined, of one user and of all.
    pub(super) fn new_ones(&self, uid: u32) -> (usize, usize) {
        if self.new == 0 {
            return (0, 0);
        }
        let new = |stream: &&Stream| stream.worker().is_none() && stream.peer.uid == uid;
        (self.places.iter().flatten().filter(new).count(), self.new)
    }

    /// The first stream that is to be refused at a time, and that time.
    pub(super) fn earliest(&self) -> Option<(Key, Time)> {
        if self.new == 0 {
            return None;
        }
        let places = (0u32..).zip(&self.places);
        let waiting = places.filter_map(|(index, stream)| match stream {
            Some(stream) => match stream.stage {
                Stage::New { until } => Some((Key { index, serial: stream.serial }, until)),
                Stage::Asked | Stage::Joined(_) | Stage::Over(_) => None,
            },
            None => None,
        });
        waiting.min_by_key(|(_, until)| *until)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &Stream)> {
        (0u32..).zip(&self.places).filter_map(|(index, stream)| {
            let stream = stream.as_ref()?;
            Some((Key { index, serial: stream.serial }, stream))
        })
    }

    pub(super) fn drain(&mut self) -> impl Iterator<Item = Stream> + '_ {
        self.new = 0;
        self.workers.clear();
        self.places.drain(..).flatten()
    }
}
