//! Files that a connection names: secrets, and certificates and keys as OpenSSL makes them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use postern_ike::auth::identity::IdentityPattern;
use postern_ike::config::{LocalAuth, RemoteAuth};
use zeroize::Zeroizing;

use super::ike::CONNECTION;
use crate::config::keys::Beside;
use crate::config::{Config, ConfigError, KeyFiles, parse};

/// Files in a directory of their own, judged at a time.
struct Files {
    beside: Beside,
    now: SystemTime,
}

impl KeyFiles for Files {
    fn secret(&self, path: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
        self.beside.secret(path)
    }

    fn public(&self, path: &Path) -> Result<Vec<u8>, String> {
        self.beside.public(path)
    }

    fn now(&self) -> SystemTime {
        self.now
    }
}

/// A directory with what OpenSSL makes: a CA, an own certificate by it with RSA, ECDSA and Ed25519 keys, its CRL.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Directory {
    /// `None` if there is no OpenSSL on this machine.
    fn new(name: &str) -> Option<Self> {
        if Command::new("openssl").arg("version").output().is_err() {
            eprintln!("skipped: there is no openssl program");
            return None;
        }
        let path = std::env::temp_dir().join(format!("pt-config-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        let directory = Self(path);
        directory.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 30 -subj /O=Example/CN=CA");
        for (own, key) in
            [("rsa", "rsa:2048"), ("ec", "ec -pkeyopt ec_paramgen_curve:P-384"), ("ed", "ed25519")]
        {
            directory.openssl(&format!(
                "req -x509 -newkey {key} -nodes -CA ca.pem -CAkey ca.key -keyout {own}.key -out {own}.pem -days 30 \
                 -subj /O=Example/CN={own} -addext subjectAltName=DNS:{own}.example.org,IP:192.0.2.1"
            ));
        }
        Some(directory)
    }

    fn openssl(&self, arguments: &str) {
        let arguments = arguments.split_whitespace();
        let output = Command::new("openssl").args(arguments).current_dir(&self.0).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn read_at(&self, text: &str, now: SystemTime) -> Result<Config, ConfigError> {
        parse("t", text, &Files { beside: Beside(self.0.clone()), now })
    }

    fn read(&self, text: &str) -> Result<Config, ConfigError> {
        self.read_at(text, SystemTime::now())
    }

    /// The only finding.
    fn finding(&self, text: &str) -> String {
        match self.read(text) {
            Ok(config) => config.warnings[0].to_string(),
            Err(ConfigError(findings)) => {
                assert_eq!(findings.len(), 1, "{findings:?}");
                findings[0].to_string()
            }
        }
    }
}

fn with_certificates(own: &str) -> String {
    CONNECTION
        .replacen(
            "local_auth = { method = \"psk\", secret = \"correct horse battery\" }",
            &format!("local_auth = {{ method = \"certificate\", certificate = \"{own}.pem\", key = \"{own}.key\" }}"),
            1,
        )
        .replace(
            "remote_auth = { method = \"psk\", secret = \"correct horse battery\" }",
            "remote_auth = { method = \"certificate\", id = \"*.example.org\", ca = [\"ca.pem\"] }",
        )
}

/// OPS-2, IKE-4: certificates and keys as OpenSSL writes them, and what is said about wrong ones.
#[test]
fn ops_2_certificates() {
    let Some(directory) = Directory::new("certificates") else { return };
    let mut fingerprints = Vec::new();
    for own in ["rsa", "ec", "ed"] {
        let config = directory.read(&with_certificates(own)).unwrap();
        assert_eq!(config.warnings, []);
        assert!(!config.holds_keys, "the key is in a file of its own");
        let connection = &config.ike.connections[0].ike;
        assert_eq!(
            connection.local_id.to_string(),
            format!("O=Example, CN={own}"),
            "the subject, if nothing is said"
        );
        assert!(matches!(&connection.local_auth, LocalAuth::Certificate { chain, .. } if chain.len() == 1));
        fingerprints.push(connection.fingerprint);
    }
    assert!(fingerprints[0] != fingerprints[1] && fingerprints[1] != fingerprints[2]);

    let text = with_certificates("rsa");
    directory.openssl("x509 -in rsa.pem -outform DER -out rsa.der");
    directory.openssl("rsa -in rsa.key -traditional -out pkcs1.key");
    directory.openssl("rsa -in rsa.key -outform DER -out der.key");
    directory.openssl("rsa -in rsa.key -aes128 -passout pass:x -out encrypted.key");
    for (own, key) in [("rsa.der", "rsa.key"), ("rsa.pem", "pkcs1.key"), ("rsa.pem", "der.key")] {
        let text = text.replace("rsa.pem", own).replace("rsa.key", key);
        let same = directory.read(&text).unwrap().ike.connections[0].ike.fingerprint;
        assert_eq!(same, fingerprints[0], "{own} {key}: the same certificate");
    }
    directory.write("junk.pem", "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n", 0o644);
    directory.write("public.key", &std::fs::read_to_string(directory.0.join("rsa.key")).unwrap(), 0o644);
    std::fs::write(directory.0.join("both.pem"), {
        let read = |name| std::fs::read_to_string(directory.0.join(name)).unwrap();
        read("ca.pem") + &read("rsa.pem")
    })
    .unwrap();
    for (from, to, expected) in [
        ("\"rsa.key\"", "\"ec.key\"", "does not belong to the certificate of \"O=Example, CN=rsa\""),
        ("\"rsa.key\"", "\"encrypted.key\"", "openssl pkey"),
        ("\"rsa.key\"", "\"rsa.pem\"", "chmod 600"),
        ("\"rsa.key\"", "\"public.key\"", "chmod 600"),
        ("\"rsa.key\"", "\"none.key\"", "cannot be read: No such file"),
        ("\"rsa.pem\"", "\"rsa.key\"", "holds no certificate, but: PRIVATE KEY"),
        ("\"rsa.pem\"", "\"junk.pem\"", "cannot be read"),
        ("\"rsa.pem\"", "\"both.pem\"", "put the own certificate first"),
        ("[\"ca.pem\"]", "[\"junk.pem\"]", "certificate 1 in it cannot be read"),
        ("[\"ca.pem\"]", "[\"none.pem\"]", "cannot be read: No such file"),
        ("[\"ca.pem\"]", "[\"ca.pem\"], crl = \"ca.pem\"", "holds no CRL, but: CERTIFICATE"),
        (
            "certificate = \"rsa",
            "id = \"b.example.org\", certificate = \"rsa",
            "does not hold `b.example.org`, only O=Example, CN=rsa and rsa.example.org",
        ),
        ("[\"ca.pem\"]", "\"ca.pem\", crl_required = true", "every peer has to send the CRLs"),
    ] {
        assert!(text.contains(from), "{from}");
        let finding = directory.finding(&text.replace(from, to));
        assert!(finding.contains(expected), "{to}: {finding}");
    }
    let held = text.replace("certificate = \"rsa", "id = \"rsa.example.org\", certificate = \"rsa");
    assert_eq!(directory.read(&held).unwrap().warnings, []);

    let days = |days: u64| SystemTime::now() + Duration::from_hours(24 * days);
    for (at, messages) in [
        (days(20), &["expires within 14 days"][..]),
        (days(40), &["expired at", "no peer is believed by it"]),
        (days(0) - Duration::from_hours(72), &["not valid before", "not valid before"]),
    ] {
        let config = directory.read_at(&text, at).unwrap();
        let warnings: Vec<_> = config.warnings.iter().map(ToString::to_string).collect();
        assert_eq!(warnings.len(), messages.len(), "{warnings:?}");
        for (warning, message) in warnings.iter().zip(messages) {
            assert!(warning.contains(message), "{warning}");
        }
    }
}

/// OPS-2, OPS-4: secrets in files of their own, for the owner alone; users that change do not close anything.
#[test]
fn ops_4_secret_files() {
    let Some(directory) = Directory::new("secrets") else { return };
    directory.write("psk", "correct horse battery\n", 0o600);
    let inline = directory.read(CONNECTION).unwrap();
    let text = CONNECTION.replace("secret = \"correct horse battery\"", "secret_file = \"psk\"");
    let config = directory.read(&text).unwrap();
    assert!(!config.holds_keys && inline.holds_keys);
    assert_eq!(config.ike.connections[0].ike.fingerprint, inline.ike.connections[0].ike.fingerprint);
    directory.write("psk", "correct horse battery\n", 0o640);
    let ConfigError(findings) = directory.read(&text).unwrap_err();
    assert!(findings.len() == 2 && findings[0].message.contains("chmod 600"), "{findings:?}");

    let text = with_certificates("ec").replace("start = \"start\"\n", "").replace(
        "\"certificate\", id = \"*.example.org\", ca = [\"ca.pem\"]",
        "\"eap-mschapv2\", users_file = \"users\"",
    );
    directory.write("users", "# who\njoe = \"first\"\n\"amy@example.org\" = \"second\"\n", 0o600);
    let first = directory.read(&text).unwrap().ike;
    let connection = &first.connections[0];
    let RemoteAuth::EapMschapv2(users) = &connection.ike.remote_auth else { panic!() };
    assert_eq!(users.get("amy@example.org").unwrap().expose(), b"second");
    assert_eq!((users.len(), &connection.ike.remote_id), (2, &IdentityPattern::Any));
    directory.write("users", "joe = \"first\"\n", 0o600);
    let second = directory.read(&text).unwrap().ike;
    assert_eq!(first.changes(&second), ["refresh connection b: its users or CRLs; its SAs stay"]);
    directory.write("users", "joe = \"first\"\namy = second\n", 0o600);
    let finding = directory.finding(&text);
    assert!(finding.contains("users_file`: line 2: expected lines such as"), "{finding}");
    assert!(!finding.contains("second"), "{finding}");
    directory.write("users", "", 0o600);
    assert!(directory.finding(&text).contains("nobody can come"));
    directory.write("users", "joe = \"first\"\n", 0o600);
    let starts = text.replace("remote_net = [", "start = \"trap\"\nremote_net = [");
    assert!(directory.finding(&starts).contains("with EAP the client begins"));
}
