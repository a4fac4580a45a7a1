//! Every suite in every mode and family, both ways, byte for byte (DP-3).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use common::*;
use postern_contract::Translation;
use postern_contract::counters::DropReason;
use postern_contract::request::Operation;
use postern_contract::sa::{Action, IpsecProtocol, Mode, SaId, UdpEncap};
use postern_datapath::testbed::{Layout, Testbed};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{esp, ip4, ip6, udp};
use tempfile::TempDir;

const ENCAP: UdpEncap = UdpEncap { local_port: 4500, remote_port: 4500 };
/// Sizes around block and word boundaries, and one that fills a frame of 1500 with every suite.
const SIZES: [usize; 9] = [0, 1, 2, 3, 4, 13, 14, 100, 1300];

/// The packet that a host of side A, or B, sends in this mode.
fn packet(options: &Options, a: bool, payload: &[u8]) -> Vec<u8> {
    if options.mode == Mode::Tunnel {
        return datagram(options.inner_v6, a, payload);
    }
    let (from, to) = outer(options.outer_v6);
    let (from, to) = if a { (from, to) } else { (to, from) };
    let (from, to) = (from.to_string(), to.to_string());
    if options.outer_v6 { udp6(&from, &to, 7, 9, payload) } else { udp4(&from, &to, 7, 9, payload) }
}

/// What arrives: in tunnel mode two routers were on the way, in transport mode none.
fn expected(options: &Options, packet: &[u8]) -> Vec<u8> {
    routed(packet, if options.mode == Mode::Tunnel { 2 } else { 0 })
}

/// The outer packet is what the options say, from its first header to the IPsec header.
fn check_outer(options: &Options, suite: Suites, sealed: &[u8]) {
    sound(sealed);
    let (from, to) = outer(options.outer_v6);
    let (source, destination, protocol, rest) = if options.outer_v6 {
        let view = ip6::View::parse(sealed).unwrap();
        (view.source().into(), view.destination().into(), view.next_header(), view.payload())
    } else {
        let view = ip4::View::parse(sealed).unwrap();
        (std::net::IpAddr::from(view.source()), view.destination().into(), view.protocol(), view.payload())
    };
    assert_eq!((source, destination), (from, to));
    let outermost = if options.bundle || suite.is_ah() { Protocol::AH } else { Protocol::ESP };
    if options.encap.is_some() {
        assert_eq!(protocol, Protocol::UDP);
        let view = udp::Header::parse(rest).unwrap();
        assert_eq!((view.source_port, view.destination_port), (4500, 4500));
        if let (std::net::IpAddr::V6(from), std::net::IpAddr::V6(to)) = (from, to) {
            let mut datagram = rest.to_vec();
            datagram[6..8].fill(0);
            assert_eq!(view.checksum, udp::checksum_v6(from, to, &datagram), "RFC 8200 section 8.1");
        } else {
            assert_eq!(view.checksum, 0, "RFC 3948 section 2.1");
        }
        assert_eq!(esp::Header::parse(&rest[8..]).unwrap().spi, SPI_AB);
    } else {
        assert_eq!(protocol, outermost);
    }
}

/// Sends packets of all sizes both ways and checks them.
fn round_trip(suite: Suites, options: &Options) {
    let name = format!("{suite:?} {options:?}");
    let mut pair = Pair::new(suite, options.clone());
    for size in SIZES {
        let payload: Vec<u8> = (0..=255).cycle().take(size).collect();
        let there = packet(options, true, &payload);
        let sealed = pair.protect(&there);
        assert_eq!(sealed.len(), 1, "{name} {size}");
        check_outer(options, suite, &sealed[0]);
        assert_eq!(pair.open_b(&sealed[0]), [expected(options, &there)], "{name} {size}");
        let back = packet(options, false, &payload);
        assert_eq!(pair.b_to_a(&back), [expected(options, &back)], "{name} {size}");
    }
    pair.clean();
    let report = pair.b.publisher.sa(A_IN).unwrap();
    assert_eq!((report.counters.packets, report.counters.sequence), (SIZES.len() as u64, SIZES.len() as u64));
}

fn all_options() -> Vec<Options> {
    let mut all = Vec::new();
    for (mode, outer_v6, inner_v6) in [
        (Mode::Tunnel, false, false),
        (Mode::Tunnel, false, true),
        (Mode::Tunnel, true, false),
        (Mode::Tunnel, true, true),
        (Mode::Transport, false, false),
        (Mode::Transport, true, true),
    ] {
        for esn in [false, true] {
            for encap in [None, Some(ENCAP)] {
                all.push(Options { mode, outer_v6, inner_v6, esn, encap, ..Options::default() });
            }
        }
    }
    all
}

/// DP-3: all suites, tunnel and transport mode, IPv4 and IPv6 outside and inside, with and without ESN and NAT-T.
#[test]
fn dp_3_every_suite_in_every_form() {
    for suite in ALL_SUITES {
        for options in all_options() {
            if options.encap.is_none() || suite.protocol() == IpsecProtocol::Esp {
                round_trip(suite, &options);
            }
        }
    }
}

/// DP-3: the bundle of AH over ESP.
#[test]
fn dp_3_bundles() {
    for suite in [Suites::Gcm128, Suites::CbcSha256, Suites::NullSha256, Suites::ChaCha] {
        for options in all_options().into_iter().filter(|options| options.encap.is_none()) {
            round_trip(suite, &Options { bundle: true, ..options });
        }
    }
}

/// DP-3: ESP that comes without the AH of its bundle, or under another's, is refused, and its window does not move.
#[test]
fn dp_3_esp_without_its_ah() {
    const OTHER: Spi = Spi(0x5005);
    let mut pair = Pair::new(Suites::Gcm128, Options { bundle: true, ..Options::default() });
    // B also has an AH SA with A that is no part of the bundle, and A can sign with it.
    let alone = |a: bool| {
        let options = Options { mode: Mode::Transport, ..Options::default() };
        let mut operations = side(Suites::AhSha512, &options, a);
        for (id, new) in [(A_IN, SaId(12)), (A_OUT, SaId(11))] {
            let config = sa(&mut operations, id);
            (config.id, config.pair, config.spi) = (new, None, Translation::same(OTHER));
        }
        operations
    };
    let mut operations = alone(false);
    operations.truncate(2);
    install(&mut pair.b, operations);
    let state = TempDir::new().unwrap();
    let mut signer = Testbed::new(&Layout::default(), state.path()).unwrap();
    let mut operations = alone(true);
    if let Some(Operation::InstallPolicy(policy)) = operations.last_mut() {
        policy.action = Action::Protect(Some(SaId(11)));
    }
    install(&mut signer, operations);

    let sealed = pair.protect(&datagram(false, true, b"bundle")).remove(0);
    let (from, to) = outer(false);
    let esp = &sealed[20 + 28..];
    let bare = ip_packet(from, to, Protocol::ESP, 0, esp);
    assert!(pair.open_b(&bare).is_empty());
    dropped(&pair.b, DropReason::BundleMissing, 1);
    let under_another = signer.from_inside(&bare).0.remove(0);
    assert_eq!(under_another.len(), bare.len() + 44);
    assert!(pair.open_b(&under_another).is_empty());
    dropped(&pair.b, DropReason::BundleMissing, 2);
    assert_eq!(pair.open_b(&sealed).len(), 1);
}

/// DP-3: AH whose ESP underneath has an SPI that nobody knows.
#[test]
fn dp_3_ah_over_unknown_esp() {
    let options = Options { bundle: true, ..Options::default() };
    let mut pair = Pair::with(Suites::Gcm128, options, |operations, a| {
        if a {
            sa(operations, A_OUT).spi = Translation::same(Spi(0x9999));
        }
    });
    assert!(pair.a_to_b(&datagram(false, true, b"x")).is_empty());
    dropped(&pair.b, DropReason::UnknownSpi, 1);
}

/// DP-3: the AH of a bundle covers the ESP header.
#[test]
fn dp_3_ah_covers_the_esp_header() {
    let mut pair = Pair::new(Suites::Gcm128, Options { bundle: true, ..Options::default() });
    let sealed = pair.protect(&datagram(false, true, b"bundle")).remove(0);
    // 20 bytes of IP, 28 of AH, then the ESP SPI and number.
    for at in 48..56 {
        let mut forged = sealed.clone();
        forged[at] ^= 1;
        assert!(pair.open_b(&forged).is_empty());
    }
    dropped(&pair.b, DropReason::BadIcv, 8);
    assert_eq!(pair.open_b(&sealed).len(), 1);
}
