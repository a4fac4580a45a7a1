//! Signatures of the AUTH payload: RFC 7427's "Digital Signature" with RSA (PKCS#1 v1.5 and PSS), ECDSA and Ed25519
//! (RFC 8420), and the older methods of RFC 7296 and RFC 4754 for peers that announce no hash algorithms.
//!
//! Signing chooses by what the peer announced; verifying takes what the peer names, if the key and this side's policy
//! allow it.

use core::fmt;

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature as algorithm;
use aws_lc_rs::signature::{
    EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair, UnparsedPublicKey, VerificationAlgorithm,
};
use x509_cert::der::asn1::{AnyRef, ContextSpecific, ObjectIdentifier, UintRef};
use x509_cert::der::{Decode, Encode, Reader, SliceReader, Tag, TagNumber, Tagged};
use x509_cert::spki::{AlgorithmIdentifierRef, SubjectPublicKeyInfoRef};

use super::raw_rsa::RawKey;
use crate::message::registry::{AuthMethod, HashId};

pub(super) const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const MGF1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.8");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// Hash algorithms that this side takes, for SIGNATURE_HASH_ALGORITHMS. SHA-1 is not one of them.
pub const fn hashes() -> &'static [HashId] {
    &[HashId::SHA2_256, HashId::SHA2_384, HashId::SHA2_512, HashId::IDENTITY]
}

/// What an AUTH payload says that is not a shared key's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// Method.
    pub method: AuthMethod,
    /// Authentication data.
    pub data: Vec<u8>,
}

/// Why something could not be signed, or a signature is not good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The peer's hash algorithms do not fit the own key.
    #[error("the peer takes {accepted}; a key of type {key} signs with {needed}")]
    NoHash {
        /// Type of the own key.
        key: KeyKind,
        /// What it needs.
        needed: &'static str,
        /// What the peer takes.
        accepted: String,
    },
    /// Without RFC 7427, RSA means SHA-1, which is not signed here.
    #[error(
        "the peer does not announce hash algorithms (RFC 7427), so that an RSA key would have to sign SHA-1, which is not done; \
         use a newer peer, or an ECDSA key"
    )]
    OnlySha1,
    /// The library failed.
    #[error("the signature could not be computed")]
    Internal,
    /// The authentication method is no signature, or none that is known here.
    #[error("authentication method {0} is not supported for certificates")]
    Method(AuthMethod),
    /// The method does not fit the key in the certificate.
    #[error("it is made by {used}, but the certificate has a key of type {key}")]
    Mismatch {
        /// Method or algorithm.
        used: String,
        /// Type of the key in the certificate.
        key: KeyKind,
    },
    /// The certificate's key is of an unknown type.
    #[error("the certificate has a key of unsupported type {0}")]
    Key(String),
    /// RFC 7427's algorithm is unknown.
    #[error("its algorithm {0} is not supported")]
    Algorithm(String),
    /// The policy does not allow SHA-1.
    #[error("it is made with SHA-1, which is not allowed")]
    Sha1,
    /// The authentication data cannot be read.
    #[error("its algorithm identifier cannot be read")]
    Malformed,
    /// It is not the signature of this exchange by this key.
    #[error(
        "it does not verify with the certificate's key; is the peer's private key the one of its certificate?"
    )]
    Wrong,
}

/// Types of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// RSA.
    Rsa,
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// ECDSA on P-521.
    P521,
    /// Ed25519.
    Ed25519,
}

impl KeyKind {
    /// Of a Subject Public Key Info (DER).
    pub fn of(spki: &[u8]) -> Result<Self, SignatureError> {
        let info = SubjectPublicKeyInfoRef::from_der(spki)
            .map_err(|_| SignatureError::Key("unreadable".to_owned()))?;
        let curve = || {
            let oid = info.algorithm.parameters_oid().ok()?;
            CURVES.iter().find(|curve| curve.oid == oid).map(|curve| curve.kind)
        };
        match info.algorithm.oid {
            RSA_ENCRYPTION => Some(Self::Rsa),
            EC_PUBLIC_KEY => curve(),
            ED25519 => Some(Self::Ed25519),
            _ => None,
        }
        .ok_or_else(|| SignatureError::Key(info.algorithm.oid.to_string()))
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rsa => "RSA",
            Self::P256 => "ECDSA P-256",
            Self::P384 => "ECDSA P-384",
            Self::P521 => "ECDSA P-521",
            Self::Ed25519 => "Ed25519",
        })
    }
}

/// What belongs to a curve: RFC 4754 binds one hash to each.
struct Curve {
    kind: KeyKind,
    /// Of the signature with its hash.
    name: &'static str,
    oid: ObjectIdentifier,
    classic: AuthMethod,
    fixed: &'static algorithm::EcdsaVerificationAlgorithm,
    signing: &'static algorithm::EcdsaSigningAlgorithm,
    hash: HashId,
    /// Algorithm of RFC 7427 appendix A.3.
    signature_oid: ObjectIdentifier,
}

static CURVES: [Curve; 3] = [
    Curve {
        kind: KeyKind::P256,
        name: "ECDSA with SHA-256",
        oid: ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7"),
        classic: AuthMethod::ECDSA_SHA256_P256,
        fixed: &algorithm::ECDSA_P256_SHA256_FIXED,
        signing: &algorithm::ECDSA_P256_SHA256_FIXED_SIGNING,
        hash: HashId::SHA2_256,
        signature_oid: ECDSA_SHA256,
    },
    Curve {
        kind: KeyKind::P384,
        name: "ECDSA with SHA-384",
        oid: ObjectIdentifier::new_unwrap("1.3.132.0.34"),
        classic: AuthMethod::ECDSA_SHA384_P384,
        fixed: &algorithm::ECDSA_P384_SHA384_FIXED,
        signing: &algorithm::ECDSA_P384_SHA384_FIXED_SIGNING,
        hash: HashId::SHA2_384,
        signature_oid: ECDSA_SHA384,
    },
    Curve {
        kind: KeyKind::P521,
        name: "ECDSA with SHA-512",
        oid: ObjectIdentifier::new_unwrap("1.3.132.0.35"),
        classic: AuthMethod::ECDSA_SHA512_P521,
        fixed: &algorithm::ECDSA_P521_SHA512_FIXED,
        signing: &algorithm::ECDSA_P521_SHA512_FIXED_SIGNING,
        hash: HashId::SHA2_512,
        signature_oid: ECDSA_SHA512,
    },
];

/// What belongs to a hash algorithm that RSA signs with.
struct RsaHash {
    hash: HashId,
    /// OID of the hash, for PSS parameters.
    oid: ObjectIdentifier,
    /// Bytes of its output; RFC 7427 section 5 has a PSS salt as long.
    length: u8,
    pkcs1_name: &'static str,
    pss_name: &'static str,
    pkcs1: &'static algorithm::RsaParameters,
    pss: &'static algorithm::RsaParameters,
    pkcs1_signing: &'static algorithm::RsaSignatureEncoding,
    pss_signing: &'static algorithm::RsaSignatureEncoding,
    pkcs1_oid: ObjectIdentifier,
}

static RSA_HASHES: [RsaHash; 3] = [
    RsaHash {
        hash: HashId::SHA2_256,
        oid: ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1"),
        length: 32,
        pkcs1_name: "RSA with SHA-256",
        pss_name: "RSA-PSS with SHA-256",
        pkcs1: &algorithm::RSA_PKCS1_2048_8192_SHA256,
        pss: &algorithm::RSA_PSS_2048_8192_SHA256,
        pkcs1_signing: &algorithm::RSA_PKCS1_SHA256,
        pss_signing: &algorithm::RSA_PSS_SHA256,
        pkcs1_oid: ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11"),
    },
    RsaHash {
        hash: HashId::SHA2_384,
        oid: ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.2"),
        length: 48,
        pkcs1_name: "RSA with SHA-384",
        pss_name: "RSA-PSS with SHA-384",
        pkcs1: &algorithm::RSA_PKCS1_2048_8192_SHA384,
        pss: &algorithm::RSA_PSS_2048_8192_SHA384,
        pkcs1_signing: &algorithm::RSA_PKCS1_SHA384,
        pss_signing: &algorithm::RSA_PSS_SHA384,
        pkcs1_oid: ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12"),
    },
    RsaHash {
        hash: HashId::SHA2_512,
        oid: ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.3"),
        length: 64,
        pkcs1_name: "RSA with SHA-512",
        pss_name: "RSA-PSS with SHA-512",
        pkcs1: &algorithm::RSA_PKCS1_2048_8192_SHA512,
        pss: &algorithm::RSA_PSS_2048_8192_SHA512,
        pkcs1_signing: &algorithm::RSA_PKCS1_SHA512,
        pss_signing: &algorithm::RSA_PSS_SHA512,
        pkcs1_oid: ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.13"),
    },
];
const ECDSA_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
const ECDSA_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
const ECDSA_SHA512: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.4");
const RSA_SHA1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.5");
const ECDSA_SHA1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.1");

/// A private key. Its memory is the library's, which wipes it; `Debug` shows the type only.
pub struct SigningKey {
    key: PrivateKey,
    pss: bool,
    /// For IKEv1, if it is an RSA key.
    raw: Option<RawKey>,
}

enum PrivateKey {
    Rsa(RsaKeyPair),
    Ecdsa(EcdsaKeyPair, &'static Curve),
    Ed25519(Ed25519KeyPair),
}

/// Why bytes are no private key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFormatError {
    /// Neither PKCS#8, PKCS#1 nor SEC1 of a known type.
    #[error(
        "it holds no private key of a supported type (RSA of 2048 to 8192 bits, ECDSA P-256, P-384, P-521, Ed25519)"
    )]
    Unsupported,
}

impl SigningKey {
    /// Reads DER: PKCS#8, PKCS#1 (RSA) or SEC1 (ECDSA).
    pub fn from_der(der: &[u8]) -> Result<Self, KeyFormatError> {
        let rsa =
            || RsaKeyPair::from_pkcs8(der).or_else(|_| RsaKeyPair::from_der(der)).ok().map(PrivateKey::Rsa);
        let ed25519 = || Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).ok().map(PrivateKey::Ed25519);
        let ecdsa = || {
            CURVES.iter().find_map(|curve| {
                EcdsaKeyPair::from_pkcs8(curve.signing, der)
                    .or_else(|_| EcdsaKeyPair::from_private_key_der(curve.signing, der))
                    .ok()
                    .map(|key| PrivateKey::Ecdsa(key, curve))
            })
        };
        let key = ecdsa().or_else(ed25519).or_else(rsa).ok_or(KeyFormatError::Unsupported)?;
        let raw = if let PrivateKey::Rsa(_) = &key { RawKey::from_der(der) } else { None };
        Ok(Self { key, pss: false, raw })
    }

    /// Makes an RSA key sign with PSS instead of PKCS#1 v1.5 (RFC 7427 only). Other keys do not care.
    #[must_use]
    pub const fn with_pss(mut self) -> Self {
        self.pss = true;
        self
    }

    /// Its type.
    pub const fn kind(&self) -> KeyKind {
        match &self.key {
            PrivateKey::Rsa(_) => KeyKind::Rsa,
            PrivateKey::Ecdsa(_, curve) => curve.kind,
            PrivateKey::Ed25519(_) => KeyKind::Ed25519,
        }
    }

    /// Whether it is the private key of the certificate with this Subject Public Key Info (DER).
    pub fn fits(&self, spki: &[u8]) -> bool {
        let der = match &self.key {
            PrivateKey::Rsa(key) => AsDer::<PublicKeyX509Der<'_>>::as_der(key.public_key()),
            PrivateKey::Ecdsa(key, _) => AsDer::<PublicKeyX509Der<'_>>::as_der(key.public_key()),
            PrivateKey::Ed25519(key) => AsDer::<PublicKeyX509Der<'_>>::as_der(key.public_key()),
        };
        der.is_ok_and(|der| der.as_ref() == spki)
    }

    /// Signs `octets`, with an algorithm that a peer takes that announced `hashes`.
    pub fn sign(&self, hashes: &[HashId], octets: &[u8]) -> Result<Signature, SignatureError> {
        match &self.key {
            PrivateKey::Rsa(key) => self.sign_rsa(key, hashes, octets),
            PrivateKey::Ecdsa(key, curve) => sign_ecdsa(key, curve, hashes, octets),
            PrivateKey::Ed25519(key) if hashes.contains(&HashId::IDENTITY) => {
                let signature = key.try_sign(octets).map_err(|_| SignatureError::Internal)?;
                digital(&identifier(ED25519, None)?, signature.as_ref())
            }
            PrivateKey::Ed25519(_) => Err(self.no_hash("the identity hash (RFC 8420)", hashes)),
        }
    }

    /// Signs a hash of IKEv1 as it is, without naming its algorithm (RFC 2409 section 5.1); RSA keys only.
    pub fn sign_hash(&self, hash: &[u8]) -> Result<Signature, SignatureError> {
        let method = AuthMethod::RSA_SIGNATURE;
        let mismatch = SignatureError::Mismatch { used: "IKEv1 with RSA".to_owned(), key: self.kind() };
        let data = self.raw.as_ref().ok_or(mismatch)?.sign(hash).ok_or(SignatureError::Internal)?;
        Ok(Signature { method, data })
    }

    fn sign_rsa(
        &self,
        key: &RsaKeyPair,
        hashes: &[HashId],
        octets: &[u8],
    ) -> Result<Signature, SignatureError> {
        if hashes.is_empty() {
            return Err(SignatureError::OnlySha1);
        }
        // As strong as the modulus (NIST SP 800-57), else whatever is common.
        let preferred = match key.public_modulus_len() {
            0..384 => HashId::SHA2_256,
            384..960 => HashId::SHA2_384,
            _ => HashId::SHA2_512,
        };
        let hash = RSA_HASHES
            .iter()
            .filter(|entry| hashes.contains(&entry.hash))
            .min_by_key(|entry| (entry.hash != preferred, entry.hash))
            .ok_or_else(|| self.no_hash("SHA-256, SHA-384 or SHA-512", hashes))?;
        let (encoding, identifier) = if self.pss {
            (hash.pss_signing, identifier(RSA_PSS, Some(&pss_parameters(hash)?))?)
        } else {
            (hash.pkcs1_signing, identifier(hash.pkcs1_oid, Some(&NULL))?)
        };
        let mut signature = vec![0; key.public_modulus_len()];
        key.sign(encoding, &SystemRandom::new(), octets, &mut signature)
            .map_err(|_| SignatureError::Internal)?;
        digital(&identifier, &signature)
    }

    fn no_hash(&self, needed: &'static str, hashes: &[HashId]) -> SignatureError {
        let accepted = if hashes.is_empty() {
            "no hash algorithms at all (it lacks RFC 7427)".to_owned()
        } else {
            hashes.iter().take(16).map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        SignatureError::NoHash { key: self.kind(), needed, accepted }
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.kind())
    }
}

/// Whether `signature` is one of `octets` by the key of `spki` (Subject Public Key Info, DER). Gives the algorithm's name.
pub fn verify(
    spki: &[u8],
    signature: &Signature,
    octets: &[u8],
    allow_sha1: bool,
) -> Result<&'static str, SignatureError> {
    let kind = KeyKind::of(spki)?;
    let by = |algorithm: &'static dyn VerificationAlgorithm, signature: &[u8]| {
        UnparsedPublicKey::new(algorithm, spki).verify(octets, signature).map_err(|_| SignatureError::Wrong)
    };
    match signature.method {
        AuthMethod::RSA_SIGNATURE if kind == KeyKind::Rsa => {
            let hash = CLASSIC_RSA
                .iter()
                .find(|(algorithm, _, _)| by(*algorithm, &signature.data).is_ok())
                .ok_or(SignatureError::Wrong)?;
            if hash.2 && !allow_sha1 { Err(SignatureError::Sha1) } else { Ok(hash.1) }
        }
        AuthMethod::DIGITAL_SIGNATURE => {
            let (identifier, value) = signature
                .data
                .split_first()
                .and_then(|(length, rest)| rest.split_at_checked(usize::from(*length)))
                .ok_or(SignatureError::Malformed)?;
            let identifier =
                AlgorithmIdentifierRef::from_der(identifier).map_err(|_| SignatureError::Malformed)?;
            let (name, algorithm) = named(&identifier, kind)?;
            by(algorithm, value).map(|()| name)
        }
        method => {
            let mismatch = || SignatureError::Mismatch { used: method.to_string(), key: kind };
            match CURVES.iter().find(|curve| curve.classic == method) {
                Some(curve) if curve.kind == kind => by(curve.fixed, &signature.data).map(|()| curve.name),
                Some(_) => Err(mismatch()),
                None if method == AuthMethod::RSA_SIGNATURE => Err(mismatch()),
                None => Err(SignatureError::Method(method)),
            }
        }
    }
}

/// What RSA_SIGNATURE (RFC 7296 section 3.8: RSASSA-PKCS1-v1_5) may have been made with. Which hash it was only the
/// signature says; "SHOULD use SHA-1 as the default hash function" is why that is tried first.
static CLASSIC_RSA: [(&algorithm::RsaParameters, &str, bool); 4] = [
    (&algorithm::RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY, "RSA with SHA-1", true),
    (&algorithm::RSA_PKCS1_2048_8192_SHA256, "RSA with SHA-256", false),
    (&algorithm::RSA_PKCS1_2048_8192_SHA384, "RSA with SHA-384", false),
    (&algorithm::RSA_PKCS1_2048_8192_SHA512, "RSA with SHA-512", false),
];

/// ECDSA with RFC 7427 leaves curve and hash to the signer.
type EcdsaByCurve = [(KeyKind, &'static algorithm::EcdsaVerificationAlgorithm); 3];
static ECDSA: [(ObjectIdentifier, &str, EcdsaByCurve); 3] = [
    (
        ECDSA_SHA256,
        "ECDSA with SHA-256",
        [
            (KeyKind::P256, &algorithm::ECDSA_P256_SHA256_ASN1),
            (KeyKind::P384, &algorithm::ECDSA_P384_SHA256_ASN1),
            (KeyKind::P521, &algorithm::ECDSA_P521_SHA256_ASN1),
        ],
    ),
    (
        ECDSA_SHA384,
        "ECDSA with SHA-384",
        [
            (KeyKind::P256, &algorithm::ECDSA_P256_SHA384_ASN1),
            (KeyKind::P384, &algorithm::ECDSA_P384_SHA384_ASN1),
            (KeyKind::P521, &algorithm::ECDSA_P521_SHA384_ASN1),
        ],
    ),
    (
        ECDSA_SHA512,
        "ECDSA with SHA-512",
        [
            (KeyKind::P256, &algorithm::ECDSA_P256_SHA512_ASN1),
            (KeyKind::P384, &algorithm::ECDSA_P384_SHA512_ASN1),
            (KeyKind::P521, &algorithm::ECDSA_P521_SHA512_ASN1),
        ],
    ),
];

/// What RFC 7427's algorithm is called, and what verifies it with a key of type `kind`.
fn named(
    identifier: &AlgorithmIdentifierRef<'_>,
    kind: KeyKind,
) -> Result<(&'static str, &'static dyn VerificationAlgorithm), SignatureError> {
    let mismatch = |used: &str| SignatureError::Mismatch { used: used.to_owned(), key: kind };
    let rsa = |name: &'static str, algorithm: &'static dyn VerificationAlgorithm| {
        if kind == KeyKind::Rsa { Ok((name, algorithm)) } else { Err(mismatch(name)) }
    };
    if identifier.oid == RSA_PSS {
        return match RSA_HASHES.iter().find(|hash| is_pss_of(hash, identifier)) {
            Some(hash) => rsa(hash.pss_name, hash.pss),
            None => Err(SignatureError::Algorithm("RSA-PSS with unusual parameters".to_owned())),
        };
    }
    // RFC 7427 appendix A: RSA has NULL or nothing there, the others have nothing.
    let null = identifier.parameters.is_some_and(|parameters| parameters == AnyRef::NULL);
    if identifier.parameters.is_some() && !(null && kind == KeyKind::Rsa) {
        return Err(SignatureError::Malformed);
    }
    if let Some(hash) = RSA_HASHES.iter().find(|hash| hash.pkcs1_oid == identifier.oid) {
        return rsa(hash.pkcs1_name, hash.pkcs1);
    }
    if let Some((_, name, algorithms)) = ECDSA.iter().find(|(oid, _, _)| *oid == identifier.oid) {
        return algorithms
            .iter()
            .find(|(curve, _)| *curve == kind)
            .map(|(_, algorithm)| -> (&'static str, &'static dyn VerificationAlgorithm) {
                (name, *algorithm)
            })
            .ok_or_else(|| mismatch(name));
    }
    match identifier.oid {
        ED25519 if kind == KeyKind::Ed25519 => Ok(("Ed25519", &algorithm::ED25519)),
        ED25519 => Err(mismatch("Ed25519")),
        RSA_SHA1 | ECDSA_SHA1 => Err(SignatureError::Sha1),
        oid => Err(SignatureError::Algorithm(oid.to_string())),
    }
}

/// Whether these are RSASSA-PSS-params of `hash`, MGF1 with the same hash, and a salt of its length.
fn is_pss_of(hash: &RsaHash, identifier: &AlgorithmIdentifierRef<'_>) -> bool {
    let is_hash = |identifier: &AlgorithmIdentifierRef<'_>| {
        identifier.oid == hash.oid
            && identifier.parameters.is_none_or(|parameters| parameters == AnyRef::NULL)
    };
    let read = |parameters: AnyRef<'_>| -> Result<bool, x509_cert::der::Error> {
        let mut reader = SliceReader::new(parameters.value())?;
        let digest =
            ContextSpecific::<AlgorithmIdentifierRef<'_>>::decode_explicit(&mut reader, TagNumber(0))?;
        let mask = ContextSpecific::<AlgorithmIdentifierRef<'_>>::decode_explicit(&mut reader, TagNumber(1))?;
        let salt = ContextSpecific::<u8>::decode_explicit(&mut reader, TagNumber(2))?;
        let trailer = ContextSpecific::<u8>::decode_explicit(&mut reader, TagNumber(3))?;
        reader.finish()?;
        let mask = match mask.filter(|mask| mask.value.oid == MGF1).and_then(|mask| mask.value.parameters) {
            Some(parameters) => Some(parameters.decode_as::<AlgorithmIdentifierRef<'_>>()?),
            None => None,
        };
        Ok(digest.is_some_and(|digest| is_hash(&digest.value))
            && mask.is_some_and(|mask| is_hash(&mask))
            && salt.is_some_and(|salt| salt.value == hash.length)
            && trailer.is_none_or(|trailer| trailer.value == 1))
    };
    identifier
        .parameters
        .filter(|parameters| parameters.tag() == Tag::Sequence)
        .is_some_and(|parameters| read(parameters).unwrap_or(false))
}

/// RFC 7427 if the peer announced the curve's hash, else the method of RFC 4754, which names its hash itself.
fn sign_ecdsa(
    key: &EcdsaKeyPair,
    curve: &Curve,
    hashes: &[HashId],
    octets: &[u8],
) -> Result<Signature, SignatureError> {
    let fixed = key.sign(&SystemRandom::new(), octets).map_err(|_| SignatureError::Internal)?;
    if !hashes.contains(&curve.hash) {
        return Ok(Signature { method: curve.classic, data: fixed.as_ref().to_vec() });
    }
    let (r, s) = fixed.as_ref().split_at_checked(fixed.as_ref().len() / 2).ok_or(SignatureError::Internal)?;
    let encode = || {
        let (r, s) = (UintRef::new(r)?.to_der()?, UintRef::new(s)?.to_der()?);
        AnyRef::new(Tag::Sequence, &[r, s].concat())?.to_der()
    };
    digital(&identifier(curve.signature_oid, None)?, &encode().map_err(|_| SignatureError::Internal)?)
}

/// RFC 7427 section 3: length of the AlgorithmIdentifier, the identifier, the signature.
fn digital(identifier: &[u8], signature: &[u8]) -> Result<Signature, SignatureError> {
    let length = u8::try_from(identifier.len()).map_err(|_| SignatureError::Internal)?;
    Ok(Signature { method: AuthMethod::DIGITAL_SIGNATURE, data: [&[length], identifier, signature].concat() })
}

const NULL: [u8; 2] = [0x05, 0x00];

fn identifier(oid: ObjectIdentifier, parameters: Option<&[u8]>) -> Result<Vec<u8>, SignatureError> {
    let encode = || {
        let body = [&oid.to_der()?, parameters.unwrap_or_default()].concat();
        AnyRef::new(Tag::Sequence, &body)?.to_der()
    };
    encode().map_err(|_: x509_cert::der::Error| SignatureError::Internal)
}

/// RSASSA-PSS-params of RFC 8017 appendix A.2.3, as RFC 7427 appendix A.4 writes them.
fn pss_parameters(hash: &RsaHash) -> Result<Vec<u8>, SignatureError> {
    let digest = identifier(hash.oid, Some(&NULL))?;
    let mask = identifier(MGF1, Some(&digest))?;
    let tagged = |number: u8, body: &[u8]| -> Result<Vec<u8>, SignatureError> {
        let length = u8::try_from(body.len()).map_err(|_| SignatureError::Internal)?;
        Ok([&[0xa0 | number, length], body].concat())
    };
    let body = [tagged(0, &digest)?, tagged(1, &mask)?, tagged(2, &[0x02, 0x01, hash.length])?].concat();
    AnyRef::new(Tag::Sequence, &body)
        .and_then(|sequence| sequence.to_der())
        .map_err(|_| SignatureError::Internal)
}
