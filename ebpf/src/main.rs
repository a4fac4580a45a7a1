//! The XDP program: decides for each frame whether a worker or the kernel gets it (DP-1).
//!
//! On an *outside* interface ESP, AH and ESP in UDP are redirected to the AF_XDP socket of their receive queue;
//! NAT-keepalives are dropped; fragments of IPsec pass or are dropped, as configured; IKE and all else passes. Where
//! the loader knows this host's addresses, IPsec for others is left alone: a router forwards it.
//!
//! On an *inside* interface unicast packets are redirected whose destination, and where its entry says so whose source,
//! a policy protects. This host's addresses, multicast, broadcast and link-local destinations pass.
//!
//! An interface with both roles looks for IPsec first. A packet to be redirected whose queue has no socket passes,
//! counted: while no worker runs the host behaves as if the program were not there.
#![no_std]
#![no_main]

use core::hint::black_box;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray, XskMap};
use aya_ebpf::programs::XdpContext;
use postern_steer_maps::{MAX_LOCAL, MAX_PREFIXES, MAX_QUEUES, Prefix, Settings, VERDICT_COUNT, Verdict};
use postern_wire::steer::{Bytes, Class, Classified, Link, classify};

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

/// Entry point.
#[xdp]
pub fn postern_steer(ctx: XdpContext) -> u32 {
    let Some(settings) = SETTINGS.get(0) else {
        return XDP_PASS;
    };
    // Where the optimiser knows that `start` fits 32 bits it turns `start + 1 > end` into `start >= end`, from which the
    // verifier does not learn that one byte may be read.
    let packet = Packet { start: black_box(ctx.data()), end: ctx.data_end() };
    let verdict = decide(&packet, settings);
    let (verdict, action) = match verdict {
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
fn decide(packet: &Packet, settings: &Settings) -> Verdict {
    let found = classify(packet, Link::Ethernet);
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
            if settings.flags & Settings::LOCAL_ONLY == 0 || is_local(packet, &found) {
                return verdict;
            }
            if settings.flags & Settings::INSIDE == 0 {
                return Verdict::ForeignPassed;
            }
        }
    }
    if settings.flags & Settings::INSIDE != 0 && is_protected(packet, &found) {
        return Verdict::Protected;
    }
    if overgrown { Verdict::ExtensionHeadersPassed } else { Verdict::Passed }
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
