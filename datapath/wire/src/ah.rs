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
    /// RFC 4302 section 2.2: the payload length is "in 32-bit words (4-byte units), minus 2". The reserved field is
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
/// RFC 4302 section 3.3.3.1.1: DSCP and ECN, flags, fragment offset, TTL and checksum are mutable. Section
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
/// RFC 4302 section 3.3.3.1.2: traffic class, flow label and hop limit are mutable. Section 3.3.3.1.2.1: of a
/// hop-by-hop or destination option whose third-highest bit says that it may change, "the entire Option Data field"
/// counts as zero, its type and length stay. `None` if a header is malformed, the walk does not end at `upto`, or
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
