//! CHILD_SAs in the datapath: what IKE wants installed, as orders to the supervisor, and what the datapath says of it.
//!
//! [`Datapath`] has no I/O of its own: calls and [`Notice`]s go in, [`Order`]s go out through a channel, and what IKE
//! should know comes back as [`Told`]. It is the truth of what should be installed of negotiated objects: at every
//! connection the datapath's inventory is compared with it, so an order that was lost does no harm.
//!
//! # Policies
//! Children with the same selectors and priority share one policy, which points to the one that was put in use last: a
//! rekey, or a peer that came back with a new IKE SA, switches it in one step, and the old SA goes on receiving until it
//! is retired. Of overlapping policies the newer comes first. Below them are *traps*: for each child that starts by
//! itself or on traffic a policy without an SA, so that its packets are never sent in the clear, and ask for the child
//! (`Acquire`) while it is not up.
//!
//! # A datapath that was started anew
//! It is empty, and what its SAs had received is forgotten: installed again with the same keys they would accept
//! old packets a second time (outbound numbers would be safe, by the datapath's ledger). So no negotiated SA is ever
//! installed in a second life of the datapath. Policies are put back at once, pointing to nothing, and IKE is told of
//! the lost children ([`Told::Lost`]) to rekey them: one round trip later each has new keys.
//!
//! With `reset = "restore"` children do go on in another life of the datapath, after a reset of both: it knows from the
//! beginning that their keys may come back ([`KeyOrigin`](postern_contract::sa::KeyOrigin)), and keeps what their windows
//! accepted as it does for keys from a file.
//!
//! # A control process that was started anew
//! It finds SAs that it has no keys for: *leftovers*. They go on forwarding until a new child with the same selectors is
//! in use, the datapath's own lifetime limit ends them, or [`LEFTOVER`](leftovers::LEFTOVER) is over. Connections whose peer's address is known
//! are initiated at once, with INITIAL_CONTACT, so that the peer replaces its old ones; others come back by their dead
//! peer detection. Inbound SPIs of leftovers are reserved as long as they are there.

mod leftovers;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use postern_contract::Generation;
use postern_contract::event::Event;
use postern_contract::request::Operation;
use postern_contract::sa::{Action, Direction, Policy, PolicyId, SaConfig, SaId as DatapathSa, Selector};
use postern_ike::Random;
use postern_ike::output::{ChildId, ChildSa, SaId};
use tokio::sync::mpsc::UnboundedSender;
use tracing::warn;

use self::leftovers::{DRAIN, Leftover};
use super::describe::{PairId, describe, selectors, tunnel_name};
use super::jobs::System;
use super::spis::Spis;
use crate::config::ike::ChildSettings;
use crate::datapath::client::Outcome;
use crate::datapath::supervisor::{Notice, Order};
use crate::desired::{NEGOTIATED, Outline, SaOutline, TunnelSummary};
use crate::digest;

/// How long an installation waits for a datapath that is away.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two [`Told::Acquire`] of one trap.
const ACQUIRE: Duration = Duration::from_secs(1);

/// This bit of a policy's id puts traps behind policies of children.
const TRAP: u64 = 1 << 62;

/// What IKE should know.
#[derive(Debug)]
pub enum Told {
    /// Answer to [`Datapath::install`].
    Installed(ChildId, Result<(), String>),
    /// What was ordered for this IKE SA is done: its outputs go on.
    Resume(SaId),
    /// There is a connection, for the first time or again.
    Connected {
        /// Addresses of peers that leftovers were found of; empty but for the first connection.
        leftovers: HashSet<IpAddr>,
    },
    /// The datapath does not have these any more.
    Lost(Vec<ChildId>),
    /// A soft limit.
    SoftLimit(ChildId),
    /// A hard limit, or the end of its numbers.
    HardLimit(ChildId),
    /// MOB-2: the peer's newest packet came from here.
    Moved(ChildId, IpAddr, Option<u16>),
    /// Traffic waits for a child.
    Acquire {
        /// The connection.
        connection: Arc<str>,
        /// The child.
        child: Arc<str>,
        /// From where to where, in words.
        packet: String,
    },
}

/// A policy for traffic that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trap {
    /// The connection.
    pub connection: Arc<str>,
    /// The child.
    pub child: Arc<str>,
    /// Priority.
    pub priority: u32,
    /// Selectors.
    pub selectors: Vec<Selector>,
}

/// Negotiated objects.
#[derive(Debug)]
pub struct Datapath {
    orders: UnboundedSender<Order>,
    spis: Arc<Mutex<Spis>>,
    random: System,
    connected: bool,
    /// The datapath's life that children are installed in.
    instance: Option<u64>,
    next_token: u64,
    under_way: HashMap<u64, UnderWay>,
    children: HashMap<ChildId, Child>,
    pairs: HashMap<PairId, ChildId>,
    slots: HashMap<SlotKey, Slot>,
    traps: BTreeMap<PolicyId, (Trap, Generation, Option<Instant>)>,
    leftovers: BTreeMap<PairId, Leftover>,
    stamp: u64,
}

/// Digest of priority and selectors.
type SlotKey = [u8; 16];

/// What an order that was not answered yet was for.
#[derive(Debug)]
enum UnderWay {
    Install(ChildId),
    Step(SaId),
    Quiet,
}

#[derive(Debug)]
struct Child {
    pair: PairId,
    generation: Generation,
    state: ChildState,
    description: Box<ChildSa>,
    settings: ChildSettings,
    /// Where it is in use.
    slot: Option<SlotKey>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChildState {
    /// For a connection, since then.
    Waiting(Instant),
    /// For an answer.
    Ordered,
    /// The connection broke before the answer came: in this life of the datapath it may be there.
    Unclear(u64, Instant),
    Installed,
    /// The datapath does not have it any more.
    Lost,
}

/// A policy and who uses it.
#[derive(Debug)]
struct Slot {
    policy: PolicyId,
    generation: Generation,
    /// The last one has it.
    users: Vec<ChildId>,
    /// It still leads to this one.
    leftover: Option<PairId>,
}

impl Datapath {
    /// One that knows of no connection yet.
    pub fn new(orders: UnboundedSender<Order>, spis: Arc<Mutex<Spis>>) -> Self {
        Self {
            orders,
            spis,
            random: System::default(),
            connected: false,
            instance: None,
            next_token: 0,
            under_way: HashMap::new(),
            children: HashMap::new(),
            pairs: HashMap::new(),
            slots: HashMap::new(),
            traps: BTreeMap::new(),
            leftovers: BTreeMap::new(),
            stamp: 0,
        }
    }

    /// Whether there is a connection.
    pub const fn is_connected(&self) -> bool {
        self.connected
    }

    /// Has a child installed; [`Told::Installed`] follows. An error is one that no datapath could change.
    pub fn install(
        &mut self,
        now: Instant,
        child: Box<ChildSa>,
        settings: ChildSettings,
    ) -> Result<(), String> {
        let pair = self.new_pair();
        let generation = self.stamp();
        let configs = describe(pair, generation, &child, &settings)?;
        let id = child.id;
        let slot = if child.in_use { Some(slot_key(&child, &settings)?) } else { None };
        self.pairs.insert(pair, id);
        let state = ChildState::Waiting(now);
        self.children.insert(id, Child { pair, generation, state, description: child, settings, slot: None });
        if let Some(slot) = slot {
            self.enter(id, slot);
        }
        if self.connected {
            self.order_install_of(id, installs(configs));
        }
        Ok(())
    }

    /// Sends what the child protects through it. Gives whether [`Told::Resume`] of `sa` follows.
    pub fn put_in_use(&mut self, sa: SaId, id: ChildId) -> bool {
        let Some(child) = self.children.get(&id) else { return false };
        let Ok(key) = slot_key(&child.description, &child.settings) else { return false };
        if self.slots.get(&key).is_some_and(|slot| slot.users.last() == Some(&id)) {
            return false;
        }
        self.enter(id, key);
        let operations = self.policy(key).into_iter().collect();
        self.order(UnderWay::Step(sa), operations)
    }

    /// Changes a child's outer addresses. Gives whether [`Told::Resume`] of `sa` follows.
    pub fn move_to(
        &mut self,
        sa: SaId,
        id: ChildId,
        (local, remote): (IpAddr, IpAddr),
        encap: Option<(u16, u16)>,
    ) -> bool {
        let generation = self.stamp();
        let Some(child) = self.children.get_mut(&id) else { return false };
        (child.description.local, child.description.remote, child.description.encap) = (local, remote, encap);
        child.generation = generation;
        if child.state == ChildState::Lost {
            return false;
        }
        let operations = child.install_operations();
        self.order(UnderWay::Step(sa), operations)
    }

    /// Removes a child.
    pub fn retire(&mut self, id: ChildId) {
        let Some(child) = self.children.remove(&id) else { return };
        self.pairs.remove(&child.pair);
        let mut operations = Vec::new();
        if let Some(key) = child.slot {
            operations.extend(self.leave(id, key));
        }
        operations.extend(remove(child.pair));
        self.order(UnderWay::Quiet, operations);
    }

    /// The traps that there should be.
    pub fn set_traps(&mut self, traps: Vec<Trap>) {
        let mut wanted: BTreeMap<PolicyId, Trap> = BTreeMap::new();
        for trap in traps {
            let name = [b"trap", trap.connection.as_bytes(), trap.child.as_bytes()];
            wanted.insert(PolicyId(NEGOTIATED | TRAP | digest::short(&name) >> 2), trap);
        }
        let mut operations = Vec::new();
        let unwanted: Vec<PolicyId> =
            self.traps.keys().filter(|id| !wanted.contains_key(id)).copied().collect();
        for id in unwanted {
            self.traps.remove(&id);
            operations.push(Operation::RemovePolicy(id));
        }
        for (id, trap) in wanted {
            if self.traps.get(&id).is_some_and(|(found, ..)| *found == trap) {
                continue;
            }
            let generation = self.stamp();
            operations.push(trap.operation(id, generation));
            self.traps.insert(id, (trap, generation, None));
        }
        self.order(UnderWay::Quiet, operations);
    }

    /// The supervisor said something.
    pub fn notice(&mut self, now: Instant, notice: Notice) -> Vec<Told> {
        match notice {
            Notice::Connected { instance, installed } => self.connect(now, instance, &installed),
            Notice::Lost => {
                self.connected = false;
                Vec::new()
            }
            Notice::Applied { token, outcomes } => self.applied(now, token, outcomes).into_iter().collect(),
            Notice::Events(events) => events.iter().filter_map(|event| self.event(now, event)).collect(),
        }
    }

    /// What is due by `now`. To be called about every second.
    pub fn tick(&mut self, now: Instant) -> Vec<Told> {
        let due: Vec<PairId> =
            self.leftovers.iter().filter(|(_, left)| left.until <= now).map(|(pair, _)| *pair).collect();
        for pair in due {
            self.retire_leftover(pair);
        }
        if self.connected {
            return Vec::new();
        }
        let late: Vec<ChildId> = self
            .children
            .iter()
            .filter(|(_, child)| match child.state {
                ChildState::Waiting(since) | ChildState::Unclear(_, since) => since + PATIENCE <= now,
                _ => false,
            })
            .map(|(id, _)| *id)
            .collect();
        late.into_iter().map(|id| self.failed(id, "the datapath is down".to_owned())).collect()
    }

    /// Number of CHILD_SAs.
    pub fn children(&self) -> usize {
        self.children.len()
    }

    /// What may be shown of the children and traps.
    pub fn outline(&self) -> Outline {
        let mut outline = Outline::default();
        for child in self.children.values() {
            let Ok(configs) = describe(child.pair, child.generation, &child.description, &child.settings)
            else {
                continue;
            };
            let ChildSa { connection, child: index, .. } = &*child.description;
            let name =
                connection.children.get(*index).map(|found| tunnel_name(&connection.name, &found.name));
            let tunnel = name.unwrap_or_else(|| connection.name.to_string());
            let suite = super::describe::suite_words(&child.description);
            let slot = child.slot.and_then(|key| self.slots.get(&key));
            let [config, _] = &configs;
            outline.tunnels.push(TunnelSummary {
                name: tunnel.clone(),
                mode: config.mode,
                suite: suite.clone(),
                sas: configs.iter().map(|config| config.id).collect(),
                policy: slot.map_or(PolicyId(0), |slot| slot.policy),
            });
            if let Some((slot, key)) = slot.zip(child.slot)
                && let Some(Operation::InstallPolicy(policy)) = self.policy_operation(key, slot.generation)
            {
                outline.policies.insert(slot.policy, (tunnel.clone(), policy));
            }
            for config in configs {
                let id = config.id;
                outline.sas.insert(id, SaOutline::new(tunnel.clone(), suite.clone(), &config));
            }
        }
        for (id, (trap, generation, _)) in &self.traps {
            if let Operation::InstallPolicy(policy) = trap.operation(*id, *generation) {
                outline.policies.insert(*id, (tunnel_name(&trap.connection, &trap.child), policy));
            }
        }
        outline
    }

    fn new_pair(&mut self) -> PairId {
        loop {
            let random: &mut dyn Random = &mut self.random;
            let pair = PairId::new(random.u64());
            if !self.pairs.contains_key(&pair) && !self.leftovers.contains_key(&pair) {
                return pair;
            }
        }
    }

    /// A number above all that were given, in this life of control and earlier ones.
    fn stamp(&mut self) -> Generation {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.stamp = u64::try_from(now.as_micros()).unwrap_or_default().max(self.stamp + 1);
        Generation(self.stamp)
    }

    /// Sends operations, if there are any and there is a connection. Gives whether an answer follows. Without a
    /// connection there is nothing to do: the next one finds what differs.
    fn order(&mut self, purpose: UnderWay, operations: Vec<Operation>) -> bool {
        if !self.connected || operations.is_empty() {
            return false;
        }
        self.next_token += 1;
        let token = self.next_token;
        self.under_way.insert(token, purpose);
        // An error means that the daemon ends.
        self.orders.send(Order { token, operations }).is_ok()
    }

    fn order_install(&mut self, id: ChildId) {
        if let Some(child) = self.children.get(&id) {
            self.order_install_of(id, child.install_operations());
        }
    }

    fn order_install_of(&mut self, id: ChildId, mut operations: Vec<Operation>) {
        let Some(child) = self.children.get_mut(&id) else { return };
        child.state = ChildState::Ordered;
        let slot = child.slot;
        if let Some(key) = slot {
            operations.extend(self.policy(key));
        }
        self.order(UnderWay::Install(id), operations);
    }

    /// Makes the child the one in use of a slot.
    fn enter(&mut self, id: ChildId, key: SlotKey) {
        let stamp = self.stamp();
        let slot = self.slots.entry(key).or_insert_with(|| Slot {
            // Newer policies have lower ids, so they come first.
            policy: PolicyId(NEGOTIATED | (TRAP - 1).saturating_sub(stamp.0)),
            generation: stamp,
            users: Vec::new(),
            leftover: None,
        });
        slot.users.retain(|user| *user != id);
        slot.users.push(id);
        if let Some(child) = self.children.get_mut(&id) {
            child.slot = Some(key);
        }
        self.supersede(id);
    }

    /// Takes a child out of its slot; gives what that changes.
    fn leave(&mut self, id: ChildId, key: SlotKey) -> Option<Operation> {
        let slot = self.slots.get_mut(&key)?;
        let had_it = slot.users.last() == Some(&id);
        slot.users.retain(|user| *user != id);
        if !slot.users.is_empty() {
            return if had_it { self.policy(key) } else { None };
        }
        let slot = self.slots.remove(&key)?;
        Some(Operation::RemovePolicy(slot.policy))
    }

    /// The policy of a slot, described anew, leading to the child in use. What it led to before ends soon.
    fn policy(&mut self, key: SlotKey) -> Option<Operation> {
        let generation = self.stamp();
        let slot = self.slots.get_mut(&key)?;
        slot.generation = generation;
        if let Some(pair) = slot.leftover.take()
            && let Some(leftover) = self.leftovers.get_mut(&pair)
        {
            leftover.slot = None;
            leftover.until = Instant::now() + DRAIN;
        }
        self.policy_operation(key, generation)
    }

    fn policy_operation(&self, key: SlotKey, generation: Generation) -> Option<Operation> {
        let slot = self.slots.get(&key)?;
        let child = self.children.get(slot.users.last()?)?;
        let description = &child.description;
        Some(Operation::InstallPolicy(Policy {
            id: slot.policy,
            generation,
            priority: child.settings.priority,
            selectors: selectors(&description.local_ts, &description.remote_ts).ok()?,
            action: Action::Protect(Some(child.pair.sa(Direction::Outbound))),
        }))
    }

    /// A child could not be installed; nothing of it stays.
    fn failed(&mut self, id: ChildId, problem: String) -> Told {
        self.retire(id);
        Told::Installed(id, Err(problem))
    }

    fn applied(&mut self, now: Instant, token: u64, outcomes: Result<Vec<Outcome>, String>) -> Option<Told> {
        match (self.under_way.remove(&token)?, outcomes) {
            (UnderWay::Install(id), Ok(outcomes)) => {
                if let Some(refusal) = outcomes.into_iter().find_map(Result::err) {
                    warn!("the datapath refused a CHILD_SA: {refusal}");
                    return Some(self.failed(id, refusal.to_string()));
                }
                // Retired meanwhile: the removal is on its way.
                self.children.get_mut(&id)?.state = ChildState::Installed;
                Some(Told::Installed(id, Ok(())))
            }
            // It may or may not be there: the next connection tells.
            (UnderWay::Install(id), Err(_)) => {
                let instance = self.instance.unwrap_or_default();
                self.children.get_mut(&id)?.state = ChildState::Unclear(instance, now);
                None
            }
            (UnderWay::Step(sa), outcomes) => {
                if let Ok(outcomes) = outcomes
                    && let Some(refusal) = outcomes.into_iter().find_map(Result::err)
                {
                    warn!("the datapath refused a change of a CHILD_SA: {refusal}");
                }
                Some(Told::Resume(sa))
            }
            (UnderWay::Quiet, _) => None,
        }
    }

    fn event(&mut self, now: Instant, event: &Event) -> Option<Told> {
        let child = |sa: DatapathSa| self.pairs.get(&PairId::of(sa)).copied();
        match event {
            Event::SoftLimit { sa, .. } => child(*sa).map(Told::SoftLimit),
            Event::HardLimit { sa, .. } | Event::SequenceExhausted { sa } => {
                let found = child(*sa);
                if found.is_none() {
                    self.retire_leftover(PairId::of(*sa));
                }
                found.map(Told::HardLimit)
            }
            Event::NewPath { sa, remote, port } => child(*sa).map(|id| Told::Moved(id, *remote, *port)),
            Event::Acquire { policy, source, destination, protocol, ports: _ } => {
                let (trap, _, last) = self.traps.get_mut(policy)?;
                if last.is_some_and(|last| now < last + ACQUIRE) {
                    return None;
                }
                *last = Some(now);
                Some(Told::Acquire {
                    connection: Arc::clone(&trap.connection),
                    child: Arc::clone(&trap.child),
                    packet: format!("{source} to {destination}, protocol {}", protocol.0),
                })
            }
            Event::Lost { count } => {
                warn!(count, "events of the datapath were lost");
                None
            }
        }
    }
}

impl Child {
    fn install_operations(&self) -> Vec<Operation> {
        match describe(self.pair, self.generation, &self.description, &self.settings) {
            Ok(configs) => installs(configs),
            // It was described before it was entered.
            Err(_) => Vec::new(),
        }
    }
}

fn installs(configs: [SaConfig; 2]) -> Vec<Operation> {
    configs.map(|config| Operation::InstallSa(Box::new(config))).into()
}

impl Trap {
    fn operation(&self, id: PolicyId, generation: Generation) -> Operation {
        Operation::InstallPolicy(Policy {
            id,
            generation,
            priority: self.priority,
            selectors: self.selectors.clone(),
            action: Action::Protect(None),
        })
    }
}

fn remove(pair: PairId) -> [Operation; 2] {
    [Direction::Outbound, Direction::Inbound].map(|direction| Operation::RemoveSa(pair.sa(direction)))
}

fn slot_key(child: &ChildSa, settings: &ChildSettings) -> Result<SlotKey, String> {
    Ok(digest_of(settings.priority, &selectors(&child.local_ts, &child.remote_ts)?))
}

fn digest_of(priority: u32, selectors: &[Selector]) -> SlotKey {
    let mut selectors: Vec<Vec<u8>> =
        selectors.iter().map(|selector| postcard::to_allocvec(selector).unwrap_or_default()).collect();
    selectors.sort();
    digest::half(&[b"policy", &priority.to_be_bytes(), &selectors.concat()])
}

#[cfg(test)]
mod tests;
