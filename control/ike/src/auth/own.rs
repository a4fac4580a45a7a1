//! This side's own certificates and what it trusts, judged when the configuration is read: what a peer would refuse is
//! better known before it does.

use std::time::SystemTime;

use x509_cert::certificate::Certificate;
use x509_cert::der::Decode;

use super::certificate::{CertificateError, Trust, distinguished, holds, may_sign};
use super::identity::Identity;
use super::reason::{in_time, shown};

/// A certificate of this side.
pub struct OwnCertificate(Certificate);

impl OwnCertificate {
    /// Reads DER.
    ///
    /// # Errors
    /// If it is no certificate; in words.
    pub fn from_der(der: &[u8]) -> Result<Self, String> {
        Certificate::from_der(der).map(Self).map_err(|error| error.to_string())
    }

    /// The subject as an identity, which every certificate holds.
    pub fn subject(&self) -> Option<Identity> {
        distinguished(self.0.tbs_certificate().subject()).map(Identity::Dn)
    }

    /// What a peer that judges it at `at` would find wrong with the certificate itself.
    ///
    /// # Errors
    /// If it is out of time or not made for signing.
    pub fn check(&self, at: SystemTime) -> Result<(), CertificateError> {
        in_time(&self.0, at)?;
        may_sign(&self.0)
    }

    /// Whether a peer would take it as proof of `identity`.
    ///
    /// # Errors
    /// [`CertificateError::Identity`] says what it holds instead.
    pub fn holds(&self, identity: &Identity) -> Result<(), CertificateError> {
        holds(&self.0, identity)
    }
}

impl Trust {
    /// CAs that cannot be used at `at` because they are out of time.
    pub fn unusable(&self, at: SystemTime) -> Vec<CertificateError> {
        self.anchors.iter().filter_map(|anchor| in_time(&anchor.certificate, at).err()).collect()
    }

    /// Issuers of CRLs whose successor was due before `at`, in quotes.
    pub fn stale(&self, at: SystemTime) -> Vec<String> {
        let stale = self.crls.iter().filter(|crl| crl.next_update.is_some_and(|next| next < at));
        stale.map(|crl| shown(&crl.issuer)).collect()
    }
}
