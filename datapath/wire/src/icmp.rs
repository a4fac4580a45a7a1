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
