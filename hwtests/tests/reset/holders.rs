//! An operator's first steps with each holder of the private half (RST-3), and then a reset: the peer is told.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::config::Recovery;
use postern_hwtests::node::{binary, write_private};
use postern_hwtests::party::Make;
use postern_hwtests::peer::Version;
use postern_hwtests::process::{Background, run, wait_for};
use postern_hwtests::stage::{Stage, postern, swan};
use serde_json::Value;

use super::{DARK, NAME, crash_and_restart, views};

/// `postern key …` on the keys of the left party.
fn key(stage: &Stage, words: &[&str]) -> Result<String> {
    let keys = stage.left.node()?.dir().join("state/recovery");
    run(Command::new(binary("postern")?).args(words).arg("--directory").arg(keys))
}

/// The left party loses its power, and its peer is told or not; gives the report.
fn reset(stage: &mut Stage, make: &Make, told: bool) -> Result<Value> {
    let before = stage.agreed(NAME)?;
    crash_and_restart(stage, make, DARK)?;
    stage.check(|stage| {
        let node = stage.left.node()?;
        if !told {
            let report = node.json(&["recover"])?;
            ensure!(report.get("burst").is_none(), "{report}");
            return Ok(report);
        }
        let report = wait_for("the peer to be told", Duration::from_secs(20), || {
            let report = node.json(&["recover"])?;
            Ok((report.pointer("/burst/told") == Some(&Value::from(1))).then_some(report))
        })?;
        let problems = report.get("problems").and_then(Value::as_array).is_some_and(Vec::is_empty);
        ensure!(problems, "{report}");
        stage.agreed_where(NAME, "a new IKE SA", |now| now.ike != before.ike)?;
        stage.carry()?;
        Ok(report)
    })
}

fn connected(make: &Make) -> Result<Stage> {
    let stage = Stage::pair(make, &swan(Version::V6))?;
    let (near, far) = views(&stage);
    stage.left.load(vec![near], vec![])?;
    stage.right.load(vec![far], vec![])?;
    stage.establish(NAME, false)?;
    Ok(stage)
}

/// The left party's configuration from its next start on.
fn configure(stage: &Stage, make: &Make, recovery: Recovery) -> Result<()> {
    let Make::Postern(base) = make else { anyhow::bail!("not Postern") };
    let (near, _) = views(stage);
    let mut config = base.as_ref().clone();
    config.recovery = Some(recovery);
    config.connections = vec![near];
    stage.left.node()?.configure(config)
}

/// RST-3: made in the clear at the first start, put under a passphrase, rotated; then the reset. Without the passphrase
/// nobody is told, and that is said.
#[test]
fn rst_3_a_passphrase() -> Result<()> {
    let make = postern();
    let mut stage = connected(&make)?;
    let words = stage.left.node()?.dir().join("passphrase");
    let shown = words.display().to_string();
    write_private(&words, "correct horse battery staple\n")?;
    let said = key(&stage, &["key", "seal", "--with-passphrase-file", &shown])?;
    ensure!(said.contains("sealed with a passphrase"), "{said}");

    let before = stage.agreed(NAME)?;
    crash_and_restart(&mut stage, &make, DARK)?;
    stage.check(|stage| {
        let report = stage.left.node()?.json(&["recover"])?;
        let problems = report.get("problems").map(Value::to_string).unwrap_or_default();
        ensure!(problems.contains("sealed with a passphrase, and none is given"), "{report}");
        ensure!(report.get("burst").is_none() && stage.right.sas()? == 1, "{report}");
        Ok(())
    })?;
    // The backup waits for a start that can read it.
    configure(&stage, &make, Recovery { passphrase_file: Some(shown.clone()), ..Recovery::default() })?;
    crash_and_restart(&mut stage, &make, DARK)?;
    stage.check(|stage| stage.agreed_where(NAME, "a new IKE SA", |now| now.ike != before.ike))?;
    reset(&mut stage, &make, true)?;

    // New keys are for the next start; what is there is still for the old ones.
    let said = key(&stage, &["key", "rotate", "--passphrase-file", &shown])?;
    ensure!(said.contains("from its next start on"), "{said}");
    reset(&mut stage, &make, true)?;
    reset(&mut stage, &make, true)?;
    Ok(())
}

/// RST-3: a credential, as systemd passes it; there is no file with the private half.
#[test]
fn rst_3_a_credential() -> Result<()> {
    let make = postern();
    let mut stage = connected(&make)?;
    let directory = stage.left.node()?.dir().join("credentials");
    fs::create_dir(&directory)?;
    fs::rename(
        stage.left.node()?.dir().join("state/recovery/private.key"),
        directory.join("postern-backup"),
    )?;
    stage.left.node_mut()?.set_variable("CREDENTIALS_DIRECTORY", &directory.display().to_string());
    configure(
        &stage,
        &make,
        Recovery { credential: Some("postern-backup".to_owned()), ..Recovery::default() },
    )?;
    reset(&mut stage, &make, true)?;
    reset(&mut stage, &make, true)?;
    ensure!(!stage.left.node()?.dir().join("state/recovery/private.key").exists());
    Ok(())
}

/// RST-3, RST-11: a TPM seals the private half and counts generations; an older backup that is put back is refused.
#[test]
fn rst_3_a_tpm() -> Result<()> {
    let make = postern();
    let mut stage = connected(&make)?;
    let dir = stage.left.node()?.dir().join("tpm");
    fs::create_dir(&dir)?;
    let Some((_tpm, tcti)) = software_tpm(&dir)? else { return Ok(()) };
    let said = key(&stage, &["key", "seal", "--tpm2", "--pcrs", "sha256:7", "--tcti", &tcti])?;
    ensure!(said.contains("sealed by the TPM to PCRs sha256:7"), "{said}");
    let recovery = Recovery { tcti: Some(tcti), tpm_counter: Some(true), ..Recovery::default() };
    // A backup that was written without the counter is not believed with it: from one to the other by a clean start.
    configure(&stage, &make, recovery)?;
    let report = reset(&mut stage, &make, false)?;
    let problems = report.get("problems").map(Value::to_string).unwrap_or_default();
    ensure!(problems.contains("written without the counter"), "{report}");
    // By its first message (INITIAL_CONTACT) the peer knows that the IKE SA before is gone.
    stage.establish(NAME, true)?;
    reset(&mut stage, &make, true)?;
    // A TPM takes its time, and nobody waits for it before the peers are told.
    wait_for("the backup to be guarded", Duration::from_secs(5), || {
        let report = stage.left.node()?.json(&["recover"])?;
        Ok((report.pointer("/backup/protected") == Some(&Value::Bool(true))).then_some(()))
    })?;

    // Put back from before a reset.
    let backup = stage.left.node()?.dir().join("state/recovery/backup");
    let kept = stage.left.node()?.dir().join("kept");
    run(Command::new("cp").arg("-a").args([&backup, &kept]))?;
    reset(&mut stage, &make, true)?;
    stage.left.crash()?;
    fs::remove_dir_all(&backup)?;
    fs::rename(&kept, &backup)?;
    stage.left.node_mut()?.start_control()?;
    stage.check(|stage| {
        let report = stage.left.node()?.json(&["recover"])?;
        ensure!(report.get("burst").is_none(), "{report}");
        let problems = report.get("problems").map(Value::to_string).unwrap_or_default();
        ensure!(problems.contains("rolled back"), "{report}");
        Ok(())
    })
}

/// A software TPM with its state and sockets in `dir`; `None` where it is not installed, which `hwtests/setup` changes.
fn software_tpm(dir: &Path) -> Result<Option<(Background, String)>> {
    let missing = |program: &str| {
        let started =
            Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        started.is_err()
    };
    if missing("swtpm") || missing("tpm2_getcap") {
        println!("not checked: swtpm or tpm2-tools are not installed");
        return Ok(None);
    }
    let at = |name: &str| dir.join(name).display().to_string();
    let mut command = Command::new("swtpm");
    command
        .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
        .args(["--tpmstate", &format!("dir={}", dir.display())])
        .args(["--server", &format!("type=unixio,path={}", at("tpm"))])
        .args(["--ctrl", &format!("type=unixio,path={}", at("tpm.ctrl"))]);
    let tpm = Background::start(&mut command, &dir.join("log"))?;
    wait_for("the software TPM", Duration::from_secs(5), || Ok(dir.join("tpm.ctrl").exists().then_some(())))
        .with_context(|| fs::read_to_string(dir.join("log")).unwrap_or_default())?;
    Ok(Some((tpm, format!("swtpm:path={}", at("tpm")))))
}
