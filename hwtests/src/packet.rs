//! The few packets that tests make or look into by hand. Everything else is the oracle's.

use std::net::{IpAddr, UdpSocket};

use anyhow::{Context, Result, bail};

use crate::netns::Netns;

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;

/// An Ethernet frame around an IP packet.
pub fn ethernet(destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] =
        if packet.first().is_some_and(|byte| byte >> 4 == 4) { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&destination[..], &source, &kind, packet].concat()
}

/// The link-layer address of an interface.
pub fn mac(namespace: &Netns, interface: &str) -> Result<[u8; 6]> {
    let text = namespace.sh(&format!("cat /sys/class/net/{interface}/address"))?;
    let bytes: Vec<u8> =
        text.trim().split(':').map(|pair| u8::from_str_radix(pair, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("not a link-layer address")
}

/// An IP header with this protocol and nothing behind it: TTL 64, no options, DF clear.
pub fn ip_header(source: IpAddr, destination: IpAddr, protocol: u8, payload: usize) -> Result<Vec<u8>> {
    let length = u16::try_from(payload)?;
    let mut header = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let [high, low] = (20 + length).to_be_bytes();
            let fixed = [0x45, 0, high, low, 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
            [&fixed[..], &source.octets(), &destination.octets()].concat()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let [high, low] = length.to_be_bytes();
            let fixed = [0x60, 0, 0, 0, high, low, protocol, 64];
            [&fixed[..], &source.octets(), &destination.octets()].concat()
        }
        _ => bail!("addresses of two families"),
    };
    fix_ip_checksum(&mut header);
    Ok(header)
}

/// A UDP datagram in IP with a right checksum.
pub fn udp(from: (IpAddr, u16), to: (IpAddr, u16), data: &[u8]) -> Result<Vec<u8>> {
    let length = 8 + data.len();
    let mut datagram = Vec::new();
    for word in [from.1, to.1, u16::try_from(length)?, 0] {
        datagram.extend_from_slice(&word.to_be_bytes());
    }
    datagram.extend_from_slice(data);
    let mut pseudo = Vec::new();
    for address in [from.0, to.0] {
        match address {
            IpAddr::V4(address) => pseudo.extend_from_slice(&address.octets()),
            IpAddr::V6(address) => pseudo.extend_from_slice(&address.octets()),
        }
    }
    pseudo.extend_from_slice(&u32::try_from(length)?.to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, 17]);
    let checksum = match internet_checksum(&[&pseudo[..], &datagram].concat()) {
        0 => 0xffff,
        other => other,
    };
    if let Some(field) = datagram.get_mut(6..8) {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
    Ok([ip_header(from.0, to.0, 17, length)?, datagram].concat())
}

/// What an outer IP header says; of IPv6 extension headers it knows nothing.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Source.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// Protocol of what follows.
    pub protocol: u8,
    /// Bytes of the header.
    pub size: usize,
}

/// The IP header that a packet begins with; `None` if it is cut off.
pub fn outer_header(packet: &[u8]) -> Option<Outer> {
    let v4 = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<4>()?));
    let v6 = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<16>()?));
    Some(match packet.first()? >> 4 {
        4 => Outer { source: v4(12)?, destination: v4(16)?, protocol: *packet.get(9)?, size: 20 },
        6 => Outer { source: v6(8)?, destination: v6(24)?, protocol: *packet.get(6)?, size: 40 },
        _ => return None,
    })
}

/// Whether an Ethernet frame carries IKE: UDP on port 500, or on 4500 with the non-ESP marker (RFC 3948 section 2.2).
pub fn is_ike(frame: &[u8]) -> bool {
    let Some(packet) = frame.get(ETHERNET..) else { return false };
    let Some(header) = outer_header(packet).filter(|header| header.protocol == 17) else { return false };
    let Some([a, b, c, d, _, _, _, _, data @ ..]) = packet.get(header.size..) else { return false };
    let ports = [u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])];
    ports.contains(&500) || (ports.contains(&4500) && data.starts_with(&[0; 4]))
}

/// Makes an IPv4 header's checksum right; leaves IPv6 alone.
pub fn fix_ip_checksum(packet: &mut [u8]) {
    if packet.first().is_none_or(|byte| byte >> 4 != 4) {
        return;
    }
    if let Some(field) = packet.get_mut(10..12) {
        field.fill(0);
    }
    let checksum = packet.get(..20).map(internet_checksum).unwrap_or_default();
    if let Some(field) = packet.get_mut(10..12) {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The packet as a router hands it on: TTL or hop limit one less (RFC 1812 section 5.3.1, RFC 8200 section 3).
pub fn forwarded(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let field = if packet.first().is_some_and(|byte| byte >> 4 == 4) { 8 } else { 7 };
    if let Some(ttl) = packet.get_mut(field) {
        *ttl = ttl.saturating_sub(1);
    }
    fix_ip_checksum(&mut packet);
    packet
}

/// What an outbound SA protects of `packet`: in tunnel mode it was forwarded into the tunnel, in transport mode the
/// gateway stands for the host itself and leaves the header as it is (RFC 4301 section 4.1).
pub fn protected(packet: &[u8], mode: &str) -> Vec<u8> {
    if mode == "tunnel" { forwarded(packet) } else { packet.to_vec() }
}

/// Sends one UDP datagram from a socket inside `namespace`.
pub fn send_datagram(namespace: &Netns, from: (IpAddr, u16), to: (IpAddr, u16), data: &[u8]) -> Result<()> {
    let socket = namespace.enter(|| Ok(UdpSocket::bind(from)?))?;
    socket.send_to(data, to)?;
    Ok(())
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| match *pair {
            [high, low] => u32::from(u16::from_be_bytes([high, low])),
            [high] => u32::from(high) << 8,
            _ => 0,
        })
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}
