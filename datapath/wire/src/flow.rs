//! Summary of a cleartext packet of either family, for the SPD and for selectors (RFC 4301 section 4.4.1.1).

use core::net::IpAddr;

use crate::ids::Protocol;
use crate::{Malformed, bytes, ip4, ip6};

/// Upper layers beside TCP and UDP whose first four bytes are ports: DCCP, SCTP, UDP-Lite.
const DCCP: Protocol = Protocol(33);
const SCTP: Protocol = Protocol(132);
const UDP_LITE: Protocol = Protocol(136);
/// Mobility header (RFC 6275), whose type is a selector (RFC 4301 section 4.4.1.1).
const MOBILITY: Protocol = Protocol(135);

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fragment {
    /// All of it; an IPv6 atomic fragment (RFC 6946) counts as this.
    No,
    /// The first part, which has the upper layer's header.
    First,
    /// A part without the upper layer's header.
    Later,
}

/// What policies ask about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Upper layer, after the extension headers of IPv6.
    pub protocol: Protocol,
    /// Source port; type and code (type * 256 + code) for ICMP and ICMPv6; type * 256 for the mobility header.
    pub source_port: u16,
    /// Destination port; for ICMP, ICMPv6 and the mobility header the same as `source_port`.
    pub destination_port: u16,
    /// Whether the ports were there to be read. Both are 0 if not: later fragments, upper layers that are too short,
    /// protocols without ports.
    pub ports_known: bool,
    /// Offset of the upper layer from the start of the packet, in bytes.
    pub header_len: u16,
    /// Offset of the byte that names the upper layer.
    pub next_header_at: u16,
    /// Length of the packet as its header tells it, in bytes.
    pub total_len: u16,
    /// DSCP and ECN.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Whether routers may not fragment the packet; always so for IPv6.
    pub dont_fragment: bool,
    /// Which part of a datagram this is.
    pub fragment: Fragment,
}

impl Flow {
    /// Reads an IPv4 or IPv6 packet.
    ///
    /// Bytes beyond the packet's own length are allowed (TFC padding, RFC 4303 section 2.7; Ethernet padding) and
    /// never read. The IPv4 checksum is not checked. An IPv6 packet longer than 65535 bytes is refused as
    /// [`Malformed::TotalLength`].
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        match packet.first().ok_or(Malformed::Truncated)? >> 4 {
            4 => Self::parse_v4(packet),
            6 => Self::parse_v6(packet),
            _ => Err(Malformed::Version),
        }
    }

    fn parse_v4(packet: &[u8]) -> Result<Self, Malformed> {
        let view = ip4::View::parse(packet)?;
        let fragment = match (view.fragment_offset(), view.more_fragments()) {
            (0, false) => Fragment::No,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        };
        let ports = ports(view.protocol(), fragment, view.payload());
        let (source_port, destination_port) = ports.unwrap_or((0, 0));
        Ok(Self {
            source: IpAddr::V4(view.source()),
            destination: IpAddr::V4(view.destination()),
            protocol: view.protocol(),
            source_port,
            destination_port,
            ports_known: ports.is_some(),
            header_len: narrow(view.header_len())?,
            next_header_at: 9,
            total_len: narrow(view.total_len())?,
            tos: view.tos(),
            ttl: view.ttl(),
            dont_fragment: view.dont_fragment(),
            fragment,
        })
    }

    fn parse_v6(packet: &[u8]) -> Result<Self, Malformed> {
        let view = ip6::View::parse(packet)?;
        let total_len = narrow(view.total_len())?;
        let upper = ip6::upper(packet)?;
        let fragment = match upper.fragment {
            None | Some(ip6::Fragment { offset: 0, more: false, .. }) => Fragment::No,
            Some(ip6::Fragment { offset: 0, more: true, .. }) => Fragment::First,
            Some(_) => Fragment::Later,
        };
        let payload = view.payload().get(usize::from(upper.offset).saturating_sub(ip6::LEN)..).unwrap_or(&[]);
        let ports = ports(upper.protocol, fragment, payload);
        let (source_port, destination_port) = ports.unwrap_or((0, 0));
        Ok(Self {
            source: IpAddr::V6(view.source()),
            destination: IpAddr::V6(view.destination()),
            protocol: upper.protocol,
            source_port,
            destination_port,
            ports_known: ports.is_some(),
            header_len: upper.offset,
            next_header_at: upper.next_header_at,
            total_len,
            tos: view.traffic_class(),
            ttl: view.hop_limit(),
            dont_fragment: true,
            fragment,
        })
    }
}

/// The ports of an upper layer, or what stands for them.
fn ports(protocol: Protocol, fragment: Fragment, payload: &[u8]) -> Option<(u16, u16)> {
    if fragment == Fragment::Later {
        return None;
    }
    match protocol {
        Protocol::TCP | Protocol::UDP | DCCP | SCTP | UDP_LITE => {
            Some((bytes::u16_at(payload, 0)?, bytes::u16_at(payload, 2)?))
        }
        Protocol::ICMP | Protocol::ICMPV6 => {
            bytes::u16_at(payload, 0).map(|type_code| (type_code, type_code))
        }
        // RFC 7296 section 3.13.1: "with Type in the most significant eight bits and the least significant eight bits
        // set to zero".
        MOBILITY => bytes::u8_at(payload, 2).map(|kind| u16::from(kind) << 8).map(|port| (port, port)),
        _ => None,
    }
}

fn narrow(len: usize) -> Result<u16, Malformed> {
    u16::try_from(len).map_err(|_| Malformed::TotalLength)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::hex;

    /// Made by scapy 2.8: `IP(src='10.1.2.3', dst='10.4.5.6', tos=0xb8, id=0x4242, flags='DF', ttl=64) /
    /// UDP(sport=53, dport=5353) / b'abc'`.
    const UDP_V4: &str = "45b8001f424240004011dcc60a0102030a040506003514e9000b0b4a616263";
    /// Made by scapy 2.8: hop-by-hop options, routing, first fragment, destination options, TCP(1024, 443).
    const CHAIN_V6: &str = "600000000044004020010db800000000000000000000000120010db8000000000000000000000002
        2b000502000001002c0200010000000020010db80000000000000000000000093c000001deadbeef0600010400000000
        040001bb0000000000000000500220002eac0000";

    fn udp_v4() -> Flow {
        Flow {
            source: [10, 1, 2, 3].into(),
            destination: [10, 4, 5, 6].into(),
            protocol: Protocol::UDP,
            source_port: 53,
            destination_port: 5353,
            ports_known: true,
            header_len: 20,
            next_header_at: 9,
            total_len: 31,
            tos: 0xb8,
            ttl: 64,
            dont_fragment: true,
            fragment: Fragment::No,
        }
    }

    #[test]
    fn reads_v4() {
        assert_eq!(Flow::parse(&hex(UDP_V4)), Ok(udp_v4()));
    }

    #[test]
    fn reads_v6_behind_extension_headers() {
        let expected = Flow {
            source: IpAddr::V6("2001:db8::1".parse().unwrap()),
            destination: IpAddr::V6("2001:db8::2".parse().unwrap()),
            protocol: Protocol::TCP,
            source_port: 1024,
            destination_port: 443,
            ports_known: true,
            header_len: 88,
            next_header_at: 80,
            total_len: 108,
            tos: 0,
            ttl: 64,
            dont_fragment: true,
            fragment: Fragment::First,
        };
        assert_eq!(Flow::parse(&hex(CHAIN_V6)), Ok(expected));
    }

    /// RFC 4301 section 4.4.1.1: the ports of later fragments are opaque.
    #[test]
    fn ports_are_known_where_they_are() {
        let unknown = Flow { source_port: 0, destination_port: 0, ports_known: false, ..udp_v4() };
        let mut later = hex(UDP_V4);
        later[7] = 185;
        assert_eq!(Flow::parse(&later), Ok(Flow { fragment: Fragment::Later, ..unknown }));
        let mut first = hex(UDP_V4);
        first[6] = 0x20;
        let expected = Flow { fragment: Fragment::First, dont_fragment: false, ..udp_v4() };
        assert_eq!(Flow::parse(&first), Ok(expected));
        // The bytes of the ports are there, but beyond the packet.
        let mut short = hex(UDP_V4);
        short[3] = 23;
        assert_eq!(Flow::parse(&short), Ok(Flow { total_len: 23, ..unknown }));
        let mut esp = hex(UDP_V4);
        esp[9] = Protocol::ESP.0;
        assert_eq!(Flow::parse(&esp), Ok(Flow { protocol: Protocol::ESP, ..unknown }));
    }

    /// RFC 4301 section 4.4.1.1: message type and code, type in the high byte.
    #[test]
    fn icmp_type_and_code_stand_for_ports() {
        let mut packet = hex(UDP_V4);
        (packet[9], packet[20], packet[21]) = (Protocol::ICMP.0, 3, 4);
        let flow = Flow::parse(&packet).unwrap();
        assert_eq!((flow.source_port, flow.destination_port, flow.ports_known), (0x0304, 0x0304, true));
    }

    /// RFC 6946: a fragment header alone does not make a fragment.
    #[test]
    fn atomic_fragment_is_whole() {
        let mut packet = hex(CHAIN_V6);
        packet[75] = 0;
        assert_eq!(Flow::parse(&packet).unwrap().fragment, Fragment::No);
    }

    #[test]
    fn refuses_what_is_no_packet() {
        assert_eq!(Flow::parse(&[]), Err(Malformed::Truncated));
        assert_eq!(Flow::parse(&[0x15; 40]), Err(Malformed::Version));
        assert_eq!(Flow::parse(&hex(UDP_V4)[..30]), Err(Malformed::Truncated));
        let mut jumbo = std::vec![0; 40 + 65_535];
        (jumbo[0], jumbo[4], jumbo[5]) = (0x60, 0xff, 0xff);
        assert_eq!(Flow::parse(&jumbo), Err(Malformed::TotalLength));
    }
}
