//! Proxies that copy every byte: HAProxy and nginx, in front of the same workers, each on a port of
//! its own.

use std::fmt::Write;
use std::io;
use std::net::SocketAddr;

use super::{Running, Setup, ourselves, program};
use crate::load::{Process, Role};
use crate::worker::Kind;
use crate::{machine, socket};

/// Starts the workers behind a proxy.
fn backends(running: &mut Running, kind: Kind, setup: &Setup) -> io::Result<Vec<SocketAddr>> {
    let mut addresses = Vec::new();
    for index in 0..setup.workers {
        let address = socket::free_address()?;
        let mut command = ourselves()?;
        command.args(["worker", "--source", "reuse-port", "--kind", kind.name()]);
        command.args(["--serve", setup.serve.name(), "--listen", &address.to_string()]);
        if index < setup.workers / 4 {
            command.arg("--delay").arg(setup.delay.as_micros().to_string());
        }
        running.start_ready(Role::Worker, command.arg(index.to_string()), 1)?;
        addresses.push(address);
    }
    Ok(addresses)
}

fn installed(name: &str) -> io::Result<std::path::PathBuf> {
    machine::find_program(name).ok_or_else(|| io::ErrorKind::NotFound.into())
}

pub(super) fn haproxy(running: &mut Running, kind: Kind, setup: &Setup) -> io::Result<()> {
    let backends = backends(running, kind, setup)?;
    let front = socket::free_address()?;
    running.addresses.push(front);
    let mut config = format!(
        "global\n maxconn 9000\n\
         defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n\
         listen web\n bind {front} backlog {}\n balance leastconn\n",
        socket::BACKLOG
    );
    for (number, backend) in backends.iter().enumerate() {
        let _ = writeln!(config, " server s{number} {backend}");
    }
    let file = running.path("haproxy.cfg");
    std::fs::write(&file, config)?;
    let child =
        program(&installed("haproxy")?)?.arg("-db").arg("-q").arg("-f").arg(&file).spawn()?;
    running.add_child(Role::Front, child)?;
    Ok(())
}

pub(super) fn nginx(running: &mut Running, kind: Kind, setup: &Setup) -> io::Result<()> {
    let backends = backends(running, kind, setup)?;
    let front = socket::free_address()?;
    running.addresses.push(front);
    let mut servers = String::new();
    for backend in &backends {
        let _ = write!(servers, "server {backend}; ");
    }
    let binary = installed("nginx")?;
    // Distributions that build it as a module have sbin/nginx and lib/nginx/modules.
    let prefix = binary.parent().and_then(std::path::Path::parent);
    let module = prefix
        .map(|prefix| prefix.join("lib/nginx/modules/ngx_stream_module.so"))
        .filter(|file| file.is_file())
        .map_or(String::new(), |file| format!("load_module {};\n", file.display()));
    let config = format!(
        "{module}daemon off; master_process on; worker_processes 2; worker_rlimit_nofile 20000;\n\
         pid {:?}; error_log /dev/null;\n\
         events {{ worker_connections 18000; }}\n\
         stream {{ upstream web {{ least_conn; zone web 64k; {servers}}}\n\
         server {{ listen {front} backlog={}; tcp_nodelay on; proxy_timeout 1h; proxy_pass web; }} }}\n",
        running.path("nginx.pid"),
        socket::BACKLOG
    );
    let file = running.path("nginx.conf");
    std::fs::write(&file, config)?;
    let mut command = program(&binary)?;
    command.arg("-p").arg(running.directory.path()).arg("-e").arg("/dev/null").arg("-c").arg(&file);
    running.add_child(Role::Front, command.spawn()?)?;
    let master = running.processes.last().map_or(0, |process| process.pid);
    // The proxy's own workers start a moment later.
    let deadline = std::time::Instant::now() + super::PATIENCE;
    while machine::children(master).len() < 2 && std::time::Instant::now() < deadline {
        running.check_alive()?;
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let children = machine::children(master).into_iter();
    running.processes.extend(children.map(|pid| Process { role: Role::Front, pid }));
    Ok(())
}
