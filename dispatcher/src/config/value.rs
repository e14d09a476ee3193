//! Values that check themselves while serde reads them, so that the error has the position of the
//! value.
//!
//! The second line of a custom error is its hint (`read::translate` separates them).

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// A whole number from `MIN` to `MAX`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Count<const MIN: u32, const MAX: u32>(pub u32);

impl<'de, const MIN: u32, const MAX: u32> Deserialize<'de> for Count<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<const MIN: u32, const MAX: u32>;

        impl<const MIN: u32, const MAX: u32> Visitor<'_> for V<MIN, MAX> {
            type Value = Count<MIN, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {MIN} to {MAX}")
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
                u32::try_from(number)
                    .ok()
                    .filter(|n| (MIN..=MAX).contains(n))
                    .map(Count)
                    .ok_or_else(|| E::custom(format!("must be from {MIN} to {MAX}, not {number}")))
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
                self.visit_i64(i64::try_from(number).unwrap_or(i64::MAX))
            }
        }

        deserializer.deserialize_any(V::<MIN, MAX>)
    }
}

/// A duration of at least `MIN` and at most `MAX` milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait<const MIN: u64, const MAX: u64>(pub Duration);

/// One year: the longest duration that is accepted. It cannot overflow a clock.
pub(super) const YEAR: u64 = 366 * 24 * 3600 * 1000;

/// The kernel's limit for counts of seconds in 15 bits.
pub(super) const KERNEL_SECONDS: u64 = 32_767 * 1000;

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Wait<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<const MIN: u64, const MAX: u64>;

        impl<const MIN: u64, const MAX: u64> Visitor<'_> for V<MIN, MAX> {
            type Value = Wait<MIN, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration with its unit, such as \"200ms\" or \"10s\"")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let duration = humantime::parse_duration(text).map_err(|error| {
                    E::custom(format!(
                        "`{text}` is not a duration: {error}\n\
                         write a number and its unit, such as \"200ms\", \"10s\" or \"1m 30s\""
                    ))
                })?;
                let (min, max) = (Duration::from_millis(MIN), Duration::from_millis(MAX));
                if duration < min {
                    return Err(E::custom(format!(
                        "must be at least \"{}\"",
                        humantime::format_duration(min)
                    )));
                }
                if duration > max {
                    return Err(E::custom(format!(
                        "must be at most \"{}\"",
                        humantime::format_duration(max)
                    )));
                }
                Ok(Wait(duration))
            }
        }

        deserializer.deserialize_any(V::<MIN, MAX>)
    }
}

/// Milliseconds in a second.
pub(super) const SECOND: u64 = 1000;

/// A [`Wait`] that is a multiple of `UNIT` milliseconds, the unit of the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Whole<const UNIT: u64, const MIN: u64, const MAX: u64>(pub Duration);

impl<'de, const UNIT: u64, const MIN: u64, const MAX: u64> Deserialize<'de>
    for Whole<UNIT, MIN, MAX>
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Wait(wait) = Wait::<MIN, MAX>::deserialize(deserializer)?;
        let unit = Duration::from_millis(UNIT);
        if wait.as_nanos().is_multiple_of(unit.as_nanos()) {
            return Ok(Whole(wait));
        }
        let name = if UNIT == SECOND { "seconds" } else { "milliseconds" };
        Err(D::Error::custom(format!(
            "must be whole {name}: the kernel does not support smaller units here"
        )))
    }
}

/// Text, or a whole number, for keys that accept both: modes and accounts.
#[derive(Clone, Debug)]
pub(super) enum TextOrNumber {
    Text(String),
    Number(i64),
}

/// The description of a [`TextOrNumber`] in errors.
pub(super) trait Expecting {
    const WHAT: &'static str;
}

/// Permission bits.
#[derive(Clone, Debug)]
pub(super) struct AMode;
impl Expecting for AMode {
    const WHAT: &'static str = "permission bits in octal, such as \"0660\"";
}

/// Permission bits that new files do not get.
#[derive(Clone, Debug)]
pub(super) struct AMask;
impl Expecting for AMask {
    const WHAT: &'static str =
        "permission bits that new files do not get, in octal, such as \"0027\"";
}

/// A limit that is a count.
#[derive(Clone, Debug)]
pub(super) struct ACount;
impl Expecting for ACount {
    const WHAT: &'static str =
        "a number such as 4096, or the soft and the hard limit: \"1024:4096\"";
}

/// A limit in bytes.
#[derive(Clone, Debug)]
pub(super) struct ASize;
impl Expecting for ASize {
    const WHAT: &'static str = "bytes, such as 0, \"512MiB\" or \"unlimited\"";
}

/// A user or a group.
#[derive(Clone, Debug)]
pub(super) struct AnAccount;
impl Expecting for AnAccount {
    const WHAT: &'static str = "a name or a numeric id";
}

/// A [`TextOrNumber`] whose errors describe it as `W`.
#[derive(Clone, Debug)]
pub(super) struct Either<W>(pub TextOrNumber, PhantomData<W>);

impl<'de, W: Expecting> Deserialize<'de> for Either<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<W>(PhantomData<W>);

        impl<W: Expecting> Visitor<'_> for V<W> {
            type Value = Either<W>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(W::WHAT)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Either(TextOrNumber::Text(text.to_owned()), PhantomData))
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
                Ok(Either(TextOrNumber::Number(number), PhantomData))
            }
        }

        deserializer.deserialize_any(V::<W>(PhantomData))
    }
}
