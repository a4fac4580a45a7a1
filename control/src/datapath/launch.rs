//! Starting the datapath so that it outlives control (DP-7).
//!
//! A session of its own keeps terminal signals and control's end from it. Between `fork` and `exec` only unsafe code may
//! run, so the own program is started once more and becomes the datapath: [`become_detached`] is its whole life.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// First argument that makes `postern-control` call [`become_detached`].
pub const DETACH: &str = "--become-detached";

/// Name of the datapath's program.
const PROGRAM: &str = "postern-datapath";

/// How to start the datapath.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program that calls [`become_detached`] when its first argument is [`DETACH`].
    pub launcher: PathBuf,
    /// The datapath's program.
    pub program: PathBuf,
    /// The configuration file it is given.
    pub config: PathBuf,
}

impl Launch {
    /// Starts it.
    pub fn spawn(&self) -> io::Result<tokio::process::Child> {
        let Self { launcher, program, config } = self;
        tokio::process::Command::new(launcher)
            .arg(DETACH)
            .arg(program)
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .kill_on_drop(false)
            .spawn()
    }
}

/// Leaves the session and becomes the program named by the first argument, with the others as its own. Returns only
/// if that fails.
pub fn become_detached(arguments: impl IntoIterator<Item = OsString>) -> io::Error {
    let mut arguments = arguments.into_iter();
    let Some(program) = arguments.next() else {
        return io::Error::new(io::ErrorKind::InvalidInput, "no program was named");
    };
    if let Err(error) = rustix::process::setsid() {
        return error.into();
    }
    Command::new(program).args(arguments).exec()
}

/// Where the datapath's program is: as configured, else beside `own`, else in `PATH`.
pub fn find_program(configured: Option<&Path>, own: &Path) -> Option<PathBuf> {
    let name = configured.unwrap_or(Path::new(PROGRAM));
    if name.components().count() > 1 {
        return Some(name.to_owned());
    }
    let beside = own.parent().map(|directory| directory.join(name));
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&paths).map(|directory| directory.join(name));
    beside.into_iter().chain(in_path).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
