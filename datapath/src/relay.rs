//! The blind relay: a packet that matches one partition of an entry leaves with the values of the other (RLY-1).
//!
//! No crypto stage is reachable from here, and nothing in an entry could feed one. A packet keeps its length, unless
//! the two sides differ in UDP encapsulation (RLY-11).

pub mod express;
mod ways;

use std::net::IpAddr;

use arrayvec::ArrayVec;
use hashbrown::HashMap;
use postern_contract::counters::{DropReason, RelayCounters};
use postern_contract::relay::{Partition, RelayEntry, RelayId};
use postern_contract::sa::{IpsecProtocol, UdpEncap};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{ah, checksum, esp, ether, udp};

use crate::core::Core;
use crate::egress;
use crate::fib::{PortIndex, Route};
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

/// Asks for the memory in which the way of a packet is looked up.
#[inline]
pub fn prefetch(relays: &RelayTable, spi: u32, relay: u32) {
    relays.ways.prefetch(WayKey::new(spi, relay));
}

/// Where the short way of ESP packets with this SPI to this address stands, if there is one; asks for its memory.
#[inline]
pub fn find(relays: &RelayTable, spi: u32, relay: u32) -> u32 {
    relays.ways.find(WayKey::new(spi, relay)).unwrap_or(ways::NONE)
}

/// Translates a packet of ESP over IPv4 without options and without UDP, sound and whole, whose short way was found at
/// `place`, and sends it on. Its frame begins and ends with the packet, and has room for a link header in front. What is
/// not usual in any way is left to the long way, which knows all cases and all complaints.
#[inline]
pub fn run_quick(core: &mut Core, frame: Frame, place: u32, port: PortIndex) {
    if let Err(frame) = pass(core, frame, place, port) {
        run_plain(core, frame, port);
    }
}

#[cold]
fn run_plain(core: &mut Core, frame: Frame, port: PortIndex) {
    match Arrival::plain(port, core.arena.bytes(&frame)) {
        Some(arrival) => run_one(core, frame, &arrival),
        None => core.discard(frame, port, DropReason::Malformed),
    }
}

/// The short way of one packet; gives the frame back, and the packet as it was, if there is none.
#[inline]
fn pass(core: &mut Core, mut frame: Frame, place: u32, from: PortIndex) -> Result<(), Frame> {
    let Core { arena, relays, fib, egress, resolver, now, .. } = core;
    let Some(way) = relays.ways.get_mut(place) else { return Err(frame) };
    let to = way.destination();
    let Some(exit) = fib.exit_of(&mut way.exit, to) else { return Err(frame) };
    let len = frame.len();
    if len > usize::from(exit.mtu) || !exit.ethernet || frame.grow_front(ether::LEN).is_none() {
        return Err(frame);
    }
    let head = arena.bytes_mut(&mut frame).split_first_chunk_mut();
    if let Some((link, rest)) = head
        && let Some(head) = rest.first_chunk_mut()
        && way.fits(head)
    {
        *link = exit.link;
        way.translate(head, len);
        match egress.room(exit.tell(resolver, *now)) {
            Ok(room) => egress::put(room, frame, from),
            Err(reason) => core.discard(frame, from, reason),
        }
        return Ok(());
    }
    // What was put in front is taken off again.
    let _ = frame.shrink_front(ether::LEN);
    Err(frame)
}

/// Translates packets one by one and sends them on.
pub fn run(core: &mut Core, packets: &mut ArrayVec<(Frame, Arrival), BATCH>) {
    for (frame, arrival) in packets.drain(..) {
        run_one(core, frame, &arrival);
    }
}

/// The long way of one packet.
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
        (Some(_), Some(encap)) => {
            return readdress_udp(packet, ip_len, encap, from, to).ok_or(DropReason::Malformed);
        }
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

/// Gives a datagram that stays one the other side's ports. Over IPv6 its checksum follows, so that one that was wrong is
/// not made right on the way; one that is missing (RFC 6935) is computed.
fn readdress_udp(
    packet: &mut [u8],
    at: usize,
    encap: UdpEncap,
    from: &Partition,
    to: &Partition,
) -> Option<()> {
    let check = header::get_u16(packet, at + 6)?;
    if check == 0 || from.relay.is_ipv4() {
        return put_udp(packet, at, encap, to);
    }
    let words = |address: IpAddr| match address {
        IpAddr::V4(address) => checksum::sum(&address.octets()),
        IpAddr::V6(address) => checksum::sum(&address.octets()),
    };
    let spi = |spi: Option<Spi>| checksum::sum(&spi.unwrap_or(Spi(0)).0.to_be_bytes());
    let old_ports = packet.get(at..at + 4).map(checksum::sum)?;
    let old = words(from.peer) + words(from.relay) + old_ports + spi(from.esp.map(|pair| pair.to_relay));
    let new = words(to.relay)
        + words(to.peer)
        + u64::from(encap.local_port)
        + u64::from(encap.remote_port)
        + spi(to.esp.map(|pair| pair.from_relay));
    // RFC 1624 section 3, equation 3; the complement of a sum is that of its words, as 16-bit words are counted modulo
    // 2^16 - 1.
    let check = checksum::finish(u64::from(!check) + u64::from(!checksum::fold(old)) + new);
    header::put(packet, at, encap.local_port.to_be_bytes());
    header::put(packet, at + 2, encap.remote_port.to_be_bytes());
    header::put(packet, at + 6, if check == 0 { 0xffff } else { check }.to_be_bytes());
    Some(())
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use postern_contract::Generation;
    use postern_contract::relay::SpiPair;
    use postern_contract::request::Operation;
    use postern_wire::ip4;
    use tempfile::TempDir;

    use super::*;
    use crate::testbed::{Layout, Testbed};

    const RELAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

    /// A relay with three entries: one whose next hop is the gateway, one on the link, one in UDP on the other side.
    fn bed(quick: bool) -> (TempDir, Testbed) {
        let state = tempfile::tempdir().unwrap();
        let mut bed = Testbed::new(&Layout::default(), state.path()).unwrap();
        let side = |peer: [u8; 4], spi: u32, encap| Partition {
            relay: RELAY.into(),
            peer: Ipv4Addr::from(peer).into(),
            encap,
            esp: Some(SpiPair { to_relay: Spi(spi), from_relay: Spi(spi + 1000) }),
            ah: None,
        };
        let udp = Some(UdpEncap { local_port: 4500, remote_port: 4501 });
        let entries = [
            (side([198, 51, 100, 1], 0x1001, None), side([203, 0, 113, 1], 0x2001, None)),
            (side([198, 51, 100, 2], 0x1002, None), side([192, 0, 2, 254], 0x2002, None)),
            (side([198, 51, 100, 3], 0x1003, None), side([203, 0, 113, 3], 0x2003, udp)),
        ];
        let entries = (1..).zip(entries).map(|(id, (client, gateway))| {
            Operation::InstallRelay(RelayEntry {
                id: RelayId(id),
                generation: Generation(1),
                client,
                gateway,
            })
        });
        for done in bed.apply(entries.collect()) {
            done.unwrap();
        }
        if !quick {
            bed.workers.borrow_mut()[0].core.relays.ways = Ways::default();
        }
        (state, bed)
    }

    fn packets() -> impl Iterator<Item = Vec<u8>> {
        let mut state = 1_u64;
        let mut random = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % below
        };
        (0..3000).map(move |_| {
            let size = [27, 28, 32, 60, 1400, 1492, 1493, 1500, 1501][random(9)];
            let mut packet: Vec<u8> = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let header = ip4::Header {
                source: Ipv4Addr::new(198, 51, 100, u8::try_from(1 + random(3)).unwrap()),
                destination: RELAY,
                protocol: [Protocol::ESP, Protocol::ESP, Protocol::ESP, Protocol::AH][random(4)],
                ttl: [1, 2, 64, 255][random(4)],
                tos: u8::try_from(random(256)).unwrap(),
                id: 9,
                dont_fragment: random(2) == 0,
            };
            header.emit(&mut packet, size - 20).unwrap();
            let spi = 0x1000 + u32::try_from(random(5)).unwrap();
            if let Some(place) = packet.get_mut(20..24) {
                place.copy_from_slice(&spi.to_be_bytes());
            }
            match random(12) {
                0 => packet[10] ^= 1,
                1 => ip4::set_fragment(&mut packet, None, 8 * random(2), true).unwrap(),
                2 => packet.extend([0xa5; 7]),
                _ => {}
            }
            packet
        })
    }

    /// RLY-1: what goes the short way leaves as what goes the long way, and is counted alike.
    #[test]
    fn rly_1_both_ways_write_the_same() {
        let ((_one, mut quick), (_other, mut long)) = (bed(true), bed(false));
        let mut sent = 0;
        for packet in packets() {
            let left = quick.from_outside(&packet);
            assert_eq!(left, long.from_outside(&packet), "{packet:02x?}");
            sent += left.0.len();
        }
        assert!(sent > 150, "{sent}");
        for reason in DropReason::ALL {
            assert_eq!(quick.drops(*reason), long.drops(*reason), "{reason:?}");
        }
        assert!(quick.drops(DropReason::RelayWrongPeer) > 0 && quick.drops(DropReason::TtlExpired) > 0);
        assert_eq!(quick.balance(), long.balance());
        assert_eq!((quick.missing_frames(), long.missing_frames()), (0, 0));
        let counters = |bed: &Testbed| {
            let mut counters = bed.workers.borrow()[0].core.relays.counters();
            counters.sort_by_key(|(id, _)| id.0);
            format!("{counters:?}")
        };
        assert_eq!(counters(&quick), counters(&long));
    }
}
