//! Tests of `parse` and `emit`.

use proptest::prelude::*;

use super::registry::{PayloadType, *};
use super::*;

fn bytes(length: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), length)
}

fn transform() -> impl Strategy<Value = Transform> {
    (any::<u8>(), any::<u16>(), any::<Option<u16>>()).prop_map(|(kind, id, key_length)| Transform {
        kind: TransformType(kind),
        id,
        key_length,
        unknown_attribute: false,
    })
}

fn proposal() -> impl Strategy<Value = Proposal> {
    (any::<u8>(), any::<u8>(), bytes(0..9), prop::collection::vec(transform(), 0..20)).prop_map(
        |(number, protocol, spi, transforms)| Proposal {
            number,
            protocol: ProtocolId(protocol),
            spi,
            transforms,
        },
    )
}

fn selector() -> impl Strategy<Value = TrafficSelector> {
    let ends = prop_oneof![
        (any::<[u8; 4]>(), any::<[u8; 4]>())
            .prop_map(|(a, b)| (IpAddr::from(a.min(b)), IpAddr::from(a.max(b)))),
        (any::<[u8; 16]>(), any::<[u8; 16]>())
            .prop_map(|(a, b)| (IpAddr::from(a.min(b)), IpAddr::from(a.max(b)))),
    ];
    (ends, any::<u8>(), any::<u16>(), any::<u16>()).prop_map(|((start, end), protocol, first, last)| {
        TrafficSelector { start, end, protocol, ports: first..=last }
    })
}

fn id() -> impl Strategy<Value = IdData> {
    (any::<u8>(), bytes(0..40)).prop_map(|(kind, data)| IdData { kind: IdType(kind), data })
}

fn payload() -> impl Strategy<Value = Payload> {
    prop_oneof![
        prop::collection::vec(proposal(), 1..5).prop_map(Payload::Sa),
        (any::<u16>(), bytes(0..100))
            .prop_map(|(method, data)| Payload::Ke(KeyExchangeData { method: KeMethod(method), data })),
        id().prop_map(Payload::IdI),
        id().prop_map(Payload::IdR),
        (any::<u8>(), bytes(0..100))
            .prop_map(|(encoding, data)| Payload::Cert { encoding: CertEncoding(encoding), data }),
        (any::<u8>(), bytes(0..100)).prop_map(|(encoding, authorities)| Payload::CertReq {
            encoding: CertEncoding(encoding),
            authorities
        }),
        (any::<u8>(), bytes(0..100))
            .prop_map(|(method, data)| Payload::Auth { method: AuthMethod(method), data }),
        bytes(16..=256).prop_map(Payload::Nonce),
        (any::<u8>(), bytes(0..9), any::<u16>(), bytes(0..50)).prop_map(|(protocol, spi, kind, data)| {
            Payload::Notify(Notify { protocol: ProtocolId(protocol), spi, kind: NotifyType(kind), data })
        }),
        (2_u8..4, prop::collection::vec(any::<u32>(), 0..10))
            .prop_map(|(protocol, spis)| Payload::Delete { protocol: ProtocolId(protocol), spis }),
        Just(Payload::Delete { protocol: ProtocolId::IKE, spis: Vec::new() }),
        bytes(0..40).prop_map(Payload::VendorId),
        prop::collection::vec(selector(), 0..10).prop_map(Payload::TsI),
        prop::collection::vec(selector(), 0..10).prop_map(Payload::TsR),
        (any::<u8>(), prop::collection::vec((0_u16..0x8000, bytes(0..20)), 0..10)).prop_map(
            |(kind, attributes)| {
                let attributes =
                    attributes.into_iter().map(|(kind, value)| (CfgAttribute(kind), value)).collect();
                Payload::Cp(Configuration { kind: CfgType(kind), attributes })
            }
        ),
        bytes(4..40).prop_map(Payload::Eap),
        (54_u8..=255).prop_map(|kind| Payload::Unknown { kind: PayloadType(kind), critical: false }),
    ]
}

fn head() -> impl Strategy<Value = Head> {
    (any::<(u64, u64, u8, bool, bool, u32)>()).prop_map(
        |(spi_i, spi_r, exchange, from_initiator, response, message_id)| Head {
            spi_i: IkeSpi(spi_i),
            spi_r: IkeSpi(spi_r),
            exchange: ExchangeType(exchange),
            from_initiator,
            response,
            message_id,
        },
    )
}

proptest! {
    /// IKE-1: what is written is read.
    #[test]
    fn ike_1_round_trip(head in head(), payloads in prop::collection::vec(payload(), 0..12)) {
        let written = emit::plain(&head, &payloads);
        let parsed = parse::message(&written).unwrap();
        prop_assert_eq!(parsed.head, head);
        prop_assert_eq!(parsed.body, parse::Body::Plain(payloads));
        fuzz(&written);
    }

    /// IKE-1: a message that ends early is refused wherever it ends, and so is one that goes on.
    #[test]
    fn ike_1_every_truncation(head in head(), payloads in prop::collection::vec(payload(), 1..6)) {
        let written = emit::plain(&head, &payloads);
        for end in 0..written.len() {
            let mut cut = written[..end].to_vec();
            prop_assert_eq!(parse::message(&cut), Err(parse::ParseError::Truncated));
            // The same with a header that agrees: the payloads themselves are short.
            if let Some(length) = cut.get_mut(24..28) {
                length.copy_from_slice(&u32::try_from(end).unwrap().to_be_bytes());
                prop_assert!(parse::message(&cut).is_err());
            }
        }
        let long = [&written[..], &[0]].concat();
        prop_assert_eq!(parse::message(&long), Err(parse::ParseError::Syntax("bytes after the end of the message")));
    }

    /// IKE-1: no bytes at all make it panic.
    #[test]
    fn ike_1_any_bytes(first: u8, bytes in bytes(0..300)) {
        fuzz(&bytes);
        fuzz_chain(PayloadType(first), &bytes);
    }

    /// IKE-1: nor does a right message with a few bytes changed.
    #[test]
    fn ike_1_damaged(
        head in head(),
        payloads in prop::collection::vec(payload(), 1..6),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut written = emit::plain(&head, &payloads);
        for (place, byte) in damage {
            let at = place.index(written.len());
            written[at] = byte;
        }
        fuzz(&written);
    }

    /// IKE-1: the envelope of an Encrypted payload and of a fragment.
    #[test]
    fn ike_1_envelope(head in head(), first: u8, sealed in bytes(0..100), total in 1_u16.., number: prop::sample::Index) {
        let message = [emit::sk_prefix(&head, PayloadType(first), sealed.len()), sealed.clone()].concat();
        let parsed = parse::message(&message).unwrap();
        prop_assert_eq!(parsed.head, head);
        let (aad, _) = message.split_at(emit::SK_PREFIX_LEN);
        prop_assert_eq!(
            parsed.body,
            parse::Body::Encrypted { first_inner: PayloadType(first), aad, sealed: &sealed }
        );
        for end in 0..message.len() {
            prop_assert!(parse::message(&message[..end]).is_err());
        }
        fuzz(&message);

        let number = u16::try_from(number.index(total.into())).unwrap() + 1;
        let prefix = emit::skf_prefix(&head, PayloadType(first), number, total, sealed.len());
        let message = [&prefix[..], &sealed[..]].concat();
        let parsed = parse::message(&message).unwrap();
        prop_assert_eq!(parsed.head, head);
        let first_inner = if number == 1 { PayloadType(first) } else { PayloadType::NONE };
        prop_assert_eq!(
            parsed.body,
            parse::Body::Fragment { number, total, first_inner, aad: &prefix, sealed: &sealed }
        );
        for end in 0..message.len() {
            prop_assert!(parse::message(&message[..end]).is_err());
        }
        fuzz(&message);
    }
}
