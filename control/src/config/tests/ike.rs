//! `[ike]`, `[[pool]]` and `[[connection]]`: every key, every mistake with its words, and fingerprints.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use postern_contract::sa::{DfPolicy, FanOut, Limits};
use postern_ike::auth::identity::{Identity, IdentityPattern};
use postern_ike::config::{LocalAuth, Mode, RemoteAuth, Selector, Start, Unique};

use super::{FULL, error, errors, read};
use crate::config::Diagnostic;

/// Every key there is of IKE.
pub(super) const EVERYTHING: &str = r#"
[ike]
port = 1500
nat_port = 14500
addresses = ["192.0.2.1", "2001:db8::1"]
retransmit_first_ms = 500
retransmit_factor = 2
retransmit_tries = 5
cookie_threshold = 10
half_open_limit = 1000
source_threshold = 5
half_open_timeout_s = 20
nat_keepalive_s = 10
fragment_size = 1400
threads = 4
keylog = "keys"

[[pool]]
name = "rw"
range = "10.3.0.10-10.3.0.250"
[[pool]]
name = "rw6"
range = "2001:db8:3::/112"

[[connection]]
name = "site-b"
local = ["192.0.2.1"]
remote = "192.0.2.2"
remote_nets = ["192.0.2.0/24", "198.51.100.7"]
remote_port = 1500
proposals = ["aes128gcm16-prfsha256-x25519", "aes256-sha384-modp2048"]
local_auth = { method = "psk", id = "a.example.org", secret = "correct horse battery" }
remote_auth = { method = "psk", id = "C=CH, O=Example, CN=*", secret = "0x000102030405060708" }
mobike = false
fragmentation = false
childless = true
force_encap = true
rekey_s = 1000
rekey_jitter_s = 10
over_time_s = 20
dpd_s = 0
unique = "never"
pools = ["rw", "rw6"]
dns = ["10.1.0.53"]
[[connection.child]]
name = "net"
local_net = ["10.1.0.0/24"]
remote_net = ["dynamic", "10.2.0.1-10.2.0.9"]
protocol = "tcp"
remote_ports = "443"
esp = ["aes128gcm16-x25519"]
mode = "transport"
start = "trap"
on_close = "start"
on_dpd = "trap"
rekey_s = 100
rekey_jitter_s = 9
life_s = 120
rekey_bytes = 1000
rekey_packets = 10
life_bytes = 2000
life_packets = 20
replay_window = 128
follow_peer = false
mtu = 1400
df = "set"
dscp = 46
mss_clamp = false
priority = 7
worker = 0
fan_out = false
[[connection.child]]
name = "other"
ah = ["sha256"]

[[connection]]
name = "roaming"
remote = "192.0.2.9"
local_auth = { method = "eap-mschapv2", user = "joe", password = "secret" }
remote_auth = { method = "psk", id = "%any", secret = "123456789" }
request_address = ["v4", "v6"]
[[connection.child]]
name = "all"
remote_net = ["0.0.0.0/0", "::/0"]
"#;

/// The least that a connection needs; tests replace parts of it.
pub(super) const CONNECTION: &str = r#"[[connection]]
name = "b"
local = ["192.0.2.1"]
remote = "192.0.2.2"
local_auth = { method = "psk", secret = "correct horse battery" }
remote_auth = { method = "psk", secret = "correct horse battery" }
[[connection.child]]
name = "net"
local_net = ["10.1.0.0/24"]
remote_net = ["10.2.0.0/24"]
start = "start"
"#;

/// Short times leave room for the rekey as well: a tenth more, and never nothing.
#[test]
fn ike_1_defaults_of_short_times_leave_room() {
    for (rekey, more) in [(1, 1), (9, 1), (10, 1), (11, 2), (3600, 360)] {
        let text = CONNECTION
            .replace("[[connection.child]]", &format!("rekey_s = {rekey}\n[[connection.child]]"))
            .replace("start = \"start\"", &format!("rekey_s = {rekey}"));
        let connection = &read(&text).unwrap().ike.connections[0].ike;
        assert_eq!(connection.over_time, Duration::from_secs(more));
        assert_eq!(connection.children[0].life, Some(Duration::from_secs(rekey + more)));
    }
}

#[test]
fn ops_2_every_key_of_ike_is_read() {
    let text = EVERYTHING.replace(
        "\"psk\", id = \"%any\", secret = \"123456789\"",
        "\"certificate\", id = \"g\", ca = \"ca\"",
    );
    // A client by EAP needs a certificate of the gateway, which is read from a file; see below.
    let finding = error(&text);
    assert!(finding.message.contains("files are not read here"), "{finding}");
    let (text, _) = EVERYTHING.split_once("[[connection]]\nname = \"roaming\"").unwrap();
    let config = read(text).unwrap();
    assert_eq!(config.warnings, []);
    let ike = &config.ike;
    assert_eq!((ike.listen.port, ike.listen.nat_port, ike.listen.addresses.len()), (1500, 14500, 2));
    assert_eq!((ike.threads, ike.keylog.as_deref()), (4, Some(Path::new("keys"))));
    let settings = &ike.settings;
    assert_eq!((settings.retransmit.first, settings.retransmit.tries), (Duration::from_millis(500), 5));
    assert!((settings.retransmit.factor - 2.0).abs() < f32::EPSILON);
    assert_eq!(
        (settings.cookie_threshold, settings.half_open_limit, settings.source_threshold),
        (10, 1000, 5)
    );
    assert_eq!(
        (settings.half_open_timeout, settings.nat_keepalive),
        (Duration::from_secs(20), Duration::from_secs(10))
    );
    assert_eq!(settings.fragment_size, 1400);
    assert_eq!(ike.pools[0].last.to_string(), "10.3.0.250");
    assert_eq!(ike.pools[1].last.to_string(), "2001:db8:3::ffff");

    let [site] = &ike.connections[..] else { panic!() };
    let connection = &site.ike;
    assert_eq!(&*connection.name, "site-b");
    assert_eq!(connection.remote, Some("192.0.2.2".parse().unwrap()));
    assert_eq!(
        connection.remote_nets.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["192.0.2.0/24", "198.51.100.7/32"]
    );
    assert_eq!(
        (connection.remote_port, connection.proposals.len(), connection.proposals[1].number),
        (1500, 2, 2)
    );
    assert_eq!(connection.local_id, Identity::Fqdn("a.example.org".into()));
    assert!(matches!(connection.remote_id, IdentityPattern::Name(_)));
    assert!(
        matches!(&connection.local_auth, LocalAuth::Psk(secret) if secret.expose() == b"correct horse battery")
    );
    assert!(
        matches!(&connection.remote_auth, RemoteAuth::Psk(secret) if secret.expose() == [0, 1, 2, 3, 4, 5, 6, 7, 8])
    );
    assert!(
        !connection.mobike && !connection.fragmentation && connection.childless && connection.force_encap
    );
    assert_eq!(connection.rekey, Some(Duration::from_secs(1000)));
    assert_eq!(
        (connection.rekey_jitter, connection.over_time),
        (Duration::from_secs(10), Duration::from_secs(20))
    );
    assert_eq!((connection.dpd, connection.unique), (None, Unique::Never));
    assert_eq!(connection.pools.iter().map(|name| &**name).collect::<Vec<_>>(), ["rw", "rw6"]);
    assert_eq!(connection.dns.len(), 1);

    let [net, other] = &connection.children[..] else { panic!() };
    assert_eq!((net.start, net.on_close, net.on_dpd), (Start::Trap, Start::Start, Start::Trap));
    assert_eq!((net.mode, other.mode), (Mode::Transport, Mode::Tunnel));
    assert_eq!((net.rekey, net.life), (Some(Duration::from_secs(100)), Some(Duration::from_mins(2))));
    assert_eq!((other.rekey, other.life), (Some(Duration::from_hours(1)), Some(Duration::from_mins(66))));
    assert_eq!(other.rekey_jitter, Duration::from_mins(6));
    assert!(
        matches!(&net.local_ts[..], [Selector::Fixed(ts)] if ts.protocol == 6 && ts.ports == (0..=65535))
    );
    assert!(
        matches!(&net.remote_ts[..], [Selector::Dynamic { protocol: 6, ports }, Selector::Fixed(_)] if *ports == (443..=443))
    );
    assert!(matches!(&other.local_ts[..], [Selector::Dynamic { protocol: 0, .. }]));
    let settings = &site.children[0];
    assert_eq!((settings.replay_window, settings.follow_peer, settings.priority), (128, false, 7));
    assert_eq!((settings.path.mtu, settings.path.df, settings.worker), (Some(1400), DfPolicy::Set, Some(0)));
    assert_eq!((settings.fan_out, site.children[1].fan_out), (FanOut::Never, FanOut::ByLoad));
    assert_eq!(settings.limits.soft, Limits { seconds: None, bytes: Some(1000), packets: Some(10) });
    assert_eq!(settings.limits.hard, Limits { seconds: None, bytes: Some(2000), packets: Some(20) });
    assert_eq!(site.children[1].replay_window, 1024);
}

#[test]
fn ops_2_what_may_be_left_out() {
    let config = read(CONNECTION).unwrap();
    assert_eq!(config.warnings, []);
    assert!(config.holds_keys, "a secret is a key");
    let connection = &config.ike.connections[0].ike;
    assert_eq!(connection.local_id, Identity::Ip("192.0.2.1".parse().unwrap()));
    assert_eq!(connection.remote_id, IdentityPattern::Exact(Identity::Ip("192.0.2.2".parse().unwrap())));
    assert!(!connection.proposals.is_empty() && !connection.children[0].proposals.is_empty());
    // What is to be up comes back with its peer, unless the file says otherwise.
    let on_dpd =
        |more: &str| read(&[CONNECTION, more].concat()).unwrap().ike.connections[0].ike.children[0].on_dpd;
    assert_eq!((on_dpd(""), on_dpd("on_dpd = \"none\"\n")), (Start::Start, Start::None));
    assert_eq!(connection.children[0].on_close, Start::None);
    assert_eq!(connection.dpd, Some(Duration::from_secs(30)));
    assert!(connection.mobike && connection.fragmentation && connection.unique == Unique::Replace);
    let nothing = read("").unwrap().ike;
    assert_eq!((nothing.connections.len(), nothing.threads, nothing.listen.port), (0, 2, 500));
    assert!(read(FULL).unwrap().ike.connections.is_empty());
}

/// OPS-2: each mistake is one finding, which says what to do.
#[test]
fn ops_2_mistakes_in_a_connection() {
    let psk = "{ method = \"psk\", secret = \"correct horse battery\" }";
    let local = &format!("local_auth = {psk}")[..];
    let remote = &format!("remote_auth = {psk}")[..];
    for (from, to, key, message) in [
        ("name = \"b\"", "name = \"a b\"", "connection[a b].name", "expected 1 to 64 letters"),
        ("local = [", "mobik = true\nlocal = [", "connection[b].mobik", "did you mean `mobike`?"),
        ("\"192.0.2.2\"", "\"2001:db8::2\"", "connection[b].remote", "`local` has no address of its family"),
        (
            "\"192.0.2.2\"",
            "\"0.0.0.0\"",
            "connection[b].remote",
            "leave it out if the peer comes from anywhere",
        ),
        (
            "remote = \"192.0.2.2\"",
            "remote = \"192.0.2.2\"\nremote_nets = [\"10.0.0.0/8\"]\n",
            "connection[b].remote_nets",
            "does not hold `remote`",
        ),
        (
            "remote = \"192.0.2.2\"",
            "remote = \"192.0.2.2\"\nremote_nets = [\"192.0.2.2/24\"]",
            "connection[b].remote_nets",
            "it is \"192.0.2.0/24\"",
        ),
        (
            "remote = \"192.0.2.2\"\n",
            "",
            "connection[b].child[net].start",
            "needs `remote` in the connection",
        ),
        (
            "remote = \"192.0.2.2\"",
            "remote = \"192.0.2.2\"\nremote_port = 0",
            "connection[b].remote_port",
            "from 1 to 65535",
        ),
        (local, "", "connection[b].local_auth", "missing; expected a table such as { method = \"psk\""),
        (
            local,
            "local_auth = { method = \"pks\" }",
            "connection[b].local_auth.method",
            "\"psk\", \"certificate\" or \"eap-mschapv2\"",
        ),
        (
            local,
            "local_auth = { method = \"psk\" }",
            "connection[b].local_auth.secret",
            "missing; expected a secret in quotes, or a file with it as `secret_file`",
        ),
        (
            local,
            "local_auth = { method = \"psk\", secret = \"\" }",
            "connection[b].local_auth.secret",
            "is empty",
        ),
        (
            local,
            "local_auth = { method = \"psk\", secret = \"0xabc\" }",
            "connection[b].local_auth.secret",
            "an odd number of hexadecimal digits",
        ),
        (
            local,
            "local_auth = { method = \"psk\", secret = \"x\", secret_file = \"y\" }",
            "connection[b].local_auth.secret",
            "not both",
        ),
        (
            local,
            "local_auth = { method = \"psk\", secret_file = \"y\" }",
            "connection[b].local_auth.secret_file",
            "not read here",
        ),
        (
            local,
            "local_auth = { method = \"psk\", id = \"C=\\u0007\", secret = \"correct horse\" }",
            "connection[b].local_auth.id",
            "expected an identity in quotes",
        ),
        (
            local,
            "local_auth = { method = \"certificate\" }",
            "connection[b].local_auth.certificate",
            "missing; expected a path",
        ),
        (
            local,
            "local_auth = { method = \"psk\", secret = \"correct horse\", key = \"k\" }",
            "connection[b].local_auth.key",
            "unknown key",
        ),
        (
            "local = [\"192.0.2.1\"]\n",
            "",
            "connection[b].local_auth.id",
            "missing; expected who this side is",
        ),
        (
            remote,
            "remote_auth = { method = \"certificate\", ca = \"ca.pem\" }",
            "connection[b].remote_auth.id",
            "\"%any\" for whoever can authenticate",
        ),
        (
            remote,
            "remote_auth = { method = \"certificate\", id = \"x\" }",
            "connection[b].remote_auth.ca",
            "missing; expected a path in quotes",
        ),
        (
            remote,
            "remote_auth = { method = \"eap-mschapv2\" }",
            "connection[b].remote_auth.users",
            "users = { joe =",
        ),
        (
            remote,
            "remote_auth = { method = \"eap-mschapv2\", users = { joe = 1, amy = \"secret\" } }",
            "connection[b].remote_auth.users",
            "expected a password in quotes",
        ),
        (
            remote,
            "remote_auth = { method = \"eap-mschapv2\", users = { joe = \"pass\" } }",
            "connection[b].local_auth",
            "this side has to show a certificate (RFC 7296 section 2.16)",
        ),
        (
            local,
            "local_auth = { method = \"eap-mschapv2\", user = \"joe\", password = \"pass\" }",
            "connection[b].remote_auth",
            "has to show a certificate (RFC 7296 section 2.16)",
        ),
        (
            remote,
            "proposals = [\"aes128gcm-prfsha256-x25519\"]\nremote_auth = { method = \"psk\", secret = \"correct horse\" }",
            "connection[b].proposals",
            "did you mean `aes128gcm16`?",
        ),
        (
            remote,
            &format!("proposals = [\"aes128gcm16-prfsha256\"]\n{remote}"),
            "connection[b].proposals",
            "no key exchange method",
        ),
        (remote, &format!("proposals = []\n{remote}"), "connection[b].proposals", "at least one proposal"),
        (remote, &format!("pools = [\"rw\"]\n{remote}"), "connection[b].pools", "there is no [[pool]]"),
        (remote, &format!("dns = [\"10.1.0.53\"]\n{remote}"), "connection[b].dns", "only with `pools`"),
        (
            remote,
            &format!("rekey_s = 10\nrekey_jitter_s = 20\n{remote}"),
            "connection[b].rekey_jitter_s",
            "above `rekey_s`",
        ),
        (remote, &format!("over_time_s = 0\n{remote}"), "connection[b].over_time_s", "above 0"),
        (
            remote,
            &format!("unique = \"yes\"\n{remote}"),
            "connection[b].unique",
            "\"replace\", \"keep\" or \"never\"",
        ),
        (
            remote,
            &format!("request_address = [\"ipv4\"]\n{remote}"),
            "connection[b].request_address",
            "\"v4\" or \"v6\"",
        ),
        (
            "start = \"start\"",
            "start = \"now\"",
            "connection[b].child[net].start",
            "\"none\", \"start\" (at once)",
        ),
        (
            "start = \"start\"",
            "esp = [\"aes128gcm16\"]\nah = [\"sha256\"]",
            "connection[b].child[net].ah",
            "not both",
        ),
        ("start = \"start\"", "esp = [\"aes128\"]", "connection[b].child[net].esp", "integrity"),
        ("start = \"start\"", "esp = \"aes128gcm16\"", "connection[b].child[net].esp", "expected an array"),
        ("start = \"start\"", "life_s = 3600", "connection[b].child[net].life_s", "before it is replaced"),
        (
            "start = \"start\"",
            "rekey_s = 0\nlife_s = 3600",
            "connection[b].child[net].life_s",
            "without a successor",
        ),
        (
            "start = \"start\"",
            "life_bytes = 5",
            "connection[b].child[net].life_bytes",
            "without `rekey_bytes`",
        ),
        (
            "start = \"start\"",
            "rekey_packets = 5\nlife_packets = 5",
            "connection[b].child[net].life_packets",
            "before it is replaced",
        ),
        ("start = \"start\"", "rekey_packets = 0", "connection[b].child[net].rekey_packets", "above 0"),
        (
            "start = \"start\"",
            "replay_window = 65",
            "connection[b].child[net].replay_window",
            "multiples of 64",
        ),
        ("start = \"start\"", "worker = 8", "connection[b].child[net].worker", "there are 1 workers"),
        (
            "start = \"start\"",
            "local_ports = 5",
            "connection[b].child[net].local_ports",
            "ports need a `protocol`",
        ),
        (
            "[\"10.2.0.0/24\"]",
            "[\"2001:db8::/32\"]",
            "connection[b].child[net].remote_net",
            "no address family in common",
        ),
        ("[\"10.2.0.0/24\"]", "[\"dynamisch\"]", "connection[b].child[net].remote_net", "or \"dynamic\""),
        ("[\"10.2.0.0/24\"]", "[\"10.2.0.1/24\"]", "connection[b].child[net].remote_net", "\"10.2.0.0/24\""),
        ("name = \"net\"\n", "", "connection[b].child.name", "missing"),
    ] {
        assert!(CONNECTION.contains(from), "{from}");
        demand(&CONNECTION.replace(from, to), key, message);
    }
}

/// There is this finding, and at most one that follows from it.
fn demand(text: &str, key: &str, message: &str) {
    let found = errors(text);
    let fits = |finding: &&Diagnostic| finding.key == key && finding.message.contains(message);
    assert!(found.iter().any(|finding| fits(&finding)) && found.len() <= 2, "{key} {message}: {found:?}");
    assert!(found.iter().all(|finding| !finding.message.contains("correct horse")), "{found:?}");
}

#[test]
fn ops_2_mistakes_between_sections() {
    let second =
        CONNECTION.replace("\"b\"", "\"c\"").replace("192.0.2.2", "192.0.2.3").replace("10.2.", "10.3.");
    assert_eq!(read(&format!("{CONNECTION}{second}")).unwrap().warnings, []);
    let child = &CONNECTION[CONNECTION.find("[[connection.child]]").unwrap()..];
    let pools = "[[pool]]\nname = \"p\"\nrange = \"10.3.0.0/24\"\n[[pool]]\nname = \"q\"\nrange = \"10.3.0.255-10.3.1.9\"\n";
    for (text, key, message) in [
        (format!("{CONNECTION}{CONNECTION}"), "connection[b].name", "another connection has this name"),
        (format!("{CONNECTION}{child}"), "connection[b].child[net].name", "another child of this connection"),
        (pools.to_owned(), "pool[q].range", "has addresses that pool \"p\" has too"),
        (
            pools.replace("\"q\"", "\"p\"").replace("10.3.0.255", "10.3.1.1"),
            "pool[p].name",
            "another pool has this name",
        ),
        (
            pools.replace("10.3.0.255", "10.3.1.1").replace("\"10.3.0.0/24\"", "\"x\""),
            "pool[p].range",
            "expected a network",
        ),
        (
            format!("{CONNECTION}[ike]\naddresses = [\"192.0.2.7\"]\n"),
            "connection[b].local",
            "`ike.addresses` does not have 192.0.2.1",
        ),
        ("[ike]\nport = 4500\n".to_owned(), "ike.nat_port", "must differ"),
        ("[ike]\nthreads = 0\n".to_owned(), "ike.threads", "from 1 to 256"),
        ("[ike]\nretransmit_factor = 0.5\n".to_owned(), "ike.retransmit_factor", "1.0 to 10.0"),
        (
            "[ike]\ncookie_threshold = 9\nhalf_open_limit = 8\n".to_owned(),
            "ike.cookie_threshold",
            "no cookie would ever",
        ),
        ("[ike]\nprot = 1\n".to_owned(), "ike.prot", "did you mean `port`?"),
        (
            format!(
                "{}{}",
                pools.replace("10.3.0.255", "10.3.1.1"),
                CONNECTION.replace("local = [", "pools = [\"r\"]\nlocal = [")
            ),
            "connection[b].pools",
            "no pool has that name; there are: p, q",
        ),
    ] {
        demand(&text, key, message);
    }
    for (text, key, message) in [
        (
            format!("{CONNECTION}{}", second.replace("192.0.2.3", "192.0.2.2")),
            "connection[c]",
            "always gets that one",
        ),
        (
            format!("{CONNECTION}{}", second.replace("10.3.", "10.2.")),
            "connection[c].child[net]",
            "the same selectors as child \"net\" of connection \"b\"",
        ),
        (
            CONNECTION.replace("correct horse battery", "secret"),
            "connection[b].local_auth.secret",
            "openssl rand",
        ),
        (
            CONNECTION
                .replace("start = \"start\"\n", "")
                .replace("local = [", "request_address = [\"v4\"]\nlocal = ["),
            "connection[b].request_address",
            "local_net = [\"dynamic\"]",
        ),
    ] {
        let warnings = read(&text).unwrap().warnings;
        assert!(
            warnings.iter().any(|finding| finding.key == key && finding.message.contains(message)),
            "{warnings:?}"
        );
    }
}

/// OPS-4: no secret is in what is printed of a configuration, right or wrong.
#[test]
fn ops_4_secrets_are_not_shown() {
    let text = CONNECTION
        .replace("correct horse battery", "Xyzzy-plugh-1234")
        .replace("remote_auth = { method", "remote_auth = { id = \"%any\", method");
    let config = read(&text).unwrap();
    let shown = format!("{config:?} {config:#?}");
    assert!(!shown.contains("plugh") && !shown.contains("88, 121"), "{shown}");
    for broken in [
        text.replace("name = \"b\"", "name = 1"),
        text.replace("secret = \"Xyzzy-plugh-1234\"", "secret = [\"Xyzzy-plugh-1234\"]"),
        text.replace("secret = \"Xyzzy-plugh-1234\"", "secret = \"0sXyzzy-plugh-1234\""),
        text.replace("secret = \"Xyzzy-plugh-1234\"", "secrte = \"Xyzzy-plugh-1234\""),
        text.replace("secret = \"Xyzzy-plugh-1234\"", "users = { joe = [\"Xyzzy-plugh-1234\"] }"),
    ] {
        let shown = format!("{:?}", read(&broken).unwrap_err());
        assert!(!shown.contains("plugh"), "{shown}");
    }
}

/// OPS-2: a fingerprint is the same for the same connection, and another one for every difference.
#[test]
fn ops_2_fingerprints() {
    let fingerprint = |text: &str| read(text).unwrap().ike.connections[0].ike.fingerprint;
    let base = fingerprint(CONNECTION);
    assert_eq!(base, fingerprint(&format!("# moved\n\n[ike]\nthreads = 3\n{CONNECTION}")));
    let mut all = HashMap::from([(base, "")]);
    for (from, to) in [
        ("battery\" }\nremote", "staple\" }\nremote"),
        ("battery\" }\n[[", "staple\" }\n[["),
        ("192.0.2.1", "192.0.2.3"),
        ("10.1.0.0/24", "10.1.0.0/25"),
        ("start = \"start\"", "start = \"trap\""),
        ("start = \"start\"", "start = \"start\"\npriority = 3"),
        ("start = \"start\"", "start = \"start\"\nmtu = 1300"),
        ("start = \"start\"", "start = \"start\"\nesp = [\"aes128gcm16\"]"),
        ("remote = ", "rekey_s = 100\nremote = "),
        ("remote = ", "proposals = [\"aes128gcm16-prfsha256-x25519\"]\nremote = "),
    ] {
        let other = fingerprint(&CONNECTION.replacen(from, to, 1));
        assert_eq!(all.insert(other, to), None, "{to}");
    }
}

/// OPS-2: what a reload would change, in words.
#[test]
fn ops_2_changes_in_words() {
    let pool = "[[pool]]\nname = \"p\"\nrange = \"10.3.0.0/24\"\n";
    let second = CONNECTION.replace("\"b\"", "\"c\"").replace("192.0.2.2", "192.0.2.3");
    let old = read(&format!("{CONNECTION}{second}{pool}")).unwrap().ike;
    assert_eq!(old.changes(&old), [""; 0]);
    let new = read(&format!("{}{}", CONNECTION.replace("battery", "staple"), pool.replace(".3.", ".4.")))
        .unwrap()
        .ike;
    assert_eq!(
        old.changes(&new),
        [
            "remove connection c: its SAs are closed",
            "change connection b: its SAs are closed",
            "change pool p"
        ]
    );
    assert_eq!(new.changes(&old)[1], "add connection c");
}
