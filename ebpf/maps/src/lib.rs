//! Records and indices shared between the XDP program and user space (DP-1).
//!
//! The program is loaded once for each interface and has maps of its own there: an XSKMAP is indexed by the receive
//! queue of one interface, and counters are wanted per interface. Nothing here is persisted, so the layout may
//! change with the program; both sides are always of one build.
//!
//! Records hold fixed-width integers only: no bool, enum, Option, usize or padding. Numbers are in host byte order,
//! addresses are byte arrays in network order.
#![no_std]

/// Names of the maps, as the program declares them.
pub mod name {
    /// The XDP program.
    pub const PROGRAM: &str = "postern_steer";
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
}

/// Receive queues of one interface that can have a socket.
pub const MAX_QUEUES: u32 = 1024;
/// Addresses of this host, of each IP version.
pub const MAX_LOCAL: u32 = 4096;
/// Prefixes in each of the four tries. Entries are allocated as they come.
pub const MAX_PREFIXES: u32 = 1 << 20;

/// What the program does on its interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Settings {
    /// Sum of the constants below; none of them: everything passes.
    pub flags: u32,
    /// With [`Settings::CHECK_MAC`]: the interface's address.
    pub mac: [u8; 6],
    /// Zero: the record has no padding.
    pub reserved: [u8; 2],
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
    assert!(core::mem::offset_of!(Settings, reserved) == 10);
    assert!(size_of::<Prefix>() == 4 && align_of::<Prefix>() == 4);
    assert!(core::mem::offset_of!(Prefix, flags) == 0);
};

#[cfg(feature = "aya")]
// SAFETY: repr(C), integers only, no padding: every byte pattern is a value (sizes asserted above).
unsafe impl aya::Pod for Settings {}
#[cfg(feature = "aya")]
// SAFETY: as for `Settings`.
unsafe impl aya::Pod for Prefix {}

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
