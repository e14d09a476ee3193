//! The kinds of faults. `docs/OPERATING.md` says for each what to do.

/// The kind of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum FaultKind {
    WorkerGone,
    WorkerSuspect,
    WorkerExpelled,
    WorkerRefused,
    ConnectionLostByWorker,
    ConnectionUnread,
    ChannelFull,
    CounterClamped,
    GaugeImpossible,
    NoWorker,
    Refusing,
    BackPressure,
    ProcessEnded,
    ProcessNotStarted,
    ProcessStopped,
    CrashLoop,
    RollStopped,
    OutOfResources,
    AcceptPaused,
    WorkerNotAccepted,
    SocketFileMissing,
    AdvicePeer,
    Steering,
}

impl FaultKind {
    #[cfg(test)]
    const ALL: [FaultKind; 23] = [
        FaultKind::WorkerGone,
        FaultKind::WorkerSuspect,
        FaultKind::WorkerExpelled,
        FaultKind::WorkerRefused,
        FaultKind::ConnectionLostByWorker,
        FaultKind::ConnectionUnread,
        FaultKind::ChannelFull,
        FaultKind::CounterClamped,
        FaultKind::GaugeImpossible,
        FaultKind::NoWorker,
        FaultKind::Refusing,
        FaultKind::BackPressure,
        FaultKind::ProcessEnded,
        FaultKind::ProcessNotStarted,
        FaultKind::ProcessStopped,
        FaultKind::CrashLoop,
        FaultKind::RollStopped,
        FaultKind::OutOfResources,
        FaultKind::AcceptPaused,
        FaultKind::WorkerNotAccepted,
        FaultKind::SocketFileMissing,
        FaultKind::AdvicePeer,
        FaultKind::Steering,
    ];

    /// The name in the status.
    pub(super) fn name(self) -> &'static str {
        match self {
            FaultKind::WorkerGone => "worker_gone",
            FaultKind::WorkerSuspect => "worker_suspect",
            FaultKind::WorkerExpelled => "worker_expelled",
            FaultKind::WorkerRefused => "worker_refused",
            FaultKind::ConnectionLostByWorker => "connection_lost_by_worker",
            FaultKind::ConnectionUnread => "connection_unread",
            FaultKind::ChannelFull => "channel_full",
            FaultKind::CounterClamped => "counter_clamped",
            FaultKind::GaugeImpossible => "gauge_impossible",
            FaultKind::NoWorker => "no_worker",
            FaultKind::Refusing => "refusing",
            FaultKind::BackPressure => "back_pressure",
            FaultKind::ProcessEnded => "process_ended",
            FaultKind::ProcessNotStarted => "process_not_started",
            FaultKind::ProcessStopped => "process_stopped",
            FaultKind::CrashLoop => "crash_loop",
            FaultKind::RollStopped => "roll_stopped",
            FaultKind::OutOfResources => "out_of_resources",
            FaultKind::AcceptPaused => "accept_paused",
            FaultKind::WorkerNotAccepted => "worker_not_accepted",
            FaultKind::SocketFileMissing => "socket_file_missing",
            FaultKind::AdvicePeer => "advice_peer",
            FaultKind::Steering => "steering",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_documented_and_no_other() {
        let page = include_str!("../../../docs/OPERATING.md");
        let (_, table) = page.split_once("| kind | what happened |").expect("the table of faults");
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let kinds = rows.flat_map(|row| row.split('|').nth(1).unwrap_or_default().split(", "));
        let mut documented: Vec<&str> = kinds.map(|kind| kind.trim().trim_matches('`')).collect();
        documented.sort_unstable();
        let mut all = FaultKind::ALL.map(FaultKind::name);
        all.sort_unstable();
        assert_eq!(documented, all);
    }
}
