//! Certificates for tests, made by strongSwan's `pki`: not by the library that checks them in Postern.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::config::ike::Credential;
use crate::node::write_private;
use crate::process::sh;

/// Kind of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// RSA, 2048 bits.
    Rsa,
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// Ed25519.
    Ed25519,
}

impl Key {
    /// What makes one, in PEM. `pki` takes a second for an RSA key, openssl a tenth.
    const fn maker(self) -> &'static str {
        match self {
            Self::Rsa => "openssl genrsa -traditional 2048",
            Self::P256 => "pki --gen --type ecdsa --size 256 --outform pem",
            Self::P384 => "pki --gen --type ecdsa --size 384 --outform pem",
            Self::Ed25519 => "pki --gen --type ed25519 --outform pem",
        }
    }

    const fn family(self) -> &'static str {
        match self {
            Self::Rsa => "rsa",
            Self::P256 | Self::P384 => "ecdsa",
            Self::Ed25519 => "ed25519",
        }
    }
}

/// A certification authority with its files in a directory.
#[derive(Clone, Debug)]
pub struct Authority {
    dir: PathBuf,
    name: String,
    key: PathBuf,
    certificate: PathBuf,
    /// Intermediate CAs, this one first; empty for a root.
    chain: Vec<PathBuf>,
    root: PathBuf,
}

/// What is special about a certificate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Special {
    /// Valid until yesterday.
    pub expired: bool,
    /// More alternative names, to make it big.
    pub names: usize,
}

impl Authority {
    /// A self-signed root, CN = `name`.
    pub fn root(dir: &Path, name: &str, key: Key) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let (key_file, certificate) = files(dir, name);
        generate(key, &key_file)?;
        let subject = subject(name);
        let mut command = pki(&["--self", "--ca", "--type", key.family(), "--dn", &subject, "--in"]);
        write(command.arg(&key_file), &certificate)?;
        let (dir, name) = (dir.to_owned(), name.to_owned());
        Ok(Self { dir, name, key: key_file, root: certificate.clone(), certificate, chain: Vec::new() })
    }

    /// A CA below this one.
    pub fn intermediate(&self, name: &str, key: Key) -> Result<Self> {
        let (key_file, certificate) = files(&self.dir, name);
        generate(key, &key_file)?;
        let mut command = self.issuing(key, &key_file, &subject(name));
        write(command.arg("--ca"), &certificate)?;
        let mut chain = vec![certificate.clone()];
        chain.extend(self.chain.iter().cloned());
        let (dir, name, root) = (self.dir.clone(), name.to_owned(), self.root.clone());
        Ok(Self { dir, name, key: key_file, certificate, chain, root })
    }

    /// A certificate for the host `name`, which is also its identity; the other end is to trust the root.
    pub fn issue(&self, name: &str, key: Key) -> Result<Credential> {
        self.issue_special(name, key, Special::default())
    }

    /// [`Authority::issue`], with something special about it.
    pub fn issue_special(&self, name: &str, key: Key, special: Special) -> Result<Credential> {
        let (key_file, certificate) = files(&self.dir, &format!("{name}-of-{}", self.name));
        generate(key, &key_file)?;
        let mut command = self.issuing(key, &key_file, &subject(name));
        command.args(["--san", name, "--flag", "serverAuth"]);
        for number in 0..special.names {
            command.args(["--san", &format!("name-{number}.of-a-rather-long-alternative-name.example")]);
        }
        if special.expired {
            command.args(["--not-before", "01.01.20 00:00:00", "--not-after", "01.01.21 00:00:00"]);
        }
        write(&mut command, &certificate)?;
        let mut chain = vec![certificate];
        chain.extend(self.chain.iter().cloned());
        Ok(Credential::Certificate { id: name.to_owned(), chain, key: key_file, ca: self.root.clone() })
    }

    /// This authority's list of revoked certificates.
    pub fn crl(&self, revoked: &[&Path]) -> Result<PathBuf> {
        let file = self.dir.join(format!("{}.crl", self.name));
        let mut command = pki(&["--signcrl", "--cacert"]);
        command.arg(&self.certificate).arg("--cakey").arg(&self.key);
        for certificate in revoked {
            command.args(["--reason", "key-compromise", "--cert"]).arg(certificate);
        }
        write(&mut command, &file)?;
        Ok(file)
    }

    /// Its own certificate.
    pub fn certificate(&self) -> &Path {
        &self.certificate
    }

    fn issuing(&self, key: Key, key_file: &Path, subject: &str) -> Command {
        let mut command = pki(&["--issue", "--type", key.family(), "--dn", subject]);
        command.arg("--in").arg(key_file).arg("--cacert").arg(&self.certificate);
        command.arg("--cakey").arg(&self.key);
        command
    }
}

/// File of the first certificate of a credential.
pub fn certificate_of(credential: &Credential) -> Option<&Path> {
    match credential {
        Credential::Certificate { chain, .. } => chain.first().map(PathBuf::as_path),
        _ => None,
    }
}

fn subject(name: &str) -> String {
    format!("C=CH, O=Postern tests, CN={name}")
}

fn files(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    let name = name.replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
    (dir.join(format!("{name}.key")), dir.join(format!("{name}.pem")))
}

fn generate(key: Key, file: &Path) -> Result<()> {
    // Postern refuses a key that others can read.
    write_private(file, &sh(key.maker())?)
}

fn pki(arguments: &[&str]) -> Command {
    let mut command = Command::new("pki");
    command.env("PATH", "/usr/bin:/bin").args(arguments);
    command
}

/// Runs it with its output in PEM in `file`.
fn write(command: &mut Command, file: &Path) -> Result<()> {
    let output = command.args(["--outform", "pem"]).stdin(Stdio::null()).stderr(Stdio::piped());
    let output = output.stdout(File::create(file)?).output().context("cannot start pki")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", crate::process::show(command));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// openssl agrees with what was made.
    #[test]
    fn chains_verify() {
        let dir = std::env::temp_dir().join(crate::netns::unique_prefix() + "-pki");
        let root = Authority::root(&dir, "root", Key::P256).unwrap();
        let middle = root.intermediate("middle", Key::Rsa).unwrap();
        let special = Special { names: 5, ..Special::default() };
        let credential = middle.issue_special("a.example", Key::Ed25519, special).unwrap();
        let Credential::Certificate { chain, ca, .. } = &credential else { panic!("no certificate") };
        assert_eq!(chain.len(), 2);
        let (leaf, middle_file, ca) = (chain[0].display(), chain[1].display(), ca.display());
        sh(&format!("openssl verify -CAfile {ca} -untrusted {middle_file} {leaf}")).unwrap();
        let crl = middle.crl(&[certificate_of(&credential).unwrap()]).unwrap();
        let crl = crl.display();
        let verify =
            format!("openssl verify -crl_check -CRLfile {crl} -CAfile {ca} -untrusted {middle_file} {leaf}");
        assert!(sh(&verify).unwrap_err().to_string().contains("revoked"));
        let old = Special { expired: true, ..Special::default() };
        let old = root.issue_special("b.example", Key::P384, old).unwrap();
        let old = certificate_of(&old).unwrap().display();
        assert!(
            sh(&format!("openssl verify -CAfile {ca} {old}")).unwrap_err().to_string().contains("expired")
        );
        std::fs::remove_dir_all(dir).unwrap();
    }
}
