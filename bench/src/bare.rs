//! The minimal dispatcher: accept, send to the next worker, close. No accounting, no copy in
//! flight, no policy.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags};

use crate::{machine, socket};

/// Arguments of the hidden command.
#[derive(Debug, clap::Args)]
pub struct BareArgs {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    workers: u16,
    /// `--delay` of the first quarter of the workers.
    #[arg(long, default_value_t = 0)]
    slow_delay: u64,
    /// Arguments of each worker; its index follows.
    #[arg(last = true)]
    worker: Vec<String>,
}

/// Starts the workers and passes connections until it is killed.
pub fn run(args: &BareArgs) -> io::Result<()> {
    machine::die_with_parent();
    let listener = socket::listen(args.listen, false)?;
    let nonblocking = args.worker.iter().any(|arg| arg == "mio");
    let (mut channels, mut children): (Vec<OwnedFd>, Vec<Child>) = (Vec::new(), Vec::new());
    for index in 0..args.workers {
        let (ours, theirs) = socket::seqpacket_pair()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(&args.worker);
        if index < args.workers / 4 {
            command.arg("--delay").arg(args.slow_delay.to_string());
        }
        let child = command.arg(index.to_string()).stdin(Stdio::from(theirs)).spawn()?;
        channels.push(ours);
        children.push(child);
    }
    let mut flags = SocketFlags::CLOEXEC;
    flags.set(SocketFlags::NONBLOCK, nonblocking);
    let mut next = 0;
    loop {
        let fd = match rustix::net::accept_with(&listener, flags) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
            Err(error) => return Err(error.into()),
        };
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let record = [IoSlice::new(b"c")];
        rustix::net::sendmsg(&channels[next], &record, &mut ancillary, SendFlags::NOSIGNAL)?;
        next = (next + 1) % channels.len();
    }
}
