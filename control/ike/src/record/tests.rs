use proptest::prelude::*;

use super::*;
use crate::crypto::testing::Seeded;
use crate::message::parse::{self, Body};
use crate::random::Random as _;

/// All that an IKE SA can be protected with.
fn protections() -> Vec<Protection> {
    let mut all = Vec::new();
    for encr in [EncrId::AES_GCM_16, EncrId::CHACHA20_POLY1305, EncrId::AES_CBC] {
        for bits in [128, 192, 256] {
            for integ in [
                IntegId::NONE,
                IntegId::HMAC_SHA1_96,
                IntegId::HMAC_SHA2_256_128,
                IntegId::HMAC_SHA2_384_192,
                IntegId::HMAC_SHA2_512_256,
            ] {
                all.extend(Protection::from_numbers(encr, bits, integ));
            }
        }
    }
    all
}

pub(crate) fn context(protection: Protection, next_request: u32, unanswered: Unanswered) -> V2Context {
    let length = protection.encr_length() + protection.integ_length();
    let mut random = Seeded(u64::try_from(length).unwrap());
    let (own, peer) = (Secret::new(random.bytes(length)), Secret::new(random.bytes(length)));
    V2Context { protection, own, peer, next_request, unanswered }
}

pub(crate) fn saved(number: u64, body: SavedBody) -> SavedIke {
    SavedIke {
        spis: (IkeSpi(number), IkeSpi(number | 1 << 63)),
        initiator: number % 2 == 1,
        connection: "headquarters".into(),
        peer: PeerTag::of("peer.example.org"),
        path: Path {
            local: "192.0.2.1:4500".parse().unwrap(),
            remote: "198.51.100.7:61234".parse().unwrap(),
            natt: true,
        },
        expires: UNIX_EPOCH + Duration::from_hours(500_000),
        body,
    }
}

/// RST-1: a record is read as it was written, whatever protects the IKE SA.
#[test]
fn rst_1_round_trip() {
    for protection in protections() {
        for unanswered in [Unanswered::None, Unanswered::Kept(vec![7; 113]), Unanswered::Long] {
            let v6 = "[2001:db8::1]:500".parse().unwrap();
            let mut record = saved(5, SavedBody::V2Context(context(protection, 9, unanswered)));
            assert_eq!(SavedIke::decode(&record.encode()).unwrap(), record);
            record.path = Path { local: v6, remote: v6, natt: false };
            assert_eq!(SavedIke::decode(&record.encode()).unwrap(), record);
            let prebuilt = record.into_prebuilt();
            assert_eq!(SavedIke::decode(&prebuilt.encode()).unwrap(), prebuilt);
        }
    }
}

/// RST-5, RST-8: the same for IKEv1: what is built before is what is built later, by the function that the live SA uses.
#[test]
fn rst_8_version_1() {
    for hash in Hash::ALL {
        let mut random = Seeded(3);
        let context = V1Context {
            skeyid_a: Secret::new(random.bytes(hash.len())),
            ka: Secret::new(random.bytes(32)),
            last_block: [9; 16],
            hash,
        };
        let record = saved(5, SavedBody::V1Context(context));
        let bytes = record.encode();
        assert!(bytes.len() < 300);
        let later = SavedIke::decode(&bytes).unwrap();
        assert_eq!(later, record);
        let SavedBody::V1Context(context) = &later.body else { panic!() };
        let built = context.delete(later.spis).unwrap();
        assert_eq!(built[..16], record.key());
        assert_eq!(built[16..20], [8, 0x10, 5, 1]);
        let finished = record.into_prebuilt();
        assert_eq!(SavedIke::decode(&finished.encode()).unwrap(), finished);
        let SavedBody::Prebuilt(prebuilt) = &finished.body else { panic!() };
        assert_eq!((prebuilt.answered, &prebuilt.deletes), (false, &vec![built]));
        for length in 0..bytes.len() {
            assert!(SavedIke::decode(&bytes[..length]).is_err());
        }
    }
}

/// RST-2: "at most 1,024 bytes per SA on disk"; what the storage adds is below 100 bytes. With the longest keys, IPv6 and
/// the longest request that is kept; and typically half of that.
#[test]
fn rst_2_sizes() {
    let v6 = "[2001:db8::1]:4500".parse().unwrap();
    for protection in protections() {
        for kept in [None, Some(LONGEST_REQUEST)] {
            let unanswered = kept.map_or(Unanswered::None, |length| Unanswered::Kept(vec![0; length]));
            let mut record = saved(5, SavedBody::V2Context(context(protection, 9, unanswered)));
            let typical = record.encode().len();
            assert!(kept.is_some() || typical <= 412, "{protection:?}: {typical} bytes");
            record.path = Path { local: v6, remote: v6, natt: true };
            let most = record.encode().len();
            let prebuilt = record.into_prebuilt().encode().len();
            assert!(most <= 924 && prebuilt <= 924, "{protection:?}: {most} and {prebuilt} bytes");
        }
    }
}

/// RST-8: the finished message is the one that is built later, byte for byte; a record of it has no key in it.
#[test]
fn rst_8_prebuilt_is_what_is_built_later() {
    for protection in protections() {
        let record = saved(5, SavedBody::V2Context(context(protection, 9, Unanswered::None)));
        let bytes = record.encode();
        let SavedBody::V2Context(context) = &record.body else { panic!() };
        let (own, peer) = (context.own.duplicate(), context.peer.duplicate());
        let finished = record.into_prebuilt();
        let SavedBody::Prebuilt(prebuilt) = &finished.body else { panic!() };
        let later = SavedIke::decode(&bytes).unwrap();
        let SavedBody::V2Context(context) = &later.body else { panic!() };
        let builder = context.builder(later.spis, later.initiator).unwrap();
        let built: Vec<_> = context.ids().map(|id| builder.build(id)).collect();
        assert_eq!(prebuilt.deletes, built);
        let stored = finished.encode();
        for key in [&own, &peer] {
            assert!(!stored.windows(8).any(|window| window == key.expose().first_chunk::<8>().unwrap()));
        }
    }
}

/// RST-5: an INFORMATIONAL request with a Delete payload, which the peer can open, under the next message ID.
#[test]
fn rst_5_the_peer_can_open_it() {
    for protection in protections() {
        let context = context(protection, 9, Unanswered::None);
        let spis = (IkeSpi(3), IkeSpi(4));
        let message = context.builder(spis, true).unwrap().build(9);
        let parsed = parse::message(&message).unwrap();
        assert_eq!((parsed.head.spi_i, parsed.head.spi_r), spis);
        assert!(parsed.head.from_initiator && !parsed.head.response && parsed.head.message_id == 9);
        assert_eq!(parsed.head.exchange, ExchangeType::INFORMATIONAL);
        let Body::Encrypted { first_inner, aad, sealed } = parsed.body else { panic!() };
        let opener = Opener::from_saved(protection, &context.own).unwrap();
        let plain = opener.open(aad, sealed).unwrap();
        assert_eq!(
            parse::chain(first_inner, &plain).unwrap(),
            [Payload::Delete { protocol: ProtocolId::IKE, spis: Vec::new() }]
        );
    }
}

/// RST-9: after a request that is too long to be kept, its own message ID is tried as well; message IDs do not wrap.
#[test]
fn rst_9_message_ids() {
    let protection = protections()[0];
    let ids = |next, unanswered| context(protection, next, unanswered).ids().collect::<Vec<_>>();
    assert_eq!(ids(9, Unanswered::None), [9, 10, 11]);
    assert_eq!(ids(9, Unanswered::Kept(vec![1])), [9, 10, 11]);
    assert_eq!(ids(9, Unanswered::Long), [8, 9, 10, 11]);
    assert_eq!(ids(u32::MAX - 1, Unanswered::None), [u32::MAX - 1]);
    assert!(ids(u32::MAX, Unanswered::None).is_empty());
}

/// RST-11: whatever is changed in a record, it is read as something or refused, and never more than it says is read.
#[test]
fn rst_11_mangled() {
    let kept = Unanswered::Kept(vec![7; 20]);
    for record in [
        saved(5, SavedBody::V2Context(context(protections()[0], 9, kept.clone()))),
        saved(5, SavedBody::V2Context(context(protections()[5], 9, kept))).into_prebuilt(),
    ] {
        let bytes = record.encode();
        for length in 0..bytes.len() {
            assert!(SavedIke::decode(&bytes[..length]).is_err());
        }
        assert_eq!(SavedIke::decode(&[&bytes[..], &[0]].concat()), Err(RecordError::Trailing));
        for at in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut mangled = bytes.to_vec();
                mangled[at] ^= flip;
                fuzz(&mangled);
            }
        }
    }
    assert_eq!(SavedIke::decode(&[VERSION + 1, 0]), Err(RecordError::Version(VERSION + 1)));
}

/// OPS-4: no byte of a key is shown.
#[test]
fn ops_4_debug_shows_no_key() {
    let record = saved(5, SavedBody::V2Context(context(protections()[0], 9, Unanswered::None)));
    let SavedBody::V2Context(context) = &record.body else { panic!() };
    let shown = format!("{record:?}");
    let [a, b, ..] = context.own.expose() else { panic!() };
    assert!(!shown.contains(&format!("{a}, {b}")));
}

proptest! {
    /// RST-11: any bytes.
    #[test]
    fn rst_11_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzz(&bytes);
    }

    /// RST-11: any bytes behind a good beginning.
    #[test]
    fn rst_11_any_body(kind in 0_u8..5, bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let record = saved(5, SavedBody::V2Context(context(protections()[0], 9, Unanswered::None)));
        let head = record.encode()[..56].to_vec();
        let mut whole = [head, bytes].concat();
        whole[1] = kind;
        fuzz(&whole);
    }
}
