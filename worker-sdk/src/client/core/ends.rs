//! Ending, waiting for the end, and telling the application what happens.

use super::*;

impl Core {
    /// Ends what was claimed on behalf of an application that will not ask again.
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

    /// Closes, waits until no connection is live, and shuts down what is left after `within`: gives how many that are.
    pub(crate) fn shutdown(self: &Arc<Self>, within: Duration) -> usize {
        if !self.process.is_current() {
            return 0;
        }
        self.close();
        if self.wait_until_idle(Some(after(within))) {
            return 0;
        }
        self.end_queue();
        let ended = self.live.end_now();
        if ended > 0 {
            log::warn!("the time to shut down is over: {ended} connections are shut down");
        }
        ended
    }

    /// Waits until no connection is live; false if that moment has come before. In a forked child none ever is.
    pub(crate) fn wait_until_idle(&self, until: Option<Instant>) -> bool {
        !self.process.is_current() || self.idle.wait(until, || self.live())
    }

    /// The same for a task: the waiting is done by a thread, as a runtime may have no timers.
    #[cfg(feature = "tokio")]
    pub(crate) async fn shut_down_aside(self: &Arc<Self>, within: Duration) -> usize {
        self.close();
        let (tell, told) = tokio::sync::oneshot::channel();
        self.shut_down_on_a_thread(within, move |ended| {
            // Whoever asked may have given up.
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

    /// Closes, and has a thread do the rest of [`Core::shutdown`].
    #[cfg(any(feature = "mio", feature = "tokio"))]
    pub(crate) fn shut_down_on_a_thread(
        self: &Arc<Self>,
        within: Duration,
        done: impl FnOnce(usize) + Send + 'static,
    ) {
        self.close();
        let core = Arc::clone(self);
        start_thread(self, "worker-shutdown", move || done(core.shutdown(within)));
        self.said.flush();
    }

    pub(crate) fn on_joined(self: &Arc<Self>, callback: impl Fn(u64) + Send + Sync + 'static) {
        self.on(Callback::Joined(Arc::new(callback)));
    }

    pub(crate) fn on_lost(self: &Arc<Self>, callback: impl Fn(&str) + Send + Sync + 'static) {
        self.on(Callback::Lost(Arc::new(callback)));
    }

    pub(crate) fn on_resumed(self: &Arc<Self>, callback: impl Fn() + Send + Sync + 'static) {
        self.on(Callback::Resumed(Arc::new(callback)));
    }

    fn on(self: &Arc<Self>, callback: Callback) {
        // Under the lock, so that what happens meanwhile is told once.
        let state = self.lock();
        let already = match (&callback, &state.link) {
            (Callback::Joined(_), Link::Joined { session, .. }) => {
                Some(Event::Joined(session.worker_id))
            }
            _ => None,
        };
        let done = self.events.on(self, callback, already);
        drop(state);
        drop(done);
    }

    /// The same for a task.
    #[cfg(feature = "tokio")]
    pub(crate) async fn idle(&self) {
        if self.process.is_current() {
            self.idle.waited(|| self.live()).await;
        }
    }
}
