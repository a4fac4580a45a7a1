//! The thread that follows the kernel, and the workers' questions to it.
//!
//! Two sockets: one takes notifications and never blocks, the other asks for dumps and has neighbours resolved.
//! Subscription comes before the first dump, so nothing falls in between; when the kernel says that notifications
//! were lost (`ENOBUFS`), everything is read again.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;
use hashbrown::HashMap;
use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHopFlags, RouteType,
    RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use postern_wire::ether::Mac;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Fib, NO_MAC, PortIndex, PortState, Routes, Table, Target};

/// Why following the kernel could not begin.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} by netlink")]
pub struct FollowError {
    action: &'static str,
    source: io::Error,
}

/// The thread that follows the kernel's tables. It ends when this is dropped.
#[derive(Debug)]
pub struct Follower {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    resolver: Resolver,
}

impl Follower {
    /// Follows the network namespace of the calling thread. `interfaces` gives the kernel's numbers of the datapath's
    /// interfaces. `publish` gets the first view before this returns and later ones from the follower's thread.
    pub fn spawn(
        interfaces: Vec<(u32, PortIndex)>,
        publish: impl Fn(Arc<Fib>) + Send + 'static,
    ) -> Result<Self, FollowError> {
        let failed = |action| move |source| FollowError { action, source };
        let resolver = Resolver::unattended();
        let stop = Arc::new(AtomicBool::new(false));
        let events = subscribe().map_err(failed("subscribe to changes"))?;
        let mut kernel = Kernel::open().map_err(failed("open a socket"))?;
        let mut model = Model::new(interfaces);
        model.read_all(&mut kernel).map_err(failed("read routes and neighbours"))?;
        publish(Arc::new(model.view()));
        let mut runner = Runner {
            stop: Arc::clone(&stop),
            requests: resolver.clone(),
            events,
            kernel,
            model,
            asked: HashMap::new(),
            buffer: Vec::with_capacity(BUFFER),
        };
        let thread = Builder::new()
            .name("fib".to_owned())
            .spawn(move || runner.run(&publish))
            .map_err(failed("start the thread that follows routes"))?;
        Ok(Self { stop, thread: Some(thread), resolver })
    }

    /// For the workers, a clone each.
    pub fn resolver(&self) -> Resolver {
        self.resolver.clone()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that follows routes had failed");
        }
    }
}

/// What a worker wants of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Resolve(PortIndex, IpAddr),
    Touch(PortIndex, IpAddr),
}

/// Asks the kernel for neighbours. Costs no system call and never waits: when the follower is behind, requests are
/// lost, and the next packet asks again.
#[derive(Clone, Debug)]
pub struct Resolver {
    queue: Arc<ArrayQueue<Request>>,
    /// The neighbours touched last and when, so that a busy one costs a compare a packet.
    touched: Box<[Option<(PortIndex, IpAddr, u32)>]>,
    /// The one asked for last and when: nearly always the next one.
    last: Option<(PortIndex, IpAddr, u32)>,
}

impl Resolver {
    /// A resolver that nobody listens to, for tests and for ports without neighbours.
    pub fn unattended() -> Self {
        Self {
            queue: Arc::new(ArrayQueue::new(REQUESTS)),
            touched: vec![None; TOUCHED].into_boxed_slice(),
            last: None,
        }
    }

    /// Asks for the link-layer address of a neighbour that is [`Unresolved`](super::Neighbour::Unresolved).
    pub fn resolve(&self, port: PortIndex, next_hop: IpAddr) {
        // Full: the packet is dropped anyway, and the next one asks again.
        let _ = self.queue.push(Request::Resolve(port, next_hop));
    }

    /// Tells of a packet sent to a known neighbour at second `now`, so that the kernel checks one that has grown
    /// stale. Only the first call in [`TOUCH_SECONDS`] does more than a compare.
    #[inline]
    pub fn touch(&mut self, port: PortIndex, next_hop: IpAddr, now: u32) {
        if self.last != Some((port, next_hop, now)) {
            self.touch_other(port, next_hop, now);
        }
    }

    fn touch_other(&mut self, port: PortIndex, next_hop: IpAddr, now: u32) {
        let index = super::spread(next_hop) % u64::try_from(TOUCHED).unwrap_or(1);
        let Some(entry) = usize::try_from(index).ok().and_then(|index| self.touched.get_mut(index)) else {
            return;
        };
        if let Some((last_port, last_hop, at)) = entry
            && *last_hop == next_hop
            && *last_port == port
            && now.wrapping_sub(*at) < TOUCH_SECONDS
        {
            self.last = Some((port, next_hop, now));
            return;
        }
        if self.queue.push(Request::Touch(port, next_hop)).is_ok() {
            *entry = Some((port, next_hop, now));
        }
    }

    /// Takes the oldest request that waits, for tests.
    pub fn next_request(&self) -> Option<(PortIndex, IpAddr)> {
        self.queue
            .pop()
            .map(|(Request::Resolve(port, address) | Request::Touch(port, address))| (port, address))
    }
}

/// Seconds between two checks of a neighbour in use; the kernel calls an entry stale after 15 to 45 s.
pub const TOUCH_SECONDS: u32 = 20;
/// Seconds between two questions for the same unresolved neighbour.
const RESOLVE_SECONDS: u64 = 1;
const REQUESTS: usize = 256;
const TOUCHED: usize = 64;
/// Requests passed on in one round of 10 ms, and neighbours remembered: a scan of a large link must not fill the
/// kernel's tables or this process's memory.
const REQUESTS_PER_ROUND: usize = 64;
const ASKED: usize = 4096;
const ROUND: Duration = Duration::from_millis(10);
/// Changes come in bursts; a view is published this long after the first of them.
const SETTLE: Duration = Duration::from_millis(5);
/// Larger than any datagram of a dump.
const BUFFER: usize = 1 << 16;

struct Runner {
    stop: Arc<AtomicBool>,
    requests: Resolver,
    events: Socket,
    kernel: Kernel,
    model: Model,
    /// When a neighbour was asked for last.
    asked: HashMap<(PortIndex, IpAddr), Instant>,
    buffer: Vec<u8>,
}

impl Runner {
    fn run(&mut self, publish: &dyn Fn(Arc<Fib>)) {
        let mut changed_at: Option<Instant> = None;
        let mut read_routes_after = Instant::now();
        // Until everything was read again: a reading that fails is repeated.
        let mut lost = false;
        while !self.stop.load(Ordering::Relaxed) {
            wait(&self.events, if changed_at.is_some() { SETTLE } else { ROUND });
            if self.drain() {
                tracing::warn!("the kernel dropped notifications; reading all routes and neighbours again");
                lost = true;
            }
            self.pass_on_requests();
            let now = Instant::now();
            if lost {
                match self.model.read_all(&mut self.kernel) {
                    Ok(()) => {
                        lost = false;
                        publish(Arc::new(self.model.view()));
                    }
                    Err(error) => tracing::error!(%error, "cannot read routes and neighbours"),
                }
                continue;
            }
            let routes_due = self.model.routes_changed && now >= read_routes_after;
            if !self.model.view_changed && !routes_due {
                changed_at = None;
                continue;
            }
            if now.duration_since(*changed_at.get_or_insert(now)) < SETTLE {
                continue;
            }
            changed_at = None;
            if routes_due {
                if let Err(error) = self.model.read_routes(&mut self.kernel) {
                    tracing::error!(%error, "cannot read routes");
                    self.model.routes_changed = true;
                }
                read_routes_after = Instant::now() + 3 * now.elapsed();
            }
            publish(Arc::new(self.model.view()));
        }
    }

    /// Applies the notifications that wait; true if some were lost.
    ///
    /// A loss is told once, and all that are lost before the queue was empty again belong to it: so the queue is emptied
    /// also then, and what is read anew afterwards is newer than anything lost.
    fn drain(&mut self) -> bool {
        let mut lost = false;
        loop {
            self.buffer.clear();
            match self.events.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(0) => return lost,
                Ok(_) => {
                    for message in messages(&self.buffer) {
                        self.model.notice(message);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => lost = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::error!(%error, "cannot read notifications of routes");
                    }
                    return lost;
                }
            }
        }
    }

    fn pass_on_requests(&mut self) {
        let now = Instant::now();
        for _ in 0..REQUESTS_PER_ROUND {
            let Some(request) = self.requests.queue.pop() else { break };
            let (Request::Resolve(port, address) | Request::Touch(port, address)) = request;
            let state = self.model.neighbours.get(&(port, address)).map(|neighbour| neighbour.state);
            let (wanted, pause) = match request {
                Request::Resolve(..) => {
                    let kept = [Some(NeighbourState::Permanent), Some(NeighbourState::Noarp)];
                    (!kept.contains(&state), RESOLVE_SECONDS)
                }
                // Only a stale entry has to be checked; and the kernel would make an ordinary entry of a permanent
                // one that it is told to use.
                Request::Touch(..) => (state == Some(NeighbourState::Stale), u64::from(TOUCH_SECONDS) / 2),
            };
            let recent = |at: &Instant| now.duration_since(*at) < Duration::from_secs(pause);
            let Some(ifindex) = self.model.ifindex_of(port).filter(|_| wanted) else { continue };
            if self.asked.get(&(port, address)).is_some_and(recent) {
                continue;
            }
            if self.asked.len() >= ASKED {
                let longest = Duration::from_secs(TOUCH_SECONDS.into());
                self.asked.retain(|_, at| now.duration_since(*at) < longest);
                if self.asked.len() >= ASKED {
                    continue;
                }
            }
            self.asked.insert((port, address), now);
            if let Err(error) = self.kernel.use_neighbour(ifindex, address) {
                tracing::warn!(%error, %address, "cannot ask for a neighbour");
            }
        }
        self.kernel.discard_answers();
    }
}

/// What was read from the kernel.
struct Model {
    ports: HashMap<u32, PortIndex>,
    links: HashMap<PortIndex, Link>,
    addresses: Vec<(u32, IpAddr)>,
    neighbours: HashMap<(PortIndex, IpAddr), Entry>,
    routes: Arc<Routes>,
    /// What the last view had, used again while it is the same.
    resolved: Arc<HashMap<(PortIndex, IpAddr), Mac>>,
    neighbours_changed: bool,
    view_changed: bool,
    routes_changed: bool,
    warned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link {
    mac: Mac,
    mtu: u16,
    resolves: bool,
    up: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    mac: Option<Mac>,
    state: NeighbourState,
}

impl Model {
    fn new(interfaces: Vec<(u32, PortIndex)>) -> Self {
        Self {
            ports: interfaces.into_iter().collect(),
            links: HashMap::new(),
            addresses: Vec::new(),
            neighbours: HashMap::new(),
            routes: Arc::default(),
            resolved: Arc::default(),
            neighbours_changed: false,
            view_changed: false,
            routes_changed: false,
            warned: false,
        }
    }

    fn ifindex_of(&self, port: PortIndex) -> Option<u32> {
        self.ports.iter().find(|(_, other)| **other == port).map(|(ifindex, _)| *ifindex)
    }

    fn read_all(&mut self, kernel: &mut Kernel) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        self.links.clear();
        kernel.dump(&RouteNetlinkMessage::GetLink(link), |message| self.notice(message))?;
        self.addresses.clear();
        let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        kernel.dump(&addresses, |message| self.notice(message))?;
        self.neighbours.clear();
        self.neighbours_changed = true;
        let neighbours = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        kernel.dump(&neighbours, |message| self.notice(message))?;
        self.read_routes(kernel)
    }

    fn read_routes(&mut self, kernel: &mut Kernel) -> io::Result<()> {
        let mut routes = Routes::default();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            kernel.dump(&RouteNetlinkMessage::GetRoute(request), |message| {
                if let Some(RouteNetlinkMessage::NewRoute(route)) = self.decode(message) {
                    enter_route(&mut routes, &self.ports, &route);
                }
            })?;
        }
        self.routes = Arc::new(routes);
        self.routes_changed = false;
        self.view_changed = true;
        Ok(())
    }

    fn decode(&mut self, message: Message<'_>) -> Option<RouteNetlinkMessage> {
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message.bytes) {
            Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(inner), .. }) => Some(inner),
            Ok(_) => None,
            Err(error) => {
                if !self.warned {
                    tracing::warn!(%error, kind = message.kind, "a message of the kernel is not understood");
                    self.warned = true;
                }
                None
            }
        }
    }

    /// Takes one message of a dump or a notification.
    fn notice(&mut self, message: Message<'_>) {
        if matches!(message.kind, RTM_NEWROUTE | RTM_DELROUTE | RTM_NEWNEXTHOP | RTM_DELNEXTHOP) {
            self.routes_changed = true;
            return;
        }
        match self.decode(message) {
            Some(RouteNetlinkMessage::NewLink(link)) => self.set_link(&link, true),
            Some(RouteNetlinkMessage::DelLink(link)) => self.set_link(&link, false),
            Some(RouteNetlinkMessage::NewAddress(address)) => self.set_address(&address, true),
            Some(RouteNetlinkMessage::DelAddress(address)) => self.set_address(&address, false),
            Some(RouteNetlinkMessage::NewNeighbour(neighbour)) => self.set_neighbour(&neighbour, true),
            Some(RouteNetlinkMessage::DelNeighbour(neighbour)) => self.set_neighbour(&neighbour, false),
            _ => {}
        }
    }

    fn set_link(&mut self, message: &LinkMessage, exists: bool) {
        // Bridges send link messages of their own family about their ports.
        if message.header.interface_family != AddressFamily::Unspec {
            return;
        }
        let Some(port) = self.ports.get(&message.header.index).copied() else { return };
        let link = exists.then(|| {
            let mut link = Link { mac: NO_MAC, mtu: 1500, resolves: false, up: false };
            for attribute in &message.attributes {
                match attribute {
                    LinkAttribute::Address(bytes) => {
                        link.mac = <[u8; 6]>::try_from(bytes.as_slice()).map_or(NO_MAC, Mac);
                    }
                    LinkAttribute::Mtu(mtu) => link.mtu = u16::try_from(*mtu).unwrap_or(u16::MAX),
                    _ => {}
                }
            }
            link.up = message.header.flags.contains(LinkFlags::Up);
            link.resolves = message.header.link_layer_type == LinkLayerType::Ether
                && !message.header.flags.contains(LinkFlags::Noarp);
            link
        });
        let old = match link {
            Some(link) => self.links.insert(port, link),
            None => self.links.remove(&port),
        };
        if old != link {
            self.view_changed = true;
            // The kernel does not announce the routes that go with a link that goes down.
            self.routes_changed |= old.map(|link| link.up) != link.map(|link| link.up);
        }
    }

    fn set_address(&mut self, message: &AddressMessage, exists: bool) {
        // On point-to-point links the local address is the one that is ours; elsewhere IPv6 gives only the other.
        let find =
            |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
        let local = find(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let address = find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        let Some(address) = local.or(address) else { return };
        let entry = (message.header.index, address);
        let known = self.addresses.contains(&entry);
        if known && !exists {
            self.addresses.retain(|other| *other != entry);
        } else if !known && exists {
            self.addresses.push(entry);
        }
        self.view_changed |= known != exists;
    }

    fn set_neighbour(&mut self, message: &NeighbourMessage, exists: bool) {
        let Some(port) = self.ports.get(&message.header.ifindex).copied() else { return };
        if message.header.flags.contains(NeighbourFlags::Proxy) {
            return;
        }
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::V4(*address)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
            _ => None,
        });
        let Some(address) = address else { return };
        let state = message.header.state;
        let usable = exists
            && matches!(
                state,
                NeighbourState::Reachable
                    | NeighbourState::Stale
                    | NeighbourState::Delay
                    | NeighbourState::Probe
                    | NeighbourState::Noarp
                    | NeighbourState::Permanent
            );
        let mac = message.attributes.iter().filter(|_| usable).find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac)
            }
            _ => None,
        });
        let old = if exists {
            self.neighbours.insert((port, address), Entry { mac, state })
        } else {
            self.neighbours.remove(&(port, address))
        };
        // Most notifications only tell of another state.
        if old.and_then(|entry| entry.mac) != mac {
            self.neighbours_changed = true;
            self.view_changed = true;
        }
    }

    fn view(&mut self) -> Fib {
        if self.neighbours_changed {
            let known = self.neighbours.iter().filter_map(|(key, entry)| Some((*key, entry.mac?)));
            self.resolved = Arc::new(known.collect());
        }
        self.neighbours_changed = false;
        self.view_changed = false;
        let count = self.ports.values().map(|port| usize::from(port.0) + 1).max().unwrap_or(0);
        let mut ports = vec![PortState::ABSENT; count];
        for (ifindex, port) in &self.ports {
            if let (Some(link), Some(state)) = (self.links.get(port), ports.get_mut(usize::from(port.0))) {
                let Link { mac, mtu, resolves, up: _ } = *link;
                let own = self.addresses.iter().filter(|(index, _)| index == ifindex);
                *state =
                    PortState { mac, mtu, resolves, addresses: own.map(|(_, address)| *address).collect() };
            }
        }
        Fib {
            routes: Arc::clone(&self.routes),
            neighbours: Arc::clone(&self.resolved),
            ports: Arc::new(ports),
            local_addresses: Arc::new(self.addresses.iter().map(|(_, address)| *address).collect()),
        }
    }
}

/// Enters a route of the dump, unless it is one that is not followed.
fn enter_route(routes: &mut Routes, ports: &HashMap<u32, PortIndex>, message: &RouteMessage) {
    let header = &message.header;
    if header.tos != 0 || header.source_prefix_length != 0 || header.flags.contains(RouteFlags::Cloned) {
        return;
    }
    let (mut table, mut metric, mut mtu) = (u32::from(header.table), 0, 0);
    let mut destination = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        _ => IpAddr::from([0; 16]),
    };
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = IpAddr::V4(*address),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => destination = IpAddr::V6(*address),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(value) = metric {
                        mtu = u16::try_from(*value).unwrap_or(u16::MAX);
                    }
                }
            }
            RouteAttribute::MultiPath(next_hops) => {
                for hop in next_hops.iter().filter(|hop| !hop.flags.contains(RouteNextHopFlags::Dead)) {
                    hops.push((usize::from(hop.hops) + 1, hop.interface_index, hop.attributes.as_slice()));
                }
            }
            _ => {}
        }
    }
    let table = match table {
        RT_TABLE_LOCAL => Table::Local,
        RT_TABLE_MAIN => Table::Main,
        _ => return,
    };
    let Ok(net) = IpNet::new(destination, header.destination_prefix_length) else { return };
    let out = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(ifindex) => Some(*ifindex),
        _ => None,
    });
    if let Some(ifindex) = out
        && hops.is_empty()
        && !header.flags.contains(RouteFlags::Dead)
    {
        hops.push((1, ifindex, message.attributes.as_slice()));
    }
    let target = match header.kind {
        RouteType::Local | RouteType::Anycast => Target::Local,
        RouteType::Broadcast
        | RouteType::Multicast
        | RouteType::BlackHole
        | RouteType::Unreachable
        | RouteType::Prohibit => Target::Unreachable,
        RouteType::Throw if table == Table::Main => Target::Unreachable,
        RouteType::Unicast => {
            let mut targets = hops
                .into_iter()
                .map(|(weight, ifindex, attributes)| (weight, target_of(ports, ifindex, attributes, mtu)));
            match (targets.next(), targets.next()) {
                (None, _) => return,
                (Some((_, only)), None) => only,
                (Some(first), Some(second)) => {
                    let all = [first, second].into_iter().chain(targets);
                    let hops = all.flat_map(|(weight, target)| std::iter::repeat_n(target, weight)).collect();
                    let Ok(index) = u32::try_from(routes.multipath.len()) else { return };
                    routes.multipath.push(hops);
                    Target::Multipath(index)
                }
            }
        }
        _ => return,
    };
    routes.insert(table, net, metric, target);
}

fn target_of(
    ports: &HashMap<u32, PortIndex>,
    ifindex: u32,
    attributes: &[RouteAttribute],
    mtu: u16,
) -> Target {
    let mut gateway = None;
    for attribute in attributes {
        match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(address))
            | RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
            RouteAttribute::Gateway(RouteAddress::Inet6(address))
            | RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
            // MPLS, segment routing and the like: the kernel's business.
            RouteAttribute::EncapType(_) | RouteAttribute::Encap(_) => return Target::Kernel(ifindex),
            _ => {}
        }
    }
    match ports.get(&ifindex) {
        Some(port) => Target::Hop { port: *port, gateway, mtu },
        None => Target::Kernel(ifindex),
    }
}

const RT_TABLE_MAIN: u32 = 254;
const RT_TABLE_LOCAL: u32 = 255;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;

/// RTNLGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE, _NEXTHOP (linux/rtnetlink.h).
const GROUPS: [u32; 7] = [1, 3, 5, 7, 9, 11, 32];

fn subscribe() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    // The kernel may grant less; what overflows is read again.
    socket.set_rx_buf_sz::<libc::c_int>(1 << 20)?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    Ok(socket)
}

/// Waits until the socket can be read, or `timeout` is over.
fn wait(socket: &Socket, timeout: Duration) -> bool {
    let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0)
}

/// The socket for questions.
struct Kernel {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Kernel {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(BUFFER) })
    }

    fn send(&mut self, payload: RouteNetlinkMessage, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(payload));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(self.sequence)
    }

    /// Gives all messages of a dump to `each`. A dump that the kernel calls inconsistent is read once more; should
    /// it stay so, the notification of whatever disturbed it comes later.
    fn dump(&mut self, request: &RouteNetlinkMessage, mut each: impl FnMut(Message<'_>)) -> io::Result<()> {
        for _ in 0..2 {
            if self.dump_once(request, &mut each)? {
                break;
            }
        }
        Ok(())
    }

    fn dump_once(
        &mut self,
        request: &RouteNetlinkMessage,
        each: &mut impl FnMut(Message<'_>),
    ) -> io::Result<bool> {
        let sequence = self.send(request.clone(), NLM_F_DUMP)?;
        let mut consistent = true;
        let mut patience = 500;
        loop {
            if !wait(&self.socket, ROUND) {
                patience -= 1;
                if patience == 0 {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                continue;
            }
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            }
            for message in messages(&self.buffer).filter(|message| message.sequence == sequence) {
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => return Ok(consistent),
                    NLMSG_ERROR => return Err(message.error()),
                    _ => each(message),
                }
            }
        }
    }

    /// Has the kernel resolve or check a neighbour: the same as if it had sent a packet there itself.
    fn use_neighbour(&mut self, ifindex: u32, address: IpAddr) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.ifindex = ifindex;
        message.header.flags = NeighbourFlags::Use;
        message.attributes.push(NeighbourAttribute::Destination(address.into()));
        self.send(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE).map(|_| ())
    }

    /// Errors come back even where no acknowledgement was asked for, such as for a link that is down.
    fn discard_answers(&mut self) {
        self.buffer.clear();
        while self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT).is_ok_and(|length| length > 0) {
            self.buffer.clear();
        }
    }
}

/// One netlink message: `bytes` is all of it with its header.
#[derive(Clone, Copy)]
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    bytes: &'a [u8],
}

impl Message<'_> {
    fn error(&self) -> io::Error {
        let code = self
            .bytes
            .get(16..)
            .and_then(|rest| rest.first_chunk())
            .map_or(0, |code| i32::from_ne_bytes(*code));
        io::Error::from_raw_os_error(code.wrapping_neg())
    }
}

/// The messages of a datagram: struct nlmsghdr is length (4 bytes, header included), type (2), flags (2), sequence
/// (4), port (4); each begins at a multiple of four.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    core::iter::from_fn(move || {
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *datagram.first_chunk::<16>()?;
        let length =
            usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok().filter(|length| *length >= 16)?;
        let bytes = datagram.get(..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            bytes,
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever comes in a datagram, cutting it into messages ends and stays inside it.
        #[test]
        fn any_bytes_are_cut_into_messages(bytes in prop::collection::vec(any::<u8>(), 0..200), length in 0_u32..80) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_chunk_mut::<4>() {
                *first = length.to_ne_bytes();
            }
            let total: usize = messages(&bytes).map(|message| message.bytes.len()).sum();
            prop_assert!(total <= bytes.len());
            let mut model = Model::new(vec![(1, PortIndex(0))]);
            for message in messages(&bytes) {
                model.notice(message);
            }
        }
    }

    /// A neighbour in use is told of once in twenty seconds, each neighbour for itself.
    #[test]
    fn touch_is_rare() {
        let mut resolver = Resolver::unattended();
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        for now in 0..TOUCH_SECONDS {
            resolver.touch(PortIndex(0), a, now);
            resolver.touch(PortIndex(0), b, now);
        }
        let mut requests = Vec::new();
        while let Some(request) = resolver.next_request() {
            requests.push(request);
        }
        assert_eq!(requests, [(PortIndex(0), a), (PortIndex(0), b)]);
        resolver.touch(PortIndex(0), a, TOUCH_SECONDS);
        assert_eq!(resolver.next_request(), Some((PortIndex(0), a)));
    }

    /// Requests beyond the queue are lost without harm.
    #[test]
    fn a_full_queue_loses_requests() {
        let resolver = Resolver::unattended();
        for _ in 0..2 * REQUESTS {
            resolver.resolve(PortIndex(3), IpAddr::from([10, 0, 0, 1]));
        }
        assert_eq!(std::iter::from_fn(|| resolver.next_request()).count(), REQUESTS);
    }
}
