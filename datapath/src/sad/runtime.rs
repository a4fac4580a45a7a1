//! The runtime half of an SA: owned by one worker, changed by plain `&mut` (DESIGN decision 3).
//!
//! What every packet changes is one cache line; the one behind it has what usual packets ask of the configuration, ready
//! to be compared or written. What only some packets or some SAs need is in [`Rest`], elsewhere.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use postern_contract::sa::{DfPolicy, DscpPolicy, Lifetime};
use postern_wire::ids::Protocol;
use postern_wire::{checksum, esp, ip4, udp};

use crate::crypto::SequenceCounter;
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
    /// What the headers of usual packets are made of.
    pub template: Template,
}

const _: () = assert!(size_of::<Option<Inbound>>() == 128 && size_of::<Option<Outbound>>() == 128);
const _: () = assert!(std::mem::offset_of!(Inbound, expected) == 64);
const _: () = assert!(std::mem::offset_of!(Outbound, template) == 64);

/// What a usual inbound packet is held against: of a plain SA with one selector of IPv4 addresses, with a peer on IPv4,
/// and without limits of packets or bytes.
#[derive(Debug)]
#[repr(C)]
pub struct Expected {
    /// What decrypted packets must match.
    pub selector: V4,
    /// The peer's address.
    pub peer: u32,
    /// Whether there are usual packets at all.
    pub usable: bool,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// MOB-2.
    pub follow: bool,
    /// In UDP.
    pub encapsulated: bool,
    /// Bytes of ESP header and IV.
    pub front: u8,
    /// Bytes of the ICV.
    pub icv_len: u8,
}

impl Expected {
    const NOTHING: Self = Self {
        selector: V4::NOTHING,
        peer: 0,
        usable: false,
        esn: false,
        follow: false,
        encapsulated: false,
        front: 0,
        icv_len: 0,
    };

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
            usable: config.is_plain() && !config.is_metered(),
            esn: config.esn,
            follow: config.follow_peer,
            encapsulated: config.encap.is_some(),
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
#[derive(Debug)]
#[repr(C)]
pub struct Template {
    /// The headers up to the SPI, in which TOS, lengths, identification, flags and checksum are zero; zeros behind.
    pub head: [u8; HEAD],
    /// How packets to the peer left last.
    pub exit: ExitName,
    /// Sum of the IPv4 header.
    pub sum: u16,
    /// The configured limit of outer packets in bytes; `u16::MAX` without one.
    pub mtu: u16,
    /// Whether there are usual packets at all.
    pub usable: bool,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// Offset of the ESP header.
    pub at: u8,
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

impl Template {
    const NOTHING: Self = Self {
        head: [0; HEAD],
        exit: ExitName::NONE,
        sum: 0,
        mtu: 0,
        usable: false,
        esn: false,
        at: 0,
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
        let mut head = [0; HEAD];
        let protocol = if config.encap.is_some() { Protocol::UDP } else { Protocol::ESP };
        let header = ip4::Header {
            source,
            destination,
            protocol,
            ttl: OUTER_TTL,
            tos: 0,
            id: 0,
            dont_fragment: false,
        };
        header.emit(&mut head, 0)?;
        let (ip, rest) = head.split_first_chunk_mut::<{ ip4::MIN_LEN }>()?;
        crate::header::put(ip, 2, [0; 2]);
        crate::header::put(ip, 10, [0; 2]);
        let sum = checksum::fold(checksum::sum(ip));
        let mut at = 0;
        if let Some(encap) = config.encap {
            let header = udp::Header {
                source_port: encap.local_port,
                destination_port: peer_port,
                length: 0,
                checksum: 0,
            };
            header.emit(rest)?;
            at = udp::LEN;
        }
        crate::header::put(rest, at, config.spi.on_wire.0.to_be_bytes());
        let layout = key.layout();
        let ecn = if config.path.ecn { ECN } else { 0 };
        Some(Self {
            head,
            exit: ExitName::NONE,
            sum,
            mtu: config.path.mtu.unwrap_or(u16::MAX),
            // Without an IV the zeros behind the SPI would reach into the packet.
            usable: config.is_plain() && !config.is_metered() && layout.iv_len >= 8,
            esn: config.esn,
            at: u8::try_from(ip4::MIN_LEN + at).ok()?,
            iv_len: layout.iv_len,
            icv_len: layout.icv_len,
            block_mask: layout.block.checked_sub(1)?,
            tos: match config.path.dscp {
                DscpPolicy::Copy => (!ECN | ecn, 0),
                DscpPolicy::Fixed(dscp) => (ecn, dscp << 2),
            },
            df: config.path.df,
        })
    }

    /// The peer.
    #[inline]
    pub fn peer(&self) -> Ipv4Addr {
        let [.., a, b, c, d] = *self.head.first_chunk::<{ ip4::MIN_LEN }>().unwrap_or(&[0; ip4::MIN_LEN]);
        Ipv4Addr::new(a, b, c, d)
    }
}

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
        impl Slab<$sa, Rest> {
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
