//! What is saved of an IKE SA, so that after a reset its peer can be told that it is gone (RST-1, RST-2, RST-8).
//!
//! A saved form is its own type and never the live object: each is written by taking it apart completely, so that a new
//! field does not compile until someone has decided whether it is saved (DESIGN decision 8). A record begins with its
//! version; every length in it is checked against what is there, and what is left over is an error. Records are stored
//! encrypted, by whoever stores them; the bytes of [`SavedIke::encode`] hold keys and wipe themselves.
//!
//! ```text
//! version | kind | SPIi | SPIr | flags | connection | peer | local | remote | expires | body of the kind
//! ```
//!
//! What goes on after a reset has more saved of it, its CHILD_SAs too: [`whole`].
//!
//! No counter is restored: [`V2Context::next_request`] is above every message ID that this side has used, because the
//! record is durable before a request is sent, and what is sealed after a reset has IVs of its own
//! ([`Sealer::seal_after_reset`]).

mod bytes;
pub mod whole;

use core::net::SocketAddr;
use core::time::Duration;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use zeroize::Zeroizing;

use self::bytes::{Reader, Writer};
use self::whole::Whole;
use crate::Secret;
use crate::crypto::digest::sha256;
use crate::crypto::sk::{Opener, Protection, Sealer};
use crate::message::registry::{EncrId, ExchangeType, IntegId, ProtocolId};
use crate::message::{Head, IkeSpi, Payload};
use crate::message::{emit, parse};
use crate::output::Path;
use crate::v1::cipher::Iv;
use crate::v1::delete::{DeleteContext, delete_message};
use crate::v1::hash::Hash;
use crate::v2::channel::Datagrams;

/// What happens to the IKE SAs of a connection after a reset of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// The keys of the IKE SA are saved, and the Delete is built when it is needed.
    #[default]
    Delete,
    /// The finished Delete is saved, and no key (RST-8).
    Prebuilt,
    /// All of it is saved, keys of the CHILD_SAs too, and it goes on where it was. Where that cannot be (in the middle of
    /// a key exchange, or of another configuration), the peer is told as with `Delete`. IKEv1: as `Delete`.
    Restore,
    /// Nothing is saved: the peer finds out by itself.
    None,
}

/// Longest record.
pub const MAX_RECORD: usize = 2048;

/// The layout's version.
const VERSION: u8 = 1;

/// Message IDs that are tried above the saved one, each later than the one before: more than none only if the last
/// changes did not reach the storage.
pub const WALK: u32 = 3;

/// Longest record of an IKE SA that is to go on: with what the storage adds it takes at most 2,048 bytes.
pub const LONGEST_WHOLE: usize = MAX_RECORD - 100;

/// Longest request that is saved with its IKE SA.
const LONGEST_REQUEST: usize = 256;

/// An IKE SA that is never rekeyed by this side is believed to live so long.
pub(crate) const UNLIMITED: Duration = Duration::from_hours(30 * 24);

/// A time as it is saved.
pub(crate) fn whole_seconds(time: SystemTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// An IKE SA as it is saved.
#[derive(Debug, PartialEq, Eq)]
pub struct SavedIke {
    /// SPIs (cookies) of the original initiator and responder.
    pub spis: (IkeSpi, IkeSpi),
    /// This side began it.
    pub initiator: bool,
    /// The connection that it belongs to.
    pub connection: Arc<str>,
    /// Tells whose it is.
    pub peer: PeerTag,
    /// Where the peer was last seen, and from where to speak to it.
    pub path: Path,
    /// When it ends by itself; to the second.
    pub expires: SystemTime,
    /// What a Delete is made from.
    pub body: SavedBody,
}

/// The beginning of a digest of a peer's identity: tells one peer's records from another's, and not who the peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerTag(pub [u8; 8]);

/// What a Delete is made from.
#[derive(Debug, PartialEq, Eq)]
pub enum SavedBody {
    /// IKEv2: the keys.
    V2Context(V2Context),
    /// IKEv1: the keys.
    V1Context(V1Context),
    /// The messages, in the order in which they are sent (RST-8).
    Prebuilt(Prebuilt),
    /// IKEv2: everything, so that it can go on.
    Whole(Box<Whole>),
}

/// What the Delete of an IKEv2 SA is made from, and what its answer is recognised by.
#[derive(Debug, PartialEq, Eq)]
pub struct V2Context {
    /// Algorithms.
    pub protection: Protection,
    /// SK_e and SK_a of what this side sends.
    pub own: Secret,
    /// SK_e and SK_a of what the peer sends.
    pub peer: Secret,
    /// Above every message ID that this side has used.
    pub next_request: u32,
    /// The request below `next_request`, if it was not answered.
    pub unanswered: Unanswered,
}

/// What the Delete of an IKEv1 SA is made from; with the cookies a [`DeleteContext`].
#[derive(Debug, PartialEq, Eq)]
pub struct V1Context {
    /// SKEYID_a.
    pub skeyid_a: Secret,
    /// Ka, of AES.
    pub ka: Secret,
    /// The last block of phase 1.
    pub last_block: Iv,
    /// The negotiated hash.
    pub hash: Hash,
}

/// A request that the peer may or may not have seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// All were answered.
    None,
    /// This one, which can be repeated.
    Kept(Vec<u8>),
    /// One that is too long to be kept, or is not to be repeated because the peer would begin new keys by it that nobody
    /// else knows. A Delete goes out under its message ID as well.
    Long,
}

/// Messages that were finished before the reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prebuilt {
    /// The peer answers a Delete (IKEv2).
    pub answered: bool,
    /// The message ID of the first Delete may be known to the peer as that of another request.
    pub doubtful: bool,
    /// The request before it, to be repeated first.
    pub repeated: Option<Vec<u8>>,
    /// Deletes by message ID, upward.
    pub deletes: Vec<Vec<u8>>,
}

/// Why bytes are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Of another version of the program.
    #[error("layout version {0} is not known here")]
    Version(u8),
    /// It ends too early.
    #[error("the record is truncated")]
    Truncated,
    /// Bytes after its end.
    #[error("bytes after the end of the record")]
    Trailing,
    /// A field has no meaning.
    #[error("the record is malformed: {0}")]
    Malformed(&'static str),
}

impl PeerTag {
    /// That of an identity, as it is shown.
    pub fn of(identity: &str) -> Self {
        Self(sha256(&[identity.as_bytes()]).first_chunk().copied().unwrap_or_default())
    }
}

impl Unanswered {
    /// Of a request that is outstanding.
    pub(crate) fn of(datagrams: &Datagrams) -> Self {
        match datagrams.iter().as_slice() {
            [one] if one.len() <= LONGEST_REQUEST && is_informational(one) => Self::Kept(one.clone()),
            _ => Self::Long,
        }
    }
}

fn is_informational(message: &[u8]) -> bool {
    parse::peek(message).is_some_and(|peek| peek.head.exchange == ExchangeType::INFORMATIONAL)
}

impl V2Context {
    /// Message IDs under which Deletes go out, upward, as the tries go on. With a long request that was not answered the
    /// first may be known to the peer as that request's: its answer does not prove that the peer has seen the Delete.
    pub fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        let doubtful = u32::from(self.unanswered == Unanswered::Long);
        let first = self.next_request.saturating_sub(doubtful);
        // Message IDs do not wrap, and the last one is not used (RFC 7296 section 2.2).
        (first..self.next_request.saturating_add(WALK)).filter(|id| *id != u32::MAX)
    }

    /// Builds Deletes.
    pub fn builder(&self, spis: (IkeSpi, IkeSpi), initiator: bool) -> Option<DeleteBuilder> {
        let sealer = Sealer::from_saved(self.protection, &self.own)?;
        Some(DeleteBuilder { sealer, spis, initiator })
    }

    /// All that is sent, finished.
    pub fn prebuilt(&self, spis: (IkeSpi, IkeSpi), initiator: bool) -> Prebuilt {
        let repeated = match &self.unanswered {
            Unanswered::Kept(request) => Some(request.clone()),
            Unanswered::None | Unanswered::Long => None,
        };
        let builder = self.builder(spis, initiator);
        let deletes = builder.iter().flat_map(|builder| self.ids().map(|id| builder.build(id))).collect();
        Prebuilt { answered: true, doubtful: self.unanswered == Unanswered::Long, repeated, deletes }
    }

    /// Opens what the peer sends.
    pub(crate) fn opener(&self) -> Option<Opener> {
        Opener::from_saved(self.protection, &self.peer)
    }
}

/// The message ID of an IKEv1 Delete after a reset is made from this and SKEYID_a: the same each time.
const V1_LABEL: &[u8] = b"postern recovery message id";

impl V1Context {
    /// The Delete, the same bytes each time; `None` if the key is none of AES's.
    pub fn delete(&self, cookies: (IkeSpi, IkeSpi)) -> Option<Vec<u8>> {
        let Self { skeyid_a, ka, last_block, hash } = self;
        let drawn = hash.prf(skeyid_a.expose(), &[V1_LABEL]);
        let id = drawn.expose().first_chunk().map_or(1, |bytes| u32::from_be_bytes(*bytes)).max(1);
        let context = DeleteContext {
            cookies,
            skeyid_a: skeyid_a.duplicate(),
            ka: ka.duplicate(),
            last_block: *last_block,
            hash: *hash,
        };
        delete_message(&context, id).ok()
    }

    /// The same, finished.
    pub fn prebuilt(&self, cookies: (IkeSpi, IkeSpi)) -> Prebuilt {
        let deletes = self.delete(cookies).into_iter().collect();
        Prebuilt { answered: false, doubtful: false, repeated: None, deletes }
    }
}

/// Builds Deletes of one IKEv2 SA; the same message ID gives the same bytes each time.
#[derive(Debug)]
pub struct DeleteBuilder {
    sealer: Sealer,
    spis: (IkeSpi, IkeSpi),
    initiator: bool,
}

impl DeleteBuilder {
    /// RFC 7296 section 1.4.1: an INFORMATIONAL request with a Delete payload of protocol IKE and no SPI.
    pub fn build(&self, message_id: u32) -> Vec<u8> {
        let Self { sealer, spis: (spi_i, spi_r), initiator } = self;
        let head = Head {
            spi_i: *spi_i,
            spi_r: *spi_r,
            exchange: ExchangeType::INFORMATIONAL,
            from_initiator: *initiator,
            response: false,
            message_id,
        };
        let mut chain = Vec::with_capacity(8);
        let first =
            emit::chain(&[Payload::Delete { protocol: ProtocolId::IKE, spis: Vec::new() }], &mut chain);
        let prefix = emit::sk_prefix(&head, first, sealer.sealed_length(chain.len()));
        sealer.seal_after_reset(message_id, prefix, &chain)
    }
}

impl SavedIke {
    /// With the finished Delete in place of the keys.
    #[must_use]
    pub fn into_prebuilt(mut self) -> Self {
        let finished = match &self.body {
            SavedBody::V2Context(context) => context.prebuilt(self.spis, self.initiator),
            SavedBody::V1Context(context) => context.prebuilt(self.spis),
            SavedBody::Whole(whole) => whole.context.prebuilt(self.spis, self.initiator),
            SavedBody::Prebuilt(_) => return self,
        };
        self.body = SavedBody::Prebuilt(finished);
        self
    }

    /// What is too long is left out: first the answer that may have to be repeated, then everything but what a Delete is
    /// made from.
    #[must_use]
    pub fn into_fitting(mut self) -> Self {
        if self.fits() {
            return self;
        }
        if let SavedBody::Whole(whole) = &mut self.body {
            whole.answer = None;
        }
        if self.fits() {
            return self;
        }
        let Self { spis, initiator, connection, peer, path, expires, body } = self;
        let body = match body {
            SavedBody::Whole(whole) => SavedBody::V2Context(whole.into_context()),
            other => other,
        };
        Self { spis, initiator, connection, peer, path, expires, body }
    }

    fn fits(&self) -> bool {
        !matches!(self.body, SavedBody::Whole(_)) || self.write().finish_within(LONGEST_WHOLE).is_some()
    }

    /// It is about to go on: from now on it is the next life that is saved, so that none begins twice, whatever becomes of
    /// this one. To be durable before [`Endpoint::restore`](crate::endpoint::Endpoint::restore) is given the record as it
    /// was.
    #[must_use]
    pub fn into_next_life(mut self) -> Self {
        if let SavedBody::Whole(whole) = &mut self.body {
            whole.life = whole.life.saturating_add(1);
        }
        self
    }

    /// Under what it is stored.
    pub fn key(&self) -> [u8; 16] {
        let mut key = [0; 16];
        let (first, second) = key.split_at_mut(8);
        first.copy_from_slice(&self.spis.0.0.to_be_bytes());
        second.copy_from_slice(&self.spis.1.0.to_be_bytes());
        key
    }

    /// To bytes.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        self.write().finish()
    }

    fn write(&self) -> Writer {
        let Self { spis: (spi_i, spi_r), initiator, connection, peer: PeerTag(peer), path, expires, body } =
            self;
        let Path { local, remote, natt } = path;
        let mut writer = Writer::new();
        let kind = match body {
            SavedBody::V2Context(_) => KIND_V2_CONTEXT,
            SavedBody::V1Context(_) => KIND_V1_CONTEXT,
            SavedBody::Prebuilt(_) => KIND_PREBUILT,
            SavedBody::Whole(_) => KIND_WHOLE,
        };
        writer.bytes(&[VERSION, kind]);
        writer.bytes(&spi_i.0.to_be_bytes());
        writer.bytes(&spi_r.0.to_be_bytes());
        writer.bytes(&[u8::from(*initiator) | u8::from(*natt) << 1]);
        writer.short(cut(connection).as_bytes());
        writer.bytes(peer);
        writer.address(local);
        writer.address(remote);
        let seconds = expires.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        writer.bytes(&seconds.to_be_bytes());
        match body {
            SavedBody::V2Context(context) => write_v2(&mut writer, context),
            SavedBody::V1Context(context) => write_v1(&mut writer, context),
            SavedBody::Prebuilt(prebuilt) => write_prebuilt(&mut writer, prebuilt),
            SavedBody::Whole(whole) => whole.write(&mut writer),
        }
        writer
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(bytes);
        let version = reader.u8()?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let kind = reader.u8()?;
        let spis = (IkeSpi(reader.u64()?), IkeSpi(reader.u64()?));
        let flags = reader.u8()?;
        if flags > 3 {
            return Err(RecordError::Malformed("unknown flags"));
        }
        let connection = str::from_utf8(reader.short()?).map_err(|_| RecordError::Malformed("a name"))?;
        let peer = PeerTag(reader.array()?);
        let (local, remote) = (reader.address()?, reader.address()?);
        let path = Path { local, remote, natt: flags & 2 != 0 };
        if local.is_ipv4() != remote.is_ipv4() {
            return Err(RecordError::Malformed("addresses of two families"));
        }
        let expires = UNIX_EPOCH
            .checked_add(Duration::from_secs(reader.u64()?))
            .ok_or(RecordError::Malformed("a time"))?;
        let body = match kind {
            KIND_V2_CONTEXT => SavedBody::V2Context(read_v2(&mut reader)?),
            KIND_V1_CONTEXT => SavedBody::V1Context(read_v1(&mut reader)?),
            KIND_PREBUILT => SavedBody::Prebuilt(read_prebuilt(&mut reader)?),
            KIND_WHOLE => SavedBody::Whole(Box::new(Whole::read(&mut reader)?)),
            _ => return Err(RecordError::Malformed("an unknown kind")),
        };
        reader.finish()?;
        let initiator = flags & 1 != 0;
        Ok(Self { spis, initiator, connection: connection.into(), peer, path, expires, body })
    }
}

const KIND_V2_CONTEXT: u8 = 1;
const KIND_PREBUILT: u8 = 2;
const KIND_V1_CONTEXT: u8 = 3;
const KIND_WHOLE: u8 = 4;

const UNANSWERED_NONE: u8 = 0;
const UNANSWERED_KEPT: u8 = 1;
const UNANSWERED_LONG: u8 = 2;

/// Most messages of a prebuilt record.
const MOST_DELETES: u8 = 8;

/// The first 255 bytes of a name, which is only shown.
fn cut(name: &str) -> &str {
    name.get(..name.floor_char_boundary(255)).unwrap_or_default()
}

fn write_v2(writer: &mut Writer, context: &V2Context) {
    let V2Context { protection, own, peer, next_request, unanswered } = context;
    let (encr, key_bits, integ) = protection.numbers();
    writer.bytes(&encr.0.to_be_bytes());
    writer.bytes(&key_bits.to_be_bytes());
    writer.bytes(&integ.0.to_be_bytes());
    writer.short(own.expose());
    writer.short(peer.expose());
    writer.bytes(&next_request.to_be_bytes());
    match unanswered {
        Unanswered::None => writer.bytes(&[UNANSWERED_NONE]),
        Unanswered::Kept(request) => {
            writer.bytes(&[UNANSWERED_KEPT]);
            writer.long(request);
        }
        Unanswered::Long => writer.bytes(&[UNANSWERED_LONG]),
    }
}

fn read_v2(reader: &mut Reader<'_>) -> Result<V2Context, RecordError> {
    let (encr, key_bits, integ) = (EncrId(reader.u16()?), reader.u16()?, IntegId(reader.u16()?));
    let protection = Protection::from_numbers(encr, key_bits, integ)
        .ok_or(RecordError::Malformed("algorithms that are not known here"))?;
    let (own, peer) = (Secret::new(reader.short()?), Secret::new(reader.short()?));
    let length = protection.encr_length() + protection.integ_length();
    if own.len() != length || peer.len() != length {
        return Err(RecordError::Malformed("keys of a wrong length"));
    }
    let next_request = reader.u32()?;
    let unanswered = match reader.u8()? {
        UNANSWERED_NONE => Unanswered::None,
        UNANSWERED_KEPT => Unanswered::Kept(reader.long()?.to_vec()),
        UNANSWERED_LONG => Unanswered::Long,
        _ => return Err(RecordError::Malformed("an unknown state of the last request")),
    };
    Ok(V2Context { protection, own, peer, next_request, unanswered })
}

fn write_v1(writer: &mut Writer, context: &V1Context) {
    let V1Context { skeyid_a, ka, last_block, hash } = context;
    writer.bytes(&hash.number().to_be_bytes());
    writer.short(skeyid_a.expose());
    writer.short(ka.expose());
    writer.bytes(last_block);
}

fn read_v1(reader: &mut Reader<'_>) -> Result<V1Context, RecordError> {
    let hash = Hash::from_number(reader.u16()?).ok_or(RecordError::Malformed("an unknown hash"))?;
    let (skeyid_a, ka) = (Secret::new(reader.short()?), Secret::new(reader.short()?));
    if skeyid_a.len() != hash.len() || ![16, 24, 32].contains(&ka.len()) {
        return Err(RecordError::Malformed("keys of a wrong length"));
    }
    Ok(V1Context { skeyid_a, ka, last_block: reader.array()?, hash })
}

fn write_prebuilt(writer: &mut Writer, prebuilt: &Prebuilt) {
    let Prebuilt { answered, doubtful, repeated, deletes } = prebuilt;
    let most = deletes.len().min(usize::from(MOST_DELETES));
    let count = u8::try_from(most).unwrap_or(MOST_DELETES);
    let flags = u8::from(*answered) | u8::from(repeated.is_some()) << 1 | u8::from(*doubtful) << 2;
    writer.bytes(&[flags, count]);
    for message in repeated.iter().chain(deletes.iter().take(most)) {
        writer.long(message);
    }
}

fn read_prebuilt(reader: &mut Reader<'_>) -> Result<Prebuilt, RecordError> {
    let (flags, count) = (reader.u8()?, reader.u8()?);
    if flags > 7 || count > MOST_DELETES {
        return Err(RecordError::Malformed("unknown flags or too many messages"));
    }
    let repeated = if flags & 2 == 0 { None } else { Some(reader.long()?.to_vec()) };
    let deletes = (0..count).map(|_| reader.long().map(<[u8]>::to_vec)).collect::<Result<_, _>>()?;
    Ok(Prebuilt { answered: flags & 1 != 0, doubtful: flags & 4 != 0, repeated, deletes })
}

/// What the fuzz target and the property tests call: any bytes are a record or an error; a record gives the same bytes
/// again, and messages of which none is empty.
///
/// # Panics
/// When that does not hold.
#[cfg(any(test, feature = "exercise"))]
pub fn fuzz(bytes: &[u8]) {
    if let Ok(record) = SavedIke::decode(bytes) {
        let again = record.encode();
        assert!(*again == bytes, "it is written as it was read");
        if let SavedBody::V2Context(context) = &record.body {
            let prebuilt = context.prebuilt(record.spis, record.initiator);
            assert!(prebuilt.deletes.iter().all(|message| message.len() > emit::SK_PREFIX_LEN));
        }
        if let SavedBody::V1Context(context) = &record.body {
            assert!(context.delete(record.spis).is_some_and(|message| message.len() > 28));
        }
        crate::recovery::fuzz(record);
    }
}

impl Writer {
    fn address(&mut self, address: &SocketAddr) {
        match address {
            SocketAddr::V4(address) => {
                self.bytes(&[4]);
                self.bytes(&address.ip().octets());
            }
            SocketAddr::V6(address) => {
                self.bytes(&[6]);
                self.bytes(&address.ip().octets());
            }
        }
        self.bytes(&address.port().to_be_bytes());
    }
}

impl Reader<'_> {
    fn address(&mut self) -> Result<SocketAddr, RecordError> {
        match self.u8()? {
            4 => Ok(SocketAddr::from((self.array::<4>()?, self.u16()?))),
            6 => Ok(SocketAddr::from((self.array::<16>()?, self.u16()?))),
            _ => Err(RecordError::Malformed("an address of an unknown family")),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
