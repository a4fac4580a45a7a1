//! The outer path follows the newest authenticated packet, and nothing else (MOB-1, MOB-2, MOB-3).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use std::net::IpAddr;

use common::*;
use postern_contract::Generation;
use postern_contract::counters::DropReason;
use postern_contract::event::Event;
use postern_contract::request::Operation;
use postern_contract::sa::UdpEncap;
use postern_datapath::testbed::OUTSIDE;
use postern_wire::ids::Protocol;
use postern_wire::{ip4, ip6, udp};

const NATT: UdpEncap = UdpEncap { local_port: 4500, remote_port: 4500 };

fn following() -> Options {
    Options { follow: true, ..Options::default() }
}

/// The packet from another source address, and port if it has one.
fn from(packet: &[u8], source: IpAddr, port: u16) -> Vec<u8> {
    let mut packet = packet.to_vec();
    match source {
        IpAddr::V4(source) => {
            let to = ip4::View::parse(&packet).unwrap().destination();
            ip4::set_addresses(&mut packet, source, to).unwrap();
            if packet[9] == 17 {
                packet[20..22].copy_from_slice(&port.to_be_bytes());
            }
        }
        IpAddr::V6(source) => {
            let to = ip6::View::parse(&packet).unwrap().destination();
            ip6::set_addresses(&mut packet, source, to).unwrap();
            if packet[6] == 17 {
                packet[40..42].copy_from_slice(&port.to_be_bytes());
            }
        }
    }
    packet
}

fn sealed(pair: &mut Pair) -> Vec<u8> {
    pair.protect(&datagram(false, true, b"moving")).remove(0)
}

/// Where B sends its packets: address, and port if encapsulated.
fn destination(pair: &mut Pair) -> (IpAddr, Option<u16>) {
    let packet = pair.protect_b(&datagram(false, false, b"back")).remove(0);
    sound(&packet);
    let to = postern_datapath::header::destination(&packet).unwrap();
    let (protocol, at) = if to.is_ipv4() { (packet[9], 20) } else { (packet[6], 40) };
    let port = udp::Header::parse(&packet[at..]).filter(|_| protocol == 17);
    (to, port.map(|header| header.destination_port))
}

fn new_path(remote: IpAddr, port: Option<u16>) -> Event {
    Event::NewPath { sa: A_IN, remote, port }
}

/// MOB-2: the newest authenticated packet moves the path of the pair, with an event each time it does.
#[test]
fn mob_2_newest_packet_moves_the_path() {
    for (outer_v6, elsewhere) in [(false, ip("203.0.113.7")), (true, ip("2001:db8:7::7"))] {
        for suite in [Suites::Gcm128, Suites::CbcSha256, Suites::NullSha256] {
            let mut pair = Pair::new(suite, Options { outer_v6, ..following() });
            let home = outer(outer_v6).0;
            let packet = sealed(&mut pair);
            assert_eq!(pair.open_b(&packet).len(), 1);
            assert_eq!((destination(&mut pair), pair.b.events()), ((home, None), vec![]));
            let packet = from(&sealed(&mut pair), elsewhere, 0);
            assert_eq!(pair.open_b(&packet).len(), 1);
            assert_eq!(pair.b.events(), [new_path(elsewhere, None)]);
            assert_eq!(destination(&mut pair), (elsewhere, None));
            // More from there raises nothing; back home raises one.
            let packet = from(&sealed(&mut pair), elsewhere, 0);
            assert_eq!(pair.open_b(&packet).len(), 1);
            assert_eq!(pair.b.events(), []);
            let packet = sealed(&mut pair);
            assert_eq!(pair.open_b(&packet).len(), 1);
            assert_eq!(pair.b.events(), [new_path(home, None)]);
            assert_eq!(destination(&mut pair), (home, None));
            let report = pair.b.publisher.sa(A_OUT).unwrap();
            assert_eq!(report.remote.on_wire, home);
            pair.clean();
        }
    }
}

/// MOB-2: AH covers the outer source, so it moves only with what its sender signed.
#[test]
fn mob_2_ah_follows_what_is_signed() {
    let mut pair = Pair::new(Suites::AhSha256, following());
    let elsewhere = ip("203.0.113.7");
    let packet = from(&sealed(&mut pair), elsewhere, 0);
    assert!(pair.open_b(&packet).is_empty());
    dropped(&pair.b, DropReason::BadIcv, 1);
    assert_eq!((destination(&mut pair), pair.b.events()), ((outer(false).0, None), vec![]));
    // The sender itself moves.
    let mut operations = side(Suites::AhSha256, &following(), true);
    operations.retain(|operation| matches!(operation, Operation::InstallSa(config) if config.id == A_OUT));
    let config = sa(&mut operations, A_OUT);
    config.generation = Generation(2);
    config.local = postern_contract::Translation::same(elsewhere);
    install(&mut pair.a, operations);
    let packet = sealed(&mut pair);
    assert_eq!(pair.open_b(&packet).len(), 1);
    assert_eq!(pair.b.events(), [new_path(elsewhere, None)]);
    assert_eq!(destination(&mut pair), (elsewhere, None));
}

/// MOB-2 behind a NAT: another port is another path.
#[test]
fn mob_2_port_alone() {
    for (outer_v6, elsewhere) in [(false, ip("203.0.113.7")), (true, ip("2001:db8:7::7"))] {
        let mut pair = Pair::new(Suites::Gcm128, Options { outer_v6, encap: Some(NATT), ..following() });
        let home = outer(outer_v6).0;
        for (source, port) in [(home, 1024), (elsewhere, 1024), (elsewhere, 65_535), (home, 4500)] {
            let packet = from(&sealed(&mut pair), source, port);
            assert_eq!(pair.open_b(&packet).len(), 1);
            assert_eq!(pair.b.events(), [new_path(source, Some(port))]);
            assert_eq!(destination(&mut pair), (source, Some(port)));
            let report = pair.b.publisher.sa(A_OUT).unwrap();
            assert_eq!(report.encap, Some(UdpEncap { local_port: 4500, remote_port: port }));
        }
        pair.clean();
    }
}

/// MOB-2: forged, replayed and old packets never move it.
#[test]
fn mob_2_nothing_else_moves_the_path() {
    for suite in [Suites::Gcm128, Suites::CbcSha256, Suites::ChaCha] {
        let mut pair = Pair::new(suite, following());
        let (home, elsewhere) = (outer(false).0, ip("203.0.113.7"));
        let packets: Vec<_> = (0..6).map(|_| sealed(&mut pair)).collect();
        // Forged in every byte that is authenticated, from elsewhere.
        for at in 24..packets[0].len() {
            let mut forged = from(&packets[0], elsewhere, 0);
            forged[at] ^= 1;
            assert!(pair.open_b(&forged).is_empty());
        }
        assert_eq!(pair.open_b(&packets[3]).len(), 1);
        // Replayed from elsewhere.
        assert!(pair.open_b(&from(&packets[3], elsewhere, 0)).is_empty());
        // In the window, authentic, new, but not the newest.
        assert_eq!(pair.open_b(&from(&packets[1], elsewhere, 0)).len(), 1);
        // The newest and an older one in one batch, each from another place: the newest wins whichever comes first.
        for order in [[4, 2], [0, 5]] {
            let (newest, older) = (order[0].max(order[1]), order[0].min(order[1]));
            for place in order {
                let source = if place == newest { home } else { elsewhere };
                pair.b.push(OUTSIDE, &from(&packets[place], source, 0));
            }
            assert_eq!(pair.b.departed().1.len(), 2, "{newest} {older}");
        }
        assert_eq!(pair.b.events(), []);
        assert_eq!(destination(&mut pair), (home, None));
        conserved(&pair.b);
    }
}

/// MOB-3: a dummy is authentic and newest, so it tells where the peer is, though it carries nothing.
#[test]
fn mob_3_a_dummy_moves_the_path() {
    let mut pair = Pair::new(Suites::Gcm128, following());
    let elsewhere = ip("203.0.113.7");
    let (_, to) = outer(false);
    for (n, inner) in [&[][..], &[1, 2, 3, 4, 5], &[0; 200]].into_iter().enumerate() {
        let plaintext = with_trailer(inner, Protocol::NONE, 4);
        let esp = seal(&Suites::Gcm128.suite(0x11), SPI_AB, n as u64 + 1, true, &plaintext);
        assert!(pair.open_b(&ip_packet(elsewhere, to, Protocol::ESP, 0, &esp)).is_empty());
    }
    dropped(&pair.b, DropReason::Dummy, 3);
    assert_eq!(pair.b.events(), [new_path(elsewhere, None)]);
    assert_eq!(destination(&mut pair), (elsewhere, None));
    let report = pair.b.publisher.sa(A_IN).unwrap();
    assert_eq!((report.counters.packets, report.counters.sequence), (0, 3));
}

/// MOB-2 is switched per SA.
#[test]
fn mob_2_switched_off() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let packet = from(&sealed(&mut pair), ip("203.0.113.7"), 0);
    assert_eq!(pair.open_b(&packet).len(), 1);
    assert_eq!((destination(&mut pair), pair.b.events()), ((outer(false).0, None), vec![]));
    // On for an installed SA.
    let mut operations = side(Suites::Gcm128, &following(), false);
    operations.retain(|operation| matches!(operation, Operation::InstallSa(config) if config.id == A_IN));
    sa(&mut operations, A_IN).generation = Generation(2);
    install(&mut pair.b, operations);
    let packet = from(&sealed(&mut pair), ip("203.0.113.7"), 0);
    assert_eq!(pair.open_b(&packet).len(), 1);
    assert_eq!(destination(&mut pair).0, ip("203.0.113.7"));
}

/// MOB-2: a change of encapsulation is the key exchange's to agree on (MOB-5), not a packet's.
#[test]
fn mob_2_encapsulation_does_not_follow() {
    let mut pair = Pair::new(Suites::Gcm128, following());
    let packet = sealed(&mut pair);
    let (_, to) = outer(false);
    let wrapped = ip_packet(ip("203.0.113.7"), to, Protocol::UDP, 0, &in_udp(77, 4500, &packet[20..]));
    assert_eq!(pair.open_b(&wrapped).len(), 1);
    assert_eq!((destination(&mut pair), pair.b.events()), ((outer(false).0, None), vec![]));
}

/// MOB-1, MOB-2: what was learnt stays through other changes of the SA, and ends when control gives another address.
#[test]
fn mob_2_control_moves_the_path() {
    let mut pair = Pair::new(Suites::Gcm128, following());
    let elsewhere = ip("203.0.113.7");
    let packet = from(&sealed(&mut pair), elsewhere, 0);
    assert_eq!(pair.open_b(&packet).len(), 1);
    let reconfigure = |pair: &mut Pair, generation, edit: &dyn Fn(&mut postern_contract::sa::SaConfig)| {
        let mut operations = side(Suites::Gcm128, &following(), false);
        operations.truncate(2);
        for id in [A_IN, A_OUT] {
            let config = sa(&mut operations, id);
            config.generation = Generation(generation);
            edit(config);
        }
        install(&mut pair.b, operations);
    };
    reconfigure(&mut pair, 2, &|config| config.path.mss_clamp = false);
    assert_eq!(destination(&mut pair).0, elsewhere);
    let third = ip("203.0.113.9");
    reconfigure(&mut pair, 3, &|config| config.remote = postern_contract::Translation::same(third));
    assert_eq!(destination(&mut pair).0, third);
    // The replay window went through all of it.
    assert!(pair.open_b(&packet).is_empty());
    dropped(&pair.b, DropReason::ReplayDuplicate, 1);
    // Unpaired: the inbound SA follows, but has nothing to move.
    let lone = Pair::with(Suites::Gcm128, following(), |operations, a| {
        if !a {
            sa(operations, A_OUT).pair = None;
        }
    });
    let mut pair = lone;
    let packet = from(&sealed(&mut pair), elsewhere, 0);
    assert_eq!(pair.open_b(&packet).len(), 1);
    assert_eq!(destination(&mut pair).0, outer(false).0);
}
