//! A gateway without devices: workers over memory ports, turned by hand. For tests, benches and fuzzing; the stages,
//! tables and cryptography are the appliance's own.
//!
//! Port 0 is the outside, port 1 the inside; both are Ethernet. On request port 2 is the node's own stack (IP). Every destination of the outside's network and of the
//! inside's has a neighbour, as the given routes say.

use std::cell::RefCell;
use std::net::IpAddr;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use postern_contract::counters::DropReason;
use postern_contract::event::Event;
use postern_contract::request::{Done, Operation, Refusal};
use postern_contract::settings::{Backend, Role};
use postern_wire::ether::{self, Mac};
use postern_wire::ids::EtherType;

use crate::assembly::{Assembly, Interface, Parts, assemble};
use crate::core::PortInfo;
use crate::counters::WorkerCells;
use crate::fib::{Fib, PortIndex, Resolver};
use crate::frame::Arena;
use crate::numa::Placement;
use crate::port::memory::{MemoryHandle, MemoryPort};
use crate::port::{LinkKind, Port};
use crate::publish::Publisher;
use crate::reserve::Ledger;
use crate::worker::Worker;

/// Port 0.
pub const OUTSIDE: PortIndex = PortIndex(0);
/// Port 1.
pub const INSIDE: PortIndex = PortIndex(1);
/// Port 2, where there is one.
pub const HOST: PortIndex = PortIndex(2);
/// Link-layer address of the outside port.
pub const OUTSIDE_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
/// Link-layer address of the inside port.
pub const INSIDE_MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);
/// Link-layer address of every neighbour.
pub const NEIGHBOUR_MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

/// How a testbed is laid out.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Address of the outside port, its network, and a gateway in it for everything else of the family.
    pub outside: Vec<(IpNet, IpAddr)>,
    /// Addresses of the inside port with their networks.
    pub inside: Vec<IpNet>,
    /// Neighbours on the inside.
    pub inside_hosts: Vec<IpAddr>,
    /// MTU of both ports.
    pub mtu: u16,
    /// Number of workers.
    pub workers: usize,
    /// Frames, a power of two.
    pub frames: u32,
    /// Slots of the SPI table.
    pub sa_slots: u32,
    /// What AES-GCM is computed with. By default what the environment variable POSTERN_TEST_BACKEND names, or the best.
    pub backend: Backend,
    /// Whether the node itself sends and receives, as through a TUN device.
    pub host: bool,
}

impl Default for Layout {
    fn default() -> Self {
        let net = |text: &str| text.parse::<IpNet>().unwrap_or(IpNet::V4(ipnet::Ipv4Net::default()));
        let address =
            |text: &str| text.parse::<IpAddr>().unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
        Self {
            outside: vec![
                (net("192.0.2.1/24"), address("192.0.2.254")),
                (net("2001:db8::1/64"), address("2001:db8::fe")),
            ],
            inside: vec![net("10.1.0.1/24"), net("fd01::1/64")],
            inside_hosts: vec![address("10.1.0.2"), address("fd01::2")],
            mtu: 1500,
            workers: 1,
            frames: 1024,
            sa_slots: 4096,
            backend: backend(),
            host: false,
        }
    }
}

/// What the environment asks the tests to be run with.
pub fn backend() -> Backend {
    let wanted = std::env::var("POSTERN_TEST_BACKEND").unwrap_or_default();
    let all = [Backend::Auto, Backend::Vaes512, Backend::Vaes256, Backend::Ring];
    all.into_iter().find(|backend| backend.name() == wanted).unwrap_or_default()
}

/// A gateway that is turned by hand.
pub struct Testbed {
    /// The main thread's tables.
    pub publisher: Publisher,
    /// The workers.
    pub workers: Rc<RefCell<Vec<Worker>>>,
    /// The wires of the outside port, by worker.
    pub outside: Vec<MemoryHandle>,
    /// The wires of the inside port, by worker.
    pub inside: Vec<MemoryHandle>,
    /// The node's own stack, by worker.
    pub host: Vec<MemoryHandle>,
    /// The clock.
    pub now: Rc<RefCell<Duration>>,
    /// Events that [`Testbed::events`] has not given yet.
    events: Vec<Event>,
    frames: u32,
}

/// A testbed could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] crate::reserve::LedgerError),
    /// The frames.
    #[error("frames: {0}")]
    Frames(#[from] std::io::Error),
    /// The workers.
    #[error(transparent)]
    Assembly(#[from] crate::assembly::AssemblyError),
}

fn info(name: &str, role: Role, mac: Mac) -> PortInfo {
    PortInfo { name: name.to_owned(), role, link: LinkKind::Ethernet, mac, host: false, socket: false }
}

fn host_info() -> PortInfo {
    PortInfo { link: LinkKind::Ip, host: true, ..info("host", Role::Inside, Mac([0; 6])) }
}

/// Routes and neighbours of a layout.
pub fn fib(layout: &Layout) -> Arc<Fib> {
    let outside: Vec<IpAddr> = layout.outside.iter().map(|(net, _)| net.addr()).collect();
    let inside: Vec<IpAddr> = layout.inside.iter().map(IpNet::addr).collect();
    let mut builder = Fib::fixed()
        .port(OUTSIDE, OUTSIDE_MAC, layout.mtu, &outside)
        .port(INSIDE, INSIDE_MAC, layout.mtu, &inside);
    for (net, gateway) in &layout.outside {
        let everything = if net.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        builder = builder.neighbour(OUTSIDE, *gateway, NEIGHBOUR_MAC);
        if let Ok(everything) = everything.parse() {
            builder = builder.route(everything, OUTSIDE, Some(*gateway));
        }
    }
    for net in &layout.inside {
        builder = builder.route(net.trunc(), INSIDE, None);
    }
    for host in &layout.inside_hosts {
        builder = builder.neighbour(INSIDE, *host, NEIGHBOUR_MAC);
    }
    builder.build()
}

impl Testbed {
    /// A gateway whose ledger is kept in `state`, a directory.
    pub fn new(layout: &Layout, state: &Path) -> Result<Self, TestbedError> {
        let (arena, frames) = Arena::new(layout.frames, false)?;
        let ports = |link| {
            let pairs = (0..layout.workers).map(|_| MemoryPort::new(link));
            let (ports, handles): (Vec<_>, Vec<_>) = pairs.unzip();
            let ports =
                ports.into_iter().map(|port| Some(Box::new(port) as Box<dyn Port>)).collect::<Vec<_>>();
            (ports, handles)
        };
        let (outside_ports, outside) = ports(LinkKind::Ethernet);
        let (inside_ports, inside) = ports(LinkKind::Ethernet);
        let (host_ports, mut host) = ports(LinkKind::Ip);
        let mut interfaces = vec![
            Interface { info: info("outside", Role::Outside, OUTSIDE_MAC), queues: outside_ports },
            Interface { info: info("inside", Role::Inside, INSIDE_MAC), queues: inside_ports },
        ];
        if layout.host {
            interfaces.push(Interface { info: host_info(), queues: host_ports });
        } else {
            host.clear();
        }
        let Assembly { mut publisher, workers, bell: _ } = assemble(Parts {
            arena,
            frames,
            interfaces,
            fib: fib(layout),
            resolver: Resolver::unattended(),
            ledger: Ledger::open(state)?,
            sa_slots: layout.sa_slots,
            backend: layout.backend,
            placement: Placement::anywhere(layout.workers),
        })?;
        let workers = Rc::new(RefCell::new(workers));
        let now = Rc::new(RefCell::new(Duration::ZERO));
        let (turning, clock) = (Rc::clone(&workers), Rc::clone(&now));
        publisher.wait_with(Box::new(move || {
            for worker in turning.borrow_mut().iter_mut() {
                worker.turn(*clock.borrow());
            }
        }));
        let (events, frames) = (Vec::new(), layout.frames);
        Ok(Self { publisher, workers, outside, inside, host, now, events, frames })
    }

    /// Seconds on the clock, as the tables count them.
    pub fn seconds(&self) -> u32 {
        u32::try_from(self.now.borrow().as_secs()).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// Applies operations and gives their outcomes.
    pub fn apply(&mut self, operations: Vec<Operation>) -> Vec<Result<Done, Refusal>> {
        let now = self.seconds();
        self.publisher.apply(&[operations], now).pop().unwrap_or_default()
    }

    /// Turns all workers until none has work left.
    pub fn settle(&mut self) {
        let mut busy = true;
        while busy {
            let now = *self.now.borrow();
            busy = false;
            for worker in self.workers.borrow_mut().iter_mut() {
                busy |= worker.turn(now);
            }
            self.publisher.collect();
        }
        self.events.extend(self.publisher.take_events());
    }

    /// Moves the clock on, with what is due by then.
    pub fn advance(&mut self, by: Duration) {
        *self.now.borrow_mut() += by;
        let now = self.seconds();
        self.publisher.tick(now);
        self.settle();
    }

    /// Events since the last call.
    pub fn events(&mut self) -> Vec<Event> {
        self.settle();
        std::mem::take(&mut self.events)
    }

    /// A packet arrives outside, at the first worker. Gives what leaves: (outside, inside), without link headers.
    pub fn from_outside(&mut self, packet: &[u8]) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        self.push(OUTSIDE, packet);
        self.departed()
    }

    /// A packet arrives inside, at the first worker. Gives what leaves: (outside, inside), without link headers.
    pub fn from_inside(&mut self, packet: &[u8]) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        self.push(INSIDE, packet);
        self.departed()
    }

    /// The node itself sends a packet. Gives what leaves outside.
    pub fn from_host(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        if let Some(handle) = self.host.first() {
            handle.push(packet);
        }
        self.departed().0
    }

    /// What the node itself received since the last call.
    pub fn to_host(&mut self) -> Vec<Vec<u8>> {
        self.settle();
        self.host.iter().flat_map(MemoryHandle::take_all).collect()
    }

    /// Queues a packet (without link header) to arrive at the first worker.
    pub fn push(&self, port: PortIndex, packet: &[u8]) {
        let (handles, mac) =
            if port == OUTSIDE { (&self.outside, OUTSIDE_MAC) } else { (&self.inside, INSIDE_MAC) };
        if let Some(handle) = handles.first() {
            handle.push(&frame(mac, packet));
        }
    }

    /// Turns the workers and gives what left: (outside, inside), without link headers.
    pub fn departed(&mut self) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        self.settle();
        let strip = |handles: &[MemoryHandle]| {
            let frames = handles.iter().flat_map(MemoryHandle::take_all);
            frames.map(|frame| frame.get(ether::LEN..).unwrap_or_default().to_vec()).collect()
        };
        (strip(&self.outside), strip(&self.inside))
    }

    /// Packets dropped for a reason, all workers and ports.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.workers.borrow().iter().map(|worker| worker.core.cells.drops(reason)).sum()
    }

    /// Packets dropped for any reason.
    pub fn all_drops(&self) -> u64 {
        self.workers.borrow().iter().map(|worker| worker.core.cells.all_drops()).sum()
    }

    /// Packets that came or were made, and packets that left or were dropped: equal, or one was lost without a name.
    /// Only between turns; a packet that waits for its neighbour counts as left.
    pub fn balance(&self) -> (u64, u64) {
        let workers = self.workers.borrow();
        let sum =
            |count: fn(&WorkerCells) -> u64| workers.iter().map(|worker| count(&worker.core.cells)).sum();
        let refused: u64 = workers.iter().map(Worker::refused).sum();
        let came: u64 = refused
            + sum(|cells| cells.made.get() + cells.ports.iter().map(|port| port.received.get()).sum::<u64>());
        let left: u64 = sum(|cells| {
            cells.all_drops() + cells.ports.iter().map(|port| port.transmitted.get()).sum::<u64>()
        });
        let parked: u64 = workers.iter().map(|worker| worker.core.parking.len() as u64).sum();
        (came, left + parked)
    }

    /// Frames that are neither free nor on a wire: zero, or some were lost.
    pub fn missing_frames(&self) -> u64 {
        // The spill of all pools is one queue: it is counted once, the workers' own shares each.
        let workers = self.workers.borrow();
        let own: usize =
            workers.iter().map(|worker| worker.core.pool.local() + worker.core.parking.len()).sum();
        let shared =
            workers.first().map_or(0, |worker| worker.core.pool.available() - worker.core.pool.local());
        u64::from(self.frames).saturating_sub((own + shared) as u64)
    }
}

/// A packet with a link header in front.
pub fn frame(to: Mac, packet: &[u8]) -> Vec<u8> {
    let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let ethertype = if v6 { EtherType::IPV6 } else { EtherType::IPV4 };
    let header = ether::Header { destination: to, source: NEIGHBOUR_MAC, ethertype };
    let mut frame = vec![0; ether::LEN + packet.len()];
    let _ = header.emit(&mut frame);
    if let Some(body) = frame.get_mut(ether::LEN..) {
        body.copy_from_slice(packet);
    }
    frame
}
