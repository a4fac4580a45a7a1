//! Security associations, traffic selectors and policies as control describes them to the datapath.
//!
//! This is the *configuration half* of an SA (DESIGN decision 3): immutable once published; a move or a rekey
//! sends a new one. What changes with every packet (sequence numbers, window, counters) belongs to one worker.

use core::net::IpAddr;
use core::ops::RangeInclusive;

use postern_wire::ids::{Protocol, Spi};
use serde::{Deserialize, Serialize};

use crate::secret::Secret;
use crate::{Generation, Translation};

/// Control's name for one unidirectional SA; never reused within one state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SaId(pub u64);

/// Control's name for one policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PolicyId(pub u64);

/// Which way an SA carries packets, seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// Packets that this node receives and opens.
    Inbound,
    /// Packets that this node seals and sends.
    Outbound,
}

/// The IPsec protocol of an SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum IpsecProtocol {
    /// Encapsulating Security Payload (RFC 4303).
    Esp,
    /// Authentication Header (RFC 4302).
    Ah,
}

/// RFC 4301 section 4.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// The whole inner packet is protected and gets a new outer header.
    Tunnel,
    /// The packet keeps its header; what follows it is protected.
    Transport,
}

/// Encryption transforms (IANA IKEv2 transform type 1). The key's length picks the variant of AES.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Encryption {
    /// RFC 2410; needs an [`Integrity`]. Also what every AH SA has.
    Null,
    /// RFC 3602, key 16, 24 or 32 bytes; needs an [`Integrity`].
    AesCbc,
    /// RFC 4106 with a 16-byte ICV; key 16, 24 or 32 bytes followed by 4 bytes of salt.
    AesGcm16,
    /// RFC 7634; key 32 bytes followed by 4 bytes of salt.
    ChaCha20Poly1305,
    /// `ENCR_NULL_AUTH_AES_GMAC`, RFC 4543: integrity without confidentiality; key 16, 24 or 32 + 4 bytes of salt.
    NullAuthAesGmac,
}

/// Integrity transforms (IANA IKEv2 transform type 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Integrity {
    /// With an AEAD only.
    None,
    /// RFC 2404: 20-byte key, 12-byte ICV.
    HmacSha1_96,
    /// RFC 4868: 32-byte key, 16-byte ICV.
    HmacSha2_256_128,
    /// RFC 4868: 48-byte key, 24-byte ICV.
    HmacSha2_384_192,
    /// RFC 4868: 64-byte key, 32-byte ICV.
    HmacSha2_512_256,
    /// RFC 4543 section 5, AH only: key 16, 24 or 32 + 4 bytes of salt, 16-byte ICV preceded by an 8-byte IV.
    AesGmac,
}

/// Algorithms and keys of one SA.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Suite {
    /// Encryption transform.
    pub encryption: Encryption,
    /// Key of `encryption`, with the salt behind it where the transform has one.
    pub encryption_key: Secret,
    /// Integrity transform.
    pub integrity: Integrity,
    /// Key of `integrity`.
    pub integrity_key: Secret,
}

/// Why a [`Suite`] is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum SuiteError {
    /// The encryption key has a length that the transform does not take.
    #[error("the key of {0:?} has {1} bytes; see the length that the transform takes")]
    EncryptionKeyLength(Encryption, u16),
    /// The integrity key has a length that the transform does not take.
    #[error("the key of {0:?} has {1} bytes; see the length that the transform takes")]
    IntegrityKeyLength(Integrity, u16),
    /// Encryption without integrity, two integrities at once, or a transform that the protocol does not have.
    #[error("{0:?} with {1:?} is no valid combination for {2:?}")]
    Combination(Encryption, Integrity, IpsecProtocol),
}

impl Suite {
    /// A value that names the algorithms and keys without showing them: both processes, and the operators of both ends,
    /// compare it to see whether they mean the same.
    ///
    /// 64 bits of SHA-256 over the transforms, the lengths and the keys. It says nothing about keys of full entropy; a
    /// guessable key could be confirmed by it.
    pub fn key_check(&self) -> [u8; 8] {
        let Self { encryption, encryption_key, integrity, integrity_key } = self;
        let encryption = match encryption {
            Encryption::Null => b"null",
            Encryption::AesCbc => b"acbc",
            Encryption::AesGcm16 => b"agcm",
            Encryption::ChaCha20Poly1305 => b"ccpy",
            Encryption::NullAuthAesGmac => b"gmac",
        };
        let integrity = match integrity {
            Integrity::None => b"none",
            Integrity::HmacSha1_96 => b"sh1 ",
            Integrity::HmacSha2_256_128 => b"s256",
            Integrity::HmacSha2_384_192 => b"s384",
            Integrity::HmacSha2_512_256 => b"s512",
            Integrity::AesGmac => b"gmac",
        };
        // Keys have at most 64 bytes (`validate`); a longer one is refused before it protects anything.
        let length = u8::try_from(encryption_key.len()).unwrap_or(u8::MAX);
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        for part in [&b"postern key check 1\0"[..], encryption, integrity, &[length]] {
            context.update(part);
        }
        context.update(encryption_key.expose());
        context.update(integrity_key.expose());
        context.finish().as_ref().first_chunk().copied().unwrap_or_default()
    }

    /// Checks the combination for `protocol` and all key lengths.
    pub fn validate(&self, protocol: IpsecProtocol) -> Result<(), SuiteError> {
        let Self { encryption, encryption_key, integrity, integrity_key } = self;
        let combination = match (protocol, encryption, integrity) {
            (IpsecProtocol::Ah, Encryption::Null, Integrity::None) => false,
            (IpsecProtocol::Ah, Encryption::Null, _) => true,
            (IpsecProtocol::Ah, ..) | (IpsecProtocol::Esp, _, Integrity::AesGmac) => false,
            (IpsecProtocol::Esp, Encryption::Null | Encryption::AesCbc, integrity) => {
                *integrity != Integrity::None
            }
            (
                IpsecProtocol::Esp,
                Encryption::AesGcm16 | Encryption::ChaCha20Poly1305 | Encryption::NullAuthAesGmac,
                integrity,
            ) => *integrity == Integrity::None,
        };
        if !combination {
            return Err(SuiteError::Combination(*encryption, *integrity, protocol));
        }
        let length = encryption_key.len();
        let fits = match encryption {
            Encryption::Null => length == 0,
            Encryption::AesCbc => matches!(length, 16 | 24 | 32),
            Encryption::AesGcm16 | Encryption::NullAuthAesGmac => matches!(length, 20 | 28 | 36),
            Encryption::ChaCha20Poly1305 => length == 36,
        };
        if !fits {
            return Err(SuiteError::EncryptionKeyLength(
                *encryption,
                u16::try_from(length).unwrap_or(u16::MAX),
            ));
        }
        let length = integrity_key.len();
        let fits = match integrity {
            Integrity::None => length == 0,
            Integrity::HmacSha1_96 => length == 20,
            Integrity::HmacSha2_256_128 => length == 32,
            Integrity::HmacSha2_384_192 => length == 48,
            Integrity::HmacSha2_512_256 => length == 64,
            Integrity::AesGmac => matches!(length, 20 | 28 | 36),
        };
        if !fits {
            return Err(SuiteError::IntegrityKeyLength(
                *integrity,
                u16::try_from(length).unwrap_or(u16::MAX),
            ));
        }
        Ok(())
    }
}

/// An inclusive range of addresses of one family (RFC 7296 section 3.13.1 gives selectors as ranges).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AddressRange {
    /// First address.
    pub start: IpAddr,
    /// Last address, of the same family and not below `start`.
    pub end: IpAddr,
}

impl AddressRange {
    /// Whether both ends are of one family and in order.
    pub fn is_valid(&self) -> bool {
        self.start.is_ipv4() == self.end.is_ipv4() && self.start <= self.end
    }

    /// Whether `address` lies in the range (never, for the other family).
    pub fn contains(&self, address: IpAddr) -> bool {
        self.start.is_ipv4() == address.is_ipv4() && self.start <= address && address <= self.end
    }
}

impl From<ipnet::IpNet> for AddressRange {
    fn from(net: ipnet::IpNet) -> Self {
        Self { start: net.network(), end: net.broadcast() }
    }
}

/// A *traffic selector* pair (RFC 4301 section 4.4.1.1), seen from this node: `local` is the inside network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Selector {
    /// Addresses on this node's side.
    pub local: AddressRange,
    /// Addresses on the peer's side.
    pub remote: AddressRange,
    /// Upper-layer protocol; `None` is any.
    pub protocol: Option<Protocol>,
    /// Ports on this node's side (for ICMP: type * 256 + code, RFC 4301 section 4.4.1.1); the full range is any, and
    /// then also matches packets that have no ports or hide them (fragments).
    pub local_ports: RangeInclusive<u16>,
    /// Ports on the peer's side.
    pub remote_ports: RangeInclusive<u16>,
}

/// Limits after which an SA is renewed or stopped (RFC 4301 section 4.4.2.1). `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Limits {
    /// Seconds since installation.
    pub seconds: Option<u64>,
    /// Bytes of protected payload.
    pub bytes: Option<u64>,
    /// Packets.
    pub packets: Option<u64>,
}

/// Soft limits raise an event, hard limits stop the SA (DP-4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lifetime {
    /// Renew when reached.
    pub soft: Limits,
    /// Stop when reached.
    pub hard: Limits,
}

/// UDP encapsulation of ESP (RFC 3948): the ports as this node sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct UdpEncap {
    /// This node's port, as a rule 4500.
    pub local_port: u16,
    /// The peer's port, as its NAT shows it.
    pub remote_port: u16,
}

/// What an outer IPv4 header does with Don't Fragment (RFC 4301 section 8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DfPolicy {
    /// As the inner header has it; set when the inner packet is IPv6.
    #[default]
    Copy,
    /// Always set.
    Set,
    /// Never set.
    Clear,
}

/// Where the outer DSCP comes from (RFC 4301 section 5.1.2, footnote 6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DscpPolicy {
    /// From the inner header.
    #[default]
    Copy,
    /// A fixed value, 0 to 63.
    Fixed(u8),
}

/// How an outbound SA treats packet sizes and header fields (DP-5); an inbound one uses `mss_clamp` and `ecn` only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PathPolicy {
    /// Don't Fragment in the outer IPv4 header.
    pub df: DfPolicy,
    /// DSCP in the outer header.
    pub dscp: DscpPolicy,
    /// ECN normal mode of RFC 6040; off is its compatibility mode (outer Not-ECT).
    pub ecn: bool,
    /// Largest outer packet in bytes, if smaller than the egress interface's MTU.
    pub mtu: Option<u16>,
    /// Clamp the MSS of TCP SYNs, both directions, to what fits the tunnel.
    pub mss_clamp: bool,
}

impl Default for PathPolicy {
    fn default() -> Self {
        Self { df: DfPolicy::Copy, dscp: DscpPolicy::Copy, ecn: true, mtu: None, mss_clamp: true }
    }
}

/// Where the keys of an SA come from, and so whether they may be installed once more after it or in another life of the
/// datapath. If they may, what was reserved of its sequence numbers and what its window had accepted is kept for them,
/// so that no number is used twice with the same key and no packet is taken twice (DESIGN decision 8, DP-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum KeyOrigin {
    /// Negotiated: they never come back.
    Negotiated,
    /// Negotiated and saved with their IKE SA: after a reset they may come back as [`Restored`](Self::Restored), unless
    /// the SA was removed before.
    Saved,
    /// Negotiated before a reset. Refused if the datapath does not remember them.
    Restored,
    /// From a file: they come back at any time, also after the SA was removed.
    Static,
}

/// Whether workers that do not own an SA may seal and open its packets, so that one SA is not bound to one core's speed
/// (DP-8). Numbers, window, limits and the order of packets stay with the owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FanOut {
    /// While the owner has more packets than it can take and another worker has little to do.
    #[default]
    ByLoad,
    /// Always, with one worker or many.
    Always,
    /// Never.
    Never,
}

/// Everything the datapath needs to know about one SA.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct SaConfig {
    /// Control's name for it.
    pub id: SaId,
    /// State of this description.
    pub generation: Generation,
    /// Inbound or outbound.
    pub direction: Direction,
    /// ESP or AH.
    pub protocol: IpsecProtocol,
    /// Tunnel or transport.
    pub mode: Mode,
    /// The SPI (inbound: chosen by this side; outbound: by the peer).
    pub spi: Translation<Spi>,
    /// This node's outer address.
    pub local: Translation<IpAddr>,
    /// The peer's outer address.
    pub remote: Translation<IpAddr>,
    /// UDP encapsulation, ESP only.
    pub encap: Option<UdpEncap>,
    /// Algorithms and keys.
    pub suite: Suite,
    /// 64-bit sequence numbers (RFC 4303 section 2.2.1).
    pub esn: bool,
    /// Anti-replay window in packets, 64 to 4096 in multiples of 64; 0 turns the check off. Inbound only.
    pub replay_window: u16,
    /// Outbound: the first sequence number to send, at least 1. Inbound: the highest number already accepted, 0 if none.
    pub sequence: u64,
    /// Inbound: what a decrypted packet must match, any of them. Outbound: what the SA may carry, checked by policy.
    pub selectors: Vec<Selector>,
    /// Soft and hard limits.
    pub lifetime: Lifetime,
    /// Sizes and header fields.
    pub path: PathPolicy,
    /// MOB-2: an authenticated newest packet from another outer source moves the peer's address. Inbound only.
    pub follow_peer: bool,
    /// The SA of the other direction, on the same worker; its path follows with MOB-2.
    pub pair: Option<SaId>,
    /// SA bundle: for an ESP SA the AH SA that is applied after it (outbound) or must have been verified before it (inbound).
    pub bundle: Option<SaId>,
    /// Whether the keys may be installed once more.
    pub origin: KeyOrigin,
    /// Worker that owns the SA; `None` lets the datapath choose.
    pub worker: Option<u16>,
    /// Whether other workers may encrypt and decrypt for the owner. ESP only, and not in a bundle.
    pub fan_out: FanOut,
}

/// What to do with a packet that a policy's selectors match (RFC 4301 section 4.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Send it through this outbound SA; `None` means that there is none yet, so the packet is dropped and an `Acquire` event raised.
    Protect(Option<SaId>),
    /// Forward it as it is.
    Bypass,
    /// Drop it.
    Discard,
}

/// One entry of the outbound SPD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Control's name for it.
    pub id: PolicyId,
    /// State of this description.
    pub generation: Generation,
    /// Lower is looked at first; entries of equal priority in the order of their ids.
    pub priority: u32,
    /// Any of these matches.
    pub selectors: Vec<Selector>,
    /// What to do.
    pub action: Action,
}
