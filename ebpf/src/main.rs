//! The XDP program: decides for each frame whether a worker or the kernel gets it (DP-1).
//!
//! On an *outside* interface ESP, AH and ESP in UDP are redirected to the AF_XDP socket of their receive queue;
//! NAT-keepalives are dropped; fragments of IPsec pass or are dropped, as configured; IKE and all else passes. Where
//! the loader knows this host's addresses, IPsec for others is left alone: a router forwards it.
//!
//! On an *inside* interface unicast packets are redirected whose destination, and where its entry says so whose source,
//! a policy protects. This host's addresses, multicast, broadcast and link-local destinations pass.
//!
//! What a blind relay translates is translated here and sent on, where a [`Rule`] and a next hop are known for it
//! (RLY-1); a packet that is not usual goes to a worker like any IPsec, which counts what is wrong with it. Nothing is
//! dropped for the relay here.
//!
//! An interface with both roles looks for IPsec first. A packet to be redirected whose queue has no socket passes,
//! counted: while no worker runs the host behaves as if the program were not there.
#![no_std]
#![no_main]

mod bench;

use core::hint::black_box;

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, DevMap, HashMap, LpmTrie, PerCpuArray, XskMap};
use aya_ebpf::programs::XdpContext;
use postern_steer_maps::{
    Hop, MAX_HOPS, MAX_LOCAL, MAX_PORTS, MAX_PREFIXES, MAX_QUEUES, Prefix, Relay, RelayKey, Settings,
    Traffic, VERDICT_COUNT, Verdict,
};
use postern_wire::steer::{Bytes, Class, Classified, Link, classify};
use postern_wire::translate::{Address, BytesMut, Kind, Place};

#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[map]
static SOCKETS: XskMap = XskMap::with_max_entries(MAX_QUEUES, 0);
#[map]
static LOCAL_V4: HashMap<[u8; 4], u32> = HashMap::with_max_entries(MAX_LOCAL, 0);
#[map]
static LOCAL_V6: HashMap<[u8; 16], u32> = HashMap::with_max_entries(MAX_LOCAL, 0);
#[map]
static DESTINATIONS_V4: LpmTrie<[u8; 4], Prefix> = LpmTrie::with_max_entries(MAX_PREFIXES, 0);
#[map]
static DESTINATIONS_V6: LpmTrie<[u8; 16], Prefix> = LpmTrie::with_max_entries(MAX_PREFIXES, 0);
#[map]
static SOURCES_V4: LpmTrie<[u8; 4], Prefix> = LpmTrie::with_max_entries(MAX_PREFIXES, 0);
#[map]
static SOURCES_V6: LpmTrie<[u8; 16], Prefix> = LpmTrie::with_max_entries(MAX_PREFIXES, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(VERDICT_COUNT, 0);
// The loader says how many entries there are.
#[map]
static RELAY_V4: HashMap<RelayKey<[u8; 4]>, Relay<[u8; 4]>> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map]
static RELAY_V6: HashMap<RelayKey<[u8; 16]>, Relay<[u8; 16]>> =
    HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map]
static RELAY_TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(1, 0);
#[map]
static RELAY_HOPS: Array<Hop> = Array::with_max_entries(MAX_HOPS, 0);
#[map]
static RELAY_USED: Array<u32> = Array::with_max_entries(MAX_HOPS, 0);
#[map]
static RELAY_PORTS: DevMap = DevMap::with_max_entries(MAX_PORTS, 0);
#[map]
static RELAY_SENT: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(MAX_PORTS, 0);

/// The frame between the two pointers that the verifier follows.
struct Packet {
    start: usize,
    end: usize,
}

impl Packet {
    /// `N` bytes at `at`. The comparison is in the form by which the verifier learns how far `start` may be read.
    #[inline(always)]
    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let from = self.start + at;
        if from + N > self.end {
            return None;
        }
        // SAFETY: from..from + N lies inside the frame; byte arrays have no alignment.
        Some(unsafe { *(from as *const [u8; N]) })
    }
}

impl Bytes for Packet {
    /// Hidden from the optimiser, which would else derive from comparisons with the length that bounds checks further
    /// on are superfluous. The verifier understands only those checks.
    #[inline(always)]
    fn size(&self) -> usize {
        black_box(self.end - self.start)
    }

    #[inline(always)]
    fn u8(&self, at: usize) -> Option<u8> {
        self.array(at).map(|[byte]| byte)
    }

    #[inline(always)]
    fn u16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_be_bytes)
    }

    #[inline(always)]
    fn u32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_be_bytes)
    }
}

impl BytesMut for Packet {
    #[inline(always)]
    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        Self::array(self, at)
    }

    #[inline(always)]
    fn put<const N: usize>(&mut self, at: usize, value: [u8; N]) -> Option<()> {
        let to = self.start + at;
        if to + N > self.end {
            return None;
        }
        // SAFETY: to..to + N lies inside the frame, which this program alone has; byte arrays have no alignment.
        unsafe { *(to as *mut [u8; N]) = value };
        Some(())
    }
}

/// Entry point.
#[xdp]
pub fn postern_steer(ctx: XdpContext) -> u32 {
    let Some(settings) = SETTINGS.get(0) else {
        return XDP_PASS;
    };
    // Where the optimiser knows that `start` fits 32 bits it turns `start + 1 > end` into `start >= end`, from which the
    // verifier does not learn that one byte may be read.
    let mut packet = Packet { start: black_box(ctx.data()), end: ctx.data_end() };
    let found = classify(&packet, Link::Ethernet);
    let mut verdict = decide(&packet, &found, settings);
    let mut sent = None;
    if settings.flags & Settings::RELAY != 0
        && matches!(verdict, Verdict::Esp | Verdict::EspInUdp | Verdict::Ah)
    {
        sent = if found.v6 {
            relay(&mut packet, &found, settings, &RELAY_V6)
        } else {
            relay(&mut packet, &found, settings, &RELAY_V4)
        };
        if sent.is_some() {
            verdict = Verdict::Relayed;
        }
    }
    let (verdict, action) = match verdict {
        Verdict::Relayed => (verdict, sent.unwrap_or(XDP_PASS)),
        Verdict::Esp | Verdict::EspInUdp | Verdict::Ah | Verdict::Protected => {
            match SOCKETS.redirect(ctx.rx_queue_index(), u64::from(XDP_PASS)) {
                Ok(action) => (verdict, action),
                // The kernel might forward what a policy protects in the clear: better lost than read.
                Err(_) if matches!(verdict, Verdict::Protected) => (Verdict::ProtectedDropped, XDP_DROP),
                Err(action) => (Verdict::NoSocket, action),
            }
        }
        Verdict::KeepaliveDropped | Verdict::FragmentDropped => (verdict, XDP_DROP),
        _ => (verdict, XDP_PASS),
    };
    if let Some(counter) = COUNTERS.get_ptr_mut(verdict.index()) {
        // SAFETY: this processor's own cell; the program is not preempted by itself.
        unsafe { *counter += 1 };
    }
    action
}

#[inline(always)]
fn decide(packet: &Packet, found: &Classified, settings: &Settings) -> Verdict {
    match found.class {
        Class::NotIp => return Verdict::NotIpPassed,
        Class::Malformed => return Verdict::MalformedPassed,
        _ => {}
    }
    // Their destination is known all the same, so a policy cannot be evaded by headers.
    let overgrown = matches!(found.class, Class::TooManyExtensionHeaders);
    if !for_this_station(packet, settings) {
        return Verdict::Passed;
    }
    if settings.flags & Settings::OUTSIDE != 0 && !overgrown {
        let verdict = match found.class {
            Class::Esp => Verdict::Esp,
            Class::EspInUdp => Verdict::EspInUdp,
            Class::Ah => Verdict::Ah,
            Class::NattKeepalive => Verdict::KeepaliveDropped,
            Class::Ike => Verdict::IkePassed,
            Class::IpsecFragment if settings.flags & Settings::DROP_FRAGMENTS != 0 => {
                Verdict::FragmentDropped
            }
            Class::IpsecFragment => Verdict::FragmentPassed,
            _ => Verdict::Passed,
        };
        if !matches!(verdict, Verdict::Passed) {
            if settings.flags & Settings::LOCAL_ONLY == 0 || is_local(packet, found) {
                return verdict;
            }
            if settings.flags & Settings::INSIDE == 0 {
                return Verdict::ForeignPassed;
            }
        }
    }
    if settings.flags & Settings::INSIDE != 0 && is_protected(packet, found) {
        return Verdict::Protected;
    }
    if overgrown { Verdict::ExtensionHeadersPassed } else { Verdict::Passed }
}

/// Translates a packet and says how it leaves; `None`, and the packet as it was, if that is for a worker to do.
#[inline(always)]
fn relay<A: Address>(
    packet: &mut Packet,
    found: &Classified,
    settings: &Settings,
    table: &HashMap<RelayKey<A>, Relay<A>>,
) -> Option<u32> {
    let kind = Kind::of(found.class)?;
    let Place { destination, spi, length } = Place::<A>::of(packet, found, kind)?;
    let known = table.get_ptr(RelayKey { destination, spi, kind: kind as u32 })?;
    // SAFETY: the kernel frees an element no earlier than this program has ended.
    let Relay { rule, hop: index, slot } = unsafe { &*known };
    let hop = RELAY_HOPS.get(*index)?;
    if u32::from(length) > hop.mtu {
        return None;
    }
    // Before anything is written: only here can the port turn out to be missing. What is chosen counts only if this
    // program ends with XDP_REDIRECT, and no other choice follows.
    let action = if hop.port == u32::from(settings.port) {
        XDP_TX
    } else {
        RELAY_PORTS.redirect(hop.port, u64::from(XDP_PASS)).ok()?
    };
    rule.apply(packet, kind)?;
    packet.put(0, hop.destination)?;
    packet.put(6, hop.source)?;
    let bytes = u64::from(length);
    count(&RELAY_TRAFFIC, *slot, bytes);
    count(&RELAY_SENT, hop.port, bytes + LINK_HEADER);
    if let Some(used) = RELAY_USED.get_ptr_mut(*index) {
        // SAFETY: an aligned word; whoever writes it writes the same. Looked at first, so that it stays in all caches.
        unsafe {
            if *used == 0 {
                *used = 1;
            }
        }
    }
    Some(action)
}

#[inline(always)]
fn count(cells: &PerCpuArray<Traffic>, index: u32, bytes: u64) {
    if let Some(cell) = cells.get_ptr_mut(index) {
        // SAFETY: this processor's own cell; the program is not preempted by itself.
        unsafe {
            (*cell).packets += 1;
            (*cell).bytes += bytes;
        }
    }
}

/// Whether the frame was sent to this interface alone.
#[inline(always)]
fn for_this_station(packet: &Packet, settings: &Settings) -> bool {
    let Some(to) = packet.array::<6>(0) else {
        return false;
    };
    // The lowest bit of the first byte is the group bit: broadcast and multicast.
    to[0] & 1 == 0 && (settings.flags & Settings::CHECK_MAC == 0 || to == settings.mac)
}

/// Offset of the destination address in an IPv4 header; the source is the 4 bytes before.
const IP4_DESTINATION: usize = 16;
/// Offset of the destination address in an IPv6 header; the source is the 16 bytes before.
const IP6_DESTINATION: usize = 24;
/// Offset of the IP header, the only one that [`classify`] answers for [`Link::Ethernet`]. A constant, since the
/// verifier need not follow a variable then.
const NETWORK: usize = 14;
/// The same, in bytes that are counted.
const LINK_HEADER: u64 = 14;

#[inline(always)]
fn is_local(packet: &Packet, found: &Classified) -> bool {
    if found.v6 {
        packet.array(NETWORK + IP6_DESTINATION).is_some_and(|to| LOCAL_V6.get_ptr(&to).is_some())
    } else {
        packet.array(NETWORK + IP4_DESTINATION).is_some_and(|to| LOCAL_V4.get_ptr(&to).is_some())
    }
}

#[inline(always)]
fn is_protected(packet: &Packet, found: &Classified) -> bool {
    if found.v6 {
        let Some(to) = packet.array::<16>(NETWORK + IP6_DESTINATION) else {
            return false;
        };
        // Multicast ff00::/8 and link-local fe80::/10 (neighbour discovery) are not forwarded.
        if to[0] == 0xff || (to[0] == 0xfe && to[1] & 0xc0 == 0x80) {
            return false;
        }
        let Some(entry) = DESTINATIONS_V6.get(Key::new(128, to)).copied() else {
            return false;
        };
        if !entry.has(Prefix::PROTECT) || LOCAL_V6.get_ptr(&to).is_some() {
            return false;
        }
        !entry.has(Prefix::CHECK_SOURCE)
            || packet.array::<16>(NETWORK + IP6_DESTINATION - 16).is_some_and(|from| {
                SOURCES_V6.get(Key::new(128, from)).is_some_and(|source| source.has(Prefix::PROTECT))
            })
    } else {
        let Some(to) = packet.array::<4>(NETWORK + IP4_DESTINATION) else {
            return false;
        };
        // Multicast and reserved 224.0.0.0/3 with the limited broadcast, link-local 169.254.0.0/16.
        if to[0] >= 224 || (to[0] == 169 && to[1] == 254) {
            return false;
        }
        let Some(entry) = DESTINATIONS_V4.get(Key::new(32, to)).copied() else {
            return false;
        };
        if !entry.has(Prefix::PROTECT) || LOCAL_V4.get_ptr(&to).is_some() {
            return false;
        }
        !entry.has(Prefix::CHECK_SOURCE)
            || packet.array::<4>(NETWORK + IP4_DESTINATION - 4).is_some_and(|from| {
                SOURCES_V4.get(Key::new(32, from)).is_some_and(|source| source.has(Prefix::PROTECT))
            })
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
