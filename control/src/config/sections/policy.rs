//! `[[policy]]`: traffic that goes through unprotected, or not at all.

use postern_contract::sa::Action;
use toml::de::DeValue;

use super::Context;
use super::common::{ranges, upper_layer};
use super::values::one_of;
use crate::config::reader::{Net, Read, Table, expected};
use crate::config::{DEFAULT_PRIORITY, PlainPolicy};

impl Context<'_> {
    pub(super) fn policy(&self, mut table: Table<'_, '_>) -> Option<PlainPolicy> {
        let name = self.name(&mut table, "policy");
        let priority = table.or("priority", DEFAULT_PRIORITY);
        let action = table.need::<PlainAction>("action");
        let local = table.need::<Vec<Net>>("local");
        let remote = table.need::<Vec<Net>>("remote");
        let upper = upper_layer(&mut table);
        let nets = local.zip(remote).map(|(local, remote)| (ranges(local.value), ranges(remote.value)));
        let selectors = nets.map(|(local, remote)| self.selectors(&table, &local, &remote, &upper));
        let span = table.span.clone();
        table.finish();
        let policy = PlainPolicy { name: name?, priority, action: action?.value.0, selectors: selectors? };
        let key = format!("policy[{}]", policy.name);
        self.claim_selectors(&span, &key, &policy.selectors, priority, &format!("policy {:?}", policy.name));
        Some(policy)
    }
}

/// `action` of a `[[policy]]`.
struct PlainAction(Action);

impl Read for PlainAction {
    const EXPECTED: &'static str = "\"bypass\" or \"discard\" (a [[tunnel]] protects by itself)";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [("bypass", Action::Bypass), ("discard", Action::Discard)];
        one_of(&value, &words).map(Self).ok_or_else(expected::<Self>)
    }
}
