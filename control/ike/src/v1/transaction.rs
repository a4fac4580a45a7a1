//! Transaction exchanges: XAuth (draft-beaulieu-ike-xauth) and mode-config (draft-dukes-ike-mode-cfg), for road warriors and
//! their gateway.
//!
//! ```text
//! gateway ─► REQUEST user, password          client ─► REQUEST address, name servers
//! client  ─► REPLY                           gateway ─► REPLY
//! gateway ─► SET status                      then Quick Mode
//! client  ─► ACK
//! ```

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::established::{Alive, Doing, Established, LINGER, PhaseTwo, repeat};
use super::message::{Attribute, Cfg, Exchange, Payload};
use super::{Arrived, Common};
use crate::Secret;
use crate::auth::identity::Identity;
use crate::config::Xauth;
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::output::{Effect, VirtualConfiguration};
use crate::report::{CloseReason, Failure, Report};
use crate::v2::channel::Datagrams;

const TRANSACTION: Exchange = Exchange::TRANSACTION;

/// Attributes of XAuth.
mod xauth {
    pub(super) const TYPE: u16 = 16520;
    pub(super) const USER: u16 = 16521;
    pub(super) const PASSWORD: u16 = 16522;
    pub(super) const STATUS: u16 = 16527;
}
/// Attributes of mode-config.
mod config {
    pub(super) const IP4_ADDRESS: u16 = 1;
    pub(super) const IP4_NETMASK: u16 = 2;
    pub(super) const IP4_DNS: u16 = 3;
    pub(super) const IP6_ADDRESS: u16 = 8;
    pub(super) const IP6_DNS: u16 = 10;
}

/// What has to be done before children are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Nothing.
    Open,
    /// As gateway: user and password were asked for.
    Password,
    /// As gateway: they are right, and the client is told.
    Passed,
    /// As client: the gateway is to ask, and to say that they are right.
    Asked,
    /// As client: an address was asked for.
    Address,
}

impl Established {
    /// Phase 1 is done: what comes before children?
    pub(super) fn begin_gate(&mut self, common: &mut Common, core: &mut Core, now: Now) {
        let limit = now.monotonic + core.settings.half_open_timeout;
        match common.v1().map(|v1| &v1.xauth) {
            Some(Xauth::Server(_)) if !common.initiator => {
                self.gate = Gate::Password;
                self.gate_until = Some(limit);
                let attributes =
                    vec![Attribute::variable(xauth::USER, []), Attribute::variable(xauth::PASSWORD, [])];
                self.request(common, core, now, Cfg::REQUEST, attributes);
            }
            Some(Xauth::Client { .. }) if common.initiator => {
                self.gate = Gate::Asked;
                self.gate_until = Some(limit);
            }
            _ => self.ask_for_address(common, core, now),
        }
    }

    fn ask_for_address(&mut self, common: &mut Common, core: &mut Core, now: Now) {
        let (v4, v6) = self.connection.request_address;
        if !self.is_client() || !common.initiator {
            return self.open_gate(common, core, now);
        }
        self.gate = Gate::Address;
        self.gate_until = Some(now.monotonic + core.settings.half_open_timeout);
        let mut wanted = Vec::new();
        if v4 {
            wanted.extend([config::IP4_ADDRESS, config::IP4_NETMASK, config::IP4_DNS]);
        }
        if v6 {
            wanted.extend([config::IP6_ADDRESS, config::IP6_DNS]);
        }
        let attributes = wanted.into_iter().map(|kind| Attribute::variable(kind, [])).collect();
        self.request(common, core, now, Cfg::REQUEST, attributes);
    }

    /// From now on children can be made.
    fn open_gate(&mut self, common: &mut Common, core: &mut Core, now: Now) {
        self.gate = Gate::Open;
        self.gate_until = None;
        self.succeed(common, core, now);
        let wanted = std::mem::take(&mut self.wanted);
        for index in wanted {
            self.want_child(common, core, now, index);
        }
    }

    /// Begins an exchange.
    fn request(&mut self, common: &Common, core: &mut Core, now: Now, kind: Cfg, attributes: Vec<Attribute>) {
        let id = self.new_id(core);
        let payload = Payload::Attributes { kind, id: 0, attributes };
        let before = id.to_be_bytes();
        let sealed = self.seal(common, TRANSACTION, (id, self.first_iv(id)), &[&before], &[payload]);
        let Some((message, iv)) = sealed else { return };
        let retransmission = repeat(core, now, message);
        common.send(core, retransmission.datagrams());
        self.exchanges.push(PhaseTwo {
            id,
            iv,
            doing: Doing::Transaction,
            retransmission: Some(retransmission),
            deadline: now.monotonic + 4 * LINGER,
        });
    }

    /// A message of a Transaction exchange.
    pub(super) fn transaction(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> Result<Alive, Ignored> {
        let id = arrived.head.message_id;
        if self.recent.has_id(id) {
            return Err(Ignored::MessageId);
        }
        let place = self.exchanges.iter().position(|exchange| exchange.id == id);
        let ours = place.and_then(|place| self.exchanges.get(place));
        let iv = match ours {
            Some(PhaseTwo { doing: Doing::Transaction, iv, .. }) => *iv,
            Some(_) => return Err(Ignored::Exchange),
            None => self.first_iv(id),
        };
        let opened = self.open(arrived, iv, &[&id.to_be_bytes()])?;
        let found = opened.chain.payloads.into_iter().find_map(|payload| match payload {
            Payload::Attributes { kind, id, attributes } => Some((kind, id, attributes)),
            _ => None,
        });
        let Some((kind, identifier, attributes)) = found else { return Err(Ignored::Legality) };
        self.heard(common, core, now, arrived);
        self.recent.over(id);
        if let Some(place) = place {
            self.exchanges.remove(place);
            self.recent.answered(arrived.datagram, Datagrams::default());
            return Ok(self.replied(common, core, now, kind, &attributes));
        }
        let (kind, answer, alive) = match kind {
            Cfg::REQUEST => (Cfg::REPLY, self.requested(common, core, &attributes), Alive::Yes),
            Cfg::SET => {
                let (answer, alive) = self.set(&attributes);
                (Cfg::ACK, answer, alive)
            }
            _ => return Err(Ignored::Legality),
        };
        let payload = Payload::Attributes { kind, id: identifier, attributes: answer };
        if let Some((message, _)) =
            self.seal(common, TRANSACTION, (id, opened.iv), &[&id.to_be_bytes()], &[payload])
        {
            let answer = Datagrams::from(vec![message]);
            common.send(core, &answer);
            self.recent.answered(arrived.datagram, answer);
        }
        if self.gate == Gate::Passed && !is_gateway(common) {
            self.ask_for_address(common, core, now);
        }
        Ok(alive)
    }

    /// The answer to an exchange of this side.
    fn replied(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        kind: Cfg,
        attributes: &[Attribute],
    ) -> Alive {
        match (self.gate, kind) {
            (Gate::Password, Cfg::REPLY) => {
                let right = check_password(common, attributes);
                if let Some(user) = &right {
                    self.gate = Gate::Passed;
                    self.remote_id = user.clone();
                    self.request(common, core, now, Cfg::SET, vec![Attribute::basic(xauth::STATUS, 1)]);
                    return Alive::Yes;
                }
                let id = self.new_id(core);
                let attributes = vec![Attribute::basic(xauth::STATUS, 0)];
                let payload = Payload::Attributes { kind: Cfg::SET, id: 0, attributes };
                let before = id.to_be_bytes();
                if let Some((message, _)) =
                    self.seal(common, TRANSACTION, (id, self.first_iv(id)), &[&before], &[payload])
                {
                    common.send(core, &Datagrams::from(vec![message]));
                }
                self.say_goodbye(common, core, now);
                self.failed(common, core, Failure::Xauth("the user or the password is wrong"));
                Alive::No(CloseReason::Failed)
            }
            (Gate::Passed, Cfg::ACK) => {
                self.open_gate(common, core, now);
                Alive::Yes
            }
            (Gate::Address, Cfg::REPLY) => {
                if self.configure(common, core, attributes) {
                    self.open_gate(common, core, now);
                    return Alive::Yes;
                }
                self.say_goodbye(common, core, now);
                self.failed(common, core, Failure::NoAddress);
                Alive::No(CloseReason::Failed)
            }
            _ => Alive::Yes,
        }
    }

    fn failed(&self, common: &Common, core: &mut Core, failure: Failure) {
        core.counters.failed += 1;
        let connection = Some(std::sync::Arc::clone(&self.connection.name));
        core.report(common.id, Report::Failed { sa: common.id, connection, path: common.path, failure });
    }

    /// The peer asks: as client for user and password, as gateway for an address.
    fn requested(&mut self, common: &Common, core: &mut Core, asked: &[Attribute]) -> Vec<Attribute> {
        let is_asked = |kind| asked.iter().any(|attribute| attribute.kind == kind);
        let mut answer = Vec::new();
        if is_asked(xauth::USER) || is_asked(xauth::PASSWORD) {
            if let (Gate::Asked, Some(Xauth::Client { user, password })) =
                (self.gate, common.v1().map(|v1| &v1.xauth))
            {
                if is_asked(xauth::TYPE) {
                    answer.push(Attribute::basic(xauth::TYPE, 0));
                }
                answer.push(Attribute::variable(xauth::USER, user.as_bytes()));
                answer.push(Attribute::variable(xauth::PASSWORD, password.expose()));
            }
            return answer;
        }
        if self.gate != Gate::Open || self.is_client() || self.connection.pools.is_empty() {
            return answer;
        }
        for (v4, kind) in [(true, config::IP4_ADDRESS), (false, config::IP6_ADDRESS)] {
            let Some(wish) = asked.iter().find(|attribute| attribute.kind == kind) else { continue };
            if let Some(address) = self.lease(common, core, v4, &wish.bytes()) {
                answer.push(match address {
                    IpAddr::V4(address) => Attribute::variable(kind, address.octets()),
                    IpAddr::V6(address) => {
                        Attribute::variable(kind, [address.octets().as_slice(), &[128]].concat())
                    }
                });
                if is_asked(config::IP4_NETMASK) && v4 {
                    answer.push(Attribute::variable(config::IP4_NETMASK, [255; 4]));
                }
            }
        }
        for dns in &self.connection.dns {
            answer.push(match dns {
                IpAddr::V4(dns) => Attribute::variable(config::IP4_DNS, dns.octets()),
                IpAddr::V6(dns) => Attribute::variable(config::IP6_DNS, dns.octets()),
            });
        }
        answer
    }

    /// The address that the client has already, or a new one.
    fn lease(&mut self, common: &Common, core: &mut Core, v4: bool, wish: &[u8]) -> Option<IpAddr> {
        if let Some(address) = self.addresses.iter().find(|address| address.is_ipv4() == v4) {
            return Some(*address);
        }
        let wish = read_address(wish).filter(|address| !address.is_unspecified());
        match core.pools.lease(&self.connection.pools, v4, &self.remote_id, wish) {
            Ok(Some(address)) => {
                self.addresses.push(address);
                Some(address)
            }
            Ok(None) => None,
            Err(failure) => {
                self.failed(common, core, failure);
                None
            }
        }
    }

    /// The gateway says that the password is right, or is not.
    fn set(&mut self, attributes: &[Attribute]) -> (Vec<Attribute>, Alive) {
        let status = attributes.iter().find(|attribute| attribute.kind == xauth::STATUS);
        match (self.gate, status.and_then(Attribute::number)) {
            (Gate::Asked, Some(status)) => {
                let answer = vec![Attribute::basic(xauth::STATUS, u16::from(status == 1))];
                if status == 1 {
                    self.gate = Gate::Passed;
                    (answer, Alive::Yes)
                } else {
                    (answer, Alive::No(CloseReason::Failed))
                }
            }
            _ => (Vec::new(), Alive::Yes),
        }
    }

    /// Takes over the addresses that the gateway assigned.
    fn configure(&mut self, common: &Common, core: &mut Core, attributes: &[Attribute]) -> bool {
        let mut configuration = VirtualConfiguration::default();
        for attribute in attributes {
            let Some(address) = read_address(&attribute.bytes()) else { continue };
            match attribute.kind {
                config::IP4_ADDRESS | config::IP6_ADDRESS => configuration.addresses.push(address),
                config::IP4_DNS | config::IP6_DNS => configuration.dns.push(address),
                _ => {}
            }
        }
        if configuration.addresses.is_empty() {
            return false;
        }
        self.addresses.clone_from(&configuration.addresses);
        core.emit(common.id, Effect::Configure(configuration));
        true
    }
}

/// An address; behind one of IPv6 may be a prefix length.
fn read_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => bytes.first_chunk::<4>().map(|octets| IpAddr::V4(Ipv4Addr::from(*octets))),
        16 | 17 => bytes.first_chunk::<16>().map(|octets| IpAddr::V6(Ipv6Addr::from(*octets))),
        _ => None,
    }
}

/// This side gives addresses and asks for passwords.
fn is_gateway(common: &Common) -> bool {
    !common.initiator && matches!(common.v1().map(|v1| &v1.xauth), Some(Xauth::Server(_)))
}

/// Who has this password, if it is right.
fn check_password(common: &Common, attributes: &[Attribute]) -> Option<Identity> {
    let Some(Xauth::Server(users)) = common.v1().map(|v1| &v1.xauth) else { return None };
    let find = |kind| attributes.iter().find(|attribute| attribute.kind == kind).map(Attribute::bytes);
    let name = String::from_utf8(find(xauth::USER)?).ok()?;
    // Some append a terminator.
    let name = name.trim_end_matches('\0');
    let mut password = zeroize::Zeroizing::new(find(xauth::PASSWORD)?);
    while password.last() == Some(&0) {
        password.pop();
    }
    // A user that is not there costs as much as one that is, and nobody has an empty password.
    let nobody = Secret::default();
    let expected = users.get(name).unwrap_or(&nobody);
    let right = *expected == Secret::new(password.as_slice()) && !expected.is_empty();
    right.then(|| name.parse().ok()).flatten()
}
