//! The real HAProxy in front of the dispatcher, with `send-proxy` and `send-proxy-v2`.

use std::process::{Command, Stdio};

use super::*;

/// HAProxy's program, if it is installed.
fn program() -> Option<&'static str> {
    let found = ["/usr/sbin/haproxy", "/usr/local/sbin/haproxy"]
        .into_iter()
        .find(|path| std::path::Path::new(path).exists());
    if found.is_none() {
        skip("needs HAProxy (Debian's package haproxy)");
    }
    found
}

#[test]
fn clients_of_the_real_haproxy_are_known() {
    let Some(program) = program() else { return };
    let dispatcher = Dispatcher::start(&config("127.0.0.1:0", "", ""));
    let (_worker, told) = watching_worker(&dispatcher);
    let to = dispatcher.address("web");
    let (first, second) = (free_address(), free_address());
    let file = dispatcher.dir.join("haproxy.cfg");
    let text = format!(
        "global\n  maxconn 100\ndefaults\n  mode tcp\n  timeout connect 10s\n  timeout client 60s\n  \
         timeout server 60s\n\
         listen one\n  bind {first}\n  server a {to} send-proxy\n\
         listen two\n  bind {second}\n  unique-id-format id-%pid\n  \
         server a {to} send-proxy-v2 proxy-v2-options crc32c,unique-id check inter 200ms\n"
    );
    std::fs::write(&file, text).unwrap();
    let log = std::fs::File::create(dispatcher.dir.join("haproxy-log")).unwrap();
    let mut command = Command::new(program);
    command.args(["-db", "-f"]).arg(&file).stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log);
    let mut haproxy = Process::start("haproxy", &mut command);
    for (at, tlvs) in [(first, false), (second, true)] {
        let mut stream = wait_for("HAProxy to listen", || {
            assert!(haproxy.running(), "HAProxy has ended");
            TcpStream::connect(at).ok()
        });
        stream.write_all(b"through HAProxy").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let client = stream.local_addr().unwrap().to_string();
        // HAProxy also checks the server, with LOCAL.
        let seen = loop {
            let seen = told.recv_timeout(PATIENCE).unwrap();
            if !seen.local {
                break seen;
            }
        };
        assert_eq!((seen.client, seen.bytes), (client, b"through HAProxy".to_vec()));
        let kinds: Vec<u8> = seen.tlvs.iter().map(|(kind, _)| *kind).collect();
        let unique_id = seen.tlvs.iter().any(|(kind, id)| *kind == 5 && id.starts_with(b"id-"));
        assert_eq!((kinds.contains(&3), unique_id), (tlvs, tlvs), "{kinds:?}");
    }
    let check = loop {
        let seen = told.recv_timeout(PATIENCE).unwrap();
        if seen.local {
            break seen;
        }
    };
    assert_eq!(check.proxy.unwrap().to_string(), check.client, "a check has the proxy's address");
    let status = dispatcher.status();
    let failed = |reason: &str| status.closed[reason];
    assert_eq!(failed("proxy_malformed") + failed("proxy_missing") + failed("proxy_untrusted"), 0);
}
