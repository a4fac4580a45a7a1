//! Addresses that change: MOBIKE (RFC 4555) as initiator and as responder (MOB-7), NAT mappings that change
//! (RFC 7296 section 2.23), and packets that come from elsewhere (MOB-2).

use core::net::{IpAddr, SocketAddr};

use super::child::ChildState;
use super::established::{Established, Ours};
use super::nat::{self, Nat};
use super::{Common, Task};
use crate::endpoint::{Core, Now};
use crate::message::legality::Payloads;
use crate::message::registry::{ExchangeType, NotifyType};
use crate::message::{Notify, Payload};
use crate::output::{Effect, Path};
use crate::report::Report;

/// What there is to know about addresses.
#[derive(Debug, Default)]
pub(super) struct Moving {
    /// As initiator: the path that is to be used from now on.
    target: Option<Path>,
    /// The COOKIE2 of the update that is under way.
    cookie: Vec<u8>,
}

/// What a liveness check carries: nothing, but with NAT detection where there is a NAT, so that a changed mapping is
/// noticed.
pub(super) fn check_payloads(common: &Common) -> Vec<Payload> {
    if common.path.natt && common.nat.any() && common.peer.mobike {
        nat::notifications(common.spi_i, common.spi_r, common.path, false).to_vec()
    } else {
        Vec::new()
    }
}

impl Established {
    /// An authenticated request came along `path`.
    ///
    /// RFC 7296 section 2.23: "IKE implementations that ... are not behind a NAT ... SHOULD send all packets (including
    /// retransmission packets) to the IP address and port from the last valid authenticated packet". With MOBIKE the
    /// initiator says by UPDATE_SA_ADDRESSES where it is (RFC 4555 section 3.5), unless only its NAT's mapping changed.
    pub(super) fn follow(&mut self, common: &mut Common, core: &mut Core, path: Path) {
        let mapping = common.nat.remote && !common.nat.local && path.local == common.path.local;
        if mapping && !common.initiator && !common.peer.mobike && path.remote != common.path.remote {
            self.go_to(common, core, path);
        }
    }

    /// From now on the SA and its children use this path.
    fn go_to(&mut self, common: &mut Common, core: &mut Core, path: Path) {
        if common.path == path {
            return;
        }
        common.path = path;
        self.persist(common, core);
        self.move_children(common, core);
        core.report(common.id, Report::Moved { sa: common.id, path });
    }

    fn move_children(&self, common: &Common, core: &mut Core) {
        let (local, remote, encap) = (common.path.local.ip(), common.path.remote.ip(), common.encap());
        for child in self.children.iter().filter(|child| child.state != ChildState::Refused) {
            core.emit(common.id, Effect::Move { child: child.id, local, remote, encap });
        }
    }

    /// MOB-2: the datapath saw the peer's newest packet come from elsewhere and follows it already. IKE goes there too; a
    /// MOBIKE peer will say itself where it is.
    pub(super) fn peer_moved(&self, common: &mut Common, core: &mut Core, remote: IpAddr, port: Option<u16>) {
        let port = port.unwrap_or(common.path.remote.port());
        let path = Path { remote: SocketAddr::new(remote, port), ..common.path };
        if common.path != path && !common.initiator {
            common.path = path;
            self.persist(common, core);
            core.report(common.id, Report::Moved { sa: common.id, path });
        }
    }

    /// What a request of the peer says about addresses, and the answer's part.
    pub(super) fn mobike_request(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        payloads: &Payloads<'_>,
    ) -> Vec<Payload> {
        let mut answer = Vec::new();
        // RFC 4555 section 3.7: "the recipient MUST copy the notification as-is to the response".
        if let Some(cookie) = payloads.notify(NotifyType::COOKIE2) {
            answer.push(Payload::Notify(cookie.clone()));
        }
        let update = payloads.notify(NotifyType::UPDATE_SA_ADDRESSES).is_some();
        if update && common.peer.mobike && !common.initiator {
            let nat = Nat::detect(payloads, common.spi_i, common.spi_r, path);
            if nat.any() && payloads.notify(NotifyType::NO_NATS_ALLOWED).is_some() {
                answer.push(Payload::Notify(Notify::new(NotifyType::UNEXPECTED_NAT_DETECTED, [])));
                return answer;
            }
            if nat.supported {
                common.nat = nat;
            }
            let before = common.path;
            common.path = path;
            if before != path {
                self.persist(common, core);
            }
            self.move_children(common, core);
            if before != path {
                core.report(common.id, Report::Moved { sa: common.id, path });
            }
            self.schedule_keepalive(common, core, now);
        } else if payloads.notify(NotifyType::NAT_DETECTION_SOURCE_IP).is_some() && !common.initiator {
            // A check of an initiator behind a NAT: its mapping may have changed.
            let nat = Nat::detect(payloads, common.spi_i, common.spi_r, path);
            if nat.remote && path.remote != common.path.remote && path.local == common.path.local {
                common.nat = nat;
                self.go_to(common, core, path);
            }
        }
        if payloads.notify(NotifyType::NAT_DETECTION_SOURCE_IP).is_some() {
            answer.extend(nat::notifications(common.spi_i, common.spi_r, path, self.connection.force_encap));
        }
        answer
    }

    /// This machine's addresses are now these: as initiator of a MOBIKE SA, the tunnel moves if its own is gone or a
    /// better one is there.
    pub(super) fn addresses_changed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        addresses: &[IpAddr],
    ) {
        if !common.initiator || !common.peer.mobike || self.is_closing() {
            return;
        }
        let current = self.moving.target.unwrap_or(common.path);
        let remote = current.remote;
        // The route decides; where it says nothing new and the address is still there, all stays.
        let allowed =
            |address: &IpAddr| self.connection.local.is_empty() || self.connection.local.contains(address);
        let routed = core.host.source_address(remote.ip()).filter(allowed);
        let local = match routed {
            Some(local) => local,
            None if addresses.contains(&current.local.ip()) => return,
            // No way to the peer now; a later change may bring one.
            None => return,
        };
        if local == current.local.ip() {
            return;
        }
        let path = Path {
            local: SocketAddr::new(local, core.settings.nat_port),
            remote: SocketAddr::new(remote.ip(), if current.natt { remote.port() } else { 4500 }),
            natt: true,
        };
        self.moving.target = Some(path);
        // Whatever is being sent goes along the new path from now on (section 3.5).
        common.path = path;
        self.persist(common, core);
        if let Some(datagrams) = self.channel.resend(now.monotonic, &mut *core.random) {
            common.send(core, &datagrams);
        }
        self.enqueue(common, core, now, Task::UpdateAddresses);
    }

    /// Sends UPDATE_SA_ADDRESSES.
    pub(super) fn update_addresses(&mut self, common: &Common, core: &mut Core, now: Now) {
        self.moving.cookie = core.random.bytes(16);
        let mut payloads = vec![Payload::Notify(Notify::new(NotifyType::UPDATE_SA_ADDRESSES, []))];
        payloads.extend(nat::notifications(
            common.spi_i,
            common.spi_r,
            common.path,
            self.connection.force_encap,
        ));
        payloads.push(Payload::Notify(Notify::new(NotifyType::COOKIE2, self.moving.cookie.clone())));
        payloads.push(Payload::Notify(Notify::new(NotifyType::NO_ADDITIONAL_ADDRESSES, [])));
        self.request(common, core, now, ExchangeType::INFORMATIONAL, &payloads);
        self.ours = Some(Ours::Update);
    }

    /// The peer has answered the update.
    pub(super) fn addresses_updated(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        payloads: &Payloads<'_>,
    ) {
        let cookie = payloads.notify(NotifyType::COOKIE2);
        let genuine = cookie.is_some_and(|cookie| cookie.data == self.moving.cookie);
        if !genuine || payloads.error_notify().is_some() {
            // Section 3.5: it is repeated with what is true then.
            self.retry(core, now, Task::UpdateAddresses);
            return;
        }
        let target = self.moving.target.unwrap_or(common.path);
        if target != common.path {
            // It moved again meanwhile.
            self.enqueue(common, core, now, Task::UpdateAddresses);
            return;
        }
        self.moving.target = None;
        let nat = Nat::detect(payloads, common.spi_i, common.spi_r, path);
        if nat.supported {
            common.nat = nat;
        }
        self.move_children(common, core);
        core.report(common.id, Report::Moved { sa: common.id, path: common.path });
        self.schedule_keepalive(common, core, now);
    }
}
