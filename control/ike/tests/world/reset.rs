//! Resets: a node forgets everything but what was saved, and tells its peers (RST-1, RST-5, RST-6, RST-8 to RST-10).
//! The peers are endpoints: they act on nothing that is not authentic and not the next message of their window.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postern_ike::config::{Selector, Start, Strategy};
use postern_ike::endpoint::Target;
use postern_ike::message::parse::{self, Body};
use postern_ike::negotiate::keyword;
use postern_ike::recovery::{How, Progress, Settings as Pace};
use postern_ike::report::{CloseReason, Report};

use crate::sim::{Link, World};
use crate::sites::{
    CONNECTION, connected, connection, is_up, network, psk, road_warrior, settings, users, world,
};
use postern_ike::config::{LocalAuth, RemoteAuth};

/// The reset node.
const GATEWAY: usize = 0;

fn progress(world: &World) -> Progress {
    world.nodes[GATEWAY].recovery.as_ref().unwrap().progress()
}

/// How often a node's IKE SAs were closed by the peer.
fn closed(world: &World, node: usize) -> usize {
    let by_peer =
        |report: &&(Duration, Report)| matches!(report.1, Report::Closed { reason: CloseReason::Peer, .. });
    world.nodes[node].reports.iter().filter(by_peer).count()
}

/// A gateway and so many peers, each with an IKE SA.
fn star(seed: u64, peers: usize, strategy: Strategy, suite: &str) -> World {
    let mut world = World::new(seed);
    let gateway = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    world.node("gateway", &[gateway], settings());
    let mut connections = Vec::new();
    for peer in 1..=peers {
        let number = u8::try_from(peer).unwrap();
        let address = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 100 + number));
        let node = world.node("peer", &[address], settings());
        let name = format!("peer{peer}.example.org");
        let (ours, theirs) = (format!("10.1.{peer}.0/24"), format!("10.2.{peer}.0/24"));
        let mut near = connection("gateway.example.org", &name, Some(address));
        near.name = name.as_str().into();
        near.reset = strategy;
        let mut far = connection(&name, "gateway.example.org", Some(gateway));
        for (side, local, remote) in [(&mut near, &ours, &theirs), (&mut far, &theirs, &ours)] {
            side.proposals = vec![keyword::ike(suite).unwrap()];
            side.children[0].local_ts = vec![Selector::Fixed(network(local))];
            side.children[0].remote_ts = vec![Selector::Fixed(network(remote))];
            side.dpd = None;
        }
        world.configure(node, vec![Arc::new(far)], &[]);
        connections.push(Arc::new(near));
    }
    world.configure(GATEWAY, connections, &[]);
    for peer in 1..=peers {
        // Half of them are begun by the gateway, which then is the one that sends requests first.
        if peer % 2 == 0 {
            world.initiate(GATEWAY, &format!("peer{peer}.example.org"));
        } else {
            world.initiate(peer, CONNECTION);
        }
    }
    world.run(Duration::from_secs(30));
    assert_eq!(world.established(GATEWAY).len(), peers);
    world
}

/// No IV is used twice with different content: whatever has the same SPIs, direction and IV is the same message.
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

/// RST-5, RST-6: every peer is told once, and its IKE SA goes with its children. With each kind of record.
#[test]
fn rst_5_all_are_told() {
    for (seed, suite) in [(1, "aes128gcm16-prfsha256-x25519"), (2, "aes256-sha512-x25519")] {
        for strategy in [Strategy::Delete, Strategy::Prebuilt] {
            let mut world = star(seed, 30, strategy, suite);
            watch_ivs(&mut world);
            world.recover(GATEWAY, settings(), Pace::default());
            world.run(Duration::from_secs(1));
            assert_eq!(
                progress(&world),
                Progress { total: 30, told: 30, messages: 30, ..Progress::default() },
                "{strategy:?}"
            );
            for peer in 1..=30 {
                assert_eq!((world.established(peer).len(), closed(&world, peer)), (0, 1));
                assert!(world.nodes[peer].children.is_empty());
            }
            assert!(world.nodes[GATEWAY].store.is_empty(), "RST-7: nothing is left");
        }
    }
}

/// RST-9: with loss, reorder, duplication and corruption. Nobody is told twice, whoever can be reached is told.
#[test]
fn rst_9_on_a_bad_network() {
    for seed in 0..40 {
        let strategy = if seed % 2 == 0 { Strategy::Delete } else { Strategy::Prebuilt };
        let mut world = star(seed, 10, strategy, "aes128gcm16-prfsha256-x25519");
        watch_ivs(&mut world);
        world.link = Link { corrupt: 0, ..Link::BAD };
        let pace = Pace { tries: 12, factor: 1.5, ..Pace::default() };
        world.recover(GATEWAY, settings(), pace);
        world.run(Duration::from_mins(5));
        let progress = progress(&world);
        assert!(progress.is_done() && progress.told + progress.unanswered == 10, "seed {seed}: {progress:?}");
        for peer in 1..=10 {
            assert_eq!((world.established(peer).len(), closed(&world, peer)), (0, 1), "seed {seed}");
        }
    }
}

/// RST-9: a request of the gateway is on its way, and perhaps lost, when the power fails: a short one is repeated first, a
/// long one's message ID is tried as well.
#[test]
fn rst_9_in_the_middle_of_a_request() {
    for (strategy, lost, long) in [
        (Strategy::Delete, true, false),
        (Strategy::Delete, false, false),
        (Strategy::Delete, true, true),
        (Strategy::Delete, false, true),
        (Strategy::Prebuilt, true, false),
        (Strategy::Prebuilt, true, true),
        (Strategy::Prebuilt, false, true),
    ] {
        let mut world = connected(3, |a, b| {
            a.reset = strategy;
            if long {
                for connection in [a, b] {
                    connection.children[0].proposals = vec![keyword::esp("aes128gcm16-modp2048").unwrap()];
                }
            }
        });
        watch_ivs(&mut world);
        if lost {
            world.link.loss = 100;
        }
        let target = Target::Children(CONNECTION.to_owned(), "net".to_owned());
        world.with(GATEWAY, |endpoint, now| {
            if long { endpoint.rekey(now, &target) } else { endpoint.terminate(now, &target) }.unwrap();
        });
        // The answer is on its way and finds nobody.
        world.run(Duration::from_millis(15));
        world.link.loss = 0;
        world.recover(GATEWAY, settings(), Pace::default());
        world.run(Duration::from_mins(2));
        let case = (strategy, lost, long);
        assert_eq!(progress(&world).told, 1, "{case:?}: {:?}", progress(&world));
        assert_eq!(world.established(1).len(), 0, "{case:?}");
    }
}

/// RST-4: the Delete of a clean stop is lost, or its answer is: it is said again at the next start, in the same words first,
/// and the answer to that counts. Not so the answer to a Delete of a child.
#[test]
fn rst_4_the_delete_of_a_stop_is_lost() {
    for suite in ["aes128gcm16-prfsha256-x25519", "aes256-sha512-x25519"] {
        for (strategy, of_child) in [
            (Strategy::Delete, false),
            (Strategy::Prebuilt, false),
            (Strategy::Delete, true),
            (Strategy::Prebuilt, true),
        ] {
            let mut world = star(11, 1, strategy, suite);
            watch_ivs(&mut world);
            world.link.loss = 100;
            let name = "peer1.example.org".to_owned();
            let target =
                if of_child { Target::Children(name, "net".to_owned()) } else { Target::Connection(name) };
            world.with(GATEWAY, |endpoint, now| endpoint.terminate(now, &target)).unwrap();
            world.run(Duration::from_millis(15));
            world.link.loss = 0;
            world.recover(GATEWAY, settings(), Pace::default());
            world.run(Duration::from_millis(100));
            let case = (suite, strategy, of_child);
            let after = progress(&world);
            // Of what has no keys and whole blocks nobody can say what it was; the Delete that follows is not answered.
            let known = strategy == Strategy::Delete || suite.contains("gcm");
            assert_eq!(after.told, u64::from(of_child || known), "{case:?}: {after:?}");
            assert_eq!((world.established(1).len(), closed(&world, 1)), (0, 1), "{case:?}");
            world.run(Duration::from_mins(2));
            assert!(progress(&world).is_done(), "{case:?}");
        }
    }
}

/// RST-9: a rekey of the IKE SA that never left is not repeated, however short it is: by it the peer would make an IKE SA
/// whose keys nobody else has, and take the children there.
#[test]
fn rst_9_a_lost_rekey_is_not_repeated() {
    for strategy in [Strategy::Delete, Strategy::Prebuilt] {
        let mut world = connected(4, |a, _| a.reset = strategy);
        world.link.loss = 100;
        let target = Target::Connection(CONNECTION.to_owned());
        world.with(GATEWAY, |endpoint, now| endpoint.rekey(now, &target)).unwrap();
        world.run(Duration::from_millis(15));
        world.link.loss = 0;
        world.recover(GATEWAY, settings(), Pace::default());
        world.run(Duration::from_mins(2));
        assert_eq!(progress(&world).told, 1, "{strategy:?}: {:?}", progress(&world));
        assert_eq!(world.established(1).len(), 0, "{strategy:?}");
    }
}

/// RST-9: a second reset in the middle of the burst, ten times at random points: every peer is told, once, and no IV is
/// used twice with different content.
#[test]
fn rst_9_resets_in_the_burst() {
    for seed in 0..10 {
        let mut world = star(seed, 30, Strategy::Delete, "aes128gcm16-prfsha256-x25519");
        watch_ivs(&mut world);
        world.link.jitter = Duration::from_millis(40);
        world.link.loss = 10;
        let pace = Pace { rate: 500, in_flight: 8, tries: 12, ..Pace::default() };
        for _ in 0..10 {
            world.recover(GATEWAY, settings(), pace);
            let moment = world.random.up_to(Duration::from_millis(30));
            world.run(moment);
        }
        world.recover(GATEWAY, settings(), pace);
        world.run(Duration::from_mins(20));
        assert!(progress(&world).is_done());
        for peer in 1..=30 {
            assert_eq!((world.established(peer).len(), closed(&world, peer)), (0, 1), "seed {seed}");
        }
        let mut keys: Vec<_> = world.nodes[GATEWAY].ended.iter().map(|ended| ended.key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!((keys.len(), world.nodes[GATEWAY].ended.len()), (30, 30), "each ended once");
    }
}

/// RST-5, RST-9: what is saved after rekeys of the IKE SA is the new one, and messages later.
#[test]
fn rst_5_after_rekeys_and_checks() {
    for first in 0..2 {
        let mut world = connected(5, |a, b| {
            for connection in [a, b] {
                connection.dpd = Some(Duration::from_secs(5));
            }
        });
        for round in 0..3 {
            let target = Target::Connection(CONNECTION.to_owned());
            world.with((first + round) % 2, |endpoint, now| endpoint.rekey(now, &target)).unwrap();
            world.run(Duration::from_secs(40));
        }
        assert_eq!(world.nodes[GATEWAY].store.len(), 1);
        watch_ivs(&mut world);
        world.recover(GATEWAY, settings(), Pace::default());
        world.run(Duration::from_secs(1));
        // The last request of this side is repeated, for it may not have arrived.
        assert!(progress(&world).told == 1 && progress(&world).messages <= 2);
        assert_eq!(world.established(1).len(), 0);
    }
}

/// RST-5: "every non-expired phase 1 SA".
#[test]
fn rst_5_expired_ones_are_skipped() {
    let mut world = connected(6, |a, _| {
        a.rekey = Some(Duration::from_mins(10));
        a.over_time = Duration::from_mins(1);
    });
    world.run(Duration::from_mins(1));
    let store = world.nodes[GATEWAY].store.clone();
    world.restart(GATEWAY, settings());
    world.run(Duration::from_mins(11));
    world.nodes[GATEWAY].store = store;
    world.recover(GATEWAY, settings(), Pace::default());
    world.run(Duration::from_secs(1));
    assert_eq!(progress(&world), Progress { total: 1, expired: 1, ..Progress::default() });
    assert_eq!(world.nodes[GATEWAY].ended[0].how, How::Expired);
    assert!(world.nodes[GATEWAY].store.is_empty());
}

/// RST-10: a client behind a NAT is reached at the mapping where it was last seen; one whose mapping changed, when it
/// speaks.
#[test]
fn rst_10_behind_nat() {
    for moved in [false, true] {
        let (client, mut gateway, pool) = road_warrior(
            (LocalAuth::Psk(psk("a secret")), RemoteAuth::Psk(psk("a secret"))),
            RemoteAuth::Psk(psk("a secret")),
        );
        let mut client = client;
        client.remote = Some(crate::sites::A);
        client.dpd = Some(Duration::from_secs(20));
        gateway.remote_id = "%any".parse().unwrap();
        gateway.dpd = None;
        let mut world = World::new(7);
        world.node("gateway", &[crate::sites::A], settings());
        let roamer = world.node("client", &["10.9.9.9".parse().unwrap()], settings());
        let nat = world.nat(roamer, "203.0.113.1".parse().unwrap());
        world.configure(GATEWAY, vec![Arc::new(gateway)], std::slice::from_ref(&pool));
        world.configure(roamer, vec![Arc::new(client)], &[]);
        world.initiate(roamer, CONNECTION);
        world.run(Duration::from_secs(5));
        assert_eq!(world.established(roamer).len(), 1, "{:?}", world.failures(roamer));
        if moved {
            world.reboot_nat(nat);
        }
        world.recover(GATEWAY, settings(), Pace::default());
        world.run(Duration::from_secs(30));
        assert_eq!(progress(&world).told, 1, "moved: {moved}");
        assert_eq!(world.established(roamer).len(), 0);
    }
}

/// RST-7: a peer that begins anew when its SA is closed is served meanwhile, and what it has then is not touched.
#[test]
fn rst_7_new_ones_come_up_meanwhile() {
    let mut world = connected(8, |_, b| b.children[0].on_close = Start::Start);
    let connections = {
        let (a, _) = crate::sites::sites();
        vec![Arc::new(a)]
    };
    world.recover(GATEWAY, settings(), Pace::default());
    world.configure(GATEWAY, connections, &[]);
    assert!(world.run_until(Duration::from_secs(2), is_up), "{:?}", world.failures(1));
    assert!(world.clock < Duration::from_secs(30));
    world.run(Duration::from_mins(1));
    assert!(is_up(&world));
    assert_eq!((progress(&world).told, closed(&world, 1)), (1, 1));
    assert_eq!(world.nodes[GATEWAY].store.len(), 1, "the new one is saved, the old one is gone");
}

/// RST-9: the pace is kept: so many messages a second, so many peers at a time.
#[test]
fn rst_9_paced() {
    let mut world = star(9, 40, Strategy::Delete, "aes128gcm16-prfsha256-x25519");
    let start = world.clock;
    world.recover(GATEWAY, settings(), Pace { rate: 100, ..Pace::default() });
    assert!(world.run_until(Duration::from_secs(5), |world| progress(world).is_done()));
    let took = world.clock.saturating_sub(start);
    assert!((Duration::from_millis(380)..Duration::from_millis(450)).contains(&took), "{took:?}");

    let mut world = star(9, 40, Strategy::Delete, "aes128gcm16-prfsha256-x25519");
    let start = world.clock;
    world.recover(GATEWAY, settings(), Pace { rate: 0, in_flight: 4, ..Pace::default() });
    assert!(world.run_until(Duration::from_secs(5), |world| progress(world).is_done()));
    // Ten rounds of 20 ms.
    let took = world.clock.saturating_sub(start);
    assert!((Duration::from_millis(195)..Duration::from_millis(210)).contains(&took), "{took:?}");
}

/// RST-11: nobody who has not the keys can end the telling of a peer, unless no keys were saved.
#[test]
fn rst_11_forged_answers() {
    let mut world = connected(10, |_, _| {});
    // The peer is away; someone answers in its place.
    world.unreachable.insert(crate::sites::B);
    let target = crate::sites::A;
    world.tap = Some(Box::new(move |_, node, datagram| (node != GATEWAY).then_some(datagram)));
    world.recover(GATEWAY, settings(), Pace::default());
    let bytes = world.nodes[GATEWAY].store.values().next().unwrap().clone();
    let record = postern_ike::record::SavedIke::decode(&bytes).unwrap();
    for id in 0..5_u32 {
        let mut answer = record.key().to_vec();
        answer.extend([46, 0x20, 37, if record.initiator { 0x20 } else { 0x28 }]);
        answer.extend(id.to_be_bytes());
        answer.extend(57_u32.to_be_bytes());
        answer.extend([0, 0, 0, 29]);
        answer.extend([7; 25]);
        let from = "192.0.2.66:500".parse().unwrap();
        world.inject(crate::sim::Datagram { from, to: (target, 500).into(), bytes: answer });
    }
    world.run(Duration::from_mins(5));
    assert_eq!((progress(&world).forged, progress(&world).told, progress(&world).unanswered), (5, 0, 1));
}

/// A connection with `reset = "none"` leaves nothing.
#[test]
fn rst_2_nothing_is_saved_if_that_is_wished() {
    let mut world = world(11, |a, _| a.reset = Strategy::None);
    world.initiate(GATEWAY, CONNECTION);
    assert!(world.run_until(Duration::from_secs(5), is_up));
    assert!(world.nodes[GATEWAY].store.is_empty() && world.nodes[1].store.len() == 1);
    let _ = users(&[]);
}
