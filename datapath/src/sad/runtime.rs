//! The runtime half of an SA: owned by one worker, changed by plain `&mut` (DESIGN decision 3).

use std::net::IpAddr;
use std::sync::Arc;

use crate::crypto::SequenceCounter;
use crate::sad::config::SaShared;
use crate::sad::lifetime::LifetimeState;
use crate::sad::replay::ReplayWindow;

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

/// An inbound SA in its worker's hands.
#[derive(Debug)]
pub struct Inbound {
    /// The configuration half.
    pub config: Arc<SaShared>,
    /// Anti-replay window and ESN.
    pub window: ReplayWindow,
    /// Traffic so far.
    pub traffic: Traffic,
    /// Limits.
    pub lifetime: LifetimeState,
    /// Index of the outbound SA of the pair, in the same worker's table.
    pub pair: u32,
    /// Index of the inbound AH SA of the bundle, in the same worker's table.
    pub bundle: u32,
    /// Second, since the start of the datapath, of the last packet; 0 if there was none.
    pub last_used: u32,
    /// UDP port of the peer as last seen; 0 without encapsulation.
    pub peer_port: u16,
    /// A hard limit stopped it.
    pub stopped: bool,
    /// The peer's address as last seen on an authenticated, newest packet (MOB-2).
    pub peer: IpAddr,
}

/// An outbound SA in its worker's hands.
#[derive(Debug)]
pub struct Outbound {
    /// The configuration half.
    pub config: Arc<SaShared>,
    /// The only source of its sequence numbers.
    pub sequence: SequenceCounter,
    /// Traffic so far.
    pub traffic: Traffic,
    /// Limits.
    pub lifetime: LifetimeState,
    /// Index of the outbound AH SA of the bundle, in the same worker's table.
    pub bundle: u32,
    /// Second, since the start of the datapath, of the last packet; 0 if there was none.
    pub last_used: u32,
    /// UDP port of the peer; 0 without encapsulation.
    pub peer_port: u16,
    /// A hard limit or the end of the sequence space stopped it.
    pub stopped: bool,
    /// More numbers were asked for and not yet granted.
    pub reserving: bool,
    /// The peer's outer address (MOB-2).
    pub peer: IpAddr,
}

impl Inbound {
    /// An SA whose window begins behind `sequence`.
    pub fn new(config: Arc<SaShared>, sequence: u64, now: u32) -> Self {
        let lifetime = LifetimeState::new(config.lifetime.as_deref().unwrap_or(&UNLIMITED), u64::from(now));
        Self {
            window: ReplayWindow::new(config.replay_window, sequence, config.esn),
            traffic: Traffic::default(),
            lifetime,
            pair: NO_LINK,
            bundle: NO_LINK,
            last_used: 0,
            peer_port: config.encap.map_or(0, |encap| encap.remote_port),
            stopped: false,
            peer: config.remote,
            config,
        }
    }
}

impl Outbound {
    /// An SA whose next sequence number is `next` and whose numbers are reserved up to `ceiling`.
    pub fn new(config: Arc<SaShared>, next: u64, ceiling: u64, now: u32) -> Self {
        let lifetime = LifetimeState::new(config.lifetime.as_deref().unwrap_or(&UNLIMITED), u64::from(now));
        Self {
            sequence: SequenceCounter::new(next, ceiling, config.esn),
            traffic: Traffic::default(),
            lifetime,
            bundle: NO_LINK,
            last_used: 0,
            peer_port: config.encap.map_or(0, |encap| encap.remote_port),
            stopped: false,
            reserving: false,
            peer: config.remote,
            config,
        }
    }
}

const NO_LIMITS: postern_contract::sa::Limits =
    postern_contract::sa::Limits { seconds: None, bytes: None, packets: None };
const UNLIMITED: postern_contract::sa::Lifetime =
    postern_contract::sa::Lifetime { soft: NO_LIMITS, hard: NO_LIMITS };
