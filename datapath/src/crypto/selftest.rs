//! The known-answer test that a backend has to pass before it gets a packet (DESIGN decision 6).
//!
//! One packet with an extended sequence number for every suite. Every ICV covers the ciphertext, so the first 12
//! bytes of the ICV are the answer to the whole of it. The answers come from another implementation (OpenSSL, through
//! Python's `cryptography`). A vector kernel has to agree with ring besides, on texts of many lengths: some of them run on
//! processors on which they were never tested.

use arrayvec::ArrayVec;
use postern_contract::sa::{Encryption, Integrity, Suite};
use postern_contract::secret::Secret;
use postern_espgcm::{EspPacket, HEADER, Kernel, Key, Lacking, TAG, Verdict};
use ring::aead::{AES_128_GCM, AES_256_GCM, LessSafeKey, Nonce, UnboundKey};

use super::{ESP_HEADER, Engine, EspKey, OpenOp, Outcome, SealOp, SealOutcome, SequenceCounter};

/// The backend gave a wrong answer; no packet may be trusted to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the crypto backend {backend} fails its self test for {encryption:?} (key of {key_len} bytes) with {integrity:?}"
)]
pub struct SelfTestError {
    backend: &'static str,
    encryption: Encryption,
    key_len: u8,
    integrity: Integrity,
}

/// There is nothing to protect packets with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A backend was asked for by name that this processor cannot run.
    #[error("{0}; choose crypto.backend = \"auto\"")]
    Unavailable(Lacking),
    /// Wrong answers, and nothing else is left.
    #[error("cryptography self-test failed: {0}")]
    SelfTest(#[from] SelfTestError),
}

impl SelfTestError {
    /// The key that is written over others is not to be had.
    pub(super) const fn no_keys() -> Self {
        Self { backend: "ring", encryption: Encryption::AesGcm16, key_len: 32, integrity: Integrity::None }
    }
}

/// The full number of the test's packet.
const SEQUENCE: u64 = 0x0123_4567_89ab_cdef;

/// Length of the plaintext, a multiple of every block; its bytes count up from 0x40.
const TEXT: u8 = 48;

/// Every suite of ESP: transform, length of its key with the salt, integrity, first 12 bytes of the ICV. Keys are 1, 2, 3, …
#[rustfmt::skip]
pub(super) const ANSWERS: [(Encryption, u8, Integrity, u128); 23] = [
    (Encryption::AesGcm16, 20, Integrity::None, 0xb994_522f_fd55_e0dd_6da8_c695),
    (Encryption::NullAuthAesGmac, 20, Integrity::None, 0x0765_ca29_fdd5_33c0_511b_c085),
    (Encryption::AesGcm16, 28, Integrity::None, 0x789a_dfd4_dba3_bd46_afb6_0438),
    (Encryption::NullAuthAesGmac, 28, Integrity::None, 0x1f4d_dbad_7072_05d8_2428_4a52),
    (Encryption::AesGcm16, 36, Integrity::None, 0x35d5_429f_25c2_7ef5_c291_d5c1),
    (Encryption::NullAuthAesGmac, 36, Integrity::None, 0xda03_aa1a_0bd7_4050_62b1_2995),
    (Encryption::ChaCha20Poly1305, 36, Integrity::None, 0x2836_63cc_fe82_ad91_bdfb_bf88),
    (Encryption::AesCbc, 16, Integrity::HmacSha1_96, 0x1a13_ee0a_2e24_ef9e_12a2_e3f4),
    (Encryption::AesCbc, 24, Integrity::HmacSha1_96, 0x2066_4f97_5612_4848_48b5_83f7),
    (Encryption::AesCbc, 32, Integrity::HmacSha1_96, 0x31eb_b44b_03e2_7656_7ff4_565b),
    (Encryption::Null, 0, Integrity::HmacSha1_96, 0xc56f_d9c9_7d3d_699b_9a30_b390),
    (Encryption::AesCbc, 16, Integrity::HmacSha2_256_128, 0x6e18_77e4_1827_dd4d_6fd7_4aba),
    (Encryption::AesCbc, 24, Integrity::HmacSha2_256_128, 0x2924_133f_b3ec_b564_c9ca_56ac),
    (Encryption::AesCbc, 32, Integrity::HmacSha2_256_128, 0xc369_8910_ebc8_7843_90b2_1fd9),
    (Encryption::Null, 0, Integrity::HmacSha2_256_128, 0xb805_b978_9ac2_c2de_fee2_c1e7),
    (Encryption::AesCbc, 16, Integrity::HmacSha2_384_192, 0x101a_204d_b288_0f52_4ef4_7031),
    (Encryption::AesCbc, 24, Integrity::HmacSha2_384_192, 0x80bd_3989_c3c1_8b2f_d2a1_6359),
    (Encryption::AesCbc, 32, Integrity::HmacSha2_384_192, 0x6200_42b3_fda3_73c9_3ccc_22aa),
    (Encryption::Null, 0, Integrity::HmacSha2_384_192, 0x83df_3bb1_b734_7d8d_66cd_9f6a),
    (Encryption::AesCbc, 16, Integrity::HmacSha2_512_256, 0x9824_564a_dcc0_fbf5_beef_c55a),
    (Encryption::AesCbc, 24, Integrity::HmacSha2_512_256, 0xd19e_990b_a521_0fb1_fada_3b56),
    (Encryption::AesCbc, 32, Integrity::HmacSha2_512_256, 0x1d0b_d52f_9b48_2545_56e9_b528),
    (Encryption::Null, 0, Integrity::HmacSha2_512_256, 0x9b47_c6c5_62dc_72ba_806e_c1f1),
];

/// Lengths of text on which a kernel is compared with ring: every number of blocks, full and not, on both sides of a chunk
/// of either width, and packets of usual sizes up to a jumbo frame, where the counter carries.
const LENGTHS: [core::ops::RangeInclusive<usize>; 4] = [0..=300, 530..=580, 1408..=1430, 8992..=9000];

/// Compares a kernel with ring, for AES-128 and AES-256, on texts of [`LENGTHS`]: what it seals, what it opens, and that a
/// changed bit does not open and leaves no plaintext. The answers of AES-192 are among [`ANSWERS`] alone.
pub(super) fn compare(kernel: Kernel) -> Result<(), SelfTestError> {
    for (algorithm, key_len) in [(&AES_128_GCM, 16), (&AES_256_GCM, 32)] {
        let bytes: ArrayVec<u8, 32> = (1..=key_len).collect();
        let agrees = || {
            let reference = LessSafeKey::new(UnboundKey::new(algorithm, &bytes).ok()?);
            let mut key = Key::blank();
            kernel.expand(&bytes, &mut key).ok()?;
            LENGTHS.into_iter().flatten().try_for_each(|len| agree(kernel, &key, &reference, len))
        };
        if agrees().is_none() {
            let (encryption, integrity) = (Encryption::AesGcm16, Integrity::None);
            return Err(SelfTestError { backend: kernel.level().name(), encryption, key_len, integrity });
        }
    }
    Ok(())
}

/// Whether both do the same with a text of `len` bytes.
fn agree(kernel: Kernel, key: &Key, reference: &LessSafeKey, len: usize) -> Option<()> {
    let text = || (0..len).map(|at| at.to_le_bytes()[0] ^ 0x5a);
    let header: [u8; HEADER] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
    // RFC 4106 sections 4 and 5: what salt, header and the high half of an extended number become.
    let nonce = [17, 18, 19, 20, 9, 10, 11, 12, 13, 14, 15, 16];
    let (high, aad): (_, &[u8]) = if len.is_multiple_of(2) {
        (None, &[1, 2, 3, 4, 5, 6, 7, 8])
    } else {
        (Some(0x1516_1718), &[1, 2, 3, 4, 0x15, 0x16, 0x17, 0x18, 5, 6, 7, 8])
    };
    let mut sealed: Vec<u8> = text().collect();
    let number = Nonce::assume_unique_for_key(nonce);
    reference.seal_in_place_append_tag(number, ring::aead::Aad::from(aad), &mut sealed).ok()?;

    let mut buffer: Vec<u8> = header.into_iter().chain(text()).chain([0xa5; TAG]).collect();
    let run = |buffer: &mut Vec<u8>, call: fn(Kernel, &[Key], &mut [EspPacket<'_>])| {
        let packet =
            EspPacket { key: 0, salt: [17, 18, 19, 20], high, bytes: buffer, verdict: Verdict::Pending };
        let mut batch = [packet];
        call(kernel, core::slice::from_ref(key), &mut batch);
        let [packet] = batch;
        packet.verdict
    };
    (run(&mut buffer, Kernel::seal_esp) == Verdict::Done).then_some(())?;
    (buffer.split_off(HEADER) == sealed && buffer == header).then_some(())?;
    buffer.extend_from_slice(&sealed);
    let mut forged = buffer.clone();
    *forged.get_mut(HEADER + len * 3 / 4)? ^= 0x10;
    (run(&mut forged, Kernel::open_esp) == Verdict::BadTag).then_some(())?;
    forged.get(HEADER..HEADER + len)?.iter().all(|byte| *byte == 0).then_some(())?;
    (run(&mut buffer, Kernel::open_esp) == Verdict::Done).then_some(())?;
    buffer.get(HEADER..HEADER + len)?.iter().copied().eq(text()).then_some(())
}

/// Seals the packet with every suite, compares, opens it, and sees that a changed one does not open.
pub(super) fn run(engine: &mut Engine) -> Result<(), SelfTestError> {
    for (encryption, key_len, integrity, answer) in ANSWERS {
        if passes(engine, encryption, key_len, integrity, answer).is_none() {
            return Err(SelfTestError { backend: engine.name(), encryption, key_len, integrity });
        }
    }
    Ok(())
}

/// Whether one suite gives its answer.
fn passes(
    engine: &mut Engine,
    encryption: Encryption,
    key_len: u8,
    integrity: Integrity,
    answer: u128,
) -> Option<()> {
    let suite = suite(encryption, key_len, integrity);
    let key = EspKey::new(&suite).ok()?;
    let layout = key.layout();
    let mut packet: ArrayVec<u8, 128> = ArrayVec::new();
    packet.extend([1, 2, 3, 4, 0, 0, 0, 0]);
    packet.extend((0..layout.iv_len).map(|_| 0xa5));
    packet.extend(0x40..0x40 + TEXT);
    packet.extend((0..layout.icv_len).map(|_| 0xa5));

    let sequence = SequenceCounter::new(SEQUENCE, u64::MAX, true).reserve().ok()?;
    let mut batch: ArrayVec<SealOp<'_>, 1> = ArrayVec::new();
    batch.push(SealOp { key: (&key).into(), sequence, esn: true, packet: &mut packet });
    (engine.seal(batch).first() == Some(&SealOutcome::Sealed)).then_some(())?;
    let icv = packet.get(packet.len().checked_sub(layout.icv_len.into())?..)?.first_chunk::<12>()?;
    (answer.to_be_bytes().last_chunk() == Some(icv)).then_some(())?;

    let mut forged = packet.clone();
    *forged.get_mut(ESP_HEADER + usize::from(layout.iv_len))? ^= 0x80;
    let op = |packet| OpenOp {
        key: (&key).into(),
        sequence: SEQUENCE,
        esn: true,
        packet,
        outcome: Outcome::Pending,
    };
    let mut batch = [op(&mut forged), op(&mut packet)];
    engine.open(&mut batch);
    let [forgery, genuine] = batch;
    if let Some(serial) = key.serial() {
        engine.forget(serial);
    }
    (forgery.outcome == Outcome::BadIcv && genuine.outcome == Outcome::Opened).then_some(())?;
    let text = packet.get(ESP_HEADER + usize::from(layout.iv_len)..)?;
    text.iter().zip(0x40..0x40 + TEXT).all(|(got, sent)| *got == sent).then_some(())
}

pub(super) fn suite(encryption: Encryption, key_len: u8, integrity: Integrity) -> Suite {
    let integrity_len = match integrity {
        Integrity::None | Integrity::AesGmac => 0,
        Integrity::HmacSha1_96 => 20,
        Integrity::HmacSha2_256_128 => 32,
        Integrity::HmacSha2_384_192 => 48,
        Integrity::HmacSha2_512_256 => 64,
    };
    let secret = |len: u8| Secret::new((1..=len).collect::<Vec<u8>>());
    Suite { encryption, encryption_key: secret(key_len), integrity, integrity_key: secret(integrity_len) }
}
