//! Types that are read from one value, and the words for them.

use core::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use postern_contract::sa::{DfPolicy, DscpPolicy, Mode};
use postern_wire::ids::{Protocol, Spi};
use toml::de::DeValue;

use crate::config::reader::{Read, expected};
use crate::config::suite::{EspSuite, Mac};

/// Ports of a selector.
pub(super) struct Ports(pub(super) RangeInclusive<u16>);

/// A value that is one of a few words.
pub(super) fn one_of<T: Copy>(value: &DeValue<'_>, words: &[(&str, T)]) -> Option<T> {
    let DeValue::String(text) = value else { return None };
    words.iter().find(|(word, _)| word == text).map(|(_, value)| *value)
}

impl Read for PathBuf {
    const EXPECTED: &'static str = "a path in quotes";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match String::read(value) {
            Ok(text) if !text.is_empty() && !text.contains('\0') => Ok(Path::new(&text).to_owned()),
            _ => Err(expected::<Self>()),
        }
    }
}

impl Read for Mode {
    const EXPECTED: &'static str = "\"tunnel\" or \"transport\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        one_of(&value, &[("tunnel", Self::Tunnel), ("transport", Self::Transport)])
            .ok_or_else(expected::<Self>)
    }
}

impl Read for DfPolicy {
    const EXPECTED: &'static str = "\"copy\", \"set\" or \"clear\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [("copy", Self::Copy), ("set", Self::Set), ("clear", Self::Clear)];
        one_of(&value, &words).ok_or_else(expected::<Self>)
    }
}

impl Read for DscpPolicy {
    const EXPECTED: &'static str = "\"copy\" or a number from 0 to 63";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        if let Some(copy) = one_of(&value, &[("copy", Self::Copy)]) {
            return Ok(copy);
        }
        let number = u16::read(value).ok().and_then(|number| u8::try_from(number).ok());
        number.filter(|number| *number < 64).map(Self::Fixed).ok_or_else(expected::<Self>)
    }
}

impl Read for Spi {
    const EXPECTED: &'static str =
        "an SPI from 0x100 to 0xffffffff (0 to 255 are reserved, RFC 4303 section 2.1)";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        u32::read(value).ok().map(Self).filter(|spi| spi.is_usable()).ok_or_else(expected::<Self>)
    }
}

impl Read for Protocol {
    const EXPECTED: &'static str =
        "\"tcp\", \"udp\", \"icmp\", \"icmpv6\", \"sctp\", \"gre\" or a number from 0 to 255";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [
            ("tcp", Self::TCP),
            ("udp", Self::UDP),
            ("icmp", Self::ICMP),
            ("icmpv6", Self::ICMPV6),
            ("sctp", Self(132)),
            ("gre", Self(47)),
        ];
        if let Some(protocol) = one_of(&value, &words) {
            return Ok(protocol);
        }
        let number = u16::read(value).ok().and_then(|number| u8::try_from(number).ok());
        number.map(Self).ok_or_else(expected::<Self>)
    }
}

impl Read for Ports {
    const EXPECTED: &'static str = "a port such as \"443\" or a range such as \"1000-2000\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let range = match value {
            DeValue::String(text) if text == "any" => Some(0..=u16::MAX),
            DeValue::String(text) => {
                let (start, end) = text.split_once('-').unwrap_or((&text, &text));
                start.trim().parse().ok().zip(end.trim().parse().ok()).map(|(start, end)| start..=end)
            }
            number => u16::read(number).ok().map(|port| port..=port),
        };
        range.filter(|range| !range.is_empty()).map(Self).ok_or_else(expected::<Self>)
    }
}

impl Read for EspSuite {
    const EXPECTED: &'static str = "algorithms in quotes, such as \"aes128gcm16\" or \"aes256-sha256\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Self::parse(&text),
            _ => Err(expected::<Self>()),
        }
    }
}

impl Read for Mac {
    const EXPECTED: &'static str = "an algorithm in quotes, such as \"sha256\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Self::parse_ah(&text),
            _ => Err(expected::<Self>()),
        }
    }
}
