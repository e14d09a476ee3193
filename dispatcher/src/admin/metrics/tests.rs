use super::*;
use crate::api::advice::{AddressRecord, AdvicePoolStatus, AdviceStatus, PeerStatus};
use crate::api::status::{AgentStatus, HostDrainStatus, LeavingStatus, RollStatus};
use crate::api::status::{Distribution, ListenerStatus, Meters, ProcessesStatus};
use crate::api::status::{LineStatus, LineWorkerStatus, ProxyHeadersStatus};
use crate::api::status::{NotSteered, SteerStatus, SteerWorkerStatus};

fn status(workers: u64) -> Status {
    let worker = |id| WorkerStatus {
        id,
        name: "a\"b\\c\nd".to_owned(),
        state: "active".to_owned(),
        load: 10,
        ..WorkerStatus::default()
    };
    let mut histogram =
        dispatcher_core::histogram::Histogram::new(dispatcher_core::histogram::HANDOFF);
    histogram.record(std::time::Duration::from_micros(15));
    histogram.record(std::time::Duration::from_secs(60));
    let pool = PoolStatus {
        name: "web".to_owned(),
        state: "ready".to_owned(),
        taken: 5,
        handoff: (&histogram).into(),
        workers: (1..=workers).map(worker).collect(),
        ..PoolStatus::default()
    };
    Status { pools: vec![pool], version: "1.2.3".to_owned(), ..Status::default() }
}

const RELOAD: LastReload = LastReload { successful: true, success_at: 1_700_000_000.5 };

fn text(workers: u64, max_workers: usize) -> String {
    let status = Arc::new(status(workers));
    openmetrics(Snapshot { status, last_reload: RELOAD, max_workers }, Process::read())
}

#[test]
fn openmetrics_and_plain_text_format() {
    let open = text(1, 10);
    assert!(open.ends_with("# EOF\n"));
    assert!(open.contains("# TYPE dispatcher_pool_taken_connections counter\n"), "{open}");
    assert!(open.contains("\ndispatcher_pool_taken_connections_total{pool=\"web\"} 5\n"));
    assert!(open.contains("# UNIT dispatcher_handoff_latency_seconds seconds\n"));
    let bucket = "dispatcher_handoff_latency_seconds_bucket";
    assert!(open.contains(&format!("{bucket}{{le=\"0.00001\",pool=\"web\"}} 0\n")), "{open}");
    assert!(open.contains(&format!("{bucket}{{le=\"0.00002\",pool=\"web\"}} 1\n")));
    assert!(open.contains(&format!("{bucket}{{le=\"+Inf\",pool=\"web\"}} 2\n")));
    assert!(open.contains("dispatcher_handoff_latency_seconds_sum{pool=\"web\"} 60.000015\n"));

    let plain = plain(&open);
    assert!(plain.contains("# TYPE dispatcher_pool_taken_connections_total counter\n"));
    assert!(plain.contains("# HELP dispatcher_pool_taken_connections_total Connections taken"));
    assert!(!plain.contains("# EOF") && !plain.contains("# UNIT"));
    let samples = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(samples(&open), samples(&plain));
}

#[test]
fn names_cannot_break_a_line() {
    let open = text(1, 10);
    assert!(open.contains(
        "dispatcher_worker_live_connections{pool=\"web\",worker=\"a\\\"b\\\\c\\nd\",id=\"1\"} 10\n"
    ), "{open}");
}

#[test]
fn series_of_workers_are_bounded() {
    let open = text(20, 3);
    let lines = |start: &str| open.lines().filter(|line| line.starts_with(start)).count();
    assert_eq!(lines("dispatcher_worker_live_connections{"), 3);
    assert_eq!(lines("dispatcher_worker_state{"), 3);
    // The number of series per worker that the documentation states.
    let own = open.lines().filter(|line| line.contains(",id=\"1\"")).count();
    let docs = include_str!("../../../../docs/METRICS.md");
    assert!(docs.contains(&format!("{own} series each")), "{own}");
    let bound = own * crate::config::Limits::default().metrics_max_workers as usize;
    let said = format!("at most {},{:03} series", bound / 1000, bound % 1000);
    assert!(docs.contains(&said), "{said}");
    assert_eq!(own, 9, "etc/dispatcher.toml says so in words");
    assert!(
        include_str!("../../../../etc/dispatcher.toml").contains("Each worker has nine series.")
    );
    assert!(open.contains("dispatcher_workers_not_shown{pool=\"web\"} 17\n"));
    // The sums of the pool include all workers.
    assert!(open.contains("dispatcher_live_connections{pool=\"web\"} 200\n"));
    let none = text(20, 0);
    assert!(!none.contains("dispatcher_worker_"), "{none}");
    assert!(none.contains("dispatcher_workers_not_shown{pool=\"web\"} 20\n"));
}

/// All numbers differ, so that no metric can show another one's value, or zero.
#[test]
fn each_status_field_has_its_own_metric() {
    let histogram = |count| Distribution {
        up_to_nanoseconds: vec![1_000_000_000],
        counts: vec![count, 1],
        sum_nanoseconds: 5_000_000_000,
    };
    let worker = WorkerStatus {
        id: 31,
        name: "w".to_owned(),
        state: "suspect".to_owned(),
        load: 19,
        in_flight: 20,
        max_connections: 21,
        weight: 22,
        taken: 23,
        finished: 24,
        revoked: 25,
        channel_full: 26,
        not_scored: Some("gauge queue_wait never set".to_owned()),
        line: Some(LineWorkerStatus { unread: 85, ..LineWorkerStatus::default() }),
        steer: Some(SteerWorkerStatus { pending: 97, queued: 98, ..SteerWorkerStatus::default() }),
        ..WorkerStatus::default()
    };
    let agent = AgentStatus {
        listen: vec!["10.0.0.1:9902".to_owned()],
        answer: "ready up 85% maxconn:300".to_owned(),
        answers: [("down", 86), ("drain", 87), ("ready", 88)]
            .map(|(name, count)| (name.to_owned(), count))
            .into(),
        refused: 89,
    };
    let pool = PoolStatus {
        name: "p".to_owned(),
        agent: Some(agent),
        steer: Some(SteerStatus {
            attached: true,
            pinned: false,
            hashed: None,
            not_pinned: None,
            error: Some("no right".to_owned()),
            chosen: 92,
            dropped_full: 93,
            dropped_no_worker: 94,
            refused: 95,
            failed: 96,
            not_steered: vec![NotSteered::default(); 3],
        }),
        policy: "least-score".to_owned(),
        state: "back-pressure".to_owned(),
        queued: 11,
        taken: 12,
        revoked: 13,
        lost: 14,
        suspects: 15,
        returned: 0,
        channel_full: 16,
        processes: Some(ProcessesStatus {
            wanted: 71,
            active: 72,
            starting: 73,
            leaving: 74,
            outdated: 78,
            restarts: 52,
            replaced: 75,
            ended_late: 76,
            ended_hung: 77,
            crash_loop: true,
            next_start_in_ms: None,
            generation: 79,
            restart_needed: true,
            roll: Some(RollStatus { state: "stopped".to_owned(), ..RollStatus::default() }),
            leaving_generations: vec![
                LeavingStatus { generation: 1, processes: 1, connections: 80 },
                LeavingStatus { generation: 2, processes: 1, connections: 1 },
            ],
            ready_checks_passed: 82,
            ready_checks_failed: 83,
        }),
        joined: 17,
        gone: 18,
        handoff: histogram(32),
        affinity: Some(AffinityStatus {
            key: "client-ip".to_owned(),
            entries: 35,
            awaiting: 36,
            hits: 37,
            misses: 38,
            moved: 39,
            routed: 40,
            unknown: 41,
            timed_out: 42,
            not_awaited: 43,
            claimed: 44,
            evicted: 45,
        }),
        workers: vec![worker],
    };
    let listener = ListenerStatus {
        name: "l".to_owned(),
        pool: "p".to_owned(),
        state: "paused".to_owned(),
        accepted: 8,
        closed: [("denied".to_owned(), 9)].into(),
        tracked_clients: 10,
        proxy_headers: Some(ProxyHeadersStatus { from: Vec::new(), awaited: 57, read: 58 }),
        ..ListenerStatus::default()
    };
    let status = Status {
        version: "1.2.3".to_owned(),
        uptime_seconds: 30,
        stopping: true,
        draining: Some(HostDrainStatus {
            state: "draining".to_owned(),
            ..HostDrainStatus::default()
        }),
        accepted: 46,
        returned: 86,
        queued: 47,
        in_flight: 48,
        taken: 49,
        closed: [("no_worker".to_owned(), 50)].into(),
        ended_at_deadline: 51,
        meters: Meters {
            decision: histogram(33),
            turn: histogram(34),
            accept_pauses: 3,
            workers_refused: 4,
            log_lines_dropped: 5,
            log_lines_limited: 6,
            process_output_lost: 56,
            closing: 53,
            closes_interrupted: 54,
            closes_left_out: 55,
            residual: -7,
        },
        listeners: vec![listener],
        pools: vec![pool],
        line: Some(LineStatus {
            exact: true,
            reason: None,
            overruns: 87,
            tracked: 88,
            reports: 89,
            recovered: 90,
            unread_closed: 91,
        }),
        advice: Some(AdviceStatus {
            requests: [("best".to_owned(), 81)].into(),
            refused: [("denied".to_owned(), 82)].into(),
            left_out: [("own".to_owned(), 85)].into(),
            peers: vec![PeerStatus {
                address: "10.0.0.2:1".to_owned(),
                state: "itself".to_owned(),
                failures: [("silent".to_owned(), 83)].into(),
                ..PeerStatus::default()
            }],
            pools: vec![AdvicePoolStatus {
                pool: "p".to_owned(),
                addresses: vec![
                    AddressRecord {
                        state: "full".to_owned(),
                        ..AddressRecord::default()
                    };
                    84
                ],
            }],
            ..AdviceStatus::default()
        }),
        ..Status::default()
    };
    let process = Process {
        cpu_seconds: 1.25,
        start_seconds: 1_600_000_000.5,
        open_fds: 27,
        max_fds: 28,
        resident_bytes: 29,
        virtual_bytes: 30,
    };
    let status = Arc::new(status);
    let text = openmetrics(Snapshot { status, last_reload: RELOAD, max_workers: 1 }, process);
    let samples: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.contains("_bucket{"))
        .map(|line| line.strip_prefix("dispatcher_").unwrap_or(line))
        .collect();
    let expected = r#"process_cpu_seconds_total 1.25
process_start_time_seconds 1600000000.5
process_open_fds 27
process_max_fds 28
process_resident_memory_bytes 29
process_virtual_memory_bytes 30
build_info{version="1.2.3"} 1
uptime_seconds 30
stopping 1
connections_accepted_total 46
connections_returned_total 86
connections_queued 47
connections_in_flight 48
connections_taken_total 49
connections_closed_total{reason="no_worker"} 50
ended_connections_total 51
conservation_residual -7
decision_seconds_sum{} 5.0
decision_seconds_count{} 34
turn_seconds_sum{} 5.0
turn_seconds_count{} 35
accept_pauses_total 3
workers_refused_total 4
closing_descriptors 53
closes_interrupted_total 54
closes_left_out_total 55
log_lines_dropped_total 5
log_lines_limited_total 6
process_output_lost_lines_total 56
config_last_reload_successful 1
config_last_reload_success_timestamp_seconds 1700000000.5
listener_accepted_connections_total{listener="l",pool="p"} 8
listener_closed_connections_total{listener="l",pool="p",reason="denied"} 9
listener_state{listener="l",pool="p",state="accepting"} 0
listener_state{listener="l",pool="p",state="paused"} 1
listener_state{listener="l",pool="p",state="refusing"} 0
listener_state{listener="l",pool="p",state="steered"} 0
listener_state{listener="l",pool="p",state="closed"} 0
tracked_clients{listener="l",pool="p"} 10
awaited_proxy_headers{listener="l",pool="p"} 57
proxy_headers_total{listener="l",pool="p"} 58
pool_state{pool="p",state="ready"} 0
pool_state{pool="p",state="back-pressure"} 1
pool_state{pool="p",state="no-worker"} 0
pool_state{pool="p",state="refusing"} 0
pool_queued_connections{pool="p"} 11
pool_in_flight_connections{pool="p"} 20
pool_taken_connections_total{pool="p"} 12
revoked_connections_total{pool="p"} 13
lost_connections_total{pool="p"} 14
suspects_total{pool="p"} 15
channel_full_total{pool="p"} 16
processes{pool="p",state="wanted"} 71
processes{pool="p",state="active"} 72
processes{pool="p",state="starting"} 73
processes{pool="p",state="leaving"} 74
processes{pool="p",state="outdated"} 78
process_restarts_total{pool="p"} 52
processes_replaced_total{pool="p"} 75
processes_stopped_total{pool="p",reason="late"} 76
processes_stopped_total{pool="p",reason="hung"} 77
process_crash_loop{pool="p"} 1
pool_generation{pool="p"} 79
pool_restart_needed{pool="p"} 1
rolls{pool="p",state="progressing"} 0
rolls{pool="p",state="stopped"} 1
rolls{pool="p",state="done"} 0
leaving_generations{pool="p"} 2
leaving_generation_connections{pool="p"} 81
ready_checks_total{pool="p",result="passed"} 82
ready_checks_total{pool="p",result="failed"} 83
workers_joined_total{pool="p"} 17
workers_gone_total{pool="p"} 18
workers{pool="p",state="active"} 0
workers{pool="p",state="suspect"} 1
workers{pool="p",state="draining"} 0
live_connections{pool="p"} 19
capacity_connections{pool="p"} 21
workers_not_scored{pool="p"} 1
awaited_connections{pool="p"} 36
affinity_entries{pool="p"} 35
affinity_connections_total{pool="p",result="hit"} 37
affinity_connections_total{pool="p",result="miss"} 38
affinity_connections_total{pool="p",result="moved"} 39
affinity_connections_total{pool="p",result="routed"} 40
affinity_connections_total{pool="p",result="unknown"} 41
affinity_claimed_total{pool="p"} 44
affinity_evicted_total{pool="p"} 45
peeks_failed_total{pool="p",reason="timed_out"} 42
peeks_failed_total{pool="p",reason="not_awaited"} 43
handoff_latency_seconds_sum{pool="p"} 5.0
handoff_latency_seconds_count{pool="p"} 33
advice_requests_total{request="best"} 81
advice_refused_total{reason="denied"} 82
advice_left_out_total{what="own"} 85
advice_addresses{pool="p",state="ok"} 0
advice_addresses{pool="p",state="full"} 84
advice_addresses{pool="p",state="draining"} 0
advice_addresses{pool="p",state="refusing"} 0
advice_addresses{pool="p",state="unserved"} 0
advice_peer_up{peer="10.0.0.2:1"} 1
advice_peer_failures_total{peer="10.0.0.2:1",reason="silent"} 83
host_state{state="serving"} 0
host_state{state="announced"} 0
host_state{state="draining"} 1
host_state{state="drained"} 0
agent_capacity_percent{pool="p"} 85
agent_answers_total{pool="p",answer="down"} 86
agent_answers_total{pool="p",answer="drain"} 87
agent_answers_total{pool="p",answer="ready"} 88
agent_refused_connections_total{pool="p"} 89
line_loads_exact 1
line_overruns_total 87
line_tracked_sockets 88
line_reports_total 89
line_recovered_connections_total 90
line_workers{pool="p"} 1
line_unread_connections{pool="p"} 85
steer_attached{pool="p"} 1
steer_pinned{pool="p"} 0
steer_failing{pool="p"} 1
steer_chosen_connections_total{pool="p"} 92
steer_dropped_syns_total{pool="p",reason="full"} 93
steer_dropped_syns_total{pool="p",reason="no_worker"} 94
steer_refused_syns_total{pool="p"} 95
steer_failed_choices_total{pool="p"} 96
steer_not_steered_workers{pool="p"} 3
steer_pending_connections{pool="p"} 97
steer_unaccepted_connections{pool="p"} 98
workers_not_shown{pool="p"} 0
worker_state{pool="p",worker="w",id="31",state="suspect"} 1
worker_live_connections{pool="p",worker="w",id="31"} 19
worker_in_flight_connections{pool="p",worker="w",id="31"} 20
worker_max_connections{pool="p",worker="w",id="31"} 21
worker_weight{pool="p",worker="w",id="31"} 22
worker_taken_connections_total{pool="p",worker="w",id="31"} 23
worker_finished_connections_total{pool="p",worker="w",id="31"} 24
worker_revoked_connections_total{pool="p",worker="w",id="31"} 25
worker_channel_full_total{pool="p",worker="w",id="31"} 26"#;
    assert_eq!(samples, expected.lines().collect::<Vec<_>>());
}

/// A steered pool needs root, so the test that reads a running dispatcher has none.
#[test]
fn the_metrics_of_steered_pools_are_documented() {
    let mut status = status(1);
    assert!(!text(1, 1).contains("dispatcher_steer_"), "no series without a steered pool");
    status.pools[0].steer = Some(SteerStatus::default());
    let status = Arc::new(status);
    let open =
        openmetrics(Snapshot { status, last_reload: RELOAD, max_workers: 1 }, Process::read());
    let docs = include_str!("../../../../docs/METRICS.md");
    let rows: Vec<&str> =
        docs.lines().filter(|line| line.starts_with("| `dispatcher_steer_")).collect();
    let text = plain(&open);
    let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE dispatcher_steer_"));
    let mut families = 0;
    for (name, kind) in kinds.filter_map(|line| line.split_once(' ')) {
        families += 1;
        let sample =
            text.lines().find(|line| line.starts_with(&format!("dispatcher_steer_{name}{{")));
        let inside = sample.and_then(|sample| sample.split(['{', '}']).nth(1)).unwrap_or_default();
        let labels: Vec<&str> = inside.split(',').filter_map(|it| it.split('=').next()).collect();
        let start = format!("| `dispatcher_steer_{name}` | {kind} | {} |", labels.join(", "));
        assert!(rows.iter().any(|row| row.starts_with(&start)), "{start}");
    }
    assert_eq!(families, rows.len());
}
