//! IKEv1 among ourselves: main mode, Quick Mode, Informational, XAuth and mode-config, succession of IKE SAs.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use postern_ike::config::{Connection, LocalAuth, RemoteAuth, V1, Xauth};
use postern_ike::endpoint::Target;
use postern_ike::ignored::Ignored;
use postern_ike::negotiate::keyword;
use postern_ike::output::Path;
use postern_ike::report::{CloseReason, Failure, Report};
use postern_ike::v1::delete::delete_message;

use crate::sim::{Link, World};
use crate::sites::{A, B, CONNECTION, connected, is_up, psk, road_warrior, settings, world};

fn v1(connection: &mut Connection) {
    connection.v1 = Some(V1 { xauth: Xauth::None, aggressive: false });
    connection.proposals = vec![keyword::ike("aes128-sha256-ecp256").unwrap()];
}

fn both(a: &mut Connection, b: &mut Connection) {
    v1(a);
    v1(b);
}

fn esp(text: &str, a: &mut Connection, b: &mut Connection) {
    for connection in [a, b] {
        connection.children[0].proposals = vec![keyword::esp(text).unwrap()];
    }
}

fn ike() -> Target {
    Target::Connection(CONNECTION.to_owned())
}

fn children() -> Target {
    Target::Children(CONNECTION.to_owned(), "net".to_owned())
}

fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let one = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    (0..count).filter(move |seed| one.is_none_or(|one| one == *seed))
}

fn flows(world: &mut World) {
    for node in 0..2 {
        world.probe(node);
    }
    world.run(Duration::from_secs(1));
    for node in 0..2 {
        let probes = &world.nodes[node].probes;
        assert!(probes.arrived > 0 && probes.lost.is_empty() && probes.without_sa == 0, "{probes:?}");
    }
}

/// IKE-2: main mode with every hash, group and key length, Quick Mode with and without perfect forward secrecy.
#[test]
fn ike_2_suites() {
    for (ike, child) in [
        ("aes128-sha256-ecp256", "aes128gcm16"),
        ("aes256-sha1-modp2048", "aes256-sha256-modp2048"),
        ("aes192-sha384-ecp384", "aes128-sha1-ecp256"),
        ("aes256-sha512-modp3072", "null-sha512"),
        ("aes128-aes256-sha1-sha256-modp4096-ecp256", "aes256gcm16-aes128gcm16-ecp384"),
    ] {
        let mut world = connected(1, |a, b| {
            both(a, b);
            esp(child, a, b);
            a.proposals = vec![keyword::ike(ike).unwrap()];
            b.proposals.clone_from(&a.proposals);
        });
        world.agree(0, 1).unwrap();
        flows(&mut world);
        let view = &world.established(0)[0];
        assert!(view.suite.starts_with("IKEv1 AES_CBC"), "{}", view.suite);
    }
}

/// IKE-2: deleted by either side, nothing is left at either; a child alone leaves the IKE SA.
#[test]
fn ike_2_deletes() {
    for node in 0..2 {
        let mut world = connected(1, both);
        world.with(node, |endpoint, now| endpoint.terminate(now, &children()).unwrap());
        world.run(Duration::from_secs(1));
        assert!(world.nodes.iter().all(|node| node.children.is_empty() && node.endpoint.len() == 1));
        world.initiate(0, CONNECTION);
        world.run(Duration::from_secs(1));
        flows(&mut world);
        world.with(node, |endpoint, now| endpoint.terminate(now, &ike()).unwrap());
        world.run(Duration::from_secs(1));
        world.is_clean(0).unwrap();
        world.is_clean(1).unwrap();
    }
}

/// IKE-2: over a bad network both come to the same end.
#[test]
fn ike_2_over_a_bad_network() {
    for seed in seeds(100) {
        let mut world = world(seed, |a, b| {
            both(a, b);
            let text = if seed % 2 == 0 { "aes128gcm16" } else { "aes128gcm16-ecp256" };
            esp(text, a, b);
        });
        world.link = Link::BAD;
        // An attempt may come to nothing: the other side gives up half-open IKE SAs before this one does.
        let up = (0..4).any(|_| {
            world.initiate(0, CONNECTION);
            world.run_until(Duration::from_mins(4), is_up)
        });
        assert!(up, "seed {seed}: {:?}", world.failures(0));
        world.link = Link::GOOD;
        world.run(Duration::from_mins(4));
        assert!(is_up(&world), "seed {seed}");
        world.agree(0, 1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        world.no_leak(0).unwrap();
        world.no_leak(1).unwrap();
        flows(&mut world);
    }
}

/// IKE-2: rekeys of children and of the IKE SA by either side, or by both at once, while packets flow: none is lost.
#[test]
fn ike_2_rekeys_lose_nothing() {
    let (mut together, mut one_left) = (0, 0);
    for seed in seeds(60) {
        let mut world = connected(seed, |a, b| {
            both(a, b);
            esp(if seed % 2 == 0 { "aes128gcm16" } else { "aes128gcm16-ecp256" }, a, b);
        });
        world.link.jitter = Duration::from_millis(20);
        for node in &mut world.nodes {
            node.job_time = Duration::from_millis(30);
            node.install_time = Duration::from_millis(30);
        }
        for node in 0..2 {
            world.probe_regularly(node, Duration::from_millis(5), Duration::from_mins(1));
        }
        let who: &[usize] = [&[0][..], &[1], &[0, 1]][usize::try_from(seed % 3).unwrap()];
        let target = if seed % 4 < 2 { children() } else { ike() };
        for node in who {
            world.run(Duration::from_millis(seed % 7 * 10));
            world.with(*node, |endpoint, now| endpoint.rekey(now, &target).unwrap());
        }
        world.run(Duration::from_secs(80));
        for node in 0..2 {
            let probes = &world.nodes[node].probes;
            let few: Vec<&String> = probes.lost.iter().take(5).collect();
            assert!(few.is_empty() && probes.without_sa == 0, "seed {seed}, node {node}: {few:?}");
            assert_eq!(world.nodes[node].endpoint.len(), 1, "seed {seed}");
            world.no_leak(node).unwrap();
        }
        if who.len() == 1 {
            assert!(world.nodes.iter().all(|node| node.children.len() == 1), "seed {seed}");
            world.agree(0, 1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        }
        together += usize::from(who.len() == 2);
        one_left += usize::from(who.len() == 2 && world.nodes.iter().all(|node| node.children.len() == 1));
    }
    // Where the sides choose differently the second goes with its lifetime.
    assert!(one_left * 4 >= together * 3, "{one_left} of {together} crossings left one child");
}

/// IKE-2: both limits in time pass many times, and packets flow through all of it.
#[test]
fn ike_2_a_day_of_lifetimes() {
    let mut world = connected(3, |a, b| {
        both(a, b);
        for connection in [a, b] {
            connection.rekey = Some(Duration::from_hours(3));
            connection.rekey_jitter = Duration::from_mins(20);
            let child = &mut connection.children[0];
            child.rekey = Some(Duration::from_hours(1));
            child.rekey_jitter = Duration::from_mins(6);
            child.life = Some(Duration::from_mins(66));
        }
    });
    for node in 0..2 {
        world.probe_regularly(node, Duration::from_secs(1), Duration::from_hours(24));
    }
    world.run(Duration::from_hours(24) + Duration::from_secs(1));
    for node in 0..2 {
        let probes = &world.nodes[node].probes;
        let few: Vec<&String> = probes.lost.iter().take(5).collect();
        assert!(few.is_empty() && probes.without_sa == 0, "node {node}: {few:?}");
        assert!(world.nodes[node].children.len() <= 2 && world.nodes[node].endpoint.len() == 1);
        world.no_leak(node).unwrap();
    }
}

/// IKE-2, RFC 3706: a peer that is gone is found out, by either side; one that is there is not.
#[test]
fn ike_2_dead_peer_detection() {
    for node in 0..2 {
        let mut world = connected(1, both);
        world.run(Duration::from_hours(1));
        assert!(is_up(&world), "an idle peer is alive");
        world.unreachable.insert([B, A][node]);
        world.run(Duration::from_mins(10));
        let closed = world.nodes[node]
            .reports
            .iter()
            .any(|(_, report)| matches!(report, Report::Closed { reason: CloseReason::Dead, .. }));
        assert!(closed && world.is_clean(node).is_ok());
    }
}

/// IKE-2, RFC 3947: behind a NAT both float to 4500, ESP is in UDP, and the NAT is kept open.
#[test]
fn ike_2_behind_a_nat() {
    let mut world = world(1, |a, b| {
        both(a, b);
        b.remote = None;
    });
    world.nat(0, "198.51.100.1".parse().unwrap());
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(10), is_up), "{:?}", world.failures(0));
    assert!(world.nodes.iter().all(|node| node.children.values().all(|child| child.sa.encap.is_some())));
    flows(&mut world);
    let Path { natt, .. } = world.established(1)[0].path;
    assert!(natt);
    world.run(Duration::from_mins(5));
    assert!(world.nodes[0].keepalives > 5);
    world.with(0, |endpoint, now| endpoint.rekey(now, &ike()).unwrap());
    world.run(Duration::from_secs(20));
    assert!(is_up(&world) && world.established(0)[0].path.natt);
    flows(&mut world);
}

/// IKE-2: a wrong secret, a wrong identity, no common suite: nothing comes up, both say why, nothing is left.
#[test]
fn ike_2_refusals() {
    type Change = fn(&mut Connection, &mut Connection);
    type Expected = fn(&Failure) -> bool;
    let cases: [(Change, Expected); 5] = [
        (
            |a, _| (a.local_auth, a.remote_auth) = (LocalAuth::Psk(psk("x")), RemoteAuth::Psk(psk("x"))),
            |failure| matches!(failure, Failure::V1NoProof),
        ),
        (
            |a, _| a.local_id = "mallory.example.org".parse().unwrap(),
            |failure| matches!(failure, Failure::V1NoProof),
        ),
        (
            |a, _| a.remote_id = "other.example.org".parse().unwrap(),
            |failure| matches!(failure, Failure::Identity { .. }),
        ),
        (
            |a, _| a.proposals = vec![keyword::ike("aes256-sha512-modp2048").unwrap()],
            |failure| matches!(failure, Failure::Notified(_)),
        ),
        (|_, b| b.v1 = None, |failure| matches!(failure, Failure::NoAnswer(_))),
    ];
    for (change, fits) in cases {
        let mut world = world(1, |a, b| {
            both(a, b);
            change(a, b);
        });
        world.initiate(0, CONNECTION);
        world.run(Duration::from_mins(5));
        let failures = world.failures(0);
        assert!(failures.iter().all(|failure| fits(failure)) && failures.len() == 1, "{failures:?}");
        world.is_clean(0).unwrap();
        world.is_clean(1).unwrap();
    }
}

/// IKE-2: a child that the peer does not want is refused by a notification, and the IKE SA stays.
#[test]
fn ike_2_refused_children() {
    for wrong in 0..2 {
        let mut world = world(1, |a, b| {
            both(a, b);
            if wrong == 0 {
                a.children[0].proposals = vec![keyword::esp("aes256-sha512").unwrap()];
            } else {
                a.children[0].remote_ts =
                    vec![postern_ike::config::Selector::Fixed(crate::sites::network("10.9.0.0/24"))];
            }
        });
        world.initiate(0, CONNECTION);
        world.run(Duration::from_secs(30));
        assert!(matches!(world.failures(0)[..], [Failure::Notified(_)]), "{:?}", world.failures(0));
        assert_eq!((world.established(0).len(), world.established(1).len()), (1, 1));
        world.no_leak(0).unwrap();
        world.no_leak(1).unwrap();
    }
}

fn warriors(password: &str) -> (World, Arc<Connection>) {
    let auth = || (LocalAuth::Psk(psk("a group secret")), RemoteAuth::Psk(psk("a group secret")));
    let (mut client, mut gateway, pool) = road_warrior(auth(), auth().1);
    (gateway.local_auth, _) = auth();
    both(&mut client, &mut gateway);
    client.mobike = false;
    client.v1 =
        Some(V1 { xauth: Xauth::Client { user: "joe".into(), password: psk(password) }, aggressive: false });
    let users: HashMap<_, _> = [("joe".to_owned(), psk("his password"))].into();
    gateway.v1 = Some(V1 { xauth: Xauth::Server(Arc::new(users)), aggressive: false });
    let mut world = World::new(7);
    world.node("client", &[A], settings());
    world.node("gateway", &[B], settings());
    let client = Arc::new(client);
    world.configure(0, vec![Arc::clone(&client)], &[]);
    world.configure(1, vec![Arc::new(gateway)], &[pool]);
    world.nat(0, "198.51.100.1".parse().unwrap());
    (world, client)
}

/// IKE-2: XAuth and mode-config behind a NAT; the address stays through a new phase 1, and is given back at the end.
#[test]
fn ike_2_xauth_and_mode_config() {
    let (mut world, _) = warriors("his password");
    world.initiate(0, CONNECTION);
    assert!(
        world.run_until(Duration::from_secs(20), is_up),
        "{:?} {:?}",
        world.failures(0),
        world.failures(1)
    );
    let address: IpAddr = "10.3.0.10".parse().unwrap();
    let configuration = world.nodes[0].virtual_configuration.clone().unwrap();
    assert_eq!(configuration.addresses, [address]);
    assert_eq!(configuration.dns, ["10.2.0.53".parse::<IpAddr>().unwrap()]);
    let view = &world.established(1)[0];
    assert_eq!((view.remote_id.as_deref(), view.addresses.as_slice()), (Some("joe"), &[address][..]));
    flows(&mut world);
    world.with(0, |endpoint, now| endpoint.rekey(now, &ike()).unwrap());
    world.run(Duration::from_secs(30));
    assert!(is_up(&world));
    assert_eq!(world.established(1)[0].addresses, [address]);
    flows(&mut world);
    world.with(0, |endpoint, now| endpoint.terminate(now, &ike()).unwrap());
    world.run(Duration::from_secs(1));
    world.is_clean(0).unwrap();
    world.is_clean(1).unwrap();
    assert_eq!(world.nodes[0].virtual_configuration, None);
}

/// IKE-2: a wrong password leads to nothing.
#[test]
fn ike_2_wrong_password() {
    let (mut world, _) = warriors("a guess");
    world.initiate(0, CONNECTION);
    world.run(Duration::from_mins(2));
    assert!(world.failures(1).iter().any(|failure| matches!(failure, Failure::Xauth(_))));
    world.is_clean(0).unwrap();
    world.is_clean(1).unwrap();
}

/// RST-5: the Delete that is built from the saved context of an SA, after its side is gone, ends it at the peer with its
/// children; one with a wrong key does not.
#[test]
fn rst_5_the_saved_context_deletes() {
    for node in 0..2 {
        let mut world = connected(1, both);
        let view = world.established(node)[0].clone();
        let mut context = world.nodes[node].endpoint.delete_context(view.id).unwrap();
        world.restart(node, settings());
        let path = view.path;
        let send = |world: &mut World, bytes: Vec<u8>| {
            world.inject(crate::sim::Datagram { from: path.local, to: path.remote, bytes });
            world.run(Duration::from_secs(1));
        };
        let right = std::mem::replace(&mut context.skeyid_a, psk("wrong"));
        send(&mut world, delete_message(&context, 7).unwrap());
        assert_eq!(world.nodes[1 - node].endpoint.len(), 1);
        assert_eq!(world.ignored(1 - node, Ignored::Integrity), 1);
        context.skeyid_a = right;
        send(&mut world, delete_message(&context, 8).unwrap());
        world.is_clean(1 - node).unwrap();
    }
}

fn aggressive(connection: &mut Connection) {
    v1(connection);
    connection.v1 = Some(V1 { xauth: Xauth::None, aggressive: true });
}

/// IKE-2: aggressive mode, rekeyed and over a bad network, by each side.
#[test]
fn ike_2_aggressive_mode() {
    for seed in seeds(40) {
        let mut world = world(seed, |a, b| {
            aggressive(a);
            aggressive(b);
        });
        if seed % 2 == 1 {
            world.link = Link::BAD;
        }
        let from = usize::try_from(seed / 2 % 2).unwrap();
        let up = (0..4).any(|_| {
            world.initiate(from, CONNECTION);
            world.run_until(Duration::from_mins(4), is_up)
        });
        assert!(up, "seed {seed}: {:?}", world.failures(from));
        world.link = Link::GOOD;
        world.run(Duration::from_mins(4));
        world.agree(0, 1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        flows(&mut world);
        world.with(1 - from, |endpoint, now| endpoint.rekey(now, &ike()).unwrap());
        world.run(Duration::from_secs(30));
        world.agree(0, 1).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        flows(&mut world);
        world.no_leak(0).unwrap();
        world.no_leak(1).unwrap();
    }
}

/// IKE-2, RFC 3947: aggressive mode behind a NAT floats to 4500 with message 3.
#[test]
fn ike_2_aggressive_mode_behind_a_nat() {
    let mut world = world(1, |a, b| {
        aggressive(a);
        aggressive(b);
        b.remote = None;
    });
    world.nat(0, "198.51.100.1".parse().unwrap());
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(10), is_up), "{:?}", world.failures(0));
    assert!(world.nodes.iter().all(|node| node.children.values().all(|child| child.sa.encap.is_some())));
    assert!(world.established(1)[0].path.natt);
    flows(&mut world);
}

/// IKE-2: aggressive mode is refused where it is not switched on; a wrong secret or identity leads to nothing.
#[test]
fn ike_2_aggressive_mode_refused() {
    type Change = fn(&mut Connection, &mut Connection);
    type Expected = fn(&[&Failure], &[&Failure]) -> bool;
    let cases: [(Change, Expected); 4] = [
        (
            |_, b| v1(b),
            |a, b| {
                matches!(a, [Failure::NoAnswer(_)])
                    && matches!(b.first(), Some(Failure::V1Protocol("aggressive mode", _)))
            },
        ),
        (
            |a, _| (a.local_auth, a.remote_auth) = (LocalAuth::Psk(psk("x")), RemoteAuth::Psk(psk("x"))),
            |a, _| matches!(a, [Failure::SharedSecret(_)]),
        ),
        (
            |a, _| a.local_id = "mallory.example.org".parse().unwrap(),
            |a, b| {
                matches!(a, [Failure::NoAnswer(_)]) && matches!(b.first(), Some(Failure::NoConnection { .. }))
            },
        ),
        (
            |a, _| a.remote_id = "other.example.org".parse().unwrap(),
            |a, _| matches!(a, [Failure::Identity { .. }]),
        ),
    ];
    for (change, fits) in cases {
        let mut world = world(1, |a, b| {
            aggressive(a);
            aggressive(b);
            change(a, b);
        });
        world.initiate(0, CONNECTION);
        world.run(Duration::from_mins(5));
        let failures = [0, 1].map(|node| world.failures(node));
        assert!(fits(&failures[0], &failures[1]), "{failures:?}");
        world.is_clean(0).unwrap();
        world.is_clean(1).unwrap();
    }
}
