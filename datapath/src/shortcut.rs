//! The relay in the XDP programs (RLY-1): what [`Express`] decides goes to the program of each interface, and what the
//! programs counted comes back, to be added to what the workers counted.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postern_contract::counters::PortCounters;
use postern_contract::relay::{RelayEntry, RelayId};
use postern_contract::request::RelayReport;
use postern_contract::settings::{DatapathSettings, PortKind, RelayPath, Role};
use postern_steer_maps::Traffic;

use crate::fib::{Fib, PortIndex, Resolver};
use crate::relay::express::{Change, Express};
use crate::steer::Steer;

/// The programs with what their interfaces are for.
type Steers = [(Steer, Role)];

/// The relay in the XDP programs.
pub struct Shortcut {
    /// `None` where the workers translate everything.
    express: Option<Express>,
    fib: Arc<Fib>,
    resolver: Resolver,
    /// Ports of the programs, in their order.
    ports: Vec<PortIndex>,
    /// Whether the programs know the ports.
    told: bool,
    second: u32,
    /// Routes that changed are followed no sooner: with many entries it takes long, and they may change often.
    pause: Instant,
    stale: bool,
}

/// What the programs received from and sent to one port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OfPort {
    /// Frames that came in there and were translated.
    pub received: Traffic,
    /// Translated frames that left there.
    pub sent: Traffic,
}

impl OfPort {
    /// Adds both to a worker's counters.
    pub fn add_to(self, counters: &mut PortCounters) {
        counters.received += self.received.packets;
        counters.received_bytes += self.received.bytes;
        counters.transmitted += self.sent.packets;
        counters.transmitted_bytes += self.sent.bytes;
    }
}

impl Shortcut {
    /// As the settings say, over these routes.
    pub fn new(settings: &DatapathSettings, fib: Arc<Fib>, resolver: Resolver) -> Self {
        let of_kind = |kind| settings.interfaces.iter().any(|interface| interface.port == kind);
        let wanted = settings.relay == RelayPath::Xdp && of_kind(PortKind::Xsk) && !of_kind(PortKind::Socket);
        let xsk = settings.interfaces.iter().enumerate().filter(|(_, one)| one.port == PortKind::Xsk);
        let ports = xsk.filter_map(|(port, _)| Some(PortIndex(u16::try_from(port).ok()?)));
        Self {
            express: wanted.then(|| Express::new(settings.relay_entries)),
            fib,
            resolver,
            ports: ports.collect(),
            told: false,
            second: 0,
            pause: Instant::now(),
            stale: false,
        }
    }

    /// Entries that the programs execute; `None` if only workers do.
    pub fn placed(&self) -> Option<u64> {
        self.express.as_ref().map(Express::placed)
    }

    /// Entries were put or removed.
    pub fn follow_entries(
        &mut self,
        entries: &[(RelayId, Option<RelayEntry>)],
        steers: &mut Steers,
        now: u32,
    ) {
        if entries.is_empty() {
            return;
        }
        if !self.told {
            self.look_at_ports(steers, now);
        }
        let Some(express) = &mut self.express else { return };
        for (id, entry) in entries {
            let changes = match entry {
                Some(entry) => express.put(entry, &self.fib, now),
                None => express.remove(*id, now),
            };
            write(steers, &changes);
        }
    }

    /// Routes or neighbours are others now.
    pub fn follow_routes(&mut self, fib: Arc<Fib>, steers: &mut Steers, now: u32) {
        self.fib = fib;
        self.stale = true;
        self.refresh(steers, now);
    }

    /// Often; does most of its work once a second.
    pub fn tick(&mut self, steers: &mut Steers, now: u32) {
        self.refresh(steers, now);
        if now == self.second {
            return;
        }
        self.second = now;
        self.look_at_ports(steers, now);
        let Some(express) = &mut self.express else { return };
        write(steers, &express.tick(&self.fib, now));
        for (hop, port, address) in express.hops() {
            for (steer, _) in steers.iter_mut().filter(|(steer, _)| steer.relays()) {
                match steer.take_used(hop) {
                    // The kernel sees none of this traffic, and would let the neighbour grow stale.
                    Ok(true) => self.resolver.touch(port, address, now),
                    Ok(false) => {}
                    Err(error) => {
                        tracing::error!(interface = steer.interface(), %error, "relay in XDP");
                    }
                }
            }
        }
    }

    fn refresh(&mut self, steers: &mut Steers, now: u32) {
        let start = Instant::now();
        if !self.stale || start < self.pause {
            return;
        }
        self.stale = false;
        if let Some(express) = &mut self.express {
            write(steers, &express.refresh(&self.fib, now));
        }
        // No more than a quarter of the time, and at most a second late.
        self.pause = Instant::now() + (start.elapsed() * 3).min(Duration::from_secs(1));
    }

    /// Looks which ports take frames from XDP, which changes on veth with what the other end does.
    fn look_at_ports(&mut self, steers: &mut Steers, now: u32) {
        let Some(express) = &mut self.express else { return };
        if !self.told {
            self.told = true;
            let interfaces: Vec<u32> = steers.iter().map(|(steer, _)| steer.index()).collect();
            for (steer, _) in steers.iter_mut() {
                for (port, interface) in self.ports.iter().zip(&interfaces) {
                    if let Err(error) = steer.set_relay_port(*port, *interface) {
                        tracing::error!(interface = steer.interface(), %error, "relay in XDP");
                    }
                }
            }
        }
        // In generic mode the kernel sends like for anybody else.
        let native = steers.iter().any(|(steer, _)| steer.relays() && steer.mode() == "native");
        let usable: BTreeSet<PortIndex> = self
            .ports
            .iter()
            .zip(steers.iter())
            .filter(|(_, (steer, _))| !native || steer.takes_redirects())
            .map(|(port, _)| *port)
            .collect();
        for (port, (steer, _)) in self.ports.iter().zip(steers.iter()) {
            if express.is_usable(*port) != usable.contains(port) {
                let usable = usable.contains(port);
                tracing::info!(interface = steer.interface(), usable, "frames from XDP can leave here");
            }
        }
        if express.set_usable(usable) {
            write(steers, &express.refresh(&self.fib, now));
        }
    }

    /// Adds what the programs counted of an entry.
    pub fn count(&self, report: &mut RelayReport, steers: &Steers) {
        let Some(slots) = self.express.as_ref().and_then(|express| express.slots(report.entry.id)) else {
            return;
        };
        let counters = &mut report.counters;
        for (steer, _) in steers.iter().filter(|(steer, _)| steer.relays()) {
            let [there, back] = slots.map(|slot| steer.relay_traffic(slot).unwrap_or_default());
            counters.to_gateway_packets += there.packets;
            counters.to_gateway_bytes += there.bytes;
            counters.to_client_packets += back.packets;
            counters.to_client_bytes += back.bytes;
        }
    }

    /// What the programs received from and sent to a port.
    pub fn of_port(&self, port: usize, steers: &Steers) -> OfPort {
        let mut all = OfPort::default();
        if self.express.is_none() {
            return all;
        }
        for (from, (steer, _)) in self.ports.iter().zip(steers.iter()) {
            for to in &self.ports {
                let sent = steer.relay_sent(*to).unwrap_or_default();
                if usize::from(to.0) == port {
                    all.sent = add(all.sent, sent);
                }
                if usize::from(from.0) == port {
                    all.received = add(all.received, sent);
                }
            }
        }
        all
    }
}

const fn add(a: Traffic, b: Traffic) -> Traffic {
    Traffic { packets: a.packets + b.packets, bytes: a.bytes + b.bytes }
}

/// Writes changes to the programs of all outside interfaces. What cannot be written stays with the workers.
fn write(steers: &mut Steers, changes: &[Change]) {
    for (steer, _) in steers.iter_mut().filter(|(steer, _)| steer.relays()) {
        for change in changes {
            if let Err(error) = steer.apply_relay(change) {
                tracing::error!(
                    interface = steer.interface(),
                    %error,
                    "a relay entry cannot be given to XDP: the workers translate it"
                );
            }
        }
    }
}
