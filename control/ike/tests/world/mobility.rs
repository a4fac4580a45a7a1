//! NATs, changed ports, changed addresses (RFC 7296 section 2.23, RFC 3948, RFC 4555).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use postern_ike::config::{LocalAuth, RemoteAuth};

use crate::sim::{Link, Probes, World};
use crate::sites::{B, CONNECTION, is_up, psk, road_warrior, world};

const PUBLIC: [u8; 4] = [198, 51, 100, 7];

fn address(octets: [u8; 4]) -> IpAddr {
    octets.into()
}

/// A client and its gateway, connected; the client behind a NAT or not.
fn roaming(seed: u64, nat: bool) -> World {
    let auth = || (LocalAuth::Psk(psk("a secret")), RemoteAuth::Psk(psk("a secret")));
    let (client, gateway, pool) = road_warrior(auth(), auth().1);
    let mut world = world(seed, |_, _| ());
    if nat {
        world.nat(0, address(PUBLIC));
    }
    world.configure(0, vec![Arc::new(client)], &[]);
    world.configure(1, vec![Arc::new(gateway)], &[pool]);
    world.initiate(0, CONNECTION);
    assert!(
        world.run_until(Duration::from_secs(10), is_up),
        "{:?} {:?}",
        world.failures(0),
        world.failures(1)
    );
    world
}

/// Packets flow both ways from now on.
fn flows(world: &mut World) {
    for node in [0, 1] {
        world.nodes[node].probes = Probes::default();
        world.probe(node);
        world.run(Duration::from_secs(1));
        let probes = &world.nodes[node].probes;
        assert_eq!((probes.sent, probes.arrived), (1, 1), "node {node}: {probes:?}");
    }
}

fn encap(world: &World) -> Vec<Option<(u16, u16)>> {
    world.nodes.iter().flat_map(|node| node.children.values().map(|child| child.sa.encap)).collect()
}

/// NAT detection, port 4500, encapsulation on both sides, keepalives of the side behind the NAT only.
#[test]
fn ike_1_behind_a_nat() {
    let mut world = roaming(1, true);
    assert!(world.established(0)[0].path.natt && world.established(1)[0].path.natt);
    assert_eq!(encap(&world)[0], Some((4500, 4500)));
    assert!(encap(&world)[1].is_some_and(|(local, remote)| local == 4500 && remote > 20_000));
    flows(&mut world);
    let before = (world.nodes[0].keepalives, world.nodes[1].keepalives);
    world.run(Duration::from_mins(5));
    assert!(world.nodes[0].keepalives > before.0 + 5);
    assert_eq!(world.nodes[1].keepalives, 0);
    assert!(is_up(&world));
}

#[test]
fn ike_1_no_nat_no_encapsulation() {
    let mut world = roaming(1, false);
    assert_eq!(encap(&world), [None, None]);
    flows(&mut world);
    world.run(Duration::from_mins(5));
    assert_eq!(world.nodes[0].keepalives, 0);
}

/// MOB-2: the NAT has forgotten its mapping: an authenticated packet of the client tells the gateway the new port.
#[test]
fn mob_2_the_nat_changes_the_port() {
    let mut world = roaming(1, true);
    let before = world.established(1)[0].path;
    world.reboot_nat(0);
    // Client first: nothing can reach it before it has sent something.
    flows(&mut world);
    let after = world.established(1)[0].path;
    assert_ne!(before.remote.port(), after.remote.port());
    assert_eq!(encap(&world)[1].map(|(_, port)| port), Some(after.remote.port()));
    world.run(Duration::from_mins(5));
    assert!(is_up(&world));
    flows(&mut world);
}

/// MOB-2: the same with nothing but IKE messages on the way: DPD or a keepalive opens the NAT again.
#[test]
fn mob_2_the_nat_changes_the_port_while_idle() {
    let mut world = roaming(1, true);
    world.reboot_nat(0);
    world.run(Duration::from_mins(5));
    assert!(is_up(&world), "{:?}", world.nodes[1].reports);
    flows(&mut world);
}

/// MOB-7: RFC 4555. The client is at another address: same IKE SA, same children, same inner address; NAT or not, before
/// and after.
#[test]
fn mob_7_the_client_moves() {
    for (before, after) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut world = roaming(1, before);
        let spis = world.established(0)[0].spis;
        let given = world.nodes[0].virtual_configuration.clone();
        world.nodes[0].behind = None;
        let (inner, public) = (address([203, 0, 113, 9]), address([198, 51, 100, 99]));
        if after {
            world.nat(0, public);
        }
        world.readdress(0, &[inner]);
        world.run(Duration::from_secs(10));
        assert!(is_up(&world), "{before} {after}: {:?}", world.nodes[0].reports);
        assert_eq!(world.established(0)[0].spis, spis);
        assert_eq!(world.nodes[0].virtual_configuration, given);
        assert_eq!(world.established(1)[0].path.remote.ip(), if after { public } else { inner });
        assert_eq!(encap(&world).iter().map(Option::is_some).collect::<Vec<_>>(), [after, after]);
        flows(&mut world);
        world.run(Duration::from_mins(5));
        assert!(is_up(&world));
    }
}

/// MOB-7: moving again and again over a bad network, also while rekeying: it is up in the end, or both know that it is not.
#[test]
fn mob_7_moving_over_a_bad_network() {
    let one = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    for seed in (0..200).filter(|seed| one.is_none_or(|one| one == *seed)) {
        let mut world = roaming(seed, seed % 2 == 0);
        world.link = Link::BAD;
        for step in 0..5_u8 {
            let delay =
                Duration::from_secs(20) * u32::from(step) + world.random.up_to(Duration::from_secs(20));
            let (nat, rekey) = (world.random.chance(50), world.random.below(3));
            world.after(delay, move |world| {
                world.nodes[0].behind = None;
                if nat {
                    world.nat(0, address([198, 51, 100, 100 + step]));
                }
                let target = postern_ike::endpoint::Target::Connection(CONNECTION.to_owned());
                let node = usize::try_from(rekey).unwrap();
                if node < 2 {
                    drop(world.with(node, |endpoint, now| endpoint.rekey(now, &target)));
                }
                world.readdress(0, &[address([203, 0, 113, 9 + step])]);
            });
        }
        world.run(Duration::from_mins(20));
        world.link = Link::GOOD;
        world.run(Duration::from_mins(20));
        world.agree(0, 1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        if world.established(0).is_empty() {
            world.is_clean(0).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
            world.is_clean(1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        } else {
            flows(&mut world);
            assert!(world.established(1)[0].path.local.ip() == B);
        }
    }
}
