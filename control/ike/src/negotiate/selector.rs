//! Traffic selectors: narrowing (RFC 7296 section 2.9), and what they are in words.
//!
//! A list of selectors is the set of packets that any one of them matches. [`narrow`] keeps of an offered list what is
//! configured too, and never more. The peer's first selector may be one packet's (section 2.9: "a very specific Traffic
//! Selector including the addresses in the packet triggering the request"); since all of the common set is kept, that
//! packet is still in it if the policy lets it through at all.
//!
//! "Opaque" ports (section 3.13.1) are an empty range here, which has nothing in common with any: the datapath's full
//! range matches packets without ports already.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::ops::RangeInclusive;

use ipnet::IpNet;

use crate::message::TrafficSelector;
use crate::message::parse::MAX_SELECTORS;

/// Every port.
pub const ANY_PORT: RangeInclusive<u16> = 0..=u16::MAX;

impl TrafficSelector {
    /// A network, with an upper-layer protocol (0: any) and ports.
    pub fn new(net: IpNet, protocol: u8, ports: RangeInclusive<u16>) -> Self {
        Self { start: net.network(), end: net.broadcast(), protocol, ports }
    }

    /// One address, with an upper-layer protocol (0: any) and ports.
    pub fn host(address: IpAddr, protocol: u8, ports: RangeInclusive<u16>) -> Self {
        Self { start: address, end: address, protocol, ports }
    }

    /// Whether a packet with this address, protocol and port is in it.
    pub fn matches(&self, address: IpAddr, protocol: u8, port: u16) -> bool {
        self.holds(address) && (self.protocol == 0 || self.protocol == protocol) && self.ports.contains(&port)
    }

    /// Whether the address is in it.
    pub fn holds(&self, address: IpAddr) -> bool {
        // Addresses of different families compare too, v4 below v6.
        self.start.is_ipv4() == address.is_ipv4() && (self.start..=self.end).contains(&address)
    }

    /// The packets that are in both; `None` if there are none.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        if self.start.is_ipv4() != other.start.is_ipv4() {
            return None;
        }
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        let ports = *self.ports.start().max(other.ports.start())..=*self.ports.end().min(other.ports.end());
        let protocol = match (self.protocol, other.protocol) {
            (0, protocol) | (protocol, 0) => protocol,
            (one, another) if one == another => one,
            _ => return None,
        };
        (start <= end && !ports.is_empty()).then_some(Self { start, end, protocol, ports })
    }
}

/// All addresses of the network, with every protocol and port.
impl From<IpNet> for TrafficSelector {
    fn from(net: IpNet) -> Self {
        Self::new(net, 0, ANY_PORT)
    }
}

/// One address, with every protocol and port.
impl From<IpAddr> for TrafficSelector {
    fn from(address: IpAddr) -> Self {
        Self::host(address, 0, ANY_PORT)
    }
}

/// What is in both lists, in the order of the offered one: empty is TS_UNACCEPTABLE. At most as many selectors as are
/// read of a peer ([`MAX_SELECTORS`]); what is left out then is a narrower choice, not a wrong one.
pub fn narrow(configured: &[TrafficSelector], offered: &[TrafficSelector]) -> Vec<TrafficSelector> {
    let mut narrowed: Vec<TrafficSelector> = Vec::new();
    let pairs =
        offered.iter().flat_map(|theirs| configured.iter().filter_map(|ours| ours.intersection(theirs)));
    for common in pairs {
        if narrowed.iter().any(|known| covers(known, &common)) {
            continue;
        }
        // What holds the packet that it is about stays first, for a peer that takes only one.
        let place = narrowed.iter().position(|known| covers(&common, known)).unwrap_or(narrowed.len());
        narrowed.retain(|known| !covers(&common, known));
        if narrowed.len() == MAX_SELECTORS {
            break;
        }
        narrowed.insert(place, common);
    }
    narrowed
}

/// Whether all of `inner` is in `outer`.
pub fn covers(outer: &TrafficSelector, inner: &TrafficSelector) -> bool {
    outer.intersection(inner).as_ref() == Some(inner)
}

/// Whether each of `inner` is in one of `outer`: what an answer to our offer has to be.
pub fn all_covered(outer: &[TrafficSelector], inner: &[TrafficSelector]) -> bool {
    inner.iter().all(|inner| outer.iter().any(|outer| covers(outer, inner)))
}

/// As `10.1.0.0/24[tcp/80]`, `10.1.0.7`, or `10.1.0.5-10.1.0.9[udp/1000-2000]`.
impl fmt::Display for TrafficSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match prefix(self.start, self.end) {
            Some((_, 32)) if self.start.is_ipv4() => write!(f, "{}", self.start)?,
            Some((_, 128)) => write!(f, "{}", self.start)?,
            Some((address, length)) => write!(f, "{address}/{length}")?,
            None => write!(f, "{}-{}", self.start, self.end)?,
        }
        let any_port = self.ports == ANY_PORT;
        match (self.protocol, any_port) {
            (0, true) => return Ok(()),
            (0, false) => f.write_str("[any")?,
            (1, _) => f.write_str("[icmp")?,
            (6, _) => f.write_str("[tcp")?,
            (17, _) => f.write_str("[udp")?,
            (58, _) => f.write_str("[ipv6-icmp")?,
            (132, _) => f.write_str("[sctp")?,
            (other, _) => write!(f, "[{other}")?,
        }
        if !any_port {
            write_ports(f, self.protocol, *self.ports.start(), *self.ports.end())?;
        }
        f.write_str("]")
    }
}

fn write_ports(f: &mut fmt::Formatter<'_>, protocol: u8, first: u16, last: u16) -> fmt::Result {
    let ([first_type, first_code], [last_type, last_code]) = (first.to_be_bytes(), last.to_be_bytes());
    let icmp = protocol == 1 || protocol == 58;
    match () {
        () if (first, last) == (u16::MAX, 0) => f.write_str("/opaque"),
        () if icmp && first == last => write!(f, "/{first_type}({first_code})"),
        () if icmp && first_type == last_type && (first_code, last_code) == (0, 255) => {
            write!(f, "/{first_type}")
        }
        () if icmp => write!(f, "/{first_type}({first_code})-{last_type}({last_code})"),
        () if first == last => write!(f, "/{first}"),
        () => write!(f, "/{first}-{last}"),
    }
}

/// The network that is exactly this range, if there is one.
fn prefix(start: IpAddr, end: IpAddr) -> Option<(IpAddr, u8)> {
    // Below the common bits, all are 0 in the first address and 1 in the last.
    let length = match (start, end) {
        (IpAddr::V4(start), IpAddr::V4(end)) => (u32::from(start) ^ u32::from(end)).leading_zeros(),
        (IpAddr::V6(start), IpAddr::V6(end)) => (u128::from(start) ^ u128::from(end)).leading_zeros(),
        _ => return None,
    };
    let net = IpNet::new(start, u8::try_from(length).ok()?).ok()?;
    ((net.network(), net.broadcast()) == (start, end)).then_some((start, net.prefix_len()))
}

/// Several selectors, for a message. Cut short, since a peer says how many there are.
#[derive(Clone, Copy, Debug)]
pub struct List<'a>(pub &'a [TrafficSelector]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 8;
        let mut between = "";
        for selector in self.0.iter().take(MOST) {
            write!(f, "{between}{selector}")?;
            between = ", ";
        }
        match self.0.len() {
            0 => f.write_str("nothing"),
            1..=MOST => Ok(()),
            many => write!(f, " and {} more", many - MOST),
        }
    }
}

/// Every IPv4 address, and every IPv6 address: what a client offers as the peer's side if nothing narrower is configured.
pub fn everything() -> [TrafficSelector; 2] {
    let v4 = TrafficSelector {
        start: Ipv4Addr::UNSPECIFIED.into(),
        end: Ipv4Addr::BROADCAST.into(),
        protocol: 0,
        ports: ANY_PORT,
    };
    let last = Ipv6Addr::from_bits(u128::MAX);
    let v6 = TrafficSelector { start: Ipv6Addr::UNSPECIFIED.into(), end: last.into(), ..v4.clone() };
    [v4, v6]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> TrafficSelector {
        text.parse::<IpNet>().unwrap().into()
    }

    fn range(start: &str, end: &str) -> TrafficSelector {
        TrafficSelector {
            start: start.parse().unwrap(),
            end: end.parse().unwrap(),
            protocol: 0,
            ports: ANY_PORT,
        }
    }

    fn text(selectors: &[TrafficSelector]) -> String {
        List(selectors).to_string()
    }

    #[test]
    fn in_words() {
        let tcp = |ports| TrafficSelector { protocol: 6, ports, ..net("10.1.0.0/24") };
        let icmp = |ports| TrafficSelector { protocol: 1, ports, ..net("10.1.0.0/24") };
        for (selector, expected) in [
            (net("10.1.0.0/24"), "10.1.0.0/24"),
            (net("10.1.0.7/32"), "10.1.0.7"),
            (net("0.0.0.0/0"), "0.0.0.0/0"),
            (net("::/0"), "::/0"),
            (net("2001:db8::/32"), "2001:db8::/32"),
            (net("2001:db8::1/128"), "2001:db8::1"),
            (net("2001:db8::/127"), "2001:db8::/127"),
            (range("10.1.0.5", "10.1.0.9"), "10.1.0.5-10.1.0.9"),
            (range("10.1.0.1", "10.1.0.2"), "10.1.0.1-10.1.0.2"),
            (tcp(80..=80), "10.1.0.0/24[tcp/80]"),
            (tcp(80..=90), "10.1.0.0/24[tcp/80-90]"),
            (tcp(ANY_PORT), "10.1.0.0/24[tcp]"),
            #[expect(clippy::reversed_empty_ranges, reason = "this is how section 3.13.1 writes it")]
            (tcp(65535..=0), "10.1.0.0/24[tcp/opaque]"),
            (TrafficSelector { protocol: 0, ..tcp(1..=1) }, "10.1.0.0/24[any/1]"),
            (TrafficSelector { protocol: 47, ..tcp(ANY_PORT) }, "10.1.0.0/24[47]"),
            (icmp(0x0800..=0x08ff), "10.1.0.0/24[icmp/8]"),
            (icmp(0x0301..=0x0301), "10.1.0.0/24[icmp/3(1)]"),
            (icmp(0x0301..=0x0402), "10.1.0.0/24[icmp/3(1)-4(2)]"),
        ] {
            assert_eq!(selector.to_string(), expected);
        }
        assert_eq!(text(&[]), "nothing");
        assert_eq!(
            text(&vec![net("10.0.0.0/8"); 9]),
            format!("{}10.0.0.0/8 and 1 more", "10.0.0.0/8, ".repeat(7))
        );
        assert_eq!(text(&everything()), "0.0.0.0/0, ::/0");
    }

    /// IKE-1: the example of RFC 7296 section 2.9: Alice offers the packet's selector and all of her policy, Bob allows a
    /// part.
    #[test]
    fn ike_1_narrowing() {
        let packet =
            TrafficSelector { protocol: 17, ports: 555..=555, ..range("198.51.100.66", "198.51.100.66") };
        let offered = [packet.clone(), net("198.51.100.0/24")];
        let bob = [range("198.51.100.66", "198.51.100.70")];
        assert_eq!(text(&narrow(&bob, &offered)), "198.51.100.66-198.51.100.70");
        assert!(narrow(&bob, &offered).iter().any(|selector| covers(selector, &packet)));
        // Bob allows that packet's protocol only.
        let bob = [TrafficSelector { protocol: 17, ..net("198.51.100.64/26") }];
        assert_eq!(text(&narrow(&bob, &offered)), "198.51.100.64/26[udp]");
        // Two disjoint parts.
        let bob = [net("198.51.100.0/28"), net("198.51.100.64/28"), net("192.0.2.0/24")];
        assert_eq!(text(&narrow(&bob, &offered)), "198.51.100.64/28, 198.51.100.0/28");
        assert_eq!(text(&narrow(&[net("192.0.2.0/24")], &offered)), "nothing");
        assert_eq!(text(&narrow(&[net("::/0")], &offered)), "nothing");
        assert_eq!(text(&narrow(&[], &offered)), "nothing");
        assert_eq!(
            text(&narrow(&everything(), &[net("10.0.0.0/8"), net("2001:db8::/32")])),
            "10.0.0.0/8, 2001:db8::/32"
        );
        #[expect(clippy::reversed_empty_ranges, reason = "this is how section 3.13.1 writes it")]
        let opaque = TrafficSelector { ports: 65535..=0, ..net("10.0.0.0/8") };
        assert_eq!(text(&narrow(&everything(), &[opaque])), "nothing");
    }

    /// A peer's list times ours is not the length of the answer.
    #[test]
    fn narrowing_is_bounded() {
        let ours: Vec<_> = (0..200)
            .map(|port| TrafficSelector { protocol: 6, ports: port * 2..=port * 2, ..net("0.0.0.0/0") })
            .collect();
        let theirs: Vec<_> = (0..64_u8).map(|byte| net(&format!("10.{byte}.0.0/16"))).collect();
        let narrowed = narrow(&ours, &theirs);
        assert_eq!(narrowed.len(), MAX_SELECTORS);
        assert!(all_covered(&ours, &narrowed) && all_covered(&theirs, &narrowed));
    }

    fn small() -> impl Strategy<Value = TrafficSelector> {
        let protocol = prop::sample::select(vec![0_u8, 6, 17]);
        (any::<bool>(), 0_u8..6, 0_u8..6, protocol, 0_u16..5, 0_u16..5).prop_map(
            |(v6, a, b, protocol, c, d)| {
                let address = |byte: u8| {
                    if v6 {
                        IpAddr::from(Ipv6Addr::from_bits(byte.into()))
                    } else {
                        IpAddr::from(Ipv4Addr::from_bits(byte.into()))
                    }
                };
                TrafficSelector { start: address(a.min(b)), end: address(a.max(b)), protocol, ports: c..=d }
            },
        )
    }

    proptest! {
        /// IKE-1: packet by packet, what is narrowed is what both lists have, and nothing in it is said twice.
        #[test]
        fn ike_1_narrowed_is_the_intersection(
            ours in prop::collection::vec(small(), 0..5),
            theirs in prop::collection::vec(small(), 0..5),
        ) {
            let narrowed = narrow(&ours, &theirs);
            let any = |list: &[TrafficSelector], address, protocol, port| {
                list.iter().any(|selector| selector.matches(address, protocol, port))
            };
            for byte in 0_u8..7 {
                for address in [IpAddr::from(Ipv4Addr::from_bits(byte.into())), IpAddr::from(Ipv6Addr::from_bits(byte.into()))] {
                    for protocol in [6, 17, 50] {
                        for port in 0..6 {
                            prop_assert_eq!(
                                any(&narrowed, address, protocol, port),
                                any(&ours, address, protocol, port) && any(&theirs, address, protocol, port)
                            );
                        }
                    }
                }
            }
            prop_assert!(all_covered(&ours, &narrowed) && all_covered(&theirs, &narrowed));
            for (index, one) in narrowed.iter().enumerate() {
                for (other_index, other) in narrowed.iter().enumerate() {
                    prop_assert!(index == other_index || !covers(one, other), "{} covers {}", one, other);
                }
            }
            prop_assert_eq!(&narrow(&narrowed, &narrowed), &narrowed);
            prop_assert_eq!(narrow(&theirs, &ours).is_empty(), narrowed.is_empty());
        }

        /// A network reads back from its text.
        #[test]
        fn network_in_words(address: u32, length in 0_u8..=32) {
            let net = IpNet::new(IpAddr::from(Ipv4Addr::from_bits(address)), length).unwrap().trunc();
            let text = TrafficSelector::from(net).to_string();
            let expected = if length == 32 { net.addr().to_string() } else { net.to_string() };
            prop_assert_eq!(text, expected);
        }
    }
}
