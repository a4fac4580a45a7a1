use proptest::prelude::*;

use super::super::tests::{context, saved};
use super::super::{LONGEST_WHOLE, MAX_RECORD, RecordError, SavedBody, SavedIke, Unanswered, fuzz};
use super::*;
use crate::crypto::sk::Protection;
use crate::crypto::testing::Seeded;
use crate::random::Random as _;

/// What the storage adds to a record on disk.
const FRAME: usize = 100;

fn ike(gcm: bool) -> Protection {
    let protection = if gcm {
        Protection::from_numbers(EncrId::AES_GCM_16, 128, IntegId::NONE)
    } else {
        Protection::from_numbers(EncrId::AES_CBC, 256, IntegId::HMAC_SHA2_512_256)
    };
    protection.unwrap()
}

fn secret(length: usize, seed: u64) -> Secret {
    Secret::new(Seeded(seed).bytes(length))
}

fn network(v6: bool, number: u8) -> TrafficSelector {
    let net = if v6 { format!("fd00:{number}::/64") } else { format!("10.{number}.0.0/16") };
    TrafficSelector::new(net.parse().unwrap(), 0, 0..=u16::MAX)
}

/// A CHILD_SA; with GCM and 128 bits, or with the longest keys.
pub(crate) fn child(gcm: bool, selectors: usize, v6: bool) -> SavedChild {
    let (encr, key_bits, integ) = if gcm {
        (EncrId::AES_GCM_16, 128, IntegId::NONE)
    } else {
        (EncrId::AES_CBC, 256, IntegId::HMAC_SHA2_512_256)
    };
    let lengths = (encr_key_length(encr, key_bits).unwrap(), integ_key_length(integ).unwrap());
    let keys = |seed| (secret(lengths.0, seed), secret(lengths.1, seed + 1));
    let ke = KeMethod::CURVE25519;
    let suite = ChildSuite {
        protocol: ProtocolId::ESP,
        encr,
        key_bits,
        integ,
        ke,
        additional: [KeMethod::ML_KEM_768].into_iter().collect(),
        esn: true,
    };
    let networks = |seed: usize| -> Vec<TrafficSelector> {
        (0..selectors).map(|number| network(v6, u8::try_from(seed + number).unwrap())).collect()
    };
    SavedChild {
        index: 0,
        current: true,
        replaces: None,
        nonce: Vec::new(),
        mode: Mode::Tunnel,
        spi_in: 0xc000_0001,
        spi_out: 0xc000_0002,
        suite,
        keys_in: keys(100),
        keys_out: keys(102),
        local_ts: networks(1),
        remote_ts: networks(101),
        ends: Some(UNIX_EPOCH + Duration::from_hours(500_000)),
    }
}

pub(crate) fn whole(gcm: bool, children: Vec<SavedChild>) -> Whole {
    Whole {
        context: context(ike(gcm), 9, Unanswered::None),
        expected_request: 7,
        answer: None,
        life: 3,
        prf: PrfId::HMAC_SHA2_256,
        ke: KeMethod::CURVE25519,
        additional: Additional::new(),
        sk_d: secret(32, 7),
        fingerprint: [5; 8],
        identity: IdData { kind: IdType::FQDN, data: b"peer.example.org".to_vec() },
        addresses: Vec::new(),
        traits: Traits { nat_detection: true, fragmentation: true, mobike: true, ..Traits::default() },
        children,
    }
}

fn record(whole: Whole) -> SavedIke {
    saved(5, SavedBody::Whole(Box::new(whole)))
}

/// RST-2: "A full save needs about 2 KB per SA": on disk at most 2,048 bytes, with one to a few children, whatever their
/// algorithms and addresses; mostly far less. A record that would be longer keeps what a Delete needs.
#[test]
fn rst_2_sizes_of_whole_records() {
    for (gcm, v6, children, selectors, most) in [
        (true, false, 1, 1, 512),
        (true, false, 3, 1, 1024),
        (false, false, 1, 1, 1024),
        (false, true, 3, 2, MAX_RECORD),
        (true, true, 4, 2, MAX_RECORD),
    ] {
        let children = (0..children).map(|_| child(gcm, selectors, v6)).collect();
        let record = record(whole(gcm, children)).into_fitting();
        assert!(matches!(record.body, SavedBody::Whole(_)));
        let length = record.encode().len();
        println!("gcm {gcm}, IPv6 {v6}: {length} bytes");
        assert!(length + FRAME <= most, "gcm {gcm}, IPv6 {v6}: {length} bytes");
    }
    for (answer, selectors, stays, answers) in
        [(1000, 1, true, true), (1000, 60, true, false), (10, 255, false, false)]
    {
        let mut body = whole(true, vec![child(true, 1, false)]);
        body.answer = Some(vec![3; answer]);
        if let Some(child) = body.children.first_mut() {
            child.local_ts = vec![network(false, 1); selectors];
        }
        let record = record(body).into_fitting();
        assert!(record.encode().len() <= LONGEST_WHOLE);
        assert_eq!(SavedIke::decode(&record.encode()).unwrap(), record);
        match &record.body {
            SavedBody::Whole(whole) => assert!(stays && whole.answer.is_some() == answers),
            SavedBody::V2Context(kept) => assert!(!stays && *kept == context(ike(true), 9, Unanswered::None)),
            _ => panic!(),
        }
    }
    let many = record(whole(true, (0..300).map(|_| child(true, 1, false)).collect()));
    assert!(many.encode().is_empty() && SavedIke::decode(&many.encode()) == Err(RecordError::Truncated));
    assert!(matches!(many.into_fitting().body, SavedBody::V2Context(_)));
}

/// RST-2: what is saved for a Delete has no key of a CHILD_SA in it, and neither SK_d.
#[test]
fn rst_2_no_child_key_in_what_a_delete_is_made_from() {
    let kept = record(whole(true, vec![child(true, 1, false)]));
    let keys = [secret(32, 7), secret(20, 100), secret(20, 102)];
    let has = |bytes: &[u8], key: &Secret| bytes.windows(8).any(|window| window == &key.expose()[..8]);
    for key in &keys {
        assert!(has(&kept.encode(), key));
    }
    let context = record(whole(true, Vec::new()));
    let SavedBody::Whole(body) = context.body else { panic!() };
    let context = saved(5, SavedBody::V2Context(body.into_context()));
    let prebuilt = record(whole(true, vec![child(true, 1, false)])).into_prebuilt();
    for key in &keys {
        assert!(!has(&context.encode(), key) && !has(&prebuilt.encode(), key));
    }
    // The Delete is the same as that of a record that was never to be more.
    assert_eq!(prebuilt, context.into_prebuilt());
}

/// RST-11: whatever is changed in a record, it is read as something or refused.
#[test]
fn rst_11_mangled_whole_records() {
    let mut body = whole(true, vec![child(true, 1, false), child(false, 1, true)]);
    body.answer = Some(vec![1; 60]);
    body.addresses = vec!["10.99.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
    if let Some(child) = body.children.last_mut() {
        child.replaces = Some(0);
    }
    let record = record(body);
    let bytes = record.encode();
    assert_eq!(SavedIke::decode(&bytes).unwrap(), record);
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

/// OPS-4: no byte of a key is shown.
#[test]
fn ops_4_debug_of_whole_shows_no_key() {
    let shown = format!("{:?}", record(whole(true, vec![child(true, 1, false)])));
    for key in [secret(32, 7), secret(20, 100), secret(20, 102)] {
        let [a, b, c, ..] = key.expose() else { panic!() };
        assert!(!shown.contains(&format!("{a}, {b}, {c}")));
    }
}

prop_compose! {
    fn any_child()(
        (gcm, v6, current, transport, esn) in any::<(bool, bool, bool, bool, bool)>(),
        (spi_in, spi_out, index) in any::<(u32, u32, u16)>(),
        replaces in prop::option::of(0_u8..2),
        nonce in prop::collection::vec(any::<u8>(), 0..40),
        ends in prop::option::of(0_u64..1 << 40),
        selectors in 0_usize..4,
    ) -> SavedChild {
        let made = child(gcm, selectors, v6);
        SavedChild {
            index,
            current,
            replaces,
            nonce,
            mode: if transport { Mode::Transport } else { Mode::Tunnel },
            spi_in,
            spi_out,
            suite: ChildSuite { esn, ..made.suite.clone() },
            ends: ends.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds)),
            ..made
        }
    }
}

proptest! {
    /// RST-1: a record is read as it was written.
    #[test]
    fn rst_1_whole_round_trip(
        gcm in any::<bool>(),
        children in prop::collection::vec(any_child(), 2..5),
        (expected_request, life, traits) in (any::<u32>(), any::<u16>(), 0_u8..64),
        answer in prop::option::of(prop::collection::vec(any::<u8>(), 1..300)),
        addresses in prop::collection::vec(any::<IpAddr>(), 0..3),
        identity in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let record = record(Whole {
            expected_request,
            life,
            answer,
            addresses,
            traits: Traits::of(traits).unwrap(),
            identity: IdData { kind: IdType::KEY_ID, data: identity },
            ..whole(gcm, children)
        })
        .into_fitting();
        let bytes = record.encode();
        prop_assert!(!bytes.is_empty());
        prop_assert_eq!(&SavedIke::decode(&bytes).unwrap(), &record);
        fuzz(&bytes);
    }

    /// RST-11: any bytes behind a good beginning.
    #[test]
    fn rst_11_any_whole_body(cut in 0_usize..700, bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let good = record(whole(true, vec![child(true, 1, false)])).encode();
        let head = good.get(..56 + cut % (good.len() - 56)).unwrap();
        fuzz(&[head, &bytes].concat());
    }
}
