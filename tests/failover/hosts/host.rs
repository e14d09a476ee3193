//! A host: a dispatcher and four workers, on an address of its own.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_support::*;

pub use super::network::Fault;
use super::network::Network;

const WORKERS: usize = 4;

pub struct Host {
    number: usize,
    directory: TempDir,
    /// None after a kill.
    dispatcher: Option<Dispatcher>,
    workers: Vec<Process>,
    /// Where it serves clients.
    pub address: String,
    /// Where it gives advice.
    pub advice: String,
}

/// Where hosts serve clients, and where they give advice.
const PORT: u16 = 7000;
const ADVICE_PORT: u16 = 9901;

/// The configuration of a host. All hosts have the same peers: a dispatcher notices that it is one
/// of them.
fn config(network: &Network, number: usize, hosts: usize) -> String {
    let ip = network.ip(number);
    let peer =
        |number| format!("[[advice_peer]]\naddress = \"{}:{ADVICE_PORT}\"\n", network.ip(number));
    let peers: String = (0..hosts).map(peer).collect();
    let pool = one_pool("").replace("127.0.0.1:0", &format!("{ip}:{PORT}"));
    format!("advice_listen = \"{ip}:{ADVICE_PORT}\"\n{peers}{pool}")
}

impl Host {
    pub fn start(network: &Network, number: usize, hosts: usize) -> Host {
        let ip = network.ip(number);
        let mut host = Host {
            number,
            directory: configure(&config(network, number, hosts)),
            dispatcher: None,
            workers: Vec::new(),
            address: format!("{ip}:{PORT}"),
            advice: format!("{ip}:{ADVICE_PORT}"),
        };
        host.start_processes(network);
        host
    }

    pub fn dispatcher(&self) -> &Dispatcher {
        self.dispatcher.as_ref().expect("the host is up")
    }

    fn start_processes(&mut self, network: &Network) {
        let run = |program: &Path| network.command(self.number, program);
        let mut command = run(Path::new(dispatcher_bin()));
        command.env_remove("NOTIFY_SOCKET");
        let dispatcher = Dispatcher::start_as(self.directory.path(), &mut command);
        for number in 0..WORKERS {
            let mut command = run(&example("echo"));
            command.env("DISPATCH_SOCKET", dispatcher.dispatch()).env("DISPATCH_POOL", "web");
            command.env("DISPATCH_NAME", format!("w{number}"));
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            self.workers.push(Process::start("echo", &mut command));
        }
        dispatcher.wait_joined("web", WORKERS);
        self.dispatcher = Some(dispatcher);
    }

    pub fn apply(&mut self, network: &Network, fault: Fault) {
        match fault {
            Fault::Kill => {
                self.dispatcher.take().expect("the host is up").process.kill();
                self.workers.clear();
            }
            Fault::Stop => self.signal(Signal::SIGSTOP),
            Fault::LinkDown | Fault::Drop => network.cut(self.number, fault),
        }
    }

    /// Ends the fault, and waits until the host serves clients.
    pub fn revive(&mut self, network: &Network, fault: Fault) {
        match fault {
            Fault::Kill => self.start_processes(network),
            Fault::Stop => self.signal(Signal::SIGCONT),
            Fault::LinkDown | Fault::Drop => network.restore(self.number, fault),
        }
        wait_until("the host to serve again", || serves(&self.address));
    }

    fn signal(&self, signal: Signal) {
        self.dispatcher().process.signal(signal);
        self.workers.iter().for_each(|worker| worker.signal(signal));
    }
}

fn serves(address: &str) -> bool {
    let limit = Duration::from_secs(1);
    let served = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"\n")?;
        stream.read_exact(&mut [0])
    };
    served().is_ok()
}
