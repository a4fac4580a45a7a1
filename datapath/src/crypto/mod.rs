//! The crypto seam (DP-3): ESP packets are sealed and opened in batches, with an outcome each (DESIGN decision 6).
//!
//! [`Engine::select`] picks the implementation once at start, after a known-answer test of every suite, for one worker:
//! for AES-GCM a kernel of our own where the processor has VAES (see `vector`), otherwise ring and the `aes` crate. A
//! kernel that gives a wrong answer is not used, and an error is logged.
//! [`Engine::seal`] and [`Engine::open`] take a batch; packets of one SA that stand next to each other form a
//! *run*, for which a key is made ready once.
//!
//! The packet of an operation is, for every suite, contiguous:
//!
//! ```text
//! SPI (4) | sequence (4) | IV (Layout::iv_len) | payload, padding, trailer | ICV (Layout::icv_len)
//! ```
//!
//! Authenticated are, in the words of RFC 4303, the "SPI, Sequence Number, Payload Data, Padding, Pad Length, Next
//! Header"; with extended sequence numbers the high 32 bits of the number as well, in the place where each transform
//! wants them. The SPI in the packet is the *authenticated* one (DESIGN decision 1); a relay's translation is applied
//! outside the seam.
//!
//! A sequence number seals once: [`SealOp`] owns the [`Reserved`] number, and [`Engine::seal`] takes it by value.
//! AEAD IVs are the 64-bit number (RFC 4106 section 3.1: "The IV … can be … a counter").
//!
//! An SA has its AEAD key as it was derived; what is expanded of it is the worker's and bounded ([`Engine::forget`] when
//! the SA goes). Keys are wiped as far as the libraries let us (OPS-4): what is ours is zeroed; over ring's keys, which
//! do not wipe themselves, the schedule of another key is written. Copies that the compiler made on the stack when it
//! moved a key, and registers, are out of reach.
#![forbid(unsafe_code)]

mod aead;
mod ah;
mod cache;
mod cbc;
mod check;
mod mac;
mod selftest;
pub mod sequence;
mod vector;

#[cfg(test)]
mod tests;

use core::fmt;

use arrayvec::ArrayVec;
use postern_contract::sa::{Encryption, IpsecProtocol, Suite, SuiteError};
use postern_contract::settings::Backend;
use postern_espgcm::{Kernel, Verdict};
use ring::aead::LessSafeKey;

pub use self::aead::ShortKey;
pub use self::ah::AhKey;
pub use self::cache::Serial;
pub use self::check::{fingerprint, key_check, window_name};
pub use self::selftest::{EngineError, SelfTestError};
pub use self::sequence::{ReserveError, Reserved, SequenceCounter};

use self::aead::{Aead, AeadKey, Gcm, TAG};
use self::cache::KeyCache;
use self::cbc::{BLOCK, CbcKey, Decryptor, Encryptor};
use self::mac::MacKey;
use self::vector::{Group, Vector};

/// Length of the ESP header: SPI and sequence number.
pub const ESP_HEADER: usize = 8;

/// Pad Length and Next Header: the least that is under the ICV besides the header.
const TRAILER: usize = 2;

/// Packets that [`Engine::open`] opens at once.
const BATCH: usize = 64;

/// What a suite adds to a packet, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Length of the IV behind the ESP header.
    pub iv_len: u8,
    /// Length of the ICV at the end.
    pub icv_len: u8,
    /// Payload, padding and trailer together are a multiple of this (RFC 4303 section 2.4): 4, or the cipher's block.
    pub block: u8,
}

impl Layout {
    /// Of AES-GCM (RFC 4106), ChaCha20-Poly1305 (RFC 7634) and GMAC (RFC 4543).
    const GCM: Self = Self { iv_len: 8, icv_len: 16, block: 4 };
}

/// The key of one ESP SA, which is one direction.
pub struct EspKey(Kind);

enum Kind {
    /// RFC 4106, RFC 7634, and `ENCR_NULL_AUTH_AES_GMAC` (RFC 4543).
    Aead(AeadKey),
    /// Encrypt, then authenticate (RFC 4303 section 3.3.2.1). Boxed: with the states of the HMAC it is four times as large
    /// as an AEAD's key, and computing the HMAC takes longer than fetching it.
    Cbc(Box<(CbcKey, MacKey)>),
    /// RFC 2410.
    Null(Box<MacKey>),
}

// 1,000,000 SAs have to fit in 1 GiB with everything else that belongs to them.
const _: () = assert!(size_of::<EspKey>() == 48);

/// Expanded keys of ring's that a worker keeps: 2.3 MB. With more SAs than this in use at the same time, some packets pay
/// for expanding a key.
const RING_SLOTS: usize = 4096;

/// One packet to seal.
pub struct SealOp<'a> {
    /// The SA's key.
    pub key: KeyRef<'a>,
    /// The packet's number. Its low half is written to the header.
    pub sequence: Reserved,
    /// Whether the SA has extended sequence numbers.
    pub esn: bool,
    /// The packet from the ESP header to the end of the ICV. SPI and plaintext are there; the number, IV and ICV are
    /// written, the plaintext is replaced.
    pub packet: &'a mut [u8],
}

/// What became of a [`SealOp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a packet that is not sealed must not be sent"]
pub enum SealOutcome {
    /// The packet may be sent.
    Sealed,
    /// The packet is shorter than the suite's fields or the plaintext is no multiple of [`Layout::block`]. It may
    /// hold plaintext and must not be sent.
    BadLength,
}

/// One packet to open.
pub struct OpenOp<'a> {
    /// The SA's key.
    pub key: KeyRef<'a>,
    /// The full number: the packet's with the recovered high half (RFC 4303 appendix A2).
    pub sequence: u64,
    /// Whether the SA has extended sequence numbers.
    pub esn: bool,
    /// The packet from the ESP header to the end of the ICV.
    pub packet: &'a mut [u8],
    /// `Pending` before, anything else after [`Engine::open`].
    pub outcome: Outcome,
}

/// What became of an [`OpenOp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not looked at yet.
    Pending,
    /// The ICV is right; the plaintext stands in place, `packet.len() - 8 - iv_len - icv_len` bytes from `8 + iv_len`.
    Opened,
    /// The ICV is wrong. The packet holds ciphertext or zeros, no plaintext that was not there before.
    BadIcv,
    /// Shorter than the suite's fields with a trailer, or no whole number of cipher blocks. The packet is untouched.
    BadLength,
}

/// What one worker seals and opens with: the implementations that the machine got, and expanded keys.
pub struct Engine {
    /// For AES-GCM.
    vector: Option<Vector>,
    /// ring's keys. ring serves all AEADs but AES-192-GCM, and HMAC; the `aes` crate CBC and AES-192-GCM.
    keys: KeyCache<LessSafeKey>,
}

impl EspKey {
    /// Takes the keys of `suite`, which has to be one of ESP.
    pub fn new(suite: &Suite) -> Result<Self, SuiteError> {
        suite.validate(IpsecProtocol::Esp)?;
        let Suite { encryption, encryption_key, integrity, integrity_key } = suite;
        let key = encryption_key.expose();
        let mac = || MacKey::new(*integrity, integrity_key.expose());
        let kind = match encryption {
            Encryption::Null => mac().map(Box::new).map(Kind::Null),
            Encryption::AesCbc => CbcKey::new(key).zip(mac()).map(Box::new).map(Kind::Cbc),
            Encryption::AesGcm16 | Encryption::ChaCha20Poly1305 | Encryption::NullAuthAesGmac => {
                AeadKey::new(*encryption, key).map(Kind::Aead)
            }
        };
        // Not reached: `validate` admits only what the constructors take.
        kind.map(Self).ok_or(SuiteError::Combination(*encryption, *integrity, IpsecProtocol::Esp))
    }

    /// Names the key where it stands expanded; `None` of a transform that is not.
    pub fn serial(&self) -> Option<Serial> {
        match &self.0 {
            Kind::Aead(key) => Some(key.serial()),
            Kind::Cbc(_) | Kind::Null(_) => None,
        }
    }

    /// What the suite adds to a packet.
    pub fn layout(&self) -> Layout {
        match &self.0 {
            Kind::Aead(_) => Layout::GCM,
            Kind::Cbc(keys) => Layout { iv_len: 16, icv_len: keys.1.icv_len(), block: 16 },
            Kind::Null(mac) => Layout { iv_len: 0, icv_len: mac.icv_len(), block: 4 },
        }
    }
}

/// An SA's key, wherever it is.
#[derive(Clone, Copy, Debug)]
pub enum KeyRef<'a> {
    /// As the SA was given it.
    Whole(&'a EspKey),
    /// A copy, which is not vacant.
    Short(&'a ShortKey),
}

impl<'a> From<&'a EspKey> for KeyRef<'a> {
    fn from(key: &'a EspKey) -> Self {
        Self::Whole(key)
    }
}

impl<'a> KeyRef<'a> {
    /// What the suite adds to a packet.
    pub fn layout(self) -> Layout {
        match self {
            Self::Whole(key) => key.layout(),
            Self::Short(_) => Layout::GCM,
        }
    }

    /// Whether both are the same place.
    fn is(self, other: Self) -> bool {
        match (self, other) {
            (Self::Whole(a), Self::Whole(b)) => core::ptr::eq(a, b),
            (Self::Short(a), Self::Short(b)) => core::ptr::eq(a, b),
            _ => false,
        }
    }

    /// What a vector kernel needs; `None` if it is no key of AES-GCM that encrypts.
    #[inline]
    fn gcm(self) -> Option<Gcm<'a>> {
        match self {
            Self::Short(key) => Some(key.gcm()),
            Self::Whole(EspKey(Kind::Aead(key))) => key.gcm(),
            Self::Whole(_) => None,
        }
    }
}

impl ShortKey {
    /// Becomes a copy of `key`, if that is one of AES-128-GCM, and vacant if not.
    pub fn copy(&mut self, key: &EspKey) {
        match &key.0 {
            Kind::Aead(key) => self.copy_from(key),
            Kind::Cbc(_) | Kind::Null(_) => self.vacate(),
        }
    }
}

impl fmt::Debug for EspKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EspKey(..)")
    }
}

impl fmt::Debug for SealOp<'_> {
    /// Without the packet's bytes, which are plaintext.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, sequence, esn, packet } = self;
        write!(f, "SealOp {{ {key:?}, {sequence:?}, esn: {esn}, packet: {} bytes }}", packet.len())
    }
}

impl fmt::Debug for OpenOp<'_> {
    /// Without the packet's bytes, which are plaintext once it is open.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, sequence, esn, packet, outcome } = self;
        let len = packet.len();
        write!(f, "OpenOp {{ {key:?}, {sequence}, esn: {esn}, packet: {len} bytes, {outcome:?} }}")
    }
}

impl fmt::Debug for Engine {
    /// Without the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({})", self.name())
    }
}

impl Engine {
    /// Picks the implementation, with room for the expanded keys of about `slots` SAs, and tests every suite against known
    /// answers.
    ///
    /// `Auto` takes the best that the processor has. A kernel that fails its test is never used: ring takes its place, and
    /// an error is logged. Fails when the processor lacks what a backend asked for by name needs, or when ring fails.
    pub fn select(backend: Backend, slots: usize) -> Result<Self, EngineError> {
        for level in vector::levels(backend) {
            let kernel = match Kernel::new(*level) {
                Ok(kernel) => kernel,
                Err(_) if backend == Backend::Auto => continue,
                Err(lacking) => return Err(EngineError::Unavailable(lacking)),
            };
            let mut engine = Self::ring(slots)?;
            engine.vector = Vector::new(kernel, slots);
            match selftest::compare(kernel).and_then(|()| selftest::run(&mut engine)) {
                Ok(()) => return Ok(engine),
                Err(error) => tracing::error!(%error, "CRYPTO SELF-TEST FAILED: this backend is not used"),
            }
        }
        let mut engine = Self::ring(slots)?;
        selftest::run(&mut engine)?;
        Ok(engine)
    }

    /// Without a kernel; not tested yet.
    fn ring(slots: usize) -> Result<Self, SelfTestError> {
        let keys = KeyCache::new(slots.min(RING_SLOTS), 0).ok_or(SelfTestError::no_keys())?;
        Ok(Self { vector: None, keys })
    }

    /// The name of what serves AES-GCM, for logs and `status`.
    pub fn name(&self) -> &'static str {
        self.vector.as_ref().map_or("ring", Vector::name)
    }

    /// Wipes what is expanded of a key, whose SA this worker gives away (OPS-4).
    pub fn forget(&mut self, serial: Serial) {
        self.keys.forget(serial);
        if let Some(vector) = &mut self.vector {
            vector.forget(serial);
        }
    }

    /// Wipes all that is expanded.
    pub fn forget_all(&mut self) {
        self.keys.forget_all();
        if let Some(vector) = &mut self.vector {
            vector.forget_all();
        }
    }

    /// Number of keys that are expanded now.
    pub fn expanded(&self) -> usize {
        self.keys.len() + self.vector.as_ref().map_or(0, Vector::expanded)
    }

    /// Seals every packet of the batch; the outcomes are in the same order.
    pub fn seal<const N: usize>(&mut self, ops: ArrayVec<SealOp<'_>, N>) -> ArrayVec<SealOutcome, N> {
        let mut sealing = self.sealing();
        ops.into_iter().for_each(|op| sealing.push(op));
        sealing.finish()
    }

    /// Begins to seal at most `N` packets.
    #[inline]
    pub fn sealing<'p, const N: usize>(&mut self) -> Sealing<'_, 'p, N> {
        Sealing {
            engine: self,
            group: Group::new(),
            others: ArrayVec::new(),
            room: N,
            outcomes: ArrayVec::new(),
        }
    }

    /// Begins to open at most `N` packets.
    #[inline]
    pub fn opening<'p, const N: usize>(&mut self) -> Opening<'_, 'p, N> {
        Opening {
            engine: self,
            group: Group::new(),
            others: ArrayVec::new(),
            room: N,
            outcomes: ArrayVec::new(),
        }
    }

    /// Opens every pending packet of the batch and writes its outcome.
    pub fn open(&mut self, ops: &mut [OpenOp<'_>]) {
        for ops in ops.chunks_mut(BATCH) {
            let mut opening = self.opening::<BATCH>();
            let mut places = ArrayVec::<&mut Outcome, BATCH>::new();
            for op in ops.iter_mut().filter(|op| op.outcome == Outcome::Pending) {
                let OpenOp { key, sequence, esn, packet, outcome } = op;
                places.push(outcome);
                let (key, sequence, esn, outcome) = (*key, *sequence, *esn, Outcome::Pending);
                opening.push(OpenOp { key, sequence, esn, packet, outcome });
            }
            for (place, outcome) in places.into_iter().zip(opening.finish()) {
                *place = outcome;
            }
        }
    }
}

/// A batch that is being sealed: packets are taken in one by one, and are sealed when [`Self::finish`] returns.
pub struct Sealing<'e, 'p, const N: usize> {
    engine: &'e mut Engine,
    /// What waits for the kernel; empty if there is something in `others`, so that outcomes come in the order of the
    /// packets.
    group: Group<'p>,
    /// What is not for the kernel; empty if there is something in `group`.
    others: ArrayVec<SealOp<'p>, N>,
    /// Packets that may still be taken in.
    room: usize,
    outcomes: ArrayVec<SealOutcome, N>,
}

impl<'p, const N: usize> Sealing<'_, 'p, N> {
    /// Takes in a packet. The one behind the `N`th is left as it is, and has no outcome.
    #[expect(
        clippy::inline_always,
        reason = "an operation is not to be built in memory only to be taken apart"
    )]
    #[inline(always)]
    pub fn push(&mut self, op: SealOp<'p>) {
        let Self { engine: Engine { vector, keys }, group, others, room, outcomes } = self;
        let Some(left) = room.checked_sub(1) else { return };
        *room = left;
        match (vector, op.key.gcm()) {
            (Some(vector), Some(key)) => {
                if !others.is_empty() {
                    seal_runs(keys, others, outcomes);
                    others.clear();
                }
                let SealOp { sequence, esn, packet, .. } = op;
                vector.seal(group, key, &sequence, esn, packet, |verdict| {
                    outcomes.extend(Some(sealed(verdict)));
                });
            }
            (vector, _) => {
                if let Some(vector) = vector {
                    vector.finish_sealing(group, || {}, |verdict| outcomes.extend(Some(sealed(verdict))));
                }
                let _ = others.try_push(op);
            }
        }
    }

    /// The outcomes, in the order of the packets. Not of a moved `self`, which is several kilobytes.
    pub fn finish(&mut self) -> ArrayVec<SealOutcome, N> {
        self.finish_while(|| {})
    }

    /// The same, with `meanwhile` called now and then, for what is to be asked of memory while the cipher leaves it alone.
    #[inline]
    pub fn finish_while(&mut self, meanwhile: impl FnMut()) -> ArrayVec<SealOutcome, N> {
        let Self { engine: Engine { vector, keys }, group, others, room, outcomes } = self;
        *room = N;
        if let Some(vector) = vector {
            vector.finish_sealing(group, meanwhile, |verdict| outcomes.extend(Some(sealed(verdict))));
        }
        seal_runs(keys, others, outcomes);
        others.clear();
        core::mem::take(outcomes)
    }
}

/// A batch that is being opened, as [`Sealing`].
pub struct Opening<'e, 'p, const N: usize> {
    engine: &'e mut Engine,
    group: Group<'p>,
    others: ArrayVec<OpenOp<'p>, N>,
    /// Packets that may still be taken in.
    room: usize,
    outcomes: ArrayVec<Outcome, N>,
}

impl<'p, const N: usize> Opening<'_, 'p, N> {
    /// Takes in a packet, as [`Sealing::push`]; the outcome in the operation is not looked at.
    #[expect(
        clippy::inline_always,
        reason = "an operation is not to be built in memory only to be taken apart"
    )]
    #[inline(always)]
    pub fn push(&mut self, op: OpenOp<'p>) {
        let Self { engine: Engine { vector, keys }, group, others, room, outcomes } = self;
        let Some(left) = room.checked_sub(1) else { return };
        *room = left;
        match (vector, op.key.gcm()) {
            (Some(vector), Some(key)) => {
                if !others.is_empty() {
                    open_runs(keys, others, outcomes);
                    others.clear();
                }
                let high = op.esn.then(|| sequence::high(op.sequence));
                vector.open(group, key, high, op.packet, |verdict| outcomes.extend(Some(opened(verdict))));
            }
            (vector, _) => {
                if let Some(vector) = vector {
                    vector.finish_opening(group, |verdict| outcomes.extend(Some(opened(verdict))));
                }
                let _ = others.try_push(op);
            }
        }
    }

    /// The outcomes, in the order of the packets. Not of a moved `self`, which is several kilobytes.
    pub fn finish(&mut self) -> ArrayVec<Outcome, N> {
        let Self { engine: Engine { vector, keys }, group, others, room, outcomes } = self;
        *room = N;
        if let Some(vector) = vector {
            vector.finish_opening(group, |verdict| outcomes.extend(Some(opened(verdict))));
        }
        open_runs(keys, others, outcomes);
        others.clear();
        core::mem::take(outcomes)
    }
}

fn sealed(verdict: Verdict) -> SealOutcome {
    if verdict == Verdict::Done { SealOutcome::Sealed } else { SealOutcome::BadLength }
}

fn opened(verdict: Verdict) -> Outcome {
    match verdict {
        Verdict::Done => Outcome::Opened,
        Verdict::BadTag => Outcome::BadIcv,
        Verdict::Refused | Verdict::Pending => Outcome::BadLength,
    }
}

/// Seals packets one by one, with each run's key made ready once.
fn seal_runs<const N: usize>(
    keys: &mut KeyCache<LessSafeKey>,
    ops: &mut [SealOp<'_>],
    outcomes: &mut ArrayVec<SealOutcome, N>,
) {
    for run in ops.chunk_by_mut(|a, b| a.key.is(b.key)) {
        let ready = run.first().and_then(|op| ready_to_seal(op.key, keys));
        if let Some(Ready::Cbc(cipher, mac)) = &ready
            && run.len() > 1
        {
            for ops in run.chunks_mut(cbc::TOGETHER) {
                seal_cbc_together(cipher, mac, ops, outcomes);
            }
            continue;
        }
        outcomes.extend(run.iter_mut().map(|op| match &ready {
            Some(ready) => ready.seal(op),
            // Not reached: the lengths of keys were checked when they were taken.
            None => SealOutcome::BadLength,
        }));
    }
}

/// Opens packets one by one, with each run's key made ready once.
fn open_runs<const N: usize>(
    keys: &mut KeyCache<LessSafeKey>,
    ops: &mut [OpenOp<'_>],
    outcomes: &mut ArrayVec<Outcome, N>,
) {
    for run in ops.chunk_by_mut(|a, b| a.key.is(b.key)) {
        let ready = run.first().and_then(|op| ready_to_open(op.key, keys));
        outcomes.extend(run.iter_mut().map(|op| match &ready {
            Some(ready) => ready.open(op),
            // Not reached, as above.
            None => Outcome::BadLength,
        }));
    }
}

/// A key ready for a run of packets, with the cipher as `C`.
enum Ready<'a, C> {
    Aead(Aead<'a>),
    Gmac(Aead<'a>),
    Cbc(C, &'a MacKey),
    Null(&'a MacKey),
}

fn ready_to_seal<'a>(key: KeyRef<'a>, keys: &'a mut KeyCache<LessSafeKey>) -> Option<Ready<'a, Encryptor>> {
    let kind = match key {
        KeyRef::Short(key) => return key.expand(keys).map(Ready::Aead),
        KeyRef::Whole(EspKey(kind)) => kind,
    };
    Some(match kind {
        Kind::Aead(key) if key.is_gmac() => Ready::Gmac(key.expand(keys)?),
        Kind::Aead(key) => Ready::Aead(key.expand(keys)?),
        Kind::Cbc(keys) => Ready::Cbc(keys.0.encryptor(), &keys.1),
        Kind::Null(mac) => Ready::Null(mac),
    })
}

fn ready_to_open<'a>(key: KeyRef<'a>, keys: &'a mut KeyCache<LessSafeKey>) -> Option<Ready<'a, Decryptor>> {
    let kind = match key {
        KeyRef::Short(key) => return key.expand(keys).map(Ready::Aead),
        KeyRef::Whole(EspKey(kind)) => kind,
    };
    Some(match kind {
        Kind::Aead(key) if key.is_gmac() => Ready::Gmac(key.expand(keys)?),
        Kind::Aead(key) => Ready::Aead(key.expand(keys)?),
        Kind::Cbc(keys) => Ready::Cbc(keys.0.decryptor(), &keys.1),
        Kind::Null(mac) => Ready::Null(mac),
    })
}

/// Checks the lengths and writes the number to the header.
fn numbered(op: &mut SealOp<'_>) -> bool {
    let SealOp { key, sequence, esn: _, packet } = op;
    let Layout { iv_len, icv_len, block } = key.layout();
    let fields = ESP_HEADER + usize::from(iv_len) + usize::from(icv_len);
    let text = packet.len().checked_sub(fields).filter(|text| *text >= TRAILER);
    if text.is_none_or(|text| text % usize::from(block) != 0) {
        return false;
    }
    if let Some((_, number)) = packet.split_first_chunk_mut::<4>()
        && let Some(number) = number.first_chunk_mut()
    {
        *number = sequence.low().to_be_bytes();
    }
    true
}

impl Ready<'_, Encryptor> {
    /// Writes the number to the header, checks the lengths and seals with the IV that belongs to the number.
    fn seal(&self, op: &mut SealOp<'_>) -> SealOutcome {
        if !numbered(op) {
            return SealOutcome::BadLength;
        }
        let SealOp { key: _, sequence, esn, packet } = op;
        let high = esn.then(|| sequence.high());
        let iv = sequence.value().to_be_bytes();
        let sealed = match self {
            Self::Aead(aead) => seal_aead(aead, iv, high, packet),
            Self::Gmac(aead) => seal_gmac(aead, iv, high, packet),
            Self::Cbc(cipher, mac) => seal_cbc(cipher, mac, cipher.iv(sequence.value()), high, packet),
            Self::Null(mac) => seal_null(mac, high, packet),
        };
        if sealed.is_some() { SealOutcome::Sealed } else { SealOutcome::BadLength }
    }
}

impl Ready<'_, Decryptor> {
    fn open(&self, op: &mut OpenOp<'_>) -> Outcome {
        let OpenOp { key: _, sequence, esn, packet, outcome: _ } = op;
        let high = esn.then(|| sequence::high(*sequence));
        let right = match self {
            Self::Aead(aead) => open_aead(aead, high, packet),
            Self::Gmac(aead) => open_gmac(aead, high, packet),
            Self::Cbc(cipher, mac) => open_cbc(cipher, mac, high, packet),
            Self::Null(mac) => open_null(mac, high, packet),
        };
        match right {
            Some(true) => Outcome::Opened,
            Some(false) => Outcome::BadIcv,
            None => Outcome::BadLength,
        }
    }
}

/// An AEAD packet in its parts.
struct Parts<'p> {
    header: &'p [u8; ESP_HEADER],
    iv: &'p mut [u8; 8],
    text: &'p mut [u8],
    tag: &'p mut [u8; TAG],
}

impl<'p> Parts<'p> {
    /// `None` when the packet is too short for them and a trailer.
    fn of(packet: &'p mut [u8]) -> Option<Self> {
        let (header, packet) = packet.split_first_chunk_mut()?;
        let (iv, packet) = packet.split_first_chunk_mut()?;
        let (text, tag) = packet.split_last_chunk_mut()?;
        (text.len() >= TRAILER).then_some(Self { header, iv, text, tag })
    }
}

/// RFC 4106 section 5, RFC 7634 section 2.1: the AAD is SPI and sequence number, the latter with 64 bits when it is
/// extended.
fn with_aad<T>(header: [u8; ESP_HEADER], high: Option<u32>, f: impl FnOnce(&[u8]) -> T) -> T {
    match high {
        None => f(&header),
        Some(high) => {
            let [s0, s1, s2, s3, l0, l1, l2, l3] = header;
            let [h0, h1, h2, h3] = high.to_be_bytes();
            f(&[s0, s1, s2, s3, h0, h1, h2, h3, l0, l1, l2, l3])
        }
    }
}

fn seal_aead(aead: &Aead<'_>, iv: [u8; 8], high: Option<u32>, packet: &mut [u8]) -> Option<()> {
    let parts = Parts::of(packet)?;
    *parts.iv = iv;
    *parts.tag = with_aad(*parts.header, high, |aad| aead.seal(iv, aad, parts.text))?;
    Some(())
}

fn open_aead(aead: &Aead<'_>, high: Option<u32>, packet: &mut [u8]) -> Option<bool> {
    let parts = Parts::of(packet)?;
    Some(with_aad(*parts.header, high, |aad| aead.open(*parts.iv, aad, parts.text, *parts.tag)))
}

fn seal_gmac(aead: &Aead<'_>, iv: [u8; 8], high: Option<u32>, packet: &mut [u8]) -> Option<()> {
    *Parts::of(packet)?.iv = iv;
    let tag = with_gmac_aad(high, packet, |aad| aead.seal(iv, aad, &mut []))??;
    *packet.last_chunk_mut()? = tag;
    Some(())
}

fn open_gmac(aead: &Aead<'_>, high: Option<u32>, packet: &mut [u8]) -> Option<bool> {
    let parts = Parts::of(packet)?;
    let (iv, tag) = (*parts.iv, *parts.tag);
    let right = with_gmac_aad(high, packet, |aad| aead.open(iv, aad, &mut [], tag))?;
    // The AAD with an extended number reached into the ICV's place.
    *packet.last_chunk_mut()? = tag;
    Some(right)
}

/// RFC 4543 section 3.3 as draft-mcgrew-gcm-test-01 section 3 clarifies it and peers do it: the AAD is SPI, sequence
/// number (64 bits when extended), IV, and the whole payload to the trailer.
///
/// ring wants it in one piece. Without ESN it is: the packet up to the ICV. With ESN the packet behind the SPI moves
/// up by the 4 bytes of the high half for the time of the call, into the place of the ICV, which the callers save or
/// write afterwards.
fn with_gmac_aad<T>(high: Option<u32>, packet: &mut [u8], f: impl FnOnce(&[u8]) -> T) -> Option<T> {
    let end = packet.len().checked_sub(TAG)?;
    let Some(high) = high else {
        return packet.get(..end).map(f);
    };
    let moved = end.checked_add(4)?;
    if end < ESP_HEADER || moved > packet.len() {
        return None;
    }
    packet.copy_within(4..end, 8);
    let (_, rest) = packet.split_first_chunk_mut::<4>()?;
    *rest.first_chunk_mut()? = high.to_be_bytes();
    let result = packet.get(..moved).map(f);
    packet.copy_within(8..moved, 4);
    result
}

/// Seals packets of one key, with a block of each in the cipher at a time.
fn seal_cbc_together<const N: usize>(
    cipher: &Encryptor,
    mac: &MacKey,
    ops: &mut [SealOp<'_>],
    outcomes: &mut ArrayVec<SealOutcome, N>,
) {
    let mut texts: ArrayVec<([u8; BLOCK], &mut [u8]), { cbc::TOGETHER }> = ArrayVec::new();
    let mut fit: ArrayVec<bool, { cbc::TOGETHER }> = ArrayVec::new();
    for op in &mut *ops {
        let iv = cipher.iv(op.sequence.value());
        let text = if numbered(op) { cbc_text(mac, iv, op.packet) } else { None };
        fit.push(text.is_some());
        texts.extend(text.map(|text| (iv, text)));
    }
    cipher.encrypt_together(&mut texts);
    drop(texts);
    outcomes.extend(ops.iter_mut().zip(fit).map(|(op, fits)| {
        let high = op.esn.then(|| op.sequence.high());
        match fits.then(|| sign_cbc(mac, high, op.packet)) {
            Some(Some(())) => SealOutcome::Sealed,
            _ => SealOutcome::BadLength,
        }
    }));
}

/// Writes the IV and gives the text.
fn cbc_text<'p>(mac: &MacKey, iv: [u8; BLOCK], packet: &'p mut [u8]) -> Option<&'p mut [u8]> {
    let end = packet.len().checked_sub(usize::from(mac.icv_len()))?;
    let (_, behind) = packet.get_mut(..end)?.split_first_chunk_mut::<ESP_HEADER>()?;
    let (iv_field, text) = behind.split_first_chunk_mut()?;
    if text.is_empty() || text.len() % BLOCK != 0 {
        return None;
    }
    *iv_field = iv;
    Some(text)
}

/// Writes the ICV of an encrypted packet.
fn sign_cbc(mac: &MacKey, high: Option<u32>, packet: &mut [u8]) -> Option<()> {
    let end = packet.len().checked_sub(usize::from(mac.icv_len()))?;
    let (covered, icv) = packet.split_at_mut_checked(end)?;
    mac.sign(covered, high, icv);
    Some(())
}

fn seal_cbc(
    cipher: &Encryptor,
    mac: &MacKey,
    iv: [u8; BLOCK],
    high: Option<u32>,
    packet: &mut [u8],
) -> Option<()> {
    cipher.encrypt(iv, cbc_text(mac, iv, packet)?);
    sign_cbc(mac, high, packet)
}

fn open_cbc(cipher: &Decryptor, mac: &MacKey, high: Option<u32>, packet: &mut [u8]) -> Option<bool> {
    let end = packet.len().checked_sub(usize::from(mac.icv_len()))?;
    let (covered, icv) = packet.split_at_mut_checked(end)?;
    let text = covered.len().checked_sub(ESP_HEADER + BLOCK)?;
    if text == 0 || text % BLOCK != 0 {
        return None;
    }
    if !mac.verify(covered, high, icv) {
        return Some(false);
    }
    let (_, behind) = covered.split_first_chunk_mut::<ESP_HEADER>()?;
    let (iv, text) = behind.split_first_chunk_mut()?;
    cipher.decrypt(*iv, text);
    Some(true)
}

fn seal_null(mac: &MacKey, high: Option<u32>, packet: &mut [u8]) -> Option<()> {
    let end = packet.len().checked_sub(usize::from(mac.icv_len()))?;
    let (covered, icv) = packet.split_at_mut_checked(end)?;
    mac.sign(covered, high, icv);
    Some(())
}

fn open_null(mac: &MacKey, high: Option<u32>, packet: &mut [u8]) -> Option<bool> {
    let end = packet.len().checked_sub(usize::from(mac.icv_len()))?;
    let (covered, icv) = packet.split_at_mut_checked(end)?;
    if covered.len() < ESP_HEADER + TRAILER {
        return None;
    }
    Some(mac.verify(covered, high, icv))
}
