//! Certificates, CRLs and private keys from files: PEM as OpenSSL and others write it (RFC 7468), or DER.

use base64ct::{Base64, Encoding};
use zeroize::Zeroizing;

/// The certificates in a file, in its order.
pub(super) fn certificates(file: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    objects(file, &["CERTIFICATE", "X509 CERTIFICATE"], "certificate")
}

/// The CRLs in a file, in its order.
pub(super) fn crls(file: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    objects(file, &["X509 CRL"], "CRL")
}

/// The private key in a file: PKCS#8, PKCS#1 or SEC1, which is for the reader of the DER to find out.
pub(super) fn private_key(file: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
    let Some(sections) = sections(file)? else { return Ok(Zeroizing::new(file.to_vec())) };
    if sections.iter().any(|section| section.encrypted) {
        return Err(
            "the key is encrypted; `openssl pkey -in … -out …` writes it without a password".to_owned()
        );
    }
    let key = sections.into_iter().find(|section| section.label.ends_with("PRIVATE KEY"));
    key.map(|section| section.der).ok_or_else(|| "holds no private key (BEGIN PRIVATE KEY)".to_owned())
}

/// The secret that a text stands for: itself, hexadecimal digits after `0x`, or base64 after `0s`, as strongSwan has it.
pub(super) fn shared_secret(text: &str) -> Result<Zeroizing<Vec<u8>>, String> {
    if text.starts_with("0x") {
        let secret = super::keys::from_hex(text).map_err(|problem| format!("after `0x`: {problem}"))?;
        return Ok(Zeroizing::new(secret.expose().to_vec()));
    }
    match text.strip_prefix("0s") {
        Some(digits) => base64(digits.as_bytes()).ok_or_else(|| "after `0s`: not base64".to_owned()),
        None => Ok(Zeroizing::new(text.as_bytes().to_vec())),
    }
}

/// One `-----BEGIN label-----`.
struct Section {
    label: String,
    encrypted: bool,
    der: Zeroizing<Vec<u8>>,
}

fn objects(file: &[u8], labels: &[&str], what: &str) -> Result<Vec<Vec<u8>>, String> {
    let Some(sections) = sections(file)? else { return Ok(vec![file.to_vec()]) };
    let found: Vec<_> = sections
        .iter()
        .filter(|section| labels.contains(&section.label.as_str()))
        .map(|section| section.der.to_vec())
        .collect();
    match (found.is_empty(), sections.first()) {
        (true, Some(Section { label, .. })) => Err(format!("holds no {what}: its first part is a {label}")),
        (true, None) => Err(format!("is empty; expected a {what} as PEM or DER")),
        (false, _) => Ok(found),
    }
}

/// The sections of a PEM text; `None` if it is none, so DER.
fn sections(file: &[u8]) -> Result<Option<Vec<Section>>, String> {
    let Ok(text) = core::str::from_utf8(file) else { return Ok(None) };
    let mut sections = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(label) = boundary(line, "-----BEGIN ") else { continue };
        let mut encrypted = label.starts_with("ENCRYPTED");
        let mut digits = Zeroizing::new(Vec::with_capacity(text.len()));
        loop {
            let Some(line) = lines.next() else { return Err(format!("ends before END {label}")) };
            if boundary(line, "-----END ").is_some() {
                break;
            }
            // RFC 1421 headers, as OpenSSL's traditional form has them: `Proc-Type: 4,ENCRYPTED`.
            match line.split_once(':') {
                Some((_, value)) => encrypted |= value.contains("ENCRYPTED"),
                None => digits.extend(line.bytes().filter(|byte| !byte.is_ascii_whitespace())),
            }
        }
        let der = match base64(&digits) {
            Some(der) => der,
            None if encrypted => Zeroizing::default(),
            None => return Err(format!("what is between BEGIN and END {label} is not base64")),
        };
        sections.push(Section { label: label.to_owned(), encrypted, der });
    }
    Ok(if sections.is_empty() && !text.trim().is_empty() { None } else { Some(sections) })
}

fn boundary<'l>(line: &'l str, begin: &str) -> Option<&'l str> {
    line.trim().strip_prefix(begin)?.strip_suffix("-----")
}

/// In constant time, as far as the contents go.
fn base64(digits: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; digits.len()]);
    let length = Base64::decode(digits, &mut bytes).ok()?.len();
    bytes.truncate(length);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sections_are_found_by_their_labels() {
        let pem = b"subject=x\n-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n\
            -----BEGIN EC PARAMETERS-----\nBgg=\n-----END EC PARAMETERS-----\n\
            -----BEGIN EC PRIVATE KEY-----\nAwQF\n-----END EC PRIVATE KEY-----\n  -----BEGIN CERTIFICATE-----\r\nAw\r\nQF\r\n-----END CERTIFICATE-----\r\n";
        assert_eq!(certificates(pem).unwrap(), [vec![0, 1, 2], vec![3, 4, 5]]);
        assert_eq!(*private_key(pem).unwrap(), [3, 4, 5]);
        assert_eq!(crls(pem).unwrap_err(), "holds no CRL: its first part is a CERTIFICATE");
        assert_eq!(crls(b"\n").unwrap_err(), "is empty; expected a CRL as PEM or DER");
        assert_eq!(certificates(&[0x30, 0x82, 0xff]).unwrap(), [[0x30, 0x82, 0xff]], "DER as it is");
        let traditional = b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAEC\n-----END RSA PRIVATE KEY-----";
        assert!(private_key(traditional).unwrap_err().contains("encrypted"));
        let new = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAEC\n-----END ENCRYPTED PRIVATE KEY-----";
        assert!(private_key(new).unwrap_err().contains("encrypted"));
        assert!(certificates(b"-----BEGIN CERTIFICATE-----\nAAEC\n").unwrap_err().contains("ends before"));
        assert!(certificates(b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----").is_err());
    }

    #[test]
    fn secrets_as_strongswan_writes_them() {
        for (text, bytes) in
            [("plain", &b"plain"[..]), ("0x00ff", &[0, 0xff]), ("0sAAEC", &[0, 1, 2]), ("0", b"0")]
        {
            assert_eq!(*shared_secret(text).unwrap(), bytes, "{text}");
        }
        assert!(shared_secret("0xabc").is_err() && shared_secret("0s?").is_err());
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>, label in "-----BEGIN [A-Z ]*-----\n[A-Za-z0-9+/=\n-]*") {
            for bytes in [bytes, label.into_bytes()] {
                let _ = (certificates(&bytes), crls(&bytes), private_key(&bytes).map(|key| key.len()));
            }
        }
    }
}
