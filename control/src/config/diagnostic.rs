//! What is said about a configuration file: where, which key, what is wrong and what is allowed. Never a value: it could be a key.

use core::cell::{Cell, RefCell};
use core::fmt;
use core::ops::Range;

use serde::{Deserialize, Serialize};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file cannot be used.
    Error,
    /// The file can be used, but perhaps not as it was meant.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// The file as it was named.
    pub file: String,
    /// Line, from 1; 0 where the file could not be read at all.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The key's path, such as `tunnel.out.key`; empty for the file as a whole.
    pub key: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { severity, file, line, column, key, message } = self;
        write!(f, "{file}:")?;
        if *line > 0 {
            write!(f, "{line}:{column}:")?;
        }
        write!(f, " {severity}: ")?;
        if !key.is_empty() {
            write!(f, "`{key}`: ")?;
        }
        f.write_str(message)
    }
}

/// Findings are complete up to here; what follows is counted only.
const LIMIT: usize = 50;

/// Collects findings while a file is read.
pub(super) struct Report<'a> {
    file: &'a str,
    text: &'a str,
    found: RefCell<Vec<Diagnostic>>,
    errors: Cell<usize>,
}

impl<'a> Report<'a> {
    pub(super) fn new(file: &'a str, text: &'a str) -> Self {
        Self { file, text, found: RefCell::default(), errors: Cell::new(0) }
    }

    pub(super) fn error(&self, span: Range<usize>, key: &str, message: impl Into<String>) {
        self.errors.set(self.errors.get() + 1);
        self.add(Severity::Error, span, key, message.into());
    }

    pub(super) fn warn(&self, span: Range<usize>, key: &str, message: impl Into<String>) {
        self.add(Severity::Warning, span, key, message.into());
    }

    /// Whether an error was reported.
    pub(super) fn failed(&self) -> bool {
        self.errors.get() > 0
    }

    /// All findings in the order of their lines.
    pub(super) fn into_findings(self) -> Vec<Diagnostic> {
        let mut found = self.found.into_inner();
        found.sort_by_key(|finding| (finding.line, finding.column));
        found
    }

    fn add(&self, severity: Severity, span: Range<usize>, key: &str, message: String) {
        let mut found = self.found.borrow_mut();
        if found.len() < LIMIT {
            let (line, column) = position(self.text, span.start);
            found.push(Diagnostic {
                severity,
                file: self.file.to_owned(),
                line,
                column,
                key: key.to_owned(),
                message,
            });
        }
    }
}

/// Line and column, from 1, of the byte at `offset`.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset.min(text.len())).unwrap_or_default();
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    (line, column)
}

/// The one of `known` that `word` is probably meant to be.
pub(super) fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let allowed = (word.chars().count() / 3).clamp(1, 3);
    known
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Restricted edit distance (Damerau): insertions, deletions, replacements and swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    let mut previous = None;
    for (i, from) in a.chars().enumerate() {
        let mut row = Vec::with_capacity(b.len() + 1);
        row.push(i + 1);
        for (j, to) in b.iter().enumerate() {
            let at = |row: &[usize], index: usize| row.get(index).copied().unwrap_or(usize::MAX - 1);
            let mut cost =
                (at(&last, j) + usize::from(from != *to)).min(at(&last, j + 1) + 1).min(at(&row, j) + 1);
            let swapped = j.checked_sub(1).and_then(|k| b.get(k)) == Some(&from) && previous == Some(*to);
            if swapped && let Some(k) = j.checked_sub(1) {
                cost = cost.min(at(&before_last, k) + 1);
            }
            row.push(cost);
        }
        before_last = core::mem::replace(&mut last, row);
        previous = Some(from);
    }
    last.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, expected) in [
            ("", "", 0),
            ("abc", "abc", 0),
            ("abc", "acb", 1),
            ("abc", "ab", 1),
            ("", "ab", 2),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
        assert_eq!(nearest("soket", ["state", "socket"]), Some("socket"));
        assert_eq!(nearest("xyz", ["state", "socket"]), None);
    }

    #[test]
    fn positions_count_characters() {
        let text = "ä = 1\nöö = 2";
        assert_eq!(position(text, 0), (1, 1));
        assert_eq!(position(text, text.find("= 2").unwrap()), (2, 4));
        assert_eq!(position(text, 1000), (2, 7));
    }
}
