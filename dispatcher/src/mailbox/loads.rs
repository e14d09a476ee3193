//! The figures for advice that only the event loop has.

use dispatcher_core::advice::PoolLoad;

use crate::api::advice::{GaugeRecord, WorkerDetail};

/// The pools and listeners of this dispatcher at one instant.
#[derive(Debug, Default)]
pub struct OwnLoads {
    /// Identifies this start of the dispatcher.
    pub instance: String,
    /// By pool.
    pub pools: Vec<OwnPoolLoad>,
    /// The listeners that were not removed.
    pub listeners: Vec<ListenerAddresses>,
}

/// A pool with its gauges.
#[derive(Debug)]
pub struct OwnPoolLoad {
    /// Its sums.
    pub load: PoolLoad,
    /// The means of its gauges.
    pub gauges: Vec<GaugeRecord>,
    /// The gauges of each of `load.advertised`.
    pub advertised: Vec<Vec<GaugeRecord>>,
    /// Its workers; empty without `advice_detail`.
    pub workers: Vec<WorkerDetail>,
}

/// Where clients of a pool connect.
#[derive(Debug)]
pub struct ListenerAddresses {
    /// The pool.
    pub pool: String,
    /// `advertise`, if set.
    pub advertise: Option<String>,
    /// The bound addresses.
    pub bound: Vec<String>,
}

/// A function that completes the figures: the event loop gathers the data, and the side thread
/// reads the gauges.
pub struct DeferredLoads(pub Box<dyn FnOnce() -> OwnLoads + Send>);

impl std::fmt::Debug for DeferredLoads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DeferredLoads")
    }
}
