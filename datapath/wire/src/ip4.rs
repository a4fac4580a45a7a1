//! IPv4 header (RFC 791): view, builder, in-place changes that keep the header checksum right, and what
//! fragmentation needs.
//!
//! [`View::parse`] checks version, header length and total length against the bytes; no accessor fails after it. The
//! functions that change a header in place take a slice that starts at the header, touch nothing unless they return
//! `Some`, and update the checksum incrementally (RFC 1624), so that a header that was damaged stays detectably so.

use core::net::Ipv4Addr;

use crate::ids::Protocol;
use crate::{Malformed, bytes, checksum};

/// Length of a header without options, in bytes.
pub const MIN_LEN: usize = 20;
/// Length of the longest header, in bytes.
pub const MAX_LEN: usize = 60;

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

/// Option kinds that need no length byte (RFC 791 section 3.1).
pub(crate) const OPTION_END: u8 = 0;
pub(crate) const OPTION_NOP: u8 = 1;

/// An IPv4 packet whose lengths hold.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    head: &'a [u8; MIN_LEN],
    options: &'a [u8],
    payload: &'a [u8],
}

impl<'a> View<'a> {
    /// Checks version, IHL (at least 5, within the packet) and total length (at least the header, within the bytes).
    /// Bytes beyond the total length are allowed and not part of the view. The checksum is not checked.
    pub fn parse(packet: &'a [u8]) -> Result<Self, Malformed> {
        let (head, _) = packet.split_first_chunk::<MIN_LEN>().ok_or(Malformed::Truncated)?;
        if head[0] >> 4 != 4 {
            return Err(Malformed::Version);
        }
        let header_len = usize::from(head[0] & 0x0f) * 4;
        if header_len < MIN_LEN {
            return Err(Malformed::HeaderLength);
        }
        let total_len = usize::from(u16::from_be_bytes([head[2], head[3]]));
        if total_len < header_len {
            return Err(Malformed::TotalLength);
        }
        let packet = packet.get(..total_len).ok_or(Malformed::Truncated)?;
        let (header, payload) = packet.split_at_checked(header_len).ok_or(Malformed::HeaderLength)?;
        let (head, options) = header.split_first_chunk().ok_or(Malformed::HeaderLength)?;
        Ok(Self { head, options, payload })
    }

    /// Length of the header with its options, in bytes.
    pub const fn header_len(&self) -> usize {
        MIN_LEN + self.options.len()
    }

    /// Total length field, in bytes: header and payload.
    pub fn total_len(&self) -> usize {
        usize::from(u16::from_be_bytes([self.head[2], self.head[3]]))
    }

    /// The former TOS byte: DSCP (RFC 2474) and ECN (RFC 3168).
    pub const fn tos(&self) -> u8 {
        self.head[1]
    }

    /// Identification.
    pub const fn id(&self) -> u16 {
        u16::from_be_bytes([self.head[4], self.head[5]])
    }

    /// The DF flag.
    pub const fn dont_fragment(&self) -> bool {
        self.fragment_field() & DONT_FRAGMENT != 0
    }

    /// The MF flag.
    pub const fn more_fragments(&self) -> bool {
        self.fragment_field() & MORE_FRAGMENTS != 0
    }

    /// Fragment offset in bytes, a multiple of 8.
    pub const fn fragment_offset(&self) -> u16 {
        (self.fragment_field() & OFFSET) << 3
    }

    /// Time to live.
    pub const fn ttl(&self) -> u8 {
        self.head[8]
    }

    /// Protocol of the payload.
    pub const fn protocol(&self) -> Protocol {
        Protocol(self.head[9])
    }

    /// Source address.
    pub const fn source(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.head[12], self.head[13], self.head[14], self.head[15])
    }

    /// Destination address.
    pub const fn destination(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.head[16], self.head[17], self.head[18], self.head[19])
    }

    /// Header checksum as found.
    pub const fn checksum(&self) -> u16 {
        u16::from_be_bytes([self.head[10], self.head[11]])
    }

    /// Whether the header checksum is right (RFC 791 section 3.1).
    pub fn checksum_ok(&self) -> bool {
        checksum::finish(checksum::sum(self.head) + checksum::sum(self.options)) == 0
    }

    /// The options with their padding, 0 to 40 bytes.
    pub const fn options(&self) -> &'a [u8] {
        self.options
    }

    /// What the total length leaves after the header.
    pub const fn payload(&self) -> &'a [u8] {
        self.payload
    }

    const fn fragment_field(&self) -> u16 {
        u16::from_be_bytes([self.head[6], self.head[7]])
    }
}

/// A header without options, to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// Protocol of the payload.
    pub protocol: Protocol,
    /// Time to live.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Identification.
    pub id: u16,
    /// The DF flag.
    pub dont_fragment: bool,
}

impl Header {
    /// Writes [`MIN_LEN`] bytes with their checksum to the start of `out`. `None`, and `out` untouched, if it is
    /// shorter or header and payload exceed 65535 bytes.
    pub fn emit(&self, out: &mut [u8], payload_len: usize) -> Option<()> {
        let total_len = u16::try_from(payload_len.checked_add(MIN_LEN)?).ok()?;
        let out = out.first_chunk_mut::<MIN_LEN>()?;
        let [len_high, len_low] = total_len.to_be_bytes();
        let [id_high, id_low] = self.id.to_be_bytes();
        let flags = if self.dont_fragment { 0x40 } else { 0 };
        let [s0, s1, s2, s3] = self.source.octets();
        let [d0, d1, d2, d3] = self.destination.octets();
        *out = [
            0x45,
            self.tos,
            len_high,
            len_low,
            id_high,
            id_low,
            flags,
            0,
            self.ttl,
            self.protocol.0,
            0,
            0,
            s0,
            s1,
            s2,
            s3,
            d0,
            d1,
            d2,
            d3,
        ];
        [out[10], out[11]] = checksum::finish(checksum::sum(out)).to_be_bytes();
        Some(())
    }
}

/// Replaces both addresses.
pub fn set_addresses(header: &mut [u8], source: Ipv4Addr, destination: Ipv4Addr) -> Option<()> {
    let head = header.first_chunk_mut::<MIN_LEN>()?;
    let [s0, s1, s2, s3] = source.octets();
    let [d0, d1, d2, d3] = destination.octets();
    replace(head, 12, [s0, s1])?;
    replace(head, 14, [s2, s3])?;
    replace(head, 16, [d0, d1])?;
    replace(head, 18, [d2, d3])
}

/// Takes one from the TTL; `None` when it is 1 or 0, and the packet must not be forwarded (RFC 1812 section 5.3.1).
#[inline]
pub fn decrement_ttl(header: &mut [u8]) -> Option<()> {
    let head = header.first_chunk_mut::<MIN_LEN>()?;
    head[8] = head[8].checked_sub(1).filter(|ttl| *ttl > 0)?;
    // As `replace` does: the word of TTL and protocol is less by 0x0100, so ~m + m' is 0xfeff whatever it was.
    let check = u16::from_be_bytes([head[10], head[11]]);
    [head[10], head[11]] = checksum::finish(u64::from(!check) + 0xfeff).to_be_bytes();
    Some(())
}

/// Replaces DSCP and ECN.
pub fn set_tos(header: &mut [u8], tos: u8) -> Option<()> {
    let head = header.first_chunk_mut::<MIN_LEN>()?;
    let version = head[0];
    replace(head, 0, [version, tos])
}

/// Replaces the total length (header and payload, in bytes); `None` if it exceeds 65535.
pub fn set_total_len(header: &mut [u8], total_len: usize) -> Option<()> {
    let head = header.first_chunk_mut::<MIN_LEN>()?;
    replace(head, 2, u16::try_from(total_len).ok()?.to_be_bytes())
}

/// Replaces the protocol of the payload.
pub fn set_protocol(header: &mut [u8], protocol: Protocol) -> Option<()> {
    let head = header.first_chunk_mut::<MIN_LEN>()?;
    let ttl = head[8];
    replace(head, 8, [ttl, protocol.0])
}

/// Replaces the identification, if one is given, and the place of this fragment. DF is kept as it is. `None` if
/// `offset` (in bytes) is not a multiple of 8 or above 65528.
pub fn set_fragment(header: &mut [u8], id: Option<u16>, offset: usize, more: bool) -> Option<()> {
    let head = header.first_chunk_mut::<MIN_LEN>()?;
    let offset = u16::try_from(offset).ok().filter(|offset| offset % 8 == 0)?;
    let kept = u16::from_be_bytes([head[6], head[7]]) & !(MORE_FRAGMENTS | OFFSET);
    let more = if more { MORE_FRAGMENTS } else { 0 };
    if let Some(id) = id {
        replace(head, 4, id.to_be_bytes())?;
    }
    replace(head, 6, (kept | more | (offset >> 3)).to_be_bytes())
}

/// Bytes of payload that a fragment other than the last carries: what the MTU leaves after the header, rounded down
/// to a multiple of 8 (RFC 791 section 3.2). `None` if that is nothing.
pub fn fragment_payload_len(header_len: usize, mtu: usize) -> Option<usize> {
    mtu.checked_sub(header_len).map(|room| room & !7).filter(|len| *len > 0)
}

/// Writes those of `options` that later fragments carry, padded with end-of-list to a multiple of 4, and returns
/// their length (0 to 40).
///
/// RFC 791 section 3.1, copied flag: "0 = not copied, 1 = copied" into all fragments on fragmentation. Padding
/// between options is dropped. `None` if the options are malformed or `out` is too short.
pub fn copied_options(options: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut written = 0;
    for option in Options::new(options) {
        let option = option.ok()?;
        if option.first().is_some_and(|kind| kind & 0x80 != 0) {
            out.get_mut(written..written + option.len())?.copy_from_slice(option);
            written += option.len();
        }
    }
    let padded = written.next_multiple_of(4);
    out.get_mut(written..padded)?.fill(OPTION_END);
    Some(padded)
}

/// The options of a header one by one, each with its type and length bytes; ends at end-of-list, skips no-operation.
/// Yields at most one `Err`, after which it ends.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    rest: &'a [u8],
}

impl<'a> Options<'a> {
    /// Walks `options` as [`View::options`] returns them.
    pub const fn new(options: &'a [u8]) -> Self {
        Self { rest: options }
    }
}

impl<'a> Iterator for Options<'a> {
    type Item = Result<&'a [u8], Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        while let [OPTION_NOP, rest @ ..] = self.rest {
            self.rest = rest;
        }
        let len = match *self.rest {
            [] | [OPTION_END, ..] => return None,
            [_, len, ..] if len >= 2 => usize::from(len),
            _ => usize::MAX,
        };
        let Some((option, rest)) = self.rest.split_at_checked(len) else {
            self.rest = &[];
            return Some(Err(Malformed::Options));
        };
        self.rest = rest;
        Some(Ok(option))
    }
}

/// Replaces the 16-bit word at the even offset `at` and updates the checksum for it.
fn replace(head: &mut [u8; MIN_LEN], at: usize, new: [u8; 2]) -> Option<()> {
    let old = bytes::u16_at(head, at)?;
    bytes::put(head, at, new)?;
    let check = u16::from_be_bytes([head[10], head[11]]);
    [head[10], head[11]] = checksum::update_u16(check, old, u16::from_be_bytes(new)).to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::hex;

    /// Made by scapy 2.8: `IP(src='10.1.2.3', dst='10.4.5.6', tos=0xb8, id=0x4242, flags='DF', ttl=64) /
    /// UDP(sport=53, dport=5353) / b'abc'`.
    const UDP: &str = "45b8001f424240004011dcc60a0102030a040506003514e9000b0b4a616263";

    fn header() -> Header {
        Header {
            source: Ipv4Addr::new(10, 1, 2, 3),
            destination: Ipv4Addr::new(10, 4, 5, 6),
            protocol: Protocol::UDP,
            ttl: 64,
            tos: 0xb8,
            id: 0x4242,
            dont_fragment: true,
        }
    }

    #[test]
    fn emits_what_scapy_emits() {
        let packet = hex(UDP);
        let mut out = [0xa5; MIN_LEN + 1];
        header().emit(&mut out, 11).unwrap();
        assert_eq!((&out[..MIN_LEN], out[MIN_LEN]), (&packet[..MIN_LEN], 0xa5));
        assert_eq!(header().emit(&mut out[..MIN_LEN - 1], 11), None);
        assert_eq!(header().emit(&mut out, 65_515), Some(()));
        assert_eq!(header().emit(&mut out, 65_516), None);
        assert_eq!(header().emit(&mut out, usize::MAX), None);
    }

    #[test]
    fn view_of_a_padded_packet() {
        let mut packet = hex(UDP);
        packet.extend([0xff; 15]);
        let view = View::parse(&packet).unwrap();
        assert!(view.checksum_ok());
        assert_eq!((view.header_len(), view.total_len(), view.payload().len()), (20, 31, 11));
        assert_eq!((view.dont_fragment(), view.more_fragments(), view.fragment_offset()), (true, false, 0));
        packet[8] ^= 1;
        assert!(!View::parse(&packet).unwrap().checksum_ok());
    }

    #[test]
    fn lengths_that_contradict_are_named() {
        let cases: [(usize, u8, Malformed); 5] = [
            (0, 0x65, Malformed::Version),
            (0, 0x44, Malformed::HeaderLength),
            (0, 0x4f, Malformed::TotalLength),
            (3, 19, Malformed::TotalLength),
            (3, 32, Malformed::Truncated),
        ];
        for (at, value, expected) in cases {
            let mut packet = hex(UDP);
            packet[at] = value;
            assert_eq!(View::parse(&packet).unwrap_err(), expected, "byte {at} = {value}");
        }
        assert_eq!(View::parse(&hex(UDP)[..19]).unwrap_err(), Malformed::Truncated);
    }

    #[test]
    fn changes_give_what_building_gives() {
        let mut changed = hex(UDP);
        let to = Header {
            source: Ipv4Addr::new(192, 0, 2, 1),
            destination: Ipv4Addr::new(198, 51, 100, 255),
            protocol: Protocol::ESP,
            ttl: 63,
            tos: 3,
            id: 0x4242,
            dont_fragment: true,
        };
        set_addresses(&mut changed, to.source, to.destination).unwrap();
        set_protocol(&mut changed, to.protocol).unwrap();
        decrement_ttl(&mut changed).unwrap();
        set_tos(&mut changed, to.tos).unwrap();
        set_total_len(&mut changed, 1420).unwrap();
        let mut built = [0xa5; MIN_LEN];
        to.emit(&mut built, 1400).unwrap();
        assert_eq!(changed[..MIN_LEN], built);
    }

    /// RFC 1812 section 5.3.1: a packet whose TTL would become zero is not forwarded.
    #[test]
    fn ttl_stops_at_one() {
        for (ttl, after) in [(0, None), (1, None), (2, Some(1)), (255, Some(254))] {
            let mut packet = [0xa5; MIN_LEN];
            Header { ttl, ..header() }.emit(&mut packet, 0).unwrap();
            let done = decrement_ttl(&mut packet);
            assert_eq!(done.map(|()| packet[8]), after);
        }
    }

    /// DP-5: a datagram cut into fragments as RFC 791 section 3.2 says joins to the original again.
    #[test]
    fn dp_5_fragments_join() {
        let payload: std::vec::Vec<u8> = (0..=255).cycle().take(3001).collect();
        let room = fragment_payload_len(MIN_LEN, 1400).unwrap();
        assert_eq!(room, 1376);
        let mut joined = [0xa5; 3001];
        for (n, part) in payload.chunks(room).enumerate() {
            let mut fragment = [0xa5; 1400];
            Header { dont_fragment: false, ..header() }.emit(&mut fragment, part.len()).unwrap();
            fragment[MIN_LEN..MIN_LEN + part.len()].copy_from_slice(part);
            let more = (n + 1) * room < payload.len();
            set_fragment(&mut fragment, Some(7), n * room, more).unwrap();
            let view = View::parse(&fragment).unwrap();
            assert!(view.checksum_ok() && view.id() == 7 && view.more_fragments() == more);
            let at = usize::from(view.fragment_offset());
            joined[at..at + view.payload().len()].copy_from_slice(view.payload());
        }
        assert_eq!(joined.as_slice(), payload);
        assert_eq!(fragment_payload_len(20, 27), None);
        assert_eq!(fragment_payload_len(20, 28), Some(8));
        assert_eq!(fragment_payload_len(60, 20), None);
    }

    /// RFC 791 section 3.1: router alert (148) and security (130) carry the copied flag, record route (7) does not.
    #[test]
    fn options_with_the_copied_flag_are_copied() {
        let options = [7, 7, 4, 0, 0, 0, 0, OPTION_NOP, 148, 4, 0, 0, 130, 3, 9, OPTION_END];
        let mut out = [0xa5; 12];
        assert_eq!(copied_options(&options, &mut out), Some(8));
        assert_eq!(out, [148, 4, 0, 0, 130, 3, 9, OPTION_END, 0xa5, 0xa5, 0xa5, 0xa5]);
        assert_eq!(copied_options(&options, &mut out[..7]), None);
        assert_eq!(copied_options(&[148, 5, 0, 0], &mut out), None);
        assert_eq!(copied_options(&[148, 1], &mut out), None);
        assert_eq!(copied_options(&[148], &mut out), None);
        assert_eq!(copied_options(&[], &mut out), Some(0));
    }
}
