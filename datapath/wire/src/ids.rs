//! Registry numbers and identifiers, as open newtypes: an unknown value is a value, not an error.

use core::fmt;

/// Security Parameters Index (RFC 4301 section 4.1), in host byte order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Spi(pub u32);

impl Spi {
    /// RFC 4303 section 2.1: values 1 to 255 are reserved and 0 never appears on the wire.
    pub const FIRST_USABLE: Self = Self(256);

    /// Whether this SPI may name an SA on the wire.
    pub const fn is_usable(self) -> bool {
        self.0 >= Self::FIRST_USABLE.0
    }
}

impl fmt::Debug for Spi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

impl fmt::Display for Spi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Internet protocol number, also the IPv6 next header (IANA protocol-numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Protocol(pub u8);

impl Protocol {
    /// IPv6 hop-by-hop options (RFC 8200 section 4.3).
    pub const HOP_BY_HOP: Self = Self(0);
    /// ICMP for IPv4 (RFC 792).
    pub const ICMP: Self = Self(1);
    /// IPv4 in IP (RFC 2003): the next header of a tunnel-mode ESP packet with an IPv4 inside.
    pub const IPV4: Self = Self(4);
    /// TCP (RFC 9293).
    pub const TCP: Self = Self(6);
    /// UDP (RFC 768).
    pub const UDP: Self = Self(17);
    /// IPv6 in IP (RFC 2473).
    pub const IPV6: Self = Self(41);
    /// IPv6 routing header (RFC 8200 section 4.4).
    pub const ROUTING: Self = Self(43);
    /// IPv6 fragment header (RFC 8200 section 4.5).
    pub const FRAGMENT: Self = Self(44);
    /// Encapsulating Security Payload (RFC 4303).
    pub const ESP: Self = Self(50);
    /// Authentication Header (RFC 4302).
    pub const AH: Self = Self(51);
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: Self = Self(58);
    /// No next header (RFC 8200 section 4.7); a dummy packet inside ESP (RFC 4303 section 2.6).
    pub const NONE: Self = Self(59);
    /// IPv6 destination options (RFC 8200 section 4.6).
    pub const DEST_OPTIONS: Self = Self(60);
}

/// Ethernet type (IANA ieee-802-numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4.
    pub const IPV4: Self = Self(0x0800);
    /// Address Resolution Protocol (RFC 826).
    pub const ARP: Self = Self(0x0806);
    /// IEEE 802.1Q customer tag.
    pub const VLAN: Self = Self(0x8100);
    /// IPv6.
    pub const IPV6: Self = Self(0x86dd);
}

/// UDP port of IKE (RFC 7296 section 2).
pub const PORT_IKE: u16 = 500;
/// UDP port of IKE and ESP behind a NAT (RFC 3948).
pub const PORT_NATT: u16 = 4500;
