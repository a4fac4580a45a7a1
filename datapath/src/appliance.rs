//! The datapath on a real machine: from the settings to running workers, and back to a clean interface.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, unbounded};
use postern_contract::settings::{DatapathSettings, InterfaceSettings, PortKind, RelayPath, Role};
use postern_wire::ether::Mac;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::assembly::{Assembly, AssemblyError, Interface, Parts, assemble};
use crate::core::PortInfo;
use crate::fib::{Fib, FollowError, Follower, PortIndex};
use crate::frame::Arena;
use crate::handoff::Doorbell;
use crate::numa::Placement;
use crate::port::netdev::Netdev;
use crate::port::socket::{HeldPort, NATT_PORT, SocketError, SocketOptions, SocketPort};
use crate::port::tun::TunPort;
use crate::port::xsk::{BusyPoll, Umem, XskError, XskOptions, XskSocket};
use crate::port::{LinkKind, Port};
use crate::publish::Publisher;
use crate::reserve::{Ledger, LedgerError};
use crate::sad::lookup::Handle;
use crate::shortcut::Shortcut;
use crate::steer::{RelayRoom, Steer, SteerError};
use crate::worker::{Clock, Worker};

const DEFAULT_TUN_MTU: u16 = 1400;

/// Why the datapath could not start; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Too many workers.
    #[error("cores: at most {} workers", Handle::MAX_WORKERS)]
    Workers,
    /// No interface is configured.
    #[error("no interface is configured: add a [[datapath.interface]] with name and role")]
    NoInterface,
    /// The kernel does not tell about an interface.
    #[error("{0}")]
    Interface(io::Error),
    /// An interface that is down neither receives nor sends.
    #[error("interface {0} is down: set it up first (`ip link set {0} up`)")]
    Down(String),
    /// Memory for the frames.
    #[error("cannot get memory for {frames} frames of 4096 bytes: {source}; lower `frames` or add memory")]
    Frames {
        /// How many.
        frames: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// XDP.
    #[error(transparent)]
    Steer(#[from] SteerError),
    /// AF_XDP.
    #[error(transparent)]
    Xsk(#[from] XskError),
    /// TUN.
    #[error(transparent)]
    Tun(io::Error),
    /// Raw sockets.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Routes.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The workers.
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
    /// A thread.
    #[error("cannot start a worker thread: {0}")]
    Thread(io::Error),
}

/// What an interface is, for `status`.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Interface name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// How it is attached, by worker; `None` where the worker has no queue.
    pub by_worker: Vec<Option<String>>,
}

/// A running datapath.
pub struct Appliance {
    /// The main thread's tables.
    pub publisher: Publisher,
    /// Rung when workers or the follower of routes left something.
    pub bell: Arc<Doorbell>,
    /// Other routes and neighbours, newest last.
    pub fibs: Receiver<Arc<Fib>>,
    /// XDP programs, one an interface.
    pub steers: Vec<(Steer, Role)>,
    /// The relay in the XDP programs.
    pub shortcut: Shortcut,
    /// Interfaces in the order of their ports.
    pub attachments: Vec<Attachment>,
    /// The clock that workers use.
    pub clock: Clock,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    follower: Option<Follower>,
    /// A socket port reads ESP in UDP beside whoever has port 4500, so someone has to have it.
    shares_natt: bool,
    held: Option<HeldPort>,
}

/// One configured interface, opened.
struct Opened {
    interface: Interface,
    steer: Option<Steer>,
    attachment: Attachment,
    index: Option<u32>,
}

/// What the relay in XDP is opened with; nothing where packets have to leave by raw sockets, which workers do.
fn relay_room(settings: &DatapathSettings, port: usize) -> Option<RelayRoom> {
    let sockets = settings.interfaces.iter().any(|interface| interface.port == PortKind::Socket);
    let wanted = settings.relay == RelayPath::Xdp && !sockets;
    let port = PortIndex(u16::try_from(port).ok()?);
    wanted.then_some(RelayRoom { port, entries: settings.relay_entries })
}

/// Whose memory is where.
fn placement(settings: &DatapathSettings) -> Placement {
    if !settings.numa_local {
        return Placement::anywhere(settings.workers());
    }
    let placement = Placement::of_cores(&settings.cores);
    for (worker, core) in settings.cores.iter().enumerate() {
        if let Some(node) = placement.node_of(worker) {
            tracing::info!(worker, core, node, "the worker's memory is on its processor's node");
        }
    }
    placement
}

impl Appliance {
    /// Opens everything that the settings name and starts the workers.
    pub fn start(settings: &DatapathSettings) -> Result<Self, StartError> {
        let workers = settings.workers();
        if workers > Handle::MAX_WORKERS {
            return Err(StartError::Workers);
        }
        if settings.interfaces.is_empty() {
            return Err(StartError::NoInterface);
        }
        // First what another instance would hold, so that a second start changes nothing.
        let ledger = Ledger::open(&settings.state)?;
        let placement = placement(settings);
        let (arena, frames) = Arena::placed(settings.frames, settings.huge_pages, &placement)
            .map_err(|source| StartError::Frames { frames: settings.frames, source })?;
        if settings.huge_pages && !arena.is_huge() {
            tracing::warn!(
                "no huge pages are reserved (see /proc/sys/vm/nr_hugepages): transparent ones as far as there are some"
            );
        }
        let umem = Umem::new(arena.clone());
        let mut opened = Vec::new();
        for (port, interface) in settings.interfaces.iter().enumerate() {
            opened.push(open(settings, interface, &umem, &placement, relay_room(settings, port))?);
        }
        let indices = opened
            .iter()
            .enumerate()
            .filter_map(|(port, opened)| Some((opened.index?, PortIndex(u16::try_from(port).ok()?))));
        let (sender, fibs) = unbounded();
        // The follower publishes its first view before the main thread's bell exists; that one is taken from the channel.
        let bell_slot: Arc<std::sync::OnceLock<Arc<Doorbell>>> = Arc::default();
        let ring = Arc::clone(&bell_slot);
        let follower = Follower::spawn(indices.collect(), move |fib| {
            if sender.send(fib).is_ok()
                && let Some(bell) = ring.get()
            {
                bell.ring();
            }
        })?;
        let fib = fibs.try_iter().last().unwrap_or_else(Fib::empty);
        let mut interfaces = Vec::new();
        let mut steers = Vec::new();
        let mut attachments = Vec::new();
        for Opened { interface, steer, attachment, index: _ } in opened {
            steers.extend(steer.map(|steer| (steer, attachment.role)));
            interfaces.push(interface);
            attachments.push(attachment);
        }
        for (steer, _) in &mut steers {
            steer.set_local(fib.local_addresses())?;
        }
        let shortcut = Shortcut::new(settings, Arc::clone(&fib), follower.resolver());
        let Assembly { publisher, workers, bell } = assemble(Parts {
            arena,
            frames,
            interfaces,
            fib,
            resolver: follower.resolver(),
            ledger,
            sa_slots: settings.sa_slots,
            backend: settings.crypto.backend,
            placement,
        })?;
        let _ = bell_slot.set(Arc::clone(&bell));
        let clock = Clock::start();
        let stop = Arc::new(AtomicBool::new(false));
        let mut appliance = Self {
            publisher,
            bell,
            fibs,
            steers,
            shortcut,
            attachments,
            clock,
            stop,
            threads: Vec::new(),
            follower: Some(follower),
            shares_natt: settings.interfaces.iter().any(|interface| interface.port == PortKind::Socket),
            held: None,
        };
        appliance.hold_natt();
        for (number, worker) in workers.into_iter().enumerate() {
            appliance.spawn(settings, number, worker)?;
        }
        Ok(appliance)
    }

    fn spawn(
        &mut self,
        settings: &DatapathSettings,
        number: usize,
        mut worker: Worker,
    ) -> Result<(), StartError> {
        let core = settings.cores.get(number).copied();
        let (clock, idle, stop) = (self.clock, settings.idle, Arc::clone(&self.stop));
        let thread = std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            if let Some(core) = core {
                let mut set = CpuSet::new();
                set.set(usize::from(core));
                if let Err(error) = sched_setaffinity(None, &set) {
                    tracing::warn!(worker = number, core, %error, "cannot pin the worker to its processor");
                }
            }
            worker.run(clock, idle, &stop);
        });
        self.threads.push(thread.map_err(StartError::Thread)?);
        Ok(())
    }

    /// Detaches XDP, so that traffic is the kernel's again, then ends the workers.
    pub fn stop(&mut self) {
        self.steers.clear();
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.publisher.workers() {
            worker.inbox.bell().wake();
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker had failed");
            }
        }
        self.follower = None;
    }

    /// Has UDP port 4500 if a socket port needs that and nobody else has it: while no control process, which listens there
    /// for IKE, is connected. May be called again and again.
    pub fn hold_natt(&mut self) {
        if !self.shares_natt || self.held.is_some() {
            return;
        }
        match HeldPort::take(NATT_PORT) {
            Ok(held) => self.held = Some(held),
            // An IKE daemon has the port, which serves as well.
            Err(SocketError::PortTaken(_)) => {}
            Err(error) => tracing::warn!(%error, "peers may be told that nobody receives ESP in UDP here"),
        }
    }

    /// Leaves the port to control.
    pub fn release_natt(&mut self) {
        self.held = None;
    }

    /// Whether all workers still run.
    pub fn is_alive(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open(
    settings: &DatapathSettings,
    interface: &InterfaceSettings,
    umem: &Umem,
    placement: &Placement,
    relay: Option<RelayRoom>,
) -> Result<Opened, StartError> {
    let workers = placement.workers();
    match interface.port {
        PortKind::Xsk => open_xsk(settings, interface, umem, placement, relay),
        PortKind::Tun => {
            let port = TunPort::create(&interface.name, interface.mtu.unwrap_or(DEFAULT_TUN_MTU))
                .map_err(StartError::Tun)?;
            let index = Netdev::query(&interface.name).map_err(StartError::Interface)?.index;
            Ok(opened(interface, Box::new(port), workers, Some(index)))
        }
        PortKind::Socket => {
            let port = SocketPort::open(SocketOptions::default())?;
            Ok(opened(interface, Box::new(port), workers, None))
        }
    }
}

/// A port without queues: the first worker has it.
fn opened(interface: &InterfaceSettings, port: Box<dyn Port>, workers: usize, index: Option<u32>) -> Opened {
    let info = PortInfo {
        name: interface.name.clone(),
        role: interface.role,
        link: port.link(),
        mac: Mac([0; 6]),
        host: interface.port == PortKind::Tun && interface.role.is_inside(),
        socket: interface.port == PortKind::Socket && interface.role.is_outside(),
    };
    let mut by_worker = vec![Some(port.describe())];
    by_worker.resize(workers, None);
    let mut queues = vec![Some(port)];
    queues.resize_with(workers, || None);
    let attachment = Attachment { name: interface.name.clone(), role: interface.role, by_worker };
    Opened { interface: Interface { info, queues }, steer: None, attachment, index }
}

fn open_xsk(
    settings: &DatapathSettings,
    interface: &InterfaceSettings,
    umem: &Umem,
    placement: &Placement,
    relay: Option<RelayRoom>,
) -> Result<Opened, StartError> {
    let workers = placement.workers();
    let device = Netdev::query(&interface.name).map_err(StartError::Interface)?;
    if !device.up {
        return Err(StartError::Down(device.name));
    }
    let mut steer = Steer::attach(interface, settings.fragments, relay)?;
    let queues = usize::try_from(device.queues).unwrap_or(1);
    if queues > workers {
        tracing::warn!(
            interface = interface.name,
            queues,
            workers,
            "more queues than workers: what arrives on the others goes to the kernel; add cores or set fewer queues \
             (`ethtool -L {} combined {workers}`)",
            interface.name
        );
    }
    let sockets = u32::try_from(settings.interfaces.len() * workers).unwrap_or(u32::MAX);
    let busy_poll = (settings.busy_poll_us > 0)
        .then_some(BusyPoll { microseconds: settings.busy_poll_us, budget: settings.busy_poll_budget });
    let options = XskOptions {
        zero_copy: interface.zero_copy,
        need_wakeup: settings.need_wakeup,
        busy_poll,
        ..XskOptions::default()
    }
    .for_sockets(settings.frames, sockets);
    let mut ports: Vec<Option<Box<dyn Port>>> = Vec::new();
    let mut by_worker = Vec::new();
    for worker in 0..workers {
        let Some(queue) = (worker < queues).then(|| u32::try_from(worker).unwrap_or(0)) else {
            ports.push(None);
            by_worker.push(None);
            continue;
        };
        // Its rings are on the worker's memory node too.
        let socket = placement.near(worker, || XskSocket::bind(umem, &interface.name, queue, options))?;
        if let Some(fd) = socket.fd() {
            steer.register_xsk(queue, fd.as_fd())?;
        }
        let copy = if socket.is_zero_copy() { "zero-copy" } else { "copy" };
        let wakeup = if settings.need_wakeup { "" } else { ", no need_wakeup" };
        let busy = match (busy_poll, socket.is_busy_polled()) {
            (None, _) => "",
            (Some(_), true) => ", busy poll",
            (Some(_), false) => {
                tracing::warn!(
                    interface = interface.name,
                    queue,
                    "busy polling: the driver has not told the kernel of a receive loop to run; Linux before 6.14 learns of it \
                     with the first packet, later ones never: then busy_poll_us does nothing here"
                );
                ", busy poll not yet"
            }
        };
        by_worker.push(Some(format!("xsk {} {copy}{wakeup}{busy}", steer.mode())));
        ports.push(Some(Box::new(socket)));
    }
    let info = PortInfo {
        name: interface.name.clone(),
        role: interface.role,
        link: LinkKind::Ethernet,
        mac: device.mac.unwrap_or(Mac([0; 6])),
        host: false,
        socket: false,
    };
    let attachment = Attachment { name: interface.name.clone(), role: interface.role, by_worker };
    Ok(Opened {
        interface: Interface { info, queues: ports },
        steer: Some(steer),
        attachment,
        index: Some(device.index),
    })
}
