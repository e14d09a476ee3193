//! Why a worker was chosen or passed over: the words of `explain` and `history`.

/// Why a worker was chosen or passed over by the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It was chosen.
    Chosen,
    /// It was chosen because the client was there before, or its session id names it.
    Remembered,
    /// It has more connections for its weight than the one that was chosen.
    MoreLoaded,
    /// It was as good, and others are first this time.
    Tie,
    /// Its turn comes later.
    LaterTurn,
    /// The random draw fell on another one.
    NotDrawn,
    /// The key belongs to another one.
    OtherKey,
    /// Its score is higher than that of the one that was chosen.
    HigherScore,
    /// One of its gauges is too old, or was never set.
    StaleGauge,
    /// A worker of a higher priority is up.
    StandsBy,
    /// It has as many connections as it may.
    Full,
    /// It has as many untaken connections as it has slots.
    NoSlot,
    /// It left something untaken.
    Suspect,
    /// It gets nothing more.
    Draining,
    /// Its channel had no room.
    ChannelFull,
    /// It lost a connection a moment ago.
    LostOne,
    /// It takes no more for now: its threads are busy, or it has as many untaken connections as it is trusted with.
    Busy,
    /// It has to prove that it takes connections, and is not tested at the moment.
    Unproven,
    /// It was chosen because it is likely to take the connection sooner than the worker that had it, or for want of a
    /// better one.
    TakenSooner,
    /// Another one is likely to take the connection sooner.
    TakenLater,
}

impl Why {
    /// The name in answers and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Why::Chosen => "chosen",
            Why::Remembered => "remembered",
            Why::MoreLoaded => "more-loaded",
            Why::Tie => "tie",
            Why::LaterTurn => "later-turn",
            Why::NotDrawn => "not-drawn",
            Why::OtherKey => "other-key",
            Why::HigherScore => "higher-score",
            Why::StaleGauge => "stale-gauge",
            Why::StandsBy => "stands-by",
            Why::Full => "full",
            Why::NoSlot => "no-slot",
            Why::Suspect => "suspect",
            Why::Draining => "draining",
            Why::ChannelFull => "channel-full",
            Why::LostOne => "lost-one",
            Why::Busy => "busy",
            Why::Unproven => "unproven",
            Why::TakenSooner => "taken-sooner",
            Why::TakenLater => "taken-later",
        }
    }
}
