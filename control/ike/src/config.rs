//! What an endpoint is configured with. Made by control from its file; immutable and shared once made.

use core::fmt;
use core::net::IpAddr;
use core::time::Duration;
use std::collections::HashMap;
use std::sync::Arc;

use ipnet::IpNet;

use crate::Secret;
use crate::auth::certificate::Trust;
use crate::auth::identity::{Identity, IdentityPattern};
use crate::auth::signature::SigningKey;
use crate::message::{Proposal, TrafficSelector};
pub use crate::record::Strategy;
pub use crate::settings::{Retransmit, Settings};

/// One `[[connection]]`: with whom, how both authenticate, and what is protected.
#[derive(Debug)]
pub struct Connection {
    /// Its name.
    pub name: Arc<str>,
    /// Digest of everything else, secrets included, by whoever made it: a connection of the same name and fingerprint is
    /// the same (OPS-2). Not secret, and not shown.
    pub fingerprint: [u8; 32],
    /// This side's addresses, in order of preference; empty: any.
    pub local: Vec<IpAddr>,
    /// Networks that the peer may come from; empty: any.
    pub remote_nets: Vec<IpNet>,
    /// Where to reach the peer; `None`: it comes to us.
    pub remote: Option<IpAddr>,
    /// The peer's port for the first message, as a rule 500.
    pub remote_port: u16,
    /// Proposals of the IKE SA, in order of preference. At least one.
    pub proposals: Vec<Proposal>,
    /// This side's identity.
    pub local_id: Identity,
    /// Identities that the peer may have.
    pub remote_id: IdentityPattern,
    /// How this side authenticates.
    pub local_auth: LocalAuth,
    /// How the peer has to authenticate.
    pub remote_auth: RemoteAuth,
    /// CHILD_SAs.
    pub children: Vec<Child>,
    /// As responder: where clients' addresses come from, by name of a [`PoolConfig`].
    pub pools: Vec<Arc<str>>,
    /// As responder: name servers for clients.
    pub dns: Vec<IpAddr>,
    /// As initiator: ask for an IPv4 and for an IPv6 address.
    pub request_address: (bool, bool),
    /// RFC 4555.
    pub mobike: bool,
    /// RFC 7383.
    pub fragmentation: bool,
    /// RFC 6023: as initiator, leave the first CHILD_SA out of IKE_AUTH.
    pub childless: bool,
    /// Encapsulate in UDP even if there is no NAT, by pretending one.
    pub force_encap: bool,
    /// Age at which the IKE SA is rekeyed, before jitter; `None`: never by this side.
    pub rekey: Option<Duration>,
    /// Up to this much is taken off each rekey time, at random.
    pub rekey_jitter: Duration,
    /// How long after the rekey time the IKE SA is closed, if it was not rekeyed.
    pub over_time: Duration,
    /// Liveness check after this long without a message from the peer; `None`: never.
    pub dpd: Option<Duration>,
    /// What happens to an IKE SA of the same peer identity when a new one is established.
    pub unique: Unique,
    /// What happens to its IKE SAs after a reset of this node.
    pub reset: Strategy,
    /// IKEv1 instead of IKEv2, and what only that has.
    pub v1: Option<V1>,
}

/// What only IKEv1 has.
#[derive(Debug)]
pub struct V1 {
    /// A password beside what authenticates phase 1.
    pub xauth: Xauth,
    /// Aggressive mode: it is what this side begins with, and the peer may.
    pub aggressive: bool,
}

/// XAuth (draft-beaulieu-ike-xauth).
pub enum Xauth {
    /// None.
    None,
    /// As client: this user.
    Client {
        /// The user.
        user: String,
        /// The password.
        password: Secret,
    },
    /// As gateway: passwords by user.
    Server(Arc<HashMap<String, Secret>>),
}

impl fmt::Debug for Xauth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Client { .. } => "XAuth client",
            Self::Server(_) => "XAuth gateway",
        })
    }
}

/// See [`Connection::unique`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unique {
    /// The old one is deleted (the default).
    Replace,
    /// The old one stays, unless the peer says INITIAL_CONTACT.
    Keep,
    /// The old one stays even then.
    Never,
}

/// How this side authenticates.
pub enum LocalAuth {
    /// With a shared secret.
    Psk(Secret),
    /// With a certificate.
    Certificate {
        /// DER, the own one first, then intermediate CAs.
        chain: Vec<Vec<u8>>,
        /// Its private key.
        key: Arc<SigningKey>,
    },
    /// As client, with a password. The gateway authenticates by [`RemoteAuth::Certificate`] or a shared secret.
    EapMschapv2 {
        /// The EAP identity.
        user: String,
        /// The password.
        password: Secret,
    },
}

/// How the peer has to authenticate.
pub enum RemoteAuth {
    /// With a shared secret.
    Psk(Secret),
    /// With a certificate.
    Certificate(Arc<Trust>),
    /// As gateway: the client has a password. Passwords by EAP identity.
    EapMschapv2(Arc<HashMap<String, Secret>>),
}

impl fmt::Debug for LocalAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.method())
    }
}

impl fmt::Debug for RemoteAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.method())
    }
}

impl LocalAuth {
    /// In words.
    pub const fn method(&self) -> &'static str {
        match self {
            Self::Psk(_) => "shared secret",
            Self::Certificate { .. } => "certificate",
            Self::EapMschapv2 { .. } => "EAP-MSCHAPv2",
        }
    }
}

impl RemoteAuth {
    /// In words.
    pub const fn method(&self) -> &'static str {
        match self {
            Self::Psk(_) => "shared secret",
            Self::Certificate(_) => "certificate",
            Self::EapMschapv2(_) => "EAP-MSCHAPv2",
        }
    }
}

/// Tunnel or transport mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Tunnel mode.
    Tunnel,
    /// Transport mode, by USE_TRANSPORT_MODE (section 1.3.1); falls back to tunnel mode if the peer does not want it.
    Transport,
}

/// One CHILD_SA.
#[derive(Debug)]
pub struct Child {
    /// Its name.
    pub name: Arc<str>,
    /// ESP or AH proposals, in order of preference. SPIs are put in when they are sent.
    pub proposals: Vec<Proposal>,
    /// This side's selectors.
    pub local_ts: Vec<Selector>,
    /// The peer's selectors.
    pub remote_ts: Vec<Selector>,
    /// Tunnel or transport.
    pub mode: Mode,
    /// When it begins.
    pub start: Start,
    /// What happens when the peer deletes it.
    pub on_close: Start,
    /// What happens when the peer is dead.
    pub on_dpd: Start,
    /// Age at which it is rekeyed, before jitter; `None`: never by this side.
    pub rekey: Option<Duration>,
    /// Up to this much is taken off each rekey time, at random.
    pub rekey_jitter: Duration,
    /// Age at which it is deleted, if it was not rekeyed.
    pub life: Option<Duration>,
}

/// When a CHILD_SA begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// When the peer, or a command, asks.
    None,
    /// At once.
    Start,
    /// On first traffic.
    Trap,
}

/// A traffic selector as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// As it stands.
    Fixed(TrafficSelector),
    /// The side's outer address, or the virtual address that it is assigned, with this protocol and these ports.
    Dynamic {
        /// Upper-layer protocol; 0 is any.
        protocol: u8,
        /// Ports.
        ports: core::ops::RangeInclusive<u16>,
    },
}

/// A pool of addresses for clients (MOB-6: the same identity gets the same address).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Its name.
    pub name: Arc<str>,
    /// First address.
    pub first: IpAddr,
    /// Last address, of the same family.
    pub last: IpAddr,
}
