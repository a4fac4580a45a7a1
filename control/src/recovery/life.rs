//! What became of the process before this one (RST-4): told from what it wrote down, from the machine's boot id, and from
//! whether its datapath still runs. No operator has to say anything.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Name of the file in the state directory.
const FILE: &str = "life";

/// Changes with each start of the kernel.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How the last process ended, and so what this start is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// There was none.
    First,
    /// It was told to end with its datapath, and has told its peers as far as they answered.
    Stopped,
    /// It was told to end, and its datapath goes on.
    Restarted,
    /// It was killed or crashed, and its datapath goes on.
    ControlDied,
    /// It was told to end and its datapath went on, but that is gone too.
    DatapathGone,
    /// It was killed or crashed, and so was its datapath.
    Crashed,
    /// The machine was started anew, in an orderly way as far as this process could see.
    Rebooted,
    /// The machine was started anew without a word: power loss, reset, panic.
    PowerLoss,
}

/// What is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    /// Of the machine.
    boot_id: String,
    /// Whether it was told to end; with what.
    ended: Option<Ending>,
}

/// How a process ends that was told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The peers were told, and the datapath ends.
    Everything,
    /// The datapath goes on.
    ControlOnly,
}

impl Cause {
    /// Whether peers may have SAs that this side has lost.
    pub const fn is_reset(self) -> bool {
        matches!(self, Self::DatapathGone | Self::Crashed | Self::Rebooted | Self::PowerLoss)
    }

    /// Whether the datapath of the process before still forwards.
    pub const fn is_adoption(self) -> bool {
        matches!(self, Self::Restarted | Self::ControlDied)
    }

    /// In words.
    pub const fn text(self) -> &'static str {
        match self {
            Self::First => "first start",
            Self::Stopped => "start after a clean stop",
            Self::Restarted => "control was restarted, the datapath goes on",
            Self::ControlDied => "control was killed or crashed, the datapath goes on",
            Self::DatapathGone => "control was stopped, and the datapath is gone too",
            Self::Crashed => "control and datapath were killed or crashed",
            Self::Rebooted => "the machine was rebooted",
            Self::PowerLoss => "power loss, reset or panic of the machine",
        }
    }

    fn of(before: Option<&Written>, boot_id: &str, datapath_lives: bool) -> Self {
        let Some(Written { boot_id: before, ended }) = before else { return Self::First };
        match (ended, before == boot_id) {
            (Some(Ending::ControlOnly), true) if datapath_lives => Self::Restarted,
            (Some(Ending::Everything), _) => Self::Stopped,
            (_, true) if datapath_lives => Self::ControlDied,
            (Some(Ending::ControlOnly), true) => Self::DatapathGone,
            (None, true) => Self::Crashed,
            (Some(Ending::ControlOnly), false) => Self::Rebooted,
            (None, false) => Self::PowerLoss,
        }
    }
}

/// Reads what the process before wrote, and writes down that this one runs. `datapath_lives`: there is a datapath
/// that this process has not started.
pub fn begin(state: &Path, datapath_lives: bool) -> io::Result<Cause> {
    // Where there is no such file, every start in the same state directory counts as of the same boot.
    let boot_id = fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned();
    let before = fs::read(state.join(FILE)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let cause = Cause::of(before.as_ref(), &boot_id, datapath_lives);
    write(state, &Written { boot_id, ended: None })?;
    Ok(cause)
}

/// Writes down that this process was told to end.
pub fn end(state: &Path, ending: Ending) -> io::Result<()> {
    let boot_id = fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned();
    write(state, &Written { boot_id, ended: Some(ending) })
}

/// Whole or not at all, and durable when it returns.
fn write(state: &Path, written: &Written) -> io::Result<()> {
    let (path, temporary) = (state.join(FILE), state.join(format!("{FILE}.new")));
    let bytes = serde_json::to_vec(written).map_err(io::Error::other)?;
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(state)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RST-4: the table.
    #[test]
    fn rst_4_causes() {
        let before = |ended, boot: &str| Some(Written { boot_id: boot.to_owned(), ended });
        for (before, lives, cause) in [
            (None, false, Cause::First),
            (before(Some(Ending::Everything), "a"), false, Cause::Stopped),
            (before(Some(Ending::Everything), "b"), false, Cause::Stopped),
            (before(Some(Ending::ControlOnly), "a"), true, Cause::Restarted),
            (before(None, "a"), true, Cause::ControlDied),
            (before(Some(Ending::ControlOnly), "a"), false, Cause::DatapathGone),
            (before(None, "a"), false, Cause::Crashed),
            (before(Some(Ending::ControlOnly), "b"), false, Cause::Rebooted),
            (before(None, "b"), false, Cause::PowerLoss),
        ] {
            assert_eq!(Cause::of(before.as_ref(), "a", lives), cause);
            assert!(!(cause.is_reset() && cause.is_adoption()));
        }
    }

    /// RST-4: what one process writes the next reads; a file that is no such file is as none.
    #[test]
    fn rst_4_written_down() {
        let dir = std::env::temp_dir().join(format!("postern-life-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(begin(&dir, false).unwrap(), Cause::First);
        assert_eq!(begin(&dir, false).unwrap(), Cause::Crashed);
        end(&dir, Ending::ControlOnly).unwrap();
        assert_eq!(begin(&dir, true).unwrap(), Cause::Restarted);
        end(&dir, Ending::Everything).unwrap();
        assert_eq!(begin(&dir, false).unwrap(), Cause::Stopped);
        fs::write(dir.join(FILE), b"{").unwrap();
        assert_eq!(begin(&dir, false).unwrap(), Cause::First);
        fs::remove_dir_all(&dir).unwrap();
    }
}
