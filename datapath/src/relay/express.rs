//! Which translations the XDP programs execute, and where their packets go next (RLY-1). The main thread's half.
//!
//! Every entry is in the workers' tables too; what is here in addition is a short cut. A translation is in the programs'
//! tables only while all of it can be done there: both sides are encapsulated or none is, a neighbour with a link-layer
//! address is known, and the port takes frames from XDP. Whatever comes between takes it out, and the worker, which
//! packets then reach, asks for the neighbour or counts the drop.
//!
//! Routes are the workers' own ([`Fib`]), so both paths send a packet the same way. A next hop that is in use never
//! changes, because the program could read half of the change: translations are led to another one.
//!
//! [`Express`] holds no map. It says what is to be written, in this order, and [`Steer`](crate::steer::Steer) writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use postern_contract::relay::{Partition, RelayEntry, RelayId};
use postern_contract::sa::UdpEncap;
use postern_steer_maps::{Hop, MAX_HOPS, MAX_PORTS, Relay, RelayKey};
use postern_wire::translate::{Address, Kind, Rule, Side};

use crate::fib::{Fib, Neighbour, PortIndex, Route};

/// Seconds that an index rests before it is used again: a program that was running when it was given back is long done.
const REST: u32 = 2;

/// A write to the programs' maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A translation, new or instead of the one with its key.
    PutV4(RelayKey<[u8; 4]>, Relay<[u8; 4]>),
    /// The same for IPv6.
    PutV6(RelayKey<[u8; 16]>, Relay<[u8; 16]>),
    /// No translation has this key any more.
    Take(Key),
    /// A next hop at an index that no translation uses.
    Hop(u32, Hop),
    /// Counting begins anew at a slot that no translation uses.
    Clear(u32),
}

/// What a translation of either family is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// IPv4.
    V4(RelayKey<[u8; 4]>),
    /// IPv6.
    V6(RelayKey<[u8; 16]>),
}

/// A translation of either family, without what changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Translation {
    V4(RelayKey<[u8; 4]>, Rule<[u8; 4]>),
    V6(RelayKey<[u8; 16]>, Rule<[u8; 16]>),
}

impl Translation {
    /// Of packets that look like `from` into those that look like `to`; `None` where their length would change.
    fn new(from: &Partition, to: &Partition) -> Option<Self> {
        fn build<A: Address>(
            [peer, relay, new_relay, new_peer]: [A; 4],
            from: &Partition,
            to: &Partition,
        ) -> Option<(RelayKey<A>, Rule<A>)> {
            // In a bundle AH is the outer header.
            let (kind, old, new) = match (from.ah.zip(to.ah), from.esp.zip(to.esp)) {
                (Some((old, new)), _) => (Kind::Ah, old, new),
                (None, Some((old, new))) if from.encap.is_some() => (Kind::EspInUdp, old, new),
                (None, Some((old, new))) => (Kind::Esp, old, new),
                (None, None) => return None,
            };
            let below = (kind == Kind::Ah).then(|| from.esp.zip(to.esp)).flatten();
            let came = Side {
                source: peer,
                destination: relay,
                spi: old.to_relay.0,
                inner_spi: below.map(|(old, _)| old.to_relay.0),
                ports: from.encap.map(|UdpEncap { local_port, remote_port }| (remote_port, local_port)),
            };
            let goes = Side {
                source: new_relay,
                destination: new_peer,
                spi: new.from_relay.0,
                inner_spi: below.map(|(_, new)| new.from_relay.0),
                ports: to.encap.map(|UdpEncap { local_port, remote_port }| (local_port, remote_port)),
            };
            let key = RelayKey { destination: relay, spi: old.to_relay.0.to_be_bytes(), kind: kind as u32 };
            Some((key, Rule::new(&came, &goes)?))
        }
        match (from.peer, from.relay, to.relay, to.peer) {
            (IpAddr::V4(a), IpAddr::V4(b), IpAddr::V4(c), IpAddr::V4(d)) => {
                let (key, rule) = build([a, b, c, d].map(|address| address.octets()), from, to)?;
                Some(Self::V4(key, rule))
            }
            (IpAddr::V6(a), IpAddr::V6(b), IpAddr::V6(c), IpAddr::V6(d)) => {
                let (key, rule) = build([a, b, c, d].map(|address| address.octets()), from, to)?;
                Some(Self::V6(key, rule))
            }
            _ => None,
        }
    }

    const fn put(self, hop: u32, slot: u32) -> Change {
        match self {
            Self::V4(key, rule) => Change::PutV4(key, Relay { rule, hop, slot }),
            Self::V6(key, rule) => Change::PutV6(key, Relay { rule, hop, slot }),
        }
    }

    const fn key(self) -> Key {
        match self {
            Self::V4(key, _) => Key::V4(key),
            Self::V6(key, _) => Key::V6(key),
        }
    }
}

/// One direction of an entry.
#[derive(Clone, Copy, Debug)]
struct Way {
    translation: Translation,
    /// Whose route its packets take.
    to: IpAddr,
    slot: u32,
}

/// Towards the gateway, and towards the client.
type Ways = [Way; 2];

/// A destination of translated packets.
#[derive(Debug, Default)]
struct Peer {
    hop: Option<u32>,
    users: BTreeSet<(RelayId, usize)>,
}

/// Indices that are given out, and given out again after a rest.
#[derive(Debug)]
struct Indices {
    next: u32,
    limit: u32,
    free: Vec<u32>,
    resting: Vec<(u32, u32)>,
}

impl Indices {
    const fn new(limit: u32) -> Self {
        Self { next: 0, limit, free: Vec::new(), resting: Vec::new() }
    }

    fn take(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        let index = self.next;
        (index < self.limit).then(|| {
            self.next += 1;
            index
        })
    }

    fn give(&mut self, index: u32, now: u32) {
        self.resting.push((index, now));
    }

    fn wake(&mut self, now: u32) {
        let (rested, resting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.resting).into_iter().partition(|(_, since)| now >= since + REST);
        self.resting = resting;
        self.free.extend(rested.into_iter().map(|(index, _)| index));
    }

    const fn has_room(&self) -> bool {
        !self.free.is_empty() || self.next < self.limit
    }
}

/// A next hop in use.
#[derive(Debug)]
struct HopUse {
    index: u32,
    peers: usize,
}

/// The translations that the XDP programs execute.
#[derive(Debug)]
pub struct Express {
    ways: BTreeMap<RelayId, Ways>,
    /// The keys that the programs have, and whose they are: of several changes made at once one may take what another just
    /// gave.
    owners: HashMap<Key, RelayId>,
    /// Entries for which there was no slot.
    waiting: BTreeMap<RelayId, RelayEntry>,
    peers: HashMap<IpAddr, Peer>,
    /// With the address by which the kernel is asked about them.
    hops: HashMap<(Hop, IpAddr), HopUse>,
    slots: Indices,
    hop_indices: Indices,
    /// Ports that take frames from XDP.
    usable: BTreeSet<PortIndex>,
    /// Whether it was said that entries wait.
    warned: bool,
}

impl Express {
    /// Room for `entries` entries.
    pub fn new(entries: u32) -> Self {
        Self {
            ways: BTreeMap::new(),
            owners: HashMap::new(),
            waiting: BTreeMap::new(),
            peers: HashMap::new(),
            hops: HashMap::new(),
            slots: Indices::new(entries.saturating_mul(2)),
            hop_indices: Indices::new(MAX_HOPS),
            usable: BTreeSet::new(),
            warned: false,
        }
    }

    /// Entries that the programs execute: their directions, two to an entry.
    pub fn placed(&self) -> u64 {
        self.owners.len() as u64 / 2
    }

    /// Where the packets of an entry are counted: towards the gateway, towards the client.
    pub fn slots(&self, id: RelayId) -> Option<[u32; 2]> {
        self.ways.get(&id).map(|ways| ways.map(|way| way.slot))
    }

    /// Next hops in use: index, port, and address.
    pub fn hops(&self) -> impl Iterator<Item = (u32, PortIndex, IpAddr)> {
        self.hops.iter().filter_map(|((hop, address), used)| {
            Some((used.index, PortIndex(u16::try_from(hop.port).ok()?), *address))
        })
    }

    /// A new entry, or another state of one. What it counted goes on.
    pub fn put(&mut self, entry: &RelayEntry, fib: &Fib, now: u32) -> Vec<Change> {
        let mut changes = Vec::new();
        let sides = [(&entry.client, &entry.gateway), (&entry.gateway, &entry.client)];
        let [Some(there), Some(back)] = sides.map(|(from, to)| Translation::new(from, to)) else {
            return self.remove(entry.id, now);
        };
        let old = self.ways.remove(&entry.id);
        let slots = match &old {
            Some(ways) => Some(ways.map(|way| way.slot)),
            None => self.two_slots(now),
        };
        let Some(slots) = slots else {
            self.waiting.insert(entry.id, *entry);
            if !std::mem::replace(&mut self.warned, true) {
                tracing::warn!(
                    entries = self.slots.limit / 2,
                    "more relay entries than the XDP program has room for: the workers translate the others; raise \
                     `relay_entries`"
                );
            }
            return changes;
        };
        self.waiting.remove(&entry.id);
        if old.is_none() {
            changes.extend(slots.map(Change::Clear));
        }
        let [slot_there, slot_back] = slots;
        let ways = [(there, entry.gateway.peer, slot_there), (back, entry.client.peer, slot_back)]
            .map(|(translation, to, slot)| Way { translation, to, slot });
        // The new state's peers first, so that a hop that both use stays where it is.
        for (direction, way) in ways.iter().enumerate() {
            self.join(way.to, (entry.id, direction), fib, &mut changes);
        }
        for (direction, way) in old.iter().flatten().enumerate() {
            // A key that the new state has as well is written over, which leaves no gap.
            if !ways.iter().any(|new| new.translation.key() == way.translation.key()) {
                self.take(entry.id, way, &mut changes);
            }
            if ways.get(direction).is_some_and(|new| new.to != way.to) {
                self.leave(way.to, (entry.id, direction), now);
            }
        }
        for way in &ways {
            let hop = self.peers.get(&way.to).and_then(|peer| peer.hop);
            self.place(entry.id, way, hop, &mut changes);
        }
        self.ways.insert(entry.id, ways);
        changes
    }

    /// No entry has this id any more.
    pub fn remove(&mut self, id: RelayId, now: u32) -> Vec<Change> {
        self.waiting.remove(&id);
        let Some(ways) = self.ways.remove(&id) else { return Vec::new() };
        let mut changes = Vec::new();
        for (direction, way) in ways.into_iter().enumerate() {
            self.take(id, &way, &mut changes);
            self.leave(way.to, (id, direction), now);
            self.slots.give(way.slot, now);
        }
        changes
    }

    /// Whether a port takes frames from XDP.
    pub fn is_usable(&self, port: PortIndex) -> bool {
        self.usable.contains(&port)
    }

    /// Other ports take frames from XDP. Says whether anything changed; then [`Self::refresh`] is due.
    pub fn set_usable(&mut self, ports: BTreeSet<PortIndex>) -> bool {
        let ports = ports.into_iter().filter(|port| u32::from(port.0) < MAX_PORTS).collect();
        let changed = self.usable != ports;
        self.usable = ports;
        changed
    }

    /// Routes, neighbours or ports are others now.
    pub fn refresh(&mut self, fib: &Fib, now: u32) -> Vec<Change> {
        let mut changes = Vec::new();
        let addresses: Vec<IpAddr> = self.peers.keys().copied().collect();
        for address in addresses {
            let wanted = self.next_hop(fib, address);
            let present = self.peers.get(&address).and_then(|peer| peer.hop);
            let known = wanted.and_then(|wanted| self.hops.get(&wanted)).map(|used| used.index);
            if known == present && known.is_some() == wanted.is_some() {
                continue;
            }
            let hop = self.hold_hop(wanted, &mut changes);
            let Some(peer) = self.peers.get_mut(&address) else { continue };
            peer.hop = hop;
            let users = std::mem::take(&mut peer.users);
            for (id, direction) in &users {
                let way = self.ways.get(id).and_then(|ways| ways.get(*direction)).copied();
                if let Some(way) = way {
                    self.place(*id, &way, hop, &mut changes);
                }
            }
            if let Some(peer) = self.peers.get_mut(&address) {
                peer.users = users;
            }
            self.release_hop(present, now);
        }
        changes
    }

    /// Once a second: what rested is used again, and entries that waited for it come in.
    pub fn tick(&mut self, fib: &Fib, now: u32) -> Vec<Change> {
        self.slots.wake(now);
        self.hop_indices.wake(now);
        let mut changes = Vec::new();
        while self.slots.has_room()
            && let Some((_, entry)) = self.waiting.pop_first()
        {
            changes.extend(self.put(&entry, fib, now));
            if self.waiting.contains_key(&entry.id) {
                break;
            }
        }
        self.warned &= !self.waiting.is_empty();
        changes
    }

    fn two_slots(&mut self, now: u32) -> Option<[u32; 2]> {
        let first = self.slots.take()?;
        if let Some(second) = self.slots.take() {
            return Some([first, second]);
        }
        // Alone it is of no use; it rests like any that was used.
        self.slots.give(first, now);
        None
    }

    /// Where packets to `destination` go, if the program can send them there.
    fn next_hop(&self, fib: &Fib, destination: IpAddr) -> Option<(Hop, IpAddr)> {
        let Route::Via { port, next_hop, mtu, source_mac, neighbour: Neighbour::Known(mac) } =
            fib.lookup(destination)
        else {
            return None;
        };
        self.usable.contains(&port).then(|| {
            let hop = Hop { port: port.0.into(), mtu: mtu.into(), destination: mac.0, source: source_mac.0 };
            (hop, next_hop)
        })
    }

    fn hold_hop(&mut self, wanted: Option<(Hop, IpAddr)>, changes: &mut Vec<Change>) -> Option<u32> {
        let wanted = wanted?;
        match self.hops.entry(wanted) {
            Entry::Occupied(mut known) => {
                known.get_mut().peers += 1;
                Some(known.get().index)
            }
            Entry::Vacant(place) => {
                let index = self.hop_indices.take()?;
                place.insert(HopUse { index, peers: 1 });
                changes.push(Change::Hop(index, wanted.0));
                Some(index)
            }
        }
    }

    fn release_hop(&mut self, index: Option<u32>, now: u32) {
        let Some(index) = index else { return };
        let found = self.hops.iter_mut().find(|(_, used)| used.index == index);
        let Some((key, used)) = found.map(|(key, used)| (*key, used)) else { return };
        used.peers -= 1;
        if used.peers == 0 {
            self.hops.remove(&key);
            self.hop_indices.give(index, now);
        }
    }

    /// A direction's packets go to `address` from now on.
    fn join(&mut self, address: IpAddr, user: (RelayId, usize), fib: &Fib, changes: &mut Vec<Change>) {
        if !self.peers.contains_key(&address) {
            let wanted = self.next_hop(fib, address);
            let hop = self.hold_hop(wanted, changes);
            self.peers.insert(address, Peer { hop, users: BTreeSet::new() });
        }
        if let Some(peer) = self.peers.get_mut(&address) {
            peer.users.insert(user);
        }
    }

    fn leave(&mut self, address: IpAddr, user: (RelayId, usize), now: u32) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        peer.users.remove(&user);
        if peer.users.is_empty() {
            let hop = peer.hop;
            self.peers.remove(&address);
            self.release_hop(hop, now);
        }
    }

    /// Gives a direction to the programs, or takes it from them while there is no hop.
    fn place(&mut self, id: RelayId, way: &Way, hop: Option<u32>, changes: &mut Vec<Change>) {
        let Some(hop) = hop else { return self.take(id, way, changes) };
        self.owners.insert(way.translation.key(), id);
        changes.push(way.translation.put(hop, way.slot));
    }

    /// Takes a direction from the programs, if it is there.
    fn take(&mut self, id: RelayId, way: &Way, changes: &mut Vec<Change>) {
        let key = way.translation.key();
        if self.owners.get(&key) == Some(&id) {
            self.owners.remove(&key);
            changes.push(Change::Take(key));
        }
    }
}
