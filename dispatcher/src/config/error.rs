//! Messages about mistakes in a configuration: position, line, caret, and a correction.

use std::fmt;
use std::io;
use std::ops::Range;

/// The reason why there is no configuration.
#[derive(Debug)]
pub enum ConfigError {
    /// The file could not be read.
    Unreadable {
        /// The path.
        file: String,
        /// The error of the system.
        error: io::Error,
    },
    /// The file has mistakes.
    Invalid {
        /// All mistakes in the order of the file; at least one.
        mistakes: Vec<Diagnostic>,
        /// The warnings besides the mistakes.
        warnings: Vec<Warning>,
    },
}

impl ConfigError {
    /// The first mistake; `None` if the file could not be read.
    pub fn diagnostic(&self) -> Option<&Diagnostic> {
        self.diagnostics().first()
    }

    /// All mistakes in the order of the file; empty if the file could not be read.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        match self {
            ConfigError::Invalid { mistakes, .. } => mistakes,
            ConfigError::Unreadable { .. } => &[],
        }
    }

    /// Warnings about values that are valid but probably wrong.
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

/// A value that is valid but probably wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning(pub Diagnostic);

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f, "warning: ")
    }
}

/// A message about one position in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The name of the file, as given by the caller.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Number of marked characters, at least 1.
    pub width: usize,
    /// The whole line without its end.
    pub text: String,
    /// The message.
    pub message: String,
    /// How to correct it.
    pub help: Option<String>,
}

impl Diagnostic {
    fn write(&self, f: &mut fmt::Formatter<'_>, kind: &str) -> fmt::Result {
        let number = self.line.to_string();
        let gutter = " ".repeat(number.len());
        // Tabs are kept, so that the caret is aligned for any tab width.
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

/// A mistake with its position in bytes.
#[derive(Debug)]
pub(super) struct Mistake {
    /// The marked bytes of the text.
    pub span: Range<usize>,
    pub message: String,
    pub help: Option<String>,
    /// A key or table is missing here. It may be missing only because of another mistake.
    pub absence: bool,
}

impl Mistake {
    pub(super) fn new(span: Range<usize>, message: impl Into<String>) -> Mistake {
        Mistake { span, message: message.into(), help: None, absence: false }
    }

    /// A missing key or table. It is not reported beside mistakes that may be the cause.
    pub(super) fn absence(span: Range<usize>, message: impl Into<String>) -> Mistake {
        Mistake { absence: true, ..Mistake::new(span, message) }
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Mistake {
        self.help = Some(help.into());
        self
    }
}

/// A configuration text and its name for messages.
pub(super) struct Source<'a> {
    pub file: &'a str,
    pub text: &'a str,
}

impl Source<'_> {
    pub(super) fn error(&self, mistake: Mistake) -> ConfigError {
        self.errors(vec![mistake], Vec::new())
    }

    /// Requires at least one mistake.
    pub(super) fn errors(&self, mistakes: Vec<Mistake>, warnings: Vec<Warning>) -> ConfigError {
        let mut mistakes: Vec<Diagnostic> = mistakes.into_iter().map(|m| self.locate(m)).collect();
        mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
        // A default is checked once for every pool but reported once.
        mistakes.dedup();
        ConfigError::Invalid { mistakes, warnings }
    }

    pub(super) fn warning(&self, mistake: Mistake) -> Warning {
        Warning(self.locate(mistake))
    }

    /// The marked bytes; empty if the span is not within the text.
    pub(super) fn slice(&self, span: &Range<usize>) -> &str {
        self.text.get(span.clone()).unwrap_or_default()
    }

    /// Whether two spans begin on the same line.
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
        // A span may cover several lines, such as a table: the caret marks the part on the first
        // one.
        let line_end = line_start + text.len();
        // The caret for a missing key is before the line break (LF or CRLF).
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

/// The most similar candidate, if one is similar enough.
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
            // `max_connections` differs in many letters from `max_connections_per_worker`, but a
            // common prefix counts as similar.
            let prefix = word.len() >= 4 && folded.starts_with(&word);
            (distance * 3 <= longest + 2 || prefix).then_some((distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// `did you mean …?`, or the list of all candidates.
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
