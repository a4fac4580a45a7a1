//! What a configuration's files hold: certificates, CRLs and private keys, in PEM (RFC 7468) or DER. Contents in, values
//! out; errors say what is wrong and leave naming the file to the caller.

use rustls_pki_types::pem::{PemObject, SectionKind};
use webpki::OwnedCertRevocationList;
use x509_cert::certificate::Certificate;
use x509_cert::der::{Decode, Encode};
use zeroize::Zeroizing;

use super::signature::{KeyFormatError, KeyKind, SigningKey};

/// Most certificates or CRLs of one file.
const COUNT_LIMIT: usize = 256;

/// Longest label that is shown.
const LABEL_LIMIT: usize = 64;

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// Nothing of use.
    #[error("it holds no {wanted}{found}")]
    Lacks {
        /// What should be there.
        wanted: &'static str,
        /// What is there instead, beginning with a comma; or nothing.
        found: String,
    },
    /// The PEM frame or its base64 is damaged.
    #[error("its PEM text is damaged: {0}")]
    Pem(String),
    /// More than are of any use.
    #[error("it holds more than {COUNT_LIMIT} {0}s")]
    TooMany(&'static str),
    /// One cannot be read.
    #[error("{what} {number} in it cannot be read: {why}")]
    Unreadable {
        /// Certificate or CRL.
        what: &'static str,
        /// Its number from 1.
        number: usize,
        /// Why.
        why: String,
    },
    /// A private key with a passphrase.
    #[error(
        "the private key is encrypted; decrypt it, for instance with `openssl pkey`, and protect the file instead"
    )]
    Encrypted,
    /// More than one private key.
    #[error("it holds {0} private keys; which one is meant?")]
    SeveralKeys(usize),
    /// Not a key that can be used.
    #[error("{0}")]
    Key(#[from] KeyFormatError),
    /// Certificate and key are not a pair.
    #[error("the private key ({key}) does not belong to the certificate of {subject}{hint}")]
    Unfit {
        /// Type of the key.
        key: KeyKind,
        /// Subject of the first certificate.
        subject: String,
        /// What may have happened.
        hint: &'static str,
    },
}

/// The certificates of a file, DER, in its order. At least one.
pub fn certificates(contents: &[u8]) -> Result<Vec<Vec<u8>>, FileError> {
    let check = |der: &[u8]| Certificate::from_der(der).map(drop).map_err(|error| error.to_string());
    items(contents, SectionKind::Certificate, "certificate", check)
}

/// The CRLs of a file, DER, in its order. At least one.
pub fn crls(contents: &[u8]) -> Result<Vec<Vec<u8>>, FileError> {
    let check =
        |der: &[u8]| OwnedCertRevocationList::from_der(der).map(drop).map_err(|error| error.to_string());
    items(contents, SectionKind::Crl, "CRL", check)
}

/// The private key of a file: PKCS#8, PKCS#1 or SEC1, not encrypted.
pub fn private_key(contents: &[u8]) -> Result<SigningKey, FileError> {
    if !is_pem(contents) {
        return SigningKey::from_der(contents).map_err(FileError::Key);
    }
    if contains(contents, b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        || contains(contents, b"Proc-Type: 4,ENCRYPTED")
    {
        return Err(FileError::Encrypted);
    }
    let mut keys = Vec::new();
    for section in sections(contents) {
        let (kind, der) = section?;
        if matches!(kind, SectionKind::PrivateKey | SectionKind::RsaPrivateKey | SectionKind::EcPrivateKey) {
            keys.push(der);
        }
    }
    match keys.as_slice() {
        [] => Err(lacks(contents, "private key")),
        [der] => SigningKey::from_der(der).map_err(FileError::Key),
        several => Err(FileError::SeveralKeys(several.len())),
    }
}

/// The own chain and key, from the contents of the certificate files in their order: the first certificate is the own
/// one and has to belong to the key.
pub fn own<'a>(
    certificate_files: impl IntoIterator<Item = &'a [u8]>,
    key: SigningKey,
) -> Result<(Vec<Vec<u8>>, SigningKey), FileError> {
    let mut chain = Vec::new();
    for contents in certificate_files {
        chain.extend(certificates(contents)?);
    }
    let own = chain.first().ok_or(FileError::Lacks { wanted: "certificate", found: String::new() })?;
    if fits(&key, own) {
        return Ok((chain, key));
    }
    let subject = Certificate::from_der(own)
        .map(|certificate| super::reason::shown(certificate.tbs_certificate().subject()))
        .unwrap_or_default();
    let hint = if chain.iter().any(|certificate| fits(&key, certificate)) {
        ", which comes first, but to a later one; put the own certificate first"
    } else {
        ""
    };
    Err(FileError::Unfit { key: key.kind(), subject, hint })
}

fn fits(key: &SigningKey, certificate: &[u8]) -> bool {
    Certificate::from_der(certificate)
        .and_then(|certificate| certificate.tbs_certificate().subject_public_key_info().to_der())
        .is_ok_and(|spki| key.fits(&spki))
}

fn items(
    contents: &[u8],
    wanted: SectionKind,
    what: &'static str,
    check: impl Fn(&[u8]) -> Result<(), String>,
) -> Result<Vec<Vec<u8>>, FileError> {
    let mut found = Vec::new();
    if is_pem(contents) {
        for section in sections(contents) {
            match section? {
                (kind, der) if kind == wanted => found.push(der.to_vec()),
                _ => {}
            }
            if found.len() > COUNT_LIMIT {
                return Err(FileError::TooMany(what));
            }
        }
    } else if !contents.is_empty() {
        found.push(contents.to_vec());
    }
    if found.is_empty() {
        return Err(lacks(contents, what));
    }
    for (index, der) in found.iter().enumerate() {
        check(der).map_err(|why| FileError::Unreadable { what, number: index + 1, why })?;
    }
    Ok(found)
}

/// The sections of a PEM text whose labels are known, wiped after use.
fn sections(contents: &[u8]) -> impl Iterator<Item = Result<(SectionKind, Zeroizing<Vec<u8>>), FileError>> {
    <(SectionKind, Vec<u8>)>::pem_slice_iter(contents).map(|section| {
        section
            .map(|(kind, der)| (kind, Zeroizing::new(der)))
            .map_err(|error| FileError::Pem(error.to_string()))
    })
}

fn lacks(contents: &[u8], wanted: &'static str) -> FileError {
    let mut labels: Vec<String> = Vec::new();
    for line in contents.split(|byte| *byte == b'\n') {
        let label =
            line.trim_ascii().strip_prefix(b"-----BEGIN ").and_then(|line| line.strip_suffix(b"-----"));
        // RFC 7468 section 3: a label is printable ASCII. Anything else only looks like one, and is not for a terminal.
        if let Some(label) = label
            && labels.len() < 4
            && label.len() <= LABEL_LIMIT
            && let Ok(label) = core::str::from_utf8(label)
            && label.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        {
            labels.push(label.to_owned());
        }
    }
    let found = if contents.is_empty() {
        ", it is empty".to_owned()
    } else if labels.is_empty() {
        ", and no PEM text".to_owned()
    } else {
        format!(", but: {}", labels.join(", "))
    };
    FileError::Lacks { wanted, found }
}

fn is_pem(contents: &[u8]) -> bool {
    contains(contents, b"-----BEGIN ")
}

fn contains(contents: &[u8], wanted: &[u8]) -> bool {
    contents.windows(wanted.len()).any(|window| window == wanted)
}
