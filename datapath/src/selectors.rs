//! Traffic selectors as the tables keep them, and how packets are matched with them (RFC 4301 section 4.4.1.1).
//!
//! A single selector of IPv4 addresses, which is what nearly all SAs and policies have, lies in place and takes 28 bytes;
//! anything else is on the heap. A million of these exist.

use core::net::{IpAddr, Ipv4Addr};

use postern_contract::sa::{AddressRange, Selector};
use postern_wire::flow::Flow;
use postern_wire::ids::Protocol;

/// The selectors of one SA or policy. A packet matches if it matches any of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selectors(Kept);

const _: () = assert!(size_of::<Selectors>() == 32);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kept {
    V4(V4),
    Any(Box<[Selector]>),
}

/// One selector of IPv4 addresses; ranges as (first, last).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V4 {
    local: (u32, u32),
    remote: (u32, u32),
    local_ports: (u16, u16),
    remote_ports: (u16, u16),
    protocol: Option<Protocol>,
}

impl Selectors {
    /// Packs `selectors`, whose ranges hold addresses of one family each.
    pub fn new(selectors: &[Selector]) -> Self {
        let single = match selectors {
            [selector] => V4::new(selector),
            _ => None,
        };
        Self(single.map_or_else(|| Kept::Any(selectors.into()), Kept::V4))
    }

    /// The only one, if it is one of IPv4 addresses.
    pub const fn single(&self) -> Option<V4> {
        match self.0 {
            Kept::V4(single) => Some(single),
            Kept::Any(_) => None,
        }
    }

    /// The selectors as control described them.
    pub fn to_vec(&self) -> Vec<Selector> {
        match &self.0 {
            Kept::V4(single) => vec![single.unpack()],
            Kept::Any(selectors) => selectors.to_vec(),
        }
    }

    /// The remote addresses of the first selector.
    pub fn first_remote(&self) -> Option<AddressRange> {
        match &self.0 {
            Kept::V4(single) => Some(range(single.remote)),
            Kept::Any(selectors) => selectors.first().map(|selector| selector.remote),
        }
    }

    /// Whether a packet may go out: its source must be on our side and its destination on the peer's.
    #[inline]
    pub fn match_outbound(&self, flow: &Flow) -> bool {
        let ends = [(flow.source, flow.source_port), (flow.destination, flow.destination_port)];
        self.matches(flow, ends)
    }

    /// Whether a decrypted packet may have come through an SA with these selectors: its source must be on the peer's
    /// side and its destination on ours. No selector, no match.
    ///
    /// RFC 4301 section 5.2, step 4: "match the packet against the inbound selectors identified by the SAD entry to
    /// verify that the received packet is appropriate for the SA via which it was received."
    #[inline]
    pub fn match_inbound(&self, flow: &Flow) -> bool {
        let ends = [(flow.destination, flow.destination_port), (flow.source, flow.source_port)];
        self.matches(flow, ends)
    }

    /// `ends`: our address and port, then the peer's.
    fn matches(&self, flow: &Flow, ends: [(IpAddr, u16); 2]) -> bool {
        match (&self.0, ends) {
            (Kept::V4(single), [(IpAddr::V4(local), local_port), (IpAddr::V4(remote), remote_port)]) => {
                within(single.remote, remote)
                    && within(single.local, local)
                    && carries(single.protocol, flow)
                    && holds(single.local_ports, local_port, flow)
                    && holds(single.remote_ports, remote_port, flow)
            }
            (Kept::V4(_), _) => false,
            (Kept::Any(selectors), [(local, local_port), (remote, remote_port)]) => {
                selectors.iter().any(|selector| {
                    selector.remote.contains(remote)
                        && selector.local.contains(local)
                        && carries(selector.protocol, flow)
                        && holds(ports(&selector.local_ports), local_port, flow)
                        && holds(ports(&selector.remote_ports), remote_port, flow)
                })
            }
        }
    }
}

impl V4 {
    /// Matches nothing.
    pub const NOTHING: Self =
        Self { local: (1, 0), remote: (1, 0), local_ports: (1, 0), remote_ports: (1, 0), protocol: None };

    /// [`Selectors::match_inbound`] of a packet of TCP or UDP, whose ports are known.
    #[inline]
    pub fn admits(&self, source: (u32, u16), destination: (u32, u16), protocol: Protocol) -> bool {
        let within = |(first, last): (u32, u32), value: u32| first <= value && value <= last;
        let holds = |(first, last): (u16, u16), port: u16| first <= port && port <= last;
        // All at once: none of these is likelier to fail than another.
        within(self.remote, source.0)
            & within(self.local, destination.0)
            & holds(self.remote_ports, source.1)
            & holds(self.local_ports, destination.1)
            & self.protocol.is_none_or(|wanted| wanted == protocol)
    }

    fn new(selector: &Selector) -> Option<Self> {
        let Selector { local, remote, protocol, local_ports, remote_ports } = selector;
        let range = |range: &AddressRange| match (range.start, range.end) {
            (IpAddr::V4(start), IpAddr::V4(end)) => Some((start.to_bits(), end.to_bits())),
            _ => None,
        };
        Some(Self {
            local: range(local)?,
            remote: range(remote)?,
            local_ports: ports(local_ports),
            remote_ports: ports(remote_ports),
            protocol: *protocol,
        })
    }

    fn unpack(self) -> Selector {
        Selector {
            local: range(self.local),
            remote: range(self.remote),
            protocol: self.protocol,
            local_ports: self.local_ports.0..=self.local_ports.1,
            remote_ports: self.remote_ports.0..=self.remote_ports.1,
        }
    }
}

fn range((start, end): (u32, u32)) -> AddressRange {
    AddressRange { start: Ipv4Addr::from_bits(start).into(), end: Ipv4Addr::from_bits(end).into() }
}

const fn ports(range: &core::ops::RangeInclusive<u16>) -> (u16, u16) {
    (*range.start(), *range.end())
}

fn within((start, end): (u32, u32), address: Ipv4Addr) -> bool {
    (start..=end).contains(&address.to_bits())
}

fn carries(protocol: Option<Protocol>, flow: &Flow) -> bool {
    protocol.is_none_or(|protocol| protocol == flow.protocol)
}

/// Packets whose ports cannot be seen (fragments, protocols without ports) are matched by the full range only,
/// RFC 4301 section 4.4.1.2's ANY.
fn holds((first, last): (u16, u16), port: u16, flow: &Flow) -> bool {
    (first == 0 && last == u16::MAX) || (flow.ports_known && (first..=last).contains(&port))
}

#[cfg(test)]
mod tests {
    use postern_wire::flow::Fragment;
    use proptest::prelude::*;

    use super::*;

    fn selector(local: &str, remote: &str) -> Selector {
        let range = |net: &str| net.parse::<ipnet::IpNet>().unwrap().into();
        Selector {
            local: range(local),
            remote: range(remote),
            protocol: None,
            local_ports: 0..=u16::MAX,
            remote_ports: 0..=u16::MAX,
        }
    }

    fn flow(source: IpAddr, destination: IpAddr, protocol: Protocol, ports: Option<(u16, u16)>) -> Flow {
        let (source_port, destination_port) = ports.unwrap_or((0, 0));
        Flow {
            source,
            destination,
            protocol,
            source_port,
            destination_port,
            ports_known: ports.is_some(),
            header_len: 20,
            next_header_at: 9,
            total_len: 100,
            tos: 0,
            ttl: 64,
            dont_fragment: false,
            fragment: Fragment::No,
        }
    }

    /// Packed, and as many are kept.
    fn both(selector: &Selector) -> [Selectors; 2] {
        let packed = Selectors::new(std::slice::from_ref(selector));
        assert!(matches!(packed.0, Kept::V4(_)));
        [packed, Selectors(Kept::Any(Box::new([selector.clone()])))]
    }

    /// A fragment, whose ports are hidden, matches no selector that asks for ports, not even a port 0.
    #[test]
    fn unknown_ports_match_the_full_range_only() {
        let mut narrow = selector("0.0.0.0/0", "0.0.0.0/0");
        narrow.remote_ports = 0..=65534;
        let hidden = flow([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), Protocol::UDP, None);
        for narrow in both(&narrow) {
            assert!(!narrow.match_outbound(&hidden) && !narrow.match_inbound(&hidden));
        }
        narrow.remote_ports = 0..=u16::MAX;
        for full in both(&narrow) {
            assert!(full.match_outbound(&hidden) && full.match_inbound(&hidden));
        }
        assert!(!Selectors::new(&[]).match_inbound(&hidden));
    }

    /// RFC 4301 section 5.2: inbound the peer's side is the source.
    #[test]
    fn inbound_is_the_mirror_of_outbound() {
        let selector = Selector {
            protocol: Some(Protocol::TCP),
            local_ports: 443..=443,
            remote_ports: 1024..=2000,
            ..selector("10.0.0.0/24", "192.0.2.0/24")
        };
        let out = flow([10, 0, 0, 1].into(), [192, 0, 2, 1].into(), Protocol::TCP, Some((443, 1500)));
        let back = flow([192, 0, 2, 1].into(), [10, 0, 0, 1].into(), Protocol::TCP, Some((1500, 443)));
        for selectors in both(&selector) {
            assert!(selectors.match_outbound(&out) && !selectors.match_inbound(&out));
            assert!(selectors.match_inbound(&back) && !selectors.match_outbound(&back));
            assert!(!selectors.match_inbound(&Flow { protocol: Protocol::UDP, ..back }));
            assert!(!selectors.match_inbound(&Flow { source_port: 1023, ..back }));
            assert!(!selectors.match_inbound(&Flow { destination_port: 444, ..back }));
            assert!(!selectors.match_inbound(&Flow { source: [192, 0, 3, 1].into(), ..back }));
        }
    }

    /// Each of several counts, of either family; nothing of a description is lost.
    #[test]
    fn several_selectors() {
        let described =
            [selector("10.0.0.0/24", "192.0.2.0/24"), selector("2001:db8:1::/64", "2001:db8:2::/64")];
        let selectors = Selectors::new(&described);
        let v4 = flow([10, 0, 0, 1].into(), [192, 0, 2, 1].into(), Protocol::UDP, None);
        let v6 = Flow {
            source: "2001:db8:1::1".parse().unwrap(),
            destination: "2001:db8:2::1".parse().unwrap(),
            ..v4
        };
        assert!(selectors.match_outbound(&v4) && selectors.match_outbound(&v6));
        assert!(!selectors.match_outbound(&Flow { destination: v6.destination, ..v4 }));
        assert_eq!(selectors.to_vec(), described);
        assert_eq!(selectors.first_remote(), Some(described[0].remote));
        assert!(!Selectors::new(&described[..1]).match_outbound(&v6));
    }

    fn narrow<T: Ord>((a, b): (T, T)) -> (T, T) {
        if a <= b { (a, b) } else { (b, a) }
    }

    proptest! {
        /// Packing changes neither what is matched nor what is told of it.
        #[test]
        fn packed_agrees_with_unpacked(
            addresses in any::<[(u8, u8); 2]>(),
            ports in any::<[(u16, u16); 2]>(),
            protocol in prop::option::of(0_u8..3),
            packets in prop::collection::vec(any::<(u8, u8, u8, Option<(u16, u16)>)>(), 1..20),
        ) {
            let address = |low: u8| IpAddr::from([10, 0, 0, low]);
            let range = |ends| {
                let (start, end) = narrow(ends);
                AddressRange { start: address(start), end: address(end) }
            };
            let ports = ports.map(narrow);
            let selector = Selector {
                local: range(addresses[0]),
                remote: range(addresses[1]),
                protocol: protocol.map(Protocol),
                local_ports: ports[0].0..=ports[0].1,
                remote_ports: ports[1].0..=ports[1].1,
            };
            let [packed, unpacked] = both(&selector);
            prop_assert_eq!(packed.to_vec(), vec![selector.clone()]);
            prop_assert_eq!(packed.first_remote(), Some(selector.remote));
            for (source, destination, protocol, ports) in packets {
                let flow = flow(address(source), address(destination), Protocol(protocol % 3), ports);
                prop_assert_eq!(packed.match_outbound(&flow), unpacked.match_outbound(&flow));
                prop_assert_eq!(packed.match_inbound(&flow), unpacked.match_inbound(&flow));
            }
        }
    }
}
