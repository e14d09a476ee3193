//! Who may enter a namespace: users by the kernel's word, pools by a ticket.

use dispatch_protocol::relay::Name;
use dispatch_protocol::relay::ticket::Key;

use crate::config::Namespace;

/// The namespace of a question that names none.
const DEFAULT: &str = "default";

/// The index of the namespace that this process may enter.
///
/// An observer (`observes`) only asks: the directory's own user and root may, in every namespace.
/// Without a namespace `default`, it is in the first one if it asks for that.
///
/// # Errors
/// A sentence for people, with the key that decides.
pub(super) fn check(
    namespaces: &[Namespace],
    key: Option<&Key>,
    name: &Name,
    user: u32,
    ticket: &[u8],
    observes: bool,
) -> Result<u16, String> {
    let found = namespaces.iter().position(|space| space.name == *name);
    let found = found.or((observes && name.as_str() == DEFAULT).then_some(0));
    let Some((index, space)) = found.and_then(|i| Some((i, namespaces.get(i)?))) else {
        return Err(format!("there is no namespace {name}; add [namespaces.{name}]"));
    };
    let index = u16::try_from(index).map_err(|_| "too many namespaces".to_owned())?;
    if observes {
        let own = rustix::process::geteuid().as_raw();
        return if user == own || user == 0 {
            Ok(index)
        } else {
            Err(format!("user {user} may not observe: only the directory's user and root may"))
        };
    }
    if !space.users.is_empty() && !space.users.contains(&user) {
        return Err(format!("user {user} is not in namespaces.{name}.users"));
    }
    if space.pools.is_empty() {
        return Ok(index);
    }
    let Some(key) = key else {
        return Err(format!("namespaces.{name}.pools needs tickets, and ticket_key is not set"));
    };
    match key.pool(ticket, user) {
        Some(pool) if space.pools.iter().any(|allowed| allowed == pool) => Ok(index),
        Some(pool) => Err(format!("pool {pool} is not in namespaces.{name}.pools")),
        None if ticket.is_empty() => Err(format!(
            "namespaces.{name}.pools needs a ticket, and the worker has none: is relay_ticket_key \
             set in the dispatcher's configuration?"
        )),
        None => {
            Err("the ticket is not valid here: do dispatcher and directory have the same key, \
                     and is it this user's?"
                .to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

    use super::*;
    use crate::registry::Receives;

    #[test]
    fn both_conditions_hold_where_both_are_given() {
        let key = Key::new([1; 16]);
        let space = |name: &str, pools: &[&str], users: &[u32]| Namespace {
            name: Name::new(name).unwrap(),
            pools: pools.iter().map(|&pool| pool.to_owned()).collect(),
            users: users.to_vec(),
            receives: Receives::Newest,
        };
        let all =
            [space("both", &["web"], &[5]), space("pool", &["web"], &[]), space("user", &[], &[5])];
        let ticket = |pool: &str, user| key.issue(pool, user);
        let enters = |name: &str, user, ticket: &[u8]| {
            check(&all, Some(&key), &Name::new(name).unwrap(), user, ticket, false)
        };
        assert_eq!(enters("both", 5, &ticket("web", 5)), Ok(0));
        assert!(enters("both", 6, &ticket("web", 6)).is_err());
        assert!(enters("both", 5, b"").is_err());
        assert_eq!(enters("pool", 6, &ticket("web", 6)), Ok(1));
        assert!(enters("pool", 6, &ticket("web", 5)).is_err(), "another user's ticket");
        assert!(enters("pool", 6, &ticket("api", 6)).is_err(), "another pool's ticket");
        assert_eq!(enters("user", 5, b""), Ok(2));
        assert!(enters("user", 6, b"").is_err());
        assert!(enters("none", 5, b"").is_err());
        let name = Name::new("pool").unwrap();
        assert!(check(&all, None, &name, 6, &ticket("web", 6), false).is_err());
        let own = rustix::process::geteuid().as_raw();
        assert!(check(&all, None, &name, own, b"", true).is_ok());
        assert!(check(&all, None, &name, own + 1, b"", true).is_err());
    }
}
