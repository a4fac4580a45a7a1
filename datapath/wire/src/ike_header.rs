//! The fixed header of an IKE message: RFC 7296 section 3.1, and of ISAKMP, RFC 2408 section 3.1, which calls the
//! SPIs cookies.

use crate::bytes;

/// Length of the header in bytes.
pub const LEN: usize = 28;

/// IKE or ISAKMP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The initiator's SPI, or its cookie.
    pub initiator_spi: [u8; 8],
    /// The responder's SPI, or its cookie; zero in the first message.
    pub responder_spi: [u8; 8],
    /// Type of the first payload.
    pub next_payload: u8,
    /// Major version, 4 bits.
    pub major: u8,
    /// Minor version, 4 bits.
    pub minor: u8,
    /// Exchange type.
    pub exchange: u8,
    /// Flags.
    pub flags: u8,
    /// Message ID.
    pub message_id: u32,
    /// Length of the whole message in bytes, this header included.
    pub length: u32,
}

impl Header {
    /// Reads the first [`LEN`] bytes; `None` if there are fewer. No value is checked.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let [next_payload, version, exchange, flags] = *bytes::array_at::<4>(message, 16)?;
        Some(Self {
            initiator_spi: *bytes::array_at(message, 0)?,
            responder_spi: *bytes::array_at(message, 8)?,
            next_payload,
            major: version >> 4,
            minor: version & 0x0f,
            exchange,
            flags,
            message_id: bytes::u32_at(message, 20)?,
            length: bytes::u32_at(message, 24)?,
        })
    }

    /// Writes the first [`LEN`] bytes of `out`; `None`, and `out` untouched, if it is shorter. Of the versions the
    /// low 4 bits are written.
    pub fn emit(&self, out: &mut [u8]) -> Option<()> {
        let out = out.get_mut(..LEN)?;
        bytes::put(out, 0, self.initiator_spi)?;
        bytes::put(out, 8, self.responder_spi)?;
        let version = self.major << 4 | self.minor & 0x0f;
        bytes::put(out, 16, [self.next_payload, version, self.exchange, self.flags])?;
        bytes::put(out, 20, self.message_id.to_be_bytes())?;
        bytes::put(out, 24, self.length.to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7296 section 3.1, figure 4: an IKE_SA_INIT request of 28 bytes.
    #[test]
    fn fields_lie_where_the_figure_has_them() {
        let header = Header {
            initiator_spi: [1, 2, 3, 4, 5, 6, 7, 8],
            responder_spi: [0; 8],
            next_payload: 33,
            major: 2,
            minor: 0,
            exchange: 34,
            flags: 0x08,
            message_id: 0x0102_0304,
            length: 28,
        };
        let expected =
            [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 33, 0x20, 34, 8, 1, 2, 3, 4, 0, 0, 0, 28];
        let mut out = [0xa5; LEN];
        header.emit(&mut out).unwrap();
        assert_eq!(out, expected);
        assert_eq!(Header::parse(&out), Some(header));
        assert_eq!(Header::parse(&out[..LEN - 1]), None);
        assert_eq!(header.emit(&mut out[..LEN - 1]), None);
    }
}
