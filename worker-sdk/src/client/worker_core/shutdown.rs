//! Close, shutdown, waits for the last connection, and registration of callbacks.

use rustix::event::{PollFd, PollFlags, poll};

use super::*;

impl WorkerCore {
    /// Stops receiving. Connections that are taken already are still returned by accept.
    pub(crate) fn close(self: &Arc<Self>) {
        if !self.process.is_current() {
            return;
        }
        let mut state = self.lock();
        match mem::replace(&mut state.link, Link::Closed) {
            Link::Joined { session, channel } => {
                let heard = match session.post(self, Record::Goodbye) {
                    Ok(()) => true,
                    Err(error) => {
                        self.log_queue.push(log::Level::Debug, || {
                            format!("could not say goodbye to the dispatcher: {error}")
                        });
                        false
                    }
                };
                self.readiness.forget(channel.as_fd());
                // Wakes the leader and stops further records.
                let _ = rustix::net::shutdown(&*channel, rustix::net::Shutdown::Read);
                if !heard {
                    // The leader may have just received a record.
                    state.orphaned = Some(Arc::clone(&session));
                    state.take_up();
                    self.take_all(&mut state, &session);
                }
                // The dispatcher has copies of the remaining connections and revokes them. If it
                // has ended, this worker takes them.
                let mut buffer = vec![0; channel::BUFFER];
                loop {
                    match channel::receive(channel.as_fd(), &mut buffer, ReceiveMode::NonBlocking) {
                        Received::Handoff { arrived, .. } if !heard => {
                            self.adopt(&mut state, &session, arrived);
                        }
                        Received::Handoff { .. }
                        | Received::Probe(_)
                        | Received::Drain(_)
                        | Received::Resume => {}
                        Received::Empty | Received::End | Received::Broken(_) => break,
                    }
                }
            }
            Link::Greeting { control, .. } => {
                self.readiness.forget(control.as_fd());
                join::end(&control);
            }
            Link::Standalone { listener, paused } => {
                if paused.is_none() && !state.settings.paused {
                    self.readiness.forget(listener.as_fd());
                }
                listener.unlink(&self.log_queue);
            }
            Link::Waiting { .. } | Link::Closed => {}
        }
        state.queue.retain(|pending| matches!(pending, Pending::Taken(_)));
        (state.settings.paused, state.aside) = (false, Vec::new());
        self.closed.store(true, Ordering::SeqCst);
        self.readiness.close();
        self.handed_over.notify_all();
        drop(state);
        self.close_callbacks();
    }

    /// The last part of a close. Without the lock, because a callback may own a handle of this
    /// worker.
    pub(super) fn close_callbacks(&self) {
        self.draining.close();
        self.events.close();
        self.end_session_if_over();
    }

    /// The dispatcher is lost, and the worker takes no more connections: the application gets those
    /// that were sent to it, then the end.
    pub(super) fn close_after_loss(self: &Arc<Self>, state: &mut State) {
        // With an order of the dispatcher, the deadline of the order counts.
        let ordered = self.draining.now().is_some();
        if !ordered {
            self.draining.begin(self, Drain::without_deadline());
        }
        if self.on_loss == OnDispatcherLoss::Stop && !ordered {
            // Those that the application has not asked for yet are not registered as live. It finds
            // them ended.
            let mut ended = self.live_connections.end_now();
            for pending in &state.queue {
                if let Pending::Taken(accepted) = pending {
                    let _ = accepted.stream.shutdown(std::net::Shutdown::Both);
                    ended += 1;
                }
            }
            self.log_queue.push(log::Level::Warn, || {
                format!("shut down, because the dispatcher is lost: {}", connections(ended))
            });
        }
        state.link = Link::Closed;
        (state.settings.paused, state.aside) = (false, Vec::new());
        self.closed.store(true, Ordering::SeqCst);
        self.readiness.close();
        self.handed_over.notify_all();
        self.closed_by_loss.store(true, Ordering::SeqCst);
    }

    /// Notices the loss although no thread of the application asks for connections, because its
    /// connections are to end at once. A thread of its own waits here; records do not wake it.
    pub(super) fn watch_for_loss(self: &Arc<Self>, session: &Arc<Session>, channel: &OwnedFd) {
        let mut ended = [PollFd::new(channel, PollFlags::RDHUP)];
        loop {
            match poll(&mut ended, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    let line = format_args!("cannot watch for the loss of the dispatcher: {error}");
                    return log_now(log::Level::Error, line);
                }
            }
        }
        // Records before the end may still be there.
        loop {
            let mut state = self.lock();
            let current = state.link.session().is_some_and(|other| Arc::ptr_eq(other, session));
            // A leader notices it by itself.
            if !current || state.leader {
                return;
            }
            match self.step(&mut state) {
                Ok(Step::Again) => {}
                Ok(Step::Blocked) | Err(_) => return,
            }
        }
    }

    /// Called at the deadline of a drain.
    pub(in crate::client) fn end_all(&self, round: u64) {
        if let Some(ended) = self.live_connections.end_all(round) {
            let ended = connections(ended);
            let line = format_args!("the deadline of the drain has come; shut down: {ended}");
            log_now(log::Level::Warn, line);
        }
    }

    /// After a goodbye the control connection ends with the last connection, because the dispatcher
    /// counts until then.
    pub(super) fn end_session_if_over(&self) {
        // A close sets the flag, then reads the counters; the end of a connection does the reverse.
        // So one of the two sees both.
        if self.closed.load(Ordering::SeqCst) && self.live() == 0 {
            let over = self.current.write().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(session) = over
                && session.end_after_outbox()
            {
                *self.unsent_goodbye.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
            }
            self.gauges.hide();
            self.draining.forget_deadline();
            // An event loop waits for this on the worker's one descriptor.
            self.readiness.close();
        }
    }

    /// Closes the worker and ends the connections that the application will not ask for.
    pub(crate) fn abandon(self: &Arc<Self>) {
        if self.process.is_current() {
            self.close();
            self.end_queue();
        }
    }

    fn end_queue(&self) {
        let queue = mem::take(&mut self.lock().queue);
        for pending in queue {
            if let Pending::Taken(accepted) = pending {
                drop(crate::client::connection::Connection::new(accepted));
            }
        }
    }

    /// axum has no way to receive this error, so it is logged.
    #[cfg(feature = "axum")]
    pub(crate) fn log_accept_error(&self, error: &Error) {
        let line = || format!("cannot take a connection: {error}");
        self.log_queue.push_limited(RateLimited::Axum, log::Level::Warn, line);
        self.log_queue.flush();
    }

    /// Closes, waits until no connection is live, and after `within` shuts down the others. Returns
    /// how many it shut down.
    pub(crate) fn shutdown(self: &Arc<Self>, within: Duration) -> usize {
        if !self.process.is_current() {
            return 0;
        }
        self.close();
        if self.wait_until_idle(Some(after(within))) {
            return 0;
        }
        self.end_queue();
        let ended = self.live_connections.end_now();
        if ended > 0 {
            let line =
                format_args!("the time to shut down is over; shut down: {}", connections(ended));
            log_now(log::Level::Warn, line);
        }
        ended
    }

    /// Waits until no connection is live; false if `until` comes first. Returns immediately in a
    /// forked child.
    pub(crate) fn wait_until_idle(&self, until: Option<Instant>) -> bool {
        if !self.process.is_current() {
            return true;
        }
        let idle = self.idle.wait(until, || self.live());
        let unsent_goodbye =
            self.unsent_goodbye.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(session) = unsent_goodbye {
            // The program probably ends now, and an unsent goodbye would be lost.
            let end = after(GOODBYE_TIMEOUT);
            session.outbox.wait_empty(until.map_or(end, |until| until.min(end)));
        }
        idle
    }

    /// As [`shutdown`](WorkerCore::shutdown) for a task. A thread waits, because a runtime may have
    /// no timers.
    #[cfg(feature = "tokio")]
    pub(crate) async fn shutdown_async(self: &Arc<Self>, within: Duration) -> usize {
        self.close();
        let (tell, told) = tokio::sync::oneshot::channel();
        self.shutdown_in_thread(within, move |ended| {
            // The task may have been cancelled.
            let _ = tell.send(ended);
        });
        // Without a thread there is no deadline.
        match told.await {
            Ok(ended) => ended,
            Err(_) => {
                self.idle().await;
                0
            }
        }
    }

    /// Closes, and starts a thread that does the rest of [`WorkerCore::shutdown`].
    #[cfg(any(feature = "mio", feature = "tokio"))]
    pub(crate) fn shutdown_in_thread(
        self: &Arc<Self>,
        within: Duration,
        done: impl FnOnce(usize) + Send + 'static,
    ) {
        self.close();
        let core = Arc::clone(self);
        start_thread(self, "worker-shutdown", move || done(core.shutdown(within)));
        self.log_queue.flush();
    }

    pub(crate) fn on_joined(self: &Arc<Self>, callback: impl Fn(u64) + Send + Sync + 'static) {
        self.on(LinkCallback::Joined(Arc::new(callback)));
    }

    pub(crate) fn on_lost(self: &Arc<Self>, callback: impl Fn(&str) + Send + Sync + 'static) {
        self.on(LinkCallback::Lost(Arc::new(callback)));
    }

    pub(crate) fn on_resumed(self: &Arc<Self>, callback: impl Fn() + Send + Sync + 'static) {
        self.on(LinkCallback::Resumed(Arc::new(callback)));
    }

    fn on(self: &Arc<Self>, callback: LinkCallback) {
        // Under the lock, so that each event is reported exactly once.
        let state = self.lock();
        let already = match (&callback, &state.link) {
            (LinkCallback::Joined(_), Link::Joined { session, .. }) => {
                Some(LinkEvent::Joined(session.worker_id))
            }
            _ => None,
        };
        let done = self.events.on(self, callback, already);
        drop(state);
        drop(done);
    }

    /// As [`wait_until_idle`](WorkerCore::wait_until_idle) for a task.
    #[cfg(feature = "tokio")]
    pub(crate) async fn idle(&self) {
        if self.process.is_current() {
            self.idle.waited(|| self.live()).await;
        }
    }
}
