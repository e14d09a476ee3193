//! The steps of the link to the dispatcher, and the way of connections through the queue.
//!
//! All functions run with the core's lock held, except for the wait in [`WorkerCore::lead`]. So
//! they never call the application's logger: see [`LogQueue`].

use super::*;
use crate::client::clock;

impl WorkerCore {
    /// Takes the front of the queue; `None` if it is empty. A connection is counted before the lock
    /// is released, so that a hello includes it.
    pub(super) fn pop(self: &Arc<Self>, state: &mut State) -> Option<Popped> {
        let mut popped = Popped::default();
        match state.queue.pop_front()? {
            Pending::Taken(accepted) => popped.accepted = Some(accepted),
            Pending::Offered(arrived) => {
                let session = state.link.session();
                let claim = session.and_then(|session| {
                    Some((session, take_slot(session, arrived.entry.slot, arrived.entry.seq)?))
                });
                match claim {
                    Some((session, now)) => {
                        let copied = state.forks.more_since();
                        popped.accepted = Some(self.take(session, arrived, now, copied));
                        popped.doorbell = Some(Arc::clone(session));
                    }
                    None => popped.stale = Some(arrived.fd),
                }
            }
            Pending::Probe(probe) => {
                let session = state.link.session();
                let claimed =
                    |session: &&Arc<Session>| take_slot(session, probe.slot, probe.seq).is_some();
                popped.doorbell = session.filter(claimed).cloned();
            }
        }
        Some(popped)
    }

    /// The part of a take that needs no lock: hands over, rings the doorbell, sets the blocking
    /// mode.
    pub(super) fn hand_out(
        &self,
        state: Locked<'_>,
        popped: Popped,
        nonblocking: bool,
    ) -> Option<Accepted> {
        self.pass_on(&state);
        drop(state);
        if let Some(session) = popped.doorbell {
            session.ring_if_wanted(want::TAKEN);
        }
        let accepted = popped.accepted?;
        // The mode belongs to the open socket, and an earlier owner may have changed it.
        if !(nonblocking && accepted.nonblocking)
            && let Err(error) = accepted.stream.set_nonblocking(nonblocking)
        {
            let line = || format!("cannot set a connection's blocking mode: {error}");
            self.log_queue.push_limited(RateLimited::Mode, log::Level::Error, line);
            self.log_queue.flush();
        }
        Some(accepted)
    }

    /// `copied` if a child forked since the arrival may have a copy, which it will never serve;
    /// `now` is `CLOCK_REALTIME`.
    fn take(
        self: &Arc<Self>,
        session: &Session,
        arrived: Arrived,
        now: Duration,
        copied: bool,
    ) -> Accepted {
        let Arrived { entry, fd, proxy } = arrived;
        self.opened.fetch_add(1, Ordering::SeqCst);
        let taken_slot = TakenSlot {
            board: Arc::clone(&session.board),
            slot: entry.slot,
            seq: entry.seq,
            doorbell: Arc::clone(&session.doorbell),
            resent: copied || entry.flags.contains(EntryFlags::RESENT),
        };
        Accepted {
            stream: fd.into(),
            nonblocking: entry.flags.contains(EntryFlags::NONBLOCKING),
            guard: Guard::new(Arc::clone(self), Some(taken_slot)),
            origin: Origin {
                peer: entry.peer.into(),
                listener: session.listener(entry.listener),
                accepted: AcceptTime::new(Duration::from_nanos(entry.accepted_ns), now),
                number: (entry.number != 0).then_some(entry.number),
                is_ready_check: entry.flags.contains(EntryFlags::READY_CHECK),
                proxy: proxy.map(|header| Box::new(Proxy::from(*header))),
            },
        }
    }

    /// Waits, outside the lock, for the next change of the link, then applies it.
    pub(super) fn lead<'a>(
        self: &'a Arc<Self>,
        mut state: Locked<'a>,
        until: Option<Instant>,
    ) -> (Locked<'a>, Result<(), Error>) {
        let Link::Joined { channel, .. } = &state.link else {
            let result = match self.step(&mut state) {
                Ok(Step::Again) => return (state, Ok(())),
                Ok(Step::Blocked) => {
                    drop(state);
                    self.wait(until)
                }
                Err(error) => return (state, Err(error)),
            };
            return (self.lock(), result);
        };
        let channel = Arc::clone(channel);
        let mut buffer = mem::take(&mut state.buffer);
        state.note_forks();
        drop(state);
        let wait = if until.is_none() { ReceiveMode::Blocking } else { ReceiveMode::NonBlocking };
        let mut received = channel::receive(channel.as_fd(), &mut buffer, wait);
        if matches!(received, Received::Empty) {
            // Because of a time limit, or because other code made the channel non-blocking.
            let waited = self.wait(until);
            received = channel::receive(channel.as_fd(), &mut buffer, ReceiveMode::NonBlocking);
            if waited.is_err() {
                state = self.lock();
                state.buffer = buffer;
                self.received(&mut state, received);
                return (state, waited);
            }
        }
        let mut state = self.lock();
        state.buffer = buffer;
        self.received(&mut state, received);
        (state, Ok(()))
    }

    /// Advances the link without waiting.
    pub(super) fn step(self: &Arc<Self>, state: &mut State) -> Result<Step, Error> {
        let now = Instant::now();
        match &mut state.link {
            Link::Closed => Err(Error::Closed),
            Link::Waiting { until } if now < *until => {
                let until = *until;
                self.sleep(state, until, now)
            }
            Link::Waiting { until } => {
                let socket = match state.dispatchers.next(now) {
                    Next::Try(socket) => socket,
                    Next::Wait(next) => {
                        *until = next;
                        return Ok(Step::Again);
                    }
                };
                state.dispatchers.begin(&socket, now);
                let hello = Hello {
                    // In this order, because a connection may end between the two reads, but none
                    // can open.
                    finished: self.finished.load(Ordering::SeqCst),
                    base: self.opened.load(Ordering::SeqCst),
                    weight: state.settings.weight,
                    max_connections: state.settings.max_connections,
                    ..self.hello.clone()
                };
                let greeted = join::greet(&socket, &hello).and_then(|(control, place)| match self
                    .readiness
                    .watch(control.as_fd())
                {
                    Ok(()) => Ok((control, place)),
                    Err(error) => Err(Failure::Absent(error.to_string())),
                });
                match greeted {
                    Ok((control, place)) => {
                        let until = now + WELCOME_TIMEOUT;
                        state.link = Link::Greeting { control, until, place };
                    }
                    Err(failure) => self.failed(state, failure)?,
                }
                Ok(Step::Again)
            }
            Link::Greeting { control, until, place } => {
                let socket = state.dispatchers.current();
                match join::answer(control, socket) {
                    Ok(None) if now < *until => {
                        let until = *until;
                        return self.sleep(state, until, now);
                    }
                    // It still waits in the queue of a listening socket, which a service manager
                    // can hold open while there is no dispatcher. The next dispatcher finds it
                    // there. Another attempt would only fill the queue. But another dispatcher may
                    // be ready.
                    Ok(None)
                        if !state.dispatchers.are_several()
                            && !crate::sys::all_received(control)
                            && *place == Place::of(socket).ok() =>
                    {
                        *until = now + WELCOME_TIMEOUT;
                    }
                    Ok(None) => {
                        let problem = format!("no answer within {WELCOME_TIMEOUT:?}");
                        self.failed(state, Failure::Absent(problem))?;
                    }
                    Ok(Some(joined)) => self.joined(state, joined)?,
                    Err(failure) => self.failed(state, failure)?,
                }
                Ok(Step::Again)
            }
            Link::Joined { channel, .. } => {
                let channel = Arc::clone(channel);
                state.note_forks();
                match channel::receive(channel.as_fd(), &mut state.buffer, ReceiveMode::NonBlocking)
                {
                    Received::Empty => Ok(Step::Blocked),
                    received => {
                        self.received(state, received);
                        Ok(Step::Again)
                    }
                }
            }
            Link::Standalone { .. } => Ok(self.accept_directly(state, now)),
        }
    }

    /// Nothing to do before `until`, unless the join deadline comes first.
    fn sleep(&self, state: &mut State, until: Instant, now: Instant) -> Result<Step, Error> {
        let timeout = self.check_join_deadline(state, now);
        let wake = state.join_deadline.map_or(until, |(deadline, _)| until.min(deadline));
        self.readiness.arm(wake.saturating_duration_since(now));
        timeout.map(|()| Step::Blocked)
    }

    fn failed(&self, state: &mut State, failure: Failure) -> Result<(), Error> {
        let mut connected = false;
        if let Link::Greeting { control, .. } = &state.link {
            self.readiness.forget(control.as_fd());
            join::end(control);
            connected = true;
        }
        let how = match failure {
            Failure::Transient(_) | Failure::Permanent(_) if connected => Failed::Refused,
            Failure::Absent(_) | Failure::Transient(_) | Failure::Permanent(_) => Failed::Absent,
        };
        let now = Instant::now();
        let permanent = matches!(failure, Failure::Permanent(_));
        let delay = state.dispatchers.failed(how, permanent, now);
        let until = state.dispatchers.due(now);
        state.link = Link::Waiting { until };
        let wake = until.saturating_duration_since(now);
        let problem = match failure {
            Failure::Permanent(error)
                if !state.ever_joined && state.dispatchers.all_permanent() =>
            {
                // The caller may wait all the same.
                self.readiness.arm(wake);
                return Err(error);
            }
            Failure::Permanent(error) => error.to_string(),
            Failure::Absent(problem) | Failure::Transient(problem) => problem,
        };
        let warned = state.dispatchers.warn();
        let socket = state.dispatchers.current();
        let line = || {
            format!(
                "cannot join the dispatcher at {}: {problem}; trying again in {}, and so on",
                readable_path(socket),
                clock::shown(delay)
            )
        };
        if warned {
            self.log_queue.push(log::Level::Debug, line);
        } else {
            // Without this line the user would not learn why the program gets no connections.
            self.log_queue.push_important(log::Level::Warn, line);
        }
        state.last_problem = if state.dispatchers.are_several() {
            format!("{}: {problem}", readable_path(socket))
        } else {
            problem
        };
        // Checked here as well, because the next attempt may be due already.
        let timeout = self.check_join_deadline(state, Instant::now());
        if timeout.is_err() {
            self.readiness.arm(wake);
        }
        timeout
    }

    /// Reported once, because a caller that continues to ask wants further attempts.
    fn check_join_deadline(&self, state: &mut State, now: Instant) -> Result<(), Error> {
        match state.join_deadline.take_if(|(deadline, _)| *deadline <= now) {
            None => Ok(()),
            Some((_, after)) => Err(Error::JoinTimeout {
                socket: self.socket.clone(),
                after,
                last: state.last_problem.clone(),
            }),
        }
    }

    fn joined(self: &Arc<Self>, state: &mut State, joined: Joined) -> Result<(), Error> {
        if let Err(error) = self.readiness.watch(joined.channel.as_fd()) {
            return self.failed(state, Failure::Transient(error.to_string()));
        }
        let until = Instant::now();
        let Link::Greeting { control, .. } = mem::replace(&mut state.link, Link::Waiting { until })
        else {
            return Ok(());
        };
        self.readiness.forget(control.as_fd());
        self.readiness.disarm();
        let (session, channel) = Session::new(control, joined);
        let session = Arc::new(session);
        self.log_queue.push(log::Level::Info, || {
            format!(
                "joined the dispatcher at {} as worker {} of pool {}",
                readable_path(state.dispatchers.current()),
                session.worker_id,
                self.hello.pool
            )
        });
        self.events.happened(self, LinkEvent::Joined(session.worker_id));
        // Published first, then raised: so one of the two includes a connection that ends in
        // between.
        self.set_current(Some(Arc::clone(&session)));
        session.board.raise_finished(self.finished.load(Ordering::SeqCst));
        session.ring_if_wanted(want::ROOM);
        state.idle_threads.publish(&session.board);
        self.gauges.show(&session.board);
        self.sampler.wanted(&self.gauges, &session.gauges);
        if state.settings.paused {
            self.tell(&session, &state.settings);
        }
        let channel = Arc::new(channel);
        if self.on_loss == OnDispatcherLoss::Stop {
            let (core, session) = (Arc::clone(self), Arc::clone(&session));
            let channel = Arc::clone(&channel);
            start_thread(self, "worker-loss", move || core.watch_for_loss(&session, &channel));
        }
        state.link = Link::Joined { session, channel };
        state.ever_joined = true;
        state.dispatchers.joined();
        state.join_deadline = None;
        Ok(())
    }

    fn received(self: &Arc<Self>, state: &mut State, received: Received) {
        let Some(session) = state.link.session() else {
            // The worker was closed in the meantime. Dropping the record closes its descriptors;
            // the dispatcher still has its copies, unless it has ended.
            if let (Some(session), Received::Handoff { arrived, .. }) =
                (state.orphaned.clone(), received)
            {
                self.adopt(state, &session, arrived);
            }
            return;
        };
        match received {
            Received::Empty => {}
            Received::Probe(probe) => state.queue.push_back(Pending::Probe(probe)),
            Received::Drain(drain) => {
                let drain = Drain::from(drain);
                if self.draining.now().is_none() {
                    self.log_queue.push(log::Level::Info, || match drain.deadline() {
                        None => "the dispatcher drains this worker".to_owned(),
                        Some(at) => format!(
                            "the dispatcher drains this worker, with a deadline in {}",
                            clock::shown(at.saturating_duration_since(Instant::now()))
                        ),
                    });
                }
                self.draining.begin(self, drain);
                self.handed_over.notify_all();
            }
            Received::Resume => {
                if self.draining.end(self) {
                    let line = || "the dispatcher gives this worker connections again".to_owned();
                    self.log_queue.push(log::Level::Info, line);
                    self.events.happened(self, LinkEvent::Resumed);
                }
                self.handed_over.notify_all();
            }
            Received::Handoff { arrived, lost } => {
                if !lost.is_empty() {
                    self.log_queue.push_limited(RateLimited::NotArrived, log::Level::Warn, || {
                        format!(
                            "did not arrive, and go to other workers: {}; is this process at its \
                             limit of open files?",
                            connections(lost.len())
                        )
                    });
                    for entry in lost {
                        let slot = session.board.slot(entry.slot);
                        slot.map(|slot| slot::decline(slot, entry.seq));
                    }
                    session.ring_if_wanted(want::TAKEN);
                }
                // One helper per connection, less one: the receiving thread takes one itself.
                let helpers = arrived.len().saturating_sub(1).min(state.followers);
                state.queue.extend(arrived.into_iter().map(Pending::Offered));
                if state.settings.paused {
                    state.set_aside();
                }
                (0..helpers).for_each(|_| self.handed_over.notify_one());
            }
            Received::End => self.leave(state, "it closed the connection"),
            Received::Broken(problem) => self.leave(state, &problem),
        }
    }

    /// The dispatcher has gone or is unusable. Its connections are taken now, so that the next
    /// hello counts them; the application gets them when it asks.
    fn leave(self: &Arc<Self>, state: &mut State, why: &str) {
        let until = Instant::now();
        let Link::Joined { session, channel } =
            mem::replace(&mut state.link, Link::Waiting { until })
        else {
            return;
        };
        state.take_up();
        self.take_all(state, &session);
        session.ring_if_wanted(want::TAKEN);
        self.readiness.forget(channel.as_fd());
        self.set_current(None);
        session.end();
        self.gauges.hide();
        // A dispatcher drains a process that it has started before it ends the process, and before
        // it ends itself.
        let ordered_to_end = self.hello.token.is_some() && self.draining.now().is_some();
        let returns = self.on_loss == OnDispatcherLoss::Serve && !ordered_to_end;
        self.log_queue.push(log::Level::Warn, || {
            format!(
                "lost the dispatcher at {}: {}; {}; live: {}",
                readable_path(state.dispatchers.current()),
                readable(why),
                if returns { "joining again" } else { "taking no more connections" },
                connections(usize::try_from(self.live()).unwrap_or(usize::MAX))
            )
        });
        self.events.happened(self, LinkEvent::Lost(why.to_owned()));
        if returns {
            // The next dispatcher does not know of a drain by this one.
            self.draining.end(self);
            state.link = Link::Waiting { until: after(state.dispatchers.lost()) };
        } else {
            self.close_after_loss(state);
        }
    }

    /// Takes everything in the queue, because no other worker can get it after the dispatcher has
    /// gone.
    pub(super) fn take_all(self: &Arc<Self>, state: &mut State, session: &Session) {
        for pending in mem::take(&mut state.queue) {
            match pending {
                Pending::Offered(arrived) => self.adopt(state, session, vec![arrived]),
                Pending::Taken(accepted) => state.queue.push_back(Pending::Taken(accepted)),
                Pending::Probe(_) => {}
            }
        }
    }

    /// The same for connections that have just been received.
    pub(super) fn adopt(
        self: &Arc<Self>,
        state: &mut State,
        session: &Session,
        arrived: Vec<Arrived>,
    ) {
        for arrived in arrived {
            if let Some(now) = take_slot(session, arrived.entry.slot, arrived.entry.seq) {
                let copied = state.forks.more_since();
                let accepted = self.take(session, arrived, now, copied);
                state.queue.push_back(Pending::Taken(accepted));
            }
        }
        // Followers may wait.
        self.handed_over.notify_all();
    }

    fn accept_directly(self: &Arc<Self>, state: &mut State, now: Instant) -> Step {
        if state.settings.paused {
            return Step::Blocked;
        }
        let Link::Standalone { listener, paused } = &mut state.link else {
            return Step::Again;
        };
        if let Some(until) = *paused {
            if now < until {
                self.readiness.arm(until - now);
                return Step::Blocked;
            }
            self.readiness.disarm();
            *paused = match self.readiness.watch(listener.as_fd()) {
                Ok(()) => None,
                Err(_) => Some(now + ACCEPT_PAUSE),
            };
            return Step::Again;
        }
        match listener.accept() {
            Ok(None) => Step::Blocked,
            Ok(Some((stream, peer))) => {
                self.opened.fetch_add(1, Ordering::SeqCst);
                let now = realtime();
                state.queue.push_back(Pending::Taken(Accepted {
                    stream,
                    nonblocking: false,
                    guard: Guard::new(Arc::clone(self), None),
                    origin: Origin {
                        peer,
                        listener: None,
                        accepted: AcceptTime::new(now, now),
                        number: None,
                        is_ready_check: false,
                        proxy: None,
                    },
                }));
                Step::Again
            }
            Err(error) => {
                self.log_queue.push_limited(RateLimited::Accept, log::Level::Warn, || {
                    format!("cannot accept: {error}; trying again in {ACCEPT_PAUSE:?}")
                });
                // The listener stays readable during the pause and would keep the caller busy.
                self.readiness.forget(listener.as_fd());
                *paused = Some(now + ACCEPT_PAUSE);
                Step::Again
            }
        }
    }
}

impl State {
    /// Connections that were offered during a pause are taken after all.
    pub(super) fn take_up(&mut self) {
        let aside = mem::take(&mut self.aside);
        self.queue.extend(aside);
    }

    /// Call it before every receive.
    fn note_forks(&mut self) {
        if self.queue.is_empty() {
            self.forks = Forks::now();
        }
    }
}

/// Takes a slot; returns the time of the take, `CLOCK_REALTIME`.
fn take_slot(session: &Session, slot: u32, seq: u64) -> Option<Duration> {
    let board = &session.board;
    let word = board.slot(slot)?;
    let now = realtime();
    board.stamp(slot, u64::try_from(now.as_nanos()).unwrap_or(0));
    slot::take(word, seq).then_some(now)
}

/// The current time by a clock that is the same in every time namespace.
fn realtime() -> Duration {
    clock_gettime(ClockId::Realtime).try_into().unwrap_or_default()
}
