//! The side thread: does all blocking work, so that the event loop never blocks.
//!
//! It owns one thread with a tokio runtime and its services: HTTP on the admin socket, the
//! [`crate::background::spawner`], advice, and the process of the relay's directory. Bounded
//! channels connect them with the event loop. They have no knowledge of workers, connections or
//! policies. [`client`] is the client of the admin socket, for the commands.

mod access_check;
mod advice;
mod agent;
pub mod client;
mod client_limits;
mod error_bodies;
mod file_thread;
mod http;
mod metrics;
mod relay_directory;
mod reload;
mod routes;

#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::{Mutex, Notify, oneshot, watch};

use self::advice::Adviser;
use self::agent::Agents;
use self::client_limits::ClientLimits;
use self::file_thread::FileThread;
use self::http::AdminSocket;
use self::relay_directory::DirectoryProcess;
use crate::background::logger::quoted;
use crate::background::spawner;
use crate::background::{restart, service_manager};
use crate::listen::files::SocketFiles;
use crate::mailbox::advice_faults::AdviceFaults;
use crate::mailbox::client::MailboxClient;
use crate::mailbox::hosts::Hosts;
use crate::mailbox::{MAX_REQUESTS, SideThread, TcpListeners};
use crate::wake::Wake;

/// Interval between two checks of the socket files.
const FILE_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Checks the socket files periodically.
async fn check_files(files: SocketFiles, file_thread: FileThread) {
    loop {
        let checked = files.clone();
        // The next check follows in any case.
        let _ = file_thread.run(move || checked.check()).await;
        let _ = tokio::time::timeout(FILE_CHECK_INTERVAL, files.changed()).await;
    }
}

/// Longest wait for the side thread to finish.
const THREAD_END: Duration = Duration::from_secs(1);

/// Starts the side thread, which serves HTTP on `listener`, and read-only HTTP on those of `tcp`;
/// with `held` only from the moment when `accepting` becomes true. It calls `wake` when `requests`
/// or `reports` has a new entry.
///
/// # Errors
/// If the system cannot create a thread or an epoll instance.
pub fn start(
    listener: UnixListener,
    tcp: TcpListeners,
    wake: Wake,
    held: bool,
) -> io::Result<SideThread> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    listener.set_nonblocking(true)?;
    let advice_address = tcp.advice.as_ref().map(advice::bound).transpose()?;
    let (listener, tcp, advice_socket) = {
        let _inside = runtime.enter();
        let make = |tcp: std::net::TcpListener| {
            tcp.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(tcp)
        };
        let unix = tokio::net::UnixListener::from_std(listener)?;
        (unix, tcp.admin_http.map(make).transpose()?, tcp.advice.map(make).transpose()?)
    };
    let (request_sender, requests) = mpsc::sync_channel(MAX_REQUESTS);
    let files = SocketFiles::default();
    let mailbox = MailboxClient::new(request_sender, Arc::clone(&wake), files.clone());
    let (spawner, spawns, reports) = spawner::service(wake);
    let metrics_max_workers = Arc::new(AtomicU32::new(0));
    let limits = ClientLimits::default();
    let admin_rate = limits.rate();
    let reload = Arc::new(Notify::new());
    let file_thread = FileThread::start()?;
    let (manager, teller) = service_manager::manager();
    let hosts = Hosts::default();
    let watchdog = service_manager::watchdog::interval()
        .map(|interval| (interval, manager.clone(), Arc::clone(&mailbox)));
    let (place, socket) = watch::channel(Arc::new(listener));
    let (running, configured) = watch::channel(None);
    let (accepting, gate) = watch::channel(!held);
    let (agents, agent_sockets) = watch::channel(Vec::new());
    let answering = Agents::new(Arc::clone(&mailbox), agent_sockets, gate.clone());
    let advice_faults = AdviceFaults::default();
    let directory = DirectoryProcess::new(configured.clone(), gate.clone());
    let reported = directory.clone();
    mailbox.set_relay(move || reported.status());
    let adviser = advice_address.map(|address| {
        let (mailbox, faults) = (Arc::clone(&mailbox), advice_faults.clone());
        Adviser::new(address, mailbox, configured.clone(), faults)
    });
    let reloader = reload::Reloader::new(
        Arc::clone(&mailbox),
        manager.clone(),
        file_thread.clone(),
        hosts.clone(),
        place,
        configured,
    );
    let named = hosts.clone();
    let watched = files.clone();
    let app = routes::App {
        mailbox,
        max_workers: Arc::clone(&metrics_max_workers),
        reloader: Arc::clone(&reloader),
        adviser: adviser.clone(),
    };
    let asked = Arc::clone(&reload);
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new().name("admin".to_owned()).spawn(move || {
        let serve = async {
            // These states outlive a failed task: the task that replaces it shares them.
            let spawns = Arc::new(Mutex::new(spawns));
            tokio::spawn(restart::task("processes", move || {
                let spawns = Arc::clone(&spawns);
                async move { spawns.lock().await.run().await }
            }));
            let teller = Arc::new(Mutex::new(teller));
            tokio::spawn(restart::task("service_manager", move || {
                let teller = Arc::clone(&teller);
                async move { teller.lock().await.run().await }
            }));
            if let Some((interval, manager, mailbox)) = watchdog {
                tokio::spawn(restart::task("watchdog", move || {
                    let mailbox = Arc::clone(&mailbox);
                    service_manager::watchdog::feed(interval, manager.clone(), move || {
                        let mailbox = Arc::clone(&mailbox);
                        async move { mailbox.alive(interval).await.is_ok() }
                    })
                }));
            }
            tokio::spawn(restart::task("reload", move || {
                Arc::clone(&reloader).whenever(Arc::clone(&asked))
            }));
            if let Some(tcp) = tcp {
                let (tcp, app, limits) = (Arc::new(tcp), app.clone(), limits.clone());
                let gate = gate.clone();
                tokio::spawn(restart::task("admin_http", move || {
                    let (tcp, gate) = (Arc::clone(&tcp), gate.clone());
                    http::serve_tcp(tcp, app.clone(), limits.clone(), named.clone(), gate)
                }));
            }
            if let (Some(listener), Some(adviser)) = (advice_socket, adviser) {
                let (listener, gate) = (Arc::new(listener), gate.clone());
                let collector = Arc::clone(&adviser);
                tokio::spawn(restart::task("advice", move || Arc::clone(&collector).collect()));
                tokio::spawn(restart::task("advice_listen", move || {
                    advice::serve(Arc::clone(&listener), Arc::clone(&adviser), gate.clone())
                }));
            }
            let (keeper, asker) = (directory.clone(), directory.clone());
            tokio::spawn(restart::task("relay_directory", move || keeper.clone().keep()));
            tokio::spawn(restart::task("relay_numbers", move || asker.clone().ask()));
            tokio::spawn(restart::task("agent_listen", move || Arc::clone(&answering).serve()));
            let socket = Arc::new(AdminSocket::new(socket));
            tokio::spawn(restart::task("admin_socket", move || {
                http::serve(Arc::clone(&socket), app.clone(), limits.clone(), gate.clone())
            }));
            tokio::spawn(restart::task("socket_files", move || {
                check_files(watched.clone(), file_thread.clone())
            }));
            // An error means that `SideThread` was dropped, which also ends the thread.
            let _ = stopped.await;
            directory.stop().await;
        };
        // Each task is restarted on its own. The runtime itself panics if it cannot poll, and the
        // sockets registered with it cannot be moved to another runtime.
        if let Err(error) = restart::caught(|| runtime.block_on(serve)) {
            log::error!("event=admin_thread_panicked error={}", quoted(error));
        }
        runtime.shutdown_timeout(THREAD_END);
    })?;
    Ok(SideThread {
        requests,
        reports,
        spawner,
        metrics_max_workers,
        admin_rate,
        reload,
        running,
        accepting,
        hosts,
        agents,
        advice_faults,
        files,
        manager,
        stop,
        thread,
    })
}

/// Replaces the listener of the admin socket, after a reload has created it again. To be called on
/// the side thread.
///
/// # Errors
/// If the listener cannot be registered with the runtime.
fn listen(
    place: &watch::Sender<Arc<tokio::net::UnixListener>>,
    listener: UnixListener,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    place.send_replace(Arc::new(tokio::net::UnixListener::from_std(listener)?));
    Ok(())
}
