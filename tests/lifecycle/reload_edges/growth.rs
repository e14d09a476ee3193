//! Many reloads leave neither memory nor work behind.

use super::*;

/// Reloads in one part of the test.
const PART: usize = 80;

/// Parts; the first is the warm-up.
const PARTS: usize = 8;

/// The figures after a part.
#[derive(Debug)]
struct Part {
    /// Resident memory, in KiB.
    resident: u64,
    /// Processor time of the hot thread for one reload; other programs do not lengthen it.
    cost: Duration,
}

fn resident(dispatcher: &Dispatcher) -> u64 {
    let path = format!("/proc/{}/status", dispatcher.process.pid());
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Processor time of the hot thread.
fn busy(dispatcher: &Dispatcher) -> Duration {
    let pid = dispatcher.process.pid();
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

fn reload_now(dispatcher: &Dispatcher, body: &str) {
    write_config(&dispatcher.dir, body);
    let mut stream = UnixStream::connect(dispatcher.admin()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request =
        "POST /v1/reload HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn memory_and_work_do_not_grow_with_the_number_of_reloads() {
    let base = format!("{}[pool.web]\n", listener("web", "127.0.0.1:0", "web", ""));
    let dispatcher = Dispatcher::start(&base);
    let _worker = dispatcher.worker("blocking", "web", "one");
    dispatcher.wait_joined("web", 1);
    let address = dispatcher.address("web");
    let mut number = 0;
    let mut parts: Vec<Part> = Vec::new();
    for _ in 0..PARTS {
        let began = busy(&dispatcher);
        for _ in 0..PART / 2 {
            number += 1;
            // New names each time, as in a deployment that numbers its pools.
            let more = format!(
                "{}{}[pool.extra{number}]\n[pool.extra{number}.affinity]\nkey = \"client-ip\"\n",
                listener(&format!("extra{number}"), "127.0.0.1:0", &format!("extra{number}"), ""),
                listener(
                    &format!("local{number}"),
                    &format!("unix:DIR/local{number}.sock"),
                    "web",
                    ""
                ),
            );
            reload_now(&dispatcher, &format!("{more}{}", base));
            reload_now(&dispatcher, &base);
        }
        let cost = (busy(&dispatcher) - began) / PART as u32;
        Client::connect(address).unwrap().echo("served");
        // The last reload is complete.
        let status = dispatcher.wait_status("the listeners to be gone", |s| s.listeners.len() == 1);
        assert_eq!(status.pools.len(), 1);
        parts.push(Part { resident: resident(&dispatcher), cost });
    }
    let least = |parts: &[Part]| parts.iter().map(|part| part.cost).min().unwrap();
    let (first, last) = (&parts[1], &parts[PARTS - 1]);
    // 4 KiB for each reload would exceed this.
    assert!(last.resident < first.resident + 1024, "{parts:#?}");
    // With 640 reloads, work that grows with their number would exceed this many times over.
    assert!(least(&parts[PARTS - 2..]) < least(&parts[..2]) * 3, "{parts:#?}");
}
