//! RST-3: where the private half is kept, each kind with what it refuses; the TPM is the software one of Debian's swtpm.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use postern_nvram::{
    Backup, COUNTER_INDEX, Change, FileStatus, Key, KeyError, KeyHolder, KeyRing, MonotonicCounter, Options,
    Passphrase, PrivateKey, Protection, SealedFile, Store, SystemdCredential, Tpm2, Tpm2Counter, generate,
};

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn ids(ring: &KeyRing) -> Vec<String> {
    ring.0.iter().map(|key| key.id().to_string()).collect()
}

fn again(key: &PrivateKey) -> PrivateKey {
    PrivateKey::from_text(&key.to_text()).unwrap()
}

#[test]
fn rst_3_a_key_file_in_the_clear_is_refused_when_others_may_read_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("private.key");
    let (_, private) = generate();
    let ring = KeyRing(vec![again(&private), generate().1]);
    SealedFile::write(&path, &ring, None).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let holder = SealedFile { path: path.clone(), passphrase_file: None };
    assert_eq!(ids(&holder.unseal().unwrap()), ids(&ring));
    assert!(SealedFile::is_clear(&path).unwrap());
    for wider in [0o640, 0o604, 0o610, 0o666] {
        mode(&path, wider);
        let error = holder.unseal().unwrap_err();
        assert!(matches!(&error, KeyError::Mode { mode, .. } if *mode == wider), "{error}");
    }
    mode(&path, 0o400);
    assert!(holder.unseal().is_ok());
    fs::remove_file(&path).unwrap();
    assert!(matches!(holder.unseal(), Err(KeyError::Io { .. })));
}

#[test]
fn rst_3_a_sealed_key_file_opens_with_its_passphrase_only() {
    let directory = tempfile::tempdir().unwrap();
    let (path, words) = (directory.path().join("private.key"), directory.path().join("passphrase"));
    let ring = KeyRing(vec![generate().1]);
    SealedFile::write(&path, &ring, Some(&Passphrase::new(b"correct horse".to_vec()))).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let clear = ring.to_text();
    let secret = clear.split(' ').nth(1).unwrap().trim();
    assert!(text.starts_with("postern-nvram-sealed-1 argon2id 65536 3 4 ") && !text.contains(secret));
    // Sealed, it may be seen by others.
    mode(&path, 0o644);
    assert!(!SealedFile::is_clear(&path).unwrap());
    let holder = SealedFile { path: path.clone(), passphrase_file: Some(words.clone()) };
    fs::write(&words, "correct horse\n").unwrap();
    mode(&words, 0o644);
    assert!(matches!(holder.unseal(), Err(KeyError::Mode { .. })), "the passphrase may not");
    mode(&words, 0o600);
    assert_eq!(ids(&holder.unseal().unwrap()), ids(&ring));
    fs::write(&words, "wrong horse\n").unwrap();
    assert!(matches!(holder.unseal(), Err(KeyError::Passphrase(_))));
    let without = SealedFile { path: path.clone(), passphrase_file: None };
    assert!(matches!(without.unseal(), Err(KeyError::NoPassphrase(_))));
    // Changed: another cost that is still bearable, a byte of the ciphertext, and a cost that would hold up the start.
    fs::write(&words, "correct horse\n").unwrap();
    for (changed, wrong) in [
        (text.replace(" 65536 3 4 ", " 65536 2 4 "), "passphrase"),
        (text.replace(" 65536 3 4 ", " 4000000000 3 4 "), "not a key"),
        (text.replace("argon2id", "argon2xx"), "not a key"),
        (text.trim_end().to_owned() + "AA", "not a key"),
    ] {
        fs::write(&path, &changed).unwrap();
        let error = holder.unseal().unwrap_err().to_string();
        assert!(error.contains(wrong), "{changed}: {error}");
    }
}

#[test]
fn rst_3_a_systemd_credential_is_found_where_systemd_says() {
    let directory = tempfile::tempdir().unwrap();
    let (_, private) = generate();
    fs::write(directory.path().join("nvram-key"), private.to_text().as_bytes()).unwrap();
    let in_directory = |name: &str| SystemdCredential::in_directory(name, Some(directory.path().into()));
    assert_eq!(ids(&in_directory("nvram-key").unseal().unwrap()), [private.id().to_string()]);
    assert!(matches!(in_directory("other").unseal(), Err(KeyError::Io { .. })));
    for name in ["", "..", "../nvram-key", "/etc/shadow"] {
        assert!(matches!(in_directory(name).unseal(), Err(KeyError::Holder(_))), "{name}");
    }
    assert!(matches!(SystemdCredential::in_directory("nvram-key", None).unseal(), Err(KeyError::Holder(_))));
}

/// A software TPM of this test's own: its state and its sockets are in a directory of its own.
struct SoftwareTpm {
    child: Child,
    directory: tempfile::TempDir,
}

impl SoftwareTpm {
    /// Starts one; `None` where it is not installed, which `hwtests/setup` changes.
    fn start() -> Option<Self> {
        if Command::new("tpm2_getcap").arg("--version").stdout(Stdio::null()).status().is_err() {
            eprintln!("not checked: tpm2-tools are not installed");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .args(["--tpmstate", &format!("dir={}", directory.path().display())])
            .args(["--server", &format!("type=unixio,path={}", at("tpm"))])
            .args(["--ctrl", &format!("type=unixio,path={}", at("tpm.ctrl"))])
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            eprintln!("not checked: swtpm is not installed");
            return None;
        };
        let tpm = Self { child, directory };
        let opened = (0..100).any(|_| {
            sleep(Duration::from_millis(50));
            tpm.directory.path().join("tpm.ctrl").exists()
        });
        assert!(opened, "swtpm does not open its socket");
        Some(tpm)
    }

    fn tcti(&self) -> String {
        format!("swtpm:path={}", self.directory.path().join("tpm").display())
    }
}

impl Drop for SoftwareTpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn rst_3_a_tpm_gives_the_keys_out_to_its_own_machine_only() {
    let (Some(own), Some(other)) = (SoftwareTpm::start(), SoftwareTpm::start()) else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("private.tpm2");
    let ring = KeyRing(vec![generate().1, generate().1]);
    let holder = Tpm2 { path: path.clone(), tcti: Some(own.tcti()) };
    for pcrs in [None, Some("sha256:0,7")] {
        holder.write(&ring, pcrs).unwrap();
        assert_eq!(ids(&holder.unseal().unwrap()), ids(&ring), "{pcrs:?}");
        assert!(
            !fs::read_to_string(&path).unwrap().contains(ring.to_text().split(' ').nth(1).unwrap().trim())
        );
        let thief = Tpm2 { path: path.clone(), tcti: Some(other.tcti()) };
        let error = thief.unseal().unwrap_err();
        assert!(error.to_string().contains("tpm2_load"), "{error}");
    }
    let kept = Protection::of(&path).unwrap();
    assert_eq!(kept, Protection::Tpm2 { pcrs: Some("sha256:0,7".into()) });
    assert_eq!(ids(&kept.holder(&path, None, Some(&own.tcti())).unseal().unwrap()), ids(&ring));
    // Something else was booted: the policy does not hold any more.
    let extended = Command::new("tpm2_pcrextend")
        .arg("7:sha256=1111111111111111111111111111111111111111111111111111111111111111")
        .env("TPM2TOOLS_TCTI", own.tcti())
        .status()
        .unwrap();
    assert!(extended.success());
    let error = holder.unseal().unwrap_err();
    assert!(error.to_string().contains("tpm2_unseal"), "{error}");
}

#[test]
fn rst_11_a_counter_in_the_tpm_shows_that_an_older_backup_was_put_back() {
    let Some(tpm) = SoftwareTpm::start() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (public, private) = generate();
    let keys = directory.path().join("private.key");
    SealedFile::write(&keys, &KeyRing(vec![private]), None).unwrap();
    let holder = SealedFile { path: keys, passphrase_file: None };
    let mut counter = Tpm2Counter { index: COUNTER_INDEX, tcti: Some(tpm.tcti()) };
    assert!(counter.read().is_err(), "there is none yet");
    counter.define().unwrap();
    counter.define().unwrap();
    let first = counter.read().unwrap().unwrap();
    assert_eq!(counter.advance().unwrap(), first + 1);

    let backups = directory.path().join("backup");
    let open = || Store::open(Options::new(&backups), &public, Box::new(counter.clone())).unwrap();
    let mut store = open();
    assert!(store.is_protected());
    store.commit(&[Change::Put { key: Key([1; 16]), record: vec![1].into() }]).unwrap();
    let name = Backup::inspect(&backups).unwrap().pop().unwrap().0;
    let old = fs::read(backups.join(&name)).unwrap();
    drop(store);
    let mut store = open();
    store.erase_older().unwrap();
    drop(store);
    let read = |counter: &mut Tpm2Counter| Backup::read(&backups, &holder, counter).unwrap();
    assert!(read(&mut counter.clone()).report.is_clean());
    fs::remove_dir_all(&backups).unwrap();
    fs::create_dir(&backups).unwrap();
    fs::write(backups.join(&name), old).unwrap();
    let backup = read(&mut counter.clone());
    assert!(backup.records.is_empty());
    assert_eq!(backup.report.files.first().unwrap().status, FileStatus::RolledBack { stated: first + 2 });
}
