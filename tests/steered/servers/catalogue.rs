//! The servers: how each is started, and how a client is served.

use std::path::Path;
use std::process::Command;

use super::client::Speaks;

/// One kind of server. `DIR` in texts is the directory of the dispatcher, which is also the working
/// directory of the server.
pub struct Server {
    pub name: &'static str,
    pub speaks: Speaks,
    /// Programs that must exist: absolute, or in `PATH`.
    pub tools: Vec<String>,
    /// The first number that it prints is the version. A file is a part of the project: `None`.
    pub version: Option<Vec<String>>,
    pub command: Vec<String>,
    pub environment: &'static [(&'static str, &'static str)],
    /// More keys of the pool.
    pub pool: &'static str,
    /// Name and text of files that it reads.
    pub files: &'static [(&'static str, &'static str)],
    /// How it gets its address, for the table.
    pub port: &'static str,
    pub remarks: &'static str,
}

const ASGI: (&str, &str) = (
    "app.py",
    r#"
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            what = (await receive())["type"]
            await send({"type": what + ".complete"})
            if what == "lifespan.shutdown":
                return
    headers = [(b"content-length", b"3"), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok\n"})
"#,
);

const WSGI: (&str, &str) = (
    "wsgi.py",
    r#"
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "3"), ("Content-Type", "text/plain")])
    return [b"ok\n"]
"#,
);

const NODE: (&str, &str) = (
    "server.js",
    r#"
const server = require("http").createServer((request, answer) => answer.end("ok\n"));
server.keepAliveTimeout = 600000;
if (process.env.LISTEN_FD) server.listen({ fd: Number(process.env.LISTEN_FD) });
else server.listen({ port: process.env.PORT, host: process.env.HOST });
"#,
);

const NODE_CLUSTER: (&str, &str) = (
    "cluster.js",
    r#"
const cluster = require("cluster");
if (cluster.isPrimary) {
    cluster.fork();
    cluster.fork();
    process.on("SIGTERM", () => process.exit(0));
} else require("./server.js");
"#,
);

const FASTIFY: (&str, &str) = (
    "fastify.js",
    r#"
const app = require(process.argv[2])({ keepAliveTimeout: 600000 });
app.get("/", (request, reply) => reply.send("ok\n"));
app.listen({ port: process.env.PORT, host: process.env.HOST });
"#,
);

const NGINX: (&str, &str) = (
    "nginx.conf.in",
    r#"
daemon off;
pid DIR/nginx-PORT.pid;
error_log stderr warn;
worker_processes 1;
events { worker_connections 4096; }
http {
    access_log off;
    keepalive_timeout 600;
    keepalive_requests 100000;
    port_in_redirect off;
    client_body_temp_path DIR/body-PORT;
    proxy_temp_path DIR/proxy-PORT;
    fastcgi_temp_path DIR/fastcgi-PORT;
    uwsgi_temp_path DIR/uwsgi-PORT;
    scgi_temp_path DIR/scgi-PORT;
    server {
        listen ADDRESS:PORT;
        location / { return 200 "ok\n"; }
    }
}
"#,
);

const HAPROXY: (&str, &str) = (
    "haproxy.cfg",
    r#"
defaults
    mode http
    timeout client 600s
    timeout http-keep-alive 600s
frontend web
    bind "${HOST}:${PORT}"
    http-request return status 200 content-type text/plain string "ok"
"#,
);

const PAGE: (&str, &str) = ("index.html", "ok\n");

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

/// As one word in front of the words of `rest`.
fn script(script: &str, rest: &str) -> Vec<String> {
    let mut command = vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()];
    command.extend(words(rest));
    command
}

fn plain(name: &'static str, speaks: Speaks, tool: &str, command: &str) -> Server {
    Server {
        name,
        speaks,
        tools: vec![tool.to_owned()],
        version: Some(vec![tool.to_owned(), "--version".to_owned()]),
        command: words(command),
        environment: &[],
        pool: "",
        files: &[],
        port: "",
        remarks: "",
    }
}

/// uvicorn of the Python at this path.
pub fn uvicorn(python: &str, event_loop: &str) -> Server {
    let command = format!(
        "{python} -m uvicorn app:app --host {{addr}} --port {{port}} --loop {event_loop} \
         --timeout-keep-alive 600 --log-level warning --no-access-log"
    );
    let name = if event_loop == "uvloop" { "uvicorn (uvloop)" } else { "uvicorn (asyncio)" };
    Server {
        version: Some(words(&format!("{python} -m uvicorn --version"))),
        files: &[ASGI],
        port: "`--host {addr} --port {port}`",
        remarks: "keep-alive ends after 5 s by default. `--host ::` sets `IPV6_V6ONLY` (both event \
                  loops): no IPv4 clients",
        ..plain(name, Speaks::Http, python, &command)
    }
}

/// uvicorn that inherits its listener.
pub fn uvicorn_with_listener(python: &str) -> Server {
    let command = format!(
        "{python} -m uvicorn app:app --fd {{fd}} --timeout-keep-alive 600 --log-level warning \
         --no-access-log"
    );
    Server {
        version: Some(words(&format!("{python} -m uvicorn --version"))),
        files: &[ASGI],
        port: "`--fd {fd}`",
        remarks: "nothing that waits is lost when a process dies or hangs",
        ..plain("uvicorn, shared port", Speaks::Http, python, &command)
    }
}

pub fn node_with_listener() -> Server {
    Server {
        environment: &[("LISTEN_FD", "{fd}")],
        files: &[NODE],
        port: "`environment`: `LISTEN_FD = \"{fd}\"`; `server.listen({ fd })`",
        remarks: "as above",
        ..plain("Node http, shared port", Speaks::Http, "node", "node server.js")
    }
}

pub fn node() -> Server {
    Server {
        environment: &[("HOST", "{addr}"), ("PORT", "{port}")],
        files: &[NODE],
        port: "`environment`: `PORT = \"{port}\"`",
        remarks: "keep-alive ends after 5 s by default",
        ..plain("Node http", Speaks::Http, "node", "node server.js")
    }
}

pub fn nginx() -> Server {
    let generate = "sed \"s/ADDRESS/$1/; s/PORT/$2/\" DIR/nginx.conf.in > DIR/nginx-$2.conf \
                    && exec nginx -c DIR/nginx-$2.conf";
    Server {
        version: Some(words("nginx -v")),
        command: script(generate, "nginx {addr} {port}"),
        files: &[NGINX],
        port: "a configuration for each process: `sh -c 'sed … && exec nginx -c …'`",
        remarks: "`port_in_redirect off`, or redirects name the port of the process. \
                  `daemon off`; a process is a master with one worker",
        ..plain("nginx", Speaks::Http, "nginx", "")
    }
}

pub fn redis() -> Server {
    Server {
        command: [
            words("redis-server --bind {addr} --port {port} --appendonly no --loglevel warning"),
            vec!["--save".into(), String::new()],
        ]
        .concat(),
        port: "`--bind {addr} --port {port}`",
        remarks: "each process has data of its own",
        ..plain("redis", Speaks::Redis, "redis-server", "")
    }
}

pub fn http_server(python: &str) -> Server {
    let command = format!("{python} -m http.server --bind {{addr}} --protocol HTTP/1.1 {{port}}");
    Server {
        version: Some(words(&format!("{python} --version"))),
        files: &[PAGE],
        port: "`--bind {addr} {port}`",
        remarks: "a backlog of 5: SYNs of a burst are dropped and come again after 1 s, to any \
                  process. A thread for each connection",
        ..plain("Python http.server", Speaks::Http, python, &command)
    }
}

/// All of them, with what `integrations` has installed in this directory.
pub fn all(environment: &Path) -> Vec<Server> {
    let python = environment.join("bin/python").display().to_string();
    let bin = |name: &str| environment.join("bin").join(name).display().to_string();
    let fastify = environment.join("node_modules/fastify");
    let still = environment.join("static").display().to_string();
    vec![
        uvicorn(&python, "asyncio"),
        uvicorn(&python, "uvloop"),
        Server {
            files: &[WSGI],
            port: "`--bind {addr}:{port} --workers 1`",
            remarks: "worker class `gthread`; `sync` has no keep-alive, which ends after 2 s by \
                      default. A process is a master with one worker",
            ..plain(
                "gunicorn",
                Speaks::Http,
                &bin("gunicorn"),
                &format!(
                    "{} --bind {{addr}}:{{port}} --workers 1 --worker-class gthread --threads 4 \
                 --keep-alive 600 --log-level warning --no-control-socket wsgi:app",
                    bin("gunicorn")
                ),
            )
        },
        Server {
            files: &[ASGI],
            version: Some(vec![python.clone(), "-c".into(), VERSION_OF_HYPERCORN.into()]),
            port: "`--bind {addr}:{port} --workers 1`",
            remarks: "it keeps a connection that its client has ended until its keep-alive time is \
                      over, 5 s by default, and it counts for as long; clients end theirs by \
                      `Connection: close` here. A process is a parent with one worker",
            ..plain(
                "hypercorn",
                Speaks::HttpUntilAsked,
                &bin("hypercorn"),
                &format!(
                    "{} --bind {{addr}}:{{port}} --workers 1 --keep-alive 600 --log-level warning \
                 app:app",
                    bin("hypercorn")
                ),
            )
        },
        uvicorn_with_listener(&python),
        Server {
            files: &[WSGI],
            pool: "ports = \"shared\"\n",
            port: "`ports = \"shared\"`: it reads `LISTEN_FDS`",
            remarks: "as above",
            ..plain(
                "gunicorn, shared port",
                Speaks::Http,
                &bin("gunicorn"),
                &format!(
                    "{} --workers 1 --worker-class gthread --threads 4 --keep-alive 600 \
                 --log-level warning --no-control-socket wsgi:app",
                    bin("gunicorn")
                ),
            )
        },
        Server {
            files: &[ASGI],
            port: "`--host {addr} --port {port} --workers 1`",
            remarks: "a process is a parent with one worker",
            ..plain(
                "granian",
                Speaks::Http,
                &bin("granian"),
                &format!(
                    "{} --interface asgi --host {{addr}} --port {{port}} --workers 1 \
                 --log-level warning app:app",
                    bin("granian")
                ),
            )
        },
        node(),
        node_with_listener(),
        Server {
            environment: &[("HOST", "{addr}"), ("PORT", "{port}")],
            files: &[FASTIFY],
            version: Some(vec![
                "node".into(),
                "-p".into(),
                format!("require('{}/package.json').version", fastify.display()),
            ]),
            port: "`environment`: `PORT = \"{port}\"`",
            remarks: "keep-alive ends after 72 s by default",
            ..plain(
                "Fastify",
                Speaks::Http,
                "node",
                &format!("node fastify.js {}", fastify.display()),
            )
        },
        Server {
            environment: &[("HOST", "{addr}"), ("PORT", "{port}")],
            files: &[NODE, NODE_CLUSTER],
            port: "`environment`: `PORT = \"{port}\"`",
            remarks: "a process is a primary with two workers of its own, which share its \
                      connections in turn",
            ..plain("Node cluster", Speaks::Http, "node", "node cluster.js")
        },
        nginx(),
        Server {
            version: Some(words("haproxy -v")),
            environment: &[("HOST", "{addr}"), ("PORT", "{port}")],
            files: &[HAPROXY],
            port: "`environment`; `bind \"${HOST}:${PORT}\"`",
            remarks: "`-db`: it stays in the foreground",
            ..plain("HAProxy", Speaks::Http, "haproxy", "haproxy -db -f haproxy.cfg")
        },
        redis(),
        http_server(&python),
        Server {
            version: None,
            port: "arguments",
            remarks: "`static.c` beside the tests, x86-64: nothing can be preloaded into it",
            ..plain("static, without libc", Speaks::Echo, &still, &format!("{still} {{port}}"))
        },
    ]
}

const VERSION_OF_HYPERCORN: &str = "import importlib.metadata as m; print(m.version('hypercorn'))";

impl Server {
    /// The program that is not installed, if any.
    pub fn missing(&self) -> Option<&str> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let exists = |tool: &&String| {
            !std::env::split_paths(&path).any(|folder| folder.join(tool.as_str()).exists())
        };
        self.tools.iter().find(exists).map(String::as_str)
    }

    /// The first number with a dot in what it says of its version.
    pub fn version_found(&self) -> String {
        let Some(command) = &self.version else { return "–".to_owned() };
        let out = Command::new(&command[0]).args(&command[1..]).output().unwrap();
        let text = [out.stdout, out.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        let digits = |c: char| c.is_ascii_digit() || c == '.';
        let mut numbers = text.split(|c| !digits(c)).filter(|it| it.len() > 2 && it.contains('.'));
        numbers.next().unwrap_or("?").to_owned()
    }

    /// The pool's `spawn` with four processes.
    pub fn spawn(&self) -> String {
        let quoted: Vec<String> = self.command.iter().map(|word| format!("{word:?}")).collect();
        let variables: Vec<String> =
            self.environment.iter().map(|(name, value)| format!("{name} = {value:?}")).collect();
        format!(
            "[pool.web.spawn]\nprocesses = 4\ndirectory = \"DIR\"\ncommand = [{}]\n\
             environment = {{ {} }}\n",
            quoted.join(", "),
            variables.join(", ")
        )
    }
}
