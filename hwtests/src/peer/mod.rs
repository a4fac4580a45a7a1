//! A real peer: strongSwan in a namespace, with its userspace ESP (kernel-libipsec), and the keys of its CHILD_SA.
//!
//! Several run at once, each with its own directory for configuration, control socket and log. ESP goes through a
//! TUN device: tunnel mode only, and no ESN with 5.9.8. The kernel routes what is inside, so its namespace forwards.

pub mod conf;
pub mod root;
pub mod vici;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::config::ike::{Connection, Pool};
use crate::netns::Netns;
use crate::oracle::unhex;
use crate::process::{Background, indent, run, wait_for};

pub use root::Version;
pub use vici::{Child, Sa};

/// What a strongSwan is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which one.
    pub version: Version,
    /// More lines for the daemon's section of `strongswan.conf`.
    pub charon: String,
    /// Log levels above 1, e.g. `chd = 4` for the keys of CHILD_SAs.
    pub log: String,
    /// As client: sets the addresses that it is assigned.
    pub virtual_address: bool,
}

impl Options {
    /// This version, nothing special.
    pub fn new(version: Version) -> Self {
        Self { version, charon: String::new(), log: String::new(), virtual_address: false }
    }
}

/// A running strongSwan.
#[derive(Debug)]
pub struct Peer {
    name: String,
    dir: PathBuf,
    daemon: Option<Background>,
}

/// One CHILD_SA as both ends know it, from the initiator's log.
#[derive(Clone, Debug)]
pub struct ChildKeys {
    /// SPI of packets to the initiator.
    pub to_initiator_spi: u32,
    /// SPI of packets to the responder.
    pub to_responder_spi: u32,
    /// Encryption key (with salt) and integrity key of packets from the initiator.
    pub initiator: (Vec<u8>, Vec<u8>),
    /// The same of packets from the responder.
    pub responder: (Vec<u8>, Vec<u8>),
}

impl Peer {
    /// Starts it in `namespace`, with its files in `dir/name` and no connection yet.
    pub fn start(namespace: &Netns, name: &str, dir: &Path, options: &Options) -> Result<Self> {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir)?;
        // One that was killed leaves its socket, and nobody listens on it.
        let _ = std::fs::remove_file(dir.join("vici"));
        namespace.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
        std::fs::write(dir.join("strongswan.conf"), conf::daemon(&dir, options))?;
        let mut command = options.version.daemon(namespace, &dir)?;
        command.env("STRONGSWAN_CONF", dir.join("strongswan.conf"));
        let daemon = Background::start(&mut command, &dir.join("stdout"))?;
        let peer = Self { name: name.to_owned(), dir, daemon: Some(daemon) };
        let ready = wait_for(&format!("strongSwan {name}"), Duration::from_secs(10), || {
            Ok(peer.dir.join("vici").exists().then_some(()))
        });
        ready.with_context(|| peer.log())?;
        Ok(peer)
    }

    /// From now on it has these connections and no others. IKE SAs of connections that are gone stay.
    pub fn load(&self, connections: &[Connection], pools: &[Pool]) -> Result<()> {
        conf::connections(&self.dir, connections, pools)?;
        let file = self.dir.join("swanctl.conf").display().to_string();
        let said = self.swanctl(&["--load-all", "--clear", "--noprompt", "--file", &file])?;
        // Credentials that it cannot read are a remark to it.
        ensure!(!said.contains("failed"), "{said}");
        Ok(())
    }

    /// Negotiates the connection of this name with the child of this name.
    pub fn initiate(&self, connection: &str, child: &str) -> Result<()> {
        self.swanctl(&["--initiate", "--ike", connection, "--child", child, "--timeout", "10"])?;
        Ok(())
    }

    /// The same without waiting for the end.
    pub fn initiate_only(&self, connection: &str, child: &str) -> Result<()> {
        self.swanctl(&["--initiate", "--ike", connection, "--child", child, "--timeout", "-1"]).map(drop)
    }

    /// Closes all IKE SAs of a connection.
    pub fn terminate(&self, connection: &str) -> Result<()> {
        self.swanctl(&["--terminate", "--ike", connection, "--timeout", "10"])?;
        Ok(())
    }

    /// Forgets all IKE SAs of a connection; the other end is not told.
    pub fn forget(&self, connection: &str) -> Result<()> {
        self.swanctl(&["--terminate", "--ike", connection, "--force", "--timeout", "-1"])?;
        Ok(())
    }

    /// Begins to rekey the children of this name, with a new key exchange if the proposal has one.
    pub fn rekey_child(&self, child: &str) -> Result<()> {
        self.swanctl(&["--rekey", "--child", child])?;
        Ok(())
    }

    /// Begins to rekey the IKE SAs of a connection.
    pub fn rekey_ike(&self, connection: &str) -> Result<()> {
        self.swanctl(&["--rekey", "--ike", connection])?;
        Ok(())
    }

    /// Its IKE SAs.
    pub fn sas(&self) -> Result<Vec<Sa>> {
        vici::sas(&self.swanctl(&["--list-sas", "--pretty"])?)
    }

    /// Its only established IKE SA of this connection, with exactly one installed child.
    pub fn settled(&self, connection: &str) -> Result<Sa> {
        wait_for(&format!("one IKE SA of {connection} with one child at {}", self.name), SETTLE, || {
            let mut sas = self.sas()?.into_iter().filter(|sa| sa.name == connection);
            let (Some(sa), None) = (sas.next(), sas.next()) else { return Ok(None) };
            let one = matches!(sa.children.as_slice(), [child] if child.state == "INSTALLED");
            Ok((one && sa.state == "ESTABLISHED").then_some(sa))
        })
        .with_context(|| format!("{}\n{}", self.show(), self.log()))
    }

    /// What its command line shows of its IKE SAs.
    pub fn show(&self) -> String {
        self.swanctl(&["--list-sas"]).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Statistics and loaded plugins, or with `--list-algs` algorithms.
    pub fn swanctl(&self, arguments: &[&str]) -> Result<String> {
        run(&mut self.command(arguments)).with_context(|| self.log())
    }

    /// Keys and SPIs of the only CHILD_SA, which this peer initiated; needs the log level `chd = 4`.
    pub fn child_keys(&self, connection: &str) -> Result<ChildKeys> {
        let sa = self.settled(connection)?;
        let child = sa.children.first().context("no child")?;
        let log = std::fs::read_to_string(self.dir.join("log"))?;
        // A suite without encryption or without separate integrity has no such key, and no line about it.
        let key = |name: &str| -> Result<Vec<u8>> { Ok(last_blob(&log, name)?.unwrap_or_default()) };
        Ok(ChildKeys {
            to_initiator_spi: child.spi_in,
            to_responder_spi: child.spi_out,
            initiator: (key("encryption initiator key")?, key("integrity initiator key")?),
            responder: (key("encryption responder key")?, key("integrity responder key")?),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// SIGKILL: it says goodbye to nobody.
    pub fn kill(mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |mut daemon| daemon.kill())
    }

    /// The same, to be replaced by another one with the same files.
    pub fn crash(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |mut daemon| daemon.kill())
    }

    /// Its log, for people.
    pub fn log(&self) -> String {
        let stdout = std::fs::read_to_string(self.dir.join("stdout")).unwrap_or_default();
        format!("log of {}:\n{}{}", self.name, indent(&stdout), indent(&self.log_text()))
    }

    /// Its log as it stands in the file.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Lets it run on after this value is gone (the lab).
    pub fn leave(mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.leave();
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("swanctl");
        command
            .env("STRONGSWAN_CONF", self.dir.join("strongswan.conf"))
            .env("SWANCTL_DIR", &self.dir)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .args(arguments);
        command
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.end(Signal::TERM, Duration::from_secs(3));
        }
    }
}

const SETTLE: Duration = Duration::from_secs(5);

/// The last hexadecimal dump of the log under this name, e.g.
/// `[CHD] encryption initiator key => 20 bytes @ 0x7f…` and then `[CHD]    0: A1 B2 …  text`.
fn last_blob(log: &str, name: &str) -> Result<Option<Vec<u8>>> {
    let Some((_, rest)) = log.rsplit_once(&format!("{name} => ")) else { return Ok(None) };
    let length: usize = rest.split(' ').next().unwrap_or_default().parse()?;
    let mut bytes = Vec::new();
    for line in rest.lines().skip(1) {
        if bytes.len() >= length {
            break;
        }
        let dump = line.split_once(": ").map(|(_, dump)| dump).unwrap_or_default();
        let digits: String = dump.split(' ').take_while(|pair| pair.len() == 2).take(16).collect();
        bytes.extend(unhex(&digits)?);
    }
    bytes.truncate(length);
    ensure!(bytes.len() == length, "{name}: the log ends in the middle of the key");
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_from_the_log() {
        let log = "15[CHD] <ab|1>   encryption initiator key => 20 bytes @ 0x7f\n\
            15[CHD] <ab|1>    0: 00 01 02 03 04 05 06 07 08 09 0A 0B 0C 0D 0E 0F  ................\n\
            15[CHD] <ab|1>   16: 10 11 12 13                                      ....\n\
            15[CHD] <ab|1>   encryption responder key => 20 bytes @ 0x7f\n";
        assert_eq!(
            last_blob(log, "encryption initiator key").unwrap().unwrap(),
            (0..20).collect::<Vec<u8>>()
        );
        assert!(last_blob(log, "integrity initiator key").unwrap().is_none());
        assert!(last_blob(log, "encryption responder key").is_err());
    }
}
