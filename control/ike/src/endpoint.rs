//! The endpoint: all IKE SAs of this node, behind one door.
//!
//! Datagrams, timeouts, results of jobs and commands come in as calls; effects come out of [`Endpoint::poll_output`] in
//! order. A datagram is routed by SPIs to its SA, or else, as a first message, judged by admission; nothing is believed
//! before it is authenticated (DESIGN decision 2).

mod restore;

use core::net::IpAddr;
use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use hashbrown::HashMap;

use crate::Random;
use crate::admission::{Admission, Verdict};
use crate::auth::identity::Identity;
use crate::config::{Connection, PoolConfig, Start};
use crate::connections::Connections;
use crate::counters::Counters;
use crate::crypto::keys::IkeKeys;
use crate::ignored::Ignored;
use crate::job::{Done, Job, JobId};
use crate::message::legality::Payloads;
use crate::message::parse::{self, Body, First, ParseError, Parsed};
use crate::message::registry::{ExchangeType, NotifyType};
use crate::message::{Head, IkeSpi, Notify, Payload, emit};
use crate::negotiate::IkeSuite;
use crate::output::{ChildId, Effect, IkeSaView, Output, Path, SaId};
use crate::pools::Pools;
use crate::qcd::TokenMaker;
use crate::report::{CloseReason, Report};
use crate::sa::Sa;
use crate::settings::Settings;
use crate::timers::Timers;
use crate::v1;
use crate::v2::{Estate, IkeSa, PeerSa, Task};

mod v1_routing;

/// What time it is, on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For timeouts.
    pub monotonic: Instant,
    /// For the validity of certificates.
    pub wall: SystemTime,
}

/// What an endpoint asks of the machine it runs on; answers must come at once.
pub trait Host {
    /// An inbound SPI that no SA of this node has, above 255.
    fn allocate_spi(&mut self, random: &mut dyn Random) -> u32;

    /// This inbound SPI, which an SA of before a reset has; `false` if another SA has it.
    fn claim_spi(&mut self, spi: u32) -> bool;

    /// The SPI is free again.
    fn release_spi(&mut self, spi: u32);

    /// Keys of an IKE SA, for a table with which captures are decrypted while something is debugged; as a rule nothing is
    /// done with them.
    fn note_keys(&self, _suite: &IkeSuite, _spis: (IkeSpi, IkeSpi), _keys: &IkeKeys) {}

    /// The address from which packets to `remote` leave; `None` if there is no route.
    fn source_address(&mut self, remote: IpAddr) -> Option<IpAddr>;
}

/// What a command is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// All IKE SAs of a connection.
    Connection(String),
    /// The children of this name of a connection.
    Children(String, String),
    /// One IKE SA.
    Ike(SaId),
    /// One CHILD_SA.
    Child(ChildId),
}

/// Why a command cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No such connection.
    #[error("no connection is called {0:?}")]
    NoConnection(String),
    /// No such child.
    #[error("connection {0:?} has no child {1:?}")]
    NoChild(String, String),
    /// The peer's address is not configured.
    #[error("connection {0:?} has no `remote` to initiate to: the peer has to begin")]
    NoRemote(String),
    /// There is no way to the peer.
    #[error("there is no route to {0}")]
    NoRoute(IpAddr),
    /// The target is not there.
    #[error("nothing of that is up")]
    NotUp,
}

/// What [`Endpoint::initiate`] began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The IKE SA.
    pub sa: SaId,
    /// It was there before.
    pub reused: bool,
}

/// How often a datagram that was not acted on is reported; the counters have them all.
const IGNORED_REPORTS: Duration = Duration::from_secs(1);

/// Unprotected errors that may be sent in one period.
const ERRORS: u32 = 100;

/// The period.
const ERRORS_PERIOD: Duration = Duration::from_secs(1);

/// All IKE SAs of this node.
pub struct Endpoint {
    core: Core,
    sas: HashMap<SaId, Sa>,
}

/// What the state machines share, whichever SA they work on.
pub struct Core {
    pub(crate) settings: Settings,
    pub(crate) connections: Connections,
    pub(crate) pools: Pools,
    pub(crate) random: Box<dyn Random + Send>,
    pub(crate) host: Box<dyn Host + Send>,
    pub(crate) timers: Timers<SaId>,
    pub(crate) counters: Counters,
    pub(crate) admission: Admission,
    outputs: VecDeque<Output>,
    jobs: HashMap<JobId, SaId>,
    next_job: u64,
    next_sa: u64,
    next_child: u64,
    /// By the SPI that this side chose.
    by_spi: HashMap<IkeSpi, SaId>,
    /// First messages that were answered, by who sent them, so that a retransmission finds its SA.
    half_open: HashMap<(IpAddr, u16, IkeSpi), SaId>,
    /// Which IKE SA has a child.
    pub(crate) children: HashMap<ChildId, SaId>,
    /// Established IKE SAs by connection and the peer's identity.
    pub(crate) peers: HashMap<(Arc<str>, Identity), Vec<PeerSa>>,
    /// IKE SAs that a handler made.
    pub(crate) born: Vec<Sa>,
    /// What a handler wants done to other SAs, afterwards.
    pub(crate) errands: Vec<Errand>,
    last_ignored: Option<Instant>,
    /// RFC 6290; none: peers get no tokens.
    pub(crate) tokens: Option<TokenMaker>,
    /// Unprotected errors sent in the current period.
    errors: Option<(Instant, u32)>,
}

/// Something a handler of one SA wants of another.
pub(crate) enum Errand {
    /// Close it: the peer has a newer one.
    Supersede {
        /// The SA.
        sa: SaId,
        /// The peer has forgotten it and is not told.
        silently: bool,
    },
    /// Take over the children of an IKE SA that is replaced.
    Inherit {
        /// The successor.
        sa: SaId,
        /// What it takes over.
        estate: Box<Estate>,
    },
    /// Close it before long, unless the peer does: it was made by a rekey that another one won.
    Redundant {
        /// The SA.
        sa: SaId,
    },
    /// IKEv1: begin a new IKE SA in place of this one.
    Renew {
        /// The SA.
        sa: SaId,
    },
    /// IKEv1: the children of one IKE SA go to another.
    Succeed {
        /// From this one,
        from: SaId,
        /// to this one.
        to: SaId,
        /// This side began the newer one, and deletes the other.
        mine: bool,
    },
    /// IKEv1: the peer has deleted children in an IKE SA that this one replaced.
    PeerDeleted {
        /// The SA.
        sa: SaId,
        /// The peer's SPIs.
        spis: Vec<u32>,
    },
    /// Begin again what was lost.
    Restart {
        /// The connection.
        connection: Arc<str>,
        /// Its child.
        child: Arc<str>,
    },
}

impl Core {
    /// Puts an effect in the queue.
    pub(crate) fn emit(&mut self, sa: SaId, effect: Effect) {
        self.outputs.push_back(Output { sa: Some(sa), effect });
    }

    /// Gives out a job of an SA.
    pub(crate) fn compute(&mut self, sa: SaId, job: Job) -> JobId {
        let id = JobId(self.next_job);
        self.next_job += 1;
        self.jobs.insert(id, sa);
        self.emit(sa, Effect::Compute { id, job });
        id
    }

    /// Tells people.
    pub(crate) fn report(&mut self, sa: SaId, report: Report) {
        self.emit(sa, Effect::Report(report));
    }

    /// A name for a new CHILD_SA of `sa`.
    pub(crate) fn new_child(&mut self, sa: SaId) -> ChildId {
        let id = ChildId(self.next_child);
        self.next_child += 1;
        self.children.insert(id, sa);
        id
    }

    /// A name for a new IKE SA and an SPI under which its messages are found.
    pub(crate) fn new_sa(&mut self) -> (SaId, IkeSpi) {
        let id = SaId(self.next_sa);
        self.next_sa += 1;
        loop {
            let spi = IkeSpi(self.random.u64());
            if spi != IkeSpi::NONE && !self.by_spi.contains_key(&spi) {
                self.by_spi.insert(spi, id);
                return (id, spi);
            }
        }
    }

    /// A name for an IKE SA of before a reset, whose messages are found under that SPI; `None` if another one has it.
    pub(crate) fn known_sa(&mut self, spi: IkeSpi) -> Option<SaId> {
        if spi == IkeSpi::NONE || self.by_spi.contains_key(&spi) {
            return None;
        }
        let id = SaId(self.next_sa);
        self.next_sa += 1;
        self.by_spi.insert(spi, id);
        Some(id)
    }

    /// A datagram is not acted on.
    pub(crate) fn ignore(&mut self, now: Now, sa: Option<SaId>, path: Path, reason: Ignored) {
        self.counters.ignored(reason);
        let due = self.last_ignored.is_none_or(|last| now.monotonic.duration_since(last) >= IGNORED_REPORTS);
        if due {
            self.last_ignored = Some(now.monotonic);
            let effect = Effect::Report(Report::Ignored { path, reason });
            self.outputs.push_back(Output { sa, effect });
        }
    }

    /// Judges a first message; one that is not admitted is dealt with.
    fn admits(&mut self, now: Now, path: Path, head: Head, nonce: &[u8], cookie: Option<&[u8]>) -> bool {
        let Self { admission, random, .. } = self;
        let source = path.remote.ip();
        match admission.judge(now.monotonic, source, head.spi_i, nonce, cookie, &mut **random) {
            Verdict::Admit => return true,
            Verdict::DemandCookie { cookie, reason } => {
                let head = Head { response: true, from_initiator: false, ..head };
                let notify = Payload::Notify(Notify::new(NotifyType::COOKIE, cookie));
                self.reply(path, emit::plain(&head, &[notify]));
                self.ignore(now, None, path, reason);
            }
            Verdict::Refuse(reason) => self.ignore(now, None, path, reason),
        }
        false
    }

    /// Sends one datagram that belongs to no SA.
    fn reply(&mut self, path: Path, datagram: Vec<u8>) {
        self.outputs.push_back(Output { sa: None, effect: Effect::Transmit { path, datagram } });
    }

    fn forget(&mut self, sa: &Sa) {
        if self.by_spi.get(&sa.local_spi()) == Some(&sa.id()) {
            self.by_spi.remove(&sa.local_spi());
        }
        if let Some(key) = sa.half_open_key()
            && self.half_open.get(&key) == Some(&sa.id())
        {
            self.half_open.remove(&key);
        }
        self.timers.cancel(&sa.id());
    }

    /// A first message's copies are nobody's any more.
    pub(crate) fn forget_first_message(&mut self, key: (IpAddr, u16, IkeSpi)) {
        self.half_open.remove(&key);
    }

    /// A name and SPI that are not used after all.
    pub(crate) fn release_sa(&mut self, (id, spi): (SaId, IkeSpi)) {
        if self.by_spi.get(&spi) == Some(&id) {
            self.by_spi.remove(&spi);
        }
    }

    /// An IKE SA of a peer is gone.
    pub(crate) fn forget_peer(&mut self, connection: &Connection, identity: &Identity, id: SaId) {
        let key = (Arc::clone(&connection.name), identity.clone());
        if let Some(peers) = self.peers.get_mut(&key) {
            peers.retain(|(sa, ..)| *sa != id);
            if peers.is_empty() {
                self.peers.remove(&key);
            }
        }
    }

    /// Whether an unprotected error may be sent now: a few in a second, so that nobody is flooded through this node.
    fn may_answer(&mut self, now: Now) -> bool {
        match self.errors {
            Some((since, count)) if now.monotonic.duration_since(since) < ERRORS_PERIOD => {
                self.errors = Some((since, count.saturating_add(1)));
                count < ERRORS
            }
            _ => {
                self.errors = Some((now.monotonic, 1));
                true
            }
        }
    }
}

impl Endpoint {
    /// One without a connection.
    pub fn new(settings: Settings, host: Box<dyn Host + Send>, random: Box<dyn Random + Send>) -> Self {
        let admission = Admission::new(&settings);
        let core = Core {
            settings,
            connections: Connections::default(),
            pools: Pools::default(),
            random,
            host,
            timers: Timers::default(),
            counters: Counters::default(),
            admission,
            outputs: VecDeque::new(),
            jobs: HashMap::new(),
            next_job: 0,
            next_sa: 1,
            next_child: 1,
            by_spi: HashMap::new(),
            half_open: HashMap::new(),
            children: HashMap::new(),
            peers: HashMap::new(),
            born: Vec::new(),
            errands: Vec::new(),
            last_ignored: None,
            tokens: None,
            errors: None,
        };
        Self { core, sas: HashMap::new() }
    }

    /// From now on peers of IKEv2 get tokens (RFC 6290), and are shown them for IKE SAs that are not there any more.
    pub fn make_tokens(&mut self, maker: TokenMaker) {
        self.core.tokens = Some(maker);
    }

    /// Takes over the connections and pools. IKE SAs whose connection is gone or is another are closed; those whose
    /// connection is the same (equal fingerprint) go on untouched (OPS-2).
    pub fn configure(&mut self, now: Now, connections: Vec<Arc<Connection>>, pools: &[PoolConfig]) {
        self.core.connections = Connections::new(connections);
        self.core.pools.configure(pools);
        let Self { core, sas } = self;
        let changed = sas.values().filter(|sa| sa.is_outdated(&core.connections)).map(Sa::id);
        let mut changed: Vec<SaId> = changed.collect();
        changed.sort_unstable();
        for sa in changed {
            self.with(now, sa, |sa, core| sa.close(core, now, CloseReason::Reconfigured));
        }
        for sa in self.sas.values_mut() {
            sa.adopt(&self.core.connections);
        }
    }

    /// A datagram arrived, without a non-ESP marker.
    pub fn handle_datagram(&mut self, now: Now, path: Path, datagram: &[u8]) {
        if self.core.admission.is_wary_of(path.remote.ip()) && self.turns_away(now, path, datagram) {
            return;
        }
        let parsed = match parse::message(datagram) {
            Ok(parsed) => parsed,
            Err(ParseError::Version(version)) if version >> 4 == 1 => {
                return self.handle_v1(now, path, datagram);
            }
            Err(error) => return self.unreadable(now, path, datagram, error),
        };
        let Head { spi_i, spi_r, from_initiator, .. } = parsed.head;
        let own = if from_initiator { spi_r } else { spi_i };
        if own == IkeSpi::NONE {
            return self.first_message(now, path, datagram, &parsed);
        }
        match self.core.by_spi.get(&own).copied() {
            Some(id) => {
                self.with_v2(now, id, |sa, core| sa.receive(core, now, path, datagram, &parsed));
            }
            None => self.unknown(now, path, &parsed),
        }
    }

    /// In a flood: a first message without a cookie is answered before anything else is done with it. Gives whether it was
    /// one.
    fn turns_away(&mut self, now: Now, path: Path, datagram: &[u8]) -> bool {
        let Some(First { head, nonce, has_cookie: false }) = parse::first_request(datagram) else {
            return false;
        };
        // A copy of one that was admitted goes to its IKE SA.
        let key = (path.remote.ip(), path.remote.port(), head.spi_i);
        !self.core.half_open.contains_key(&key) && !self.core.admits(now, path, head, nonce, None)
    }

    /// A message about an IKE SA that is not there. RFC 7296 section 2.21.4 allows an INVALID_IKE_SPI, on which peers do not
    /// act; with a token (RFC 6290) they may, if it was lost in a reset.
    fn unknown(&mut self, now: Now, path: Path, parsed: &Parsed<'_>) {
        let protected = !matches!(parsed.body, Body::Plain(_));
        if protected
            && !parsed.head.response
            && let Some(answer) = self.core.tokens.as_ref().map(|tokens| tokens.answer(&parsed.head))
            && self.core.may_answer(now)
        {
            self.core.reply(path, answer);
        }
        self.core.ignore(now, None, path, Ignored::UnknownSpi);
    }

    fn unreadable(&mut self, now: Now, path: Path, datagram: &[u8], error: ParseError) {
        let reason = match error {
            ParseError::Truncated => Ignored::Truncated,
            ParseError::Version(major) => {
                // Section 2.5: a higher major version is answered with the highest that is spoken here.
                if major >> 4 > 2
                    && let Some(peek) = parse::peek(datagram)
                    && !peek.head.response
                    && self.core.may_answer(now)
                {
                    let head =
                        Head { response: true, from_initiator: !peek.head.from_initiator, ..peek.head };
                    let notify = Payload::Notify(Notify::new(NotifyType::INVALID_MAJOR_VERSION, []));
                    self.core.reply(path, emit::plain(&head, &[notify]));
                }
                Ignored::Version
            }
            ParseError::Syntax(_) | ParseError::UnsupportedCritical(_) => {
                self.syntax_error(now, path, datagram, error);
                Ignored::Syntax
            }
            ParseError::Oversized => Ignored::Oversized,
        };
        self.core.ignore(now, None, path, reason);
    }

    /// RFC 7296 section 2.21.1 and 2.5: an unreadable IKE_SA_INIT request is answered, at a limited rate.
    fn syntax_error(&mut self, now: Now, path: Path, datagram: &[u8], error: ParseError) {
        let Ok((head, ..)) = parse::head(datagram) else { return };
        let first = head.exchange == ExchangeType::IKE_SA_INIT && !head.response && head.from_initiator;
        if !first || head.spi_r != IkeSpi::NONE || !self.core.may_answer(now) {
            return;
        }
        let notify = match error {
            ParseError::UnsupportedCritical(kind) => {
                Notify::new(NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD, [kind.0])
            }
            _ => Notify::new(NotifyType::INVALID_SYNTAX, []),
        };
        let head = Head { response: true, from_initiator: false, ..head };
        self.core.reply(path, emit::plain(&head, &[Payload::Notify(notify)]));
    }

    /// An IKE_SA_INIT request, if it is one.
    fn first_message(&mut self, now: Now, path: Path, datagram: &[u8], parsed: &Parsed<'_>) {
        let Head { spi_i, exchange, response, from_initiator, message_id, .. } = parsed.head;
        let ignore = |core: &mut Core, reason| core.ignore(now, None, path, reason);
        if exchange != ExchangeType::IKE_SA_INIT {
            return ignore(&mut self.core, Ignored::UnknownSpi);
        }
        if response || !from_initiator {
            return ignore(&mut self.core, Ignored::Flags);
        }
        if message_id != 0 || spi_i == IkeSpi::NONE {
            return ignore(&mut self.core, Ignored::MessageId);
        }
        let Body::Plain(payloads) = &parsed.body else {
            return ignore(&mut self.core, Ignored::Legality);
        };
        let payloads = Payloads(payloads);
        let key = (path.remote.ip(), path.remote.port(), spi_i);
        if let Some(id) = self.core.half_open.get(&key).copied() {
            let repeated = self.sas.get(&id).is_some_and(|sa| sa.was_begun_by(datagram));
            if repeated {
                self.with(now, id, |sa, core| sa.repeat_init(core, now, path));
                return;
            }
        }
        let Some(nonce) = payloads.nonce().filter(|nonce| (16..=256).contains(&nonce.len())) else {
            return ignore(&mut self.core, Ignored::Legality);
        };
        let cookie = payloads.notify(NotifyType::COOKIE).map(|notify| notify.data.as_slice());
        if !self.core.admits(now, path, parsed.head, nonce, cookie) {
            return;
        }
        match IkeSa::respond(&mut self.core, now, path, datagram, parsed.head, &payloads) {
            Ok(sa) => {
                self.core.half_open.insert(key, sa.id());
                self.admit(now, sa);
            }
            Err(refusal) => {
                if let Some(notify) = refusal.answer
                    && self.core.may_answer(now)
                {
                    let head = Head { response: true, from_initiator: false, ..parsed.head };
                    self.core.reply(path, emit::plain(&head, &[Payload::Notify(notify)]));
                }
                if let Some(failure) = refusal.failure {
                    self.core.counters.failed += 1;
                    let report = Report::Failed { sa: SaId(0), connection: None, path, failure };
                    self.core.outputs.push_back(Output { sa: None, effect: Effect::Report(report) });
                }
                if let Some(reason) = refusal.ignored {
                    ignore(&mut self.core, reason);
                }
            }
        }
    }

    /// Time has passed: everything that is due by `now` happens.
    pub fn handle_timeout(&mut self, now: Now) {
        // First all that are due, then each: whatever a handler sets anew is the next call's.
        let due: Vec<SaId> = std::iter::from_fn(|| self.core.timers.expire(now.monotonic)).collect();
        for id in due {
            self.with(now, id, |sa, core| sa.timeout(core, now));
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) is to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.core.timers.next()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.core.outputs.pop_front()
    }

    /// A job is done.
    pub fn computed(&mut self, now: Now, id: JobId, done: Done) {
        if let Some(sa) = self.core.jobs.remove(&id) {
            self.with(now, sa, |sa, core| sa.computed(core, now, id, done));
        }
    }

    /// A CHILD_SA was installed, or could not be.
    pub fn installed(&mut self, now: Now, child: ChildId, result: Result<(), String>) {
        if let Some(sa) = self.core.children.get(&child).copied() {
            self.with(now, sa, |sa, core| sa.installed(core, now, child, result));
        }
    }

    /// Brings up a connection, or one of its children: with an IKE SA that is there, or with a new one.
    pub fn initiate(
        &mut self,
        now: Now,
        connection: &str,
        child: Option<&str>,
    ) -> Result<Attempt, CommandError> {
        let found = self.core.connections.named(connection);
        let found = found.cloned().ok_or_else(|| CommandError::NoConnection(connection.to_owned()))?;
        let wanted = wanted_children(&found, child).ok_or_else(|| {
            CommandError::NoChild(connection.to_owned(), child.unwrap_or_default().to_owned())
        })?;
        let usable = |sa: &&Sa| sa.is_usable_for(connection);
        if let Some(id) = self.sas.values().filter(usable).map(Sa::id).max() {
            self.with(now, id, |sa, core| {
                for index in &wanted {
                    sa.want_child(core, now, *index);
                }
            });
            return Ok(Attempt { sa: id, reused: true });
        }
        let remote = found.remote.ok_or_else(|| CommandError::NoRemote(connection.to_owned()))?;
        let local = match found.local.iter().find(|local| local.is_ipv4() == remote.is_ipv4()) {
            Some(local) => *local,
            None => self.core.host.source_address(remote).ok_or(CommandError::NoRoute(remote))?,
        };
        let sa: Sa = if found.v1.is_some() {
            v1::IkeSa::initiate(&mut self.core, now, found, (local, remote), None, wanted).into()
        } else {
            IkeSa::initiate(&mut self.core, now, found, local, remote, wanted).into()
        };
        let id = sa.id();
        self.admit(now, sa);
        Ok(Attempt { sa: id, reused: false })
    }

    /// Closes what `target` names; gives how many IKE or CHILD_SAs that were.
    pub fn terminate(&mut self, now: Now, target: &Target) -> Result<usize, CommandError> {
        if let Target::Child(_) | Target::Children(..) = target {
            return self.task_for_children(now, target, Task::DeleteChild);
        }
        let ids = self.ike_sas(target)?;
        for id in &ids {
            self.with(now, *id, |sa, core| sa.close(core, now, CloseReason::Command));
        }
        Ok(ids.len())
    }

    /// Rekeys what `target` names; gives how many IKE or CHILD_SAs that are. For a connection: its IKE SA.
    pub fn rekey(&mut self, now: Now, target: &Target) -> Result<usize, CommandError> {
        if let Target::Child(_) | Target::Children(..) = target {
            return self.task_for_children(now, target, Task::RekeyChild);
        }
        let ids = self.ike_sas(target)?;
        for id in &ids {
            self.with(now, *id, |sa, core| sa.enqueue(core, now, Task::RekeyIke));
        }
        Ok(ids.len())
    }

    fn task_for_children(
        &mut self,
        now: Now,
        target: &Target,
        task: fn(ChildId) -> Task,
    ) -> Result<usize, CommandError> {
        let mut found: Vec<(SaId, ChildId)> = Vec::new();
        match target {
            Target::Child(child) => {
                let sa = self.core.children.get(child).copied().ok_or(CommandError::NotUp)?;
                found.push((sa, *child));
            }
            Target::Children(connection, name) => {
                for sa in self.sas.values().filter(|sa| sa.is_of(connection)) {
                    found.extend(sa.children_named(name).map(|child| (sa.id(), child)));
                }
            }
            Target::Connection(_) | Target::Ike(_) => {}
        }
        if found.is_empty() {
            return Err(CommandError::NotUp);
        }
        found.sort_unstable();
        for (sa, child) in &found {
            self.with(now, *sa, |sa, core| sa.enqueue(core, now, task(*child)));
        }
        Ok(found.len())
    }

    fn ike_sas(&self, target: &Target) -> Result<Vec<SaId>, CommandError> {
        let mut ids: Vec<SaId> = match target {
            Target::Connection(name) => {
                if self.core.connections.named(name).is_none() {
                    return Err(CommandError::NoConnection(name.clone()));
                }
                self.sas.values().filter(|sa| sa.is_of(name) && sa.is_live()).map(Sa::id).collect()
            }
            Target::Ike(id) if self.sas.contains_key(id) => vec![*id],
            _ => Vec::new(),
        };
        ids.sort_unstable();
        if ids.is_empty() { Err(CommandError::NotUp) } else { Ok(ids) }
    }

    /// A CHILD_SA reached a soft limit of bytes or packets: it is rekeyed.
    pub fn soft_limit(&mut self, now: Now, child: ChildId) {
        if let Some(sa) = self.core.children.get(&child).copied() {
            self.with(now, sa, |sa, core| sa.enqueue(core, now, Task::RekeyChild(child)));
        }
    }

    /// A CHILD_SA reached a hard limit, or used up its numbers, and has stopped: it is replaced if that is still
    /// possible, and deleted.
    pub fn hard_limit(&mut self, now: Now, child: ChildId) {
        if let Some(sa) = self.core.children.get(&child).copied() {
            self.with(now, sa, |sa, core| sa.expired(core, now, child));
        }
    }

    /// The datapath lost a CHILD_SA: the peer is told, and it is begun again if it is to be up.
    pub fn lost(&mut self, now: Now, child: ChildId) {
        if let Some(sa) = self.core.children.get(&child).copied() {
            self.with(now, sa, |sa, core| sa.lost(core, now, child));
        }
    }

    /// MOB-2: the datapath saw an authenticated packet of the peer from elsewhere.
    pub fn peer_moved(&mut self, now: Now, child: ChildId, remote: IpAddr, port: Option<u16>) {
        if let Some(sa) = self.core.children.get(&child).copied() {
            self.with(now, sa, |sa, core| sa.peer_moved(core, remote, port));
        }
    }

    /// This machine's addresses are now these (RFC 4555 section 3.5: the initiator decides).
    pub fn addresses_changed(&mut self, now: Now, addresses: &[IpAddr]) {
        let mut ids: Vec<SaId> = self.sas.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            self.with(now, id, |sa, core| sa.addresses_changed(core, now, addresses));
        }
    }

    /// All IKE SAs, for showing.
    pub fn sas(&self, now: Now) -> impl Iterator<Item = IkeSaView> + '_ {
        self.sas.values().map(move |sa| sa.view(now))
    }

    /// Counters since the start.
    pub fn counters(&self) -> &Counters {
        &self.core.counters
    }

    /// Protected messages of an IKE SA.
    #[cfg(any(test, feature = "exercise"))]
    pub(crate) fn channel(&mut self, id: SaId) -> Option<&mut crate::v2::channel::Channel> {
        self.sas.get_mut(&id)?.v2()?.channel()
    }

    /// Number of IKE SAs, half-open ones included.
    pub fn len(&self) -> usize {
        self.sas.len()
    }

    /// Whether there is no IKE SA.
    pub fn is_empty(&self) -> bool {
        self.sas.is_empty()
    }

    /// Lets a handler of one SA work, then does what it left to be done.
    fn with(&mut self, now: Now, id: SaId, handler: impl FnOnce(&mut Sa, &mut Core)) {
        let Some(sa) = self.sas.get_mut(&id) else { return };
        handler(sa, &mut self.core);
        if sa.is_dead() {
            if let Some(sa) = self.sas.remove(&id) {
                self.core.forget(&sa);
            }
        } else {
            self.schedule(now, id);
        }
        self.settle(now);
    }

    /// The same for one of version 2; another one is left alone.
    fn with_v2(&mut self, now: Now, id: SaId, handler: impl FnOnce(&mut IkeSa, &mut Core)) {
        self.with(now, id, |sa, core| {
            if let Some(sa) = sa.v2() {
                handler(sa, core);
            }
        });
    }

    fn admit(&mut self, now: Now, sa: impl Into<Sa>) {
        let sa = sa.into();
        let id = sa.id();
        self.sas.insert(id, sa);
        self.schedule(now, id);
    }

    fn schedule(&mut self, now: Now, id: SaId) {
        match self.sas.get(&id).and_then(Sa::deadline) {
            Some(at) => self.core.timers.set(now.monotonic, id, at),
            None => {
                self.core.timers.cancel(&id);
            }
        }
    }

    fn settle(&mut self, now: Now) {
        while let Some(sa) = self.core.born.pop() {
            self.admit(now, sa);
        }
        while !self.core.errands.is_empty() {
            match self.core.errands.remove(0) {
                Errand::Supersede { sa, silently: false } => {
                    self.with(now, sa, |sa, core| sa.close(core, now, CloseReason::Superseded));
                }
                Errand::Supersede { sa, silently: true } => {
                    self.with(now, sa, |sa, core| sa.drop_silently(core, CloseReason::Superseded));
                }
                Errand::Inherit { sa, estate } => {
                    self.with_v2(now, sa, |sa, core| sa.inherit(core, now, *estate));
                }
                Errand::Renew { sa } => self.renew(now, sa),
                Errand::Succeed { from, to, mine } => self.succeed(now, from, to, mine),
                Errand::PeerDeleted { sa, spis } => {
                    self.with_v1(now, sa, |sa, core| sa.peer_deleted(core, now, &spis));
                }
                Errand::Redundant { sa } => {
                    self.with_v2(now, sa, |sa, _| sa.expire_soon(now));
                }
                Errand::Restart { connection, child } => {
                    // It is no longer configured, or cannot be begun by this side: nothing to restart.
                    let _ = self.initiate(now, &connection, Some(&child));
                }
            }
        }
    }
}

/// Indices of the children to begin: the one of this name; else those that are to be up; else all.
fn wanted_children(connection: &Connection, name: Option<&str>) -> Option<Vec<usize>> {
    let children = || connection.children.iter().enumerate();
    if let Some(name) = name {
        return children().find(|(_, child)| &*child.name == name).map(|(index, _)| vec![index]);
    }
    let indices = |started: bool| {
        let chosen = children().filter(move |(_, child)| !started || child.start == Start::Start);
        chosen.map(|(index, _)| index).collect::<Vec<usize>>()
    };
    let started = indices(true);
    Some(if started.is_empty() { indices(false) } else { started })
}
