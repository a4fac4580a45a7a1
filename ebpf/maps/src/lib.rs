//! Records and indices shared between the XDP program and user space (DP-1).
//!
//! The program is loaded once for each interface and has maps of its own there: an XSKMAP is indexed by the receive
//! queue of one interface, and counters are wanted per interface. Nothing here is persisted, so the layout may
//! change with the program; both sides are always of one build.
//!
//! Records hold fixed-width integers only: no bool, enum, Option, usize or padding. Numbers are in host byte order,
//! addresses are byte arrays in network order.
#![no_std]

use postern_wire::translate::Rule;

/// Names of the maps, as the program declares them.
pub mod name {
    /// The XDP program.
    pub const PROGRAM: &str = "postern_steer";
    /// The relay bench's generator.
    pub const BENCH_SEND: &str = "bench_send";
    /// The relay bench's receiver.
    pub const BENCH_SINK: &str = "bench_sink";
    /// What its frames begin with: [`BENCH_HEAD_LEN`](super::BENCH_HEAD_LEN) bytes.
    pub const BENCH_HEAD: &str = "BENCH_HEAD";
    /// One [`Settings`](super::Settings) at index 0.
    pub const SETTINGS: &str = "SETTINGS";
    /// AF_XDP sockets by receive queue.
    pub const SOCKETS: &str = "SOCKETS";
    /// Addresses of this host: `[u8; 4]` to an unused `u32`.
    pub const LOCAL_V4: &str = "LOCAL_V4";
    /// Addresses of this host: `[u8; 16]` to an unused `u32`.
    pub const LOCAL_V6: &str = "LOCAL_V6";
    /// Destinations behind the peers, longest prefix first, to [`Prefix`](super::Prefix).
    pub const DESTINATIONS_V4: &str = "DESTINATIONS_V4";
    /// The same for IPv6.
    pub const DESTINATIONS_V6: &str = "DESTINATIONS_V6";
    /// Sources that a policy protects, looked up where the destination's entry demands it.
    pub const SOURCES_V4: &str = "SOURCES_V4";
    /// The same for IPv6.
    pub const SOURCES_V6: &str = "SOURCES_V6";
    /// Packets per verdict, a `u64` per processor at [`Verdict::index`](super::Verdict::index).
    pub const COUNTERS: &str = "COUNTERS";
    /// Translations of a blind relay: [`RelayKey`](super::RelayKey) to [`Relay`](super::Relay), for IPv4.
    pub const RELAY_V4: &str = "RELAY_V4";
    /// The same for IPv6.
    pub const RELAY_V6: &str = "RELAY_V6";
    /// Where translated packets go: [`Hop`](super::Hop) by [`Relay::hop`](super::Relay::hop).
    pub const RELAY_HOPS: &str = "RELAY_HOPS";
    /// By hop: not zero where a packet went there since user space looked last.
    pub const RELAY_USED: &str = "RELAY_USED";
    /// Interfaces that translated packets leave by, by port.
    pub const RELAY_PORTS: &str = "RELAY_PORTS";
    /// What was translated: [`Traffic`](super::Traffic) per processor by [`Relay::slot`](super::Relay::slot).
    pub const RELAY_TRAFFIC: &str = "RELAY_TRAFFIC";
    /// What was translated: frames by the port that they left by, a [`Traffic`](super::Traffic) per processor.
    pub const RELAY_SENT: &str = "RELAY_SENT";
}

/// Receive queues of one interface that can have a socket.
pub const MAX_QUEUES: u32 = 1024;
/// Addresses of this host, of each IP version.
pub const MAX_LOCAL: u32 = 4096;
/// Prefixes in each of the four tries. Entries are allocated as they come.
pub const MAX_PREFIXES: u32 = 1 << 20;
/// Ports that translated packets can leave by.
pub const MAX_PORTS: u32 = 64;
/// Next hops of translated packets.
pub const MAX_HOPS: u32 = 4096;
/// Bytes at the front of the bench's frames that are written anew each time.
pub const BENCH_HEAD_LEN: usize = 48;

/// What the program does on its interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Settings {
    /// Sum of the constants below; none of them: everything passes.
    pub flags: u32,
    /// With [`Settings::CHECK_MAC`]: the interface's address.
    pub mac: [u8; 6],
    /// This interface's own number among the ports.
    pub port: u16,
}

impl Settings {
    /// Towards peers: IPsec is redirected.
    pub const OUTSIDE: u32 = 1;
    /// Towards the protected network: what a policy protects is redirected.
    pub const INSIDE: u32 = 2;
    /// Fragments of IPsec packets are dropped instead of passed.
    pub const DROP_FRAGMENTS: u32 = 4;
    /// IPsec is redirected only if it is for one of the local addresses.
    pub const LOCAL_ONLY: u32 = 8;
    /// Only frames for `mac` are redirected: in promiscuous mode the others are seen too.
    pub const CHECK_MAC: u32 = 16;
    /// Packets that a translation is known for are translated here (RLY-1).
    pub const RELAY: u32 = 32;
}

/// What is known of a prefix of destinations or sources. The longest prefix decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Prefix {
    /// Sum of the constants below.
    pub flags: u32,
}

impl Prefix {
    /// An exception from a shorter prefix: passes.
    pub const PASS: Self = Self { flags: 0 };
    /// A destination that is redirected, or a source that a policy protects.
    pub const PROTECT: u32 = 1;
    /// Of a destination: only if the source is protected as well.
    pub const CHECK_SOURCE: u32 = 2;

    /// Whether all of `flags` are set.
    #[must_use]
    pub const fn has(self, flags: u32) -> bool {
        self.flags & flags == flags
    }
}

/// What a translation is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct RelayKey<A> {
    /// The relay's address.
    pub destination: A,
    /// SPI of the outermost IPsec header.
    pub spi: [u8; 4],
    /// A [`Kind`](postern_wire::translate::Kind) as a number.
    pub kind: u32,
}

/// One direction of a translation entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Relay<A> {
    /// What is checked and written.
    pub rule: Rule<A>,
    /// Where the packets go next.
    pub hop: u32,
    /// Where they are counted.
    pub slot: u32,
}

/// A next hop. One that is in use never changes: translations are led to another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Hop {
    /// The port that leads there.
    pub port: u32,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// The hop's link-layer address.
    pub destination: [u8; 6],
    /// The port's link-layer address.
    pub source: [u8; 6],
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

macro_rules! verdicts {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// What became of a packet; each is a counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Verdict { $($(#[doc = $doc])+ $name,)+ }

        /// The names of the counters, by index.
        pub const VERDICTS: &[&str] = &[$($label,)+];

        /// A sentence on each counter, by index.
        pub const VERDICT_HELP: &[&str] = &[$(concat!($($doc),+),)+];

        /// Number of verdicts.
        pub const VERDICT_COUNT: u32 = 0 $(+ { let _ = Verdict::$name; 1 })+;
    };
}

verdicts! {
    /// ESP, redirected to a worker.
    Esp = "esp",
    /// ESP in UDP, redirected to a worker.
    EspInUdp = "esp_in_udp",
    /// AH, redirected to a worker.
    Ah = "ah",
    /// Cleartext from the inside that a policy protects, redirected to a worker.
    Protected = "protected",
    /// NAT-keepalive, dropped (RFC 3948 section 2.3).
    KeepaliveDropped = "keepalive_dropped",
    /// IKE, passed to the kernel, on to control's socket.
    IkePassed = "ike_passed",
    /// A fragment of an IPsec packet, passed to the kernel.
    FragmentPassed = "fragment_passed",
    /// A fragment of an IPsec packet, dropped.
    FragmentDropped = "fragment_dropped",
    /// IPsec for an address that is not ours, passed.
    ForeignPassed = "foreign_passed",
    /// Any other IP packet, passed.
    Passed = "passed",
    /// ARP, VLAN tags and other Ethernet types, passed.
    NotIpPassed = "not_ip_passed",
    /// A frame shorter than its headers say, passed.
    MalformedPassed = "malformed_passed",
    /// More IPv6 extension headers than are followed, passed.
    ExtensionHeadersPassed = "extension_headers_passed",
    /// IPsec, but its receive queue has no socket: passed.
    NoSocket = "no_socket",
    /// Cleartext that a policy protects, but its receive queue has no socket: dropped, for the kernel would forward it as it is.
    ProtectedDropped = "protected_dropped",
    /// IPsec that a relay translates, translated here and sent on.
    Relayed = "relayed",
}

impl Verdict {
    /// Index into the counters and [`VERDICTS`].
    #[must_use]
    pub const fn index(self) -> u32 {
        self as u32
    }
}

const _: () = {
    assert!(size_of::<Settings>() == 12 && align_of::<Settings>() == 4);
    assert!(core::mem::offset_of!(Settings, flags) == 0);
    assert!(core::mem::offset_of!(Settings, mac) == 4);
    assert!(core::mem::offset_of!(Settings, port) == 10);
    assert!(size_of::<Prefix>() == 4 && align_of::<Prefix>() == 4);
    assert!(core::mem::offset_of!(Prefix, flags) == 0);
    assert!(size_of::<RelayKey<[u8; 4]>>() == 12 && size_of::<RelayKey<[u8; 16]>>() == 24);
    assert!(size_of::<Relay<[u8; 4]>>() == 36 + 8 && size_of::<Relay<[u8; 16]>>() == 72 + 8);
    assert!(size_of::<Hop>() == 20 && align_of::<Hop>() == 4);
    assert!(size_of::<Traffic>() == 16);
};

#[cfg(feature = "aya")]
// SAFETY: repr(C), integers only, no padding: every byte pattern is a value (sizes asserted above).
unsafe impl aya::Pod for Settings {}
#[cfg(feature = "aya")]
// SAFETY: as for `Settings`.
unsafe impl aya::Pod for Prefix {}
#[cfg(feature = "aya")]
// SAFETY: as for `Settings`.
unsafe impl aya::Pod for RelayKey<[u8; 4]> {}
#[cfg(feature = "aya")]
// SAFETY: as for `Settings`.
unsafe impl aya::Pod for RelayKey<[u8; 16]> {}
#[cfg(feature = "aya")]
// SAFETY: as for `Settings`; the size of `Rule` is asserted where it is declared.
unsafe impl aya::Pod for Relay<[u8; 4]> {}
#[cfg(feature = "aya")]
// SAFETY: as for `Settings`; the size of `Rule` is asserted where it is declared.
unsafe impl aya::Pod for Relay<[u8; 16]> {}
#[cfg(feature = "aya")]
// SAFETY: as for `Settings`.
unsafe impl aya::Pod for Hop {}
#[cfg(feature = "aya")]
// SAFETY: as for `Settings`.
unsafe impl aya::Pod for Traffic {}

#[cfg(test)]
mod tests {
    use super::*;

    /// DP-6: every verdict has a name of its own.
    #[test]
    fn dp_6_verdicts_have_names() {
        assert_eq!(VERDICTS.len(), VERDICT_COUNT as usize);
        assert_eq!(VERDICTS[Verdict::NoSocket.index() as usize], "no_socket");
        for (index, name) in VERDICTS.iter().enumerate() {
            assert!(!VERDICTS[..index].contains(name), "{name} twice");
            assert!(!VERDICT_HELP[index].is_empty());
        }
    }
}
