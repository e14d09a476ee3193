//! What can carry messages between two processes: socket pairs, and a ring in shared memory with a
//! doorbell. Nothing of the relay is in the way, so this is the part of its time that a different
//! link could save.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dispatch_protocol::Mapping;
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::receiver::{Receiver, measure as measure_received};
use super::table::{self, Samples};
use super::{FLOOD, SIZES, Sender, measure, message};

const TRANSPORTS: &[(&str, &str)] =
    &[("seqpacket", "seqpacket pair"), ("stream", "stream pair"), ("ring", "shared-memory ring")];

/// Messages in one write of the stream, as the relay makes them while the other end is busy.
const BATCH: usize = 64 * 1024;

/// Words of eight bytes in the ring.
const WORDS: usize = 256 * 1024;

/// Words before the ring, on cache lines of their own: what was written, what was read, and whether
/// the reader sleeps.
const WRITTEN: usize = 0;
const READ: usize = 64;
const SLEEPS: usize = 128;
const START: usize = 256;

pub fn compare(rounds: usize) {
    for size in SIZES {
        let mut samples: Vec<Samples> = TRANSPORTS.iter().map(|_| Samples::default()).collect();
        for round in 0..rounds {
            for turn in 0..TRANSPORTS.len() {
                let index = (round + turn) % TRANSPORTS.len();
                let (mut sender, mut receiver) = open(TRANSPORTS[index].0);
                let figures = measure(&mut *sender, &mut receiver, size, Duration::from_secs(1));
                samples[index].0.push(figures);
            }
        }
        table::print(size, TRANSPORTS, &samples, 1);
    }
}

fn open(name: &str) -> (Box<dyn Sender>, Receiver) {
    let arguments = ["receive", "transport", name];
    let pair = |kind| {
        rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
    };
    match name {
        "seqpacket" => {
            let (own, other) = pair(SocketType::SEQPACKET);
            (Box::new(Packets(own)), Receiver::start_on(&arguments, other))
        }
        "stream" => {
            let (own, other) = pair(SocketType::STREAM);
            (Box::new(Stream(UnixStream::from(own))), Receiver::start_on(&arguments, other))
        }
        _ => {
            // The receiver opens both by their paths in this process.
            let memory = rustix::fs::memfd_create("ring", MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&memory, (START + WORDS * 8) as u64).unwrap();
            let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let (own, other) = UnixStream::pair().unwrap();
            let sender = Ring::new(memory, doorbell);
            let fds = [sender.memory.as_fd(), sender.doorbell.as_fd()];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
            assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
            let bytes = [std::io::IoSlice::new(b"x")];
            rustix::net::sendmsg(&own, &bytes, &mut control, SendFlags::empty()).unwrap();
            (Box::new(sender), Receiver::start_on(&arguments, other.into()))
        }
    }
}

pub fn receive(name: &str) {
    let input = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    match name {
        "seqpacket" => {
            println!("ready");
            measure_received(|bytes| {
                bytes.resize(128 * 1024, 0);
                let (len, _) =
                    rustix::net::recv(&input, &mut bytes[..], RecvFlags::empty()).unwrap();
                bytes.truncate(len);
            });
        }
        "stream" => {
            let mut stream = std::io::BufReader::with_capacity(256 * 1024, UnixStream::from(input));
            println!("ready");
            measure_received(|bytes| {
                let mut len = [0; 4];
                stream.read_exact(&mut len).unwrap();
                bytes.resize(u32::from_le_bytes(len) as usize, 0);
                stream.read_exact(bytes).unwrap();
            });
        }
        _ => {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let mut bytes = [std::io::IoSliceMut::new(&mut byte)];
            rustix::net::recvmsg(&input, &mut bytes, &mut control, RecvFlags::empty()).unwrap();
            let mut fds = Vec::new();
            for message in control.drain() {
                if let rustix::net::RecvAncillaryMessage::ScmRights(all) = message {
                    fds.extend(all);
                }
            }
            let doorbell = fds.pop().unwrap();
            let mut ring = Ring::new(fds.pop().unwrap(), doorbell);
            println!("ready");
            measure_received(|bytes| ring.read(bytes));
        }
    }
}

struct Packets(OwnedFd);

impl Sender for Packets {
    fn send(&mut self, message: &[u8]) {
        rustix::net::send(&self.0, message, SendFlags::empty()).unwrap();
    }

    fn flood(&mut self, size: usize, end: Instant) {
        while Instant::now() < end {
            self.send(&message(FLOOD, size));
        }
    }
}

struct Stream(UnixStream);

impl Sender for Stream {
    fn send(&mut self, message: &[u8]) {
        let mut bytes = u32::try_from(message.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend_from_slice(message);
        self.0.write_all(&bytes).unwrap();
    }

    fn flood(&mut self, size: usize, end: Instant) {
        let mut batch = Vec::new();
        while Instant::now() < end {
            batch.clear();
            while batch.len() < BATCH {
                batch.extend_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
                batch.extend_from_slice(&message(FLOOD, size));
            }
            self.0.write_all(&batch).unwrap();
        }
    }
}

/// One writer and one reader. A message is its length and its bytes, in whole words.
struct Ring {
    memory: OwnedFd,
    doorbell: OwnedFd,
    map: Mapping,
    position: u64,
}

impl Ring {
    fn new(memory: OwnedFd, doorbell: OwnedFd) -> Ring {
        let map = Mapping::shared(memory.as_fd(), START + WORDS * 8).unwrap();
        Ring { memory, doorbell, map, position: 0 }
    }

    fn word(&self, position: u64) -> &std::sync::atomic::AtomicU64 {
        self.map.u64(START + (position as usize % WORDS) * 8)
    }

    /// Without room it looks again at once: the reader is busy.
    fn write(&mut self, message: &[u8]) {
        let words = 1 + message.len().div_ceil(8) as u64;
        while self.position + words - self.map.u64(READ).load(Ordering::Acquire) > WORDS as u64 {
            std::thread::yield_now();
        }
        self.word(self.position).store(message.len() as u64, Ordering::Relaxed);
        for (position, chunk) in (self.position + 1..).zip(message.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(position).store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
        self.position += words;
        self.map.u64(WRITTEN).store(self.position, Ordering::SeqCst);
        if self.map.u64(SLEEPS).load(Ordering::SeqCst) == 1 {
            self.map.u64(SLEEPS).store(0, Ordering::SeqCst);
            rustix::io::write(&self.doorbell, &1u64.to_ne_bytes()).unwrap();
        }
    }

    fn read(&mut self, bytes: &mut Vec<u8>) {
        while self.map.u64(WRITTEN).load(Ordering::Acquire) == self.position {
            self.map.u64(SLEEPS).store(1, Ordering::SeqCst);
            if self.map.u64(WRITTEN).load(Ordering::SeqCst) != self.position {
                break;
            }
            rustix::io::read(&self.doorbell, &mut [0; 8]).unwrap();
        }
        let len = self.word(self.position).load(Ordering::Relaxed) as usize;
        bytes.clear();
        for position in self.position + 1.. {
            if bytes.len() >= len {
                break;
            }
            bytes.extend_from_slice(&self.word(position).load(Ordering::Relaxed).to_le_bytes());
        }
        self.position += 1 + len.div_ceil(8) as u64;
        bytes.truncate(len);
        self.map.u64(READ).store(self.position, Ordering::Release);
    }
}

impl Sender for Ring {
    fn send(&mut self, message: &[u8]) {
        self.write(message);
    }

    fn flood(&mut self, size: usize, end: Instant) {
        while Instant::now() < end {
            self.write(&message(FLOOD, size));
        }
    }
}
