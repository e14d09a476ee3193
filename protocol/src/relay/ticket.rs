//! The ticket: proof that a process of one user has joined a pool.
//!
//! The dispatcher signs the pool and the user id with a key that it shares with the directory (a
//! file that only their user can read), and sends the ticket in the welcome. The worker shows it in
//! its hello, and the directory compares the user with that of the connected socket. So neither
//! asks the other, and both work while the other restarts. A ticket does not expire: it is as good
//! as the key. The signature is SipHash-2-4 with 128 bits, which is made for short messages.
//!
//! ```text
//! version u8 (1) | user id u32 | pool, 1 to 64 bytes | signature, 16 bytes
//! ```

#[cfg(feature = "ticket")]
use std::hash::Hasher;

/// Most bytes of a ticket.
pub const MAX_TICKET: usize = 1 + 4 + crate::wire::MAX_NAME + SIGNATURE;

/// Bytes of the key.
pub const KEY: usize = 16;

const SIGNATURE: usize = 16;

/// Makes and checks tickets.
#[cfg(feature = "ticket")]
#[derive(Clone)]
pub struct Key([u8; KEY]);

#[cfg(feature = "ticket")]
impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

#[cfg(feature = "ticket")]
impl Key {
    /// A key of these random bytes.
    pub fn new(bytes: [u8; KEY]) -> Key {
        Key(bytes)
    }

    /// A ticket for processes of this user in this pool.
    ///
    /// ```
    /// use dispatch_protocol::relay::ticket::Key;
    ///
    /// let key = Key::new([7; 16]);
    /// let ticket = key.issue("web", 1000);
    /// assert_eq!(key.pool(&ticket, 1000), Some("web"));
    /// assert_eq!(key.pool(&ticket, 1001), None);
    /// ```
    pub fn issue(&self, pool: &str, user: u32) -> Vec<u8> {
        let mut ticket = vec![1];
        ticket.extend_from_slice(&user.to_le_bytes());
        ticket.extend_from_slice(pool.as_bytes());
        let signature = self.sign(&ticket);
        ticket.extend_from_slice(&signature);
        ticket
    }

    /// The pool of a valid ticket of this user.
    pub fn pool<'a>(&self, ticket: &'a [u8], user: u32) -> Option<&'a str> {
        let (signed, signature) = ticket.split_last_chunk::<SIGNATURE>()?;
        // Without an early end, so that the time shows nothing of the right signature.
        let right = self.sign(signed);
        let differs = right.iter().zip(signature).fold(0, |all, (a, b)| all | (a ^ b));
        let [1, rest @ ..] = signed else { return None };
        let (owner, pool) = rest.split_first_chunk::<4>()?;
        let pool = str::from_utf8(pool).ok().filter(|pool| crate::wire::is_name(pool))?;
        (differs == 0 && u32::from_le_bytes(*owner) == user).then_some(pool)
    }

    fn sign(&self, bytes: &[u8]) -> [u8; SIGNATURE] {
        use siphasher::sip128::Hasher128;

        let mut hasher = siphasher::sip128::SipHasher24::new_with_key(&self.0);
        hasher.write(bytes);
        hasher.finish128().as_bytes()
    }
}
