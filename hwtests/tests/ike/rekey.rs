//! Rekeys by either side, by both at once, and by limits, under traffic of which every datagram is counted.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::impair::{BadNetwork, Impairment};
use postern_hwtests::party::Make;
use postern_hwtests::peer::Version;
use postern_hwtests::stage::{Stage, postern, swan};

/// Child without and with a new key exchange, then the IKE SA, each by the left and by the right side.
pub fn each_side(left: &Make, right: &Make) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    for esp in ["aes128gcm16", "aes256-sha256-ecp256", "aes128gcm16-modp2048"] {
        let mut link = stage.link("rekey");
        esp.clone_into(&mut link.esp);
        stage.load(&link)?;
        stage
            .check(|stage| {
                stage.establish("rekey", true)?;
                stage.carry()?;
                stage.without_loss(|| {
                    for from_left in [true, false] {
                        child(stage, from_left)?;
                        ike(stage, from_left)?;
                        child(stage, from_left)?;
                    }
                    Ok(())
                })?;
                stage.carry()?;
                stage.close("rekey", false)
            })
            .context(esp)?;
    }
    Ok(())
}

/// One rekey of the child.
fn child(stage: &Stage, from_left: bool) -> Result<()> {
    let before = stage.agreed("rekey")?;
    stage.initiator(from_left).rekey_child("rekey")?;
    let what = format!("rekey of the child, from the left: {from_left}");
    let after = stage.agreed_where("rekey", &what, |now| now.spi_in != before.spi_in)?;
    ensure!(after.ike == before.ike, "another IKE SA");
    Ok(())
}

/// One rekey of the IKE SA.
fn ike(stage: &Stage, from_left: bool) -> Result<()> {
    let before = stage.agreed("rekey")?;
    stage.initiator(from_left).rekey_ike("rekey")?;
    let what = format!("rekey of the IKE SA, from the left: {from_left}");
    let after = stage.agreed_where("rekey", &what, |now| now.ike != before.ike)?;
    ensure!(after.spi_in == before.spi_in && after.initiator == from_left, "{before:?} became {after:?}");
    Ok(())
}

/// Both sides at once: the requests cross on a wire of 100 ms.
pub fn both_sides(left: &Make, right: &Make) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    let slow = Impairment { delay: Duration::from_millis(100), ..Impairment::default() };
    let network = BadNetwork::insert(stage.topology().ns("wire")?, "left", "g2", slow)?;
    let mut link = stage.link("rekey");
    "aes128gcm16-x25519".clone_into(&mut link.esp);
    stage.load(&link)?;
    stage.check(|stage| {
        stage.establish("rekey", true)?;
        stage.carry()?;
        for round in 0..3 {
            stage
                .without_loss(|| {
                    let before = stage.agreed("rekey")?;
                    stage.left.rekey_child("rekey")?;
                    stage.right.rekey_child("rekey")?;
                    stage.agreed_where("rekey", "children rekeyed at once", |now| {
                        now.spi_in != before.spi_in
                    })?;
                    Ok(())
                })
                .with_context(|| format!("child, round {round}"))?;
            stage
                .without_loss(|| {
                    let before = stage.agreed("rekey")?;
                    stage.right.rekey_ike("rekey")?;
                    stage.left.rekey_ike("rekey")?;
                    stage.agreed_where("rekey", "IKE SAs rekeyed at once", |now| now.ike != before.ike)?;
                    Ok(())
                })
                .with_context(|| format!("IKE SA, round {round}"))?;
        }
        stage.carry()?;
        stage.close("rekey", true)
    })?;
    network.finish()
}

/// Rekeys by themselves: after so many seconds, and after so many packets.
pub fn by_limits(left: &Make, right: &Make) -> Result<()> {
    let stage = Stage::pair(left, right)?;
    let link = stage.link("rekey");
    stage.right.load(vec![link.right()], vec![])?;
    let limited = |seconds: u32, packets: Option<u64>, ike: u32| {
        let mut connection = link.left();
        (connection.rekey_s, connection.rekey_jitter_s) = (ike, Some(0));
        if let Some(child) = connection.child() {
            (child.rekey_s, child.rekey_packets, child.rekey_jitter_s) = (seconds, packets, Some(0));
            child.life_s = (seconds > 0).then_some(seconds + 60);
        }
        stage.left.load(vec![connection], vec![])
    };
    stage.check(|stage| {
        for (what, seconds, packets, ike) in
            [("seconds", 2, None, 0), ("packets", 0, Some(500), 0), ("IKE SA", 0, None, 2)]
        {
            limited(seconds, packets, ike)?;
            let before = stage.establish("rekey", true)?;
            stage.without_loss(|| {
                stage.agreed_where("rekey", what, |now| {
                    if ike > 0 { now.ike != before.ike } else { now.spi_in != before.spi_in }
                })?;
                Ok(())
            })?;
            stage.close("rekey", true)?;
        }
        Ok(())
    })
}

/// IKE-1: no packet is lost, whoever rekeys.
#[test]
fn ike_1_rekeys_with_strongswan_5() -> Result<()> {
    each_side(&postern(), &swan(Version::V5))
}

/// IKE-1: no packet is lost, whoever rekeys.
#[test]
fn ike_1_rekeys_with_strongswan_6() -> Result<()> {
    each_side(&postern(), &swan(Version::V6))
}

/// IKE-1: simultaneous rekeys (RFC 7296 sections 2.8.1 and 2.8.2, 2.25).
#[test]
fn ike_1_simultaneous_rekeys() -> Result<()> {
    for version in Version::ALL {
        both_sides(&postern(), &swan(version)).context(version.name())?;
    }
    both_sides(&postern(), &postern())
}

/// IKE-1: rekeys ahead of limits.
#[test]
fn ike_1_rekeys_by_limits() -> Result<()> {
    by_limits(&postern(), &swan(Version::V6))
}
