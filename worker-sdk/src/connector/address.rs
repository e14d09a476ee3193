//! The address of a server: a socket address, or a host name with a port.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use super::Error;

/// The longest host name.
const MAX_HOST: usize = 253;

/// An address to connect to: `192.0.2.1:8000`, `[2001:db8::1]:8000` or `host.example:8000`.
///
/// A host name stands for all addresses that it has; it is resolved for each attempt.
///
/// ```
/// # fn main() -> Result<(), worker_sdk::connector::Error> {
/// use worker_sdk::connector::Address;
///
/// let address: Address = "db.example:5432".parse()?;
/// assert_eq!(address.to_string(), "db.example:5432");
/// assert!("db.example".parse::<Address>().is_err()); // No port.
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Address(Kind);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Kind {
    Socket(SocketAddr),
    Name(String, u16),
}

impl Address {
    /// The socket address, if this is not a name.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match &self.0 {
            Kind::Socket(address) => Some(*address),
            Kind::Name(..) => None,
        }
    }

    /// The host name, if this is one.
    pub fn host_name(&self) -> Option<&str> {
        match &self.0 {
            Kind::Socket(_) => None,
            Kind::Name(host, _) => Some(host),
        }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        match &self.0 {
            Kind::Socket(address) => address.port(),
            Kind::Name(_, port) => *port,
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        Address(Kind::Socket(address))
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address, Error> {
        let invalid = |problem: &str| {
            let shown: String = text.escape_debug().take(2 * MAX_HOST).collect();
            Error::config("address", format!("\"{shown}\" {problem}"))
        };
        if let Ok(address) = text.parse::<SocketAddr>() {
            if address.port() == 0 {
                return Err(invalid("has port 0; write the port of the server"));
            }
            return Ok(address.into());
        }
        let (host, port) =
            text.rsplit_once(':').ok_or_else(|| invalid("has no port; write HOST:PORT"))?;
        let port: u16 = port
            .parse()
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| invalid("has no port from 1 to 65535 after the last colon"))?;
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if host.is_empty() || host.len() > MAX_HOST || !host.bytes().all(is_part) {
            return Err(invalid(
                "is neither an IP address (IPv6 in brackets) nor a host name, with a port",
            ));
        }
        Ok(Address(Kind::Name(host.to_owned(), port)))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Socket(address) => address.fmt(f),
            Kind::Name(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[test]
fn addresses_are_read_and_written() {
    for text in ["10.0.0.1:80", "[::1]:8000", "localhost:1", "a-b.c_d.example:65535"] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
    }
    for text in [
        "",
        ":80",
        "host",
        "host:",
        "host:0",
        "host:65536",
        "::1:80",
        "a b:80",
        "a/b:80",
        "1.2.3.4:0",
    ] {
        let problem = text.parse::<Address>().unwrap_err().to_string();
        assert!(problem.contains(&format!("{text:?}")), "{problem}");
    }
}
