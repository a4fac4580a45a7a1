//! Captures with tcpdump and their dissection by tshark.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::netns::Netns;
use crate::process::{Background, run, wait_for};

/// A running capture, written packet by packet.
#[derive(Debug)]
pub struct Capture {
    process: Background,
    file: PathBuf,
}

impl Capture {
    /// Captures what `filter` (pcap-filter(7)) matches on `interface`; returns once it is listening.
    pub fn start(namespace: &Netns, interface: &str, filter: &str, file: &Path) -> Result<Self> {
        let log = file.with_extension("log");
        let mut command = namespace.command("tcpdump");
        // -Z root: without it tcpdump changes its user and cannot write into a private directory. -s, -B: the ring of
        // immediate mode has slots of the snapshot length, with the default of 256 KiB a handful.
        command.args(["-n", "-U", "--immediate-mode", "-s", "4096", "-B", "32768", "-Z", "root"]);
        command.args(["-i", interface, "-w"]).arg(file).arg(filter);
        let process = Background::start(&mut command, &log)?;
        wait_for("tcpdump", Duration::from_secs(5), || {
            Ok(std::fs::read_to_string(&log)?.contains("listening on").then_some(()))
        })?;
        Ok(Self { process, file: file.to_owned() })
    }

    /// Ends it and gives the file. Waits half a second first: packets on their way to tcpdump are not lost. An error if
    /// tcpdump was too slow for some.
    pub fn finish(mut self) -> Result<PathBuf> {
        std::thread::sleep(Duration::from_millis(500));
        self.process.end(Signal::TERM, Duration::from_secs(5));
        let log = std::fs::read_to_string(self.file.with_extension("log"))?;
        ensure!(log.contains("\n0 packets dropped by kernel"), "the capture is not complete: {log}");
        Ok(self.file.clone())
    }
}

/// The values of `fields` (tshark's names) of every packet in `file` that `filter` (a display filter) matches.
pub fn fields(file: &Path, filter: &str, fields: &[&str]) -> Result<Vec<Vec<String>>> {
    dissect(file, None, filter, fields)
}

/// [`fields`], with the SAs that tshark shall check and decrypt; see [`EspSa`].
pub fn fields_with_keys(
    file: &Path,
    keys: &[EspSa],
    filter: &str,
    fields: &[&str],
) -> Result<Vec<Vec<String>>> {
    let profile = file.with_extension("tshark");
    std::fs::create_dir_all(&profile)?;
    let lines: String = keys.iter().map(EspSa::line).collect();
    std::fs::write(profile.join("esp_sa"), lines)?;
    dissect(file, Some(&profile), filter, fields)
}

/// [`fields`], with the tables of keys that are in the directory `profile` under Wireshark's names.
pub fn fields_with_tables(
    file: &Path,
    profile: &Path,
    filter: &str,
    fields: &[&str],
) -> Result<Vec<Vec<String>>> {
    dissect(file, Some(profile), filter, fields)
}

fn dissect(file: &Path, profile: Option<&Path>, filter: &str, fields: &[&str]) -> Result<Vec<Vec<String>>> {
    let mut command = Command::new("tshark");
    command.args(["-n", "-r"]).arg(file).args(["-Y", filter, "-T", "fields", "-E", "separator=/t"]);
    if let Some(profile) = profile {
        command.env("WIRESHARK_CONFIG_DIR", profile);
        command.args([
            "-o",
            "esp.enable_encryption_decode:TRUE",
            "-o",
            "esp.enable_authentication_check:TRUE",
        ]);
    }
    command.args(fields.iter().flat_map(|field| ["-e", field])).stderr(Stdio::null());
    let table = run(&mut command).with_context(|| format!("tshark on {}", file.display()))?;
    Ok(table.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect())
}

/// The frames of a capture file as tcpdump writes it here (microseconds, this machine's byte order).
pub fn frames(file: &Path) -> Result<Vec<Vec<u8>>> {
    let bytes = std::fs::read(file)?;
    let mut rest = bytes.get(24..).context("no capture file")?;
    let mut frames = Vec::new();
    while let Some((header, tail)) = rest.split_first_chunk::<16>() {
        let [_, _, _, _, _, _, _, _, a, b, c, d, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([a, b, c, d]))?;
        let Some((frame, tail)) = tail.split_at_checked(length) else { break };
        frames.push(frame.to_vec());
        rest = tail;
    }
    Ok(frames)
}

/// Writes packets that begin with their IP header into a capture file.
pub fn write_pcap(file: &Path, packets: &[Vec<u8>]) -> Result<()> {
    // Link type 101, LINKTYPE_RAW: the IP version tells the family.
    let mut bytes = Vec::new();
    // Version 2.4 is two 16-bit fields, major first, little-endian each.
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 101] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for (second, packet) in (0_u32..).zip(packets) {
        let length = u32::try_from(packet.len())?;
        for word in [second, 0, length, length] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(packet);
    }
    Ok(std::fs::write(file, bytes)?)
}

/// One line of tshark's table of ESP SAs.
#[derive(Clone, Debug)]
pub struct EspSa {
    /// Whether the outer header is IPv6.
    pub v6: bool,
    /// SPI.
    pub spi: u32,
    /// tshark's name of the encryption.
    pub encryption: &'static str,
    /// Key with salt.
    pub key: String,
    /// tshark's name of the authentication.
    pub authentication: &'static str,
    /// Key.
    pub authentication_key: String,
}

impl EspSa {
    fn line(&self) -> String {
        let Self { v6, spi, encryption, key, authentication, authentication_key } = self;
        let family = if *v6 { "IPv6" } else { "IPv4" };
        let prefixed = |key: &str| if key.is_empty() { String::new() } else { format!("0x{key}") };
        let (key, authentication_key) = (prefixed(key), prefixed(authentication_key));
        format!(
            "\"{family}\",\"*\",\"*\",\"{spi:#010x}\",\"{encryption}\",\"{key}\",\"{authentication}\",\"{authentication_key}\"\n"
        )
    }
}
