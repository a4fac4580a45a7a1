//! Why a peer's certificate is not believed, in words that say what to do.
//!
//! webpki says what is wrong, not with which certificate. [`Case`] follows the names from the peer's certificate up to a
//! CA, as a person would, and finds the one.

use core::time::Duration;
use std::time::SystemTime;

use x509_cert::certificate::Certificate;
use x509_cert::der::{DateTime, Decode, Encode};
use x509_cert::name::Name;
use x509_cert::time::Time;

use super::certificate::{Anchor, Crl, Presented, Trust};
use super::name::DistinguishedName;
use super::signature::SignatureError;

/// Longest path that is followed.
const PATH_LIMIT: usize = 16;

/// Why a peer is not believed, in words that say what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// No CERT payload.
    #[error("the peer sent no certificate")]
    Missing,
    /// It is no certificate.
    #[error("the peer's certificate cannot be read: {0}")]
    Malformed(String),
    /// Too late.
    #[error("the certificate of {subject} expired at {}", instant(*since))]
    Expired {
        /// Whose.
        subject: String,
        /// When it expired.
        since: SystemTime,
    },
    /// Too early.
    #[error("the certificate of {subject} is not valid before {}; are the clocks right?", instant(*until))]
    NotYetValid {
        /// Whose.
        subject: String,
        /// When it begins.
        until: SystemTime,
    },
    /// On a CRL.
    #[error("the certificate of {0} is revoked")]
    Revoked(String),
    /// The policy demands a CRL.
    #[error("there is no CRL of {0}, and `crl_required` is set")]
    NoCrl(String),
    /// The policy demands a fresh CRL.
    #[error("the CRL of {issuer} is stale since {}, and `crl_required` is set", instant(*since))]
    StaleCrl {
        /// Whose CRL.
        issuer: String,
        /// When the next one was due.
        since: SystemTime,
    },
    /// The CRL is not good.
    #[error("a CRL is not good: {0}")]
    BadCrl(String),
    /// No path.
    #[error(
        "the certificate of {subject} is issued by {issuer}, which is not a configured CA, nor did the peer send its certificate"
    )]
    UnknownCa {
        /// The last certificate of the path.
        subject: String,
        /// Who is missing.
        issuer: String,
    },
    /// A path by name only.
    #[error(
        "the certificate of {subject} is not signed by the configured CA {issuer}, only by one of the same name; is the CA certificate outdated?"
    )]
    WrongCaKey {
        /// The last certificate of the path.
        subject: String,
        /// The CA.
        issuer: String,
    },
    /// A signature that is too weak.
    #[error(
        "a certificate of the path of {0} is signed with an algorithm that is not accepted (such as SHA-1, or RSA below 2048 bits)"
    )]
    WeakAlgorithm(String),
    /// Not for IKE.
    #[error("the certificate of {subject} is not made for this: {what}")]
    Purpose {
        /// Whose.
        subject: String,
        /// What it lacks.
        what: &'static str,
    },
    /// The path breaks a rule of RFC 5280.
    #[error("the certificate path of {subject} is not valid: {what}")]
    Path {
        /// Whose.
        subject: String,
        /// Which rule.
        what: String,
    },
    /// The certificate is somebody else's.
    #[error("the peer says it is {identity}, but its certificate holds only {holds}")]
    Identity {
        /// What it says.
        identity: String,
        /// What its certificate holds.
        holds: String,
    },
    /// The signature is not good.
    #[error("the signature of the peer is not good: {0}")]
    Signature(#[from] SignatureError),
}

const NO_CA: &str = "a certificate in it was issued by one that is not a CA's";

/// A peer's certificate that was looked at, and all that belongs to it.
pub(super) struct Case<'a> {
    trust: &'a Trust,
    own: &'a Certificate,
    /// From the peer's own certificate up, as far as the peer's certificates go: each is issued by the next one's
    /// subject.
    chain: Vec<Certificate>,
    /// The configured CA that issued the last one of them, going by its name.
    top: Option<&'a Anchor>,
    pub(super) sent_crls: Vec<Crl>,
    at: SystemTime,
}

impl<'a> Case<'a> {
    /// Reads what the peer sent. What cannot be read is left out: webpki says whether it was needed.
    pub(super) fn new(trust: &'a Trust, own: &'a Certificate, presented: &Presented, at: SystemTime) -> Self {
        let others: Vec<Certificate> = presented
            .certificates
            .iter()
            .skip(1)
            .take(PATH_LIMIT)
            .filter_map(|der| Certificate::from_der(der).ok())
            .collect();
        let mut chain = vec![own.clone()];
        let mut top: Option<&Anchor> = None;
        while let Some(last) = chain.last() {
            let issuer = last.tbs_certificate().issuer();
            top =
                trust.anchors.iter().find(|anchor| anchor.certificate.tbs_certificate().subject() == issuer);
            let next = others.iter().find(|next| next.tbs_certificate().subject() == issuer);
            let next = next.filter(|next| !chain.contains(next)).cloned();
            match next {
                Some(next) if top.is_none() && chain.len() < PATH_LIMIT => chain.push(next),
                _ => break,
            }
        }
        let sent_crls = presented.crls.iter().take(PATH_LIMIT).filter_map(|der| Crl::new(der).ok()).collect();
        Self { trust, own, chain, top, sent_crls, at }
    }

    /// Why there is no path, with the names of those concerned.
    pub(super) fn explain(&self, error: &webpki::Error) -> CertificateError {
        use webpki::Error;
        let subject = shown(self.own.tbs_certificate().subject());
        // A certificate of the path that is out of time explains every other error.
        if let Some(error) = self
            .chain
            .iter()
            .chain(self.top.map(|anchor| &anchor.certificate))
            .find_map(|certificate| in_time(certificate, self.at).err())
        {
            return error;
        }
        match error {
            Error::UnknownIssuer => {
                let last = self.last().tbs_certificate();
                let (subject, issuer) = (shown(last.subject()), shown(last.issuer()));
                match self.top {
                    Some(top) if !top.is_ca => CertificateError::Path { subject, what: NO_CA.to_owned() },
                    Some(_) => CertificateError::WrongCaKey { subject, issuer },
                    None => CertificateError::UnknownCa { subject, issuer },
                }
            }
            Error::InvalidSignatureForPublicKey if self.top.is_some() => {
                let last = self.last().tbs_certificate();
                CertificateError::WrongCaKey { subject: shown(last.subject()), issuer: shown(last.issuer()) }
            }
            Error::CertRevoked => CertificateError::Revoked(
                self.chain
                    .iter()
                    .find(|certificate| self.is_listed(certificate))
                    .map_or(subject, |certificate| shown(certificate.tbs_certificate().subject())),
            ),
            Error::UnknownRevocationStatus => {
                let issuer = |certificate: &Certificate| certificate.tbs_certificate().issuer().clone();
                let missing = self
                    .chain
                    .iter()
                    .map(issuer)
                    .find(|issuer| !self.crls().any(|crl| crl.issuer == *issuer));
                CertificateError::NoCrl(shown(&missing.unwrap_or_else(|| issuer(self.own))))
            }
            Error::CrlExpired { next_update, .. } => {
                let since = SystemTime::UNIX_EPOCH + Duration::from_secs(next_update.as_secs());
                let stale = self.crls().find(|crl| crl.next_update == Some(since));
                let issuer = stale.map_or_else(|| self.last().tbs_certificate().issuer(), |crl| &crl.issuer);
                CertificateError::StaleCrl { issuer: shown(issuer), since }
            }
            Error::InvalidCrlSignatureForPublicKey => {
                CertificateError::BadCrl("its signature is not that of its issuer".to_owned())
            }
            Error::IssuerNotCrlSigner => {
                CertificateError::BadCrl("its issuer may not sign CRLs (key usage)".to_owned())
            }
            Error::UnsupportedCrlSignatureAlgorithmContext(_)
            | Error::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_) => {
                CertificateError::BadCrl("it is signed with an algorithm that is not accepted".to_owned())
            }
            Error::UnsupportedSignatureAlgorithmContext(_)
            | Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
                CertificateError::WeakAlgorithm(subject)
            }
            Error::RequiredEkuNotFoundContext(_) => CertificateError::Purpose {
                subject,
                what: "its extended key usage has neither ipsecIKE nor TLS server or client authentication",
            },
            Error::CaUsedAsEndEntity => {
                CertificateError::Purpose { subject, what: "it is the certificate of a CA" }
            }
            Error::EndEntityUsedAsCa => CertificateError::Path { subject, what: NO_CA.to_owned() },
            Error::PathLenConstraintViolated => {
                CertificateError::Path { subject, what: "it is longer than a CA in it allows".to_owned() }
            }
            Error::NameConstraintViolation => CertificateError::Path {
                subject,
                what: "a CA in it may not issue certificates for such names (name constraints)".to_owned(),
            },
            Error::UnsupportedCriticalExtension => CertificateError::Path {
                subject,
                what: "a certificate in it has a critical extension that is not known here".to_owned(),
            },
            Error::UnsupportedCertVersion => CertificateError::Path {
                subject,
                what: "a certificate in it is not of X.509 version 3".to_owned(),
            },
            other => CertificateError::Path { subject, what: other.to_string() },
        }
    }

    /// The uppermost certificate that the peer has.
    fn last(&self) -> &Certificate {
        self.chain.last().unwrap_or(self.own)
    }

    fn crls(&self) -> impl Iterator<Item = &Crl> {
        self.trust.crls.iter().chain(&self.sent_crls)
    }

    fn is_listed(&self, certificate: &Certificate) -> bool {
        let tbs = certificate.tbs_certificate();
        self.crls().any(|crl| {
            crl.issuer == *tbs.issuer()
                && crl.list.find_serial(tbs.serial_number().as_bytes()).is_ok_and(|entry| entry.is_some())
        })
    }
}

/// Whether `at` is within the certificate's validity.
pub(super) fn in_time(certificate: &Certificate, at: SystemTime) -> Result<(), CertificateError> {
    let tbs = certificate.tbs_certificate();
    let (until, since) = (system_time(tbs.validity().not_before), system_time(tbs.validity().not_after));
    if at < until {
        Err(CertificateError::NotYetValid { subject: shown(tbs.subject()), until })
    } else if at > since {
        Err(CertificateError::Expired { subject: shown(tbs.subject()), since })
    } else {
        Ok(())
    }
}

/// A name, for people; safe to log.
pub(super) fn shown(name: &Name) -> String {
    name.to_der()
        .ok()
        .and_then(|der| DistinguishedName::from_der(&der).ok())
        .map_or_else(|| "(a name that cannot be shown)".to_owned(), |name| format!("\"{name}\""))
}

/// `2026-11-21T13:40:00Z`.
fn instant(time: SystemTime) -> String {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| DateTime::from_unix_duration(since).ok())
        .map_or_else(|| "(no date)".to_owned(), |time| time.to_string())
}

/// A time of a certificate; none is before 1970.
pub(super) fn system_time(time: Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + time.to_unix_duration()
}
