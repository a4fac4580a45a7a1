//! The difference between what should be installed and what is, as steps in an order that never leaves traffic without
//! its SA: make before break.
//!
//! SAs and entries come first, then the policies are switched to them, then what nothing uses any more is removed. Only
//! where both cannot be in the tables does the old one go just before the new one: when it takes over an inbound SPI, or
//! the keys under which an outbound SA counts. An object whose generation is installed is not touched (DP-7).

use std::collections::{BTreeMap, HashMap, HashSet};

use postern_contract::Generation;
use postern_contract::relay::{Partition, RelayId};
use postern_contract::request::{Operation, Page, RelayReport, SaReport};
use postern_contract::sa::{Direction, IpsecProtocol, Policy, PolicyId, SaId};
use postern_wire::ids::Spi;

use crate::desired::{Desired, NEGOTIATED, duplicate};

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

    /// What was configured, and what the negotiator installed.
    pub fn divide(mut self) -> (Self, Self) {
        let negotiated = Self {
            sas: self.sas.split_off(&SaId(NEGOTIATED)),
            policies: self.policies.split_off(&PolicyId(NEGOTIATED)),
            relays: BTreeMap::new(),
        };
        (self, negotiated)
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
                let config = &wanted.config;
                plan.make.extend(gone.make_room(match config.direction {
                    Direction::Inbound => Place::Inbound(protocol, config.spi.on_wire),
                    Direction::Outbound => Place::Keys(config.suite.key_check()),
                }));
                plan.make.push(Step::InstallSa(*id));
            }
        }
        for (id, wanted) in &desired.relays {
            if installed.relays.get(id).map(|report| report.entry.generation) == Some(wanted.entry.generation)
            {
                continue;
            }
            for place in places_of(&wanted.entry.client).chain(places_of(&wanted.entry.gateway)) {
                plan.make.extend(gone.make_room(place));
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

        let Leaving { steps, by_place: _, early } = gone;
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

/// What no two objects can have at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Place {
    /// Inbound lookup of the datapath.
    Inbound(IpsecProtocol, Spi),
    /// Outbound numbers are counted per key.
    Keys([u8; 8]),
}

/// Installed SAs and entries that are no longer wanted.
struct Leaving {
    steps: Vec<Step>,
    by_place: HashMap<Place, Vec<Step>>,
    /// Those of `steps` that [`Leaving::make_room`] has given out.
    early: HashSet<Step>,
}

impl Leaving {
    fn new(desired: &Desired, installed: &Installed) -> Self {
        let mut leaving = Self { steps: Vec::new(), by_place: HashMap::new(), early: HashSet::new() };
        for (id, report) in installed.sas.iter().filter(|(id, _)| !desired.sas.contains_key(id)) {
            let step = Step::RemoveSa(*id);
            let place = match report.direction {
                Direction::Inbound => Place::Inbound(report.protocol, report.spi.on_wire),
                Direction::Outbound => Place::Keys(report.key_check),
            };
            leaving.add(step, [place]);
        }
        for (id, report) in installed.relays.iter().filter(|(id, _)| !desired.relays.contains_key(id)) {
            let places = places_of(&report.entry.client).chain(places_of(&report.entry.gateway));
            leaving.add(Step::RemoveRelay(*id), places);
        }
        leaving
    }

    fn add(&mut self, step: Step, places: impl IntoIterator<Item = Place>) {
        self.steps.push(step);
        for place in places {
            self.by_place.entry(place).or_default().push(step);
        }
    }

    /// The steps that free `place` and were not given out before.
    fn make_room(&mut self, place: Place) -> Vec<Step> {
        let mut steps = self.by_place.remove(&place).unwrap_or_default();
        steps.retain(|step| self.early.insert(*step));
        steps
    }
}

fn places_of(partition: &Partition) -> impl Iterator<Item = Place> + use<> {
    let esp = partition.esp.map(|pair| Place::Inbound(IpsecProtocol::Esp, pair.to_relay));
    let ah = partition.ah.map(|pair| Place::Inbound(IpsecProtocol::Ah, pair.to_relay));
    esp.into_iter().chain(ah)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fmt::Write;

    use postern_contract::counters::SaCounters;
    use postern_contract::sa::{Action, SaConfig};
    use proptest::prelude::*;

    use super::*;
    use crate::config::{NoKeyFiles, parse};

    /// A tunnel in a world of few names, SPIs and keys, so that they change hands.
    type Sketch = (u8, u8, u8, bool);

    fn sketches() -> impl Strategy<Value = Vec<Sketch>> {
        let one = (0..4_u8, 0..4_u8, 0..4_u8, any::<bool>());
        proptest::collection::vec(one, 0..5).prop_map(|mut all| {
            // Each name, inbound SPI and key once, as the configuration demands.
            let mut seen = HashSet::new();
            all.retain(|(name, spi, key, _)| {
                seen.insert((0, *name)) & seen.insert((1, *spi)) & seen.insert((2, *key))
            });
            all
        })
    }

    fn desired(sketches: &[Sketch]) -> Desired {
        let mut text = String::new();
        for (name, spi, key, clamp) in sketches {
            write!(
                text,
                "[[tunnel]]\nname = \"{name}\"\nlocal = \"192.0.2.1\"\nremote = \"192.0.2.2\"\nesp = \"aes128gcm16\"\n\
                 out = {{ spi = {}, key = \"{}\" }}\nin = {{ spi = {}, key = \"{}\" }}\nmss_clamp = {clamp}\n\
                 local_net = [\"10.1.0.0/24\"]\nremote_net = [\"10.2.0.0/24\"]\n",
                0x1000 + u32::from(*spi),
                format!("0{key}").repeat(20),
                0x2000 + u32::from(*spi),
                format!("f{key}").repeat(20),
            )
            .unwrap();
        }
        let mut desired = Desired::new(parse("t", &text, &NoKeyFiles).unwrap());
        // As `state` does it: the same description, the same generation.
        for wanted in desired.sas.values_mut() {
            let description = format!("{:?}", wanted.config);
            wanted.config.generation = Generation(crate::digest::short(&[description.as_bytes()]));
        }
        for wanted in desired.policies.values_mut() {
            let description = format!("{:?}", wanted.policy);
            wanted.policy.generation = Generation(crate::digest::short(&[description.as_bytes()]));
        }
        desired
    }

    /// A datapath that is as strict as the real one.
    #[derive(Default)]
    struct Model {
        sas: HashMap<SaId, SaConfig>,
        policies: HashMap<PolicyId, Policy>,
    }

    impl Model {
        fn apply(&mut self, operation: Operation) {
            match operation {
                Operation::InstallSa(config) => {
                    for other in self.sas.values().filter(|other| other.id != config.id) {
                        let inbound = config.direction == Direction::Inbound;
                        assert!(
                            other.direction != config.direction || !inbound || other.spi != config.spi,
                            "SPI taken"
                        );
                        assert!(
                            other.direction != config.direction || inbound || other.suite != config.suite,
                            "same keys"
                        );
                    }
                    self.sas.insert(config.id, *config);
                }
                Operation::RemoveSa(id) => assert!(self.sas.remove(&id).is_some()),
                Operation::InstallPolicy(policy) => {
                    let Action::Protect(Some(sa)) = policy.action else { panic!() };
                    assert!(self.sas.contains_key(&sa), "switched to an SA that is not there");
                    self.policies.insert(policy.id, policy);
                }
                Operation::RemovePolicy(id) => assert!(self.policies.remove(&id).is_some()),
                Operation::InstallRelay(_) | Operation::RemoveRelay(_) => panic!(),
            }
        }

        fn installed(&self) -> Installed {
            let report = |sa: &SaConfig| SaReport {
                id: sa.id,
                generation: sa.generation,
                direction: sa.direction,
                protocol: sa.protocol,
                mode: sa.mode,
                spi: sa.spi,
                local: sa.local,
                remote: sa.remote,
                encap: sa.encap,
                worker: 0,
                stopped: false,
                key_check: sa.suite.key_check(),
                counters: SaCounters::default(),
            };
            Installed {
                sas: self.sas.values().map(|sa| (sa.id, report(sa))).collect(),
                policies: self.policies.values().map(|policy| (policy.id, policy.clone())).collect(),
                relays: BTreeMap::new(),
            }
        }
    }

    proptest! {
        /// OPS-2, DP-7: from any state to any other, nothing on the way is refused, and then nothing differs.
        #[test]
        fn ops_2_every_plan_leads_there(states in proptest::collection::vec(sketches(), 1..4)) {
            let mut model = Model::default();
            for sketches in states {
                let desired = desired(&sketches);
                let plan = Plan::new(&desired, &model.installed());
                for step in [&plan.make, &plan.switch, &plan.clear].into_iter().flatten() {
                    model.apply(step.operation(&desired));
                }
                prop_assert!(Plan::new(&desired, &model.installed()).is_empty());
                prop_assert_eq!(model.sas.len(), desired.sas.len());
                prop_assert_eq!(model.policies.len(), desired.policies.len());
            }
        }
    }
}
