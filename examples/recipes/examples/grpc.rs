//! gRPC with tonic: its server takes a stream of connections.
//!
//! The service is written by hand in the form of tonic's code generator, so that no protobuf
//! compiler is needed.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::signal::unix::{SignalKind, signal};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use worker_sdk::tokio::{Connection, Listener};
use worker_sdk::{PeerAddr, WorkerConfig};

/// `message Text { string text = 1; }`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Text {
    #[prost(string, tag = "1")]
    pub text: String,
}

/// tonic's requirements for a connection. Handlers find the address in the extensions of their
/// requests.
struct Client(Connection);

impl Connected for Client {
    type ConnectInfo = PeerAddr;

    fn connect_info(&self) -> PeerAddr {
        self.0.peer_addr()
    }
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// `service Greeter { rpc Greet(Text) returns (Text); }`
#[derive(Clone)]
struct Greeter;

struct Greet;

impl UnaryService<Text> for Greet {
    type Response = Text;
    type Future = Ready<Result<Response<Text>, Status>>;

    fn call(&mut self, request: Request<Text>) -> Self::Future {
        let peer = request.extensions().get::<PeerAddr>().map(PeerAddr::to_string);
        let text = format!("hello {} at {}", request.get_ref().text, peer.unwrap_or_default());
        ready(Ok(Response::new(Text { text })))
    }
}

impl NamedService for Greeter {
    const NAME: &'static str = "example.Greeter";
}

impl Service<http::Request<Body>> for Greeter {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/example.Greeter/Greet" => {
                    Grpc::new(ProstCodec::<Text, Text>::default()).unary(Greet, request).await
                }
                _ => Status::unimplemented("no such method").into_http(),
            })
        })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let listener = Listener::connect(WorkerConfig::from_env()?).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let closing = listener.clone();
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            () = closing.drained() => {}
        }
        // After the goodbye, `shutdown` ends connections that take too long.
        tokio::spawn(async move { closing.shutdown(Duration::from_secs(10)).await });
    };
    let incoming = listener.into_incoming().map(|accepted| accepted.map(Client));
    Server::builder().add_service(Greeter).serve_with_incoming_shutdown(incoming, stop).await?;
    Ok(())
}
