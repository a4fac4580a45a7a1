//! Name servers that gateways assigned to this machine as their client (RFC 7296 section 3.15.1), in a file in the form of
//! `resolv.conf`: for whatever resolves names here, which control does not presume to configure.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use postern_ike::output::SaId;
use tracing::warn;

/// Name of the file in control's state directory.
pub const FILE: &str = "resolv.conf";

/// Name servers by IKE SA, and the file that has all of them while there are any.
#[derive(Debug)]
pub(super) struct NameServers {
    file: PathBuf,
    held: BTreeMap<SaId, Vec<IpAddr>>,
}

impl NameServers {
    /// With its file in `directory`, which is not there as long as nobody assigned any.
    pub(super) fn new(directory: &Path) -> Self {
        let this = Self { file: directory.join(FILE), held: BTreeMap::new() };
        this.write();
        this
    }

    /// An IKE SA has these now.
    pub(super) fn set(&mut self, sa: SaId, servers: &[IpAddr]) {
        let before =
            if servers.is_empty() { self.held.remove(&sa) } else { self.held.insert(sa, servers.to_vec()) };
        if before.unwrap_or_default() != servers {
            self.write();
        }
    }

    /// One IKE SA takes over from another.
    pub(super) fn rename(&mut self, old: SaId, new: SaId) {
        if let Some(servers) = self.held.remove(&old) {
            self.held.insert(new, servers);
        }
    }

    /// The end.
    pub(super) fn clear(&mut self) {
        self.held.clear();
        self.write();
    }

    fn write(&self) {
        let mut servers: Vec<&IpAddr> = Vec::new();
        for server in self.held.values().flatten() {
            if !servers.contains(&server) {
                servers.push(server);
            }
        }
        let lines: Vec<String> = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        let written = if lines.is_empty() {
            fs::remove_file(&self.file)
        } else {
            // Readers never see a half of it.
            let next = self.file.with_extension("new");
            fs::write(&next, lines.concat()).and_then(|()| fs::rename(&next, &self.file))
        };
        if let Err(error) = written
            && error.kind() != std::io::ErrorKind::NotFound
        {
            warn!("{}: {error}", self.file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IKE-7: all that are assigned, each once, as long as one IKE SA has them.
    #[test]
    fn ike_7_name_servers_are_in_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        fs::write(&file, "of an earlier life").unwrap();
        let mut servers = NameServers::new(directory.path());
        assert!(!file.exists());
        let [one, two] = ["10.1.0.53", "fd00::53"].map(|text| text.parse::<IpAddr>().unwrap());
        servers.set(SaId(1), &[one]);
        servers.set(SaId(2), &[two, one]);
        assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 10.1.0.53\nnameserver fd00::53\n");
        servers.rename(SaId(1), SaId(3));
        servers.set(SaId(1), &[]);
        servers.set(SaId(2), &[]);
        assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 10.1.0.53\n");
        servers.set(SaId(3), &[]);
        assert!(!file.exists());
        servers.set(SaId(4), &[two]);
        servers.clear();
        assert!(!file.exists());
    }
}
