//! Runs a directory: signals, the runtime, and the word to the service manager.

use std::io;
use std::os::unix::net::UnixDatagram;

use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// The socket cannot be bound, the key cannot be read, or the runtime cannot start.
pub fn run(config: Config) -> io::Result<()> {
    serve(config, std::future::pending())
}

/// Like [`run`], and until the end of `input`, whose other end the process that has started this
/// one keeps open.
///
/// # Errors
/// As [`run`]; or no thread can be started.
pub fn run_until_end_of(
    config: Config,
    mut input: impl io::Read + Send + 'static,
) -> io::Result<()> {
    let (ended, end) = tokio::sync::oneshot::channel();
    // A blocking read, because not every input can be waited for otherwise.
    std::thread::Builder::new().name("input".to_owned()).spawn(move || {
        let _ = io::copy(&mut input, &mut io::sink());
        let _ = ended.send(());
    })?;
    serve(config, async {
        let _ = end.await;
    })
}

fn serve(config: Config, end: impl Future<Output = ()>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shown = config.socket.display().to_string();
        let host = config.host.clone();
        let ready = move || {
            log::info!("event=directory_ready socket={shown} host={host}");
            notify(b"READY=1\n");
        };
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                () = end => {}
            }
            log::info!("event=directory_stops");
            notify(b"STOPPING=1\n");
        };
        crate::server::serve(config, ready, stop).await
    })
}

/// Tells the service manager, if there is one.
fn notify(state: &[u8]) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = UnixDatagram::unbound().and_then(|socket| {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::net::SocketAddr;

        socket.set_nonblocking(true)?;
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&path)?,
        };
        socket.send_to_addr(state, &address)
    });
    if let Err(error) = told {
        log::warn!("event=service_manager_not_told error=\"{error}\"");
    }
}
