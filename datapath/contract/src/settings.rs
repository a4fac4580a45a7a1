//! The `[datapath]` section of the configuration file: both processes read it, so it is described once.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Towards peers: ESP and AH are taken, the rest is the kernel's.
    Outside,
    /// Towards the protected network: what a policy protects is taken, the rest is the kernel's.
    Inside,
    /// Both at once (a gateway on a stick).
    Both,
}

impl Role {
    /// Whether IPsec packets are taken here.
    pub const fn is_outside(self) -> bool {
        matches!(self, Self::Outside | Self::Both)
    }

    /// Whether cleartext is taken here.
    pub const fn is_inside(self) -> bool {
        matches!(self, Self::Inside | Self::Both)
    }
}

/// How frames of an interface reach the workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortKind {
    /// AF_XDP: the appliance.
    #[default]
    Xsk,
    /// A TUN device that the datapath creates; cleartext of this host itself.
    Tun,
    /// Raw and UDP sockets; IPsec of a host that is no appliance. No interface of its own.
    Socket,
}

/// How the XDP program is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// Native where the driver has it, else generic.
    #[default]
    Auto,
    /// In the driver, or fail.
    Native,
    /// In the network stack (slow).
    Generic,
}

/// What a worker does when there is nothing to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Idle {
    /// Spin a little, then sleep until a frame or a command comes.
    #[default]
    Poll,
    /// Never sleep: lowest latency, a whole core.
    Spin,
}

/// Where IP fragments of IPsec packets go (they cannot be steered by SPI).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FragmentPolicy {
    /// To the kernel.
    #[default]
    Kernel,
    /// Dropped in the XDP program, and counted there.
    Drop,
}

/// Where the packets of a relay are translated (RLY-1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RelayPath {
    /// In the XDP program, where all of it can be done there; the workers do the rest.
    Xdp,
    /// By the workers.
    #[default]
    Worker,
}

/// What AES-GCM is computed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The best that the processor has and that passes its self-test.
    #[default]
    Auto,
    /// AES instructions on 512-bit vectors (AVX-512).
    Vaes512,
    /// AES instructions on 256-bit vectors (AVX2).
    Vaes256,
    /// The ring library.
    Ring,
}

impl Backend {
    /// As the configuration file has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Vaes512 => "vaes512",
            Self::Vaes256 => "vaes256",
            Self::Ring => "ring",
        }
    }
}

/// Cryptography.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CryptoSettings {
    /// What AES-GCM is computed with. One that the processor cannot run is an error at start.
    #[serde(default)]
    pub backend: Backend,
}

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceSettings {
    /// Name of the network interface (`tun`: the one to create; `socket`: a label).
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// How frames are received and sent.
    #[serde(default)]
    pub port: PortKind,
    /// How the XDP program is attached (`xsk` only).
    #[serde(default)]
    pub xdp: XdpMode,
    /// Use zero-copy where the driver has it (`xsk` only).
    #[serde(default = "yes")]
    pub zero_copy: bool,
    /// `tun` only: MTU of the device.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// The whole `[datapath]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatapathSettings {
    /// Unix socket on which the datapath listens for control.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Directory of the datapath's own state (reserved sequence numbers).
    #[serde(default = "default_state")]
    pub state: PathBuf,
    /// Control starts the datapath itself when nothing answers on `socket`; off where a service manager does it.
    #[serde(default)]
    pub start: bool,
    /// Processor numbers of the workers, one worker each. Empty: one worker, not pinned.
    #[serde(default)]
    pub cores: Vec<u16>,
    /// Frames of 4,096 bytes (`xsk`: the UMEM), shared by all workers and interfaces.
    #[serde(default = "default_frames")]
    pub frames: u32,
    /// Back the frames with huge pages; falls back to ordinary ones with a warning.
    #[serde(default)]
    pub huge_pages: bool,
    /// Each worker's frames and tables are on the memory node of its processor; otherwise wherever the kernel puts them.
    #[serde(default = "yes")]
    pub numa_local: bool,
    /// The kernel says when it wants to be called (`xsk`); otherwise it is called in every turn that has something for it.
    #[serde(default = "yes")]
    pub need_wakeup: bool,
    /// Workers run the driver's receive loop themselves, in place of interrupts, for so many microseconds a call at most
    /// (`xsk`). 0: interrupts do.
    #[serde(default)]
    pub busy_poll_us: u32,
    /// Packets that the driver takes in one such call at most.
    #[serde(default = "default_budget")]
    pub busy_poll_budget: u16,
    /// What an idle worker does.
    #[serde(default)]
    pub idle: Idle,
    /// Where fragments of IPsec packets go.
    #[serde(default)]
    pub fragments: FragmentPolicy,
    /// Where relay entries are executed.
    #[serde(default)]
    pub relay: RelayPath,
    /// Relay entries that the XDP programs have room for. The workers execute what is more than that.
    #[serde(default = "default_relay_entries")]
    pub relay_entries: u32,
    /// Slots of the inbound SA table; a power of two. More SAs than slots still work, through a hash map.
    #[serde(default = "default_slots")]
    pub sa_slots: u32,
    /// Cryptography.
    #[serde(default)]
    pub crypto: CryptoSettings,
    /// The interfaces.
    #[serde(default, rename = "interface")]
    pub interfaces: Vec<InterfaceSettings>,
}

const fn yes() -> bool {
    true
}

fn default_socket() -> PathBuf {
    PathBuf::from("/run/postern/datapath.sock")
}

fn default_state() -> PathBuf {
    PathBuf::from("/var/lib/postern/datapath")
}

const fn default_frames() -> u32 {
    8192
}

const fn default_budget() -> u16 {
    64
}

const fn default_slots() -> u32 {
    1 << 17
}

const fn default_relay_entries() -> u32 {
    1 << 14
}

/// Why settings are refused; the text names the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// `frames` out of range.
    #[error("frames = {0}: must be a power of two from 512 to 4194304")]
    Frames(u32),
    /// `sa_slots` out of range.
    #[error("sa_slots = {0}: must be a power of two from 64 to 16777216")]
    Slots(u32),
    /// `relay_entries` out of range.
    #[error(
        "relay_entries = {0}: must be 1 to 4194304; the XDP programs are left out with relay = \"worker\""
    )]
    RelayEntries(u32),
    /// `busy_poll_us` out of range.
    #[error("busy_poll_us = {0}: must be 0 (interrupts) to 1000000; 20 is usual")]
    BusyPoll(u32),
    /// `busy_poll_budget` out of range.
    #[error("busy_poll_budget = 0: must be 1 to 65535; 64 is what drivers take by themselves")]
    Budget,
    /// The same interface twice.
    #[error("interface {0:?} is named twice")]
    DuplicateInterface(String),
    /// A name that the kernel does not take.
    #[error("interface name {0:?}: 1 to 15 bytes, no slash and no white space")]
    InterfaceName(String),
    /// The same processor twice.
    #[error("cores: processor {0} is named twice; each worker needs one of its own")]
    DuplicateCore(u16),
}

impl DatapathSettings {
    /// Checks what the types cannot say.
    pub fn validate(&self) -> Result<(), SettingsError> {
        if !self.frames.is_power_of_two() || !(512..=1 << 22).contains(&self.frames) {
            return Err(SettingsError::Frames(self.frames));
        }
        if !self.sa_slots.is_power_of_two() || !(64..=1 << 24).contains(&self.sa_slots) {
            return Err(SettingsError::Slots(self.sa_slots));
        }
        if !(1..=1 << 22).contains(&self.relay_entries) {
            return Err(SettingsError::RelayEntries(self.relay_entries));
        }
        if self.busy_poll_us > 1_000_000 {
            return Err(SettingsError::BusyPoll(self.busy_poll_us));
        }
        if self.busy_poll_budget == 0 {
            return Err(SettingsError::Budget);
        }
        let mut names = std::collections::HashSet::new();
        for interface in &self.interfaces {
            let name = &interface.name;
            if name.is_empty() || name.len() > 15 || name.contains(|c: char| c == '/' || c.is_whitespace()) {
                return Err(SettingsError::InterfaceName(name.clone()));
            }
            if !names.insert(name) {
                return Err(SettingsError::DuplicateInterface(name.clone()));
            }
        }
        let mut cores = std::collections::HashSet::new();
        if let Some(core) = self.cores.iter().find(|core| !cores.insert(**core)) {
            return Err(SettingsError::DuplicateCore(*core));
        }
        Ok(())
    }

    /// Number of workers.
    pub fn workers(&self) -> usize {
        self.cores.len().max(1)
    }
}
