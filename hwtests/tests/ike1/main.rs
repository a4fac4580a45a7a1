//! IKEv1 against unmodified strongSwan, 5.9.8 (ESP in UDP) and 6.0.1 (raw ESP): IKE-2, IKE-5.
//!
//! Each scenario is a function of two parties and says which side begins.

mod deletes;

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::config::ike::{Connection, Credential, Link, Pool, Xauth};
use postern_hwtests::party::Make;
use postern_hwtests::peer::Version;
use postern_hwtests::pki::{Authority, Key};
use postern_hwtests::process::wait_for;
use postern_hwtests::stage::{Stage, host, postern, swan};
use postern_hwtests::traffic::Ping;

const NAME: &str = "one";
const IKE: &str = "aes128-sha256-modp2048";

/// A connection of version 1 in both ends' views.
fn link(stage: &Stage, ike: &str, esp: &str, auth: Option<(Credential, Credential)>) -> Link {
    let plain = stage.link(NAME);
    Link {
        ike: ike.to_owned(),
        esp: esp.to_owned(),
        auth: auth.unwrap_or_else(|| plain.auth.clone()),
        ..plain
    }
}

fn views(link: &Link) -> (Connection, Connection) {
    let (mut left, mut right) = (link.left(), link.right());
    for view in [&mut left, &mut right] {
        view.version = Some(1);
    }
    (left, right)
}

fn load(stage: &Stage, link: &Link) -> Result<()> {
    let (left, right) = views(link);
    stage.left.load(vec![left], vec![])?;
    stage.right.load(vec![right], vec![])
}

fn certificates(stage: &Stage) -> Result<(Credential, Credential)> {
    let dir = stage.topology().dir().join("pki");
    let root = |side: &str| Authority::root(&dir, &format!("{side} root"), Key::Rsa);
    Ok((root("left")?.issue("left.example", Key::Rsa)?, root("right")?.issue("right.example", Key::Rsa)?))
}

/// Suites, groups, PFS and not, shared secrets by name and by address, RSA.
fn negotiates(left: &Make, right: &Make, from_left: bool) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    let by_address = (Credential::psk("192.0.2.1"), Credential::psk("192.0.2.2"));
    for (ike, esp, auth) in [
        (IKE, "aes128gcm16", None),
        ("aes256-sha1-modp2048", "aes256-sha1", None),
        ("aes256-sha384-ecp384", "aes128-sha256-ecp256", None),
        ("aes128-sha512-modp3072", "aes256gcm16-modp2048", None),
        ("aes192-sha256-ecp256", "aes192-sha384-modp3072", Some(by_address)),
        ("aes256-sha256-modp4096", "aes256-sha512-ecp384", None),
        (IKE, "aes128gcm16-ecp256", Some(certificates(&stage)?)),
        ("aes256-sha512-ecp256", "aes128gcm16", Some(certificates(&stage)?)),
    ] {
        let what = format!("{ike} {esp} {}", if auth.is_some() { "other credentials" } else { "" });
        load(&stage, &link(&stage, ike, esp, auth))?;
        stage
            .check(|stage| {
                stage.establish(NAME, from_left)?;
                stage.carry()?;
                stage.close(NAME, from_left)?;
                stage.establish(NAME, from_left)?;
                if let Ok(peer) = stage.right.swan() {
                    ensure!(
                        peer.log_text().contains("received FRAGMENTATION vendor ID"),
                        "it is not announced"
                    );
                }
                stage.close(NAME, !from_left)
            })
            .context(what)?;
    }
    Ok(())
}

/// The child by either side, and a new phase 1 by either side, under counted datagrams.
fn rekeys(left: &Make, right: &Make) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    for esp in ["aes128gcm16", "aes128gcm16-ecp256"] {
        load(&stage, &link(&stage, IKE, esp, None))?;
        stage
            .check(|stage| {
                stage.establish(NAME, true)?;
                stage.carry()?;
                for from_left in [true, false] {
                    stage
                        .without_loss(|| child(stage, from_left))
                        .with_context(|| format!("child {from_left}"))?;
                    stage
                        .without_loss(|| phase_1(stage, from_left))
                        .with_context(|| format!("IKE {from_left}"))?;
                    stage
                        .without_loss(|| child(stage, from_left))
                        .with_context(|| format!("again {from_left}"))?;
                }
                stage.carry()?;
                stage.close(NAME, false)
            })
            .context(esp)?;
    }
    Ok(())
}

fn child(stage: &Stage, from_left: bool) -> Result<()> {
    let before = stage.agreed(NAME)?;
    stage.initiator(from_left).rekey_child(NAME)?;
    stage.agreed_where(NAME, "a new child", |now| now.spi_in != before.spi_in).map(drop)
}

fn phase_1(stage: &Stage, from_left: bool) -> Result<()> {
    let before = stage.agreed(NAME)?;
    stage.initiator(from_left).rekey_ike(NAME)?;
    // The old one is deleted a few seconds later (strongSwan: 10), and takes nothing with it.
    wait_for("the old IKE SA to go", Duration::from_secs(30), || {
        Ok((stage.left.sas()? == 1 && stage.right.sas()? == 1).then_some(()))
    })?;
    stage.agreed_where(NAME, "a new IKE SA", |now| now.ike != before.ike).map(drop)
}

/// A peer that vanishes is found dead by either side.
fn dead_peer(left: &Make, right: &Make) -> Result<()> {
    for left_asks in [true, false] {
        let stage = Stage::pair(left, right)?;
        let (mut near, mut far) = views(&link(&stage, IKE, "aes128gcm16", None));
        if left_asks {
            near.dpd_s = 2;
        } else {
            far.dpd_s = 2;
        }
        stage.left.load(vec![near], vec![])?;
        stage.right.load(vec![far], vec![])?;
        stage.check(|stage| {
            stage.establish(NAME, true)?;
            stage.carry()?;
            // Asked again and again, an idle peer is alive.
            std::thread::sleep(Duration::from_secs(7));
            stage.agreed(NAME)?;
            let cut = if left_asks { "g2" } else { "g1" };
            let outer = stage.topology().ns(cut)?;
            outer.sh("nft add table ip cut")?;
            outer.sh("nft add chain ip cut in { type filter hook input priority 0 ; policy drop ; }")?;
            let asks = if left_asks { &stage.left } else { &stage.right };
            wait_for("the peer to be found dead", Duration::from_secs(25), || {
                Ok((asks.sas()? == 0).then_some(()))
            })
        })?;
    }
    Ok(())
}

/// A client behind a NAT with XAuth and an address of the gateway's pool.
fn road_warrior(client: &Make, gateway: &Make) -> Result<()> {
    let stage = Stage::roam(client, gateway)?;
    let nets = ("dynamic".to_owned(), "10.2.0.0/24".to_owned());
    let auth = (Credential::psk("left.example"), Credential::psk("right.example"));
    let (mut left, mut right) = views(&Link { nets, ..link(&stage, IKE, "aes128gcm16", Some(auth)) });
    left.local.clear();
    left.request_address = vec!["v4"];
    right.remote = None;
    right.pools = vec!["pool".to_owned()];
    right.dns = vec![[10, 2, 0, 53].into()];
    let password = "open sesame".to_owned();
    left.xauth =
        Some(Xauth { user: Some("joe".to_owned()), password: Some(password.clone()), ..Xauth::default() });
    right.xauth = Some(Xauth { users: [("joe".to_owned(), password)].into(), ..Xauth::default() });
    let pool = Pool { name: "pool".to_owned(), range: "10.99.0.10-10.99.0.250".to_owned() };
    stage.right.load(vec![right], vec![pool])?;
    stage.left.load(vec![left.clone()], vec![])?;
    stage.check(|stage| {
        let seen = stage.establish(NAME, true)?;
        ensure!(seen.encap, "no UDP encapsulation behind a NAT: {seen:?}");
        let [address] = seen.addresses.as_slice() else { anyhow::bail!("{seen:?}") };
        let address: IpAddr = address.parse()?;
        ensure!(address.to_string().starts_with("10.99.0."), "assigned {address}");
        let (client, _, host, far) = stage.hosts()?;
        Ping::default().all(client, far)?;
        Ping::default().all(host, address)?;
        stage.tcp()?;
        child(stage, true)?;
        Ping::default().all(client, far)?;
        stage.close(NAME, true)?;
        let again = stage.establish(NAME, true)?;
        ensure!(again.addresses == seen.addresses, "another address the second time: {again:?}");
        stage.close(NAME, true)?;
        if let Some(xauth) = &mut left.xauth {
            xauth.password = Some("guessed".to_owned());
        }
        stage.left.load(vec![left], vec![])?;
        stage.left.initiate(NAME)?;
        std::thread::sleep(Duration::from_secs(1));
        stage.left.quiet()?;
        ensure!(stage.right.state(NAME)?.is_none(), "a wrong password was good enough");
        Ok(())
    })
}

/// Phase 1 in three messages, by shared secret and by RSA, begun by either side; refused where it is not switched on.
fn aggressive(left: &Make, right: &Make) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    for auth in [None, Some(certificates(&stage)?)] {
        let (mut near, mut far) = views(&link(&stage, "aes256-sha256-ecp256", "aes128gcm16", auth));
        for view in [&mut near, &mut far] {
            view.aggressive = Some(true);
        }
        stage.left.load(vec![near.clone()], vec![])?;
        stage.right.load(vec![far.clone()], vec![])?;
        stage.check(|stage| {
            for from_left in [true, false] {
                stage.establish(NAME, from_left)?;
                stage.carry()?;
                stage.close(NAME, from_left)?;
            }
            near.aggressive = None;
            stage.left.load(vec![near], vec![])?;
            stage.right.initiate(NAME)?;
            std::thread::sleep(Duration::from_secs(1));
            ensure!(stage.left.state(NAME)?.is_none() && stage.left.sas()? == 0, "it was switched off");
            stage.right.quiet()
        })?;
    }
    Ok(())
}

/// Runs a scenario with both versions of strongSwan.
fn with_both(scenario: impl Fn(&Make, &Make) -> Result<()>) -> Result<()> {
    for version in Version::ALL {
        scenario(&postern(), &swan(version)).context(version.name())?;
    }
    Ok(())
}

/// IKE-2, IKE-5: as initiator.
#[test]
fn ike_2_initiates() -> Result<()> {
    with_both(|left, right| negotiates(left, right, true))
}

/// IKE-2, IKE-5: as responder.
#[test]
fn ike_2_answers() -> Result<()> {
    with_both(|left, right| negotiates(left, right, false))
}

/// IKE-2: no packet is lost, whoever rekeys.
#[test]
fn ike_2_rekeys() -> Result<()> {
    with_both(rekeys)
}

/// IKE-2, RFC 3706.
#[test]
fn ike_2_dead_peers() -> Result<()> {
    with_both(dead_peer)
}

/// IKE-2: aggressive mode, where both ends switch it on.
#[test]
fn ike_2_aggressive() -> Result<()> {
    for version in Version::ALL {
        let mut peer = postern_hwtests::peer::Options::new(version);
        // What it answers shared secrets with in aggressive mode, and nothing less.
        "i_dont_care_about_security_and_use_aggressive_mode_psk = yes".clone_into(&mut peer.charon);
        aggressive(&postern(), &Make::Swan(peer)).context(version.name())?;
    }
    Ok(())
}

/// IKE-2: XAuth and mode-config behind a NAT, Postern as gateway and as client.
#[test]
fn ike_2_road_warriors() -> Result<()> {
    for version in Version::ALL {
        let peer = postern_hwtests::peer::Options {
            virtual_address: true,
            ..postern_hwtests::peer::Options::new(version)
        };
        road_warrior(&Make::Swan(peer), &postern())
            .with_context(|| format!("{} as client", version.name()))?;
        road_warrior(&host(), &swan(version)).with_context(|| format!("{} as gateway", version.name()))?;
    }
    Ok(())
}

/// Between two of ours everything works as well.
#[test]
fn ike_2_alone() -> Result<()> {
    negotiates(&postern(), &postern(), true)?;
    rekeys(&postern(), &postern())?;
    road_warrior(&host(), &postern())
}

/// The scenarios are right: strongSwan with strongSwan.
#[test]
fn the_scenarios_are_right() -> Result<()> {
    let (left, right): (Make, Make) = (swan(Version::V6), swan(Version::V6));
    negotiates(&left, &right, true)?;
    Ok(())
}
