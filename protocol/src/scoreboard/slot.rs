//! The claim protocol: who has a connection, decided by one atomic word per slot.
//!
//! Owns the words' encoding, every transition and every memory ordering. Knows nothing of memory
//! mappings, sockets or counters; it works on anything that is a [`Word`], so that the functions the two
//! processes run are the very ones that the model checker runs.
//!
//! ```text
//! FREE → SENT (dispatcher, before sendmsg) → TAKEN (worker) → RELEASED (dispatcher has closed its copy) → SENT …
//!                                          ↘ REVOKED (dispatcher) → SENT …
//!                                          ↘ LOST (worker: the fd did not arrive) → SENT …
//! ```
//!
//! SENT→TAKEN, SENT→LOST and SENT→REVOKED are compare-and-swaps of the whole word, sequence number
//! included: exactly one side wins, and a word that was used again can't be mistaken for the old one. Whoever loses
//! closes its copy of the connection and never shuts it down.
//!
//! ```
//! use std::sync::atomic::AtomicU64;
//! use dispatch_protocol::scoreboard::slot::{self, Revoke, SlotState};
//!
//! let slot = AtomicU64::new(0); // In real life, one of a scoreboard.
//!
//! // A handoff: the dispatcher offers, the worker claims, the dispatcher closes its copy.
//! slot::offer(&slot, 1);
//! assert!(slot::take(&slot, 1));
//! assert!(slot::dispatcher_has_copy(&slot, 1), "shut down before closing, or the client sees no end");
//! assert_eq!(slot::state(&slot, 1), SlotState::Taken);
//! slot::release(&slot, 1);
//! assert!(!slot::dispatcher_has_copy(&slot, 1));
//!
//! // The worker is slow, so the dispatcher takes the next one back. The late claim fails.
//! slot::offer(&slot, 2);
//! assert_eq!(slot::revoke(&slot, 2), Revoke::Revoked);
//! assert!(!slot::take(&slot, 2), "close it, never shut it down: somebody else serves it");
//!
//! // The file descriptor did not arrive: the worker gives the slot back, the dispatcher sends it elsewhere.
//! slot::offer(&slot, 3);
//! assert!(slot::decline(&slot, 3));
//! assert_eq!(slot::revoke(&slot, 3), Revoke::Was(SlotState::Lost));
//! ```
//!
//! # Sleeping
//!
//! The dispatcher wants to sleep, yet hear of a take or a close. It sets bits in the `want` word, then reads
//! slots and counters once more, then sleeps. A worker changes a slot or counter, then reads `want`. Each side puts a
//! sequentially consistent fence between its write and its read (Dekker's pattern), so at least one of
//! them sees the other's write: either the dispatcher does not sleep, or the worker rings the doorbell.
//!
//! ```
//! use std::sync::atomic::{AtomicU32, AtomicU64};
//! use dispatch_protocol::scoreboard::slot::{self, SlotState, want};
//!
//! let (slot, word) = (AtomicU64::new(0), AtomicU32::new(0));
//! slot::offer(&slot, 1);
//!
//! // The dispatcher, before it sleeps: ask, then look once more.
//! slot::arm(&word, want::TAKEN | want::ROOM);
//! assert_eq!(slot::state(&slot, 1), SlotState::Sent);
//!
//! // The worker: change, then ask whether somebody wants to know. Only the first change rings.
//! assert!(slot::take(&slot, 1));
//! assert!(slot::must_ring(&word, want::TAKEN), "now write 1 to the eventfd");
//! assert!(!slot::must_ring(&word, want::TAKEN));
//! ```

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// An atomic integer shared by the two sides. Implemented by the standard atomics and, in tests, by a model checker's.
///
/// ```
/// use std::sync::atomic::AtomicU64;
/// use dispatch_protocol::scoreboard::slot::{self, Word};
///
/// /// Works on shared memory and in a model checker alike.
/// fn serve(slot: &impl Word<u64>, seq: u64) -> bool {
///     slot::take(slot, seq)
/// }
///
/// let slot = AtomicU64::new(0);
/// slot::offer(&slot, 7);
/// assert!(serve(&slot, 7));
/// assert!(!slot.swap_if(7 * 8 + 1, 7 * 8 + 2), "no longer SENT");
/// ```
pub trait Word<T: Copy> {
    /// Atomic load.
    fn load(&self, order: Ordering) -> T;
    /// Atomic store.
    fn store(&self, value: T, order: Ordering);
    /// Atomic compare-and-swap (strong): true if the word was `old` and is now `new`.
    fn swap_if(&self, old: T, new: T) -> bool;
    /// Atomic or; returns the old value.
    fn or(&self, bits: T) -> T;
    /// Atomic and-not; returns the old value.
    fn clear(&self, bits: T) -> T;
    /// A fence, [`Ordering::SeqCst`].
    fn fence();
}

macro_rules! word {
    ($atomic:ty, $int:ty) => {
        impl Word<$int> for $atomic {
            fn load(&self, order: Ordering) -> $int {
                <$atomic>::load(self, order)
            }
            fn store(&self, value: $int, order: Ordering) {
                <$atomic>::store(self, value, order);
            }
            fn swap_if(&self, old: $int, new: $int) -> bool {
                self.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok()
            }
            fn or(&self, bits: $int) -> $int {
                self.fetch_or(bits, Ordering::AcqRel)
            }
            fn clear(&self, bits: $int) -> $int {
                self.fetch_and(!bits, Ordering::AcqRel)
            }
            fn fence() {
                fence(Ordering::SeqCst);
            }
        }
    };
}
word!(AtomicU64, u64);
word!(AtomicU32, u32);

const STATE_BITS: u32 = 3;
const SENT: u64 = 1;
const TAKEN: u64 = 2;
const RELEASED: u64 = 3;
const REVOKED: u64 = 4;
const LOST: u64 = 5;

/// Largest sequence number a slot can hold.
pub const MAX_SEQ: u64 = u64::MAX >> STATE_BITS;

const fn word(seq: u64, state: u64) -> u64 {
    (seq << STATE_BITS) | state
}

/// What the dispatcher reads in a slot whose sequence number it knows; see the [example](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Not yet taken.
    Sent,
    /// The worker's application has it.
    Taken,
    /// The worker did not receive it, or declined it.
    Lost,
    /// A word that no worker may write there: the worker is broken or hostile.
    Invalid,
}

/// How an attempt to revoke ended; see the [example](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revoke {
    /// The dispatcher has the connection again; the worker can no longer claim it.
    Revoked,
    /// Too late: the slot had this state.
    Was(SlotState),
}

/// Dispatcher: offers `seq` (1 to [`MAX_SEQ`]) in a slot, before the record that names it is sent. [Example](self).
pub fn offer(slot: &impl Word<u64>, seq: u64) {
    slot.store(word(seq, SENT), Ordering::Release);
}

/// Dispatcher: what has become of `seq`. [Example](self).
pub fn state(slot: &impl Word<u64>, seq: u64) -> SlotState {
    let now = slot.load(Ordering::Acquire);
    if now == word(seq, SENT) {
        SlotState::Sent
    } else if now == word(seq, TAKEN) {
        SlotState::Taken
    } else if now == word(seq, LOST) {
        SlotState::Lost
    } else {
        SlotState::Invalid
    }
}

/// Dispatcher: takes `seq` back unless the worker has it. [Example](self).
pub fn revoke(slot: &impl Word<u64>, seq: u64) -> Revoke {
    if slot.swap_if(word(seq, SENT), word(seq, REVOKED)) {
        return Revoke::Revoked;
    }
    match state(slot, seq) {
        // Only a worker that writes SENT itself gets here; it must not make us loop.
        SlotState::Sent => Revoke::Was(SlotState::Invalid),
        other => Revoke::Was(other),
    }
}

/// Dispatcher: its own copy of the taken `seq` is closed; the worker's close then ends the connection. Does nothing if the
/// slot has been used again meanwhile. [Example](self).
pub fn release(slot: &impl Word<u64>, seq: u64) {
    slot.swap_if(word(seq, TAKEN), word(seq, RELEASED));
}

/// Worker: claims `seq` for its application. On false it closes its copy and touches nothing else. [Example](self).
#[must_use]
pub fn take(slot: &impl Word<u64>, seq: u64) -> bool {
    slot.swap_if(word(seq, SENT), word(seq, TAKEN))
}

/// Worker: `seq` did not arrive (the process is out of descriptors), or is declined. False if it was revoked meanwhile.
/// [Example](self).
pub fn decline(slot: &impl Word<u64>, seq: u64) -> bool {
    slot.swap_if(word(seq, SENT), word(seq, LOST))
}

/// Worker: whether the dispatcher may still hold a copy of the taken `seq`, so that closing alone would not end it.
/// [Example](self).
pub fn dispatcher_has_copy(slot: &impl Word<u64>, seq: u64) -> bool {
    slot.load(Ordering::Acquire) == word(seq, TAKEN)
}

/// Bits of the `want` word: what the dispatcher wants to be woken for.
pub mod want {
    /// A slot changes from SENT.
    pub const TAKEN: u32 = 1;
    /// `finished` grows.
    pub const ROOM: u32 = 2;
    /// More threads wait in `accept`.
    pub const IDLE: u32 = 4;
}

/// Dispatcher: asks to be rung, for the [bits](want) given. Everything it would sleep on must be read again after
/// this. [Example](self#sleeping).
pub fn arm(want: &impl Word<u32>, bits: u32) {
    want.or(bits);
    fence_of(want);
}

/// Worker: after a change of the kind [`bit`](want); true if it must ring the doorbell. [Example](self#sleeping).
#[must_use]
pub fn must_ring(want: &impl Word<u32>, bit: u32) -> bool {
    fence_of(want);
    // The plain load keeps the common case, nobody asleep, free of a write to a shared line.
    want.load(Ordering::Relaxed) & bit != 0 && want.clear(bit) & bit != 0
}

fn fence_of<W: Word<u32>>(_: &W) {
    W::fence();
}
