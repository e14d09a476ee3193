//! NATS over loopback as a contender, with the client of the NATS project.

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::Instant;

use async_nats::{Client, Message, Subscriber};
use futures_core::Stream;
use tokio::runtime::Runtime;

use super::receiver::measure;
use super::{END_FLOOD, END_TIMED, FLOOD, STOP, Sender, TIMED, message};

/// Requests without a reply at a time.
const WINDOW: usize = 512;

const SUBJECT: &str = "c";

/// The messages whose arrival nothing else tells have a subject of their own, with a reply.
const SURE: &str = "sure";

pub struct Nats {
    runtime: Runtime,
    client: Client,
    /// Whether each message has a reply of the receiver.
    acknowledged: bool,
}

fn runtime() -> Runtime {
    // The client's connection is a task; the application waits on its own thread.
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

impl Nats {
    pub fn new(address: &str, acknowledged: bool) -> Nats {
        let runtime = runtime();
        let client = runtime.block_on(async_nats::connect(address)).unwrap();
        Nats { runtime, client, acknowledged }
    }
}

impl Sender for Nats {
    fn send(&mut self, message: &[u8]) {
        let message = message.to_vec().into();
        self.runtime.block_on(async {
            if self.acknowledged {
                self.client.request(SURE, message).await.unwrap();
            } else {
                self.client.publish(SUBJECT, message).await.unwrap();
            }
        });
    }

    fn flood(&mut self, size: usize, end: Instant) {
        self.runtime.block_on(async {
            if !self.acknowledged {
                while Instant::now() < end {
                    self.client.publish(SUBJECT, message(FLOOD, size).into()).await.unwrap();
                }
                return self.client.flush().await.unwrap();
            }
            let mut pending = VecDeque::new();
            while Instant::now() < end {
                let client = self.client.clone();
                pending.push_back(tokio::spawn(async move {
                    client.request(SURE, message(FLOOD, size).into()).await.unwrap();
                }));
                if pending.len() >= WINDOW {
                    pending.pop_front().unwrap().await.unwrap();
                }
            }
            for one in pending {
                one.await.unwrap();
            }
        });
    }

    fn send_surely(&mut self, message: &[u8]) {
        assert!([END_TIMED, END_FLOOD, STOP].contains(&message[0]));
        self.runtime.block_on(async {
            // What was published before is in the server when this returns.
            self.client.flush().await.unwrap();
            self.client.request(SURE, message.to_vec().into()).await.unwrap();
        });
    }
}

async fn next(subscription: &mut Subscriber) -> Message {
    std::future::poll_fn(|context| Pin::new(&mut *subscription).poll_next(context)).await.unwrap()
}

pub fn receive(address: &str) {
    let runtime = runtime();
    // Subscriptions are dropped within the runtime.
    let _inside = runtime.enter();
    let (client, mut plain, mut sure) = runtime.block_on(async {
        let client = async_nats::connect(address).await.unwrap();
        let plain = client.subscribe(SUBJECT).await.unwrap();
        let sure = client.subscribe(SURE).await.unwrap();
        client.flush().await.unwrap();
        (client, plain, sure)
    });
    println!("ready");
    measure(|bytes| {
        let message = runtime.block_on(async {
            // The order of two subscriptions of one connection is that of the server; what was
            // published comes first.
            let message = tokio::select! {
                biased;
                message = next(&mut plain) => message,
                message = next(&mut sure) => message,
            };
            if let Some(reply) = message.reply.clone() {
                client.publish(reply, "".into()).await.unwrap();
                if ![TIMED, FLOOD].contains(&message.payload[0]) {
                    client.flush().await.unwrap();
                }
            }
            message
        });
        bytes.clear();
        bytes.extend_from_slice(&message.payload);
    });
}
