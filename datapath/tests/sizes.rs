//! Sizes and header fields: path MTU, fragments, MSS, DF, DSCP, ECN, padding (DP-5).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use common::*;
use postern_contract::counters::DropReason;
use postern_contract::sa::{DfPolicy, DscpPolicy, IpsecProtocol, Mode, PathPolicy, UdpEncap};
use postern_datapath::testbed::{INSIDE, Layout, Testbed, fib};
use postern_wire::flow::Flow;
use postern_wire::ids::Protocol;
use postern_wire::{icmp, ip4, ip6, tcp};

const NATT: UdpEncap = UdpEncap { local_port: 4500, remote_port: 4500 };

/// A packet of exactly `size` bytes from host A to host B.
fn sized(v6: bool, size: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..=255).cycle().take(size - if v6 { 48 } else { 28 }).collect();
    datagram(v6, true, &payload)
}

/// The same with DF clear.
fn fragmentable(size: usize) -> Vec<u8> {
    without_df(&sized(false, size))
}

fn without_df(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[6] &= !0x40;
    packet[10..12].fill(0);
    let header_len = usize::from(packet[0] & 15) * 4;
    let check = postern_wire::checksum::finish(postern_wire::checksum::sum(&packet[..header_len]));
    packet[10..12].copy_from_slice(&check.to_be_bytes());
    packet
}

/// The MTU that an ICMP error tells.
fn told(error: &[u8]) -> usize {
    sound(error);
    if error[0] >> 4 == 4 {
        assert_eq!(error[20..22], [3, 4]);
        usize::from(u16::from_be_bytes([error[26], error[27]]))
    } else {
        assert_eq!(error[40..42], [2, 0]);
        usize::try_from(u32::from_be_bytes([error[44], error[45], error[46], error[47]])).unwrap()
    }
}

/// What an ICMP too-big error about `packet` looks like.
fn too_big(packet: &[u8], mtu: usize, from: &str) -> Vec<u8> {
    let mut out = vec![0; 1280];
    let len = match ip(from) {
        std::net::IpAddr::V4(from) => icmp::too_big_v4(packet, u16::try_from(mtu).unwrap(), from, &mut out),
        std::net::IpAddr::V6(from) => icmp::too_big_v6(packet, u32::try_from(mtu).unwrap(), from, &mut out),
    };
    out.truncate(len.unwrap());
    out
}

/// The fragment that has the upper layer's header.
fn first_of(pieces: &[Vec<u8>]) -> &[u8] {
    pieces.iter().find(|piece| ip4::View::parse(piece).unwrap().fragment_offset() == 0).unwrap()
}

/// Puts IPv4 fragments together, in any order.
fn join(pieces: &[Vec<u8>]) -> Vec<u8> {
    let mut pieces: Vec<_> = pieces.iter().map(|piece| ip4::View::parse(piece).unwrap()).collect();
    pieces.sort_by_key(ip4::View::fragment_offset);
    let mut payload = Vec::new();
    let first = pieces[0];
    for (n, piece) in pieces.iter().enumerate() {
        assert!(piece.checksum_ok());
        assert_eq!(usize::from(piece.fragment_offset()), payload.len(), "a hole or an overlap");
        assert_eq!(piece.more_fragments(), n + 1 < pieces.len());
        assert_eq!((piece.id(), piece.protocol(), piece.ttl()), (first.id(), first.protocol(), first.ttl()));
        payload.extend_from_slice(piece.payload());
    }
    payload
}

/// DP-5: "ICMP fragmentation needed / packet too big returned to the inside": it names the largest packet that fits,
/// which then does, in every form.
#[test]
fn dp_5_too_big() {
    for suite in ALL_SUITES {
        for (outer_v6, inner_v6) in [(false, false), (false, true), (true, false), (true, true)] {
            for (encap, bundle) in [(None, false), (Some(NATT), false), (None, true)] {
                if suite.protocol() == IpsecProtocol::Ah && (encap.is_some() || bundle) {
                    continue;
                }
                for limit in [None, Some(1400)] {
                    let path = PathPolicy { mtu: limit, ..PathPolicy::default() };
                    let options = Options { outer_v6, inner_v6, encap, bundle, path, ..Options::default() };
                    let name = format!("{suite:?} {options:?}");
                    let mut pair = Pair::new(suite, options);
                    let packet = sized(inner_v6, 1500);
                    let (outside, inside) = pair.a.from_inside(&packet);
                    assert_eq!((outside.len(), inside.len()), (0, 1), "{name}");
                    dropped(&pair.a, DropReason::TooBig, 1);
                    let mtu = told(&inside[0]);
                    assert_eq!(
                        inside[0],
                        too_big(&packet, mtu, if inner_v6 { "fd01::1" } else { "10.1.0.1" }),
                        "{name}"
                    );
                    let fits = sized(inner_v6, mtu);
                    let sealed = pair.protect(&fits);
                    assert_eq!(sealed.len(), 1, "{name}: {mtu} was told");
                    let outer_mtu = usize::from(limit.unwrap_or(1500));
                    assert!(sealed[0].len() <= outer_mtu, "{name}");
                    assert!(sealed[0].len() + 16 > outer_mtu, "{name}: {mtu} wastes room");
                    assert_eq!(pair.open_b(&sealed[0]), [routed(&fits, 2)], "{name}");
                    assert_eq!(told(&pair.a.from_inside(&sized(inner_v6, mtu + 1)).1[0]), mtu, "{name}");
                    conserved(&pair.a);
                }
            }
        }
    }
}

/// DP-5: packets of a host itself in transport mode, with options in the header as well.
#[test]
fn dp_5_too_big_in_transport_mode() {
    for suite in ALL_SUITES {
        let mut pair = Pair::new(suite, Options { mode: Mode::Transport, ..Options::default() });
        for options in [0, 4, 40] {
            let packet = |size: usize| {
                let payload = vec![7; size - 28 - options];
                let plain = udp4("192.0.2.1", "198.51.100.1", 5, 6, &payload);
                let mut packet = plain[..20].to_vec();
                // No-operations.
                packet.extend(vec![1; options]);
                packet.extend(&plain[20..]);
                packet[0] = 0x45 + u8::try_from(options / 4).unwrap();
                ip4::set_total_len(&mut packet, size).unwrap();
                let fragmentable = without_df(&packet);
                let mut packet = fragmentable;
                packet[6] |= 0x40;
                let check = u16::from_be_bytes([packet[10], packet[11]]);
                let check = postern_wire::checksum::update_u16(check, 0, 0x4000);
                packet[10..12].copy_from_slice(&check.to_be_bytes());
                packet
            };
            assert_eq!(pair.a.from_host(&packet(1500)), Vec::<Vec<u8>>::new());
            let errors = pair.a.to_host();
            assert_eq!(errors.len(), 1, "{suite:?}");
            let mtu = told(&errors[0]);
            let sealed = pair.protect(&packet(mtu));
            assert_eq!(sealed.len(), 1);
            assert!(sealed[0].len() <= 1500 && sealed[0].len() > 1484, "{suite:?} {mtu} {}", sealed[0].len());
            assert_eq!(pair.open_b(&sealed[0]), [packet(mtu)]);
        }
        conserved(&pair.a);
    }
}

/// DP-5: without DF a packet is fragmented before it is protected, so that the other gateway need not reassemble.
#[test]
fn dp_5_inner_fragments() {
    for (suite, mtu) in
        [(Suites::Gcm128, 1500), (Suites::CbcSha256, 1500), (Suites::AhSha256, 1500), (Suites::Gcm128, 600)]
    {
        for outer_v6 in [false, true] {
            let mut pair = Pair::new(suite, Options { outer_v6, mtu, ..Options::default() });
            for size in [1400, 1441, 1500, 3000, 3700] {
                let packet = fragmentable(size);
                let sealed = pair.protect(&packet);
                assert!(sealed.iter().all(|packet| packet.len() <= usize::from(mtu)), "{suite:?} {size}");
                let arrived: Vec<_> = sealed.iter().flat_map(|sealed| pair.open_b(sealed)).collect();
                assert_eq!(arrived.len(), sealed.len());
                assert_eq!(join(&arrived), packet[20..], "{suite:?} {size}");
                assert!(arrived.iter().all(|piece| piece[8] == 62));
            }
            pair.clean();
        }
    }
}

/// RFC 791 section 3.1: options with the copied flag go into every fragment, others into the first only; fragments of
/// fragments fit where the fragment was.
#[test]
fn dp_5_fragments_with_options_and_of_fragments() {
    let mut pair = Pair::new(Suites::Gcm128, Options { mtu: 600, ..Options::default() });
    let plain = fragmentable(3000);
    let mut packet = plain[..20].to_vec();
    // Record route (not copied), router alert (copied), padding.
    packet.extend([7, 7, 4, 0, 0, 0, 0, 148, 4, 0, 0, 0]);
    packet.extend(&plain[20..]);
    packet[0] = 0x48;
    let len = packet.len();
    ip4::set_total_len(&mut packet, len).unwrap();
    let packet = without_df(&packet);
    let arrived = pair.a_to_b(&packet);
    assert!(arrived.len() > 5);
    assert_eq!(join(&arrived), packet[32..]);
    for piece in &arrived {
        let view = ip4::View::parse(piece).unwrap();
        let expected: &[u8] = if view.fragment_offset() == 0 { &packet[20..32] } else { &[148, 4, 0, 0] };
        assert_eq!(view.options(), expected);
    }
    // The middle of a larger datagram.
    let mut middle = fragmentable(2000);
    ip4::set_fragment(&mut middle, Some(77), 8000, true).unwrap();
    let mut pieces: Vec<_> = pair.a_to_b(&middle);
    pieces.sort_by_key(|piece| ip4::View::parse(piece).unwrap().fragment_offset());
    let mut at = 8000;
    for piece in &pieces {
        let view = ip4::View::parse(piece).unwrap();
        assert_eq!((usize::from(view.fragment_offset()), view.more_fragments(), view.id()), (at, true, 77));
        at += view.payload().len();
    }
    assert_eq!(at, 8000 + 1980);
    pair.clean();
    // No offset is left for its pieces: it is dropped whole.
    let mut last = fragmentable(1500);
    ip4::set_fragment(&mut last, Some(78), 65_528, false).unwrap();
    assert!(pair.protect(&last).is_empty());
    dropped(&pair.a, DropReason::Unfragmentable, 1);
    // Options that nobody can read.
    let mut broken = packet.clone();
    broken[21] = 200;
    let broken = without_df(&broken);
    assert!(pair.protect(&broken).is_empty());
    dropped(&pair.a, DropReason::Unfragmentable, 2);
}

/// DP-5: the network behind the far gateway has a smaller MTU: the error comes back through the tunnel, or the packet
/// is fragmented there.
#[test]
fn dp_5_smaller_mtu_behind_the_tunnel() {
    for v6 in [false, true] {
        let mut pair = Pair::new(Suites::Gcm128, Options { inner_v6: v6, ..Options::default() });
        let layout = Layout { mtu: 1400, ..layout_b() };
        pair.b.publisher.set_fib(&fib(&layout));
        let packet = sized(v6, 1430);
        let sealed = pair.protect(&packet).remove(0);
        let (back, inside) = pair.b.from_outside(&sealed);
        assert_eq!((back.len(), inside.len()), (1, 0));
        dropped(&pair.b, DropReason::TooBig, 1);
        let error = too_big(&routed(&packet, 2), 1400, if v6 { "fd02::1" } else { "10.2.0.1" });
        let arrived = pair.open_a(&back[0]);
        assert_eq!(arrived, [routed(&error, 1)]);
        assert_eq!(pair.a_to_b(&sized(v6, 1400)).len(), 1);
    }
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    pair.b.publisher.set_fib(&fib(&Layout { mtu: 600, ..layout_b() }));
    let packet = fragmentable(1440);
    let arrived = pair.a_to_b(&packet);
    assert_eq!(arrived.len(), 3);
    assert!(arrived.iter().all(|piece| piece.len() <= 600 && piece[8] == 62));
    assert_eq!(join(&arrived), packet[20..]);
    pair.clean();
}

/// RFC 4303 section 3.3.4: in transport mode the protected packet is fragmented instead.
#[test]
fn dp_5_outer_fragments_in_transport_mode() {
    for suite in [Suites::Gcm128, Suites::CbcSha512, Suites::AhSha1] {
        let mut pair = Pair::new(suite, Options { mode: Mode::Transport, ..Options::default() });
        for size in [1480, 1500, 3000] {
            let packet = without_df(&udp4("192.0.2.1", "198.51.100.1", 5, 6, &vec![3; size - 28]));
            let pieces = pair.protect(&packet);
            assert!(pieces.len() >= 2 && pieces.iter().all(|piece| piece.len() <= 1500), "{suite:?} {size}");
            let payload = join(&pieces);
            let mut whole = first_of(&pieces)[..20].to_vec();
            whole.extend(payload);
            let len = whole.len();
            ip4::set_total_len(&mut whole, len).unwrap();
            ip4::set_fragment(&mut whole, None, 0, false).unwrap();
            assert_eq!(pair.open_b(&whole), [packet], "{suite:?} {size}");
        }
        pair.clean();
    }
}

/// A SYN that announces `mss`.
fn syn(v6: bool, a_to_b: bool, mss: u16) -> Vec<u8> {
    let mut segment = vec![0u8; 24];
    (segment[12], segment[13]) = (6 << 4, 2);
    segment[20..22].copy_from_slice(&[2, 4]);
    segment[22..24].copy_from_slice(&mss.to_be_bytes());
    let hosts = if v6 { [ip("fd01::2"), ip("fd02::2")] } else { [ip("10.1.0.2"), ip("10.2.0.2")] };
    let [from, to] = if a_to_b { hosts } else { [hosts[1], hosts[0]] };
    let mut packet = ip_packet(from, to, Protocol::TCP, 0, &segment);
    postern_datapath::header::renew_upper_checksum(&mut packet, if v6 { 40 } else { 20 });
    packet
}

/// DP-5: "TCP MSS clamp option", both directions, at either gateway, with a right checksum.
#[test]
fn dp_5_mss_clamp() {
    for v6 in [false, true] {
        for (on_a, on_b) in [(true, false), (false, true), (false, false)] {
            let options = Options { inner_v6: v6, ..Options::default() };
            let mut pair = Pair::with(Suites::Gcm128, options, |operations, a| {
                for id in [A_IN, A_OUT] {
                    sa(operations, id).path.mss_clamp = if a { on_a } else { on_b };
                }
            });
            let header = if v6 { 40 } else { 20 };
            let fits = told(&pair.a.from_inside(&sized(v6, 1500)).1[0]);
            let clamped = u16::try_from(fits - header - 20).unwrap();
            for a_to_b in [true, false] {
                for (offered, expected) in [(1460, clamped), (8960, clamped), (536, 536)] {
                    let packet = syn(v6, a_to_b, offered);
                    let arrived = if a_to_b { pair.a_to_b(&packet) } else { pair.b_to_a(&packet) };
                    let expected = if on_a || on_b { expected } else { offered };
                    assert_eq!(arrived, [routed(&syn(v6, a_to_b, expected), 2)], "{v6} {a_to_b} {offered}");
                    assert_eq!(tcp::mss(&arrived[0][header..]), Some(expected));
                }
            }
        }
    }
}

fn outer_header(pair: &mut Pair, packet: &[u8]) -> Vec<u8> {
    let sealed = pair.protect(packet).remove(0);
    sound(&sealed);
    sealed
}

/// RFC 4301 section 8.1: DF of the outer header is copied, set or cleared.
#[test]
fn dp_5_df() {
    for (df, copied) in [(DfPolicy::Copy, None), (DfPolicy::Set, Some(true)), (DfPolicy::Clear, Some(false))]
    {
        let path = PathPolicy { df, ..PathPolicy::default() };
        for (packet, inner) in
            [(sized(false, 100), true), (fragmentable(100), false), (sized(true, 100), true)]
        {
            let mut pair = Pair::new(
                Suites::Gcm128,
                Options { path, inner_v6: packet[0] >> 4 == 6, ..Options::default() },
            );
            let sealed = outer_header(&mut pair, &packet);
            let view = ip4::View::parse(&sealed).unwrap();
            assert_eq!(view.dont_fragment(), copied.unwrap_or(inner), "{df:?} {inner}");
            assert_eq!((view.ttl(), view.fragment_offset(), view.more_fragments()), (64, 0, false));
        }
    }
}

/// RFC 6864: a packet that may be fragmented has an identification that does not repeat soon.
#[test]
fn dp_5_identification() {
    let path = PathPolicy { df: DfPolicy::Clear, ..PathPolicy::default() };
    let mut pair = Pair::new(Suites::Gcm128, Options { path, ..Options::default() });
    let ids: std::collections::HashSet<u16> = (0..500)
        .map(|_| ip4::View::parse(&outer_header(&mut pair, &sized(false, 60))).unwrap().id())
        .collect();
    assert_eq!(ids.len(), 500);
}

/// RFC 4301 section 5.1.2, RFC 6040 section 4.1: DSCP and ECN of the outer header.
#[test]
fn dp_5_dscp_and_ecn_outbound() {
    for (dscp, ecn) in [
        (DscpPolicy::Copy, true),
        (DscpPolicy::Copy, false),
        (DscpPolicy::Fixed(46), true),
        (DscpPolicy::Fixed(0), false),
    ] {
        for (outer_v6, inner_v6) in [(false, false), (false, true), (true, false), (true, true)] {
            let path = PathPolicy { dscp, ecn, ..PathPolicy::default() };
            let mut pair =
                Pair::new(Suites::Gcm128, Options { path, outer_v6, inner_v6, ..Options::default() });
            for tos in [0, 1, 2, 3, 0xb8, 0xbb, 0xfd] {
                let mut packet = sized(inner_v6, 80);
                postern_datapath::header::set_tos(&mut packet, tos).unwrap();
                let sealed = outer_header(&mut pair, &packet);
                let class = match dscp {
                    DscpPolicy::Copy => tos & 0xfc,
                    DscpPolicy::Fixed(dscp) => dscp << 2,
                };
                let expected = class | if ecn { tos & 3 } else { 0 };
                assert_eq!(postern_datapath::header::tos(&sealed), Some(expected), "{path:?} {tos:#x}");
                // Inside all of it is kept, DSCP in any case (RFC 4301 section 5.1.2.1).
                assert_eq!(pair.open_b(&sealed), [routed(&packet, 2)]);
            }
        }
    }
}

/// RFC 6040 section 4.2, figure 4: what comes out, for every pair of inner and outer codepoints. `None` is a drop.
const DECAPSULATED: [[Option<u8>; 4]; 4] = [
    // Outer: Not-ECT, ECT(1), ECT(0), CE.
    [Some(0), Some(0), Some(0), None],
    [Some(1), Some(1), Some(1), Some(3)],
    [Some(2), Some(1), Some(2), Some(3)],
    [Some(3), Some(3), Some(3), Some(3)],
];

/// RFC 6040: the table of decapsulation.
#[test]
fn dp_5_ecn_inbound() {
    for (outer_v6, inner_v6) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut pair = Pair::new(Suites::Gcm128, Options { outer_v6, inner_v6, ..Options::default() });
        for (inner, row) in (0u8..).zip(DECAPSULATED) {
            for (outer, expected) in (0u8..).zip(row) {
                let mut packet = sized(inner_v6, 80);
                postern_datapath::header::set_tos(&mut packet, 0xb8 | inner).unwrap();
                let mut sealed = pair.protect(&packet).remove(0);
                // A DSCP that the network changed does not come in (RFC 2983).
                postern_datapath::header::set_tos(&mut sealed, 0x28 | outer).unwrap();
                let arrived = pair.open_b(&sealed);
                let expected = expected.map(|ecn| {
                    postern_datapath::header::set_tos(&mut packet, 0xb8 | ecn).unwrap();
                    routed(&packet, 2)
                });
                assert_eq!(arrived, expected.into_iter().collect::<Vec<_>>(), "inner {inner} outer {outer}");
                for packet in &arrived {
                    sound(packet);
                }
            }
        }
        dropped(&pair.b, DropReason::EcnNotEctMarked, 1);
    }
}

/// RFC 4303 section 2.7: padding behind the inner packet hides its length, and goes.
#[test]
fn dp_5_traffic_flow_confidentiality() {
    for suite in [Suites::Gcm128, Suites::CbcSha256, Suites::NullSha256] {
        for v6 in [false, true] {
            let mut pair = Pair::new(suite, Options { inner_v6: v6, ..Options::default() });
            let (from, to) = outer(false);
            let packet = sized(v6, 90);
            for (n, extra) in [1, 3, 100, 1300].into_iter().enumerate() {
                let padded = [packet.clone(), vec![0xee; extra]].concat();
                let next_header = if v6 { Protocol::IPV6 } else { Protocol::IPV4 };
                let plaintext = with_trailer(&padded, next_header, 16);
                let esp = seal(&suite.suite(0x11), SPI_AB, n as u64 + 1, true, &plaintext);
                let arrived = pair.open_b(&ip_packet(from, to, Protocol::ESP, 0, &esp));
                assert_eq!(arrived, [routed(&packet, 1)], "{suite:?} {extra}");
            }
            pair.clean();
        }
    }
}

/// Ethernet pads short frames: padding is no part of a packet, on either side.
#[test]
fn dp_5_ethernet_padding() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let packet = datagram(false, true, b"");
    let padded = [packet.clone(), vec![0x77; 18]].concat();
    let sealed = pair.protect(&padded).remove(0);
    let sealed_padded = [sealed, vec![0x77; 30]].concat();
    assert_eq!(pair.open_b(&sealed_padded), [routed(&packet, 2)]);
    let flow = Flow::parse(&packet).unwrap();
    assert_eq!(usize::from(flow.total_len), packet.len());
    pair.clean();
}

/// DP-5: cleartext that bypasses is routed like by any router: MTU, TTL and all.
#[test]
fn dp_5_bypass_is_routed() {
    use postern_contract::Generation;
    use postern_contract::request::Operation;
    use postern_contract::sa::{Action, Policy, PolicyId};
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let policy = |id, net_a, net_b| {
        Operation::InstallPolicy(Policy {
            id: PolicyId(id),
            generation: Generation(1),
            priority: 1,
            selectors: vec![selector(net_a, net_b)],
            action: Action::Bypass,
        })
    };
    install(&mut pair.a, vec![policy(8, "10.1.0.0/24", "10.2.0.0/24"), policy(9, "fd01::/64", "fd02::/64")]);
    let set = |bed: &mut Testbed, mtu| bed.publisher.set_fib(&fib(&Layout { mtu, ..Layout::default() }));
    set(&mut pair.a, 1300);
    for v6 in [false, true] {
        let packet = sized(v6, 1300);
        assert_eq!(pair.a.from_inside(&packet).0, [routed(&packet, 1)]);
        let packet = sized(v6, 1301);
        let (outside, inside) = pair.a.from_inside(&packet);
        assert!(outside.is_empty());
        assert_eq!(told(&inside[0]), 1300);
        assert_eq!(pair.a.from_inside(&routed(&sized(v6, 100), 63)).1.len(), 1, "time exceeded");
    }
    let packet = fragmentable(3000);
    let (pieces, _) = pair.a.from_inside(&packet);
    assert_eq!(pieces.len(), 3);
    assert_eq!(join(&pieces), packet[20..]);
    assert_eq!((pair.a.drops(DropReason::TooBig), pair.a.drops(DropReason::TtlExpired)), (2, 2));
    assert!(ip6::View::parse(&sized(true, 100)).is_ok());
    pair.a.push(INSIDE, &sized(false, 64));
    assert_eq!(pair.a.departed().0.len(), 1);
    conserved(&pair.a);
}
