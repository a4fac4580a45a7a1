//! The difference between what should be installed and what is, as steps in an order that never leaves traffic without
//! its SA: make before break.
//!
//! SAs and entries come first, then the policies are switched to them, then what nothing uses any more is removed. Only
//! where a new inbound SA or entry takes over the SPI of an old one does the old one go just before it, because both
//! cannot be in the table. An object whose generation is installed is not touched (DP-7).

use std::collections::{BTreeMap, HashMap, HashSet};

use postern_contract::Generation;
use postern_contract::relay::{Partition, RelayId};
use postern_contract::request::{Operation, Page, RelayReport, SaReport};
use postern_contract::sa::{Direction, IpsecProtocol, Policy, PolicyId, SaId};
use postern_wire::ids::Spi;

use crate::desired::{Desired, duplicate};

/// What the datapath holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// SAs.
    pub sas: BTreeMap<SaId, SaReport>,
    /// Policies.
    pub policies: BTreeMap<PolicyId, Policy>,
    /// Translation entries.
    pub relays: BTreeMap<RelayId, RelayReport>,
}

impl Installed {
    /// Adds one page of the inventory.
    pub fn add(&mut self, page: Page) {
        let Page { sas, policies, relays, next: _ } = page;
        self.sas.extend(sas.into_iter().map(|report| (report.id, report)));
        self.policies.extend(policies.into_iter().map(|policy| (policy.id, policy)));
        self.relays.extend(relays.into_iter().map(|report| (report.entry.id, report)));
    }

    /// The newest generation of all.
    pub fn newest(&self) -> Generation {
        let sas = self.sas.values().map(|report| report.generation);
        let policies = self.policies.values().map(|policy| policy.generation);
        let relays = self.relays.values().map(|report| report.entry.generation);
        sas.chain(policies).chain(relays).max().unwrap_or(Generation(0))
    }
}

/// One change, by name: the description with its keys is looked up when it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Install or replace an SA.
    InstallSa(SaId),
    /// Remove an SA.
    RemoveSa(SaId),
    /// Install or replace a policy.
    InstallPolicy(PolicyId),
    /// Remove a policy.
    RemovePolicy(PolicyId),
    /// Install or replace a translation entry.
    InstallRelay(RelayId),
    /// Remove a translation entry.
    RemoveRelay(RelayId),
}

/// The steps of one reconciliation. Each phase is acknowledged before the next begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// SAs and entries, with what must make room for them.
    pub make: Vec<Step>,
    /// Policies.
    pub switch: Vec<Step>,
    /// What is no longer wanted.
    pub clear: Vec<Step>,
}

impl Plan {
    /// What it takes to come from `installed` to `desired`.
    pub fn new(desired: &Desired, installed: &Installed) -> Self {
        let mut plan = Self::default();
        let mut gone = Leaving::new(desired, installed);

        // AH first: the ESP SA of a bundle names it.
        for protocol in [IpsecProtocol::Ah, IpsecProtocol::Esp] {
            for (id, wanted) in desired.sas.iter().filter(|(_, wanted)| wanted.config.protocol == protocol) {
                if installed.sas.get(id).map(|report| report.generation) == Some(wanted.config.generation) {
                    continue;
                }
                if wanted.config.direction == Direction::Inbound {
                    plan.make.extend(gone.make_room((protocol, wanted.config.spi.on_wire)));
                }
                plan.make.push(Step::InstallSa(*id));
            }
        }
        for (id, wanted) in &desired.relays {
            if installed.relays.get(id).map(|report| report.entry.generation) == Some(wanted.entry.generation)
            {
                continue;
            }
            for spi in inbound_spis(&wanted.entry.client).chain(inbound_spis(&wanted.entry.gateway)) {
                plan.make.extend(gone.make_room(spi));
            }
            plan.make.push(Step::InstallRelay(*id));
        }

        for (id, wanted) in &desired.policies {
            if installed.policies.get(id).map(|policy| policy.generation) != Some(wanted.policy.generation) {
                plan.switch.push(Step::InstallPolicy(*id));
            }
        }
        let unwanted = installed.policies.keys().filter(|id| !desired.policies.contains_key(id));
        plan.switch.extend(unwanted.map(|id| Step::RemovePolicy(*id)));

        let Leaving { steps, by_spi: _, early } = gone;
        plan.clear.extend(steps.into_iter().filter(|step| !early.contains(step)));
        plan
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.make.len() + self.switch.len() + self.clear.len()
    }

    /// Whether everything is as it should be.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Step {
    /// The operation to send. What is not desired after all is removed.
    pub fn operation(self, desired: &Desired) -> Operation {
        match self {
            Self::InstallSa(id) => desired.sas.get(&id).map_or(Operation::RemoveSa(id), |wanted| {
                Operation::InstallSa(Box::new(duplicate(&wanted.config)))
            }),
            Self::RemoveSa(id) => Operation::RemoveSa(id),
            Self::InstallPolicy(id) => {
                desired.policies.get(&id).map_or(Operation::RemovePolicy(id), |wanted| {
                    Operation::InstallPolicy(wanted.policy.clone())
                })
            }
            Self::RemovePolicy(id) => Operation::RemovePolicy(id),
            Self::InstallRelay(id) => desired
                .relays
                .get(&id)
                .map_or(Operation::RemoveRelay(id), |wanted| Operation::InstallRelay(wanted.entry)),
            Self::RemoveRelay(id) => Operation::RemoveRelay(id),
        }
    }
}

/// Inbound lookup of the datapath: protocol and SPI.
type Lookup = (IpsecProtocol, Spi);

/// Installed SAs and entries that are no longer wanted.
struct Leaving {
    steps: Vec<Step>,
    by_spi: HashMap<Lookup, Vec<Step>>,
    /// Those of `steps` that [`Leaving::make_room`] has given out.
    early: HashSet<Step>,
}

impl Leaving {
    fn new(desired: &Desired, installed: &Installed) -> Self {
        let mut leaving = Self { steps: Vec::new(), by_spi: HashMap::new(), early: HashSet::new() };
        for (id, report) in installed.sas.iter().filter(|(id, _)| !desired.sas.contains_key(id)) {
            let step = Step::RemoveSa(*id);
            leaving.steps.push(step);
            if report.direction == Direction::Inbound {
                leaving.by_spi.entry((report.protocol, report.spi.on_wire)).or_default().push(step);
            }
        }
        for (id, report) in installed.relays.iter().filter(|(id, _)| !desired.relays.contains_key(id)) {
            let step = Step::RemoveRelay(*id);
            leaving.steps.push(step);
            for spi in inbound_spis(&report.entry.client).chain(inbound_spis(&report.entry.gateway)) {
                leaving.by_spi.entry(spi).or_default().push(step);
            }
        }
        leaving
    }

    /// Takes out the steps that free `spi`.
    fn make_room(&mut self, spi: Lookup) -> Vec<Step> {
        let mut steps = self.by_spi.remove(&spi).unwrap_or_default();
        steps.retain(|step| self.early.insert(*step));
        steps
    }
}

fn inbound_spis(partition: &Partition) -> impl Iterator<Item = Lookup> + use<> {
    let esp = partition.esp.map(|pair| (IpsecProtocol::Esp, pair.to_relay));
    let ah = partition.ah.map(|pair| (IpsecProtocol::Ah, pair.to_relay));
    esp.into_iter().chain(ah)
}
