//! The advice interface of a dispatcher, as its client sees it: requests, and what may be answered.
//!
//! An answer comes from another host, so its size is bounded and every part of it is checked. The
//! module does no I/O. It speaks HTTP/1.0, so that no answer comes in chunks.

use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::Address;
use super::failure::Failure;
use super::selection::Candidate;

/// The longest head of an answer, in bytes.
const MAX_HEAD: usize = 8 * 1024;
/// The longest body of an answer, in bytes.
const MAX_BODY: usize = 256 * 1024;
/// The most headers of an answer.
const MAX_HEADERS: usize = 32;
/// The most addresses of a list.
pub(super) const MAX_ADDRESSES: usize = 1_024;
/// Bounds on the time for which a list is used: an answer must not cause a request for each connect
/// of a busy client, and must not be kept for ever.
const VALID_FOR: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3_600));

/// The characters of a path segment that need no escape.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// One address for one new connection.
    Best,
    /// All usable addresses, best first.
    Addresses,
}

/// A checked answer.
#[derive(Debug, PartialEq)]
pub(super) enum Answer {
    Best(Address),
    /// With the time for which the list is valid.
    Addresses(Vec<Candidate<Address>>, Duration),
    /// The host knows no usable address, or not the pool; why.
    Nothing(String),
}

/// The whole request.
pub(super) fn request(question: Question, pool: &str, host: &Address) -> Vec<u8> {
    let pool = utf8_percent_encode(pool, ESCAPED);
    let what = match question {
        Question::Best => "best",
        Question::Addresses => "addresses",
    };
    format!(
        "GET /v1/pools/{pool}/{what} HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n\r\n"
    )
    .into_bytes()
}

/// An answer as it arrives.
#[derive(Debug, Default)]
pub(super) struct Reply {
    bytes: Vec<u8>,
    head: Option<Head>,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    status: u16,
    /// Where the body begins.
    size: usize,
    /// The length of the body; none: it ends with the connection.
    length: Option<usize>,
}

impl Reply {
    /// Adds received bytes; true when the answer is whole.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<bool, Failure> {
        self.add(bytes).map_err(Failure::of_answer)
    }

    fn add(&mut self, bytes: &[u8]) -> Result<bool, String> {
        self.bytes.extend_from_slice(bytes);
        if self.head.is_none() {
            self.head = parse_head(&self.bytes)?;
        }
        let Some(head) = self.head else {
            return if self.bytes.len() > MAX_HEAD {
                Err(format!("the head of its answer is longer than {MAX_HEAD} bytes"))
            } else {
                Ok(false)
            };
        };
        let body = self.bytes.len() - head.size;
        if body > MAX_BODY || head.length.is_some_and(|length| length > MAX_BODY) {
            return Err(format!("its answer is longer than {MAX_BODY} bytes"));
        }
        Ok(head.length.is_some_and(|length| body >= length))
    }

    /// The answer, when it is whole or the connection has ended.
    pub(super) fn finish(self, question: Question) -> Result<Answer, Failure> {
        self.read(question).map_err(Failure::of_answer)
    }

    fn read(self, question: Question) -> Result<Answer, String> {
        let head = self.head.ok_or("it closed the connection without an answer")?;
        let mut body = self.bytes.get(head.size..).unwrap_or_default();
        if let Some(length) = head.length {
            body = body.get(..length).ok_or("its answer is not whole")?;
        }
        answer(question, head.status, body)
    }
}

fn parse_head(bytes: &[u8]) -> Result<Option<Head>, String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let parsed =
        response.parse(bytes).map_err(|error| format!("it does not speak HTTP: {error}"))?;
    let httparse::Status::Complete(size) = parsed else { return Ok(None) };
    let mut length = None;
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err("its answer comes in chunks, which were not asked for".to_owned());
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let text = std::str::from_utf8(header.value).unwrap_or_default();
            let parsed = text.trim().parse::<usize>();
            length = Some(parsed.map_err(|_| "its answer has a length that is no number")?);
        }
    }
    Ok(Some(Head { status: response.code.unwrap_or(0), size, length }))
}

#[derive(Deserialize)]
struct BestBody {
    address: String,
}

#[derive(Deserialize)]
struct AddressesBody {
    valid_for_ms: u64,
    addresses: Vec<Advised>,
}

#[derive(Deserialize)]
struct Advised {
    address: String,
    #[serde(default)]
    score: Option<f64>,
    #[serde(default = "one")]
    weight: f64,
    #[serde(default)]
    state: Option<String>,
}

#[derive(Deserialize)]
struct Refusal {
    error: String,
}

fn one() -> f64 {
    1.0
}

/// A weight as a whole number: hundredths, and at least one of them for every weight above 0.
fn hundredths(weight: f64) -> u32 {
    // A conversion of what is out of range gives the nearest number.
    if weight > 0.0 { ((weight * 100.0) as u32).max(1) } else { 0 }
}

fn answer(question: Question, status: u16, body: &[u8]) -> Result<Answer, String> {
    if status != 200 {
        let said = serde_json::from_slice::<Refusal>(body).map(|refusal| refusal.error);
        let said = said.map_or_else(|_| String::new(), |said| format!(": {}", shown(&said)));
        let problem = format!("it answered {status}{said}");
        return if matches!(status, 404 | 503) {
            Ok(Answer::Nothing(problem))
        } else {
            Err(problem)
        };
    }
    let garbage = |error: serde_json::Error| format!("its answer is not what was asked: {error}");
    let read = |text: &str| {
        let problem = || format!("its answer has {}, which is no address", shown(text));
        text.parse::<Address>().map_err(|_| problem())
    };
    match question {
        Question::Best => {
            let body: BestBody = serde_json::from_slice(body).map_err(garbage)?;
            read(&body.address).map(Answer::Best)
        }
        Question::Addresses => {
            let body: AddressesBody = serde_json::from_slice(body).map_err(garbage)?;
            if body.addresses.len() > MAX_ADDRESSES {
                return Err(format!("its answer has more than {MAX_ADDRESSES} addresses"));
            }
            let mut list: Vec<Candidate<Address>> = Vec::new();
            for advised in body.addresses {
                let address = read(&advised.address)?;
                let usable = advised.state.is_none_or(|state| state == "ok");
                if usable && list.iter().all(|known| known.address != address) {
                    let score = advised.score.filter(|score| score.is_finite());
                    list.push(Candidate { address, weight: hundredths(advised.weight), score });
                }
            }
            let valid_for = Duration::from_millis(body.valid_for_ms);
            Ok(Answer::Addresses(list, valid_for.clamp(VALID_FOR.0, VALID_FOR.1)))
        }
    }
}

/// The text of another host, for an error: short and without control characters.
fn shown(text: &str) -> String {
    text.chars().take(100).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(question: Question, reply: &str) -> Result<Answer, Failure> {
        let mut arriving = Reply::default();
        // Byte by byte, as the slowest peer sends it.
        for byte in reply.as_bytes() {
            if arriving.push(&[*byte])? {
                break;
            }
        }
        arriving.finish(question)
    }

    fn with_length(status: u16, body: &str) -> String {
        format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    #[test]
    fn requests_name_the_pool_in_the_path() {
        let host = "10.0.0.1:9901".parse().unwrap();
        let text = String::from_utf8(request(Question::Best, "a/b ?%ü", &host)).unwrap();
        assert_eq!(
            text,
            "GET /v1/pools/a%2Fb%20%3F%25%C3%BC/best HTTP/1.0\r\nHost: 10.0.0.1:9901\r\n\
             Accept: application/json\r\n\r\n"
        );
    }

    #[test]
    fn answers_with_and_without_a_length_are_read() {
        let best = r#"{"address":"10.0.0.1:8000","score":0.25,"valid_for_ms":1000}"#;
        let expected = Answer::Best("10.0.0.1:8000".parse().unwrap());
        assert_eq!(ask(Question::Best, &with_length(200, best)).unwrap(), expected);
        let until_end = format!("HTTP/1.0 200 OK\r\n\r\n{best}");
        assert_eq!(ask(Question::Best, &until_end).unwrap(), expected);
        let list = r#"{"pool":"web","valid_for_ms":1,"addresses":[
            {"address":"10.0.0.2:8000","load":1,"capacity":null,"score":0.5,"weight":4.0,
             "state":"ok","age_ms":3},
            {"address":"b.example:80","score":null,"state":"ok"},
            {"address":"10.0.0.2:8000"},
            {"address":"10.0.0.3:8000","state":"draining"}]}"#;
        let Answer::Addresses(list, valid_for) =
            ask(Question::Addresses, &with_length(200, list)).unwrap()
        else {
            panic!("another answer")
        };
        let shown: Vec<_> =
            list.iter().map(|c| (c.address.to_string(), c.weight, c.score)).collect();
        let expected =
            [("10.0.0.2:8000".to_owned(), 400, Some(0.5)), ("b.example:80".to_owned(), 100, None)];
        assert_eq!(shown, expected);
        assert_eq!(valid_for, VALID_FOR.0);
    }

    #[test]
    fn everything_else_is_a_problem_that_says_what() {
        let many: Vec<String> =
            (0..MAX_ADDRESSES + 1).map(|n| format!(r#"{{"address":"h{n}:1"}}"#)).collect();
        let many = format!(r#"{{"valid_for_ms":1,"addresses":[{}]}}"#, many.join(","));
        for (reply, expected) in [
            (String::new(), "without an answer"),
            ("SSH-2.0-OpenSSH\r\n".to_owned(), "does not speak HTTP"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}".to_owned(), "not whole"),
            ("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}".to_owned(), "no number"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(), "in chunks"),
            (format!("HTTP/1.1 200 OK\r\nA: {}", "x".repeat(MAX_HEAD)), "head of its answer"),
            (format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(MAX_BODY + 1)), "longer than"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n".to_owned(), "longer than"),
            (with_length(503, r#"{"error":"no \n address"}"#), r"503: no \n address"),
            (with_length(404, "nothing here"), "answered 404"),
            (with_length(200, "[1,2"), "not what was asked"),
            (with_length(200, r#"{"valid_for_ms":-1,"addresses":[]}"#), "not what was asked"),
            (
                with_length(200, r#"{"valid_for_ms":1,"addresses":[{"address":"a\u001b b"}]}"#),
                r"a\u{1b} b, which is no address",
            ),
            (with_length(200, &many), "more than"),
        ] {
            let problem = match ask(Question::Addresses, &reply) {
                Err(Failure { problem, .. }) | Ok(Answer::Nothing(problem)) => problem,
                Ok(answer) => panic!("{answer:?}"),
            };
            assert!(problem.contains(expected), "{problem} is not {expected}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_of_a_host_do_harm(
            head in "(HTTP/1\\.1 200 OK\r\n(Content-Length: [0-9]{1,20}\r\n)?\r\n)?",
            body in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
            cut in 1..50usize,
        ) {
            for question in [Question::Best, Question::Addresses] {
                let mut reply = Reply::default();
                let bytes = [head.as_bytes(), &body].concat();
                let _ = bytes.chunks(cut).find(|part| !matches!(reply.push(part), Ok(false)));
                // Random bytes name no address.
                proptest::prop_assert!(reply.finish(question).is_err());
            }
        }
    }
}
