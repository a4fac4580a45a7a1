//! Encapsulating Security Payload (RFC 4303): header, padding and trailer.

use crate::bytes;
use crate::ids::{Protocol, Spi};

/// SPI and sequence number, in bytes.
pub const HEADER_LEN: usize = 8;
/// Pad length and next header, in bytes.
pub const TRAILER_LEN: usize = 2;

/// SPI and the low 32 bits of the sequence number (RFC 4303 sections 2.1 and 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Security Parameters Index.
    pub spi: Spi,
    /// Sequence number; with ESN its low half.
    pub sequence: u32,
}

impl Header {
    /// Reads the first [`HEADER_LEN`] bytes; `None` if there are fewer.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        Some(Self { spi: Spi(bytes::u32_at(packet, 0)?), sequence: bytes::u32_at(packet, 4)? })
    }

    /// Writes the first [`HEADER_LEN`] bytes of `out`; `None`, and `out` untouched, if it is shorter.
    pub fn emit(&self, out: &mut [u8]) -> Option<()> {
        let both = u64::from(self.spi.0) << 32 | u64::from(self.sequence);
        bytes::put(out, 0, both.to_be_bytes())
    }
}

/// Pad bytes that make payload, padding and trailer a multiple of the cipher's block and of 4.
///
/// RFC 4303 section 2.4: padding fills the plaintext to a multiple of the block size, and the pad length and next
/// header fields "must be right aligned within a 4-byte word". `block` is in bytes, 1 for stream ciphers and at most
/// 256; a block that is no multiple of 4 is rounded up to one.
pub fn padding(payload_len: usize, block: usize) -> u8 {
    let align = block.clamp(4, 256).next_multiple_of(4);
    if align.is_power_of_two() {
        // All blocks there are; the general case costs three divisions.
        let used = payload_len.wrapping_add(TRAILER_LEN);
        return u8::try_from(used.wrapping_neg() & (align - 1)).unwrap_or(u8::MAX);
    }
    // Both terms are reduced first, so that no length overflows.
    let used = (payload_len % align + TRAILER_LEN) % align;
    u8::try_from((align - used) % align).unwrap_or(u8::MAX)
}

/// Fills `out` with padding 1, 2, 3 … (RFC 4303 section 2.4), pad length and next header.
///
/// `out` is exactly the padding and [`TRAILER_LEN`]; `None`, and `out` untouched, if that means less than no padding
/// or more than 255 bytes of it.
#[inline]
pub fn write_trailer(out: &mut [u8], next_header: Protocol) -> Option<()> {
    // All there is with blocks of four bytes.
    match out {
        [pad_len, next] => (*pad_len, *next) = (0, next_header.0),
        [a, pad_len, next] => (*a, *pad_len, *next) = (1, 1, next_header.0),
        [a, b, pad_len, next] => (*a, *b, *pad_len, *next) = (1, 2, 2, next_header.0),
        [a, b, c, pad_len, next] => (*a, *b, *c, *pad_len, *next) = (1, 2, 3, 3, next_header.0),
        _ => return write_long_trailer(out, next_header),
    }
    Some(())
}

/// Padding of at most six bytes, pad length and next header, and zeros behind them: for who has room for a whole word, and
/// writes what follows later. `None` of more padding.
#[inline]
pub fn trailer_word(pad_len: u8, next_header: Protocol) -> Option<[u8; 8]> {
    const PAD: u64 = 0x0605_0403_0201;
    let shift = 8 * u32::from(pad_len);
    if pad_len > 6 {
        return None;
    }
    let pad = PAD & ((1 << shift) - 1);
    let fields = u64::from(pad_len) | u64::from(next_header.0) << 8;
    Some((pad | fields << shift).to_le_bytes())
}

fn write_long_trailer(out: &mut [u8], next_header: Protocol) -> Option<()> {
    let pad_len = u8::try_from(out.len().checked_sub(TRAILER_LEN)?).ok()?;
    let (pad, trailer) = out.split_at_mut_checked(usize::from(pad_len))?;
    for (byte, value) in pad.iter_mut().zip(1..=u8::MAX) {
        *byte = value;
    }
    bytes::put(trailer, 0, [pad_len, next_header.0])
}

/// What the trailer of an authenticated plaintext says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Bytes of padding.
    pub pad_len: u8,
    /// Protocol of the payload; [`Protocol::NONE`] marks a dummy packet (RFC 4303 section 2.6).
    pub next_header: Protocol,
    /// Bytes before the padding: payload, and TFC padding if there is any.
    pub payload_len: usize,
}

/// Why a trailer cannot be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadTrailer {
    /// The plaintext is shorter than a trailer.
    Truncated,
    /// The pad length exceeds what precedes it.
    PadLength,
    /// The pad bytes are not 1, 2, 3 …
    PadBytes,
}

/// Reads the trailer at the end of `plaintext` (after the ICV was verified) and checks the pad bytes.
///
/// RFC 4303 section 2.4: "the receiver SHOULD inspect the Padding field". It is looked at after authentication only,
/// so the comparison need not be in constant time.
#[inline]
pub fn trailer(plaintext: &[u8]) -> Result<Trailer, BadTrailer> {
    // Up to six pad bytes are in one word with what follows them.
    const PAD: u64 = 0x0102_0304_0506;
    if let Some(last) = plaintext.last_chunk::<8>() {
        let [.., pad_len, next_header] = *last;
        if let Some(shift) = 6_u32.checked_sub(pad_len.into()) {
            let pad = u64::from_be_bytes(*last) >> 16;
            let mask = (1 << (8 * u32::from(pad_len))) - 1;
            if (pad ^ (PAD >> (8 * shift))) & mask != 0 {
                return Err(BadTrailer::PadBytes);
            }
            let payload_len = plaintext.len() - TRAILER_LEN - usize::from(pad_len);
            return Ok(Trailer { pad_len, next_header: Protocol(next_header), payload_len });
        }
    }
    long_trailer(plaintext)
}

fn long_trailer(plaintext: &[u8]) -> Result<Trailer, BadTrailer> {
    let (rest, [pad_len, next_header]) = plaintext.split_last_chunk().ok_or(BadTrailer::Truncated)?;
    let payload_len = rest.len().checked_sub(usize::from(*pad_len)).ok_or(BadTrailer::PadLength)?;
    let pad = rest.get(payload_len..).ok_or(BadTrailer::PadLength)?;
    if !pad.iter().copied().eq(1..=*pad_len) {
        return Err(BadTrailer::PadBytes);
    }
    Ok(Trailer { pad_len: *pad_len, next_header: Protocol(*next_header), payload_len })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_big_endian() {
        let header = Header { spi: Spi(0x0102_0304), sequence: 0x0506_0708 };
        let mut out = [0xa5; HEADER_LEN + 1];
        header.emit(&mut out).unwrap();
        assert_eq!(out, [1, 2, 3, 4, 5, 6, 7, 8, 0xa5]);
        assert_eq!(Header::parse(&out), Some(header));
        assert_eq!(Header::parse(&out[..7]), None);
        assert_eq!(header.emit(&mut out[..7]), None);
    }

    /// RFC 4303 section 2.4: payload, padding and trailer end on a block and on a 4-byte word.
    #[test]
    fn padding_fills_blocks_and_words() {
        let cases =
            [(0, 1, 2), (2, 4, 0), (3, 4, 3), (14, 16, 0), (15, 16, 15), (16, 16, 14), (255, 256, 255)];
        for (payload, block, pad) in cases {
            assert_eq!(padding(payload, block), pad, "{payload} bytes, block {block}");
        }
        assert_eq!(padding(usize::MAX, 16), 15);
    }

    /// RFC 4303 section 2.4: "the first padding byte appended to the plaintext is numbered 1".
    #[test]
    fn trailer_counts_up() {
        let mut out = [0xa5; 6];
        write_trailer(&mut out, Protocol::IPV4).unwrap();
        assert_eq!(out, [1, 2, 3, 4, 4, 4]);
        let expected = Trailer { pad_len: 4, next_header: Protocol::IPV4, payload_len: 0 };
        assert_eq!(trailer(&out), Ok(expected));
        let mut longest = [0xa5; 257];
        write_trailer(&mut longest, Protocol::NONE).unwrap();
        assert_eq!(trailer(&longest).unwrap().pad_len, 255);
        for pad_len in 0..=6 {
            let mut out = [0; 8];
            write_trailer(&mut out[..usize::from(pad_len) + TRAILER_LEN], Protocol::IPV6).unwrap();
            assert_eq!(trailer_word(pad_len, Protocol::IPV6), Some(out));
        }
        assert_eq!(trailer_word(7, Protocol::IPV6), None);
        assert_eq!(write_trailer(&mut [0xa5; 258], Protocol::NONE), None);
        assert_eq!(write_trailer(&mut [0xa5; 1], Protocol::NONE), None);
    }

    #[test]
    fn bad_trailers_are_named() {
        assert_eq!(trailer(&[4]), Err(BadTrailer::Truncated));
        assert_eq!(trailer(&[1, 2, 3, 4]), Err(BadTrailer::PadLength));
        assert_eq!(trailer(&[1, 3, 2, 4]), Err(BadTrailer::PadBytes));
        assert_eq!(trailer(&[0, 0, 2, 4]), Err(BadTrailer::PadBytes));
        assert_eq!(trailer(&[0, 4]).map(|trailer| trailer.payload_len), Ok(0));
    }
}
