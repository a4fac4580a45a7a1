//! A real peer: strongSwan in a namespace, with its userspace ESP (kernel-libipsec), and the keys of its CHILD_SA.
//!
//! Debian 12's strongSwan 5.9.8 speaks ESP in UDP on port 4500 only in this arrangement, in tunnel mode, without
//! ESN. Dead peer detection is off and it never rekeys by itself, so that one side can be replaced under it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::netns::Netns;
use crate::oracle::unhex;
use crate::process::{Background, indent, run, wait_for};

const PLUGINS: &str = "openssl random nonce aes sha1 sha2 hmac kdf gcm drbg pem pkcs1 pubkey x509 constraints \
    chapoly gmp curve25519 socket-default kernel-libipsec kernel-netlink vici";

/// What a strongSwan shall agree on with its peer.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// Its outer address.
    pub local: IpAddr,
    /// The peer's.
    pub remote: IpAddr,
    /// Network behind it.
    pub local_net: String,
    /// Network behind the peer.
    pub remote_net: String,
    /// ESP proposal, by strongSwan's names.
    pub esp: &'static str,
}

impl PeerConfig {
    /// The other end's.
    #[must_use]
    pub fn mirrored(&self) -> Self {
        Self {
            local: self.remote,
            remote: self.local,
            local_net: self.remote_net.clone(),
            remote_net: self.local_net.clone(),
            esp: self.esp,
        }
    }
}

/// A running strongSwan.
#[derive(Debug)]
pub struct Peer {
    name: String,
    dir: PathBuf,
    daemon: Background,
}

/// One CHILD_SA as both ends know it, from the initiator's log.
#[derive(Clone, Debug)]
pub struct ChildSa {
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
    /// Writes its configuration into `dir/name`, starts it in `namespace` and loads its one connection.
    pub fn start(namespace: &Netns, name: &str, dir: &Path, config: &PeerConfig) -> Result<Self> {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir)?;
        // Its inside packets come from a TUN device and are routed by the kernel.
        namespace.sh("sysctl -qw net.ipv4.ip_forward=1")?;
        std::fs::write(dir.join("strongswan.conf"), daemon_config(&dir))?;
        std::fs::write(dir.join("swanctl.conf"), connection_config(config))?;
        let mut command = namespace.command("charon-systemd");
        command.env("STRONGSWAN_CONF", dir.join("strongswan.conf"));
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let daemon = Background::start(&mut command, &dir.join("stdout"))?;
        let peer = Self { name: name.to_owned(), dir, daemon };
        let ready = wait_for(&format!("strongSwan {name}"), Duration::from_secs(10), || {
            Ok(peer.dir.join("vici").exists().then_some(()))
        });
        ready.with_context(|| peer.log())?;
        peer.swanctl(&[
            "--load-all",
            "--noprompt",
            "--file",
            &peer.dir.join("swanctl.conf").display().to_string(),
        ])?;
        Ok(peer)
    }

    /// Negotiates the IKE SA and its CHILD_SA.
    pub fn initiate(&self) -> Result<()> {
        self.swanctl(&["--initiate", "--child", "net", "--timeout", "10"])?;
        Ok(())
    }

    /// The CHILD_SA that this peer initiated last.
    pub fn child_sa(&self) -> Result<ChildSa> {
        let log = std::fs::read_to_string(self.dir.join("log"))?;
        // A suite without encryption or without separate integrity has no such key, and no line about it.
        let key = |name: &str| -> Result<Vec<u8>> { Ok(last_blob(&log, name)?.unwrap_or_default()) };
        let listed = self.swanctl(&["--list-sas", "--raw"])?;
        let spi = |name: &str| -> Result<u32> {
            let value =
                listed.split_once(&format!("{name}=")).and_then(|(_, rest)| rest.split([' ', '}']).next());
            Ok(u32::from_str_radix(value.with_context(|| format!("no {name} in: {listed}"))?, 16)?)
        };
        Ok(ChildSa {
            to_initiator_spi: spi("spi-in")?,
            to_responder_spi: spi("spi-out")?,
            initiator: (key("encryption initiator key")?, key("integrity initiator key")?),
            responder: (key("encryption responder key")?, key("integrity responder key")?),
        })
    }

    /// SIGKILL: it says goodbye to nobody.
    pub fn kill(mut self) -> Result<()> {
        self.daemon.kill()
    }

    /// Its log.
    pub fn log(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        format!("log of {}:\n{}{}", self.name, indent(&read("stdout")), indent(&read("log")))
    }

    fn swanctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("swanctl");
        command
            .env("STRONGSWAN_CONF", self.dir.join("strongswan.conf"))
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        run(command.args(arguments)).with_context(|| self.log())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.daemon.end(Signal::TERM, Duration::from_secs(3));
    }
}

fn daemon_config(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "charon-systemd {{
  load = {PLUGINS}
  install_virtual_ip = no
  retransmit_timeout = 0.5
  retransmit_base = 1.5
  retransmit_tries = 4
  plugins {{ vici {{ socket = unix://{dir}/vici }} }}
  filelog {{ f {{
      path = {dir}/log
      flush_line = yes
      default = 1
      chd = 4
  }} }}
  journal {{ default = -1 }}
}}
swanctl {{ socket = unix://{dir}/vici }}
"
    )
}

fn connection_config(config: &PeerConfig) -> String {
    let PeerConfig { local, remote, local_net, remote_net, esp } = config;
    format!(
        "connections {{ ab {{
  version = 2
  local_addrs = {local}
  remote_addrs = {remote}
  proposals = aes128gcm16-prfsha256-ecp256
  dpd_delay = 0s
  rekey_time = 0s
  mobike = no
  local {{ auth = psk
          id = {local} }}
  remote {{ auth = psk
          id = {remote} }}
  children {{ net {{
      local_ts = {local_net}
      remote_ts = {remote_net}
      esp_proposals = {esp}
      rekey_time = 0s
  }} }} }} }}
secrets {{ ike-1 {{ secret = \"not a secret\" }} }}
"
    )
}

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
