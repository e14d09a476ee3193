//! Where the addresses of a service come from.

use super::advice::MAX_ADDRESSES;
use super::selection::Candidate;
use super::{Address, Error};

/// The most hosts that are asked for advice.
const MAX_HOSTS: usize = 64;

/// The longest name of a pool.
const MAX_POOL: usize = 64;

/// Where the addresses of a service come from: a list, or the advice interface of its dispatchers.
///
/// ```
/// # fn main() -> Result<(), worker_sdk::connector::Error> {
/// use worker_sdk::connector::Addresses;
///
/// // A list, in the order of preference; a host name stands for all addresses that it has.
/// let list = Addresses::list(["10.0.0.1:8000", "[2001:db8::2]:8000", "c.example:8000"])?;
/// // Each client has an order of its own.
/// let shuffled = Addresses::list(["10.0.0.1:8000", "10.0.0.2:8000"])?.shuffled();
/// // The dispatchers know the list. Until one of them answers, this one is used.
/// let advised = Addresses::advice(["10.0.0.1:9901", "10.0.0.2:9901"], "web")?
///     .or_list(["10.0.0.1:8000"])?;
/// # let _ = (list, shuffled, advised);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Addresses {
    pub(super) list: Vec<Candidate<Address>>,
    pub(super) advice: Option<Advice>,
    pub(super) shuffled: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Advice {
    pub(super) hosts: Vec<Address>,
    pub(super) pool: String,
}

impl Addresses {
    /// A fixed list, in this order, of `HOST:PORT`. At least 1 and at most 1,024.
    ///
    /// # Errors
    /// [`Error::Config`] names the first bad address.
    pub fn list<T: AsRef<str>>(addresses: impl IntoIterator<Item = T>) -> Result<Addresses, Error> {
        Addresses::weighted(addresses.into_iter().map(|address| (address, 1)))
    }

    /// A fixed list with weights, for [`Selection::Weighted`](super::Selection::Weighted). An
    /// address with weight 0 is used when nothing else is left.
    ///
    /// # Errors
    /// [`Error::Config`] names the first bad address.
    pub fn weighted<T: AsRef<str>>(
        addresses: impl IntoIterator<Item = (T, u32)>,
    ) -> Result<Addresses, Error> {
        let list = candidates(addresses)?;
        Ok(Addresses { list, advice: None, shuffled: false })
    }

    /// The list that the dispatchers of these hosts advise for the pool: the addresses of their
    /// `advice_listen`, at most 64. Any one of them is asked, another one if it does not answer,
    /// and again when the list is out of date. If none answers, the last list stays in use.
    ///
    /// # Errors
    /// [`Error::Config`] names what is wrong.
    pub fn advice<T: AsRef<str>>(
        hosts: impl IntoIterator<Item = T>,
        pool: impl Into<String>,
    ) -> Result<Addresses, Error> {
        let hosts = candidates(hosts.into_iter().map(|host| (host, 1)))?;
        let hosts: Vec<Address> = hosts.into_iter().map(|host| host.address).collect();
        if hosts.len() > MAX_HOSTS {
            return Err(Error::config("advice", format!("has more than {MAX_HOSTS} hosts")));
        }
        let pool = pool.into();
        if pool.is_empty() || pool.len() > MAX_POOL {
            let problem = format!("{pool:?} is not 1 to {MAX_POOL} bytes long");
            return Err(Error::config("pool", problem));
        }
        let advice = Some(Advice { hosts, pool });
        Ok(Addresses { list: Vec::new(), advice, shuffled: false })
    }

    /// The list to use until a host has advised one.
    ///
    /// # Errors
    /// [`Error::Config`] names the first bad address.
    pub fn or_list<T: AsRef<str>>(
        mut self,
        addresses: impl IntoIterator<Item = T>,
    ) -> Result<Addresses, Error> {
        self.list = candidates(addresses.into_iter().map(|address| (address, 1)))?;
        Ok(self)
    }

    /// The pool that hosts are asked for; empty without hosts.
    pub(super) fn pool(&self) -> &str {
        self.advice.as_ref().map_or("", |advice| &advice.pool)
    }

    /// Each connector has a random order of its own, where the order matters: with
    /// [`Selection::InOrder`](super::Selection::InOrder) every client has a preferred server.
    #[must_use]
    pub fn shuffled(mut self) -> Addresses {
        self.shuffled = true;
        self
    }
}

fn candidates<T: AsRef<str>>(
    addresses: impl IntoIterator<Item = (T, u32)>,
) -> Result<Vec<Candidate<Address>>, Error> {
    let mut list: Vec<Candidate<Address>> = Vec::new();
    for (text, weight) in addresses {
        let address: Address = text.as_ref().trim().parse()?;
        if list.iter().any(|known| known.address == address) {
            return Err(Error::config("address", format!("{address} is listed twice")));
        }
        if list.len() == MAX_ADDRESSES {
            let problem = format!("more than {MAX_ADDRESSES} are listed");
            return Err(Error::config("address", problem));
        }
        list.push(Candidate { weight, ..Candidate::new(address) });
    }
    if list.is_empty() {
        return Err(Error::config("address", "none is listed; name at least one HOST:PORT"));
    }
    Ok(list)
}

#[test]
fn a_bad_list_is_named() {
    let none: [&str; 0] = [];
    let many: Vec<String> = (0..MAX_ADDRESSES + 1).map(|n| format!("h{n}:1")).collect();
    for (result, expected) in [
        (Addresses::list(none), "none is listed"),
        (Addresses::list(["a:1", "b"]), "\"b\" has no port"),
        (Addresses::list(["a:1", "b:1", " a:1"]), "a:1 is listed twice"),
        (Addresses::list(many), "more than 1024 are listed"),
        (Addresses::advice(["a:1"], ""), "1 to 64 bytes"),
        (Addresses::advice((1..66).map(|n| format!("h:{n}")), "web"), "more than 64 hosts"),
    ] {
        let problem = result.unwrap_err().to_string();
        assert!(problem.contains(expected), "{problem}");
    }
}
