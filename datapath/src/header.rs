//! Family-independent work on IP headers, in place.
//!
//! Everything here looks at the version nibble itself, and fails on what is no IP header.

use std::net::IpAddr;

use postern_wire::ids::Protocol;
use postern_wire::{checksum, ip4, ip6, tcp, udp};

/// Longest IP header, with options or extension headers, that AH is computed over.
const MAX_SAVED: usize = 320;

/// Whether the packet is IPv6; `None` if it is neither version.
pub fn is_v6(packet: &[u8]) -> Option<bool> {
    match packet.first()? >> 4 {
        4 => Some(false),
        6 => Some(true),
        _ => None,
    }
}

/// Writes `value` at `at`, if it fits.
pub fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(place) = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *place = value;
    }
}

/// The big-endian value at `at`.
pub fn get_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|value| u16::from_be_bytes(*value))
}

/// The big-endian value at `at`.
pub fn get_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|value| u32::from_be_bytes(*value))
}

fn address(packet: &[u8], v4_at: usize, v6_at: usize) -> Option<IpAddr> {
    if is_v6(packet)? {
        packet.get(v6_at..)?.first_chunk::<16>().map(|bytes| IpAddr::from(*bytes))
    } else {
        packet.get(v4_at..)?.first_chunk::<4>().map(|bytes| IpAddr::from(*bytes))
    }
}

/// Length of the packet as its header tells it.
pub fn total_len(packet: &[u8]) -> Option<usize> {
    if is_v6(packet)? {
        Some(ip6::LEN + usize::from(get_u16(packet, 4)?))
    } else {
        get_u16(packet, 2).map(usize::from)
    }
}

/// Whether the checksum of an IPv4 header with its options is right.
pub fn checksum_ok(packet: &[u8]) -> bool {
    match packet {
        // Without options its length is known, and the sum takes no loop.
        [0x45, ..] => packet
            .first_chunk::<{ ip4::MIN_LEN }>()
            .is_some_and(|header| checksum::finish(checksum::sum(header)) == 0),
        _ => ip4::View::parse(packet).is_ok_and(|view| view.checksum_ok()),
    }
}

/// Source address.
pub fn source(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 12, 8)
}

/// Destination address.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 16, 24)
}

/// DSCP and ECN.
pub fn tos(packet: &[u8]) -> Option<u8> {
    let [first, second] = *packet.first_chunk()?;
    Some(if first >> 4 == 6 { first << 4 | second >> 4 } else { second })
}

/// Replaces DSCP and ECN.
pub fn set_tos(packet: &mut [u8], tos: u8) -> Option<()> {
    if is_v6(packet)? { ip6::set_traffic_class(packet, tos) } else { ip4::set_tos(packet, tos) }
}

/// Takes one from TTL or hop limit; `None` when it would reach zero.
pub fn decrement_ttl(packet: &mut [u8]) -> Option<()> {
    if is_v6(packet)? { ip6::decrement_hop_limit(packet) } else { ip4::decrement_ttl(packet) }
}

/// [`decrement_ttl`] of an IPv4 header whose TTL was seen to be above one.
#[inline]
pub fn forward(head: &mut [u8; ip4::MIN_LEN]) {
    let [_, _, _, _, _, _, _, _, ttl, _, c0, c1, ..] = head;
    *ttl = ttl.wrapping_sub(1);
    // RFC 1624 section 3: the word of TTL and protocol is less by 0x0100, so ~m + m' is 0xfeff whatever it was. RFC 1071
    // section 2 (B): so with the bytes of both exchanged.
    let check = !checksum::fold_few(u32::from(!u16::from_le_bytes([*c0, *c1])) + 0xfffe);
    [*c0, *c1] = check.to_le_bytes();
}

/// Replaces both addresses, which have to be of the packet's family.
pub fn set_addresses(packet: &mut [u8], source: IpAddr, destination: IpAddr) -> Option<()> {
    match (is_v6(packet)?, source, destination) {
        (false, IpAddr::V4(source), IpAddr::V4(destination)) => {
            ip4::set_addresses(packet, source, destination)
        }
        (true, IpAddr::V6(source), IpAddr::V6(destination)) => {
            ip6::set_addresses(packet, source, destination)
        }
        _ => None,
    }
}

/// Offset of the byte that names what follows the IP header and its extension headers.
pub fn next_header_at(packet: &[u8]) -> Option<usize> {
    if is_v6(packet)? {
        // The walk needs the whole packet; the length field may already be wrong here, so only the front is shown.
        ip6::upper(packet).ok().map(|upper| usize::from(upper.next_header_at))
    } else {
        Some(9)
    }
}

/// Says what follows the IP header, and how much: all of `packet`.
pub fn set_payload(packet: &mut [u8], next_header_at: usize, protocol: Protocol) -> Option<()> {
    let len = packet.len();
    if is_v6(packet)? {
        ip6::set_payload_len(packet, len.checked_sub(ip6::LEN)?)?;
        ip6::set_next_header(packet, next_header_at, protocol)
    } else {
        ip4::set_total_len(packet, len)?;
        ip4::set_protocol(packet, protocol)
    }
}

/// A copy of an IP header while the original is muted for AH.
pub struct Saved {
    bytes: [u8; MAX_SAVED],
    len: usize,
}

impl Saved {
    /// Copies all of `header`; `None` if it is longer than any that AH is computed over.
    pub fn take(header: &[u8]) -> Option<Self> {
        let mut bytes = [0; MAX_SAVED];
        bytes.get_mut(..header.len())?.copy_from_slice(header);
        Some(Self { bytes, len: header.len() })
    }

    /// Writes it back to the front of `packet`.
    pub fn restore(&self, packet: &mut [u8]) {
        if let Some((from, to)) = self.bytes.get(..self.len).zip(packet.get_mut(..self.len)) {
            to.copy_from_slice(from);
        }
    }
}

/// Computes the TCP, UDP or ICMPv6 checksum of an unfragmented packet anew; other protocols have none over addresses.
/// A UDP datagram over IPv4 without a checksum stays so.
pub fn renew_upper_checksum(packet: &mut [u8], header_len: usize) {
    let Some((at, protocol, v6)) = checksum_place(packet) else { return };
    let Some((source, destination)) = source(packet).zip(destination(packet)) else { return };
    let Some(segment) = packet.get_mut(header_len..) else { return };
    if protocol == Protocol::UDP && !v6 && get_u16(segment, at) == Some(0) {
        return;
    }
    if segment.len() < at + 2 {
        return;
    }
    put(segment, at, [0, 0]);
    let Ok(len) = u16::try_from(segment.len()) else { return };
    let pseudo = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            checksum::pseudo_v4(source, destination, protocol, len)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            checksum::pseudo_v6(source, destination, protocol, u32::from(len))
        }
        _ => return,
    };
    let check = checksum::finish(pseudo + checksum::sum(segment));
    let check = if check == 0 && protocol == Protocol::UDP { 0xffff } else { check };
    put(segment, at, check.to_be_bytes());
}

/// Offset of the checksum in the upper layer, if there is one over addresses and all of the datagram is here.
fn checksum_place(packet: &[u8]) -> Option<(usize, Protocol, bool)> {
    let flow = postern_wire::flow::Flow::parse(packet).ok()?;
    if flow.fragment != postern_wire::flow::Fragment::No {
        return None;
    }
    let at = match flow.protocol {
        Protocol::TCP => 16,
        Protocol::UDP => 6,
        Protocol::ICMPV6 => 2,
        _ => return None,
    };
    Some((at, flow.protocol, flow.source.is_ipv6()))
}

/// Lowers the MSS of a TCP SYN to what packets of `mtu` bytes have room for. Fragments are left alone.
pub fn clamp_mss(packet: &mut [u8], header_len: usize, mtu: usize) {
    let v6 = is_v6(packet) == Some(true);
    let headers = if v6 { ip6::LEN } else { ip4::MIN_LEN } + 20;
    let Ok(mss) = u16::try_from(mtu.saturating_sub(headers)) else { return };
    if let Some(segment) = packet.get_mut(header_len..) {
        tcp::clamp_mss(segment, mss);
    }
}

/// Length of a UDP header, for those who add one.
pub const UDP_LEN: usize = udp::LEN;

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    /// DP-5: the traffic class sits across two bytes in IPv6 and in one in IPv4.
    #[test]
    fn dp_5_tos_of_both_families() {
        let mut v4 = [0xa5u8; 20];
        let header = ip4::Header {
            source: Ipv4Addr::new(192, 0, 2, 1),
            destination: Ipv4Addr::new(192, 0, 2, 2),
            protocol: Protocol::UDP,
            ttl: 64,
            tos: 0xb9,
            id: 7,
            dont_fragment: true,
        };
        header.emit(&mut v4, 0).unwrap();
        assert_eq!(tos(&v4), Some(0xb9));
        set_tos(&mut v4, 0x03).unwrap();
        assert_eq!(tos(&v4), Some(0x03));
        assert!(ip4::View::parse(&v4).unwrap().checksum_ok());

        let mut v6 = [0xa5u8; 40];
        let header = ip6::Header {
            source: Ipv6Addr::LOCALHOST,
            destination: Ipv6Addr::LOCALHOST,
            next_header: Protocol::UDP,
            hop_limit: 64,
            traffic_class: 0xb9,
            flow_label: 0xabcde,
        };
        header.emit(&mut v6, 0).unwrap();
        assert_eq!(tos(&v6), Some(0xb9));
        set_tos(&mut v6, 0x03).unwrap();
        assert_eq!((tos(&v6), ip6::View::parse(&v6).unwrap().flow_label()), (Some(0x03), 0xabcde));
    }

    /// DP-5: a TTL that was looked at is lowered as any other.
    #[test]
    fn dp_5_forward_agrees() {
        for (ttl, check) in [(2, 0), (64, 0xffff), (255, 0x1234), (64, 0xfeff), (64, 0xff00), (2, 0x0100)] {
            let mut head = [0xa5; ip4::MIN_LEN];
            (head[0], head[8]) = (0x45, ttl);
            put(&mut head, 10, u16::to_be_bytes(check));
            let mut expected = head;
            decrement_ttl(&mut expected).unwrap();
            forward(&mut head);
            assert_eq!(head, expected);
        }
    }

    /// RLY-2: after addresses changed, the checksum made anew is the one of the new addresses.
    #[test]
    fn rly_2_upper_checksum_is_made_anew() {
        let mut packet = [0u8; 20 + 8 + 4];
        let header = ip4::Header {
            source: Ipv4Addr::new(192, 0, 2, 1),
            destination: Ipv4Addr::new(192, 0, 2, 2),
            protocol: Protocol::UDP,
            ttl: 64,
            tos: 0,
            id: 0,
            dont_fragment: true,
        };
        header.emit(&mut packet, 12).unwrap();
        put(&mut packet, 20, [0x12, 0x34, 0x56, 0x78, 0, 12, 0xff, 0xff]);
        renew_upper_checksum(&mut packet, 20);
        let expected = {
            let mut datagram = packet[20..].to_vec();
            datagram[6..8].fill(0);
            udp::checksum_v4(header.source, header.destination, &datagram)
        };
        assert_eq!(get_u16(&packet, 26), Some(expected));
    }
}
