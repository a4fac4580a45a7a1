//! Puts workers together: the same way for the appliance, for tests and for benches.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use postern_contract::settings::Backend;

use crate::core::{ACQUIRES_PER_SECOND, Core, ICMP_PER_SECOND, Outbox, PortInfo};
use crate::counters::{SaDrops, WorkerCells};
use crate::crypto::Engine;
use crate::egress::{Egress, Parking};
use crate::fanout::{Exchange, Fan};
use crate::fib::{CachedFib, Fib, PortIndex, Resolver};
use crate::flows::Flows;
use crate::frame::{Arena, Frame, Pool};
use crate::handoff::{Doorbell, Inbox};
use crate::numa::Placement;
use crate::outbound::OutboundBatch;
use crate::port::Port;
use crate::publish::{Publisher, WorkerLink};
use crate::relay::RelayTable;
use crate::reserve::Ledger;
use crate::sad::lookup::SpiTable;
use crate::sad::slab::Slab;
use crate::spd::Spd;
use crate::worker::{COMMANDS, OUTBOX, Worker};

/// One interface: what it is, and a port for each worker that has a queue of it.
pub struct Interface {
    /// What it is.
    pub info: PortInfo,
    /// By worker.
    pub queues: Vec<Option<Box<dyn Port>>>,
}

/// What workers are made of.
pub struct Parts {
    /// Memory of all frames.
    pub arena: Arena,
    /// The frames that no port holds.
    pub frames: Vec<Frame>,
    /// All interfaces.
    pub interfaces: Vec<Interface>,
    /// Routes and neighbours to begin with.
    pub fib: Arc<Fib>,
    /// Asks the kernel for neighbours.
    pub resolver: Resolver,
    /// Reserved sequence numbers.
    pub ledger: Ledger,
    /// Slots of the SPI table.
    pub sa_slots: u32,
    /// What AES-GCM is computed with.
    pub backend: Backend,
    /// The workers, 1 to [`crate::sad::lookup::Handle::MAX_WORKERS`], and whose memory is where.
    pub placement: Placement,
}

/// Workers ready to run, and the main thread's end of them.
pub struct Assembly {
    /// The main thread's tables.
    pub publisher: Publisher,
    /// To be run, each on a thread of its own.
    pub workers: Vec<Worker>,
    /// The main thread's bell, rung by workers.
    pub bell: Arc<Doorbell>,
}

/// Why workers cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// No event descriptor.
    #[error("cannot make an event descriptor: {0}")]
    Doorbell(#[from] std::io::Error),
    /// There is no cryptography to protect anything with.
    #[error(transparent)]
    Crypto(#[from] crate::crypto::EngineError),
    /// The latency histogram cannot be made.
    #[error("latency histogram: {0}")]
    Histogram(#[from] hdrhistogram::CreationError),
}

/// Flows (twice as many) and routes that a worker remembers at least (0.2 MB), and that all workers remember together at the
/// most (25 MB).
const REMEMBERED: (usize, usize) = (4096, 1 << 19);

/// Makes the workers.
pub fn assemble(parts: Parts) -> Result<Assembly, AssemblyError> {
    let Parts { arena, frames, interfaces, fib, resolver, ledger, sa_slots, backend, placement } = parts;
    let workers = placement.workers();
    let bell = Arc::new(Doorbell::new()?);
    let outbox = Outbox { queue: Arc::new(ArrayQueue::new(OUTBOX)), bell: Arc::clone(&bell) };
    let inboxes: Arc<[Inbox]> = (0..workers).map(|_| Inbox::new()).collect::<Result<_, _>>()?;
    let find = |wanted: fn(&PortInfo) -> bool| {
        let position = interfaces.iter().position(|interface| wanted(&interface.info))?;
        u16::try_from(position).ok().map(PortIndex)
    };
    // As many as SAs that each may have: these are spread over the workers.
    let all = usize::try_from(sa_slots).unwrap_or(usize::MAX).min(REMEMBERED.1);
    let remembered = (all / workers.max(1)).max(REMEMBERED.0);
    let (host_port, socket_port) = (find(|info| info.host), find(|info| info.socket));
    let mut infos = Vec::new();
    let mut server_of = Vec::new();
    let mut queues: Vec<Vec<Option<Box<dyn Port>>>> = (0..workers).map(|_| Vec::new()).collect();
    for interface in interfaces {
        let server = interface.queues.iter().position(Option::is_some).unwrap_or(usize::MAX);
        server_of.push(u8::try_from(server).unwrap_or(u8::MAX));
        infos.push(interface.info);
        let mut ports = interface.queues.into_iter();
        for worker in &mut queues {
            worker.push(ports.next().flatten());
        }
    }
    let infos: Arc<[PortInfo]> = infos.into();
    let exchange = Exchange::new(workers);
    let mut links = Vec::new();
    let mut made = Vec::new();
    let pools = Pool::split_placed(frames, &arena, &placement);
    for (id, (pool, ports)) in pools.into_iter().zip(queues).enumerate() {
        let cells = Arc::new(WorkerCells::new(infos.len()));
        let commands = Arc::new(ArrayQueue::new(COMMANDS));
        if let Some(inbox) = inboxes.get(id) {
            links.push(WorkerLink::new(Arc::clone(&commands), inbox.clone(), Arc::clone(&cells)));
        }
        let number = u8::try_from(id).unwrap_or(u8::MAX);
        // Its tables are on its own memory node.
        let make = || -> Result<Worker, AssemblyError> {
            let foreign = (workers > 1).then(|| Engine::select(backend, Fan::KEYS)).transpose()?;
            let core = Core {
                id: number,
                fan: Fan::new(number, Arc::clone(&exchange), foreign),
                arena: arena.clone(),
                pool,
                crypto: Engine::select(backend, remembered)?,
                spis: SpiTable::new(sa_slots),
                inbound: Slab::default(),
                outbound: Slab::default(),
                spd: Spd::new(),
                flows: Flows::new(remembered),
                relays: RelayTable::default(),
                fib: CachedFib::new(
                    Arc::clone(&fib),
                    infos.iter().map(|info| info.link).collect(),
                    remembered,
                ),
                resolver: resolver.clone(),
                ports: Arc::clone(&infos),
                host_port,
                socket_port,
                own: OutboundBatch::default(),
                parking: Parking::new(),
                egress: Egress::new(infos.len()),
                cells,
                sa_drops: SaDrops::default(),
                outbox: outbox.clone(),
                inboxes: Arc::clone(&inboxes),
                now: 0,
                icmp_tokens: ICMP_PER_SECOND,
                acquire_tokens: ACQUIRES_PER_SECOND,
            };
            Ok(Worker::new(core, ports, server_of.clone(), commands)?)
        };
        made.push(placement.near(id, make)?);
    }
    Ok(Assembly { publisher: Publisher::new(links, outbox, ledger), workers: made, bell })
}
