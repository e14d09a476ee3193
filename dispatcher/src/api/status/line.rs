//! The line protocol in the status.

use dispatcher_core::LineSnapshot;
use serde::{Deserialize, Serialize};

/// What a worker of the line protocol has reported. Keys that its last line did not have are
/// missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineWorkerStatus {
    /// The `type` of its last report; may be empty.
    pub r#type: String,
    /// Live connections, by its last report.
    pub count: u64,
    /// Connections served since its start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<u64>,
    /// Most threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_threads: Option<u64>,
    /// Threads now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub curr_threads: Option<u64>,
    /// Of these, busy ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy_threads: Option<u64>,
    /// Connections that wait for a thread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qlen: Option<u64>,
    /// Live connections whose end the kernel will tell.
    pub tracked: u64,
    /// Connections in its socket that it has not read yet.
    pub unread: u64,
}

impl From<&LineSnapshot> for LineWorkerStatus {
    fn from(core: &LineSnapshot) -> LineWorkerStatus {
        let report = &core.report;
        LineWorkerStatus {
            r#type: report.kind.clone(),
            count: report.count,
            used: report.used,
            max_threads: report.max_threads,
            curr_threads: report.curr_threads,
            busy_threads: report.busy_threads,
            qlen: report.qlen,
            tracked: core.tracked,
            unread: core.unread,
        }
    }
}

/// The line protocol of this dispatcher. Counts are since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineStatus {
    /// Whether loads are exact: the kernel tells the ends of TCP connections. Otherwise they are
    /// the last counts and what was sent since.
    pub exact: bool,
    /// Why they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Times the kernel's messages overflowed, so that all sockets had to be listed.
    pub overruns: u64,
    /// Sockets whose end the kernel will tell.
    pub tracked: u64,
    /// Reports of workers.
    pub reports: u64,
    /// Connections that a worker had not read when it left, and that went to another worker.
    pub recovered: u64,
    /// Such connections that had to be closed.
    pub unread_closed: u64,
}
