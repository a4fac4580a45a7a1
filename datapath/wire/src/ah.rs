//! Authentication Header (RFC 4302): the header, and the muting of what changes in transit before the ICV is computed.

use core::ops::Range;

use crate::ids::{Protocol, Spi};
use crate::{Malformed, bytes, ip4, ip6};

/// Next header, payload length, reserved, SPI and sequence number, in bytes.
pub const FIXED_LEN: usize = 12;

/// Fixed part of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows the AH.
    pub next_header: Protocol,
    /// Security Parameters Index.
    pub spi: Spi,
    /// Sequence number; with ESN its low half.
    pub sequence: u32,
    /// Length of the ICV field in bytes. After a parse the padding of RFC 4302 section 2.6 is counted in, as the
    /// packet does not tell it apart: compare `header_len` of the algorithm with [`Header::len`].
    pub icv_len: usize,
}

impl Header {
    /// Reads the header at the start of `packet` and checks that all of it, with its ICV field, is there.
    ///
    /// RFC 4302 section 2.2: the payload length is "in 32-bit words (4-byte units)", less 2. The reserved field is
    /// ignored (section 2.3).
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        let head = packet.first_chunk::<FIXED_LEN>().ok_or(Malformed::Truncated)?;
        let len = usize::from(head[1]) * 4 + 8;
        let icv_len = len.checked_sub(FIXED_LEN).ok_or(Malformed::HeaderLength)?;
        if len > packet.len() {
            return Err(Malformed::Truncated);
        }
        Ok(Self {
            next_header: Protocol(head[0]),
            spi: Spi(u32::from_be_bytes([head[4], head[5], head[6], head[7]])),
            sequence: u32::from_be_bytes([head[8], head[9], head[10], head[11]]),
            icv_len,
        })
    }

    /// Length in bytes of a header that was parsed.
    #[expect(clippy::len_without_is_empty, reason = "a header is never empty")]
    pub const fn len(&self) -> usize {
        FIXED_LEN + self.icv_len
    }

    /// Writes the fixed part, a zero ICV and the padding of the ICV field to the start of `out`, and returns their
    /// length, which is [`header_len`]. `None`, and `out` untouched, if it is shorter or the length field (at most
    /// 1028 bytes) cannot hold it.
    pub fn emit(&self, out: &mut [u8], v6: bool) -> Option<usize> {
        if self.icv_len > 1024 {
            return None;
        }
        let len = header_len(self.icv_len, v6);
        let out = out.get_mut(..len)?;
        let payload_len = u8::try_from(len / 4 - 2).ok()?;
        out.fill(0);
        bytes::put(out, 0, [self.next_header.0, payload_len])?;
        bytes::put(out, 4, self.spi.0.to_be_bytes())?;
        bytes::put(out, 8, self.sequence.to_be_bytes())?;
        Some(len)
    }
}

/// Length in bytes of a header with an ICV of `icv_len` bytes.
///
/// RFC 4302 section 3.3.3.2.1: padding makes the header "a multiple of 32 bits (IPv4) or 64 bits (IPv6)". For
/// HMAC-SHA-256-128 that is 28 over IPv4 and 32 over IPv6.
pub const fn header_len(icv_len: usize, v6: bool) -> usize {
    let align = if v6 { 8 } else { 4 };
    FIXED_LEN.saturating_add(icv_len).saturating_add(align - 1) / align * align
}

/// Where the ICV of `icv_len` bytes lies in a header.
pub const fn icv_range(icv_len: usize) -> Range<usize> {
    FIXED_LEN..FIXED_LEN.saturating_add(icv_len)
}

/// Options of IPv4 that are immutable in transit (RFC 4302 appendix A1), besides end-of-list and no-operation:
/// security, extended security, commercial security, router alert, sender directed delivery.
const IMMUTABLE_V4: [u8; 5] = [130, 133, 134, 148, 149];
/// Loose and strict source route.
const SOURCE_ROUTES: [u8; 2] = [131, 137];

/// Zeroes the mutable fields of the IPv4 header (options included) at the start of `header`, a copy for the ICV.
///
/// RFC 4302 section 3.3.3.1.1.1: DSCP and ECN, flags, fragment offset, TTL and checksum are mutable. Section
/// 3.3.3.1.1.2: "if an option is classified as mutable, the entire option is zeroed"; options not listed in appendix
/// A1 count as mutable. `None` if header or options are malformed, or a source route is not at its end: the
/// destination address is then predictable only to those who know the route. `header` is then to be discarded.
pub fn mute_v4(header: &mut [u8]) -> Option<()> {
    let first = bytes::u8_at(header, 0)?;
    let header_len = usize::from(first & 0x0f) * 4;
    if first >> 4 != 4 || header_len < ip4::MIN_LEN {
        return None;
    }
    let (head, options) = header.get_mut(..header_len)?.split_first_chunk_mut::<{ ip4::MIN_LEN }>()?;
    head[1] = 0;
    [head[6], head[7]] = [0, 0];
    head[8] = 0;
    [head[10], head[11]] = [0, 0];

    let mut rest = options;
    loop {
        match rest {
            [] | [ip4::OPTION_END, ..] => return Some(()),
            [ip4::OPTION_NOP, tail @ ..] => rest = tail,
            [kind, len, ..] if *len >= 2 => {
                let (kind, len) = (*kind, usize::from(*len));
                let (option, tail) = rest.split_at_mut_checked(len)?;
                if SOURCE_ROUTES.contains(&kind) && usize::from(*option.get(2)?) <= len {
                    return None;
                }
                if !IMMUTABLE_V4.contains(&kind) {
                    option.fill(0);
                }
                rest = tail;
            }
            _ => return None,
        }
    }
}

/// Zeroes the mutable fields of the IPv6 header at the start of `headers`, a copy for the ICV, and of the extension
/// headers up to the offset `upto`, where the AH begins.
///
/// RFC 4302 section 3.3.3.1.2.1: traffic class, flow label and hop limit are mutable. Section 3.3.3.1.2.2: of a
/// hop-by-hop or destination option whose third-highest bit says that it may change, the option data "must be treated
/// as zero-valued octets", its type and length stay. `None` if a header is malformed, the walk does not end at `upto`, or
/// there is a routing header (its final form is predictable only for the deprecated type 0, RFC 5095) or a fragment
/// header (section 3.3.4: AH is applied to whole packets). `headers` is then to be discarded.
pub fn mute_v6(headers: &mut [u8], upto: usize) -> Option<()> {
    let (head, mut rest) = headers.get_mut(..upto)?.split_first_chunk_mut::<{ ip6::LEN }>()?;
    if head[0] >> 4 != 6 {
        return None;
    }
    [head[0], head[1], head[2], head[3]] = [0x60, 0, 0, 0];
    head[7] = 0;

    let mut protocol = Protocol(head[6]);
    while !rest.is_empty() {
        if !matches!(protocol, Protocol::HOP_BY_HOP | Protocol::DEST_OPTIONS) {
            return None;
        }
        let [next, len] = *rest.first_chunk::<2>()?;
        let (extension, tail) = rest.split_at_mut_checked(usize::from(len) * 8 + 8)?;
        mute_options_v6(extension.get_mut(2..)?)?;
        protocol = Protocol(next);
        rest = tail;
    }
    (protocol == Protocol::AH).then_some(())
}

/// Zeroes the data of options that may change en route (RFC 8200 section 4.2: third-highest bit of the type).
fn mute_options_v6(options: &mut [u8]) -> Option<()> {
    let mut rest = options;
    loop {
        match rest {
            [] => return Some(()),
            // Pad1 is a type without a length (RFC 8200 section 4.2).
            [0, tail @ ..] => rest = tail,
            [kind, len, tail @ ..] => {
                let (data, tail) = tail.split_at_mut_checked(usize::from(*len))?;
                if *kind & 0x20 != 0 {
                    data.fill(0);
                }
                rest = tail;
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::hex;

    /// Made by scapy 2.8: `IP(src='192.0.2.1', dst='198.51.100.2', tos=0x2e, id=0x1234, flags='DF', ttl=63,
    /// options=[IPOption_Router_Alert(), IPOption_NOP(), timestamp, security]) / AH(…)`, the header.
    const V4: &str = "4b2e0058123440003f33f492c0000201c63364029404000001440805
        00aabbccdd820b00000000000000000006";
    /// The same after scapy's `zero_mutable_fields`: the timestamp is zeroed, the other options stay.
    const V4_MUTED: &str = "4b0000581234000000330000c0000201c633640294040000010000
        000000000000820b00000000000000000006";

    /// Made by scapy 2.8: `IPv6(src='2001:db8::1', dst='2001:db8::2', tc=0x5a, fl=0xbeef1, hlim=9) /
    /// IPv6ExtHdrHopByHop(options=[RouterAlert(value=3), mutable 0x3e 'hello']) /
    /// IPv6ExtHdrDestOpt(options=[immutable 0x1e 'keep']) / AH(nh=17, spi=0x1000, seq=1, …)`.
    const V6: &str = "65abeef10041000920010db800000000000000000000000120010db8000000000000000000000002
        3c01050200033e0568656c6c6f01010033001e046b656570
        1106000000001000000000010000000000000000000000000000000000000000";
    /// The same after scapy's `zero_mutable_fields`.
    const V6_MUTED: &str = "600000000041000020010db800000000000000000000000120010db8000000000000000000000002
        3c01050200033e05000000000001010033001e046b656570
        1106000000001000000000010000000000000000000000000000000000000000";
    const V6_UPTO: usize = 64;

    #[test]
    fn mutes_v4_as_scapy_does() {
        // The last byte is the first of the AH: what follows the header is not touched.
        let mut header = hex(V4);
        mute_v4(&mut header).unwrap();
        assert_eq!(header, hex(V4_MUTED));
    }

    #[test]
    fn mutes_v6_as_scapy_does() {
        let mut headers = hex(V6);
        mute_v6(&mut headers, V6_UPTO).unwrap();
        assert_eq!(headers, hex(V6_MUTED));
    }

    /// RFC 4302 section 3.3.3.1.1: with a source route the destination is predictable, not immutable.
    #[test]
    fn unfinished_source_routes_are_refused() {
        let mut header = hex(V4);
        header[20..28].copy_from_slice(&[131, 7, 4, 10, 0, 0, 1, 0]);
        assert_eq!(mute_v4(&mut header.clone()), None);
        header[22] = 8;
        mute_v4(&mut header).unwrap();
        assert_eq!(header[20..28], [0; 8]);
    }

    #[test]
    fn malformed_headers_are_not_muted() {
        for (at, value) in [(0, 0x44), (0, 0x6b), (0, 0x4f), (21, 1), (21, 0), (21, 60), (26, 32)] {
            let mut header = hex(V4);
            header[at] = value;
            assert_eq!(mute_v4(&mut header), None, "byte {at} = {value}");
        }
        assert_eq!(mute_v4(&mut []), None);
    }

    #[test]
    fn chains_that_are_not_predictable_are_refused() {
        let cases = [(0, 0x45), (6, 43), (6, 44), (6, 17), (41, 9), (47, 30), (56, 17), (59, 5)];
        for (at, value) in cases {
            let mut headers = hex(V6);
            headers[at] = value;
            assert_eq!(mute_v6(&mut headers, V6_UPTO), None, "byte {at} = {value}");
        }
        for upto in [0, 39, 40, 48, 56, 63, 65, 1000] {
            assert_eq!(mute_v6(&mut hex(V6), upto), None, "AH at {upto}");
        }
    }

    #[test]
    fn header_of_scapy() {
        let packet = hex(V6);
        let header = Header::parse(&packet[V6_UPTO..]).unwrap();
        let expected = Header { next_header: Protocol::UDP, spi: Spi(0x1000), sequence: 1, icv_len: 20 };
        assert_eq!(header, expected);
        let mut out = [0xa5; 33];
        let sent = Header { icv_len: 16, ..header };
        assert_eq!(sent.emit(&mut out, true), Some(32));
        assert_eq!(out[..32], packet[V6_UPTO..]);
        assert_eq!(out[32], 0xa5);
    }

    /// RFC 4302 section 2.2: for an ICV of 96 bits the payload length is 4; sections 2.6 and 3.3.3.2.1 on padding.
    #[test]
    fn lengths_are_padded_for_the_family() {
        for (icv_len, v4, v6) in [(12, 24, 24), (16, 28, 32), (24, 36, 40), (32, 44, 48), (13, 28, 32)] {
            assert_eq!((header_len(icv_len, false), header_len(icv_len, true)), (v4, v6), "ICV of {icv_len}");
        }
        let header = Header { next_header: Protocol::TCP, spi: Spi(256), sequence: 7, icv_len: 12 };
        let mut out = [0xa5; 24];
        header.emit(&mut out, false).unwrap();
        assert_eq!(out[1], 4);
        assert_eq!(Header::parse(&out), Ok(header));
        assert_eq!(Header::parse(&out[..23]), Err(Malformed::Truncated));
        out[1] = 0;
        assert_eq!(Header::parse(&out), Err(Malformed::HeaderLength));
        assert_eq!(icv_range(16), 12..28);
        assert_eq!(Header { icv_len: usize::MAX, ..header }.emit(&mut out, true), None);
    }
}
