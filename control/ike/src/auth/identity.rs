//! Identities (RFC 7296 section 3.5) and the patterns that a configuration demands of them.
//!
//! An [`Identity`] holds nothing but text that can be shown: data of an Identification payload that is not what its
//! type promises (a host name with control characters, a name that is no DER) is kept as [`Identity::Other`], byte for
//! byte, and shown in hexadecimal. So `Display` of any identity is safe in a log, and bounded.

use core::fmt;
use core::hash::{Hash, Hasher};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use super::name::DistinguishedName;
use crate::message::IdData;
use crate::message::registry::IdType;

/// Longest host name or mail address, in bytes, that is taken for one.
const TEXT_LIMIT: usize = 320;
/// Bytes of opaque data that are shown.
const SHOWN_LIMIT: usize = 64;

/// Who someone is. Host names, mail addresses and strings in distinguished names compare without regard to case.
#[derive(Clone, Debug)]
pub enum Identity {
    /// ID_IPV4_ADDR or ID_IPV6_ADDR.
    Ip(IpAddr),
    /// ID_FQDN; also the plain user names that clients with EAP send under this type.
    Fqdn(String),
    /// ID_RFC822_ADDR.
    Email(String),
    /// ID_DER_ASN1_DN.
    Dn(DistinguishedName),
    /// ID_KEY_ID.
    KeyId(Vec<u8>),
    /// Another type, or data that does not fit its type.
    Other(IdData),
}

/// Text that is no identity or pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Nothing at all.
    #[error("an identity is empty")]
    Empty,
    /// Too long.
    #[error("the identity is longer than {TEXT_LIMIT} bytes")]
    TooLong,
    /// Control characters.
    #[error("the identity {0:?} has characters that cannot be shown, or spaces around it")]
    Unprintable(String),
    /// After `keyid:0x` or `@#`.
    #[error("the key identifier {0:?} is no even number of hexadecimal digits")]
    Hex(String),
    /// After `ip:`.
    #[error("{0:?} is no address")]
    Address(String),
    /// In a distinguished name.
    #[error("the distinguished name {name:?}: {what}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        what: String,
    },
}

impl Identity {
    /// Of an Identification payload. Never fails: what does not fit its type is [`Identity::Other`].
    pub fn from_data(data: &IdData) -> Self {
        let other = || Self::Other(data.clone());
        match data.kind {
            IdType::IPV4_ADDR => <[u8; 4]>::try_from(data.data.as_slice())
                .map_or_else(|_| other(), |octets| Self::Ip(IpAddr::V4(Ipv4Addr::from(octets)))),
            IdType::IPV6_ADDR => <[u8; 16]>::try_from(data.data.as_slice())
                .map_or_else(|_| other(), |octets| Self::Ip(IpAddr::V6(Ipv6Addr::from(octets)))),
            IdType::FQDN => shown(&data.data).map_or_else(other, Self::Fqdn),
            IdType::RFC822_ADDR => shown(&data.data).map_or_else(other, Self::Email),
            IdType::DER_ASN1_DN => DistinguishedName::from_der(&data.data).map_or_else(|_| other(), Self::Dn),
            IdType::KEY_ID => Self::KeyId(data.data.clone()),
            _ => other(),
        }
    }

    /// For an Identification payload.
    pub fn to_data(&self) -> IdData {
        let (kind, data) = match self {
            Self::Ip(IpAddr::V4(address)) => (IdType::IPV4_ADDR, address.octets().to_vec()),
            Self::Ip(IpAddr::V6(address)) => (IdType::IPV6_ADDR, address.octets().to_vec()),
            Self::Fqdn(text) => (IdType::FQDN, text.as_bytes().to_vec()),
            Self::Email(text) => (IdType::RFC822_ADDR, text.as_bytes().to_vec()),
            Self::Dn(name) => (IdType::DER_ASN1_DN, name.der().to_vec()),
            Self::KeyId(data) => (IdType::KEY_ID, data.clone()),
            Self::Other(data) => return data.clone(),
        };
        IdData { kind, data }
    }
}

impl From<&IdData> for Identity {
    fn from(data: &IdData) -> Self {
        Self::from_data(data)
    }
}

impl From<&Identity> for IdData {
    fn from(identity: &Identity) -> Self {
        identity.to_data()
    }
}

impl From<IpAddr> for Identity {
    fn from(address: IpAddr) -> Self {
        Self::Ip(address)
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ip(a), Self::Ip(b)) => a == b,
            (Self::Fqdn(a), Self::Fqdn(b)) | (Self::Email(a), Self::Email(b)) => a.eq_ignore_ascii_case(b),
            (Self::Dn(a), Self::Dn(b)) => a == b,
            (Self::KeyId(a), Self::KeyId(b)) => a == b,
            (Self::Other(a), Self::Other(b)) => a == b,
            _ => false,
        }
    }
}

impl Eq for Identity {}

impl Hash for Identity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        core::mem::discriminant(self).hash(state);
        match self {
            Self::Ip(address) => address.hash(state),
            Self::Fqdn(text) | Self::Email(text) => {
                for byte in text.bytes() {
                    state.write_u8(byte.to_ascii_lowercase());
                }
                state.write_u8(0xff);
            }
            Self::Dn(name) => name.hash(state),
            Self::KeyId(data) => data.hash(state),
            Self::Other(data) => data.hash(state),
        }
    }
}

/// As strongSwan writes them, so that its configurations can be taken over: an address, `host` or `@host`, `a@b`,
/// `C=CH, O=x, CN=y`, `keyid:text`, `keyid:0x0a1b` or `@#0a1b`. A type in front (`fqdn:`, `dns:`, `email:`, `rfc822:`,
/// `dn:`, `asn1dn:`, `ip:`, `ipv4:`, `ipv6:`) settles what would be guessed otherwise.
impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let text = text.trim();
        if let Some((kind, rest)) = text.split_once(':') {
            let rest = rest.trim();
            match kind.to_ascii_lowercase().as_str() {
                "fqdn" | "dns" => return printable(rest).map(Self::Fqdn),
                "email" | "rfc822" | "userfqdn" => return printable(rest).map(Self::Email),
                "dn" | "asn1dn" => return name(rest),
                "ip" | "ipv4" | "ipv6" => {
                    return rest.parse().map(Self::Ip).map_err(|_| IdentityError::Address(rest.to_owned()));
                }
                "keyid" => {
                    return match rest.strip_prefix("0x") {
                        Some(digits) => unhex(digits).map(Self::KeyId),
                        None => printable(rest).map(|text| Self::KeyId(text.into_bytes())),
                    };
                }
                _ => {}
            }
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Ip(address));
        }
        if let Some(digits) = text.strip_prefix("@#") {
            return unhex(digits).map(Self::KeyId);
        }
        if let Some(mail) = text.strip_prefix("@@") {
            return printable(mail.trim()).map(Self::Email);
        }
        if let Some(host) = text.strip_prefix('@') {
            return printable(host.trim()).map(Self::Fqdn);
        }
        if text.contains('=') {
            return name(text);
        }
        if text.contains('@') {
            return printable(text).map(Self::Email);
        }
        printable(text).map(Self::Fqdn)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => fmt::Display::fmt(address, f),
            // With its type in front if it would be read as something else.
            Self::Fqdn(text) | Self::Email(text) => {
                let plain = text.parse::<IdentityPattern>().is_ok_and(|read| read.exact() == Some(self));
                let prefix = match self {
                    _ if plain => "",
                    Self::Fqdn(_) => "fqdn:",
                    _ => "email:",
                };
                write!(f, "{prefix}{text}")
            }
            Self::Dn(name) => fmt::Display::fmt(name, f),
            Self::KeyId(data) => {
                f.write_str("keyid:0x")?;
                hex(f, data)
            }
            Self::Other(data) => {
                write!(f, "{}:0x", data.kind)?;
                hex(f, &data.data)
            }
        }
    }
}

/// What a configuration demands of a peer's identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityPattern {
    /// `%any`: whoever can authenticate.
    Any,
    /// This one.
    Exact(Identity),
    /// `*.example.org`: any host name that ends in what follows the star. Kept with its dot.
    HostSuffix(String),
    /// `*@example.org`: any mail address of the domain. Kept with its `@`.
    MailSuffix(String),
    /// `C=CH, O=x, CN=*`: a distinguished name of the same attributes in the same order, those with a star of any value.
    Name(DistinguishedName),
}

impl IdentityPattern {
    /// Whether `identity` fits.
    pub fn matches(&self, identity: &Identity) -> bool {
        match (self, identity) {
            (Self::Any, _) => true,
            (Self::Exact(wanted), _) => wanted == identity,
            (Self::HostSuffix(suffix), Identity::Fqdn(text))
            | (Self::MailSuffix(suffix), Identity::Email(text)) => ends_with(text, suffix),
            (Self::Name(pattern), Identity::Dn(name)) => pattern.covers(name),
            _ => false,
        }
    }

    /// The higher, the fewer identities fit: of several connections that match, the most specific one is meant.
    pub fn specificity(&self) -> u32 {
        match self {
            Self::Any => 0,
            Self::HostSuffix(suffix) | Self::MailSuffix(suffix) => {
                u32::try_from(suffix.len()).unwrap_or(u32::MAX - 1)
            }
            Self::Name(pattern) => 1 + pattern.fixed_values(),
            Self::Exact(_) => u32::MAX,
        }
    }

    /// The one identity that fits, if it is only one.
    pub fn exact(&self) -> Option<&Identity> {
        match self {
            Self::Exact(identity) => Some(identity),
            _ => None,
        }
    }
}

impl From<Identity> for IdentityPattern {
    fn from(identity: Identity) -> Self {
        match identity {
            Identity::Dn(name) if name.has_star() => Self::Name(name),
            identity => Self::Exact(identity),
        }
    }
}

/// `%any` (also `*`), `*.example.org`, `*@example.org`, a distinguished name with stars, or an [`Identity`].
impl FromStr for IdentityPattern {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let text = text.trim();
        let suffix = text.strip_prefix('@').unwrap_or(text).strip_prefix('*');
        match suffix {
            _ if text == "%any" || text == "*" => Ok(Self::Any),
            Some(suffix) if suffix.starts_with('.') => printable(suffix).map(Self::HostSuffix),
            Some(suffix) if suffix.starts_with('@') => printable(suffix).map(Self::MailSuffix),
            _ => text.parse::<Identity>().map(Self::from),
        }
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("%any"),
            Self::Exact(identity) => fmt::Display::fmt(identity, f),
            Self::HostSuffix(suffix) | Self::MailSuffix(suffix) => write!(f, "*{suffix}"),
            Self::Name(pattern) => fmt::Display::fmt(pattern, f),
        }
    }
}

/// Longer than the suffix, too: the star stands for something.
fn ends_with(text: &str, suffix: &str) -> bool {
    text.len()
        .checked_sub(suffix.len())
        .and_then(|start| text.as_bytes().split_at_checked(start))
        .is_some_and(|(head, tail)| !head.is_empty() && tail.eq_ignore_ascii_case(suffix.as_bytes()))
}

/// Text of a payload, if it can be shown.
fn shown(data: &[u8]) -> Option<String> {
    core::str::from_utf8(data).ok().and_then(|text| printable(text).ok())
}

fn printable(text: &str) -> Result<String, IdentityError> {
    if text.is_empty() {
        Err(IdentityError::Empty)
    } else if text.len() > TEXT_LIMIT {
        Err(IdentityError::TooLong)
    } else if text.chars().any(char::is_control) || text.trim() != text {
        Err(IdentityError::Unprintable(text.to_owned()))
    } else {
        Ok(text.to_owned())
    }
}

fn name(text: &str) -> Result<Identity, IdentityError> {
    text.parse().map(Identity::Dn).map_err(|what: super::name::NameError| IdentityError::Name {
        name: text.to_owned(),
        what: what.to_string(),
    })
}

fn unhex(digits: &str) -> Result<Vec<u8>, IdentityError> {
    let wrong = || IdentityError::Hex(digits.to_owned());
    if digits.is_empty() || !digits.len().is_multiple_of(2) || digits.len() > 2 * TEXT_LIMIT {
        return Err(wrong());
    }
    digits
        .as_bytes()
        .chunks_exact(2)
        .map(|pair| {
            pair.iter().try_fold(0_u8, |value, digit| {
                let digit = char::from(*digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())?;
                Some(value << 4 | digit)
            })
        })
        .collect::<Option<Vec<u8>>>()
        .ok_or_else(wrong)
}

/// Hexadecimal digits of the first bytes.
fn hex(f: &mut fmt::Formatter<'_>, data: &[u8]) -> fmt::Result {
    for byte in data.iter().take(SHOWN_LIMIT) {
        write!(f, "{byte:02x}")?;
    }
    if data.len() > SHOWN_LIMIT { f.write_str("…") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use core::hash::BuildHasher;
    use std::hash::RandomState;

    use proptest::prelude::*;

    use super::*;

    fn id(text: &str) -> Identity {
        text.parse().unwrap()
    }

    fn data(kind: IdType, bytes: &[u8]) -> IdData {
        IdData { kind, data: bytes.to_vec() }
    }

    /// IKE-3: text becomes the type and bytes that strongSwan makes of it (its `identification_create_from_string`).
    #[test]
    fn ike_3_text_as_strongswan_reads_it() {
        for (text, kind, bytes) in [
            ("192.0.2.1", IdType::IPV4_ADDR, &[192, 0, 2, 1][..]),
            ("ip:192.0.2.1", IdType::IPV4_ADDR, &[192, 0, 2, 1]),
            ("2001:db8::1", IdType::IPV6_ADDR, &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
            ("moon.example.org", IdType::FQDN, b"moon.example.org"),
            ("@moon.example.org", IdType::FQDN, b"moon.example.org"),
            ("fqdn:a@b", IdType::FQDN, b"a@b"),
            (" carol ", IdType::FQDN, b"carol"),
            ("carol@example.org", IdType::RFC822_ADDR, b"carol@example.org"),
            ("@@carol", IdType::RFC822_ADDR, b"carol"),
            ("email:carol", IdType::RFC822_ADDR, b"carol"),
            ("keyid:abc", IdType::KEY_ID, b"abc"),
            ("keyid:0x00ff", IdType::KEY_ID, &[0, 0xff]),
            ("@#00FF", IdType::KEY_ID, &[0, 0xff]),
            (
                "C=CH, O=x",
                IdType::DER_ASN1_DN,
                b"\x30\x19\x31\x0b\x30\x09\x06\x03\x55\x04\x06\x13\x02CH\x31\x0a\x30\x08\x06\x03\x55\x04\x0a\x13\x01x",
            ),
        ] {
            let expected = data(kind, bytes);
            assert_eq!(id(text).to_data(), expected, "{text}");
            assert_eq!(Identity::from_data(&expected), id(text));
        }
    }

    /// OPS-2: what is wrong with an identity is said.
    #[test]
    fn ops_2_errors_say_what_is_wrong() {
        for (text, expected) in [
            ("", "an identity is empty"),
            ("keyid:0x1", "the key identifier \"1\" is no even number of hexadecimal digits"),
            ("keyid:0xzz", "the key identifier \"zz\" is no even number of hexadecimal digits"),
            ("ip:moon", "\"moon\" is no address"),
            (
                "moon\u{7}",
                "the identity \"moon\\u{7}\" has characters that cannot be shown, or spaces around it",
            ),
            ("C=CH, moon", "the distinguished name \"C=CH, moon\": \"moon\" is not of the form TYPE=value"),
            (
                "C=CH, X=moon",
                "the distinguished name \"C=CH, X=moon\": the attribute \"X\" is unknown; known are C, O, OU, CN, L, ST, \
                 DC, E, UID, SN and more, or an OID in dots",
            ),
        ] {
            assert_eq!(text.parse::<Identity>().unwrap_err().to_string(), expected);
        }
        assert_eq!("x".repeat(400).parse::<Identity>(), Err(IdentityError::TooLong));
    }

    /// IKE-3: names compare as people expect, and equal ones have equal hashes.
    #[test]
    fn ike_3_equal_identities() {
        let state = RandomState::new();
        for (a, b) in [
            ("moon.example.org", "Moon.EXAMPLE.org"),
            ("carol@example.org", "Carol@Example.org"),
            ("C=CH, O=Linux  strongSwan, CN=moon", "/c=ch/o=linux strongSwan /cn=MOON"),
            ("C=CH, 2.5.4.3=moon", "C=CH, CN=moon"),
        ] {
            assert_eq!(id(a), id(b));
            assert_eq!(state.hash_one(id(a)), state.hash_one(id(b)));
        }
        for (a, b) in [
            ("moon", "moon.example.org"),
            ("moon", "email:moon"),
            ("keyid:moon", "moon"),
            ("C=CH, CN=moon", "CN=moon, C=CH"),
            ("C=CH, CN=moon", "C=CH, CN=moon, CN=moon"),
            ("C=CH, CN=moon", "C=CH+CN=moon"),
            ("C=CH, CN=moon", "C=CH, OU=moon"),
        ] {
            assert_ne!(id(a), id(b));
        }
    }

    /// IKE-3: patterns match what they should and nothing else; the more specific one counts.
    #[test]
    fn ike_3_patterns() {
        for (pattern, matching, others) in [
            ("%any", &["moon", "192.0.2.1", "a@b", "C=CH", "keyid:x"][..], &[][..]),
            (
                "*.example.org",
                &["a.example.org", "a.b.EXAMPLE.org"],
                &[
                    "example.org",
                    ".example.org",
                    "a.example.com",
                    "aexample.org",
                    "email:x.example.org",
                    "192.0.2.1",
                ],
            ),
            (
                "*@example.org",
                &["carol@Example.org"],
                &["email:@example.org", "carol@a.example.org", "fqdn:a@example.org"],
            ),
            (
                "C=CH, O=x, CN=*",
                &["C=CH, O=X, CN=anything", "C=CH, O=x, CN=*"],
                &[
                    "C=CH, O=y, CN=a",
                    "C=CH, O=x",
                    "C=CH, O=x, CN=a, CN=b",
                    "C=CH, O=x, OU=a",
                    "O=x, C=CH, CN=a",
                ],
            ),
            ("moon", &["Moon"], &["moon.example.org", "email:moon"]),
            ("192.0.2.1", &["192.0.2.1"], &["192.0.2.2", "fqdn:192.0.2.1"]),
        ] {
            let parsed: IdentityPattern = pattern.parse().unwrap();
            assert_eq!(parsed.to_string(), pattern);
            assert!(matching.iter().all(|text| parsed.matches(&id(text))), "{pattern}");
            assert!(!others.iter().any(|text| parsed.matches(&id(text))), "{pattern}");
        }
        let specificity: Vec<u32> = ["%any", "*.org", "*.example.org", "moon.example.org"]
            .map(|text| text.parse::<IdentityPattern>().unwrap().specificity())
            .to_vec();
        assert!(specificity.is_sorted() && specificity[0] == 0, "{specificity:?}");
    }

    /// Payloads whose data does not fit their type keep it, and are shown without harm.
    #[test]
    fn odd_payloads_are_kept() {
        for (kind, bytes, shown) in [
            (IdType::FQDN, &b"evil\nname"[..], "FQDN:0x6576696c0a6e616d65"),
            (IdType::FQDN, b"", "FQDN:0x"),
            (IdType::FQDN, b" x", "FQDN:0x2078"),
            (IdType::FQDN, b"a@b", "fqdn:a@b"),
            (IdType::FQDN, b"%any", "fqdn:%any"),
            (IdType::FQDN, b"192.0.2.1", "fqdn:192.0.2.1"),
            (IdType::RFC822_ADDR, b"moon", "email:moon"),
            (IdType::RFC822_ADDR, &[0xff, 0xfe], "RFC822_ADDR:0xfffe"),
            (IdType::IPV4_ADDR, &[1, 2, 3], "IPV4_ADDR:0x010203"),
            (IdType::DER_ASN1_DN, &[0x30, 0x05], "DER_ASN1_DN:0x3005"),
            (IdType(99), b"x", "IdType(99):0x78"),
        ] {
            let identity = Identity::from_data(&data(kind, bytes));
            assert_eq!(identity.to_string(), shown);
            assert_eq!(identity.to_data(), data(kind, bytes));
        }
        assert!(Identity::from_data(&data(IdType::KEY_ID, &[7; 5000])).to_string().len() < 200);
    }

    proptest! {
        /// Any payload becomes an identity that goes back to the same bytes and can be shown on one line.
        #[test]
        fn any_payload(kind in 0_u8..15, bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let data = data(IdType(kind), &bytes);
            let identity = Identity::from_data(&data);
            prop_assert_eq!(identity.to_data(), data);
            prop_assert!(!identity.to_string().chars().any(char::is_control));
        }

        /// Any text is an identity or an error; what is shown reads as the same identity.
        #[test]
        fn any_text(text in "[-@#*.:=,+/\\\\a-zA-Z0-9 é]{0,30}|(C|O|CN)=[ -~]{0,10}(, ?(DC|E|OU)=[ -~é]{0,10}){0,3}") {
            let _ = text.parse::<IdentityPattern>();
            if let Ok(identity) = text.parse::<Identity>() {
                let shown = identity.to_string();
                prop_assert_eq!(Ok(identity.clone()), shown.parse(), "{}", shown);
                prop_assert_eq!(Identity::from_data(&identity.to_data()), identity);
            }
        }
    }
}
