//! The usual packet out of its ESP, in one pass.
//!
//! Usual is TCP or UDP over IPv4 without options and whole, in a plain SA over IPv4, neither packet marked by ECN. What
//! is not usual in any way, or not in order, is left as it was to `decap`, which knows all cases and all complaints.

use std::net::{IpAddr, Ipv4Addr};

use postern_wire::flow::{Flow, Fragment};
use postern_wire::ids::Protocol;
use postern_wire::{esp, ip4};

use super::Arrival;
use crate::frame::{Arena, Frame};
use crate::sad::config::SaKey;
use crate::sad::runtime::Inbound;

/// IPv4 header and ports.
const HEAD: usize = ip4::MIN_LEN + 4;
const ECN: u8 = 0b11;

/// Leaves the inner packet in the frame. Gives what policies ask about it, and the bytes that were protected.
#[inline]
pub(super) fn strip(
    arena: &Arena,
    frame: &mut Frame,
    arrival: &Arrival,
    state: &Inbound,
) -> Option<(Flow, usize)> {
    let config = &*state.config;
    let SaKey::Esp(key) = &config.key else { return None };
    if !config.is_plain() || config.is_metered() {
        return None;
    }
    let layout = key.layout();
    let packet = arena.bytes(frame);
    let [first, outer_tos] = *packet.first_chunk()?;
    let at = arrival.at() + esp::HEADER_LEN + usize::from(layout.iv_len);
    let end = packet.len().checked_sub(usize::from(layout.icv_len))?;
    let trailer = esp::trailer(packet.get(at..end)?).ok()?;
    let len = trailer.payload_len;
    let (flow, total) = read(packet.get(at..at.checked_add(len)?)?)?;
    let marked = (outer_tos | flow.tos) & ECN != 0;
    if first >> 4 != 4 || trailer.next_header != Protocol::IPV4 || marked || !config.admits(&flow) {
        return None;
    }
    frame.shrink_front(at)?;
    frame.truncate(total);
    Some((flow, len))
}

/// As [`Flow::parse`] reads it, if it is usual.
#[inline]
fn read(packet: &[u8]) -> Option<(Flow, usize)> {
    let head = packet.first_chunk::<HEAD>()?;
    let [0x45, tos, t0, t1, _, _, f0, f1, ttl, protocol, _, _, s @ .., d0, d1, d2, d3, p0, p1, q0, q1] =
        *head
    else {
        return None;
    };
    let total_len = u16::from_be_bytes([t0, t1]);
    let total = usize::from(total_len);
    // RFC 791 section 3.1: DF, then More Fragments and the offset.
    let fragment = u16::from_be_bytes([f0, f1]);
    let protocol = Protocol(protocol);
    let usual = matches!(protocol, Protocol::TCP | Protocol::UDP) && fragment.trailing_zeros() >= 14;
    if !usual || total < HEAD || total > packet.len() {
        return None;
    }
    let flow = Flow {
        source: IpAddr::V4(Ipv4Addr::from(s)),
        destination: IpAddr::V4(Ipv4Addr::new(d0, d1, d2, d3)),
        protocol,
        source_port: u16::from_be_bytes([p0, p1]),
        destination_port: u16::from_be_bytes([q0, q1]),
        ports_known: true,
        header_len: 20,
        next_header_at: 9,
        total_len,
        tos,
        ttl,
        dont_fragment: fragment & 0x4000 != 0,
        fragment: Fragment::No,
    };
    Some((flow, total))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// DP-5: what is read in a few steps is what the parser reads.
        #[test]
        fn dp_5_the_short_way_agrees(
            mut packet in prop::collection::vec(any::<u8>(), 20..80),
            protocol in prop::sample::select(vec![6_u8, 17, 50, 1]),
            fragment in prop::sample::select(vec![0_u16, 0x4000, 0x2000, 1, 0x8000]),
            total in 0_u16..90,
            version in prop::sample::select(vec![0x45_u8, 0x45, 0x46, 0x60]),
        ) {
            packet[0] = version;
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            packet[6..8].copy_from_slice(&fragment.to_be_bytes());
            packet[9] = protocol;
            if let Some((flow, total)) = read(&packet) {
                prop_assert_eq!(Flow::parse(&packet), Ok(flow));
                prop_assert_eq!(total, usize::from(flow.total_len));
            }
        }
    }
}
