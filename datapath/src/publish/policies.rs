//! Policies: which SA each leads to, and what the XDP program has to steer for them.

use std::sync::Arc;

use ipnet::IpNet;
use postern_contract::Generation;
use postern_contract::request::{Done, Refusal};
use postern_contract::sa::{Action, Direction, Policy, PolicyId, SaId};

use super::Publisher;
use crate::command::Command;
use crate::sad::lookup::Handle;
use crate::selectors::Selectors;
use crate::spd;

/// A policy without its id, as small as it gets: it is looked at when it is replaced and for the inventory.
#[derive(Debug)]
pub(super) struct PolicyRecord {
    generation: Generation,
    selectors: Selectors,
    action: Action,
    priority: u32,
}

impl PolicyRecord {
    pub(super) fn new(policy: &Policy) -> Self {
        let Policy { id: _, generation, priority, selectors, action } = policy;
        Self {
            generation: *generation,
            selectors: Selectors::new(selectors),
            action: *action,
            priority: *priority,
        }
    }

    pub(super) fn policy(&self, id: PolicyId) -> Policy {
        let Self { generation, selectors, action, priority } = self;
        Policy {
            id,
            generation: *generation,
            priority: *priority,
            selectors: selectors.to_vec(),
            action: *action,
        }
    }
}

/// What the XDP program has to do after policies changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SteerChanges {
    /// Prefixes of policies that protect from now on; one comes as often as there are such policies.
    pub added: Vec<IpNet>,
    /// Prefixes of policies that are gone.
    pub removed: Vec<IpNet>,
}

impl SteerChanges {
    /// Notes a change, or takes back the opposite one that XDP has not been told of.
    fn change(&mut self, prefix: IpNet, add: bool) {
        let Self { added, removed } = self;
        let (to, opposite) = if add { (added, removed) } else { (removed, added) };
        match opposite.iter().position(|noted| *noted == prefix) {
            Some(place) => {
                opposite.swap_remove(place);
            }
            None => to.push(prefix),
        }
    }
}

impl Publisher {
    /// Points the policies that name an SA to it, or to nothing.
    pub(super) fn point_users(&mut self, id: SaId, handle: Option<Handle>) {
        let users: Vec<PolicyId> = self
            .users
            .range((id, PolicyId(0))..=(id, PolicyId(u64::MAX)))
            .map(|(_, policy)| *policy)
            .collect();
        for policy in users {
            for link in &mut self.workers {
                link.push(Command::SetPolicyHandle(policy, handle));
            }
        }
    }

    pub(super) fn install_policy(&mut self, policy: &Policy) -> Result<Done, Refusal> {
        if let Some(record) = self.policies.get(&policy.id) {
            let installed = record.generation;
            match policy.generation.cmp(&installed) {
                std::cmp::Ordering::Less => return Err(Refusal::Stale(installed)),
                std::cmp::Ordering::Equal => return Ok(Done::Already),
                std::cmp::Ordering::Greater => {}
            }
        }
        for selector in &policy.selectors {
            let families = selector.local.start.is_ipv4() == selector.remote.start.is_ipv4();
            if !selector.local.is_valid() || !selector.remote.is_valid() || !families {
                let text = "selectors: each range needs start <= end, and local and remote one family";
                return Err(Refusal::Invalid(text.to_owned()));
            }
        }
        let handle = match policy.action {
            Action::Protect(Some(sa)) => {
                let found = self.sas.get(&sa);
                if found.is_some_and(|config| config.direction() == Direction::Inbound) {
                    return Err(Refusal::Invalid(
                        "action: an inbound SA cannot protect outbound packets".to_owned(),
                    ));
                }
                found.map(|config| config.handle)
            }
            _ => None,
        };
        if let Some(old) = self.policies.insert(policy.id, Box::new(PolicyRecord::new(policy))) {
            self.forget_policy(&old.policy(policy.id));
        }
        if let Action::Protect(Some(sa)) = policy.action {
            self.users.insert((sa, policy.id));
        }
        if !matches!(policy.action, Action::Bypass) {
            for prefix in spd::prefixes(&policy.selectors) {
                self.steer.change(prefix, true);
            }
        }
        let policy = Arc::new(policy.clone());
        for link in &mut self.workers {
            link.push(Command::PutPolicy(Arc::clone(&policy), handle));
        }
        Ok(Done::Applied)
    }

    fn forget_policy(&mut self, policy: &Policy) {
        if let Action::Protect(Some(sa)) = policy.action {
            self.users.remove(&(sa, policy.id));
        }
        if !matches!(policy.action, Action::Bypass) {
            for prefix in spd::prefixes(&policy.selectors) {
                self.steer.change(prefix, false);
            }
        }
    }

    pub(super) fn remove_policy(&mut self, id: PolicyId) -> Done {
        let Some(record) = self.policies.remove(&id) else { return Done::Already };
        self.forget_policy(&record.policy(id));
        for link in &mut self.workers {
            link.push(Command::RemovePolicy(id));
        }
        Done::Applied
    }
}
