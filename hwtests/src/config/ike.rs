//! The sections about IKEv2 (`[ike]`, `[[pool]]`, `[[connection]]`), and connections between two ends.
//!
//! A [`Connection`] is one end's view. Postern's configuration is its serialisation; strongSwan's is written from the
//! same value by [`crate::peer::conf`], so that a test says once what both ends shall do and then changes what it is about.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::Serialize;

/// `[ike]`. What is left out keeps Postern's default.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Ike {
    /// Before the first retransmission.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retransmit_first_ms: Option<u32>,
    /// Of each wait to the one before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retransmit_factor: Option<f32>,
    /// Transmissions in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retransmit_tries: Option<u8>,
    /// Half-open IKE SAs above which a cookie is demanded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cookie_threshold: Option<u32>,
    /// Largest IP packet of an IKE message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fragment_size: Option<u16>,
    /// Between NAT keepalives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nat_keepalive_s: Option<u32>,
    /// Directory for tshark's tables of keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keylog: Option<PathBuf>,
}

impl Ike {
    /// Fast retransmission: a request is given up after 6.6 s, like strongSwan's with [`crate::peer::Options`]'s defaults.
    pub fn fast() -> Self {
        Self {
            retransmit_first_ms: Some(500),
            retransmit_factor: Some(1.5),
            retransmit_tries: Some(5),
            ..Self::default()
        }
    }
}

/// `[[pool]]`.
#[derive(Clone, Debug, Serialize)]
pub struct Pool {
    /// Name.
    pub name: String,
    /// First and last address with a hyphen between, or a network.
    pub range: String,
}

/// How one end authenticates, or how it wants the other to: `local_auth`, `remote_auth`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Auth {
    /// `psk`, `certificate` or `eap-mschapv2`.
    pub method: &'static str,
    /// Identity; `%any` and patterns for the other end's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Shared secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// Own certificate and intermediate CAs, PEM.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub certificate: Vec<PathBuf>,
    /// Private key, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// CAs that the other end's certificate may come from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ca: Vec<PathBuf>,
    /// Their revocation lists.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub crl: Vec<PathBuf>,
    /// User name, as client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Password, as client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Passwords by user name, as gateway.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub users: BTreeMap<String, String>,
}

/// How one end of a connection proves who it is; gives what both ends have to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Shared secret.
    Psk {
        /// Identity.
        id: String,
        /// Secret.
        secret: String,
    },
    /// Certificate.
    Certificate {
        /// Identity.
        id: String,
        /// Own certificate first, then intermediate CAs.
        chain: Vec<PathBuf>,
        /// Private key.
        key: PathBuf,
        /// What the other end trusts.
        ca: PathBuf,
    },
    /// User name and password (EAP-MSCHAPv2).
    Eap {
        /// User.
        user: String,
        /// Password.
        password: String,
    },
}

impl Credential {
    /// A shared secret under this identity.
    pub fn psk(id: &str) -> Self {
        Self::Psk { id: id.to_owned(), secret: "not a secret".to_owned() }
    }

    /// Joe, who has a password.
    pub fn eap() -> Self {
        Self::Eap { user: "joe".to_owned(), password: "open sesame".to_owned() }
    }

    /// What the end whose credential it is needs.
    pub fn own(&self) -> Auth {
        match self.clone() {
            Self::Psk { id, secret } => {
                Auth { method: "psk", id: Some(id), secret: Some(secret), ..Auth::default() }
            }
            Self::Certificate { id, chain, key, .. } => Auth {
                method: "certificate",
                id: Some(id),
                certificate: chain,
                key: Some(key),
                ..Auth::default()
            },
            Self::Eap { user, password } => Auth {
                method: "eap-mschapv2",
                id: Some(user.clone()),
                user: Some(user),
                password: Some(password),
                ..Auth::default()
            },
        }
    }

    /// What the other end needs.
    pub fn expected(&self) -> Auth {
        match self.clone() {
            Self::Psk { id, secret } => {
                Auth { method: "psk", id: Some(id), secret: Some(secret), ..Auth::default() }
            }
            Self::Certificate { id, ca, .. } => {
                Auth { method: "certificate", id: Some(id), ca: vec![ca], ..Auth::default() }
            }
            Self::Eap { user, password } => Auth {
                method: "eap-mschapv2",
                id: Some("%any".to_owned()),
                users: BTreeMap::from([(user, password)]),
                ..Auth::default()
            },
        }
    }
}

/// `[[connection]]`: one end's view.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Connection {
    /// Name.
    pub name: String,
    /// Major version of IKE, if it is not 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u8>,
    /// Aggressive mode of IKEv1, if it is switched on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggressive: Option<bool>,
    /// This end's addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub local: Vec<IpAddr>,
    /// Where to reach the other end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote: Option<IpAddr>,
    /// Networks that the other end may come from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remote_nets: Vec<String>,
    /// Proposals of the IKE SA, in strongSwan's words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub proposals: Vec<String>,
    /// This end's authentication.
    pub local_auth: Auth,
    /// The other end's.
    pub remote_auth: Auth,
    /// XAuth of IKEv1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xauth: Option<Xauth>,
    /// RFC 4555.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mobike: Option<bool>,
    /// RFC 7383.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fragmentation: Option<bool>,
    /// RFC 6023.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub childless: Option<bool>,
    /// UDP encapsulation without a NAT.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force_encap: Option<bool>,
    /// Age at which the IKE SA is rekeyed; 0: never.
    pub rekey_s: u32,
    /// Taken off it at random.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rekey_jitter_s: Option<u32>,
    /// Silence after which the peer is asked whether it lives; 0: never.
    pub dpd_s: u32,
    /// `replace`, `keep` or `never`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unique: Option<&'static str>,
    /// Postern only: what happens after a reset of this end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reset: Option<&'static str>,
    /// Names of pools for clients.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<String>,
    /// Name servers for clients.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// `v4`, `v6`: as client, ask for an address.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub request_address: Vec<&'static str>,
    /// CHILD_SAs.
    #[serde(rename = "child")]
    pub children: Vec<Child>,
}

/// `xauth`: a password beside what authenticates phase 1 of IKEv1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Xauth {
    /// User name, as client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Password, as client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Passwords by user name, as gateway.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub users: BTreeMap<String, String>,
}

/// `[[connection.child]]`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Child {
    /// Name.
    pub name: String,
    /// Networks behind this end, or `dynamic`.
    pub local_net: Vec<String>,
    /// Networks behind the other end, or `dynamic`.
    pub remote_net: Vec<String>,
    /// ESP proposals, in strongSwan's words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub esp: Vec<String>,
    /// `tunnel` or `transport`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<&'static str>,
    /// `none`, `start` or `trap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<&'static str>,
    /// The same, when the peer closes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_close: Option<&'static str>,
    /// The same, when the peer is dead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_dpd: Option<&'static str>,
    /// Age at which it is rekeyed; 0: never.
    pub rekey_s: u32,
    /// Taken off it at random.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rekey_jitter_s: Option<u32>,
    /// Age at which it ends, if it was not rekeyed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub life_s: Option<u32>,
    /// Packets after which it is rekeyed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rekey_packets: Option<u64>,
}

/// A connection between two ends, left and right, before either's view is taken.
#[derive(Clone, Debug)]
pub struct Link {
    /// Name of the connection and of its only child.
    pub name: String,
    /// Outer addresses.
    pub outer: (IpAddr, IpAddr),
    /// Inner networks.
    pub nets: (String, String),
    /// Proposal of the IKE SA.
    pub ike: String,
    /// Proposal of the CHILD_SA.
    pub esp: String,
    /// How each end authenticates.
    pub auth: (Credential, Credential),
}

/// What is negotiated by tests about something else.
pub const IKE: &str = "aes128gcm16-prfsha256-x25519";
/// The same for ESP.
pub const ESP: &str = "aes128gcm16";

impl Link {
    /// With a shared secret and the default proposals.
    pub fn new(name: &str, outer: (IpAddr, IpAddr), nets: (String, String)) -> Self {
        let auth = (Credential::psk("left.example"), Credential::psk("right.example"));
        Self { name: name.to_owned(), outer, nets, ike: IKE.to_owned(), esp: ESP.to_owned(), auth }
    }

    /// The left end's view.
    pub fn left(&self) -> Connection {
        self.view(self.outer, (&self.nets.0, &self.nets.1), (&self.auth.0, &self.auth.1))
    }

    /// The right end's view.
    pub fn right(&self) -> Connection {
        let outer = (self.outer.1, self.outer.0);
        self.view(outer, (&self.nets.1, &self.nets.0), (&self.auth.1, &self.auth.0))
    }

    fn view(
        &self,
        outer: (IpAddr, IpAddr),
        nets: (&str, &str),
        auth: (&Credential, &Credential),
    ) -> Connection {
        let child = Child {
            name: self.name.clone(),
            local_net: vec![nets.0.to_owned()],
            remote_net: vec![nets.1.to_owned()],
            esp: vec![self.esp.clone()],
            ..Child::default()
        };
        Connection {
            name: self.name.clone(),
            local: vec![outer.0],
            remote: Some(outer.1),
            proposals: vec![self.ike.clone()],
            local_auth: auth.0.own(),
            remote_auth: auth.1.expected(),
            mobike: Some(false),
            children: vec![child],
            ..Connection::default()
        }
    }
}

impl Connection {
    /// Its only child.
    pub fn child(&mut self) -> Option<&mut Child> {
        self.children.first_mut()
    }
}
