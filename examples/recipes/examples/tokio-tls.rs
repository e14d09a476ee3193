//! TLS with tokio-rustls: one task per connection. `tokio-tls CERTIFICATE.der KEY.der`

use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio_rustls::TlsAcceptor;
use worker_sdk::tokio::{Connection, Listener};
use worker_sdk::{Error, WorkerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let mut arguments = std::env::args().skip(1);
    let mut file = || {
        std::fs::read(arguments.next().ok_or("usage: tokio-tls CERTIFICATE.der KEY.der")?)
            .map_err(Box::<dyn std::error::Error>::from)
    };
    let certificate = CertificateDer::from(file()?);
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(file()?));
    let config =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));

    let listener = Listener::connect(WorkerConfig::from_env()?).await?;
    let end = loop {
        match listener.accept().await {
            Ok(connection) => {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let peer = connection.peer_addr();
                    // The handshake runs in the connection's task, so that a slow client does not
                    // delay others.
                    if let Err(error) = serve(connection, acceptor).await {
                        eprintln!("{peer}: {error}");
                    }
                });
            }
            Err(end) => break end,
        }
    };
    listener.shutdown(Duration::from_secs(10)).await;
    match end {
        Error::Draining | Error::Closed => Ok(()),
        error => Err(error.into()),
    }
}

async fn serve(connection: Connection, acceptor: TlsAcceptor) -> std::io::Result<()> {
    let mut stream = BufReader::new(acceptor.accept(connection).await?);
    let mut line = String::new();
    while stream.read_line(&mut line).await? > 0 {
        stream.get_mut().write_all(format!("you said {line}").as_bytes()).await?;
        stream.get_mut().flush().await?;
        line.clear();
    }
    stream.get_mut().shutdown().await
}
