//! Where the backup is, and when that fails (RST-2, RST-11): a device in place of a directory, no space. And
//! peers that did not hear the Delete of a clean stop (RST-4).

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::config::Recovery;
use postern_hwtests::node::{Node, binary};
use postern_hwtests::party::Make;
use postern_hwtests::peer::Version;
use postern_hwtests::process::{run, wait_for};
use postern_hwtests::stage::{Stage, postern, swan};
use serde_json::Value;

use super::{DARK, NAME, crash_and_restart, views};

fn told(stage: &Stage, how_many: u64) -> Result<Value> {
    let node = stage.left.node()?;
    wait_for("the peer to be told", Duration::from_secs(20), || {
        let report = node.json(&["recover"])?;
        Ok((report.pointer("/burst/told") == Some(&Value::from(how_many))).then_some(report))
    })
}

/// RST-2, RST-5: the backup on a device of its own: the peer is told after each of three resets, and `postern snapshot`
/// reads it.
#[test]
fn rst_2_on_a_device() -> Result<()> {
    let mut make = postern();
    // The directory of the topology is not known yet.
    let device = std::env::temp_dir().join(postern_hwtests::netns::unique_prefix() + "-device");
    let _gone = RemovedAtEnd(device.clone());
    File::create(&device)?.set_len(1 << 20)?;
    if let Make::Postern(config) = &mut make {
        config.recovery =
            Some(Recovery { device: Some(device.display().to_string()), ..Recovery::default() });
    }
    let mut stage = Stage::pair(&make, &swan(Version::V6))?;
    let (near, far) = views(&stage);
    stage.left.load(vec![near], vec![])?;
    stage.right.load(vec![far], vec![])?;
    stage.establish(NAME, false)?;
    let keys = stage.left.node()?.dir().join("state/recovery");
    for _ in 0..3 {
        let before = stage.agreed(NAME)?;
        crash_and_restart(&mut stage, &make, DARK)?;
        stage.check(|stage| {
            let report = told(stage, 1)?;
            ensure!(report.get("problems").and_then(Value::as_array).is_some_and(Vec::is_empty), "{report}");
            stage.agreed_where(NAME, "a new IKE SA", |now| now.ike != before.ike)?;
            stage.carry()?;
            let mut inspect = Command::new(binary("postern")?);
            let shown = run(inspect.args(["snapshot", "inspect", "--json"]).arg(&device))?;
            let shown: Value = serde_json::from_str(&shown)?;
            ensure!(shown.as_array().is_some_and(|files| files.len() == 1), "{shown}");
            let mut verify = Command::new(binary("postern")?);
            let verified =
                run(verify.args(["snapshot", "verify"]).arg(&device).arg("--directory").arg(&keys))?;
            ensure!(verified.contains("1 records would be used"), "{verified}");
            Ok(())
        })?;
    }
    ensure!(!keys.join("backup").exists(), "there is a directory as well");
    Ok(())
}

/// A file that is gone with this value.
struct RemovedAtEnd(PathBuf);

impl Drop for RemovedAtEnd {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A small file system of its own; unmounted with this value.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Result<Self> {
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k,mode=700", "postern-test"]).arg(at))?;
        Ok(Self(at.to_owned()))
    }

    /// Until nothing more fits.
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.0.join("filler"))?;
        while file.write_all(&[0x55; 4096]).is_ok() {}
        Ok(())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("--lazy").arg(&self.0));
    }
}

/// What is wrong with the backup; empty: nothing.
fn problems(node: &Node) -> Result<String> {
    let report = node.json(&["snapshot"])?;
    let all = report.get("problems").and_then(Value::as_array).context("no problems")?;
    Ok(all.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("; "))
}

/// RST-11: with a full file system connections come up and stay; that they are not saved is said; when there is room again
/// they are, without anybody doing anything, and told after the reset that follows.
#[test]
fn rst_11_no_space() -> Result<()> {
    let make = postern();
    let mut stage = Stage::pair(&make, &swan(Version::V6))?;
    // It is to be mounted before control begins.
    let backup = stage.left.node()?.dir().join("state/recovery/backup");
    stage.left.crash()?;
    let small = Small::mount(&backup)?;
    stage.left.node_mut()?.start_control()?;
    let (near, mut far) = views(&stage);
    if let Some(child) = far.child() {
        child.on_close = None;
    }
    stage.left.load(vec![near], vec![])?;
    stage.right.load(vec![far], vec![])?;
    let outcome = (|| {
        // The last page of a file has room: from the start nothing fits.
        stage.left.crash()?;
        small.fill()?;
        stage.left.node_mut()?.start_control()?;
        stage.establish(NAME, false)?;
        stage.carry()?;
        let said = problems(stage.left.node()?)?;
        ensure!(said.contains("cannot be written") && said.contains("No space left on device"), "{said}");
        let shown = stage.left.node()?.cli(&["status"])?;
        ensure!(shown.contains("cannot be written"), "{shown}");
        fs::remove_file(backup.join("filler"))?;
        wait_for("the backup to be written again", Duration::from_secs(12), || {
            Ok(problems(stage.left.node()?)?.is_empty().then_some(()))
        })?;
        let report = stage.left.node()?.json(&["snapshot"])?;
        ensure!(report.pointer("/backup/records") == Some(&Value::from(1)), "{report}");
        crash_and_restart(&mut stage, &make, DARK)?;
        told(&stage, 1)?;
        stage.right.quiet()
    })();
    outcome.with_context(|| stage.report())?;
    // Control ends before its file system goes.
    stage.left.crash()
}

/// RST-4: who does not hear the Delete of a clean stop is told at the next start; who answered is not told again.
#[test]
fn rst_4_a_stop_that_was_not_heard() -> Result<()> {
    let make = postern();
    let mut stage = Stage::pair(&make, &swan(Version::V6))?;
    stage.left.crash()?;
    let node = stage.left.node_mut()?;
    node.add_argument("--stop-datapath");
    node.start_control()?;
    let (near, far) = views(&stage);
    stage.left.load(vec![near], vec![])?;
    let (mut far, dark) = (far, stage.topology().ns("g2")?.name().to_owned());
    if let Some(child) = far.child() {
        child.on_close = None;
    }
    stage.right.load(vec![far], vec![])?;
    let cut = |words: &str| postern_hwtests::netns::Netns::existing(&dark)?.sh(words).map(drop);
    for heard in [true, false] {
        stage.establish(NAME, true)?;
        if !heard {
            cut("nft add table ip cut")?;
            cut("nft add chain ip cut in { type filter hook input priority 0 ; policy drop ; }")?;
        }
        let lines = stage.right.log_text().len();
        let ended = stage.left.node_mut()?.stop_control()?;
        ensure!(ended < Duration::from_secs(3), "stopping took {ended:?}");
        if heard {
            stage.right.quiet()?;
        } else {
            cut("nft delete table ip cut")?;
            ensure!(stage.right.sas()? == 1, "the peer has heard it");
        }
        stage.left.node_mut()?.start_control()?;
        stage.check(|stage| {
            if !heard {
                told(stage, 1)?;
            }
            let report = stage.left.node()?.json(&["recover"])?;
            ensure!(report.pointer("/cause") == Some(&Value::from("stopped")), "{report}");
            ensure!(report.get("burst").is_some() != heard, "heard {heard}: {report}");
            stage.right.quiet()?;
            let log = stage.right.log_text();
            let log = log.get(lines..).unwrap_or_default();
            ensure!(log.matches("received DELETE for IKE_SA").count() == 1, "{log}");
            Ok(())
        })?;
    }
    Ok(())
}
