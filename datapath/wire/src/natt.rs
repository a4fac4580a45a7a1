//! What a UDP datagram on port 4500 carries (RFC 3948).

use crate::esp;

/// Four zero bytes where an SPI would be, before an IKE message (RFC 3948 section 2.2).
pub const NON_ESP_MARKER: [u8; 4] = [0; 4];
/// The payload of a NAT-keepalive (RFC 3948 section 2.3).
pub const KEEPALIVE: u8 = 0xff;

/// Kind of a datagram on port 4500.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Natt {
    /// One byte 0xff: dropped (RFC 3948 section 2.3: "The receiver SHOULD ignore a received NAT-keepalive packet").
    Keepalive,
    /// An IKE message after the non-ESP marker.
    Ike,
    /// An ESP packet; its header is complete.
    Esp,
    /// Neither: shorter than an ESP header and no marker.
    Malformed,
}

/// Sorts a UDP payload from or to port 4500. IKE messages are not looked into.
pub fn classify(udp_payload: &[u8]) -> Natt {
    match udp_payload {
        [KEEPALIVE] => Natt::Keepalive,
        [0, 0, 0, 0, ..] => Natt::Ike,
        _ if udp_payload.len() >= esp::HEADER_LEN => Natt::Esp,
        _ => Natt::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3948 sections 2.1 to 2.3.
    #[test]
    fn sorts_the_three_kinds() {
        assert_eq!(classify(&[0xff]), Natt::Keepalive);
        assert_eq!(classify(&[0, 0, 0, 0]), Natt::Ike);
        assert_eq!(classify(&[0, 0, 0, 0, 1, 2, 3, 4, 5]), Natt::Ike);
        assert_eq!(classify(&[0, 0, 1, 0, 0, 0, 0, 1]), Natt::Esp);
        assert_eq!(classify(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1]), Natt::Esp);
        for short in [&[][..], &[0], &[0xfe], &[0, 0, 0], &[0xff, 0xff], &[0, 0, 1, 0, 0, 0, 0]] {
            assert_eq!(classify(short), Natt::Malformed, "{short:?}");
        }
    }
}
