//! Questions to a running directory, for commands: a blocking client that only asks.

use std::io;
use std::path::Path;
use std::time::Duration;

use dispatch_protocol::relay::{
    Count, FromDirectory, GroupSize, Id, MAX_PAGE, MAX_RECORD, Name, Place, ToDirectory, VERSION,
    readable,
};
use std::os::fd::OwnedFd;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection that asks.
#[derive(Debug)]
pub struct Query {
    socket: OwnedFd,
}

impl Query {
    /// Connects to the directory at `path`, in a namespace.
    ///
    /// # Errors
    /// Nothing listens there, or the directory refuses this user; the text says so.
    pub fn connect(path: &Path, namespace: &Name) -> io::Result<Query> {
        let socket = crate::server::socket::connect_to(path)?;
        let timeout = rustix::net::sockopt::Timeout::Recv;
        rustix::net::sockopt::set_socket_timeout(&socket, timeout, Some(PATIENCE))?;
        let mut query = Query { socket };
        let worker = Name::new("observer").map_err(io::Error::other)?;
        query.send(&ToDirectory::Hello {
            version: VERSION,
            namespace: namespace.clone(),
            member: 0,
            worker,
            ticket: Vec::new(),
        })?;
        match query.receive()? {
            FromDirectory::Welcome { .. } => Ok(query),
            FromDirectory::Refused { reason, .. } => Err(io::Error::other(readable(&reason))),
            _ => Err(io::Error::other("the directory answered with another record")),
        }
    }

    /// Where an id is registered.
    ///
    /// # Errors
    /// The directory does not answer.
    pub fn who(&mut self, id: &Id) -> io::Result<Vec<Place>> {
        self.send(&ToDirectory::Who { request: 1, id: id.clone() })?;
        self.places().map(|(places, _)| places)
    }

    /// A page of registered ids, and the cursor of the next; 0 at both ends.
    ///
    /// # Errors
    /// The directory does not answer.
    pub fn online(&mut self, cursor: u64) -> io::Result<(Vec<Place>, u64)> {
        self.send(&ToDirectory::Online { request: 1, cursor })?;
        self.places()
    }

    /// A page of groups after this one, in the order of their names.
    ///
    /// # Errors
    /// The directory does not answer.
    pub fn groups(&mut self, after: &[u8]) -> io::Result<(Vec<GroupSize>, bool)> {
        self.send(&ToDirectory::Groups { request: 1, after: after.to_vec() })?;
        match self.receive()? {
            FromDirectory::GroupSizes { groups, .. } => {
                let more = groups.len() == MAX_PAGE;
                Ok((groups, more))
            }
            _ => Err(io::Error::other("the directory answered with another record")),
        }
    }

    /// The directory's numbers.
    ///
    /// # Errors
    /// The directory does not answer.
    pub fn stats(&mut self) -> io::Result<Vec<Count>> {
        self.send(&ToDirectory::Stats { request: 1 })?;
        match self.receive()? {
            FromDirectory::Counts { counts, .. } => Ok(counts),
            _ => Err(io::Error::other("the directory answered with another record")),
        }
    }

    fn places(&mut self) -> io::Result<(Vec<Place>, u64)> {
        match self.receive()? {
            FromDirectory::Places { places, next, .. } => Ok((places, next)),
            _ => Err(io::Error::other("the directory answered with another record")),
        }
    }

    fn send(&mut self, record: &ToDirectory) -> io::Result<()> {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        rustix::net::send(&self.socket, &bytes, rustix::net::SendFlags::NOSIGNAL)?;
        Ok(())
    }

    fn receive(&mut self) -> io::Result<FromDirectory> {
        let mut buffer = vec![0; MAX_RECORD];
        let flags = rustix::net::RecvFlags::empty();
        let (len, _) = rustix::net::recv(&self.socket, &mut buffer[..], flags)?;
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the directory has ended"));
        }
        FromDirectory::decode(&buffer[..len]).map_err(io::Error::other)
    }
}
