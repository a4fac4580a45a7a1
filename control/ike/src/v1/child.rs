//! CHILD_SAs of IKEv1: what is proposed and agreed for them, how they are installed, and their life.

use core::net::IpAddr;
use core::ops::RangeInclusive;
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use super::Common;
use super::established::Established;
use super::keys;
use super::message::Id;
use super::proposal::Encapsulation;
use crate::Secret;
use crate::config::{self, Connection, Mode, Selector};
use crate::endpoint::{Core, Now};
use crate::message::TrafficSelector;
use crate::negotiate::ChildSuite;
use crate::output::{ChildId, ChildSa, ChildView, Effect, Origin};

/// A CHILD_SA of an IKE SA.
pub(super) struct Child {
    pub(super) id: ChildId,
    /// Index in the connection's children.
    pub(super) index: usize,
    pub(super) spi_in: u32,
    pub(super) spi_out: u32,
    pub(super) suite: ChildSuite,
    pub(super) local_ts: TrafficSelector,
    pub(super) remote_ts: TrafficSelector,
    pub(super) state: ChildState,
    pub(super) encap: bool,
    pub(super) since: Instant,
    pub(super) rekey_at: Option<Instant>,
    pub(super) life_at: Option<Instant>,
    /// Then traffic is sent through it: the peer, which replaced another by it, may install it a moment later.
    pub(super) use_at: Option<Instant>,
    /// Replaced by this side: then the peer is told that it is gone.
    pub(super) delete_at: Option<Instant>,
    /// Deleted by the peer: removed then, when what is under way has arrived.
    pub(super) retire_at: Option<Instant>,
    /// The one that it replaces.
    pub(super) replaces: Option<ChildId>,
    /// This side began its Quick Mode.
    pub(super) mine: bool,
}

/// Where a CHILD_SA is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChildState {
    /// The datapath was asked and has not answered.
    Installing,
    /// The datapath has it.
    Installed,
    /// A successor is there; the peer may still send through it.
    Replaced,
    /// Both sides know that it is gone.
    Gone,
}

impl Child {
    /// Whether it is one that traffic is sent through.
    pub(super) const fn is_current(&self) -> bool {
        matches!(self.state, ChildState::Installing | ChildState::Installed)
    }

    /// Both sides know that it is gone: it stays a little, so that packets that are under way can arrive.
    pub(super) fn drain(&mut self, core: &Core, now: Now) {
        self.state = ChildState::Gone;
        (self.delete_at, self.life_at) = (None, None);
        self.retire_at = Some(now.monotonic + core.settings.drain);
    }

    /// When something is to be done about it.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let live = self.is_current();
        [self.rekey_at.filter(|_| live), self.life_at, self.use_at, self.delete_at, self.retire_at]
            .into_iter()
            .flatten()
            .min()
    }

    /// For showing.
    pub(super) fn view(&self, connection: &Connection, now: Now) -> ChildView {
        let name = connection.children.get(self.index).map(|child| Arc::clone(&child.name));
        ChildView {
            id: self.id,
            name: name.unwrap_or_else(|| Arc::from("")),
            state: match self.state {
                ChildState::Installing => "installing",
                ChildState::Installed => "installed",
                ChildState::Replaced => "replaced",
                ChildState::Gone => "draining",
            },
            spis: (self.spi_in, self.spi_out),
            suite: self.suite.to_string(),
            local_ts: vec![self.local_ts.clone()],
            remote_ts: vec![self.remote_ts.clone()],
            encap: self.encap,
            age: now.monotonic.saturating_duration_since(self.since),
        }
    }
}

/// A CHILD_SA that both sides want.
#[derive(Clone, Debug)]
pub(super) struct Agreed {
    pub(super) index: usize,
    pub(super) encapsulation: Encapsulation,
    pub(super) spi_in: u32,
    pub(super) spi_out: u32,
    pub(super) suite: ChildSuite,
    pub(super) local_ts: TrafficSelector,
    pub(super) remote_ts: TrafficSelector,
    /// The shortest lifetime of both.
    pub(super) life: Option<Duration>,
}

/// The selectors of one side of a child; `dynamic` is the assigned address, or else the outer one.
pub(super) fn expand(selectors: &[Selector], outer: IpAddr, assigned: &[IpAddr]) -> Vec<TrafficSelector> {
    let mut all = Vec::new();
    for found in selectors {
        match found {
            Selector::Fixed(fixed) => all.push(fixed.clone()),
            Selector::Dynamic { protocol, ports } => {
                let host = |address| TrafficSelector::host(address, *protocol, ports.clone());
                all.extend(assigned.iter().copied().map(host));
                if assigned.is_empty() {
                    all.push(host(outer));
                }
            }
        }
    }
    all
}

/// A selector as an Identification payload of Quick Mode (RFC 2407 section 4.6.2): an address, a subnet or a range, with one
/// port or all.
pub(super) fn to_id(selector: &TrafficSelector) -> Id {
    let port = if selector.ports.start() == selector.ports.end() { *selector.ports.start() } else { 0 };
    let protocol = selector.protocol;
    let (v4, start, end) = (selector.start.is_ipv4(), octets(selector.start), octets(selector.end));
    if start == end {
        return Id { kind: if v4 { 1 } else { 5 }, protocol, port, data: start };
    }
    // A subnet if all bits from the first that differs on are 0 in one and 1 in the other.
    let mask: Vec<u8> = start.iter().zip(&end).map(|(start, end)| !(start ^ end)).collect();
    let ones = mask.iter().map(|byte| byte.leading_ones()).take_while(|ones| *ones == 8).count();
    let tail = mask.get(ones).map_or(8, |byte| byte.leading_ones());
    let is_mask = mask.iter().enumerate().all(|(place, byte)| match place.cmp(&ones) {
        core::cmp::Ordering::Less => true,
        core::cmp::Ordering::Equal => byte.count_ones() == tail,
        core::cmp::Ordering::Greater => *byte == 0,
    });
    let aligned = start.iter().zip(&mask).all(|(start, mask)| start & !mask == 0);
    if is_mask && aligned {
        Id { kind: if v4 { 4 } else { 6 }, protocol, port, data: [start, mask].concat() }
    } else {
        Id { kind: if v4 { 7 } else { 8 }, protocol, port, data: [start, end].concat() }
    }
}

/// The selector that an Identification payload of Quick Mode means.
pub(super) fn from_id(id: &Id) -> Option<TrafficSelector> {
    let (first, second) = match id.kind {
        1 | 5 => (address(&id.data)?, None),
        4 | 6 | 7 | 8 => {
            let (first, second) = id.data.split_at_checked(id.data.len() / 2)?;
            (address(first)?, Some(second))
        }
        _ => return None,
    };
    let v4 = matches!(id.kind, 1 | 4 | 7);
    if first.is_ipv4() != v4 {
        return None;
    }
    let (start, end) = match (id.kind, second) {
        (4 | 6, Some(mask)) => {
            let start: Vec<u8> = octets(first).iter().zip(mask).map(|(byte, mask)| byte & mask).collect();
            let end: Vec<u8> = octets(first).iter().zip(mask).map(|(byte, mask)| byte | !mask).collect();
            (address(&start)?, address(&end)?)
        }
        (_, Some(end)) => (first, address(end)?),
        _ => (first, first),
    };
    let ports: RangeInclusive<u16> = if id.port == 0 { 0..=u16::MAX } else { id.port..=id.port };
    (start <= end).then_some(TrafficSelector { start, end, protocol: id.protocol, ports })
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

/// What goes into the keys of a CHILD_SA.
pub(super) struct Keying<'a> {
    /// g(qm)^xy; none without perfect forward secrecy.
    pub(super) shared: Option<&'a Secret>,
    pub(super) ni: &'a [u8],
    pub(super) nr: &'a [u8],
}

impl Established {
    /// Makes the keys and has the datapath install the CHILD_SA, which `mine` says who began. `None` if the suite is not implemented, and then it is
    /// neither proposed nor chosen.
    pub(super) fn install(
        &self,
        common: &Common,
        core: &mut Core,
        now: Now,
        agreed: Agreed,
        keying: &Keying<'_>,
        (mine, replaces): (bool, Option<ChildId>),
    ) -> Option<Child> {
        let Agreed { index, encapsulation, spi_in, spi_out, suite, local_ts, remote_ts, life } = agreed;
        let Keying { shared, ni, nr } = *keying;
        let derive = |spi| keys::child(self.hash, &self.skeyid_d, &suite, shared, spi, ni, nr);
        let (keys_in, keys_out) = (derive(spi_in)?, derive(spi_out)?);
        let id = core.new_child(common.id);
        let encap = common.encap().filter(|_| encapsulation.udp);
        core.emit(
            common.id,
            Effect::Install(Box::new(ChildSa {
                id,
                connection: Arc::clone(&self.connection),
                child: index,
                protocol: suite.protocol,
                mode: if encapsulation.transport { Mode::Transport } else { Mode::Tunnel },
                spi_in,
                spi_out,
                encr: suite.encr,
                integ: suite.integ,
                esn: false,
                keys_in,
                keys_out,
                local_ts: vec![local_ts.clone()],
                remote_ts: vec![remote_ts.clone()],
                local: common.path.local.ip(),
                remote: common.path.remote.ip(),
                encap,
                replaces,
                in_use: mine && replaces.is_none(),
                leases: self.leases().to_vec(),
                origin: Origin::Negotiated,
            })),
        );
        let config = self.connection.children.get(index);
        // The peer's lifetime may be shorter: then the rekey comes in time for that.
        let cap = life.map(|life| life.mul_f32(0.85));
        let rekey = config.and_then(|child| {
            let after = child.rekey?;
            Some(jittered(core, cap.map_or(after, |cap| cap.min(after)), child.rekey_jitter.min(after / 5)))
        });
        let own_life = config.and_then(|child| child.life);
        let life = own_life.into_iter().chain(life).min();
        Some(Child {
            id,
            index,
            spi_in,
            spi_out,
            suite,
            local_ts,
            remote_ts,
            state: ChildState::Installing,
            encap: encap.is_some(),
            since: now.monotonic,
            rekey_at: rekey.map(|after| now.monotonic + after),
            life_at: life.map(|after| now.monotonic + after),
            use_at: None,
            delete_at: None,
            retire_at: None,
            replaces,
            mine,
        })
    }
}

/// The mode that is offered for a child.
pub(super) fn encapsulation(common: &Common, child: &config::Child) -> Encapsulation {
    Encapsulation { transport: child.mode == Mode::Transport, udp: common.encap().is_some() }
}

/// `after`, less a random part of `jitter`.
pub(super) fn jittered(core: &mut Core, after: Duration, jitter: Duration) -> Duration {
    let part = f64::from(core.random.u32()) / f64::from(u32::MAX);
    after.saturating_sub(jitter.mul_f64(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(start: &str, end: &str) -> TrafficSelector {
        TrafficSelector {
            start: start.parse().unwrap(),
            end: end.parse().unwrap(),
            protocol: 6,
            ports: 0..=u16::MAX,
        }
    }

    /// IKE-2: addresses, subnets and ranges become the ID types of RFC 2407 section 4.6.2.1 and come back.
    #[test]
    fn ike_2_selectors_as_identities() {
        for (kind, start, end) in [
            (1, "10.1.0.7", "10.1.0.7"),
            (4, "10.1.0.0", "10.1.0.255"),
            (4, "0.0.0.0", "255.255.255.255"),
            (4, "10.1.2.128", "10.1.2.255"),
            (7, "10.1.0.1", "10.1.0.255"),
            (7, "10.1.0.0", "10.3.1.255"),
            (5, "2001:db8::1", "2001:db8::1"),
            (6, "2001:db8::", "2001:db8::ffff:ffff:ffff:ffff"),
            (8, "2001:db8::", "2001:db8::fffe"),
        ] {
            let selector = selector(start, end);
            let id = to_id(&selector);
            assert_eq!(id.kind, kind, "{start} to {end}");
            assert_eq!(from_id(&id), Some(selector));
        }
        let port = TrafficSelector { ports: 80..=80, ..selector("10.1.0.0", "10.1.0.255") };
        assert_eq!(from_id(&to_id(&port)), Some(port));
        for (kind, data) in [
            (1, vec![1; 3]),
            (4, vec![1; 7]),
            (7, vec![9, 0, 0, 0, 8, 0, 0, 0]),
            (2, vec![1; 4]),
            (1, vec![1; 16]),
        ] {
            assert_eq!(from_id(&Id { kind, protocol: 0, port: 0, data }), None);
        }
    }
}
