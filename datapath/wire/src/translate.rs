//! The translation of a blind relay that the XDP program and user space both run (RLY-1, RLY-3).
//!
//! A [`Rule`] is one direction of a translation entry, made ready: what a packet must look like, and what is written
//! over it. [`Rule::apply`] checks everything before it writes anything, so a packet that it refuses is as it was and
//! can go the longer way through a worker, which finds and counts the reason. Refused is whatever is not usual:
//! options and extension headers, Ethernet padding, another sender, a TTL that ran out, a wrong header checksum, a
//! UDP checksum that is missing over IPv6, an AH header that is not what the entry says. What is written is byte for
//! byte what a worker writes.
//!
//! A rule keeps the length of packets: both sides of its entry are encapsulated in UDP, or none is.

#![expect(clippy::inline_always, reason = "the verifier follows packet pointers into no function of its own")]

use crate::checksum;
use crate::ids::Protocol;
use crate::steer::{Bytes, Class, Classified};

/// Bytes that can be read and written. Every access checks the bounds.
pub trait BytesMut: Bytes {
    /// The `N` bytes at `at`.
    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
    /// Writes `value` at `at`.
    fn put<const N: usize>(&mut self, at: usize, value: [u8; N]) -> Option<()>;
}

impl BytesMut for [u8] {
    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.get(at..)?.first_chunk().copied()
    }

    fn put<const N: usize>(&mut self, at: usize, value: [u8; N]) -> Option<()> {
        *self.get_mut(at..)?.first_chunk_mut()? = value;
        Some(())
    }
}

/// What the IPsec header of a packet is behind, as part of what a rule is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// ESP over IP.
    Esp,
    /// ESP in UDP (RFC 3948).
    EspInUdp,
    /// AH over IP.
    Ah,
}

impl Kind {
    /// Of a packet that is IPsec.
    #[inline]
    pub const fn of(class: Class) -> Option<Self> {
        match class {
            Class::Esp => Some(Self::Esp),
            Class::EspInUdp => Some(Self::EspInUdp),
            Class::Ah => Some(Self::Ah),
            _ => None,
        }
    }

    /// Bytes between the IP header and the ESP or AH header.
    const fn before(self) -> usize {
        match self {
            Self::Esp | Self::Ah => 0,
            Self::EspInUdp => UDP_LEN,
        }
    }

    /// Offset of the SPI in the ESP or AH header.
    const fn spi(self) -> usize {
        match self {
            Self::Esp | Self::EspInUdp => 0,
            Self::Ah => 4,
        }
    }
}

/// Length of the Ethernet header: the frames have one.
const NETWORK: usize = 14;
const UDP_LEN: usize = 8;
/// RFC 4303 section 2: SPI and sequence number.
const ESP_MIN_LEN: usize = 8;

/// Where the two IP versions keep what is looked at and changed.
pub trait Address: Copy + Eq {
    /// Whether it is IPv6.
    const V6: bool;
    /// Length of the header without options or extension headers.
    const HEADER: usize;
    /// Offset of the source address; the destination follows.
    const SOURCE: usize;
    /// Bytes of an address.
    const LEN: usize;
    /// Offset of TTL or hop limit.
    const TTL: usize;
    /// The address at `at`.
    fn get<B: BytesMut + ?Sized>(bytes: &B, at: usize) -> Option<Self>;
    /// Writes the address to `at`.
    fn put<B: BytesMut + ?Sized>(self, bytes: &mut B, at: usize) -> Option<()>;
    /// Sum of its 16-bit words.
    fn sum(self) -> u64;
    /// Sum of its words, each complemented.
    fn sum_of_complements(self) -> u64;
}

macro_rules! address {
    ($len:literal, $v6:literal, $header:literal, $source:literal, $ttl:literal) => {
        impl Address for [u8; $len] {
            const V6: bool = $v6;
            const HEADER: usize = $header;
            const SOURCE: usize = $source;
            const LEN: usize = $len;
            const TTL: usize = $ttl;

            #[inline(always)]
            fn get<B: BytesMut + ?Sized>(bytes: &B, at: usize) -> Option<Self> {
                bytes.array(at)
            }

            #[inline(always)]
            fn put<B: BytesMut + ?Sized>(self, bytes: &mut B, at: usize) -> Option<()> {
                bytes.put(at, self)
            }

            fn sum(self) -> u64 {
                checksum::sum(&self)
            }

            fn sum_of_complements(self) -> u64 {
                checksum::sum(&self.map(|byte| !byte))
            }
        }
    };
}

address!(4, false, 20, 12, 8);
address!(16, true, 40, 8, 7);

/// One direction of a translation entry. Integers of fixed width and no padding: it lies in a map that the XDP program
/// and user space share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Rule<A> {
    /// Where packets must come from.
    pub source: A,
    /// The relay's address on the other side.
    pub new_source: A,
    /// The peer's address on the other side.
    pub new_destination: A,
    /// SPI on the other side, of the outermost IPsec header.
    pub new_spi: [u8; 4],
    /// SPI that an ESP header under AH must have; zero, which no SA has, if there must be none (RLY-3).
    pub inner_spi: [u8; 4],
    /// What it becomes.
    pub new_inner_spi: [u8; 4],
    /// UDP source and destination port that packets must have; zero without encapsulation.
    pub ports: [u8; 4],
    /// What they become.
    pub new_ports: [u8; 4],
    /// What all the changes together add to the sum under a checksum: of the IPv4 header; over IPv6 of UDP.
    pub change: u32,
}

/// One side of an entry, as a rule needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side<A> {
    /// Source of the packets.
    pub source: A,
    /// Destination of the packets.
    pub destination: A,
    /// SPI of the outermost IPsec header.
    pub spi: u32,
    /// SPI of ESP under AH.
    pub inner_spi: Option<u32>,
    /// UDP source and destination port.
    pub ports: Option<(u16, u16)>,
}

impl<A: Address> Rule<A> {
    /// Makes packets that look like `from` look like `to`. `None` if one is encapsulated and the other is not, or one is a
    /// bundle and the other is not: such packets would change their length or keep an SPI.
    pub fn new(from: &Side<A>, to: &Side<A>) -> Option<Self> {
        if from.ports.is_some() != to.ports.is_some() || from.inner_spi.is_some() != to.inner_spi.is_some() {
            return None;
        }
        let ports = |side: &Side<A>| {
            let (source, destination) = side.ports.unwrap_or_default();
            let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
            [a, b, c, d]
        };
        let (old_ports, new_ports) = (ports(from), ports(to));
        let mut change = from.source.sum_of_complements()
            + from.destination.sum_of_complements()
            + to.source.sum()
            + to.destination.sum();
        change += if A::V6 {
            // What UDP's checksum covers besides: ports and SPI.
            u64::from(!u32::from_be_bytes(old_ports))
                + u64::from(u32::from_be_bytes(new_ports))
                + u64::from(!from.spi)
                + u64::from(to.spi)
        } else {
            // One less of the TTL, which is the high byte of its word.
            u64::from(!0x0100_u16)
        };
        Some(Self {
            source: from.source,
            new_source: to.source,
            new_destination: to.destination,
            new_spi: to.spi.to_be_bytes(),
            inner_spi: from.inner_spi.unwrap_or_default().to_be_bytes(),
            new_inner_spi: to.inner_spi.unwrap_or_default().to_be_bytes(),
            ports: old_ports,
            new_ports,
            change: u32::from(checksum::fold(change)),
        })
    }

    /// Translates a frame. `None`, and the frame as it was, if it is not for this rule or not usual.
    ///
    /// The frame is one for which [`Place::of`] answered for this family and `kind`, and whose destination address and SPI
    /// led to this rule.
    #[inline(always)]
    pub fn apply<B: BytesMut + ?Sized>(&self, frame: &mut B, kind: Kind) -> Option<()> {
        let at = NETWORK + A::HEADER + kind.before();
        let ttl = frame.u8(NETWORK + A::TTL)?;
        if ttl <= 1 || A::get(frame, NETWORK + A::SOURCE)? != self.source {
            return None;
        }
        let new_check = if A::V6 { 0 } else { self.header_checksum(frame)? };
        let new_udp_check = if let Kind::EspInUdp = kind { self.udp_checksum(frame)? } else { 0 };
        let below = if let Kind::Ah = kind { self.under_ah(frame, at)? } else { Below::Nothing };
        // From here on nothing fails: all of it was read, or lies in front of what was.
        if let Below::Esp(below) = below {
            frame.put(below, self.new_inner_spi)?;
        }
        frame.put(at + kind.spi(), self.new_spi)?;
        if let Kind::EspInUdp = kind {
            frame.put(at - UDP_LEN, self.new_ports)?;
            frame.put(at - 2, new_udp_check.to_be_bytes())?;
        }
        frame.put(NETWORK + A::TTL, [ttl - 1])?;
        if !A::V6 {
            frame.put(NETWORK + 10, new_check.to_be_bytes())?;
        }
        self.new_source.put(frame, NETWORK + A::SOURCE)?;
        self.new_destination.put(frame, NETWORK + A::SOURCE + A::LEN)
    }

    /// The IPv4 header's next checksum, if the present one is right (RFC 1122 section 3.2.1.2).
    #[inline(always)]
    fn header_checksum<B: BytesMut + ?Sized>(&self, frame: &B) -> Option<u16> {
        let words: [u8; 20] = frame.array(NETWORK)?;
        let (words, _) = words.as_chunks::<4>();
        let mut sum = 0;
        for word in words {
            sum += u64::from(u32::from_be_bytes(*word));
        }
        if fold(sum) != 0xffff {
            return None;
        }
        Some(self.after(frame.u16(NETWORK + 10)?))
    }

    /// UDP's next checksum.
    #[inline(always)]
    fn udp_checksum<B: BytesMut + ?Sized>(&self, frame: &B) -> Option<u16> {
        let at = NETWORK + A::HEADER;
        // The datagram ends where the packet does: what were behind it would belong to nobody.
        let length = frame.u16(at + 4)?;
        if frame.array(at)? != self.ports || NETWORK + A::HEADER + usize::from(length) != end::<A, B>(frame)?
        {
            return None;
        }
        if !A::V6 {
            // RFC 3948 section 2.1: "the IPv4 UDP Checksum SHOULD be transmitted as a zero value".
            return Some(0);
        }
        match frame.u16(at + 6)? {
            0 => None,
            check => match self.after(check) {
                // RFC 768: "If the computed checksum is zero, it is transmitted as all ones".
                0 => Some(0xffff),
                check => Some(check),
            },
        }
    }

    /// RFC 1624 section 3, equation 3, for all words that change at once. A wrong checksum stays wrong.
    #[inline(always)]
    const fn after(&self, check: u16) -> u16 {
        !fold(widen(!check) + self.change as u64)
    }

    /// RLY-3: what is under the AH header at `at`, if that is what must be there.
    #[inline(always)]
    fn under_ah<B: BytesMut + ?Sized>(&self, frame: &B, at: usize) -> Option<Below> {
        let [next, words] = frame.array(at)?;
        // RFC 4302 section 2.2: in units of 4 bytes, less 2.
        let below = at + (usize::from(words) + 2) * 4;
        let end = end::<A, B>(frame)?;
        if words == 0 || below > end {
            return None;
        }
        let bundle = self.inner_spi != [0; 4];
        if (Protocol(next) == Protocol::ESP) != bundle {
            return None;
        }
        if !bundle {
            return Some(Below::Nothing);
        }
        if below + ESP_MIN_LEN > end || frame.array(below)? != self.inner_spi {
            return None;
        }
        Some(Below::Esp(below))
    }
}

/// What is behind an AH header.
#[derive(Clone, Copy)]
enum Below {
    /// Nothing to be translated.
    Nothing,
    /// An ESP header, at this offset.
    Esp(usize),
}

/// Folds a sum below 2^48 into 16 bits with end-around carry. No loop: the XDP program's verifier would follow it.
#[inline(always)]
const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let [.., high, low] = sum.to_be_bytes();
    u16::from_be_bytes([high, low])
}

const fn widen(word: u16) -> u64 {
    let [high, low] = word.to_be_bytes();
    u64::from_be_bytes([0, 0, 0, 0, 0, 0, high, low])
}

/// Offset of the end of the IP packet.
#[inline(always)]
fn end<A: Address, B: BytesMut + ?Sized>(frame: &B) -> Option<usize> {
    Some(if A::V6 {
        NETWORK + A::HEADER + usize::from(frame.u16(NETWORK + 4)?)
    } else {
        NETWORK + usize::from(frame.u16(NETWORK + 2)?)
    })
}

/// What a rule is found by, and how long the packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<A> {
    /// The relay's address.
    pub destination: A,
    /// SPI of the outermost IPsec header.
    pub spi: [u8; 4],
    /// Length of the IP packet in bytes: the frame's without its link header.
    pub length: u16,
}

impl<A: Address> Place<A> {
    /// Of a frame that [`classify`](crate::steer::classify) found to be `found`. `None` if it is of the other family, has
    /// options or extension headers, or padding behind the packet.
    #[inline(always)]
    pub fn of<B: BytesMut + ?Sized>(frame: &B, found: &Classified, kind: Kind) -> Option<Self> {
        let at = NETWORK + A::HEADER + kind.before();
        if found.v6 != A::V6 || usize::from(found.transport) != at {
            return None;
        }
        let length = end::<A, B>(frame)?.checked_sub(NETWORK)?;
        if frame.size() != NETWORK + length {
            return None;
        }
        Some(Self {
            destination: A::get(frame, NETWORK + A::SOURCE + A::LEN)?,
            spi: frame.array(at + kind.spi())?,
            length: u16::try_from(length).ok()?,
        })
    }
}

const _: () = {
    assert!(size_of::<Rule<[u8; 4]>>() == 36 && align_of::<Rule<[u8; 4]>>() == 4);
    assert!(size_of::<Rule<[u8; 16]>>() == 72 && align_of::<Rule<[u8; 16]>>() == 4);
};
