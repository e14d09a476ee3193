//! Redis pub/sub over its Unix socket as a contender, with a blocking client.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::receiver::measure;
use super::{FLOOD, Sender, message};

/// Publications in one write, as a pipelining client makes them.
const BATCH: usize = 64;

pub struct Redis {
    stream: UnixStream,
    replies: BufReader<UnixStream>,
}

fn publish(out: &mut Vec<u8>, message: &[u8]) {
    out.extend_from_slice(b"*3\r\n$7\r\nPUBLISH\r\n$1\r\nc\r\n");
    out.extend_from_slice(format!("${}\r\n", message.len()).as_bytes());
    out.extend_from_slice(message);
    out.extend_from_slice(b"\r\n");
}

impl Redis {
    pub fn new(socket: &str) -> Redis {
        let stream = UnixStream::connect(socket).unwrap();
        Redis { replies: BufReader::new(stream.try_clone().unwrap()), stream }
    }

    /// The replies count subscribers; they do not say that a message has arrived.
    fn replies(&mut self, count: usize) {
        let mut reply = String::new();
        for _ in 0..count {
            reply.clear();
            self.replies.read_line(&mut reply).unwrap();
        }
    }
}

impl Sender for Redis {
    fn send(&mut self, message: &[u8]) {
        let mut out = Vec::new();
        publish(&mut out, message);
        self.stream.write_all(&out).unwrap();
        self.replies(1);
    }

    fn flood(&mut self, size: usize, end: Instant) {
        let mut batch = Vec::new();
        while Instant::now() < end {
            batch.clear();
            (0..BATCH).for_each(|_| publish(&mut batch, &message(FLOOD, size)));
            self.stream.write_all(&batch).unwrap();
            self.replies(BATCH);
        }
    }
}

pub fn receive(socket: &str) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"*2\r\n$9\r\nSUBSCRIBE\r\n$1\r\nc\r\n").unwrap();
    let mut input = BufReader::with_capacity(256 * 1024, stream);
    let mut line = String::new();
    let mut read_line = |input: &mut BufReader<UnixStream>| {
        line.clear();
        input.read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    (0..6).for_each(|_| drop(read_line(&mut input)));
    println!("ready");
    measure(|bytes| {
        // *3, $7, message, $1, c, $len, payload.
        (0..5).for_each(|_| drop(read_line(&mut input)));
        let len: usize = read_line(&mut input)[1..].parse().unwrap();
        bytes.resize(len + 2, 0);
        input.read_exact(bytes).unwrap();
    });
}
