//! The contenders: starts each as real processes, knows their addresses, and ends them.

mod node;
mod ours;
mod proxy;
mod steered;

use std::io::{self, BufRead, BufReader};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::cgroup::Cgroup;
use crate::load::{Process, Role};
use crate::machine;
use crate::worker::{Kind, Serve};

/// The longest time a contender may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// A way to spread connections over processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Dispatcher,
    /// With `busy_poll`.
    Busy,
    /// With `mode = "steer"`: the kernel chooses among workers that listen.
    Steered(Ports),
    ReusePort,
    Shared,
    Bare,
    HaProxy,
    Nginx,
    Node,
}

/// The listeners of steered workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Each worker opens one at a port of its own.
    Own,
    /// Each worker inherits one of the public port.
    Shared,
}

/// A way, with a kind of worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contender {
    pub how: How,
    pub kind: Kind,
}

/// The job of a contender.
#[derive(Clone, Debug)]
pub struct Setup {
    pub serve: Serve,
    pub workers: u16,
    /// Processes that the workers share. Only the dispatcher's workers can share processes.
    pub processes: u16,
    pub listeners: u16,
    /// Pause after each accept of the first quarter of the workers.
    pub delay: Duration,
    /// How long a round of an event loop, or the service of one client, takes.
    pub round: Duration,
    /// Additional workers that take nothing.
    pub stuck: u16,
    /// The system calls of the front process are counted, which slows it down.
    pub count_calls: bool,
    /// The processes have a cgroup of their own, as those of a unit of systemd. The kernel accounts
    /// for each cgroup, which takes time.
    pub own_cgroup: bool,
}

impl Setup {
    pub fn new(serve: Serve, workers: u16) -> Setup {
        Setup {
            serve,
            workers,
            processes: workers,
            listeners: 1,
            delay: Duration::ZERO,
            round: Duration::ZERO,
            stuck: 0,
            count_calls: false,
            own_cgroup: false,
        }
    }
}

impl Contender {
    pub const fn new(how: How, kind: Kind) -> Contender {
        Contender { how, kind }
    }

    pub fn name(self) -> String {
        let how = match self.how {
            How::Dispatcher => "dispatcher",
            How::Busy => "dispatcher busy_poll",
            How::Steered(Ports::Own) => "dispatcher steer own port",
            How::Steered(Ports::Shared) => "dispatcher steer shared port",
            How::ReusePort => "SO_REUSEPORT",
            How::Shared => "shared accept",
            How::Bare => "bare loop",
            How::HaProxy => return "HAProxy TCP".to_owned(),
            How::Nginx => return "nginx stream".to_owned(),
            How::Node => return "Node cluster".to_owned(),
        };
        format!("{how}/{}", self.kind.name())
    }

    /// The reason why it cannot be measured on this machine, if there is one.
    pub fn missing(self, dispatcher: &Path) -> Option<String> {
        let program = match self.how {
            How::Dispatcher | How::Busy if dispatcher.is_file() => return None,
            How::Steered(_) if dispatcher.is_file() => return steered::missing(dispatcher),
            How::Dispatcher | How::Busy | How::Steered(_) => {
                return Some(format!(
                    "{} is not built; run: cargo build --release -p dispatcher",
                    dispatcher.display()
                ));
            }
            How::ReusePort | How::Shared | How::Bare => return None,
            How::HaProxy => "haproxy",
            How::Nginx => "nginx",
            How::Node => "node",
        };
        match machine::find_program(program) {
            Some(_) => None,
            None => Some("not installed".to_owned()),
        }
    }

    /// Starts it and waits until it accepts clients.
    pub fn start(self, setup: &Setup, dispatcher: &Path) -> io::Result<Running> {
        let directory = TempDir::with_prefix("bench-")?;
        let mut running = Running {
            addresses: Vec::new(),
            processes: Vec::new(),
            children: Vec::new(),
            directory,
            cgroup: setup.own_cgroup.then(Cgroup::new).transpose()?,
        };
        match self.how {
            How::Dispatcher => ours::dispatcher(&mut running, self.kind, setup, dispatcher, false),
            How::Busy => ours::dispatcher(&mut running, self.kind, setup, dispatcher, true),
            How::Steered(ports) => {
                steered::dispatcher(&mut running, self.kind, setup, dispatcher, ports)
            }
            How::ReusePort => ours::reuse_port(&mut running, self.kind, setup),
            How::Shared => ours::shared(&mut running, self.kind, setup),
            How::Bare => ours::bare(&mut running, self.kind, setup),
            How::HaProxy => proxy::haproxy(&mut running, self.kind, setup),
            How::Nginx => proxy::nginx(&mut running, self.kind, setup),
            How::Node => node::cluster(&mut running, setup),
        }?;
        running.wait_for_port()?;
        Ok(running)
    }

    /// Mean time of a decision since the start in microseconds, as the dispatcher measures it;
    /// `None` for other contenders.
    pub fn decision(self, running: &Running) -> io::Result<Option<f64>> {
        match self.how {
            How::Dispatcher | How::Busy => ours::decision(running),
            How::Steered(_)
            | How::ReusePort
            | How::Shared
            | How::Bare
            | How::HaProxy
            | How::Nginx
            | How::Node => Ok(None),
        }
    }
}

/// A running contender. Dropping it kills its processes.
#[derive(Debug)]
pub struct Running {
    pub addresses: Vec<SocketAddr>,
    pub processes: Vec<Process>,
    /// In the order of their start; they are ended in reverse order.
    children: Vec<Child>,
    directory: TempDir,
    /// Dropped after all processes have been killed.
    cgroup: Option<Cgroup>,
}

impl Running {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn add_child(&mut self, role: Role, child: Child) -> io::Result<()> {
        let pid = child.id();
        self.processes.push(Process { role, pid: pid as i32 });
        self.children.push(child);
        self.cgroup.as_ref().map_or(Ok(()), |cgroup| cgroup.add(pid))
    }

    /// Starts a process and waits until it has printed `ready` this number of times.
    fn start_ready(&mut self, role: Role, command: &mut Command, times: u16) -> io::Result<()> {
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        self.add_child(role, child)?;
        let mut lines = BufReader::new(out).lines();
        for _ in 0..times {
            if lines.next().transpose()?.as_deref() != Some("ready") {
                return Err(io::Error::other(format!("a process did not get ready: {command:?}")));
            }
        }
        Ok(())
    }

    /// Fails once one of the processes has ended.
    fn check_alive(&mut self) -> io::Result<()> {
        for child in &mut self.children {
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("it ended by itself: {status}")));
            }
        }
        Ok(())
    }

    /// Waits until every address accepts connections.
    fn wait_for_port(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for address in self.addresses.clone() {
            let mut stream = loop {
                match TcpStream::connect(address) {
                    Ok(stream) => break stream,
                    Err(error) if Instant::now() > deadline => return Err(error),
                    Err(_) => self.check_alive()?,
                }
                std::thread::sleep(Duration::from_millis(10));
            };
            // The worker serves and closes this connection before the measurement.
            let _ = stream.shutdown(Shutdown::Write);
            stream.set_read_timeout(Some(PATIENCE))?;
            match io::copy(&mut stream, &mut io::sink()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
                // A reset is an end too.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
        }
        // Children of a master process do not all end with it.
        for process in &self.processes {
            if self.children.iter().all(|child| child.id() as i32 != process.pid) {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

/// This program with a hidden command.
fn ourselves() -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.stdin(Stdio::null());
    Ok(command)
}

/// A program of another project; it ends when the bench does.
fn program(path: &Path) -> io::Result<Command> {
    let mut command = ourselves()?;
    command.arg("exec").arg(path);
    Ok(command)
}
