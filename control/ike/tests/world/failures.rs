//! What goes wrong ends as RFC 7296 says: with an answer or with none, a reason for people, a counter, and nothing left.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use postern_ike::config::{LocalAuth, RemoteAuth, Selector, Settings};
use postern_ike::ignored::Ignored;
use postern_ike::message::registry::{ExchangeType, NotifyType};
use postern_ike::message::{Head, IkeSpi, Notify, Payload, emit, parse};
use postern_ike::negotiate::keyword;
use postern_ike::report::{CloseReason, Failure, Report};

use crate::sim::{Datagram, World};
use crate::sites::{A, B, CONNECTION, connected, is_up, network, psk, settings, world, world_with};

fn attempt(world: &mut World) {
    world.initiate(0, CONNECTION);
    world.run(Duration::from_mins(5));
}

fn clean(world: &World) {
    world.is_clean(0).unwrap();
    world.is_clean(1).unwrap();
}

#[track_caller]
fn failed(world: &World, node: usize, fits: impl Fn(&Failure) -> bool) {
    let failures = world.failures(node);
    assert!(failures.len() == 1 && failures.iter().all(|failure| fits(failure)), "node {node}: {failures:?}");
    // It is in words that a person can act on.
    assert!(failures[0].to_string().len() > 15);
}

/// IKE-3: a wrong shared secret, on either side.
#[test]
fn ike_3_wrong_shared_secret() {
    let mut world = world(1, |a, _| a.local_auth = LocalAuth::Psk(psk("another")));
    attempt(&mut world);
    failed(&world, 0, |failure| matches!(failure, Failure::Notified(NotifyType::AUTHENTICATION_FAILED)));
    failed(&world, 1, |failure| matches!(failure, Failure::SharedSecret(_)));
    clean(&world);
}

/// IKE-3: the initiator refuses the responder; the responder is told, and has nothing left either.
#[test]
fn ike_3_the_responder_has_another_secret() {
    let mut world = world(1, |_, b| b.local_auth = LocalAuth::Psk(psk("another")));
    attempt(&mut world);
    failed(&world, 0, |failure| matches!(failure, Failure::SharedSecret(_)));
    clean(&world);
}

#[test]
fn ike_3_wrong_identity() {
    let mut world = world(1, |a, _| a.local_id = "mallory.example.org".parse().unwrap());
    attempt(&mut world);
    failed(&world, 0, |failure| matches!(failure, Failure::Notified(NotifyType::AUTHENTICATION_FAILED)));
    failed(&world, 1, |failure| matches!(failure, Failure::Identity { .. } | Failure::NoConnection { .. }));
    clean(&world);
}

#[test]
fn ike_1_no_common_proposal() {
    let other = || vec![keyword::ike("aes256gcm16-prfsha384-ecp384").unwrap()];
    let mut world = world(1, |a, _| a.proposals = other());
    attempt(&mut world);
    failed(&world, 0, |failure| matches!(failure, Failure::Notified(NotifyType::NO_PROPOSAL_CHOSEN)));
    failed(&world, 1, |failure| matches!(failure, Failure::NoProposal { .. }));
    clean(&world);
}

/// RFC 7296 section 1.2: a child that cannot be made leaves the IKE SA up.
#[test]
fn ike_1_children_that_do_not_fit() {
    let mut selectors = world(1, |a, _| {
        a.children[0].remote_ts = vec![Selector::Fixed(network("172.16.0.0/16"))];
    });
    attempt(&mut selectors);
    failed(&selectors, 0, |failure| matches!(failure, Failure::Notified(NotifyType::TS_UNACCEPTABLE)));
    let mut proposals =
        world(1, |a, _| a.children[0].proposals = vec![keyword::esp("aes256-sha384").unwrap()]);
    attempt(&mut proposals);
    failed(&proposals, 0, |failure| matches!(failure, Failure::Notified(NotifyType::NO_PROPOSAL_CHOSEN)));
    for world in [selectors, proposals] {
        for node in 0..2 {
            assert_eq!(world.established(node).len(), 1);
            assert!(world.nodes[node].children.is_empty());
            world.no_leak(node).unwrap();
        }
    }
}

/// The datapath of either side refuses: the other does not believe in a child that is not there.
#[test]
fn a_datapath_that_refuses() {
    for node in 0..2 {
        let mut world = world(1, |_, _| ());
        world.nodes[node].installer = Box::new(|_| Err("no room".to_owned()));
        attempt(&mut world);
        failed(&world, node, |failure| matches!(failure, Failure::Datapath(why) if why == "no room"));
        for node in 0..2 {
            assert!(world.nodes[node].children.is_empty(), "{:?}", world.nodes[node].children);
            world.no_leak(node).unwrap();
        }
        world.agree(0, 1).unwrap();
    }
}

/// RFC 7296 section 2.6.
#[test]
fn ike_1_cookies() {
    let settings = Settings { cookie_threshold: 0, ..settings() };
    let mut world = world_with(1, &settings, |_, _| ());
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(5), is_up));
    assert_eq!(world.ignored(1, Ignored::CookieDemanded), 1);
    world.agree(0, 1).unwrap();
}

/// RFC 7296 section 1.2: the initiator guessed another key exchange method than the responder wants; also with a cookie
/// on top (section 2.6.1).
#[test]
fn ike_1_invalid_ke_payload() {
    for cookie_threshold in [256, 0] {
        let settings = Settings { cookie_threshold, ..settings() };
        let mut world = world_with(1, &settings, |a, b| {
            a.proposals = vec![keyword::ike("aes128gcm16-prfsha256-x25519-ecp256").unwrap()];
            b.proposals = vec![keyword::ike("aes128gcm16-prfsha256-ecp256").unwrap()];
        });
        world.initiate(0, CONNECTION);
        assert!(world.run_until(Duration::from_secs(10), is_up), "{:?}", world.failures(0));
        assert_eq!(world.established(0)[0].suite, "AES_GCM_16_128/PRF_HMAC_SHA2_256/ECP_256");
        world.agree(0, 1).unwrap();
    }
}

/// Nobody answers, and nothing is left after the last retransmission.
#[test]
fn ike_1_no_answer() {
    let mut world = world(1, |_, _| ());
    world.unreachable.insert(B);
    attempt(&mut world);
    failed(&world, 0, |failure| matches!(failure, Failure::NoAnswer(B)));
    assert_eq!(world.nodes[0].transmitted, 7);
    clean(&world);
}

/// A half-open IKE SA whose initiator is silent is given up, and gives back its place.
#[test]
fn ike_1_half_open_times_out() {
    let mut world = world(1, |_, _| ());
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(5), |world| !world.nodes[1].endpoint.is_empty()));
    world.unreachable.insert(A);
    world.run(Duration::from_secs(40));
    world.is_clean(1).unwrap();
}

/// IKE-1: DPD. The peer is gone; this side notices and lets go of everything.
#[test]
fn ike_1_dead_peer() {
    let mut world = connected(1, |_, _| ());
    world.unreachable.extend([A, B]);
    world.run(Duration::from_mins(10));
    clean(&world);
    for node in 0..2 {
        let dead =
            |(_, report): &(_, Report)| matches!(report, Report::Closed { reason: CloseReason::Dead, .. });
        assert_eq!(world.nodes[node].reports.iter().filter(|report| dead(report)).count(), 1);
    }
}

/// A peer that answers is alive, for as long as it takes.
#[test]
fn ike_1_a_live_peer_stays() {
    let mut world = connected(1, |_, _| ());
    let before = world.established(0)[0].spis;
    world.run(Duration::from_hours(10));
    assert_eq!(world.established(0)[0].spis, before);
    assert!(world.nodes[0].transmitted < 5_000);
    world.agree(0, 1).unwrap();
}

/// IKE-1: everything that was ever sent comes again, to both, as it was, truncated, and with single bits changed: nothing
/// that is established changes.
#[test]
fn ike_1_replays_truncations_and_forgeries() {
    let recorded: Rc<RefCell<Vec<Datagram>>> = Rc::default();
    let mut world = world(1, |_, _| ());
    let tape = Rc::clone(&recorded);
    world.tap = Some(Box::new(move |_, _, datagram| {
        tape.borrow_mut().push(datagram.clone());
        Some(datagram)
    }));
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(5), is_up));
    world.run(Duration::from_secs(1));
    let target = postern_ike::endpoint::Target::Children(CONNECTION.to_owned(), "net".to_owned());
    world.with(0, |endpoint, now| endpoint.rekey(now, &target)).unwrap();
    world.run(Duration::from_secs(10));
    world.tap = None;
    let before: Vec<_> = (0..2).map(|node| world.established(node)[0].spis).collect();
    let children: Vec<_> = (0..2).map(|node| world.nodes[node].children.keys().copied().collect()).collect();
    let tape = recorded.borrow().clone();
    assert!(tape.len() >= 8);
    for datagram in &tape {
        let mut changed = vec![datagram.clone()];
        changed.push(Datagram { from: datagram.to, to: datagram.from, ..datagram.clone() });
        for length in 0..datagram.bytes.len() {
            changed.push(Datagram { bytes: datagram.bytes[..length].to_vec(), ..datagram.clone() });
            let mut bytes = datagram.bytes.clone();
            bytes[length] ^= 1 << (length % 8);
            changed.push(Datagram { bytes, ..datagram.clone() });
        }
        for datagram in changed {
            world.inject(datagram);
        }
        world.run(Duration::from_millis(100));
    }
    world.run(Duration::from_mins(5));
    let after: Vec<_> = (0..2).map(|node| world.established(node)[0].spis).collect();
    let children_after: Vec<Vec<_>> =
        (0..2).map(|node| world.nodes[node].children.keys().copied().collect()).collect();
    assert_eq!((before, children), (after, children_after));
    for node in 0..2 {
        assert_eq!(world.nodes[node].endpoint.len(), 1);
        world.no_leak(node).unwrap();
    }
    for reason in [Ignored::Truncated, Ignored::UnknownSpi, Ignored::Integrity, Ignored::MessageId] {
        assert!(world.ignored(0, reason) + world.ignored(1, reason) > 0, "{reason:?}");
    }
}

/// RFC 7296 section 2.21.1: an unprotected error does not end what a genuine answer can still establish; and an
/// unprotected message about an established IKE SA does nothing.
#[test]
fn ike_1_unprotected_errors_of_a_stranger() {
    let mut world = world(1, |_, _| ());
    let spi: Rc<RefCell<Option<IkeSpi>>> = Rc::default();
    let seen = Rc::clone(&spi);
    world.tap = Some(Box::new(move |_, node, datagram| {
        if node == 0 && seen.borrow().is_none() {
            *seen.borrow_mut() = Some(parse::head(&datagram.bytes).unwrap().0.spi_i);
        }
        Some(datagram)
    }));
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(1), |_| spi.borrow().is_some()));
    let head = Head {
        spi_i: spi.borrow().unwrap(),
        spi_r: IkeSpi::NONE,
        exchange: ExchangeType::IKE_SA_INIT,
        from_initiator: false,
        response: true,
        message_id: 0,
    };
    let lie = |head: &Head, kind| emit::plain(head, &[Payload::Notify(Notify::new(kind, []))]);
    let (from, to) = ((B, 500).into(), (A, 500).into());
    for kind in
        [NotifyType::NO_PROPOSAL_CHOSEN, NotifyType::AUTHENTICATION_FAILED, NotifyType::INVALID_SYNTAX]
    {
        let now = world.link;
        world.link.delay = Duration::from_millis(1);
        world.inject(Datagram { from, to, bytes: lie(&head, kind) });
        world.link = now;
    }
    assert!(world.run_until(Duration::from_secs(5), is_up), "{:?}", world.failures(0));
    let view = world.established(0).remove(0);
    for response in [false, true] {
        let (spi_i, spi_r) = view.spis;
        let head =
            Head { spi_i, spi_r, exchange: ExchangeType::INFORMATIONAL, response, message_id: 0, ..head };
        world.inject(Datagram { from, to, bytes: lie(&head, NotifyType::INVALID_IKE_SPI) });
    }
    world.run(Duration::from_mins(5));
    assert!(is_up(&world) && world.ignored(0, Ignored::Unprotected) == 1);
}

/// A peer that lost its memory begins anew: its INITIAL_CONTACT, or the uniqueness of identities, ends the old IKE SA.
#[test]
fn ike_1_the_peer_restarts() {
    let mut world = connected(1, |_, _| ());
    let old = world.established(1)[0].spis;
    let (a, _) = crate::sites::sites();
    world.restart(0, settings());
    world.configure(0, vec![std::sync::Arc::new(a)], &[]);
    world.initiate(0, CONNECTION);
    world.run(Duration::from_secs(30));
    assert!(is_up(&world));
    assert_ne!(world.established(1)[0].spis, old);
    world.agree(0, 1).unwrap();
    world.no_leak(1).unwrap();
}

/// The gateway has no addresses to give, and makes a child without: the client does not take it, and says so.
#[test]
fn ike_1_no_address_assigned() {
    let auth = (LocalAuth::Psk(psk("a secret")), RemoteAuth::Psk(psk("a secret")));
    let (client, mut server, _) = crate::sites::road_warrior(auth, RemoteAuth::Psk(psk("a secret")));
    server.pools.clear();
    let mut world = world(1, |_, _| ());
    world.configure(0, vec![std::sync::Arc::new(client)], &[]);
    world.configure(1, vec![std::sync::Arc::new(server)], &[]);
    attempt(&mut world);
    failed(&world, 0, |failure| matches!(failure, Failure::NoAddress | Failure::Notified(_)));
    world.agree(0, 1).unwrap();
    for node in 0..2 {
        assert!(world.nodes[node].children.is_empty());
        world.no_leak(node).unwrap();
    }
}

/// RFC 7296 section 2.6, RFC 8019: a flood of first messages from random addresses leaves nothing behind, takes no more
/// memory than half-open IKE SAs are allowed without a cookie, and does not keep a real peer out.
#[test]
fn ike_1_a_flood_of_first_messages() {
    let recorded: Rc<RefCell<Option<Datagram>>> = Rc::default();
    let mut world = world(1, |_, b| b.remote = None);
    let tape = Rc::clone(&recorded);
    world.tap = Some(Box::new(move |_, _, datagram| {
        tape.borrow_mut().get_or_insert_with(|| datagram.clone());
        Some(datagram)
    }));
    let target = postern_ike::endpoint::Target::Connection(CONNECTION.to_owned());
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(5), is_up));
    world.with(0, |endpoint, now| endpoint.terminate(now, &target)).unwrap();
    world.run(Duration::from_secs(5));
    clean(&world);
    world.tap = None;
    let first = recorded.borrow().clone().unwrap();
    for round in 0..20_u64 {
        for _ in 0..1_000 {
            let mut bytes = first.bytes.clone();
            bytes[..8].copy_from_slice(&world.random.next().to_be_bytes());
            let source = std::net::Ipv4Addr::from_bits(
                0x0a00_0000 | u32::try_from(world.random.below(1 << 24)).unwrap(),
            );
            world.inject(Datagram { from: (source, 500).into(), bytes, ..first.clone() });
        }
        world.run(Duration::from_millis(50));
        assert!(world.nodes[1].endpoint.len() <= 260, "{}", world.nodes[1].endpoint.len());
        if round == 10 {
            world.initiate(0, CONNECTION);
        }
    }
    assert!(world.run_until(Duration::from_secs(2), is_up), "{:?}", world.failures(0));
    world.run(Duration::from_mins(1));
    assert_eq!(world.nodes[1].endpoint.len(), 1);
    assert!(world.ignored(1, Ignored::CookieDemanded) > 19_000);
    world.no_leak(1).unwrap();
}

/// IKE-3: EAP with a wrong password or an unknown user.
#[test]
fn ike_3_eap_refused() {
    for (user, password) in [("joe", "wrong"), ("nobody", "right")] {
        let client = LocalAuth::EapMschapv2 { user: user.to_owned(), password: psk(password) };
        let gateway = RemoteAuth::Psk(psk("a secret"));
        let (client, server, pool) =
            crate::sites::road_warrior((client, gateway), crate::sites::users(&[("joe", "right")]));
        let mut world = world(1, |_, _| ());
        world.configure(0, vec![std::sync::Arc::new(client)], &[]);
        world.configure(1, vec![std::sync::Arc::new(server)], &[pool]);
        attempt(&mut world);
        failed(&world, 0, |failure| {
            matches!(failure, Failure::Eap(_) | Failure::Notified(NotifyType::AUTHENTICATION_FAILED))
        });
        failed(&world, 1, |failure| matches!(failure, Failure::Eap(_)));
        clean(&world);
    }
}
