//! Rekeys of both kinds by either side, also by both at once (RFC 7296 section 2.8), while packets flow both ways.

use std::time::Duration;

use postern_ike::config::Connection;
use postern_ike::endpoint::Target;
use postern_ike::negotiate::keyword;

use crate::sim::World;
use crate::sites::{CONNECTION, connected, is_up};

fn ike() -> Target {
    Target::Connection(CONNECTION.to_owned())
}

fn children() -> Target {
    Target::Children(CONNECTION.to_owned(), "net".to_owned())
}

/// Seeds to try; one alone if SEED is in the environment.
fn seeds() -> impl Iterator<Item = u64> {
    let one = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    (0..300).filter(move |seed| one.is_none_or(|one| one == *seed))
}

/// A connection on a network that delivers everything, though not in order, with packets flowing.
fn flowing(seed: u64, change: impl FnOnce(&mut Connection, &mut Connection)) -> World {
    let mut world = connected(seed, change);
    world.link.jitter = Duration::from_millis(20);
    for node in &mut world.nodes {
        node.job_time = Duration::from_millis(30);
        node.install_time = Duration::from_millis(30);
    }
    for node in 0..2 {
        world.probe_regularly(node, Duration::from_millis(5), Duration::from_mins(1));
    }
    world
}

/// One child each, the same, and not a packet lost.
fn check(world: &mut World, seed: u64) {
    world.run(Duration::from_secs(70));
    for node in 0..2 {
        let probes = &world.nodes[node].probes;
        let few: Vec<&String> = probes.lost.iter().take(5).collect();
        assert!(few.is_empty() && probes.without_sa == 0, "seed {seed}, node {node}: {few:?}");
        assert_eq!(world.nodes[node].children.len(), 1, "seed {seed}");
        assert_eq!(world.nodes[node].endpoint.len(), 1, "seed {seed}");
        world.no_leak(node).unwrap();
    }
    assert!(is_up(world), "seed {seed}");
    world.agree(0, 1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
}

fn spis(world: &World) -> Vec<u32> {
    world.nodes[0].children.values().map(|child| child.sa.spi_in).collect()
}

fn pfs(a: &mut Connection, b: &mut Connection) {
    for connection in [a, b] {
        connection.children[0].proposals = vec![keyword::esp("aes128gcm16-x25519").unwrap()];
    }
}

/// IKE-1: a CHILD_SA is rekeyed by either side, without and with a key exchange of its own.
#[test]
fn ike_1_child_rekey_by_either_side() {
    for (seed, node) in [(1, 0), (2, 1)] {
        for change in [|_: &mut Connection, _: &mut Connection| (), pfs] {
            let mut world = flowing(seed, change);
            let before = spis(&world);
            assert_eq!(world.with(node, |endpoint, now| endpoint.rekey(now, &children())), Ok(1));
            check(&mut world, seed);
            assert_ne!(spis(&world), before);
        }
    }
}

/// IKE-1: the IKE SA is rekeyed by either side; its children stay as they are.
#[test]
fn ike_1_ike_rekey_by_either_side() {
    for (seed, node) in [(1, 0), (2, 1)] {
        let mut world = flowing(seed, |_, _| ());
        let (before, children) = (world.established(0)[0].spis, spis(&world));
        assert_eq!(world.with(node, |endpoint, now| endpoint.rekey(now, &ike())), Ok(1));
        check(&mut world, seed);
        assert_ne!(world.established(0)[0].spis, before);
        assert_eq!(spis(&world), children);
        // And it can be done again, by the other one.
        let before = world.established(0)[0].spis;
        assert_eq!(world.with(1 - node, |endpoint, now| endpoint.rekey(now, &ike())), Ok(1));
        check(&mut world, seed);
        assert_ne!(world.established(0)[0].spis, before);
    }
}

/// RFC 7296 section 2.8.1: of two CHILD_SAs from simultaneous rekeys, that with the lowest nonce goes.
#[test]
fn ike_1_simultaneous_child_rekeys() {
    for seed in seeds() {
        let change = if seed % 2 == 0 { |_: &mut Connection, _: &mut Connection| () } else { pfs };
        let mut world = flowing(seed, change);
        let before = spis(&world);
        both_at_once(&mut world, children(), children());
        check(&mut world, seed);
        assert_ne!(spis(&world), before, "seed {seed}");
    }
}

/// RFC 7296 section 2.8.2: the same of IKE SAs.
#[test]
fn ike_1_simultaneous_ike_rekeys() {
    for seed in seeds() {
        let mut world = flowing(seed, |_, _| ());
        let before = world.established(0)[0].spis;
        both_at_once(&mut world, ike(), ike());
        check(&mut world, seed);
        assert_ne!(world.established(0)[0].spis, before, "seed {seed}");
    }
}

/// RFC 7296 section 2.25: one rekeys the child while the other rekeys the IKE SA.
#[test]
fn ike_1_child_and_ike_rekey_at_once() {
    for seed in seeds() {
        let mut world = flowing(seed, |_, _| ());
        let (before, old) = (world.established(0)[0].spis, spis(&world));
        both_at_once(&mut world, children(), ike());
        check(&mut world, seed);
        assert_ne!(world.established(0)[0].spis, before, "seed {seed}");
        assert_ne!(spis(&world), old, "seed {seed}");
    }
}

/// RFC 7296 section 2.25.1: a child is deleted by one side while it is rekeyed by the other. Whatever comes of it, both
/// sides have the same.
#[test]
fn ike_1_delete_and_rekey_at_once() {
    for seed in seeds() {
        let mut world = connected(seed, |_, _| ());
        world.link.jitter = Duration::from_millis(20);
        let delay = world.random.up_to(Duration::from_millis(60));
        world.after(delay, |world| {
            drop(world.with(0, |endpoint, now| endpoint.rekey(now, &children())));
        });
        let delay = world.random.up_to(Duration::from_millis(60));
        world.after(delay, |world| {
            drop(world.with(1, |endpoint, now| endpoint.terminate(now, &children())));
        });
        world.run(Duration::from_mins(1));
        world.agree(0, 1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        for node in 0..2 {
            world.no_leak(node).unwrap();
            assert_eq!(world.established(node).len(), 1);
        }
    }
}

/// Within a span in which they meet under way in every manner.
fn both_at_once(world: &mut World, first: Target, second: Target) {
    for (node, target) in [(0, first), (1, second)] {
        let delay = world.random.up_to(Duration::from_millis(80));
        world.after(delay, move |world| {
            // A second rekey of what has just been replaced is refused, which is as good.
            drop(world.with(node, |endpoint, now| endpoint.rekey(now, &target)));
        });
    }
}

/// IKE-1: ahead of the limits, with jitter, for hours, and no packet is lost on the way.
#[test]
fn ike_1_rekeys_come_by_themselves() {
    let mut world = connected(3, |a, b| {
        for connection in [a, b] {
            connection.rekey = Some(Duration::from_mins(20));
            connection.rekey_jitter = Duration::from_mins(5);
            connection.children[0].rekey = Some(Duration::from_mins(10));
            connection.children[0].rekey_jitter = Duration::from_mins(2);
            connection.children[0].life = Some(Duration::from_mins(11));
        }
    });
    let hours = Duration::from_hours(4);
    for node in 0..2 {
        world.probe_regularly(node, Duration::from_millis(250), hours);
    }
    world.run(hours);
    for node in 0..2 {
        let probes = &world.nodes[node].probes;
        assert!(probes.lost.is_empty() && probes.without_sa == 0, "{probes:?}");
        assert!(probes.arrived > 50_000);
        world.no_leak(node).unwrap();
    }
    let counters = world.nodes[0].endpoint.counters();
    assert!((12..=20).contains(&counters.ike_rekeyed), "{counters:?}");
    assert!((24..=40).contains(&counters.children_rekeyed), "{counters:?}");
    world.run(Duration::from_secs(10));
    world.agree(0, 1).unwrap();
}
