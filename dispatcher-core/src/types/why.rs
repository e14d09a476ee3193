//! Why a worker was chosen or passed over: the reasons in `explain` and `history`.

/// Why a worker was chosen or passed over by the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It was chosen.
    Chosen,
    /// It was chosen because the client's key is bound to it, or the client's session id names it.
    Remembered,
    /// It has more connections for its weight than the one that was chosen.
    MoreLoaded,
    /// It was equal, and the rotation of ties selected another.
    Tie,
    /// Its turn is later.
    LaterTurn,
    /// The random draw selected another worker.
    NotDrawn,
    /// The key belongs to another worker.
    OtherKey,
    /// Its score is higher than that of the one that was chosen.
    HigherScore,
    /// One of its gauges is too old, or was never set.
    StaleGauge,
    /// A worker of a higher priority is up.
    StandsBy,
    /// It has its maximum of connections.
    Full,
    /// All its slots are in use.
    NoSlot,
    /// It is suspect.
    Suspect,
    /// It is draining.
    Draining,
    /// Its channel had no room.
    ChannelFull,
    /// It lost a connection a moment ago.
    LostOne,
    /// Its threads are busy and it has as many untaken connections as are sent ahead.
    Busy,
    /// It is without trust, and gets no trial at the moment.
    Unproven,
    /// It was chosen because it is likely to take the connection sooner than the worker that had
    /// it, or because there is no better one.
    TakenSooner,
    /// Another worker is likely to take the connection sooner.
    TakenLater,
    /// It was chosen because a roll is in progress and its process is of the new generation.
    NewGeneration,
    /// A roll is in progress: a worker of the new generation was preferred.
    NotPreferred,
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
            Why::NewGeneration => "new-generation",
            Why::NotPreferred => "not-preferred",
        }
    }
}
