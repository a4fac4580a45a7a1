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

    /// IKE-6: what decides on a cookie is seen without reading the rest.
    #[test]
    fn ike_6_first_request(
        spi_i in 1_u64..,
        mut payloads in prop::collection::vec(payload(), 0..6),
        nonce in bytes(16..=256),
        cookie: Option<u8>,
    ) {
        let head = Head {
            spi_i: IkeSpi(spi_i),
            spi_r: IkeSpi::NONE,
            exchange: ExchangeType::IKE_SA_INIT,
            from_initiator: true,
            response: false,
            message_id: 0,
        };
        payloads.retain(|payload| !matches!(payload, Payload::Nonce(_)));
        if let Some(cookie) = cookie {
            payloads.insert(0, Payload::Notify(Notify::new(NotifyType::COOKIE, [cookie; 33])));
        }
        payloads.push(Payload::Nonce(nonce.clone()));
        let written = emit::plain(&head, &payloads);
        let first = parse::first_request(&written).unwrap();
        prop_assert_eq!((first.head, first.nonce), (head, &nonce[..]));
        prop_assert!(first.has_cookie || cookie.is_none());
        fuzz(&written);
        for end in 0..written.len() {
            prop_assert_eq!(parse::first_request(&written[..end]), None);
        }
        for other in [
            Head { response: true, ..head },
            Head { from_initiator: false, ..head },
            Head { message_id: 1, ..head },
            Head { spi_r: IkeSpi(1), ..head },
            Head { spi_i: IkeSpi::NONE, ..head },
            Head { exchange: ExchangeType::IKE_AUTH, ..head },
        ] {
            let written = emit::plain(&other, &payloads);
            prop_assert_eq!(parse::first_request(&written), None);
        }
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
    fn ike_1_any_bytes(first: u8, exchange in 34_u8..38, response: bool, bytes in bytes(0..300)) {
        fuzz(&bytes);
        let head = Head {
            spi_i: IkeSpi(1),
            spi_r: IkeSpi(2),
            exchange: ExchangeType(exchange),
            from_initiator: true,
            response,
            message_id: 0,
        };
        fuzz_chain(&head, PayloadType(first), &bytes);
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

/// One message of `strongswan.txt`.
struct Captured {
    /// What strongSwan calls it: exchange, request or response, message ID, payloads.
    name: String,
    header: Vec<u8>,
    payloads: Vec<Payload>,
    chosen: Option<String>,
}

fn captured() -> Vec<Captured> {
    let hex = |text: &str| -> Vec<u8> {
        text.as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    };
    let blocks = include_str!("strongswan.txt").split("\n\n").skip(1).filter(|block| !block.is_empty());
    let messages = blocks.map(|block| {
        let mut lines = block.lines();
        let name = lines.next().unwrap().to_owned();
        let (mut header, mut payloads, mut chosen) = (Vec::new(), Vec::new(), None);
        for line in lines {
            let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
            match kind {
                "message" => {
                    header = hex(rest);
                    let parse::Body::Plain(plain) = parse::message(&header).unwrap().body else {
                        panic!("{name}")
                    };
                    assert_eq!(emit::plain(&parse::head(&header).unwrap().0, &plain), header, "{name}");
                    payloads = plain;
                }
                "header" => header = hex(rest),
                "inside" => {
                    let inside = hex(rest);
                    payloads = parse::chain(PayloadType(header[28]), &inside).unwrap();
                    let mut written = Vec::new();
                    assert_eq!(emit::chain(&payloads, &mut written), PayloadType(header[28]));
                    assert_eq!(written, inside, "{name}");
                }
                "chosen" => chosen = Some(rest.to_owned()),
                other => panic!("{other}"),
            }
        }
        Captured { name, header, payloads, chosen }
    });
    messages.collect()
}

/// IKE-5: strongSwan's messages are read, are what strongSwan says they are, are legal, and are written with the same bytes.
#[test]
fn ike_5_messages_of_strongswan() {
    let all = captured();
    assert!(all.len() > 30);
    for message in &all {
        let peek = parse::peek(&message.header).unwrap();
        let head = peek.head;
        let summary = describe::Summary { head: &head, payloads: &message.payloads }.to_string();
        // Without what stands in brackets, the names are strongSwan's own.
        let bare = |text: &str| {
            let (mut depth, mut bare) = (0_u8, String::new());
            for character in text.chars() {
                depth += u8::from(character == '(');
                if depth == 0 {
                    bare.push(character);
                }
                depth -= u8::from(character == ')');
            }
            bare
        };
        let theirs = ["CPRQ", "CPRP"].iter().fold(bare(&message.name), |name, cp| name.replace(cp, "CP"));
        let word = |word: &str| match word.split_once("EAP/") {
            None => word.to_owned(),
            Some((before, after)) => format!("{before}EAP{}", if after.ends_with(']') { "]" } else { "" }),
        };
        let words: Vec<_> = theirs.split(' ').map(word).collect();
        assert_eq!(bare(&summary), words.join(" "), "{}", message.name);

        let phase = if head.exchange == ExchangeType::IKE_AUTH && head.message_id > 1 {
            legality::Phase::Later
        } else {
            legality::Phase::First
        };
        let legal = legality::check(head.exchange, head.response, phase, &message.payloads);
        assert_eq!(legal, Ok(()), "{}", message.name);
        if message.header.len() == emit::SK_PREFIX_LEN {
            let sealed = usize::try_from(peek.length).unwrap() - emit::SK_PREFIX_LEN;
            assert_eq!(emit::sk_prefix(&head, PayloadType(message.header[28]), sealed), message.header);
        }
    }
}

/// IKE-5: from strongSwan's offer and its answer follows what its log says was chosen; and we choose what it can accept.
#[test]
fn ike_5_choices_of_strongswan() {
    use crate::negotiate::{Suite, keyword, proposal};
    let (mut offers, mut answers) = (Vec::new(), 0);
    for message in captured() {
        let Some(sa) = legality::Payloads(&message.payloads).sa() else { continue };
        let head = parse::peek(&message.header).unwrap().head;
        if !head.response {
            for configured in [keyword::default_ike(), keyword::default_esp()] {
                if let Some(chosen) = proposal::choose(&configured, sa) {
                    assert!(proposal::accepts(sa, &[chosen.proposal]).is_some());
                }
            }
            offers.push((head.exchange, sa.to_vec()));
            continue;
        }
        let (_, offer) = offers.iter().rfind(|(exchange, _)| *exchange == head.exchange).unwrap();
        let chosen = proposal::accepts(offer, sa).unwrap();
        let text = match &chosen.suite {
            Suite::Ike(suite) => format!("IKE:{suite}"),
            Suite::Child(suite) => suite.to_string(),
        };
        assert_eq!(Some(text), message.chosen, "{}", message.name);
        answers += 1;
    }
    assert_eq!(answers, 7);
}

/// A message in one line: no identity, no address, no key, and not longer than a line is worth.
#[test]
fn summary_is_short_and_tells_nothing() {
    let head = Head {
        spi_i: IkeSpi(1),
        spi_r: IkeSpi(2),
        exchange: ExchangeType::IKE_AUTH,
        from_initiator: true,
        response: false,
        message_id: 1,
    };
    let secret = b"gossip".to_vec();
    let payloads = [
        Payload::IdI(IdData { kind: IdType::FQDN, data: secret.clone() }),
        Payload::Notify(Notify::new(NotifyType::INITIAL_CONTACT, secret.clone())),
        Payload::Notify(Notify::new(NotifyType(40_000), secret.clone())),
        Payload::Auth { method: AuthMethod::SHARED_KEY, data: secret.clone() },
        Payload::Cp(Configuration {
            kind: CfgType::REQUEST,
            attributes: vec![(CfgAttribute(1), secret.clone())],
        }),
        Payload::Eap([&[2, 0, 0, 11, 26][..], &secret].concat()),
        Payload::Delete { protocol: ProtocolId::ESP, spis: vec![1, 2] },
        Payload::VendorId(secret),
        Payload::Unknown { kind: PayloadType(200), critical: false },
    ];
    assert_eq!(
        describe::Summary { head: &head, payloads: &payloads }.to_string(),
        "IKE_AUTH request 1 [IDi N(INITIAL_CONTACT) N(40000) AUTH(SHARED_KEY) CP(REQUEST) EAP(response 26) D(2 of ESP) V \
         ?(200)]"
    );
    let many = vec![Payload::VendorId(Vec::new()); 128];
    let text = describe::Summary { head: &head, payloads: &many }.to_string();
    assert!(text.ends_with("V V and 96 more]") && text.len() < 120, "{text}");
}

/// The seeds of the fuzz target `ike_message` go through the same function.
#[test]
fn fuzz_seeds_hold() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../hwtests/fuzz/seeds/ike_message");
    let mut replayed = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let seed = std::fs::read(&path).unwrap();
        assert!(std::panic::catch_unwind(|| fuzz(&seed)).is_ok(), "{}", path.display());
        replayed += 1;
    }
    assert!(replayed >= 20, "{replayed} seeds in {folder}");
}
