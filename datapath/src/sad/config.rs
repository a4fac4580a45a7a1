//! The configuration half of an SA: immutable, shared with the main thread, replaced as a whole (DESIGN decision 3).

use std::net::IpAddr;

use postern_contract::request::Refusal;
use postern_contract::sa::{
    AddressRange, Direction, DscpPolicy, FanOut, IpsecProtocol, KeyOrigin, Lifetime, Limits, Mode,
    PathPolicy, SaConfig, SaId, Selector, UdpEncap,
};
use postern_contract::{Generation, Translation};
use postern_wire::flow::Flow;
use postern_wire::ids::{Protocol, Spi};

use crate::crypto::{AhKey, EspKey, Serial, fingerprint, key_check};
use crate::sad::lookup::Handle;
use crate::selectors::{Selectors, V4};

/// Keys of one SA.
#[derive(Debug)]
pub enum SaKey {
    /// ESP.
    Esp(EspKey),
    /// AH, which is rare: side by side with ESP's it would make each SA larger.
    Ah(Box<AhKey>),
}

impl SaKey {
    /// Names the key where it stands expanded; `None` of a transform that is not.
    pub fn serial(&self) -> Option<Serial> {
        match self {
            Self::Esp(key) => key.serial(),
            Self::Ah(key) => key.serial(),
        }
    }
}

/// What every packet of an SA needs to know and none changes.
///
/// A million of these exist, so what only some SAs have is boxed or packed.
#[derive(Debug)]
pub struct SaShared {
    /// Keys.
    pub key: SaKey,
    /// Control's name for the SA.
    pub id: SaId,
    /// State of the description.
    pub generation: Generation,
    /// SPIs.
    pub spi: Translation<Spi>,
    /// This node's address on the wire.
    pub local: IpAddr,
    /// The peer's address on the wire, as installed.
    pub remote: IpAddr,
    /// UDP encapsulation, as installed.
    pub encap: Option<UdpEncap>,
    /// Sizes and header fields.
    pub path: PathPolicy,
    /// Tunnel or transport.
    pub mode: Mode,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// MOB-2.
    pub follow_peer: bool,
    /// What decides on each packet's way through the stages; see [`Self::is_plain`].
    shape: u8,
    /// Size of the anti-replay window.
    pub replay_window: u16,
    /// Where the runtime half is; the publisher's, who sets it before a worker sees the SA.
    pub handle: Handle,
    /// Second since the start from which time limits count; the publisher's as well.
    pub installed: u32,
    /// Tells keys apart without showing them.
    pub key_check: [u8; 8],
    /// The SA of the other direction; this SA itself if there is none.
    pair: SaId,
    side: Side,
    rare: Option<Box<Rare>>,
}

// With the reference counts in front and the allocator's word 224 bytes.
const _: () = assert!(size_of::<SaShared>() == 192);

/// Bits of `shape`.
const PLAIN: u8 = 1;
const METERED: u8 = 2;
const SHARED: u8 = 4;
const ALWAYS: u8 = 8;

/// What only SAs of one direction have.
#[derive(Debug)]
enum Side {
    /// What a decrypted packet must match.
    Inbound(Selectors),
    /// Names the keys in the ledger of reserved sequence numbers. What the SA may carry is a matter of policies.
    Outbound([u8; 16]),
}

/// What few SAs have.
#[derive(Debug)]
struct Rare {
    /// What the ICV covers in place of `local` and `remote`, behind a relay (RLY-2).
    authenticated: Option<(IpAddr, IpAddr)>,
    lifetime: Lifetime,
    /// Whether what is reserved for the keys outlives the SA.
    origin: KeyOrigin,
    /// The other SA of the bundle.
    bundle: Option<SaId>,
}

impl SaShared {
    /// Checks `config` and takes its keys.
    ///
    /// # Errors
    /// [`Refusal::Suite`] or [`Refusal::Invalid`], naming the field and what is allowed.
    pub fn build(config: &SaConfig) -> Result<Self, Refusal> {
        let SaConfig {
            id,
            generation,
            direction,
            protocol,
            mode,
            spi,
            local,
            remote,
            encap,
            suite,
            esn,
            replay_window,
            sequence,
            selectors,
            lifetime,
            path,
            follow_peer,
            pair,
            bundle,
            origin,
            worker: _,
            fan_out,
        } = config;
        suite.validate(*protocol)?;
        let invalid = |text: &str| Err(Refusal::Invalid(text.to_owned()));
        if !spi.on_wire.is_usable() || !spi.authenticated.is_usable() {
            return invalid("spi: 0 to 255 are reserved (RFC 4303 section 2.1)");
        }
        if local.on_wire.is_ipv4() != remote.on_wire.is_ipv4()
            || local.authenticated.is_ipv4() != remote.authenticated.is_ipv4()
        {
            return invalid("local and remote must be of one address family");
        }
        if local.on_wire.is_ipv4() != local.authenticated.is_ipv4() {
            return invalid("local and remote: a relay swaps addresses, so both its sides are of one family");
        }
        if *protocol == IpsecProtocol::Ah {
            if encap.is_some() {
                return invalid("encap: AH cannot be encapsulated in UDP (RFC 3948)");
            }
            if bundle.is_some() {
                return invalid("bundle: named by the ESP SA, not by the AH SA");
            }
        }
        if encap.is_some() && bundle.is_some() {
            return invalid("encap: an SA bundle has AH outside, which cannot be encapsulated in UDP");
        }
        match direction {
            Direction::Inbound => {
                let size = usize::from(*replay_window);
                if size != 0 && (!(64..=4096).contains(&size) || size % 64 != 0) {
                    return invalid("replay_window: 0, or 64 to 4096 in multiples of 64");
                }
            }
            Direction::Outbound if *sequence == 0 => {
                return invalid("sequence: an outbound SA begins at 1 or above");
            }
            Direction::Outbound => {}
        }
        if !esn && *sequence > u64::from(u32::MAX) {
            return invalid("sequence: above 2^32 - 1 without extended sequence numbers");
        }
        for Selector { local, remote, protocol: _, local_ports, remote_ports } in selectors {
            if !local.is_valid() || !remote.is_valid() || local.start.is_ipv4() != remote.start.is_ipv4() {
                return invalid("selectors: each range needs start <= end, and local and remote one family");
            }
            if local_ports.is_empty() || remote_ports.is_empty() {
                return invalid("selectors: a port range must not be empty");
            }
        }
        if let Some(mtu) = path.mtu
            && mtu < 296
        {
            return invalid("path.mtu: at least 296 bytes, below which no useful inner packet fits");
        }
        if let DscpPolicy::Fixed(64..) = path.dscp {
            return invalid("path.dscp: 0 to 63");
        }
        let key = match protocol {
            IpsecProtocol::Esp => SaKey::Esp(EspKey::new(suite)?),
            IpsecProtocol::Ah => SaKey::Ah(Box::new(AhKey::new(suite)?)),
        };
        let authenticated = (local.is_translated() || remote.is_translated())
            .then_some((local.authenticated, remote.authenticated));
        let plain = matches!(key, SaKey::Esp(_))
            && *mode == Mode::Tunnel
            && !spi.is_translated()
            && authenticated.is_none()
            && bundle.is_none();
        let counts = |limits: &Limits| limits.packets.is_some() || limits.bytes.is_some();
        let metered = counts(&lifetime.soft) || counts(&lifetime.hard);
        // AH is made over what ESP left, and verified before it: a bundle's packets would go out twice.
        let shared = match fan_out {
            _ if *protocol == IpsecProtocol::Ah || bundle.is_some() => 0,
            FanOut::ByLoad => SHARED,
            FanOut::Always => SHARED | ALWAYS,
            FanOut::Never => 0,
        };
        let rare = authenticated.is_some()
            || bundle.is_some()
            || *origin != KeyOrigin::Negotiated
            || *lifetime != Lifetime::default();
        Ok(Self {
            key,
            id: *id,
            generation: *generation,
            spi: *spi,
            local: local.on_wire,
            remote: remote.on_wire,
            encap: *encap,
            path: *path,
            mode: *mode,
            esn: *esn,
            follow_peer: *follow_peer,
            shape: if plain { PLAIN } else { 0 } | if metered { METERED } else { 0 } | shared,
            replay_window: *replay_window,
            handle: Handle::NOWHERE,
            installed: 0,
            key_check: key_check(suite),
            pair: pair.unwrap_or(*id),
            side: match direction {
                Direction::Inbound => Side::Inbound(Selectors::new(selectors)),
                Direction::Outbound => Side::Outbound(fingerprint(suite)),
            },
            rare: rare.then(|| {
                Box::new(Rare { authenticated, lifetime: *lifetime, origin: *origin, bundle: *bundle })
            }),
        })
    }

    /// Inbound or outbound.
    pub const fn direction(&self) -> Direction {
        match self.side {
            Side::Inbound(_) => Direction::Inbound,
            Side::Outbound(_) => Direction::Outbound,
        }
    }

    /// Inbound: whether a decrypted packet may have come through this SA (RFC 4301 section 5.2, step 4).
    #[inline]
    pub fn admits(&self, flow: &Flow) -> bool {
        matches!(&self.side, Side::Inbound(selectors) if selectors.match_inbound(flow))
    }

    /// Inbound: the selector, if it is a single one of IPv4 addresses.
    pub const fn selector(&self) -> Option<V4> {
        match &self.side {
            Side::Inbound(selectors) => selectors.single(),
            Side::Outbound(_) => None,
        }
    }

    /// Outbound: names the keys in the ledger of reserved sequence numbers.
    pub const fn fingerprint(&self) -> Option<&[u8; 16]> {
        match &self.side {
            Side::Inbound(_) => None,
            Side::Outbound(fingerprint) => Some(fingerprint),
        }
    }

    /// The SA of the other direction.
    pub fn pair(&self) -> Option<SaId> {
        (self.pair != self.id).then_some(self.pair)
    }

    /// ESP or AH.
    pub const fn protocol(&self) -> IpsecProtocol {
        match self.key {
            SaKey::Esp(_) => IpsecProtocol::Esp,
            SaKey::Ah(_) => IpsecProtocol::Ah,
        }
    }

    /// ESP alone, in tunnel mode and with nothing to be translated: what the stages have a short way for.
    pub const fn is_plain(&self) -> bool {
        self.shape & PLAIN != 0
    }

    /// Has a limit of packets or bytes, so that each packet is to be counted against it.
    pub const fn is_metered(&self) -> bool {
        self.shape & METERED != 0
    }

    /// Whether other workers may seal and open its packets (DP-8).
    pub const fn may_fan_out(&self) -> bool {
        self.shape & SHARED != 0
    }

    /// Whether they are to, whatever the load.
    pub const fn always_fans_out(&self) -> bool {
        self.shape & ALWAYS != 0
    }

    /// Whether the keys may be installed again after the SA was removed.
    pub fn has_static_keys(&self) -> bool {
        self.rare.as_deref().is_some_and(|rare| rare.origin == KeyOrigin::Static)
    }

    /// Whether the other SA of a bundle must be applied or must have been verified.
    pub fn is_bundled(&self) -> bool {
        self.bundle().is_some()
    }

    /// The other SA of the bundle.
    pub fn bundle(&self) -> Option<SaId> {
        self.rare.as_deref()?.bundle
    }

    /// Limits, if there are any.
    pub fn lifetime(&self) -> Option<&Lifetime> {
        self.rare.as_deref().map(|rare| &rare.lifetime).filter(|lifetime| **lifetime != Lifetime::default())
    }

    /// The addresses (this node's, the peer's) that the ICV covers, where they are others than those on the wire.
    pub fn authenticated(&self) -> Option<(IpAddr, IpAddr)> {
        self.rare.as_deref()?.authenticated
    }

    /// The IP protocol number of the SA.
    pub const fn ip_protocol(&self) -> Protocol {
        match self.protocol() {
            IpsecProtocol::Esp => Protocol::ESP,
            IpsecProtocol::Ah => Protocol::AH,
        }
    }

    /// Which field of `other` differs though an installed SA cannot change it; `None` if `other` may replace this.
    pub fn immutable_difference(&self, other: &Self) -> Option<&'static str> {
        let differences = [
            (self.direction() != other.direction(), "direction"),
            (self.protocol() != other.protocol(), "protocol"),
            (self.spi.on_wire != other.spi.on_wire, "spi"),
            (self.key_check != other.key_check, "keys"),
            (self.esn != other.esn, "esn"),
            (self.replay_window != other.replay_window, "replay_window"),
        ];
        differences.into_iter().find_map(|(differs, name)| differs.then_some(name))
    }

    /// The addresses that an ICV covers: (this node's, the peer's), where the peer is now at `remote`.
    pub fn authenticated_addresses(&self, remote: IpAddr) -> (IpAddr, IpAddr) {
        self.authenticated().unwrap_or((self.local, remote))
    }

    /// `Translation` of both addresses as installed, for reports.
    pub fn translations(&self) -> (Translation<IpAddr>, Translation<IpAddr>) {
        let (local, remote) = self.authenticated_addresses(self.remote);
        (
            Translation { on_wire: self.local, authenticated: local },
            Translation { on_wire: self.remote, authenticated: remote },
        )
    }
}

/// A range that holds exactly `address`.
pub const fn host_range(address: IpAddr) -> AddressRange {
    AddressRange { start: address, end: address }
}
