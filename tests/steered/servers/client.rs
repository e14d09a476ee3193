//! A client that keeps its connection open and sees that it is served.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use test_support::PATIENCE;

/// What a server understands. Each request leaves the connection open.
#[derive(Clone, Copy, PartialEq)]
pub enum Speaks {
    /// `GET /` with keep-alive; a whole answer with status 200.
    Http,
    /// The same. The server keeps a connection that its client has ended until its own time for
    /// idle ones is over, so clients ask it to end them.
    HttpUntilAsked,
    /// `PING`, `+PONG`.
    Redis,
    /// The same bytes come back.
    Echo,
}

pub struct Client {
    stream: TcpStream,
    speaks: Speaks,
}

impl Client {
    /// Connects only.
    pub fn open(speaks: Speaks, address: SocketAddr) -> Result<Client> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Client { stream, speaks })
    }

    /// Connects and is served once.
    pub fn served(speaks: Speaks, address: SocketAddr) -> Result<Client> {
        let mut client = Client::open(speaks, address)?;
        client.ask()?;
        Ok(client)
    }

    /// Sends a request and reads the whole answer.
    pub fn ask(&mut self) -> Result<()> {
        match self.speaks {
            Speaks::Http | Speaks::HttpUntilAsked => {
                self.stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")?;
                let head = head(&mut self.stream)?;
                let lower = head.to_ascii_lowercase();
                let length = lower.split("content-length:").nth(1).and_then(|rest| {
                    let line = rest.lines().next()?;
                    line.trim().parse().ok()
                });
                let Some(length) = length.filter(|_| lower.starts_with("http/1.1 200")) else {
                    return Err(Error::new(ErrorKind::InvalidData, head));
                };
                self.stream.read_exact(&mut vec![0; length])
            }
            Speaks::Redis => self.expect(b"PING\r\n", b"+PONG\r\n"),
            Speaks::Echo => self.expect(b"hello\n", b"hello\n"),
        }
    }

    fn expect(&mut self, question: &[u8], answer: &[u8]) -> Result<()> {
        self.stream.write_all(question)?;
        let mut read = vec![0; answer.len()];
        self.stream.read_exact(&mut read)?;
        assert_eq!(read, answer);
        Ok(())
    }

    /// Ends the connection, and waits until the server has ended it, too.
    pub fn finish(mut self) -> Result<()> {
        if self.speaks == Speaks::HttpUntilAsked {
            let last = b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
            self.stream.write_all(last)?;
        } else {
            self.stream.shutdown(Shutdown::Write)?;
        }
        std::io::copy(&mut self.stream, &mut std::io::sink()).map(drop)
    }
}

/// Everything up to the empty line.
pub fn head(stream: &mut TcpStream) -> Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 4096 {
            return Err(Error::new(ErrorKind::InvalidData, "no end of the headers"));
        }
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
