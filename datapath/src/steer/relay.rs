//! The maps of the relay in the XDP program (RLY-1): what [`Express`](crate::relay::express::Express) decides is
//! written here, and what the program counted is read.

use aya::maps::xdp::XdpMapError;
use aya::maps::{Array, DevMap, HashMap, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::{Ebpf, EbpfLoader};
use postern_steer_maps::{Hop, MAX_PORTS, Relay, RelayKey, Settings, Traffic, name};

use super::{Steer, SteerError, features, map, on};
use crate::fib::PortIndex;
use crate::relay::express::{Change, Key};

/// What the relay of an interface is loaded with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayRoom {
    /// The interface's own number.
    pub port: PortIndex,
    /// Entries that the maps hold, both directions of each.
    pub entries: u32,
}

/// The maps.
pub(super) struct RelayMaps {
    v4: HashMap<MapData, RelayKey<[u8; 4]>, Relay<[u8; 4]>>,
    v6: HashMap<MapData, RelayKey<[u8; 16]>, Relay<[u8; 16]>>,
    hops: Array<MapData, Hop>,
    used: Array<MapData, u32>,
    ports: DevMap<MapData>,
    traffic: PerCpuArray<MapData, Traffic>,
    sent: PerCpuArray<MapData, Traffic>,
}

impl RelayMaps {
    /// Sizes the maps before they are made; without a relay they stay as small as can be.
    pub(super) fn size(loader: &mut EbpfLoader<'_>, room: Option<RelayRoom>) {
        let ways = room.map_or(1, |room| room.entries.saturating_mul(2).max(1));
        for table in [name::RELAY_V4, name::RELAY_V6, name::RELAY_TRAFFIC] {
            loader.map_max_entries(table, ways);
        }
    }

    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, SteerError> {
        Ok(Self {
            v4: map(ebpf, name::RELAY_V4)?,
            v6: map(ebpf, name::RELAY_V6)?,
            hops: map(ebpf, name::RELAY_HOPS)?,
            used: map(ebpf, name::RELAY_USED)?,
            ports: map(ebpf, name::RELAY_PORTS)?,
            traffic: map(ebpf, name::RELAY_TRAFFIC)?,
            sent: map(ebpf, name::RELAY_SENT)?,
        })
    }

    fn apply(&mut self, change: &Change) -> Result<(), SteerError> {
        match change {
            Change::PutV4(key, value) => put(&mut self.v4, key, value).map_err(on(name::RELAY_V4)),
            Change::PutV6(key, value) => put(&mut self.v6, key, value).map_err(on(name::RELAY_V6)),
            Change::Take(Key::V4(key)) => take(&mut self.v4, key).map_err(on(name::RELAY_V4)),
            Change::Take(Key::V6(key)) => take(&mut self.v6, key).map_err(on(name::RELAY_V6)),
            Change::Hop(index, hop) => self.hops.set(*index, hop, 0).map_err(on(name::RELAY_HOPS)),
            Change::Clear(slot) => {
                let processors = aya::util::nr_cpus().map_err(|(_, error)| MapError::from(error));
                processors
                    .and_then(|count| Ok(PerCpuValues::try_from(vec![Traffic::default(); count])?))
                    .and_then(|zeros| self.traffic.set(*slot, zeros, 0))
                    .map_err(on(name::RELAY_TRAFFIC))
            }
        }
    }
}

/// Puts an entry. If that fails no older one stays: it would translate into what is no longer so.
fn put<K: aya::Pod, V: aya::Pod>(
    table: &mut HashMap<MapData, K, V>,
    key: &K,
    value: &V,
) -> Result<(), MapError> {
    table.insert(key, value, 0).inspect_err(|_| {
        // What was never there need not be taken.
        let _ = table.remove(key);
    })
}

/// Takes an entry out, if it is there: one that could not be put is not.
fn take<K: aya::Pod, V: aya::Pod>(table: &mut HashMap<MapData, K, V>, key: &K) -> Result<(), MapError> {
    match table.remove(key) {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn total(values: &PerCpuValues<Traffic>) -> Traffic {
    values.iter().fold(Traffic::default(), |sum, one| Traffic {
        packets: sum.packets + one.packets,
        bytes: sum.bytes + one.bytes,
    })
}

impl Steer {
    /// Whether the program translates packets, once it is told how.
    pub fn relays(&self) -> bool {
        self.settings.flags & Settings::RELAY != 0
    }

    /// Whether a frame that the program of an interface in native mode sends to this one leaves it. The kernel loses it
    /// without a word where the driver cannot (veth: while the other end has neither GRO nor an XDP program).
    pub fn takes_redirects(&self) -> bool {
        features::takes_redirects(self.index).unwrap_or(false)
    }

    /// Tells the program which interface a port is.
    pub fn set_relay_port(&mut self, port: PortIndex, interface: u32) -> Result<(), SteerError> {
        if u32::from(port.0) >= MAX_PORTS {
            return Ok(());
        }
        self.relay.ports.set(port.0.into(), interface, None, 0).map_err(|error| match error {
            XdpMapError::MapError(error) => on(name::RELAY_PORTS)(error),
            // Said only of a map that cannot run a second program, and none is asked for.
            XdpMapError::ChainedProgramNotSupported => SteerError::NoMap(name::RELAY_PORTS),
        })
    }

    /// Writes one change.
    pub fn apply_relay(&mut self, change: &Change) -> Result<(), SteerError> {
        self.relay.apply(change)
    }

    /// IP packets that were counted at a slot, and their bytes.
    pub fn relay_traffic(&self, slot: u32) -> Result<Traffic, SteerError> {
        let values = self.relay.traffic.get(&slot, 0).map_err(on(name::RELAY_TRAFFIC))?;
        Ok(total(&values))
    }

    /// Frames that came in here and were sent out of `port` by the program, and their bytes.
    pub fn relay_sent(&self, port: PortIndex) -> Result<Traffic, SteerError> {
        if u32::from(port.0) >= MAX_PORTS {
            return Ok(Traffic::default());
        }
        let values = self.relay.sent.get(&port.0.into(), 0).map_err(on(name::RELAY_SENT))?;
        Ok(total(&values))
    }

    /// Whether a packet went to a next hop since the last call.
    pub fn take_used(&mut self, hop: u32) -> Result<bool, SteerError> {
        let used = self.relay.used.get(&hop, 0).map_err(on(name::RELAY_USED))? != 0;
        if used {
            self.relay.used.set(hop, 0, 0).map_err(on(name::RELAY_USED))?;
        }
        Ok(used)
    }
}
