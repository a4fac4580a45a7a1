//! Two gateways back to back under traffic in both directions, while tunnels are rekeyed, moved, deleted and installed.
//!
//! Every packet is made in the inside port of one gateway and looked at in that of the other: it must be there once, whole,
//! and as it was made. In between some are damaged, doubled, or sent to another worker than their flow belongs to. In the
//! end every packet that was made was delivered or dropped under a name, every frame is in a pool, every key is forgotten,
//! and the process is not larger than it was after a twentieth of the packets.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;
use ipnet::IpNet;
use postern_contract::Generation;
use postern_contract::counters::DropReason;
use postern_contract::request::Operation;
use postern_contract::sa::{
    Direction, Encryption, FanOut, Integrity, Policy, PolicyId, SaConfig, SaId, Selector, Suite, UdpEncap,
};
use postern_contract::secret::Secret;
use postern_contract::settings::{Backend, Role};
use postern_datapath::assembly::{Assembly, Interface, Parts, assemble};
use postern_datapath::core::PortInfo;
use postern_datapath::counters::WorkerCells;
use postern_datapath::fib::Resolver;
use postern_datapath::frame::{Arena, BATCH, Frame, Pool};
use postern_datapath::header;
use postern_datapath::numa::Placement;
use postern_datapath::port::{LinkKind, Port};
use postern_datapath::publish::Publisher;
use postern_datapath::reserve::Ledger;
use postern_datapath::testbed::{self, INSIDE_MAC, Layout, OUTSIDE_MAC};
use postern_datapath::worker::{Clock, Worker};
use postern_wire::ether::{self, Mac};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{ip4, udp};

use crate::parts;

/// What a soak is to be.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Packets to make.
    pub packets: u64,
    /// Time after which it ends all the same.
    pub limit: Duration,
    /// Another seed, other changes.
    pub seed: u64,
    /// Prints a line a second.
    pub progress: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Packets made.
    pub made: u64,
    /// Copies added on the way.
    pub doubled: u64,
    /// Packets that came out as they were made.
    pub delivered: u64,
    /// Packets that came out twice, or not as they were made. Must be 0.
    pub wrong: u64,
    /// Drops of both gateways, by reason.
    pub drops: Vec<(DropReason, u64)>,
    /// Packets received or made by gateways, and sent or dropped by them. Must be equal.
    pub balance: [(u64, u64); 2],
    /// Frames that are in no pool. Must be 0.
    pub missing_frames: u64,
    /// Packets that other workers than the owner sealed or opened.
    pub helped: u64,
    /// Changes of the tables: installs, rekeys, moves, deletes.
    pub changes: [u64; 4],
    /// Expanded keys and SAs that are left after the last delete. Must be 0.
    pub left: u64,
    /// Resident bytes after a twentieth of the packets, and at the end.
    pub memory: (u64, u64),
    /// How long packets were made.
    pub took: Duration,
}

impl Report {
    /// Everything that must not be, in words.
    pub fn complaints(&self) -> Vec<String> {
        let mut all = Vec::new();
        let drops: u64 = self.drops.iter().map(|(_, count)| count).sum();
        if self.made + self.doubled != self.delivered + drops {
            all.push(format!(
                "{} packets were made and {} doubled, but {} delivered and {drops} dropped",
                self.made, self.doubled, self.delivered
            ));
        }
        for (came, left) in self.balance {
            if came != left {
                all.push(format!("a gateway took {came} packets and accounts for {left}"));
            }
        }
        for (count, what) in [
            (self.wrong, "packets came out twice or changed"),
            (self.missing_frames, "frames are lost"),
            (self.left, "keys or SAs are left"),
            (u64::from(self.helped == 0), "helper never helped"),
            (u64::from(self.changes.contains(&0)), "kind of change never happened"),
        ] {
            if count > 0 {
                all.push(format!("{count} {what}"));
            }
        }
        let (early, late) = self.memory;
        // Tables and the allocator keep what they needed at the most at once.
        if late > early + (16 << 20) {
            all.push(format!("memory grew from {early} to {late} bytes"));
        }
        all
    }
}

const TUNNELS: u32 = 12;
const WORKERS: usize = 2;
const FRAMES: u32 = 16_384;
/// Frames on one wire at most.
const WIRE: usize = 2048;
/// Packets on their way at most: half of what a ring between workers holds, for each of two gateways.
const UNDER_WAY: u64 = 1024;
const FIRST_PORT: u16 = 2000;
const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 1, 0, 2), Ipv4Addr::new(10, 2, 0, 2)];
const GATEWAYS: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(198, 51, 100, 1)];
/// Where the first gateway is after a move.
const MOVED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
/// Sizes of inner packets, one as likely as the other.
const SIZES: [usize; 16] = [64, 64, 64, 64, 64, 64, 80, 80, 100, 100, 128, 200, 200, 256, 576, 1400];
/// IPv4, UDP, then the packet's name: tunnel, number, size.
const HEAD: usize = ip4::MIN_LEN + udp::LEN;
const NAME: usize = 16;
/// Numbers that a tunnel's packets may be apart when they come out.
const SPAN: usize = 1 << 16;

/// A small generator of numbers.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, below: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let high = u32::try_from(self.0 >> 32).unwrap_or(0);
        u32::try_from((u64::from(high) * u64::from(below)) >> 32).unwrap_or(0)
    }
}

/// What all ports know.
struct Shared {
    /// Packets that may still be made.
    budget: AtomicU64,
    made: AtomicU64,
    doubled: AtomicU64,
    delivered: AtomicU64,
    wrong: AtomicU64,
    /// As of a moment ago.
    dropped: AtomicU64,
    /// Of all workers, to look at their drops again.
    cells: OnceLock<Vec<Arc<WorkerCells>>>,
    /// By tunnel and direction.
    flows: Vec<[Flow; 2]>,
    /// Payloads, at any offset below 256.
    pattern: Vec<u8>,
    /// By side of the receiver and its worker.
    wires: [Vec<ArrayQueue<Frame>>; 2],
}

struct Flow {
    next: AtomicU64,
    /// By number: which round of numbers was seen last.
    seen: Vec<AtomicU32>,
    /// Ethernet, IPv4 and UDP headers, by size.
    templates: Vec<[u8; ether::LEN + HEAD]>,
}

impl Shared {
    fn new() -> Self {
        let flow = |tunnel: u32, side: usize| Flow {
            next: AtomicU64::new(0),
            seen: (0..SPAN).map(|_| AtomicU32::new(0)).collect(),
            templates: SIZES.iter().filter_map(|size| template(tunnel, side, *size)).collect(),
        };
        let wires = || (0..WORKERS).map(|_| ArrayQueue::new(WIRE)).collect();
        let mut dice = Dice(9);
        Self {
            budget: AtomicU64::new(0),
            made: AtomicU64::new(0),
            doubled: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            cells: OnceLock::new(),
            flows: (0..TUNNELS).map(|tunnel| [flow(tunnel, 0), flow(tunnel, 1)]).collect(),
            pattern: (0..2048).map(|_| u8::try_from(dice.throw(256)).unwrap_or(0)).collect(),
            wires: [wires(), wires()],
        }
    }

    /// Whether more may come.
    fn has_room(&self) -> bool {
        if self.under_way() <= UNDER_WAY {
            return true;
        }
        let drops = self.cells.get().into_iter().flatten().map(|cells| cells.all_drops()).sum();
        self.dropped.store(drops, Ordering::Relaxed);
        self.under_way() <= UNDER_WAY
    }

    /// Packets that are neither out again nor dropped.
    fn under_way(&self) -> u64 {
        let all =
            |counts: &[&AtomicU64]| counts.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>();
        let out = all(&[&self.delivered, &self.wrong, &self.dropped]);
        all(&[&self.made, &self.doubled]).saturating_sub(out)
    }

    fn flow(&self, tunnel: u32, side: usize) -> Option<&Flow> {
        self.flows.get(usize::try_from(tunnel).ok()?)?.get(side)
    }

    /// What a packet carries behind its name.
    fn payload(&self, number: u64, len: usize) -> &[u8] {
        let at = usize::try_from(number % 256).unwrap_or(0);
        self.pattern.get(at..at + len).unwrap_or_default()
    }
}

fn template(tunnel: u32, side: usize, size: usize) -> Option<[u8; ether::LEN + HEAD]> {
    let mut bytes = [0; ether::LEN + HEAD];
    parts::write_link(&mut bytes, INSIDE_MAC)?;
    let (hosts, port) = ((*HOSTS.get(side)?, *HOSTS.get(1 - side)?), port_of(tunnel));
    parts::write_udp(bytes.get_mut(ether::LEN..)?, size, hosts, (port, port))?;
    Some(bytes)
}

fn port_of(tunnel: u32) -> u16 {
    FIRST_PORT + u16::try_from(tunnel).unwrap_or(0)
}

/// Makes packets, and looks at those that come out.
struct Edge {
    side: usize,
    shared: Arc<Shared>,
    dice: Dice,
}

impl Edge {
    fn make(&mut self, arena: &Arena, pool: &mut Pool, tunnel: u32) -> Option<Frame> {
        let kind = usize::try_from(self.dice.throw(16)).ok()?;
        let size = *SIZES.get(kind)?;
        let flow = self.shared.flow(tunnel, self.side)?;
        let mut frame = pool.take()?;
        frame.grow_back(ether::LEN + size)?;
        let number = flow.next.fetch_add(1, Ordering::Relaxed);
        let (head, body) = arena.bytes_mut(&mut frame).split_first_chunk_mut::<{ ether::LEN + HEAD }>()?;
        *head = *flow.templates.get(kind)?;
        let (name, rest) = body.split_first_chunk_mut::<NAME>()?;
        let (t, n) = (tunnel.to_be_bytes(), number.to_be_bytes());
        let [s0, s1] = u16::try_from(size).ok()?.to_be_bytes();
        *name = [t[0], t[1], t[2], t[3], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], s0, s1, 0x50, 0x6f];
        rest.copy_from_slice(self.shared.payload(number, rest.len()));
        Some(frame)
    }

    /// Whether a packet is what was made at the other side, and is so for the first time.
    fn is_right(&self, bytes: &[u8]) -> Option<()> {
        let packet = bytes.get(ether::LEN..)?;
        let body = packet.get(HEAD..)?;
        let (name, rest) = body.split_first_chunk::<NAME>()?;
        let [t0, t1, t2, t3, n0, n1, n2, n3, n4, n5, n6, n7, s0, s1, 0x50, 0x6f] = *name else { return None };
        let (tunnel, number) =
            (u32::from_be_bytes([t0, t1, t2, t3]), u64::from_be_bytes([n0, n1, n2, n3, n4, n5, n6, n7]));
        let size = usize::from(u16::from_be_bytes([s0, s1]));
        let flow = self.shared.flow(tunnel, 1 - self.side)?;
        let right = size == packet.len()
            && header::checksum_ok(packet)
            && packet.get(8) == Some(&62)
            && packet.get(12..HEAD)
                == flow.templates.get(SIZES.iter().position(|s| *s == size)?)?.get(ether::LEN + 12..)
            && rest == self.shared.payload(number, rest.len());
        let round = u32::try_from(number / SPAN as u64).ok()? + 1;
        let place = flow.seen.get(usize::try_from(number % SPAN as u64).ok()?)?;
        (right && place.swap(round, Ordering::Relaxed) != round).then_some(())
    }
}

impl Port for Edge {
    fn receive(&mut self, arena: &Arena, pool: &mut Pool, out: &mut ArrayVec<Frame, BATCH>) {
        // Whoever sends sees that the receivers are behind.
        if !self.shared.has_room() {
            return;
        }
        // As a rule a whole batch, half of them of the one elephant.
        let count = if self.dice.throw(8) == 0 { self.dice.throw(64) } else { 64 };
        let wanted = u64::from(count).min(out.remaining_capacity() as u64);
        let take = |budget: u64| Some(budget.saturating_sub(wanted));
        let before = self.shared.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let granted = before.unwrap_or(0).min(wanted);
        let (mut tunnel, mut made) = (0, 0);
        for number in 0..granted {
            if number % 8 == 0 {
                tunnel = if self.dice.throw(2) == 0 { 0 } else { self.dice.throw(TUNNELS) };
            }
            let Some(frame) = self.make(arena, pool, tunnel) else { break };
            out.push(frame);
            made += 1;
        }
        self.shared.made.fetch_add(made, Ordering::Relaxed);
        self.shared.budget.fetch_add(granted - made, Ordering::Relaxed);
    }

    fn transmit(&mut self, arena: &Arena, pool: &mut Pool, frames: &mut ArrayVec<Frame, BATCH>) -> usize {
        let count = frames.len();
        let mut right = 0;
        for frame in frames.drain(..) {
            right += u64::from(self.is_right(arena.bytes(&frame)).is_some());
            pool.give(frame);
        }
        self.shared.delivered.fetch_add(right, Ordering::Relaxed);
        self.shared.wrong.fetch_add(count as u64 - right, Ordering::Relaxed);
        count
    }

    fn flush(&mut self, _: &Arena, _: &mut Pool) {}

    fn drain(&mut self, _: &Arena, _: &mut Pool) {}

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn link(&self) -> LinkKind {
        LinkKind::Ethernet
    }

    fn describe(&self) -> String {
        "maker of packets".to_owned()
    }
}

/// The wire between the gateways.
struct Wire {
    side: usize,
    worker: usize,
    shared: Arc<Shared>,
    dice: Dice,
}

impl Wire {
    /// Where a frame arrives: one worker for each SPI, but now and then another.
    fn lane(&mut self, bytes: &[u8]) -> usize {
        let stray = usize::from(self.dice.throw(5000) == 0);
        let at = ether::LEN + ip4::MIN_LEN;
        let spi = bytes.get(at + 3).copied().unwrap_or(0);
        (usize::from(spi) + stray) % WORKERS
    }
}

impl Port for Wire {
    fn receive(&mut self, _: &Arena, _: &mut Pool, out: &mut ArrayVec<Frame, BATCH>) {
        let own = self.shared.wires.get(self.side).and_then(|wires| wires.get(self.worker));
        while let Some(frame) = own.filter(|_| !out.is_full()).and_then(ArrayQueue::pop) {
            out.push(frame);
        }
    }

    fn transmit(&mut self, arena: &Arena, pool: &mut Pool, frames: &mut ArrayVec<Frame, BATCH>) -> usize {
        let mut sent = 0;
        while let Some(mut frame) = frames.pop_at(0) {
            match self.dice.throw(20_000) {
                0 => {
                    if let Some(last) = arena.bytes_mut(&mut frame).last_mut() {
                        *last ^= 0x10;
                    }
                }
                1 => {
                    if let Some(mut copy) = pool.take()
                        && copy.grow_back(frame.len()).is_some()
                    {
                        arena.bytes_mut(&mut copy).copy_from_slice(arena.bytes(&frame));
                        let lane = self.lane(arena.bytes(&frame));
                        let wire = self.shared.wires.get(1 - self.side).and_then(|wires| wires.get(lane));
                        match wire.map(|wire| wire.push(copy)) {
                            Some(Err(copy)) => pool.give(copy),
                            _ => _ = self.shared.doubled.fetch_add(1, Ordering::Relaxed),
                        }
                    }
                }
                _ => {}
            }
            let lane = self.lane(arena.bytes(&frame));
            let wire = self.shared.wires.get(1 - self.side).and_then(|wires| wires.get(lane));
            let Some(wire) = wire else { break };
            if let Err(frame) = wire.push(frame) {
                frames.insert(0, frame);
                break;
            }
            sent += 1;
        }
        sent
    }

    fn flush(&mut self, _: &Arena, _: &mut Pool) {}

    fn drain(&mut self, _: &Arena, _: &mut Pool) {}

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn link(&self) -> LinkKind {
        LinkKind::Ethernet
    }

    fn describe(&self) -> String {
        "wire".to_owned()
    }
}

/// One gateway's tables, and what is installed in them.
struct Gateway {
    publisher: Publisher,
    cells: Vec<Arc<WorkerCells>>,
}

fn layout(side: usize) -> Layout {
    let net = |text: &str| text.parse::<IpNet>().unwrap_or_default();
    let address = |text: &str| text.parse::<IpAddr>().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    if side == 0 {
        return Layout { workers: WORKERS, ..Layout::default() };
    }
    Layout {
        outside: vec![(net("198.51.100.1/24"), address("198.51.100.254"))],
        inside: vec![net("10.2.0.1/24")],
        inside_hosts: vec![address("10.2.0.2")],
        workers: WORKERS,
        ..Layout::default()
    }
}

fn gateway(
    side: usize,
    seed: u64,
    arena: &Arena,
    pools: &mut Vec<Pool>,
    shared: &Arc<Shared>,
    state: &std::path::Path,
) -> Result<(Gateway, Vec<Worker>), Box<dyn std::error::Error>> {
    let dice = |salt: usize| Dice(seed ^ (salt as u64 * 0x9e37_79b9 + side as u64 * 0x85eb_ca6b));
    let wire = |worker| {
        let port = Wire { side, worker, shared: Arc::clone(shared), dice: dice(worker + 1) };
        Some(Box::new(port) as Box<dyn Port>)
    };
    let edge = |worker: usize| {
        let port = Edge { side, shared: Arc::clone(shared), dice: dice(worker + 11) };
        Some(Box::new(port) as Box<dyn Port>)
    };
    let info = |name: &str, role, mac: Mac| PortInfo {
        name: name.to_owned(),
        role,
        link: LinkKind::Ethernet,
        mac,
        host: false,
        socket: false,
    };
    let interfaces = vec![
        Interface {
            info: info("outside", Role::Outside, OUTSIDE_MAC),
            queues: (0..WORKERS).map(wire).collect(),
        },
        Interface {
            info: info("inside", Role::Inside, INSIDE_MAC),
            queues: (0..WORKERS).map(edge).collect(),
        },
    ];
    let Assembly { publisher, mut workers, bell: _ } = assemble(Parts {
        arena: arena.clone(),
        frames: Vec::new(),
        interfaces,
        fib: testbed::fib(&layout(side)),
        resolver: Resolver::unattended(),
        ledger: Ledger::open(state)?,
        sa_slots: 4096,
        backend: Backend::Auto,
        placement: Placement::anywhere(WORKERS),
    })?;
    // Frames cross from one gateway to the other: all workers share one store of them.
    for (worker, pool) in workers.iter_mut().zip(pools.drain(..WORKERS)) {
        worker.core.pool = pool;
    }
    let cells = workers.iter().map(|worker| Arc::clone(&worker.core.cells)).collect();
    Ok((Gateway { publisher, cells }, workers))
}

/// What control knows of a tunnel.
struct Tunnel {
    /// Times that it was keyed.
    keyed: u64,
    /// State of its descriptions.
    generation: u64,
    moved: bool,
    installed: bool,
    /// Keys of before, still installed.
    old: Option<u64>,
}

struct Control {
    gateways: [Gateway; 2],
    tunnels: Vec<Tunnel>,
    dice: Dice,
    changes: [u64; 4],
    started: Instant,
}

fn id(tunnel: u32, keyed: u64, side: usize, direction: Direction) -> SaId {
    let direction = u64::from(direction == Direction::Outbound);
    SaId(((keyed * u64::from(TUNNELS) + u64::from(tunnel)) * 2 + direction) * 2 + side as u64 + 1)
}

/// Of packets that `from` sends.
fn spi(tunnel: u32, keyed: u64, from: usize) -> Spi {
    let number = keyed * u64::from(TUNNELS) + u64::from(tunnel);
    Spi(0x1000 + u32::try_from((number * 2 + from as u64) % 0x0fff_0000).unwrap_or(0))
}

fn suite(tunnel: u32, keyed: u64, from: usize) -> Suite {
    let key = |len: usize| {
        let mut dice = Dice((u64::from(tunnel) << 40) ^ (keyed << 1) ^ from as u64);
        Secret::new((0..len).map(|_| u8::try_from(dice.throw(256)).unwrap_or(0)).collect::<Vec<u8>>())
    };
    let (encryption, len, integrity, integrity_len) = match tunnel % 6 {
        3 => (Encryption::ChaCha20Poly1305, 36, Integrity::None, 0),
        4 => (Encryption::AesGcm16, 36, Integrity::None, 0),
        5 => (Encryption::AesCbc, 16, Integrity::HmacSha2_256_128, 32),
        _ => (Encryption::AesGcm16, 20, Integrity::None, 0),
    };
    let integrity_key = if integrity_len > 0 { key(integrity_len) } else { Secret::empty() };
    Suite { encryption, encryption_key: key(len), integrity, integrity_key }
}

fn selector(tunnel: u32, side: usize) -> Selector {
    let host = |side: usize| parts::only(HOSTS.get(side).copied().unwrap_or(Ipv4Addr::UNSPECIFIED));
    let ports = port_of(tunnel)..=port_of(tunnel);
    Selector {
        protocol: Some(Protocol::UDP),
        local_ports: ports.clone(),
        remote_ports: ports,
        ..parts::selector(host(side), host(1 - side))
    }
}

impl Control {
    fn now(&self) -> u32 {
        u32::try_from(self.started.elapsed().as_secs()).unwrap_or(u32::MAX).saturating_add(1)
    }

    fn apply(&mut self, side: usize, operations: Vec<Operation>) {
        let now = self.now();
        let Some(gateway) = self.gateways.get_mut(side) else { return };
        for done in gateway.publisher.apply(&[operations], now).into_iter().flatten() {
            if let Err(refusal) = done {
                eprintln!("refused: {refusal}");
            }
        }
    }

    fn sa(&self, tunnel: u32, keyed: u64, side: usize, direction: Direction) -> Option<Operation> {
        let state = self.tunnels.get(usize::try_from(tunnel).ok()?)?;
        let outbound = direction == Direction::Outbound;
        let from = if outbound { side } else { 1 - side };
        let address = |side: usize| {
            let usual = GATEWAYS.get(side).copied().unwrap_or(Ipv4Addr::UNSPECIFIED);
            IpAddr::from(if side == 0 && state.moved { MOVED } else { usual })
        };
        let other = if outbound { Direction::Inbound } else { Direction::Outbound };
        let ends = (address(side), address(1 - side));
        let (id_here, spi) = (id(tunnel, keyed, side, direction), spi(tunnel, keyed, from));
        let suite = suite(tunnel, keyed, from);
        Some(Operation::InstallSa(Box::new(SaConfig {
            generation: Generation(state.generation),
            encap: (tunnel % 4 == 1).then_some(UdpEncap { local_port: 4500, remote_port: 4500 }),
            esn: tunnel % 3 != 2,
            pair: Some(id(tunnel, keyed, side, other)),
            fan_out: match tunnel % 3 {
                0 => FanOut::Always,
                1 => FanOut::ByLoad,
                _ => FanOut::Never,
            },
            ..parts::sa(id_here, direction, spi, ends, suite, selector(tunnel, side))
        })))
    }

    fn policy(tunnel: u32, keyed: u64, side: usize) -> Operation {
        let sa = id(tunnel, keyed, side, Direction::Outbound);
        let policy = parts::policy(PolicyId(u64::from(tunnel) + 1), selector(tunnel, side), sa);
        Operation::InstallPolicy(Policy { generation: Generation(keyed), ..policy })
    }

    fn tunnel(&mut self, tunnel: u32) -> Option<&mut Tunnel> {
        self.tunnels.get_mut(usize::try_from(tunnel).ok()?)
    }

    fn remove(&mut self, tunnel: u32, keyed: u64) {
        for side in [0, 1] {
            let ids = [Direction::Outbound, Direction::Inbound];
            let ids = ids.map(|direction| Operation::RemoveSa(id(tunnel, keyed, side, direction)));
            self.apply(side, ids.into());
        }
    }

    /// New keys for a tunnel, with or without some before: first both ends can receive, then they send.
    fn key(&mut self, tunnel: u32) {
        let Some(state) = self.tunnel(tunnel) else { return };
        let old = state.installed.then_some(state.keyed);
        state.keyed += 1;
        state.generation += 1;
        state.installed = true;
        let keyed = state.keyed;
        if let Some(oldest) = std::mem::replace(&mut state.old, old) {
            self.remove(tunnel, oldest);
        }
        for direction in [Direction::Inbound, Direction::Outbound] {
            for side in [0, 1] {
                let sa = self.sa(tunnel, keyed, side, direction);
                self.apply(side, sa.into_iter().collect());
            }
        }
        for side in [0, 1] {
            self.apply(side, vec![Self::policy(tunnel, keyed, side)]);
        }
    }

    fn delete(&mut self, tunnel: u32) {
        let Some(state) = self.tunnel(tunnel) else { return };
        let mut all = ArrayVec::<u64, 2>::new();
        all.extend(state.installed.then_some(state.keyed));
        all.extend(state.old.take());
        state.installed = false;
        for side in [0, 1] {
            self.apply(side, vec![Operation::RemovePolicy(PolicyId(u64::from(tunnel) + 1))]);
        }
        for keyed in all {
            self.remove(tunnel, keyed);
        }
    }

    /// The first gateway goes elsewhere. Its peer is told, or sees it by the next packet (MOB-2).
    fn travel(&mut self, tunnel: u32) {
        let told = self.dice.throw(2) == 0;
        let Some(state) = self.tunnel(tunnel) else { return };
        state.moved = !state.moved;
        state.generation += 1;
        let keyed = state.keyed;
        for side in [0, 1].into_iter().filter(|side| *side == 0 || told) {
            for direction in [Direction::Inbound, Direction::Outbound] {
                let sa = self.sa(tunnel, keyed, side, direction);
                self.apply(side, sa.into_iter().collect());
            }
        }
    }

    /// One change, whichever comes.
    fn change(&mut self) {
        let tunnel = self.dice.throw(TUNNELS);
        let Some(installed) = self.tunnel(tunnel).map(|state| state.installed) else { return };
        let kind = match (installed, self.dice.throw(8)) {
            (false, _) => 0,
            (true, 0) => 3,
            (true, 1..=3) => 2,
            (true, _) => 1,
        };
        match kind {
            0 | 1 => self.key(tunnel),
            2 => self.travel(tunnel),
            _ => self.delete(tunnel),
        }
        if let Some(count) = self.changes.get_mut(kind) {
            *count += 1;
        }
    }

    fn housekeeping(&mut self) {
        let now = self.now();
        for gateway in &mut self.gateways {
            gateway.publisher.collect();
            gateway.publisher.tick(now);
            drop(gateway.publisher.take_events());
        }
    }

    fn cells(&self) -> impl Iterator<Item = &Arc<WorkerCells>> {
        self.gateways.iter().flat_map(|gateway| &gateway.cells)
    }
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) << 10
}

/// Runs it. An error is one of the environment: no memory, no directory.
pub fn run(settings: &Settings) -> Result<Report, Box<dyn std::error::Error>> {
    let (arena, frames) = Arena::new(FRAMES, false)?;
    let mut pools = Pool::split(frames, 2 * WORKERS);
    let shared = Arc::new(Shared::new());
    let state = tempfile::tempdir()?;
    let mut make = |side: usize| {
        let path = state.path().join(side.to_string());
        gateway(side, settings.seed, &arena, &mut pools, &shared, &path)
    };
    let ((first, mut a), (second, mut b)) = (make(0)?, make(1)?);
    let tunnels =
        (0..TUNNELS).map(|_| Tunnel { keyed: 0, generation: 0, moved: false, installed: false, old: None });
    let mut control = Control {
        gateways: [first, second],
        tunnels: tunnels.collect(),
        dice: Dice(settings.seed),
        changes: [0; 4],
        started: Instant::now(),
    };
    let _ = shared.cells.set(control.cells().cloned().collect());
    let clock = Clock::start();
    let stop = AtomicBool::new(false);
    let mut report = std::thread::scope(|scope| {
        // A thread turns one worker of each gateway: the machine need not have four processors.
        for (one, other) in a.iter_mut().zip(&mut b) {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let now = clock.now();
                    if !(one.turn(now) | other.turn(now)) {
                        std::thread::yield_now();
                    }
                }
            });
        }
        let report = drive(settings, &shared, &mut control);
        stop.store(true, Ordering::Relaxed);
        report
    });
    let workers: Vec<&Worker> = a.iter().chain(&b).collect();
    // The spill of all pools is one store: it is counted once, the workers' own shares each.
    let own: usize = workers.iter().map(|worker| worker.core.pool.local() + worker.core.parking.len()).sum();
    let store = workers.first().map_or(0, |worker| worker.core.pool.available() - worker.core.pool.local());
    report.missing_frames = u64::from(FRAMES).saturating_sub((own + store) as u64);
    for (place, gateway) in control.gateways.iter().enumerate() {
        let sum =
            |count: &dyn Fn(&WorkerCells) -> u64| gateway.cells.iter().map(|cells| count(cells)).sum::<u64>();
        let came =
            sum(&|cells| cells.made.get() + cells.ports.iter().map(|port| port.received.get()).sum::<u64>());
        let left = sum(&|cells| {
            cells.all_drops() + cells.ports.iter().map(|port| port.transmitted.get()).sum::<u64>()
        });
        if let Some(balance) = report.balance.get_mut(place) {
            *balance = (came, left);
        }
    }
    let keys = |worker: &&Worker| worker.core.crypto.expanded() + worker.core.fan.expanded();
    let sas = |worker: &&Worker| worker.core.inbound.len() + worker.core.outbound.len();
    report.left = workers.iter().map(|worker| (keys(worker) + sas(worker)) as u64).sum();
    Ok(report)
}

/// The main thread: changes tables until all packets are made, waits for the last of them, and deletes everything.
fn drive(settings: &Settings, shared: &Shared, control: &mut Control) -> Report {
    for tunnel in 0..TUNNELS {
        control.key(tunnel);
    }
    shared.budget.store(settings.packets, Ordering::Relaxed);
    let start = Instant::now();
    let mut early = None;
    let mut next_change = start;
    let mut next_line = Duration::from_secs(1);
    loop {
        std::thread::sleep(Duration::from_micros(500));
        control.housekeeping();
        if Instant::now() >= next_change {
            control.change();
            next_change = Instant::now() + Duration::from_millis(2);
        }
        let (made, spent) = (shared.made.load(Ordering::Relaxed), start.elapsed());
        if early.is_none() && made > settings.packets / 20 {
            early = Some(resident());
        }
        if settings.progress && spent >= next_line {
            next_line = spent + Duration::from_secs(1);
            let delivered = shared.delivered.load(Ordering::Relaxed);
            let [installs, rekeys, moves, deletes] = control.changes;
            println!(
                "{:>4} s  {made:>11} made  {delivered:>11} delivered  {installs} installs {rekeys} rekeys {moves} moves \
                 {deletes} deletes  {} KiB",
                spent.as_secs(),
                resident() >> 10
            );
        }
        if spent > settings.limit {
            shared.budget.store(0, Ordering::Relaxed);
        }
        if shared.budget.load(Ordering::Relaxed) == 0 {
            break;
        }
    }
    let took = start.elapsed();
    let late = resident();
    // Until nothing moves any more.
    let progress = |control: &Control| -> u64 {
        control
            .cells()
            .map(|cells| {
                cells.all_drops()
                    + cells.ports.iter().map(|p| p.received.get() + p.transmitted.get()).sum::<u64>()
            })
            .sum()
    };
    let mut last = u64::MAX;
    while last != progress(control) {
        last = progress(control);
        std::thread::sleep(Duration::from_millis(300));
        control.housekeeping();
    }
    for tunnel in 0..TUNNELS {
        control.delete(tunnel);
    }
    // Helpers wipe keys in the turn after.
    std::thread::sleep(Duration::from_millis(100));
    control.housekeeping();
    let drops = DropReason::ALL
        .iter()
        .map(|reason| (*reason, control.cells().map(|cells| cells.drops(*reason)).sum::<u64>()));
    Report {
        made: shared.made.load(Ordering::Relaxed),
        doubled: shared.doubled.load(Ordering::Relaxed),
        delivered: shared.delivered.load(Ordering::Relaxed),
        wrong: shared.wrong.load(Ordering::Relaxed),
        drops: drops.filter(|(_, count)| *count > 0).collect(),
        helped: control.cells().map(|cells| cells.helped.get()).sum(),
        changes: control.changes,
        memory: (early.unwrap_or(late), late),
        took,
        ..Report::default()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            made,
            doubled,
            delivered,
            wrong,
            drops,
            balance,
            missing_frames,
            helped,
            changes,
            left,
            memory,
            took,
        } = self;
        let rate = *made as f64 / took.as_secs_f64() / 1e6;
        let [installs, rekeys, moves, deletes] = changes;
        let mut text = format!(
            "made {made} packets in {:.1} s ({rate:.2} Mpps), doubled {doubled} on the way\n\
             delivered {delivered}, of which wrong {wrong}\n\
             installs {installs}, rekeys {rekeys}, moves {moves}, deletes {deletes}\n\
             sealed or opened by another worker than the owner: {helped}\n\
             gateways: took and accounted for {balance:?}\n\
             frames missing {missing_frames}, keys and SAs left {left}\n\
             resident {} KiB after a twentieth, {} KiB at the end\n",
            took.as_secs_f64(),
            memory.0 >> 10,
            memory.1 >> 10
        );
        for (reason, count) in drops {
            writeln!(text, "dropped {count:>10} {}", reason.label())?;
        }
        f.write_str(text.trim_end())
    }
}
