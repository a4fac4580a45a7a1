//! Every parser and every in-place change on arbitrary bytes, with what must hold of them asserted.
//!
//! The fuzz target, the property tests and the replay of the corpus all call [`all`]. It is compiled for tests and
//! under the feature `exercise` only; a contradiction panics, which is what its callers look for.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a contradiction must stop the caller")]

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::flow::{self, Flow};
use crate::ids::{Protocol, Spi};
use crate::ip6::Upper;
use crate::natt::Natt;
use crate::steer::{self, Class, Link};
use crate::{Malformed, ah, checksum, esp, ether, icmp, ike_header, ip4, ip6, natt, tcp, udp};

/// Longest input looked at, in bytes; what exceeds it is ignored.
pub const MAX_LEN: usize = 2048;

/// What output buffers hold before they are written.
const UNWRITTEN: u8 = 0xa5;

/// Runs everything on `bytes`; panics where the results contradict each other.
pub fn all(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(MAX_LEN)];
    sums(bytes);
    ethernet(bytes);
    ipv4(bytes);
    ipv4_options(bytes);
    ipv6(bytes);
    flows(bytes);
    steering(bytes);
    udp_header(bytes);
    tcp_mss(bytes);
    esp_packet(bytes);
    ah_packet(bytes);
    muting_v4(bytes);
    muting_v6(bytes);
    datagram(bytes);
    icmp_errors(bytes);
    ike(bytes);
}

/// A copy that may be changed in place.
struct Copy {
    bytes: [u8; MAX_LEN],
    len: usize,
}

impl Copy {
    fn of(bytes: &[u8]) -> Self {
        let mut copy = [UNWRITTEN; MAX_LEN];
        copy[..bytes.len()].copy_from_slice(bytes);
        Self { bytes: copy, len: bytes.len() }
    }

    /// The copy after `change`, which must not touch anything if it returns `None`.
    fn changed(bytes: &[u8], change: impl FnOnce(&mut [u8]) -> Option<()>) -> Option<Self> {
        let mut copy = Self::of(bytes);
        if change(&mut copy.bytes[..copy.len]).is_some() {
            return Some(copy);
        }
        assert_eq!(copy.get(), bytes, "a refused change left a trace");
        None
    }

    fn get(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Two values of a checksum field that verify alike: ones' complement has two zeros.
fn same_check(a: u16, b: u16) -> bool {
    a == b || (a == 0 || a == 0xffff) && (b == 0 || b == 0xffff)
}

fn sums(bytes: &[u8]) {
    let mut naive = 0_u64;
    for pair in bytes.chunks(2) {
        naive += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    }
    let folded = checksum::fold(checksum::sum(bytes));
    assert_eq!(folded, checksum::fold(naive));
    let (third, half) = (bytes.len() / 3, bytes.len() / 2);
    let pieces = [&bytes[..third], &bytes[third..half], &[], &bytes[half..]];
    assert_eq!(folded, checksum::fold(checksum::sum_slices(&pieces)));

    let Some((new, rest)) = bytes.split_first_chunk::<4>() else { return };
    let Some((old, tail)) = rest.split_first_chunk::<4>() else { return };
    let check = checksum::finish(checksum::sum(rest));
    let after = checksum::finish(checksum::sum(new) + checksum::sum(tail));
    let updated = checksum::update_u32(check, u32::from_be_bytes(*old), u32::from_be_bytes(*new));
    assert!(same_check(updated, after));
    let after = checksum::finish(checksum::sum(&new[..2]) + checksum::sum(&rest[2..]));
    let [o0, o1, ..] = *old;
    let [n0, n1, ..] = *new;
    let updated = checksum::update_u16(check, u16::from_be_bytes([o0, o1]), u16::from_be_bytes([n0, n1]));
    assert!(same_check(updated, after));
}

fn ethernet(bytes: &[u8]) {
    let parsed = ether::parse(bytes);
    assert_eq!(parsed.is_some(), bytes.len() >= ether::LEN);
    if let Some(header) = parsed {
        round_trip::<{ ether::LEN }>(bytes, |out| header.emit(out));
    }
}

/// `emit` writes exactly the first `N` of `bytes` again, and nothing into a buffer that is too short.
fn round_trip<const N: usize>(bytes: &[u8], emit: impl Fn(&mut [u8]) -> Option<()>) {
    let mut out = [UNWRITTEN; MAX_LEN];
    assert!(emit(&mut out[..N - 1]).is_none());
    assert_eq!(out, [UNWRITTEN; MAX_LEN], "a refused write left a trace");
    emit(&mut out).unwrap();
    assert_eq!(out[..N], bytes[..N]);
    assert!(out[N..].iter().all(|byte| *byte == UNWRITTEN), "written past the header");
}

fn ipv4(bytes: &[u8]) {
    let Ok(view) = ip4::View::parse(bytes) else { return };
    assert_eq!(view.header_len() + view.payload().len(), view.total_len());
    assert!(view.total_len() <= bytes.len() && view.header_len() <= ip4::MAX_LEN);
    assert_eq!(view.options(), &bytes[ip4::MIN_LEN..view.header_len()]);
    assert_eq!(view.checksum_ok(), checksum::fold(checksum::sum(&bytes[..view.header_len()])) == 0xffff);

    let header = ip4::Header {
        source: view.source(),
        destination: view.destination(),
        protocol: view.protocol(),
        ttl: view.ttl(),
        tos: view.tos(),
        id: view.id(),
        dont_fragment: view.dont_fragment(),
    };
    let mut out = [UNWRITTEN; MAX_LEN];
    assert!(header.emit(&mut out, 65_516).is_none());
    header.emit(&mut out, view.payload().len()).unwrap();
    assert!(out[ip4::MIN_LEN..].iter().all(|byte| *byte == UNWRITTEN));
    let built = ip4::View::parse(&out[..ip4::MIN_LEN + view.payload().len()]).unwrap();
    assert!(built.checksum_ok());
    assert_eq!(
        (built.source(), built.destination(), built.protocol(), built.ttl(), built.tos(), built.id()),
        (view.source(), view.destination(), view.protocol(), view.ttl(), view.tos(), view.id())
    );
    assert_eq!(built.dont_fragment(), view.dont_fragment());
    assert_eq!(built.payload().len(), view.payload().len());

    let (source, destination) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(203, 0, 113, 255));
    change_v4(
        bytes,
        |h| ip4::set_addresses(h, source, destination),
        |h| ip4::set_addresses(h, view.source(), view.destination()),
        |new| (new.source(), new.destination()) == (source, destination),
    );
    change_v4(
        bytes,
        |h| ip4::set_tos(h, 0x5a),
        |h| ip4::set_tos(h, view.tos()),
        |new| new.tos() == 0x5a && new.header_len() == view.header_len(),
    );
    change_v4(
        bytes,
        |h| ip4::set_protocol(h, Protocol::ESP),
        |h| ip4::set_protocol(h, view.protocol()),
        |new| new.protocol() == Protocol::ESP && new.ttl() == view.ttl(),
    );
    change_v4(
        bytes,
        |h| ip4::set_total_len(h, view.header_len()),
        |h| ip4::set_total_len(h, view.total_len()),
        |new| new.payload().is_empty(),
    );
    change_v4(
        bytes,
        |h| ip4::set_fragment(h, Some(0xbeef), 65_528, true),
        |h| {
            let offset = usize::from(view.fragment_offset());
            ip4::set_fragment(h, Some(view.id()), offset, view.more_fragments())
        },
        |new| {
            (new.id(), new.fragment_offset(), new.more_fragments()) == (0xbeef, 65_528, true)
                && new.dont_fragment() == view.dont_fragment()
        },
    );
    assert!(Copy::changed(bytes, |h| ip4::set_fragment(h, None, 4, false)).is_none());
    assert!(Copy::changed(bytes, |h| ip4::set_fragment(h, None, 65_536, false)).is_none());
    assert!(Copy::changed(bytes, |h| ip4::set_total_len(h, 65_536)).is_none());
    match Copy::changed(bytes, ip4::decrement_ttl) {
        Some(copy) => {
            let new = ip4::View::parse(copy.get()).unwrap();
            assert_eq!(new.ttl(), view.ttl() - 1);
            assert!(new.ttl() > 0);
            assert_eq!(new.protocol(), view.protocol());
            assert_eq!(new.checksum_ok(), view.checksum_ok());
        }
        None => assert!(view.ttl() <= 1),
    }
}

/// A change does what it says, keeps right checksums right and wrong ones wrong, and can be undone.
fn change_v4(
    bytes: &[u8],
    change: impl FnOnce(&mut [u8]) -> Option<()>,
    undo: impl FnOnce(&mut [u8]) -> Option<()>,
    holds: impl FnOnce(ip4::View<'_>) -> bool,
) {
    let before = ip4::View::parse(bytes).unwrap();
    let mut copy = Copy::changed(bytes, change).unwrap();
    let after = ip4::View::parse(copy.get()).unwrap();
    assert!(holds(after));
    assert_eq!(before.checksum_ok(), after.checksum_ok());
    undo(&mut copy.bytes[..copy.len]).unwrap();
    let undone = ip4::View::parse(copy.get()).unwrap();
    assert!(same_check(before.checksum(), undone.checksum()));
    copy.bytes[10..12].copy_from_slice(&bytes[10..12]);
    assert_eq!(copy.get(), bytes);
}

fn ipv4_options(bytes: &[u8]) {
    let options = &bytes[..bytes.len().min(40)];
    let mut out = [UNWRITTEN; 40];
    let Some(len) = ip4::copied_options(options, &mut out) else {
        assert!(ip4::Options::new(options).any(|option| option.is_err()) || !options.len().is_multiple_of(4));
        return;
    };
    assert!(len <= options.len().next_multiple_of(4) && len.is_multiple_of(4));
    assert!(out[len..].iter().all(|byte| *byte == UNWRITTEN));
    let copied = |option: &Result<&[u8], Malformed>| option.unwrap()[0] & 0x80 != 0;
    assert!(ip4::Options::new(options).filter(copied).eq(ip4::Options::new(&out[..len])));
}

fn ipv6(bytes: &[u8]) {
    let Ok(view) = ip6::View::parse(bytes) else {
        assert!(ip6::upper(bytes).is_err());
        return;
    };
    assert_eq!(view.total_len(), ip6::LEN + view.payload_len());
    assert!(view.total_len() <= bytes.len());
    let header = ip6::Header {
        source: view.source(),
        destination: view.destination(),
        next_header: view.next_header(),
        hop_limit: view.hop_limit(),
        traffic_class: view.traffic_class(),
        flow_label: view.flow_label(),
    };
    round_trip::<{ ip6::LEN }>(bytes, |out| header.emit(out, view.payload_len()));

    let address = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let copy = Copy::changed(bytes, |h| {
        ip6::set_addresses(h, address, view.source())?;
        ip6::set_traffic_class(h, !view.traffic_class())?;
        ip6::set_payload_len(h, 0)
    });
    let copy = copy.unwrap();
    let new = ip6::View::parse(copy.get()).unwrap();
    assert_eq!((new.source(), new.destination()), (address, view.source()));
    assert_eq!((new.traffic_class(), new.flow_label()), (!view.traffic_class(), view.flow_label()));
    assert_eq!((new.next_header(), new.hop_limit()), (view.next_header(), view.hop_limit()));
    assert_eq!(new.payload_len(), 0);
    assert_eq!(&copy.get()[ip6::LEN..], &bytes[ip6::LEN..]);
    match Copy::changed(bytes, ip6::decrement_hop_limit) {
        Some(copy) => {
            let new = ip6::View::parse(copy.get()).unwrap().hop_limit();
            assert!(new > 0 && new == view.hop_limit() - 1);
        }
        None => assert!(view.hop_limit() <= 1),
    }

    let Ok(upper) = ip6::upper(bytes) else { return };
    let at = usize::from(upper.next_header_at);
    assert!(usize::from(upper.offset) <= view.total_len() && at < usize::from(upper.offset));
    assert_eq!(bytes[at], upper.protocol.0);
    let copy = Copy::changed(bytes, |packet| ip6::set_next_header(packet, at, Protocol::ESP)).unwrap();
    assert_eq!(ip6::upper(copy.get()), Ok(Upper { protocol: Protocol::ESP, ..upper }));
}

fn flows(bytes: &[u8]) {
    let parsed = Flow::parse(bytes);
    let Ok(flow) = parsed else {
        assert!(ip4::View::parse(bytes).is_err());
        assert!(ip6::View::parse(bytes).is_err() || ip6::upper(bytes).is_err());
        return;
    };
    let packet = &bytes[..usize::from(flow.total_len)];
    assert_eq!(Flow::parse(packet), parsed, "bytes beyond the packet were read");
    assert!(Flow::parse(&packet[..packet.len() - 1]).is_err());
    assert!(flow.header_len <= flow.total_len);
    assert_eq!(packet[usize::from(flow.next_header_at)], flow.protocol.0);
    assert!(flow.ports_known || (flow.source_port, flow.destination_port) == (0, 0));
    assert!(!(flow.ports_known && flow.fragment == flow::Fragment::Later));
    let upper = &packet[usize::from(flow.header_len)..];
    match flow.protocol {
        Protocol::TCP | Protocol::UDP if flow.fragment != flow::Fragment::Later => {
            assert_eq!(flow.ports_known, upper.len() >= 4);
            if let Some(header) = udp::Header::parse(upper) {
                assert_eq!(
                    (flow.source_port, flow.destination_port),
                    (header.source_port, header.destination_port)
                );
            }
        }
        Protocol::ESP | Protocol::AH | Protocol::NONE => assert!(!flow.ports_known),
        _ => {}
    }
    match (flow.source, flow.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let view = ip4::View::parse(bytes).unwrap();
            assert_eq!((view.source(), view.destination()), (source, destination));
            assert_eq!((view.tos(), view.ttl(), view.protocol()), (flow.tos, flow.ttl, flow.protocol));
            assert_eq!((view.header_len(), view.payload()), (usize::from(flow.header_len), upper));
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let view = ip6::View::parse(bytes).unwrap();
            assert_eq!((view.source(), view.destination()), (source, destination));
            assert_eq!((view.traffic_class(), view.hop_limit()), (flow.tos, flow.ttl));
        }
        mixed => unreachable!("{mixed:?}"),
    }
}

/// The parser of the XDP program and the one of policies agree on what they both see.
fn steering(bytes: &[u8]) {
    let found = steer::classify(bytes, Link::Ip);
    match (found.class, Flow::parse(bytes)) {
        (Class::Malformed | Class::NotIp | Class::TooManyExtensionHeaders, _) | (_, Err(_)) => {}
        (class, Ok(flow)) => {
            assert_eq!(found.v6, flow.source.is_ipv6());
            assert_eq!(found.later_fragment, flow.fragment == flow::Fragment::Later);
            if class == Class::EspInUdp {
                assert_eq!(flow.protocol, Protocol::UDP);
                assert_eq!(usize::from(found.transport), usize::from(flow.header_len) + udp::LEN);
            } else {
                assert_eq!((found.transport, found.protocol), (flow.header_len, flow.protocol));
            }
        }
    }
}

fn udp_header(bytes: &[u8]) {
    let Some(header) = udp::Header::parse(bytes) else { return };
    round_trip::<{ udp::LEN }>(bytes, |out| header.emit(out));
    let mut copy = Copy::of(bytes);
    copy.bytes[6..8].fill(0);
    let (v4, v6) = (Ipv4Addr::new(198, 51, 100, 7), Ipv6Addr::LOCALHOST);
    let (check_v4, check_v6) = (udp::checksum_v4(v4, v4, copy.get()), udp::checksum_v6(v6, v6, copy.get()));
    assert!(check_v4 != 0 && check_v6 != 0);
    copy.bytes[6..8].copy_from_slice(&check_v4.to_be_bytes());
    assert_eq!(udp::checksum_v4(v4, v4, copy.get()), 0xffff);
    copy.bytes[6..8].copy_from_slice(&check_v6.to_be_bytes());
    assert_eq!(udp::checksum_v6(v6, v6, copy.get()), 0xffff);
}

fn tcp_mss(bytes: &[u8]) {
    let before = tcp::mss(bytes);
    for max in [0, 536, 1360, u16::MAX] {
        let mut copy = Copy::of(bytes);
        let clamped = tcp::clamp_mss(&mut copy.bytes[..bytes.len()], max);
        assert_eq!(clamped, before.is_some_and(|before| before > max));
        assert_eq!(tcp::mss(copy.get()), before.map(|before| before.min(max)));
        // Whatever the pseudo-header adds, the checksum verifies as before if the sum stays.
        let sums = [bytes, copy.get()].map(|segment| checksum::fold(checksum::sum(segment)));
        assert!(same_check(sums[0], sums[1]));
        let differing = bytes.iter().zip(copy.get()).filter(|(old, new)| old != new).count();
        assert!(differing <= 4 && (clamped || differing == 0));
    }
}

fn esp_packet(bytes: &[u8]) {
    if let Some(header) = esp::Header::parse(bytes) {
        round_trip::<{ esp::HEADER_LEN }>(bytes, |out| header.emit(out));
    }
    for block in [0, 1, 4, 8, 16, 256] {
        let pad = usize::from(esp::padding(bytes.len(), block));
        assert!(pad < block.max(4));
        assert!((bytes.len() + pad + esp::TRAILER_LEN).is_multiple_of(block.max(4)));
    }
    if let Ok(trailer) = esp::trailer(bytes) {
        let mut out = [UNWRITTEN; 257];
        let out = &mut out[..usize::from(trailer.pad_len) + esp::TRAILER_LEN];
        esp::write_trailer(out, trailer.next_header).unwrap();
        assert_eq!(*out, bytes[trailer.payload_len..]);
    }
}

fn ah_packet(bytes: &[u8]) {
    let Ok(header) = ah::Header::parse(bytes) else { return };
    assert!(header.len() <= bytes.len());
    assert_eq!(header.len(), ah::FIXED_LEN + header.icv_len);
    let mut out = [UNWRITTEN; MAX_LEN];
    assert!(header.emit(&mut out[..header.len() - 1], false).is_none());
    for v6 in [false, true] {
        let mut out = [UNWRITTEN; MAX_LEN];
        let Some(len) = header.emit(&mut out, v6) else {
            assert!(v6 && header.icv_len > 1012);
            continue;
        };
        assert_eq!(len, ah::header_len(header.icv_len, v6));
        assert!(len.is_multiple_of(if v6 { 8 } else { 4 }));
        assert!(out[len..].iter().all(|byte| *byte == UNWRITTEN));
        let icv_len = len - ah::FIXED_LEN;
        assert_eq!(ah::Header::parse(&out[..len]), Ok(ah::Header { icv_len, ..header }));
        assert!(icv_len - header.icv_len < 8 && (v6 || icv_len == header.icv_len));
    }
}

/// What muting leaves does not depend on the fields it mutes.
fn muting_v4(bytes: &[u8]) {
    let mut muted = Copy::of(bytes);
    if ah::mute_v4(&mut muted.bytes[..bytes.len()]).is_none() {
        return;
    }
    let header_len = usize::from(bytes[0] & 0x0f) * 4;
    assert_eq!(muted.get()[header_len..], bytes[header_len..]);
    let mut other = Copy::of(bytes);
    for at in [1, 6, 7, 8, 10, 11] {
        assert_eq!(muted.bytes[at], 0);
        other.bytes[at] = !bytes[at];
    }
    ah::mute_v4(&mut other.bytes[..bytes.len()]).unwrap();
    assert_eq!(other.get(), muted.get());
    for at in [0, 2, 3, 4, 5, 9, 12, 13, 14, 15, 16, 17, 18, 19] {
        assert_eq!(muted.bytes[at], bytes[at]);
    }
}

fn muting_v6(bytes: &[u8]) {
    let Ok(upper) = ip6::upper(bytes) else { return };
    let upto = usize::from(upper.offset);
    let mut muted = Copy::of(bytes);
    if ah::mute_v6(&mut muted.bytes[..bytes.len()], upto).is_none() {
        return;
    }
    assert_eq!(upper.protocol, Protocol::AH);
    assert_eq!(muted.get()[upto..], bytes[upto..]);
    assert_eq!(muted.get()[4..7], bytes[4..7]);
    assert_eq!(muted.get()[8..ip6::LEN], bytes[8..ip6::LEN]);
    assert_eq!(ip6::upper(muted.get()), Ok(upper), "a type or length was muted");
    let mut other = Copy::of(bytes);
    other.bytes[0] ^= 0x0f;
    for at in [1, 2, 3, 7] {
        other.bytes[at] = !bytes[at];
    }
    ah::mute_v6(&mut other.bytes[..bytes.len()], upto).unwrap();
    assert_eq!(other.get(), muted.get());
}

fn datagram(bytes: &[u8]) {
    match natt::classify(bytes) {
        Natt::Keepalive => assert_eq!(bytes, [natt::KEEPALIVE]),
        Natt::Ike => assert!(bytes.starts_with(&natt::NON_ESP_MARKER)),
        Natt::Esp => assert!(esp::Header::parse(bytes).is_some_and(|header| header.spi != Spi(0))),
        Natt::Malformed => assert!(bytes.len() < esp::HEADER_LEN),
    }
}

/// An ICMP error about a packet, from an address, into a buffer.
type Builder<A> = fn(&[u8], A, &mut [u8]) -> Option<usize>;

fn icmp_errors(bytes: &[u8]) {
    let from = Ipv4Addr::new(10, 0, 0, 1);
    let builders: [Builder<Ipv4Addr>; 2] =
        [|packet, from, out| icmp::too_big_v4(packet, 1400, from, out), icmp::time_exceeded_v4];
    for build in builders {
        let mut out = [UNWRITTEN; MAX_LEN];
        let Some(len) = build(bytes, from, &mut out) else { continue };
        let original = ip4::View::parse(bytes).unwrap();
        assert!(len <= icmp::MAX_V4 && out[len..].iter().all(|byte| *byte == UNWRITTEN));
        let view = ip4::View::parse(&out[..len]).unwrap();
        assert!(view.checksum_ok() && view.total_len() == len);
        assert_eq!((view.source(), view.destination()), (from, original.source()));
        assert_eq!(checksum::finish(checksum::sum(view.payload())), 0);
        assert_eq!(&view.payload()[8..], &bytes[..len - 28]);
        assert!(len - 28 >= original.total_len().min(original.header_len() + 8));
        let mut again = [UNWRITTEN; MAX_LEN];
        assert!(build(&out[..len], from, &mut again).is_none(), "an error about an error");
        assert!(build(bytes, from, &mut again[..len - 1]).is_none());
        assert!(again.iter().all(|byte| *byte == UNWRITTEN), "a refused write left a trace");
    }

    let from = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let builders: [Builder<Ipv6Addr>; 2] =
        [|packet, from, out| icmp::too_big_v6(packet, 1400, from, out), icmp::time_exceeded_v6];
    for build in builders {
        let mut out = [UNWRITTEN; MAX_LEN];
        let Some(len) = build(bytes, from, &mut out) else { continue };
        let original = ip6::View::parse(bytes).unwrap();
        assert!(len <= icmp::MAX_V6 && out[len..].iter().all(|byte| *byte == UNWRITTEN));
        let view = ip6::View::parse(&out[..len]).unwrap();
        assert_eq!((view.source(), view.destination()), (from, original.source()));
        let message_len = u32::try_from(view.payload_len()).unwrap();
        let pseudo = checksum::pseudo_v6(view.source(), view.destination(), Protocol::ICMPV6, message_len);
        assert_eq!(checksum::finish(pseudo + checksum::sum(view.payload())), 0);
        assert_eq!(&view.payload()[8..], &bytes[..len - 48]);
        let mut again = [UNWRITTEN; MAX_LEN];
        assert!(build(&out[..len], from, &mut again).is_none(), "an error about an error");
        assert!(build(bytes, from, &mut again[..len - 1]).is_none());
        assert!(again.iter().all(|byte| *byte == UNWRITTEN), "a refused write left a trace");
    }
}

fn ike(bytes: &[u8]) {
    let parsed = ike_header::Header::parse(bytes);
    assert_eq!(parsed.is_some(), bytes.len() >= ike_header::LEN);
    if let Some(header) = parsed {
        round_trip::<{ ike_header::LEN }>(bytes, |out| header.emit(out));
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use proptest::collection::vec as bytes;
    use proptest::prelude::*;

    use super::*;

    /// Protocols whose parsers look further, and any other.
    fn protocol() -> impl Strategy<Value = u8> {
        prop_oneof![
            6 => prop::sample::select(vec![1_u8, 4, 6, 17, 41, 50, 51, 58, 59, 132, 135]),
            1 => any::<u8>(),
        ]
    }

    /// Upper layers that get past the first check of their parser now and then.
    fn upper() -> impl Strategy<Value = Vec<u8>> {
        let tcp = (bytes(any::<u8>(), 20..21), options(), bytes(any::<u8>(), 0..40)).prop_map(
            |(mut head, options, payload)| {
                head[12] = u8::try_from(((20 + options.len()) / 4 * 16) & 0xf0).unwrap();
                head[13] |= 2;
                [head, options, payload].concat()
            },
        );
        let ah =
            (any::<[u8; 12]>(), 0_u8..8, bytes(any::<u8>(), 32..60)).prop_map(|(mut head, units, rest)| {
                head[1] = units;
                [head.to_vec(), rest].concat()
            });
        prop_oneof![bytes(any::<u8>(), 0..80), tcp, ah]
    }

    /// Up to 40 bytes of kind, length, data, with padding of both sorts between.
    fn options() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop::sample::select(vec![2_u8, 5, 7, 0x20, 0x26, 68, 130, 131, 137, 148, 149, 194]);
        let option = prop_oneof![
            1 => Just(vec![0_u8]),
            3 => Just(vec![1_u8]),
            6 => (kind.clone(), bytes(any::<u8>(), 0..12)).prop_map(|(kind, data)| {
                [vec![kind, u8::try_from(data.len() + 2).unwrap()], data].concat()
            }),
            3 => (Just(2_u8), any::<[u8; 2]>()).prop_map(|(kind, [a, b])| vec![kind, 4, a, b]),
            1 => (kind, any::<u8>()).prop_map(|(kind, len)| vec![kind, len]),
        ];
        bytes(option, 0..6).prop_map(|options| {
            let mut options = options.concat();
            options.resize(options.len().next_multiple_of(4).min(40), 0);
            options
        })
    }

    fn v4_packet() -> impl Strategy<Value = Vec<u8>> {
        let fragment = prop_oneof![4 => Just(0_u16), 2 => Just(0x4000), 1 => Just(0x2000), 1 => any::<u16>()];
        (any::<[u8; 20]>(), options(), upper(), protocol(), fragment, any::<bool>(), bytes(any::<u8>(), 0..8))
            .prop_map(|(mut head, options, upper, protocol, fragment, right, padding)| {
                let total = u16::try_from(20 + options.len() + upper.len()).unwrap();
                head[0] = 0x45 + u8::try_from(options.len() / 4).unwrap();
                head[2..4].copy_from_slice(&total.to_be_bytes());
                head[6..8].copy_from_slice(&fragment.to_be_bytes());
                head[9] = protocol;
                let mut packet = [head.to_vec(), options].concat();
                if right {
                    packet[10..12].fill(0);
                    let check = checksum::finish(checksum::sum(&packet));
                    packet[10..12].copy_from_slice(&check.to_be_bytes());
                }
                [packet, upper, padding].concat()
            })
    }

    fn v6_packet() -> impl Strategy<Value = Vec<u8>> {
        let options = bytes(
            (prop::sample::select(vec![1_u8, 5, 0x26, 0x3e, 0xc2]), bytes(any::<u8>(), 0..12))
                .prop_map(|(kind, data)| [vec![kind, u8::try_from(data.len()).unwrap()], data].concat()),
            0..3,
        );
        let kind = prop::sample::select(vec![60_u8, 60, 60, 43, 44, 0]);
        let extension = (kind, options, any::<u16>()).prop_map(|(kind, options, fragment)| {
            let mut body = vec![0, 0];
            if kind == 44 {
                body.extend((fragment & if fragment & 2 == 0 { 1 } else { 0xffff }).to_be_bytes());
                body.extend([1, 2, 3, 4]);
            } else {
                body.extend(options.concat());
                body.resize(body.len().next_multiple_of(8), 0);
                body[1] = u8::try_from(body.len() / 8 - 1).unwrap();
            }
            (kind, body)
        });
        (
            any::<[u8; 40]>(),
            bytes(extension, 0..10),
            any::<bool>(),
            upper(),
            protocol(),
            bytes(any::<u8>(), 0..8),
        )
            .prop_map(|(mut head, mut extensions, hop_by_hop, upper, protocol, padding)| {
                if hop_by_hop {
                    extensions.insert(0, (0, vec![0, 0, 0x3e, 4, 1, 2, 3, 4]));
                }
                let mut next = protocol;
                for (kind, body) in extensions.iter_mut().rev() {
                    body[0] = core::mem::replace(&mut next, *kind);
                }
                let chain: Vec<u8> = extensions.into_iter().flat_map(|(_, body)| body).collect();
                head[0] = 0x60 | head[0] & 0x0f;
                let len = u16::try_from(chain.len() + upper.len()).unwrap();
                head[4..6].copy_from_slice(&len.to_be_bytes());
                head[6] = next;
                [head.to_vec(), chain, upper, padding].concat()
            })
    }

    /// The seeds of the fuzz target, which scapy made: every protocol and the odd cases of each.
    #[test]
    fn fuzz_seeds_hold() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../hwtests/fuzz/seeds/wire");
        let mut replayed = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let seed = std::fs::read(&path).unwrap();
            assert!(std::panic::catch_unwind(|| all(&seed)).is_ok(), "{}", path.display());
            replayed += 1;
        }
        assert!(replayed >= 50, "{replayed} seeds in {folder}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_bytes_hold(packet in bytes(any::<u8>(), 0..200)) {
            all(&packet);
        }

        #[test]
        fn ipv4_packets_hold(packet in v4_packet()) {
            all(&packet);
        }

        #[test]
        fn ipv6_packets_hold(packet in v6_packet()) {
            all(&packet);
        }

        #[test]
        fn upper_layers_hold(segment in upper()) {
            all(&segment);
        }

        #[test]
        fn option_lists_hold(options in options()) {
            all(&options);
        }

        #[test]
        fn esp_plaintexts_hold(payload in bytes(any::<u8>(), 0..64), pad: u8, next_header: u8) {
            let mut plaintext = payload.clone();
            plaintext.resize(payload.len() + usize::from(pad) + esp::TRAILER_LEN, UNWRITTEN);
            esp::write_trailer(&mut plaintext[payload.len()..], Protocol(next_header)).unwrap();
            let trailer = esp::Trailer {
                pad_len: pad,
                next_header: Protocol(next_header),
                payload_len: payload.len(),
            };
            prop_assert_eq!(esp::trailer(&plaintext), Ok(trailer));
            all(&plaintext);
        }
    }
}
