//! Ethernet II header: destination, source, EtherType. VLAN tags are left to the caller, who sees their EtherType.

use core::fmt;

use crate::bytes;
use crate::ids::EtherType;

/// Length of the header in bytes.
pub const LEN: usize = 14;

/// MAC address, EUI-48.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The broadcast address.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether the address names one station: the individual/group bit is clear (IEEE 802).
    pub const fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([first, rest @ ..]) = self;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|octet| write!(f, ":{octet:02x}"))
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Ethernet II header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Station the frame is for.
    pub destination: Mac,
    /// Station that sent it.
    pub source: Mac,
    /// Protocol of the payload.
    pub ethertype: EtherType,
}

impl Header {
    /// Reads the first [`LEN`] bytes; `None` if there are fewer.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        Some(Self {
            destination: Mac(*bytes::array_at(frame, 0)?),
            source: Mac(*bytes::array_at(frame, 6)?),
            ethertype: EtherType(bytes::u16_at(frame, 12)?),
        })
    }

    /// Writes the first [`LEN`] bytes of `out`; `None`, and `out` untouched, if it is shorter.
    pub fn emit(&self, out: &mut [u8]) -> Option<()> {
        let out = out.first_chunk_mut::<LEN>()?;
        let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (self.destination.0, self.source.0);
        let [t0, t1] = self.ethertype.0.to_be_bytes();
        *out = [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1];
        Some(())
    }
}

/// Reads the header at the start of `frame`, see [`Header::parse`].
pub fn parse(frame: &[u8]) -> Option<Header> {
    Header::parse(frame)
}

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;
    use crate::bytes::hex;

    /// Made by scapy 2.8: `Ether(dst='02:00:5e:10:00:01', src='aa:bb:cc:dd:ee:ff', type=0x86dd)`.
    #[test]
    fn header_of_scapy() {
        let frame = hex("02005e100001aabbccddeeff86dd");
        let header = Header::parse(&frame).unwrap();
        assert_eq!(
            format!("{} {}", header.destination, header.source),
            "02:00:5e:10:00:01 aa:bb:cc:dd:ee:ff"
        );
        assert_eq!(header.ethertype, EtherType::IPV6);
        let mut out = [0xa5; LEN + 1];
        header.emit(&mut out).unwrap();
        assert_eq!((&out[..LEN], out[LEN]), (frame.as_slice(), 0xa5));
        assert_eq!(header.emit(&mut out[..LEN - 1]), None);
    }

    #[test]
    fn group_addresses_are_not_unicast() {
        assert!(Mac([2, 0, 0, 0, 0, 1]).is_unicast());
        assert!(!Mac([0x33, 0x33, 0, 0, 0, 1]).is_unicast());
        assert!(!Mac::BROADCAST.is_unicast());
    }
}
