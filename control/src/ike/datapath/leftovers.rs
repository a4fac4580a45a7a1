//! A connection to the datapath: what is installed, compared with what should be; and what an earlier control process
//! left. See [`datapath`](super) for why.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use postern_contract::Generation;
use postern_contract::request::Operation;
use postern_contract::sa::{Action, Direction, PolicyId};
use postern_ike::output::{ChildId, ChildSa};
use tracing::{info, warn};

use super::{ChildState, Datapath, Slot, SlotKey, Told, UnderWay, digest_of, remove};
use crate::datapath::reconcile::Installed;
use crate::ike::describe::PairId;

/// How long SAs of an earlier control process may stay. Their peers notice much earlier that nobody answers, if they
/// look at all; those that do not look go on until their own lifetimes end.
pub(super) const LEFTOVER: Duration = Duration::from_hours(1);

/// A leftover that was replaced stays this long, for packets that are under way.
pub(super) const DRAIN: Duration = Duration::from_secs(5);

/// SAs of which nothing is known but what the datapath tells.
#[derive(Debug)]
pub(super) struct Leftover {
    pub(super) until: Instant,
    /// Its address, and its port if encapsulated in UDP.
    peer: (IpAddr, Option<u16>),
    spi_in: Option<u32>,
    pub(super) slot: Option<SlotKey>,
}

impl Datapath {
    /// Compares what is installed with what should be.
    pub(super) fn connect(&mut self, now: Instant, instance: u64, installed: &Installed) -> Vec<Told> {
        let first = self.instance.replace(instance).is_none();
        self.connected = true;
        self.stamp = self.stamp.max(installed.newest().0);
        let mut operations = Vec::new();
        let mut lost = Vec::new();
        let mut missing = Vec::new();
        let mut failed = Vec::new();
        for (id, child) in &mut self.children {
            let both = [Direction::Inbound, Direction::Outbound].map(|direction| {
                installed.sas.get(&child.pair.sa(direction)).map(|report| report.generation)
            });
            match child.state {
                ChildState::Waiting(_) => missing.push(*id),
                // Installing what is there changes nothing.
                ChildState::Unclear(before, _) if before == instance => missing.push(*id),
                ChildState::Unclear(..) => failed.push(*id),
                ChildState::Installed if both.iter().any(Option::is_none) => {
                    child.state = ChildState::Lost;
                    operations.extend(remove(child.pair));
                    lost.push(*id);
                }
                ChildState::Installed if both != [Some(child.generation); 2] => {
                    operations.extend(child.install_operations());
                }
                // `Ordered` is answered after this.
                ChildState::Installed | ChildState::Ordered | ChildState::Lost => {}
            }
        }
        self.leftovers.retain(|pair, left| {
            let both = [Direction::Inbound, Direction::Outbound];
            let there = both.into_iter().any(|direction| installed.sas.contains_key(&pair.sa(direction)));
            if !there && let Some(spi) = left.spi_in {
                self.spis.lock().unwrap_or_else(PoisonError::into_inner).release(spi);
            }
            there
        });
        if first {
            self.adopt(now, installed);
        }
        for slot in self
            .slots
            .values_mut()
            .filter(|slot| !slot.leftover.is_some_and(|p| self.leftovers.contains_key(&p)))
        {
            slot.leftover = None;
        }
        self.slots.retain(|_, slot| !slot.users.is_empty() || slot.leftover.is_some());

        let known = |pair: PairId| self.pairs.contains_key(&pair) || self.leftovers.contains_key(&pair);
        let foreign = installed.sas.keys().filter(|id| !known(PairId::of(**id)));
        let foreign: Vec<Operation> = foreign.map(|id| Operation::RemoveSa(*id)).collect();
        let policies: HashSet<PolicyId> =
            self.slots.values().map(|slot| slot.policy).chain(self.traps.keys().copied()).collect();
        let unwanted = installed.policies.keys().filter(|id| !policies.contains(id));
        operations.extend(unwanted.map(|id| Operation::RemovePolicy(*id)));
        let differs = |id: &PolicyId, generation: Generation| {
            installed.policies.get(id).is_none_or(|policy| policy.generation != generation)
        };
        let slots = self.slots.iter().filter(|(_, slot)| !slot.users.is_empty());
        let slots: Vec<SlotKey> =
            slots.filter(|(_, slot)| differs(&slot.policy, slot.generation)).map(|(key, _)| *key).collect();
        for key in slots {
            operations.extend(self.policy(key));
        }
        let traps = self.traps.iter().filter(|(id, (_, generation, _))| differs(id, *generation));
        let traps: Vec<PolicyId> = traps.map(|(id, _)| *id).collect();
        for id in traps {
            let generation = self.stamp();
            if let Some((trap, described, _)) = self.traps.get_mut(&id) {
                *described = generation;
                operations.push(trap.operation(id, generation));
            }
        }
        operations.extend(foreign);
        self.order(UnderWay::Quiet, operations);
        for id in missing {
            self.order_install(id);
        }
        let leftovers = self.leftovers.values().filter(|_| first).map(|left| left.peer.0).collect();
        let mut told = vec![Told::Connected { leftovers }];
        let restarted = || "the datapath was started anew".to_owned();
        told.extend(failed.into_iter().map(|id| self.failed(id, restarted())));
        if !lost.is_empty() {
            warn!(children = lost.len(), "the datapath was started anew: its CHILD_SAs get new keys");
            told.push(Told::Lost(lost));
        }
        told
    }

    /// Takes over what an earlier control process left.
    fn adopt(&mut self, now: Instant, installed: &Installed) {
        let mut spis = self.spis.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, report) in &installed.sas {
            let pair = PairId::of(*id);
            if self.pairs.contains_key(&pair) {
                continue;
            }
            let until = now + LEFTOVER;
            let peer = (report.remote.on_wire, report.encap.map(|encap| encap.remote_port));
            let leftover =
                self.leftovers.entry(pair).or_insert(Leftover { until, peer, spi_in: None, slot: None });
            if report.direction == Direction::Inbound {
                spis.reserve(report.spi.on_wire.0);
                leftover.spi_in = Some(report.spi.on_wire.0);
            }
        }
        drop(spis);
        for (id, policy) in &installed.policies {
            let Action::Protect(Some(sa)) = policy.action else { continue };
            let pair = PairId::of(sa);
            let Some(leftover) = self.leftovers.get_mut(&pair) else { continue };
            let key = digest_of(policy.priority, &policy.selectors);
            leftover.slot = Some(key);
            let slot =
                Slot { policy: *id, generation: policy.generation, users: Vec::new(), leftover: Some(pair) };
            // A child in use of the same selectors has come in between: its policy is the newer one.
            self.slots.entry(key).or_insert(slot);
        }
        if !self.leftovers.is_empty() {
            info!(
                children = self.leftovers.len(),
                "found CHILD_SAs of an earlier control process; they go on until they are replaced"
            );
        }
    }

    /// Leftovers of the same peer end soon: it has a new IKE SA with this node, and deletes what it had before.
    pub(super) fn supersede(&mut self, id: ChildId) {
        if self.leftovers.is_empty() {
            return;
        }
        let Some(child) = self.children.get(&id) else { return };
        let ChildSa { remote, encap, .. } = &*child.description;
        let peer = (*remote, encap.map(|(_, port)| port));
        let until = Instant::now() + DRAIN;
        for leftover in self.leftovers.values_mut().filter(|leftover| leftover.peer == peer) {
            leftover.until = leftover.until.min(until);
        }
    }

    /// Removes one.
    pub(super) fn retire_leftover(&mut self, pair: PairId) {
        let Some(Leftover { spi_in, slot, .. }) = self.leftovers.remove(&pair) else { return };
        let mut operations = Vec::new();
        if let Some(key) = slot
            && let Some(slot) = self.slots.get_mut(&key)
        {
            slot.leftover = None;
            if slot.users.is_empty() {
                operations.push(Operation::RemovePolicy(slot.policy));
                self.slots.remove(&key);
            }
        }
        operations.extend(remove(pair));
        self.order(UnderWay::Quiet, operations);
        if let Some(spi) = spi_in {
            self.spis.lock().unwrap_or_else(PoisonError::into_inner).release(spi);
        }
    }
}
