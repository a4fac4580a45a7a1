//! `[[relay]]`: entries of the relay's translation table (RLY-1).

use core::net::IpAddr;

use postern_contract::Generation;
use postern_contract::relay::{Partition, RelayEntry, RelayId, SpiPair};
use postern_contract::sa::IpsecProtocol;
use postern_wire::ids::Spi;

use super::Context;
use super::common::encapsulation;
use crate::config::Relay;
use crate::config::reader::Table;

impl Context<'_> {
    pub(super) fn relay(&self, mut table: Table<'_, '_>) -> Option<Relay> {
        let name = self.name(&mut table, "relay");
        let client = Self::partition(&mut table, "client");
        let gateway = Self::partition(&mut table, "gateway");
        let span = table.span.clone();
        table.finish();
        let relay = Relay { name: name?, client: client?, gateway: gateway? };
        let key = format!("relay[{}]", relay.name);
        let entry = RelayEntry {
            id: RelayId(0),
            generation: Generation(0),
            client: relay.client,
            gateway: relay.gateway,
        };
        if let Err(error) = entry.validate() {
            self.report.error(span, &key, error.to_string());
            return None;
        }
        let who = format!("relay {:?}", relay.name);
        for (side, partition) in [("client", &relay.client), ("gateway", &relay.gateway)] {
            for (protocol, pair) in [(IpsecProtocol::Esp, partition.esp), (IpsecProtocol::Ah, partition.ah)] {
                if let Some(pair) = pair {
                    let key = format!("{key}.{side}");
                    self.claim_spi(&span, &key, protocol, pair.to_relay, Some(partition.relay), &who);
                }
            }
        }
        Some(relay)
    }

    fn partition(relay: &mut Table<'_, '_>, key: &'static str) -> Option<Partition> {
        let Some(mut table) = relay.table(key) else {
            if !relay.has(key) {
                relay.error(
                    relay.span.clone(),
                    key,
                    "missing; expected a table with `relay`, `peer` and `esp` or `ah`",
                );
            }
            return None;
        };
        let relay_address = table.need::<IpAddr>("relay");
        let peer = table.need::<IpAddr>("peer");
        let (has_esp, has_ah) = (table.has("esp"), table.has("ah"));
        let esp = table.table("esp").and_then(spi_pair);
        let ah = table.table("ah").and_then(spi_pair);
        let encap = table.table("encap").map(encapsulation);
        table.finish();
        // An unreadable pair was reported; without it the partition would be judged for what it does not say.
        if esp.is_some() != has_esp || ah.is_some() != has_ah {
            return None;
        }
        Some(Partition { relay: relay_address?.value, peer: peer?.value, encap, esp, ah })
    }
}

fn spi_pair(mut table: Table<'_, '_>) -> Option<SpiPair> {
    let to_relay = table.need::<Spi>("to_relay");
    let from_relay = table.need::<Spi>("from_relay");
    table.finish();
    Some(SpiPair { to_relay: to_relay?.value, from_relay: from_relay?.value })
}
