//! Bytes that wait in this process, in all and of each user, so that one user cannot take the
//! memory that others need.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

/// Why no more bytes can wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// The user has its share.
    User,
    /// All together have what there is.
    All,
}

/// The bytes of one purpose.
#[derive(Debug)]
pub(crate) struct Budget {
    most: usize,
    most_of_user: usize,
    total: Cell<usize>,
    users: RefCell<HashMap<u32, usize>>,
}

impl Budget {
    pub(crate) fn new(most: usize, most_of_user: usize) -> Rc<Budget> {
        let (total, users) = (Cell::new(0), RefCell::default());
        Rc::new(Budget { most, most_of_user, total, users })
    }

    pub(crate) fn total(&self) -> usize {
        self.total.get()
    }

    /// The user with the most bytes.
    pub(crate) fn largest(&self) -> Option<u32> {
        let users = self.users.borrow();
        users.iter().max_by_key(|(_, bytes)| **bytes).map(|(user, _)| *user)
    }

    /// An empty share of a user.
    pub(crate) fn share(self: &Rc<Budget>, user: u32) -> Share {
        Share { budget: Rc::clone(self), user, bytes: Cell::new(0) }
    }

    fn take(&self, user: u32, bytes: usize) -> Result<(), Full> {
        let mut users = self.users.borrow_mut();
        let of_user = users.get(&user).copied().unwrap_or(0).saturating_add(bytes);
        let total = self.total.get().saturating_add(bytes);
        if of_user > self.most_of_user {
            return Err(Full::User);
        }
        if total > self.most {
            return Err(Full::All);
        }
        if bytes > 0 {
            users.insert(user, of_user);
            self.total.set(total);
        }
        Ok(())
    }

    fn give_back(&self, user: u32, bytes: usize) {
        self.total.set(self.total.get().saturating_sub(bytes));
        let mut users = self.users.borrow_mut();
        let Some(of_user) = users.get_mut(&user) else { return };
        *of_user = of_user.saturating_sub(bytes);
        if *of_user == 0 {
            users.remove(&user);
        }
    }
}

/// Bytes of one queue. They are given back with it.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Rc<Budget>,
    user: u32,
    bytes: Cell<usize>,
}

impl Share {
    pub(crate) fn user(&self) -> u32 {
        self.user
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.get()
    }

    /// Takes more; all or nothing.
    pub(crate) fn grow(&self, bytes: usize) -> Result<(), Full> {
        self.budget.take(self.user, bytes)?;
        self.bytes.set(self.bytes.get() + bytes);
        Ok(())
    }

    /// Gives some back.
    pub(crate) fn shrink(&self, bytes: usize) {
        let bytes = bytes.min(self.bytes.get());
        self.bytes.set(self.bytes.get() - bytes);
        self.budget.give_back(self.user, bytes);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shrink(self.bytes.get());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_takes_its_share_and_no_more() {
        let budget = Budget::new(100, 60);
        let (a, b, c) = (budget.share(1), budget.share(1), budget.share(2));
        assert_eq!(a.grow(40), Ok(()));
        assert_eq!(b.grow(30), Err(Full::User));
        assert_eq!(b.grow(20), Ok(()));
        assert_eq!(c.grow(41), Err(Full::All));
        assert_eq!(c.grow(40), Ok(()));
        assert_eq!((budget.largest(), budget.total()), (Some(1), 100));
        a.shrink(1000);
        assert_eq!((a.bytes(), budget.total()), (0, 60), "no more than it has");
        drop(b);
        drop(c);
        assert_eq!((budget.largest(), budget.total()), (None, 0));
    }
}
