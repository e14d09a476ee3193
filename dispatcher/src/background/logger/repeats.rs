//! Limits how often one place in the program may log: the last protection against floods. Lines
//! that peers can cause are limited by pool and cause where they are written
//! (`event_loop::rate_limit`); this limit is for the others, which operators and the system can
//! cause.

use std::sync::atomic::{AtomicU64, Ordering};

use log::Record;

/// Modules with a rate limit of their own, by pool or process: a flood in one must not hide
/// another.
const LIMITED: [&str; 7] = [
    "dispatcher::background::spawner::output",
    "dispatcher::event_loop::accept",
    "dispatcher::event_loop::join",
    "dispatcher::event_loop::leaving",
    "dispatcher::event_loop::perform",
    "dispatcher::event_loop::status",
    "dispatcher::event_loop::events",
];

/// Lines of one place in one second.
const PER_SECOND: u64 = 20;

/// Places that are counted apart; the program has fewer.
const PLACES: usize = 1024;

/// By place: the second in the upper half, the lines in it in the lower half.
pub(super) struct Repeats {
    places: [AtomicU64; PLACES],
    left_out: AtomicU64,
}

impl Repeats {
    pub(super) const fn new() -> Repeats {
        Repeats { places: [const { AtomicU64::new(0) }; PLACES], left_out: AtomicU64::new(0) }
    }

    /// Whether this line may be written in this second. Details (`debug` and `trace`) always may:
    /// an operator who selects them wants all.
    pub(super) fn allow(&self, record: &Record<'_>, second: u64) -> bool {
        if record.level() > log::Level::Info || LIMITED.contains(&record.target()) {
            return true;
        }
        let file = record.file().unwrap_or_default();
        let line = u64::from(record.line().unwrap_or_default());
        let mixed = file
            .bytes()
            .fold(line, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let place = &self.places[(mixed ^ mixed >> 32) as usize % PLACES];
        let second = second & 0xffff_ffff;
        // Never fails: the closure always returns a value.
        let before = place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let lines = if word >> 32 == second { word & 0xffff_ffff } else { 0 };
            Some(second << 32 | (lines + 1).min(PER_SECOND + 1))
        });
        let word = before.unwrap_or_default();
        let allowed = word >> 32 != second || word & 0xffff_ffff < PER_SECOND;
        if !allowed {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
        allowed
    }

    /// Lines dropped since the start.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(target: &'static str, line: u32) -> Record<'static> {
        Record::builder()
            .level(log::Level::Info)
            .target(target)
            .file_static(Some("src/admin/reload.rs"))
            .line(Some(line))
            .build()
    }

    #[test]
    fn every_exempt_module_exists_and_limits_its_lines() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        for target in LIMITED {
            let module = target.strip_prefix("dispatcher::").expect("a module of this crate");
            let path = root.join(module.replace("::", "/")).with_extension("rs");
            let text = std::fs::read_to_string(&path).expect(target);
            assert!(text.contains(".allow("), "{target} has no rate limit");
        }
    }

    #[test]
    fn no_place_floods_and_none_hides_another() {
        let repeats = Repeats::new();
        let count = |record: &Record<'_>, second| {
            (0..1_000).filter(|_| repeats.allow(record, second)).count() as u64
        };
        let one = record("dispatcher::admin::reload", 48);
        assert_eq!(count(&one, 7), PER_SECOND);
        assert_eq!(count(&record("dispatcher::admin::reload", 49), 7), PER_SECOND);
        assert_eq!(count(&one, 7), 0);
        assert_eq!(count(&one, 8), PER_SECOND, "again in the next second");
        assert_eq!(repeats.left_out(), 980 * 3 + 1_000);
        assert_eq!(
            count(&record("dispatcher::event_loop::events", 50), 8),
            1_000,
            "limited by pool"
        );
    }
}
