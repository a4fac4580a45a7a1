//! Loads and attaches the XDP program and keeps its maps (DP-1).
//!
//! One [`Steer`] is one interface: a program of its own with maps of its own, held by a *bpf link*. Dropping the
//! `Steer` detaches the program, and so does the kernel when the process dies of whatever cause; a new process finds
//! the interface free. Until [`Steer::register_xsk`] gave it sockets, and whenever a queue has none, the program passes
//! everything to the kernel.
//!
//! What is redirected on an *inside* interface follows the policies: [`Steer::protect`] and [`Steer::unprotect`] are called
//! once for each pair of prefixes that a policy protects, in any order and as often as policies come and go; uses
//! are counted here. What is redirected is what a policy may protect, never less: the SPD has the last word.

mod features;
mod relay;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, XskMap};
use aya::programs::links::FdLink;
use aya::programs::{ProgramError, ProgramInfo, Xdp, XdpMode as AyaMode, loaded_programs};
use aya::{Ebpf, EbpfError, EbpfLoader};
use hashbrown::HashMap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use postern_contract::settings::{FragmentPolicy, InterfaceSettings, XdpMode};
use postern_steer_maps::{MAX_QUEUES, Prefix, Settings, VERDICTS, name};
use prefix_trie::joint::map::JointPrefixMap;

use self::relay::RelayMaps;
pub use self::relay::RelayRoom;

/// The compiled XDP program. `ebpf/build` makes it; user space and program are always of one build.
pub const OBJECT: &[u8] = aya::include_bytes_aligned!("../../ebpf/postern-steer.o");

/// How long a start waits for a predecessor of ours that is still dying. The kernel detaches a program when the process
/// that held it is gone, which takes as long as giving back its memory.
const TAKEOVER: Duration = Duration::from_secs(3);

/// Why a program could not be loaded, attached or told something.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// No such interface in this network namespace.
    #[error("interface {name:?}: {cause}")]
    NoInterface {
        /// Its name.
        name: String,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The kernel refused the maps.
    #[error(
        "the XDP program's maps cannot be made: {}; this needs root, or CAP_BPF and CAP_NET_ADMIN, and on kernels \
         before 5.11 a locked-memory limit (ulimit -l) that holds them",
        Chain(&**.0)
    )]
    Maps(Box<EbpfError>),
    /// The kernel refused the program.
    #[error(
        "the XDP program cannot be loaded: {}; this needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and Linux 5.9",
        Chain(&**.0)
    )]
    Load(Box<ProgramError>),
    /// Somebody else's program is there.
    #[error(
        "interface {interface:?} already runs the XDP program {id} ({program:?}); stop the service that attached it, or \
         detach it with: ip link set dev {interface} xdp off"
    )]
    Occupied {
        /// The interface.
        interface: String,
        /// The kernel's number of the program.
        id: u32,
        /// The program's name.
        program: String,
    },
    /// The interface or its driver takes no program in this mode.
    #[error("interface {interface:?} takes no XDP program in {mode} mode: {}", Chain(&**cause))]
    Attach {
        /// The interface.
        interface: String,
        /// `native` or `generic`.
        mode: &'static str,
        /// What the kernel said.
        cause: Box<ProgramError>,
    },
    /// The program was attached, but would outlive this process.
    #[error("interface {0:?}: this kernel has no bpf links for XDP; Linux 5.9 or newer is needed")]
    NoLink(String),
    /// More receive queues than [`MAX_QUEUES`].
    #[error("receive queue {0}: only queues below {max} can have a socket", max = MAX_QUEUES)]
    Queue(u32),
    /// The program lacks a map: object and loader are of different builds.
    #[error("the compiled XDP program has no map {0:?}: rebuild it with ebpf/build")]
    NoMap(&'static str),
    /// The kernel refused an entry.
    #[error("map {map}: {}", Chain(cause))]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        cause: MapError,
    },
}

/// Returns the error of an operation on `map`.
fn on(map: &'static str) -> impl FnOnce(MapError) -> SteerError {
    move |cause| SteerError::Map { map, cause }
}

/// The XDP program on one interface.
pub struct Steer {
    interface: String,
    index: u32,
    mode: &'static str,
    maps: Maps,
    relay: RelayMaps,
    settings: Settings,
    local: Vec<IpAddr>,
    rules: Rules,
    /// Last: the maps close first, and the program is detached when this one does.
    _link: FdLink,
}

impl std::fmt::Debug for Steer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { interface, index, mode, maps: _, relay: _, settings, local, rules: _, _link: _ } = self;
        f.debug_struct("Steer")
            .field("interface", interface)
            .field("index", index)
            .field("mode", mode)
            .field("settings", settings)
            .field("local", local)
            .finish_non_exhaustive()
    }
}

impl Steer {
    /// Loads the program, tells it what `interface` is for and attaches it as `interface.xdp` says: `auto` is native
    /// where the driver can, else generic.
    ///
    /// Where a Postern that was just killed still holds the interface, waits for it, up to three seconds.
    ///
    /// With `relay` the program of an outside interface translates packets itself, once it is told how
    /// ([`Steer::apply_relay`]).
    pub fn attach(
        interface: &InterfaceSettings,
        fragments: FragmentPolicy,
        relay: Option<RelayRoom>,
    ) -> Result<Self, SteerError> {
        let index = interface_index(&interface.name)?;
        let relay = relay.filter(|_| interface.role.is_outside());
        let mut loader = EbpfLoader::new();
        RelayMaps::size(&mut loader, relay);
        let mut ebpf = loader.load(OBJECT).map_err(|error| SteerError::Maps(Box::new(error)))?;
        let mut maps = Maps::take(&mut ebpf)?;
        let relay_maps = RelayMaps::take(&mut ebpf)?;

        let mut flags = 0;
        if interface.role.is_outside() {
            flags |= Settings::OUTSIDE;
        }
        if interface.role.is_inside() {
            flags |= Settings::INSIDE;
        }
        if fragments == FragmentPolicy::Drop {
            flags |= Settings::DROP_FRAGMENTS;
        }
        if relay.is_some() {
            flags |= Settings::RELAY;
        }
        let port = relay.map_or(0, |room| room.port.0);
        let settings = Settings { flags, port, ..Settings::default() };
        maps.set_settings(settings)?;

        let program = ebpf.program_mut(name::PROGRAM).ok_or(SteerError::NoMap(name::PROGRAM))?;
        let program: &mut Xdp = program.try_into().map_err(|error| SteerError::Load(Box::new(error)))?;
        program.load().map_err(|error| SteerError::Load(Box::new(error)))?;

        let mut attach = |mode| attach_when_free(program, &interface.name, index, mode);
        let (mode, link) = match interface.xdp {
            XdpMode::Native => ("native", attach(AyaMode::Driver)?),
            XdpMode::Generic => ("generic", attach(AyaMode::Skb)?),
            XdpMode::Auto => match attach(AyaMode::Driver) {
                Ok(link) => ("native", link),
                Err(SteerError::Attach { cause, .. }) => {
                    let link = attach(AyaMode::Skb)?;
                    tracing::warn!(interface = interface.name, reason = %Chain(&cause), "no native XDP: generic");
                    ("generic", link)
                }
                Err(error) => return Err(error),
            },
        };
        Ok(Self {
            interface: interface.name.clone(),
            index,
            mode,
            maps,
            relay: relay_maps,
            settings,
            local: Vec::new(),
            rules: Rules::default(),
            _link: link,
        })
    }

    /// The interface's name.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The kernel's number of the interface.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// How the program is attached: `native` or `generic`.
    pub fn mode(&self) -> &'static str {
        self.mode
    }

    /// Gives the frames of a receive queue to an AF_XDP socket, which must be bound to that queue of this interface.
    /// The entry goes when the socket is closed.
    pub fn register_xsk(&mut self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), SteerError> {
        if queue >= MAX_QUEUES {
            return Err(SteerError::Queue(queue));
        }
        self.maps.sockets.set(queue, socket, 0).map_err(on(name::SOCKETS))
    }

    /// Replaces the list of this host's addresses.
    ///
    /// On an outside interface IPsec is then redirected only if it is for one of them, so that a router does not
    /// take what it should forward; with an empty list all IPsec is redirected. On an inside interface packets for
    /// these addresses pass to the kernel, whatever policies say.
    pub fn set_local(&mut self, addresses: &[IpAddr]) -> Result<(), SteerError> {
        // Added before removed, and the filter last when it comes and first when it goes: no packet for an address that
        // stays is ever taken for another's.
        if addresses.is_empty() {
            self.set_flags(self.settings.flags & !Settings::LOCAL_ONLY)?;
        }
        for address in addresses.iter().filter(|address| !self.local.contains(address)) {
            self.maps.add_local(*address)?;
        }
        for address in self.local.iter().filter(|address| !addresses.contains(address)) {
            self.maps.remove_local(*address)?;
        }
        self.local = addresses.to_vec();
        if !addresses.is_empty() {
            self.set_flags(self.settings.flags | Settings::LOCAL_ONLY)?;
        }
        Ok(())
    }

    /// Redirects only frames that are sent to this link-layer address; `None` takes every unicast frame, which is
    /// right unless the interface is in promiscuous mode. Whoever sets it must follow its changes.
    pub fn set_mac(&mut self, mac: Option<[u8; 6]>) -> Result<(), SteerError> {
        let flags = match mac {
            Some(_) => self.settings.flags | Settings::CHECK_MAC,
            None => self.settings.flags & !Settings::CHECK_MAC,
        };
        self.update(Settings { flags, mac: mac.unwrap_or_default(), ..self.settings })
    }

    /// A policy protects packets to `destination`, from `source` or (`None`) from anywhere.
    pub fn protect(&mut self, destination: IpNet, source: Option<IpNet>) -> Result<(), SteerError> {
        // What cannot be written stays counted, so that taking it back takes nothing from other policies.
        self.rules.protect(destination, source).into_iter().try_for_each(|change| self.maps.apply(change))
    }

    /// Takes one [`Steer::protect`] back. Without one there is nothing to do.
    pub fn unprotect(&mut self, destination: IpNet, source: Option<IpNet>) -> Result<(), SteerError> {
        self.rules.unprotect(destination, source).into_iter().try_for_each(|change| self.maps.apply(change))
    }

    /// Packets by verdict of the program, summed over the processors.
    pub fn counters(&self) -> Result<Vec<(String, u64)>, SteerError> {
        self.maps.counters()
    }

    fn set_flags(&mut self, flags: u32) -> Result<(), SteerError> {
        self.update(Settings { flags, ..self.settings })
    }

    fn update(&mut self, settings: Settings) -> Result<(), SteerError> {
        self.maps.set_settings(settings)?;
        self.settings = settings;
        Ok(())
    }
}

/// The program's maps.
struct Maps {
    settings: Array<MapData, Settings>,
    sockets: XskMap<MapData>,
    local_v4: BpfHashMap<MapData, [u8; 4], u32>,
    local_v6: BpfHashMap<MapData, [u8; 16], u32>,
    destinations_v4: LpmTrie<MapData, [u8; 4], Prefix>,
    destinations_v6: LpmTrie<MapData, [u8; 16], Prefix>,
    sources_v4: LpmTrie<MapData, [u8; 4], Prefix>,
    sources_v6: LpmTrie<MapData, [u8; 16], Prefix>,
    counters: PerCpuArray<MapData, u64>,
}

fn map<M: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, SteerError> {
    ebpf.take_map(name).ok_or(SteerError::NoMap(name))?.try_into().map_err(on(name))
}

impl Maps {
    fn take(ebpf: &mut Ebpf) -> Result<Self, SteerError> {
        Ok(Self {
            settings: map(ebpf, name::SETTINGS)?,
            sockets: map(ebpf, name::SOCKETS)?,
            local_v4: map(ebpf, name::LOCAL_V4)?,
            local_v6: map(ebpf, name::LOCAL_V6)?,
            destinations_v4: map(ebpf, name::DESTINATIONS_V4)?,
            destinations_v6: map(ebpf, name::DESTINATIONS_V6)?,
            sources_v4: map(ebpf, name::SOURCES_V4)?,
            sources_v6: map(ebpf, name::SOURCES_V6)?,
            counters: map(ebpf, name::COUNTERS)?,
        })
    }

    fn set_settings(&mut self, settings: Settings) -> Result<(), SteerError> {
        self.settings.set(0, settings, 0).map_err(on(name::SETTINGS))
    }

    fn add_local(&mut self, address: IpAddr) -> Result<(), SteerError> {
        match address {
            IpAddr::V4(address) => self.local_v4.insert(address.octets(), 1, 0).map_err(on(name::LOCAL_V4)),
            IpAddr::V6(address) => self.local_v6.insert(address.octets(), 1, 0).map_err(on(name::LOCAL_V6)),
        }
    }

    fn remove_local(&mut self, address: IpAddr) -> Result<(), SteerError> {
        match address {
            IpAddr::V4(address) => self.local_v4.remove(&address.octets()).map_err(on(name::LOCAL_V4)),
            IpAddr::V6(address) => self.local_v6.remove(&address.octets()).map_err(on(name::LOCAL_V6)),
        }
    }

    fn apply(&mut self, change: Change) -> Result<(), SteerError> {
        let Change { table, net, entry } = change;
        match (table, net) {
            (Table::Destinations, IpNet::V4(net)) => {
                write(&mut self.destinations_v4, net.prefix_len(), net.network().octets(), entry)
                    .map_err(on(name::DESTINATIONS_V4))
            }
            (Table::Destinations, IpNet::V6(net)) => {
                write(&mut self.destinations_v6, net.prefix_len(), net.network().octets(), entry)
                    .map_err(on(name::DESTINATIONS_V6))
            }
            (Table::Sources, IpNet::V4(net)) => {
                write(&mut self.sources_v4, net.prefix_len(), net.network().octets(), entry)
                    .map_err(on(name::SOURCES_V4))
            }
            (Table::Sources, IpNet::V6(net)) => {
                write(&mut self.sources_v6, net.prefix_len(), net.network().octets(), entry)
                    .map_err(on(name::SOURCES_V6))
            }
        }
    }

    fn counters(&self) -> Result<Vec<(String, u64)>, SteerError> {
        (0..)
            .zip(VERDICTS)
            .map(|(index, verdict)| {
                let values = self.counters.get(&index, 0).map_err(on(name::COUNTERS))?;
                Ok(((*verdict).to_owned(), values.iter().sum()))
            })
            .collect()
    }
}

fn write<K: aya::Pod>(
    trie: &mut LpmTrie<MapData, K, Prefix>,
    length: u8,
    address: K,
    entry: Option<Prefix>,
) -> Result<(), MapError> {
    let key = Key::new(u32::from(length), address);
    match entry {
        Some(entry) => trie.insert(&key, entry, 0),
        None => trie.remove(&key),
    }
}

/// A write to one of the tries; `None` removes the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    table: Table,
    net: IpNet,
    entry: Option<Prefix>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    Destinations,
    Sources,
}

/// How often prefixes are in use, and what the tries hold for them.
///
/// In a trie only the longest prefix counts. A destination that is protected from some sources must therefore not
/// hide a shorter one that is protected from all: it is then written without the source check.
#[derive(Debug, Default)]
struct Rules {
    /// Policies by destination, for any source. There may be a million.
    open: Open,
    /// Policies by destination, for sources of their own.
    checked: JointPrefixMap<IpNet, u32>,
    /// Policies by such a source.
    sources: HashMap<IpNet, u32>,
}

/// Counted prefixes, among which those that cover another are found by trying the lengths that there are.
#[derive(Debug, Default)]
struct Open {
    v4: HashMap<Ipv4Net, u32>,
    v6: HashMap<Ipv6Net, u32>,
    /// Prefixes by length.
    lengths: [BTreeMap<u8, u32>; 2],
}

impl Open {
    fn contains(&self, net: IpNet) -> bool {
        match net {
            IpNet::V4(net) => self.v4.contains_key(&net),
            IpNet::V6(net) => self.v6.contains_key(&net),
        }
    }

    /// Whether a prefix here holds all of `net`.
    fn covers(&self, net: IpNet) -> bool {
        let [v4, v6] = &self.lengths;
        match net {
            IpNet::V4(net) => v4.range(..=net.prefix_len()).any(|(length, _)| {
                Ipv4Net::new(net.addr(), *length).is_ok_and(|net| self.v4.contains_key(&net.trunc()))
            }),
            IpNet::V6(net) => v6.range(..=net.prefix_len()).any(|(length, _)| {
                Ipv6Net::new(net.addr(), *length).is_ok_and(|net| self.v6.contains_key(&net.trunc()))
            }),
        }
    }

    fn add(&mut self, net: IpNet) {
        let count = match net {
            IpNet::V4(net) => self.v4.entry(net).or_default(),
            IpNet::V6(net) => self.v6.entry(net).or_default(),
        };
        *count += 1;
        if *count == 1 {
            *self.length(net).entry(net.prefix_len()).or_default() += 1;
        }
    }

    /// Takes one use back; `None` if there was none, else how many are left.
    fn take(&mut self, net: IpNet) -> Option<u32> {
        let left = match net {
            IpNet::V4(net) => count_down(&mut self.v4, &net),
            IpNet::V6(net) => count_down(&mut self.v6, &net),
        }?;
        if left == 0 {
            let lengths = self.length(net);
            if let Some(count) = lengths.get_mut(&net.prefix_len()) {
                *count -= 1;
                if *count == 0 {
                    lengths.remove(&net.prefix_len());
                }
            }
        }
        Some(left)
    }

    fn length(&mut self, net: IpNet) -> &mut BTreeMap<u8, u32> {
        let [v4, v6] = &mut self.lengths;
        if matches!(net, IpNet::V4(_)) { v4 } else { v6 }
    }
}

/// `None` if there was none, else how many are left; at 0 the entry is gone.
fn count_down<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, u32>, key: &K) -> Option<u32> {
    let count = counts.get_mut(key)?;
    *count -= 1;
    let left = *count;
    if left == 0 {
        counts.remove(key);
    }
    Some(left)
}

impl Rules {
    fn protect(&mut self, destination: IpNet, source: Option<IpNet>) -> Vec<Change> {
        let destination = destination.trunc();
        let known = self.is_known(destination);
        let mut changes = Vec::new();
        if let Some(source) = specific(source) {
            let uses = self.sources.entry(source).or_default();
            *uses += 1;
            if *uses == 1 {
                changes.push(Change { table: Table::Sources, net: source, entry: Some(PROTECTED) });
            }
            *self.checked.entry(destination).or_default() += 1;
            if !known {
                changes.push(self.destination(destination));
            }
        } else {
            let covered = self.open.covers(destination);
            self.open.add(destination);
            if !known {
                changes.push(self.destination(destination));
            }
            if !covered {
                // What was checked below it is not any more.
                changes.extend(self.checked.children(&destination).map(|(net, _)| self.destination(net)));
            }
        }
        changes
    }

    fn unprotect(&mut self, destination: IpNet, source: Option<IpNet>) -> Vec<Change> {
        let destination = destination.trunc();
        let mut changes = Vec::new();
        if let Some(source) = specific(source) {
            let Some(uses) = self.checked.get_mut(&destination) else { return Vec::new() };
            *uses -= 1;
            if *uses == 0 {
                self.checked.remove(&destination);
            }
            if count_down(&mut self.sources, &source) == Some(0) {
                changes.push(Change { table: Table::Sources, net: source, entry: None });
            }
        } else {
            let Some(left) = self.open.take(destination) else { return Vec::new() };
            if left == 0 && !self.open.covers(destination) {
                changes.extend(self.checked.children(&destination).map(|(net, _)| self.destination(net)));
            }
        }
        if !self.is_known(destination) {
            changes.insert(0, Change { table: Table::Destinations, net: destination, entry: None });
        }
        changes
    }

    /// Whether the trie of destinations has this prefix.
    fn is_known(&self, net: IpNet) -> bool {
        self.open.contains(net) || self.checked.contains_key(&net)
    }

    /// What the trie has to say of a destination in use.
    fn destination(&self, net: IpNet) -> Change {
        let check = if self.open.covers(net) { 0 } else { Prefix::CHECK_SOURCE };
        let entry = Some(Prefix { flags: Prefix::PROTECT | check });
        Change { table: Table::Destinations, net, entry }
    }
}

const PROTECTED: Prefix = Prefix { flags: Prefix::PROTECT };

/// A source prefix that restricts anything.
fn specific(source: Option<IpNet>) -> Option<IpNet> {
    source.filter(|net| net.prefix_len() > 0).map(|net| net.trunc())
}

/// Attaches, and waits where a predecessor of ours is still being torn down.
fn attach_when_free(
    program: &mut Xdp,
    interface: &str,
    index: u32,
    mode: AyaMode,
) -> Result<FdLink, SteerError> {
    let deadline = Instant::now() + TAKEOVER;
    loop {
        let error = match program.attach_to_if_index(index, mode) {
            Ok(id) => {
                let link = program.take_link(id).map_err(|error| SteerError::Load(Box::new(error)))?;
                // Without bpf links aya attaches by netlink, and nothing would detach after a crash; dropping the
                // link that cannot be converted detaches it.
                return link.try_into().map_err(|_| SteerError::NoLink(interface.to_owned()));
            }
            Err(error) => error,
        };
        let Some(id) = attached_program(index).map_err(|cause| no_interface(interface, cause))? else {
            let mode = if matches!(mode, AyaMode::Skb) { "generic" } else { "native" };
            return Err(SteerError::Attach { interface: interface.to_owned(), mode, cause: Box::new(error) });
        };
        let occupant = program_name(id);
        // The kernel keeps 15 bytes of a name.
        let ours = name::PROGRAM.starts_with(&occupant) && !occupant.is_empty();
        if !ours || Instant::now() >= deadline {
            let interface = interface.to_owned();
            return Err(SteerError::Occupied { interface, id, program: occupant });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn no_interface(name: &str, cause: io::Error) -> SteerError {
    SteerError::NoInterface { name: name.to_owned(), cause }
}

fn interface_index(name: &str) -> Result<u32, SteerError> {
    let lookup = || {
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
        rustix::net::netdevice::name_to_index(socket, name)
    };
    lookup().map_err(|errno: rustix::io::Errno| no_interface(name, errno.into()))
}

fn program_name(id: u32) -> String {
    loaded_programs()
        .flatten()
        .find(|program| program.id() == id)
        .and_then(|program: ProgramInfo| program.name_as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// The number of the XDP program on an interface, as the kernel has it (IFLA_XDP_PROG_ID).
fn attached_program(index: u32) -> io::Result<Option<u32>> {
    let socket = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
    let mut link = LinkMessage::default();
    link.header.index = index;
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(link));
    request.header.flags = NLM_F_REQUEST;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send_to(&bytes, &netlink_sys::SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
    let link = match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => link,
        NetlinkPayload::Error(error) => return Err(error.to_io()),
        _ => return Err(io::Error::other("no answer to RTM_GETLINK")),
    };
    let xdp = link.attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::Xdp(xdp) => Some(xdp),
        _ => None,
    });
    // With programs in several modes only the numbers by mode are given.
    Ok(xdp.into_iter().flatten().find_map(|xdp| match xdp {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id)
            if id != 0 =>
        {
            Some(id)
        }
        _ => None,
    }))
}

/// An error with its causes, in one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the program does with the tries: the longest prefix decides.
    #[derive(Default)]
    struct Tries(HashMap<(u8, IpNet), Prefix>);

    impl Tries {
        fn apply(&mut self, changes: Vec<Change>) {
            for Change { table, net, entry } in changes {
                match entry {
                    Some(entry) => drop(self.0.insert((table as u8, net), entry)),
                    None => assert!(self.0.remove(&(table as u8, net)).is_some(), "{net} removed twice"),
                }
            }
        }

        fn longest(&self, table: Table, address: IpAddr) -> Option<Prefix> {
            self.0
                .iter()
                .filter(|((of, net), _)| *of == table as u8 && net.contains(&address))
                .max_by_key(|((_, net), _)| net.prefix_len())
                .map(|(_, entry)| *entry)
        }

        fn redirects(&self, source: IpAddr, destination: IpAddr) -> bool {
            self.longest(Table::Destinations, destination).is_some_and(|entry| {
                entry.has(Prefix::PROTECT)
                    && (!entry.has(Prefix::CHECK_SOURCE) || self.longest(Table::Sources, source).is_some())
            })
        }
    }

    /// Addresses and prefixes of a small world, so that they nest.
    fn net() -> impl Strategy<Value = IpNet> {
        (0u8..16, 124u8..=128, any::<bool>()).prop_map(|(low, length, v6)| {
            if v6 {
                let address = std::net::Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(low));
                IpNet::new(address.into(), length).unwrap()
            } else {
                IpNet::new(std::net::Ipv4Addr::new(10, 0, 0, low).into(), length - 96).unwrap()
            }
        })
    }

    proptest! {
        /// DP-1: whatever policies came and went in whatever order, each packet that one of those left protects is
        /// redirected, and the tries hold nothing for the others.
        #[test]
        fn dp_1_rules_never_redirect_less_than_policies(
            steps in prop::collection::vec((net(), prop::option::of(net()), any::<bool>()), 1..40),
        ) {
            let mut rules = Rules::default();
            let mut tries = Tries::default();
            let mut policies: Vec<(IpNet, Option<IpNet>)> = Vec::new();
            for (destination, source, add) in steps {
                if add || policies.is_empty() {
                    policies.push((destination, source));
                    tries.apply(rules.protect(destination, source));
                } else {
                    let (destination, source) = policies.swap_remove(policies.len() / 2);
                    tries.apply(rules.unprotect(destination, source));
                }
                for destination in 0..16 {
                    for source in 0..16 {
                        let to = IpAddr::from([10, 0, 0, destination]);
                        let from = IpAddr::from([10, 0, 0, source]);
                        let protected = policies.iter().any(|(net, source)| {
                            net.contains(&to) && source.is_none_or(|source| source.contains(&from))
                        });
                        let possible = policies.iter().any(|(net, _)| net.contains(&to));
                        prop_assert!(!protected || tries.redirects(from, to), "{from} to {to} escapes");
                        prop_assert!(possible || !tries.redirects(from, to), "{from} to {to} taken");
                    }
                }
            }
            for (destination, source) in policies {
                tries.apply(rules.unprotect(destination, source));
            }
            prop_assert!(tries.0.is_empty(), "left: {:?}", tries.0);
        }
    }

    /// Taking back what was never given changes nothing.
    #[test]
    fn unprotect_without_protect() {
        let mut rules = Rules::default();
        let net: IpNet = "10.0.0.0/8".parse().unwrap();
        assert!(rules.unprotect(net, None).is_empty());
        rules.protect(net, None);
        assert!(rules.unprotect(net, Some(net)).is_empty());
        assert_eq!(rules.unprotect(net, None).len(), 1);
    }
}
