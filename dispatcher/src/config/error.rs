//! What a mistake looks like to the person who made it: place, line, caret, and what to write instead.

use std::fmt;
use std::io;
use std::ops::Range;

/// Why there is no configuration.
#[derive(Debug)]
pub enum ConfigError {
    /// The file itself could not be read.
    Unreadable {
        /// Its path.
        file: String,
        /// Why not.
        error: io::Error,
    },
    /// It holds mistakes.
    Invalid {
        /// All of them, in the order of the file; at least one.
        mistakes: Vec<Diagnostic>,
        /// What is valid beside them and probably not meant.
        warnings: Vec<Warning>,
    },
}

impl ConfigError {
    /// The first mistake and its place, if the file could be read at all.
    pub fn diagnostic(&self) -> Option<&Diagnostic> {
        self.diagnostics().first()
    }

    /// Every mistake and its place, in the order of the file. None if the file could not be read.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        match self {
            ConfigError::Invalid { mistakes, .. } => mistakes,
            ConfigError::Unreadable { .. } => &[],
        }
    }

    /// What is valid beside the mistakes and probably not meant.
    pub fn warnings(&self) -> &[Warning] {
        match self {
            ConfigError::Invalid { warnings, .. } => warnings,
            ConfigError::Unreadable { .. } => &[],
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::Unreadable { file, error } => write!(f, "{file}: {error}"),
            ConfigError::Invalid { mistakes, .. } => {
                for (position, mistake) in mistakes.iter().enumerate() {
                    if position > 0 {
                        f.write_str("\n")?;
                    }
                    mistake.write(f, "")?;
                }
                match mistakes.len() {
                    0 | 1 => Ok(()),
                    count => write!(f, "\n{count} mistakes"),
                }
            }
        }
    }
}

impl std::error::Error for ConfigError {}

/// Something valid that is probably not meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning(pub Diagnostic);

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f, "warning: ")
    }
}

/// A message about one place in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The file, as it was named to us.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// How many characters are meant, at least 1.
    pub width: usize,
    /// The whole line, without its end.
    pub text: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    fn write(&self, f: &mut fmt::Formatter<'_>, kind: &str) -> fmt::Result {
        let number = self.line.to_string();
        let gutter = " ".repeat(number.len());
        // Tabs stay tabs, so that the caret lines up however wide the terminal makes them.
        let indent: String = self
            .text
            .chars()
            .take(self.column - 1)
            .map(|c| if c == '\t' { '\t' } else { ' ' })
            .collect();
        let carets = "^".repeat(self.width);
        writeln!(f, "{}:{}:{}: {kind}{}", self.file, self.line, self.column, self.message)?;
        writeln!(f, " {number} | {}", self.text)?;
        write!(f, " {gutter} | {indent}{carets}")?;
        match &self.help {
            Some(help) => write!(f, "\nhelp: {help}"),
            None => Ok(()),
        }
    }
}

/// A mistake before its place is known as line and column.
#[derive(Debug)]
pub(super) struct Mistake {
    /// Bytes of the text that are meant.
    pub span: Range<usize>,
    pub message: String,
    pub help: Option<String>,
    /// Something is missing here. It may be missing only because another mistake hides it.
    pub absence: bool,
}

impl Mistake {
    pub(super) fn new(span: Range<usize>, message: impl Into<String>) -> Mistake {
        Mistake { span, message: message.into(), help: None, absence: false }
    }

    /// Something that is missing. It is not reported beside mistakes that may hide it.
    pub(super) fn absence(span: Range<usize>, message: impl Into<String>) -> Mistake {
        Mistake { absence: true, ..Mistake::new(span, message) }
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Mistake {
        self.help = Some(help.into());
        self
    }
}

/// A configuration text and what to call it.
pub(super) struct Source<'a> {
    pub file: &'a str,
    pub text: &'a str,
}

impl Source<'_> {
    pub(super) fn error(&self, mistake: Mistake) -> ConfigError {
        self.errors(vec![mistake], Vec::new())
    }

    /// At least one mistake.
    pub(super) fn errors(&self, mistakes: Vec<Mistake>, warnings: Vec<Warning>) -> ConfigError {
        let mut mistakes: Vec<Diagnostic> = mistakes.into_iter().map(|m| self.locate(m)).collect();
        mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
        // A default is looked at once for every pool; once is enough to say it.
        mistakes.dedup();
        ConfigError::Invalid { mistakes, warnings }
    }

    pub(super) fn warning(&self, mistake: Mistake) -> Warning {
        Warning(self.locate(mistake))
    }

    /// The bytes a span means; empty when the span is none of this text.
    pub(super) fn slice(&self, span: &Range<usize>) -> &str {
        self.text.get(span.clone()).unwrap_or_default()
    }

    /// Whether two spans begin in the same line.
    pub(super) fn same_line(&self, one: &Range<usize>, two: &Range<usize>) -> bool {
        let (first, last) = (one.start.min(two.start), one.start.max(two.start));
        let between = self.text.as_bytes().get(first..last.min(self.text.len()));
        !between.unwrap_or_default().contains(&b'\n')
    }

    fn locate(&self, mistake: Mistake) -> Diagnostic {
        let mut start = mistake.span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &self.text[..start];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let rest = &self.text[line_start..];
        let text = rest.split('\n').next().unwrap_or_default();
        let text = text.strip_suffix('\r').unwrap_or(text);
        // A span may go over several lines (a table): the caret marks its part of the first one.
        let line_end = line_start + text.len();
        // What is missing at the end of a line is missing before its line break, whichever kind that is.
        let start = start.min(line_end);
        let end = mistake.span.end.min(line_end);
        let width =
            self.text.get(start..end).map_or(1, |marked| marked.trim_end().chars().count().max(1));
        Diagnostic {
            file: self.file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: self.text[line_start..start].chars().count() + 1,
            width,
            text: text.to_owned(),
            message: mistake.message,
            help: mistake.help,
        }
    }
}

/// The candidate a person most likely meant, if any is near enough to be worth saying.
pub(super) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    candidates
        .into_iter()
        .filter_map(|candidate| {
            let folded = candidate.to_lowercase().replace('-', "_");
            let distance = strsim::damerau_levenshtein(&word, &folded);
            let longest = word.chars().count().max(folded.chars().count());
            // `max_connections` for `max_connections_per_worker` is far by letters and near by sense.
            let prefix = word.len() >= 4 && folded.starts_with(&word);
            (distance * 3 <= longest + 2 || prefix).then_some((distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// `did you mean …?`, or everything there is to choose from.
pub(super) fn suggest<'a>(
    word: &str,
    what: &str,
    candidates: impl IntoIterator<Item = &'a str> + Clone,
) -> String {
    match nearest(word, candidates.clone()) {
        Some(candidate) => format!("did you mean `{candidate}`?"),
        None => {
            let all: Vec<&str> = candidates.into_iter().collect();
            format!("{what}: {}", all.join(", "))
        }
    }
}
