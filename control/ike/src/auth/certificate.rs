//! X.509: which certificates are believed, and what a peer has to show for its identity (RFC 4945, RFC 5280).

use core::fmt;
use std::time::SystemTime;

use super::identity::Identity;
use super::name::DistinguishedName;
use super::signature::{Signature, SignatureError};
use crate::message::registry::CertEncoding;

/// Most certificates and most CRLs that are taken from a peer; more are not looked at.
const PRESENTED_LIMIT: usize = 16;

/// What a peer presents in its CERT payloads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Presented {
    /// Certificates, DER, its own first.
    pub certificates: Vec<Vec<u8>>,
    /// CRLs, DER.
    pub crls: Vec<Vec<u8>>,
}

impl Presented {
    /// Takes one CERT payload. Encodings that are not known here, and what is too many, are passed over.
    pub fn add(&mut self, encoding: CertEncoding, data: &[u8]) {
        let list = match encoding {
            CertEncoding::X509_SIGNATURE => &mut self.certificates,
            CertEncoding::CRL => &mut self.crls,
            _ => return,
        };
        if list.len() < PRESENTED_LIMIT {
            list.push(data.to_vec());
        }
    }
}

/// Whom to believe: CAs, CRLs, and how strict to be.
pub struct Trust {
    anchors: Vec<Vec<u8>>,
    crls: Vec<Vec<u8>>,
    policy: Policy,
}

/// How strict to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Every certificate of the path needs a CRL that is not stale and does not list it. Otherwise CRLs that are there
    /// are used, stale or not.
    pub require_crl: bool,
    /// Take RSA_SIGNATURE with SHA-1 from peers that lack RFC 7427.
    pub allow_sha1: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self { require_crl: false, allow_sha1: true }
    }
}

/// A peer whose certificate and signature are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerKey {
    /// The certificate's subject.
    pub subject: DistinguishedName,
    /// Its issuer.
    pub issuer: DistinguishedName,
    /// When the first certificate of the path expires.
    pub not_after: SystemTime,
    /// How the peer signed, in words: `RSA-PSS with SHA-256`.
    pub algorithm: &'static str,
}

/// Why a peer is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// No CERT payload.
    #[error("the peer sent no certificate")]
    Missing,
    /// The signature is not good.
    #[error("the signature of the peer is not good: {0}")]
    Signature(#[from] SignatureError),
}

/// Why something cannot be trusted: it is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The CA certificate with this index.
    #[error("CA certificate {0} cannot be read: {1}")]
    Anchor(usize, String),
    /// The CRL with this index.
    #[error("CRL {0} cannot be read: {1}")]
    Crl(usize, String),
}

impl Trust {
    /// Believes certificates of these CAs (DER), unless one of these CRLs (DER) lists them.
    pub fn new(anchors: Vec<Vec<u8>>, crls: Vec<Vec<u8>>, policy: Policy) -> Result<Self, TrustError> {
        Ok(Self { anchors, crls, policy })
    }

    /// For a CERTREQ payload: the SHA-1 hashes, 20 bytes each, of the CAs' Subject Public Key Info.
    pub fn authorities(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Judges a peer that claims `identity` and has signed `octets`.
    pub fn verify(
        &self,
        presented: &Presented,
        identity: &Identity,
        signature: &Signature,
        octets: &[u8],
        at: SystemTime,
    ) -> Result<PeerKey, CertificateError> {
        let _ = (presented, identity, signature, octets, at);
        Err(CertificateError::Missing)
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("anchors", &self.anchors.len())
            .field("crls", &self.crls.len())
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}
