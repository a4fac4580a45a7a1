//! What the gateways and packets of all benches here are made of; each changes what it wants to have otherwise.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a bench that cannot make its packets has to stop"
)]

use std::net::{IpAddr, Ipv4Addr};

use arrayvec::ArrayVec;
use postern_contract::sa::{
    Action, AddressRange, Direction, Encryption, FanOut, Integrity, IpsecProtocol, KeyOrigin, Lifetime, Mode,
    PathPolicy, Policy, PolicyId, SaConfig, SaId, Selector, Suite,
};
use postern_contract::secret::Secret;
use postern_contract::{Generation, Translation};
use postern_datapath::crypto::{Engine, EspKey, Layout, SealOp, SealOutcome, SequenceCounter};
use postern_datapath::testbed::NEIGHBOUR_MAC;
use postern_wire::ether::{self, Mac};
use postern_wire::ids::{EtherType, Protocol, Spi};
use postern_wire::{esp, ip4, udp};

/// Where the ESP header of a frame is.
pub const ESP_AT: usize = ether::LEN + ip4::MIN_LEN;

/// One address.
pub fn only(address: Ipv4Addr) -> AddressRange {
    AddressRange { start: address.into(), end: address.into() }
}

/// All protocols and ports between these.
pub fn selector(local: AddressRange, remote: AddressRange) -> Selector {
    Selector { local, remote, protocol: None, local_ports: 0..=u16::MAX, remote_ports: 0..=u16::MAX }
}

/// A suite without integrity of its own.
pub fn aead(encryption: Encryption, key: Secret) -> Suite {
    Suite { encryption, encryption_key: key, integrity: Integrity::None, integrity_key: Secret::empty() }
}

/// An SA of ESP in tunnel mode with ESN, a window of 1,024 if it is inbound, and nothing special. `ends` are ours and the
/// peer's.
pub fn sa(
    id: SaId,
    direction: Direction,
    spi: Spi,
    ends: (IpAddr, IpAddr),
    suite: Suite,
    selector: Selector,
) -> SaConfig {
    let inbound = direction == Direction::Inbound;
    SaConfig {
        id,
        generation: Generation(1),
        direction,
        protocol: IpsecProtocol::Esp,
        mode: Mode::Tunnel,
        spi: Translation::same(spi),
        local: Translation::same(ends.0),
        remote: Translation::same(ends.1),
        encap: None,
        suite,
        esn: true,
        replay_window: if inbound { 1024 } else { 0 },
        sequence: u64::from(!inbound),
        selectors: vec![selector],
        lifetime: Lifetime::default(),
        path: PathPolicy::default(),
        follow_peer: inbound,
        pair: None,
        bundle: None,
        origin: KeyOrigin::Negotiated,
        worker: None,
        fan_out: FanOut::ByLoad,
    }
}

/// The policy that gives packets to an SA.
pub fn policy(id: PolicyId, selector: Selector, sa: SaId) -> Policy {
    Policy {
        id,
        generation: Generation(1),
        priority: 1,
        selectors: vec![selector],
        action: Action::Protect(Some(sa)),
    }
}

/// The header of a whole packet with DF.
fn header(source: Ipv4Addr, destination: Ipv4Addr, protocol: Protocol) -> ip4::Header {
    ip4::Header { source, destination, protocol, ttl: 64, tos: 0, id: 1, dont_fragment: true }
}

/// Writes the link header of an IPv4 packet that the neighbour sends.
pub fn write_link(bytes: &mut [u8], to: Mac) -> Option<()> {
    ether::Header { destination: to, source: NEIGHBOUR_MAC, ethertype: EtherType::IPV4 }.emit(bytes)
}

/// Writes the headers of a UDP packet of `size` bytes; `ports` and `hosts` are those of its source and its destination.
pub fn write_udp(
    bytes: &mut [u8],
    size: usize,
    hosts: (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
) -> Option<()> {
    let length = size.checked_sub(ip4::MIN_LEN)?;
    header(hosts.0, hosts.1, Protocol::UDP).emit(bytes, length)?;
    let (source_port, destination_port) = ports;
    let length = u16::try_from(length).ok()?;
    let datagram = udp::Header { source_port, destination_port, length, checksum: 0 };
    datagram.emit(bytes.get_mut(ip4::MIN_LEN..)?)
}

/// Makes `frame` one that comes from inside, with a packet of `size` bytes between these hosts.
pub fn cleartext(frame: &mut Vec<u8>, to: Mac, hosts: (Ipv4Addr, Ipv4Addr), size: usize) {
    frame.clear();
    frame.resize(ether::LEN + size, 0x5a);
    write_link(frame, to).expect("room");
    write_udp(&mut frame[ether::LEN..], size, hosts, (1000, 2000)).expect("room");
}

/// The same from outside, in ESP between `ends`: all that stands in it before it is [`seal`]ed.
pub fn in_esp(
    frame: &mut Vec<u8>,
    to: Mac,
    hosts: (Ipv4Addr, Ipv4Addr),
    size: usize,
    ends: (Ipv4Addr, Ipv4Addr),
    spi: Spi,
    layout: Layout,
) {
    let front = ESP_AT + esp::HEADER_LEN + usize::from(layout.iv_len);
    let pad = usize::from(esp::padding(size, usize::from(layout.block)));
    let end = front + size + pad + esp::TRAILER_LEN;
    frame.clear();
    frame.resize(end + usize::from(layout.icv_len), 0x5a);
    write_link(frame, to).expect("room");
    let outer = &mut frame[ether::LEN..];
    let len = outer.len() - ip4::MIN_LEN;
    header(ends.0, ends.1, Protocol::ESP).emit(outer, len).expect("room");
    esp::Header { spi, sequence: 0 }.emit(&mut frame[ESP_AT..]).expect("room");
    write_udp(&mut frame[front..], size, hosts, (1000, 2000)).expect("room");
    esp::write_trailer(&mut frame[front + size..end], Protocol::IPV4).expect("room");
}

/// Seals a packet from its ESP header on, with the next number.
pub fn seal(engine: &mut Engine, key: &EspKey, numbers: &mut SequenceCounter, packet: &mut [u8]) {
    let sequence = numbers.reserve().expect("a number");
    let mut ops = ArrayVec::<_, 1>::new();
    ops.push(SealOp { key: key.into(), sequence, esn: true, packet });
    assert_eq!(engine.seal(ops).as_slice(), [SealOutcome::Sealed]);
}
