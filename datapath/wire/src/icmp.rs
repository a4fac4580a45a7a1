//! The ICMP errors a gateway sends back to the inside (DP-5), as complete IP packets.
//!
//! Every builder writes to the start of `out` and returns the packet's length, or `None` if `out` is too short (576
//! bytes for IPv4 and 1280 for IPv6 always suffice) or no error may be sent about `original`:
//!
//! - RFC 1122 section 3.2.2: never about "an ICMP error message", "a datagram destined to an IP broadcast or IP
//!   multicast address", "a non-initial fragment", or "a datagram whose source address does not define a single host".
//! - RFC 4443 section 2.4 (e): never about an ICMPv6 error or redirect, a packet to a multicast address, or a source
//!   "that does not uniquely identify a single node". The exception for Packet Too Big about a packet to a multicast
//!   address is not made, nor is a later fragment answered: its first fragment is as long.
//!
//! How often errors are sent is the caller's to limit (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4 (f)).

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::ids::Protocol;
use crate::{bytes, checksum, ip4, ip6};

/// Longest IPv4 packet built here, in bytes (RFC 1812 section 4.3.2.3).
pub const MAX_V4: usize = 576;
/// Longest IPv6 packet built here, in bytes: the minimum IPv6 MTU (RFC 4443 section 2.4 (c)).
pub const MAX_V6: usize = 1280;

/// Length of an ICMP error's own header in both families.
const LEN: usize = 8;
const HOPS: u8 = 64;
/// RFC 1812 section 4.3.2.5: errors go at precedence 6, internetwork control.
const PRECEDENCE: u8 = 0xc0;

/// Destination unreachable, fragmentation needed and DF set (RFC 792), with the next-hop MTU of RFC 1191 section 4.
pub fn too_big_v4(original: &[u8], next_hop_mtu: u16, from: Ipv4Addr, out: &mut [u8]) -> Option<usize> {
    let [high, low] = next_hop_mtu.to_be_bytes();
    error_v4([3, 4, 0, 0, 0, 0, high, low], original, from, out)
}

/// Time exceeded in transit (RFC 792).
pub fn time_exceeded_v4(original: &[u8], from: Ipv4Addr, out: &mut [u8]) -> Option<usize> {
    error_v4([11, 0, 0, 0, 0, 0, 0, 0], original, from, out)
}

/// Packet too big (RFC 4443 section 3.2). The MTU is reported as given: below 1280 receivers ignore it (RFC 8201
/// section 4).
pub fn too_big_v6(original: &[u8], mtu: u32, from: Ipv6Addr, out: &mut [u8]) -> Option<usize> {
    let [a, b, c, d] = mtu.to_be_bytes();
    error_v6([2, 0, 0, 0, a, b, c, d], original, from, out)
}

/// Time exceeded, hop limit exceeded in transit (RFC 4443 section 3.3).
pub fn time_exceeded_v6(original: &[u8], from: Ipv6Addr, out: &mut [u8]) -> Option<usize> {
    error_v6([3, 0, 0, 0, 0, 0, 0, 0], original, from, out)
}

fn error_v4(head: [u8; LEN], original: &[u8], from: Ipv4Addr, out: &mut [u8]) -> Option<usize> {
    let view = ip4::View::parse(original).ok()?;
    if view.fragment_offset() != 0 || !is_host_v4(view.source()) {
        return None;
    }
    let to = view.destination();
    if to.is_multicast() || to.is_broadcast() || to.is_unspecified() {
        return None;
    }
    // RFC 1122 section 3.2.2: the error types are 3, 4, 5, 11 and 12. An ICMP message without a type is no query.
    if view.protocol() == Protocol::ICMP && matches!(view.payload(), [] | [3 | 4 | 5 | 11 | 12, ..]) {
        return None;
    }
    // RFC 1812 section 4.3.2.3: "as much of the original datagram as possible without the length of the ICMP datagram
    // exceeding 576 bytes".
    let quoted_len = view.total_len().min(MAX_V4 - ip4::MIN_LEN - LEN);
    let quoted = original.get(..quoted_len)?;
    let header = ip4::Header {
        source: from,
        destination: view.source(),
        protocol: Protocol::ICMP,
        ttl: HOPS,
        tos: PRECEDENCE,
        // An atomic datagram: DF set, so its identification means nothing (RFC 6864 section 4.1).
        id: 0,
        dont_fragment: true,
    };
    let len = ip4::MIN_LEN + LEN + quoted_len;
    let out = out.get_mut(..len)?;
    header.emit(out, LEN + quoted_len)?;
    let message = out.get_mut(ip4::MIN_LEN..)?;
    bytes::put(message, 0, head)?;
    message.get_mut(LEN..)?.copy_from_slice(quoted);
    let check = checksum::finish(checksum::sum(message));
    bytes::put_u16(message, 2, check)?;
    Some(len)
}

fn error_v6(head: [u8; LEN], original: &[u8], from: Ipv6Addr, out: &mut [u8]) -> Option<usize> {
    let view = ip6::View::parse(original).ok()?;
    let upper = ip6::upper(original).ok()?;
    if upper.fragment.is_some_and(|fragment| fragment.offset != 0) {
        return None;
    }
    let (source, to) = (view.source(), view.destination());
    if source.is_multicast() || source.is_unspecified() || to.is_multicast() || to.is_unspecified() {
        return None;
    }
    let quoted_len = view.total_len().min(MAX_V6 - ip6::LEN - LEN);
    if upper.protocol == Protocol::ICMPV6 {
        let whole = original.get(..view.total_len())?;
        // RFC 4443 section 2.1: error messages are types 0 to 127; 137 is the redirect.
        match bytes::u8_at(whole, usize::from(upper.offset)) {
            None | Some(0..=127 | 137) => return None,
            Some(_) => {}
        }
    }
    let quoted = original.get(..quoted_len)?;
    let header = ip6::Header {
        source: from,
        destination: source,
        next_header: Protocol::ICMPV6,
        hop_limit: HOPS,
        traffic_class: 0,
        flow_label: 0,
    };
    let len = ip6::LEN + LEN + quoted_len;
    let out = out.get_mut(..len)?;
    header.emit(out, LEN + quoted_len)?;
    let message = out.get_mut(ip6::LEN..)?;
    bytes::put(message, 0, head)?;
    message.get_mut(LEN..)?.copy_from_slice(quoted);
    let message_len = u32::try_from(message.len()).ok()?;
    let pseudo = checksum::pseudo_v6(from, source, Protocol::ICMPV6, message_len);
    let check = checksum::finish(pseudo + checksum::sum(message));
    bytes::put_u16(message, 2, check)?;
    Some(len)
}

/// RFC 1122 section 3.2.2: not "a zero address, a loopback address, a broadcast address, a multicast address, or a
/// Class E address". Broadcasts of a subnet cannot be told here.
fn is_host_v4(address: Ipv4Addr) -> bool {
    let [first, ..] = address.octets();
    first != 0 && first < 224 && !address.is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::hex;

    const UDP_V4: &str = "45b8001f424240004011dcc60a0102030a040506003514e9000b0b4a616263";
    const UDP_V6: &str = "65abeef10013110920010db800000000000000000000000120010db8000000000000000000000002
        119401f400134d116f6464206c656e67746821";
    const FROM_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const FROM_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xff);

    /// DP-5. Made by scapy 2.8: `IP(src='10.0.0.1', dst='10.1.2.3', tos=0xc0, ttl=64, id=0, flags='DF') /
    /// ICMP(type=3, code=4, nexthopmtu=1400) / original`, and with `ICMP(type=11, code=0)`.
    #[test]
    fn dp_5_errors_of_scapy_over_v4() {
        let mut out = [0xa5; 64];
        let len = too_big_v4(&hex(UDP_V4), 1400, FROM_V4, &mut out).unwrap();
        let expected = "45c0003b00004000400123fe0a0000010a010203030412ae00000578";
        assert_eq!(out[..len], [hex(expected), hex(UDP_V4)].concat());
        assert!(out[len..].iter().all(|byte| *byte == 0xa5));
        let len = time_exceeded_v4(&hex(UDP_V4), FROM_V4, &mut out).unwrap();
        let expected = "45c0003b00004000400123fe0a0000010a0102030b00102a00000000";
        assert_eq!(out[..len], [hex(expected), hex(UDP_V4)].concat());
        assert_eq!(too_big_v4(&hex(UDP_V4), 1400, FROM_V4, &mut out[..len - 1]), None);
    }

    /// DP-5. Made by scapy 2.8: `IPv6(src='2001:db8::ff', dst='2001:db8::1', hlim=64) /
    /// ICMPv6PacketTooBig(mtu=1400) / original`, and with `ICMPv6TimeExceeded()`.
    #[test]
    fn dp_5_errors_of_scapy_over_v6() {
        let ip = "6000000000433a4020010db80000000000000000000000ff20010db8000000000000000000000001";
        let mut out = [0xa5; 128];
        let len = too_big_v6(&hex(UDP_V6), 1400, FROM_V6, &mut out).unwrap();
        assert_eq!(out[..len], [hex(ip), hex("0200360300000578"), hex(UDP_V6)].concat());
        assert!(out[len..].iter().all(|byte| *byte == 0xa5));
        let len = time_exceeded_v6(&hex(UDP_V6), FROM_V6, &mut out).unwrap();
        assert_eq!(out[..len], [hex(ip), hex("03003a7b00000000"), hex(UDP_V6)].concat());
    }

    /// RFC 1812 section 4.3.2.3 and RFC 4443 section 2.4 (c): 576 and 1280 bytes at most; padding is not quoted.
    #[test]
    fn quotes_are_bounded() {
        let mut long = hex(UDP_V4);
        ip4::set_total_len(&mut long, 1500).unwrap();
        long.resize(1514, 0x5a);
        assert_eq!(too_big_v4(&long, 1400, FROM_V4, &mut [0xa5; 2000]), Some(MAX_V4));
        let mut long = hex(UDP_V6);
        ip6::set_payload_len(&mut long, 1460).unwrap();
        long.resize(1514, 0x5a);
        assert_eq!(too_big_v6(&long, 1400, FROM_V6, &mut [0xa5; 2000]), Some(MAX_V6));
        let padded = [hex(UDP_V4), [0; 15].to_vec()].concat();
        assert_eq!(too_big_v4(&padded, 1400, FROM_V4, &mut [0xa5; 2000]), Some(28 + 31));
    }

    /// RFC 1122 section 3.2.2.
    #[test]
    fn no_error_about_these_over_v4() {
        let refused = |why: &str, change: &dyn Fn(&mut [u8])| {
            let mut packet = hex(UDP_V4);
            change(&mut packet);
            assert_eq!(too_big_v4(&packet, 1400, FROM_V4, &mut [0xa5; 600]), None, "{why}");
            assert_eq!(time_exceeded_v4(&packet, FROM_V4, &mut [0xa5; 600]), None, "{why}");
        };
        for kind in [3, 4, 5, 11, 12] {
            refused("ICMP error", &|packet| (packet[9], packet[20]) = (1, kind));
        }
        refused("later fragment", &|packet| packet[7] = 1);
        for address in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 5], [240, 0, 0, 1], [255; 4]] {
            refused("source", &|packet| packet[12..16].copy_from_slice(&address));
        }
        for address in [[0, 0, 0, 0], [224, 0, 0, 5], [255; 4]] {
            refused("destination", &|packet| packet[16..20].copy_from_slice(&address));
        }
        let mut echo = hex(UDP_V4);
        (echo[9], echo[20]) = (1, 8);
        assert!(too_big_v4(&echo, 1400, FROM_V4, &mut [0xa5; 600]).is_some(), "echo request");
        let mut first = hex(UDP_V4);
        first[6] = 0x20;
        assert!(too_big_v4(&first, 1400, FROM_V4, &mut [0xa5; 600]).is_some(), "first fragment");
    }

    /// RFC 4443 section 2.4 (e).
    #[test]
    fn no_error_about_these_over_v6() {
        let refused = |why: &str, change: &dyn Fn(&mut [u8])| {
            let mut packet = hex(UDP_V6);
            change(&mut packet);
            assert_eq!(too_big_v6(&packet, 1400, FROM_V6, &mut [0xa5; 600]), None, "{why}");
            assert_eq!(time_exceeded_v6(&packet, FROM_V6, &mut [0xa5; 600]), None, "{why}");
        };
        for kind in [0, 1, 2, 3, 4, 127, 137] {
            refused("ICMPv6 error or redirect", &|packet| (packet[6], packet[40]) = (58, kind));
        }
        refused("ICMPv6 without a type", &|packet| (packet[5], packet[6]) = (0, 58));
        refused("later fragment", &|packet| (packet[6], packet[43]) = (44, 8));
        refused("multicast source", &|packet| packet[8] = 0xff);
        refused("unspecified source", &|packet| packet[8..24].fill(0));
        refused("multicast destination", &|packet| packet[24] = 0xff);
        refused("unspecified destination", &|packet| packet[24..40].fill(0));
        let mut echo = hex(UDP_V6);
        (echo[6], echo[40]) = (58, 128);
        assert!(too_big_v6(&echo, 1400, FROM_V6, &mut [0xa5; 600]).is_some(), "echo request");
    }
}
