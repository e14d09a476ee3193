//! `/acl/status`: the workers of the line protocol in the format of acl's `master_dispatch`, for
//! programs that read its status.

use std::fmt::Write;

use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use super::{App, PATIENCE, methods, no_answer, refused};
use crate::api::command::{CommandError, Problem};
use crate::api::status::{Status, WorkerStatus};

pub(super) fn routes() -> Router<App> {
    Router::new().route("/acl/status", methods("GET, HEAD", get(status)))
}

/// One worker. What it has not reported is 0.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Server {
    conns: u64,
    used: u64,
    pid: i32,
    max_threads: u64,
    curr_threads: u64,
    busy_threads: u64,
    qlen: u64,
    r#type: String,
}

/// The document, with the sums over all workers.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Document {
    server: Vec<Server>,
    conns: u64,
    used: u64,
    qlen: u64,
    max_threads: u64,
    curr_threads: u64,
    busy_threads: u64,
    /// The address of the first listener.
    addr: String,
    /// The load average of the machine over one minute.
    load: String,
}

impl Server {
    fn of(worker: &WorkerStatus) -> Option<Server> {
        let line = worker.line.as_ref()?;
        Some(Server {
            conns: worker.load,
            used: line.used.unwrap_or_default(),
            pid: worker.pid,
            max_threads: line.max_threads.unwrap_or_default(),
            curr_threads: line.curr_threads.unwrap_or_default(),
            busy_threads: line.busy_threads.unwrap_or_default(),
            qlen: line.qlen.unwrap_or_default(),
            r#type: line.r#type.clone(),
        })
    }
}

impl Document {
    fn new(status: &Status, load: String) -> Document {
        let workers = status.pools.iter().flat_map(|pool| &pool.workers);
        let server: Vec<Server> = workers.filter_map(Server::of).collect();
        // The values come from workers.
        let sum = |value: fn(&Server) -> u64| server.iter().map(value).fold(0, u64::saturating_add);
        let (conns, used, qlen) = (sum(|it| it.conns), sum(|it| it.used), sum(|it| it.qlen));
        let (max_threads, curr_threads) = (sum(|it| it.max_threads), sum(|it| it.curr_threads));
        let busy_threads = sum(|it| it.busy_threads);
        let addr = status.listeners.first().map(|it| it.address.clone()).unwrap_or_default();
        Document { server, conns, used, qlen, max_threads, curr_threads, busy_threads, addr, load }
    }

    /// As XML: the sums are attributes of `server`, and each worker is a `proc`.
    fn xml(&self, declaration: bool) -> String {
        let mut out = String::new();
        if declaration {
            out.push_str("<?xml version=\"1.0\"?>");
        }
        let sums = [
            ("conns", self.conns),
            ("used", self.used),
            ("qlen", self.qlen),
            ("max_threads", self.max_threads),
            ("curr_threads", self.curr_threads),
            ("busy_threads", self.busy_threads),
        ];
        // Writing to a string cannot fail.
        out.push_str("<server");
        let texts = [("addr", escaped(&self.addr)), ("load", escaped(&self.load))];
        let sums = sums.map(|(name, sum)| (name, sum.to_string()));
        for (name, value) in sums.into_iter().chain(texts) {
            for part in [" ", name, "=\"", &value, "\""] {
                out.push_str(part);
            }
        }
        out.push('>');
        for server in &self.server {
            let _ = write!(
                out,
                "<proc><conns>{}</conns><used>{}</used><pid>{}</pid><max_threads>{}</max_threads>\
                 <curr_threads>{}</curr_threads><busy_threads>{}</busy_threads><qlen>{}</qlen>\
                 <type>{}</type></proc>",
                server.conns,
                server.used,
                server.pid,
                server.max_threads,
                server.curr_threads,
                server.busy_threads,
                server.qlen,
                escaped(&server.r#type)
            );
        }
        out.push_str("</server>\r\n");
        out
    }
}

/// Text in XML. Types have no control characters, but may have two characters that XML excludes.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\u{fffe}' | '\u{ffff}' => out.push(char::REPLACEMENT_CHARACTER),
            other => out.push(other),
        }
    }
    out
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Xml { declaration: bool },
}

impl Format {
    /// From the query (`format`, or acl's `type` and `xml_meta`), else from the header `Accept`.
    fn of(query: &str, accept: &str) -> Result<Format, String> {
        let pairs = || query.split('&').filter_map(|pair| pair.split_once('='));
        let declaration =
            !pairs().any(|(key, value)| key == "xml_meta" && value.eq_ignore_ascii_case("false"));
        let wanted = pairs().find(|(key, _)| matches!(*key, "format" | "type"));
        match wanted.map(|(_, value)| value.to_ascii_lowercase()).as_deref() {
            Some("json") => Ok(Format::Json),
            Some("xml") => Ok(Format::Xml { declaration }),
            Some(other) => Err(other.to_owned()),
            None if accept.contains("xml")
                && !accept.contains("json")
                && !accept.contains("html") =>
            {
                Ok(Format::Xml { declaration })
            }
            None => Ok(Format::Json),
        }
    }
}

async fn status(State(app): State<App>, RawQuery(query): RawQuery, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let format = match Format::of(&query.unwrap_or_default(), accept.unwrap_or_default()) {
        Ok(format) => format,
        Err(other) => {
            let message = format!("there is no format `{other}`");
            let error = CommandError::new(Problem::Invalid, message);
            return refused(&error.hint("the formats are: json, xml"));
        }
    };
    let status = match app.mailbox.status(PATIENCE).await {
        Ok(status) => status,
        Err(why) => return no_answer(why),
    };
    let loads = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = loads.split(' ').next().unwrap_or_default().to_owned();
    let document = Document::new(&status, load);
    match format {
        Format::Json => Json(document).into_response(),
        Format::Xml { declaration } => {
            let kind = [(header::CONTENT_TYPE, "text/xml; charset=utf-8")];
            (kind, document.xml(declaration)).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::api::status::{LineWorkerStatus, ListenerStatus, PoolStatus};

    fn document() -> Document {
        let line = |kind: &str, used| LineWorkerStatus {
            r#type: kind.to_owned(),
            count: 1,
            used: Some(used),
            max_threads: Some(8),
            curr_threads: Some(4),
            busy_threads: Some(2),
            qlen: Some(1),
            ..LineWorkerStatus::default()
        };
        let worker = |pid, load, line| WorkerStatus { pid, load, line, ..WorkerStatus::default() };
        let workers = vec![
            worker(11, 3, Some(line("a<b&\"c\"", 5))),
            worker(12, 100, None),
            worker(13, 4, Some(LineWorkerStatus::default())),
        ];
        let listener = ListenerStatus { address: "10.0.0.1:80".to_owned(), ..Default::default() };
        let status = Status {
            listeners: vec![listener],
            pools: vec![PoolStatus { workers, ..PoolStatus::default() }],
            ..Status::default()
        };
        Document::new(&status, "0.42".to_owned())
    }

    #[test]
    fn the_json_has_the_names_of_acl() {
        let text = serde_json::to_string(&document()).unwrap();
        assert_eq!(
            text,
            "{\"server\":[{\"conns\":3,\"used\":5,\"pid\":11,\"max_threads\":8,\"curr_threads\":4,\
             \"busy_threads\":2,\"qlen\":1,\"type\":\"a<b&\\\"c\\\"\"},\
             {\"conns\":4,\"used\":0,\"pid\":13,\"max_threads\":0,\"curr_threads\":0,\
             \"busy_threads\":0,\"qlen\":0,\"type\":\"\"}],\"conns\":7,\"used\":5,\"qlen\":1,\
             \"max_threads\":8,\"curr_threads\":4,\"busy_threads\":2,\"addr\":\"10.0.0.1:80\",\
             \"load\":\"0.42\"}"
        );
    }

    #[test]
    fn the_xml_has_the_names_of_acl() {
        let text = document().xml(true);
        let sums = "<?xml version=\"1.0\"?><server conns=\"7\" used=\"5\" qlen=\"1\" max_threads=\"8\" \
                    curr_threads=\"4\" busy_threads=\"2\" addr=\"10.0.0.1:80\" load=\"0.42\"><proc>";
        assert!(text.starts_with(sums), "{text}");
        assert!(text.contains("<type>a&lt;b&amp;&quot;c&quot;</type></proc><proc>"), "{text}");
        assert!(text.ends_with("<qlen>0</qlen><type></type></proc></server>\r\n"), "{text}");
        assert!(document().xml(false).starts_with("<server "));
    }

    #[test]
    fn characters_that_xml_excludes_are_replaced() {
        assert_eq!(escaped("a\u{fffe}b\u{ffff}c\u{fffd}"), "a\u{fffd}b\u{fffd}c\u{fffd}");
        // These are characters of XML 1.0.
        let others = "\u{85}\u{9f}\u{d7ff}\u{e000}\u{fdd0}\u{1ffff}\u{10ffff}";
        assert_eq!(escaped(others), others);
    }

    #[test]
    fn the_query_decides_before_the_header() {
        let xml = Ok(Format::Xml { declaration: true });
        assert_eq!(Format::of("", ""), Ok(Format::Json));
        assert_eq!(Format::of("", "application/xml"), xml);
        assert_eq!(Format::of("", "text/html,application/xml;q=0.9"), Ok(Format::Json));
        assert_eq!(Format::of("format=json", "application/xml"), Ok(Format::Json));
        assert_eq!(Format::of("format=xml", ""), xml);
        let bare = Ok(Format::Xml { declaration: false });
        assert_eq!(Format::of("type=XML&xml_meta=false", ""), bare, "as acl asks");
        assert_eq!(Format::of("format=yaml", ""), Err("yaml".to_owned()));
    }
}
