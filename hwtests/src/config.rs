//! Postern's configuration as the tests generate it, the suites they go through, and pairs of tunnels that fit.
//!
//! The types mirror the file's layout (README, "Configuration"); what is left out of a value is left out of the
//! file, so the defaults under test are Postern's own.

pub mod ike;

use std::io::Read;
use std::net::IpAddr;

use anyhow::Result;
use serde::Serialize;

use crate::config::ike::{Connection, Ike, Pool};
use crate::oracle::{OracleSa, hex};

/// The whole file.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Config {
    /// `[datapath]`.
    pub datapath: Datapath,
    /// `[control]`.
    pub control: Control,
    /// `[ike]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ike: Option<Ike>,
    /// `[recovery]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
    /// `[[pool]]`.
    #[serde(rename = "pool", skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<Pool>,
    /// `[[connection]]`.
    #[serde(rename = "connection", skip_serializing_if = "Vec::is_empty")]
    pub connections: Vec<Connection>,
    /// `[[tunnel]]`.
    #[serde(rename = "tunnel", skip_serializing_if = "Vec::is_empty")]
    pub tunnels: Vec<Tunnel>,
    /// `[[policy]]`.
    #[serde(rename = "policy", skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<Policy>,
    /// `[[relay]]`.
    #[serde(rename = "relay", skip_serializing_if = "Vec::is_empty")]
    pub relays: Vec<Relay>,
}

/// `[datapath]`. Paths are filled in by [`crate::node::Node::start`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct Datapath {
    /// Socket.
    pub socket: String,
    /// State directory.
    pub state: String,
    /// Control starts the datapath.
    pub start: bool,
    /// Processors of the workers.
    pub cores: Vec<u16>,
    /// Whether the kernel says when it wants to be called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub need_wakeup: Option<bool>,
    /// How long a worker runs the driver's receive loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busy_poll_us: Option<u32>,
    /// What an idle worker does: `poll` or `spin`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<&'static str>,
    /// Most SAs, of both directions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sa_slots: Option<u32>,
    /// Where relay entries are executed: `xdp` or `worker`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relay: Option<&'static str>,
    /// `[[datapath.interface]]`.
    #[serde(rename = "interface")]
    pub interfaces: Vec<Interface>,
}

/// `[[datapath.interface]]`.
#[derive(Clone, Debug, Serialize)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// `outside`, `inside` or `both`.
    pub role: &'static str,
    /// `xsk`, `tun` or `socket`.
    pub port: &'static str,
}

/// `[control]`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Control {
    /// Management socket.
    pub socket: String,
    /// State directory.
    pub state: String,
}

/// `[recovery]`. What is left out keeps Postern's default.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Recovery {
    /// Block device or file that the backup is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// File with the passphrase of the private half.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passphrase_file: Option<String>,
    /// Name of the credential with the private half.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// How the TPM is reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcti: Option<String>,
    /// The TPM counts generations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm_counter: Option<bool>,
}

/// `[[tunnel]]`.
#[derive(Clone, Debug, Serialize)]
pub struct Tunnel {
    /// Name.
    pub name: String,
    /// This node's outer address.
    pub local: IpAddr,
    /// The peer's, or the relay's.
    pub remote: IpAddr,
    /// `tunnel` or `transport`.
    pub mode: &'static str,
    /// ESP suite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub esp: Option<&'static str>,
    /// AH suite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ah: Option<&'static str>,
    /// Outbound SPIs and keys.
    pub out: Keys,
    /// Inbound SPIs and keys.
    #[serde(rename = "in")]
    pub inbound: Keys,
    /// Networks behind this node.
    pub local_net: Vec<String>,
    /// Networks behind the peer.
    pub remote_net: Vec<String>,
    /// UDP encapsulation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encap: Option<Encap>,
    /// 64-bit sequence numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub esn: Option<bool>,
    /// Anti-replay window.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay_window: Option<u16>,
    /// MOB-2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub follow_peer: Option<bool>,
    /// Largest outer packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// What the far end sees behind a relay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seen_as: Option<SeenAs>,
}

/// SPIs and keys of one direction.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Keys {
    /// ESP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spi: Option<u32>,
    /// Key with salt, hexadecimal.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// Key of the integrity transform.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub integrity_key: String,
    /// First sequence number to send, or highest received.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// AH.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ah_spi: Option<u32>,
    /// Key of AH.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub ah_key: String,
    /// As `sequence`, for AH.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ah_sequence: Option<u64>,
}

impl Keys {
    /// Sets where the sequence numbers of all SAs of this direction begin.
    pub fn begin_at(&mut self, sequence: u64) {
        self.sequence = self.spi.map(|_| sequence);
        self.ah_sequence = self.ah_spi.map(|_| sequence);
    }
}

/// UDP ports of encapsulation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Encap {
    /// This node's.
    pub local_port: u16,
    /// The peer's.
    pub remote_port: u16,
}

/// The values of the far side of a relay.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SeenAs {
    /// Where the far end sees this node.
    pub local: IpAddr,
    /// The far end's own address.
    pub remote: IpAddr,
    /// The far end's inbound ESP SPI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out_spi: Option<u32>,
    /// The far end's outbound ESP SPI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_spi: Option<u32>,
    /// The far end's inbound AH SPI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ah_out_spi: Option<u32>,
    /// The far end's outbound AH SPI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ah_in_spi: Option<u32>,
}

/// `[[policy]]`.
#[derive(Clone, Debug, Serialize)]
pub struct Policy {
    /// Name.
    pub name: String,
    /// Lower comes first.
    pub priority: u32,
    /// `discard` or `bypass`.
    pub action: &'static str,
    /// Networks behind this node.
    pub local: Vec<String>,
    /// Other networks.
    pub remote: Vec<String>,
}

/// `[[relay]]`.
#[derive(Clone, Debug, Serialize)]
pub struct Relay {
    /// Name.
    pub name: String,
    /// Towards the client.
    pub client: Partition,
    /// Towards the gateway.
    pub gateway: Partition,
}

/// One side of a relay entry.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Partition {
    /// The relay's address on this side.
    pub relay: IpAddr,
    /// The other's.
    pub peer: IpAddr,
    /// UDP encapsulation on this side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encap: Option<Encap>,
    /// SPIs of ESP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub esp: Option<Spis>,
    /// SPIs of AH.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ah: Option<Spis>,
}

/// The two SPIs of one protocol on one side of a relay.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spis {
    /// Of packets to the relay.
    pub to_relay: u32,
    /// Of packets from it.
    pub from_relay: u32,
}

/// One suite under its names here, at the oracle and at tshark.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// Postern's name.
    pub name: &'static str,
    /// `esp` or `ah`.
    pub protocol: &'static str,
    /// The oracle's name of the encryption.
    pub encryption: &'static str,
    /// Bytes of its key, with salt.
    pub key: usize,
    /// The oracle's name of the integrity transform.
    pub integrity: &'static str,
    /// Bytes of its key.
    pub integrity_key: usize,
    /// tshark's names of encryption and authentication, where it checks the ICV.
    pub tshark: Option<(&'static str, &'static str)>,
}

const fn aead(
    name: &'static str,
    encryption: &'static str,
    key: usize,
    tshark: Option<(&'static str, &'static str)>,
) -> Suite {
    Suite { name, protocol: "esp", encryption, key, integrity: "none", integrity_key: 0, tshark }
}

const fn hmac(
    name: &'static str,
    key: usize,
    integrity: &'static str,
    integrity_key: usize,
    tshark: &'static str,
) -> Suite {
    let (encryption, theirs) = if key == 0 { ("null", "NULL") } else { ("aes-cbc", "AES-CBC [RFC3602]") };
    Suite { name, protocol: "esp", encryption, key, integrity, integrity_key, tshark: Some((theirs, tshark)) }
}

const fn ah(name: &'static str, integrity: &'static str, integrity_key: usize) -> Suite {
    Suite { name, protocol: "ah", encryption: "null", key: 0, integrity, integrity_key, tshark: None }
}

const GCM: Option<(&str, &str)> = Some(("AES-GCM with 16 octet ICV [RFC4106]", "NULL"));
const SHA1: &str = "HMAC-SHA-1-96 [RFC2404]";
const SHA256: &str = "HMAC-SHA-256-128 [RFC4868]";
const SHA384: &str = "HMAC-SHA-384-192 [RFC4868]";
const SHA512: &str = "HMAC-SHA-512-256 [RFC4868]";

/// AES-128-GCM, the suite of tests that are about something else.
pub const AES128GCM: Suite = aead("aes128gcm16", "aes-gcm", 20, GCM);

/// Every ESP suite of DP-3.
pub const ESP_SUITES: [Suite; 14] = [
    AES128GCM,
    aead("aes192gcm16", "aes-gcm", 28, GCM),
    aead("aes256gcm16", "aes-gcm", 36, GCM),
    aead("chacha20poly1305", "chacha20-poly1305", 36, None),
    aead("aes128gmac", "aes-gmac", 20, None),
    aead("aes256gmac", "aes-gmac", 36, None),
    hmac("aes128-sha1", 16, "hmac-sha1-96", 20, SHA1),
    hmac("aes128-sha256", 16, "hmac-sha2-256-128", 32, SHA256),
    hmac("aes192-sha384", 24, "hmac-sha2-384-192", 48, SHA384),
    hmac("aes256-sha512", 32, "hmac-sha2-512-256", 64, SHA512),
    hmac("null-sha1", 0, "hmac-sha1-96", 20, SHA1),
    hmac("null-sha256", 0, "hmac-sha2-256-128", 32, SHA256),
    hmac("null-sha384", 0, "hmac-sha2-384-192", 48, SHA384),
    hmac("null-sha512", 0, "hmac-sha2-512-256", 64, SHA512),
];

/// Every AH suite of DP-3.
pub const AH_SUITES: [Suite; 6] = [
    ah("sha1", "hmac-sha1-96", 20),
    ah("sha256", "hmac-sha2-256-128", 32),
    ah("sha384", "hmac-sha2-384-192", 48),
    ah("sha512", "hmac-sha2-512-256", 64),
    ah("aes128gmac", "aes-gmac", 20),
    ah("aes256gmac", "aes-gmac", 36),
];

/// Random bytes for a key.
pub fn random_key(length: usize) -> Result<Vec<u8>> {
    let mut key = vec![0; length];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
    Ok(key)
}

/// Two ends of a tunnel between two networks, before it is known what is in between.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Name; also the start of its SPIs.
    pub name: String,
    /// ESP suite.
    pub esp: Option<Suite>,
    /// AH suite; with `esp` a bundle.
    pub ah: Option<Suite>,
    /// `tunnel` or `transport`.
    pub mode: &'static str,
    /// Outer addresses, left and right, as each end has them.
    pub outer: (IpAddr, IpAddr),
    /// Networks, left and right.
    pub nets: (String, String),
    /// SPIs of packets to the right end and to the left end; AH has the same plus 0x10000.
    pub spis: (u32, u32),
    /// UDP encapsulation on 4500.
    pub natt: bool,
    /// 64-bit sequence numbers; `None` leaves Postern's default.
    pub esn: Option<bool>,
    /// MOB-2; `None` leaves Postern's default.
    pub follow_peer: Option<bool>,
    /// Keys of packets to the right end and to the left end: ESP, its integrity, AH.
    pub keys: [[Vec<u8>; 3]; 2],
}

/// What the SPIs on a relay's client side are above those that both ends' integrity checks cover.
pub const RELAY_SPI_OFFSET: u32 = 0x3000;

/// What AH's SPIs are above ESP's in generated configurations.
pub const AH_SPI_OFFSET: u32 = 0x1_0000;

impl Pair {
    /// A tunnel in tunnel mode with fresh keys. `number` makes its SPIs its own.
    pub fn new(
        number: u32,
        esp: Option<Suite>,
        ah: Option<Suite>,
        outer: (IpAddr, IpAddr),
        nets: (&str, &str),
    ) -> Result<Self> {
        let fresh = || -> Result<[Vec<u8>; 3]> {
            Ok([
                random_key(esp.map_or(0, |suite| suite.key))?,
                random_key(esp.map_or(0, |suite| suite.integrity_key))?,
                random_key(ah.map_or(0, |suite| suite.integrity_key))?,
            ])
        };
        Ok(Self {
            name: format!("t{number}"),
            esp,
            ah,
            mode: "tunnel",
            outer,
            nets: (nets.0.to_owned(), nets.1.to_owned()),
            spis: (0x1001 + number * 0x10, 0x2001 + number * 0x10),
            natt: false,
            esn: None,
            follow_peer: None,
            keys: [fresh()?, fresh()?],
        })
    }

    /// The left end's tunnel.
    pub fn left(&self) -> Tunnel {
        let [right, left] = &self.keys;
        self.tunnel(self.outer, &self.nets.0, &self.nets.1, (self.spis.0, right), (self.spis.1, left))
    }

    /// The right end's tunnel.
    pub fn right(&self) -> Tunnel {
        let [right, left] = &self.keys;
        let outer = (self.outer.1, self.outer.0);
        self.tunnel(outer, &self.nets.1, &self.nets.0, (self.spis.1, left), (self.spis.0, right))
    }

    /// The SA of packets to the right (`true`) or to the left end, for the oracle. `esn` is what is in force.
    pub fn oracle_sa(&self, to_right: bool, esn: bool) -> Option<OracleSa> {
        let [right, left] = &self.keys;
        let ([key, integrity_key, ah_key], spi) =
            if to_right { (right, self.spis.0) } else { (left, self.spis.1) };
        let ah = self.ah.map(|suite| {
            // In a bundle AH covers the ESP packet in transport mode.
            let mode = if self.esp.is_some() { "transport" } else { self.mode };
            OracleSa { esn, ..OracleSa::new(&suite, mode, spi + AH_SPI_OFFSET, &[], ah_key) }
        });
        let Some(esp) = self.esp else { return ah };
        let sa = OracleSa::new(&esp, self.mode, spi, key, integrity_key);
        Some(OracleSa { esn, natt: self.natt, ah: ah.map(Box::new), ..sa })
    }

    fn tunnel(
        &self,
        (local, remote): (IpAddr, IpAddr),
        local_net: &str,
        remote_net: &str,
        out: (u32, &[Vec<u8>; 3]),
        inbound: (u32, &[Vec<u8>; 3]),
    ) -> Tunnel {
        let keys = |(spi, [key, integrity_key, ah_key]): (u32, &[Vec<u8>; 3])| Keys {
            spi: self.esp.map(|_| spi),
            key: hex(key),
            integrity_key: hex(integrity_key),
            sequence: None,
            ah_spi: self.ah.map(|_| spi + AH_SPI_OFFSET),
            ah_key: hex(ah_key),
            ah_sequence: None,
        };
        Tunnel {
            name: self.name.clone(),
            local,
            remote,
            mode: self.mode,
            esp: self.esp.map(|suite| suite.name),
            ah: self.ah.map(|suite| suite.name),
            out: keys(out),
            inbound: keys(inbound),
            local_net: vec![local_net.to_owned()],
            remote_net: vec![remote_net.to_owned()],
            encap: self.natt.then_some(Encap { local_port: 4500, remote_port: 4500 }),
            esn: self.esn,
            replay_window: None,
            follow_peer: self.follow_peer,
            mtu: None,
            seen_as: None,
        }
    }

    /// Puts a relay in between: gives the left end's tunnel, which now knows what the right end sees, the right
    /// end's, and the relay's entry. `left` and `right` are the relay's two addresses.
    pub fn through_relay(&self, left: IpAddr, right: IpAddr) -> (Tunnel, Tunnel, Relay) {
        let moved = |spi: u32| spi + RELAY_SPI_OFFSET;
        let (mut a, mut b) = (self.left(), self.right());
        let seen = a.clone();
        a.remote = left;
        b.remote = right;
        for keys in [&mut a.out, &mut a.inbound] {
            keys.spi = keys.spi.map(moved);
            keys.ah_spi = keys.ah_spi.map(moved);
        }
        a.seen_as = Some(SeenAs {
            local: right,
            remote: self.outer.1,
            out_spi: seen.out.spi,
            in_spi: seen.inbound.spi,
            ah_out_spi: seen.out.ah_spi,
            ah_in_spi: seen.inbound.ah_spi,
        });
        let spis = |to: Option<u32>, from: Option<u32>| {
            to.zip(from).map(|(to_relay, from_relay)| Spis { to_relay, from_relay })
        };
        let relay = Relay {
            name: self.name.clone(),
            client: Partition {
                relay: left,
                peer: self.outer.0,
                encap: a.encap,
                esp: spis(a.out.spi, a.inbound.spi),
                ah: spis(a.out.ah_spi, a.inbound.ah_spi),
            },
            gateway: Partition {
                relay: right,
                peer: self.outer.1,
                encap: b.encap,
                esp: spis(b.out.spi, b.inbound.spi),
                ah: spis(b.out.ah_spi, b.inbound.ah_spi),
            },
        };
        (a, b, relay)
    }
}
