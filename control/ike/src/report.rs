//! What an endpoint tells people: events, and why something failed, in words that say what to do.

use core::net::IpAddr;
use std::sync::Arc;

use crate::auth::certificate::CertificateError;
pub use crate::ignored::Ignored;
use crate::message::registry::{ExchangeType, KeMethod, NotifyType};
use crate::output::{ChildId, Path, SaId, explain_notify};

/// An event.
#[derive(Clone, Debug)]
pub enum Report {
    /// An IKE SA is established.
    Established {
        /// The SA.
        sa: SaId,
        /// The connection.
        connection: Arc<str>,
        /// The peer's identity.
        remote_id: String,
        /// Where it is.
        path: Path,
        /// The suite, in strongSwan's words.
        suite: String,
    },
    /// An IKE SA goes on after a reset.
    Restored {
        /// The SA.
        sa: SaId,
        /// The connection.
        connection: Arc<str>,
        /// The peer's identity.
        remote_id: String,
        /// Where it was last seen.
        path: Path,
        /// CHILD_SAs that go on with it.
        children: usize,
    },
    /// An IKE SA was replaced by a rekey.
    Rekeyed {
        /// The old SA.
        old: SaId,
        /// The new SA.
        new: SaId,
    },
    /// An IKE SA is gone.
    Closed {
        /// The SA.
        sa: SaId,
        /// The connection, if it was known.
        connection: Option<Arc<str>>,
        /// Why.
        reason: CloseReason,
    },
    /// An attempt to establish an IKE SA failed.
    Failed {
        /// The SA.
        sa: SaId,
        /// The connection, if it was known.
        connection: Option<Arc<str>>,
        /// Where the peer is.
        path: Path,
        /// Why.
        failure: Failure,
    },
    /// A CHILD_SA is in use.
    ChildUp {
        /// The IKE SA.
        sa: SaId,
        /// The CHILD_SA.
        child: ChildId,
        /// Connection.
        connection: Arc<str>,
        /// Its name in the configuration.
        name: Arc<str>,
        /// The one it replaces.
        replaces: Option<ChildId>,
        /// The suite, in strongSwan's words.
        suite: String,
    },
    /// A CHILD_SA is gone.
    ChildDown {
        /// The IKE SA.
        sa: SaId,
        /// The CHILD_SA.
        child: ChildId,
        /// Connection.
        connection: Arc<str>,
        /// Its name in the configuration.
        name: Arc<str>,
        /// Why.
        reason: CloseReason,
    },
    /// A CHILD_SA could not be made; the IKE SA stays.
    ChildFailed {
        /// The IKE SA.
        sa: SaId,
        /// Connection.
        connection: Arc<str>,
        /// Its name in the configuration.
        name: Arc<str>,
        /// Why.
        failure: Failure,
    },
    /// The peer is at another address.
    Moved {
        /// The IKE SA.
        sa: SaId,
        /// Where it is now.
        path: Path,
    },
    /// A message was not acted on. Rate-limited; the counters have them all.
    Ignored {
        /// From where to where.
        path: Path,
        /// Why.
        reason: Ignored,
    },
}

/// Why an SA is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The peer deleted it.
    Peer,
    /// This side was told to.
    Command,
    /// It does not answer any more.
    Dead,
    /// It has lost it in a reset, and proves so (RFC 6290).
    Forgotten,
    /// A rekey replaced it.
    Replaced,
    /// Its hard limit came before a rekey.
    Expired,
    /// The peer came back with a new IKE SA (INITIAL_CONTACT or a uniqueness rule).
    Superseded,
    /// The configuration no longer has it.
    Reconfigured,
    /// Something failed in it.
    Failed,
}

/// Why something failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// No answer at all.
    #[error(
        "{0} does not answer; is the peer up, is its address right, does a firewall let UDP 500 and 4500 pass?"
    )]
    NoAnswer(IpAddr),
    /// The peer sent an error notification.
    #[error("the peer answered {0}: {text}", text = explain_notify(*.0))]
    Notified(NotifyType),
    /// None of the peer's proposals fits.
    #[error("no common proposal: the peer offers {offered}, here are {configured}")]
    NoProposal {
        /// The peer's.
        offered: String,
        /// Ours.
        configured: String,
    },
    /// The peer chose what was not offered.
    #[error("the peer chose a proposal that was not offered")]
    BadChoice,
    /// The peer wants a key exchange method that this side does not propose.
    #[error("the peer insists on key exchange {0}, which is not proposed")]
    KeyExchange(KeMethod),
    /// The peer's public value is not valid.
    #[error("the peer's public value is no valid one of its key exchange method")]
    PublicValue,
    /// No connection fits the addresses and identities.
    #[error(
        "no connection fits the peer {identity} at {address}; see `remote`, `remote_auth.id` and `local_auth.id`"
    )]
    NoConnection {
        /// The identity it claims.
        identity: String,
        /// Its address.
        address: IpAddr,
    },
    /// The peer's identity is not the one configured.
    #[error("the peer says it is {found}, expected is {expected}")]
    Identity {
        /// What it says.
        found: String,
        /// The configuration's pattern.
        expected: String,
    },
    /// The shared secret is wrong.
    #[error("{0} does not have the same shared secret")]
    SharedSecret(String),
    /// The peer authenticates by another method than configured.
    #[error("the peer authenticates by {found}, expected is {expected}")]
    Method {
        /// What it uses.
        found: String,
        /// The configuration's.
        expected: &'static str,
    },
    /// Its certificate or signature is not good.
    #[error("{0}")]
    Certificate(#[from] CertificateError),
    /// This side could not sign.
    #[error("this side cannot sign: {0}")]
    Signing(String),
    /// EAP failed.
    #[error("EAP: {0}")]
    Eap(String),
    /// The traffic selectors do not overlap.
    #[error("the traffic selectors do not fit: the peer has {offered}, here are {configured}")]
    Selectors {
        /// The peer's.
        offered: String,
        /// Ours.
        configured: String,
    },
    /// No address is left in the pool.
    #[error("the address pool {0} is full")]
    PoolFull(String),
    /// The peer did not assign the address that was asked for.
    #[error("the peer assigned no address; is it configured with a pool?")]
    NoAddress,
    /// The peer's message breaks the protocol.
    #[error("the peer's {0} message breaks the protocol: {1}")]
    Protocol(ExchangeType, &'static str),
    /// The peer's message of IKEv1 breaks the protocol.
    #[error("the peer's {0} {1}")]
    V1Protocol(&'static str, &'static str),
    /// Message 5 of main mode is not answered.
    #[error(
        "the peer does not answer the encrypted identity; are the shared secrets of both ends the same, does it know this identity?"
    )]
    V1NoProof,
    /// XAuth failed.
    #[error("XAuth: {0}")]
    Xauth(&'static str),
    /// The datapath refused the SA.
    #[error("the datapath refused the SA: {0}")]
    Datapath(String),
    /// Too slow.
    #[error("it was not complete in time")]
    Timeout,
    /// It was told to stop.
    #[error("it was cancelled")]
    Cancelled,
    /// The connection is gone or changed.
    #[error("the connection was removed or changed")]
    Reconfigured,
}

impl Failure {
    /// Of an IKE SA that is closed before it is established.
    pub(crate) const fn of_closing(reason: CloseReason) -> Self {
        match reason {
            CloseReason::Reconfigured => Self::Reconfigured,
            _ => Self::Cancelled,
        }
    }
}
