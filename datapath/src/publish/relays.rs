//! Translation entries (RLY-1).

use postern_contract::relay::{RelayEntry, RelayId};
use postern_contract::request::{Done, Refusal};
use postern_contract::sa::IpsecProtocol;
use postern_wire::ids::Spi;

use super::{Publisher, spi_key};
use crate::command::Command;

impl Publisher {
    pub(super) fn install_relay(&mut self, entry: &RelayEntry) -> Result<Done, Refusal> {
        entry.validate()?;
        if let Some(installed) = self.relays.get(&entry.id) {
            match entry.generation.cmp(&installed.generation) {
                std::cmp::Ordering::Less => return Err(Refusal::Stale(installed.generation)),
                std::cmp::Ordering::Equal => return Ok(Done::Already),
                std::cmp::Ordering::Greater => {}
            }
        }
        let keys = relay_keys(entry);
        for (position, key) in keys.iter().enumerate() {
            let (protocol, spi, _) = *key;
            if self.relay_keys.get(key).is_some_and(|owner| *owner != entry.id)
                || keys.iter().take(position).any(|other| other == key)
                || self.inbound_spis.find(&self.sas, spi_key, &(protocol, spi)).is_some()
            {
                return Err(Refusal::SpiTaken(spi));
            }
        }
        self.forget_relay_keys(entry.id);
        for key in keys {
            let (protocol, spi, _) = key;
            self.relay_keys.insert(key, entry.id);
            *self.relay_spis.entry((protocol, spi)).or_insert(0) += 1;
        }
        self.relays.insert(entry.id, *entry);
        self.relays_changed.insert(entry.id);
        for link in &mut self.workers {
            link.push(Command::PutRelay(*entry));
        }
        Ok(Done::Applied)
    }

    fn forget_relay_keys(&mut self, id: RelayId) {
        if let Some(old) = self.relays.get(&id) {
            for key in relay_keys(old) {
                self.relay_keys.remove(&key);
                if let Some(count) = self.relay_spis.get_mut(&(key.0, key.1)) {
                    *count -= 1;
                    if *count == 0 {
                        self.relay_spis.remove(&(key.0, key.1));
                    }
                }
            }
        }
    }

    pub(super) fn remove_relay(&mut self, id: RelayId) -> Done {
        self.forget_relay_keys(id);
        if self.relays.remove(&id).is_none() {
            return Done::Already;
        }
        self.relays_changed.insert(id);
        for link in &mut self.workers {
            link.push(Command::RemoveRelay(id));
        }
        Done::Applied
    }
}

fn relay_keys(entry: &RelayEntry) -> Vec<(IpsecProtocol, Spi, std::net::IpAddr)> {
    [&entry.client, &entry.gateway].into_iter().filter_map(crate::relay::key).collect()
}
