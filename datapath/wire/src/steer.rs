//! Which packets are ours: the one parser that the XDP program and the workers both run (DP-1).
//!
//! [`classify`] looks at the link, IP and UDP headers of one frame and says what it carries and where. It reads
//! through [`Bytes`], so that the XDP program can run it over packet pointers that the kernel's verifier follows, and
//! a worker over a slice. It never panics and believes nothing: lengths are checked against the frame and against
//! each other, options and extension headers are bounded.
//!
//! After `classify` returned anything but [`Class::NotIp`], [`Class::Malformed`] and
//! [`Class::TooManyExtensionHeaders`], the IP header at `network` is whole, the IP packet ends inside the frame and
//! `transport` lies inside the packet or at its end. For [`Class::Esp`], [`Class::EspInUdp`] and [`Class::Ah`] the
//! SPI and the sequence number (for AH the whole fixed header) are inside the packet too.
//! Checksums are not looked at: the XDP program leaves them to the worker.

use crate::ids::{EtherType, PORT_IKE, PORT_NATT, Protocol};

/// Bytes of a frame, from its first, in network byte order. Every access checks the bounds.
pub trait Bytes {
    /// Number of bytes.
    fn size(&self) -> usize;
    /// The byte at `at`.
    fn u8(&self, at: usize) -> Option<u8>;
    /// The big-endian 16-bit value at `at`.
    fn u16(&self, at: usize) -> Option<u16>;
    /// The big-endian 32-bit value at `at`.
    fn u32(&self, at: usize) -> Option<u32>;
}

impl Bytes for [u8] {
    fn size(&self) -> usize {
        self.len()
    }

    fn u8(&self, at: usize) -> Option<u8> {
        self.get(at).copied()
    }

    fn u16(&self, at: usize) -> Option<u16> {
        self.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
    }

    fn u32(&self, at: usize) -> Option<u32> {
        self.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
    }
}

impl<B: Bytes + ?Sized> Bytes for &B {
    fn size(&self) -> usize {
        (**self).size()
    }

    fn u8(&self, at: usize) -> Option<u8> {
        (**self).u8(at)
    }

    fn u16(&self, at: usize) -> Option<u16> {
        (**self).u16(at)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        (**self).u32(at)
    }
}

/// What the frame starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// An Ethernet header of 14 bytes.
    Ethernet,
    /// The IP header (TUN devices, raw sockets).
    Ip,
}

/// What a frame is to an IPsec gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// ESP over IP (protocol 50).
    Esp,
    /// ESP in UDP to port 4500 (RFC 3948 section 2.1): the first four bytes are not zero.
    EspInUdp,
    /// AH over IP (protocol 51).
    Ah,
    /// NAT-keepalive (RFC 3948 section 2.3): UDP to port 4500 with the one byte 0xFF.
    NattKeepalive,
    /// IKE: UDP to port 500, or to port 4500 with the non-ESP marker (RFC 3948 section 2.2), whole or the first
    /// fragment of it.
    Ike,
    /// A fragment, first or later, of ESP or AH, or the first fragment of ESP in UDP. An IPv6 packet with a fragment
    /// header is a fragment even if it is the only one (RFC 6946).
    IpsecFragment,
    /// Any other IPv4 or IPv6 packet, also later fragments of UDP, which have no port to tell them by.
    Ip,
    /// ARP, VLAN tags, any other Ethernet type or IP version.
    NotIp,
    /// Shorter than its headers say, or a length that contradicts another.
    Malformed,
    /// More than [`MAX_EXTENSION_HEADERS`] IPv6 extension headers, or more than [`MAX_EXTENSION_BYTES`] of them.
    TooManyExtensionHeaders,
}

/// Extension headers followed in an IPv6 packet.
pub const MAX_EXTENSION_HEADERS: usize = 8;
/// Bytes of extension headers followed in an IPv6 packet.
pub const MAX_EXTENSION_BYTES: usize = 2048;
/// Length of an Ethernet header without tags.
const ETHERNET_LEN: u16 = 14;
const IP4_MIN_LEN: usize = 20;
const IP6_LEN: usize = 40;
const UDP_LEN: usize = 8;
/// SPI and sequence number (RFC 4303 section 2).
const ESP_MIN_LEN: usize = 8;
/// Next header, length, reserved, SPI, sequence number (RFC 4302 section 2).
const AH_MIN_LEN: usize = 12;
/// RFC 3948 section 2.3: one octet with the value 0xFF.
const KEEPALIVE: u8 = 0xff;

/// What [`classify`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classified {
    /// What it is.
    pub class: Class,
    /// Whether the IP header is IPv6.
    pub v6: bool,
    /// The upper-layer header is in another fragment; `transport` is then where this fragment's data starts.
    pub later_fragment: bool,
    /// Offset of the IP header in the frame.
    pub network: u16,
    /// Offset of the ESP or AH header ([`Class::EspInUdp`]: the UDP header is the 8 bytes before), else of the
    /// upper-layer header.
    pub transport: u16,
    /// Protocol of what is at `transport`; [`Class::EspInUdp`] says ESP. [`Protocol::NONE`] where the frame is not IP,
    /// malformed or not followed to its end.
    pub protocol: Protocol,
}

impl Classified {
    /// A frame in which nothing beyond the link header is known.
    const fn opaque(class: Class, v6: bool, network: u16) -> Self {
        Self { class, v6, later_fragment: false, network, transport: network, protocol: Protocol::NONE }
    }
}

/// Says what a frame is; see the module's documentation for what may be relied on afterwards.
///
/// Each helper is called from one place: so they end up inside the XDP program's one function.
#[inline]
pub fn classify<B: Bytes + ?Sized>(bytes: &B, link: Link) -> Classified {
    let (network, ether_type) = match link {
        Link::Ethernet => (ETHERNET_LEN, bytes.u16(12)),
        Link::Ip => (
            0,
            bytes.u8(0).map(|first| match first >> 4 {
                4 => EtherType::IPV4.0,
                6 => EtherType::IPV6.0,
                _ => 0,
            }),
        ),
    };
    let (v6, found) = match ether_type.map(EtherType) {
        Some(EtherType::IPV4) => (false, ip4(bytes, network)),
        Some(EtherType::IPV6) => (true, ip6(bytes, network)),
        Some(_) => (false, Err(Class::NotIp)),
        None => (false, Err(Class::Malformed)),
    };
    match found.and_then(|found| upper(bytes, found).ok_or(Class::Malformed)) {
        Ok(found) => found,
        Err(class) => Classified::opaque(class, v6, network),
    }
}

/// Where in the frame the upper layer is, and how much of it.
#[derive(Clone, Copy)]
struct Upper {
    v6: bool,
    network: u16,
    protocol: Protocol,
    /// Offset of the upper-layer header.
    at: usize,
    /// Offset of the end of the IP packet.
    end: usize,
    fragment: Option<FragmentPart>,
}

/// Which part of a fragmented packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FragmentPart {
    First,
    Later,
}

#[inline]
fn ip4<B: Bytes + ?Sized>(bytes: &B, network: u16) -> Result<Upper, Class> {
    let start = usize::from(network);
    let version_ihl = bytes.u8(start).ok_or(Class::Malformed)?;
    let header = usize::from(version_ihl & 0x0f) * 4;
    let total = usize::from(bytes.u16(start + 2).ok_or(Class::Malformed)?);
    let end = start + total;
    if version_ihl >> 4 != 4 || header < IP4_MIN_LEN || total < header || end > bytes.size() {
        return Err(Class::Malformed);
    }
    // RFC 791 section 3.1: bit 13 is More Fragments, the low 13 bits the offset.
    let fragment = match bytes.u16(start + 6).ok_or(Class::Malformed)? & 0x3fff {
        0 => None,
        0x2000 => Some(FragmentPart::First),
        _ => Some(FragmentPart::Later),
    };
    let protocol = Protocol(bytes.u8(start + 9).ok_or(Class::Malformed)?);
    Ok(Upper { v6: false, network, protocol, at: start + header, end, fragment })
}

#[inline]
fn ip6<B: Bytes + ?Sized>(bytes: &B, network: u16) -> Result<Upper, Class> {
    let start = usize::from(network);
    let version = bytes.u8(start).ok_or(Class::Malformed)? >> 4;
    let chain = start + IP6_LEN;
    let end = chain + usize::from(bytes.u16(start + 4).ok_or(Class::Malformed)?);
    if version != 6 || end > bytes.size() {
        return Err(Class::Malformed);
    }
    let mut protocol = Protocol(bytes.u8(start + 6).ok_or(Class::Malformed)?);
    let mut fragment = None;
    let mut at = chain;
    for _ in 0..=MAX_EXTENSION_HEADERS {
        // What follows the header of a later fragment is data, whatever its first byte looks like.
        if fragment == Some(FragmentPart::Later) {
            return Ok(Upper { v6: true, network, protocol, at, end, fragment });
        }
        let length = match protocol {
            // RFC 8200 section 4.2: length in units of 8 octets, the first not counted.
            Protocol::HOP_BY_HOP | Protocol::ROUTING | Protocol::DEST_OPTIONS => {
                (usize::from(bytes.u8(at + 1).ok_or(Class::Malformed)?) + 1) * 8
            }
            // RFC 8200 section 4.5: the low 3 bits are reserved and More Fragments.
            Protocol::FRAGMENT => {
                let first = bytes.u16(at + 2).ok_or(Class::Malformed)? & 0xfff8 == 0;
                fragment = Some(if first { FragmentPart::First } else { FragmentPart::Later });
                8
            }
            _ => return Ok(Upper { v6: true, network, protocol, at, end, fragment }),
        };
        protocol = Protocol(bytes.u8(at).ok_or(Class::Malformed)?);
        at += length;
        if at > end {
            return Err(Class::Malformed);
        }
        if at > chain + MAX_EXTENSION_BYTES {
            break;
        }
    }
    Err(Class::TooManyExtensionHeaders)
}

/// `None` is malformed: an upper-layer header shorter than what tells one class from another.
#[inline]
fn upper<B: Bytes + ?Sized>(bytes: &B, upper: Upper) -> Option<Classified> {
    let Upper { v6, network, protocol, at, end, fragment } = upper;
    let transport = u16::try_from(at).ok()?;
    let later_fragment = fragment == Some(FragmentPart::Later);
    let found = |class| Some(Classified { class, v6, later_fragment, network, transport, protocol });
    match protocol {
        Protocol::ESP | Protocol::AH if fragment.is_some() => found(Class::IpsecFragment),
        Protocol::ESP if at + ESP_MIN_LEN > end => None,
        Protocol::ESP => found(Class::Esp),
        Protocol::AH if at + AH_MIN_LEN > end => None,
        Protocol::AH => found(Class::Ah),
        Protocol::UDP if later_fragment => found(Class::Ip),
        Protocol::UDP if at + UDP_LEN > end => None,
        Protocol::UDP => match bytes.u16(at + 2)? {
            PORT_IKE => found(Class::Ike),
            PORT_NATT => natt(bytes, at, end, fragment.is_some()).and_then(|class| match class {
                Class::EspInUdp => {
                    let transport = u16::try_from(at + UDP_LEN).ok()?;
                    let protocol = Protocol::ESP;
                    Some(Classified { class, v6, later_fragment, network, transport, protocol })
                }
                _ => found(class),
            }),
            _ => found(Class::Ip),
        },
        _ => found(Class::Ip),
    }
}

/// What UDP to port 4500 at `at` carries (RFC 3948 section 2); `None` if nothing that may be there.
#[inline]
fn natt<B: Bytes + ?Sized>(bytes: &B, at: usize, end: usize, fragment: bool) -> Option<Class> {
    let length = usize::from(bytes.u16(at + 4)?);
    // The length of a fragmented datagram is that of the whole.
    if length < UDP_LEN || (!fragment && at + length > end) {
        return None;
    }
    let payload = at + UDP_LEN;
    if length == UDP_LEN + 1 && bytes.u8(payload)? == KEEPALIVE {
        return Some(Class::NattKeepalive);
    }
    if length < UDP_LEN + 4 || payload + 4 > end {
        return None;
    }
    match bytes.u32(payload)? {
        0 => Some(Class::Ike),
        _ if fragment => Some(Class::IpsecFragment),
        _ if length < UDP_LEN + ESP_MIN_LEN => None,
        _ => Some(Class::EspInUdp),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    /// A packet in words: what [`build`] makes bytes of and [`expected`] names, neither by parsing.
    #[derive(Clone, Debug)]
    struct Packet {
        v6: bool,
        /// IPv4: words of options, to be taken modulo 11. IPv6: the headers before the upper layer, by kind (modulo 3)
        /// and length in units of 8 bytes more than one (modulo 4).
        extra: Vec<(u8, u8)>,
        fragment: Option<FragmentPart>,
        payload: Payload,
        /// Bytes after the packet: Ethernet pads short frames.
        padding: usize,
    }

    #[derive(Clone, Debug)]
    enum Payload {
        Esp(usize),
        Ah(usize),
        Udp(u16, Vec<u8>),
        Other(u8, usize),
    }

    fn payload() -> impl Strategy<Value = Payload> {
        let natt = prop_oneof![
            Just(vec![0xff]),
            prop::collection::vec(any::<u8>(), 0..24),
            prop::collection::vec(any::<u8>(), 0..24).prop_map(|bytes| [vec![0; 4], bytes].concat()),
        ];
        prop_oneof![
            (0usize..40).prop_map(Payload::Esp),
            (0usize..40).prop_map(Payload::Ah),
            (prop::sample::select(vec![500, 4500, 53]), natt)
                .prop_map(|(port, bytes)| Payload::Udp(port, bytes)),
            (prop::sample::select(vec![1u8, 4, 6, 41, 58, 59, 132]), 0usize..40)
                .prop_map(|(protocol, length)| Payload::Other(protocol, length)),
        ]
    }

    fn packet() -> impl Strategy<Value = Packet> {
        let fragment =
            prop::sample::select(vec![None, None, Some(FragmentPart::First), Some(FragmentPart::Later)]);
        (any::<bool>(), prop::collection::vec(any::<(u8, u8)>(), 0..11), fragment, payload(), 0usize..20)
            .prop_map(|(v6, extra, fragment, payload, padding)| Packet {
                v6,
                extra,
                fragment,
                payload,
                padding,
            })
    }

    impl Packet {
        fn protocol(&self) -> Protocol {
            match self.payload {
                Payload::Esp(_) => Protocol::ESP,
                Payload::Ah(_) => Protocol::AH,
                Payload::Udp(..) => Protocol::UDP,
                Payload::Other(protocol, _) => Protocol(protocol),
            }
        }

        fn payload(&self) -> Vec<u8> {
            match &self.payload {
                Payload::Esp(length) | Payload::Ah(length) | Payload::Other(_, length) => vec![0x5a; *length],
                Payload::Udp(port, bytes) => {
                    let length = u16::try_from(8 + bytes.len()).unwrap();
                    let header =
                        [port.swap_bytes().to_be_bytes(), port.to_be_bytes(), length.to_be_bytes(), [0; 2]];
                    [header.concat(), bytes.clone()].concat()
                }
            }
        }

        /// The packet without a link header and without padding.
        fn build(&self) -> Vec<u8> {
            let payload = self.payload();
            if !self.v6 {
                let options = self.extra.len().min(10) * 4;
                let total = u16::try_from(20 + options + payload.len()).unwrap();
                let [high, low] = total.to_be_bytes();
                let ihl = u8::try_from(5 + options / 4).unwrap();
                let offset: u16 = match self.fragment {
                    None => 0x4000,
                    Some(FragmentPart::First) => 0x2000,
                    Some(FragmentPart::Later) => 0x0123,
                };
                let mut bytes = vec![0x40 | ihl, 0, high, low, 0, 1];
                bytes.extend(offset.to_be_bytes());
                bytes.extend([64, self.protocol().0, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1]);
                bytes.extend(vec![1; options]);
                bytes.extend(payload);
                return bytes;
            }
            // From the last header to the first, each naming what was put before it.
            let mut next = self.protocol().0;
            let mut body = payload;
            if let Some(part) = self.fragment {
                let offset: u16 = if part == FragmentPart::First { 1 } else { 0x0120 };
                let [high, low] = offset.to_be_bytes();
                body = [vec![next, 0, high, low, 0, 0, 0, 1], body].concat();
                next = 44;
            }
            for (kind, length) in self.extra.iter().rev() {
                let length = length % 4;
                let header = [vec![next, length], vec![0; usize::from(length) * 8 + 6]].concat();
                body = [header, body].concat();
                next = [0, 43, 60][usize::from(kind % 3)];
            }
            let [high, low] = u16::try_from(body.len()).unwrap().to_be_bytes();
            [vec![0x60, 0, 0, 0, high, low, next, 64], vec![0x20; 32], body].concat()
        }

        fn ether(&self) -> Vec<u8> {
            let kind = if self.v6 { [0x86, 0xdd] } else { [0x08, 0x00] };
            [vec![2; 12], kind.to_vec(), self.build(), vec![0xee; self.padding]].concat()
        }

        /// Extension headers of an IPv6 packet.
        fn headers(&self) -> usize {
            self.extra.len() + usize::from(self.fragment.is_some())
        }

        fn class(&self) -> Class {
            let later = self.fragment == Some(FragmentPart::Later);
            if self.v6 && self.headers() > MAX_EXTENSION_HEADERS {
                return Class::TooManyExtensionHeaders;
            }
            match (&self.payload, self.fragment) {
                (Payload::Esp(_) | Payload::Ah(_), Some(_)) => Class::IpsecFragment,
                (Payload::Esp(0..8) | Payload::Ah(0..12), None) => Class::Malformed,
                (Payload::Esp(_), None) => Class::Esp,
                (Payload::Ah(_), None) => Class::Ah,
                (Payload::Udp(500, _), _) if !later => Class::Ike,
                (Payload::Udp(4500, bytes), fragment) if !later => match bytes.as_slice() {
                    [0xff] => Class::NattKeepalive,
                    [0, 0, 0, 0, ..] => Class::Ike,
                    [] | [_] | [_, _] | [_, _, _] => Class::Malformed,
                    _ if fragment.is_some() => Class::IpsecFragment,
                    bytes if bytes.len() < 8 => Class::Malformed,
                    _ => Class::EspInUdp,
                },
                _ => Class::Ip,
            }
        }
    }

    proptest! {
        /// DP-1: every packet gets the class by which it was made, at the offset where it was put.
        #[test]
        fn dp_1_agrees_with_the_model(packet in packet()) {
            let frame = packet.ether();
            let found = classify(frame.as_slice(), Link::Ethernet);
            prop_assert_eq!(found.class, packet.class());
            prop_assert_eq!((found.v6, found.network), (packet.v6, 14));
            if !matches!(found.class, Class::Malformed | Class::TooManyExtensionHeaders) {
                let payload = 14 + packet.build().len() - packet.payload().len();
                let udp = if found.class == Class::EspInUdp { 8 } else { 0 };
                prop_assert_eq!(usize::from(found.transport), payload + udp);
                let protocol = if found.class == Class::EspInUdp { Protocol::ESP } else { packet.protocol() };
                prop_assert_eq!(found.protocol, protocol);
                prop_assert_eq!(found.later_fragment, packet.fragment == Some(FragmentPart::Later));
            }
            // Without the link header the same, 14 bytes earlier.
            let bare = classify(frame.get(14..).unwrap(), Link::Ip);
            prop_assert_eq!(bare.class, found.class);
            prop_assert_eq!(bare.transport + 14, found.transport);
        }

        /// DP-1: a frame that was cut off is malformed.
        #[test]
        fn dp_1_truncated_is_malformed(packet in packet(), cut in any::<prop::sample::Index>()) {
            let frame = [&[2; 12][..], if packet.v6 { &[0x86, 0xdd] } else { &[8, 0] }, &packet.build()].concat();
            let cut = cut.index(frame.len());
            let found = classify(&frame[..cut], Link::Ethernet);
            prop_assert_eq!(found.class, Class::Malformed);
        }

        /// Never panics, and keeps what the module promises, whatever the bytes.
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), ether in any::<bool>()) {
            check_promises(&bytes, if ether { Link::Ethernet } else { Link::Ip });
        }

        /// The same for what is nearly a packet.
        #[test]
        fn nearly_packets(packet in packet(), changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..8)) {
            let mut frame = packet.ether();
            for (at, byte) in changes {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            check_promises(&frame, Link::Ethernet);
        }
    }

    fn check_promises(bytes: &[u8], link: Link) {
        let found = classify(bytes, link);
        if matches!(found.class, Class::NotIp | Class::Malformed | Class::TooManyExtensionHeaders) {
            assert_eq!(found.protocol, Protocol::NONE);
            return;
        }
        let start = usize::from(found.network);
        let header = if found.v6 { 40 } else { usize::from(bytes[start] & 0x0f) * 4 };
        let length = |at: usize| usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        let end = start + if found.v6 { 40 + length(start + 4) } else { length(start + 2) };
        let transport = usize::from(found.transport);
        assert!(end <= bytes.len() && start + header <= transport && transport <= end);
        let needs = match found.class {
            Class::Esp | Class::EspInUdp | Class::Ike | Class::NattKeepalive => 8,
            Class::Ah => 12,
            _ => 0,
        };
        assert!(transport + needs <= end, "{found:?}");
    }

    /// DP-1: what is not IP is told by its Ethernet type or its version.
    #[test]
    fn dp_1_not_ip() {
        for kind in [EtherType::ARP, EtherType::VLAN, EtherType(0x88cc)] {
            let frame = [&[2; 12][..], &kind.0.to_be_bytes(), &[0; 28]].concat();
            assert_eq!(classify(frame.as_slice(), Link::Ethernet).class, Class::NotIp);
        }
        assert_eq!(classify([0x50; 40].as_slice(), Link::Ip).class, Class::NotIp);
        assert_eq!(classify([].as_slice(), Link::Ip).class, Class::Malformed);
    }

    /// DP-1: the chain of extension headers is bounded in bytes too.
    #[test]
    fn dp_1_extension_headers_bounded_in_bytes() {
        let chain = |lengths: &[u8]| {
            let mut body = Vec::new();
            for (index, length) in lengths.iter().enumerate() {
                let next = if index + 1 == lengths.len() { 50 } else { 60 };
                body.extend([next, *length]);
                body.extend(vec![0; usize::from(*length) * 8 + 6]);
            }
            body.extend([7; 16]);
            let [high, low] = u16::try_from(body.len()).unwrap().to_be_bytes();
            [vec![0x60, 0, 0, 0, high, low, 60, 64], vec![0x20; 32], body].concat()
        };
        assert_eq!(classify(chain(&[255]).as_slice(), Link::Ip).class, Class::Esp);
        assert_eq!(classify(chain(&[254, 0]).as_slice(), Link::Ip).class, Class::Esp);
        assert_eq!(classify(chain(&[255, 0]).as_slice(), Link::Ip).class, Class::TooManyExtensionHeaders);
    }
}
