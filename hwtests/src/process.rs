//! Commands that fail loudly, and processes that end with their owner.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// Runs `command` to its end. Anything but success is an error that carries the command line and what it printed.
pub fn run(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start: {shown}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    bail!("{shown}\n  ended with {}\n{}{}", output.status, indent(&out), indent(&err))
}

/// [`run`] for a command written in one line; words are separated by single spaces.
pub fn sh(line: &str) -> Result<String> {
    let mut words = line.split(' ');
    let program = words.next().unwrap_or_default();
    run(Command::new(program).args(words))
}

/// The command line, for messages.
pub fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Two spaces before every line.
pub fn indent(text: &str) -> String {
    text.lines().flat_map(|line| ["  ", line, "\n"]).collect()
}

/// Polls `check` every 20 ms until it gives a value; an error that names `what` after `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        match check() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if start.elapsed() > limit => bail!("{what}: not within {limit:?}"),
            Err(error) if start.elapsed() > limit => {
                return Err(error.context(format!("{what}: not within {limit:?}")));
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Whether a process with this id exists and is not a zombie.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z') && !rest.starts_with('X'))
}

/// Start time of a process in clock ticks since boot: with the id it names a process for good.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    // proc(5): starttime is field 22; `rest` begins with field 3.
    rest.split(' ').nth(19)?.parse().ok()
}

/// Gives the session of a process the share of the processors that our own has (sched(7), autogroups): a daemon in a
/// session of its own would else have another, and what is compared with it an advantage.
pub fn share_like_ours(pid: i32) -> Result<()> {
    // "/autogroup-12 nice 0". Nothing is grouped where there is no such file, nor where it is empty: the process is then
    // in a control group with a share of its own, and what it starts is in the same.
    let own = std::fs::read_to_string("/proc/self/autogroup").unwrap_or_default();
    let Some(nice) = own.split_whitespace().last() else { return Ok(()) };
    std::fs::write(format!("/proc/{pid}/autogroup"), nice).with_context(|| format!("autogroup of {pid}"))
}

/// Sends a signal to one process. A process that is gone already is fine.
pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid)
        && test_kill_process(pid).is_ok()
    {
        // Gone between the two calls: nothing to do.
        let _ = kill_process(pid, signal);
    }
}

/// Asks processes to end, and ends those that have not after `patience`.
pub fn end_all(pids: &[i32], patience: Duration) {
    for pid in pids {
        signal(*pid, Signal::TERM);
    }
    let start = Instant::now();
    while start.elapsed() < patience && pids.iter().any(|pid| is_alive(*pid)) {
        std::thread::sleep(Duration::from_millis(10));
    }
    for pid in pids.iter().filter(|pid| is_alive(**pid)) {
        signal(*pid, Signal::KILL);
    }
}

/// A process in the background, with its output in a file; ended when dropped.
#[derive(Debug)]
pub struct Background {
    child: Child,
}

impl Background {
    /// Starts `command` with standard output and error in the file `log`.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let shown = show(command);
        let file = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start: {shown}"))?;
        Ok(Self { child })
    }

    /// Takes over a process that was started elsewhere.
    pub fn adopt(child: Child) -> Self {
        Self { child }
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(0)
    }

    /// Whether it still runs; a process that ended is reaped.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// `signal`, then up to `patience` for the end, then SIGKILL. `true` if it ended by itself.
    pub fn end(&mut self, with: Signal, patience: Duration) -> bool {
        if !self.runs() {
            return true;
        }
        signal(self.pid(), with);
        let start = Instant::now();
        while start.elapsed() < patience {
            if !self.runs() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // It did not listen; the result of the kill itself tells nothing new.
        let _ = self.kill();
        false
    }

    /// `with`, until the process ends (Rust's own handler of SIGSEGV lets the first one pass); what it ended with.
    pub fn crash(&mut self, with: Signal, patience: Duration) -> Result<ExitStatus> {
        wait_for("the end of a process", patience, || {
            signal(self.pid(), with);
            Ok(self.child.try_wait()?)
        })
    }

    /// Lets the process run on after this value is gone.
    pub fn leave(self) {
        let mut this = std::mem::ManuallyDrop::new(self);
        // Reaps it in case it has ended already.
        let _ = this.child.try_wait();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end(Signal::TERM, Duration::from_secs(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_carry_what_was_printed() {
        let error = run(Command::new("sh").args(["-c", "echo told; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("told") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_dropped_background_process_is_gone() {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let background = Background::adopt(child);
        let pid = background.pid();
        assert!(is_alive(pid) && start_time(pid).is_some());
        drop(background);
        assert!(!is_alive(pid));
    }
}
