//! `local_auth` and `remote_auth` of a connection: methods, identities, and the secrets, certificates and keys behind
//! them. Whatever a peer would refuse for sure is found here.

use core::net::IpAddr;
use core::ops::Range;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use postern_ike::Secret;
use postern_ike::auth::certificate::{CertificateError, Policy, Trust, TrustError};
use postern_ike::auth::files::{self, FileError};
use postern_ike::auth::identity::{Identity, IdentityPattern};
use postern_ike::auth::own::OwnCertificate;
use postern_ike::config::{LocalAuth, RemoteAuth};
use toml::de::{DeTable, DeValue};
use zeroize::Zeroizing;

use super::Context;
use super::values::one_of;
use crate::config::keys::{from_base64, from_hex, text};
use crate::config::reader::{Located, Passphrase, Read, Table, expected};
use crate::digest::sha256;

/// A shared secret or password that is shorter gets a warning.
const SHORT: usize = 8;

/// One side's authentication.
pub(super) struct Side<A, I> {
    pub(super) auth: A,
    pub(super) id: I,
    pub(super) method: Method,
    pub(super) span: Range<usize>,
    /// What the connection's fingerprint is made over: secrets, keys and certificates that are not in any `Debug`.
    pub(super) digest: [u8; 32],
    /// Digest of what may change under a running connection: users and CRLs, which are for those who come.
    pub(super) refreshable: [u8; 32],
}

/// Gives the objects, each DER, in the contents of a file.
type Reader = fn(&[u8]) -> Result<Vec<Vec<u8>>, FileError>;

/// `method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Psk,
    Certificate,
    EapMschapv2,
}

impl Context<'_> {
    /// `local_auth`. `own` is this side's address, if there is only one.
    pub(super) fn local_auth(
        &self,
        connection: &mut Table<'_, '_>,
        own: Option<IpAddr>,
    ) -> Option<Side<LocalAuth, Identity>> {
        let mut table = auth_table(connection, "local_auth")?;
        let method = table.need::<Method>("method")?.value;
        let id_given = table.has("id");
        let id = table.get::<Identity>("id");
        let span = table.span.clone();
        let missing_id = |table: &Table<'_, '_>| {
            if !id_given {
                let message = "missing; expected who this side is, such as id = \"a.example.org\"";
                table.error(span.clone(), "id", message);
            }
        };
        let side = match method {
            Method::Psk => {
                let secret = self.psk(&mut table);
                let id = id.map(|found| found.value).or_else(|| own.filter(|_| !id_given).map(Identity::Ip));
                if id.is_none() {
                    missing_id(&table);
                }
                secret.zip(id).map(|(secret, id)| {
                    let digest = sha256(&[b"psk", secret.expose()]);
                    (LocalAuth::Psk(secret), id, digest)
                })
            }
            Method::Certificate => self.own_certificate(&mut table, id, id_given),
            Method::EapMschapv2 => {
                let user = table.need::<String>("user").map(|found| found.value);
                let password = self.password(&mut table);
                let named = || user.as_ref().and_then(|user| user.parse().ok());
                let id = id.map(|found| found.value).or_else(|| named().filter(|_| !id_given));
                if id.is_none() && user.is_some() {
                    missing_id(&table);
                }
                user.clone().zip(password).zip(id).map(|((user, password), id)| {
                    let digest = sha256(&[b"eap", user.as_bytes(), password.expose()]);
                    (LocalAuth::EapMschapv2 { user, password }, id, digest)
                })
            }
        };
        table.finish();
        let (auth, id, digest) = side?;
        Some(Side { auth, id, method, span, digest, refreshable: [0; 32] })
    }

    /// `remote_auth`. `peer` is the peer's address, if it has to have one.
    pub(super) fn remote_auth(
        &self,
        connection: &mut Table<'_, '_>,
        peer: Option<IpAddr>,
    ) -> Option<Side<RemoteAuth, IdentityPattern>> {
        let mut table = auth_table(connection, "remote_auth")?;
        let method = table.need::<Method>("method")?.value;
        let id_given = table.has("id");
        let id = table.get::<IdentityPattern>("id").map(|found| found.value);
        let id = match method {
            _ if id_given => id,
            Method::Psk if peer.is_some() => peer.map(|peer| IdentityPattern::Exact(Identity::Ip(peer))),
            Method::EapMschapv2 => Some(IdentityPattern::Any),
            Method::Psk | Method::Certificate => {
                let message = "missing; expected who the peer is, such as id = \"b.example.org\" or \"*.example.org\", \
                               or \"%any\" for whoever can authenticate";
                table.error(table.span.clone(), "id", message);
                None
            }
        };
        let side = match method {
            Method::Psk => self.psk(&mut table).map(|secret| {
                let digest = sha256(&[b"psk", secret.expose()]);
                (RemoteAuth::Psk(secret), digest, [0; 32])
            }),
            Method::Certificate => self.trust(&mut table),
            Method::EapMschapv2 => self.users(&mut table).map(|users| {
                let sorted: BTreeMap<_, _> = users.iter().collect();
                let parts = sorted.iter().flat_map(|(user, password)| [user.as_bytes(), password.expose()]);
                let refreshable = sha256(&parts.collect::<Vec<_>>());
                (RemoteAuth::EapMschapv2(Arc::new(users)), sha256(&[b"eap"]), refreshable)
            }),
        };
        let span = table.span.clone();
        table.finish();
        let (auth, digest, refreshable) = side?;
        Some(Side { auth, id: id?, method, span, digest, refreshable })
    }

    fn own_certificate(
        &self,
        table: &mut Table<'_, '_>,
        id: Option<Located<Identity>>,
        id_given: bool,
    ) -> Option<(LocalAuth, Identity, [u8; 32])> {
        let files = table.need::<Files>("certificate");
        let key_file = table.need::<PathBuf>("key");
        let pss = table.or("pss", false);
        let key = key_file.and_then(|found| {
            let read = self.keys.secret(&found.value).and_then(|bytes| {
                files::private_key(&bytes).map_err(|error| format!("{}: {error}", found.value.display()))
            });
            self.or_report(table, "key", &found.span, read).map(|key| (found.span, key))
        });
        let found = files?;
        let contents = self.contents(table, "certificate", &found)?;
        let mut certificates = Vec::new();
        for (path, contents) in &contents {
            let read = files::certificates(contents).map_err(|error| format!("{}: {error}", path.display()));
            certificates.extend(self.or_report(table, "certificate", &found.span, read)?);
        }
        let certificates: Vec<_> =
            certificates.iter().filter_map(|der| OwnCertificate::from_der(der).ok()).collect();
        let own = certificates.first()?;
        self.judge(table, &found.span, &certificates);
        let (key_span, key) = key?;
        let pair = files::own(contents.iter().map(|(_, contents)| contents.as_slice()), key);
        let (chain, key) =
            self.or_report(table, "key", &key_span, pair.map_err(|error| error.to_string()))?;
        let id = match id {
            Some(found) => {
                if let Err(CertificateError::Identity { identity, holds }) = own.holds(&found.value) {
                    let message = format!(
                        "the certificate does not hold `{identity}`, only {holds}: peers will refuse it; \
                         give one of these as `id`, or leave it out for the subject"
                    );
                    self.report.warn(found.span, &table.path_of("id"), message);
                }
                found.value
            }
            None if id_given => return None,
            None => own.subject()?,
        };
        // The key is the one of the first certificate, so it needs no digest.
        let chain_digest = sha256(&chain.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let digest = sha256(&[b"certificate", &chain_digest, &[u8::from(pss)]]);
        let key = Arc::new(if pss { key.with_pss() } else { key });
        Some((LocalAuth::Certificate { chain, key }, id, digest))
    }

    /// Warns of what peers will refuse.
    fn judge(&self, table: &Table<'_, '_>, span: &Range<usize>, certificates: &[OwnCertificate]) {
        let now = self.keys.now();
        let soon = now + core::time::Duration::from_hours(14 * 24);
        for (index, certificate) in certificates.iter().enumerate() {
            let message = match (certificate.check(now), certificate.check(soon)) {
                // Intermediate CAs need not be for signing.
                (Err(CertificateError::Purpose { .. }), _) if index > 0 => continue,
                (Err(problem), _) => format!("{problem}: peers will refuse it; have a new one issued"),
                (Ok(()), Err(CertificateError::Expired { subject, .. })) => {
                    format!("the certificate of {subject} expires within 14 days; have a new one issued")
                }
                _ => continue,
            };
            self.report.warn(span.clone(), &table.path_of("certificate"), message);
        }
    }

    fn trust(&self, table: &mut Table<'_, '_>) -> Option<(RemoteAuth, [u8; 32], [u8; 32])> {
        let ca = table.need::<Files>("ca");
        let crl = table.get::<Files>("crl");
        let require_crl = table.or("crl_required", false);
        let allow_sha1 = table.or("allow_sha1", Policy::default().allow_sha1);
        if require_crl && crl.is_none() && !table.has("crl") {
            let message = "without `crl` every peer has to send the CRLs of its CAs, or it is refused";
            self.report.warn(table.span.clone(), &table.path_of("crl_required"), message);
        }
        let ca = ca?;
        let anchors = self.objects(table, "ca", &ca, files::certificates);
        let crls = match &crl {
            Some(found) => self.objects(table, "crl", found, files::crls),
            None => (!table.has("crl")).then(Vec::new),
        };
        let (anchors, crls) = (anchors?, crls?);
        let trust = match Trust::new(&anchors, &crls, Policy { require_crl, allow_sha1 }) {
            Ok(trust) => trust,
            Err(error) => {
                let (key, span) = match (&error, &crl) {
                    (TrustError::Crl { .. }, Some(crl)) => ("crl", crl.span.clone()),
                    _ => ("ca", ca.span.clone()),
                };
                table.error(span, key, error.to_string());
                return None;
            }
        };
        let now: SystemTime = self.keys.now();
        for problem in trust.unusable(now) {
            let message = format!("{problem}: no peer is believed by it; renew it");
            self.report.warn(ca.span.clone(), &table.path_of("ca"), message);
        }
        for issuer in trust.stale(now) {
            let effect = if require_crl { "peers of this CA are refused" } else { "it is used all the same" };
            let span = crl.as_ref().map_or(0..0, |crl| crl.span.clone());
            let message = format!("the CRL of {issuer} is stale: {effect}; fetch the next one");
            self.report.warn(span, &table.path_of("crl"), message);
        }
        let over = |all: &[Vec<u8>]| sha256(&all.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let policy = [u8::from(require_crl), u8::from(allow_sha1)];
        let digest = sha256(&[b"trust", &over(&anchors), &policy]);
        Some((RemoteAuth::Certificate(Arc::new(trust)), digest, over(&crls)))
    }

    /// The shared secret.
    fn psk(&self, table: &mut Table<'_, '_>) -> Option<Secret> {
        let (key, span, text) = self.phrase(table, ["secret", "secret_file"])?;
        let secret = self.or_report(table, key, &span, shared_secret(&text))?;
        self.warn_of_short(table, key, &span, secret.len());
        Some(secret)
    }

    /// The password of this side as client.
    pub(super) fn password(&self, table: &mut Table<'_, '_>) -> Option<Secret> {
        let (_, _, text) = self.phrase(table, ["password", "password_file"])?;
        Some(Secret::new(text.as_bytes()))
    }

    fn warn_of_short(&self, table: &Table<'_, '_>, key: &str, span: &Range<usize>, length: usize) {
        if length < SHORT {
            let message = "so short a secret can be guessed by whoever answers in the peer's place \
                           (RFC 7296 section 2.15); `openssl rand -base64 24` makes a good one";
            self.report.warn(span.clone(), &table.path_of(key), message);
        }
    }

    /// A secret text given inline or as a file, with the key that gave it.
    fn phrase(
        &self,
        table: &mut Table<'_, '_>,
        [inline, file]: [&'static str; 2],
    ) -> Option<(&'static str, Range<usize>, Zeroizing<String>)> {
        let given = table.has(inline) || table.has(file);
        let (text_found, path) = (table.get::<Passphrase>(inline), table.get::<PathBuf>(file));
        let (key, span, phrase) = match (text_found, path) {
            (Some(found), Some(_)) => {
                table.error(found.span, inline, format!("give `{inline}` or `{file}`, not both"));
                return None;
            }
            (Some(found), None) => {
                self.holds_keys.set(true);
                (inline, found.span, found.value.0)
            }
            (None, Some(path)) => {
                let read = self.keys.secret(&path.value).and_then(text);
                let read = self.or_report(table, file, &path.span, read)?;
                let line = Zeroizing::new(read.trim_end_matches(['\n', '\r']).to_owned());
                (file, path.span, line)
            }
            (None, None) => {
                if !given {
                    let message =
                        format!("missing; expected {}, or a file with it as `{file}`", Passphrase::EXPECTED);
                    table.error(table.span.clone(), inline, message);
                }
                return None;
            }
        };
        if phrase.is_empty() {
            table.error(span, key, "is empty");
            return None;
        }
        Some((key, span, phrase))
    }

    /// Users with their passwords.
    pub(super) fn users(&self, table: &mut Table<'_, '_>) -> Option<HashMap<String, Secret>> {
        let given = table.has("users") || table.has("users_file");
        let inline = table.table("users");
        let path = table.get::<PathBuf>("users_file");
        let mut users = HashMap::new();
        if let Some(mut inline) = inline {
            self.holds_keys.set(true);
            for (user, span, value) in inline.rest() {
                match Passphrase::read(value) {
                    Ok(password) if !password.0.is_empty() => {
                        users.insert(user, Secret::new(password.0.as_bytes()));
                    }
                    _ => inline.error(
                        span,
                        "",
                        "expected a password in quotes for each user, as in joe = \"…\"",
                    ),
                }
            }
        } else if let Some(path) = &path {
            let read = self.keys.secret(&path.value).and_then(text).and_then(|text| users_of(&text));
            users = self.or_report(table, "users_file", &path.span, read)?;
        }
        if !given {
            let message = "missing; expected a table such as users = { joe = \"password\" }, or a file with such lines as \
                           `users_file`";
            table.error(table.span.clone(), "users", message);
            return None;
        }
        if users.is_empty() {
            self.report.warn(
                table.span.clone(),
                &table.path_of("users"),
                "there is no user: nobody can come",
            );
        }
        Some(users)
    }

    /// All objects in some files.
    fn objects(
        &self,
        table: &Table<'_, '_>,
        key: &str,
        found: &Located<Files>,
        read: Reader,
    ) -> Option<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        for (path, contents) in self.contents(table, key, found)? {
            let read = read(&contents).map_err(|error| format!("{}: {error}", path.display()));
            all.extend(self.or_report(table, key, &found.span, read)?);
        }
        Some(all)
    }

    fn contents<'f>(
        &self,
        table: &Table<'_, '_>,
        key: &str,
        found: &'f Located<Files>,
    ) -> Option<Vec<(&'f PathBuf, Vec<u8>)>> {
        let read = |path: &'f PathBuf| {
            Some((path, self.or_report(table, key, &found.span, self.keys.public(path))?))
        };
        found.value.0.iter().map(read).collect()
    }

    fn or_report<T>(
        &self,
        table: &Table<'_, '_>,
        key: &str,
        span: &Range<usize>,
        result: Result<T, String>,
    ) -> Option<T> {
        result.map_err(|problem| self.report.error(span.clone(), &table.path_of(key), problem)).ok()
    }
}

/// The secret that a text stands for: itself, hexadecimal digits after `0x`, or base64 after `0s`, as strongSwan has it.
fn shared_secret(text: &str) -> Result<Secret, String> {
    if text.starts_with("0x") {
        let secret = from_hex(text).map_err(|problem| format!("after `0x`: {problem}"))?;
        return Ok(Secret::new(secret.expose()));
    }
    match text.strip_prefix("0s") {
        Some(digits) => from_base64(digits)
            .map(|secret| Secret::new(secret.as_slice()))
            .ok_or_else(|| "after `0s`: not base64".to_owned()),
        None => Ok(Secret::new(text.as_bytes())),
    }
}

/// The lines of a users' file: TOML, a password in quotes for each user.
fn users_of(text: &str) -> Result<HashMap<String, Secret>, String> {
    let line = |offset: usize| text.get(..offset).unwrap_or_default().matches('\n').count() + 1;
    // The error's own rendering quotes the line, which holds a password.
    let table = DeTable::parse(text).map_err(|error| {
        format!(
            "line {}: expected lines such as joe = \"password\"",
            line(error.span().unwrap_or(0..0).start)
        )
    })?;
    let mut users = HashMap::new();
    for (user, value) in table.into_inner() {
        let at = value.span().start;
        match Passphrase::read(value.into_inner()) {
            Ok(password) if !password.0.is_empty() => {
                users.insert(user.into_inner().into_owned(), Secret::new(password.0.as_bytes()));
            }
            _ => return Err(format!("line {}: expected a password in quotes", line(at))),
        }
    }
    Ok(users)
}

fn auth_table<'r, 'i>(connection: &mut Table<'r, 'i>, key: &'static str) -> Option<Table<'r, 'i>> {
    let table = connection.table(key);
    if table.is_none() && !connection.has(key) {
        let message = format!(
            "missing; expected a table such as {{ method = \"psk\", id = \"…\", secret = \"…\" }}; methods are {}",
            Method::EXPECTED
        );
        connection.error(connection.span.clone(), key, message);
    }
    table
}

/// One or several files.
struct Files(Vec<PathBuf>);

impl Read for Files {
    const EXPECTED: &'static str = "a path in quotes, or an array of paths";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let paths = match value {
            DeValue::Array(_) => Vec::<PathBuf>::read(value),
            one => PathBuf::read(one).map(|path| vec![path]),
        };
        paths.ok().filter(|paths| !paths.is_empty()).map(Self).ok_or_else(expected::<Self>)
    }
}

impl Read for Method {
    const EXPECTED: &'static str = "\"psk\", \"certificate\" or \"eap-mschapv2\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words =
            [("psk", Self::Psk), ("certificate", Self::Certificate), ("eap-mschapv2", Self::EapMschapv2)];
        one_of(&value, &words).ok_or_else(expected::<Self>)
    }
}

macro_rules! read_identity {
    ($($type:ty = $expected:literal),+) => {$(
        impl Read for $type {
            const EXPECTED: &'static str = $expected;
            fn read(value: DeValue<'_>) -> Result<Self, String> {
                match value {
                    DeValue::String(text) => text.parse().map_err(|problem| format!("{problem}; {}", expected::<Self>())),
                    _ => Err(expected::<Self>()),
                }
            }
        }
    )+};
}
read_identity!(
    Identity = "an identity in quotes: \"a.example.org\", \"joe@example.org\", \"192.0.2.1\", \"C=CH, O=Example, CN=a\" or \
        \"keyid:0x…\"",
    IdentityPattern = "an identity in quotes: \"a.example.org\", \"joe@example.org\", \"192.0.2.1\", \"C=CH, O=Example, CN=*\", \
        \"*.example.org\", \"*@example.org\" or \"%any\""
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_as_strongswan_writes_them() {
        for (text, bytes) in
            [("plain", &b"plain"[..]), ("0x00ff", &[0, 0xff]), ("0sAAEC", &[0, 1, 2]), ("0", b"0")]
        {
            assert_eq!(shared_secret(text).unwrap().expose(), bytes, "{text}");
        }
        assert!(shared_secret("0xabc").is_err() && shared_secret("0s?").is_err());
    }
}
