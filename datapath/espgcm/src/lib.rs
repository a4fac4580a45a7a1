//! AES-GCM for ESP packets (RFC 4106) on the vector instructions of today's x86 processors.
//!
//! [`Kernel::new`] gives the kernel of a [`Level`] if the processor has its instructions; [`Kernel::expand`] makes keys,
//! [`Kernel::seal_esp`] and [`Kernel::open_esp`] take packets in batches. A packet is contiguous:
//!
//! ```text
//! SPI (4) | sequence number (4) | IV (8) | text | tag (16)
//! ```
//!
//! Nonce and AAD are what RFC 4106 makes of SPI, number and IV, which are left as they are; that a nonce is never used
//! twice is the caller's business. [`Kernel::seal`] and [`Kernel::open`] do the same with any nonce of 12 bytes and any AAD
//! of at most one block, so that the vectors of others can be held against them. Other lengths of nonce, AAD and tag are not
//! for ESP and not here.
//!
//! Time depends on lengths and on whether tags are right, not on keys, texts or tags. A text whose tag is wrong is zeroed
//! before `open` returns.
//!
//! This crate is the one room besides the rings of the ports where `unsafe` stands: the kernels work with pointers to whole
//! vectors. The functions here check every length before they call them.
#![cfg_attr(not(test), no_std)]
#![expect(clippy::inline_always, reason = "`Lanes` says why")]
#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "there are no other processors' kernels yet")
)]

#[cfg(feature = "exercise")]
#[expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test, for several programs")]
pub mod exercise;
mod kernel;
mod key;
mod lanes;
#[cfg(all(feature = "pipes", target_arch = "x86_64"))]
pub mod pipes;
mod short;
#[cfg(any(test, feature = "portable"))]
mod soft;
#[cfg(target_arch = "x86_64")]
mod vaes256;
#[cfg(target_arch = "x86_64")]
mod vaes512;
mod work;

use core::fmt;

pub use crate::key::{Key, KeyLength, SHORT};

use crate::key::{GROUPS, Group};
use crate::lanes::Lanes;
#[cfg(any(test, feature = "portable"))]
use crate::soft::Soft;
use crate::work::work;
#[cfg(target_arch = "x86_64")]
use crate::{vaes256::Pair, vaes512::Quad};

/// Bytes before the text: SPI, sequence number, IV.
pub const HEADER: usize = 16;

/// Bytes of the tag.
pub const TAG: usize = 16;

/// Longest packet, in bytes. An IP packet has 65,535.
pub const LONGEST: usize = 1 << 20;

/// The instructions that a kernel is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// VAES and VPCLMULQDQ on 512 bits.
    Vaes512,
    /// VAES and VPCLMULQDQ on 256 bits.
    Vaes256,
    /// Two blocks a vector on plain integers: slow and not constant in time, for tests.
    #[cfg(any(test, feature = "portable"))]
    Portable2,
    /// The same with four blocks.
    #[cfg(any(test, feature = "portable"))]
    Portable4,
}

/// The processor lacks instructions of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Lacking {
    level: Level,
    /// By instruction of [`NEEDED`]: whether it is missing.
    missing: [bool; NEEDED.len()],
}

/// Names of instruction set extensions, and whether AVX-512 kernels alone need them.
const NEEDED: [(&str, bool); 8] = [
    ("AVX2", false),
    ("AES", false),
    ("PCLMULQDQ", false),
    ("VAES", false),
    ("VPCLMULQDQ", false),
    ("AVX512F", true),
    ("AVX512BW", true),
    ("AVX512VL", true),
];

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, missing } = self;
        f.write_str("the processor lacks")?;
        let names = NEEDED.iter().zip(missing).filter(|(_, missing)| **missing);
        for (at, ((name, _), _)) in names.enumerate() {
            write!(f, "{} {name}", if at == 0 { "" } else { "," })?;
        }
        write!(f, ", which {} needs", level.name())
    }
}

impl Level {
    /// As configurations name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vaes512 => "vaes512",
            Self::Vaes256 => "vaes256",
            #[cfg(any(test, feature = "portable"))]
            Self::Portable2 => "portable2",
            #[cfg(any(test, feature = "portable"))]
            Self::Portable4 => "portable4",
        }
    }
}

/// A level whose instructions the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    level: Level,
}

/// Additional authenticated data of at most one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aad {
    /// Zeros behind the data.
    block: [u8; 16],
    len: u8,
}

impl Aad {
    /// `None` when there are more than 16 bytes.
    #[inline]
    pub fn new(data: &[u8]) -> Option<Self> {
        let mut block = [0; 16];
        block.get_mut(..data.len())?.copy_from_slice(data);
        Some(Self { block, len: u8::try_from(data.len()).ok()? })
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not looked at.
    Pending,
    /// Sealed, or opened with a right tag.
    Done,
    /// The tag is wrong. The text is zero.
    BadTag,
    /// Shorter than header and tag, longer than [`LONGEST`] or than its key serves, or its key is blank. The packet is as it
    /// was.
    Refused,
}

/// A key that is to be expanded.
pub struct Wanted<'a> {
    /// Index of its place.
    pub place: usize,
    /// 16, 24 or 32 bytes.
    pub key: &'a [u8],
}

impl fmt::Debug for Wanted<'_> {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wanted {{ {} }}", self.place)
    }
}

/// One ESP packet of a batch.
pub struct EspPacket<'a> {
    /// Index of the key, expanded by the kernel that gets the packet. (By another one: a wrong tag.)
    pub key: usize,
    /// What the nonce begins with; the IV follows (RFC 4106 section 4).
    pub salt: [u8; 4],
    /// The high half of an extended sequence number (RFC 4106 section 5).
    pub high: Option<u32>,
    /// Header, IV, text, tag.
    pub bytes: &'a mut [u8],
    /// [`Verdict::Pending`] before; others are left alone.
    pub verdict: Verdict,
}

impl fmt::Debug for EspPacket<'_> {
    /// Without the bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EspPacket {{ {} bytes, {:?} }}", self.bytes.len(), self.verdict)
    }
}

/// One packet of a batch, with any nonce and AAD.
pub struct Packet<'a> {
    /// The key, expanded by the kernel that gets the packet. (By another one: a wrong tag.)
    pub key: &'a Key,
    /// Never the same one twice under a key when sealing.
    pub nonce: [u8; 12],
    /// What is authenticated besides the text.
    pub aad: Aad,
    /// Header, text, tag.
    pub bytes: &'a mut [u8],
    /// [`Verdict::Pending`] before.
    pub verdict: Verdict,
}

impl fmt::Debug for Packet<'_> {
    /// Without the bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packet {{ {} bytes, {:?} }}", self.bytes.len(), self.verdict)
    }
}

/// Seals (`true`) or opens packets with the instructions of the kernel's level.
macro_rules! at_level {
    ($kernel:expr, $vaes512:ident, $vaes256:ident, $seal:literal, $keys:expr, $packets:expr) => {
        // JUSTIFICATION: the instructions of a level may only be run where they are.
        // SAFETY: `new` saw that the processor has the instructions of the level.
        unsafe {
            match $kernel.level {
                #[cfg(target_arch = "x86_64")]
                Level::Vaes512 => $vaes512($keys, $packets),
                #[cfg(target_arch = "x86_64")]
                Level::Vaes256 => $vaes256($keys, $packets),
                #[cfg(not(target_arch = "x86_64"))]
                Level::Vaes512 | Level::Vaes256 => {}
                #[cfg(any(test, feature = "portable"))]
                Level::Portable2 => work::<Soft<2>, _, $seal>($keys, $packets),
                #[cfg(any(test, feature = "portable"))]
                Level::Portable4 => work::<Soft<4>, _, $seal>($keys, $packets),
            }
        }
    };
}

impl Kernel {
    /// The kernel of `level`, if the processor has its instructions.
    pub fn new(level: Level) -> Result<Self, Lacking> {
        let present = present();
        let missing = core::array::from_fn(|at| {
            let needed = NEEDED.get(at).is_some_and(|(_, wide)| !wide || level == Level::Vaes512);
            needed && !present.get(at).copied().unwrap_or(false)
        });
        #[cfg(any(test, feature = "portable"))]
        if matches!(level, Level::Portable2 | Level::Portable4) {
            return Ok(Self { level });
        }
        if missing.contains(&true) { Err(Lacking { level, missing }) } else { Ok(Self { level }) }
    }

    /// Whether a key that this kernel expanded serves a text of so many bytes.
    #[inline]
    pub fn is_enough(self, key: &Key, text: usize) -> bool {
        match self.level {
            #[cfg(target_arch = "x86_64")]
            Level::Vaes512 => key.is_enough::<Quad>(text),
            #[cfg(target_arch = "x86_64")]
            Level::Vaes256 => key.is_enough::<Pair>(text),
            #[cfg(not(target_arch = "x86_64"))]
            Level::Vaes512 | Level::Vaes256 => false,
            #[cfg(any(test, feature = "portable"))]
            Level::Portable2 => key.is_enough::<Soft<2>>(text),
            #[cfg(any(test, feature = "portable"))]
            Level::Portable4 => key.is_enough::<Soft<4>>(text),
        }
    }

    /// What it is made of.
    pub fn level(self) -> Level {
        self.level
    }

    /// Expands `key` into `into`. Whatever was there is overwritten, unless the key has a wrong length.
    pub fn expand(self, key: &[u8], into: &mut Key) -> Result<(), KeyLength> {
        if !matches!(key.len(), 16 | 24 | 32) {
            return Err(KeyLength(key.len()));
        }
        self.expand_into(core::slice::from_mut(into), &[Wanted { place: 0, key }], true);
        Ok(())
    }

    /// Expands several keys into places of `table`, which takes much less time than one after the other. Whatever was there
    /// is overwritten; if two want one place, the later one has it. Where a key has a wrong length the place is left blank; a
    /// place beyond the table is no place.
    ///
    /// Keys that are not `whole` take less time and serve texts of at most [`SHORT`] bytes; packets with others are refused.
    pub fn expand_into(self, table: &mut [Key], wanted: &[Wanted<'_>], whole: bool) {
        for Wanted { place, key } in wanted {
            if !matches!(key.len(), 16 | 24 | 32)
                && let Some(place) = table.get_mut(*place)
            {
                place.wipe();
            }
        }
        // JUSTIFICATION: the instructions of a level may only be run where they are.
        // SAFETY: `new` saw that the processor has the instructions of `self.level`.
        unsafe {
            match self.level {
                #[cfg(target_arch = "x86_64")]
                Level::Vaes512 => expand_vaes512(table, wanted, whole),
                #[cfg(target_arch = "x86_64")]
                Level::Vaes256 => expand_vaes256(table, wanted, whole),
                #[cfg(not(target_arch = "x86_64"))]
                Level::Vaes512 | Level::Vaes256 => {}
                #[cfg(any(test, feature = "portable"))]
                Level::Portable2 => expand::<Soft<2>>(table, wanted, whole),
                #[cfg(any(test, feature = "portable"))]
                Level::Portable4 => expand::<Soft<4>>(table, wanted, whole),
            }
        }
        scrub();
    }

    /// Encrypts the text of every pending packet in place and writes its tag. The packets' keys are in `keys`; one that is
    /// not refuses its packets.
    #[inline]
    pub fn seal_esp(self, keys: &[Key], packets: &mut [EspPacket<'_>]) {
        at_level!(self, seal_esp_vaes512, seal_esp_vaes256, true, keys, packets);
    }

    /// Decrypts the text of every pending packet in place if its tag is right, and zeroes it if not. The tags stay; keys as
    /// in [`Self::seal_esp`].
    #[inline]
    pub fn open_esp(self, keys: &[Key], packets: &mut [EspPacket<'_>]) {
        at_level!(self, open_esp_vaes512, open_esp_vaes256, false, keys, packets);
    }

    /// As [`Self::seal_esp`], of packets with any nonce and AAD.
    #[inline]
    pub fn seal(self, packets: &mut [Packet<'_>]) {
        at_level!(self, seal_vaes512, seal_vaes256, true, &[], packets);
    }

    /// As [`Self::open_esp`], of packets with any nonce and AAD.
    #[inline]
    pub fn open(self, packets: &mut [Packet<'_>]) {
        at_level!(self, open_vaes512, open_vaes256, false, &[], packets);
    }
}

/// Which extensions of [`NEEDED`] the processor has.
fn present() -> [bool; NEEDED.len()] {
    #[cfg(target_arch = "x86_64")]
    {
        extern crate std;
        use std::arch::is_x86_feature_detected as has;
        [
            has!("avx2"),
            has!("aes"),
            has!("pclmulqdq"),
            has!("vaes"),
            has!("vpclmulqdq"),
            has!("avx512f"),
            has!("avx512bw"),
            has!("avx512vl"),
        ]
    }
    #[cfg(not(target_arch = "x86_64"))]
    [false; NEEDED.len()]
}

/// The functions in which the instructions of a level are enabled.
#[cfg(target_arch = "x86_64")]
macro_rules! level {
    ($vector:ty, $features:literal, $expand:ident, $seal_esp:ident, $open_esp:ident, $seal:ident, $open:ident) => {
        // JUSTIFICATION: `#[target_feature]` is how one binary has code for several processors.
        // SAFETY (each): the caller sees that the processor has the instructions.
        #[target_feature(enable = $features)]
        unsafe fn $expand(table: &mut [Key], wanted: &[Wanted<'_>], whole: bool) {
            // SAFETY: above.
            unsafe { expand::<$vector>(table, wanted, whole) }
        }

        #[target_feature(enable = $features)]
        unsafe fn $seal_esp(keys: &[Key], packets: &mut [EspPacket<'_>]) {
            // SAFETY: above.
            unsafe { work::<$vector, _, true>(keys, packets) }
        }

        #[target_feature(enable = $features)]
        unsafe fn $open_esp(keys: &[Key], packets: &mut [EspPacket<'_>]) {
            // SAFETY: above.
            unsafe { work::<$vector, _, false>(keys, packets) }
        }

        #[target_feature(enable = $features)]
        unsafe fn $seal(keys: &[Key], packets: &mut [Packet<'_>]) {
            // SAFETY: above.
            unsafe { work::<$vector, _, true>(keys, packets) }
        }

        #[target_feature(enable = $features)]
        unsafe fn $open(keys: &[Key], packets: &mut [Packet<'_>]) {
            // SAFETY: above.
            unsafe { work::<$vector, _, false>(keys, packets) }
        }
    };
}

#[cfg(target_arch = "x86_64")]
level!(
    Pair,
    "avx2,aes,pclmulqdq,vaes,vpclmulqdq",
    expand_vaes256,
    seal_esp_vaes256,
    open_esp_vaes256,
    seal_vaes256,
    open_vaes256
);
#[cfg(target_arch = "x86_64")]
level!(
    Quad,
    "avx2,aes,pclmulqdq,vaes,vpclmulqdq,avx512f,avx512bw,avx512vl",
    expand_vaes512,
    seal_esp_vaes512,
    open_esp_vaes512,
    seal_vaes512,
    open_vaes512
);

/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
unsafe fn expand<V: Lanes>(table: &mut [Key], wanted: &[Wanted<'_>], whole: bool) {
    // In their order, so that the later one has a place that two want.
    for run in wanted.chunk_by(|a, b| a.key.len() == b.key.len()) {
        // SAFETY: the instructions are the caller's; the lengths go with the rounds.
        unsafe {
            match run.first().map_or(0, |wanted| wanted.key.len()) {
                16 => together::<V, 10>(table, run, whole),
                24 => together::<V, 12>(table, run, whole),
                32 => together::<V, 14>(table, run, whole),
                _ => {}
            }
        }
    }
}

/// Expands keys of one length.
///
/// # Safety
/// The processor has the instructions of `V`. All keys have the length that goes with the rounds.
#[inline(always)]
unsafe fn together<V: Lanes, const ROUNDS: usize>(table: &mut [Key], wanted: &[Wanted<'_>], whole: bool) {
    let places = table.len();
    let start = table.as_mut_ptr();
    let mut wanted = wanted.iter().filter(|wanted| wanted.place < places);
    let mut groups = [Group { keys: [core::ptr::null(); 4], to: [core::ptr::null_mut(); 4] }; GROUPS];
    loop {
        let mut count = 0;
        for group in &mut groups {
            let Some(mut last) = wanted.next() else { break };
            count += 1;
            for (lane, (key, to)) in group.keys.iter_mut().zip(&mut group.to).enumerate().take(V::BLOCKS) {
                if lane > 0 {
                    // Lanes that are left over do again what the one before them does.
                    last = wanted.next().unwrap_or(last);
                }
                (*key, *to) = (last.key.as_ptr(), start.wrapping_add(last.place).cast());
            }
        }
        let Some(groups) = groups.get(..count).filter(|groups| !groups.is_empty()) else { break };
        // JUSTIFICATION: places of one table are lent one at a time only.
        // SAFETY: the instructions are the caller's; the keys have their length, every place is within the table, which is
        // borrowed for as long as this takes.
        unsafe { key::expand::<V, ROUNDS>(groups, whole) };
    }
}

/// Overwrites what the expansion left on the stack, as far as this is called from where it was (OPS-4).
#[inline(never)]
fn scrub() {
    core::hint::black_box(&mut [0u8; 4096]);
}
