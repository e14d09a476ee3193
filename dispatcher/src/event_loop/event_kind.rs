//! The kinds of log lines about events of the core: each has its own rate limit and its own name.

use dispatcher_core::Event;

/// The kind of an event of the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum EventKind {
    WorkerJoined,
    WorkerGoodbye,
    WorkerGone,
    WorkerSuspect,
    WorkerTrusted,
    ConnectionLostByWorker,
    ChannelFull,
    CounterClamped,
    NoWorker,
    Refusing,
    BackPressure,
    BackPressureOver,
    OutOfResources,
    ProcessRestarting,
    WorkerDraining,
    WorkerResumed,
    DrainOver,
    GaugeImpossible,
    WorkerPaused,
    WorkerUpdated,
    StillRefusing,
    ServedAgain,
    ProcessReplacing,
    ProcessStopping,
    CrashLoop,
    CrashLoopOver,
    RollStopped,
    RollDone,
}

impl EventKind {
    pub(super) fn of(event: &Event) -> EventKind {
        match event {
            Event::Joined { .. } => EventKind::WorkerJoined,
            Event::Goodbye { .. } => EventKind::WorkerGoodbye,
            Event::Gone { .. } => EventKind::WorkerGone,
            Event::Suspect { .. } => EventKind::WorkerSuspect,
            Event::Trusted { .. } => EventKind::WorkerTrusted,
            Event::Lost { .. } => EventKind::ConnectionLostByWorker,
            Event::ChannelFull { .. } => EventKind::ChannelFull,
            Event::Clamped { .. } => EventKind::CounterClamped,
            Event::NoUsableWorker { .. } => EventKind::NoWorker,
            Event::Refusing { .. } => EventKind::Refusing,
            Event::BackPressure { .. } => EventKind::BackPressure,
            Event::Relieved { .. } => EventKind::BackPressureOver,
            Event::OutOfResources { .. } => EventKind::OutOfResources,
            Event::Restarting { .. } => EventKind::ProcessRestarting,
            Event::Draining { .. } => EventKind::WorkerDraining,
            Event::Resumed { .. } => EventKind::WorkerResumed,
            Event::DrainOver { .. } => EventKind::DrainOver,
            Event::BadGauge { .. } => EventKind::GaugeImpossible,
            Event::Paused { .. } => EventKind::WorkerPaused,
            Event::Updated { .. } => EventKind::WorkerUpdated,
            Event::StillRefusing { .. } => EventKind::StillRefusing,
            Event::Served { .. } => EventKind::ServedAgain,
            Event::Replacing { .. } => EventKind::ProcessReplacing,
            Event::ProcessStopped { .. } => EventKind::ProcessStopping,
            Event::CrashLoop { .. } => EventKind::CrashLoop,
            Event::CrashLoopOver { .. } => EventKind::CrashLoopOver,
            Event::RollStopped { .. } => EventKind::RollStopped,
            Event::Rolled { .. } => EventKind::RollDone,
        }
    }

    /// The value of `event=` in the log.
    pub(super) fn name(self) -> &'static str {
        match self {
            EventKind::WorkerJoined => "worker_joined",
            EventKind::WorkerGoodbye => "worker_goodbye",
            EventKind::WorkerGone => "worker_gone",
            EventKind::WorkerSuspect => "worker_suspect",
            EventKind::WorkerTrusted => "worker_trusted",
            EventKind::ConnectionLostByWorker => "connection_lost_by_worker",
            EventKind::ChannelFull => "channel_full",
            EventKind::CounterClamped => "counter_clamped",
            EventKind::NoWorker => "no_worker",
            EventKind::Refusing => "refusing",
            EventKind::BackPressure => "back_pressure",
            EventKind::BackPressureOver => "back_pressure_over",
            EventKind::OutOfResources => "out_of_resources",
            EventKind::ProcessRestarting => "process_restarting",
            EventKind::WorkerDraining => "worker_draining",
            EventKind::WorkerResumed => "worker_resumed",
            EventKind::DrainOver => "drain_over",
            EventKind::GaugeImpossible => "gauge_impossible",
            EventKind::WorkerPaused => "worker_paused",
            EventKind::WorkerUpdated => "worker_updated",
            EventKind::StillRefusing => "still_refusing",
            EventKind::ServedAgain => "served_again",
            EventKind::ProcessReplacing => "process_replacing",
            EventKind::ProcessStopping => "process_stopping",
            EventKind::CrashLoop => "crash_loop",
            EventKind::CrashLoopOver => "crash_loop_over",
            EventKind::RollStopped => "roll_stopped",
            EventKind::RollDone => "roll_done",
        }
    }
}
