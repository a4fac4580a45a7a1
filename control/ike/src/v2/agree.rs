//! Negotiation of proposals in the terms of the exchanges.

use crate::message::registry::{KeMethod, TransformType};
use crate::message::{Proposal, Transform};
use crate::negotiate::proposal::{self, without_key_exchange};
use crate::negotiate::{ChildSuite, IkeSuite};

/// As responder: the suite of the IKE SA, and the proposal that says so.
pub(super) fn choose_ike(configured: &[Proposal], offered: &[Proposal]) -> Option<(IkeSuite, Proposal)> {
    let chosen = proposal::choose(configured, offered)?;
    Some((chosen.ike()?.clone(), chosen.proposal))
}

/// As initiator: what the answer to `offered` agrees to.
pub(super) fn accepts_ike(offered: &[Proposal], answer: &[Proposal]) -> Option<IkeSuite> {
    proposal::accepts(offered, answer)?.ike().cloned()
}

/// Whether the connection with these proposals may have an IKE SA of this suite.
pub(super) fn allows_ike(configured: &[Proposal], suite: &IkeSuite) -> bool {
    configured.iter().any(|proposal| {
        let has = |kind, id: u16, bits: Option<u16>| {
            proposal.transforms.iter().any(|transform: &Transform| {
                transform.kind == kind
                    && transform.id == id
                    && transform.key_length.zip(bits).is_none_or(|(a, b)| a == b)
            })
        };
        has(TransformType::ENCR, suite.encr.0, Some(suite.key_bits))
            && has(TransformType::PRF, suite.prf.0, None)
            && has(TransformType::KE, suite.ke.0, None)
    })
}

/// As responder: the suite of the CHILD_SA, the peer's SPI, and the proposal that says so.
pub(super) fn choose_child(
    configured: &[Proposal],
    offered: &[Proposal],
    with_ke: bool,
) -> Option<(ChildSuite, u32, Proposal)> {
    let chosen = if with_ke {
        proposal::choose(configured, offered)
    } else {
        proposal::choose(&without_key_exchange(configured), offered)
    }?;
    Some((chosen.child()?.clone(), chosen.child_spi()?, chosen.proposal))
}

/// As initiator: what the answer to `offered` agrees to, and the peer's SPI.
pub(super) fn accepts_child(offered: &[Proposal], answer: &[Proposal]) -> Option<(ChildSuite, u32)> {
    let chosen = proposal::accepts(offered, answer)?;
    Some((chosen.child()?.clone(), chosen.child_spi()?))
}

/// The key exchange method of the first proposal that has one.
pub(super) fn first_method(proposals: &[Proposal]) -> Option<KeMethod> {
    let mut transforms = proposals.iter().flat_map(|proposal| &proposal.transforms);
    transforms
        .find(|transform| transform.kind == TransformType::KE && transform.id != KeMethod::NONE.0)
        .map(|transform| KeMethod(transform.id))
}

/// Whether a key exchange method is among the proposals.
pub(super) fn proposes(proposals: &[Proposal], method: KeMethod) -> bool {
    let mut transforms = proposals.iter().flat_map(|proposal| &proposal.transforms);
    transforms.any(|transform| transform.kind == TransformType::KE && transform.id == method.0)
}
