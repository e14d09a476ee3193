//! An instant-messaging service: login, private messages, rooms, presence. It runs as any number of
//! workers; a client is connected to one of them and does not know which, nor that there are
//! others.
//!
//! | client to server | |
//! |---|---|
//! | `{"login": "alice"}` | first; the newest login of a name wins |
//! | `{"to": "bob", "text": "…"}` | answered by `{"sent": "bob", "outcome": "…"}` |
//! | `{"join": "lobby"}`, `{"leave": "lobby"}` | |
//! | `{"room": "lobby", "text": "…"}` | to everyone in the room, the sender included |
//! | `{"watch": "bob"}` | answered by `{"presence": "bob", "online": …}`, now and at every change |
//!
//! | server to client | |
//! |---|---|
//! | `{"from": "alice", "text": "…"}`, with `"room"` if it was sent to one | a message |
//! | `{"ended": "…"}` | this login has ended; another one may have replaced it |
#![allow(clippy::print_stderr, reason = "a program for people")]

use std::collections::HashMap;

use axum::Router;
use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::{Html, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinSet;
use worker_sdk::relay::{Ended, Id, Registration, Relay, RelayConfig};
use worker_sdk::{PeerAddr, WorkerConfig, tokio::Listener};

/// Messages to one client that its connection has not taken. More wait in the relay's queue.
const OUTBOX: usize = 16;

/// Rooms and watches of one client.
const MOST: usize = 100;

/// What a client says.
#[derive(Deserialize)]
#[serde(untagged)]
enum Said {
    Login { login: String },
    To { to: String, text: String },
    Room { room: String, text: String },
    Join { join: String },
    Leave { leave: String },
    Watch { watch: String },
}

/// A message between workers.
#[derive(Serialize, Deserialize)]
struct Letter {
    from: String,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    room: Option<String>,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let listener = Listener::connect(WorkerConfig::from_env()?).await?;
    let config = RelayConfig::new().namespace("chat").with_env().ticket(listener.relay_ticket());
    let relay = Relay::connect(config).await?;
    let app = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/chat", get(upgrade))
        .with_state(relay);
    let mut terminate = signal(SignalKind::terminate())?;
    let closing = listener.clone();
    let server = axum::serve(listener, app.into_make_service_with_connect_info::<PeerAddr>());
    tokio::select! {
        result = server => result?,
        // Clients connect again and get another worker.
        _ = terminate.recv() => closing.close(),
        () = closing.drained() => closing.close(),
    }
    Ok(())
}

async fn upgrade(upgrade: WebSocketUpgrade, State(relay): State<Relay>) -> Response {
    upgrade.max_message_size(65_536).on_upgrade(move |socket| async move {
        if let Err(error) = serve(socket, &relay).await {
            log::info!("a client has gone: {error}");
        }
    })
}

fn id(kind: &str, name: &str) -> Result<Id, Box<dyn std::error::Error + Send + Sync>> {
    Ok(Id::new(format!("{kind}:{name}"))?)
}

async fn serve(
    mut socket: WebSocket,
    relay: &Relay,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let Some(Ok(Message::Text(text))) = socket.recv().await else { return Ok(()) };
    let Ok(Said::Login { login }) = serde_json::from_str(&text) else {
        return Err("no login".into());
    };
    // The registration lives as long as this connection.
    let registration = relay.register(&id("user", &login)?).await?;
    // Before any message: some may have waited for this login.
    let welcome = serde_json::json!({"welcome": login}).to_string();
    socket.send(Message::text(welcome)).await?;
    let (sender, mut outbox) = channel::<String>(OUTBOX);
    let mut tasks = JoinSet::new();
    let mut rooms = HashMap::new();
    loop {
        tokio::select! {
            said = socket.recv() => match said {
                Some(Ok(Message::Text(text))) => {
                    let said = serde_json::from_str(&text)?;
                    act(said, &login, relay, &sender, &mut tasks, &mut rooms).await?;
                }
                Some(Ok(Message::Close(_))) | None => return Ok(()),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.into()),
            },
            message = registration.recv() => match message {
                Some(message) => {
                    socket.send(Message::text(String::from_utf8(message.bytes().to_vec())?)).await?;
                }
                None => return end(socket, &registration).await,
            },
            Some(line) = outbox.recv() => socket.send(Message::text(line)).await?,
        }
    }
}

async fn end(
    mut socket: WebSocket,
    registration: &Registration,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let why = match registration.ended() {
        Some(Ended::Superseded) => "you have logged in elsewhere",
        _ => "the service ends this login",
    };
    socket.send(Message::text(serde_json::json!({"ended": why}).to_string())).await?;
    Ok(socket.send(Message::Close(None)).await?)
}

async fn act(
    said: Said,
    own: &str,
    relay: &Relay,
    sender: &Sender<String>,
    tasks: &mut JoinSet<()>,
    rooms: &mut HashMap<String, tokio::task::AbortHandle>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let from = own.to_owned();
    match said {
        Said::Login { .. } => return Err("a second login".into()),
        Said::To { to, text } => {
            let letter = serde_json::to_vec(&Letter { from, text, room: None })?;
            let pending = relay.send(&id("user", &to)?, letter);
            let sender = sender.clone();
            // The client may go on meanwhile; the relay keeps the order.
            tasks.spawn(async move {
                let outcome = format!("{:?}", pending.await);
                let line = serde_json::json!({"sent": to, "outcome": outcome});
                let _ = sender.send(line.to_string()).await;
            });
        }
        Said::Room { room, text } => {
            let group = id("room", &room)?;
            let letter = serde_json::to_vec(&Letter { from, text, room: Some(room) })?;
            // A member that reads too slowly misses it; the sender does not wait for it.
            let _ = relay.publish(&group, letter).await;
        }
        Said::Join { join } => {
            if rooms.len() >= MOST || rooms.contains_key(&join) {
                return Ok(());
            }
            let membership = relay.join(&id("room", &join)?);
            let sender = sender.clone();
            let task = tasks.spawn(async move {
                while let Some(message) = membership.recv().await {
                    let Ok(line) = String::from_utf8(message.bytes().to_vec()) else { continue };
                    if sender.send(line).await.is_err() {
                        return;
                    }
                }
            });
            rooms.insert(join, task);
        }
        Said::Leave { leave } => {
            // The membership ends with its task.
            if let Some(task) = rooms.remove(&leave) {
                task.abort();
            }
        }
        Said::Watch { watch } => {
            if tasks.len() >= 3 * MOST {
                return Ok(());
            }
            let name = id("user", &watch)?;
            let (relay, sender) = (relay.clone(), sender.clone());
            tasks.spawn(async move {
                let changes = relay.watch(&name);
                loop {
                    let places = relay.who(&name).await;
                    let online = places.is_ok_and(|page| !page.places.is_empty());
                    let line = serde_json::json!({"presence": watch, "online": online});
                    if sender.send(line.to_string()).await.is_err()
                        || changes.recv().await.is_none()
                    {
                        return;
                    }
                }
            });
        }
    }
    // Those that have ended.
    while tasks.try_join_next().is_some() {}
    Ok(())
}
