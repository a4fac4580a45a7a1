//! An established IKE SA: its children, what it has to do, and the one exchange of each side that may be under way.
//!
//! This side has one request out at a time (a window of 1, RFC 7296 section 2.3); everything else that it is to do waits
//! as a [`Task`]. Of the peer's requests one at a time may wait for a job.

use core::net::IpAddr;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::channel::{Channel, Datagrams, Received};
use super::child::{self, Agreed, Child, ChildState, Ends, Keying, Proposed, jittered};
use super::create_child::{ChildRequest, NewChild};
use super::followup::{FollowupRequest, OwnFollowup, PeerFollowup};
use super::half_open::Keyed;
use super::mobike::{Moving, check_payloads};
use super::nat::Nat;
use super::rekey_ike::{IkeRequest, NewIke, PeerRekey};
use super::{Common, Task};
use crate::Secret;
use crate::auth::identity::Identity;
use crate::config::{Connection, Start, Unique};
use crate::crypto::keys::Derivation;
use crate::endpoint::{Core, Errand, Now};
use crate::ignored::Ignored;
use crate::job::{Done, JobId};
use crate::message::legality::Payloads;
use crate::message::parse::Parsed;
use crate::message::registry::{ExchangeType, NotifyType};
use crate::message::{IkeSpi, Notify, Payload};
use crate::negotiate::IkeSuite;
use crate::output::{ChildId, Effect, IkeSaView, Path, Persist, SaId};
use crate::qcd;
use crate::record::{Strategy, UNLIMITED, whole_seconds};
use crate::report::{CloseReason, Failure, Report};

/// Under what a first message was found, and whether the peer said INITIAL_CONTACT.
pub(super) type AsResponder = ((IpAddr, u16, IkeSpi), bool);

/// Two IKE SAs of the same peers, one begun by each, the older one no older than an attempt can take, crossed on the way.
pub(super) const CROSSED: core::time::Duration = core::time::Duration::from_mins(3);

/// An established IKE SA.
pub(super) struct Established {
    pub(super) channel: Channel,
    pub(super) keys: Derivation,
    pub(super) suite: IkeSuite,
    pub(super) connection: Arc<Connection>,
    pub(super) remote_id: Identity,
    /// When it was established.
    pub(super) since: Instant,
    /// When an authenticated message of the peer last came.
    pub(super) heard: Instant,
    pub(super) rekey_at: Option<Instant>,
    pub(super) expires_at: Option<Instant>,
    /// When it is over at the latest, as far as this side decides that.
    pub(super) ends: SystemTime,
    pub(super) keepalive_at: Option<Instant>,
    pub(super) children: Vec<Child>,
    tasks: VecDeque<Task>,
    /// After a TEMPORARY_FAILURE nothing is begun before this.
    pub(super) not_before: Option<Instant>,
    /// How often in a row the peer has asked to be tried again later.
    refusals: u8,
    pub(super) ours: Option<Ours>,
    pub(super) theirs: Option<Theirs>,
    /// More key exchanges of the peer are to come.
    pub(super) expected: Option<Box<PeerFollowup>>,
    /// Virtual addresses: assigned to the peer by this side, or to this side by the peer.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) half_open_key: Option<(IpAddr, u16, IkeSpi)>,
    /// The peer has rekeyed this IKE SA while this side's own rekey was under way.
    pub(super) peer_rekey: Option<PeerRekey>,
    /// Its children were handed to a successor: only the Delete is still to come.
    pub(super) replaced: bool,
    /// The peer has deleted it while this side's own rekey, which is to come to nothing, was under way.
    pub(super) lost: bool,
    pub(super) moving: Moving,
    /// What the peer presents when it has lost this SA (RFC 6290).
    pub(super) token: Option<Secret>,
    /// What the peer has deleted and this side had not heard of, while its own exchange for a child was under way: the answer
    /// that made it may still come.
    pub(super) unheard: Vec<u32>,
}

/// This side's exchange.
pub(super) enum Ours {
    /// CREATE_CHILD_SA for a child: a new one or a rekey.
    Child(Box<NewChild>),
    /// CREATE_CHILD_SA for the IKE SA itself.
    Ike(Box<NewIke>),
    /// IKE_FOLLOWUP_KE for either.
    Followup(Box<OwnFollowup>),
    /// Delete of children.
    DeleteChildren(Vec<ChildId>),
    /// Delete of the IKE SA.
    DeleteIke(CloseReason),
    /// An empty INFORMATIONAL.
    Check,
    /// UPDATE_SA_ADDRESSES.
    Update,
    /// A request of before a reset, repeated as it was saved; all that matters is that it is answered.
    Resumed,
}

/// The peer's exchange, while a job of it runs.
pub(super) enum Theirs {
    /// CREATE_CHILD_SA for a child.
    Child(Box<ChildRequest>),
    /// CREATE_CHILD_SA for the IKE SA.
    Ike(Box<IkeRequest>),
    /// IKE_FOLLOWUP_KE for either.
    Followup(Box<FollowupRequest>),
}

/// Whether it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alive {
    Yes,
    No(CloseReason),
}

impl Established {
    /// Authentication is done.
    #[expect(clippy::too_many_arguments, reason = "all that an IKE SA is made of")]
    pub(super) fn new(
        common: &mut Common,
        core: &mut Core,
        now: Now,
        connection: &Arc<Connection>,
        keyed: Keyed,
        remote_id: Identity,
        addresses: Vec<IpAddr>,
        as_responder: Option<AsResponder>,
    ) -> Self {
        let Keyed { channel, keys, suite, .. } = keyed;
        let (key, first_contact) = as_responder.unzip();
        let mut this = Self::begin(
            core,
            now,
            Arc::clone(connection),
            channel,
            keys.derivation,
            suite,
            remote_id,
            addresses,
        );
        this.half_open_key = key;
        core.counters.established += 1;
        core.report(
            common.id,
            Report::Established {
                sa: common.id,
                connection: Arc::clone(&connection.name),
                remote_id: this.remote_id.to_string(),
                path: common.path,
                suite: this.suite.to_string(),
            },
        );
        this.be_the_only_one(common, core, now, first_contact == Some(true));
        this.schedule_keepalive(common, core, now);
        this
    }

    #[expect(clippy::too_many_arguments, reason = "all that an IKE SA is made of")]
    pub(super) fn begin(
        core: &mut Core,
        now: Now,
        connection: Arc<Connection>,
        channel: Channel,
        keys: Derivation,
        suite: IkeSuite,
        remote_id: Identity,
        addresses: Vec<IpAddr>,
    ) -> Self {
        let rekey_at =
            connection.rekey.map(|after| now.monotonic + jittered(core, after, connection.rekey_jitter));
        let expires_at = connection.rekey.map(|after| now.monotonic + after + connection.over_time);
        let life = connection.rekey.map_or(UNLIMITED, |after| after + connection.over_time);
        Self {
            channel,
            keys,
            suite,
            connection,
            remote_id,
            since: now.monotonic,
            heard: now.monotonic,
            rekey_at,
            expires_at,
            ends: whole_seconds(now.wall + life),
            keepalive_at: None,
            children: Vec::new(),
            tasks: VecDeque::new(),
            not_before: None,
            refusals: 0,
            ours: None,
            theirs: None,
            expected: None,
            addresses,
            half_open_key: None,
            peer_rekey: None,
            replaced: false,
            lost: false,
            moving: Moving::default(),
            token: None,
            unheard: Vec::new(),
        }
    }

    /// Virtual addresses.
    pub(super) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Older IKE SAs of the same peer give way (RFC 7296 section 2.4, and the connection's rule).
    fn be_the_only_one(&mut self, common: &Common, core: &mut Core, now: Now, first_contact: bool) {
        let key = (Arc::clone(&self.connection.name), self.remote_id.clone());
        let others = core.peers.entry(key).or_default();
        let older = std::mem::take(others);
        // As a rule there is no other, and a vector would make room for four.
        others.reserve_exact(1);
        others.push((common.id, common.initiator, common.spi_i, now.monotonic));
        let replace = match self.connection.unique {
            Unique::Replace => true,
            Unique::Keep => first_contact,
            Unique::Never => false,
        };
        for (id, initiator, spi_i, since) in older {
            // Both sides began at once and hold two IKE SAs: both keep the one with the larger SPI, and the other is
            // deleted by the side that began it.
            let crossed = initiator != common.initiator && now.monotonic.duration_since(since) < CROSSED;
            let stays = if !replace {
                true
            } else if crossed {
                if spi_i > common.spi_i {
                    if common.initiator {
                        self.tasks.push_back(Task::DeleteIke(CloseReason::Superseded));
                    }
                    true
                } else {
                    if initiator {
                        core.errands.push(Errand::Supersede { sa: id, silently: false });
                    }
                    true
                }
            } else {
                core.errands.push(Errand::Supersede { sa: id, silently: first_contact });
                false
            };
            if stays {
                let key = (Arc::clone(&self.connection.name), self.remote_id.clone());
                core.peers.entry(key).or_default().push((id, initiator, spi_i, since));
            }
        }
    }

    /// The first child's answer came with IKE_AUTH. `made`: the peer has made it.
    #[expect(clippy::too_many_arguments, reason = "all that was agreed, or was not")]
    pub(super) fn first_child(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        proposed: &Proposed,
        made: bool,
        outcome: Result<Agreed, Failure>,
        (ni, nr): (&[u8], &[u8]),
    ) {
        match outcome {
            Ok(agreed) => {
                let keying = Keying { derivation: &self.keys, secrets: &[], ni, nr, initiator: true };
                let child =
                    child::install(common, core, now, &self.connection, agreed, &keying, None, true, &[]);
                self.add_child(child);
            }
            Err(failure) => {
                if made {
                    self.delete_unwanted(common, core, now, proposed);
                }
                core.host.release_spi(proposed.spi_in);
                self.child_failed(common, core, proposed.index, failure);
            }
        }
    }

    /// The first child was answered in IKE_AUTH.
    pub(super) fn first_answered(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        agreed: Agreed,
        (ni, nr): (&[u8], &[u8]),
    ) {
        let keying = Keying { derivation: &self.keys, secrets: &[], ni, nr, initiator: false };
        let leases = &self.addresses;
        let child = child::install(common, core, now, &self.connection, agreed, &keying, None, true, leases);
        self.add_child(child);
    }

    /// The first child, which mostly stays the only one: no room is made for more.
    fn add_child(&mut self, child: Option<Child>) {
        self.children.reserve_exact(usize::from(child.is_some()));
        self.children.extend(child);
    }

    /// A child could not be made.
    pub(super) fn child_failed(&self, common: &Common, core: &mut Core, index: usize, failure: Failure) {
        core.counters.children_failed += 1;
        let name = self.child_name(index);
        let connection = Arc::clone(&self.connection.name);
        core.report(common.id, Report::ChildFailed { sa: common.id, connection, name, failure });
    }

    pub(super) fn child_name(&self, index: usize) -> Arc<str> {
        let child = self.connection.children.get(index);
        child.map_or_else(|| Arc::from(""), |child| Arc::clone(&child.name))
    }

    /// What `dynamic` selectors stand for.
    pub(super) fn ends<'a>(&'a self, common: &Common) -> Ends<'a> {
        let client = self.connection.request_address != (false, false);
        let (own, peers): (&[IpAddr], &[IpAddr]) =
            if client { (&self.addresses, &[]) } else { (&[], &self.addresses) };
        Ends {
            local: (common.path.local.ip(), own),
            remote: (common.path.remote.ip(), peers),
            asking: (false, false),
        }
    }

    /// Addresses that this side assigned.
    pub(super) fn leases(&self) -> &[IpAddr] {
        if self.connection.request_address == (false, false) { &self.addresses } else { &[] }
    }

    pub(super) fn child(&mut self, id: ChildId) -> Option<&mut Child> {
        self.children.iter_mut().find(|child| child.id == id)
    }

    /// Whether there is one of this kind that traffic goes through.
    pub(super) fn has_child(&self, index: usize) -> bool {
        self.children.iter().any(|child| child.index == index && child.is_current())
            || self.tasks.contains(&Task::CreateChild(index))
            || matches!(&self.ours, Some(Ours::Child(new)) if new.index() == index)
            || matches!(&self.ours, Some(Ours::Followup(followup)) if followup.child() == Some(index))
    }

    /// Whether an answer to the peer's rekey of it is being computed: nothing is begun in it then (section 2.25.2).
    const fn is_being_replaced(&self) -> bool {
        matches!(self.theirs, Some(Theirs::Ike(_)))
    }

    /// Whether the peer has deleted it and nothing keeps it any more.
    pub(super) const fn is_lost(&self) -> bool {
        self.lost && self.ours.is_none()
    }

    /// Whether it is on its way to the end.
    pub(super) fn is_closing(&self) -> bool {
        self.replaced
            || matches!(self.ours, Some(Ours::DeleteIke(_)))
            || self.tasks.iter().any(|task| matches!(task, Task::DeleteIke(_)))
    }

    pub(super) fn children_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = ChildId> + 'a {
        let matches = move |child: &&Child| &*self.child_name(child.index) == name && child.is_current();
        self.children.iter().filter(matches).map(|child| child.id)
    }

    /// Puts a task at the end, unless it is there, and begins it if nothing else is under way.
    pub(super) fn enqueue(&mut self, common: &mut Common, core: &mut Core, now: Now, task: Task) {
        if !self.tasks.contains(&task) {
            self.tasks.push_back(task);
        }
        self.pump(common, core, now);
    }

    /// Puts a task back where it was, to be tried again later.
    pub(super) fn retry(&mut self, core: &mut Core, now: Now, task: Task) {
        // "A peer that receives TEMPORARY_FAILURE MUST NOT immediately retry" (section 2.25); and each time later.
        let wait = 1000_u64 << self.refusals.min(5);
        let spread = u64::from(core.random.u32()) % (2 * wait);
        self.refusals = self.refusals.saturating_add(1);
        self.not_before = Some(now.monotonic + core::time::Duration::from_millis(wait + spread));
        if !self.tasks.contains(&task) {
            self.tasks.push_front(task);
        }
    }

    pub(super) fn take_tasks(&mut self) -> VecDeque<Task> {
        std::mem::take(&mut self.tasks)
    }

    /// Begins what is next, if this side may send a request.
    pub(super) fn pump(&mut self, common: &mut Common, core: &mut Core, now: Now) {
        while self.ours.is_none()
            && !self.is_being_replaced()
            && self.not_before.is_none_or(|at| at <= now.monotonic)
        {
            self.not_before = None;
            let Some(task) = self.tasks.pop_front() else { return };
            if self.replaced && !matches!(task, Task::DeleteIke(_) | Task::CheckPeer) {
                continue;
            }
            match task {
                Task::CreateChild(index) => {
                    if !self.children.iter().any(|child| child.index == index && child.is_current()) {
                        self.create_child(common, core, now, index, None);
                    }
                }
                Task::RekeyChild(id) => {
                    let current = self.child(id).filter(|child| child.state == ChildState::Installed);
                    if let Some(index) = current.map(|child| child.index) {
                        self.create_child(common, core, now, index, Some(id));
                    }
                }
                Task::DeleteChild(id) => self.delete_children(common, core, now, &[id]),
                Task::RekeyIke => {
                    if self.peer_rekey.is_none() {
                        self.rekey_ike(common, core);
                    }
                }
                Task::DeleteIke(reason) => self.delete_ike(common, core, now, reason),
                Task::CheckPeer => {
                    let payloads = check_payloads(common);
                    self.request(common, core, now, ExchangeType::INFORMATIONAL, &payloads);
                    self.ours = Some(Ours::Check);
                }
                Task::UpdateAddresses => self.update_addresses(common, core, now),
                Task::GiveToken => {
                    let Some(tokens) = &core.tokens else { continue };
                    let payloads = [tokens.notify(common.spi_i, common.spi_r)];
                    self.request(common, core, now, ExchangeType::INFORMATIONAL, &payloads);
                    self.ours = Some(Ours::Check);
                }
            }
        }
    }

    /// Sends a request of this side.
    pub(super) fn request(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        exchange: ExchangeType,
        payloads: &[Payload],
    ) {
        let datagrams = self.channel.request(now.monotonic, exchange, payloads, &mut *core.random);
        // Its message ID is used from now on, whatever happens.
        self.persist(common, core);
        common.send(core, &datagrams);
    }

    /// Makes the answer to a request of the peer, when everything that the request changes was changed.
    pub(super) fn respond(
        &mut self,
        common: &Common,
        core: &mut Core,
        exchange: ExchangeType,
        id: u32,
        payloads: &[Payload],
    ) -> Datagrams {
        let datagrams = self.channel.respond(exchange, id, payloads, &mut *core.random);
        // The peer counts the request as answered, and has what it made, as soon as the answer arrives.
        self.persist_whole(common, core);
        datagrams
    }

    pub(super) fn receive(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        datagram: &[u8],
        parsed: &Parsed<'_>,
    ) -> Alive {
        if qcd::presents(parsed, self.token.as_ref()) {
            return Alive::No(CloseReason::Forgotten);
        }
        if self.theirs.is_some() && !parsed.head.response {
            core.ignore(now, Some(common.id), path, Ignored::Busy);
            return Alive::Yes;
        }
        match self.channel.receive(now.monotonic, parsed, datagram) {
            Received::Request { exchange, id, payloads, .. } => {
                self.heard = now.monotonic;
                self.forget_first_message(core);
                self.follow(common, core, path);
                let alive = self.handle_request(common, core, now, path, exchange, id, &payloads);
                self.pump(common, core, now);
                alive
            }
            Received::Response { payloads, .. } => {
                self.heard = now.monotonic;
                let refusals = self.refusals;
                let alive = self.handle_response(common, core, now, path, &payloads);
                if self.refusals == refusals {
                    self.refusals = 0;
                }
                self.pump(common, core, now);
                if self.is_lost() {
                    return Alive::No(CloseReason::Replaced);
                }
                if alive == Alive::Yes {
                    self.note_end(common, core);
                }
                alive
            }
            Received::Malformed { exchange, id, notify } => {
                self.heard = now.monotonic;
                let payloads = [Payload::Notify(notify)];
                let answer = self.respond(common, core, exchange, id, &payloads);
                common.send_to(core, path, &answer);
                core.ignore(now, Some(common.id), path, Ignored::Syntax);
                Alive::Yes
            }
            Received::MalformedResponse { .. } => {
                // Section 2.21.3: an answer that cannot be read ends the IKE SA; the two sides no longer agree.
                core.ignore(now, Some(common.id), path, Ignored::Syntax);
                Alive::No(CloseReason::Failed)
            }
            received => {
                common.other(core, now, path, received);
                Alive::Yes
            }
        }
    }

    /// The initiator has its answer to IKE_AUTH: a late copy of its first message is nobody's any more.
    fn forget_first_message(&mut self, core: &mut Core) {
        if let Some(key) = self.half_open_key.take() {
            core.forget_first_message(key);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a message, where it came from, and what it is about")]
    fn handle_request(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        exchange: ExchangeType,
        id: u32,
        payloads: &[Payload],
    ) -> Alive {
        let payloads = Payloads(payloads);
        match exchange {
            ExchangeType::INFORMATIONAL => self.informational(common, core, now, path, id, &payloads),
            ExchangeType::CREATE_CHILD_SA => {
                self.create_child_request(common, core, now, id, &payloads);
                Alive::Yes
            }
            ExchangeType::IKE_FOLLOWUP_KE => {
                self.followup_request(common, core, id, &payloads);
                Alive::Yes
            }
            _ => {
                let notify = [Payload::Notify(Notify::new(NotifyType::INVALID_SYNTAX, []))];
                let answer = self.respond(common, core, exchange, id, &notify);
                common.send_to(core, path, &answer);
                core.ignore(now, Some(common.id), path, Ignored::Exchange);
                Alive::Yes
            }
        }
    }

    fn handle_response(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        payloads: &[Payload],
    ) -> Alive {
        let payloads = Payloads(payloads);
        match self.ours.take() {
            Some(Ours::Child(new)) => self.child_answered(common, core, now, *new, &payloads),
            Some(Ours::Ike(new)) => self.ike_answered(common, core, now, *new, &payloads),
            Some(Ours::Followup(followup)) => self.followup_answered(common, core, now, *followup, &payloads),
            Some(Ours::DeleteChildren(ids)) => self.children_deleted(common, core, now, &ids),
            Some(Ours::DeleteIke(reason)) => return Alive::No(reason),
            Some(Ours::Check | Ours::Resumed) => {}
            Some(Ours::Update) => self.addresses_updated(common, core, now, path, &payloads),
            None => core.ignore(now, Some(common.id), path, Ignored::Exchange),
        }
        Alive::Yes
    }

    pub(super) fn computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        id: JobId,
        done: Done,
    ) -> Alive {
        let theirs = match &self.theirs {
            Some(Theirs::Child(request)) => request.job == id,
            Some(Theirs::Ike(request)) => request.job == id,
            Some(Theirs::Followup(request)) => request.job == id,
            None => false,
        };
        if theirs {
            match self.theirs.take() {
                Some(Theirs::Child(request)) => self.child_computed(common, core, now, *request, done),
                Some(Theirs::Ike(request)) => self.ike_computed(common, core, now, *request, done),
                Some(Theirs::Followup(request)) => {
                    self.followup_computed(common, core, now, *request, done);
                }
                None => {}
            }
        } else {
            match self.ours.take() {
                Some(Ours::Child(new)) if new.job() == Some(id) => {
                    self.own_child_computed(common, core, now, *new, done);
                }
                Some(Ours::Ike(new)) if new.job() == Some(id) => {
                    self.own_ike_computed(common, core, now, *new, done);
                }
                Some(Ours::Followup(followup)) if followup.job() == Some(id) => {
                    self.own_followup_computed(common, core, now, *followup, done);
                }
                other => self.ours = other,
            }
        }
        self.pump(common, core, now);
        if self.is_lost() {
            return Alive::No(CloseReason::Replaced);
        }
        if !theirs {
            self.note_end(common, core);
        }
        Alive::Yes
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let waiting = self.ours.is_none() && !self.is_being_replaced() && !self.tasks.is_empty();
        let dpd = self.connection.dpd.filter(|_| self.ours.is_none() && self.tasks.is_empty());
        let dpd = dpd.map(|after| self.heard + after);
        let own = [
            self.channel.deadline(),
            self.rekey_at,
            self.expires_at,
            self.keepalive_at,
            self.not_before.filter(|_| waiting),
            dpd,
        ];
        let children = self.children.iter().flat_map(|child| {
            let live = child.is_current();
            // One that the datapath does not have yet is not rekeyed.
            let installed = child.state == ChildState::Installed;
            [child.rekey_at.filter(|_| installed), child.life_at.filter(|_| live), child.retire_at]
        });
        own.into_iter().chain(children).flatten().min()
    }

    pub(super) fn timeout(&mut self, common: &mut Common, core: &mut Core, now: Now) -> Alive {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now.monotonic);
        if !common.repeats(core, now, &mut self.channel) {
            core.counters.dead += 1;
            return Alive::No(match self.ours {
                // It was to end anyway.
                Some(Ours::DeleteIke(reason)) => reason,
                _ if self.replaced => CloseReason::Replaced,
                _ => CloseReason::Dead,
            });
        }
        self.retire_children(common, core, now);
        if due(self.expires_at) {
            if self.lost {
                return Alive::No(CloseReason::Replaced);
            }
            self.expires_at = None;
            self.tasks.clear();
            let reason = if self.replaced { CloseReason::Replaced } else { CloseReason::Expired };
            self.tasks.push_back(Task::DeleteIke(reason));
        }
        if due(self.rekey_at) {
            self.rekey_at = None;
            self.tasks.push_back(Task::RekeyIke);
        }
        let mut more = Vec::new();
        for child in self.children.iter_mut().filter(|child| child.is_current()) {
            if due(child.life_at) {
                child.life_at = None;
                more.push(Task::DeleteChild(child.id));
            }
            if due(child.rekey_at) && child.state == ChildState::Installed {
                child.rekey_at = None;
                more.push(Task::RekeyChild(child.id));
            }
        }
        for task in more {
            if !self.tasks.contains(&task) {
                self.tasks.push_back(task);
            }
        }
        if due(self.keepalive_at) {
            core.emit(common.id, Effect::Keepalive(common.path));
            self.schedule_keepalive(common, core, now);
        }
        let silent = self.connection.dpd.is_some_and(|after| self.heard + after <= now.monotonic);
        if silent && self.ours.is_none() && self.tasks.is_empty() {
            self.tasks.push_back(Task::CheckPeer);
        }
        self.pump(common, core, now);
        Alive::Yes
    }

    /// RFC 3948 section 4: the one behind the NAT keeps its mapping alive.
    pub(super) fn schedule_keepalive(&mut self, common: &Common, core: &Core, now: Now) {
        let needed = common.nat.local && common.path.natt;
        self.keepalive_at = needed.then(|| now.monotonic + core.settings.nat_keepalive);
    }

    /// The end: children go, addresses are free, and what is to be up again is begun again.
    pub(super) fn end(mut self: Box<Self>, common: &Common, core: &mut Core, reason: CloseReason) {
        let children = std::mem::take(&mut self.children);
        for child in children {
            self.remove_child(common, core, &child, reason);
        }
        match self.ours.take() {
            Some(Ours::Child(new)) => new.abandon(core),
            Some(Ours::Ike(new)) => new.abandon(core),
            Some(Ours::Followup(followup)) => followup.abandon(core),
            _ => {}
        }
        match self.theirs.take() {
            Some(Theirs::Child(request)) => request.abandon(core),
            Some(Theirs::Ike(request)) => request.abandon(core),
            Some(Theirs::Followup(request)) => request.abandon(core),
            None => {}
        }
        if let Some(expected) = self.expected.take() {
            expected.abandon(core);
        }
        if let Some(key) = self.half_open_key.take() {
            core.forget_first_message(key);
        }
        if !self.replaced {
            if self.leases().is_empty() {
                if !self.addresses.is_empty() {
                    core.emit(common.id, Effect::Unconfigure);
                }
            } else {
                for address in &self.addresses {
                    core.pools.release(*address);
                }
            }
        }
        core.forget_peer(&self.connection, &self.remote_id, common.id);
        if self.connection.reset != Strategy::None {
            core.emit(common.id, Effect::Persist(Persist::Remove((common.spi_i, common.spi_r))));
        }
        let connection = Some(Arc::clone(&self.connection.name));
        core.report(common.id, Report::Closed { sa: common.id, connection, reason });
    }

    /// Takes a child out of the datapath; begins it again if the configuration says so.
    pub(super) fn remove_child(&self, common: &Common, core: &mut Core, child: &Child, reason: CloseReason) {
        if child.state != ChildState::Refused {
            core.emit(common.id, Effect::Retire(child.id));
        }
        core.children.remove(&child.id);
        core.host.release_spi(child.spi_in);
        if !child.is_current() && !matches!(reason, CloseReason::Dead | CloseReason::Forgotten) {
            return;
        }
        let connection = Arc::clone(&self.connection.name);
        let name = self.child_name(child.index);
        let again = match (self.connection.children.get(child.index), reason) {
            (Some(config), CloseReason::Peer) => config.on_close == Start::Start,
            (Some(config), CloseReason::Dead) => config.on_dpd == Start::Start,
            (Some(config), CloseReason::Forgotten) => {
                [config.on_close, config.on_dpd].contains(&Start::Start)
            }
            (Some(config), CloseReason::Expired | CloseReason::Failed) => config.start == Start::Start,
            _ => false,
        };
        if again {
            let (connection, child) = (Arc::clone(&connection), Arc::clone(&name));
            core.errands.push(Errand::Restart { connection, child });
        }
        let (sa, child) = (common.id, child.id);
        core.report(common.id, Report::ChildDown { sa, child, connection, name, reason });
    }

    /// For showing.
    pub(super) fn show(&self, common: &Common, now: Now, view: &mut IkeSaView) {
        view.state = match &self.ours {
            _ if self.is_closing() => "deleting",
            Some(Ours::Ike(_)) => "rekeying",
            _ => "established",
        };
        view.remote_id = Some(self.remote_id.to_string());
        view.suite = self.suite.to_string();
        view.age = now.monotonic.saturating_duration_since(self.since);
        view.rekey_in = self.rekey_at.map(|at| at.saturating_duration_since(now.monotonic));
        view.addresses.clone_from(&self.addresses);
        let encap = common.encap().is_some();
        view.children = self.children.iter().map(|child| child.view(&self.connection, encap, now)).collect();
    }

    /// Everything that a successor takes over.
    pub(super) fn hand_over(&mut self, common: &Common) -> Estate {
        // Where this side is has still to be said; the answer that may come to this SA is about an older place.
        if matches!(self.ours, Some(Ours::Update)) && !self.tasks.contains(&Task::UpdateAddresses) {
            self.tasks.push_front(Task::UpdateAddresses);
        }
        self.replaced = true;
        self.rekey_at = None;
        Estate {
            children: std::mem::take(&mut self.children),
            tasks: self.take_tasks(),
            addresses: self.addresses.clone(),
            moving: std::mem::take(&mut self.moving),
            path: common.path,
            nat: common.nat,
            knows_tokens: self.token.is_some(),
        }
    }

    /// Takes over what a predecessor had.
    pub(super) fn inherit(&mut self, common: &mut Common, core: &mut Core, now: Now, estate: Estate) {
        let Estate { children, tasks, addresses, moving, path, nat, knows_tokens } = estate;
        if knows_tokens {
            // The old token is of the old SPIs (RFC 6290 section 4.3).
            self.tasks.push_back(Task::GiveToken);
        }
        let moved = common.path != path;
        (common.path, common.nat) = (path, nat);
        self.schedule_keepalive(common, core, now);
        for child in &children {
            core.children.insert(child.id, common.id);
        }
        self.children.extend(children);
        self.tasks.extend(tasks.into_iter().filter(|task| {
            !matches!(task, Task::RekeyIke | Task::DeleteIke(CloseReason::Replaced) | Task::CheckPeer)
        }));
        self.addresses = addresses;
        self.moving = moving;
        if moved || self.connection.reset == Strategy::Restore {
            self.persist(common, core);
        }
        let key = (Arc::clone(&self.connection.name), self.remote_id.clone());
        let peers = core.peers.entry(key).or_default();
        if !peers.iter().any(|(id, ..)| *id == common.id) {
            peers.push((common.id, common.initiator, common.spi_i, self.since));
        }
    }
}

/// What an IKE SA leaves to its successor.
pub(crate) struct Estate {
    children: Vec<Child>,
    tasks: VecDeque<Task>,
    addresses: Vec<IpAddr>,
    moving: Moving,
    path: Path,
    nat: Nat,
    /// The peer has given a token itself.
    knows_tokens: bool,
}

/// An IKE SA of a peer: its name, whether this side began it, the initiator's SPI, since when.
pub(crate) type PeerSa = (SaId, bool, IkeSpi, Instant);
