use super::*;

#[test]
fn both_sides_see_one_memory() {
    let (ours, fd) = Scoreboard::create(4, 9).unwrap();
    let theirs = Scoreboard::open(fd, 4).unwrap();
    assert_eq!((ours.slots(), theirs.slots()), (4, 4));
    assert_eq!(theirs.finished(), 9);
    theirs.raise_finished(11);
    theirs.raise_finished(10);
    assert_eq!(ours.finished(), 11, "the count never decreases");
    for slot in 0..4 {
        slot::offer(ours.slot(slot).unwrap(), u64::from(slot) + 1);
        assert!(slot::take(theirs.slot(slot).unwrap(), u64::from(slot) + 1));
    }
    assert!(ours.slot(4).is_none() && theirs.slot(u32::MAX).is_none());
    slot::arm(ours.want(), slot::want::TAKEN);
    assert!(slot::must_ring(theirs.want(), slot::want::TAKEN));
    assert!(!slot::must_ring(theirs.want(), slot::want::TAKEN), "once");
}

#[test]
fn its_size_is_fixed_for_ever() {
    let (_board, fd) = Scoreboard::create(4, 0).unwrap();
    for size in [0, 100, 1 << 20] {
        let result = rustix::fs::ftruncate(&fd, size);
        assert_eq!(result, Err(rustix::io::Errno::PERM), "to {size}");
    }
    let seals = rustix::fs::fcntl_add_seals(&fd, rustix::fs::SealFlags::WRITE);
    assert_eq!(seals, Err(rustix::io::Errno::PERM));
}

#[test]
fn only_a_sealed_scoreboard_of_that_size_is_opened() {
    for slots in [0, MAX_SLOTS + 1] {
        assert!(matches!(Scoreboard::create(slots, 0), Err(ScoreboardError::Malformed(_))));
    }
    for slots in [0, 3, 5, MAX_SLOTS, MAX_SLOTS + 1] {
        let (_board, fd) = Scoreboard::create(4, 0).unwrap();
        let error = Scoreboard::open(fd, slots).unwrap_err();
        assert!(matches!(error, ScoreboardError::Malformed(_)), "{error}");
    }
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let unsealed = rustix::fs::memfd_create(c"unsealed", flags).unwrap();
    rustix::fs::ftruncate(&unsealed, 4096).unwrap();
    let error = Scoreboard::open(unsealed, 4).unwrap_err();
    assert!(matches!(error, ScoreboardError::NotSealed), "{error}");
    let file = tempfile::tempfile().unwrap();
    let error = Scoreboard::open(file.into(), 4).unwrap_err();
    assert!(matches!(error, ScoreboardError::NotSealed), "{error}");
    let nonsense = sys::sealed_memfd(c"nonsense", 4096).unwrap();
    let error = Scoreboard::open(nonsense, 4).unwrap_err();
    assert!(matches!(error, ScoreboardError::Malformed("magic")));
}

#[test]
fn the_version_is_checked() {
    let (board, fd) = Scoreboard::create(4, 0).unwrap();
    board.map.u32(OFFSET_VERSION).store(1, Ordering::Relaxed);
    let error = Scoreboard::open(fd, 4).unwrap_err();
    assert!(matches!(error, ScoreboardError::Malformed("version")));
}

#[test]
fn a_word_that_no_worker_may_write_is_invalid() {
    use slot::{Revoke, SlotState};
    let (board, _fd) = Scoreboard::create(1, 0).unwrap();
    let slot = board.slot(0).unwrap();
    slot::offer(slot, 5);
    for word in [0, u64::MAX, 6 << 3 | 1, 5 << 3 | 3, 5 << 3 | 7] {
        slot.store(word, Ordering::Relaxed);
        assert_eq!(slot::state(slot, 5), SlotState::Invalid);
        assert_eq!(slot::revoke(slot, 5), Revoke::Was(SlotState::Invalid));
    }
    slot::offer(slot, slot::MAX_SEQ);
    assert_eq!(slot::state(slot, slot::MAX_SEQ), SlotState::Sent);
}

#[test]
fn slot_words_are_encoded_as_the_document_says() {
    let (board, _fd) = Scoreboard::create(1, 0).unwrap();
    let slot = board.slot(0).unwrap();
    let word = || slot.load(Ordering::Relaxed);
    slot::offer(slot, 5);
    assert_eq!(word(), 5 * 8 + 1);
    assert!(slot::take(slot, 5));
    assert_eq!(word(), 5 * 8 + 2);
    assert!(slot::dispatcher_has_copy(slot, 5));
    slot::release(slot, 5);
    assert_eq!(word(), 5 * 8 + 3);
    assert!(!slot::dispatcher_has_copy(slot, 5));
    slot::offer(slot, 6);
    assert_eq!(slot::revoke(slot, 6), slot::Revoke::Revoked);
    assert_eq!(word(), 6 * 8 + 4);
    slot::offer(slot, 7);
    assert!(slot::decline(slot, 7));
    assert_eq!(word(), 7 * 8 + 5);
}

pub(super) mod model {
    //! The slot protocol under every interleaving, by a model checker. It runs the same functions
    //! as the two processes, on the checker's atomics.

    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU32, AtomicU64, fence};
    use loom::thread;

    use super::super::slot::{self, Revoke, SlotState, Word, want};
    use std::sync::atomic::Ordering;

    pub(in crate::scoreboard) struct Modelled<A>(pub(in crate::scoreboard) A);

    macro_rules! word {
        ($atomic:ty, $int:ty) => {
            impl Word<$int> for Modelled<$atomic> {
                fn load(&self, order: Ordering) -> $int {
                    self.0.load(order)
                }
                fn store(&self, value: $int, order: Ordering) {
                    self.0.store(value, order);
                }
                fn swap_if(&self, old: $int, new: $int) -> bool {
                    let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
                    self.0.compare_exchange(old, new, success, failure).is_ok()
                }
                fn or(&self, bits: $int) -> $int {
                    self.0.fetch_or(bits, Ordering::AcqRel)
                }
                fn clear(&self, bits: $int) -> $int {
                    self.0.fetch_and(!bits, Ordering::AcqRel)
                }
                fn fence() {
                    fence(Ordering::SeqCst);
                }
            }
        };
    }
    word!(AtomicU64, u64);
    word!(AtomicU32, u32);

    fn slot() -> Arc<Modelled<AtomicU64>> {
        Arc::new(Modelled(AtomicU64::new(0)))
    }

    #[test]
    fn claim_and_revoke_have_one_winner() {
        loom::model(|| {
            let slot = slot();
            slot::offer(&*slot, 1);
            let worker = {
                let slot = Arc::clone(&slot);
                thread::spawn(move || slot::take(&*slot, 1))
            };
            let revoked = slot::revoke(&*slot, 1);
            let claimed = worker.join().unwrap();
            match revoked {
                Revoke::Revoked => assert!(!claimed),
                Revoke::Was(state) => assert!(claimed && state == SlotState::Taken),
            }
        });
    }

    #[test]
    fn claim_decline_and_revoke_have_one_winner() {
        loom::model(|| {
            let slot = slot();
            slot::offer(&*slot, 1);
            let (a, b) = (Arc::clone(&slot), Arc::clone(&slot));
            let claiming = thread::spawn(move || slot::take(&*a, 1));
            let declining = thread::spawn(move || slot::decline(&*b, 1));
            let revoked = slot::revoke(&*slot, 1);
            let (claimed, declined) = (claiming.join().unwrap(), declining.join().unwrap());
            let winner = match revoked {
                Revoke::Revoked => (false, false),
                Revoke::Was(SlotState::Taken) => (true, false),
                Revoke::Was(SlotState::Lost) => (false, true),
                Revoke::Was(state) => panic!("{state:?}"),
            };
            assert_eq!((claimed, declined), winner);
        });
    }

    #[test]
    fn a_reused_slot_is_not_taken_by_the_old_number() {
        loom::model(|| {
            let slot = slot();
            slot::offer(&*slot, 1);
            let worker = {
                let slot = Arc::clone(&slot);
                thread::spawn(move || slot::take(&*slot, 1))
            };
            if slot::revoke(&*slot, 1) == Revoke::Revoked {
                slot::offer(&*slot, 2);
                assert!(!worker.join().unwrap());
                assert_eq!(slot::state(&*slot, 2), SlotState::Sent);
            } else {
                assert!(worker.join().unwrap());
            }
        });
    }

    /// Both sides finish: the dispatcher sleeps only if the worker rings.
    ///
    /// The checker treats sequentially consistent accesses as acquire and release, but models
    /// fences exactly. Without the fence in `must_ring` or the one in `arm` this test fails.
    #[test]
    fn a_sleeping_dispatcher_is_rung_for_a_take() {
        loom::model(|| {
            let slot = slot();
            let wanted = Arc::new(Modelled(AtomicU32::new(0)));
            slot::offer(&*slot, 1);
            let worker = {
                let (slot, wanted) = (Arc::clone(&slot), Arc::clone(&wanted));
                thread::spawn(move || {
                    assert!(slot::take(&*slot, 1));
                    slot::must_ring(&*wanted, want::TAKEN)
                })
            };
            slot::arm(&*wanted, want::TAKEN | want::ROOM);
            let sleeps = slot::state(&*slot, 1) == SlotState::Sent;
            let rung = worker.join().unwrap();
            assert!(!sleeps || rung, "the dispatcher sleeps for ever");
        });
    }

    #[test]
    fn a_sleeping_dispatcher_is_rung_for_a_close() {
        loom::model(|| {
            let finished = Arc::new(AtomicU64::new(0));
            let wanted = Arc::new(Modelled(AtomicU32::new(0)));
            let worker = {
                let (finished, wanted) = (Arc::clone(&finished), Arc::clone(&wanted));
                thread::spawn(move || {
                    finished.fetch_max(1, Ordering::AcqRel);
                    slot::must_ring(&*wanted, want::ROOM)
                })
            };
            slot::arm(&*wanted, want::ROOM);
            let sleeps = finished.load(Ordering::Acquire) == 0;
            let rung = worker.join().unwrap();
            assert!(!sleeps || rung, "the dispatcher sleeps for ever");
        });
    }

    #[test]
    fn one_of_two_closes_rings() {
        loom::model(|| {
            let wanted = Arc::new(Modelled(AtomicU32::new(0)));
            slot::arm(&*wanted, want::ROOM);
            let other = {
                let wanted = Arc::clone(&wanted);
                thread::spawn(move || slot::must_ring(&*wanted, want::ROOM))
            };
            let ours = slot::must_ring(&*wanted, want::ROOM);
            assert!(ours != other.join().unwrap(), "exactly one");
        });
    }
}
