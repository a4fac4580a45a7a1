//! The bytes of a backup file. Integers are big-endian.
//!
//! ```text
//! offset     header copy 1, padded with zeros to 512 bytes (one sector)
//! 512        header copy 2: the same bytes
//! 1024       frames of the checkpoint, up to the offset that the header states
//! …          frames of the journal, in batches; the last frame of a batch is marked
//!            then nothing, or zeros, or what was being written when the power went
//! ```
//! A frame is `length of the record (2) | kind (1) | 0xA7 | AES-256-GCM(key (16) | record) | tag (16)`. The nonce is the
//! frame's offset in the file and the data key belongs to this file alone, so that a frame opens nowhere else: not
//! at another position, not in another generation. The first four bytes are authenticated. They are readable so that a
//! file can be inspected without a key, and so that a reader finds its way again behind damage.
//!
//! The data key is sealed to the recipient with the header's fields as HPKE `info`: a changed header opens nothing.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::digest;
use zeroize::Zeroizing;

use crate::keys::{DATA_KEY_LEN, ENCAPSULATED_LEN, KeyId, SEALED_LEN, Sealed, random};

/// Most bytes in a record.
pub const MAX_RECORD: usize = 2048;
/// What a record takes on disk beside its own bytes: frame header, key, tag.
pub const FRAME_OVERHEAD: usize = FRAME_HEADER_LEN + KEY_LEN + TAG_LEN;
/// Where the frames begin.
pub const HEADER_LEN: usize = 2 * COPY_LEN;

pub(crate) const COPY_LEN: usize = 512;
pub(crate) const KEY_LEN: usize = 16;
pub(crate) const TAG_LEN: usize = 16;
pub(crate) const FRAME_HEADER_LEN: usize = 4;
/// Most bytes that a frame encrypts.
pub(crate) const MAX_PLAINTEXT: usize = KEY_LEN + MAX_RECORD;

const MAGIC: [u8; 8] = *b"PSTRNNVR";
const VERSION: u16 = 1;
const SYNC: u8 = 0xa7;
const LAST: u8 = 0x80;
const CHECKSUM_LEN: usize = 8;
/// All fields before the sealed data key: what HPKE binds.
const BOUND_LEN: usize = 8 + 2 + 1 + 1 + 8 + 8 + 8 + 8 + 8 + 8 + 8 + 8;

/// What a file says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    /// Larger for each open: seconds since 1970, or one more than the newest that was there.
    pub(crate) generation: u64,
    /// Counts the checkpoints of the generation, from 0.
    pub(crate) epoch: u64,
    /// Generations below this one do not count any more.
    pub(crate) floor: u64,
    /// The monotonic counter's value that this file needs; `None` if it was written without one.
    pub(crate) counter: Option<u64>,
    /// When the checkpoint was written: seconds since 1970.
    pub(crate) created: u64,
    /// Whom the data key is sealed to.
    pub(crate) recipient: KeyId,
    /// Records in the checkpoint.
    pub(crate) records: u64,
    /// Offset behind the checkpoint.
    pub(crate) journal_at: u64,
}

/// A header as read: its fields, the data key, and the bytes that the seal covers.
#[derive(Clone)]
pub(crate) struct Header {
    pub(crate) fields: Fields,
    pub(crate) sealed: Sealed,
    pub(crate) bound: [u8; BOUND_LEN],
}

/// Why there is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// Neither magic number is there.
    NotABackup,
    /// Of a version that this program does not know.
    Version(u16),
    /// It was one, but its checksum is wrong or its fields contradict each other.
    Damaged,
}

impl Fields {
    pub(crate) fn bound(&self) -> [u8; BOUND_LEN] {
        // Exhaustive: a new field does not compile until it is written here and read below.
        let Self { generation, epoch, floor, counter, created, recipient, records, journal_at } = *self;
        let mut bound = [0; BOUND_LEN];
        let mut rest = bound.as_mut_slice();
        let mut put = |bytes: &[u8]| {
            if let Some((to, behind)) = core::mem::take(&mut rest).split_at_mut_checked(bytes.len()) {
                to.copy_from_slice(bytes);
                rest = behind;
            }
        };
        put(&MAGIC);
        put(&VERSION.to_be_bytes());
        put(&[u8::from(counter.is_some()), 0]);
        for number in [generation, epoch, floor, counter.unwrap_or(0), created] {
            put(&number.to_be_bytes());
        }
        put(&recipient.0);
        put(&records.to_be_bytes());
        put(&journal_at.to_be_bytes());
        bound
    }
}

/// Both copies of a header.
pub(crate) fn header_bytes(bound: &[u8; BOUND_LEN], sealed: &Sealed) -> Vec<u8> {
    let mut copy = Vec::with_capacity(HEADER_LEN);
    copy.extend_from_slice(bound);
    copy.extend_from_slice(&sealed.encapsulated);
    copy.extend_from_slice(&sealed.data_key);
    copy.extend_from_slice(&checksum(&copy));
    copy.resize(COPY_LEN, 0);
    copy.extend_from_within(..);
    copy
}

/// The copies of a file's header that are intact, in order; the error says why the first is not, if none is.
pub(crate) fn headers(file: &[u8]) -> Result<Vec<Header>, HeaderError> {
    let copies = file.chunks(COPY_LEN).take(2).map(header).collect::<Vec<_>>();
    let intact: Vec<_> = copies.iter().flatten().cloned().collect();
    if !intact.is_empty() {
        return Ok(intact);
    }
    let reasons = copies.into_iter().filter_map(Result::err);
    // The more telling reason of the two: damage and a foreign version are both better than "not a backup".
    Err(reasons
        .max_by_key(|reason| u8::from(*reason != HeaderError::NotABackup))
        .unwrap_or(HeaderError::NotABackup))
}

fn header(copy: &[u8]) -> Result<Header, HeaderError> {
    let mut reader = Reader(copy);
    if reader.take::<8>() != Some(MAGIC) {
        return Err(HeaderError::NotABackup);
    }
    let version = reader.take().map(u16::from_be_bytes).ok_or(HeaderError::Damaged)?;
    let fields = (|| {
        let [protected, _] = reader.take()?;
        let [generation, epoch, floor, counter, created] =
            [reader.number()?, reader.number()?, reader.number()?, reader.number()?, reader.number()?];
        let counter = match protected {
            0 => None,
            1 => Some(counter),
            _ => return None,
        };
        let recipient = KeyId(reader.take()?);
        let [records, journal_at] = [reader.number()?, reader.number()?];
        Some(Fields { generation, epoch, floor, counter, created, recipient, records, journal_at })
    })();
    let sealed = (|| {
        Some(Sealed {
            encapsulated: reader.take::<ENCAPSULATED_LEN>()?,
            data_key: reader.take::<SEALED_LEN>()?,
        })
    })();
    let stated = reader.take::<CHECKSUM_LEN>();
    let covered =
        copy.split_at_checked(BOUND_LEN + ENCAPSULATED_LEN + SEALED_LEN).map(|(covered, _)| covered);
    if stated.is_none() || stated != covered.map(checksum) {
        return Err(HeaderError::Damaged);
    }
    if version != VERSION {
        return Err(HeaderError::Version(version));
    }
    let (fields, sealed) = fields.zip(sealed).ok_or(HeaderError::Damaged)?;
    let bound = covered.and_then(|covered| covered.first_chunk().copied()).ok_or(HeaderError::Damaged)?;
    Ok(Header { fields, sealed, bound })
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (chunk, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*chunk)
    }

    fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }
}

/// Against accidents only, and for those who have no key; what holds against people is the seal.
pub(crate) fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_LEN] {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().first_chunk().copied().unwrap_or_default()
}

/// What a frame does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The record under this key is now this one.
    Put,
    /// There is no record under this key any more.
    Remove,
}

/// The readable part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) kind: Kind,
    /// Ends its batch.
    pub(crate) last: bool,
    /// Bytes of the record.
    pub(crate) record: u16,
}

impl FrameHeader {
    fn to_bytes(self) -> [u8; FRAME_HEADER_LEN] {
        let [high, low] = self.record.to_be_bytes();
        let kind = match self.kind {
            Kind::Put => 1,
            Kind::Remove => 2,
        };
        [high, low, kind | if self.last { LAST } else { 0 }, SYNC]
    }

    /// The frame that may begin here; `None` if none does.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let [high, low, kind, SYNC] = *bytes.first_chunk()? else { return None };
        let record = u16::from_be_bytes([high, low]);
        let last = kind & LAST != 0;
        let kind = match kind & !LAST {
            1 => Kind::Put,
            2 if record == 0 => Kind::Remove,
            _ => return None,
        };
        (usize::from(record) <= MAX_RECORD).then_some(Self { kind, last, record })
    }

    /// Bytes of the whole frame.
    pub(crate) fn frame_len(self) -> usize {
        FRAME_OVERHEAD + usize::from(self.record)
    }
}

/// The key of one file: prints nothing, cannot be copied; the cipher's own state is wiped by its library.
pub(crate) struct DataKey(LessSafeKey);

impl DataKey {
    /// A new one, and its bytes for the seal.
    pub(crate) fn generate() -> Option<(Self, Zeroizing<[u8; DATA_KEY_LEN]>)> {
        let mut bytes = Zeroizing::new([0; DATA_KEY_LEN]);
        random(bytes.as_mut());
        Some((Self::new(&bytes)?, bytes))
    }

    pub(crate) fn new(bytes: &[u8; DATA_KEY_LEN]) -> Option<Self> {
        Some(Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, bytes).ok()?)))
    }

    /// Appends the frame for offset `at` to `out`. The caller never uses an offset twice, whatever became of the first.
    pub(crate) fn seal_frame(
        &self,
        at: u64,
        header: FrameHeader,
        key: &[u8; KEY_LEN],
        record: &[u8],
        out: &mut Vec<u8>,
    ) -> Option<()> {
        let readable = header.to_bytes();
        out.extend_from_slice(&readable);
        self.seal(at, &readable, &[key, record], out)
    }

    /// Opens the frame that begins at `frame`, at offset `at` of its file, into `plain`: the key, then the record.
    pub(crate) fn open_frame<'p>(
        &self,
        at: u64,
        header: FrameHeader,
        frame: &[u8],
        plain: &'p mut [u8; MAX_PLAINTEXT],
    ) -> Option<(&'p [u8; KEY_LEN], &'p [u8])> {
        let (frame, _) = frame.split_at_checked(header.frame_len())?;
        let (readable, sealed) = frame.split_first_chunk::<FRAME_HEADER_LEN>()?;
        self.open(at, readable, sealed, plain)?.split_first_chunk()
    }

    /// Appends the encrypted `parts` and the tag.
    pub(crate) fn seal(&self, number: u64, bound: &[u8], parts: &[&[u8]], out: &mut Vec<u8>) -> Option<()> {
        let start = out.len();
        for part in parts {
            out.extend_from_slice(part);
        }
        let text = out.get_mut(start..)?;
        let tag = self.0.seal_in_place_separate_tag(nonce(number), Aad::from(bound), text).ok()?;
        out.extend_from_slice(tag.as_ref());
        Some(())
    }

    /// Opens `sealed` into the front of `plain`.
    pub(crate) fn open<'p>(
        &self,
        number: u64,
        bound: &[u8],
        sealed: &[u8],
        plain: &'p mut [u8],
    ) -> Option<&'p [u8]> {
        let (text, tag) = sealed.split_at_checked(sealed.len().checked_sub(TAG_LEN)?)?;
        let plain = plain.get_mut(..text.len())?;
        self.0.open_separate_gather(nonce(number), Aad::from(bound), text, tag, plain).ok()?;
        Some(plain)
    }
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; 12];
    if let Some(tail) = nonce.last_chunk_mut() {
        *tail = number.to_be_bytes();
    }
    Nonce::assume_unique_for_key(nonce)
}
