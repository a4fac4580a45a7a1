//! Bad networks: an IKE SA is established on both sides, or not, but never on one only.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use postern_ike::config::{Connection, LocalAuth, RemoteAuth, Settings};
use postern_ike::endpoint::{Endpoint, Target};
use postern_ike::negotiate::keyword;
use postern_ike::report::{CloseReason, Report};

use crate::sim::{Datagram, Link, Seeded, World};
use crate::sites::{CONNECTION, is_up, psk, road_warrior, settings, sites, users, world, world_with};

/// Runs `test` with one share of the seeds; of those only with SEED, if that is in the environment.
fn seeds(share: u64, of: u64, count: u64, test: impl Fn(u64) -> Result<(), String>) {
    let one = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    for seed in (0..count).filter(|seed| seed % of == share) {
        if one.is_none_or(|one| one == seed)
            && let Err(problem) = test(seed)
        {
            panic!("seed {seed}: {problem}");
        }
    }
}

/// Longer than anything takes: all retransmissions of an exchange, then DPD and its retransmissions.
const LONG: Duration = Duration::from_mins(20);

fn impaired(seed: u64) -> World {
    let mut world = world(seed, |_, _| ());
    world.link = Link::BAD;
    for node in &mut world.nodes {
        node.job_time = Duration::from_millis(300);
        node.install_time = Duration::from_millis(300);
    }
    world
}

/// IKE-1: with 20 % loss, reordering, duplication and some corruption, two sites of which one or both begin end up
/// with the same IKE SAs and children, or with nothing at all.
fn never_half(seed: u64) -> Result<bool, String> {
    let mut world = impaired(seed);
    world.initiate(0, CONNECTION);
    if seed.is_multiple_of(4) {
        let delay = world.random.up_to(Duration::from_secs(5));
        world.after(delay, |world| world.initiate(1, CONNECTION));
    }
    world.run(Duration::from_mins(3));
    // What is under way has to end: from here on the network is good.
    world.link = Link::GOOD;
    world.run(LONG);
    world.agree(0, 1)?;
    world.no_leak(0)?;
    world.no_leak(1)?;
    let up = is_up(&world);
    if !up {
        world.is_clean(0)?;
        world.is_clean(1)?;
        let says_why = |(_, report): &(_, Report)| {
            matches!(report, Report::Failed { .. } | Report::Closed { reason: CloseReason::Dead, .. })
        };
        if !world.nodes.iter().any(|node| node.reports.iter().any(says_why)) {
            return Err("nothing is up, and nobody says why".to_owned());
        }
    }
    Ok(up)
}

fn share_of_never_half(share: u64) {
    let up = std::cell::Cell::new(0_u64);
    seeds(share, 4, 10_000, |seed| {
        up.set(up.get() + u64::from(never_half(seed)?));
        Ok(())
    });
    // Most attempts succeed; some take longer than a half-open IKE SA is kept.
    assert!(std::env::var_os("SEED").is_some() || up.get() > 2_300, "{} of 2,500 are up", up.get());
}

#[test]
fn ike_1_never_half_first_quarter() {
    share_of_never_half(0);
}

#[test]
fn ike_1_never_half_second_quarter() {
    share_of_never_half(1);
}

#[test]
fn ike_1_never_half_third_quarter() {
    share_of_never_half(2);
}

#[test]
fn ike_1_never_half_fourth_quarter() {
    share_of_never_half(3);
}

/// The same seed leads to the same world.
#[test]
fn the_world_is_deterministic() {
    let history = |seed| {
        let mut world = impaired(seed);
        world.initiate(0, CONNECTION);
        world.run(LONG);
        let node = |node: usize| {
            let reports: Vec<String> =
                world.nodes[node].reports.iter().map(|report| format!("{report:?}")).collect();
            (world.nodes[node].transmitted, reports)
        };
        (node(0), node(1))
    };
    for seed in 0..20 {
        assert_eq!(history(seed), history(seed), "seed {seed}");
    }
}

/// IKE-1: everything that can be done to an established connection, by both sides at random times and over a bad
/// network: both believe the same in the end.
fn a_hard_life(seed: u64) -> Result<(), String> {
    let mut world = impaired(seed);
    world.initiate(0, CONNECTION);
    for _ in 0..8 {
        let delay = world.random.up_to(Duration::from_mins(3));
        let (node, what) = (usize::try_from(world.random.below(2)).unwrap(), world.random.below(10));
        world.after(delay, move |world| {
            let target = Target::Connection(CONNECTION.to_owned());
            let children = Target::Children(CONNECTION.to_owned(), "net".to_owned());
            // What is not up cannot be rekeyed or terminated; that is no error here.
            world.with(node, |endpoint: &mut Endpoint, now| match what {
                0..=3 => drop(endpoint.rekey(now, &children)),
                4..=6 => drop(endpoint.rekey(now, &target)),
                7 => drop(endpoint.terminate(now, &children)),
                8 => drop(endpoint.terminate(now, &target)),
                _ => drop(endpoint.initiate(now, CONNECTION, None)),
            });
        });
    }
    world.run(LONG);
    world.link = Link::GOOD;
    world.run(LONG);
    world.agree(0, 1)?;
    world.no_leak(0)?;
    world.no_leak(1)?;
    for node in 0..2 {
        let established = world.established(node).len();
        if established > 1 && sites().0.unique == postern_ike::config::Unique::Replace {
            return Err(format!("{established} IKE SAs with one peer"));
        }
        if world.nodes[node].endpoint.len() != established {
            return Err(format!("something is left over: {:?}", world.nodes[node].endpoint.len()));
        }
    }
    Ok(())
}

#[test]
fn ike_1_a_hard_life_even_seeds() {
    seeds(0, 2, 2_000, a_hard_life);
}

#[test]
fn ike_1_a_hard_life_odd_seeds() {
    seeds(1, 2, 2_000, a_hard_life);
}

/// The same of what takes more exchanges: passwords and assigned addresses behind a NAT; hybrid key exchange in fragments;
/// cookies with INVALID_KE_PAYLOAD; a datapath that refuses now and then.
fn never_half_otherwise(seed: u64) -> Result<(), String> {
    let small = Settings { fragment_size: 500, ..settings() };
    let cautious = Settings { cookie_threshold: 0, ..settings() };
    let both = |a: &mut Connection, b: &mut Connection, words: [&str; 2]| {
        a.proposals = vec![keyword::ike(words[0]).unwrap()];
        b.proposals = vec![keyword::ike(words[1]).unwrap()];
    };
    let mut world = match seed % 4 {
        0 => {
            let auth = LocalAuth::EapMschapv2 { user: "joe".to_owned(), password: psk("right") };
            let gateway = RemoteAuth::Psk(psk("a secret"));
            let (client, gateway, pool) = road_warrior((auth, gateway), users(&[("joe", "right")]));
            let mut world = impaired(seed);
            world.nat(0, "198.51.100.7".parse().unwrap());
            world.configure(0, vec![Arc::new(client)], &[]);
            world.configure(1, vec![Arc::new(gateway)], &[pool]);
            world
        }
        1 => {
            let hybrid = "aes256gcm16-prfsha384-x25519-ke1_mlkem768";
            world_with(seed, &small, |a, b| both(a, b, [hybrid, hybrid]))
        }
        2 => world_with(seed, &cautious, |a, b| {
            both(a, b, ["aes128-sha256-x25519-ecp256", "aes128-sha256-ecp256"]);
        }),
        _ => {
            let mut world = impaired(seed);
            for node in 0..2 {
                let mut random = Seeded::new(seed * 2 + u64::try_from(node).unwrap());
                let refuse = move |_: &_| if random.chance(30) { Err("no room".to_owned()) } else { Ok(()) };
                world.nodes[node].installer = Box::new(refuse);
            }
            world
        }
    };
    world.link = Link::BAD;
    world.initiate(0, CONNECTION);
    for minutes in 1..4 {
        let node = usize::try_from(world.random.below(2)).unwrap();
        let kind = world.random.below(2);
        world.after(Duration::from_mins(minutes), move |world| {
            let target = match kind {
                0 => Target::Connection(CONNECTION.to_owned()),
                _ => Target::Children(CONNECTION.to_owned(), "net".to_owned()),
            };
            // There may be nothing to rekey.
            drop(world.with(node, |endpoint, now| endpoint.rekey(now, &target)));
        });
    }
    world.run(Duration::from_mins(5));
    world.link = Link::GOOD;
    world.run(LONG);
    world.agree(0, 1)?;
    for node in 0..2 {
        world.no_leak(node)?;
        let established = world.established(node).len();
        if world.nodes[node].endpoint.len() != established || established > 1 {
            return Err(format!("{established} of {} are established", world.nodes[node].endpoint.len()));
        }
        if established == 0 {
            world.is_clean(node)?;
        }
    }
    let given = world.nodes[0].virtual_configuration.is_some();
    let wanted = seed.is_multiple_of(4) && !world.established(0).is_empty();
    if given == wanted { Ok(()) } else { Err(format!("addresses: {given}, wanted {wanted}")) }
}

#[test]
fn ike_1_never_half_otherwise() {
    seeds(0, 1, 1_000, never_half_otherwise);
}

/// Bytes overwritten, put in, taken out, and the header's length made right again.
fn mangled(random: &mut Seeded, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(4) {
        let at = usize::try_from(random.below(u64::try_from(bytes.len()).unwrap())).unwrap();
        let value = u8::try_from(random.below(256)).unwrap();
        match random.below(3) {
            0 => bytes[at] = value,
            1 => bytes.insert(at, value),
            _ if bytes.len() > 1 => drop(bytes.remove(at)),
            _ => {}
        }
    }
    let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
    if let Some(place) = bytes.get_mut(24..28) {
        place.copy_from_slice(&length);
    }
    bytes
}

/// IKE-1: somebody on the way adds mangled copies of everything, in time to be taken for the real thing. Nobody panics,
/// nothing is half, and what is protected comes up all the same.
#[test]
fn ike_1_mangled_copies() {
    seeds(0, 1, 1_000, |seed| {
        let mut world = world(seed, |a, b| {
            for connection in [a, b] {
                connection.proposals = vec![keyword::ike("aes128gcm16-prfsha256-x25519-ecp256").unwrap()];
            }
        });
        world.link.jitter = Duration::from_millis(20);
        let inbox: Rc<RefCell<Vec<Datagram>>> = Rc::default();
        let tape = Rc::clone(&inbox);
        // From the second message on: whoever mangles IKE_SA_INIT can prevent IKE.
        world.tap = Some(Box::new(move |random, _, datagram| {
            let first = datagram.bytes[18] == 34 && seed.is_multiple_of(2);
            for _ in 0..if first { 0 } else { 3 } {
                let bytes = mangled(random, &datagram.bytes);
                tape.borrow_mut().push(Datagram { bytes, ..datagram.clone() });
            }
            Some(datagram)
        }));
        world.initiate(0, CONNECTION);
        for step in 0..600 {
            if step % 50 == 49 {
                let target = Target::Children(CONNECTION.to_owned(), "net".to_owned());
                drop(world.with(step % 2, |endpoint, now| endpoint.rekey(now, &target)));
            }
            world.run(Duration::from_millis(10));
            let copies = std::mem::take(&mut *inbox.borrow_mut());
            for datagram in copies {
                world.inject(datagram);
            }
        }
        world.tap = None;
        world.run(LONG);
        world.agree(0, 1)?;
        let up = is_up(&world);
        if seed.is_multiple_of(2) && !up {
            return Err(format!("not up: {:?} {:?}", world.failures(0), world.failures(1)));
        }
        (0..2).try_for_each(|node| world.no_leak(node))
    });
}
