//! The inventory: everything that is installed with its counters, page by page, asked of the workers that have it.

use std::collections::{BTreeMap, HashMap};

use postern_contract::Translation;
use postern_contract::counters::{DropReason, RelayCounters, SaCounters};
use postern_contract::relay::RelayId;
use postern_contract::request::{Cursor, Page, RelayReport, SaReport};
use postern_contract::sa::{PolicyId, SaId};

use super::{Publisher, table_of};
use crate::command::{Command, SaSnapshot, Table};
use crate::sad::config::SaShared;

/// SAs, policies or entries on one page of the inventory.
const PAGE: usize = 128;

impl Publisher {
    /// One page of the inventory.
    pub fn page(&mut self, after: Option<Cursor>) -> Page {
        let mut page = Page::default();
        match after {
            None => self.sa_page(None, &mut page),
            Some(Cursor::Sa(id)) => self.sa_page(Some(id), &mut page),
            Some(Cursor::Policy(id)) => self.policy_page(id, &mut page),
            Some(Cursor::Relay(id)) => self.relay_page(id, &mut page),
        }
        page
    }

    fn sa_page(&mut self, after: Option<SaId>, page: &mut Page) {
        use std::ops::Bound;
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let ids: Vec<SaId> =
            self.sas.range((start, Bound::Unbounded)).take(PAGE).map(|(id, _)| *id).collect();
        page.next = match ids.last() {
            Some(last) if ids.len() == PAGE => Some(Cursor::Sa(*last)),
            _ => Some(Cursor::Policy(None)),
        };
        page.sas = self.reports(&ids);
    }

    /// One SA with its counters.
    pub fn sa(&mut self, id: SaId) -> Option<SaReport> {
        self.reports(&[id]).pop()
    }

    fn reports(&mut self, ids: &[SaId]) -> Vec<SaReport> {
        let mut wanted: BTreeMap<u8, Vec<(Table, u32)>> = BTreeMap::new();
        for id in ids {
            if let Some(config) = self.sas.get(id) {
                let place = (table_of(config.direction()), config.handle.index());
                wanted.entry(config.handle.worker()).or_default().push(place);
            }
        }
        self.snapshots.clear();
        for (worker, places) in wanted {
            self.send(worker, Command::ReportSas(places));
        }
        self.settle();
        let found: HashMap<SaId, SaSnapshot> = std::mem::take(&mut self.snapshots)
            .into_iter()
            .map(|snapshot| (snapshot.config.id, snapshot))
            .collect();
        let describe = |id: &SaId| {
            let config = self.sas.get(id)?;
            Some(report(config, config.handle.worker(), found.get(id)?))
        };
        ids.iter().filter_map(describe).collect()
    }

    fn policy_page(&self, after: Option<PolicyId>, page: &mut Page) {
        use std::ops::Bound;
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let records = self.policies.range((start, Bound::Unbounded)).take(PAGE);
        page.policies = records.map(|(id, record)| record.policy(*id)).collect();
        page.next = match page.policies.last() {
            Some(last) if page.policies.len() == PAGE => Some(Cursor::Policy(Some(last.id))),
            _ => Some(Cursor::Relay(None)),
        };
    }

    fn relay_page(&mut self, after: Option<RelayId>, page: &mut Page) {
        use std::ops::Bound;
        self.relay_counters.clear();
        for link in &mut self.workers {
            link.push(Command::ReportRelays);
        }
        self.settle();
        let mut sums: HashMap<RelayId, RelayCounters> = HashMap::new();
        for (id, counters) in std::mem::take(&mut self.relay_counters) {
            let sum = sums.entry(id).or_default();
            sum.to_gateway_packets += counters.to_gateway_packets;
            sum.to_gateway_bytes += counters.to_gateway_bytes;
            sum.to_client_packets += counters.to_client_packets;
            sum.to_client_bytes += counters.to_client_bytes;
            sum.wrong_peer += counters.wrong_peer;
        }
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let entries = self.relays.range((start, Bound::Unbounded)).take(PAGE);
        page.relays = entries
            .map(|(id, entry)| RelayReport { entry: *entry, counters: sums.remove(id).unwrap_or_default() })
            .collect();
        page.next = match page.relays.last() {
            Some(last) if page.relays.len() == PAGE => Some(Cursor::Relay(Some(last.entry.id))),
            _ => None,
        };
    }

    /// Sum of all workers' latency histograms.
    pub fn latency(&mut self) -> Option<hdrhistogram::Histogram<u64>> {
        self.latency = None;
        for link in &mut self.workers {
            link.push(Command::ReportLatency);
        }
        self.settle();
        self.latency.take()
    }
}

fn report(config: &SaShared, worker: u8, snapshot: &SaSnapshot) -> SaReport {
    let (local, remote) = config.translations();
    let (peer, port) = snapshot.peer;
    let drops: Vec<(DropReason, u64)> = snapshot.drops.clone();
    SaReport {
        id: config.id,
        generation: config.generation,
        direction: config.direction(),
        protocol: config.protocol(),
        mode: config.mode,
        spi: config.spi,
        local,
        remote: Translation {
            on_wire: peer,
            authenticated: if remote.is_translated() { remote.authenticated } else { peer },
        },
        encap: config.encap.map(|encap| postern_contract::sa::UdpEncap { remote_port: port, ..encap }),
        worker: u16::from(worker),
        stopped: snapshot.stopped,
        key_check: config.key_check,
        counters: SaCounters {
            packets: snapshot.packets,
            bytes: snapshot.bytes,
            sequence: snapshot.sequence,
            drops,
            idle_seconds: snapshot.idle_seconds,
        },
    }
}
