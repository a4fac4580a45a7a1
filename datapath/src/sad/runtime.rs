//! The runtime half of an SA: owned by one worker, changed by plain `&mut` (DESIGN decision 3).
//!
//! What every packet touches is one cache line. What only some packets or some SAs need is in [`Rest`], elsewhere.

use std::net::IpAddr;
use std::sync::Arc;

use postern_contract::sa::Lifetime;

use crate::crypto::SequenceCounter;
use crate::sad::config::SaShared;
use crate::sad::lifetime::{LifetimeEvent, LifetimeState};
use crate::sad::replay::ReplayWindow;
use crate::sad::slab::Slab;

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

/// An inbound SA in its worker's hands.
#[derive(Debug)]
#[repr(align(64))]
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
}

/// An outbound SA in its worker's hands.
#[derive(Debug)]
#[repr(align(64))]
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
}

const _: () = assert!(size_of::<Option<Inbound>>() == 64 && size_of::<Option<Outbound>>() == 64);

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
            config,
        }
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
            config,
        }
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
