//! The one list of reasons for which a packet is dropped (DP-6), and what else is counted.

use serde::{Deserialize, Serialize};

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// Why a packet was dropped. Each is a counter per port and, where the SA is known, per SA.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])+ $name,)+ }

        impl DropReason {
            /// All reasons, in the order of their indices.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The name under which the counter is shown, in the style of metric labels.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }

            /// One sentence for an operator.
            pub const fn help(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+),)+ }
            }

            /// Index into a table of [`DropReason::COUNT`] cells.
            pub const fn index(self) -> usize {
                self as usize
            }
        }
    };
}

drop_reasons! {
    /// A frame shorter than its headers say, or a length field that contradicts another.
    Malformed = "malformed",
    /// An IPv4 header checksum that does not fit.
    BadIpChecksum = "bad_ip_checksum",
    /// An IPv4 or IPv6 fragment of an IPsec packet: fragments are not reassembled.
    Fragment = "fragment",
    /// An Ethernet type, protocol or address that the datapath has no part in.
    NotForUs = "not_for_us",
    /// One byte 0xFF on port 4500 (RFC 3948 section 2.3).
    NattKeepalive = "natt_keepalive",
    /// More IPv6 extension headers than are followed.
    TooManyExtensionHeaders = "too_many_extension_headers",
    /// No SA and no relay entry has this SPI.
    UnknownSpi = "unknown_spi",
    /// The packet came by another encapsulation, protocol or destination than its SA has.
    WrongEncapsulation = "wrong_encapsulation",
    /// An ESP packet came without the AH header that its SA bundle demands.
    BundleMissing = "bundle_missing",
    /// More nested IPsec headers than an SA bundle has.
    NestedTooDeep = "nested_too_deep",
    /// A sequence number already received (RFC 4303 section 3.4.3).
    ReplayDuplicate = "replay_duplicate",
    /// A sequence number left of the anti-replay window.
    ReplayTooOld = "replay_too_old",
    /// Sequence number zero, which no sender uses.
    ReplayZero = "replay_zero",
    /// The integrity check failed.
    BadIcv = "bad_icv",
    /// The ciphertext's length does not fit the cipher.
    BadLength = "bad_length",
    /// Pad length or pad bytes are wrong after decryption.
    BadPadding = "bad_padding",
    /// A next header after decryption that this SA cannot carry.
    BadNextHeader = "bad_next_header",
    /// The decrypted packet is malformed.
    BadInner = "bad_inner",
    /// The decrypted packet does not match the SA's traffic selectors (RFC 4301 section 5.2, step 4).
    SelectorMismatch = "selector_mismatch",
    /// A dummy packet (RFC 4303 section 2.6), discarded after authentication.
    Dummy = "dummy",
    /// A hard limit of the SA was reached.
    LifetimeExpired = "lifetime_expired",
    /// The sequence counter would wrap (RFC 4303 section 3.3.3).
    SequenceExhausted = "sequence_exhausted",
    /// The next sequence numbers are not yet reserved on stable storage.
    SequenceNotReserved = "sequence_not_reserved",
    /// A policy says so.
    PolicyDiscard = "policy_discard",
    /// No policy matches.
    NoPolicy = "no_policy",
    /// A policy protects the packet but has no SA yet; an `Acquire` event was raised.
    NoSa = "no_sa",
    /// The SA of the policy is not installed on any worker.
    SaMissing = "sa_missing",
    /// The inner packet does not fit the path MTU and may not be fragmented; the sender was told.
    TooBig = "too_big",
    /// The inner packet's TTL or hop limit ran out.
    TtlExpired = "ttl_expired",
    /// No route to the next destination.
    NoRoute = "no_route",
    /// The neighbour's link-layer address is not yet known; its resolution was asked for.
    NeighbourUnresolved = "neighbour_unresolved",
    /// A relay entry matched the SPI but not the source address or port.
    RelayWrongPeer = "relay_wrong_peer",
    /// The ring to the worker that owns the SA is full.
    HandoffFull = "handoff_full",
    /// Other workers hold all packets that may be with them at once, and the packet had to follow those (DP-8).
    FanOutFull = "fan_out_full",
    /// The SA was removed while another worker had the packet to seal or open.
    SaGone = "sa_gone",
    /// The kernel had the packet for a worker whose receive ring is full: the worker is too slow.
    ReceiveRingFull = "receive_ring_full",
    /// The kernel had the packet for a worker and no frame to receive it into: the worker is too slow, or has too few frames.
    FillRingEmpty = "fill_ring_empty",
    /// The transmit ring is full.
    TransmitFull = "transmit_full",
    /// The kernel refused to send the packet.
    TransmitRefused = "transmit_refused",
    /// The kernel gave back a frame that it was never lent.
    BadDescriptor = "bad_descriptor",
    /// The frame is larger than the egress interface takes.
    EgressMtu = "egress_mtu",
    /// A packet that is too large for the next link has malformed options or an offset that leaves no room for fragments.
    Unfragmentable = "unfragmentable",
    /// No frame was free.
    NoFrame = "no_frame",
    /// ECN: an inner Not-ECT packet arrived with outer CE (RFC 6040 section 4.2).
    EcnNotEctMarked = "ecn_not_ect_marked",
}

impl DropReason {
    /// Number of reasons.
    pub const COUNT: usize = Self::ALL.len();
}

/// Counters of one SA.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaCounters {
    /// Packets that passed.
    pub packets: u64,
    /// Bytes of protected payload (inner packets).
    pub bytes: u64,
    /// Outbound: the last sequence number sent. Inbound: the highest accepted.
    pub sequence: u64,
    /// Packets of this SA that were dropped, by reason; reasons with zero left out.
    pub drops: Vec<(DropReason, u64)>,
    /// Seconds since the last packet passed; `None` if none did.
    pub idle_seconds: Option<u64>,
}

/// Counters of one translation entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayCounters {
    /// Packets from the client to the gateway.
    pub to_gateway_packets: u64,
    /// Bytes (whole outer IP packets) from the client to the gateway.
    pub to_gateway_bytes: u64,
    /// Packets from the gateway to the client.
    pub to_client_packets: u64,
    /// Bytes from the gateway to the client.
    pub to_client_bytes: u64,
    /// Packets refused because they came from another address or port.
    pub wrong_peer: u64,
}

/// Counters of one port of one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortCounters {
    /// Frames received.
    pub received: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Frames given to the transmit ring.
    pub transmitted: u64,
    /// Bytes given to the transmit ring.
    pub transmitted_bytes: u64,
    /// Frames received on this port and dropped, by reason; reasons with zero left out.
    pub drops: Vec<(DropReason, u64)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// DP-6: every reason has a name of its own.
    #[test]
    fn dp_6_labels_are_unique() {
        let mut labels: Vec<_> = DropReason::ALL.iter().map(|reason| reason.label()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), DropReason::COUNT);
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index);
            assert!(!reason.help().is_empty());
        }
    }
}
