//! Steps of a reconciliation: sent, and put into words.

use postern_contract::request::{Operation, Refusal};
use postern_contract::sa::{Direction, SaId};

use super::client::{Client, ClientError};
use super::reconcile::{Installed, Plan, Step};
use crate::desired::{Desired, duplicate};

/// Sends the steps of one phase; gives those that were refused for good.
///
/// What an installed SA cannot change it gets by being replaced: removed and installed under the same id. Its numbers
/// then go on where they were, so that no sequence number is sent or accepted twice.
pub async fn apply(
    client: &mut Client,
    desired: &Desired,
    installed: &Installed,
    steps: &[Step],
) -> Result<Vec<(Step, Refusal)>, ClientError> {
    let outcomes = client.apply(&mut steps.iter().map(|step| step.operation(desired))).await?;
    let mut refused = Vec::new();
    for (step, outcome) in steps.iter().zip(outcomes) {
        let Err(refusal) = outcome else { continue };
        let replaced = match (step, &refusal) {
            (Step::InstallSa(id), Refusal::Immutable(_)) => replacement(*id, desired, installed),
            _ => None,
        };
        match replaced {
            Some(operations) => {
                // One by one: numbers are reserved for what is not installed when a message comes.
                for operation in operations {
                    let outcomes = client.apply(&mut core::iter::once(operation)).await?;
                    refused
                        .extend(outcomes.into_iter().filter_map(Result::err).map(|refusal| (*step, refusal)));
                }
            }
            None => refused.push((*step, refusal)),
        }
    }
    Ok(refused)
}

fn replacement(id: SaId, desired: &Desired, installed: &Installed) -> Option<[Operation; 2]> {
    let report = installed.sas.get(&id)?;
    let mut config = duplicate(&desired.sas.get(&id)?.config);
    let used = report.counters.sequence;
    let reached = match config.direction {
        Direction::Inbound => used,
        Direction::Outbound => used.saturating_add(1),
    };
    config.sequence = config.sequence.max(reached);
    Some([Operation::RemoveSa(id), Operation::InstallSa(Box::new(config))])
}

/// Puts steps into words.
pub struct Describe<'a> {
    /// What should be there.
    pub desired: &'a Desired,
    /// What is there.
    pub installed: &'a Installed,
}

impl Describe<'_> {
    /// A line for each step of `plan`.
    pub fn all(&self, plan: &Plan) -> Vec<String> {
        [&plan.make, &plan.switch, &plan.clear].into_iter().flatten().map(|step| self.one(*step)).collect()
    }

    /// One step.
    pub fn one(&self, step: Step) -> String {
        let change = |there: bool| if there { "change" } else { "install" };
        match step {
            Step::InstallSa(id) => {
                let verb = change(self.installed.sas.contains_key(&id));
                match self.desired.sas.get(&id) {
                    Some(wanted) => {
                        let config = &wanted.config;
                        let spi = config.spi.on_wire;
                        format!(
                            "{verb} SA {spi} ({:?} {:?}) of tunnel {}",
                            config.direction, config.protocol, wanted.tunnel
                        )
                    }
                    None => format!("{verb} SA {:016x}", id.0),
                }
            }
            Step::RemoveSa(id) => match self.installed.sas.get(&id) {
                Some(report) => {
                    format!("remove SA {} ({:?} {:?})", report.spi.on_wire, report.direction, report.protocol)
                }
                None => format!("remove SA {:016x}", id.0),
            },
            Step::InstallPolicy(id) => {
                let verb = change(self.installed.policies.contains_key(&id));
                match self.desired.policies.get(&id) {
                    Some(wanted) => format!("{verb} policy {}", wanted.name),
                    None => format!("{verb} policy {:016x}", id.0),
                }
            }
            Step::RemovePolicy(id) => format!("remove policy {:016x}", id.0),
            Step::InstallRelay(id) => {
                let verb = change(self.installed.relays.contains_key(&id));
                match self.desired.relays.get(&id) {
                    Some(wanted) => format!("{verb} relay {}", wanted.name),
                    None => format!("{verb} relay {:016x}", id.0),
                }
            }
            Step::RemoveRelay(id) => format!("remove relay {:016x}", id.0),
        }
    }
}
