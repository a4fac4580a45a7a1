//! IKEv2 against unmodified strongSwan, 5.9.8 (ESP in UDP) and 6.0.1 (raw ESP): IKE-1 to IKE-6, MOB-1.
//!
//! Each scenario is a function of two parties. `alone` plays some with strongSwan at both ends: what fails there is the
//! scenario's fault.

mod alone;
mod bad;
mod hard;
mod keylog;
mod more;
mod negotiate;
mod rekey;
mod roam;
mod secrets;

use anyhow::Result;
use postern_hwtests::config::ike::Credential;
use postern_hwtests::pki::{Authority, Key};
use postern_hwtests::stage::Stage;

/// Certificates of both ends from two roots, so that neither end could know the other's by its own.
fn certificates(stage: &Stage, name: &str, key: Key) -> Result<(Credential, Credential)> {
    let dir = stage.topology().dir().join("pki");
    let root = |side: &str| Authority::root(&dir, &format!("{name} {side} root"), key);
    Ok((root("left")?.issue("left.example", key)?, root("right")?.issue("right.example", key)?))
}

/// The same with two intermediate CAs of other kinds of keys in between.
fn chains(stage: &Stage) -> Result<(Credential, Credential)> {
    let dir = stage.topology().dir().join("pki");
    let chain = |side: &str| {
        let root = Authority::root(&dir, &format!("chain {side} root"), Key::Rsa)?;
        let middle = root.intermediate(&format!("chain {side} middle"), Key::P384)?;
        middle
            .intermediate(&format!("chain {side} low"), Key::P256)?
            .issue(&format!("{side}.example"), Key::Rsa)
    };
    Ok((chain("left")?, chain("right")?))
}
