//! OPS-4: where keys are not: in core files, in logs, and in memory once their SA is gone.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::memory;
use postern_hwtests::oracle::hex;
use postern_hwtests::party::Make;
use postern_hwtests::peer::{Options, Peer, Version};
use postern_hwtests::process::{Background, is_alive, signal, wait_for};
use postern_hwtests::stage::{Stage, postern, swan};
use rustix::process::Signal;

/// What a shell is to do so that whatever can be dumped is.
fn permit(cores: &Path) -> String {
    format!("ulimit -c unlimited && cd {}", cores.display())
}

/// Files with the beginning of a core file: an ELF header of type `ET_CORE`.
fn core_files(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in memory::files(dir)? {
        let bytes = std::fs::read(&file)?;
        if bytes.starts_with(b"\x7fELF") && bytes.get(16..18) == Some(&[4, 0]) {
            found.push(file.display().to_string());
        }
    }
    Ok(found)
}

/// OPS-4: neither process leaves a core file, though the limit and the directory permit one, which the same signal to
/// another program shows.
#[test]
fn ops_4_no_core_file() -> Result<()> {
    let mut stage = Stage::pair(&postern(), &swan(Version::V6))?;
    let link = stage.link("core");
    stage.load(&link)?;
    let dir = stage.topology().dir().join("cores");
    std::fs::create_dir_all(&dir)?;

    // What is to be seen can be seen here.
    let mut other = stage.topology().ns("g1")?.command("sh");
    other.args(["-c", &format!("{} && exec sleep 60", permit(&dir))]);
    let mut other = Background::start(&mut other, &dir.join("log"))?;
    std::thread::sleep(Duration::from_millis(300));
    let status = other.crash(Signal::SEGV, Duration::from_secs(5))?;
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern")?;
    ensure!(status.core_dumped(), "not even another program dumps core ({status}, {})", pattern.trim());
    // A pattern with a path or a pipe puts them elsewhere; then only the processes' own ends can tell.
    if !pattern.starts_with(['/', '|']) {
        ensure!(core_files(&dir)?.len() == 1, "no core file of another program is in {}", dir.display());
    }
    for file in core_files(&dir)? {
        std::fs::remove_file(file)?;
    }

    for with in [Signal::SEGV, Signal::ABORT] {
        let node = stage.left.node_mut()?;
        // The second time it is gone already, and has perhaps started another datapath before.
        let _ = node.kill_control();
        if let Ok(datapath) = node.datapath_pid() {
            signal(datapath, Signal::KILL);
            wait_for("the end of the datapath", Duration::from_secs(5), || {
                Ok((!is_alive(datapath)).then_some(()))
            })?;
        }
        node.launch_control_after(&permit(&dir))?;
        wait_for("control", Duration::from_secs(10), || Ok(stage.left.sas().ok().map(drop)))?;
        stage.right.load(vec![link.right()], vec![])?;
        stage.left.initiate("core")?;
        stage.agreed("core").with_context(|| stage.report())?;
        stage.carry()?;
        let node = stage.left.node_mut()?;
        let (datapath, logged) = (node.datapath_pid()?, node.log().len());
        let said = wait_for("the end of the datapath in the log", Duration::from_secs(5), || {
            // Rust's own handler of SIGSEGV lets the first one pass.
            signal(datapath, with);
            let log = node.log();
            let new = log.get(logged..).unwrap_or_default();
            Ok(new.lines().find(|line| line.contains("the datapath ended")).map(str::to_owned))
        })?;
        ensure!(said.contains("signal: "), "the datapath ended in another way: {said}");
        ensure!(!said.contains("core dumped"), "the datapath dumped its memory: {said}");
        let status = node.crash_control(with)?;
        ensure!(status.signal().is_some() && !status.core_dumped(), "control ended with {status}");
        let found = core_files(stage.topology().dir())?;
        ensure!(found.is_empty(), "core files: {found:?}");
    }
    Ok(())
}

/// What strongSwan logged of the newest IKE SA and of its newest child, in pieces as long as the shortest key.
fn secrets(peer: &Peer, names: &[&'static str]) -> Result<Vec<(String, Vec<u8>)>> {
    let piece = |name: &&str| {
        let bytes = peer.logged(name)?;
        Ok(((*name).to_owned(), bytes.get(..16).unwrap_or(&bytes).to_vec()))
    };
    names.iter().map(piece).collect()
}

const OF_IKE: [&str; 7] = [
    "Sk_d secret",
    "Sk_ai secret",
    "Sk_ar secret",
    "Sk_ei secret",
    "Sk_er secret",
    "Sk_pi secret",
    "Sk_pr secret",
];
const OF_CHILD: [&str; 2] = ["encryption initiator key", "encryption responder key"];

/// OPS-4: keys of SAs that are gone are in no memory, and no key is in a log or in any file of Postern's.
#[test]
fn ops_4_keys_end_with_their_sas() -> Result<()> {
    let loud = Make::Swan(Options { log: "ike = 4\n      chd = 4".to_owned(), ..Options::new(Version::V6) });
    let stage = Stage::pair(&postern(), &loud)?;
    for (ike, esp) in [
        ("aes128-sha256-x25519", "aes128gcm16"),
        ("aes128gcm16-prfsha256-ecp256", "chacha20poly1305"),
        ("aes256-sha384-modp2048", "aes256gcm16"),
    ] {
        let mut link = stage.link("gone");
        (link.ike, link.esp) = (ike.to_owned(), esp.to_owned());
        stage.load(&link)?;
        let has_integrity = !ike.contains("gcm");
        let of_ike: Vec<_> =
            OF_IKE.into_iter().filter(|name| has_integrity || !name.starts_with("Sk_a")).collect();
        for from_left in [true, false] {
            stage
                .check(|stage| forgets(stage, &of_ike, from_left))
                .with_context(|| format!("{ike}, {esp}, from the left: {from_left}"))?;
        }
    }
    Ok(())
}

fn forgets(stage: &Stage, of_ike: &[&'static str], from_left: bool) -> Result<()> {
    let (node, peer) = (stage.left.node()?, stage.right.swan()?);
    let pids = [node.control_pid()?, node.datapath_pid()?];
    let first = stage.establish("gone", from_left)?;
    stage.carry()?;
    let (ike, child) = (secrets(peer, of_ike)?, secrets(peer, &OF_CHILD)?);
    let known = memory::search(pids[0], &ike)?;
    ensure!(known.iter().any(|name| name.starts_with("Sk_d")), "the search finds in control only {known:?}");
    // They were for the AUTH payloads alone.
    ensure!(!known.iter().any(|name| name.starts_with("Sk_p")), "control still has {known:?}");
    let known = memory::search(pids[1], &child)?;
    ensure!(!known.is_empty(), "the search finds no key in the datapath");

    stage.initiator(from_left).rekey_child("gone")?;
    stage.agreed_where("gone", "a rekey of the child", |now| now.spi_in != first.spi_in)?;
    let newer = secrets(peer, &OF_CHILD)?;
    ensure!(newer != child, "the log has the keys of before the rekey");
    nowhere(&pids, &child, "of the child that was replaced")?;

    stage.initiator(!from_left).rekey_ike("gone")?;
    let before = stage.agreed_where("gone", "a rekey of the IKE SA", |now| now.ike != first.ike)?;
    nowhere(&pids, &ike, "of the IKE SA that was replaced")?;
    let ike = secrets(peer, of_ike)?;
    ensure!(before.ike != first.ike, "the log has the keys of before the rekey");

    stage.close("gone", from_left)?;
    nowhere(&pids, &ike, "of the IKE SA that is gone")?;
    nowhere(&pids, &newer, "of the child that is gone")?;
    let all: Vec<_> = [ike, child, newer].concat();
    for file in memory::files(node.dir())? {
        let bytes = std::fs::read(&file)?;
        for (name, key) in &all {
            let texts = [hex(key).into_bytes(), hex(key).to_uppercase().into_bytes()];
            let held =
                memory::contains(&bytes, key) || texts.iter().any(|text| memory::contains(&bytes, text));
            ensure!(!held, "{} holds the {name}", file.display());
        }
    }
    Ok(())
}

/// Replaced SAs stay a few seconds for packets under way; after that their keys are to be found nowhere.
fn nowhere(pids: &[i32], secrets: &[(String, Vec<u8>)], what: &str) -> Result<()> {
    wait_for(&format!("no keys {what}"), Duration::from_secs(20), || {
        let mut found = Vec::new();
        for (pid, name) in pids.iter().zip(["control", "the datapath"]) {
            found.extend(memory::search(*pid, secrets)?.into_iter().map(|key| format!("{key} in {name}")));
        }
        ensure!(found.is_empty(), "found {found:?}");
        Ok(Some(()))
    })
}
