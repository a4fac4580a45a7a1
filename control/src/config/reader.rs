//! Reads a parsed TOML document key by key, remembering where each value stands.
//!
//! A [`Table`] gives up its entries as they are asked for; what is left at [`Table::finish`] is unknown and
//! reported with the nearest known name. Getters report what is wrong and give `None`, so that one run finds all errors.

use core::net::{IpAddr, SocketAddr};
use core::ops::Range;

use ipnet::IpNet;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use zeroize::{Zeroize, Zeroizing};

use super::diagnostic::{Report, nearest};

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Located<T> {
    pub(super) span: Range<usize>,
    pub(super) value: T,
}

/// A table whose keys are being read.
pub(super) struct Table<'r, 'i> {
    report: &'r Report<'r>,
    path: String,
    entries: DeTable<'i>,
    pub(super) span: Range<usize>,
    known: Vec<&'static str>,
    given: Vec<&'static str>,
}

impl<'r, 'i> Table<'r, 'i> {
    pub(super) fn new(report: &'r Report<'r>, path: String, table: Spanned<DeTable<'i>>) -> Self {
        let span = table.span();
        Self { report, path, entries: table.into_inner(), span, known: Vec::new(), given: Vec::new() }
    }

    /// The path of `key` in this table.
    pub(super) fn path_of(&self, key: &str) -> String {
        match (self.path.as_str(), key) {
            ("", key) => key.to_owned(),
            (path, "") => path.to_owned(),
            (path, key) => format!("{path}.{key}"),
        }
    }

    /// Reports an error about `key` of this table, at `span`.
    pub(super) fn error(&self, span: Range<usize>, key: &str, message: impl Into<String>) {
        self.report.error(span, &self.path_of(key), message);
    }

    /// Warns about `key` of this table, at `span`.
    pub(super) fn warn(&self, span: Range<usize>, key: &str, message: impl Into<String>) {
        self.report.warn(span, &self.path_of(key), message);
    }

    /// Whether the file has `key` here; stays true after it was read.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key) || self.given.contains(&key)
    }

    /// The raw value of `key`, if it is there.
    pub(super) fn take(&mut self, key: &'static str) -> Option<Spanned<DeValue<'i>>> {
        self.known.push(key);
        let value = self.entries.remove(key);
        if value.is_some() {
            self.given.push(key);
        }
        value
    }

    /// The value of `key`, if it is there and right.
    pub(super) fn get<T: Read>(&mut self, key: &'static str) -> Option<Located<T>> {
        let value = self.take(key)?;
        let span = value.span();
        match T::read(value.into_inner()) {
            Ok(value) => Some(Located { span, value }),
            Err(problem) => {
                self.error(span, key, problem);
                None
            }
        }
    }

    /// The value of `key`; it is an error if it is not there.
    pub(super) fn need<T: Read>(&mut self, key: &'static str) -> Option<Located<T>> {
        if !self.has(key) {
            self.known.push(key);
            self.error(self.span.clone(), key, format!("missing; expected {}", T::EXPECTED));
            return None;
        }
        self.get(key)
    }

    /// The value of `key`, or `default` if it is not there (or wrong, which is reported).
    pub(super) fn or<T: Read>(&mut self, key: &'static str, default: T) -> T {
        self.get(key).map_or(default, |located| located.value)
    }

    /// The table under `key`.
    pub(super) fn table(&mut self, key: &'static str) -> Option<Table<'r, 'i>> {
        let value = self.take(key)?;
        let span = value.span();
        if let DeValue::Table(table) = value.into_inner() {
            return Some(Table::new(self.report, self.path_of(key), Spanned::new(span, table)));
        }
        self.error(span, key, "expected a table");
        None
    }

    /// The tables of the array under `key` (`[[key]]`).
    pub(super) fn tables(&mut self, key: &'static str) -> Vec<Table<'r, 'i>> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let span = value.span();
        let DeValue::Array(array) = value.into_inner() else {
            self.error(span, key, format!("expected an array of tables: write `[[{}]]`", self.path_of(key)));
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in array {
            let span = item.span();
            if let DeValue::Table(table) = item.into_inner() {
                let path = match table.get("name").map(Spanned::get_ref) {
                    Some(DeValue::String(name)) if name.len() <= 64 && !name.contains(char::is_control) => {
                        format!("{}[{name}]", self.path_of(key))
                    }
                    _ => self.path_of(key),
                };
                tables.push(Table::new(self.report, path, Spanned::new(span, table)));
            } else {
                self.error(span, key, "expected a table");
            }
        }
        tables
    }

    /// All entries that nobody asked for so far, where keys are names of the user's choice.
    pub(super) fn rest(&mut self) -> Vec<(String, Range<usize>, DeValue<'i>)> {
        let entries = core::mem::take(&mut self.entries);
        let entry = |(name, value): (Spanned<std::borrow::Cow<'i, str>>, Spanned<DeValue<'i>>)| {
            (name.into_inner().into_owned(), value.span(), value.into_inner())
        };
        entries.into_iter().map(entry).collect()
    }

    /// Reports every key that nobody asked for.
    pub(super) fn finish(self) {
        for key in self.entries.keys() {
            let name = key.get_ref();
            let message = match nearest(name, self.known.iter().copied()) {
                Some(known) => format!("unknown key; did you mean `{known}`?"),
                None => format!("unknown key; known here: {}", self.known.join(", ")),
            };
            // What looks like no key's name may be a secret in the wrong place.
            let path = if name.len() <= 24 { self.path_of(name) } else { self.path.clone() };
            self.report.error(key.span(), &path, message);
        }
    }
}

/// A type that can be read from one TOML value.
pub(super) trait Read: Sized {
    /// What is allowed, to follow the word "expected".
    const EXPECTED: &'static str;

    /// The value, or what is wrong with it and what is allowed.
    fn read(value: DeValue<'_>) -> Result<Self, String>;
}

/// What is said about a value that is no `T`.
pub(super) fn expected<T: Read>() -> String {
    format!("expected {}", T::EXPECTED)
}

/// An integer that must lie in a range.
fn integer(value: &DeValue<'_>) -> Option<i128> {
    let DeValue::Integer(integer) = value else { return None };
    i128::from_str_radix(integer.as_str(), integer.radix()).ok()
}

macro_rules! read_integer {
    ($($type:ty = $expected:literal),+) => {$(
        impl Read for $type {
            const EXPECTED: &'static str = $expected;
            fn read(value: DeValue<'_>) -> Result<Self, String> {
                integer(&value).and_then(|n| n.try_into().ok()).ok_or_else(expected::<Self>)
            }
        }
    )+};
}
read_integer!(
    u16 = "a number from 0 to 65535",
    u32 = "a number from 0 to 4294967295",
    u64 = "a number from 0 to 18446744073709551615"
);

impl Read for bool {
    const EXPECTED: &'static str = "`true` or `false`";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::Boolean(value) => Ok(value),
            _ => Err(expected::<Self>()),
        }
    }
}

impl Read for String {
    const EXPECTED: &'static str = "a text in quotes";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Ok(text.into_owned()),
            _ => Err(expected::<Self>()),
        }
    }
}

/// A shared secret or a password: wiped on drop.
pub(super) struct Passphrase(pub(super) Zeroizing<String>);

impl Read for Passphrase {
    const EXPECTED: &'static str = "a secret in quotes";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        SecretText::read(value).map(|SecretText(text)| Self(text)).map_err(|_| expected::<Self>())
    }
}

/// A text that may be a key: wiped on drop.
pub(super) struct SecretText(pub(super) Zeroizing<String>);

impl Read for SecretText {
    const EXPECTED: &'static str = "a key as hexadecimal digits in quotes";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Ok(Self(Zeroizing::new(text.into_owned()))),
            mut other => {
                wipe(&mut other);
                Err(expected::<Self>())
            }
        }
    }
}

/// Wipes what a misplaced secret may have left in owned strings; borrowed ones are wiped with the file's text.
fn wipe(value: &mut DeValue<'_>) {
    if let DeValue::String(text) = value
        && let std::borrow::Cow::Owned(text) = text
    {
        text.zeroize();
    }
}

impl Read for IpAddr {
    const EXPECTED: &'static str = "an IP address in quotes, such as \"192.0.2.1\" or \"2001:db8::1\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => text.parse().map_err(|_| expected::<Self>()),
            _ => Err(expected::<Self>()),
        }
    }
}

impl Read for SocketAddr {
    const EXPECTED: &'static str =
        "an IP address and a port in quotes, such as \"127.0.0.1:9464\" or \"[::1]:9464\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => text.parse().map_err(|_| expected::<Self>()),
            _ => Err(expected::<Self>()),
        }
    }
}

/// One network, address or range of addresses of a selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Net(pub(super) postern_contract::sa::AddressRange);

impl Read for Net {
    const EXPECTED: &'static str = "a network such as \"10.1.0.0/24\" or \"2001:db8::/64\", an address, or a range \
         such as \"10.1.0.1-10.1.0.9\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let DeValue::String(text) = value else { return Err(expected::<Self>()) };
        let range = if let Some((start, end)) = text.split_once('-') {
            let ends = start.trim().parse().ok().zip(end.trim().parse().ok());
            ends.map(|(start, end)| postern_contract::sa::AddressRange { start, end })
        } else if let Ok(address) = text.parse::<IpAddr>() {
            Some(IpNet::from(address).into())
        } else if let Ok(net) = text.parse::<IpNet>() {
            if net.addr() != net.network() {
                return Err(format!(
                    "expected a network without host bits: with this prefix length it is \"{}\"",
                    net.trunc()
                ));
            }
            Some(net.into())
        } else {
            None
        };
        range.filter(postern_contract::sa::AddressRange::is_valid).map(Net).ok_or_else(expected::<Self>)
    }
}

impl<T: Read> Read for Vec<T> {
    const EXPECTED: &'static str = "an array";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::Array(array) => array.into_iter().map(|item| T::read(item.into_inner())).collect(),
            _ => Err(format!("expected an array, each element {}", T::EXPECTED)),
        }
    }
}
