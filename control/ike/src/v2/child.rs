//! CHILD_SAs: what is proposed, what is agreed (RFC 7296 sections 2.9, 2.17, 1.3.1), and how it is installed.

use core::net::IpAddr;
use core::time::Duration;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::Common;
use super::agree;
use crate::Secret;
use crate::config::{self, Connection, Mode, Selector};
use crate::crypto::keys::Derivation;
use crate::endpoint::{Core, Now};
use crate::message::legality::Payloads;
use crate::message::registry::{ExchangeType, NotifyType, ProtocolId};
use crate::message::{Notify, Payload, Proposal, TrafficSelector};
use crate::negotiate::{ChildSuite, keyword, proposal, selector};
use crate::output::{ChildId, ChildSa, ChildView, Effect, Origin};
use crate::record::{Strategy, whole_seconds};
use crate::report::Failure;

/// A CHILD_SA of an established IKE SA.
pub(super) struct Child {
    pub(super) id: ChildId,
    /// Index in the connection's children.
    pub(super) index: usize,
    pub(super) spi_in: u32,
    pub(super) spi_out: u32,
    pub(super) suite: ChildSuite,
    pub(super) local_ts: Vec<TrafficSelector>,
    pub(super) remote_ts: Vec<TrafficSelector>,
    pub(super) state: ChildState,
    pub(super) since: Instant,
    pub(super) rekey_at: Option<Instant>,
    pub(super) life_at: Option<Instant>,
    /// Replaced or deleted: removed then, when what is under way has arrived.
    pub(super) retire_at: Option<Instant>,
    /// The one that it replaces.
    pub(super) replaces: Option<ChildId>,
    /// The smaller nonce of the exchange that made it, where both sides rekeyed at once (section 2.8.1).
    pub(super) nonce: Option<Box<[u8]>>,
    /// What else has to be saved of it, if it is to go on after a reset.
    pub(super) kept: Option<Box<Kept>>,
}

/// What only the datapath needs of a CHILD_SA, and what is saved of it.
pub(super) struct Kept {
    pub(super) mode: Mode,
    pub(super) keys_in: (Secret, Secret),
    pub(super) keys_out: (Secret, Secret),
    /// When it is deleted, if it was not rekeyed.
    pub(super) ends: Option<SystemTime>,
}

/// Where a CHILD_SA is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChildState {
    /// The datapath was asked and has not answered.
    Installing,
    /// In use.
    Installed,
    /// The datapath does not take it; the peer is to be told.
    Refused,
    /// A successor is there; the peer may still send through it.
    Replaced,
    /// This side has sent a Delete.
    Deleting,
    /// Both sides know that it is gone.
    Gone,
}

impl ChildState {
    const fn word(self) -> &'static str {
        match self {
            Self::Installing => "installing",
            Self::Installed => "installed",
            Self::Refused => "refused",
            Self::Replaced => "replaced",
            Self::Deleting => "deleting",
            Self::Gone => "draining",
        }
    }
}

impl Child {
    /// Whether it is one that traffic is sent through.
    pub(super) const fn is_current(&self) -> bool {
        matches!(self.state, ChildState::Installing | ChildState::Installed)
    }

    /// For showing.
    pub(super) fn view(&self, connection: &Connection, encap: bool, now: Now) -> ChildView {
        let name = connection.children.get(self.index).map(|child| Arc::clone(&child.name));
        ChildView {
            id: self.id,
            name: name.unwrap_or_else(|| Arc::from("")),
            state: self.state.word(),
            spis: (self.spi_in, self.spi_out),
            suite: self.suite.to_string(),
            local_ts: self.local_ts.clone(),
            remote_ts: self.remote_ts.clone(),
            encap,
            age: now.monotonic.saturating_duration_since(self.since),
        }
    }
}

/// A CHILD_SA that this side has proposed.
#[derive(Debug)]
pub(super) struct Proposed {
    pub(super) index: usize,
    pub(super) spi_in: u32,
    local_ts: Vec<TrafficSelector>,
    remote_ts: Vec<TrafficSelector>,
    proposals: Vec<Proposal>,
}

/// A CHILD_SA that both sides want.
#[derive(Debug)]
pub(super) struct Agreed {
    pub(super) index: usize,
    pub(super) mode: Mode,
    pub(super) spi_in: u32,
    pub(super) spi_out: u32,
    pub(super) suite: ChildSuite,
    pub(super) local_ts: Vec<TrafficSelector>,
    pub(super) remote_ts: Vec<TrafficSelector>,
}

/// A CHILD_SA cannot be made.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) notify: Notify,
    pub(super) failure: Failure,
}

/// The addresses that `dynamic` selectors stand for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends<'a> {
    /// This side: outer address, and virtual ones if any are assigned.
    pub(super) local: (IpAddr, &'a [IpAddr]),
    /// The peer's.
    pub(super) remote: (IpAddr, &'a [IpAddr]),
    /// Addresses were asked for and are not assigned yet: this side's selectors are everything.
    pub(super) asking: (bool, bool),
}

impl Ends<'_> {
    fn local_ts(&self, child: &config::Child) -> Vec<TrafficSelector> {
        expand(&child.local_ts, self.local, self.asking)
    }

    fn remote_ts(&self, child: &config::Child) -> Vec<TrafficSelector> {
        expand(&child.remote_ts, self.remote, (false, false))
    }
}

fn expand(
    selectors: &[Selector],
    (outer, assigned): (IpAddr, &[IpAddr]),
    asking: (bool, bool),
) -> Vec<TrafficSelector> {
    let mut all = Vec::new();
    for found in selectors {
        match found {
            Selector::Fixed(fixed) => all.push(fixed.clone()),
            Selector::Dynamic { protocol, ports } => {
                let mut add = |start, end| {
                    all.push(TrafficSelector { start, end, protocol: *protocol, ports: ports.clone() });
                };
                // Section 2.19: the initiator asks for everything, and the responder narrows it to what it assigns.
                if asking.0 {
                    add(IpAddr::from([0; 4]), IpAddr::from([0xff; 4]));
                }
                if asking.1 {
                    add(IpAddr::from([0; 16]), IpAddr::from([0xff; 16]));
                }
                if asking == (false, false) {
                    let assigned = assigned.iter().copied();
                    assigned.clone().for_each(|address| add(address, address));
                    if assigned.len() == 0 {
                        add(outer, outer);
                    }
                }
            }
        }
    }
    all
}

/// Proposes the child `index`. In IKE_AUTH it comes without a key exchange: the IKE SA's gives the keys.
pub(super) fn propose(
    core: &mut Core,
    child: &config::Child,
    index: usize,
    ends: Ends<'_>,
    with_ke: bool,
) -> (Proposed, Vec<Payload>) {
    let spi_in = core.host.allocate_spi(&mut *core.random);
    let spi = spi_in.to_be_bytes();
    let proposals = if with_ke {
        proposal::offer(&child.proposals, &spi)
    } else {
        proposal::offer(&proposal::without_key_exchange(&child.proposals), &spi)
    };
    let local_ts = ends.local_ts(child);
    let remote_ts = ends.remote_ts(child);
    let mut payloads =
        vec![Payload::Sa(proposals.clone()), Payload::TsI(local_ts.clone()), Payload::TsR(remote_ts.clone())];
    if child.mode == Mode::Transport {
        payloads.push(Payload::Notify(Notify::new(NotifyType::USE_TRANSPORT_MODE, [])));
    }
    (Proposed { index, spi_in, local_ts, remote_ts, proposals }, payloads)
}

impl Proposed {
    /// ESP or AH.
    pub(super) fn protocol(&self) -> ProtocolId {
        self.proposals.first().map_or(ProtocolId::ESP, |proposal| proposal.protocol)
    }

    /// Checks the answer: one of the proposals, and selectors within those proposed.
    pub(super) fn answered(&self, child: &config::Child, payloads: &Payloads<'_>) -> Result<Agreed, Failure> {
        let (Some(answer), Some(ts_i), Some(ts_r)) = (payloads.sa(), payloads.ts_i(), payloads.ts_r()) else {
            let notify = payloads.error_notify().map(|notify| Failure::Notified(notify.kind));
            return Err(notify.unwrap_or(Failure::BadChoice));
        };
        let (suite, spi_out) = agree::accepts_child(&self.proposals, answer).ok_or(Failure::BadChoice)?;
        if !selector::all_covered(&self.local_ts, ts_i) || !selector::all_covered(&self.remote_ts, ts_r) {
            return Err(Failure::Selectors {
                offered: format!("{} and {}", selector::List(ts_i), selector::List(ts_r)),
                configured: format!(
                    "{} and {}",
                    selector::List(&self.local_ts),
                    selector::List(&self.remote_ts)
                ),
            });
        }
        // Section 1.3.1: "If the responder declines the request, the Child SA will be established in tunnel mode."
        let transport =
            child.mode == Mode::Transport && payloads.notify(NotifyType::USE_TRANSPORT_MODE).is_some();
        Ok(Agreed {
            index: self.index,
            mode: if transport { Mode::Transport } else { Mode::Tunnel },
            spi_in: self.spi_in,
            spi_out,
            suite,
            local_ts: ts_i.to_vec(),
            remote_ts: ts_r.to_vec(),
        })
    }
}

/// As responder: what can be agreed to, and the payloads that say so. `only`: a rekey is about this child.
pub(super) fn answer(
    core: &mut Core,
    connection: &Connection,
    payloads: &Payloads<'_>,
    ends: Ends<'_>,
    only: Option<usize>,
    with_ke: bool,
) -> Result<(Agreed, Vec<Payload>), Refused> {
    let (Some(offered), Some(ts_i), Some(ts_r)) = (payloads.sa(), payloads.ts_i(), payloads.ts_r()) else {
        return Err(Refused {
            notify: Notify::new(NotifyType::INVALID_SYNTAX, []),
            failure: Failure::Protocol(ExchangeType::CREATE_CHILD_SA, "lacks SA or TS"),
        });
    };
    let children = connection.children.iter().enumerate();
    let mut selectors_fit = false;
    for (index, child) in children.filter(|(index, _)| only.is_none_or(|only| only == *index)) {
        let local_ts = selector::narrow(&ends.local_ts(child), ts_r);
        let remote_ts = selector::narrow(&ends.remote_ts(child), ts_i);
        if local_ts.is_empty() || remote_ts.is_empty() {
            continue;
        }
        selectors_fit = true;
        let Some((suite, spi_out, mut chosen)) = agree::choose_child(&child.proposals, offered, with_ke)
        else {
            continue;
        };
        let spi_in = core.host.allocate_spi(&mut *core.random);
        chosen.spi = spi_in.to_be_bytes().to_vec();
        let transport =
            child.mode == Mode::Transport && payloads.notify(NotifyType::USE_TRANSPORT_MODE).is_some();
        let mut answer =
            vec![Payload::Sa(vec![chosen]), Payload::TsI(remote_ts.clone()), Payload::TsR(local_ts.clone())];
        if transport {
            answer.push(Payload::Notify(Notify::new(NotifyType::USE_TRANSPORT_MODE, [])));
        }
        let mode = if transport { Mode::Transport } else { Mode::Tunnel };
        let agreed = Agreed { index, mode, spi_in, spi_out, suite, local_ts, remote_ts };
        return Ok((agreed, answer));
    }
    if selectors_fit {
        let configured: Vec<Proposal> =
            connection.children.iter().flat_map(|child| child.proposals.iter().cloned()).collect();
        Err(Refused {
            notify: Notify::new(NotifyType::NO_PROPOSAL_CHOSEN, []),
            failure: Failure::NoProposal {
                offered: keyword::List(offered).to_string(),
                configured: keyword::List(&configured).to_string(),
            },
        })
    } else {
        let configured = connection.children.iter().map(|child| {
            format!(
                "{} and {}",
                selector::List(&ends.remote_ts(child)),
                selector::List(&ends.local_ts(child))
            )
        });
        Err(Refused {
            notify: Notify::new(NotifyType::TS_UNACCEPTABLE, []),
            failure: Failure::Selectors {
                offered: format!("{} and {}", selector::List(ts_i), selector::List(ts_r)),
                configured: configured.collect::<Vec<_>>().join(", or "),
            },
        })
    }
}

/// What goes into the keys of a CHILD_SA.
pub(super) struct Keying<'a> {
    pub(super) derivation: &'a Derivation,
    /// Secrets of the key exchanges of this exchange; none without perfect forward secrecy.
    pub(super) secrets: &'a [&'a Secret],
    pub(super) ni: &'a [u8],
    pub(super) nr: &'a [u8],
    /// This side began the exchange that made it.
    pub(super) initiator: bool,
}

/// Makes the keys and has the datapath install the CHILD_SA. `None` if the suite is not implemented, and then it is neither
/// proposed nor chosen.
#[expect(clippy::too_many_arguments, reason = "what a CHILD_SA is made of")]
pub(super) fn install(
    common: &Common,
    core: &mut Core,
    now: Now,
    connection: &Arc<Connection>,
    agreed: Agreed,
    keying: &Keying<'_>,
    replaces: Option<ChildId>,
    in_use: bool,
    leases: &[IpAddr],
) -> Option<Child> {
    let Agreed { index, mode, spi_in, spi_out, suite, mut local_ts, mut remote_ts } = agreed;
    let Keying { derivation, secrets, ni, nr, initiator } = keying;
    let material = derivation.child(&suite, secrets, ni, nr)?;
    let (keys_in, keys_out) = if *initiator {
        (material.responder, material.initiator)
    } else {
        (material.initiator, material.responder)
    };
    let id = core.new_child(common.id);
    let config = connection.children.get(index);
    let life = config.and_then(|child| child.life);
    let origin = if connection.reset == Strategy::Restore { Origin::Saved } else { Origin::Negotiated };
    let duplicate = |(encr, integ): &(Secret, Secret)| (encr.duplicate(), integ.duplicate());
    let kept = (origin == Origin::Saved).then(|| {
        let (keys_in, keys_out) = (duplicate(&keys_in), duplicate(&keys_out));
        Box::new(Kept { mode, keys_in, keys_out, ends: life.map(|life| whole_seconds(now.wall + life)) })
    });
    core.emit(
        common.id,
        Effect::Install(Box::new(ChildSa {
            id,
            connection: Arc::clone(connection),
            child: index,
            protocol: suite.protocol,
            mode,
            spi_in,
            spi_out,
            encr: suite.encr,
            integ: suite.integ,
            esn: suite.esn,
            keys_in,
            keys_out,
            local_ts: local_ts.clone(),
            remote_ts: remote_ts.clone(),
            local: common.path.local.ip(),
            remote: common.path.remote.ip(),
            encap: common.encap().filter(|_| suite.protocol == ProtocolId::ESP),
            replaces,
            in_use,
            leases: leases.to_vec(),
            origin,
        })),
    );
    let rekey_at =
        config.and_then(|child| child.rekey.map(|after| jittered(core, after, child.rekey_jitter)));
    let life_at = life.map(|after| now.monotonic + after);
    // They do not change any more, and there are many of them.
    local_ts.shrink_to_fit();
    remote_ts.shrink_to_fit();
    Some(Child {
        id,
        index,
        spi_in,
        spi_out,
        suite,
        local_ts,
        remote_ts,
        state: ChildState::Installing,
        since: now.monotonic,
        rekey_at: rekey_at.map(|after| now.monotonic + after),
        life_at,
        retire_at: None,
        replaces,
        nonce: None,
        kept,
    })
}

/// `after`, less a random part of `jitter`.
pub(super) fn jittered(core: &mut Core, after: Duration, jitter: Duration) -> Duration {
    let part = f64::from(core.random.u32()) / f64::from(u32::MAX);
    after.saturating_sub(jitter.mul_f64(part))
}
