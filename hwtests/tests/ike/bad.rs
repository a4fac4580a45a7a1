//! Peers that are wrongly configured, and datagrams that nobody should send: each gets the RFC's answer or none, a reason
//! that a person can act on, and a counter; and the next one who does it right gets in.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::capture::{Capture, frames};
use postern_hwtests::config::ike::{Connection, Link};
use postern_hwtests::impair::Lottery;
use postern_hwtests::node::Node;
use postern_hwtests::packet::{ETHERNET, is_ike, outer_header, send_datagram};
use postern_hwtests::peer::Version;
use postern_hwtests::pki::{Authority, Key, Special, certificate_of};
use postern_hwtests::process::wait_for;
use postern_hwtests::stage::{Stage, postern, swan};
use postern_hwtests::tap::Tap;

use crate::certificates;

/// A misconfiguration: views of Postern and of strongSwan, and what Postern has to say as initiator and as responder.
struct Bad {
    name: &'static str,
    views: (Connection, Connection),
    said: (&'static str, &'static str),
    /// The IKE SA comes up nevertheless, without a child.
    childless: bool,
}

fn bad_ones(stage: &Stage) -> Result<Vec<Bad>> {
    let mut all = Vec::new();
    let plain = stage.link("bad");
    let mut add = |name, views, said| all.push(Bad { name, views, said, childless: false });
    let views = |link: &Link| (link.left(), link.right());

    let (left, mut right) = views(&plain);
    right.local_auth.secret = Some("another secret".to_owned());
    right.remote_auth.secret = Some("another secret".to_owned());
    add("wrong secret", (left, right), ("AUTHENTICATION_FAILED", "same shared secret"));

    let (left, mut right) = views(&plain);
    right.local_auth.id = Some("wrong.example".to_owned());
    add("wrong identity", (left, right), ("AUTHENTICATION_FAILED", "wrong.example"));

    let (left, mut right) = views(&plain);
    right.proposals = vec!["aes256-sha512-modp4096".to_owned()];
    add("no common IKE proposal", (left, right), ("NO_PROPOSAL_CHOSEN", "no common proposal"));

    let dir = stage.topology().dir().join("pki");
    let mut link = plain.clone();
    let (ours, theirs) = certificates(stage, "good", Key::P256)?;
    link.auth = (ours, theirs);
    let root = Authority::root(&dir, "bad root", Key::P256)?;
    let expired = Special { expired: true, ..Special::default() };
    let old = Authority::root(&dir, "old root", Key::P256)?;
    link.auth.1 = old.issue_special("right.example", Key::P256, expired)?;
    add("expired certificate", views(&link), ("expired", "expired"));

    link.auth.1 = root.issue("right.example", Key::P256)?;
    let (mut left, right) = views(&link);
    let revoked = certificate_of(&link.auth.1).context("no certificate")?;
    left.remote_auth.crl = vec![root.crl(&[revoked])?];
    add("revoked certificate", (left, right), ("revoked", "revoked"));

    let (mut left, right) = views(&link);
    left.remote_auth.ca = vec![Authority::root(&dir, "other root", Key::P256)?.certificate().to_owned()];
    add("unknown CA", (left, right), ("bad root", "bad root"));

    let mut other = link.clone();
    other.auth.1 = root.issue("other.example", Key::P256)?;
    let (left, mut right) = views(&other);
    let mut left = left;
    left.remote_auth.id = Some("right.example".to_owned());
    right.local_auth.id = Some("other.example".to_owned());
    add("another's certificate", (left, right), ("AUTHENTICATION_FAILED", "other.example"));

    let mut add = |name, views, said| all.push(Bad { name, views, said, childless: true });
    let (left, mut right) = views(&plain);
    if let Some(child) = right.child() {
        child.esp = vec!["aes256-sha512".to_owned()];
    }
    add("no common ESP proposal", (left, right), ("NO_PROPOSAL_CHOSEN", "no common proposal"));

    let (left, mut right) = views(&plain);
    if let Some(child) = right.child() {
        child.local_net = vec!["10.9.0.0/24".to_owned()];
        child.remote_net = vec!["10.8.0.0/24".to_owned()];
    }
    add("unacceptable selectors", (left, right), ("TS_UNACCEPTABLE", "traffic selectors"));
    Ok(all)
}

fn misconfigured(version: Version) -> Result<()> {
    let stage = Stage::pair(&postern(), &swan(version))?;
    let (mut failed, good) = (Vec::new(), stage.link("bad"));
    for bad in bad_ones(&stage)? {
        for from_left in [true, false] {
            let outcome = stage.check(|stage| one(stage, &bad, from_left));
            println!(
                "{} {}, from the left: {from_left}",
                if outcome.is_ok() { "ok    " } else { "FAILED" },
                bad.name
            );
            if let Err(error) = outcome {
                eprintln!("{}: {error:?}", bad.name);
                failed.push(bad.name);
            }
            for party in [&stage.left, &stage.right] {
                let _ = party.terminate("bad");
                party.quiet()?;
            }
        }
    }
    ensure!(failed.is_empty(), "{failed:?}");
    stage.load(&good)?;
    stage.check(|stage| {
        stage.establish("bad", true)?;
        stage.carry()
    })
}

fn one(stage: &Stage, bad: &Bad, from_left: bool) -> Result<()> {
    let node = stage.left.node()?;
    let (counter, said) = match (bad.childless, from_left) {
        (false, true) => ("failed", bad.said.0),
        (false, false) => ("failed", bad.said.1),
        (true, true) => ("children_failed", bad.said.0),
        (true, false) => ("children_failed", bad.said.1),
    };
    let (before, logged) = (node.ike_counter(counter)?, node.log().len());
    stage.left.load(vec![bad.views.0.clone()], vec![])?;
    stage.right.load(vec![bad.views.1.clone()], vec![])?;
    stage.initiator(from_left).initiate("bad")?;
    wait_for(&format!("counter {counter}"), Duration::from_secs(5), || {
        Ok((node.ike_counter(counter)? > before).then_some(()))
    })?;
    let log = node.log();
    let log = log.get(logged..).unwrap_or_default();
    ensure!(log.contains(said), "the log does not say {said:?}:\n{log}");
    ensure!(!log.contains("secret\"") && !log.contains("another secret"), "a secret is in the log");
    let explained = node.cli(&["explain", "bad"])?;
    ensure!(explained.contains(said) || !from_left, "explain does not say {said:?}:\n{explained}");
    std::thread::sleep(Duration::from_millis(100));
    if bad.childless {
        ensure!(stage.left.state("bad")?.is_none(), "a child came up");
    } else {
        ensure!(stage.left.sas()? == 0, "an IKE SA is left");
    }
    Ok(())
}

/// IKE-8: misconfigured peers, 5.9.8.
#[test]
fn ike_8_bad_peers_5() -> Result<()> {
    misconfigured(Version::V5)
}

/// IKE-8: misconfigured peers, 6.0.1.
#[test]
fn ike_8_bad_peers_6() -> Result<()> {
    misconfigured(Version::V6)
}

const POSTERN: (IpAddr, u16) = (IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), 500);
const STRANGER: (IpAddr, u16) = (IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2)), 40_000);

/// Sums of the counters whose labels these are.
fn count(node: &Node, labels: &[&str]) -> Result<u64> {
    labels.iter().map(|label| node.ike_counter(&format!("ignored_{label}"))).sum()
}

/// IKE-8: datagrams that no IKE implementation sends, and old ones sent again.
#[test]
fn ike_8_bad_datagrams() -> Result<()> {
    let stage = Stage::pair(&postern(), &swan(Version::V6))?;
    let link = stage.link("bad");
    stage.load(&link)?;
    stage.check(|stage| {
        let (node, wire) = (stage.left.node()?, stage.topology().ns("wire")?);
        let file = stage.topology().dir().join("bad.pcap");
        let capture = Capture::start(wire, "left", "udp port 500 or udp port 4500", &file)?;
        let first = stage.establish("bad", false)?;
        stage.right.rekey_child("bad")?;
        let settled = stage.agreed_where("bad", "a rekey", |now| now.spi_in != first.spi_in)?;
        let file = capture.finish()?;

        let mut random = Lottery::new(3);
        let mut noise =
            |length: usize| -> Vec<u8> { (0..length).map(|_| random.draw().to_le_bytes()[0]).collect() };
        let header = |version: u8, exchange: u8, flags: u8, length: u32| {
            let mut bytes = vec![7; 8];
            bytes.extend([0; 8]);
            bytes.extend([33, version, exchange, flags, 0, 0, 0, 0]);
            bytes.extend(length.to_be_bytes());
            bytes
        };
        // Without a payload: nothing is wrong with it but what it asks.
        let empty = |exchange: u8| {
            let mut bytes = header(0x20, exchange, 8, 28);
            bytes[16] = 0;
            bytes
        };
        // An SA payload with 255 proposals without transforms, and one that says to be longer than the message.
        let mut crowded = header(0x20, 34, 8, 28 + 4 + 255 * 8);
        crowded.extend([0, 0]);
        crowded.extend((4 + 255 * 8_u16).to_be_bytes());
        for number in 1..=255 {
            crowded.extend([if number == 255 { 0 } else { 2 }, 0, 0, 8, number, 1, 0, 0]);
        }
        let mut lying = header(0x20, 34, 8, 28 + 8);
        lying.extend([0, 0, 0xff, 0xff, 0, 0, 0, 0]);
        let cases: [(&str, Vec<u8>, &[&str]); 9] = [
            ("truncated header", header(0x20, 34, 8, 28)[..20].to_vec(), &["truncated"]),
            ("a length that lies", header(0x20, 34, 8, 2000), &["truncated"]),
            ("another version", header(0x30, 34, 8, 28), &["version"]),
            ("an unknown exchange", empty(99), &["exchange", "unknown_spi"]),
            ("a request within no SA", empty(37), &["unknown_spi", "exchange"]),
            ("a first payload that is not there", header(0x20, 37, 8, 28), &["truncated", "syntax"]),
            ("a payload that lies", lying, &["truncated", "syntax"]),
            ("255 proposals", crowded, &["syntax", "oversized", "legality", "no_connection"]),
            ("noise", noise(400), &["truncated", "version", "unknown_spi", "exchange"]),
        ];
        let g2 = stage.topology().ns("g2")?;
        for (name, bytes, labels) in &cases {
            let before = count(node, labels)?;
            send_datagram(g2, STRANGER, POSTERN, bytes)?;
            wait_for(&format!("{name}: one of {labels:?}"), Duration::from_secs(2), || {
                Ok((count(node, labels)? > before).then_some(()))
            })?;
        }

        // What strongSwan sent before, again, and with another message ID, and with one bit turned over.
        let tap = Tap::plug(wire, "tap-bad", "left")?;
        let all = frames(&file)?;
        let from_peer = |frame: &&Vec<u8>| {
            let header = outer_header(frame.get(ETHERNET..).unwrap_or_default());
            is_ike(frame) && header.is_some_and(|header| header.source == STRANGER.0)
        };
        let sent: Vec<_> = all.iter().filter(from_peer).collect();
        ensure!(sent.len() >= 4, "strongSwan sent {} messages only", sent.len());
        let labels = ["duplicate", "message_id", "integrity", "unknown_spi", "exchange", "busy", "flags"];
        let before = count(node, &labels)?;
        for frame in &sent {
            tap.send(frame)?;
            for at in [frame.len() - 1, ETHERNET + 28 + 23] {
                let mut changed = (*frame).clone();
                changed[at] ^= 1;
                tap.send(&changed)?;
            }
        }
        std::thread::sleep(Duration::from_millis(300));
        ensure!(count(node, &labels)? > before, "no counter tells of old messages");
        // The segment has learned from the forged frames that strongSwan is behind the tap.
        drop(tap);
        // Nothing of this mattered.
        ensure!(stage.agreed("bad")? == settled, "an old or forged message changed something");
        stage.carry()?;
        stage.right.rekey_ike("bad")?;
        stage.agreed_where("bad", "a rekey after all that", |now| now.ike != settled.ike)?;
        stage.carry()
    })
}
