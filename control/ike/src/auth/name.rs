//! X.500 distinguished names: read from DER, written as people write them, compared as RFC 5280 section 7.1 says.
//!
//! Two names are equal if they have the same attributes in the same order and the values, taken as text, are equal
//! without regard to case and to the amount of white space. The kind of ASN.1 string does not matter: whether a CA
//! wrote `PrintableString` or `UTF8String` is not for the configuration to know.

use core::fmt;
use core::hash::{Hash, Hasher};
use core::str::FromStr;

use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::der::asn1::{Any, ObjectIdentifier, SetOfVec};
use x509_cert::der::{Decode, Encode, Tag, Tagged};
use x509_cert::name::{RdnSequence, RelativeDistinguishedName};

/// Most bytes of a name.
const DER_LIMIT: usize = 4096;

/// Names of attributes (RFC 4514 section 3 and strongSwan's), the one that is shown first.
const ATTRIBUTES: &[(&str, ObjectIdentifier)] = &[
    ("C", ObjectIdentifier::new_unwrap("2.5.4.6")),
    ("O", ObjectIdentifier::new_unwrap("2.5.4.10")),
    ("OU", ObjectIdentifier::new_unwrap("2.5.4.11")),
    ("CN", ObjectIdentifier::new_unwrap("2.5.4.3")),
    ("L", ObjectIdentifier::new_unwrap("2.5.4.7")),
    ("ST", ObjectIdentifier::new_unwrap("2.5.4.8")),
    ("STREET", ObjectIdentifier::new_unwrap("2.5.4.9")),
    ("postalCode", ObjectIdentifier::new_unwrap("2.5.4.17")),
    ("D", ObjectIdentifier::new_unwrap("2.5.4.13")),
    ("SN", ObjectIdentifier::new_unwrap("2.5.4.5")),
    ("serialNumber", ObjectIdentifier::new_unwrap("2.5.4.5")),
    ("S", ObjectIdentifier::new_unwrap("2.5.4.4")),
    ("G", ObjectIdentifier::new_unwrap("2.5.4.42")),
    ("GN", ObjectIdentifier::new_unwrap("2.5.4.42")),
    ("I", ObjectIdentifier::new_unwrap("2.5.4.43")),
    ("T", ObjectIdentifier::new_unwrap("2.5.4.12")),
    ("ID", ObjectIdentifier::new_unwrap("2.5.4.45")),
    ("dnQualifier", ObjectIdentifier::new_unwrap("2.5.4.46")),
    ("DC", DOMAIN_COMPONENT),
    ("UID", ObjectIdentifier::new_unwrap("0.9.2342.19200300.100.1.1")),
    ("E", EMAIL),
    ("EMAIL", EMAIL),
    ("emailAddress", EMAIL),
];
const DOMAIN_COMPONENT: ObjectIdentifier = ObjectIdentifier::new_unwrap("0.9.2342.19200300.100.1.25");
const EMAIL: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.1");

/// A distinguished name.
#[derive(Clone)]
pub struct DistinguishedName {
    der: Vec<u8>,
    /// Relative distinguished names in the order of the encoding, each with its attributes.
    relative: Vec<Vec<Attribute>>,
}

#[derive(Clone)]
struct Attribute {
    kind: ObjectIdentifier,
    value: Value,
}

#[derive(Clone)]
enum Value {
    Text(String),
    Opaque(Vec<u8>),
}

/// Why something is no distinguished name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not DER, or too long.
    #[error("it is no DER encoding of a name")]
    Encoding,
    /// Text without attributes.
    #[error("it is empty")]
    Empty,
    /// A part without `=`.
    #[error("{0:?} is not of the form TYPE=value")]
    NoValue(String),
    /// The attribute is unknown.
    #[error(
        "the attribute {0:?} is unknown; known are C, O, OU, CN, L, ST, DC, E, UID, SN and more, or an OID in dots"
    )]
    Attribute(String),
    /// Control characters.
    #[error("a value has characters that cannot be shown")]
    Unprintable,
}

impl DistinguishedName {
    /// Reads the DER of a `Name`.
    pub fn from_der(der: &[u8]) -> Result<Self, NameError> {
        if der.len() > DER_LIMIT {
            return Err(NameError::Encoding);
        }
        let sequence = RdnSequence::from_der(der).map_err(|_| NameError::Encoding)?;
        Ok(Self::from_sequence(&sequence, der.to_vec()))
    }

    /// Its DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Whether some value is a star.
    pub fn has_star(&self) -> bool {
        self.attributes().any(|attribute| attribute.value.is_star())
    }

    /// As a pattern: whether `name` has the same attributes in the same order and the same values, except where this
    /// one has a star.
    pub fn covers(&self, name: &Self) -> bool {
        self.relative.len() == name.relative.len()
            && self.relative.iter().zip(&name.relative).all(|(pattern, relative)| {
                pattern.len() == relative.len()
                    && pattern.iter().zip(relative).all(|(pattern, attribute)| {
                        pattern.kind == attribute.kind
                            && (pattern.value.is_star() || pattern.value == attribute.value)
                    })
            })
    }

    /// As a pattern: how many values are given.
    pub fn fixed_values(&self) -> u32 {
        u32::try_from(self.attributes().filter(|attribute| !attribute.value.is_star()).count())
            .unwrap_or(u32::MAX)
    }

    fn attributes(&self) -> impl Iterator<Item = &Attribute> {
        self.relative.iter().flatten()
    }

    fn from_sequence(sequence: &RdnSequence, der: Vec<u8>) -> Self {
        let relative = sequence
            .iter()
            .map(|relative| {
                relative
                    .iter()
                    .map(|attribute| Attribute { kind: attribute.oid, value: Value::of(&attribute.value) })
                    .collect()
            })
            .collect();
        Self { der, relative }
    }
}

impl Value {
    fn of(value: &Any) -> Self {
        let bytes = value.value();
        let text = match value.tag() {
            Tag::Utf8String
            | Tag::PrintableString
            | Tag::Ia5String
            | Tag::NumericString
            | Tag::VisibleString => core::str::from_utf8(bytes).ok().map(str::to_owned),
            // In theory T.61, in practice Latin 1.
            Tag::TeletexString => Some(bytes.iter().copied().map(char::from).collect()),
            Tag::BmpString => bmp(bytes),
            _ => None,
        };
        text.map_or_else(|| Self::Opaque(bytes.to_vec()), Self::Text)
    }

    fn is_star(&self) -> bool {
        matches!(self, Self::Text(text) if text == "*")
    }
}

fn bmp(bytes: &[u8]) -> Option<String> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let units: Vec<u16> = pairs.iter().map(|pair| u16::from_be_bytes(*pair)).collect();
    rest.is_empty().then(|| String::from_utf16(&units).ok()).flatten()
}

/// The characters that count in a comparison: lower case, white space collapsed and none at the ends.
fn folded(text: &str) -> impl Iterator<Item = char> {
    text.split_whitespace().enumerate().flat_map(|(i, word)| {
        (i > 0).then_some(' ').into_iter().chain(word.chars().flat_map(char::to_lowercase))
    })
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Text(a), Self::Text(b)) => folded(a).eq(folded(b)),
            (Self::Opaque(a), Self::Opaque(b)) => a == b,
            _ => false,
        }
    }
}

impl Hash for Value {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Self::Text(text) => folded(text).for_each(|c| c.hash(state)),
            Self::Opaque(bytes) => bytes.hash(state),
        }
    }
}

impl PartialEq for DistinguishedName {
    fn eq(&self, other: &Self) -> bool {
        self.relative.len() == other.relative.len()
            && self.relative.iter().zip(&other.relative).all(|(a, b)| {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.kind == b.kind && a.value == b.value)
            })
    }
}

impl Eq for DistinguishedName {}

impl Hash for DistinguishedName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for attribute in self.attributes() {
            attribute.kind.hash(state);
            attribute.value.hash(state);
        }
    }
}

/// `C=CH, O=x, CN=y`, in the order of the encoding (as strongSwan writes it; RFC 4514 has the reverse). A comma within
/// a value is written `\,`, a plus sign joins several attributes of one relative name. With a slash in front
/// (`/C=CH/O=x/CN=y`) slashes separate instead of commas.
impl FromStr for DistinguishedName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.trim();
        let (separator, body) = match text.strip_prefix('/') {
            Some(body) => ('/', body),
            None => (',', text),
        };
        if body.is_empty() {
            return Err(NameError::Empty);
        }
        let mut sequence = Vec::new();
        let mut relative = SetOfVec::new();
        for (part, end) in parts(body, separator) {
            relative.insert(attribute(&part)?).map_err(|_| NameError::Encoding)?;
            if end != Some('+') {
                sequence.push(
                    RelativeDistinguishedName::try_from(Vec::from(core::mem::take(&mut relative)))
                        .map_err(|_| NameError::Encoding)?,
                );
            }
        }
        let sequence = RdnSequence::from(sequence);
        let der = sequence.to_der().map_err(|_| NameError::Encoding)?;
        if der.len() > DER_LIMIT {
            return Err(NameError::Encoding);
        }
        Ok(Self::from_sequence(&sequence, der))
    }
}

/// Splits at `separator` and at plus signs; a backslash takes the next character as it is.
fn parts(text: &str, separator: char) -> Vec<(String, Option<char>)> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut escaped = false;
    for c in text.chars() {
        if !escaped && c == '\\' {
            escaped = true;
        } else if !escaped && (c == separator || c == '+') {
            parts.push((core::mem::take(&mut part), Some(c)));
        } else {
            part.push(c);
            escaped = false;
        }
    }
    parts.push((part, None));
    parts
}

fn attribute(part: &str) -> Result<AttributeTypeAndValue, NameError> {
    let (kind, value) = part.split_once('=').ok_or_else(|| NameError::NoValue(part.trim().to_owned()))?;
    let (kind, value) = (kind.trim(), value.trim());
    let oid = ATTRIBUTES
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(kind))
        .map(|(_, oid)| *oid)
        .or_else(|| ObjectIdentifier::new(kind).ok())
        .ok_or_else(|| NameError::Attribute(kind.to_owned()))?;
    if value.chars().any(char::is_control) {
        return Err(NameError::Unprintable);
    }
    // RFC 5280 section 4.1.2.4 and appendix A: mail addresses and domain components are IA5String.
    let tag = if value.is_ascii() && (oid == EMAIL || oid == DOMAIN_COMPONENT) {
        Tag::Ia5String
    } else if value.chars().all(is_printable_string) {
        Tag::PrintableString
    } else {
        Tag::Utf8String
    };
    let value = Any::new(tag, value.as_bytes()).map_err(|_| NameError::Encoding)?;
    Ok(AttributeTypeAndValue { oid, value })
}

/// The star is not of that set, but a pattern is never sent.
fn is_printable_string(c: char) -> bool {
    c.is_ascii_alphanumeric() || " '()+,-./:=?".contains(c)
}

impl fmt::Display for DistinguishedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, relative) in self.relative.iter().enumerate() {
            for (j, attribute) in relative.iter().enumerate() {
                f.write_str(match (i, j) {
                    (0, 0) => "",
                    (_, 0) => ", ",
                    _ => "+",
                })?;
                match ATTRIBUTES.iter().find(|(_, oid)| *oid == attribute.kind) {
                    Some((name, _)) => f.write_str(name)?,
                    None => fmt::Display::fmt(&attribute.kind, f)?,
                }
                write!(f, "={}", attribute.value)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => text.chars().try_for_each(|c| match c {
                ',' | '+' | '\\' => write!(f, "\\{c}"),
                c if c.is_control() => f.write_str("\u{fffd}"),
                c => write!(f, "{c}"),
            }),
            Self::Opaque(bytes) => {
                f.write_str("#")?;
                bytes.iter().take(64).try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

impl fmt::Debug for DistinguishedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
