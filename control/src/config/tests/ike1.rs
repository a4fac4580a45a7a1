//! `version = 1`: what a connection of IKEv1 may be, and what is said of one that cannot be.

use postern_ike::config::{Strategy, Xauth};

use super::{error, errors, read};

/// A connection of version 1 with these lines.
fn with(lines: &str, child: &str) -> String {
    let psk = |id: &str| format!("{{ method = \"psk\", id = \"{id}\", secret = \"correct horse battery\" }}");
    let (local, remote) = (psk("a.example.org"), psk("b.example.org"));
    format!(
        "[[connection]]\nname = \"old\"\nversion = 1\nremote = \"192.0.2.2\"\nlocal_auth = {local}\nremote_auth = {remote}\n{lines}\n\
         [[connection.child]]\nname = \"net\"\nremote_net = [\"10.2.0.0/24\"]\n{child}\n"
    )
}

/// IKE-2: the version, and XAuth of both sides.
#[test]
fn ike_2_version_1_is_read() {
    let v1 = |lines: &str| {
        let config = read(&with(lines, "")).unwrap();
        config.ike.connections[0].ike.v1.as_ref().map(|v1| format!("{:?}", v1.xauth)).unwrap()
    };
    assert_eq!(v1(""), "none");
    assert_eq!(v1("xauth = { user = \"joe\", password = \"open sesame\" }"), "XAuth client");
    assert_eq!(v1("xauth = { users = { joe = \"open sesame\" } }"), "XAuth gateway");
    let config = read(&with("xauth = { users = { joe = \"open sesame\" } }", "")).unwrap();
    let Some(Xauth::Server(users)) = config.ike.connections[0].ike.v1.as_ref().map(|v1| &v1.xauth) else {
        panic!()
    };
    assert!(users.contains_key("joe"));
    let plain = read(&with("", "").replace("version = 1\n", "version = 2\n")).unwrap();
    assert!(plain.ike.connections[0].ike.v1.is_none());
    // A password is part of what a connection is.
    let fingerprint = |password: &str| {
        let lines = format!("xauth = {{ user = \"joe\", password = \"{password}\" }}");
        read(&with(&lines, "")).unwrap().ike.connections[0].ike.fingerprint
    };
    assert_ne!(fingerprint("open sesame"), fingerprint("open barley"));
}

/// IKE-2: aggressive mode is off, and switched on with a warning that says what it costs.
#[test]
fn ike_2_aggressive_mode_warns() {
    let is_on = |text: &str| read(text).unwrap().ike.connections[0].ike.v1.as_ref().map(|v1| v1.aggressive);
    assert_eq!(is_on(&with("", "")), Some(false));
    let text = with("aggressive = true\nproposals = [\"aes128-sha256-ecp256\"]", "");
    assert_eq!(is_on(&text), Some(true));
    let warnings = read(&text).unwrap().warnings;
    assert!(warnings.iter().any(|found| found.to_string().contains("shared secret offline")), "{warnings:?}");
    let two = text.replace("ecp256", "ecp256-modp2048");
    assert!(errors(&two).iter().any(|found| found.message.contains("have to be of one group")));
    let v2 = text.replace("version = 1", "version = 2");
    assert!(errors(&v2).iter().any(|found| found.message.contains("is of IKEv1 alone")));
}

/// IKE-2: what IKEv1 lacks, and what is not secure any more, is refused in words that say so.
#[test]
fn ike_2_refusals_say_why() {
    for (lines, child, expected) in [
        ("proposals = [\"3des-sha1-modp2048\"]", "", "`3des` is refused: 3DES has blocks of 64 bits"),
        ("proposals = [\"aes128-md5-modp2048\"]", "", "`md5` is refused: MD5 is broken"),
        ("proposals = [\"aes128-sha1-modp1024\"]", "", "`modp1024` is refused: the group is too small"),
        ("", "esp = [\"aes128-md5\"]", "`md5` is refused"),
        ("proposals = [\"aes128gcm16-prfsha256-x25519\"]", "", "no proposal is one of IKEv1"),
        ("", "esp = [\"chacha20poly1305\"]", "a child has no proposal for IKEv1"),
        ("", "local_net = [\"10.1.0.0/24\", \"10.3.0.0/24\"]", "a child has one network on each side"),
    ] {
        let found = error(&with(lines, child)).to_string();
        assert!(found.contains(expected), "{lines} {child}: {found}");
    }
    let found = error(
        &with("xauth = { users = { joe = \"open sesame\" } }", "").replace("version = 1", "version = 2"),
    );
    assert!(found.to_string().contains("of IKEv1 alone"), "{found}");
    let found = error(&with("", "").replace("version = 1", "version = 3"));
    assert!(found.to_string().contains("1 or 2"), "{found}");
}

/// RST-2: the strategies by name; that there is no `restore` in version 1 is said, and its peers are told then.
#[test]
fn rst_2_restore_is_of_version_2() {
    for (word, strategy) in [
        ("delete", Strategy::Delete),
        ("prebuilt", Strategy::Prebuilt),
        ("restore", Strategy::Restore),
        ("none", Strategy::None),
    ] {
        let text = with(&format!("reset = \"{word}\""), "");
        let config = read(&text).unwrap();
        let warned = config.warnings.iter().any(|finding| finding.key.ends_with("reset"));
        assert_eq!(warned, strategy == Strategy::Restore, "{word}");
        let config = read(&text.replace("version = 1\n", "")).unwrap();
        assert!(config.warnings.iter().all(|finding| !finding.key.ends_with("reset")));
        assert_eq!(config.ike.connections[0].ike.reset, strategy);
    }
}
