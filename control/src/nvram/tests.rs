use std::fs;

use clap::Parser;
use postern_nvram::{Change, Key, Options, Store};

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(subcommand)]
    command: Both,
}

#[derive(Debug, Subcommand)]
enum Both {
    #[command(subcommand)]
    Key(KeyCommand),
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
}

/// What the words of a command line do.
fn run(words: &[&str]) -> Result<Outcome, Refusal> {
    let line = Line::try_parse_from([&["postern"], words].concat()).unwrap();
    match line.command {
        Both::Key(command) => key(&command),
        Both::Snapshot(command) => snapshot(&command, SystemTime::now() + Duration::from_secs(90)),
    }
}

fn levels(directory: &Path) -> Vec<Level> {
    check(directory, None).iter().map(|finding| finding.level).collect()
}

#[test]
fn rst_3_keys_are_made_rotated_and_sealed_and_never_shown() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("recovery");
    let at = directory.to_str().unwrap();
    assert_eq!(levels(&directory), [Level::Ok], "nothing yet");
    let made = run(&["key", "init", "--directory", at]).unwrap();
    assert!(made.text.contains("in the clear") && made.good);
    assert_eq!(levels(&directory), [Level::Warn]);
    assert!(matches!(run(&["key", "init", "--directory", at]), Err(Refusal::Exists(_))));
    let words = scratch.path().join("words");
    fs::write(&words, "correct horse\n").unwrap();
    fs::set_permissions(&words, fs::Permissions::from_mode(0o600)).unwrap();
    let words = words.to_str().unwrap();
    let sealed = run(&["key", "seal", "--directory", at, "--with-passphrase-file", words]).unwrap();
    assert_eq!(
        (&sealed.json["key"], &sealed.json["protection"]),
        (&made.json["key"], &json!("sealed with a passphrase"))
    );
    assert_eq!(levels(&directory), [Level::Ok]);
    assert!(matches!(
        run(&["key", "rotate", "--directory", at]),
        Err(Refusal::Key(KeyError::NoPassphrase(_)))
    ));
    let rotated = run(&["key", "rotate", "--directory", at, "--passphrase-file", words]).unwrap();
    assert_eq!(rotated.json["older"], json!([made.json["key"]]));
    let public = read_public(&directory.join(PUBLIC)).unwrap();
    assert_eq!(rotated.json["key"], json!(public.id().to_string()));
    let secret = public.to_text().split(' ').nth(1).unwrap().trim().to_owned();
    for outcome in [made, sealed, rotated] {
        assert!(!format!("{outcome:?}").contains(&secret), "OPS-4");
    }
    fs::set_permissions(directory.join(PUBLIC), fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(levels(&directory), [Level::Ok, Level::Fail]);
}

#[test]
fn rst_11_a_snapshot_is_inspected_without_and_verified_with_the_key() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("recovery");
    let at = directory.to_str().unwrap();
    run(&["key", "init", "--directory", at]).unwrap();
    let public = read_public(&directory.join(PUBLIC)).unwrap();
    let backup = directory.join(BACKUP);
    let mut store = Store::open(Options::new(&backup), &public, Box::new(NoCounter)).unwrap();
    let put = |number| Change::Put { key: Key([number; 16]), record: vec![number; 300].into() };
    store.commit(&[put(1), put(2), put(3)]).unwrap();
    store.commit(&[Change::Remove { key: Key([1; 16]) }]).unwrap();
    assert_eq!(levels(&directory), [Level::Warn, Level::Warn], "a key in the clear, and no counter");
    let path = backup.to_str().unwrap();
    let inspected = run(&["snapshot", "inspect", path]).unwrap();
    let file = &inspected.json[0];
    assert_eq!([&file["puts"], &file["removes"], &file["batches"]], [&json!(3), &json!(1), &json!(2)]);
    assert!(
        file["age_seconds"].as_u64().unwrap() >= 89 && inspected.text.contains("1m 3"),
        "{}",
        inspected.text
    );
    let verified = run(&["snapshot", "verify", path, "--directory", at]).unwrap();
    assert!(verified.good && verified.text.contains("2 records would be used"), "{}", verified.text);
    // A torn end is said, and is no success.
    let name = backup.join(&Backup::inspect(&backup).unwrap()[0].0);
    let whole = fs::read(&name).unwrap();
    fs::write(&name, &whole[..whole.len() - 3]).unwrap();
    let torn = run(&["snapshot", "verify", name.to_str().unwrap(), "--directory", at]).unwrap();
    assert!(!torn.good && torn.text.contains("bytes torn at the end"), "{}", torn.text);
    fs::write(&name, b"something else").unwrap();
    assert!(matches!(run(&["snapshot", "inspect", name.to_str().unwrap()]), Err(Refusal::Read(_))));
    assert!(matches!(run(&["snapshot", "verify", "/nowhere", "--directory", at]), Err(Refusal::Io { .. })));
}
