//! What must not get through, and the name of the counter that says so (DP-6).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::*;
use postern_contract::counters::DropReason;
use postern_contract::sa::{Mode, UdpEncap};
use postern_datapath::testbed::{INSIDE, OUTSIDE, OUTSIDE_MAC, Testbed};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{icmp, ip4, ip6};

const ENCAP: UdpEncap = UdpEncap { local_port: 4500, remote_port: 4500 };

fn encapsulated() -> Options {
    Options { encap: Some(ENCAP), ..Options::default() }
}

/// Drops of one reason since `before`.
fn since(bed: &Testbed, before: &[u64]) -> Vec<&'static str> {
    let drops = DropReason::ALL.iter().zip(before);
    drops
        .filter(|(reason, before)| bed.drops(**reason) > **before)
        .map(|(reason, _)| reason.label())
        .collect()
}

fn snapshot(bed: &Testbed) -> Vec<u64> {
    DropReason::ALL.iter().map(|reason| bed.drops(*reason)).collect()
}

/// Sends `packet` to B from outside: nothing comes out and exactly this counter moves, by one.
#[track_caller]
fn refused(pair: &mut Pair, packet: &[u8], reason: DropReason) {
    let before = snapshot(&pair.b);
    assert!(pair.open_b(packet).is_empty(), "it was delivered");
    assert_eq!(since(&pair.b, &before), [reason.label()]);
    assert_eq!(pair.b.all_drops(), before.iter().sum::<u64>() + 1);
    conserved(&pair.b);
}

/// An ESP packet from A to B whose plaintext is the caller's, with the right key.
fn hand_made(suite: Suites, sequence: u64, plaintext: &[u8]) -> Vec<u8> {
    let (from, to) = outer(false);
    ip_packet(from, to, Protocol::ESP, 0, &seal(&suite.suite(0x11), SPI_AB, sequence, true, plaintext))
}

/// DP-6: every bit of an ESP packet over IPv4 that changes keeps it out.
#[test]
fn dp_6_every_flipped_bit_is_noticed() {
    for suite in [Suites::Gcm128, Suites::ChaCha, Suites::CbcSha256, Suites::NullSha256, Suites::Gmac] {
        let mut pair = Pair::new(suite, Options::default());
        let sealed = pair.protect(&datagram(false, true, &[3; 40])).remove(0);
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut forged = sealed.clone();
                forged[at] ^= 1 << bit;
                let reasons: &[DropReason] = match at {
                    // Version and header length, total length, flags and offset: several things can be wrong.
                    0 | 2 | 3 | 6 | 7 => &[
                        DropReason::Malformed,
                        DropReason::BadIpChecksum,
                        DropReason::Fragment,
                        DropReason::NotForUs,
                    ],
                    // Another protocol than one of IPsec's.
                    9 => &[DropReason::NotForUs, DropReason::BadIpChecksum, DropReason::Malformed],
                    1..20 => &[DropReason::BadIpChecksum],
                    20..24 => &[DropReason::UnknownSpi],
                    24..28 => &[DropReason::BadIcv, DropReason::ReplayZero],
                    _ => &[DropReason::BadIcv],
                };
                let before = snapshot(&pair.b);
                assert!(pair.open_b(&forged).is_empty(), "{suite:?} byte {at} bit {bit}");
                let seen = since(&pair.b, &before);
                let known = reasons.iter().any(|reason| seen == [reason.label()]);
                assert!(known, "{suite:?} byte {at} bit {bit}: {seen:?}");
            }
        }
        conserved(&pair.b);
        assert_eq!(pair.open_b(&sealed).len(), 1, "the window did not move");
    }
}

/// DP-6: every byte of AH and of what it covers; the mutable fields are not covered.
#[test]
fn dp_6_every_flipped_byte_under_ah_is_noticed() {
    for outer_v6 in [false, true] {
        let mut pair = Pair::new(Suites::AhSha256, Options { outer_v6, ..Options::default() });
        let sealed = pair.protect(&datagram(false, true, &[3; 40])).remove(0);
        let ip = if outer_v6 { 40 } else { 20 };
        // Traffic class, flow label and hop limit (RFC 4302 section 3.3.3.1.2.1); IPv4's mutable fields are under the
        // header checksum.
        let mutable = |at| outer_v6 && matches!(at, 1..=3 | 7);
        for at in (0..sealed.len()).filter(|at| !mutable(*at)) {
            let mut forged = sealed.clone();
            forged[at] ^= 0x10;
            assert!(pair.open_b(&forged).is_empty(), "byte {at}");
        }
        assert!(pair.b.drops(DropReason::BadIcv) > 40);
        assert_eq!(pair.b.drops(DropReason::UnknownSpi), 4, "the SPI at {ip} + 4");
        conserved(&pair.b);
        let mut muted = sealed.clone();
        if outer_v6 {
            (muted[1], muted[3], muted[7]) = (0x15, 0x77, 3);
        } else {
            ip4::set_tos(&mut muted, 0x14).unwrap();
            ip4::decrement_ttl(&mut muted).unwrap();
        }
        assert_eq!(pair.open_b(&muted).len(), 1, "what routers change passes");
    }
}

/// DP-6: packets cut at any place, with and without length fields that follow.
#[test]
fn dp_6_cut_packets() {
    for (suite, options) in [
        (Suites::Gcm128, Options::default()),
        (Suites::CbcSha256, Options::default()),
        (Suites::AhSha256, Options::default()),
        (Suites::Gcm128, encapsulated()),
        (Suites::Gcm128, Options { outer_v6: true, ..Options::default() }),
    ] {
        let outer_v6 = options.outer_v6;
        let mut pair = Pair::new(suite, options);
        let sealed = pair.protect(&datagram(false, true, &[3; 40])).remove(0);
        for len in 0..sealed.len() {
            refused(&mut pair, &sealed[..len], DropReason::Malformed);
        }
        let (ip, udp) = if outer_v6 { (40, 0) } else { (20, usize::from(sealed[9] == 17) * 8) };
        for len in ip + udp..sealed.len() {
            let mut cut = sealed[..len].to_vec();
            if outer_v6 {
                ip6::set_payload_len(&mut cut, len - 40).unwrap();
            } else {
                ip4::set_total_len(&mut cut, len).unwrap();
            }
            if udp > 0 {
                cut[24..26].copy_from_slice(&u16::try_from(len - 20).unwrap().to_be_bytes());
            }
            let before = snapshot(&pair.b);
            assert!(pair.open_b(&cut).is_empty(), "{suite:?} {len}");
            let seen = since(&pair.b, &before);
            let good = [DropReason::Malformed, DropReason::BadLength, DropReason::BadIcv];
            assert!(good.iter().any(|reason| seen == [reason.label()]), "{suite:?} {len}: {seen:?}");
        }
        conserved(&pair.b);
        assert_eq!(pair.open_b(&sealed).len(), 1);
    }
}

/// DP-6: frames too short for what their headers say.
#[test]
fn dp_6_runts() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let frame = postern_datapath::testbed::frame(OUTSIDE_MAC, &hand_made(Suites::Gcm128, 1, &[0; 4]));
    for len in 0..14 + 20 + 8 {
        pair.b.outside[0].push(&frame[..len]);
        assert_eq!(pair.b.departed(), (vec![], vec![]));
        assert_eq!(pair.b.drops(DropReason::Malformed), len as u64 + 1);
    }
    dropped(&pair.b, DropReason::Malformed, 42);
    let (from, to) = outer(false);
    for len in 0..8 {
        refused(
            &mut pair,
            &ip_packet(from, to, Protocol::ESP, 0, &[1; 7][..len.min(7)]),
            DropReason::Malformed,
        );
    }
    // A header and not enough behind it for IV, trailer and ICV.
    let mut esp = seal(&Suites::Gcm128.suite(0x11), SPI_AB, 1, true, &[0, 0, 2, 4]);
    esp.truncate(33);
    refused(&mut pair, &ip_packet(from, to, Protocol::ESP, 0, &esp), DropReason::BadLength);
    // Ciphertext of CBC that is no whole number of blocks.
    let mut pair = Pair::new(Suites::CbcSha256, Options::default());
    let mut esp = seal(&Suites::CbcSha256.suite(0x11), SPI_AB, 1, true, &[0; 32]);
    esp.truncate(esp.len() - 1);
    refused(&mut pair, &ip_packet(from, to, Protocol::ESP, 0, &esp), DropReason::BadLength);
    // AH whose length field says more than the packet or less than its ICV.
    let mut pair = Pair::new(Suites::AhSha256, Options::default());
    let sealed = pair.protect(&datagram(false, true, b"ah")).remove(0);
    for (value, reason) in [
        (0, DropReason::Malformed),
        (255, DropReason::Malformed),
        (4, DropReason::BadLength),
        (6, DropReason::BadLength),
    ] {
        let mut wrong = sealed.clone();
        wrong[21] = value;
        refused(&mut pair, &wrong, reason);
    }
}

/// DP-6: larger than a frame has room for.
#[test]
fn dp_6_oversized() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let (from, to) = outer(false);
    pair.b.push(OUTSIDE, &ip_packet(from, to, Protocol::ESP, 0, &[0x11; 4000]));
    assert_eq!(pair.b.departed(), (vec![], vec![]));
    dropped(&pair.b, DropReason::EgressMtu, 1);
    // The largest that fits is looked at like any other.
    refused(&mut pair, &ip_packet(from, to, Protocol::ESP, 0, &[0x11; 3800]), DropReason::UnknownSpi);
    // Outbound: a packet that fills its frame has no room for headers behind it, and is too large anyway.
    let mut pair = Pair::new(Suites::CbcSha512, Options { mtu: 9000, ..Options::default() });
    for size in 3700..3826 - 28 {
        let arrived = pair.a_to_b(&datagram(false, true, &vec![1; size]));
        assert!(arrived.len() <= 1);
    }
    conserved(&pair.a);
    conserved(&pair.b);
}

/// DP-6: an authentic packet whose padding is not 1, 2, 3 …, or longer than the packet.
#[test]
fn dp_6_bad_padding() {
    for suite in [Suites::Gcm128, Suites::CbcSha256, Suites::NullSha256] {
        let mut pair = Pair::new(suite, Options::default());
        let inner = datagram(false, true, &[5; 33]);
        let good = with_trailer(&inner, Protocol::IPV4, 16);
        let pad = usize::from(good[good.len() - 2]);
        assert!(pad > 0);
        let mut sequence = 0;
        for at in 0..pad {
            let mut bad = good.clone();
            bad[inner.len() + at] ^= 0x80;
            sequence += 1;
            refused(&mut pair, &hand_made(suite, sequence, &bad), DropReason::BadPadding);
        }
        for pad_length in [255, u8::try_from(good.len() - 1).unwrap()] {
            let mut bad = good.clone();
            let place = bad.len() - 2;
            bad[place] = pad_length;
            sequence += 1;
            refused(&mut pair, &hand_made(suite, sequence, &bad), DropReason::BadPadding);
        }
        assert_eq!(pair.open_b(&hand_made(suite, sequence + 1, &good)).len(), 1);
    }
}

/// DP-6: a next header that a tunnel cannot carry, and an inner packet that is none.
#[test]
fn dp_6_bad_next_header_and_inner_packet() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let inner = datagram(false, true, &[5; 40]);
    let mut sequence = 0;
    let mut send = |pair: &mut Pair, inner: &[u8], next_header, reason| {
        sequence += 1;
        let packet = hand_made(Suites::Gcm128, sequence, &with_trailer(inner, next_header, 4));
        refused(pair, &packet, reason);
    };
    for next_header in [Protocol::TCP, Protocol::UDP, Protocol::ESP, Protocol(0), Protocol(255)] {
        send(&mut pair, &inner, next_header, DropReason::BadNextHeader);
    }
    // The other version than the next header says.
    send(&mut pair, &inner, Protocol::IPV6, DropReason::BadInner);
    send(&mut pair, &datagram(true, true, &[5; 40]), Protocol::IPV4, DropReason::BadInner);
    send(&mut pair, &[], Protocol::IPV4, DropReason::BadInner);
    send(&mut pair, &[], Protocol::IPV6, DropReason::BadInner);
    for len in 1..inner.len() {
        send(&mut pair, &inner[..len], Protocol::IPV4, DropReason::BadInner);
    }
    let mut short_header = inner.clone();
    short_header[0] = 0x44;
    send(&mut pair, &short_header, Protocol::IPV4, DropReason::BadInner);
    let v6 = datagram(true, true, &[5; 8]);
    for len in 1..v6.len() {
        send(&mut pair, &v6[..len], Protocol::IPV6, DropReason::BadInner);
    }
}

/// RFC 4301 section 5.2, step 4: source and destination must be what the SA is for.
#[test]
fn dp_6_wrong_selectors() {
    let mut pair = Pair::with(Suites::Gcm128, Options::default(), |operations, a| {
        if !a {
            let config = sa(operations, A_IN);
            config.selectors[0].protocol = Some(Protocol::UDP);
            config.selectors[0].local_ports = 2000..=2001;
        }
    });
    let wrong = [
        udp4("10.3.0.2", "10.2.0.2", 1, 2000, b"source"),
        udp4("10.1.0.2", "10.9.0.2", 1, 2000, b"destination"),
        udp4("10.2.0.2", "10.1.0.2", 1, 2000, b"the wrong way round"),
        udp4("10.1.0.2", "10.2.0.2", 1, 2002, b"port"),
        ip_packet(ip("10.1.0.2"), ip("10.2.0.2"), Protocol::TCP, 0, &[0; 20]),
        udp6("fd01::2", "fd02::2", 1, 2000, b"family"),
    ];
    for (n, inner) in wrong.iter().enumerate() {
        let next_header = if inner[0] >> 4 == 4 { Protocol::IPV4 } else { Protocol::IPV6 };
        let plaintext = with_trailer(inner, next_header, 4);
        refused(
            &mut pair,
            &hand_made(Suites::Gcm128, n as u64 + 1, &plaintext),
            DropReason::SelectorMismatch,
        );
    }
    let good = with_trailer(&udp4("10.1.0.2", "10.2.0.2", 1, 2001, b"right"), Protocol::IPV4, 4);
    assert_eq!(pair.open_b(&hand_made(Suites::Gcm128, 100, &good)).len(), 1);
    let drops = pair.b.publisher.sa(A_IN).unwrap().counters.drops;
    assert_eq!(drops, [(DropReason::SelectorMismatch, 6)]);
}

/// DP-6: SPIs that nobody has, the reserved ones among them, of both protocols.
#[test]
fn dp_6_unknown_spi() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let (from, to) = outer(false);
    for spi in [0, 1, 255, 0x1000, 0x0001_1001, u32::MAX, SPI_BA.0] {
        let esp = seal(&Suites::Gcm128.suite(0x11), Spi(spi), 1, true, &[0, 0, 2, 59]);
        refused(&mut pair, &ip_packet(from, to, Protocol::ESP, 0, &esp), DropReason::UnknownSpi);
    }
    // The SPI of an ESP SA in an AH header.
    let mut ah = vec![17, 4, 0, 0];
    ah.extend(SPI_AB.0.to_be_bytes());
    ah.extend([0; 32]);
    refused(&mut pair, &ip_packet(from, to, Protocol::AH, 0, &ah), DropReason::UnknownSpi);
}

/// DP-6: fragments of IPsec packets, first and later, both families; a fragment header alone counts as one.
#[test]
fn dp_6_fragments() {
    for options in [Options::default(), encapsulated()] {
        let mut pair = Pair::new(Suites::Gcm128, options);
        let sealed = pair.protect(&datagram(false, true, &[3; 100])).remove(0);
        let mut first = sealed.clone();
        ip4::set_fragment(&mut first, None, 0, true).unwrap();
        refused(&mut pair, &first, DropReason::Fragment);
        let mut later = sealed.clone();
        ip4::set_fragment(&mut later, None, 64, false).unwrap();
        // A later fragment of UDP has no port to tell whose it is.
        let reason = if sealed[9] == 17 { DropReason::NotForUs } else { DropReason::Fragment };
        refused(&mut pair, &later, reason);
    }
    let mut pair = Pair::new(Suites::Gcm128, Options { outer_v6: true, ..Options::default() });
    let sealed = pair.protect(&datagram(false, true, &[3; 100])).remove(0);
    for (offset, more) in [(0, 0), (0, 1), (64, 1), (64, 0)] {
        let mut packet = sealed[..40].to_vec();
        packet[6] = 44;
        packet.extend([50, 0, 0, offset | more, 0, 0, 0, 9]);
        packet.extend(&sealed[40..]);
        let len = packet.len() - 40;
        ip6::set_payload_len(&mut packet, len).unwrap();
        refused(&mut pair, &packet, DropReason::Fragment);
    }
}

/// RFC 3948: keepalives, IKE, and datagrams on port 4500 that are neither.
#[test]
fn dp_6_port_4500() {
    let mut pair = Pair::new(Suites::Gcm128, encapsulated());
    let (from, to) = outer(false);
    let udp = |payload: &[u8]| ip_packet(from, to, Protocol::UDP, 0, &in_udp(4500, 4500, payload));
    refused(&mut pair, &udp(&[0xff]), DropReason::NattKeepalive);
    for short in [&[][..], &[0xfe], &[0xff, 0xff], &[1, 2, 3], &[0, 0, 1, 0, 0, 0, 0]] {
        refused(&mut pair, &udp(short), DropReason::Malformed);
    }
    for ike in [&[0; 4][..], &[0; 32]] {
        refused(&mut pair, &udp(ike), DropReason::NotForUs);
    }
    let sealed = pair.protect(&datagram(false, true, &[3; 50])).remove(0);
    // The datagram ends before the packet does, or behind it.
    for difference in [-4, -1, 1, 4] {
        let mut odd = sealed.clone();
        let length = u16::try_from(i32::try_from(odd.len()).unwrap() - 20 + difference).unwrap();
        odd[24..26].copy_from_slice(&length.to_be_bytes());
        refused(&mut pair, &odd, DropReason::Malformed);
    }
    // To another port it is not ESP.
    let mut other = sealed.clone();
    other[23] ^= 1;
    refused(&mut pair, &other, DropReason::NotForUs);
    // Whatever checksum a NAT left (RFC 3948 section 2.1: "receivers MUST NOT depend on the UDP checksum being zero").
    let mut checksum = sealed;
    checksum[26..28].fill(0x55);
    assert_eq!(pair.open_b(&checksum).len(), 1);
}

/// RFC 7296 section 2.23: ESP is taken with and without UDP, whatever the SA says.
#[test]
fn dp_3_both_encapsulations_are_taken() {
    let mut pair = Pair::new(Suites::Gcm128, encapsulated());
    let (from, to) = outer(false);
    let sealed = pair.protect(&datagram(false, true, &[3; 50])).remove(0);
    let bare = ip_packet(from, to, Protocol::ESP, 0, &sealed[28..]);
    assert_eq!(pair.open_b(&bare).len(), 1);
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let sealed = pair.protect(&datagram(false, true, &[3; 50])).remove(0);
    let wrapped = ip_packet(from, to, Protocol::UDP, 0, &in_udp(4500, 4500, &sealed[20..]));
    assert_eq!(pair.open_b(&wrapped).len(), 1);
}

/// DP-6: what is no IP, or not ours, from either side.
#[test]
fn dp_6_not_ours() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let (from, to) = outer(false);
    for protocol in [Protocol::TCP, Protocol::ICMP, Protocol::IPV4, Protocol(47)] {
        refused(&mut pair, &ip_packet(from, to, protocol, 0, &[0; 40]), DropReason::NotForUs);
    }
    refused(
        &mut pair,
        &ip_packet(from, to, Protocol::UDP, 0, &in_udp(500, 500, &[0; 40])),
        DropReason::NotForUs,
    );
    let mut frame = postern_datapath::testbed::frame(OUTSIDE_MAC, &[0; 46]);
    for (n, ether_type) in [[8, 6], [0x81, 0], [0x88, 0xcc]].into_iter().enumerate() {
        frame[12..14].copy_from_slice(&ether_type);
        let before = pair.b.drops(DropReason::NotForUs);
        pair.b.outside[0].push(&frame);
        pair.b.inside[0].push(&frame);
        assert_eq!(pair.b.departed(), (vec![], vec![]), "{n}");
        assert_eq!(pair.b.drops(DropReason::NotForUs), before + 2);
    }
    // A version that contradicts the Ethernet type.
    for version in [0, 5, 6, 15] {
        let mut packet = hand_made(Suites::Gcm128, 1, &[0, 0, 2, 59]);
        packet[0] = version << 4 | 5;
        frame = postern_datapath::testbed::frame(OUTSIDE_MAC, &packet);
        frame[12..14].copy_from_slice(&[8, 0]);
        let before = pair.b.drops(DropReason::Malformed);
        pair.b.outside[0].push(&frame);
        pair.b.inside[0].push(&frame);
        assert_eq!(pair.b.departed(), (vec![], vec![]));
        assert_eq!(pair.b.drops(DropReason::Malformed), before + 2, "version {version}");
    }
    conserved(&pair.b);
}

/// RFC 1122 section 3.2.1.2, RFC 1812 section 5.2.2: a wrong header checksum, outside and inside.
#[test]
fn dp_6_bad_checksum() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let mut sealed = pair.protect(&datagram(false, true, b"x")).remove(0);
    sealed[10] ^= 1;
    refused(&mut pair, &sealed, DropReason::BadIpChecksum);
    let mut packet = datagram(false, true, b"x");
    packet[11] ^= 1;
    assert_eq!(pair.a.from_inside(&packet), (vec![], vec![]));
    dropped(&pair.a, DropReason::BadIpChecksum, 1);
}

/// DP-6: cleartext that is cut, contradicts itself or is no packet.
#[test]
fn dp_6_malformed_cleartext() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let mut count = 0;
    for v6 in [false, true] {
        let packet = datagram(v6, true, b"cut");
        for len in 0..packet.len() {
            assert_eq!(pair.a.from_inside(&packet[..len]), (vec![], vec![]));
            count += 1;
            assert_eq!(pair.a.drops(DropReason::Malformed), count);
        }
    }
    dropped(&pair.a, DropReason::Malformed, count);
}

/// DP-6: a host's own traffic on port 4500, or ESP of its own, is carried like any other, sound or not.
#[test]
fn dp_6_hosts_may_use_port_4500() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    for payload in [&[0xff][..], &[0xfe], &[], &[0; 4], &[7; 20]] {
        let packet = udp4("10.1.0.2", "10.2.0.2", 4500, 4500, payload);
        assert_eq!(pair.a_to_b(&packet), [routed(&packet, 2)]);
    }
    let esp = ip_packet(ip("10.1.0.2"), ip("10.2.0.2"), Protocol::ESP, 0, &[1; 3]);
    assert_eq!(pair.a_to_b(&esp), [routed(&esp, 2)]);
    pair.clean();
}

/// DP-1: IPsec behind IPv6 extension headers, bounded.
#[test]
fn dp_1_extension_headers() {
    for suite in [Suites::Gcm128, Suites::AhSha256] {
        let mut pair = Pair::new(suite, Options { outer_v6: true, ..Options::default() });
        for (count, length) in [(1, 0), (8, 0), (8, 2), (8, 31), (8, 32), (9, 0), (12, 0)] {
            let sealed = pair.protect(&datagram(false, true, b"chain")).remove(0);
            let mut packet = sealed[..40].to_vec();
            packet[6] = 60;
            for left in (0..count).rev() {
                let next = if left == 0 { sealed[6] } else { 60 };
                packet.extend([next, length]);
                // One PadN option that fills the header, or as many as it takes.
                let mut room = 6 + usize::from(length) * 8;
                while room > 0 {
                    let len = (room - 2).min(250);
                    packet.extend([1, u8::try_from(len).unwrap()]);
                    packet.extend(vec![0; len]);
                    room -= len + 2;
                }
            }
            packet.extend(&sealed[40..]);
            let len = packet.len() - 40;
            ip6::set_payload_len(&mut packet, len).unwrap();
            let before = snapshot(&pair.b);
            let arrived = pair.open_b(&packet).len();
            let seen = since(&pair.b, &before);
            match (count, length, suite.is_ah()) {
                // AH covers extension headers that the sender did not put there; of too many it keeps no copy.
                (1..=8, 0..=2, true) => assert_eq!(seen, [DropReason::BadIcv.label()]),
                (1..=8, 0..=31, false) => assert_eq!(arrived, 1, "{count} {length} {seen:?}"),
                _ => assert_eq!(seen, [DropReason::TooManyExtensionHeaders.label()], "{count} {length}"),
            }
        }
        conserved(&pair.b);
    }
}

/// DP-5, RFC 1812 section 5.3.1: a TTL that runs out is told to the sender, at either gateway.
#[test]
fn dp_5_ttl() {
    for v6 in [false, true] {
        let mut pair = Pair::new(Suites::Gcm128, Options { inner_v6: v6, ..Options::default() });
        let with_ttl = |ttl: u8| {
            let mut packet = datagram(v6, true, b"hops");
            while packet[if v6 { 7 } else { 8 }] > ttl {
                packet = routed(&packet, 1);
            }
            packet
        };
        let expected = |packet: &[u8], from: IpAddr| {
            let mut out = vec![0; 1280];
            let len = match from {
                IpAddr::V4(from) => icmp::time_exceeded_v4(packet, from, &mut out),
                IpAddr::V6(from) => icmp::time_exceeded_v6(packet, from, &mut out),
            };
            out.truncate(len.unwrap());
            out
        };
        let gateway = |four, six| ip(if v6 { six } else { four });
        // Gateway A itself complains.
        let (outside, inside) = pair.a.from_inside(&with_ttl(1));
        assert_eq!((outside, inside), (vec![], vec![expected(&with_ttl(1), gateway("10.1.0.1", "fd01::1"))]));
        dropped(&pair.a, DropReason::TtlExpired, 1);
        // Gateway B does, through the tunnel, of the packet as it came to it.
        let sealed = pair.protect(&with_ttl(2)).remove(0);
        let (back, inside) = pair.b.from_outside(&sealed);
        assert!(inside.is_empty());
        dropped(&pair.b, DropReason::TtlExpired, 1);
        assert_eq!(back.len(), 1);
        let complaint = expected(&with_ttl(1), gateway("10.2.0.1", "fd02::1"));
        assert_eq!(pair.open_a(&back[0]), [routed(&complaint, 1)]);
        assert_eq!(pair.a_to_b(&with_ttl(3)).len(), 1);
        conserved(&pair.a);
    }
}

/// RFC 1812 section 4.3.2.8: errors are limited per second.
#[test]
fn dp_5_errors_are_limited() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let mut packet = datagram(false, true, b"hops");
    packet = routed(&packet, 63);
    let mut told = 0;
    for _ in 0..1100 {
        told += pair.a.from_inside(&packet).1.len();
    }
    assert_eq!(told, 1000);
    dropped(&pair.a, DropReason::TtlExpired, 1100);
    pair.a.advance(Duration::from_secs(1));
    assert_eq!(pair.a.from_inside(&packet).1.len(), 1);
}

/// DP-6: no route, no neighbour.
#[test]
fn dp_6_nowhere_to_go() {
    let mut pair = Pair::with(Suites::Gcm128, Options::default(), |operations, a| {
        for id in [A_IN, A_OUT] {
            let everything = range("0.0.0.0/0");
            let config = sa(operations, id);
            if a {
                config.selectors[0].remote = everything;
            } else {
                config.selectors[0].local = everything;
            }
        }
        if let (true, Some(postern_contract::request::Operation::InstallPolicy(policy))) =
            (a, operations.last_mut())
        {
            policy.selectors[0].remote = range("0.0.0.0/0");
        }
    });
    // Multicast is not forwarded.
    let sealed = pair.protect(&udp4("10.1.0.2", "239.1.2.3", 1, 2, b"x")).remove(0);
    refused(&mut pair, &sealed, DropReason::NoRoute);
    // For B itself, which has no way to itself.
    let sealed = pair.protect(&udp4("10.1.0.2", "10.2.0.1", 1, 2, b"x")).remove(0);
    refused(&mut pair, &sealed, DropReason::NoRoute);
    // Nobody answers: the packet waits and is then counted.
    let sealed = pair.protect(&udp4("10.1.0.2", "10.2.0.77", 1, 2, b"x")).remove(0);
    assert!(pair.open_b(&sealed).is_empty());
    pair.b.advance(Duration::from_secs(10));
    pair.b.push(INSIDE, &[]);
    pair.b.settle();
    assert_eq!(pair.b.drops(DropReason::NeighbourUnresolved), 1);
    conserved(&pair.b);
}

/// DP-3: transport mode carries whole datagrams only.
#[test]
fn dp_3_transport_takes_no_fragments() {
    let mut pair = Pair::new(Suites::Gcm128, Options { mode: Mode::Transport, ..Options::default() });
    let mut packet = udp4("192.0.2.1", "198.51.100.1", 1, 2, &[1; 64]);
    ip4::set_fragment(&mut packet, None, 0, true).unwrap();
    assert!(pair.protect(&packet).is_empty());
    dropped(&pair.a, DropReason::Fragment, 1);
}
