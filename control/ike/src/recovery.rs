//! Telling peers after a reset that their IKE SAs are gone (RST-5, RST-9), without I/O: saved SAs go in, datagrams come out
//! when it is their turn, answers go in, and what was told comes out, to be removed from the storage.
//!
//! - Paced: a limit to messages a second, and one to peers that were written to for the first time and may still answer.
//! - Each peer's messages are repeated after longer and longer waits, until it answers (IKEv2) or a number of times.
//!   With each repetition one more message ID is tried, upward ([`record::WALK`](crate::record::WALK)): a peer takes
//!   exactly the next one of its window and ignores all others.
//! - An answer counts only if it is authentic by the saved keys; if none were saved (RST-8), by SPIs and message ID.
//! - An authentic message of a peer that comes from elsewhere shows where it is now (RST-10).
//! - All that is sent is the same each time, so a second reset in the middle does no harm: what was not told yet is still
//!   in the storage, and is told again in the same words.
//!
//! A peer that deletes its SA and whose answer is lost says nothing any more; it counts as not having answered.

use core::time::Duration;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use hashbrown::HashMap;

use crate::Random;
use crate::crypto::sk::Opener;
use crate::endpoint::Now;
use crate::message::IkeSpi;
use crate::message::parse::{self, Body};
use crate::message::registry::{ExchangeType, PayloadType, ProtocolId};
use crate::output::Path;
use crate::record::{DeleteBuilder, PeerTag, Prebuilt, SavedBody, SavedIke, Unanswered};

/// How fast and how often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Messages a second; 0: no limit.
    pub rate: u32,
    /// Peers that were written to for the first time and may still answer.
    pub in_flight: u32,
    /// Transmissions to one peer in all, if it answers (IKEv2).
    pub tries: u8,
    /// Transmissions to one peer in all, if it does not answer (IKEv1).
    pub silent_tries: u8,
    /// Before the first repetition.
    pub first: Duration,
    /// Of each wait to the one before.
    pub factor: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rate: 100_000,
            in_flight: 8_192,
            tries: 7,
            silent_tries: 3,
            first: Duration::from_millis(500),
            factor: 1.8,
        }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// SAs that were in the backup.
    pub total: u64,
    /// Of these, past their end: nothing is to be said.
    pub expired: u64,
    /// Their peers have answered.
    pub told: u64,
    /// All transmissions were made, and no answer was to be expected (IKEv1).
    pub sent: u64,
    /// Their peers have not answered.
    pub unanswered: u64,
    /// The same, but they have a new IKE SA.
    pub superseded: u64,
    /// Not written to yet.
    pub waiting: u64,
    /// Written to, and neither answered nor given up.
    pub under_way: u64,
    /// Messages.
    pub messages: u64,
    /// Answers that were not authentic.
    pub forged: u64,
}

impl Progress {
    /// Whether nothing is left to be done.
    pub const fn is_done(&self) -> bool {
        self.waiting == 0 && self.under_way == 0
    }
}

/// The end for one SA: what was saved of it can go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Under what it is stored.
    pub key: [u8; 16],
    /// Its connection.
    pub connection: Arc<str>,
    /// Where its peer was last seen.
    pub path: Path,
    /// How it ended.
    pub how: How,
}

/// See [`Ended`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It was past its end.
    Expired,
    /// The peer has answered.
    Told,
    /// Said as often as it is to be said.
    Sent,
    /// The peer has not answered.
    Unanswered,
    /// The peer has not answered, but it has a new IKE SA.
    Superseded,
    /// No message can be built from what was saved.
    Unusable,
}

/// The burst.
pub struct Recovery {
    settings: Settings,
    random: Box<dyn Random + Send>,
    /// Slots of peers that were not written to yet.
    waiting: VecDeque<usize>,
    slots: Vec<Option<Telling>>,
    by_spis: HashMap<(IkeSpi, IkeSpi), usize>,
    by_peer: HashMap<PeerTag, Vec<usize>>,
    /// When which slot has its turn again, and after how many transmissions.
    due: BinaryHeap<Reverse<(Instant, usize, u8)>>,
    outbox: VecDeque<(Path, Vec<u8>)>,
    ended: VecDeque<Ended>,
    /// Of those under way, how many have had one transmission and may still answer it.
    fresh: u32,
    /// When the next message would come if all came in equal distances.
    turn: Instant,
    progress: Progress,
}

/// One SA.
struct Telling {
    key: [u8; 16],
    spis: (IkeSpi, IkeSpi),
    initiator: bool,
    connection: Arc<str>,
    path: Path,
    /// Where an authentic message of the peer came from. It may be a copy that someone else sent, so the saved path stays
    /// in use.
    elsewhere: Option<Path>,
    /// How often that has changed.
    moves: u8,
    source: Source,
    /// The request before the Deletes.
    repeated: Option<Vec<u8>>,
    /// Its message ID, if it is a Delete of the IKE SA itself: a clean stop that the peer did not answer.
    goodbye: Option<u32>,
    /// Message ID of the first Delete; `None`: nothing is answered.
    first_id: Option<u32>,
    /// See [`Prebuilt::doubtful`].
    doubtful: bool,
    deletes: Vec<Vec<u8>>,
    /// So many of the Deletes were sent.
    used: usize,
    tries: u8,
    wait: Duration,
    /// The doubtful Delete was answered.
    perhaps: bool,
    superseded: bool,
}

/// Where Deletes come from.
enum Source {
    Built,
    Keys { builder: DeleteBuilder, opener: Opener, ids: Vec<u32> },
}

/// Messages may come so much before their turn, because timers are not exact.
const TOLERANCE: Duration = Duration::from_millis(2);

/// A peer's new places that are believed.
const MOVES: u8 = 4;

/// Longest wait before a repetition.
const MAX_WAIT: Duration = Duration::from_mins(1);

impl Recovery {
    /// With what was saved.
    pub fn new(
        records: impl IntoIterator<Item = SavedIke>,
        settings: Settings,
        now: Now,
        random: Box<dyn Random + Send>,
    ) -> Self {
        let mut this = Self {
            settings,
            random,
            waiting: VecDeque::new(),
            slots: Vec::new(),
            by_spis: HashMap::new(),
            by_peer: HashMap::new(),
            due: BinaryHeap::new(),
            outbox: VecDeque::new(),
            ended: VecDeque::new(),
            fresh: 0,
            turn: now.monotonic,
            progress: Progress::default(),
        };
        for record in records {
            this.add(record, now.wall);
        }
        this
    }

    fn add(&mut self, record: SavedIke, wall: SystemTime) {
        self.progress.total += 1;
        let (key, expires, peer) = (record.key(), record.expires, record.peer);
        let (connection, path) = (Arc::clone(&record.connection), record.path);
        let early = if expires <= wall { Some(How::Expired) } else { None };
        match early.map_or_else(|| Telling::new(record, key, self.settings.first).ok_or(How::Unusable), Err) {
            Ok(telling) => {
                let slot = self.slots.len();
                self.by_spis.insert(telling.spis, slot);
                self.by_peer.entry(peer).or_default().push(slot);
                self.slots.push(Some(telling));
                self.waiting.push_back(slot);
                self.progress.waiting += 1;
            }
            Err(how) => {
                match how {
                    How::Expired => self.progress.expired += 1,
                    _ => self.progress.unanswered += 1,
                }
                self.ended.push_back(Ended { key, connection, path, how });
            }
        }
    }

    /// The next message to send now.
    pub fn poll(&mut self, now: Instant) -> Option<(Path, Vec<u8>)> {
        loop {
            if let Some(message) = self.outbox.pop_front() {
                self.progress.messages += 1;
                return Some(message);
            }
            if self.turn > now + TOLERANCE {
                return None;
            }
            if let Some(Reverse((at, slot, tries))) = self.due.peek().copied()
                && at <= now
            {
                self.due.pop();
                self.repeat(now, slot, tries);
                continue;
            }
            if self.fresh >= self.settings.in_flight {
                return None;
            }
            let slot = self.waiting.pop_front()?;
            if self.slots.get(slot).is_some_and(Option::is_some) {
                self.progress.waiting -= 1;
                self.progress.under_way += 1;
                self.transmit(now, slot);
            }
        }
    }

    /// When [`poll`](Self::poll) has something next; `None`: when a peer answers, or never.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let ready =
            !self.outbox.is_empty() || (!self.waiting.is_empty() && self.fresh < self.settings.in_flight);
        let due = self.due.peek().map(|Reverse((at, ..))| *at);
        if ready { Some(self.turn) } else { due.map(|due| due.max(self.turn)) }
    }

    /// Something that arrived. Whether it belongs to an SA of before the reset; it needs no more attention then.
    pub fn handle_datagram(&mut self, path: Path, datagram: &[u8]) -> bool {
        let Some(spis) = spis(datagram) else { return false };
        let Some(slot) = self.by_spis.get(&spis).copied() else { return false };
        let Some(Some(telling)) = self.slots.get_mut(slot) else { return false };
        match telling.judge(datagram) {
            Judgement::Nothing => {}
            Judgement::Forged => self.progress.forged += 1,
            Judgement::Alive => {
                let known = telling.path == path || telling.elsewhere == Some(path);
                if !known && telling.moves < MOVES && telling.used > 0 {
                    telling.elsewhere = Some(path);
                    telling.moves += 1;
                    telling.enqueue(&mut self.outbox);
                }
            }
            Judgement::Perhaps => telling.perhaps = true,
            Judgement::Told => self.end(slot, How::Told),
        }
        true
    }

    /// A peer has a new IKE SA.
    pub fn superseded(&mut self, connection: &str, peer: PeerTag) {
        for slot in self.by_peer.get(&peer).into_iter().flatten() {
            if let Some(Some(telling)) = self.slots.get_mut(*slot)
                && *telling.connection == *connection
            {
                telling.superseded = true;
            }
        }
    }

    /// The next SA that is done with.
    pub fn poll_ended(&mut self) -> Option<Ended> {
        self.ended.pop_front()
    }

    /// How far it is.
    pub const fn progress(&self) -> Progress {
        self.progress
    }

    fn repeat(&mut self, now: Instant, slot: usize, tries: u8) {
        let Some(Some(telling)) = self.slots.get(slot) else { return };
        if telling.tries != tries {
            return;
        }
        if tries == 1 && telling.first_id.is_some() {
            self.fresh = self.fresh.saturating_sub(1);
        }
        let limit = if telling.first_id.is_some() { self.settings.tries } else { self.settings.silent_tries };
        if tries < limit.max(1) {
            return self.transmit(now, slot);
        }
        let how = match telling {
            Telling { first_id: None, .. } => How::Sent,
            Telling { perhaps: true, .. } => How::Told,
            Telling { superseded: true, .. } => How::Superseded,
            _ => How::Unanswered,
        };
        if let Some(Some(telling)) = self.slots.get_mut(slot) {
            // It counts as fresh no longer.
            telling.tries = telling.tries.max(2);
        }
        self.end(slot, how);
    }

    fn transmit(&mut self, now: Instant, slot: usize) {
        let Some(Some(telling)) = self.slots.get_mut(slot) else { return };
        let round = usize::from(telling.tries);
        telling.tries += 1;
        if telling.tries == 1 && telling.first_id.is_some() {
            self.fresh += 1;
        }
        telling.reach(1 + usize::from(telling.doubtful) + round);
        let messages = telling.enqueue(&mut self.outbox);
        let wait = telling.wait;
        let longer = Duration::try_from_secs_f32(wait.as_secs_f32() * self.settings.factor);
        telling.wait = longer.unwrap_or(MAX_WAIT).min(MAX_WAIT);
        let spread = self.random.u64().checked_rem(u64::try_from(wait.as_nanos() / 5).unwrap_or(0));
        // A tenth less or more.
        let at = now + wait / 10 * 9 + Duration::from_nanos(spread.unwrap_or(0));
        self.due.push(Reverse((at, slot, telling.tries)));
        if let Some(distance) = 1_000_000_000_u32.checked_div(self.settings.rate) {
            self.turn = self.turn.max(now) + Duration::from_nanos(distance.into()) * messages;
        }
    }

    fn end(&mut self, slot: usize, how: How) {
        let Some(telling) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        if telling.tries == 1 && telling.first_id.is_some() {
            self.fresh = self.fresh.saturating_sub(1);
        }
        self.by_spis.remove(&telling.spis);
        self.progress.under_way -= 1;
        match how {
            How::Told => self.progress.told += 1,
            How::Sent => self.progress.sent += 1,
            How::Superseded => self.progress.superseded += 1,
            How::Expired => self.progress.expired += 1,
            How::Unanswered | How::Unusable => self.progress.unanswered += 1,
        }
        let Telling { key, connection, path, .. } = telling;
        self.ended.push_back(Ended { key, connection, path, how });
    }
}

/// What a datagram says.
enum Judgement {
    /// Nothing that helps.
    Nothing,
    /// It is not authentic.
    Forged,
    /// The peer still has the SA.
    Alive,
    /// The Delete was answered, unless it was what had the same message ID before.
    Perhaps,
    /// The Delete was answered.
    Told,
}

impl Telling {
    fn new(record: SavedIke, key: [u8; 16], wait: Duration) -> Option<Self> {
        let SavedIke { spis, initiator, connection, peer: _, path, expires: _, body } = record;
        let body = match body {
            SavedBody::Whole(whole) => SavedBody::V2Context(whole.into_context()),
            body => body,
        };
        let mut goodbye = None;
        let (source, repeated, first_id, doubtful, deletes) = match body {
            SavedBody::Whole(_) => return None,
            SavedBody::V2Context(context) => {
                let ids: Vec<u32> = context.ids().collect();
                let source = Source::Keys {
                    builder: context.builder(spis, initiator)?,
                    opener: context.opener()?,
                    ids: ids.clone(),
                };
                let doubtful = context.unanswered == Unanswered::Long;
                let own = Opener::from_saved(context.protection, &context.own);
                let repeated = match context.unanswered {
                    Unanswered::Kept(request) => Some(request),
                    Unanswered::None | Unanswered::Long => None,
                };
                goodbye = own.zip(repeated.as_ref()).and_then(|(own, request)| goodbye_with(&own, request));
                (source, repeated, Some(*ids.first()?), doubtful, Vec::new())
            }
            SavedBody::V1Context(context) => (Source::Built, None, None, false, vec![context.delete(spis)?]),
            SavedBody::Prebuilt(Prebuilt { answered, doubtful, repeated, deletes }) => {
                let first = parse::peek(deletes.first()?)?.head.message_id;
                goodbye = repeated.as_ref().and_then(|request| goodbye_like(deletes.first()?, request));
                (Source::Built, repeated, answered.then_some(first), doubtful, deletes)
            }
        };
        Some(Self {
            key,
            spis,
            initiator,
            connection,
            path,
            elsewhere: None,
            moves: 0,
            source,
            repeated,
            goodbye,
            first_id,
            doubtful,
            deletes,
            used: 0,
            tries: 0,
            wait,
            perhaps: false,
            superseded: false,
        })
    }

    /// From now on so many Deletes are sent, or as many as there are.
    fn reach(&mut self, count: usize) {
        if let Source::Keys { builder, ids, .. } = &self.source {
            let more = ids.iter().take(count).skip(self.deletes.len());
            self.deletes.extend(more.map(|id| builder.build(*id)));
        }
        self.used = count.min(self.deletes.len());
    }

    /// Sends all that there is to be sent.
    fn enqueue(&self, outbox: &mut VecDeque<(Path, Vec<u8>)>) -> u32 {
        let before = outbox.len();
        for path in self.elsewhere.into_iter().chain([self.path]) {
            let messages = self.repeated.iter().chain(self.deletes.iter().take(self.used));
            outbox.extend(messages.map(|message| (path, message.clone())));
        }
        u32::try_from(outbox.len() - before).unwrap_or(u32::MAX)
    }

    fn judge(&self, datagram: &[u8]) -> Judgement {
        let Some(first) = self.first_id else { return Judgement::Nothing };
        let Ok(parsed) = parse::message(datagram) else { return Judgement::Nothing };
        let head = parsed.head;
        let (Body::Encrypted { aad, sealed, .. } | Body::Fragment { aad, sealed, .. }) = parsed.body else {
            return Judgement::Nothing;
        };
        if head.from_initiator == self.initiator {
            return Judgement::Nothing;
        }
        match &self.source {
            Source::Keys { opener, .. } if opener.open(aad, sealed).is_none() => return Judgement::Forged,
            Source::Built if !head.response => return Judgement::Nothing,
            Source::Keys { .. } | Source::Built => {}
        }
        if !head.response {
            return Judgement::Alive;
        }
        if self.goodbye == Some(head.message_id) && head.exchange == ExchangeType::INFORMATIONAL {
            return Judgement::Told;
        }
        let answered = head.message_id.checked_sub(first).and_then(|at| usize::try_from(at).ok());
        match answered.filter(|at| *at < self.used && head.exchange == ExchangeType::INFORMATIONAL) {
            None => Judgement::Nothing,
            Some(0) if self.doubtful => Judgement::Perhaps,
            Some(_) => Judgement::Told,
        }
    }
}

/// The message ID of a request, if it is a Delete of the IKE SA.
fn goodbye_with(own: &Opener, request: &[u8]) -> Option<u32> {
    let parsed = parse::message(request).ok()?;
    let Body::Encrypted { first_inner: PayloadType::DELETE, aad, sealed } = parsed.body else { return None };
    // Generic header, then the protocol (RFC 7296 section 3.11).
    let of_ike = own.open(aad, sealed)?.get(4) == Some(&ProtocolId::IKE.0);
    of_ike.then_some(parsed.head.message_id)
}

/// The same without keys: a Delete that is as long as the `finished` one, where the length is not rounded up to blocks: it
/// names no SPI.
fn goodbye_like(finished: &[u8], request: &[u8]) -> Option<u32> {
    let parsed = parse::message(request).ok()?;
    let is_delete = matches!(parsed.body, Body::Encrypted { first_inner: PayloadType::DELETE, .. });
    let told = is_delete && request.len() == finished.len() && !request.len().is_multiple_of(4);
    told.then_some(parsed.head.message_id)
}

/// The first 16 bytes of a message of either version.
fn spis(datagram: &[u8]) -> Option<(IkeSpi, IkeSpi)> {
    let (first, rest) = datagram.split_first_chunk()?;
    let (second, _) = rest.split_first_chunk()?;
    Some((IkeSpi(u64::from_be_bytes(*first)), IkeSpi(u64::from_be_bytes(*second))))
}

/// For [`record::fuzz`](crate::record::fuzz): whatever was saved is told, or not, in bounded time.
#[cfg(any(test, feature = "exercise"))]
pub(crate) fn fuzz(record: SavedIke) {
    struct Zero;
    impl Random for Zero {
        fn fill(&mut self, out: &mut [u8]) {
            out.fill(0);
        }
    }
    let mut now = Instant::now();
    let start = Now { monotonic: now, wall: SystemTime::UNIX_EPOCH };
    let mut recovery = Recovery::new([record], Settings::default(), start, Box::new(Zero));
    for _ in 0..64 {
        while let Some((path, message)) = recovery.poll(now) {
            recovery.handle_datagram(path, &message);
        }
        match recovery.poll_timeout() {
            Some(at) => now = at.max(now),
            None => break,
        }
    }
    assert!(recovery.progress().is_done());
    assert!(recovery.poll_ended().is_some());
}

#[cfg(test)]
mod tests;
