//! Which strongSwan: the one of this Debian 12, or the one of Debian 13 in a root of its own.
//!
//! The root is made by `hwtests/setup` in the cache directory. A daemon in it runs in a mount namespace of its own,
//! where its files are at the same paths as outside; nothing stays mounted when it ends.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::netns::Netns;

/// A version of strongSwan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 5.9.8, Debian 12: its userspace ESP is always UDP-encapsulated.
    V5,
    /// 6.0.1, Debian 13: raw ESP, unless there is a NAT.
    V6,
}

impl Version {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V5, Self::V6];

    /// Number, for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V5 => "5.9.8",
            Self::V6 => "6.0.1",
        }
    }

    /// The command that runs its daemon in `namespace` with `dir` for its files.
    pub fn daemon(self, namespace: &Netns, dir: &Path) -> Result<Command> {
        let mut command = match self {
            Self::V5 => namespace.command("charon-systemd"),
            Self::V6 => {
                let root = root()?;
                let mut command = namespace.command("unshare");
                command.args(["--mount", "--", "sh", "-c", ENTER, "sh"]).arg(root).arg(dir);
                command
            }
        };
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        Ok(command)
    }
}

/// `$1` is the root, `$2` the daemon's directory. /tmp and /run of the root are empty and gone afterwards.
const ENTER: &str = "set -e
mount --make-rprivate /
for covered in tmp run; do mount -t tmpfs none \"$1/$covered\"; done
mkdir -p \"$1$2\"
mount --bind \"$2\" \"$1$2\"
mount -t proc proc \"$1/proc\"
mount --rbind /dev \"$1/dev\"
exec chroot \"$1\" /usr/sbin/charon-systemd";

/// The Debian 13 root.
fn root() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = cache.or_else(home).context("neither XDG_CACHE_HOME nor HOME is set")?;
    let root = cache.join("postern-hwtests/debian13");
    ensure!(
        root.join("usr/sbin/charon-systemd").exists(),
        "{} has no strongSwan: run hwtests/setup --test",
        root.display()
    );
    Ok(root)
}
