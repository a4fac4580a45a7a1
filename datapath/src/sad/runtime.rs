//! The runtime half of an SA: owned by one worker, changed by plain `&mut` (DESIGN decision 3).
//!
//! What every packet changes is one cache line; the one behind it has what usual packets ask of the configuration, ready
//! to be compared or written, and the key of nearly all of them. So a packet needs two lines of its SA, which with 100,000 SAs
//! fit into a cache. What only some packets or some SAs need is in [`Rest`], elsewhere.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use postern_contract::sa::{DfPolicy, DscpPolicy, Lifetime};
use postern_wire::ids::Protocol;
use postern_wire::{checksum, esp, ip4, udp};

use crate::crypto::{KeyRef, SequenceCounter, ShortKey};
use crate::fib::ExitName;
use crate::sad::config::{SaKey, SaShared};
use crate::sad::lifetime::{LifetimeEvent, LifetimeState};
use crate::sad::replay::ReplayWindow;
use crate::sad::slab::Slab;
use crate::selectors::V4;

/// No linked SA.
pub const NO_LINK: u32 = u32::MAX;

/// Packets and bytes that an SA carried, and when it last did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes of inner packets.
    pub bytes: u64,
}

impl Traffic {
    /// With one packet more.
    #[must_use]
    pub const fn with(self, bytes: u64) -> Self {
        Self { packets: self.packets + 1, bytes: self.bytes + bytes }
    }
}

/// An inbound SA in its worker's hands. The fields are in the order in which they lie in memory.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Inbound {
    /// The configuration half.
    pub config: Arc<SaShared>,
    /// Anti-replay window and ESN.
    pub window: ReplayWindow,
    /// Traffic so far.
    pub traffic: Traffic,
    /// Second, since the start of the datapath, of the last packet; 0 if there was none.
    pub last_used: u32,
    /// UDP port of the peer as last seen; 0 without encapsulation.
    pub peer_port: u16,
    /// A hard limit stopped it.
    pub stopped: bool,
    /// The peer is not at the address that it was installed with, but at the one in [`Rest`].
    moved: bool,
    /// A copy of the key, if that is a short one.
    key: ShortKey,
    /// What usual packets are held against.
    pub expected: Expected,
}

/// An outbound SA in its worker's hands. The fields are in the order in which they lie in memory.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Outbound {
    /// The configuration half.
    pub config: Arc<SaShared>,
    /// The only source of its sequence numbers.
    pub sequence: SequenceCounter,
    /// Traffic so far.
    pub traffic: Traffic,
    /// Second, since the start of the datapath, of the last packet; 0 if there was none.
    pub last_used: u32,
    /// Index of the outbound AH SA of the bundle, in the same worker's table.
    pub bundle: u32,
    /// UDP port of the peer; 0 without encapsulation.
    pub peer_port: u16,
    /// A hard limit or the end of the sequence space stopped it.
    pub stopped: bool,
    /// More numbers were asked for and not yet granted.
    pub reserving: bool,
    /// The peer is not at the address that it was installed with, but at the one in [`Rest`].
    moved: bool,
    /// A copy of the key, if that is a short one.
    key: ShortKey,
    /// What the headers of usual packets are made of.
    pub template: Template,
}

const _: () = assert!(size_of::<Option<Inbound>>() == 128 && size_of::<Option<Outbound>>() == 128);
const _: () = assert!(std::mem::offset_of!(Inbound, key) == 64);
const _: () = assert!(std::mem::offset_of!(Outbound, key) == 64);

/// What a usual inbound packet is held against: of a plain SA with one selector of IPv4 addresses, with a peer on IPv4,
/// and without limits of packets or bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Expected {
    /// What decrypted packets must match.
    pub selector: V4,
    /// The peer's address.
    pub peer: u32,
    /// What is true of it.
    pub is: Traits,
    /// Bytes of ESP header and IV.
    pub front: u8,
    /// Bytes of the ICV.
    pub icv_len: u8,
}

/// What is true of a usual SA, in bits.
#[derive(Clone, Copy, Debug)]
pub struct Traits(u8);

impl Traits {
    const NONE: Self = Self(0);
    const USABLE: u8 = 1;
    const ESN: u8 = 2;
    const ENCAPSULATED: u8 = 4;
    const FOLLOW: u8 = 8;

    fn new(config: &SaShared, usable: bool) -> Self {
        let bit = |bit: u8, set: bool| if set { bit } else { 0 };
        Self(
            bit(Self::USABLE, usable && config.is_plain() && !config.is_metered())
                | bit(Self::ESN, config.esn)
                | bit(Self::ENCAPSULATED, config.encap.is_some())
                | bit(Self::FOLLOW, config.follow_peer),
        )
    }

    /// Whether there are usual packets at all.
    #[inline]
    pub const fn usable(self) -> bool {
        self.0 & Self::USABLE != 0
    }

    /// 64-bit sequence numbers.
    #[inline]
    pub const fn esn(self) -> bool {
        self.0 & Self::ESN != 0
    }

    /// In UDP.
    #[inline]
    pub const fn encapsulated(self) -> bool {
        self.0 & Self::ENCAPSULATED != 0
    }

    /// MOB-2.
    #[inline]
    pub const fn follow(self) -> bool {
        self.0 & Self::FOLLOW != 0
    }
}

impl Expected {
    const NOTHING: Self = Self { selector: V4::NOTHING, peer: 0, is: Traits::NONE, front: 0, icv_len: 0 };

    fn new(config: &SaShared, peer: IpAddr) -> Self {
        let (SaKey::Esp(key), IpAddr::V4(peer), Some(selector)) = (&config.key, peer, config.selector())
        else {
            return Self::NOTHING;
        };
        let layout = key.layout();
        let Ok(header) = u8::try_from(esp::HEADER_LEN) else { return Self::NOTHING };
        Self {
            selector,
            peer: peer.to_bits(),
            is: Traits::new(config, true),
            front: header + layout.iv_len,
            icv_len: layout.icv_len,
        }
    }
}

/// Bytes of the longest outer headers up to the SPI: IPv4, UDP, SPI.
pub const HEAD: usize = ip4::MIN_LEN + udp::LEN + 4;

/// TTL and hop limit of outer headers (RFC 1700's default; RFC 4301 section 5.1.2 leaves it to configuration).
pub const OUTER_TTL: u8 = 64;

/// What usual outbound packets get: of a plain SA over IPv4 without limits of packets or bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Template {
    /// How packets to the peer left last.
    pub exit: ExitName,
    source: u32,
    destination: u32,
    /// Source and destination port of UDP.
    ports: u32,
    spi: u32,
    /// Sum of the IPv4 header in which TOS, length, identification, flags and checksum are zero.
    sum: u16,
    /// The configured limit of outer packets in bytes; `u16::MAX` without one.
    pub mtu: u16,
    /// What is true of it.
    pub is: Traits,
    /// Bytes of the IV.
    pub iv_len: u8,
    /// Bytes of the ICV.
    pub icv_len: u8,
    /// The block less one.
    pub block_mask: u8,
    /// The bits of the inner TOS that are copied, and those that are set.
    pub tos: (u8, u8),
    /// What becomes of the inner DF.
    pub df: DfPolicy,
}

/// What of a usual packet's outer headers may be its own.
#[derive(Clone, Copy, Debug)]
pub struct Varying {
    /// TOS of the inner packet.
    pub tos: u8,
    /// DF of the inner packet.
    pub dont_fragment: bool,
    /// Identification of what may be fragmented.
    pub id: u16,
    /// Bytes of the outer packet.
    pub total: u16,
}

impl Template {
    const NOTHING: Self = Self {
        exit: ExitName::NONE,
        source: 0,
        destination: 0,
        ports: 0,
        spi: 0,
        sum: 0,
        mtu: 0,
        is: Traits::NONE,
        iv_len: 0,
        icv_len: 0,
        block_mask: 0,
        tos: (0, 0),
        df: DfPolicy::Clear,
    };

    fn new(config: &SaShared, peer: IpAddr, peer_port: u16) -> Self {
        Self::make(config, peer, peer_port).unwrap_or(Self::NOTHING)
    }

    fn make(config: &SaShared, peer: IpAddr, peer_port: u16) -> Option<Self> {
        const ECN: u8 = 0b11;
        let (SaKey::Esp(key), IpAddr::V4(source), IpAddr::V4(destination)) =
            (&config.key, config.local, peer)
        else {
            return None;
        };
        let (source, destination) = (source.to_bits(), destination.to_bits());
        let ports = config.encap.map_or(0, |encap| u32::from(encap.local_port) << 16 | u32::from(peer_port));
        let layout = key.layout();
        let ecn = if config.path.ecn { ECN } else { 0 };
        let made = Self {
            exit: ExitName::NONE,
            source,
            destination,
            ports,
            spi: config.spi.on_wire.0,
            sum: 0,
            mtu: config.path.mtu.unwrap_or(u16::MAX),
            // Without an IV the zeros behind the SPI would reach into the packet.
            is: Traits::new(config, layout.iv_len >= 8),
            iv_len: layout.iv_len,
            icv_len: layout.icv_len,
            block_mask: layout.block.checked_sub(1)?,
            tos: match config.path.dscp {
                DscpPolicy::Copy => (!ECN | ecn, 0),
                DscpPolicy::Fixed(dscp) => (ecn, dscp << 2),
            },
            df: config.path.df,
        };
        let [first, second, third, _] = made.words(0, 0);
        let fixed = [first & 0xff00_0000_0000_0000, second, third & !0xffff_ffff];
        let sum = checksum::fold(checksum::sum(fixed.map(u64::to_be_bytes).as_flattened()));
        Some(Self { sum, ..made })
    }

    /// Offset of the ESP header.
    #[inline]
    pub const fn at(&self) -> u16 {
        if self.is.encapsulated() { IP + UDP } else { IP }
    }

    /// The peer.
    #[inline]
    pub const fn peer(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.destination)
    }

    /// The headers as far as packets have them in common.
    #[inline]
    pub fn stencil(&self) -> Stencil {
        // Of no bytes in UDP, so that its length is zero.
        let [_, second, third, fourth] = self.words(IP, 0).map(u64::to_be);
        let Self { sum, is, tos, df, .. } = *self;
        Stencil { second, third, fourth, sum: sum.into(), encapsulated: is.encapsulated(), tos, df }
    }

    /// The headers in big-endian words, the first of them with nothing but the version and the header's length.
    #[inline]
    fn words(&self, total: u16, check: u16) -> [u64; 4] {
        let encapsulated = self.is.encapsulated();
        let protocol = if encapsulated { Protocol::UDP } else { Protocol::ESP };
        let [ttl, protocol, check] = [OUTER_TTL.into(), protocol.0.into(), u64::from(check)];
        let (behind, last) = if encapsulated {
            (self.ports, u64::from(total.wrapping_sub(IP)) << 48 | u64::from(self.spi))
        } else {
            (self.spi, 0)
        };
        [
            0x45 << 56,
            ttl << 56 | protocol << 48 | check << 32 | u64::from(self.source),
            u64::from(self.destination) << 32 | u64::from(behind),
            last,
        ]
    }
}

/// A [`Template`]'s headers, with nothing left to do but what a packet changes in them.
#[derive(Clone, Copy, Debug)]
pub struct Stencil {
    /// The words behind the first one, as they stand in memory, with the fields that packets change zero.
    second: u64,
    third: u64,
    fourth: u64,
    /// As the template's.
    sum: u32,
    encapsulated: bool,
    tos: (u8, u8),
    df: DfPolicy,
}

impl Stencil {
    /// Writes the headers up to the SPI, and zeros behind it (RFC 791, RFC 3948 section 2.1).
    ///
    /// Word by word to where they stay: what was written in words and is read in wider ones has to wait for memory.
    #[inline]
    pub fn write(&self, head: &mut [u8; HEAD], varying: Varying) {
        let Varying { tos, dont_fragment, id, total } = varying;
        let dont_fragment = match self.df {
            DfPolicy::Copy => dont_fragment,
            DfPolicy::Set => true,
            DfPolicy::Clear => false,
        };
        // RFC 6864: an atomic datagram's ID has no meaning; others need one that does not come back soon.
        let low: u32 = if dont_fragment { 0x4000 } else { u32::from(id) << 16 };
        let tos = tos & self.tos.0 | self.tos.1;
        let high = 0x4500_0000 | u32::from(tos) << 16 | u32::from(total);
        let varying = u32::from(tos) + u32::from(total) + (low >> 16) + (low & 0xffff);
        let check = !checksum::fold_few(self.sum + varying);
        let length = if self.encapsulated { total.wrapping_sub(IP) } else { 0 };
        let words = [
            (u64::from(high) << 32 | u64::from(low)).to_be(),
            self.second | (u64::from(check) << 32).to_be(),
            self.third,
            self.fourth | (u64::from(length) << 48).to_be(),
        ];
        for (place, word) in head.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_ne_bytes();
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "20 and 8 fit")]
const IP: u16 = ip4::MIN_LEN as u16;
#[expect(clippy::cast_possible_truncation, reason = "20 and 8 fit")]
const UDP: u16 = udp::LEN as u16;

/// What packets of an SA need only sometimes.
#[derive(Debug)]
pub struct Rest {
    /// Limits; `None` without any.
    pub lifetime: Option<Box<LifetimeState>>,
    /// Index of the outbound SA of the pair, in the same worker's table; of an inbound SA.
    pub pair: u32,
    /// Index of the inbound AH SA of the bundle, in the same worker's table; of an inbound SA.
    pub bundle: u32,
    /// The peer's address as last seen on an authenticated, newest packet (MOB-2), once it moved.
    moved_to: IpAddr,
}

const _: () = assert!(size_of::<Option<Rest>>() == 40);

impl Inbound {
    /// An SA whose window begins behind `sequence`.
    pub fn new(config: Arc<SaShared>, sequence: u64) -> Self {
        Self {
            window: ReplayWindow::new(config.replay_window, sequence, config.esn),
            traffic: Traffic::default(),
            last_used: 0,
            peer_port: config.encap.map_or(0, |encap| encap.remote_port),
            stopped: false,
            moved: false,
            key: ShortKey::VACANT,
            expected: Expected::new(&config, config.remote),
            config,
        }
    }

    /// The peer is there now, or the configuration is another one.
    fn changed(&mut self, peer: IpAddr) {
        self.expected = Expected::new(&self.config, peer);
    }
}

impl Outbound {
    /// An SA whose next sequence number is `next` and whose numbers are reserved up to `ceiling`.
    pub fn new(config: Arc<SaShared>, next: u64, ceiling: u64) -> Self {
        Self {
            sequence: SequenceCounter::new(next, ceiling, config.esn),
            traffic: Traffic::default(),
            last_used: 0,
            bundle: NO_LINK,
            peer_port: config.encap.map_or(0, |encap| encap.remote_port),
            stopped: false,
            reserving: false,
            moved: false,
            key: ShortKey::VACANT,
            template: Template::new(
                &config,
                config.remote,
                config.encap.map_or(0, |encap| encap.remote_port),
            ),
            config,
        }
    }

    /// The peer is there now, or the configuration is another one.
    fn changed(&mut self, peer: IpAddr) {
        self.template = Template::new(&self.config, peer, self.peer_port);
    }
}

impl Rest {
    /// Of an SA installed at second `now` and not linked to any other.
    pub fn new(config: &SaShared, now: u32) -> Self {
        Self {
            lifetime: config.lifetime().map(|limits| Box::new(LifetimeState::new(limits, u64::from(now)))),
            pair: NO_LINK,
            bundle: NO_LINK,
            moved_to: config.remote,
        }
    }

    /// Counts a packet, if there are limits to count for: [`LifetimeState::account`].
    #[inline]
    #[must_use = "a hard limit stops the packet"]
    pub fn account(&mut self, traffic: Traffic) -> Option<LifetimeEvent> {
        self.lifetime.as_mut()?.account(traffic.packets, traffic.bytes)
    }

    /// Other limits.
    fn limit(&mut self, limits: &Lifetime, now: u32) {
        match &mut self.lifetime {
            Some(state) => state.replace(limits),
            None => self.lifetime = Some(Box::new(LifetimeState::new(limits, u64::from(now)))),
        }
    }
}

macro_rules! with_a_peer {
    ($($sa:ty),+) => { $(
        impl $sa {
            /// The key of an SA of ESP in a table: the copy beside the rest if there is one, so that packets do not have to
            /// wait for the configuration.
            #[inline]
            pub fn esp_key(&self) -> Option<KeyRef<'_>> {
                if !self.key.is_vacant() {
                    return Some(KeyRef::Short(&self.key));
                }
                match &self.config.key {
                    SaKey::Esp(key) => Some(key.into()),
                    SaKey::Ah(_) => None,
                }
            }

            /// Copies the key, where the SA is going to stay.
            fn learn_key(&mut self) {
                match &self.config.key {
                    SaKey::Esp(key) => self.key.copy(key),
                    SaKey::Ah(_) => self.key.vacate(),
                }
            }
        }

        impl Slab<$sa, Rest> {
            /// Puts an SA at `index`; gives back what was there. Neither comes or goes with a copy of its key, which moving
            /// would leave behind (OPS-4).
            pub fn install(&mut self, index: u32, sa: $sa, rest: Rest) -> Option<($sa, Rest)> {
                if let Some(old) = self.get_mut(index) {
                    old.key.vacate();
                }
                let old = self.put(index, sa, rest);
                if let Some(new) = self.get_mut(index) {
                    new.learn_key();
                }
                old
            }

            /// Takes the SA at `index` out, without the copy of its key.
            pub fn remove(&mut self, index: u32) -> Option<($sa, Rest)> {
                self.get_mut(index)?.key.vacate();
                self.take(index)
            }

            /// Where the peer of an SA is now (MOB-2).
            #[inline]
            pub fn peer(&self, index: u32) -> Option<IpAddr> {
                let sa = self.get(index)?;
                if sa.moved { Some(self.rest(index)?.moved_to) } else { Some(sa.config.remote) }
            }

            /// From now on the peer is there. Without encapsulation there is no port, or 0.
            pub fn move_peer(&mut self, index: u32, address: IpAddr, port: Option<u16>) {
                if let Some((sa, rest)) = self.both_mut(index) {
                    sa.moved = address != sa.config.remote;
                    rest.moved_to = address;
                    sa.peer_port = port.unwrap_or(sa.peer_port);
                    sa.changed(address);
                    sa.learn_key();
                }
            }

            /// Replaces the configuration half and gives the old one back. With `move_peer` the peer is where the new
            /// one says; without, it stays where it is.
            pub fn reconfigure(
                &mut self,
                index: u32,
                config: Arc<SaShared>,
                move_peer: bool,
                now: u32,
            ) -> Option<Arc<SaShared>> {
                let peer = self.peer(index)?;
                let (sa, rest) = self.both_mut(index)?;
                let (address, port) = if move_peer {
                    (config.remote, Some(config.encap.map_or(0, |encap| encap.remote_port)))
                } else {
                    (peer, None)
                };
                let limits = config.lifetime().copied().unwrap_or_default();
                let old = std::mem::replace(&mut sa.config, config);
                if old.lifetime().copied().unwrap_or_default() != limits {
                    rest.limit(&limits, now);
                }
                self.move_peer(index, address, port);
                Some(old)
            }
        }
    )+ };
}

with_a_peer!(Inbound, Outbound);
