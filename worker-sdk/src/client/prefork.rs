//! One process that loads the application once and forks workers for the dispatcher.
//!
//! Guarantees: a worker runs the application only after the dispatcher has recorded it; a worker
//! has no descriptor of this module; no signal handler is installed. Needs a process with one
//! thread.

use std::fmt;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use dispatch_protocol::wire::{
    Ended, FORK_FDS, Fork, Forked, MAX_PREFORK_RECORD, NotForked, Prefork,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendFlags, recvmsg, send};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, setpgid, waitpid};

use super::channel::take_fds;
use super::config::WorkerConfig;
use super::error::Error;
use crate::sys;

/// The variable with the number of the channel to the dispatcher.
const VARIABLE: &str = "DISPATCH_PREFORK_FD";

/// Runs the application as a worker, or as many workers that share what was loaded before.
///
/// Everything before this call runs once. Under a dispatcher with `fork = true` in
/// `[pool.NAME.spawn]` this process then forks the workers of the pool, as many as the dispatcher
/// orders, and each one runs `serve`. The workers share the memory of this process until one of
/// them writes to it (copy-on-write), and start without loading anything. Without `fork = true`
/// this process itself is the worker, so the same program works in both ways.
///
/// `serve` gets the settings from the environment ([`WorkerConfig::from_env`]) with the name of its
/// worker. It creates the runtime and the threads of the application, if it needs any.
///
/// **It never returns in a worker**: the process exits with the result of `serve`, like a `main`
/// with this result: 0 after `Ok`; 1 after an error, which is printed to stderr. Destructors of the
/// caller do not run there, because the values belong to the parent. In the parent it returns `Ok`
/// when the dispatcher needs the parent no more.
///
/// **The process must have one thread** whenever it forks: after a fork only the forking thread
/// exists, and a lock that another thread held stays locked forever. With a second thread the fork
/// is refused, and the reason is in the logs of the parent and of the dispatcher. Start threads and
/// runtimes in `serve`.
///
/// What else a forked worker shares with its parent is as after every fork: open files have one
/// position, and the state of random number generators is the same in all workers until they are
/// seeded again.
///
/// # Errors
/// [`Error::Config`] for a mistake in the environment; [`Error::Io`] when the parent cannot wait.
///
/// ```no_run
/// use worker_sdk::{Error, Worker};
///
/// fn main() -> Result<(), Error> {
///     let table: Vec<u64> = (0..25_000_000).collect(); // 200 MB, once for all workers.
///     worker_sdk::prefork(|config| {
///         let mut worker = Worker::connect(config.listen("127.0.0.1:7000").with_env()?)?;
///         std::thread::scope(|scope| {
///             for mut connection in worker.incoming() {
///                 let table = &table;
///                 scope.spawn(move || {
///                     use std::io::Write;
///                     writeln!(connection, "{}", table.iter().sum::<u64>())
///                 });
///             }
///         });
///         Ok::<(), Error>(())
///     })
/// }
/// ```
///
/// With tokio the closure makes the runtime:
///
#[cfg_attr(feature = "tokio", doc = "```no_run")]
#[cfg_attr(not(feature = "tokio"), doc = "```ignore")]
/// # async fn serve(_: worker_sdk::tokio::Listener) {}
/// fn main() -> Result<(), worker_sdk::Error> {
///     worker_sdk::prefork(|config| {
///         tokio::runtime::Runtime::new()?.block_on(async {
///             serve(worker_sdk::tokio::Listener::connect(config).await?).await;
///             Ok::<(), std::io::Error>(())
///         })
///     })
/// }
/// ```
pub fn prefork<E: fmt::Debug>(
    serve: impl FnOnce(WorkerConfig) -> Result<(), E>,
) -> Result<(), Error> {
    // A mistake in the environment is found once, not by each worker.
    let config = WorkerConfig::from_env()?;
    let Some(number) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else {
        exit_with(|| serve(config));
    };
    let number = number.to_str().and_then(|text| text.parse::<RawFd>().ok());
    let number = number.ok_or_else(|| Error::config(VARIABLE, "is not a number"))?;
    let channel = sys::adopt_channel(number).map_err(|error| {
        Error::config(VARIABLE, format!("is not the channel to a dispatcher: {error}"))
    })?;
    // The dispatcher made the kernel kill this process at the end of the dispatcher. From now on
    // the end of the channel tells the same.
    let _ = rustix::process::set_parent_process_death_signal(None);
    match (Parent { channel, workers: Vec::new() }).run()? {
        None => Ok(()),
        Some((fork, fds)) => become_worker(fork, fds, serve),
    }
}

/// The process that forks.
struct Parent {
    channel: OwnedFd,
    workers: Vec<Forkling>,
}

/// A worker that was not reaped yet.
struct Forkling {
    pid: Pid,
    pidfd: OwnedFd,
}

/// What came from the dispatcher.
enum Order {
    Fork(Fork, Vec<OwnedFd>),
    Nothing,
    End,
}

impl Parent {
    /// Serves the dispatcher until it closes the channel. In a worker it returns the order that
    /// made this worker, without the parent's descriptors.
    fn run(mut self) -> Result<Option<(Fork, Vec<OwnedFd>)>, Error> {
        let mut buffer = vec![0; MAX_PREFORK_RECORD + 1];
        loop {
            let mut fds: Vec<PollFd<'_>> = std::iter::once(&self.channel)
                .chain(self.workers.iter().map(|worker| &worker.pidfd))
                .map(|fd| PollFd::new(fd, PollFlags::IN))
                .collect();
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::io("wait for the dispatcher", error)),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if self.reap(&ready[1..]).is_err() {
                return Ok(None);
            }
            if !ready[0] {
                continue;
            }
            match self.receive(&mut buffer)? {
                Order::Nothing => {}
                Order::End => return Ok(None),
                Order::Fork(fork, fds) => match self.fork(&fork) {
                    Ok(true) => return Ok(Some((fork, fds))),
                    Ok(false) => {}
                    Err(_) => return Ok(None),
                },
            }
        }
    }

    /// Reports the workers that have ended. An error means that the dispatcher is gone.
    fn reap(&mut self, ready: &[bool]) -> Result<(), Errno> {
        let (mut at, mut ended) = (0, Vec::new());
        self.workers.retain(|worker| {
            let over = ready[at];
            at += 1;
            if over {
                ended.push(worker.pid);
            }
            !over
        });
        for pid in ended {
            // Without a status, the kernel was told to reap children itself.
            if let Some(status) = reap(pid) {
                let pid = pid.as_raw_pid().unsigned_abs();
                let ended = Ended { pid, status: status.cast_unsigned() };
                self.send(&Prefork::Ended(ended))?;
            }
        }
        Ok(())
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Order, Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FORK_FDS[1]))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received =
            recvmsg(&self.channel, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags);
        let message = match received {
            Ok(message) => message,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(Order::Nothing),
            Err(Errno::CONNRESET) => return Ok(Order::End),
            Err(error) => return Err(Error::io("receive from the dispatcher", error)),
        };
        let fds = take_fds(&mut ancillary);
        if message.bytes == 0 && fds.is_empty() {
            return Ok(Order::End);
        }
        let bad = |problem: String| {
            Err(Error::config(VARIABLE, format!("an order is not well-formed: {problem}")))
        };
        if message.flags.contains(ReturnFlags::TRUNC) {
            return bad("it is too long".to_owned());
        }
        match Prefork::decode(&buffer[..message.bytes]) {
            // At the limit of open files the kernel delivers fewer descriptors.
            Ok(Prefork::Fork(fork)) if message.flags.contains(ReturnFlags::CTRUNC) => {
                match self.refuse(&fork, "too many open files in the parent".to_owned()) {
                    Ok(()) => Ok(Order::Nothing),
                    Err(_) => Ok(Order::End),
                }
            }
            Ok(Prefork::Fork(fork)) if FORK_FDS.contains(&fds.len()) => Ok(Order::Fork(fork, fds)),
            Ok(record) => bad(format!("{record:?} with {} file descriptors", fds.len())),
            Err(error) => bad(error.to_string()),
        }
    }

    /// Forks a worker, and answers. True in the worker. An error means that the dispatcher is gone.
    fn fork(&mut self, fork: &Fork) -> Result<bool, Errno> {
        // What is buffered would be written twice.
        let _ = std::io::stdout().flush();
        let pid = match sys::fork_alone() {
            Ok(None) => {
                let _ = setpgid(None, None);
                return Ok(true);
            }
            Ok(Some(pid)) => pid,
            Err(error) => return self.refuse(fork, error.to_string()).map(|()| false),
        };
        // Parent and child do the same, because either may be first.
        let _ = setpgid(Some(pid), Some(pid));
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => {
                self.workers.push(Forkling { pid, pidfd });
                let pid = pid.as_raw_pid().unsigned_abs();
                self.send(&Prefork::Forked(Forked { id: fork.id, pid })).map(|()| false)
            }
            Err(error) => {
                let _ = kill_process(pid, Signal::KILL);
                let _ = reap(pid);
                self.refuse(fork, format!("pidfd_open: {error}")).map(|()| false)
            }
        }
    }

    fn refuse(&self, fork: &Fork, reason: String) -> Result<(), Errno> {
        log::error!("worker {} is not forked: {reason}", fork.name);
        self.send(&Prefork::NotForked(NotForked { id: fork.id, reason }))
    }

    /// The dispatcher reads all the time, so this does not block for long.
    fn send(&self, record: &Prefork) -> Result<(), Errno> {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        loop {
            match send(&self.channel, &bytes, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The status of a child that has ended.
fn reap(pid: Pid) -> Option<i32> {
    loop {
        match waitpid(Some(pid), rustix::process::WaitOptions::empty()) {
            Ok(Some((_, status))) => return Some(status.as_raw()),
            Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return None,
        }
    }
}

/// The rest of the life of a forked process.
fn become_worker<E: fmt::Debug>(
    fork: Fork,
    fds: Vec<OwnedFd>,
    serve: impl FnOnce(WorkerConfig) -> Result<(), E>,
) -> ! {
    let mut fds = fds.into_iter();
    let gate = fds.next();
    if let (Some(stdout), Some(stderr)) = (fds.next(), fds.next())
        && let Err(error) = sys::replace_output(stdout, stderr)
    {
        eprintln!("cannot replace stdout and stderr: {error}");
        sys::exit_now(1);
    }
    // Nothing of the application has run, so no handler of it is to run at this exit.
    if !gate.is_some_and(opens) {
        sys::exit_now(0);
    }
    let token = fork.token.to_string();
    let mut variables =
        vec![("DISPATCH_NAME", Some(&*fork.name)), ("DISPATCH_TOKEN", Some(&token))];
    variables.push((VARIABLE, None));
    variables.extend(fork.variables.iter().map(|(name, value)| (&**name, Some(&**value))));
    sys::set_variables(&variables);
    exit_with(|| {
        let config = WorkerConfig::from_env().map_err(Problem::Environment)?;
        serve(config).map_err(Problem::Application)
    })
}

/// Whether the dispatcher lets this process run.
fn opens(gate: OwnedFd) -> bool {
    let mut byte = [0];
    loop {
        match rustix::io::read(gate.as_fd(), &mut byte) {
            Ok(count) => return count == 1,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

enum Problem<E> {
    Environment(Error),
    Application(E),
}

impl<E: fmt::Debug> fmt::Debug for Problem<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Environment(error) => error.fmt(f),
            Problem::Application(error) => error.fmt(f),
        }
    }
}

/// Ends this process like a `main` with this body. A panic does not unwind into the caller, whose
/// values belong to the parent.
fn exit_with<E: fmt::Debug>(serve: impl FnOnce() -> Result<(), E>) -> ! {
    let code = match catch_unwind(AssertUnwindSafe(serve)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            eprintln!("Error: {error:?}");
            1
        }
        Err(_) => 101,
    };
    std::process::exit(code)
}
