//! The slot protocol: one atomic word per slot decides which process has a connection.
//!
//! This module owns the encoding of the words, every transition and every memory ordering. It does
//! not know mappings, sockets or counters. It accepts any [`Word`], so the model checker runs the
//! same functions as the two processes.
//!
//! ```text
//! FREE → SENT (dispatcher, before sendmsg) → TAKEN (worker) → RELEASED (dispatcher) → SENT …
//!                                          ↘ REVOKED (dispatcher) → SENT …
//!                                          ↘ LOST (worker: the fd did not arrive) → SENT …
//! ```
//!
//! SENT→TAKEN, SENT→LOST and SENT→REVOKED are compare-and-swaps of the whole word, sequence number
//! included. Exactly one side wins, and a reused word cannot be mistaken for an old one. The side
//! that loses closes its copy of the connection and never shuts it down.
//!
//! ```
//! use std::sync::atomic::AtomicU64;
//! use dispatch_protocol::scoreboard::slot::{self, Revoke, SlotState};
//!
//! let slot = AtomicU64::new(0); // A scoreboard has such words.
//!
//! // A handoff: the dispatcher offers, the worker takes, the dispatcher closes its copy.
//! slot::offer(&slot, 1);
//! assert!(slot::take(&slot, 1));
//! assert!(slot::dispatcher_has_copy(&slot, 1), "a close alone does not end the connection");
//! assert_eq!(slot::state(&slot, 1), SlotState::Taken);
//! slot::release(&slot, 1);
//! assert!(!slot::dispatcher_has_copy(&slot, 1));
//!
//! // The worker is slow, so the dispatcher revokes the next slot. The late take fails.
//! slot::offer(&slot, 2);
//! assert_eq!(slot::revoke(&slot, 2), Revoke::Revoked);
//! assert!(!slot::take(&slot, 2), "another worker serves it: close it, never shut it down");
//!
//! // The file descriptor did not arrive: the worker declines, the dispatcher sends it elsewhere.
//! slot::offer(&slot, 3);
//! assert!(slot::decline(&slot, 3));
//! assert_eq!(slot::revoke(&slot, 3), Revoke::Was(SlotState::Lost));
//! ```
//!
//! # Sleeping
//!
//! The dispatcher must not sleep through a take or a close. It sets bits in the `want` word, reads
//! slots and counters once more, then sleeps. A worker changes a slot or counter, then reads
//! `want`. Each side has a sequentially consistent fence between its write and its read (Dekker's
//! pattern), so at least one side sees the other's write: either the dispatcher does not sleep, or
//! the worker rings the doorbell.
//!
//! ```
//! use std::sync::atomic::{AtomicU32, AtomicU64};
//! use dispatch_protocol::scoreboard::slot::{self, SlotState, want};
//!
//! let (slot, word) = (AtomicU64::new(0), AtomicU32::new(0));
//! slot::offer(&slot, 1);
//!
//! // The dispatcher arms `want`, then reads the slot again before it sleeps.
//! slot::arm(&word, want::TAKEN | want::ROOM);
//! assert_eq!(slot::state(&slot, 1), SlotState::Sent);
//!
//! // The worker changes the slot, then reads `want`. Only the first change rings.
//! assert!(slot::take(&slot, 1));
//! assert!(slot::must_ring(&word, want::TAKEN), "now write 1 to the eventfd");
//! assert!(!slot::must_ring(&word, want::TAKEN));
//! ```

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// An atomic integer that both sides share. The standard atomics implement it, and in tests those
/// of a model checker.
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
    /// Atomic compare-and-swap (strong): true if the word was `old` and now is `new`.
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

/// The largest sequence number of a slot.
pub const MAX_SEQ: u64 = u64::MAX >> STATE_BITS;

const fn word(seq: u64, state: u64) -> u64 {
    (seq << STATE_BITS) | state
}

/// The state of a slot as the dispatcher reads it for a known sequence number; see the
/// [example](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Not taken yet.
    Sent,
    /// The worker's application has the connection.
    Taken,
    /// The worker did not receive the connection, or declined it.
    Lost,
    /// A word that no correct worker writes.
    Invalid,
}

/// The result of an attempt to revoke; see the [example](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revoke {
    /// The dispatcher has the connection again; the worker can no longer take it.
    Revoked,
    /// The attempt came too late: the slot had this state.
    Was(SlotState),
}

/// Dispatcher: offers `seq` (1 to [`MAX_SEQ`]) in a slot, before it sends the record that names the
/// slot. [Example](self).
pub fn offer(slot: &impl Word<u64>, seq: u64) {
    slot.store(word(seq, SENT), Ordering::Release);
}

/// Dispatcher: the state of `seq`. [Example](self).
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

/// Dispatcher: revokes `seq` unless the worker has taken it. [Example](self).
pub fn revoke(slot: &impl Word<u64>, seq: u64) -> Revoke {
    if slot.swap_if(word(seq, SENT), word(seq, REVOKED)) {
        return Revoke::Revoked;
    }
    match state(slot, seq) {
        // Only a worker that writes SENT itself leads here. The dispatcher must not loop because of
        // it.
        SlotState::Sent => Revoke::Was(SlotState::Invalid),
        other => Revoke::Was(other),
    }
}

/// Dispatcher: marks its own copy of the taken `seq` as closed; from now on a close by the worker
/// ends the connection. Does nothing if the slot has been reused. [Example](self).
pub fn release(slot: &impl Word<u64>, seq: u64) {
    slot.swap_if(word(seq, TAKEN), word(seq, RELEASED));
}

/// Worker: takes `seq` for its application. If it returns false, the worker closes its copy and
/// does nothing else. [Example](self).
#[must_use]
pub fn take(slot: &impl Word<u64>, seq: u64) -> bool {
    slot.swap_if(word(seq, SENT), word(seq, TAKEN))
}

/// Worker: `seq` did not arrive (the process is out of descriptors) or is declined. Returns false
/// if the dispatcher has revoked it. [Example](self).
pub fn decline(slot: &impl Word<u64>, seq: u64) -> bool {
    slot.swap_if(word(seq, SENT), word(seq, LOST))
}

/// Worker: whether the dispatcher may still have a copy of the taken `seq`, so that a close alone
/// does not end the connection. [Example](self).
pub fn dispatcher_has_copy(slot: &impl Word<u64>, seq: u64) -> bool {
    slot.load(Ordering::Acquire) == word(seq, TAKEN)
}

/// Bits of the `want` word: the changes that should wake the dispatcher.
pub mod want {
    /// A slot changes from SENT.
    pub const TAKEN: u32 = 1;
    /// `finished` grows.
    pub const ROOM: u32 = 2;
    /// More threads wait in `accept`.
    pub const IDLE: u32 = 4;
}

/// Dispatcher: asks workers to ring the doorbell for the given [bits](want). Afterwards it must
/// read again every word that it waits for. [Example](self#sleeping).
pub fn arm(want: &impl Word<u32>, bits: u32) {
    want.or(bits);
    fence_of(want);
}

/// Worker: called after a change of the kind [`bit`](want); true if the worker must ring the
/// doorbell. [Example](self#sleeping).
#[must_use]
pub fn must_ring(want: &impl Word<u32>, bit: u32) -> bool {
    fence_of(want);
    // The relaxed load avoids a write to a shared cache line in the common case: the dispatcher is
    // awake.
    want.load(Ordering::Relaxed) & bit != 0 && want.clear(bit) & bit != 0
}

fn fence_of<W: Word<u32>>(_: &W) {
    W::fence();
}
