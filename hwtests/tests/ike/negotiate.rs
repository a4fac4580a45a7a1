//! Every authentication, suite and group, begun by either side, with traffic through what came of it.

use anyhow::{Context, Result, ensure};
use postern_hwtests::capture::{Capture, fields};
use postern_hwtests::config::ike::{Connection, Credential, ESP, IKE, Link};
use postern_hwtests::flood::Flood;
use postern_hwtests::packet::mac;
use postern_hwtests::party::{Make, Party};
use postern_hwtests::peer::{Options, Version};
use postern_hwtests::pki::{Authority, Key, Special};
use postern_hwtests::process::wait_for;
use postern_hwtests::stage::{Stage, postern, swan};

use crate::{certificates, chains};

/// Suites and groups of IKE and ESP, with PSK.
const SUITES: [(&str, &str); 9] = [
    ("aes128gcm16-prfsha256-modp2048", "aes128gcm16"),
    ("aes256gcm16-prfsha384-ecp256", "aes256gcm16"),
    ("aes256gcm16-prfsha512-ecp384", "aes192gcm16"),
    ("chacha20poly1305-prfsha256-x25519", "chacha20poly1305"),
    ("aes128-sha256-x25519", "aes128-sha256"),
    ("aes192-sha384-ecp256", "aes192-sha384"),
    ("aes256-sha512-modp2048", "aes256-sha512"),
    ("aes128-sha256-modp3072", "aes128-sha256"),
    ("aes256-sha256-prfsha384-modp4096", "null-sha256"),
];

/// Everything that a pair of ends shall negotiate: name, proposals, credentials.
pub fn cases(stage: &Stage) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    let mut add = |name: &str, ike: &str, esp: &str, auth: Option<(Credential, Credential)>| {
        let mut link = stage.link(name);
        link.auth = auth.unwrap_or(link.auth);
        ike.clone_into(&mut link.ike);
        esp.clone_into(&mut link.esp);
        links.push(link);
    };
    for (ike, esp) in SUITES {
        add(ike, ike, esp, None);
    }
    for (name, key) in
        [("rsa", Key::Rsa), ("ecdsa256", Key::P256), ("ecdsa384", Key::P384), ("ed25519", Key::Ed25519)]
    {
        add(name, IKE, ESP, Some(certificates(stage, name, key)?));
    }
    add("chain", IKE, ESP, Some(chains(stage)?));
    for (name, left, right) in [
        ("address", "192.0.2.1", "192.0.2.2"),
        ("e-mail", "joe@left.example", "moe@right.example"),
        ("dn", "C=CH, O=Postern tests, CN=left", "C=CH, O=Postern tests, CN=right"),
    ] {
        add(name, IKE, ESP, Some((Credential::psk(left), Credential::psk(right))));
    }
    let (left, _) = certificates(stage, "mixed", Key::P256)?;
    add("mixed", IKE, ESP, Some((left, Credential::psk("right.example"))));
    Ok(links)
}

/// One negotiation, the traffic, and its end.
pub fn one(stage: &Stage, link: &Link, from_left: bool) -> Result<()> {
    stage.load(link)?;
    stage.establish(&link.name, from_left)?;
    stage.carry()?;
    stage.close(&link.name, from_left)
}

/// All of them on one stage.
pub fn all(left: &Make, right: &Make, from_left: bool) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    let (mut failed, links) = (Vec::new(), cases(&stage)?);
    for link in &links {
        let start = std::time::Instant::now();
        let outcome = stage.check(|stage| one(stage, link, from_left));
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("{word:7} {:5.2} s  {}", start.elapsed().as_secs_f64(), link.name);
        if let Err(error) = outcome {
            eprintln!("{}: {error:?}", link.name);
            failed.push(link.name.as_str());
            // The next case is another matter.
            for party in [&stage.left, &stage.right] {
                let _ = party.terminate(&link.name);
                let _ = party.quiet();
            }
        }
    }
    ensure!(failed.is_empty(), "{} of {} failed: {}", failed.len(), links.len(), failed.join(", "));
    Ok(())
}

/// IKE-2, IKE-3, IKE-4.
#[test]
fn ike_4_initiates_to_strongswan_5() -> Result<()> {
    all(&postern(), &swan(Version::V5), true)
}

/// IKE-2, IKE-3, IKE-4.
#[test]
fn ike_4_answers_strongswan_5() -> Result<()> {
    all(&postern(), &swan(Version::V5), false)
}

/// IKE-2, IKE-3, IKE-4.
#[test]
fn ike_4_initiates_to_strongswan_6() -> Result<()> {
    all(&postern(), &swan(Version::V6), true)
}

/// IKE-2, IKE-3, IKE-4.
#[test]
fn ike_4_answers_strongswan_6() -> Result<()> {
    all(&postern(), &swan(Version::V6), false)
}

/// IKE-4: X25519 with ML-KEM-768 (RFC 9370). Debian's strongSwan 6.0.1 is built without ML-KEM (neither its plugin `ml`
/// nor one by OpenSSL), so two Posterns agree on it; should a later build have it, this says so.
#[test]
fn ike_4_ml_kem() -> Result<()> {
    let stage = Stage::pair(&postern(), &swan(Version::V6))?;
    let algorithms = stage.right.swan()?.swanctl(&["--list-algs"])?;
    ensure!(!algorithms.contains("ML_KEM_768"), "this strongSwan has ML-KEM: test with it");
    drop(stage);
    let stage = Stage::pair(&postern(), &postern())?;
    let mut link = stage.link("hybrid");
    "aes256gcm16-prfsha384-x25519-ke1_mlkem768".clone_into(&mut link.ike);
    stage.check(|stage| {
        one(stage, &link, true)?;
        one(stage, &link, false)
    })
}

/// IKE_AUTH with chains too big for one packet goes in fragments of IKE (RFC 7383), not of IP.
pub fn fragmented(left: &Make, right: &Make) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    let dir = stage.topology().dir().join("pki");
    let big = |side: &str| {
        let root = Authority::root(&dir, &format!("big {side} root"), Key::Rsa)?;
        let middle = root.intermediate(&format!("big {side} middle"), Key::Rsa)?;
        let special = Special { names: 60, ..Special::default() };
        middle.issue_special(&format!("{side}.example"), Key::Rsa, special)
    };
    let mut link = stage.link("big");
    link.auth = (big("left")?, big("right")?);
    stage.check(|stage| {
        for from_left in [true, false] {
            let file = dir.join(format!("fragments-{from_left}.pcap"));
            let capture = Capture::start(stage.topology().ns("wire")?, "left", "ip", &file)?;
            one(stage, &link, from_left)?;
            let file = capture.finish()?;
            let fragments = fields(&file, "isakmp.frag.number", &["ip.src", "ip.len"])?;
            for source in ["192.0.2.1", "192.0.2.2"] {
                let count = fragments.iter().filter(|row| row.first().is_some_and(|ip| ip == source)).count();
                ensure!(count >= 3, "only {count} fragments from {source}");
            }
            let split = fields(&file, "ip.flags.mf == 1 && udp", &["ip.src"])?;
            ensure!(split.is_empty(), "{} packets were fragmented by IP", split.len());
        }
        Ok(())
    })
}

/// IKE-6: fragments both ways.
#[test]
fn ike_6_fragments() -> Result<()> {
    for version in Version::ALL {
        fragmented(&postern(), &swan(version)).context(version.name())?;
    }
    Ok(())
}

/// The left end answers the right end's cookie challenge.
pub fn challenged(left: &Make, right: &Make) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    let link = stage.link("cookie");
    stage.left.load(vec![link.left()], vec![])?;
    // The right end answers anyone.
    stage.right.load(vec![Connection { remote: None, ..link.right() }], vec![])?;
    stage.topology().ns("g2")?.sh("ip route add 198.18.0.0/15 via 192.0.2.1")?;
    let wire = stage.topology().ns("wire")?;
    let file = stage.topology().dir().join("cookie.pcap");
    stage.check(|stage| {
        // Half-open IKE SAs of addresses that never answer are what makes the right end ask for cookies.
        let target = mac(stage.topology().ns("g2")?, "outside")?;
        let flood = Flood::start(wire, "left", [192, 0, 2, 2].into(), target, 200)?;
        std::thread::sleep(std::time::Duration::from_millis(300));
        flood.finish()?;
        let capture = Capture::start(wire, "left", "udp port 500 and host 192.0.2.1", &file)?;
        stage.left.initiate("cookie")?;
        wait_for("the connection", postern_hwtests::party::SETTLE, || stage.left.state("cookie"))?;
        stage.carry()?;
        let cookies = fields(&capture.finish()?, "isakmp.notify.msgtype == 16390", &["ip.src"])?;
        let from = |ip: &str| cookies.iter().any(|row| row.first().is_some_and(|source| source.contains(ip)));
        ensure!(from("192.0.2.2") && from("192.0.2.1"), "no challenge was answered: {cookies:?}");
        Ok(())
    })
}

/// strongSwan that wants a cookie from the second half-open IKE SA on.
pub fn wary_swan(version: Version) -> Make {
    let charon = "cookie_threshold = 1".to_owned();
    Make::Swan(Options { charon, ..Options::new(version) })
}

/// Postern that wants a cookie from the second half-open IKE SA on.
fn wary_postern() -> Make {
    let mut make = postern();
    if let Make::Postern(config) = &mut make
        && let Some(ike) = &mut config.ike
    {
        ike.cookie_threshold = Some(1);
    }
    make
}

/// IKE-6: cookies (RFC 7296 section 2.6), asked for by strongSwan and by Postern.
#[test]
fn ike_6_cookies() -> Result<()> {
    for version in Version::ALL {
        challenged(&postern(), &wary_swan(version)).context(version.name())?;
        challenged(&swan(version), &wary_postern()).context(version.name())?;
    }
    Ok(())
}

/// A second connection beside the first, and both ends' state when it is refused, are in `bad`; here: the same peer
/// twice replaces its old IKE SA.
#[test]
fn ike_1_initial_contact_replaces() -> Result<()> {
    for version in Version::ALL {
        let stage = Stage::pair(&postern(), &swan(version))?;
        let link = stage.link("again");
        stage.load(&link)?;
        stage.check(|stage| {
            let first = stage.establish("again", false)?;
            // strongSwan forgets it without a word.
            let Party::Swan(peer) = &stage.right else { return Ok(()) };
            peer.forget("again")?;
            stage.right.quiet()?;
            stage.right.initiate("again")?;
            let second = stage.agreed("again")?;
            ensure!(first.ike != second.ike, "the old IKE SA is still there");
            stage.carry()
        })?;
    }
    Ok(())
}
