use proptest::prelude::*;

use super::*;
use crate::crypto::testing::hex;

fn head() -> Head {
    Head {
        cookie_i: IkeSpi(1),
        cookie_r: IkeSpi(2),
        exchange: Exchange::IDENTITY_PROTECTION,
        encrypted: false,
        message_id: 0,
    }
}

/// IKE-2: an SA payload with basic and variable attributes, written out by hand from RFC 2408 sections 3.3 to 3.6.
#[test]
fn ike_2_sa_payload_byte_for_byte() {
    let attributes = vec![Attribute::basic(1, 7), Attribute::variable(12, [0, 0, 0x70, 0x80])];
    let transforms = vec![Transform { number: 1, id: 1, attributes }];
    let sa = vec![Proposal { number: 1, protocol: ProtocolId::IKE, spi: Vec::new(), transforms }];
    let bytes = emit::plain(&head(), &[Payload::Sa(sa.clone())]);
    let expected = "0000000000000001 0000000000000002 01 10 02 00 00000000 00000044
                    00 00 0028 00000001 00000001  00 00 001c 01 01 00 01
                    00 00 0014 01 01 0000  8001 0007  000c 0004 00007080";
    assert_eq!(bytes, hex(expected));
    let (read, first, body) = parse::message(&bytes).unwrap();
    assert_eq!((read, first), (head(), Kind::SA));
    let chain = parse::chain(first, body).unwrap();
    assert_eq!(chain.payloads, [Payload::Sa(sa)]);
    assert_eq!(chain.length, body.len());
}

/// IKE-2: what pads an encrypted message is no payload.
#[test]
fn ike_2_padding_is_not_read() {
    let payloads = [Payload::Hash(vec![7; 20]), Payload::Nonce(vec![9; 16])];
    let mut bytes = Vec::new();
    let first = emit::chain(&payloads, &mut bytes);
    let length = bytes.len();
    bytes.resize(length + 12, 0);
    let chain = parse::chain(first, &bytes).unwrap();
    assert_eq!((chain.length, chain.starts), (length, vec![0, 24]));
}

/// IKE-2: lengths and counts that lie.
#[test]
fn ike_2_lies_are_refused() {
    for (kind, bytes) in [
        (Kind::KE, "00000003"),
        (Kind::KE, "00000005"),
        (Kind::ID, "00000007 010000"),
        (Kind::DELETE, "00000010 00000001 01 10 0001 00000000"),
        (Kind::DELETE, "0000000c 00000001 03 00 0001"),
        (Kind::SA, "0000000c 00000002 00000001"),
        (Kind::SA, "0000000c 00000001 00000001"),
        (Kind::NOTIFY, "0000000c 00000001 03 04 0001"),
        (Kind::ATTRIBUTES, "0000000c 01000000 00010001"),
    ] {
        assert!(parse::chain(kind, &hex(bytes)).is_err(), "{bytes}");
    }
}

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop::sample::select(vec![1_u8, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 21, 132]);
    (kind, prop::collection::vec(any::<u8>(), 0..96), any::<bool>()).prop_map(|(kind, mut body, sa)| {
        if sa && kind == 1 {
            let prefix = [0, 0, 0, 1, 0, 0, 0, 1];
            let length = prefix.len().min(body.len());
            body[..length].copy_from_slice(&prefix[..length]);
        }
        let mut chain = vec![0, 0];
        chain.extend(u16::try_from(body.len() + 4).unwrap().to_be_bytes());
        chain.extend(body);
        emit::with_body(&head(), Kind(kind), &chain)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// IKE-2: any bytes, and any bytes in a payload of each type.
    #[test]
    fn ike_2_reading_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..256), message in any_message()) {
        fuzz(&bytes);
        fuzz(&message);
    }
}
