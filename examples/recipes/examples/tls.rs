//! TLS with rustls in a blocking server: one thread per connection. `tls CERTIFICATE.der KEY.der`

use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::thread;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use worker_sdk::{Connection, Worker, WorkerConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let mut arguments = std::env::args().skip(1);
    let mut file = || {
        std::fs::read(arguments.next().ok_or("usage: tls CERTIFICATE.der KEY.der")?)
            .map_err(Box::<dyn std::error::Error>::from)
    };
    let certificate = CertificateDer::from(file()?);
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(file()?));
    let config =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key)?;
    let config = Arc::new(config);

    let mut worker = Worker::connect(WorkerConfig::from_env()?)?;
    for connection in worker.incoming() {
        let config = Arc::clone(&config);
        thread::spawn(move || {
            let peer = connection.peer_addr();
            if let Err(error) = serve(connection, config) {
                eprintln!("{peer}: {error}");
            }
        });
    }
    worker.close();
    worker.wait_until_idle();
    Ok(())
}

/// Answers each line. The stream owns the connection, so dropping it ends the connection.
fn serve(
    connection: Connection,
    config: Arc<ServerConfig>,
) -> Result<(), Box<dyn std::error::Error>> {
    let session = ServerConnection::new(config)?;
    let mut stream = BufReader::new(StreamOwned::new(session, connection));
    let mut line = String::new();
    while stream.read_line(&mut line)? > 0 {
        write!(stream.get_mut(), "you said {line}")?;
        line.clear();
    }
    stream.get_mut().conn.send_close_notify();
    Ok(stream.get_mut().flush()?)
}
