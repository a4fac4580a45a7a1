//! The outbound half of the security policy database (RFC 4301 section 4.4.1), one replica per worker.
//!
//! A policy is found by the packet's destination (MOB-1: the terminal's *inner* address, never its outer one):
//! policies for single hosts through a hash table, all others through a trie of the prefixes that make up their
//! ranges. Every policy whose remote range holds the destination is considered, and of those that match the one with
//! the lowest priority wins, then the lowest id:
//!
//! > "The SPD is an ordered database, consistent with the use of Access Control Lists (ACLs) or packet filters in
//! > firewalls, routers, etc." (RFC 4301 section 4.4.1)
//!
//! A change costs a hash table update, or one trie update for each prefix of the policy's ranges (at most 62 for IPv4
//! and 254 for IPv6). Policies with the *same* remote prefix are tried one after the other, in order, so many of
//! them that differ only in their local addresses make lookups slow.
//!
//! The inbound check after decryption is [`Selectors::match_inbound`].

use core::hash::BuildHasher;
use core::net::IpAddr;
use core::slice;

use hashbrown::{DefaultHashBuilder, HashTable};
use ipnet::{IpNet, IpSubnets, Ipv4Net, Ipv4Subnets, Ipv6Net, Ipv6Subnets};
use postern_contract::sa::{Action, AddressRange, Policy, PolicyId, Selector};
use postern_wire::flow::Flow;
use prefix_trie::{Prefix, PrefixMap};

use crate::selectors::Selectors;

/// What is to be done with an outbound packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<T> {
    /// Protect it with the SA behind the handle; without one it is dropped and an `Acquire` event raised.
    Protect(PolicyId, Option<T>),
    /// Forward it as it is.
    Bypass,
    /// Drop it.
    Discard,
    /// No policy matches. RFC 4301 section 5: "If no policy is found in the SPD that matches a packet (for either
    /// inbound or outbound traffic), the packet MUST be discarded."
    None,
}

/// Outbound policies. `T` is what the worker keeps in place of an SA's name, to save a lookup per packet.
#[derive(Clone, Debug)]
pub struct Spd<T> {
    rules: Vec<Rule<T>>,
    /// Indices of `rules` that are not in use.
    free: Vec<u32>,
    /// For each policy one of its rules, the others follow by `sibling`.
    policies: HashTable<u32>,
    /// Rules whose remote range is one address.
    hosts: HashTable<Node>,
    v4: Ranges<Ipv4Net>,
    v6: Ranges<Ipv6Net>,
    lists: Lists,
    hash: DefaultHashBuilder,
}

/// One selector of one policy, with all that a verdict needs.
#[derive(Clone, Debug)]
struct Rule<T> {
    /// One of them, as [`Selectors`] keep it.
    selector: Selectors,
    priority: u32,
    policy: PolicyId,
    /// Another rule of the same policy, [`END`] for none.
    sibling: u32,
    action: Kind<T>,
}

#[derive(Clone, Copy, Debug)]
enum Kind<T> {
    Protect(Option<T>),
    Bypass,
    Discard,
}

const END: u32 = u32::MAX;

/// Nodes by prefix, with the lengths that occur: `PrefixMap::cover` would allocate for each packet.
#[derive(Clone, Debug)]
struct Ranges<P: Prefix> {
    map: PrefixMap<P, Node>,
    /// How many prefixes have a length; those of all bits are not counted, as nothing is longer.
    counts: [u32; 128],
    /// The lengths that are not zero in `counts`, as bits.
    lengths: u128,
}

impl<P: Prefix> Default for Ranges<P> {
    fn default() -> Self {
        Self { map: PrefixMap::new(), counts: [0; 128], lengths: 0 }
    }
}

impl<P: Prefix> Ranges<P> {
    fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    fn get_mut(&mut self, net: &P) -> Option<&mut Node> {
        self.map.get_mut(net)
    }

    /// Enters a prefix that is not there yet.
    fn insert(&mut self, net: P, node: Node) {
        let length = net.prefix_len();
        if let Some(count) = self.counts.get_mut(usize::from(length)) {
            *count += 1;
            self.lengths |= 1 << length;
        }
        self.map.insert(net, node);
    }

    fn remove(&mut self, net: &P) {
        let length = net.prefix_len();
        if self.map.remove(net).is_some()
            && let Some(count) = self.counts.get_mut(usize::from(length))
        {
            *count -= 1;
            if *count == 0 {
                self.lengths &= !(1 << length);
            }
        }
    }

    /// Calls `visit` with the node of every prefix that holds `host`, the longest first.
    #[inline]
    fn cover(&self, host: P, mut visit: impl FnMut(Node)) {
        let mut net = host;
        while let Some((found, node)) = self.map.get_lpm(&net) {
            visit(*node);
            // The longest length that occurs below the one found; 128 is not among the bits, and shifts them all out.
            let shorter = self.lengths & !u128::MAX.checked_shl(found.prefix_len().into()).unwrap_or(0);
            let Some(length) = shorter.checked_ilog2().and_then(|length| u8::try_from(length).ok()) else {
                return;
            };
            net = P::from_repr_len(found.repr(), length);
        }
    }
}

// A million host policies are to fit beside a million SAs.
const _: () = assert!(size_of::<Rule<u32>>() <= 64);

impl<T> Rule<T> {
    /// The order of policies; the index makes it an order of rules.
    fn rank(&self) -> (u32, PolicyId) {
        (self.priority, self.policy)
    }
}

impl<T: Copy> Default for Spd<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Copy> Spd<T> {
    /// No policies.
    pub fn new() -> Self {
        Self {
            rules: Vec::new(),
            free: Vec::new(),
            policies: HashTable::new(),
            hosts: HashTable::new(),
            v4: Ranges::default(),
            v6: Ranges::default(),
            lists: Lists::default(),
            hash: DefaultHashBuilder::default(),
        }
    }

    /// Number of policies.
    pub fn len(&self) -> usize {
        self.policies.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// Adds a policy or replaces the one with its id. `handle` is of use with [`Action::Protect`] only. A policy
    /// without selectors matches nothing and is not kept.
    pub fn insert(&mut self, policy: &Policy, handle: Option<T>) {
        let Policy { id, generation: _, priority, selectors, action } = policy;
        self.remove(*id);
        let action = match action {
            Action::Protect(_) => Kind::Protect(handle),
            Action::Bypass => Kind::Bypass,
            Action::Discard => Kind::Discard,
        };
        let mut sibling = END;
        for selector in selectors {
            let remote = selector.remote;
            let selector = Selectors::new(slice::from_ref(selector));
            let rule = Rule { selector, priority: *priority, policy: *id, sibling, action };
            // Memory for 2^31 rules does not exist.
            let Some(index) = self.store(rule) else { break };
            self.link(index, remote);
            sibling = index;
        }
        if sibling != END {
            let (hash, rules) = (&self.hash, &self.rules);
            let hash_of =
                |index: &u32| hash.hash_one(rules.get(slot(*index)).map_or(0, |rule| rule.policy.0));
            self.policies.insert_unique(hash.hash_one(id.0), sibling, hash_of);
        }
    }

    /// Takes a policy away; false if there was none with this id.
    pub fn remove(&mut self, policy: PolicyId) -> bool {
        let rules = &self.rules;
        let found =
            self.policies.find_entry(self.hash.hash_one(policy.0), |index| is_of(rules, *index, policy));
        let Ok(entry) = found else { return false };
        let (mut index, _) = entry.remove();
        while let Some((remote, sibling)) =
            self.rules.get(slot(index)).and_then(|r| Some((r.selector.first_remote()?, r.sibling)))
        {
            self.unlink(index, remote);
            self.free.push(index);
            index = sibling;
        }
        true
    }

    /// Gives a protecting policy another SA, which is all that a rekey changes; false if there is no such policy.
    pub fn set_handle(&mut self, policy: PolicyId, handle: Option<T>) -> bool {
        let rules = &self.rules;
        let found = self.policies.find(self.hash.hash_one(policy.0), |index| is_of(rules, *index, policy));
        let Some(mut index) = found.copied() else { return false };
        let mut protects = false;
        while let Some(rule) = self.rules.get_mut(slot(index)) {
            if let Kind::Protect(current) = &mut rule.action {
                *current = handle;
                protects = true;
            }
            index = rule.sibling;
        }
        protects
    }

    /// What the first policy in order that matches `flow` says.
    pub fn lookup(&self, flow: &Flow) -> Verdict<T> {
        let mut best = None;
        if !self.hosts.is_empty()
            && let Some(node) = self.host(flow.destination)
        {
            self.scan(*node, flow, &mut best);
        }
        match flow.destination {
            IpAddr::V4(address) if !self.v4.is_empty() => {
                self.v4.cover(Ipv4Net::from(address), |node| self.scan(node, flow, &mut best));
            }
            IpAddr::V6(address) if !self.v6.is_empty() => {
                self.v6.cover(Ipv6Net::from(address), |node| self.scan(node, flow, &mut best));
            }
            _ => {}
        }
        match best {
            None => Verdict::None,
            Some(Rule { action: Kind::Protect(handle), policy, .. }) => Verdict::Protect(*policy, *handle),
            Some(Rule { action: Kind::Bypass, .. }) => Verdict::Bypass,
            Some(Rule { action: Kind::Discard, .. }) => Verdict::Discard,
        }
    }

    /// Looks through the rules of one prefix for one that goes before `best`.
    #[inline]
    fn scan<'a>(&'a self, node: Node, flow: &Flow, best: &mut Option<&'a Rule<T>>) {
        for index in self.lists.rules(&node) {
            let Some(rule) = self.rules.get(slot(*index)) else { continue };
            if best.is_some_and(|best| best.rank() <= rule.rank()) {
                return;
            }
            if rule.selector.match_outbound(flow) {
                *best = Some(rule);
                return;
            }
        }
    }

    fn host(&self, address: IpAddr) -> Option<&Node> {
        self.hosts.find(hash_address(&self.hash, address), |node| self.host_of(*node) == Some(address))
    }

    fn host_of(&self, node: Node) -> Option<IpAddr> {
        host_of(&self.rules, &self.lists, node)
    }

    fn store(&mut self, rule: Rule<T>) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            *self.rules.get_mut(slot(index))? = rule;
            return Some(index);
        }
        let index = u32::try_from(self.rules.len()).ok().filter(|index| index & LIST == 0)?;
        self.rules.push(rule);
        Some(index)
    }

    /// Enters a stored rule under its remote addresses.
    fn link(&mut self, index: u32, remote: AddressRange) {
        let Self { rules, hosts, v4, v6, lists, hash, .. } = self;
        if remote.start == remote.end {
            let key = hash_address(hash, remote.start);
            match hosts.find_mut(key, |node| host_of(rules, lists, *node) == Some(remote.start)) {
                Some(node) => lists.add(node, index, rules),
                None => {
                    hosts.insert_unique(key, Node(index), |node| {
                        host_of(rules, lists, *node).map_or(0, |address| hash_address(hash, address))
                    });
                }
            }
            return;
        }
        for net in split(remote) {
            let node = match net {
                IpNet::V4(net) => v4.get_mut(&net),
                IpNet::V6(net) => v6.get_mut(&net),
            };
            match (node, net) {
                (Some(node), _) => lists.add(node, index, rules),
                (None, IpNet::V4(net)) => {
                    v4.insert(net, Node(index));
                }
                (None, IpNet::V6(net)) => {
                    v6.insert(net, Node(index));
                }
            }
        }
    }

    fn unlink(&mut self, index: u32, remote: AddressRange) {
        let Self { rules, hosts, v4, v6, lists, hash, .. } = self;
        if remote.start == remote.end {
            let key = hash_address(hash, remote.start);
            let found = hosts.find_entry(key, |node| host_of(rules, lists, *node) == Some(remote.start));
            if let Ok(mut entry) = found
                && lists.take(entry.get_mut(), index, rules)
            {
                entry.remove();
            }
            return;
        }
        for net in split(remote) {
            match net {
                IpNet::V4(net) => {
                    if v4.get_mut(&net).is_some_and(|node| lists.take(node, index, rules)) {
                        v4.remove(&net);
                    }
                }
                IpNet::V6(net) => {
                    if v6.get_mut(&net).is_some_and(|node| lists.take(node, index, rules)) {
                        v6.remove(&net);
                    }
                }
            }
        }
    }
}

/// The prefixes that make up the selectors' remote ranges: what XDP has to steer to the workers. A prefix may come twice.
pub fn prefixes(selectors: &[Selector]) -> impl Iterator<Item = IpNet> {
    selectors.iter().flat_map(|selector| split(selector.remote))
}

fn split(range: AddressRange) -> impl Iterator<Item = IpNet> {
    let subnets = match (range.start, range.end) {
        _ if !range.is_valid() => None,
        (IpAddr::V4(start), IpAddr::V4(end)) => Some(IpSubnets::V4(Ipv4Subnets::new(start, end, 0))),
        (IpAddr::V6(start), IpAddr::V6(end)) => Some(IpSubnets::V6(Ipv6Subnets::new(start, end, 0))),
        _ => None,
    };
    subnets.into_iter().flatten()
}

/// The rules of one remote prefix: the index of the only one, or with [`LIST`] set that of a list.
#[derive(Clone, Copy, Debug)]
struct Node(u32);

const LIST: u32 = 1 << 31;

/// Lists of two or more rules, each in order of rank.
#[derive(Clone, Debug, Default)]
struct Lists {
    lists: Vec<Vec<u32>>,
    free: Vec<u32>,
}

impl Lists {
    fn rules<'a>(&'a self, node: &'a Node) -> &'a [u32] {
        if node.0 & LIST == 0 {
            slice::from_ref(&node.0)
        } else {
            self.lists.get(slot(node.0 & !LIST)).map_or(&[], Vec::as_slice)
        }
    }

    fn add<T>(&mut self, node: &mut Node, index: u32, rules: &[Rule<T>]) {
        if node.0 & LIST == 0 {
            let list = self.free.pop().or_else(|| {
                self.lists.push(Vec::new());
                u32::try_from(self.lists.len() - 1).ok()
            });
            let Some(list) = list else { return };
            if let Some(entries) = self.lists.get_mut(slot(list)) {
                entries.push(node.0);
                *node = Node(list | LIST);
            }
        }
        let Some(entries) = self.lists.get_mut(slot(node.0 & !LIST)) else { return };
        let at = entries.partition_point(|other| order(rules, *other) < order(rules, index));
        entries.insert(at, index);
    }

    /// Takes a rule out; true if the node is empty now.
    fn take<T>(&mut self, node: &mut Node, index: u32, rules: &[Rule<T>]) -> bool {
        if node.0 & LIST == 0 {
            return node.0 == index;
        }
        let list = node.0 & !LIST;
        let Some(entries) = self.lists.get_mut(slot(list)) else { return true };
        if let Ok(at) = entries.binary_search_by_key(&order(rules, index), |other| order(rules, *other)) {
            entries.remove(at);
        }
        if let [only] = entries.as_slice() {
            *node = Node(*only);
            *entries = Vec::new();
            self.free.push(list);
        }
        false
    }
}

fn order<T>(rules: &[Rule<T>], index: u32) -> Option<((u32, PolicyId), u32)> {
    rules.get(slot(index)).map(|rule| (rule.rank(), index))
}

fn is_of<T>(rules: &[Rule<T>], index: u32, policy: PolicyId) -> bool {
    rules.get(slot(index)).is_some_and(|rule| rule.policy == policy)
}

/// The address of a node of the host table.
fn host_of<T>(rules: &[Rule<T>], lists: &Lists, node: Node) -> Option<IpAddr> {
    let first = lists.rules(&node).first()?;
    rules.get(slot(*first))?.selector.first_remote().map(|remote| remote.start)
}

fn hash_address(hash: &DefaultHashBuilder, address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(address) => hash.hash_one(address.to_bits()),
        IpAddr::V6(address) => hash.hash_one(address.to_bits()),
    }
}

fn slot(index: u32) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::ops::RangeInclusive;

    use postern_contract::Generation;
    use postern_contract::sa::SaId;
    use postern_wire::flow::Fragment;
    use postern_wire::ids::Protocol;
    use proptest::prelude::*;

    use super::*;

    fn range(net: &str) -> AddressRange {
        net.parse::<IpNet>().unwrap().into()
    }

    fn selector(local: &str, remote: &str) -> Selector {
        Selector {
            local: range(local),
            remote: range(remote),
            protocol: None,
            local_ports: 0..=u16::MAX,
            remote_ports: 0..=u16::MAX,
        }
    }

    fn policy(id: u64, priority: u32, selectors: Vec<Selector>, action: Action) -> Policy {
        Policy { id: PolicyId(id), generation: Generation(1), priority, selectors, action }
    }

    fn protect(id: u64, priority: u32, local: &str, remote: &str) -> Policy {
        policy(id, priority, vec![selector(local, remote)], Action::Protect(Some(SaId(id))))
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

    fn udp(source: &str, destination: &str) -> Flow {
        flow(source.parse().unwrap(), destination.parse().unwrap(), Protocol::UDP, Some((1000, 2000)))
    }

    /// MOB-1: found by the inner destination; host before net only where the priority says so.
    #[test]
    fn mob_1_lookup_by_inner_address() {
        let mut spd = Spd::new();
        spd.insert(&protect(1, 10, "10.0.0.0/8", "192.0.2.7/32"), Some(71_u32));
        spd.insert(&protect(2, 10, "10.0.0.0/8", "192.0.2.0/24"), Some(72));
        spd.insert(&policy(3, 5, vec![selector("10.9.0.0/16", "0.0.0.0/0")], Action::Bypass), None);
        spd.insert(&protect(4, 10, "2001:db8::/32", "2001:db8:9::1/128"), None);
        assert_eq!(spd.len(), 4);
        assert_eq!(spd.lookup(&udp("10.1.1.1", "192.0.2.7")), Verdict::Protect(PolicyId(1), Some(71)));
        assert_eq!(spd.lookup(&udp("10.1.1.1", "192.0.2.8")), Verdict::Protect(PolicyId(2), Some(72)));
        assert_eq!(spd.lookup(&udp("10.9.1.1", "192.0.2.7")), Verdict::Bypass);
        assert_eq!(spd.lookup(&udp("11.0.0.1", "192.0.2.7")), Verdict::None);
        assert_eq!(spd.lookup(&udp("2001:db8::5", "2001:db8:9::1")), Verdict::Protect(PolicyId(4), None));
        assert_eq!(spd.lookup(&udp("2001:db8::5", "2001:db8:9::2")), Verdict::None);
    }

    /// A rekey changes the handle and nothing else; all selectors of the policy follow.
    #[test]
    fn rekey_sets_the_handle() {
        let mut spd = Spd::new();
        let selectors = vec![selector("0.0.0.0/0", "192.0.2.1/32"), selector("0.0.0.0/0", "198.51.100.0/24")];
        spd.insert(&policy(1, 1, selectors, Action::Protect(None)), None);
        assert_eq!(spd.lookup(&udp("10.0.0.1", "198.51.100.9")), Verdict::Protect(PolicyId(1), None));
        assert!(spd.set_handle(PolicyId(1), Some(5_u32)));
        for destination in ["192.0.2.1", "198.51.100.9"] {
            assert_eq!(spd.lookup(&udp("10.0.0.1", destination)), Verdict::Protect(PolicyId(1), Some(5)));
        }
        assert!(!spd.set_handle(PolicyId(2), None));
        spd.insert(&policy(3, 1, vec![selector("0.0.0.0/0", "0.0.0.0/0")], Action::Discard), None);
        assert!(!spd.set_handle(PolicyId(3), Some(1)));
        assert!(spd.remove(PolicyId(1)) && !spd.remove(PolicyId(1)));
        assert_eq!(spd.lookup(&udp("10.0.0.1", "192.0.2.1")), Verdict::Discard);
    }

    /// Ranges that are no prefixes, the whole of both families, and ranges that are no ranges.
    #[test]
    fn ranges_are_split_into_prefixes() {
        let ranges = |start: &str, end: &str| {
            let remote = AddressRange { start: start.parse().unwrap(), end: end.parse().unwrap() };
            let selectors = vec![Selector { remote, ..selector("0.0.0.0/0", "0.0.0.0/0") }];
            prefixes(&selectors).map(|net| net.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(ranges("10.0.0.1", "10.0.0.4"), ["10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/32"]);
        assert_eq!(ranges("0.0.0.0", "255.255.255.255"), ["0.0.0.0/0"]);
        assert_eq!(ranges("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), ["::/0"]);
        assert_eq!(ranges("255.255.255.254", "255.255.255.255"), ["255.255.255.254/31"]);
        assert_eq!(ranges("::1", "::1"), ["::1/128"]);
        assert_eq!(ranges("0.0.0.1", "255.255.255.254").len(), 62);
        assert!(ranges("10.0.0.4", "10.0.0.1").is_empty());
        assert!(ranges("10.0.0.4", "::1").is_empty());
    }

    /// A million host policies fit beside a million SAs: at most 150 bytes each.
    #[test]
    fn host_policies_are_small() {
        const COUNT: u32 = 120_000;
        let mut spd = Spd::new();
        for n in 0..COUNT {
            let remote = AddressRange::from(IpNet::from(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n))));
            let selectors = vec![Selector { remote, ..selector("10.0.0.0/8", "10.0.0.0/8") }];
            spd.insert(&policy(n.into(), 1, selectors, Action::Protect(None)), Some(n));
        }
        let bytes = spd.rules.len() * size_of::<Rule<u32>>()
            + spd.policies.allocation_size()
            + spd.hosts.allocation_size();
        assert!(spd.lists.lists.is_empty() && spd.v4.is_empty());
        assert!(bytes / COUNT as usize <= 150, "{} bytes each", bytes / COUNT as usize);
    }

    /// Addresses close together, so that ranges overlap: `10.0.0.x`, `2001:db8::x` and the ends of the spaces.
    fn address(v6: bool, n: u8) -> IpAddr {
        match (v6, n) {
            (false, 0) => Ipv4Addr::UNSPECIFIED.into(),
            (false, 63..) => Ipv4Addr::BROADCAST.into(),
            (false, n) => Ipv4Addr::new(10, 0, 0, n).into(),
            (true, 0) => Ipv6Addr::UNSPECIFIED.into(),
            (true, 63..) => Ipv6Addr::from_bits(u128::MAX).into(),
            (true, n) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()).into(),
        }
    }

    fn arb_range(v6: bool) -> impl Strategy<Value = AddressRange> {
        (0_u8..64, 0_u8..64, any::<bool>()).prop_map(move |(a, b, host)| {
            let (a, b) = (a.min(b), a.max(b));
            AddressRange { start: address(v6, a), end: address(v6, if host { a } else { b }) }
        })
    }

    fn arb_ports() -> impl Strategy<Value = RangeInclusive<u16>> {
        prop_oneof![
            3 => Just(0..=u16::MAX),
            1 => (0_u16..8, 0_u16..8).prop_map(|(a, b)| a.min(b)..=a.max(b)),
        ]
    }

    fn arb_protocol() -> impl Strategy<Value = Protocol> {
        prop::sample::select(vec![Protocol::TCP, Protocol::UDP, Protocol::ICMP])
    }

    fn arb_selector() -> impl Strategy<Value = Selector> {
        any::<bool>()
            .prop_flat_map(|v6| {
                (arb_range(v6), arb_range(v6), prop::option::of(arb_protocol()), arb_ports(), arb_ports())
            })
            .prop_map(|(local, remote, protocol, local_ports, remote_ports)| {
                let local = if protocol.is_none() {
                    AddressRange {
                        start: address(local.start.is_ipv6(), 0),
                        end: address(local.start.is_ipv6(), 63),
                    }
                } else {
                    local
                };
                Selector { local, remote, protocol, local_ports, remote_ports }
            })
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, u32, Vec<Selector>, u8),
        Remove(u64),
        SetHandle(u64, Option<u32>),
    }

    fn arb_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0_u64..40, 0_u32..4, prop::collection::vec(arb_selector(), 0..4), 0_u8..3)
                .prop_map(|(id, priority, selectors, action)| Step::Insert(id, priority, selectors, action)),
            2 => (0_u64..40).prop_map(Step::Remove),
            1 => (0_u64..40, any::<Option<u32>>()).prop_map(|(id, handle)| Step::SetHandle(id, handle)),
        ]
    }

    fn arb_flow() -> impl Strategy<Value = Flow> {
        (any::<bool>(), 0_u8..64, 0_u8..64, arb_protocol(), prop::option::of((0_u16..9, 0_u16..9))).prop_map(
            |(v6, source, destination, protocol, ports)| {
                flow(address(v6, source), address(v6, destination), protocol, ports)
            },
        )
    }

    /// All policies in order, one after the other, each field compared as RFC 4301 section 4.4.1.1 says.
    fn oracle(policies: &BTreeMap<u64, (Policy, Option<u32>)>, flow: &Flow) -> Verdict<u32> {
        let mut ordered: Vec<_> = policies.values().collect();
        ordered.sort_by_key(|(policy, _)| (policy.priority, policy.id));
        for (policy, handle) in ordered {
            for s in &policy.selectors {
                let any = 0..=u16::MAX;
                let ports = |range: &RangeInclusive<u16>, port| {
                    *range == any || (flow.ports_known && range.contains(&port))
                };
                let hit = s.local.start.is_ipv4() == flow.source.is_ipv4()
                    && (s.local.start..=s.local.end).contains(&flow.source)
                    && (s.remote.start..=s.remote.end).contains(&flow.destination)
                    && s.protocol.is_none_or(|protocol| protocol == flow.protocol)
                    && ports(&s.local_ports, flow.source_port)
                    && ports(&s.remote_ports, flow.destination_port);
                if hit {
                    return match policy.action {
                        Action::Protect(_) => Verdict::Protect(policy.id, *handle),
                        Action::Bypass => Verdict::Bypass,
                        Action::Discard => Verdict::Discard,
                    };
                }
            }
        }
        Verdict::None
    }

    proptest! {
        /// The tables and a linear scan agree after any changes, and nothing is left when all is removed.
        #[test]
        fn agrees_with_a_linear_scan(
            steps in prop::collection::vec(arb_step(), 0..80),
            flows in prop::collection::vec(arb_flow(), 60),
        ) {
            let mut spd = Spd::new();
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(id, priority, selectors, action) => {
                        let action = match action {
                            0 => Action::Bypass,
                            1 => Action::Discard,
                            _ => Action::Protect(None),
                        };
                        let policy = policy(id, priority, selectors, action);
                        spd.insert(&policy, Some(priority));
                        model.insert(id, (policy, Some(priority)));
                    }
                    Step::Remove(id) => {
                        let known = model.remove(&id).is_some_and(|(policy, _)| !policy.selectors.is_empty());
                        prop_assert_eq!(spd.remove(PolicyId(id)), known);
                    }
                    Step::SetHandle(id, handle) => {
                        spd.set_handle(PolicyId(id), handle);
                        if let Some((_, current)) = model.get_mut(&id) {
                            *current = handle;
                        }
                    }
                }
            }
            for flow in &flows {
                prop_assert_eq!(spd.lookup(flow), oracle(&model, flow));
            }
            for id in model.keys() {
                spd.remove(PolicyId(*id));
            }
            prop_assert!(spd.is_empty() && spd.hosts.is_empty() && spd.v4.is_empty() && spd.v6.is_empty());
            prop_assert_eq!(spd.free.len(), spd.rules.len());
            prop_assert_eq!(spd.lists.free.len(), spd.lists.lists.len());
            prop_assert!(flows.iter().all(|flow| spd.lookup(flow) == Verdict::None));
        }
    }
}
