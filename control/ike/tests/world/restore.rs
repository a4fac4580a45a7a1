//! Resets after which everything goes on (strategy `restore`): traffic, without a negotiation first, and peers that notice
//! nothing (RST-1, RST-2, RST-9).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postern_ike::config::{Connection, LocalAuth, RemoteAuth, Strategy};
use postern_ike::endpoint::Target;
use postern_ike::message::parse::{self, Body};
use postern_ike::negotiate::keyword;
use postern_ike::output::Origin;
use postern_ike::record::{SavedBody, SavedIke};
use postern_ike::report::{CloseReason, Report};

use crate::sim::World;
use crate::sites::{CONNECTION, connected, is_up, psk, road_warrior, settings, sites};

/// The node that is reset.
const RESET: usize = 0;

/// The other one.
const PEER: usize = 1;

const GCM: &str = "aes128gcm16-prfsha256-x25519";
const CBC: &str = "aes256-sha512-x25519";

/// The reset node's connection, made the same way each time.
fn near(suite: &str, edit: fn(&mut Connection)) -> Connection {
    let (mut near, _) = sites();
    near.reset = Strategy::Restore;
    near.proposals = vec![keyword::ike(suite).unwrap()];
    edit(&mut near);
    near
}

/// Two sites, connected by `from`.
fn pair(seed: u64, from: usize, suite: &'static str, edit: fn(&mut Connection)) -> World {
    let mut world = World::new(seed);
    watch_ivs(&mut world);
    let (_, mut far) = sites();
    far.proposals = vec![keyword::ike(suite).unwrap()];
    far.dpd = None;
    edit(&mut far);
    world.node("reset", &[crate::sites::A], settings());
    world.node("peer", &[crate::sites::B], settings());
    world.configure(RESET, vec![Arc::new(near(suite, edit))], &[]);
    world.configure(PEER, vec![Arc::new(far)], &[]);
    world.initiate(from, CONNECTION);
    assert!(world.run_until(Duration::from_secs(20), is_up), "{:?}", world.failures(from));
    world.run(Duration::from_millis(100));
    world
}

fn reset(world: &mut World, suite: &str, edit: fn(&mut Connection)) {
    world.resume(RESET, settings(), vec![Arc::new(near(suite, edit))], &[]);
    // Until the children are installed.
    world.run(Duration::from_micros(1));
}

/// No IV is used twice with different content, in all lives.
fn watch_ivs(world: &mut World) {
    let seen: Arc<Mutex<HashMap<Vec<u8>, Vec<u8>>>> = Arc::default();
    world.tap = Some(Box::new(move |_, _, datagram| {
        if let Ok(parsed) = parse::message(&datagram.bytes)
            && let Body::Encrypted { sealed, .. } | Body::Fragment { sealed, .. } = parsed.body
        {
            let side = [u8::from(parsed.head.from_initiator)];
            let key = [&datagram.bytes[..16], &side, &sealed[..8]].concat();
            let mut seen = seen.lock().unwrap();
            let before = seen.entry(key).or_insert_with(|| datagram.bytes.clone());
            assert_eq!(*before, datagram.bytes, "an IV with two messages");
        }
        Some(datagram)
    }));
}

/// So many, or the one in the environment.
fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let one = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    (0..count).filter(move |seed| one.is_none_or(|one| one == *seed))
}

/// IKE SAs that ended at a node, but for those that a rekey replaced.
fn ended(world: &World, node: usize) -> usize {
    let ended = |report: &&(Duration, Report)| matches!(&report.1, Report::Closed { reason, .. } if *reason != CloseReason::Replaced);
    world.nodes[node].reports.iter().filter(ended).count()
}

fn restored(world: &World) -> usize {
    let reports = world.nodes[RESET].reports.iter();
    reports.filter(|(_, report)| matches!(report, Report::Restored { .. })).count()
}

/// IKE SPIs and SPIs of the children.
fn names(world: &World, node: usize) -> (Vec<(u64, u64)>, Vec<u32>) {
    let ike = world.established(node).iter().map(|view| (view.spis.0.0, view.spis.1.0)).collect();
    let mut children: Vec<u32> = world.nodes[node].children.values().map(|child| child.sa.spi_in).collect();
    children.sort_unstable();
    (ike, children)
}

/// RST-2: the alternative that saves everything: traffic goes on at once, in both directions and under the same keys; then
/// everything gets new ones. The peer sees neither a Delete nor a negotiation from the start.
#[test]
fn rst_2_restored_and_rekeyed() {
    for (from, suite) in [(RESET, GCM), (PEER, GCM), (RESET, CBC), (PEER, CBC)] {
        let mut world = pair(1, from, suite, |_| {});
        let before = names(&world, PEER);
        let told = world.nodes[PEER].reports.len();
        reset(&mut world, suite, |_| {});
        assert_eq!(names(&world, PEER), before);
        world.agree(RESET, PEER).unwrap();
        assert!(world.nodes[RESET].children.values().all(|child| child.sa.origin == Origin::Restored));
        for node in [RESET, PEER] {
            world.nodes[node].probes = crate::sim::Probes::default();
            world.probe_regularly(node, Duration::from_millis(5), Duration::from_secs(10));
        }
        assert_eq!((restored(&world), world.established(RESET).len()), (1, 1));
        world.run(Duration::from_mins(2));
        for node in [RESET, PEER] {
            let probes = &world.nodes[node].probes;
            assert!(probes.without_sa == 0 && probes.lost.is_empty() && probes.arrived > 1000, "{probes:?}");
            assert_eq!(ended(&world, node), 0);
        }
        world.agree(RESET, PEER).unwrap();
        world.no_leak(RESET).unwrap();
        let after = names(&world, PEER);
        assert!(after.0.len() == 1 && after.1.len() == 1 && after.0 != before.0 && after.1 != before.1);
        let events = &world.nodes[PEER].reports[told..];
        assert!(!events.iter().any(|(_, report)| matches!(report, Report::Established { .. })), "{events:?}");
        assert_eq!(world.nodes[RESET].store.len(), 1);
    }
}

/// RST-9: whatever is under way when the power fails, by either side, and whether it arrives or not: nothing is used twice
/// with other content, and in the end both sides believe the same. Mostly it goes on; in the middle of a key exchange of
/// the reset side the peer is told instead.
#[test]
fn rst_9_in_the_middle_of_anything() {
    let (mut went_on, mut told) = (0, 0);
    for seed in seeds(240) {
        let edit: fn(&mut Connection) = if seed % 3 == 0 {
            |connection| {
                connection.dpd = Some(Duration::from_mins(1));
                connection.children[0].proposals = vec![keyword::esp("aes128gcm16-x25519").unwrap()];
            }
        } else {
            // What the peer alone knows of, because it was the last to speak of new keys, it has to find out by itself.
            |connection| connection.dpd = Some(Duration::from_mins(1))
        };
        let mut world = pair(seed, usize::from(seed % 2 == 0), GCM, edit);
        world.link.jitter = Duration::from_millis(5);
        let who = usize::from(seed / 2 % 2 == 0);
        let connection = Target::Connection(CONNECTION.to_owned());
        let children = Target::Children(CONNECTION.to_owned(), "net".to_owned());
        world.with(who, |endpoint, now| match seed / 4 % 3 {
            0 => endpoint.rekey(now, &children).unwrap(),
            1 => endpoint.rekey(now, &connection).unwrap(),
            _ => endpoint.terminate(now, &children).unwrap(),
        });
        if seed % 5 == 0 {
            world.link.loss = 100;
        }
        let moment = world.random.up_to(Duration::from_millis(90));
        world.run(moment);
        world.link.loss = 0;
        reset(&mut world, GCM, edit);
        let goes_on = restored(&world) > 0;
        world.run(Duration::from_mins(20));
        if goes_on {
            went_on += 1;
        } else {
            told += 1;
        }
        world.agree(RESET, PEER).unwrap_or_else(|problem| panic!("seed {seed}, {moment:?}: {problem}"));
        world.no_leak(RESET).unwrap();
        assert_eq!(world.nodes[RESET].store.len(), world.established(RESET).len(), "seed {seed}");
        // However it ended, it can be begun again.
        if !is_up(&world) {
            world.initiate(who, CONNECTION);
            assert!(world.run_until(Duration::from_mins(1), is_up), "seed {seed}: {:?}", world.failures(who));
        }
    }
    println!("{went_on} went on, {told} peers were told");
    let all = std::env::var_os("SEED").is_none();
    assert!(!all || (went_on > 100 && told > 10), "{went_on} went on, {told} were told");
}

/// RST-9: an answer of the reset side that was lost with the power is repeated in the same words, and so is a request.
#[test]
fn rst_9_lost_answers_and_requests() {
    for (from_reset, answered) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut world = pair(3, RESET, GCM, |_| {});
        let before = names(&world, PEER);
        let target = Target::Children(CONNECTION.to_owned(), "net".to_owned());
        let who = if from_reset { RESET } else { PEER };
        if !answered {
            // The request is lost, not the answer.
            world.link.loss = 100;
        }
        world.with(who, |endpoint, now| endpoint.terminate(now, &target)).unwrap();
        world.link.loss = 0;
        if answered {
            // The request arrives; its answer leaves, and is lost.
            world.run(Duration::from_millis(9));
            world.link.loss = 100;
            world.run(Duration::from_millis(2));
            world.link.loss = 0;
        }
        reset(&mut world, GCM, |_| {});
        assert_eq!(restored(&world), 1);
        world.run(Duration::from_mins(1));
        for node in [RESET, PEER] {
            assert_eq!(ended(&world, node), 0, "{from_reset} {answered}");
            assert!(world.nodes[node].children.is_empty(), "{from_reset} {answered}");
        }
        world.agree(RESET, PEER).unwrap();
        assert_ne!(names(&world, PEER).0, before.0, "the IKE SA has new keys");
    }
}

/// RST-9: one reset after another, at any moment: it goes on, or the peer is told; never an IV twice with other content.
#[test]
fn rst_9_resets_again_and_again() {
    for seed in seeds(20) {
        let edit: fn(&mut Connection) = |connection| {
            connection.dpd = Some(Duration::from_secs(3));
            connection.children[0].rekey = Some(Duration::from_secs(20));
        };
        let mut world = pair(seed, usize::from(seed % 2 == 0), GCM, edit);
        for _ in 0..12 {
            reset(&mut world, GCM, edit);
            let moment = world.random.up_to(Duration::from_secs(8));
            world.run(moment);
            if world.established(PEER).is_empty() {
                world.initiate(PEER, CONNECTION);
                world.run(Duration::from_secs(5));
            }
        }
        world.run(Duration::from_mins(10));
        // They are rekeyed all the time.
        let settled =
            |world: &World| is_up(world) && world.agree(RESET, PEER).is_ok() && world.no_leak(RESET).is_ok();
        assert!(
            world.run_until(Duration::from_mins(1), settled),
            "seed {seed}: {:?}, {:?}",
            world.agree(RESET, PEER),
            world.no_leak(RESET)
        );
    }
}

/// RST-5: what cannot go on is told: the connection is another one now, or gone, or what is saved has expired.
#[test]
fn rst_5_told_if_it_cannot_go_on() {
    type Edit = fn(&mut Connection);
    let cases: [(Edit, bool); 4] = [
        (|_| {}, true),
        (|connection| connection.fingerprint = [1; 32], false),
        (|connection| connection.name = "another".into(), false),
        (|connection| connection.reset = Strategy::Delete, false),
    ];
    for (number, (change, goes_on)) in cases.into_iter().enumerate() {
        let mut world = pair(4, PEER, GCM, |_| {});
        let mut connection = near(GCM, |_| {});
        change(&mut connection);
        world.resume(RESET, settings(), vec![Arc::new(connection)], &[]);
        world.run(Duration::from_secs(30));
        assert_eq!((restored(&world) == 1, ended(&world, PEER) == 0), (goes_on, goes_on), "case {number}");
        assert_eq!(world.nodes[RESET].store.len(), usize::from(goes_on));
        let told = world.nodes[RESET].recovery.as_ref().unwrap().progress().told;
        assert_eq!(told, u64::from(!goes_on), "case {number}");
    }
    let edit: fn(&mut Connection) = |connection| connection.rekey = Some(Duration::from_mins(10));
    let mut world = pair(5, RESET, GCM, edit);
    let store = world.nodes[RESET].store.clone();
    world.restart(RESET, settings());
    world.run(Duration::from_mins(21));
    world.nodes[RESET].store = store;
    reset(&mut world, GCM, edit);
    assert_eq!(restored(&world), 0);
    assert_eq!(world.nodes[RESET].recovery.as_ref().unwrap().progress().expired, 1);
}

/// RST-9: the peer has dropped it meanwhile and says nothing: dead peer detection ends it, and nothing of it stays.
#[test]
fn rst_9_the_peer_is_gone() {
    let mut world = pair(6, RESET, GCM, |_| {});
    world.restart(PEER, settings());
    reset(&mut world, GCM, |_| {});
    assert_eq!(restored(&world), 1);
    world.run(Duration::from_mins(30));
    let closed =
        |report: &&(Duration, Report)| matches!(report.1, Report::Closed { reason: CloseReason::Dead, .. });
    assert_eq!(world.nodes[RESET].reports.iter().filter(closed).count(), 1);
    world.is_clean(RESET).unwrap();
    assert!(world.nodes[RESET].store.is_empty());
}

/// RST-9: a peer that begins anew with INITIAL_CONTACT is served; the restored one goes.
#[test]
fn rst_9_the_peer_begins_anew() {
    let mut world = pair(7, RESET, GCM, |_| {});
    let (_, mut far) = sites();
    far.proposals = vec![keyword::ike(GCM).unwrap()];
    world.restart(PEER, settings());
    reset(&mut world, GCM, |_| {});
    world.configure(PEER, vec![Arc::new(far)], &[]);
    world.initiate(PEER, CONNECTION);
    assert!(world.run_until(Duration::from_secs(20), is_up));
    world.run(Duration::from_mins(30));
    assert!(is_up(&world));
    world.agree(RESET, PEER).unwrap();
    assert_eq!(world.nodes[RESET].store.len(), 1);
}

/// RST-10, MOB-6: behind a NAT and with virtual addresses, at either end: the client keeps its address, nobody else gets it.
#[test]
fn rst_10_road_warriors_go_on() {
    for reset_client in [false, true] {
        let warrior = |name: &str| {
            let auth = || (LocalAuth::Psk(psk("a secret")), RemoteAuth::Psk(psk("a secret")));
            let (mut client, mut gateway, pool) = road_warrior(auth(), RemoteAuth::Psk(psk("a secret")));
            client.local_id = name.parse().unwrap();
            client.remote = Some(crate::sites::A);
            client.reset = Strategy::Restore;
            gateway.remote_id = "%any".parse().unwrap();
            gateway.reset = Strategy::Restore;
            (client, gateway, pool)
        };
        let (_, gateway, pool) = warrior("joe@example.org");
        let pools = std::slice::from_ref(&pool);
        let mut world = World::new(8);
        watch_ivs(&mut world);
        world.node("gateway", &[crate::sites::A], settings());
        for (name, inner, outer) in
            [("joe@example.org", "10.9.9.9", "203.0.113.1"), ("ann@example.org", "10.8.8.8", "203.0.113.2")]
        {
            let node = world.node("client", &[inner.parse().unwrap()], settings());
            world.nat(node, outer.parse().unwrap());
            world.configure(node, vec![Arc::new(warrior(name).0)], &[]);
        }
        world.configure(0, vec![Arc::new(gateway)], pools);
        world.initiate(1, CONNECTION);
        world.run(Duration::from_secs(5));
        let address = |world: &World, node: usize| -> Vec<IpAddr> {
            world.established(node).iter().flat_map(|view| view.addresses.clone()).collect()
        };
        let before = address(&world, 1);
        assert_eq!(before.len(), 1, "{:?}", world.failures(1));
        if reset_client {
            world.nodes[1].virtual_configuration = None;
            world.resume(1, settings(), vec![Arc::new(warrior("joe@example.org").0)], &[]);
        } else {
            world.resume(0, settings(), vec![Arc::new(warrior("joe@example.org").1)], pools);
        }
        world.initiate(2, CONNECTION);
        world.nodes[1].probes = crate::sim::Probes::default();
        world.probe_regularly(1, Duration::from_millis(100), Duration::from_mins(1));
        world.run(Duration::from_mins(3));
        let probes = &world.nodes[1].probes;
        assert!(probes.lost.is_empty() && probes.arrived > 500, "{probes:?}");
        assert_eq!(address(&world, 1), before);
        assert!(address(&world, 2).len() == 1 && address(&world, 2) != before);
        if reset_client {
            assert_eq!(world.nodes[1].virtual_configuration.as_ref().unwrap().addresses, before);
        }
        assert_eq!(ended(&world, 1), 0);
    }
}

/// RST-2: keys of CHILD_SAs are saved for `restore`, and for nothing else.
#[test]
fn rst_2_only_restore_saves_child_keys() {
    for strategy in [Strategy::Delete, Strategy::Prebuilt, Strategy::Restore] {
        let mut world = connected(9, |a, b| (a.reset, b.reset) = (strategy, strategy));
        for node in 0..2 {
            let target = Target::Children(CONNECTION.to_owned(), "net".to_owned());
            world.with(node, |endpoint, now| endpoint.rekey(now, &target)).unwrap();
            world.run(Duration::from_mins(1));
            let saved: Vec<u8> = world.nodes[node].store.values().flatten().copied().collect();
            let whole = world.nodes[node]
                .store
                .values()
                .all(|bytes| matches!(SavedIke::decode(bytes).unwrap().body, SavedBody::Whole(_)));
            assert_eq!(whole, strategy == Strategy::Restore);
            for child in world.nodes[node].children.values() {
                for key in [&child.sa.keys_in.0, &child.sa.keys_out.0] {
                    let found = saved.windows(16).any(|window| window == &key.expose()[..16]);
                    assert_eq!(found, strategy == Strategy::Restore);
                }
            }
        }
    }
}

/// RST-1: a peer's request is answered only when it is saved as answered; without `restore` nothing is saved for it.
#[test]
fn rst_1_answers_are_saved_first() {
    for (strategy, costs) in [(Strategy::Delete, 0), (Strategy::Prebuilt, 0), (Strategy::Restore, 5)] {
        let mut world = connected(10, |a, b| {
            a.reset = strategy;
            a.dpd = None;
            b.dpd = Some(Duration::from_secs(10));
        });
        let before = world.nodes[RESET].saved;
        world.run(Duration::from_secs(55));
        assert_eq!(world.nodes[RESET].saved - before, costs, "{strategy:?}");
    }
}
