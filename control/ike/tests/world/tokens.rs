//! Quick crash detection, RFC 6290: whoever lost an IKE SA proves it, and the peer believes nothing less.

use std::time::Duration;

use postern_ike::config::{Connection, Start};
use postern_ike::qcd::TokenMaker;
use postern_ike::report::{CloseReason, Report};

use crate::sim::World;
use crate::sites::{A, B, CONNECTION, is_up, psk, settings, world};

const SECRETS: [&str; 2] = ["what node a keeps through resets", "what node b keeps through resets"];

fn give_tokens(world: &mut World, node: usize) {
    world.nodes[node].endpoint.make_tokens(TokenMaker::new(psk(SECRETS[node])));
}

/// Connected, with tokens of the nodes in `makers`; both begin anew when the peer has closed a child.
fn connected(seed: u64, makers: &[usize], change: fn(&mut Connection, &mut Connection)) -> World {
    let mut world = world(seed, |a, b| {
        for connection in [&mut *a, &mut *b] {
            connection.children[0].on_close = Start::Start;
            connection.dpd = Some(Duration::from_secs(5));
        }
        change(a, b);
    });
    for node in makers {
        give_tokens(&mut world, *node);
    }
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(20), is_up), "{:?}", world.failures(0));
    world.run(Duration::from_secs(1));
    world
}

fn forgotten(world: &World, node: usize) -> usize {
    let closed = |report: &Report| matches!(report, Report::Closed { reason: CloseReason::Forgotten, .. });
    world.nodes[node].reports.iter().filter(|(_, report)| closed(report)).count()
}

/// RST-4, RFC 6290: nothing was saved; the survivor asks after 5 s of silence, is shown the token, and begins anew at once,
/// whichever side had begun. The same after a rekey of the IKE SA by either side, whose token is another.
#[test]
fn rst_4_a_lost_sa_is_proven() {
    for lost in 0..2 {
        for rekeyed_by in [None, Some(0), Some(1)] {
            let mut world = connected(5, &[0, 1], |_, _| {});
            if let Some(node) = rekeyed_by {
                let target = postern_ike::endpoint::Target::Connection(CONNECTION.to_owned());
                world.with(node, |endpoint, now| endpoint.rekey(now, &target).unwrap());
                world.run(Duration::from_secs(2));
                assert!(is_up(&world));
            }
            let survivor = 1 - lost;
            let before = world.established(survivor)[0].id;
            world.restart(lost, settings());
            give_tokens(&mut world, lost);
            world.reconfigure(lost);
            assert!(
                world.run_until(Duration::from_secs(8), |world| is_up(world)
                    && world.established(survivor)[0].id != before),
                "node {lost} lost it, rekeyed by {rekeyed_by:?}"
            );
            assert_eq!(forgotten(&world, survivor), 1);
            world.agree(0, 1).unwrap();
        }
    }
}

/// RFC 6290: another secret, none, or a token of another SA ends nothing; a side that has the SA never shows its token.
#[test]
fn rst_4_tokens_are_not_taken_on_trust() {
    for known in [false, true] {
        let mut world = connected(6, if known { &[0, 1] } else { &[] }, |_, _| {});
        world.restart(0, settings());
        world.nodes[0].endpoint.make_tokens(TokenMaker::new(psk("a secret that was made after the reset")));
        world.run(Duration::from_secs(12));
        assert_eq!((forgotten(&world, 1), world.nodes[1].endpoint.len()), (0, 1), "{known}");
        // Dead peer detection takes what it takes.
        world.run(Duration::from_mins(3));
        assert_eq!(forgotten(&world, 1), 0);
    }
    let mut world = connected(7, &[0, 1], |_, _| {});
    let view = world.established(0)[0].clone();
    let (spi_i, spi_r) = view.spis;
    let sent = world.nodes[1].transmitted;
    // A stranger asks node b about the SA that is there, and about one that is not.
    for (own, expected) in [(spi_r.0, 0), (spi_r.0 ^ 1, 1)] {
        let mut bytes = [spi_i.0.to_be_bytes(), own.to_be_bytes()].concat();
        bytes.extend([46, 0x20, 37, 0x08, 0, 0, 0, 9, 0, 0, 0, 60, 0, 0, 0, 32]);
        bytes.extend([9; 28]);
        let from = "198.51.100.9:500".parse().unwrap();
        world.inject(crate::sim::Datagram { from, to: (B, 500).into(), bytes });
        world.run(Duration::from_millis(100));
        assert_eq!(world.nodes[1].transmitted - sent, expected);
    }
    assert!(is_up(&world) && world.established(0)[0].path.local.ip() == A);
}
