//! The worker on tokio: one thread, a task for each connection.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use worker_sdk::tokio::Listener;

use super::{CHUNK, Serve, Source, WorkerArgs};

/// Busy tasks of a slow worker.
const BUSY: u32 = 4;

pub(super) fn run(args: &WorkerArgs) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if args.round > 0 {
            // Tasks that compute without a pause: a round ends when each task has had its turn.
            let part = args.round() / BUSY;
            for _ in 0..BUSY {
                tokio::spawn(async move {
                    loop {
                        std::thread::sleep(part);
                        tokio::task::yield_now().await;
                    }
                });
            }
        }
        match args.source {
            Source::Sdk => {
                let listener = Listener::connect(args.config(0)).await.map_err(io::Error::other)?;
                super::ready()?;
                loop {
                    let connection = listener.accept().await.map_err(io::Error::other)?;
                    start(connection, args);
                }
            }
            Source::ReusePort | Source::Shared | Source::Inherited => {
                let listener = args.listener()?;
                listener.set_nonblocking(true)?;
                let listener = TcpListener::from_std(listener)?;
                super::ready()?;
                loop {
                    if let Ok((stream, _)) = listener.accept().await {
                        start(stream, args);
                    }
                }
            }
            Source::Passed => Err(io::Error::other("the bare loop has no tokio worker")),
        }
    })
}

fn start(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, args: &WorkerArgs) {
    args.dawdle();
    let mut greeting = [0; 8];
    // Now, not when the task first runs: the stamp is the moment at which the application got the
    // connection.
    let len = args.serve.greeting(args.index, &mut greeting);
    tokio::spawn(serve(stream, args.serve, greeting, len));
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    serve: Serve,
    greeting: [u8; 8],
    len: usize,
) {
    if stream.write_all(&greeting[..len]).await.is_err() || serve.is_brief() {
        return;
    }
    let answer = vec![b'.'; if serve == Serve::Bulk { CHUNK } else { 0 }];
    let mut buffer = [0; 256];
    while let Ok(count) = stream.read(&mut buffer).await {
        if count == 0 {
            return;
        }
        for _ in 0..count {
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}
