//! X.509: which certificates are believed, and what a peer has to show for its identity (RFC 5280, RFC 4945).
//!
//! A peer is believed if there is a path from its certificate to a configured CA on which everything is valid now and
//! nothing is revoked, if the certificate holds the identity that the peer claims, and if the key in it made the
//! signature. The path is rustls-webpki's work, which bounds it; why there is none is found out here, so that the
//! reason names the certificate at fault.

use core::cmp::Reverse;
use core::fmt;
use core::time::Duration;
use std::time::SystemTime;

use aws_lc_rs::digest;
use rustls_pki_types::{CertificateDer, Der, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, ExtendedKeyUsageValidator, KeyPurposeIdIter,
    OwnedCertRevocationList, RevocationOptionsBuilder, UnknownStatusPolicy, anchor_from_trusted_cert,
};
use x509_cert::certificate::{Certificate, Rfc5280, Version};
use x509_cert::crl::CertificateList;
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage, SubjectAltName, SubjectKeyIdentifier};
use x509_cert::name::Name;

use super::identity::Identity;
use super::name::DistinguishedName;
use super::raw_rsa;
pub use super::reason::CertificateError;
use super::reason::{Case, in_time, shown, system_time};
use super::signature::{self, Signature, SignatureError};
use crate::message::IdData;
use crate::message::registry::{CertEncoding, IdType};

/// Most certificates and most CRLs that are taken from a peer; more are not looked at.
const PRESENTED_LIMIT: usize = 16;
/// Most names of a certificate that an error message lists.
const LISTED_NAMES: usize = 8;

/// Signatures on certificates and CRLs that are believed: SHA-1 and RSA keys below 2048 bits are not.
static ALGORITHMS: &[&dyn SignatureVerificationAlgorithm] = &[
    webpki::aws_lc_rs::ECDSA_P256_SHA256,
    webpki::aws_lc_rs::ECDSA_P256_SHA384,
    webpki::aws_lc_rs::ECDSA_P256_SHA512,
    webpki::aws_lc_rs::ECDSA_P384_SHA256,
    webpki::aws_lc_rs::ECDSA_P384_SHA384,
    webpki::aws_lc_rs::ECDSA_P384_SHA512,
    webpki::aws_lc_rs::ECDSA_P521_SHA256,
    webpki::aws_lc_rs::ECDSA_P521_SHA384,
    webpki::aws_lc_rs::ECDSA_P521_SHA512,
    webpki::aws_lc_rs::ED25519,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA256,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA384,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA512,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
];

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
    pub(super) anchors: Vec<Anchor>,
    /// The newest first: webpki asks the first one that is responsible for a certificate.
    pub(super) crls: Vec<Crl>,
    policy: Policy,
}

pub(super) struct Anchor {
    der: Vec<u8>,
    /// As webpki wants it.
    authority: TrustAnchor<'static>,
    pub(super) certificate: Certificate,
    /// Whether it may issue certificates; if not, it only stands for itself.
    pub(super) is_ca: bool,
    /// SHA-1 of the Subject Public Key Info.
    key_hash: Vec<u8>,
}

pub(super) struct Crl {
    pub(super) list: CertRevocationList<'static>,
    pub(super) issuer: Name,
    this_update: Duration,
    pub(super) next_update: Option<SystemTime>,
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

/// Why something cannot be trusted: it is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// Without a CA nobody is believed.
    #[error("there is no CA certificate")]
    NoAnchor,
    /// The CA certificate with this index.
    #[error("CA certificate {} cannot be read: {what}", index + 1)]
    Anchor {
        /// Its index.
        index: usize,
        /// What is wrong.
        what: String,
    },
    /// The CRL with this index.
    #[error("CRL {} cannot be read: {what}", index + 1)]
    Crl {
        /// Its index.
        index: usize,
        /// What is wrong.
        what: String,
    },
}

impl Trust {
    /// Believes certificates of these CAs (DER), unless one of these CRLs (DER) lists them. A certificate that is no
    /// CA's can be among the CAs: then the peer that has exactly this one is believed.
    pub fn new(anchors: &[Vec<u8>], crls: &[Vec<u8>], policy: Policy) -> Result<Self, TrustError> {
        if anchors.is_empty() {
            return Err(TrustError::NoAnchor);
        }
        let anchors = anchors
            .iter()
            .enumerate()
            .map(|(index, der)| Anchor::new(der).map_err(|what| TrustError::Anchor { index, what }))
            .collect::<Result<_, _>>()?;
        let mut crls = crls
            .iter()
            .enumerate()
            .map(|(index, der)| Crl::new(der).map_err(|what| TrustError::Crl { index, what }))
            .collect::<Result<Vec<_>, _>>()?;
        crls.sort_by_key(|crl| Reverse(crl.this_update));
        Ok(Self { anchors, crls, policy })
    }

    /// For a CERTREQ payload: the SHA-1 hashes, 20 bytes each, of the CAs' Subject Public Key Info.
    pub fn authorities(&self) -> Vec<u8> {
        self.anchors.iter().flat_map(|anchor| anchor.key_hash.iter().copied()).collect()
    }

    /// For CERTREQ payloads of IKEv1: the names of the CAs, DER.
    pub fn subjects(&self) -> Vec<Vec<u8>> {
        let names = self.anchors.iter().map(|anchor| anchor.certificate.tbs_certificate().subject().to_der());
        names.filter_map(Result::ok).collect()
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
        self.verify_with(presented, identity, at, |spki| {
            signature::verify(spki, signature, octets, self.policy.allow_sha1)
        })
    }

    /// Judges a peer that claims `identity` and has signed a hash of IKEv1 (RFC 2409 section 5.1), with an RSA key.
    pub fn verify_hash(
        &self,
        presented: &Presented,
        identity: &Identity,
        signature: &[u8],
        hash: &[u8],
        at: SystemTime,
    ) -> Result<PeerKey, CertificateError> {
        self.verify_with(presented, identity, at, |spki| {
            let right = raw_rsa::verify(spki, hash, signature);
            if right { Ok("RSA without a hash algorithm") } else { Err(SignatureError::Wrong) }
        })
    }

    fn verify_with(
        &self,
        presented: &Presented,
        identity: &Identity,
        at: SystemTime,
        verify: impl FnOnce(&[u8]) -> Result<&'static str, SignatureError>,
    ) -> Result<PeerKey, CertificateError> {
        let der = presented.certificates.first().ok_or(CertificateError::Missing)?;
        let own =
            Certificate::from_der(der).map_err(|error| CertificateError::Malformed(error.to_string()))?;
        let not_after = if self.anchors.iter().any(|anchor| anchor.der == *der) {
            in_time(&own, at)?;
            expiry(&own)
        } else {
            self.path(der, &own, presented, at)?
        };
        may_sign(&own)?;
        holds(&own, identity)?;
        let spki = spki(&own).map_err(CertificateError::Malformed)?;
        let algorithm = verify(&spki)?;
        let name = |name| {
            distinguished(name).ok_or_else(|| CertificateError::Malformed("a name is too long".to_owned()))
        };
        Ok(PeerKey {
            subject: name(own.tbs_certificate().subject())?,
            issuer: name(own.tbs_certificate().issuer())?,
            not_after,
            algorithm,
        })
    }

    /// Finds a path to a CA. Gives the time when its first certificate expires.
    fn path(
        &self,
        der: &[u8],
        own: &Certificate,
        presented: &Presented,
        at: SystemTime,
    ) -> Result<SystemTime, CertificateError> {
        let case = Case::new(self, own, presented, at);
        let own_der = CertificateDer::from(der);
        let end = EndEntityCert::try_from(&own_der).map_err(|error| case.explain(&error))?;
        // webpki takes an anchor as it is: that it is a CA, and not out of time, is ours to see to.
        let anchors: Vec<TrustAnchor<'_>> = self
            .anchors
            .iter()
            .filter(|anchor| anchor.is_ca && in_time(&anchor.certificate, at).is_ok())
            .map(Anchor::borrow)
            .collect();
        let intermediates: Vec<CertificateDer<'_>> = presented
            .certificates
            .iter()
            .skip(1)
            .take(PRESENTED_LIMIT)
            // One that cannot be read must not keep webpki from the others.
            .filter(|der| Certificate::from_der(der).is_ok())
            .map(|der| CertificateDer::from(der.as_slice()))
            .collect();
        let time = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let search = |crls: &[&Crl], strict: bool| {
            let crls: Vec<&CertRevocationList<'_>> = crls.iter().map(|crl| &crl.list).collect();
            let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|options| {
                let (unknown, stale) = if strict {
                    (UnknownStatusPolicy::Deny, ExpirationPolicy::Enforce)
                } else {
                    (UnknownStatusPolicy::Allow, ExpirationPolicy::Ignore)
                };
                options.with_status_policy(unknown).with_expiration_policy(stale).build()
            });
            if strict && revocation.is_none() {
                return Err(webpki::Error::UnknownRevocationStatus);
            }
            end.verify_for_usage(ALGORITHMS, &anchors, &intermediates, time, Purpose, revocation, None)
        };

        // Revoked is what a configured CRL says is revoked, whatever newer CRLs the peer sends; or what those say.
        let own_crls: Vec<&Crl> = self.crls.iter().collect();
        let mut found = search(&own_crls, self.policy.require_crl);
        if !case.sent_crls.is_empty() && found.as_ref().err().is_none_or(is_about_crls) {
            let mut all: Vec<&Crl> = self.crls.iter().chain(&case.sent_crls).collect();
            all.sort_by_key(|crl| Reverse(crl.this_update));
            match search(&all, self.policy.require_crl) {
                Err(webpki::Error::CertRevoked) => found = Err(webpki::Error::CertRevoked),
                with_sent if found.is_err() => found = with_sent,
                _ => {}
            }
        }
        let path = found.map_err(|error| case.explain(&error))?;

        let anchor = self.anchors.iter().find(|anchor| anchor.borrow() == *path.anchor());
        // webpki looks at the path length that intermediate CAs allow, not at that of the anchor.
        let allowed = anchor.and_then(|anchor| path_length(&anchor.certificate));
        if allowed.is_some_and(|allowed| path.intermediate_certificates().count() > usize::from(allowed)) {
            return Err(case.explain(&webpki::Error::PathLenConstraintViolated));
        }
        let intermediates = path
            .intermediate_certificates()
            .filter_map(|certificate| Certificate::from_der(&certificate.der()).ok())
            .map(|certificate| expiry(&certificate));
        Ok(intermediates
            .chain(anchor.map(|anchor| expiry(&anchor.certificate)))
            .fold(expiry(own), SystemTime::min))
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> =
            self.anchors.iter().map(|anchor| shown(anchor.certificate.tbs_certificate().subject())).collect();
        f.debug_struct("Trust")
            .field("anchors", &names)
            .field("crls", &self.crls.len())
            .field("policy", &self.policy)
            .finish()
    }
}

impl Anchor {
    fn new(der: &[u8]) -> Result<Self, String> {
        let certificate = Certificate::from_der(der).map_err(|error| error.to_string())?;
        let authority = anchor_from_trusted_cert(&CertificateDer::from(der))
            .map_err(|error| error.to_string())?
            .to_owned();
        let key_hash =
            digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &spki(&certificate)?).as_ref().to_vec();
        Ok(Self { der: der.to_vec(), authority, is_ca: is_ca(&certificate), certificate, key_hash })
    }

    /// A copy that owns nothing.
    fn borrow(&self) -> TrustAnchor<'_> {
        TrustAnchor {
            subject: Der::from(self.authority.subject.as_ref()),
            subject_public_key_info: Der::from(self.authority.subject_public_key_info.as_ref()),
            name_constraints: self.authority.name_constraints.as_ref().map(|der| Der::from(der.as_ref())),
        }
    }
}

impl Crl {
    pub(super) fn new(der: &[u8]) -> Result<Self, String> {
        let fields =
            CertificateList::<Rfc5280>::from_der(der).map_err(|error| error.to_string())?.tbs_cert_list;
        let list = OwnedCertRevocationList::from_der(der).map_err(|error| error.to_string())?;
        Ok(Self {
            list: list.into(),
            this_update: fields.this_update.to_unix_duration(),
            next_update: fields.next_update.map(system_time),
            issuer: fields.issuer,
        })
    }
}

/// Errors that CRLs the peer sent may mend.
const fn is_about_crls(error: &webpki::Error) -> bool {
    use webpki::Error;
    matches!(
        error,
        Error::UnknownRevocationStatus | Error::CrlExpired { .. } | Error::InvalidCrlSignatureForPublicKey
    )
}

/// What a certificate may be made for, so that IKE may use it: RFC 4945 section 5.1.3.12 (`ipsecIKE`, any), and what CAs
/// give to gateways and clients that know no IKE (TLS server and client, the older IPsec purposes).
struct Purpose;

const PURPOSES: [&[usize]; 7] = [
    &[1, 3, 6, 1, 5, 5, 7, 3, 17],
    &[1, 3, 6, 1, 5, 5, 8, 2, 2],
    &[2, 5, 29, 37, 0],
    &[1, 3, 6, 1, 5, 5, 7, 3, 1],
    &[1, 3, 6, 1, 5, 5, 7, 3, 2],
    &[1, 3, 6, 1, 5, 5, 7, 3, 5],
    &[1, 3, 6, 1, 5, 5, 7, 3, 7],
];

impl ExtendedKeyUsageValidator for Purpose {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let mut present = Vec::new();
        for purpose in purposes {
            let purpose = purpose?.to_decoded_oid();
            if PURPOSES.contains(&purpose.as_slice()) {
                return Ok(());
            }
            present.push(purpose);
        }
        // No extension, no restriction.
        if present.is_empty() {
            return Ok(());
        }
        Err(webpki::Error::RequiredEkuNotFoundContext(webpki::RequiredEkuNotFoundContext {
            required: webpki::KeyUsage::required_if_present(IPSEC_IKE),
            present,
        }))
    }
}

/// 1.3.6.1.5.5.7.3.17, DER without tag and length.
const IPSEC_IKE: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x11];

/// RFC 5280 section 4.2.1.9. Roots of X.509 version 1 have no extensions that could say so; they are taken for what the
/// configuration says they are.
fn is_ca(certificate: &Certificate) -> bool {
    let tbs = certificate.tbs_certificate();
    let may_issue = match tbs.get_extension::<KeyUsage>() {
        Ok(usage) => usage.is_none_or(|(_, usage)| usage.key_cert_sign()),
        Err(_) => false,
    };
    match tbs.get_extension::<BasicConstraints>() {
        Ok(Some((_, constraints))) => constraints.ca && may_issue,
        Ok(None) => tbs.version() == Version::V1,
        Err(_) => false,
    }
}

/// How many CAs may follow below this one.
fn path_length(certificate: &Certificate) -> Option<u8> {
    let constraints = certificate.tbs_certificate().get_extension::<BasicConstraints>().ok()??;
    constraints.1.path_len_constraint
}

/// RFC 4945 section 5.1.3.2: "if a KeyUsage extension is present, … implementations … MUST … digitalSignature or
/// nonRepudiation".
pub(super) fn may_sign(certificate: &Certificate) -> Result<(), CertificateError> {
    let usage = certificate.tbs_certificate().get_extension::<KeyUsage>();
    match usage {
        Ok(None) => Ok(()),
        Ok(Some((_, usage))) if usage.digital_signature() || usage.non_repudiation() => Ok(()),
        Ok(Some(_)) => Err(CertificateError::Purpose {
            subject: shown(certificate.tbs_certificate().subject()),
            what: "its key usage has neither digitalSignature nor nonRepudiation",
        }),
        Err(error) => Err(CertificateError::Malformed(error.to_string())),
    }
}

/// Whether the certificate holds `identity` (RFC 4945 section 3.1): addresses, host names and mail addresses as a subject
/// alternative name, distinguished names as the subject (or, as strongSwan has it, as a directory name among the
/// alternatives), key identifiers as the subject key identifier. The subject's common name is no host name.
pub(super) fn holds(certificate: &Certificate, identity: &Identity) -> Result<(), CertificateError> {
    let tbs = certificate.tbs_certificate();
    let malformed = |error: x509_cert::der::Error| CertificateError::Malformed(error.to_string());
    let key_identifier = tbs.get_extension::<SubjectKeyIdentifier>().map_err(malformed)?;
    let alternatives = tbs.get_extension::<SubjectAltName>().map_err(malformed)?;
    let held: Vec<Identity> = distinguished(tbs.subject())
        .map(Identity::Dn)
        .into_iter()
        .chain(alternatives.into_iter().flat_map(|(_, names)| names.0).filter_map(|name| alternative(&name)))
        .collect();
    let is_key = || match (identity, &key_identifier) {
        (Identity::KeyId(wanted), Some((_, held))) => wanted == held.0.as_bytes(),
        _ => false,
    };
    if held.contains(identity) || is_key() {
        return Ok(());
    }
    let mut names: Vec<String> = held.iter().take(LISTED_NAMES).map(ToString::to_string).collect();
    if held.len() > LISTED_NAMES {
        names.push(format!("{} more", held.len() - LISTED_NAMES));
    }
    Err(CertificateError::Identity { identity: identity.to_string(), holds: names.join(" and ") })
}

/// A subject alternative name, if there is an identity of its type.
fn alternative(name: &GeneralName) -> Option<Identity> {
    let identity = match name {
        GeneralName::DnsName(host) => IdData { kind: IdType::FQDN, data: host.as_bytes().to_vec() },
        GeneralName::Rfc822Name(mail) => IdData { kind: IdType::RFC822_ADDR, data: mail.as_bytes().to_vec() },
        GeneralName::IpAddress(octets) => {
            let kind = if octets.as_bytes().len() == 4 { IdType::IPV4_ADDR } else { IdType::IPV6_ADDR };
            IdData { kind, data: octets.as_bytes().to_vec() }
        }
        GeneralName::DirectoryName(name) => IdData { kind: IdType::DER_ASN1_DN, data: name.to_der().ok()? },
        _ => return None,
    };
    match Identity::from_data(&identity) {
        Identity::Other(_) => None,
        identity => Some(identity),
    }
}

pub(super) fn distinguished(name: &Name) -> Option<DistinguishedName> {
    name.to_der().ok().and_then(|der| DistinguishedName::from_der(&der).ok())
}

fn spki(certificate: &Certificate) -> Result<Vec<u8>, String> {
    certificate.tbs_certificate().subject_public_key_info().to_der().map_err(|error| error.to_string())
}

fn expiry(certificate: &Certificate) -> SystemTime {
    system_time(certificate.tbs_certificate().validity().not_after)
}
