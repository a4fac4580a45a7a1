//! What an endpoint wants done: ONE ordered queue. Effects of one IKE SA are applied in their order; effects of
//! different SAs do not wait for each other.

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use std::sync::Arc;

use crate::Secret;
use crate::config::{Connection, Mode};
use crate::job::{Job, JobId};
use crate::message::IkeSpi;
use crate::message::TrafficSelector;
use crate::message::registry::{EncrId, IntegId, NotifyType, ProtocolId};
use crate::record::SavedIke;
use crate::report::Report;

/// Names an IKE SA for the life of the endpoint; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SaId(pub u64);

/// Names a CHILD_SA (both directions) for the life of the endpoint; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChildId(pub u64);

/// Where datagrams of an exchange travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Path {
    /// This side.
    pub local: SocketAddr,
    /// The peer, as this side sees it.
    pub remote: SocketAddr,
    /// On port 4500, with a non-ESP marker in front of each message (RFC 3948). The driver adds and removes the marker.
    pub natt: bool,
}

/// One thing to be done.
#[derive(Debug)]
pub struct Output {
    /// The IKE SA it belongs to.
    pub sa: Option<SaId>,
    /// What.
    pub effect: Effect,
}

/// What is to be done.
#[derive(Debug)]
pub enum Effect {
    /// Send a datagram.
    Transmit {
        /// From where to where.
        path: Path,
        /// The message, without a non-ESP marker.
        datagram: Vec<u8>,
    },
    /// One byte 0xFF to the peer's port 4500 (RFC 3948 section 2.3).
    Keepalive(Path),
    /// Run a job; answer with [`computed`](crate::endpoint::Endpoint::computed).
    Compute {
        /// To answer with.
        id: JobId,
        /// The work.
        job: Job,
    },
    /// Install both directions of a CHILD_SA; answer with [`installed`](crate::endpoint::Endpoint::installed). What
    /// comes after it for the same IKE SA waits for that.
    Install(Box<ChildSa>),
    /// From now on what the child's selectors match is sent through it.
    Use(ChildId),
    /// The peer (or this side) is elsewhere: the child's outer addresses change, nothing else does.
    Move {
        /// The child.
        child: ChildId,
        /// This side's address.
        local: IpAddr,
        /// The peer's.
        remote: IpAddr,
        /// UDP encapsulation: this side's port and the peer's.
        encap: Option<(u16, u16)>,
    },
    /// Remove both directions of a CHILD_SA. Its policy goes back to trap or nothing, unless another child is in use.
    Retire(ChildId),
    /// As client: these addresses were assigned; they are to be set on this machine before children use them.
    Configure(VirtualConfiguration),
    /// As client: the addresses of this IKE SA are no longer ours.
    Unconfigure,
    /// What is saved of an IKE SA for the time after a reset (RST-1). A [`Persist::Put`] is durable before anything that
    /// comes after it for the same IKE SA is done.
    Persist(Persist),
    /// Something happened that people want to know.
    Report(Report),
}

/// See [`Effect::Persist`].
#[derive(Debug)]
pub enum Persist {
    /// This is what there is to be saved now.
    Put(Box<SavedIke>),
    /// The IKE SA with these SPIs is gone.
    Remove((IkeSpi, IkeSpi)),
}

/// What a client was given by a configuration payload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtualConfiguration {
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
}

/// A CHILD_SA to install: everything the datapath needs, from this side's view.
#[derive(Debug)]
pub struct ChildSa {
    /// Its name.
    pub id: ChildId,
    /// The connection.
    pub connection: Arc<Connection>,
    /// Index of the child in [`Connection::children`].
    pub child: usize,
    /// ESP (or AH).
    pub protocol: ProtocolId,
    /// Tunnel or transport.
    pub mode: Mode,
    /// SPI of packets to this side.
    pub spi_in: u32,
    /// SPI of packets to the peer.
    pub spi_out: u32,
    /// Encryption.
    pub encr: EncrId,
    /// Integrity; NONE with an AEAD.
    pub integ: IntegId,
    /// Extended sequence numbers.
    pub esn: bool,
    /// Keys (encryption with its salt, integrity) of packets to this side.
    pub keys_in: (Secret, Secret),
    /// Keys of packets to the peer.
    pub keys_out: (Secret, Secret),
    /// Traffic selectors of this side.
    pub local_ts: Vec<TrafficSelector>,
    /// Traffic selectors of the peer's side.
    pub remote_ts: Vec<TrafficSelector>,
    /// This side's outer address.
    pub local: IpAddr,
    /// The peer's outer address.
    pub remote: IpAddr,
    /// UDP encapsulation: this side's port and the peer's.
    pub encap: Option<(u16, u16)>,
    /// The child that this one replaces, by a rekey. It stays installed until it is retired.
    pub replaces: Option<ChildId>,
    /// Whether to send through it at once; else [`Effect::Use`] follows.
    pub in_use: bool,
    /// Addresses that were assigned to the peer by this side.
    pub leases: Vec<IpAddr>,
    /// Whether its keys may be installed once more after a reset, or are.
    pub origin: Origin,
}

/// See [`ChildSa::origin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// They never are.
    Negotiated,
    /// They are saved and may be.
    Saved,
    /// They were in use before a reset. Sequence numbers go on above all that were used, and nothing is accepted that was
    /// accepted before; who cannot warrant that must not install them.
    Restored,
}

/// The state of an IKE SA, for showing.
#[derive(Clone, Debug)]
pub struct IkeSaView {
    /// Its name.
    pub id: SaId,
    /// The connection, once it is known.
    pub connection: Option<Arc<str>>,
    /// SPIs.
    pub spis: (IkeSpi, IkeSpi),
    /// Whether this side began it.
    pub initiator: bool,
    /// In words: `connecting`, `established`, `rekeying`, `deleting`.
    pub state: &'static str,
    /// Where the peer is.
    pub path: Path,
    /// This side's identity.
    pub local_id: Option<String>,
    /// The peer's identity, once it is authenticated.
    pub remote_id: Option<String>,
    /// The proposal, in strongSwan's words.
    pub suite: String,
    /// Age since established.
    pub age: Duration,
    /// Time to the next rekey.
    pub rekey_in: Option<Duration>,
    /// Addresses assigned to the peer (as responder) or to this side (as client).
    pub addresses: Vec<IpAddr>,
    /// Children.
    pub children: Vec<ChildView>,
}

/// The state of a CHILD_SA, for showing.
#[derive(Clone, Debug)]
pub struct ChildView {
    /// Its name.
    pub id: ChildId,
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// In words: `installing`, `installed`, `rekeying`, `replaced`, `deleting`.
    pub state: &'static str,
    /// SPIs in and out.
    pub spis: (u32, u32),
    /// The proposal, in strongSwan's words.
    pub suite: String,
    /// Selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// Selectors.
    pub remote_ts: Vec<TrafficSelector>,
    /// UDP encapsulation.
    pub encap: bool,
    /// Age since installed.
    pub age: Duration,
}

/// What a notification that the peer sent as the reason of a failure means, for people.
pub fn explain_notify(kind: NotifyType) -> &'static str {
    match kind {
        NotifyType::NO_PROPOSAL_CHOSEN => {
            "the peer accepts none of the proposals; compare `proposals` and `esp` of both ends"
        }
        NotifyType::AUTHENTICATION_FAILED => {
            "the peer refused the authentication; compare identities, secrets and certificates of both ends"
        }
        NotifyType::TS_UNACCEPTABLE => {
            "the peer accepts none of the traffic selectors; compare the networks of both ends"
        }
        NotifyType::INVALID_KE_PAYLOAD => "the peer wants another key exchange method than any proposed",
        NotifyType::INTERNAL_ADDRESS_FAILURE => "the peer has no address to assign; is its pool full?",
        NotifyType::FAILED_CP_REQUIRED => "the peer insists on assigning an address; set `request_address`",
        NotifyType::SINGLE_PAIR_REQUIRED => "the peer wants a CHILD_SA for each pair of addresses",
        NotifyType::NO_ADDITIONAL_SAS => "the peer wants no more CHILD_SAs in this IKE SA",
        NotifyType::TEMPORARY_FAILURE => "the peer is busy with another exchange; it is tried again",
        NotifyType::CHILD_SA_NOT_FOUND => "the peer does not know the CHILD_SA",
        NotifyType::INVALID_SYNTAX => "the peer could not read a message",
        NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD => {
            "the peer does not know a payload that is marked critical"
        }
        NotifyType::INVALID_MAJOR_VERSION => "the peer speaks another version of IKE",
        _ => "the peer sent an error",
    }
}
