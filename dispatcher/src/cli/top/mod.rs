//! `dispatcher top`: the status as a live screen. Owns the thread that requests the status;
//! `screen` owns the terminal, `model` the state and keys, `view` the drawing.

mod deploys;
mod model;
mod screen;
#[cfg(test)]
mod tests;
mod view;

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use self::model::{Action, Key, Model, Notice};
use self::screen::{Screen, Suspend};
use self::view::Theme;
use super::admin::{self, AdminEndpoint};
use super::{AdminArgs, Exit, Failure, print};
use crate::api::action::{self, PoolScaled, WorkersChanged};
use crate::api::command::ProcessCount;
use crate::api::status::Status;

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher top                                 q ends it, the last line shows the other keys
  dispatcher top --interval 200ms
  dispatcher top --snapshot --size 100x30        one frame as text

Environment:
  NO_COLOR     anything: no colours";

#[derive(Debug, Args)]
pub(super) struct TopArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// The interval between two updates.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Print one frame as text; no terminal is needed.
    #[arg(long)]
    snapshot: bool,
    /// The columns and lines of the frame.
    #[arg(long, value_name = "COLUMNSxLINES", default_value = "100x30", value_parser = size, requires = "snapshot")]
    size: (u16, u16),
}

fn interval(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(interval) if interval >= LOOK => Ok(interval),
        Ok(_) => Err("at least 100ms".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn size(text: &str) -> Result<(u16, u16), String> {
    let (columns, lines) = text.split_once('x').ok_or("write it like 100x30")?;
    match (columns.parse(), lines.parse()) {
        (Ok(columns @ 20..=500), Ok(lines @ 5..=500)) => Ok((columns, lines)),
        _ => Err("20 to 500 columns, 5 to 500 lines".to_owned()),
    }
}

/// Longest delay of a signal or an answer while no key is pressed.
const LOOK: Duration = Duration::from_millis(100);

pub(super) fn top(arguments: &TopArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let theme = Theme { color: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) };
    if arguments.snapshot {
        return snapshot(&endpoint, arguments.size);
    }
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return Err(Failure::new(
            Exit::Usage,
            "top draws on a terminal, and this is none: see `dispatcher top --snapshot` and \
             `dispatcher status`",
        ));
    }
    // Before the terminal is taken, so that an error message stays visible.
    let first = ask(&endpoint)?;
    let signals = Signals::register().map_err(|error| system("signal handlers", &error))?;
    let mut screen = Screen::open().map_err(|error| system("the terminal", &error))?;
    let result = live(&mut screen, &endpoint, first, arguments.interval, theme, &signals);
    let gone = screen.is_gone();
    drop(screen);
    // An error caused by a lost terminal is not reported: there is nothing left to show.
    if gone { Ok(()) } else { result }
}

fn system(what: &str, error: &std::io::Error) -> Failure {
    Failure::new(Exit::OsErr, format!("{what}: {error}"))
}

/// Flags that signal handlers set.
struct Signals {
    /// End.
    stop: Arc<AtomicBool>,
    /// Stop until SIGCONT.
    suspend: Arc<AtomicBool>,
    /// Continued: another program may have changed the terminal meanwhile.
    continued: Arc<AtomicBool>,
}

impl Signals {
    fn register() -> std::io::Result<Signals> {
        let flag = |signals: &[i32]| {
            let flag = Arc::new(AtomicBool::new(false));
            for signal in signals {
                signal_hook::flag::register(*signal, Arc::clone(&flag))?;
            }
            std::io::Result::Ok(flag)
        };
        Ok(Signals {
            stop: flag(&[libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT])?,
            suspend: flag(&[libc::SIGTSTP])?,
            continued: flag(&[libc::SIGCONT])?,
        })
    }
}

/// Prints one frame as text.
fn snapshot(endpoint: &AdminEndpoint, (width, height): (u16, u16)) -> Result<(), Failure> {
    let mut model = Model::new();
    model.answer(ask(endpoint)?, Duration::ZERO);
    print(&frame(&mut model, width, height))
}

/// A frame without colours and without trailing spaces.
fn frame(model: &mut Model, width: u16, height: u16) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    let Ok(drawn) = terminal.draw(|frame| view::draw(frame, model, Theme { color: false }));
    let buffer = drawn.buffer;
    let mut text = String::new();
    for y in 0..height {
        let line: String =
            (0..width).filter_map(|x| buffer.cell((x, y)).map(|cell| cell.symbol())).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn ask(endpoint: &AdminEndpoint) -> Result<Status, Failure> {
    admin::parse(&admin::get(endpoint, "/v1/status")?, endpoint)
}

/// A message of the requesting thread.
enum News {
    Status(Box<Status>),
    NoAnswer(String),
    Done(String),
    Failed(String),
}

fn live(
    screen: &mut Screen,
    endpoint: &AdminEndpoint,
    first: Status,
    interval: Duration,
    theme: Theme,
    signals: &Signals,
) -> Result<(), Failure> {
    let began = Instant::now();
    let mut model = Model::new();
    model.answer(first, Duration::ZERO);
    let (orders, to_do) = mpsc::sync_channel(16);
    let (updates, received) = mpsc::sync_channel(16);
    let endpoint = endpoint.clone();
    // The thread ends with the process: it may be in the middle of a request.
    std::thread::Builder::new()
        .name("ask".to_owned())
        .spawn(move || keep_asking(&endpoint, interval, &to_do, &updates))
        .map_err(|error| system("a thread", &error))?;
    let broken = |error: std::io::Error| system("the terminal", &error);
    let typed = typed()?;
    while !signals.stop.load(Ordering::SeqCst) && !screen.is_gone() {
        if signals.suspend.swap(false, Ordering::SeqCst) {
            screen.suspend(Suspend::Alone).map_err(broken)?;
        }
        if signals.continued.swap(false, Ordering::SeqCst) {
            screen.take().map_err(broken)?;
        }
        while let Ok(news) = received.try_recv() {
            match news {
                News::Status(status) => model.answer(*status, began.elapsed()),
                News::NoAnswer(why) => model.no_answer(why),
                News::Done(what) => model.notify(Notice::Done(what)),
                News::Failed(why) => model.notify(Notice::Failed(why)),
            }
        }
        screen.draw(|frame| view::draw(frame, &mut model, theme)).map_err(broken)?;
        let event = match typed.recv_timeout(LOOK) {
            Ok(event) => event.map_err(broken)?,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if let Event::Key(pressed) = event
            && is_suspend(&pressed)
        {
            screen.suspend(Suspend::Job).map_err(broken)?;
        } else if let Event::Key(pressed) = event
            && let Some(key) = key(&pressed)
        {
            match model.key(key) {
                None => {}
                Some(Action::Quit) => break,
                Some(order) => {
                    let asked = orders.try_send(order);
                    if asked.is_err() {
                        model.notice = Notice::Failed("busy with what you asked before".to_owned());
                    }
                }
            }
        }
    }
    Ok(())
}

/// Reads keys on a thread that ends with the process: after the terminal is gone, the read function
/// of crossterm never returns, despite its timeout.
fn typed() -> Result<Receiver<std::io::Result<Event>>, Failure> {
    let (updates, typed) = mpsc::sync_channel(16);
    std::thread::Builder::new()
        .name("keys".to_owned())
        .spawn(move || {
            loop {
                let event = event::read();
                let last = event.is_err();
                if updates.send(event).is_err() || last {
                    return;
                }
            }
        })
        .map_err(|error| system("a thread", &error))?;
    Ok(typed)
}

/// Ctrl-Z: in raw mode the terminal does not turn it into a signal.
fn is_suspend(event: &KeyEvent) -> bool {
    event.kind != KeyEventKind::Release
        && event.code == KeyCode::Char('z')
        && event.modifiers.contains(KeyModifiers::CONTROL)
}

fn key(event: &KeyEvent) -> Option<Key> {
    if event.kind == KeyEventKind::Release {
        return None;
    }
    let control = event.modifiers.contains(KeyModifiers::CONTROL);
    Some(match event.code {
        KeyCode::Char('c') if control => Key::Interrupt,
        KeyCode::Char(_) if control => return None,
        KeyCode::Char(character) => Key::Character(character),
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::First,
        KeyCode::End => Key::Last,
        KeyCode::Esc => Key::Escape,
        _ => return None,
    })
}

/// Requests the status every `interval` and after each command; ends when the receiver is dropped.
fn keep_asking(
    endpoint: &AdminEndpoint,
    interval: Duration,
    orders: &Receiver<Action>,
    updates: &SyncSender<News>,
) {
    loop {
        let order = match orders.recv_timeout(interval) {
            Ok(order) => Some(order),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Some(order) = order
            && updates.send(carry_out(endpoint, &order)).is_err()
        {
            return;
        }
        let news = match ask(endpoint) {
            Ok(status) => News::Status(Box::new(status)),
            Err(failure) => News::NoAnswer(failure.message),
        };
        if updates.send(news).is_err() {
            return;
        }
    }
}

fn carry_out(endpoint: &AdminEndpoint, order: &Action) -> News {
    if let Action::Scale(pool, by) = order {
        let path = format!("/v1/pools/{}", admin::segment(pool));
        let scaled: Result<PoolScaled, Failure> =
            admin::post(endpoint, &path, &action::Action::scale(ProcessCount::ChangeBy(*by)));
        return match scaled {
            Ok(scaled) => {
                let processes = crate::cli::table::count(scaled.processes.into(), "process");
                News::Done(format!("{pool}: {processes}"))
            }
            Err(failure) => News::Failed(failure.message),
        };
    }
    let (id, action, done) = match order {
        Action::Drain(id) => (id, action::Action::drain(None), "is draining"),
        Action::Resume(id) => (id, action::Action::Resume {}, "gets connections again"),
        Action::Quit | Action::Scale(..) => return News::Failed("nothing to do".to_owned()),
    };
    let changed: Result<WorkersChanged, Failure> =
        admin::post(endpoint, &format!("/v1/workers/{id}"), &action);
    match changed {
        Ok(_) => News::Done(format!("worker {id} {done}")),
        Err(failure) => News::Failed(failure.message),
    }
}
