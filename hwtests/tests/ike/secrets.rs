//! OPS-4: where keys are not.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::memory;
use postern_hwtests::peer::Version;
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
