//! UDP (RFC 768).

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::ids::Protocol;
use crate::{bytes, checksum};

/// Length of the header in bytes.
pub const LEN: usize = 8;

/// UDP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Length of header and payload, in bytes.
    pub length: u16,
    /// Checksum; 0 means none over IPv4 (RFC 768), and over IPv6 only for tunnels (RFC 6935).
    pub checksum: u16,
}

impl Header {
    /// Reads the first [`LEN`] bytes; `None` if there are fewer. The length field is not checked.
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        let [s0, s1, d0, d1, l0, l1, c0, c1] = *bytes::array_at::<LEN>(datagram, 0)?;
        Some(Self {
            source_port: u16::from_be_bytes([s0, s1]),
            destination_port: u16::from_be_bytes([d0, d1]),
            length: u16::from_be_bytes([l0, l1]),
            checksum: u16::from_be_bytes([c0, c1]),
        })
    }

    /// Writes the first [`LEN`] bytes of `out`; `None`, and `out` untouched, if it is shorter.
    pub fn emit(&self, out: &mut [u8]) -> Option<()> {
        let [s0, s1] = self.source_port.to_be_bytes();
        let [d0, d1] = self.destination_port.to_be_bytes();
        let [l0, l1] = self.length.to_be_bytes();
        let [c0, c1] = self.checksum.to_be_bytes();
        bytes::put(out, 0, [s0, s1, d0, d1, l0, l1, c0, c1])
    }
}

/// The checksum to write into a datagram over IPv4 whose checksum field is zero; never 0. Computed over a datagram
/// with its checksum in place, it is 0xffff exactly if that is right.
///
/// Lengths above 65535 do not fit a datagram; the pseudo-header then carries 65535.
pub fn checksum_v4(source: Ipv4Addr, destination: Ipv4Addr, datagram: &[u8]) -> u16 {
    let len = u16::try_from(datagram.len()).unwrap_or(u16::MAX);
    never_zero(checksum::pseudo_v4(source, destination, Protocol::UDP, len) + checksum::sum(datagram))
}

/// As [`checksum_v4`], over IPv6 (RFC 8200 section 8.1).
pub fn checksum_v6(source: Ipv6Addr, destination: Ipv6Addr, datagram: &[u8]) -> u16 {
    let len = u32::try_from(datagram.len()).unwrap_or(u32::MAX);
    never_zero(checksum::pseudo_v6(source, destination, Protocol::UDP, len) + checksum::sum(datagram))
}

/// RFC 768: "If the computed checksum is zero, it is transmitted as all ones".
fn never_zero(sum: u64) -> u16 {
    match checksum::finish(sum) {
        0 => 0xffff,
        check => check,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::hex;

    /// Made by scapy 2.8: `IP(src='10.1.2.3', dst='10.4.5.6') / UDP(sport=53, dport=5353) / b'abc'`.
    #[test]
    fn checksum_of_scapy_over_v4() {
        let mut datagram = hex("003514e9000b0b4a616263");
        let header = Header { source_port: 53, destination_port: 5353, length: 11, checksum: 0x0b4a };
        assert_eq!(Header::parse(&datagram), Some(header));
        let (source, destination) = ([10, 1, 2, 3].into(), [10, 4, 5, 6].into());
        assert_eq!(checksum_v4(source, destination, &datagram), 0xffff);
        datagram[6..8].fill(0);
        assert_eq!(checksum_v4(source, destination, &datagram), 0x0b4a);
    }

    /// Made by scapy 2.8: `IPv6(src='2001:db8::1', dst='2001:db8::2') / UDP(sport=4500, dport=500) / b'odd length!'`.
    #[test]
    fn checksum_of_scapy_over_v6() {
        let mut datagram = hex("119401f400134d116f6464206c656e67746821");
        let (source, destination) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        assert_eq!(checksum_v6(source, destination, &datagram), 0xffff);
        datagram[6..8].fill(0);
        assert_eq!(checksum_v6(source, destination, &datagram), 0x4d11);
    }

    /// RFC 768: zero is transmitted as all ones.
    #[test]
    fn checksum_is_never_zero() {
        let source = Ipv4Addr::UNSPECIFIED;
        // The sum of all else is 17 (protocol) + 8 (pseudo-header) + 8 (header) + the source port.
        let mut datagram = [0; LEN];
        Header { source_port: 0xffff - 33, destination_port: 0, length: 8, checksum: 0 }
            .emit(&mut datagram)
            .unwrap();
        assert_eq!(checksum_v4(source, source, &datagram), 0xffff);
        assert_eq!(checksum_v6(Ipv6Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, &datagram), 0xffff);
    }
}
