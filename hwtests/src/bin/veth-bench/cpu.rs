//! What a forwarder's thread spends in its own code and in the kernel.

use std::path::PathBuf;

use anyhow::{Context, Result};
use postern_hwtests::prog_run::Outcome;

/// A thread whose time is read.
pub struct Thread {
    stat: PathBuf,
    /// Nanoseconds of a clock tick.
    tick: f64,
}

impl Thread {
    /// By its number.
    pub fn new(process: i32, thread: i32) -> Self {
        let ticks = u32::try_from(rustix::param::clock_ticks_per_second()).unwrap_or(100);
        Self { stat: format!("/proc/{process}/task/{thread}/stat").into(), tick: 1e9 / f64::from(ticks) }
    }

    /// By its name.
    pub fn named(process: i32, name: &str) -> Result<Self> {
        for entry in std::fs::read_dir(format!("/proc/{process}/task"))? {
            let entry = entry?;
            if std::fs::read_to_string(entry.path().join("comm"))?.trim() == name {
                let thread = entry.file_name().to_string_lossy().parse()?;
                return Ok(Self::new(process, thread));
            }
        }
        anyhow::bail!("process {process} has no thread {name}")
    }

    /// Nanoseconds so far: own code, kernel.
    pub fn spent(&self) -> Result<[f64; 2]> {
        let stat = std::fs::read_to_string(&self.stat)?;
        // proc(5): the name may contain anything, so fields are counted behind its parenthesis; `utime` is the 14th of all.
        let (_, behind) = stat.rsplit_once(')').context("no name")?;
        let mut fields = behind.split_whitespace().skip(11);
        let mut next = || -> Result<f64> {
            let ticks: u32 = fields.next().context("too few fields")?.parse()?;
            Ok(f64::from(ticks) * self.tick)
        };
        Ok([next()?, next()?])
    }
}

/// Time and packets of some runs.
#[derive(Clone, Copy, Default)]
pub struct Cost {
    spent: [f64; 2],
    packets: u64,
}

impl Cost {
    /// Adds a run.
    pub fn add(&mut self, before: [f64; 2], after: [f64; 2], outcome: &Outcome) {
        for (sum, (before, after)) in self.spent.iter_mut().zip(before.into_iter().zip(after)) {
            *sum += after - before;
        }
        self.packets += outcome.received;
    }

    /// Nanoseconds a packet: own code, kernel.
    pub fn each(&self) -> [f64; 2] {
        let packets = f64::from(u32::try_from(self.packets).unwrap_or(u32::MAX)).max(1.0);
        self.spent.map(|spent| spent / packets)
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::time::{Duration, Instant};

    use super::*;

    /// Time in the thread's own code is told as such, and that in the kernel as that.
    #[test]
    fn own_time_is_not_the_kernels() {
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        let thread = Thread::new(i32::try_from(std::process::id()).unwrap(), id);
        let spent = |work: fn()| {
            let (before, start) = (thread.spent().unwrap(), Instant::now());
            loop {
                work();
                let [own, kernel] = thread.spent().unwrap();
                let spent = [own - before[0], kernel - before[1]];
                if spent[0] + spent[1] > 2e8 {
                    return spent;
                }
                assert!(start.elapsed() < Duration::from_secs(30), "{spent:?}");
            }
        };
        let [own, kernel] = spent(|| (0..1_000_000).for_each(|n| _ = black_box(n)));
        assert!(own > 4.0 * kernel, "{own} {kernel}");
        // The file is made while it is read.
        let [own, kernel] = spent(|| drop(std::fs::read("/proc/self/smaps").unwrap()));
        assert!(kernel > own, "{own} {kernel}");
    }
}
