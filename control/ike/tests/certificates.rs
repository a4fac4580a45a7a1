//! Certificates, CRLs, keys and signatures made by strongSwan's pki and by openssl (`certificates/make`), judged by
//! Postern.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::{Duration, SystemTime};

use postern_ike::auth::certificate::{CertificateError, Policy, Presented, Trust};
use postern_ike::auth::files::{self, FileError};
use postern_ike::auth::identity::Identity;
use postern_ike::auth::signature::{self, KeyKind, Signature, SignatureError, SigningKey};
use postern_ike::message::registry::{AuthMethod, CertEncoding, HashId};

const OCTETS: &[u8] = include_bytes!("certificates/octets");
const SHA2: &[HashId] = &[HashId::SHA2_256, HashId::SHA2_384, HashId::SHA2_512, HashId::IDENTITY];

fn file(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/certificates/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn certificate(name: &str) -> Vec<u8> {
    files::certificates(&file(&format!("{name}.pem"))).unwrap().remove(0)
}

fn crl(name: &str) -> Vec<u8> {
    files::crls(&file(&format!("{name}.pem"))).unwrap().remove(0)
}

fn key(name: &str) -> SigningKey {
    files::private_key(&file(&format!("{name}.key"))).unwrap()
}

fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

/// 2030-01-01: after all certificates were made, before they expire.
fn at() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_hours(525_960)
}

fn trust(anchors: &[&str], crls: &[&str], policy: Policy) -> Trust {
    let anchors: Vec<_> = anchors.iter().map(|name| certificate(name)).collect();
    let crls: Vec<_> = crls.iter().map(|name| crl(name)).collect();
    Trust::new(&anchors, &crls, policy).unwrap()
}

fn presented(certificates: &[&str], crls: &[&str]) -> Presented {
    let mut presented = Presented::default();
    for name in certificates {
        presented.add(CertEncoding::X509_SIGNATURE, &certificate(name));
    }
    for name in crls {
        presented.add(CertEncoding::CRL, &crl(name));
    }
    presented
}

const STRICT: Policy = Policy { require_crl: true, allow_sha1: true };

/// What comes of a peer whose certificate is `name`, with its key's signature if it was kept.
fn judge_with(
    trust: &Trust,
    presented: &Presented,
    name: &str,
    identity: &str,
) -> Result<&'static str, CertificateError> {
    let path = format!("{}/tests/certificates/{name}.key", env!("CARGO_MANIFEST_DIR"));
    let signature = if std::path::Path::new(&path).exists() {
        key(name).sign(SHA2, OCTETS).unwrap()
    } else {
        Signature { method: AuthMethod::DIGITAL_SIGNATURE, data: Vec::new() }
    };
    trust.verify(presented, &id(identity), &signature, OCTETS, at()).map(|peer| peer.algorithm)
}

/// The same with the usual identity and the roots of both kinds.
fn judge(
    certificates: &[&str],
    crls: &[&str],
    policy: Policy,
    configured_crls: &[&str],
) -> Result<&'static str, CertificateError> {
    let trust = trust(&["root-rsa", "root-ec", "pss-ca"], configured_crls, policy);
    let name = certificates[0];
    judge_with(&trust, &presented(certificates, crls), name, &format!("{name}.example.org"))
}

/// IKE-3: every kind of key, with chains; the algorithm is the one expected.
#[test]
fn ike_3_good_certificates() {
    for (certificates, algorithm) in [
        (&["rsa"][..], "RSA with SHA-256"),
        (&["p256", "intermediate"], "ECDSA with SHA-256"),
        (&["p256", "other", "rsa", "intermediate", "root-ec"], "ECDSA with SHA-256"),
        (&["p384"], "ECDSA with SHA-384"),
        (&["p521"], "ECDSA with SHA-512"),
        (&["ed25519"], "Ed25519"),
        (&["ipsec"], "ECDSA with SHA-256"),
        (&["pss"], "ECDSA with SHA-256"),
    ] {
        assert_eq!(judge(certificates, &[], Policy::default(), &[]), Ok(algorithm), "{certificates:?}");
    }
    // The same bytes with the key's other forms, and PSS.
    let trust = trust(&["root-rsa"], &[], Policy::default());
    let peer = presented(&["rsa"], &[]);
    for (key, algorithm) in [
        (files::private_key(&file("rsa-pkcs8.key")).unwrap(), "RSA with SHA-256"),
        (files::private_key(&file("rsa.der")).unwrap(), "RSA with SHA-256"),
        (key("rsa").with_pss(), "RSA-PSS with SHA-256"),
    ] {
        let signature = key.sign(SHA2, OCTETS).unwrap();
        let peer = trust.verify(&peer, &id("rsa.example.org"), &signature, OCTETS, at()).unwrap();
        assert_eq!(peer.algorithm, algorithm);
        assert_eq!(peer.subject.to_string(), "C=CH, O=Postern test, CN=rsa.example.org");
        assert_eq!(peer.issuer.to_string(), "C=CH, O=Postern test, CN=Root RSA");
        // 2055-01-01.
        assert_eq!(peer.not_after, SystemTime::UNIX_EPOCH + Duration::from_hours(745_104));
    }
}

/// IKE-3: every identity that the certificate holds is accepted, any other one is named.
#[test]
fn ike_3_identities() {
    let trust = trust(&["root-rsa", "root-ec"], &[], Policy::default());
    for (name, identity) in [
        ("rsa", "rsa.example.org"),
        ("rsa", "RSA.Example.ORG"),
        ("rsa", "joe@example.org"),
        ("rsa", "192.0.2.7"),
        ("rsa", "2001:db8::7"),
        ("rsa", "C=CH, O=Postern test, CN=rsa.example.org"),
        ("rsa", "C=ch, O=postern  TEST, CN=RSA.example.org"),
        ("many", "a.example"),
        ("many", "b.example"),
        ("many", "c@d.example"),
        ("many", "192.0.2.9"),
        ("many", "O=Postern test, CN=directory"),
        ("many", "CN=many"),
        ("odd-name", r"C=CH, O=A\, B \+ Söhne, DC=example, E=joe@example.org, SN=7+UID=joe"),
        ("odd-name", r"C=CH, O=A\, B \+ SÖHNE, DC=example, E=joe@example.org, UID=joe+SN=7"),
    ] {
        let peer = presented(&[name], &[]);
        judge_with(&trust, &peer, name, identity).unwrap_or_else(|error| panic!("{identity}: {error}"));
    }
    // What is made of text is, byte for byte, what strongSwan made of it.
    let made = id("C=CH, O=Postern test, CN=rsa.example.org").to_data().data;
    assert!(certificate("rsa").windows(made.len()).any(|window| window == made));
    for (name, identity, text) in [
        (
            "rsa",
            "other.example.org",
            "the peer says it is other.example.org, but its certificate holds only C=CH, O=Postern test, \
             CN=rsa.example.org and rsa.example.org and joe@example.org and 192.0.2.7 and 2001:db8::7",
        ),
        // The common name is no host name, and a prefix no match.
        (
            "many",
            "many",
            "the peer says it is many, but its certificate holds only CN=many and a.example and b.example \
             and c@d.example and 192.0.2.9 and O=Postern test, CN=directory",
        ),
        (
            "p384",
            "example.org",
            "the peer says it is example.org, but its certificate holds only C=CH, \
             O=Postern test, CN=p384 and p384.example.org",
        ),
        (
            "p384",
            "192.0.2.7",
            "the peer says it is 192.0.2.7, but its certificate holds only C=CH, O=Postern test, \
             CN=p384 and p384.example.org",
        ),
        (
            "p384",
            "C=CH, CN=p384",
            "the peer says it is C=CH, CN=p384, but its certificate holds only C=CH, \
             O=Postern test, CN=p384 and p384.example.org",
        ),
        (
            "p384",
            "keyid:0x00",
            "the peer says it is keyid:0x00, but its certificate holds only C=CH, O=Postern test, \
             CN=p384 and p384.example.org",
        ),
    ] {
        let error = judge_with(&trust, &presented(&[name], &[]), name, identity).unwrap_err();
        assert_eq!(error.to_string(), text);
    }
}

/// IKE-3: the subject key identifier is a key identifier that the certificate holds.
#[test]
fn ike_3_key_identifier() {
    let trust = trust(&["root-ec"], &[], Policy::default());
    let der = certificate("odd-name");
    // 2.5.29.14, an OCTET STRING in an OCTET STRING of 20 bytes.
    let mark = [0x55, 0x1d, 0x0e, 0x04, 0x16, 0x04, 0x14];
    let start = der.windows(mark.len()).position(|window| window == mark).unwrap() + mark.len();
    let signature = key("odd-name").sign(SHA2, OCTETS).unwrap();
    let peer = presented(&["odd-name"], &[]);
    let right = Identity::KeyId(der[start..start + 20].to_vec());
    trust.verify(&peer, &right, &signature, OCTETS, at()).unwrap();
    let wrong = Identity::KeyId(der[start..start + 19].to_vec());
    assert!(trust.verify(&peer, &wrong, &signature, OCTETS, at()).is_err());
}

/// IKE-3: each bad certificate is refused with a text that names it and says what to do.
#[test]
fn ike_3_bad_certificates() {
    for (certificates, text) in [
        (
            &["expired"][..],
            r#"the certificate of "C=CH, O=Postern test, CN=expired" expired at 2020-02-01T00:00:00Z"#,
        ),
        (
            &["future"],
            r#"the certificate of "C=CH, O=Postern test, CN=future" is not valid before 2045-01-01T00:00:00Z; are the clocks right?"#,
        ),
        (
            &["other"],
            r#"the certificate of "C=CH, O=Postern test, CN=other" is issued by "C=CH, O=Postern test, CN=Other", which is not a configured CA, nor did the peer send its certificate"#,
        ),
        (
            &["p256"],
            r#"the certificate of "C=CH, O=Postern test, CN=p256" is issued by "C=CH, O=Postern test, CN=Intermediate", which is not a configured CA, nor did the peer send its certificate"#,
        ),
        (
            &["twin"],
            r#"the certificate of "C=CH, O=Postern test, CN=twin" is not signed by the configured CA "C=CH, O=Postern test, CN=Root EC", only by one of the same name; is the CA certificate outdated?"#,
        ),
        (
            &["purpose"],
            r#"the certificate of "CN=purpose" is not made for this: its extended key usage has neither ipsecIKE nor TLS server or client authentication"#,
        ),
        (
            &["usage"],
            r#"the certificate of "CN=usage" is not made for this: its key usage has neither digitalSignature nor nonRepudiation"#,
        ),
        (
            &["sha1"],
            r#"a certificate of the path of "CN=sha1" is signed with an algorithm that is not accepted (such as SHA-1, or RSA below 2048 bits)"#,
        ),
        (
            &["critical"],
            r#"the certificate path of "CN=critical" is not valid: a certificate in it has a critical extension that is not known here"#,
        ),
        (
            &["below-leaf", "p256", "intermediate"],
            r#"the certificate path of "CN=below-leaf" is not valid: a certificate in it was issued by one that is not a CA's"#,
        ),
        (
            &["self-signed"],
            r#"the certificate of "CN=self.example.org" is not made for this: it is the certificate of a CA"#,
        ),
    ] {
        let error = judge(certificates, &[], Policy::default(), &[]).unwrap_err();
        assert_eq!(error.to_string(), text);
    }
    // The path length that a CA allows counts for one that is configured as well.
    for anchor in ["root-ec", "intermediate"] {
        let trust = trust(&[anchor], &[], Policy::default());
        let peer = presented(&["too-long", "below", "intermediate"], &[]);
        assert_eq!(
            judge_with(&trust, &peer, "too-long", "too-long.example.org").unwrap_err().to_string(),
            r#"the certificate path of "C=CH, O=Postern test, CN=too-long" is not valid: it is longer than a CA in it allows"#
        );
        judge_with(&trust, &presented(&["p256", "intermediate"], &[]), "p256", "p256.example.org").unwrap();
    }
    let trust = trust(&["root-ec"], &[], Policy::default());
    assert_eq!(judge_with(&trust, &Presented::default(), "p384", "x"), Err(CertificateError::Missing));
    let junk = Presented { certificates: vec![vec![0x30, 0x03, 1, 2, 3]], crls: Vec::new() };
    assert!(matches!(judge_with(&trust, &junk, "p384", "x"), Err(CertificateError::Malformed(_))));
}

/// IKE-3: a CA that is out of time is none, and is named.
#[test]
fn ike_3_expired_ca() {
    let old = trust(&["root-old", "root-ec"], &[], Policy::default());
    assert_eq!(
        judge_with(&old, &presented(&["orphan"], &[]), "orphan", "orphan.example.org")
            .unwrap_err()
            .to_string(),
        r#"the certificate of "C=CH, O=Postern test, CN=Root old" expired at 2020-02-01T00:00:00Z"#
    );
    let late = SystemTime::UNIX_EPOCH + Duration::from_hours(750_000);
    let trust = trust(&["root-ec"], &[], Policy::default());
    let signature = key("p384").sign(SHA2, OCTETS).unwrap();
    for (name, when, text) in [
        (
            "p384",
            late,
            r#"the certificate of "C=CH, O=Postern test, CN=p384" expired at 2055-01-01T00:00:00Z"#,
        ),
        (
            "p384",
            SystemTime::UNIX_EPOCH,
            r#"the certificate of "C=CH, O=Postern test, CN=p384" is not valid before 2025-01-01T00:00:00Z; are the clocks right?"#,
        ),
    ] {
        let error = trust.verify(&presented(&[name], &[]), &id("p384.example.org"), &signature, OCTETS, when);
        assert_eq!(error.unwrap_err().to_string(), text);
    }
}

/// IKE-3: a certificate that is configured itself is believed, even if it is one that signed itself as a CA.
#[test]
fn ike_3_pinned_certificate() {
    let pinned = trust(&["self-signed"], &[], STRICT);
    judge_with(&pinned, &presented(&["self-signed"], &[]), "self-signed", "self.example.org").unwrap();
    let pinned = trust(&["expired", "twin", "root-rsa"], &[], Policy::default());
    let judged = judge_with(&pinned, &presented(&["expired"], &[]), "expired", "expired.example.org");
    assert!(matches!(judged, Err(CertificateError::Expired { .. })), "{judged:?}");
    // What it issues is another matter: the pinned one is no CA.
    let leaf = trust(&["p256"], &[], Policy::default());
    let judged = judge_with(&leaf, &presented(&["below-leaf"], &[]), "below-leaf", "below-leaf.example.org");
    assert_eq!(
        judged.unwrap_err().to_string(),
        r#"the certificate path of "CN=below-leaf" is not valid: a certificate in it was issued by one that is not a CA's"#
    );
}

/// IKE-3: revoked by a configured CRL, by one that the peer sends, and by an old one; a newer list without it does not
/// help, nor does another CA's.
#[test]
fn ike_3_revoked() {
    let revoked = r#"the certificate of "C=CH, O=Postern test, CN=revoked" is revoked"#;
    for policy in [Policy::default(), STRICT] {
        for (configured, sent) in [
            (&["crl-root-ec"][..], &[][..]),
            (&["crl-root-ec"], &["crl-newer"]),
            (&["crl-newer", "crl-root-ec-intermediate"], &["crl-root-ec", "crl-twin"][..1]),
            (&[], &["crl-root-ec"]),
        ] {
            let judged = judge(&["revoked"], sent, policy, configured);
            // The newest list of a CA counts; of two equally old ones the configured one.
            if configured.first() == Some(&"crl-newer") {
                judged.unwrap();
            } else {
                assert_eq!(judged.unwrap_err().to_string(), revoked, "{configured:?} {sent:?}");
            }
        }
    }
    // Stale, but it says so.
    let judged = judge(&["revoked"], &[], Policy::default(), &["crl-stale"]);
    assert_eq!(judged.unwrap_err().to_string(), revoked);
    // The intermediate CA.
    let judged = judge(&["p256", "intermediate"], &[], Policy::default(), &["crl-root-ec-intermediate"]);
    assert_eq!(
        judged.unwrap_err().to_string(),
        r#"the certificate of "C=CH, O=Postern test, CN=Intermediate" is revoked"#
    );
    // Not revoked, or of no concern.
    judge(&["revoked"], &[], Policy::default(), &[]).unwrap();
    judge(&["p384"], &[], Policy::default(), &["crl-root-ec", "crl-intermediate"]).unwrap();
    judge(&["p256", "intermediate"], &["crl-twin"], Policy::default(), &["crl-root-ec"]).unwrap();
}

/// IKE-3: with `crl_required`, a CRL that is missing or stale is named; one that the peer sends will do.
#[test]
fn ike_3_crl_required() {
    let missing = |issuer| {
        format!(r#"there is no CRL of "C=CH, O=Postern test, CN={issuer}", and `crl_required` is set"#)
    };
    for (configured, sent, text) in [
        (&[][..], &[][..], missing("Intermediate")),
        (&["crl-root-ec"], &[], missing("Intermediate")),
        (&["crl-intermediate"], &[], missing("Root EC")),
        (
            &["crl-intermediate", "crl-stale"],
            &[],
            r#"the CRL of "C=CH, O=Postern test, CN=Root EC" is stale since 2025-02-01T00:00:00Z, and `crl_required` is set"#.to_owned(),
        ),
        (
            &["crl-intermediate"],
            &["crl-twin"],
            "a CRL is not good: its signature is not that of its issuer".to_owned(),
        ),
    ] {
        let judged = judge(&["p256", "intermediate"], sent, STRICT, configured);
        assert_eq!(judged.unwrap_err().to_string(), text, "{configured:?} {sent:?}");
    }
    for (configured, sent) in [
        (&["crl-intermediate", "crl-root-ec"][..], &[][..]),
        (&["crl-root-ec"], &["crl-intermediate"]),
        (&["crl-stale"], &["crl-intermediate", "crl-newer"]),
        (&[], &["crl-root-ec", "crl-intermediate"]),
        // A bad one that the peer sends does not spoil good ones.
        (&["crl-intermediate", "crl-root-ec"], &["crl-twin"]),
    ] {
        judge(&["p256", "intermediate"], sent, STRICT, configured)
            .unwrap_or_else(|error| panic!("{configured:?} {sent:?}: {error}"));
    }
}

/// IKE-3: a signature of other octets, of another key, or damaged, is not good; nor is one by another's method.
#[test]
fn ike_3_wrong_signatures() {
    let trust = trust(&["root-ec", "root-rsa"], &[], Policy::default());
    let wrong = Err(CertificateError::Signature(SignatureError::Wrong));
    for (name, also) in [("p384", "root-ec"), ("ed25519", ""), ("rsa", ""), ("p521", "")] {
        let peer = presented(&[name], &[]);
        let identity = id(&format!("{name}.example.org"));
        let good = key(name).sign(SHA2, OCTETS).unwrap();
        let verify = |signature: &Signature, octets| {
            trust.verify(&peer, &identity, signature, octets, at()).map(|peer| peer.algorithm)
        };
        verify(&good, OCTETS).unwrap();
        assert_eq!(verify(&good, b"other octets"), wrong, "{name} {also}");
        for at in 0..good.data.len() {
            let mut bad = good.clone();
            bad.data[at] ^= 1;
            assert!(verify(&bad, OCTETS).is_err(), "{name}, byte {at}");
            bad.data.truncate(at);
            assert!(verify(&bad, OCTETS).is_err(), "{name}, {at} bytes");
        }
    }
    let peer = presented(&["p384"], &[]);
    for (signature, text) in [
        (
            key("ed25519").sign(SHA2, OCTETS).unwrap(),
            "it is made by Ed25519, but the certificate has a key of type ECDSA P-384",
        ),
        (
            key("p256").sign(&[], OCTETS).unwrap(),
            "it is made by ECDSA_SHA256_P256, but the certificate has a key of type ECDSA P-384",
        ),
        (
            Signature { method: AuthMethod::SHARED_KEY, data: vec![0; 32] },
            "authentication method SHARED_KEY is not supported for certificates",
        ),
    ] {
        let error = trust.verify(&peer, &id("p384.example.org"), &signature, OCTETS, at()).unwrap_err();
        assert_eq!(error.to_string(), format!("the signature of the peer is not good: {text}"));
    }
}

/// AlgorithmIdentifiers of RFC 7427 appendix A, as published.
const RFC_7427: &[(&str, &str, &str)] = &[
    ("rsa-sha256", "rsa", "300d06092a864886f70d01010b0500"),
    ("rsa-sha384", "rsa", "300d06092a864886f70d01010c0500"),
    ("rsa-sha512", "rsa", "300d06092a864886f70d01010d0500"),
    ("p256-sha256", "p256", "300a06082a8648ce3d040302"),
    ("p256-sha384", "p256", "300a06082a8648ce3d040303"),
    ("p256-sha512", "p256", "300a06082a8648ce3d040304"),
    ("p384-sha256", "p384", "300a06082a8648ce3d040302"),
    ("p384-sha384", "p384", "300a06082a8648ce3d040303"),
    ("p384-sha512", "p384", "300a06082a8648ce3d040304"),
    ("p521-sha256", "p521", "300a06082a8648ce3d040302"),
    ("p521-sha384", "p521", "300a06082a8648ce3d040303"),
    ("p521-sha512", "p521", "300a06082a8648ce3d040304"),
    (
        "pss-sha256",
        "rsa",
        "304106092a864886f70d01010a3034a00f300d06096086480165030402010500a11c301a06092a864886f70d010108300d06096086480165\
         030402010500a203020120",
    ),
    (
        "pss-sha384",
        "rsa",
        "304106092a864886f70d01010a3034a00f300d06096086480165030402020500a11c301a06092a864886f70d010108300d06096086480165\
         030402020500a203020130",
    ),
    (
        "pss-sha512",
        "rsa",
        "304106092a864886f70d01010a3034a00f300d06096086480165030402030500a11c301a06092a864886f70d010108300d06096086480165\
         030402030500a203020140",
    ),
    // RFC 8420 section 2 and RFC 8410 section 3.
    ("ed25519", "ed25519", "300506032b6570"),
];

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn digital(identifier: &str, value: &[u8]) -> Signature {
    let identifier = unhex(identifier);
    let data = [&[u8::try_from(identifier.len()).unwrap()], &identifier[..], value].concat();
    Signature { method: AuthMethod::DIGITAL_SIGNATURE, data }
}

/// Subject Public Key Info of a certificate.
fn spki(name: &str) -> Vec<u8> {
    use x509_cert::der::{Decode, Encode};
    let certificate = x509_cert::Certificate::from_der(&certificate(name)).unwrap();
    certificate.tbs_certificate().subject_public_key_info().to_der().unwrap()
}

/// IKE-3: signatures by openssl with RFC 7427's identifiers verify, and only under their own identifier.
#[test]
fn ike_3_signatures_of_openssl() {
    for (name, key, identifier) in RFC_7427 {
        let value = file(&format!("{name}.sig"));
        let signature = digital(identifier, &value);
        let named = signature::verify(&spki(key), &signature, OCTETS, false)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(
            name.ends_with(&named.replace("SHA-", "sha").rsplit(' ').next().unwrap().to_lowercase()),
            "{named}"
        );
        for (other, _, identifier) in RFC_7427.iter().filter(|(_, _, other)| other != identifier) {
            let judged = signature::verify(&spki(key), &digital(identifier, &value), OCTETS, false);
            assert!(judged.is_err(), "{name} as {other}");
        }
    }
    // SHA-1 is not one of the announced hashes, whatever the policy for old peers.
    for (name, key, identifier) in [
        ("rsa-sha1", "rsa", "300d06092a864886f70d0101050500"),
        ("p256-sha1", "p256", "300906072a8648ce3d0401"),
    ] {
        let signature = digital(identifier, &file(&format!("{name}.sig")));
        assert_eq!(signature::verify(&spki(key), &signature, OCTETS, true), Err(SignatureError::Sha1));
    }
    // A salt of another length than RFC 7427 asks for.
    let short = RFC_7427[12].2.replace("a203020120", "a203020114");
    let judged = signature::verify(&spki("rsa"), &digital(&short, &file("pss-short-salt.sig")), OCTETS, true);
    assert!(matches!(judged, Err(SignatureError::Algorithm(_))), "{judged:?}");
    let judged =
        signature::verify(&spki("rsa"), &digital(RFC_7427[12].2, &file("pss-short-salt.sig")), OCTETS, true);
    assert_eq!(judged, Err(SignatureError::Wrong));
}

/// IKE-3: RSA_SIGNATURE of peers without RFC 7427, SHA-1 unless the policy forbids it.
#[test]
fn ike_3_classic_rsa_of_openssl() {
    for (name, named) in [
        ("rsa-sha1", "RSA with SHA-1"),
        ("rsa-sha256", "RSA with SHA-256"),
        ("rsa-sha384", "RSA with SHA-384"),
        ("rsa-sha512", "RSA with SHA-512"),
    ] {
        let signature = Signature { method: AuthMethod::RSA_SIGNATURE, data: file(&format!("{name}.sig")) };
        assert_eq!(signature::verify(&spki("rsa"), &signature, OCTETS, true), Ok(named));
        let strict = signature::verify(&spki("rsa"), &signature, OCTETS, false);
        assert_eq!(strict, if name == "rsa-sha1" { Err(SignatureError::Sha1) } else { Ok(named) });
        assert_eq!(signature::verify(&spki("rsa"), &signature, b"x", true), Err(SignatureError::Wrong));
        let judged = signature::verify(&spki("p256"), &signature, OCTETS, true);
        assert!(matches!(judged, Err(SignatureError::Mismatch { .. })), "{judged:?}");
    }
}

/// IKE-2: signatures of IKEv1 are openssl's, byte for byte; another hash, key or length is refused.
#[test]
fn ike_2_rsa_of_a_bare_hash() {
    let (hash, expected) = (&OCTETS[..32], file("rsa-v1.sig"));
    for name in ["rsa", "rsa-pkcs8"] {
        assert_eq!(key(name).sign_hash(hash).unwrap().data, expected);
    }
    assert!(matches!(key("p256").sign_hash(hash), Err(SignatureError::Mismatch { .. })));
    let trust = trust(&["root-rsa", "root-ec"], &[], Policy::default());
    let judge = |name: &str, hash: &[u8], signature: &[u8]| {
        trust.verify_hash(
            &presented(&[name], &[]),
            &id(&format!("{name}.example.org")),
            signature,
            hash,
            at(),
        )
    };
    assert_eq!(judge("rsa", hash, &expected).unwrap().algorithm, "RSA without a hash algorithm");
    let wrong = CertificateError::Signature(SignatureError::Wrong);
    let mut changed = expected.clone();
    changed[200] ^= 1;
    for (hash, signature) in [
        (&OCTETS[..31], expected.as_slice()),
        (&OCTETS[1..33], &expected),
        (hash, &changed),
        (hash, &expected[1..]),
        (hash, &[]),
        (hash, &[0xff; 256]),
        (hash, &[0; 256]),
        // With the hash algorithm named it is another encoding.
        (hash, &file("rsa-sha256.sig")),
    ] {
        assert_eq!(judge("rsa", hash, signature), Err(wrong.clone()));
    }
    let judged = trust.verify_hash(
        &presented(&["p256", "intermediate"], &[]),
        &id("p256.example.org"),
        &expected,
        hash,
        at(),
    );
    assert_eq!(judged, Err(wrong));
}

/// IKE-3: what is signed is what openssl signs (PKCS#1 has no randomness), under RFC 7427's identifiers; the hash is the
/// one that the peer takes.
#[test]
fn ike_3_signing() {
    for (name, key_name, identifier) in RFC_7427.iter().filter(|(name, key, _)| {
        *key == "rsa" || *key == "ed25519" || ["p256-sha256", "p384-sha384", "p521-sha512"].contains(name)
    }) {
        let hash = match &name[name.len() - 3..] {
            "256" => HashId::SHA2_256,
            "384" => HashId::SHA2_384,
            "512" => HashId::SHA2_512,
            _ => HashId::IDENTITY,
        };
        let key = if name.starts_with("pss") { key(key_name).with_pss() } else { key(key_name) };
        let hash = if *name == "ed25519" { HashId::IDENTITY } else { hash };
        let signature = key.sign(&[HashId::SHA1, hash], OCTETS).unwrap();
        let expected = digital(identifier, &file(&format!("{name}.sig")));
        if name.starts_with("rsa") || *name == "ed25519" {
            assert_eq!(signature, expected, "{name}");
        } else {
            let length = usize::from(expected.data[0]) + 1;
            assert_eq!(signature.data[..length], expected.data[..length], "{name}");
        }
        signature::verify(&spki(key_name), &signature, OCTETS, false).unwrap();
        assert_ne!(key.sign(&[hash], b"x").unwrap(), signature);
    }
}

/// IKE-3: without RFC 7427, ECDSA signs by RFC 4754 and RSA says why it does not.
#[test]
fn ike_3_signing_for_old_peers() {
    for (name, method, length) in [
        ("p256", AuthMethod::ECDSA_SHA256_P256, 64),
        ("p384", AuthMethod::ECDSA_SHA384_P384, 96),
        ("p521", AuthMethod::ECDSA_SHA512_P521, 132),
    ] {
        for hashes in [&[][..], &[HashId::SHA1]] {
            let signature = key(name).sign(hashes, OCTETS).unwrap();
            assert_eq!((signature.method, signature.data.len()), (method, length));
            signature::verify(&spki(name), &signature, OCTETS, false).unwrap();
            let judged = signature::verify(&spki(name), &signature, b"x", false);
            assert_eq!(judged, Err(SignatureError::Wrong));
        }
    }
    assert_eq!(key("rsa").sign(&[], OCTETS), Err(SignatureError::OnlySha1));
    let error = key("rsa").sign(&[HashId::SHA1], OCTETS).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the peer takes SHA1; a key of type RSA signs with SHA-256, SHA-384 or SHA-512"
    );
    let error = key("ed25519").sign(&[], OCTETS).unwrap_err();
    assert!(error.to_string().contains("it lacks RFC 7427"), "{error}");
}

/// IKE-3: CERTREQ names CAs by the SHA-1 of their public keys. The value is openssl's:
/// `openssl x509 -in root-ec.pem -pubkey -noout | openssl pkey -pubin -outform der | sha1sum`.
#[test]
fn ike_3_authorities() {
    let trust = trust(&["root-ec", "root-rsa"], &[], Policy::default());
    let expected = file("authorities");
    assert_eq!(trust.authorities(), unhex(std::str::from_utf8(&expected).unwrap().trim()));
}

/// OPS-2: files are read in every form that people have, and errors say what is wrong.
#[test]
fn ops_2_files() {
    assert_eq!(key("p256").kind(), KeyKind::P256);
    for name in ["p256.key", "p256-pkcs8.key", "p256.der", "rsa.key", "rsa-pkcs8.key", "rsa.der"] {
        files::private_key(&file(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let error = |name: &str| files::private_key(&file(name)).unwrap_err();
    assert_eq!(error("encrypted.key"), FileError::Encrypted);
    assert_eq!(error("encrypted-traditional.key"), FileError::Encrypted);
    assert_eq!(error("rsa.pem").to_string(), "it holds no private key, but: CERTIFICATE");
    assert!(error("make").to_string().starts_with("it holds no private key"), "{}", error("make"));
    let both = [file("rsa.key"), file("p256.key")].concat();
    assert_eq!(files::private_key(&both).unwrap_err(), FileError::SeveralKeys(2));

    let chain = [file("p256.key"), file("p256.pem"), file("intermediate.pem")].concat();
    assert_eq!(files::certificates(&chain).unwrap(), [certificate("p256"), certificate("intermediate")]);
    assert_eq!(files::certificates(&file("revoked.der")).unwrap(), [certificate("revoked")]);
    let error = files::certificates(&file("crl-twin.pem")).unwrap_err();
    assert_eq!(error.to_string(), "it holds no certificate, but: X509 CRL");
    assert_eq!(files::crls(b"").unwrap_err().to_string(), "it holds no CRL, it is empty");
    assert!(
        files::crls(&file("revoked.der")).unwrap_err().to_string().starts_with("CRL 1 in it cannot be read")
    );
    let cut = file("rsa.pem");
    assert!(matches!(files::certificates(&cut[..cut.len() - 40]), Err(FileError::Pem(_))));

    let own = |files: &[&str], name: &str| {
        let contents: Vec<_> = files.iter().map(|name| file(&format!("{name}.pem"))).collect();
        files::own(contents.iter().map(Vec::as_slice), key(name)).map(|(chain, _)| chain.len())
    };
    assert_eq!(own(&["p256", "intermediate"], "p256"), Ok(2));
    for name in ["rsa", "p384", "p521", "ed25519"] {
        assert_eq!(own(&[name], name), Ok(1));
    }
    assert_eq!(
        own(&["intermediate", "p256"], "p256").unwrap_err().to_string(),
        "the private key (ECDSA P-256) does not belong to the certificate of \"C=CH, O=Postern test, \
         CN=Intermediate\", which comes first, but to a later one; put the own certificate first"
    );
    assert!(matches!(own(&["p256"], "other"), Err(FileError::Unfit { hint: "", .. })));
}

/// OPS-4: formatting a private key shows its type only.
#[test]
fn ops_4_debug_shows_no_key() {
    assert_eq!(format!("{:?}", key("p256")), "SigningKey(ECDSA P-256)");
}

/// What a message may bring: more certificates than are looked at, and junk among them.
#[test]
fn presented_is_bounded() {
    let mut peer = presented(&["p256"], &[]);
    for number in 0..100 {
        peer.add(CertEncoding::X509_SIGNATURE, &vec![0x30; number]);
        peer.add(CertEncoding::CRL, &vec![0x30; number]);
        peer.add(CertEncoding(12), b"http://example.org/x");
    }
    assert!(peer.certificates.len() == 16 && peer.crls.len() == 16);
    let trust = trust(&["root-ec"], &[], Policy::default());
    assert!(matches!(
        judge_with(&trust, &peer, "p256", "p256.example.org"),
        Err(CertificateError::UnknownCa { .. })
    ));
    peer.certificates.truncate(3);
    peer.add(CertEncoding::X509_SIGNATURE, &certificate("intermediate"));
    judge_with(&trust, &peer, "p256", "p256.example.org").unwrap();
}

/// The parts of an input of the fuzz target `ike_certificate`.
fn input(parts: &[(u8, Vec<u8>)]) -> Vec<u8> {
    parts
        .iter()
        .flat_map(|(kind, data)| {
            let [high, low] = u16::try_from(data.len()).unwrap().to_be_bytes();
            [&[*kind, high, low], &data[..]].concat()
        })
        .collect()
}

/// Inputs of the fuzz target: what the tests above judge.
fn seeds() -> Vec<(String, Vec<u8>)> {
    use postern_ike::auth::fuzz::part;
    let mut seeds = Vec::new();
    for (names, crls) in [
        (&["p256", "intermediate"][..], &["crl-root-ec", "crl-intermediate"][..]),
        (&["p256", "intermediate"], &["crl-root-ec-intermediate"]),
        (&["rsa"], &[]),
        (&["p384"], &["crl-stale"]),
        (&["p521"], &["crl-twin"]),
        (&["ed25519"], &["crl-newer"]),
        (&["revoked"], &["crl-root-ec"]),
        (&["expired"], &[]),
        (&["other"], &[]),
        (&["twin"], &[]),
        (&["many"], &[]),
        (&["odd-name"], &[]),
        (&["critical"], &[]),
        (&["usage"], &[]),
        (&["self-signed"], &[]),
        (&["below-leaf", "p256", "intermediate"], &[]),
    ] {
        let name = names[0];
        let mut parts = vec![(part::ANCHOR, certificate(if name == "rsa" { "root-rsa" } else { "root-ec" }))];
        for (number, crl_name) in crls.iter().enumerate() {
            parts.push((if number == 0 { part::CONFIGURED_CRL } else { part::CRL }, crl(crl_name)));
        }
        parts.extend(names.iter().map(|name| (part::CERTIFICATE, certificate(name))));
        parts.push((part::IDENTITY, [&[2], format!("{name}.example.org").as_bytes()].concat()));
        parts.push((part::OCTETS, OCTETS.to_vec()));
        // Ed25519 and PKCS#1 sign the same each time; the others' signatures are openssl's.
        let signature = match name {
            "p256" | "p384" | "p521" => {
                let (_, _, identifier) =
                    RFC_7427.iter().find(|(of, key, _)| *key == name && of.starts_with(name)).unwrap();
                digital(identifier, &file(&format!("{name}-sha256.sig")))
            }
            "rsa" => digital(RFC_7427[12].2, &file("pss-sha256.sig")),
            "ed25519" => key(name).sign(SHA2, OCTETS).unwrap(),
            _ => Signature { method: AuthMethod::RSA_SIGNATURE, data: file("rsa-sha1.sig") },
        };
        parts.push((part::SIGNATURE, [&[signature.method.0], &signature.data[..]].concat()));
        seeds.push((name.to_owned() + &crls.join("-"), input(&parts)));
    }
    for name in
        ["p256.key", "p256-pkcs8.key", "encrypted.key", "intermediate.pem", "crl-root-ec.pem", "revoked.der"]
    {
        seeds.push((format!("file-{name}"), input(&[(part::FILE, file(name))])));
    }
    for (number, text) in
        ["C=CH, O=x\\, y+UID=z, 2.5.4.3=*", "*@example.org", "keyid:0x00ff"].iter().enumerate()
    {
        let kind = [9, 3, 11][number];
        let identity = id(text).to_data().data;
        let parts =
            [(part::FILE, text.as_bytes().to_vec()), (part::IDENTITY, [&[kind], &identity[..]].concat())];
        seeds.push((format!("identity-{number}"), input(&parts)));
    }
    seeds
}

/// The seeds of the fuzz target go through the same function. With `POSTERN_WRITE_SEEDS` set they are made anew first, as
/// new certificates demand.
#[test]
fn fuzz_seeds_hold() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../hwtests/fuzz/seeds/ike_certificate");
    if std::env::var_os("POSTERN_WRITE_SEEDS").is_some() {
        for (name, seed) in seeds() {
            std::fs::write(format!("{folder}/{name}"), seed).unwrap();
        }
    }
    let mut replayed = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let seed = std::fs::read(&path).unwrap();
        let held = std::panic::catch_unwind(|| postern_ike::auth::fuzz::certificate(&seed));
        assert!(held.is_ok(), "{}", path.display());
        replayed += 1;
    }
    assert!(replayed >= 20, "{replayed} seeds in {folder}");
}

/// Good inputs with one byte changed, anywhere.
#[test]
fn damaged_seeds_hold() {
    for (name, seed) in seeds() {
        // Every byte of the short ones, every 13th of the long ones.
        for at in (0..seed.len()).step_by(if seed.len() < 300 { 1 } else { 13 }) {
            let mut damaged = seed.clone();
            damaged[at] ^= 0x21;
            let held = std::panic::catch_unwind(|| postern_ike::auth::fuzz::certificate(&damaged));
            assert!(held.is_ok(), "{name}, byte {at}");
        }
    }
}
