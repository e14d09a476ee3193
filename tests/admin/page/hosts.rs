//! The sections about several hosts: the drain of this one, agents, PROXY headers.

use dispatcher::api::status::{
    AgentStatus, HostDrainStatus, NotSteered, ProxyHeadersStatus, SteerStatus, SteerWorkerStatus,
};

use super::*;

const PARTS: [&str; 3] = ["host-drain", "agents-section", "proxy-section"];

fn is_hidden(part: &str) -> String {
    format!("document.getElementById('{part}').hidden")
}

#[test]
fn agents_drains_and_headers_are_shown_and_nothing_without_them() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    for part in PARTS {
        assert_eq!(browser.value(&is_hidden(part)), true, "{part}");
    }
    let mut status = crowd(3);
    status.draining = Some(HostDrainStatus {
        state: "announced".to_owned(),
        seconds: 2,
        begins_in_ms: 3_200,
        deadline_in_ms: Some(605_000),
        connections: 1_234,
    });
    let counts = |list: &[(&str, u64)]| {
        list.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    };
    status.pools[0].agent = Some(AgentStatus {
        listen: vec!["10.0.0.1:9902".to_owned()],
        answer: "down # no usable worker".to_owned(),
        answers: counts(&[("ready", 1_000), ("drain", 20), ("down", 3)]),
        refused: 4,
    });
    status.listeners = vec![
        ListenerStatus {
            name: HOSTILE.to_owned(),
            closed: counts(&[
                ("proxy_missing", 1),
                ("proxy_untrusted", 2),
                ("proxy_malformed", 3),
                ("proxy_too_long", 4),
                ("proxy_timeout", 5),
            ]),
            proxy_headers: Some(ProxyHeadersStatus {
                from: vec!["10.0.0.0/24".to_owned(), "::1/128".to_owned()],
                awaited: 6,
                read: 7_000,
            }),
            ..ListenerStatus::default()
        },
        ListenerStatus { name: "plain".to_owned(), ..ListenerStatus::default() },
        ListenerStatus {
            name: "unix".to_owned(),
            proxy_headers: Some(ProxyHeadersStatus::default()),
            ..ListenerStatus::default()
        },
    ];
    pretend(&mut browser, &status);
    for part in PARTS {
        browser.wait_true(&format!("!{}", is_hidden(part)));
    }
    let drain = browser.text("document.getElementById('host-drain').innerText");
    assert_eq!(
        drain,
        "Draining host: announced, 1,234 connections left, workers get connections for 4 s more, \
         the remaining ones are ended in 10 min 5 s."
    );
    assert!(browser.text("document.getElementById('about').innerText").contains(", draining host"));
    let agents = cells(&mut browser, "agents");
    let answer = "▲ down # no usable worker";
    assert_eq!(
        agents,
        [[&*status.pools[0].name, "10.0.0.1:9902", answer, "1,000", "20", "3", "4"]]
    );
    let proxies = cells(&mut browser, "proxies");
    let numbers = ["7,000", "6", "1", "2", "3", "4", "5"];
    assert_eq!(proxies[0][..2], [HOSTILE, "10.0.0.0/24, ::1/128"]);
    assert_eq!(proxies[0][2..], numbers);
    assert_eq!(proxies[1][..2], ["unix", "all clients of the socket"]);
    assert_eq!(proxies.len(), 2);
    pretend(&mut browser, &crowd(3));
    for part in PARTS {
        browser.wait_true(&is_hidden(part));
    }
    assert_eq!(browser.complaints, [] as [Value; 0]);
}

#[test]
fn steered_pools_are_shown_and_nothing_without_them() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    assert_eq!(browser.value(&is_hidden("steer-section")), true);
    let mut status = crowd(2);
    let pool = &mut status.pools[0];
    pool.steer = Some(SteerStatus {
        attached: true,
        not_pinned: Some("no bpffs".to_owned()),
        chosen: 1_234,
        dropped_full: 1,
        dropped_no_worker: 2,
        refused: 3,
        failed: 4,
        not_steered: vec![NotSteered {
            name: HOSTILE.to_owned(),
            address: "127.0.0.1:9001".to_owned(),
            problem: "MPTCP".to_owned(),
        }],
        ..SteerStatus::default()
    });
    let address = "127.0.0.1:9000".to_owned();
    pool.workers[0].pid = 0;
    pool.workers[0].steer =
        Some(SteerWorkerStatus { address: address.clone(), ..SteerWorkerStatus::default() });
    pool.workers[1].steer = Some(SteerWorkerStatus {
        address,
        problem: Some("MPTCP".to_owned()),
        ..SteerWorkerStatus::default()
    });
    pretend(&mut browser, &status);
    browser.wait_true(&format!("!{}", is_hidden("steer-section")));
    let faults = format!("no bpffs; {HOSTILE} at 127.0.0.1:9001: MPTCP");
    assert_eq!(
        cells(&mut browser, "steers"),
        [[&*status.pools[0].name, "attached", "1,234", "1", "2", "3", "4", &faults]]
    );
    let workers = browser.text("document.getElementById('workers').innerText");
    assert!(workers.contains("pid –, steered at 127.0.0.1:9000"), "{workers}");
    assert!(workers.contains(", not steered at 127.0.0.1:9000: MPTCP"), "{workers}");
    pretend(&mut browser, &crowd(2));
    browser.wait_true(&is_hidden("steer-section"));
    assert_eq!(browser.complaints, [] as [Value; 0]);
}
