//! What must not open, and what must not be sealed.

use proptest::prelude::*;

use super::*;

/// What stays in a packet that did not open: the ciphertext as it came, or zeros.
fn assert_no_plaintext(key: &EspKey, name: &str, received: &[u8], after: &[u8]) {
    let (received, after) = (text(key, received), text(key, after));
    assert!(after == received || after.iter().all(|byte| *byte == 0), "{name}");
}

/// DP-3: each bit of SPI, sequence number, IV, ciphertext and ICV is under the ICV.
#[test]
fn dp_3_every_flip_is_a_bad_icv() {
    for (name, suite) in suites() {
        let key = EspKey::new(&suite).unwrap();
        for esn in [false, true] {
            let sequence = if esn { 0x1_0000_0007 } else { 7 };
            let plain = bytes(32);
            let (outcome, packet) = seal(&key, sequence, esn, &plain);
            assert_eq!(outcome, SealOutcome::Sealed, "{name}");
            assert_eq!(packet[..8], [1, 2, 3, 4, 0, 0, 0, 7], "{name}: the number is in the header");
            for at in 0..packet.len() {
                for bit in [0x01, 0x80] {
                    let mut forged = packet.clone();
                    forged[at] ^= bit;
                    let (outcome, after) = open(&key, sequence, esn, &forged);
                    assert_eq!(outcome, Outcome::BadIcv, "{name} esn {esn} byte {at}");
                    assert_no_plaintext(&key, &name, &forged, &after);
                }
            }
            let (outcome, packet) = open(&key, sequence, esn, &packet);
            assert_eq!((outcome, text(&key, &packet)), (Outcome::Opened, &plain[..]), "{name} esn {esn}");
        }
    }
}

/// DP-4: the high half of an extended sequence number is not in the packet and yet authenticated.
#[test]
fn dp_4_wrong_high_half_is_a_bad_icv() {
    for (name, suite) in suites() {
        let key = EspKey::new(&suite).unwrap();
        let (_, packet) = seal(&key, 0x2_0000_0005, true, &bytes(48));
        for wrong in [5, 0x1_0000_0005, 0x3_0000_0005, 0x8000_0002_0000_0005] {
            let (outcome, after) = open(&key, wrong, true, &packet);
            assert_eq!(outcome, Outcome::BadIcv, "{name} {wrong:#x}");
            assert_no_plaintext(&key, &name, &packet, &after);
        }
        assert_eq!(open(&key, 0x2_0000_0005, false, &packet).0, Outcome::BadIcv, "{name} without ESN");
        assert_eq!(open(&key, 0x2_0000_0005, true, &packet).0, Outcome::Opened, "{name}");
        // Without ESN there is no high half; what the caller has there does not matter.
        let (_, packet) = seal(&key, 5, false, &bytes(48));
        assert_eq!(open(&key, 0x1_0000_0005, false, &packet).0, Outcome::Opened, "{name}");
        assert_eq!(open(&key, 5, true, &packet).0, Outcome::BadIcv, "{name} with ESN");
    }
}

/// A packet of another key, or of another suite with the same key, does not open.
#[test]
fn other_keys_do_not_open() {
    let all = suites();
    let keys: Vec<EspKey> = all.iter().map(|(_, suite)| EspKey::new(suite).unwrap()).collect();
    for (sealer, (name, suite)) in keys.iter().zip(&all) {
        let plain = bytes(48);
        let (_, packet) = seal(sealer, 9, false, &plain);
        for (opener, (other, with)) in keys.iter().zip(&all) {
            let (outcome, opened) = open(opener, 9, false, &packet);
            // RFC 4303 section 3.3.2.1: the ICV is over the ciphertext, so with HMAC its key alone decides what opens.
            let same_mac = suite.integrity != Integrity::None && suite.integrity == with.integrity;
            assert_eq!(
                outcome == Outcome::Opened,
                same_mac || name == other,
                "{name} by {other}: {outcome:?}"
            );
            if outcome == Outcome::Opened {
                assert_eq!(text(opener, &opened) == plain, name == other, "{name} by {other}");
            }
        }
        // The salt is a part of the key: the last byte of the keying material counts.
        let changed = |key: &Secret| {
            let mut bytes = key.expose().to_vec();
            if let Some(last) = bytes.last_mut() {
                *last ^= 1;
            }
            Secret::new(bytes)
        };
        let other = Suite {
            encryption: suite.encryption,
            encryption_key: changed(&suite.encryption_key),
            integrity: suite.integrity,
            integrity_key: changed(&suite.integrity_key),
        };
        assert_eq!(open(&EspKey::new(&other).unwrap(), 9, false, &packet).0, Outcome::BadIcv, "{name}");
    }
}

/// DP-3: a length that no packet of the suite has is an outcome and changes nothing.
#[test]
fn dp_3_wrong_lengths() {
    for (name, suite) in suites() {
        let key = EspKey::new(&suite).unwrap();
        let Layout { iv_len, icv_len, block } = key.layout();
        let fields = ESP_HEADER + usize::from(iv_len) + usize::from(icv_len);
        for esn in [false, true] {
            for len in 0..fields + 50 {
                let packet = bytes(len);
                let inner = len.checked_sub(fields);
                let opens = if block == 16 {
                    inner.is_some_and(|inner| inner > 0 && inner % 16 == 0)
                } else {
                    inner.is_some_and(|inner| inner >= TRAILER)
                };
                let (outcome, after) = open(&key, 1, esn, &packet);
                let expected = if opens { Outcome::BadIcv } else { Outcome::BadLength };
                assert_eq!(outcome, expected, "{name} esn {esn} open {len}");
                assert!(opens || packet == after, "{name} esn {esn} open {len}: changed");

                let mut sealed = packet.clone();
                let mut batch: ArrayVec<SealOp<'_>, 1> = ArrayVec::new();
                batch.push(SealOp { key: (&key).into(), sequence: reserve(1), esn, packet: &mut sealed });
                let seals = inner.is_some_and(|inner| inner > 0 && inner % usize::from(block) == 0);
                let expected = if seals { SealOutcome::Sealed } else { SealOutcome::BadLength };
                assert_eq!(engine().seal(batch)[0], expected, "{name} esn {esn} seal {len}");
            }
        }
    }
}

/// A packet whose ICV is right opens at lengths that we would not send: padding is its sender's business.
#[test]
fn aead_opens_lengths_off_four() {
    for (name, suite) in suites().into_iter().filter(|(_, suite)| suite.encryption == Encryption::AesGcm16) {
        let key = EspKey::new(&suite).unwrap();
        let Kind::Aead(aead) = &key.0 else { panic!("{name}") };
        for len in [2, 3, 5, 17, 31] {
            let plain = bytes(len);
            let mut packet = [vec![0; 16], plain.clone(), vec![0; TAG]].concat();
            seal_aead(&aead.expand(&mut engine().keys).unwrap(), [9; 8], None, &mut packet).unwrap();
            let (outcome, packet) = open(&key, 0, false, &packet);
            assert_eq!((outcome, text(&key, &packet)), (Outcome::Opened, &plain[..]), "{name} {len}");
        }
    }
}

/// RFC 3602 section 3: CBC's IV is unpredictable: it is not the counter and no two are alike.
#[test]
fn dp_3_cbc_ivs_differ_in_half_of_their_bits() {
    let key = EspKey::new(&suite(Encryption::AesCbc, 16, Integrity::HmacSha2_256_128)).unwrap();
    let ivs: Vec<u128> = (1..=256)
        .map(|sequence| {
            let (_, packet) = seal(&key, sequence, false, &bytes(16));
            u128::from_be_bytes(packet[8..24].try_into().unwrap())
        })
        .collect();
    let flips: u32 = ivs.windows(2).map(|pair| (pair[0] ^ pair[1]).count_ones()).sum();
    let mean = f64::from(flips) / 255.0;
    assert!((60.0..68.0).contains(&mean), "neighbours differ in {mean} of 128 bits");
}

/// RFC 4106 section 3.1: the IV of an AEAD is the whole sequence number, so no nonce comes twice under a key.
#[test]
fn dp_3_aead_iv_is_the_sequence_number() {
    for (name, suite) in suites() {
        let key = EspKey::new(&suite).unwrap();
        if key.layout().iv_len != 8 {
            continue;
        }
        for (sequence, esn) in [(1, false), (0xffff_ffff, false), (0x1_0000_0000, true), (u64::MAX - 1, true)]
        {
            let (_, packet) = seal(&key, sequence, esn, &bytes(8));
            assert_eq!(packet[8..16], sequence.to_be_bytes(), "{name}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// DP-3: what is sealed opens to the same bytes, for every suite, number and length; one flipped bit anywhere and
    /// it does not.
    #[test]
    fn dp_3_seal_then_open_is_identity(
        which in 0..ANSWERS.len(),
        sequence in prop_oneof![1_u64..100, any::<u32>().prop_map(|low| u64::from(low).max(1)), 1..u64::MAX - 1],
        blocks in 1_usize..96,
        seed in any::<u8>(),
        flip in any::<prop::sample::Index>(),
        bit in 0_u8..8,
    ) {
        let (encryption, len, integrity, _) = ANSWERS[which];
        let key = EspKey::new(&suite(encryption, len, integrity)).unwrap();
        let esn = sequence > u64::from(u32::MAX) || seed & 1 == 0;
        let plain: Vec<u8> =
            bytes(blocks * usize::from(key.layout().block)).iter().map(|byte| byte ^ seed).collect();
        let (outcome, packet) = seal(&key, sequence, esn, &plain);
        prop_assert_eq!(outcome, SealOutcome::Sealed);
        let (outcome, opened) = open(&key, sequence, esn, &packet);
        prop_assert_eq!(outcome, Outcome::Opened);
        prop_assert_eq!(text(&key, &opened), &plain[..]);
        let mut forged = packet;
        let at = flip.index(forged.len());
        forged[at] ^= 1 << bit;
        prop_assert_eq!(open(&key, sequence, esn, &forged).0, Outcome::BadIcv);
    }

    /// No bytes make it panic, and none open.
    #[test]
    fn arbitrary_bytes_never_open(
        which in 0..ANSWERS.len(),
        packet in prop::collection::vec(any::<u8>(), 0..200),
        sequence in any::<u64>(),
        esn in any::<bool>(),
    ) {
        let (encryption, len, integrity, _) = ANSWERS[which];
        let key = EspKey::new(&suite(encryption, len, integrity)).unwrap();
        let (outcome, _) = open(&key, sequence, esn, &packet);
        prop_assert!(matches!(outcome, Outcome::BadIcv | Outcome::BadLength));
    }
}
