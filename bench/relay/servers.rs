//! The servers of the contenders, each in a directory of this run.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Servers {
    children: Vec<Child>,
    dir: PathBuf,
    nats: String,
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Servers {
    /// Starts `dispatch-directory`, which was built beside this program, `redis-server` and
    /// `nats-server`, and waits until they listen.
    pub fn start() -> Servers {
        let dir = std::env::temp_dir().join(format!("relay-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut servers = Servers { children: Vec::new(), nats: format!("127.0.0.1:{port}"), dir };
        let program = std::env::current_exe().unwrap();
        let program = program.parent().and_then(|path| path.parent()).unwrap();
        let config = servers.dir.join("directory.toml");
        let socket = servers.dir.join("relay.sock");
        std::fs::write(&config, format!("socket = \"{}\"\n", socket.display())).unwrap();
        let mut directory = Command::new(program.join("dispatch-directory"));
        servers.run(directory.arg("--config").arg(config));
        let redis = servers.dir.join("redis.sock");
        let mut server = Command::new("redis-server");
        server.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]);
        // Without a limit it would drop the subscriber instead of messages.
        server.arg(&redis).args(["--client-output-buffer-limit", "pubsub 0 0 0"]);
        servers.run(&mut server);
        let nats = cfg!(feature = "nats");
        if nats {
            let mut server = Command::new("nats-server");
            server.args(["--addr", "127.0.0.1", "--port", &port.to_string()]);
            // The same for its slow consumers.
            let config = servers.dir.join("nats.conf");
            std::fs::write(&config, "max_pending: 2GB\nwrite_deadline: \"60s\"\n").unwrap();
            servers.run(server.arg("--config").arg(config));
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        let up = |servers: &Servers| {
            socket.exists()
                && redis.exists()
                && (!nats || std::net::TcpStream::connect(&servers.nats).is_ok())
        };
        while !up(&servers) {
            assert!(Instant::now() < deadline, "a server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        servers
    }

    fn run(&mut self, command: &mut Command) {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn();
        let program = command.get_program().to_string_lossy().into_owned();
        self.children.push(child.unwrap_or_else(|error| panic!("{program}: {error}")));
    }

    /// The kind of receiver of a contender, and the address of its server.
    pub fn of(&self, contender: &str) -> (&'static str, String) {
        let path = |name: &str| self.dir.join(name).display().to_string();
        match contender {
            "redis" => ("redis", path("redis.sock")),
            "nats" | "nats-request" => ("nats", self.nats.clone()),
            _ => ("relay", path("relay.sock")),
        }
    }
}
