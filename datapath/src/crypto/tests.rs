//! Tests across suites. Packets are built here; `vectors` holds what standards published, `oracles` what other
//! implementations compute, `forgeries` what must not open.

mod forgeries;
mod oracles;
mod vectors;

use postern_contract::sa::Integrity;
use postern_contract::secret::Secret;
use proptest::prelude::*;

use super::selftest::{ANSWERS, suite};
use super::*;

/// An engine with what the environment asks for, tested.
fn engine() -> Engine {
    Engine::select(crate::testbed::backend(), 8).expect("self test")
}

/// Every suite of ESP with a key.
fn suites() -> Vec<(String, Suite)> {
    let named = |(encryption, len, integrity, _)| {
        (format!("{encryption:?} {len} {integrity:?}"), suite(encryption, len, integrity))
    };
    ANSWERS.into_iter().map(named).collect()
}

/// A number out of a counter, as the datapath gets it.
fn reserve(sequence: u64) -> Reserved {
    SequenceCounter::new(sequence, u64::MAX, true).reserve().expect("a number")
}

/// Seals `text` under SPI 0x01020304, in a buffer that held 0xa5 wherever sealing writes.
fn seal(key: &EspKey, sequence: u64, esn: bool, text: &[u8]) -> (SealOutcome, Vec<u8>) {
    let Layout { iv_len, icv_len, .. } = key.layout();
    let mut packet = vec![1, 2, 3, 4];
    packet.extend([0xa5; 4]);
    packet.extend(vec![0xa5; iv_len.into()]);
    packet.extend(text);
    packet.extend(vec![0xa5; icv_len.into()]);
    let mut batch: ArrayVec<SealOp<'_>, 1> = ArrayVec::new();
    batch.push(SealOp { key: key.into(), sequence: reserve(sequence), esn, packet: &mut packet });
    let outcome = engine().seal(batch).pop().expect("an outcome");
    (outcome, packet)
}

/// Opens `packet` and gives it back with the outcome.
fn open(key: &EspKey, sequence: u64, esn: bool, packet: &[u8]) -> (Outcome, Vec<u8>) {
    let mut packet = packet.to_vec();
    let mut batch =
        [OpenOp { key: key.into(), sequence, esn, packet: &mut packet, outcome: Outcome::Pending }];
    engine().open(&mut batch);
    (batch[0].outcome, packet)
}

/// Payload, padding and trailer of an open packet.
fn text<'k, 'p>(key: impl Into<KeyRef<'k>>, packet: &'p [u8]) -> &'p [u8] {
    let Layout { iv_len, icv_len, .. } = key.into().layout();
    &packet[ESP_HEADER + usize::from(iv_len)..packet.len() - usize::from(icv_len)]
}

/// Bytes that differ from place to place.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at * 7 % 251).expect("below 251")).collect()
}

/// DP-3: every suite gives the answer of another implementation.
#[test]
fn dp_3_self_test_passes() {
    let name = engine().name();
    match crate::testbed::backend() {
        // What that is depends on the processor.
        Backend::Auto => assert!(["vaes512", "vaes256", "ring"].contains(&name), "{name}"),
        wanted => assert_eq!(name, wanted.name()),
    }
}

/// DP-3: what RFC 4303 section 2.4 and the transforms' RFCs say of lengths.
#[test]
fn dp_3_layouts() {
    for (name, suite) in suites() {
        let (iv_len, block) = match suite.encryption {
            Encryption::Null => (0, 4),
            Encryption::AesCbc => (16, 16),
            _ => (8, 4),
        };
        let icv_len = match suite.integrity {
            Integrity::HmacSha1_96 => 12,
            Integrity::HmacSha2_384_192 => 24,
            Integrity::HmacSha2_512_256 => 32,
            _ => 16,
        };
        assert_eq!(EspKey::new(&suite).unwrap().layout(), Layout { iv_len, icv_len, block }, "{name}");
    }
}

/// A suite that `Suite::validate` refuses gives no key.
#[test]
fn invalid_suites_are_refused() {
    let suite = |encryption, len, integrity| suite(encryption, len, integrity);
    assert!(EspKey::new(&suite(Encryption::AesGcm16, 19, Integrity::None)).is_err());
    assert!(EspKey::new(&suite(Encryption::AesCbc, 16, Integrity::None)).is_err());
    assert!(EspKey::new(&suite(Encryption::Null, 0, Integrity::None)).is_err());
    assert!(AhKey::new(&suite(Encryption::AesGcm16, 20, Integrity::None)).is_err());
    assert!(AhKey::new(&suite(Encryption::Null, 0, Integrity::None)).is_err());
}

/// OPS-4: no type of this module shows a byte of a key or of a packet when it is formatted.
#[test]
fn ops_4_nothing_secret_is_formatted() {
    let secret = |len: usize| Secret::new(vec![0xab; len]);
    let suite = |encryption, len, integrity, integrity_len| Suite {
        encryption,
        encryption_key: secret(len),
        integrity,
        integrity_key: secret(integrity_len),
    };
    let mut shown = Vec::new();
    for esp in [
        suite(Encryption::AesGcm16, 20, Integrity::None, 0),
        suite(Encryption::AesGcm16, 28, Integrity::None, 0),
        suite(Encryption::ChaCha20Poly1305, 36, Integrity::None, 0),
        suite(Encryption::NullAuthAesGmac, 36, Integrity::None, 0),
        suite(Encryption::AesCbc, 24, Integrity::HmacSha2_384_192, 48),
        suite(Encryption::Null, 0, Integrity::HmacSha1_96, 20),
    ] {
        let key = EspKey::new(&esp).unwrap();
        let mut packet = [0xab; 64];
        let op = SealOp { key: (&key).into(), sequence: reserve(5), esn: false, packet: &mut packet };
        shown.push(format!("{esp:?} {esp:#?} {key:?} {key:#?} {op:?} {op:#?}"));
        let op = OpenOp {
            key: (&key).into(),
            sequence: 5,
            esn: false,
            packet: &mut packet,
            outcome: Outcome::Pending,
        };
        shown.push(format!("{op:?} {op:#?}"));
    }
    for ah in [
        suite(Encryption::Null, 0, Integrity::HmacSha2_256_128, 32),
        suite(Encryption::Null, 0, Integrity::AesGmac, 28),
    ] {
        let key = AhKey::new(&ah).unwrap();
        shown.push(format!("{ah:?} {key:?} {key:#?}"));
    }
    shown.push(format!("{:?} {:?}", engine(), SequenceCounter::new(5, 6, true)));
    let shown = shown.concat();
    let lower = shown.to_lowercase();
    assert!(!lower.contains("171") && !lower.contains("abab") && !lower.contains("ab, ab"), "{shown}");
    assert!(!lower.contains("0xab"), "{shown}");
}

/// A batch of many keys, with runs, singles and forgeries: each operation gets its own outcome.
#[test]
fn outcomes_stay_with_their_operations() {
    let keys: Vec<EspKey> = suites().iter().map(|(_, suite)| EspKey::new(suite).unwrap()).collect();
    // Runs of three packets of one key, then the keys one by one.
    let order: Vec<usize> = (0..64).map(|at| if at < 32 { at / 3 } else { at % keys.len() }).collect();
    let plain = bytes(48);
    let mut packets: Vec<Vec<u8>> = order
        .iter()
        .map(|at| {
            let Layout { iv_len, icv_len, .. } = keys[*at].layout();
            let fields = [vec![0; ESP_HEADER + usize::from(iv_len)], plain.clone(), vec![0; icv_len.into()]];
            fields.concat()
        })
        .collect();
    packets[7].pop();
    let mut ops: ArrayVec<SealOp<'_>, 64> = ArrayVec::new();
    for ((at, packet), sequence) in order.iter().zip(&mut packets).zip(1..) {
        ops.push(SealOp { key: (&keys[*at]).into(), sequence: reserve(sequence), esn: true, packet });
    }
    let outcomes = engine().seal(ops);
    assert_eq!(outcomes.len(), 64);
    for (at, outcome) in outcomes.iter().enumerate() {
        assert_eq!(*outcome, if at == 7 { SealOutcome::BadLength } else { SealOutcome::Sealed }, "{at}");
    }

    packets[11][20] ^= 1;
    packets[40].truncate(9);
    let mut ops: Vec<OpenOp<'_>> = order
        .iter()
        .zip(&mut packets)
        .zip(1..)
        .map(|((at, packet), sequence)| OpenOp {
            key: (&keys[*at]).into(),
            sequence,
            esn: true,
            packet,
            outcome: Outcome::Pending,
        })
        .collect();
    ops[20].outcome = Outcome::BadIcv;
    engine().open(&mut ops);
    for (at, op) in ops.iter().enumerate() {
        let expected = match at {
            // Not sealed; what is open by an AEAD has any length, so there it is the ICV that is wrong.
            7 => {
                assert!(matches!(op.outcome, Outcome::BadIcv | Outcome::BadLength));
                continue;
            }
            11 | 20 => Outcome::BadIcv,
            40 => Outcome::BadLength,
            _ => Outcome::Opened,
        };
        assert_eq!(op.outcome, expected, "{at}");
        if expected == Outcome::Opened {
            assert_eq!(text(op.key, op.packet), plain, "{at}");
        }
    }
    assert_ne!(text(ops[20].key, ops[20].packet), plain, "an operation that is not pending stays as it is");
}

/// DP-3: packets of one CBC key in one batch, which go through the cipher together, come out as they do one by one;
/// one of them has no length for it.
#[test]
fn dp_3_cbc_together_as_one_by_one() {
    for (encryption, len, integrity, _) in ANSWERS {
        if encryption != Encryption::AesCbc {
            continue;
        }
        let key = EspKey::new(&suite(encryption, len, integrity)).unwrap();
        for count in [2, 15, 16, 17, 40] {
            let texts: Vec<Vec<u8>> = (0..count).map(|n| bytes(16 * ((n * 29) % 91 + 1))).collect();
            let alone: Vec<Vec<u8>> =
                texts.iter().zip(1..).map(|(text, n)| seal(&key, n << 30, true, text).1).collect();
            let Layout { iv_len, icv_len, .. } = key.layout();
            let fields = |text: &Vec<u8>| {
                let iv = vec![0xa5; 4 + usize::from(iv_len)];
                [vec![1, 2, 3, 4], iv, text.clone(), vec![0xa5; icv_len.into()]].concat()
            };
            let mut packets: Vec<Vec<u8>> = texts.iter().map(fields).collect();
            packets[1].pop();
            let mut ops: ArrayVec<SealOp<'_>, 40> = ArrayVec::new();
            for (packet, n) in packets.iter_mut().zip(1..) {
                ops.push(SealOp { key: (&key).into(), sequence: reserve(n << 30), esn: true, packet });
            }
            let outcomes = engine().seal(ops);
            for (n, outcome) in outcomes.iter().enumerate() {
                let expected = if n == 1 { SealOutcome::BadLength } else { SealOutcome::Sealed };
                assert_eq!(*outcome, expected, "{integrity:?} {count} {n}");
                assert!(n == 1 || packets[n] == alone[n], "{integrity:?} {count} {n}");
            }
        }
    }
}

/// An empty batch is no error.
#[test]
fn empty_batches() {
    assert!(engine().seal::<0>(ArrayVec::new()).is_empty());
    engine().open(&mut []);
}

/// DP-3: whatever one backend seals, every other opens; with more keys in a batch than are kept expanded.
#[test]
fn dp_3_backends_agree() {
    let material = |n: u8| Suite {
        encryption: Encryption::AesGcm16,
        encryption_key: Secret::new(
            (0..[20, 28, 36][usize::from(n % 3)]).map(|at| at ^ n).collect::<Vec<u8>>(),
        ),
        integrity: Integrity::None,
        integrity_key: Secret::new(Vec::new()),
    };
    let keys: Vec<EspKey> = (0..40).map(|n| EspKey::new(&material(n)).unwrap()).collect();
    let backends: Vec<Backend> = [Backend::Ring, Backend::Vaes256, Backend::Vaes512]
        .into_iter()
        .filter(|backend| match Engine::select(*backend, 1) {
            Ok(engine) => engine.name() == backend.name(),
            Err(error) => {
                eprintln!("{} is not tested: {error}", backend.name());
                false
            }
        })
        .collect();
    for sealing in &backends {
        for opening in &backends {
            let texts: Vec<Vec<u8>> = (0..40).map(|n| bytes(4 + n * 36)).collect();
            let fields = |text: &Vec<u8>| [vec![1; ESP_HEADER + 8], text.clone(), vec![0xa5; 16]].concat();
            let mut packets: Vec<Vec<u8>> = texts.iter().map(fields).collect();
            let mut ops: ArrayVec<SealOp<'_>, 40> = ArrayVec::new();
            for ((key, packet), n) in keys.iter().zip(&mut packets).zip(1..) {
                ops.push(SealOp { key: key.into(), sequence: reserve(n << 31), esn: n % 2 == 0, packet });
            }
            let outcomes = Engine::select(*sealing, 4).unwrap().seal(ops);
            assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed));
            packets[17][30] ^= 1;
            let mut ops: Vec<OpenOp<'_>> = Vec::new();
            for ((key, packet), n) in keys.iter().zip(&mut packets).zip(1..) {
                let (sequence, esn) = (n << 31, n % 2 == 0);
                ops.push(OpenOp { key: key.into(), sequence, esn, packet, outcome: Outcome::Pending });
            }
            Engine::select(*opening, 4).unwrap().open(&mut ops);
            for (n, op) in ops.iter().enumerate() {
                let expected = if n == 17 { Outcome::BadIcv } else { Outcome::Opened };
                assert_eq!(op.outcome, expected, "{sealing:?} {opening:?} {n}");
                assert!(n == 17 || text(op.key, op.packet) == texts[n], "{sealing:?} {opening:?} {n}");
            }
        }
    }
}

/// DP-3: a backend that the processor lacks is an error that says what is missing; ring is always there.
#[test]
fn dp_3_choice_of_backend() {
    assert_eq!(Engine::select(Backend::Ring, 1).unwrap().name(), "ring");
    assert!(Engine::select(Backend::Auto, 1).is_ok());
    for backend in [Backend::Vaes256, Backend::Vaes512] {
        match Engine::select(backend, 1) {
            Ok(engine) => assert_eq!(engine.name(), backend.name()),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("the processor lacks") && text.contains(backend.name()), "{text}");
            }
        }
    }
}

/// DP-3: a copy of a key seals and opens as the key does, whatever serves it; only keys of AES-128-GCM are copied.
#[test]
fn dp_3_a_copy_of_a_key_is_the_key() {
    let mut copied = Vec::new();
    for (name, suite) in suites() {
        let key = EspKey::new(&suite).unwrap();
        let mut copy = ShortKey::VACANT;
        copy.copy(&key);
        if copy.is_vacant() {
            continue;
        }
        copied.push((suite.encryption, suite.encryption_key.expose().len()));
        let plain = bytes(68);
        let (_, sealed) = seal(&key, 9, true, &plain);
        for mut engine in [engine(), Engine::select(Backend::Ring, 1).unwrap()] {
            let mut packet = sealed.clone();
            let op = |packet| OpenOp {
                key: KeyRef::Short(&copy),
                sequence: 9,
                esn: true,
                packet,
                outcome: Outcome::Pending,
            };
            let mut ops = [op(&mut packet)];
            engine.open(&mut ops);
            assert_eq!(ops[0].outcome, Outcome::Opened, "{name}");
            assert_eq!(text(ops[0].key, ops[0].packet), plain, "{name}");
            let mut ops = ArrayVec::<_, 1>::new();
            let sequence = reserve(9);
            ops.push(SealOp { key: KeyRef::Short(&copy), sequence, esn: true, packet: &mut packet });
            assert_eq!(engine.seal(ops).as_slice(), [SealOutcome::Sealed]);
            assert_eq!(packet, sealed, "{name}");
        }
        copy.vacate();
        assert!(copy.is_vacant());
    }
    assert_eq!(copied, [(Encryption::AesGcm16, 20)]);
}

proptest! {
    /// DP-3: whatever keys come one behind the other, for texts short and long, with however little room for what is
    /// expanded of them: each packet is sealed with its own key.
    #[test]
    fn dp_3_keys_are_never_mistaken(
        slots in 1_usize..6,
        batches in prop::collection::vec(
            prop::collection::vec((0_u8..40, prop::sample::select(vec![4_usize, 68, 96, 100, 132, 1424])), 1..64),
            1..6,
        ),
    ) {
        let keys: Vec<EspKey> = (0..40)
            .map(|seed: u8| {
                let len = [20, 20, 36, 28][usize::from(seed % 4)];
                let encryption_key = Secret::new(vec![seed; len]);
                let integrity_key = Secret::empty();
                let (encryption, integrity) = (Encryption::AesGcm16, Integrity::None);
                EspKey::new(&Suite { encryption, encryption_key, integrity, integrity_key }).unwrap()
            })
            .collect();
        let mut engine = Engine::select(crate::testbed::backend(), slots).unwrap();
        let mut other = Engine::select(Backend::Ring, 4).unwrap();
        let mut sequence = 0;
        for batch in batches {
            let packet = |len: usize| [vec![1; ESP_HEADER + 8], bytes(len), vec![0; 16]].concat();
            let mut ours: Vec<Vec<u8>> = batch.iter().map(|(_, len)| packet(*len)).collect();
            let mut theirs = ours.clone();
            for (engine, packets) in [(&mut engine, &mut ours), (&mut other, &mut theirs)] {
                let mut ops = ArrayVec::<SealOp<'_>, 64>::new();
                for (((key, _), packet), number) in batch.iter().zip(packets).zip(1..) {
                    let key = (&keys[usize::from(*key)]).into();
                    ops.push(SealOp { key, sequence: reserve(sequence + number), esn: true, packet });
                }
                prop_assert!(engine.seal(ops).iter().all(|outcome| *outcome == SealOutcome::Sealed));
            }
            prop_assert_eq!(&ours, &theirs);
            sequence += 64;
        }
        for key in &keys {
            engine.forget(key.serial().unwrap());
        }
        prop_assert_eq!(engine.expanded(), 0);
    }
}

/// A batch takes in as many packets as it has outcomes for; what is one too many is left as it is, and can be taken in when
/// the batch is finished.
#[test]
fn dp_3_a_batch_has_an_end() {
    let mut engine = engine();
    for (name, suite) in suites() {
        let key = EspKey::new(&suite).unwrap();
        let Layout { iv_len, icv_len, block } = key.layout();
        let len = ESP_HEADER + usize::from(iv_len) + 4 * usize::from(block) + usize::from(icv_len);
        let mut packets = vec![vec![0xa5; len]; 40];
        let mut sealing = engine.sealing::<33>();
        for (number, packet) in (1..).zip(&mut packets) {
            sealing.push(SealOp { key: (&key).into(), sequence: reserve(number), esn: true, packet });
        }
        assert_eq!(sealing.finish().as_slice(), [SealOutcome::Sealed; 33], "{name}");
        assert!(sealing.finish().is_empty());
        drop(sealing);
        assert!(packets.iter().skip(33).all(|packet| *packet == vec![0xa5; len]), "{name}");
        let before = packets.clone();
        let mut opening = engine.opening::<32>();
        for (sequence, packet) in (1..).zip(&mut packets) {
            let outcome = Outcome::Pending;
            opening.push(OpenOp { key: (&key).into(), sequence, esn: true, packet, outcome });
        }
        assert_eq!(opening.finish().as_slice(), [Outcome::Opened; 32], "{name}");
        drop(opening);
        assert_eq!(packets[32..], before[32..], "{name}");
    }
}
