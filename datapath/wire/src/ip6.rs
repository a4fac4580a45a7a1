//! IPv6 header (RFC 8200): view, builder, in-place changes, and the bounded walk over extension headers.
//!
//! [`View::parse`] checks version and payload length against the bytes; no accessor fails after it. Jumbograms
//! (RFC 2675) are not supported: their payload length of zero reads as an empty packet.

use core::net::Ipv6Addr;

use crate::ids::Protocol;
use crate::{Malformed, bytes};

/// Length of the fixed header in bytes.
pub const LEN: usize = 40;
/// Most extension headers that [`upper`] walks.
pub const MAX_EXTENSIONS: usize = 8;
/// Length of the fragment header in bytes (RFC 8200 section 4.5).
pub const FRAGMENT_LEN: usize = 8;

/// An IPv6 packet whose lengths hold.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    head: &'a [u8; 8],
    source: &'a [u8; 16],
    destination: &'a [u8; 16],
    payload: &'a [u8],
}

impl<'a> View<'a> {
    /// Checks version and that the payload length lies within the bytes. Bytes beyond it are allowed and not part of
    /// the view.
    pub fn parse(packet: &'a [u8]) -> Result<Self, Malformed> {
        let (head, rest) = packet.split_first_chunk::<8>().ok_or(Malformed::Truncated)?;
        if head[0] >> 4 != 6 {
            return Err(Malformed::Version);
        }
        let (source, rest) = rest.split_first_chunk::<16>().ok_or(Malformed::Truncated)?;
        let (destination, rest) = rest.split_first_chunk::<16>().ok_or(Malformed::Truncated)?;
        let payload_len = usize::from(u16::from_be_bytes([head[4], head[5]]));
        let payload = rest.get(..payload_len).ok_or(Malformed::Truncated)?;
        Ok(Self { head, source, destination, payload })
    }

    /// Traffic class: DSCP (RFC 2474) and ECN (RFC 3168).
    pub const fn traffic_class(&self) -> u8 {
        self.head[0] << 4 | self.head[1] >> 4
    }

    /// Flow label, 20 bits (RFC 6437).
    pub const fn flow_label(&self) -> u32 {
        u32::from_be_bytes([0, self.head[1] & 0x0f, self.head[2], self.head[3]])
    }

    /// Payload length field in bytes: extension headers and upper layer.
    pub const fn payload_len(&self) -> usize {
        self.payload.len()
    }

    /// Length of the packet in bytes: fixed header and payload.
    pub const fn total_len(&self) -> usize {
        LEN + self.payload.len()
    }

    /// What follows the fixed header.
    pub const fn next_header(&self) -> Protocol {
        Protocol(self.head[6])
    }

    /// Hop limit.
    pub const fn hop_limit(&self) -> u8 {
        self.head[7]
    }

    /// Source address.
    pub const fn source(&self) -> Ipv6Addr {
        Ipv6Addr::from_octets(*self.source)
    }

    /// Destination address.
    pub const fn destination(&self) -> Ipv6Addr {
        Ipv6Addr::from_octets(*self.destination)
    }

    /// What the payload length leaves after the fixed header, extension headers included.
    pub const fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

/// A fixed header, to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source address.
    pub source: Ipv6Addr,
    /// Destination address.
    pub destination: Ipv6Addr,
    /// What follows.
    pub next_header: Protocol,
    /// Hop limit.
    pub hop_limit: u8,
    /// DSCP and ECN.
    pub traffic_class: u8,
    /// Flow label; its low 20 bits are written.
    pub flow_label: u32,
}

impl Header {
    /// Writes [`LEN`] bytes to the start of `out`. `None`, and `out` untouched, if it is shorter or the payload
    /// exceeds 65535 bytes.
    pub fn emit(&self, out: &mut [u8], payload_len: usize) -> Option<()> {
        let payload_len = u16::try_from(payload_len).ok()?;
        let out = out.first_chunk_mut::<LEN>()?;
        let first = 6 << 28 | u32::from(self.traffic_class) << 20 | self.flow_label & 0x000f_ffff;
        bytes::put(out, 0, first.to_be_bytes())?;
        bytes::put_u16(out, 4, payload_len)?;
        [out[6], out[7]] = [self.next_header.0, self.hop_limit];
        bytes::put(out, 8, self.source.octets())?;
        bytes::put(out, 24, self.destination.octets())
    }
}

/// Replaces both addresses. Checksums of the upper layer are the caller's.
pub fn set_addresses(header: &mut [u8], source: Ipv6Addr, destination: Ipv6Addr) -> Option<()> {
    let head = header.first_chunk_mut::<LEN>()?;
    bytes::put(head, 8, source.octets())?;
    bytes::put(head, 24, destination.octets())
}

/// Takes one from the hop limit; `None` when it is 1 or 0, and the packet must not be forwarded (RFC 8200 section 3).
pub fn decrement_hop_limit(header: &mut [u8]) -> Option<()> {
    let head = header.first_chunk_mut::<LEN>()?;
    head[7] = head[7].checked_sub(1).filter(|limit| *limit > 0)?;
    Some(())
}

/// Replaces DSCP and ECN, keeps the flow label.
pub fn set_traffic_class(header: &mut [u8], class: u8) -> Option<()> {
    let head = header.first_chunk_mut::<LEN>()?;
    head[0] = head[0] & 0xf0 | class >> 4;
    head[1] = class << 4 | head[1] & 0x0f;
    Some(())
}

/// Replaces the payload length (all after the fixed header, in bytes); `None` if it exceeds 65535.
pub fn set_payload_len(header: &mut [u8], payload_len: usize) -> Option<()> {
    let head = header.first_chunk_mut::<LEN>()?;
    bytes::put_u16(head, 4, u16::try_from(payload_len).ok()?)
}

/// Replaces the byte at `at` that names a header; `at` is [`Upper::next_header_at`], or 6 for the fixed header.
pub fn set_next_header(packet: &mut [u8], at: usize, protocol: Protocol) -> Option<()> {
    bytes::put_u8(packet, at, protocol.0)
}

/// Fields of a fragment header (RFC 8200 section 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Offset in bytes, a multiple of 8.
    pub offset: u16,
    /// The M flag: more fragments follow.
    pub more: bool,
    /// Identification.
    pub id: u32,
}

/// Where the chain of extension headers ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upper {
    /// The first header that is not walked; for a later fragment, what the fragment header names.
    pub protocol: Protocol,
    /// Its offset from the start of the packet, in bytes. May equal the packet's length.
    pub offset: u16,
    /// Offset of the byte that names it.
    pub next_header_at: u16,
    /// The fragment header, if there is one.
    pub fragment: Option<Fragment>,
}

/// Walks hop-by-hop options, routing, destination options and fragment headers of a whole packet.
///
/// A later fragment ends the walk, as what follows its fragment header is not a header. AH and ESP end it as any
/// upper layer does. Errors: what [`View::parse`] finds; a header past the payload length; more than
/// [`MAX_EXTENSIONS`]; hop-by-hop options that are not first (RFC 8200 section 4.1: "restricted to appear immediately
/// after an IPv6 header only"); a second fragment header; an offset above 65535.
pub fn upper(packet: &[u8]) -> Result<Upper, Malformed> {
    let view = View::parse(packet)?;
    let packet = packet.get(..view.total_len()).ok_or(Malformed::Truncated)?;
    let mut protocol = view.next_header();
    let mut offset = LEN;
    let mut next_header_at = 6;
    let mut fragment = None;
    for walked in 0..=MAX_EXTENSIONS {
        let is_extension = matches!(
            protocol,
            Protocol::HOP_BY_HOP | Protocol::ROUTING | Protocol::DEST_OPTIONS | Protocol::FRAGMENT
        );
        let is_later = matches!(fragment, Some(Fragment { offset: 1.., .. }));
        if !is_extension || is_later {
            return Ok(Upper {
                protocol,
                offset: u16::try_from(offset).map_err(|_| Malformed::TotalLength)?,
                next_header_at: u16::try_from(next_header_at).map_err(|_| Malformed::TotalLength)?,
                fragment,
            });
        }
        if walked == MAX_EXTENSIONS {
            break;
        }
        if protocol == Protocol::HOP_BY_HOP && walked != 0 {
            return Err(Malformed::NextHeader);
        }
        let header = bytes::array_at::<8>(packet, offset).ok_or(Malformed::Truncated)?;
        let len = if protocol == Protocol::FRAGMENT {
            if fragment.is_some() {
                return Err(Malformed::NextHeader);
            }
            let field = u16::from_be_bytes([header[2], header[3]]);
            fragment = Some(Fragment {
                offset: field & 0xfff8,
                more: field & 1 != 0,
                id: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            });
            FRAGMENT_LEN
        } else {
            // RFC 8200 sections 4.3, 4.4, 4.6: "in 8-octet units, not including the first 8 octets".
            usize::from(header[1]) * 8 + 8
        };
        protocol = Protocol(header[0]);
        next_header_at = offset;
        offset += len;
        if offset > packet.len() {
            return Err(Malformed::Truncated);
        }
    }
    Err(Malformed::TooManyHeaders)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::hex;

    /// Made by scapy 2.8: `IPv6(src='2001:db8::1', dst='2001:db8::2', tc=0x5a, fl=0xbeef1, hlim=9) /
    /// UDP(sport=4500, dport=500) / b'odd length!'`.
    const UDP: &str = "65abeef10013110920010db800000000000000000000000120010db8000000000000000000000002
        119401f400134d116f6464206c656e67746821";

    /// Made by scapy 2.8: `IPv6(…) / IPv6ExtHdrHopByHop(options=[RouterAlert()]) /
    /// IPv6ExtHdrRouting(addresses=['2001:db8::9']) / IPv6ExtHdrFragment(offset=0, m=1, id=0xdeadbeef) /
    /// IPv6ExtHdrDestOpt() / TCP(sport=1024, dport=443)`.
    const CHAIN: &str = "600000000044004020010db800000000000000000000000120010db8000000000000000000000002
        2b000502000001002c0200010000000020010db80000000000000000000000093c000001deadbeef0600010400000000
        040001bb0000000000000000500220002eac0000";

    #[test]
    fn view_and_header_agree_with_scapy() {
        let packet = hex(UDP);
        let view = View::parse(&packet).unwrap();
        let header = Header {
            source: "2001:db8::1".parse().unwrap(),
            destination: "2001:db8::2".parse().unwrap(),
            next_header: Protocol::UDP,
            hop_limit: 9,
            traffic_class: 0x5a,
            flow_label: 0xbeef1,
        };
        assert_eq!((view.source(), view.destination()), (header.source, header.destination));
        assert_eq!((view.traffic_class(), view.flow_label(), view.hop_limit()), (0x5a, 0xbeef1, 9));
        assert_eq!((view.next_header(), view.payload_len()), (Protocol::UDP, 19));
        let mut out = [0xa5; LEN + 1];
        header.emit(&mut out, 19).unwrap();
        assert_eq!((&out[..LEN], out[LEN]), (&packet[..LEN], 0xa5));
        assert_eq!(header.emit(&mut out[..LEN - 1], 19), None);
        assert_eq!(header.emit(&mut out, 65_536), None);
    }

    #[test]
    fn view_refuses_what_does_not_fit() {
        let packet = hex(UDP);
        assert_eq!(View::parse(&packet[..39]).unwrap_err(), Malformed::Truncated);
        assert_eq!(View::parse(&packet[..58]).unwrap_err(), Malformed::Truncated);
        let mut packet = packet;
        packet[0] = 0x45;
        assert_eq!(View::parse(&packet).unwrap_err(), Malformed::Version);
    }

    #[test]
    fn walks_a_chain_of_scapy() {
        let packet = hex(CHAIN);
        let fragment = Some(Fragment { offset: 0, more: true, id: 0xdead_beef });
        let expected = Upper { protocol: Protocol::TCP, offset: 88, next_header_at: 80, fragment };
        assert_eq!(upper(&packet), Ok(expected));
    }

    /// Made by scapy 2.8: `IPv6(…) / IPv6ExtHdrFragment(offset=185, m=0, id=0xdeadbeef, nh=17) / b'tail'`.
    #[test]
    fn later_fragment_ends_the_walk() {
        let mut packet = hex("60000000000c2c4020010db800000000000000000000000120010db80000000000000000000000
            02110005c8deadbeef7461696c");
        let fragment = Some(Fragment { offset: 1480, more: false, id: 0xdead_beef });
        let expected = Upper { protocol: Protocol::UDP, offset: 48, next_header_at: 40, fragment };
        assert_eq!(upper(&packet), Ok(expected));
        // What follows is data even if the fragment header names an extension header.
        packet[40] = Protocol::DEST_OPTIONS.0;
        assert_eq!(upper(&packet), Ok(Upper { protocol: Protocol::DEST_OPTIONS, ..expected }));
    }

    /// A packet of `count` empty destination options and then UDP.
    fn options(count: u8) -> std::vec::Vec<u8> {
        let mut packet = hex(UDP)[..LEN].to_vec();
        packet[6] = Protocol::DEST_OPTIONS.0;
        packet[4..6].copy_from_slice(&(u16::from(count) * 8).to_be_bytes());
        for left in (0..count).rev() {
            let next = if left == 0 { Protocol::UDP } else { Protocol::DEST_OPTIONS };
            packet.extend([next.0, 0, 1, 4, 0, 0, 0, 0]);
        }
        packet
    }

    #[test]
    fn walk_is_bounded() {
        assert_eq!(upper(&options(8)).unwrap().offset, 104);
        assert_eq!(upper(&options(9)), Err(Malformed::TooManyHeaders));
    }

    #[test]
    fn headers_must_fit_and_be_in_order() {
        let mut late = options(2);
        late[40] = Protocol::HOP_BY_HOP.0;
        assert_eq!(upper(&late), Err(Malformed::NextHeader));
        let mut long = options(2);
        long[49] = 1;
        assert_eq!(upper(&long), Err(Malformed::Truncated));
        let mut twice = options(2);
        (twice[6], twice[40]) = (Protocol::FRAGMENT.0, Protocol::FRAGMENT.0);
        twice[42..44].fill(0);
        assert_eq!(upper(&twice), Err(Malformed::NextHeader));
        let mut nothing = options(1);
        nothing[5] = 0;
        assert_eq!(upper(&nothing), Err(Malformed::Truncated));
    }

    /// RFC 8200 section 3: a packet whose hop limit would become zero is not forwarded.
    #[test]
    fn hop_limit_stops_at_one() {
        let mut packet = hex(UDP);
        for expected in [8, 7, 6, 5, 4, 3, 2, 1] {
            decrement_hop_limit(&mut packet).unwrap();
            assert_eq!(packet[7], expected);
        }
        assert_eq!(decrement_hop_limit(&mut packet), None);
        packet[7] = 0;
        assert_eq!(decrement_hop_limit(&mut packet), None);
    }
}
