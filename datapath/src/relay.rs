//! The blind relay: a packet that matches one partition of an entry leaves with the values of the other (RLY-1).
//!
//! No crypto stage is reachable from here, and nothing in an entry could feed one. A packet keeps its length, unless
//! the two sides differ in UDP encapsulation (RLY-11).

mod ways;

use std::net::IpAddr;

use arrayvec::ArrayVec;
use hashbrown::HashMap;
use postern_contract::counters::{DropReason, RelayCounters};
use postern_contract::relay::{Partition, RelayEntry, RelayId};
use postern_contract::sa::{IpsecProtocol, UdpEncap};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{ah, esp, udp};

use crate::core::Core;
use crate::egress;
use crate::fib::Route;
use crate::forward;
use crate::frame::{Arena, BATCH, Frame};
use crate::header;
use crate::inbound::Arrival;
use crate::relay::ways::{Key as WayKey, Ways};

/// One translation entry with its counters.
#[derive(Debug)]
pub struct Entry {
    /// As control described it.
    pub entry: RelayEntry,
    /// What went through, without what its ways counted.
    counters: RelayCounters,
    /// Towards the gateway and towards the client; none for what is not usual.
    ways: [Option<u32>; 2],
}

impl Entry {
    fn counters(&self, ways: &Ways) -> RelayCounters {
        let mut counters = self.counters.clone();
        for (way, towards) in self.ways.iter().zip([Towards::Gateway, Towards::Client]) {
            let (packets, bytes) = way.map_or((0, 0), |way| ways.counted(way));
            count(&mut counters, towards, packets, bytes);
        }
        counters
    }
}

fn count(counters: &mut RelayCounters, towards: Towards, packets: u64, bytes: u64) {
    let (all_packets, all_bytes) = match towards {
        Towards::Gateway => (&mut counters.to_gateway_packets, &mut counters.to_gateway_bytes),
        Towards::Client => (&mut counters.to_client_packets, &mut counters.to_client_bytes),
    };
    *all_packets += packets;
    *all_bytes += bytes;
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Towards {
    Gateway,
    Client,
}

/// What a packet is found by: its outermost IPsec protocol, that SPI, and the relay's address.
type Key = (IpsecProtocol, Spi, IpAddr);

/// The translation table of one worker; all workers have the same one.
#[derive(Default)]
pub struct RelayTable {
    entries: HashMap<RelayId, Box<Entry>>,
    by_spi: HashMap<Key, (RelayId, Towards)>,
    /// The short way for most packets.
    ways: Ways,
}

/// What packets of one partition are found by.
pub(crate) fn key(partition: &Partition) -> Option<Key> {
    // In a bundle AH is the outer header, so its SPI is the one that leads here.
    let (protocol, pair) = match (partition.ah, partition.esp) {
        (Some(pair), _) => (IpsecProtocol::Ah, pair),
        (None, Some(pair)) => (IpsecProtocol::Esp, pair),
        (None, None) => return None,
    };
    Some((protocol, pair.to_relay, partition.relay))
}

impl RelayTable {
    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds an entry or replaces the one with its id, whose counters go on. Gives the replaced one back.
    pub fn put(&mut self, entry: RelayEntry) -> Option<Box<Entry>> {
        let old = self.remove(entry.id);
        let counters = old.as_ref().map(|old| old.counters.clone()).unwrap_or_default();
        let ways =
            [self.ways.put(&entry.client, &entry.gateway), self.ways.put(&entry.gateway, &entry.client)];
        for (partition, towards) in [(&entry.client, Towards::Gateway), (&entry.gateway, Towards::Client)] {
            if let Some(key) = key(partition) {
                self.by_spi.insert(key, (entry.id, towards));
            }
        }
        self.entries.insert(entry.id, Box::new(Entry { entry, counters, ways }));
        old
    }

    /// Removes an entry.
    pub fn remove(&mut self, id: RelayId) -> Option<Box<Entry>> {
        let mut old = self.entries.remove(&id)?;
        old.counters = old.counters(&self.ways);
        for way in std::mem::take(&mut old.ways).into_iter().flatten() {
            self.ways.take(way);
        }
        for partition in [&old.entry.client, &old.entry.gateway] {
            if let Some(key) = key(partition)
                && self.by_spi.get(&key).is_some_and(|(owner, _)| *owner == id)
            {
                self.by_spi.remove(&key);
            }
        }
        Some(old)
    }

    /// Counters of all entries.
    pub fn counters(&self) -> Vec<(RelayId, RelayCounters)> {
        self.entries.iter().map(|(id, entry)| (*id, entry.counters(&self.ways))).collect()
    }
}

/// Translates a batch and sends it on, by the short way where there is one: lookup → translate → route → rewrite.
pub fn run(core: &mut Core, packets: &mut ArrayVec<(Frame, Arrival), BATCH>) {
    let Core { arena, relays, .. } = core;
    let mut keys = ArrayVec::<Option<WayKey>, BATCH>::new();
    for (frame, arrival) in packets.iter() {
        let usual = arrival.protocol == IpsecProtocol::Esp && !arrival.encapsulated;
        let key = WayKey::of(arena.bytes(frame), usize::from(arrival.transport)).filter(|_| usual);
        if let Some(key) = key {
            relays.ways.prefetch(key);
        }
        keys.push(key);
    }
    let find = |key: &Option<WayKey>| key.and_then(|key| relays.ways.find(key));
    let places: ArrayVec<Option<u32>, BATCH> = keys.iter().map(find).collect();
    for ((mut frame, arrival), place) in packets.drain(..).zip(places) {
        let Core { arena, relays, fib, .. } = core;
        let packet = arena.bytes_mut(&mut frame);
        let at = usize::from(arrival.transport);
        let done = place.and_then(|place| relays.ways.translate(place, packet, at));
        match done {
            Some(destination) => {
                let route = fib.lookup(destination.into());
                send(core, frame, &arrival, route);
            }
            None => run_one(core, frame, &arrival),
        }
    }
}

/// The same with a packet for which there is no short way, or that it leaves alone.
fn run_one(core: &mut Core, mut frame: Frame, arrival: &Arrival) {
    let port = arrival.port;
    match translate(core, &mut frame, arrival) {
        Ok(route) => send(core, frame, arrival, route),
        Err(reason) => core.discard(frame, port, reason),
    }
}

fn translate(core: &mut Core, frame: &mut Frame, arrival: &Arrival) -> Result<Route, DropReason> {
    let Core { arena, relays, fib, .. } = core;
    let at = usize::from(arrival.transport);
    let packet = arena.bytes(frame);
    let (source, relay) =
        header::source(packet).zip(header::destination(packet)).ok_or(DropReason::Malformed)?;
    let spi_at = at + spi_offset(arrival.protocol);
    let spi = header::get_u32(packet, spi_at).ok_or(DropReason::Malformed)?;
    let (id, towards) =
        relays.by_spi.get(&(arrival.protocol, Spi(spi), relay)).ok_or(DropReason::UnknownSpi)?;
    let entry = relays.entries.get_mut(id).ok_or(DropReason::UnknownSpi)?;
    let (from, to) = match towards {
        Towards::Gateway => (entry.entry.client, entry.entry.gateway),
        Towards::Client => (entry.entry.gateway, entry.entry.client),
    };
    if let Err(reason) = check_peer(packet, &from, source, arrival) {
        entry.counters.wrong_peer += u64::from(reason == DropReason::RelayWrongPeer);
        return Err(reason);
    }
    let bytes = packet.len() as u64;
    let inner_esp = under_ah(packet, at, &from, arrival.protocol)?;
    let route = fib.lookup(to.peer);
    rewrite(arena, frame, arrival, inner_esp, &from, &to)?;
    count(&mut entry.counters, *towards, 1, bytes);
    Ok(route)
}

const fn spi_offset(protocol: IpsecProtocol) -> usize {
    match protocol {
        IpsecProtocol::Esp => 0,
        IpsecProtocol::Ah => 4,
    }
}

/// The packet must come from where the partition says: an SPI alone can be guessed.
fn check_peer(packet: &[u8], from: &Partition, source: IpAddr, arrival: &Arrival) -> Result<(), DropReason> {
    if arrival.encapsulated != from.encap.is_some() {
        return Err(DropReason::WrongEncapsulation);
    }
    if source != from.peer {
        return Err(DropReason::RelayWrongPeer);
    }
    if let Some(UdpEncap { local_port, remote_port }) = from.encap {
        let at = usize::from(arrival.transport).saturating_sub(udp::LEN);
        let ports = (header::get_u16(packet, at), header::get_u16(packet, at + 2));
        if ports != (Some(remote_port), Some(local_port)) {
            return Err(DropReason::RelayWrongPeer);
        }
    }
    Ok(())
}

/// RLY-3: the offset of the ESP header under an AH header, whose SPI is translated as well.
fn under_ah(
    packet: &[u8],
    at: usize,
    from: &Partition,
    protocol: IpsecProtocol,
) -> Result<Option<usize>, DropReason> {
    if protocol == IpsecProtocol::Esp {
        return Ok(None);
    }
    let rest = packet.get(at..).ok_or(DropReason::Malformed)?;
    let outer = ah::Header::parse(rest).map_err(|_| DropReason::Malformed)?;
    match (outer.next_header, from.esp) {
        (Protocol::ESP, Some(pair)) => {
            let below = at + outer.len();
            let inner = packet.get(below..).and_then(esp::Header::parse).ok_or(DropReason::Malformed)?;
            if inner.spi != pair.to_relay {
                return Err(DropReason::UnknownSpi);
            }
            Ok(Some(below))
        }
        (Protocol::ESP, None) | (_, Some(_)) => Err(DropReason::BundleMissing),
        (_, None) => Ok(None),
    }
}

/// Writes the other partition's values. Checksums follow incrementally; nothing that an ICV covers at the far end is
/// left as it was, and nothing else is touched.
fn rewrite(
    arena: &Arena,
    frame: &mut Frame,
    arrival: &Arrival,
    inner_esp: Option<usize>,
    from: &Partition,
    to: &Partition,
) -> Result<(), DropReason> {
    let at = usize::from(arrival.transport);
    let ip_len = at.saturating_sub(if from.encap.is_some() { udp::LEN } else { 0 });
    let packet = arena.bytes_mut(frame);
    header::decrement_ttl(packet).ok_or(DropReason::TtlExpired)?;
    header::set_addresses(packet, to.relay, to.peer).ok_or(DropReason::Malformed)?;
    match arrival.protocol {
        IpsecProtocol::Esp => put_spi(packet, at, to.esp)?,
        IpsecProtocol::Ah => {
            put_spi(packet, at + spi_offset(IpsecProtocol::Ah), to.ah)?;
            if let Some(below) = inner_esp {
                put_spi(packet, below, to.esp)?;
            }
        }
    }
    let moved = match (from.encap, to.encap) {
        (None, None) => return Ok(()),
        (Some(_), Some(_)) => Some(()),
        (Some(_), None) => {
            let next = header::next_header_at(packet);
            packet.copy_within(..ip_len, udp::LEN);
            return frame
                .shrink_front(udp::LEN)
                .zip(next)
                .and_then(|((), next)| header::set_payload(arena.bytes_mut(frame), next, Protocol::ESP))
                .ok_or(DropReason::Malformed);
        }
        (None, Some(_)) => {
            let next = header::next_header_at(packet);
            frame.grow_front(udp::LEN).zip(next).and_then(|((), next)| {
                let packet = arena.bytes_mut(frame);
                packet.copy_within(udp::LEN..udp::LEN + ip_len, 0);
                header::set_payload(packet, next, Protocol::UDP)
            })
        }
    };
    moved
        .zip(to.encap)
        .and_then(|((), encap)| put_udp(arena.bytes_mut(frame), ip_len, encap, to))
        .ok_or(DropReason::Malformed)
}

fn put_spi(
    packet: &mut [u8],
    at: usize,
    pair: Option<postern_contract::relay::SpiPair>,
) -> Result<(), DropReason> {
    // Entries are validated when installed: both partitions have the same protocols.
    let pair = pair.ok_or(DropReason::BundleMissing)?;
    header::put(packet, at, pair.from_relay.0.to_be_bytes());
    Ok(())
}

fn put_udp(packet: &mut [u8], at: usize, encap: UdpEncap, to: &Partition) -> Option<()> {
    let datagram = packet.get_mut(at..)?;
    let header = udp::Header {
        source_port: encap.local_port,
        destination_port: encap.remote_port,
        length: u16::try_from(datagram.len()).ok()?,
        // RFC 3948 section 2.1: "the IPv4 UDP Checksum SHOULD be transmitted as a zero value".
        checksum: 0,
    };
    header.emit(datagram)?;
    if let (IpAddr::V6(source), IpAddr::V6(destination)) = (to.relay, to.peer) {
        let check = udp::checksum_v6(source, destination, datagram);
        header::put(datagram, 6, check.to_be_bytes());
    }
    Some(())
}

/// Sends a translated packet, in fragments where encapsulation made it too large for the next link.
fn send(core: &mut Core, frame: Frame, arrival: &Arrival, route: Route) {
    let port = arrival.port;
    if let Some(socket) = core.socket_port {
        return egress::enqueue(core, frame, port, socket);
    }
    let mtu = match route {
        Route::Via { mtu, .. } => usize::from(mtu),
        Route::Local | Route::Kernel { .. } | Route::Unreachable => {
            return core.discard(frame, port, DropReason::NoRoute);
        }
    };
    let cut = frame.len() > mtu
        && postern_wire::flow::Flow::parse(core.arena.bytes(&frame)).is_ok_and(|flow| !flow.dont_fragment);
    if cut {
        forward::send_in_pieces(core, frame, port, mtu, route);
    } else {
        egress::send(core, frame, port, route);
    }
}
