//! Asks other dispatchers for their figures. A peer is not trusted: its answer is bounded in time
//! and size, and checked whole before anything of it is used.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::bounds::{
    MAX_LOAD, MAX_OWN, MOST_OF_POOL, MOST_OF_SERVER, MOST_POOLS, MOST_SERVERS, WEIGHTS,
};
use super::{Figures, milliseconds, state_of};
use crate::api::advice::{OwnAnswer, PeerStatus, ServerRecord};
use crate::background::logger::{quoted, value};
use crate::config::is_advisable;
use crate::mailbox::advice_faults::{AdviceFaults, PeerEvent};
use dispatcher_core::MAX_GAUGE_VALUE;

/// Longest head of an answer in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// Shortest interval between two log lines about one peer.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Why a peer is left out.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum PeerFault {
    /// No connection.
    Unreachable(String),
    /// No answer in time.
    Silent(Duration),
    /// It began to answer, and did not end in time.
    Slow(Duration),
    /// Not an answer of a dispatcher.
    Malformed(String),
    /// More bytes, pools, servers or addresses than one answer may have.
    TooLong(String),
    /// It answered with another status.
    Refused(String),
}

impl PeerFault {
    /// The name in status and metrics.
    fn name(&self) -> &'static str {
        match self {
            PeerFault::Unreachable(_) => "unreachable",
            PeerFault::Silent(_) => "silent",
            PeerFault::Slow(_) => "slow",
            PeerFault::Malformed(_) => "malformed",
            PeerFault::TooLong(_) => "too-long",
            PeerFault::Refused(_) => "refused",
        }
    }

    fn text(&self) -> String {
        match self {
            PeerFault::Unreachable(error) => format!("it cannot be reached: {error}"),
            PeerFault::Silent(limit) => format!("it did not answer within {limit:?}"),
            PeerFault::Slow(limit) => format!("its answer was not complete within {limit:?}"),
            PeerFault::Malformed(what) => format!("its answer is malformed: {what}"),
            PeerFault::TooLong(what) => format!("its answer is too long: {what}"),
            PeerFault::Refused(status) => format!("it refused: HTTP {status}"),
        }
    }
}

/// The names of all faults, for series that exist from the start.
pub(super) const FAULTS: [&str; 6] =
    ["unreachable", "silent", "slow", "malformed", "too-long", "refused"];

/// A peer and what is known of it.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    /// The figures of its last answer; `None` if that failed, or if it is this dispatcher itself.
    pub(super) figures: Option<Figures>,
    /// Whether it is this dispatcher.
    itself: bool,
    fault: Option<PeerFault>,
    answers: u64,
    answered: Option<Instant>,
    failures: BTreeMap<&'static str, u64>,
    /// When the log last named it, and whether as left out.
    logged: Option<Instant>,
    /// Whether the list of faults has it as left out.
    reported: bool,
    /// Changes that the log did not name.
    suppressed: u64,
}

impl Peer {
    pub(super) fn new(address: SocketAddr) -> Peer {
        let failures = FAULTS.map(|name| (name, 0)).into();
        Peer {
            address,
            figures: None,
            itself: false,
            fault: None,
            answers: 0,
            answered: None,
            failures,
            logged: None,
            reported: false,
            suppressed: 0,
        }
    }

    /// Notes the outcome of a question. `own` is the instance of this dispatcher.
    pub(super) fn asked(
        &mut self,
        outcome: Result<Figures, PeerFault>,
        own: Option<&str>,
        faults: &AdviceFaults,
    ) {
        let before = self.fault.take();
        match outcome {
            Ok(figures) => {
                self.answers += 1;
                self.answered = Some(figures.asked);
                self.itself = own == Some(&*figures.answer.instance);
                self.figures = Some(figures).filter(|_| !self.itself);
            }
            Err(fault) => {
                *self.failures.entry(fault.name()).or_default() += 1;
                self.itself = false;
                self.figures = None;
                self.fault = Some(fault);
            }
        }
        let name = |fault: &Option<PeerFault>| fault.as_ref().map(PeerFault::name);
        if name(&before) != name(&self.fault) {
            self.changed(faults);
        } else if self.suppressed > 0 {
            // The state has stayed since a change that was not reported.
            self.report(faults);
        }
    }

    fn changed(&mut self, faults: &AdviceFaults) {
        self.suppressed += 1;
        self.report(faults);
    }

    /// Reports the present state, unless the log named this peer a moment ago.
    fn report(&mut self, faults: &AdviceFaults) {
        if self.logged.is_some_and(|at| at.elapsed() < LOG_EVERY) {
            return;
        }
        let suppressed = std::mem::take(&mut self.suppressed).saturating_sub(1);
        if self.fault.is_none() && !self.reported {
            return;
        }
        self.logged = Some(Instant::now());
        let address = self.address.to_string();
        let peer = value(&address);
        match &self.fault {
            Some(fault) => log::warn!(
                "event=advice_peer_left_out peer={peer} why={} error={} suppressed={suppressed}",
                fault.name(),
                quoted(fault.text())
            ),
            None => log::info!("event=advice_peer_answers peer={peer} suppressed={suppressed}"),
        }
        self.reported = self.fault.is_some();
        let text = match &self.fault {
            Some(fault) => format!("advice leaves it out: {}", fault.text()),
            None => "advice left it out; it answers again".to_owned(),
        };
        self.tell(text, faults);
    }

    /// The peer was removed from the configuration.
    pub(super) fn removed(&mut self, faults: &AdviceFaults) {
        if self.reported {
            self.reported = false;
            self.tell("it is no advice peer any more".to_owned(), faults);
        }
    }

    fn tell(&self, text: String, faults: &AdviceFaults) {
        let (at, peer) = (SystemTime::now(), self.address.to_string());
        faults.report(PeerEvent { at, peer, text, left_out: self.reported });
    }

    pub(super) fn status(&self) -> PeerStatus {
        let state = match &self.fault {
            Some(fault) => fault.name(),
            None if self.itself => "itself",
            None if self.answers == 0 => "not-asked",
            None => "ok",
        };
        PeerStatus {
            address: self.address.to_string(),
            state: state.to_owned(),
            error: self.fault.as_ref().map(PeerFault::text),
            answers: self.answers,
            failures: self
                .failures
                .iter()
                .map(|(&name, &count)| (name.to_owned(), count))
                .collect(),
            age_ms: self.answered.map(|at| milliseconds(at.elapsed())),
        }
    }
}

/// Asks one peer. Takes at most `timeout`.
pub(super) async fn ask(peer: SocketAddr, timeout: Duration) -> Result<OwnAnswer, PeerFault> {
    let began = AtomicBool::new(false);
    match tokio::time::timeout(timeout, exchange(peer, &began)).await {
        Ok(answer) => check(&answer?),
        Err(_) if began.load(Ordering::Relaxed) => Err(PeerFault::Slow(timeout)),
        Err(_) => Err(PeerFault::Silent(timeout)),
    }
}

async fn exchange(peer: SocketAddr, began: &AtomicBool) -> Result<Bytes, PeerFault> {
    let unreachable = |error: std::io::Error| PeerFault::Unreachable(error.to_string());
    let malformed = |error: hyper::Error| match std::error::Error::source(&error) {
        Some(source) => PeerFault::Malformed(format!("{error}: {source}")),
        None => PeerFault::Malformed(error.to_string()),
    };
    let stream = TcpStream::connect(peer).await.map_err(unreachable)?;
    // The request is one small write.
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(malformed)?;
    let request = hyper::Request::builder()
        .uri("/v1/own")
        .header(hyper::header::HOST, peer.to_string())
        .header(hyper::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| PeerFault::Malformed(error.to_string()))?;
    let talk = async {
        let response = sender.send_request(request).await.map_err(malformed)?;
        began.store(true, Ordering::Relaxed);
        if response.status() != hyper::StatusCode::OK {
            return Err(PeerFault::Refused(response.status().to_string()));
        }
        let body = Limited::new(response.into_body(), MAX_OWN).collect().await;
        body.map(|body| body.to_bytes()).map_err(|error| {
            if error.is::<LengthLimitError>() {
                PeerFault::TooLong(format!("more than {MAX_OWN} bytes"))
            } else {
                PeerFault::Malformed(error.to_string())
            }
        })
    };
    // No task of its own: with this future the connection ends, too.
    let drive = async {
        // `talk` returns its errors as well.
        let _ = connection.await;
        std::future::pending().await
    };
    tokio::select! {
        answer = talk => answer,
        never = drive => never,
    }
}

/// An answer of which everything may be used.
pub(super) fn check(body: &[u8]) -> Result<OwnAnswer, PeerFault> {
    let answer: OwnAnswer =
        serde_json::from_slice(body).map_err(|error| PeerFault::Malformed(error.to_string()))?;
    if answer.instance.is_empty() || answer.instance.len() > 64 {
        return Err(PeerFault::Malformed("no instance".to_owned()));
    }
    let too_long = |what: &str, most| Err(PeerFault::TooLong(format!("more than {most} {what}")));
    if answer.pools.len() > MOST_POOLS {
        return too_long("pools", MOST_POOLS);
    }
    if answer.pools.iter().map(|pool| pool.servers.len()).sum::<usize>() > MOST_SERVERS {
        return too_long("servers", MOST_SERVERS);
    }
    for pool in &answer.pools {
        if pool.pool.is_empty() || pool.pool.len() > dispatch_protocol::wire::MAX_NAME {
            return Err(PeerFault::Malformed("a pool without a valid name".to_owned()));
        }
        if pool.servers.iter().map(|server| server.addresses.len()).sum::<usize>() > MOST_OF_POOL {
            return too_long("addresses of a pool", MOST_OF_POOL);
        }
        for server in &pool.servers {
            if server.addresses.len() > MOST_OF_SERVER {
                return too_long("addresses of a server", MOST_OF_SERVER);
            }
            if server.gauges.len() > MOST_OF_SERVER {
                return too_long("gauges of a server", MOST_OF_SERVER);
            }
            check_server(server).map_err(PeerFault::Malformed)?;
        }
    }
    Ok(answer)
}

fn check_server(server: &ServerRecord) -> Result<(), String> {
    if server.addresses.is_empty() {
        return Err("a server without an address".to_owned());
    }
    if !server.addresses.iter().all(|address| is_advisable(address)) {
        return Err("an address that no client can connect to".to_owned());
    }
    if state_of(&server.state).is_none() {
        return Err("an unknown state".to_owned());
    }
    if !WEIGHTS.contains(&server.weight) {
        return Err("an impossible weight".to_owned());
    }
    if server.load > MAX_LOAD || server.capacity.is_some_and(|most| most > MAX_LOAD) {
        return Err("an impossible load".to_owned());
    }
    let possible = |value: f64| value.abs() <= MAX_GAUGE_VALUE;
    if !server.gauges.iter().all(|gauge| possible(gauge.value)) {
        return Err("an impossible gauge".to_owned());
    }
    Ok(())
}
