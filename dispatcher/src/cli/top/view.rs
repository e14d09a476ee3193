//! Draws one frame of `top` for a terminal of any size. Colours carry no information of their own.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table, TableState};

use super::deploys;
use super::model::{self, Model, Notice};
use crate::api::status::Status;
use crate::cli::drain::host_line;
use crate::cli::status::clean;

/// Most faults shown.
const FAULTS: usize = 4;

/// Widest load bar.
const BAR: u16 = 16;

/// With or without colours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Theme {
    pub color: bool,
}

impl Theme {
    fn with(self, color: Color) -> Style {
        if self.color { Style::new().fg(color) } else { Style::new() }
    }

    fn head(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    fn of_state(self, state: &str) -> Style {
        match state {
            "active" | "ready" | "accepting" => self.with(Color::Green),
            "draining" | "paused" | "back-pressure" => {
                self.with(Color::Yellow).add_modifier(Modifier::BOLD)
            }
            _ => self.with(Color::Red).add_modifier(Modifier::BOLD),
        }
    }
}

pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model, theme: Theme) {
    let area = frame.area();
    let Some(status) = model.status.clone() else {
        let text = match &model.lost {
            Some(why) => format!("{why}\n\nStill asking.  q quit"),
            None => "Asking the dispatcher …".to_owned(),
        };
        frame.render_widget(Paragraph::new(text), area);
        return;
    };
    let pools = u16::try_from(status.pools.len()).unwrap_or(u16::MAX);
    let faults = u16::try_from(status.faults.len().min(FAULTS)).unwrap_or(0);
    // A small screen drops the least important parts first.
    let tall = area.height >= 20;
    let mut deploys = deploys::lines(&status, area.width);
    deploys.truncate(usize::from(area.height / 5));
    let [head, chart, pool_area, deploy_area, worker_area, fault_area, foot] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(if tall { 4 } else { 0 }),
        Constraint::Length(pools.saturating_add(1).min(area.height / 4).max(2)),
        Constraint::Length(u16::try_from(deploys.len()).unwrap_or(0)),
        Constraint::Min(3),
        Constraint::Length(if tall && faults > 0 { faults + 1 } else { 0 }),
        Constraint::Length(1),
    ])
    .areas(area);
    self::head(frame, head, &status, model, theme);
    accepted(frame, chart, &status, theme);
    self::pools(frame, pool_area, &status, model, theme);
    let deploys =
        deploys.into_iter().map(|(state, text)| Line::styled(text, theme.of_state(state)));
    frame.render_widget(Paragraph::new(deploys.collect::<Vec<_>>()), deploy_area);
    workers(frame, worker_area, model, theme);
    self::faults(frame, fault_area, &status, theme);
    frame.render_widget(self::foot(model, theme), foot);
}

fn head(frame: &mut Frame<'_>, area: Rect, status: &Status, model: &Model, theme: Theme) {
    let up = humantime::format_duration(Duration::from_secs(status.uptime_seconds));
    let mut first = vec![
        Span::styled(format!("dispatcher {}", clean(&status.version)), theme.head()),
        Span::raw(format!("  pid {}  up {up}", status.pid)),
    ];
    if status.stopping {
        first.push(Span::styled("  stopping", theme.of_state("stopping")));
    }
    if let Some(host) = &status.draining {
        let text = format!("  {}", host_line(host));
        first.push(Span::styled(text, theme.of_state("draining")));
    }
    if model.paused {
        first.push(Span::styled("  paused", theme.of_state("paused")));
    }
    let live: u64 = status.pools.iter().flat_map(|pool| &pool.workers).map(|w| w.load).sum();
    let totals = format!(
        "live {live}  accepted {}  queued {}  in flight {}  taken {}  closed {}",
        status.accepted,
        status.queued,
        status.in_flight,
        status.taken,
        status.closed.values().sum::<u64>(),
    );
    let reasons: Vec<String> = status
        .closed
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(reason, count)| format!("closed {} {count}", clean(reason)))
        .collect();
    let last = match &model.lost {
        Some(why) => Line::styled(
            format!("no answer, these are the last figures: {}", clean(why)),
            theme.of_state("lost"),
        ),
        None => Line::raw(reasons.join("  ")),
    };
    frame.render_widget(Paragraph::new(vec![Line::from(first), Line::raw(totals), last]), area);
}

fn accepted(frame: &mut Frame<'_>, area: Rect, status: &Status, theme: Theme) {
    let width = usize::from(area.width);
    let seconds = &status.accepted_per_second;
    let shown = &seconds[seconds.len().saturating_sub(width)..];
    let title = format!(
        "accepted per second: {} now, most {} in the last {} s",
        seconds.last().unwrap_or(&0),
        shown.iter().max().unwrap_or(&0),
        shown.len()
    );
    // The newest value is at the right edge from the first second on.
    let mut data = vec![0; width - shown.len()];
    data.extend_from_slice(shown);
    let line = Sparkline::default()
        .block(Block::new().title(title).title_style(theme.head()))
        .style(theme.with(Color::Cyan))
        .data(data);
    frame.render_widget(line, area);
}

fn pools(frame: &mut Frame<'_>, area: Rect, status: &Status, model: &Model, theme: Theme) {
    let header = ["POOL", "POLICY", "STATE", "WORKERS", "LOAD", "QUEUED", "GEN", "TREND"];
    let rows = status.pools.iter().map(|pool| {
        let load: u64 = pool.workers.iter().map(|worker| worker.load).sum();
        let changes = deploys::changes(pool);
        Row::new([
            Cell::new(clean(&pool.name)),
            Cell::new(clean(&pool.policy)),
            Cell::new(clean(&pool.state)).style(theme.of_state(&pool.state)),
            right(pool.workers.len().to_string()),
            right(load.to_string()),
            right(pool.queued.to_string()),
            right(deploys::generation(pool)),
            Cell::new(Line::from(vec![
                Span::styled(changes, theme.of_state("draining")),
                Span::styled(sparks(&model.loads(&pool.name), 30), theme.with(Color::Cyan)),
            ])),
        ])
    });
    let widths = [
        Constraint::Length(12),
        Constraint::Length(17),
        Constraint::Length(13),
        Constraint::Length(7),
        Constraint::Length(8),
        Constraint::Length(6),
        Constraint::Length(4),
        Constraint::Fill(1),
    ];
    let head =
        header.iter().enumerate().map(|(column, word)| heading(word, (3..7).contains(&column)));
    frame.render_widget(Table::new(rows, widths).header(Row::new(head).style(theme.head())), area);
}

/// The narrowest and the widest column of states: `suspect`, `suspect not steered`.
const STATE: (u16, u16) = (9, 19);

/// A column of the worker table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Column {
    Pool,
    Worker,
    State,
    Load,
    InFlight,
    Rate,
    Id,
    Pid,
    Bar,
    Weight,
    Revoked,
}

impl Column {
    /// In display order.
    const ALL: [Column; 11] = [
        Column::Pool,
        Column::Worker,
        Column::State,
        Column::Id,
        Column::Pid,
        Column::Weight,
        Column::Load,
        Column::Bar,
        Column::Rate,
        Column::InFlight,
        Column::Revoked,
    ];

    /// Columns that a narrow screen drops, the last one first.
    const OPTIONAL: [Column; 8] = [
        Column::Pool,
        Column::InFlight,
        Column::Rate,
        Column::Id,
        Column::Pid,
        Column::Bar,
        Column::Weight,
        Column::Revoked,
    ];

    fn head(self) -> &'static str {
        match self {
            Column::Pool => "POOL",
            Column::Worker => "WORKER",
            Column::State => "STATE",
            Column::Load => "LOAD",
            Column::InFlight => "INFLIGHT",
            Column::Rate => "PER SECOND",
            Column::Id => "ID",
            Column::Pid => "PID",
            Column::Bar => "",
            Column::Weight => "WEIGHT",
            Column::Revoked => "REVOKED",
        }
    }

    /// The width, where the longest state has `state` characters.
    fn width(self, state: u16) -> u16 {
        match self {
            Column::Pool => 12,
            Column::Worker => 14,
            Column::State => state,
            Column::Load | Column::Revoked => 7,
            Column::InFlight => 8,
            Column::Rate => 10,
            Column::Id | Column::Weight => 6,
            Column::Pid => 8,
            Column::Bar => BAR,
        }
    }

    fn is_number(self) -> bool {
        !matches!(self, Column::Pool | Column::Worker | Column::State | Column::Bar)
    }

    /// The columns that fit.
    fn fitting(width: u16, state: u16) -> Vec<Column> {
        let mut shown = Column::ALL.to_vec();
        for dropped in Column::OPTIONAL.iter().rev() {
            let needed: u16 = shown.iter().map(|column| column.width(state) + 1).sum();
            if needed < width {
                break;
            }
            shown.retain(|column| column != dropped);
        }
        shown
    }

    fn cell(self, row: &model::Row<'_>, most: u64, theme: Theme) -> Cell<'static> {
        let worker = row.worker;
        match self {
            Column::Pool => Cell::new(clean(&row.pool.name)),
            Column::Worker => Cell::new(clean(&worker.name)),
            Column::State => {
                let state = worker.shown_state();
                Cell::new(clean(&worker.shown_kind())).style(theme.of_state(state))
            }
            Column::Load => right(worker.shown_load()),
            Column::InFlight => right(worker.in_flight.to_string()),
            Column::Rate => right(row.rate.map_or("-".to_owned(), |rate| format!("{rate:.1}"))),
            Column::Id => right(worker.id.to_string()),
            Column::Pid => right(worker.shown_pid()),
            Column::Bar => {
                Cell::new(bar(worker.load, worker.in_flight, most)).style(theme.with(Color::Blue))
            }
            Column::Weight => right(worker.weight.to_string()),
            Column::Revoked => right(worker.revoked.to_string()),
        }
    }
}

fn workers(frame: &mut Frame<'_>, area: Rect, model: &mut Model, theme: Theme) {
    model.page = usize::from(area.height.saturating_sub(1));
    let position = model.position();
    let rows = model.rows();
    if rows.is_empty() {
        frame.render_widget(Paragraph::new("no worker has joined"), area);
        return;
    }
    let most = rows.iter().map(|row| row.worker.load).max().unwrap_or(0).max(1);
    let states = rows.iter().map(|row| row.worker.shown_kind().len() as u16);
    let state = states.max().unwrap_or(0).clamp(STATE.0, STATE.1);
    let columns = Column::fitting(area.width, state);
    let table = rows.iter().map(|row| Row::new(columns.iter().map(|c| c.cell(row, most, theme))));
    let head = columns.iter().map(|column| heading(column.head(), column.is_number()));
    let widths = columns.iter().map(|column| match column {
        Column::Worker => Constraint::Fill(1),
        other => Constraint::Length(other.width(state)),
    });
    let table = Table::new(table, widths)
        .header(Row::new(head).style(theme.head()))
        // A marker in addition to reversed cells, which screen readers and text output do not show.
        .highlight_symbol("> ")
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(position);
    frame.render_stateful_widget(table, area, &mut state);
}

fn faults(frame: &mut Frame<'_>, area: Rect, status: &Status, theme: Theme) {
    let mut lines = vec![Line::styled("last faults", theme.head())];
    for fault in status.faults.iter().rev().take(usize::from(area.height.saturating_sub(1))) {
        let time = fault.time.get(11..19).unwrap_or(&fault.time);
        let times =
            if fault.count > 1 { format!(" ({} times)", fault.count) } else { String::new() };
        lines.push(Line::raw(clean(&format!(
            "{time} {} {}: {}{times}",
            fault.kind, fault.subject, fault.text
        ))));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn foot(model: &Model, theme: Theme) -> Line<'static> {
    match &model.notice {
        Notice::Nothing => Line::raw(format!(
            "q quit  ↑↓ choose  d drain  r resume  + - scale  s order: {}  p {}",
            model.order.name(),
            if model.paused { "go on" } else { "pause" }
        )),
        Notice::Done(text) => Line::styled(clean(text), theme.with(Color::Green)),
        Notice::Failed(text) => Line::styled(clean(text), theme.of_state("failed")),
        Notice::ConfirmFewer(pool) => Line::styled(
            format!(
                "one process fewer in {}? Its last is drained.  y yes, any other key no",
                clean(pool)
            ),
            theme.of_state("draining"),
        ),
        Notice::Confirm { name, .. } => Line::styled(
            format!("drain {}? It gets no new connections.  y yes, any other key no", clean(name)),
            theme.of_state("draining"),
        ),
    }
}

fn heading(word: &'static str, right: bool) -> Cell<'static> {
    let line = Line::raw(word);
    Cell::new(if right { line.right_aligned() } else { line })
}

fn right(text: String) -> Cell<'static> {
    Cell::new(Line::raw(text).right_aligned())
}

/// The load as a bar; its untaken part is lighter.
fn bar(load: u64, in_flight: u64, most: u64) -> String {
    let cells = |part: u64| (part as f64 / most as f64 * f64::from(BAR)).round() as usize;
    let (whole, taken) = (cells(load), cells(load.saturating_sub(in_flight)));
    format!("{}{}", "█".repeat(taken), "░".repeat(whole.saturating_sub(taken)))
}

/// The last values as a line of small bars.
fn sparks(values: &[u64], width: usize) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown = &values[values.len().saturating_sub(width)..];
    let most = shown.iter().copied().max().unwrap_or(0).max(1);
    shown.iter().map(|value| LEVELS[(*value as f64 / most as f64 * 7.0).round() as usize]).collect()
}
