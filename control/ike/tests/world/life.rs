//! What a connection can be: suites, fragments, modes, addresses, several children, reloads.

use std::sync::Arc;
use std::time::Duration;

use postern_ike::config::{LocalAuth, Mode, RemoteAuth, Selector, Settings};
use postern_ike::endpoint::Target;
use postern_ike::message::registry::{IntegId, ProtocolId};
use postern_ike::negotiate::keyword;
use postern_ike::report::{CloseReason, Report};

use crate::sim::World;
use crate::sites::{
    CONNECTION, child, connected, is_up, network, psk, road_warrior, settings, sites, users, world,
    world_with,
};

/// Packets flow both ways.
fn flows(world: &mut World) {
    for node in 0..2 {
        world.nodes[node].probes = crate::sim::Probes::default();
        world.probe(node);
    }
    world.run(Duration::from_secs(1));
    for node in 0..2 {
        let probes = &world.nodes[node].probes;
        assert_eq!((probes.sent, probes.arrived), (1, 1), "node {node}: {probes:?}");
    }
    world.agree(0, 1).unwrap();
}

/// IKE-4: suites and key exchanges, additional ones in IKE_INTERMEDIATE among them.
#[test]
fn ike_4_suites() {
    for (words, suite) in [
        ("aes256gcm16-prfsha384-ecp384", "AES_GCM_16_256/PRF_HMAC_SHA2_384/ECP_384"),
        ("chacha20poly1305-prfsha512-ecp256", "CHACHA20_POLY1305/PRF_HMAC_SHA2_512/ECP_256"),
        ("aes256-sha384-modp2048", "AES_CBC_256/HMAC_SHA2_384_192/PRF_HMAC_SHA2_384/MODP_2048"),
        (
            "aes256gcm16-prfsha384-x25519-ke1_mlkem768",
            "AES_GCM_16_256/PRF_HMAC_SHA2_384/CURVE_25519/KE1_ML_KEM_768",
        ),
    ] {
        let mut world = connected(1, |a, b| {
            for connection in [a, b] {
                connection.proposals = vec![keyword::ike(words).unwrap()];
            }
        });
        assert_eq!(world.established(0)[0].suite, suite);
        flows(&mut world);
        for node in 0..2 {
            let target = Target::Connection(CONNECTION.to_owned());
            world.with(node, |endpoint, now| endpoint.rekey(now, &target)).unwrap();
            world.run(Duration::from_secs(10));
            assert_eq!(world.established(0)[0].suite, suite);
            assert_eq!(world.nodes[0].endpoint.counters().ike_rekeyed, u64::try_from(node).unwrap() + 1);
            flows(&mut world);
        }
    }
}

/// IKE-1: RFC 7383. Small packets all the way, then on a bad network.
#[test]
fn ike_1_fragmentation() {
    let settings = Settings { fragment_size: 400, ..settings() };
    for seed in 0..50 {
        let mut world = world_with(seed, &settings, |a, b| {
            for connection in [a, b] {
                connection.children[0].proposals = keyword::default_esp();
                connection.proposals = vec![keyword::ike("aes256-sha256-x25519-ke1_mlkem768").unwrap()];
            }
        });
        if seed > 0 {
            world.link = crate::sim::Link::BAD;
        }
        world.tap = Some(Box::new(|_, _, datagram| {
            let first = datagram.bytes[18] == 34;
            assert!(first || datagram.bytes.len() <= 400 - 20 - 8, "{} bytes", datagram.bytes.len());
            Some(datagram)
        }));
        world.initiate(0, CONNECTION);
        world.run(Duration::from_mins(10));
        world.link = crate::sim::Link::GOOD;
        world.run(Duration::from_mins(10));
        world.agree(0, 1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        if seed == 0 {
            assert!(is_up(&world), "{:?}", world.failures(0));
            flows(&mut world);
        }
    }
}

#[test]
fn ike_1_child_protocols_and_modes() {
    let mut ah = connected(1, |a, b| {
        for connection in [a, b] {
            connection.children[0].proposals = vec![keyword::ah("sha256").unwrap()];
        }
    });
    let sa = &ah.nodes[1].children.values().next().unwrap().sa;
    assert_eq!((sa.protocol, sa.integ), (ProtocolId::AH, IntegId::HMAC_SHA2_256_128));
    flows(&mut ah);
    let mut esn = connected(1, |a, b| {
        a.children[0].proposals = vec![keyword::esp("aes128-sha256-esn-noesn").unwrap()];
        b.children[0].proposals = vec![keyword::esp("aes128-sha256-esn").unwrap()];
    });
    assert!(esn.nodes[0].children.values().all(|child| child.sa.esn));
    flows(&mut esn);
    for (wanted, expected) in [(Mode::Transport, Mode::Transport), (Mode::Tunnel, Mode::Tunnel)] {
        let mut world = connected(1, |a, b| {
            a.children[0].mode = Mode::Transport;
            b.children[0].mode = wanted;
            for connection in [a, b] {
                let any = Selector::Dynamic { protocol: 17, ports: 0..=u16::MAX };
                connection.children[0].local_ts = vec![any.clone()];
                connection.children[0].remote_ts = vec![any];
            }
        });
        assert!(world.nodes.iter().all(|node| node.children.values().all(|child| child.sa.mode == expected)));
        flows(&mut world);
    }
}

/// RFC 7296 section 2.9: each side has what both want.
#[test]
fn ike_1_narrowing() {
    let mut world = connected(1, |a, b| {
        a.children[0].local_ts = vec![Selector::Fixed(network("10.0.0.0/8"))];
        a.children[0].remote_ts = vec![Selector::Fixed(network("0.0.0.0/0"))];
        b.children[0].remote_ts = vec![Selector::Fixed(network("10.1.0.0/16"))];
    });
    let sa = &world.nodes[0].children.values().next().unwrap().sa;
    assert_eq!(sa.local_ts, [network("10.1.0.0/16")]);
    assert_eq!(sa.remote_ts, [network("10.2.0.0/24")]);
    flows(&mut world);
}

/// RFC 6023, and a second child in the same IKE SA.
#[test]
fn ike_1_childless_and_several_children() {
    let mut world = world(1, |a, b| {
        a.childless = true;
        for (connection, [local, remote]) in
            [(a, ["10.1.0.0/24", "10.9.0.0/24"]), (b, ["10.9.0.0/24", "10.1.0.0/24"])]
        {
            let mut second = child("second");
            second.local_ts = vec![Selector::Fixed(network(local))];
            second.remote_ts = vec![Selector::Fixed(network(remote))];
            connection.children.push(second);
        }
    });
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(10), |world| {
        is_up(world) && world.nodes.iter().all(|node| node.children.len() == 2)
    }));
    flows(&mut world);
    let second = Target::Children(CONNECTION.to_owned(), "second".to_owned());
    assert_eq!(world.with(1, |endpoint, now| endpoint.terminate(now, &second)), Ok(1));
    world.run(Duration::from_secs(10));
    assert!(is_up(&world) && world.nodes.iter().all(|node| node.children.len() == 1));
    flows(&mut world);
}

/// IKE-3, MOB-6: a client with a password, behind a NAT, is given an address, and the same one when it comes again.
#[test]
fn ike_3_eap_road_warrior() {
    let auth = LocalAuth::EapMschapv2 { user: "joe".to_owned(), password: psk("right") };
    let (client, gateway, pool) =
        road_warrior((auth, RemoteAuth::Psk(psk("a secret"))), users(&[("joe", "right"), ("ann", "x")]));
    let mut world = world(1, |_, _| ());
    world.nat(0, "198.51.100.7".parse().unwrap());
    world.configure(0, vec![Arc::new(client)], &[]);
    world.configure(1, vec![Arc::new(gateway)], &[pool]);
    let mut addresses = Vec::new();
    for _ in 0..2 {
        world.initiate(0, CONNECTION);
        assert!(
            world.run_until(Duration::from_secs(10), is_up),
            "{:?} {:?}",
            world.failures(0),
            world.failures(1)
        );
        flows(&mut world);
        let given = world.nodes[0].virtual_configuration.clone().unwrap();
        assert_eq!(given.dns, ["10.2.0.53".parse::<std::net::IpAddr>().unwrap()]);
        addresses.extend(given.addresses);
        let sa = &world.nodes[1].children.values().next().unwrap().sa;
        assert_eq!(sa.leases, [addresses[0]]);
        assert_eq!(sa.remote_ts, [network(&format!("{}/32", addresses[0]))]);
        let target = Target::Connection(CONNECTION.to_owned());
        world.with(0, |endpoint, now| endpoint.terminate(now, &target)).unwrap();
        world.run(Duration::from_secs(10));
        world.is_clean(0).unwrap();
        world.is_clean(1).unwrap();
        assert_eq!(world.nodes[0].virtual_configuration, None);
    }
    assert_eq!(addresses.len(), 2);
    assert_eq!(addresses[0], addresses[1]);
}

/// OPS-2: a reload that changes nothing touches nothing; one that changes a connection closes what belongs to it.
#[test]
fn ops_2_reload() {
    let mut world = connected(1, |_, _| ());
    let before = world.established(0)[0].spis;
    let (same, mut other) = sites();
    world.configure(0, vec![Arc::new(same)], &[]);
    world.run(Duration::from_secs(10));
    assert_eq!(world.established(0)[0].spis, before);
    flows(&mut world);
    other.fingerprint = [1; 32];
    world.configure(1, vec![Arc::new(other)], &[]);
    world.run(Duration::from_secs(10));
    world.is_clean(0).unwrap();
    world.is_clean(1).unwrap();
    let closed = |(_, report): &(_, Report)| {
        matches!(report, Report::Closed { reason: CloseReason::Reconfigured, .. })
    };
    assert!(world.nodes[1].reports.iter().any(closed), "{:?}", world.nodes[1].reports);
}

/// Limits that the datapath tells of: a soft one replaces the child, a hard one too, or ends it.
#[test]
fn ike_1_limits_of_the_datapath() {
    let mut world = connected(1, |_, _| ());
    let child = |world: &World| *world.nodes[0].children.keys().next().unwrap();
    let first = child(&world);
    world.with(0, |endpoint, now| endpoint.soft_limit(now, first));
    world.run(Duration::from_secs(30));
    assert_ne!(child(&world), first);
    flows(&mut world);
    let second = child(&world);
    world.with(0, |endpoint, now| endpoint.hard_limit(now, second));
    world.run(Duration::from_secs(30));
    assert!(!world.nodes[0].children.contains_key(&second));
    world.agree(0, 1).unwrap();
    world.no_leak(0).unwrap();
    world.no_leak(1).unwrap();
}
