//! The layout as a whole, each kind of finding with its exact words, and arbitrary texts.

use postern_contract::sa::{DfPolicy, DscpPolicy, Encryption, FanOut, Integrity, IpsecProtocol};
use proptest::prelude::*;

use super::*;
use crate::desired::Desired;

mod files;
mod ike;
mod ike1;

/// Every key there is.
const FULL: &str = r#"
[datapath]
socket = "/tmp/a/datapath.sock"
state = "/tmp/a/datapath"
start = true
cores = [0, 1]
[[datapath.interface]]
name = "eth0"
role = "outside"
[[datapath.interface]]
name = "eth1"
role = "inside"

[control]
socket = "/tmp/a/control.sock"
state = "/tmp/a/control"
log = "info,postern_control=debug"
datapath_program = "postern-datapath"

[[tunnel]]
name = "site-b"
local = "192.0.2.1"
remote = "192.0.2.2"
mode = "tunnel"
esp = "aes128gcm16"
out = { spi = 0x1001, key = "000102030405060708090a0b0c0d0e0f10111213", sequence = 7 }
in = { spi = 0x2001, key = "0x202122232425262728292a2b2c2d2e2f30313233" }
local_net = ["10.1.0.0/24", "fd00:1::/64"]
remote_net = ["10.2.0.0/24", "10.3.0.1-10.3.0.9", "fd00:2::/64"]
protocol = "tcp"
local_ports = "1000-2000"
remote_ports = 443
encap = { remote_port = 14500 }
esn = true
replay_window = 4096
follow_peer = false
df = "set"
dscp = 46
ecn = false
mtu = 1400
mss_clamp = false
lifetime = { soft = { seconds = 10, bytes = 20, packets = 30 }, hard = { seconds = 11 } }
seen_as = { local = "198.51.100.1", remote = "203.0.113.1", out_spi = 0x5001, in_spi = 0x5002 }
priority = 5
worker = 1
fan_out = true

[[tunnel]]
name = "bundle"
local = "2001:db8::1"
remote = "2001:db8::2"
mode = "transport"
esp = "null-sha1"
ah = "sha256"
out = { spi = 256, integrity_key = "1111111111111111111111111111111111111111", ah_spi = 257, ah_key = "1111111111111111111111111111111111111111111111111111111111111111", ah_sequence = 3 }
in = { spi = 256, integrity_key = "2222222222222222222222222222222222222222", ah_spi = 256, ah_key = "2222222222222222222222222222222222222222222222222222222222222222" }

[[policy]]
name = "no-telnet"
priority = 10
action = "discard"
local = ["0.0.0.0/0"]
remote = ["10.2.0.0/24"]
protocol = "tcp"
remote_ports = "23"

[[relay]]
name = "joe"
client = { relay = "192.0.2.10", peer = "192.0.2.1", esp = { to_relay = 0x3001, from_relay = 0x4001 }, encap = {} }
gateway = { relay = "198.51.100.10", peer = "198.51.100.2", esp = { to_relay = 0x3002, from_relay = 0x4002 } }
"#;

/// The least that a tunnel needs; tests replace parts of it.
const TUNNEL: &str = r#"[[tunnel]]
name = "a"
local = "192.0.2.1"
remote = "192.0.2.2"
esp = "aes128gcm16"
out = { spi = 0x1001, key = "000102030405060708090a0b0c0d0e0f10111213" }
in = { spi = 0x2001, key = "202122232425262728292a2b2c2d2e2f30313233" }
local_net = ["10.1.0.0/24"]
remote_net = ["10.2.0.0/24"]
"#;

fn read(text: &str) -> Result<Config, ConfigError> {
    parse("t", text, &NoKeyFiles)
}

/// The findings in a text that cannot be used.
fn errors(text: &str) -> Vec<Diagnostic> {
    read(text).unwrap_err().0
}

/// The only finding.
fn error(text: &str) -> Diagnostic {
    let mut found = errors(text);
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

#[test]
fn ops_2_every_key_is_read() {
    let config = read(FULL).unwrap();
    assert_eq!(config.warnings, []);
    assert_eq!(config.datapath.interfaces.len(), 2);
    assert_eq!(config.control.datapath_program.as_deref(), Some(Path::new("postern-datapath")));
    let [site, bundle] = &config.tunnels[..] else { panic!() };
    assert_eq!(
        site.local,
        Translation { on_wire: "192.0.2.1".parse().unwrap(), authenticated: "198.51.100.1".parse().unwrap() }
    );
    let out = site.outbound.esp.as_ref().unwrap();
    assert_eq!(
        (out.spi, out.sequence),
        (Translation { on_wire: Spi(0x1001), authenticated: Spi(0x5001) }, 7)
    );
    assert_eq!(out.suite.encryption, Encryption::AesGcm16);
    assert_eq!(site.inbound.esp.as_ref().unwrap().suite.encryption_key.expose()[..2], [0x20, 0x21]);
    assert_eq!(site.selectors.len(), 3, "v4 × v4 twice, v6 × v6 once");
    assert_eq!(site.selectors[0].local_ports, 1000..=2000);
    assert_eq!(site.selectors[0].remote_ports, 443..=443);
    assert_eq!(site.encap, Some(UdpEncap { local_port: 4500, remote_port: 14500 }));
    let expected = PathPolicy {
        df: DfPolicy::Set,
        dscp: DscpPolicy::Fixed(46),
        ecn: false,
        mtu: Some(1400),
        mss_clamp: false,
    };
    assert_eq!(site.path, expected);
    assert_eq!(site.lifetime.soft.packets, Some(30));
    assert_eq!((site.priority, site.worker, site.replay_window), (5, Some(1), 4096));
    assert_eq!((site.fan_out, bundle.fan_out), (FanOut::Always, FanOut::ByLoad));
    assert_eq!(bundle.inbound.ah.as_ref().unwrap().suite.integrity, Integrity::HmacSha2_256_128);
    assert_eq!(bundle.selectors[0].local.start, bundle.local.on_wire);
    assert_eq!(config.policies[0].action, Action::Discard);
    assert_eq!(config.relays[0].client.encap, Some(UdpEncap { local_port: 4500, remote_port: 4500 }));
}

#[test]
fn an_empty_file_is_all_defaults() {
    let config = read("").unwrap();
    assert_eq!(config.control.socket, Path::new("/run/postern/control.sock"));
    assert_eq!(config.datapath.socket, Path::new("/run/postern/datapath.sock"));
    assert!(config.tunnels.is_empty());
}

/// OPS-2: the exact words, one table of what is replaced in [`TUNNEL`] and what is said about it.
#[test]
fn ops_2_findings_point_at_the_line() {
    let gcm = "`aes128gcm16` takes 20 bytes, 40 hexadecimal digits: 16 of key followed by 4 of salt";
    let key = "000102030405060708090a0b0c0d0e0f10111213";
    let table: &[(&str, &str, &str)] = &[
        (
            "name = \"a\"",
            "nmae = \"a\"",
            "t:1:1: error: `tunnel.name`: missing; expected a text in quotes\nt:2:1: error: `tunnel.nmae`: unknown key; did you mean `name`?",
        ),
        (
            "name = \"a\"",
            "name = \"a b\"",
            "t:2:8: error: `tunnel[a b].name`: expected 1 to 64 letters, digits or any of - _ . @ :",
        ),
        (
            "local = \"192.0.2.1\"",
            "local = \"192.0.2.300\"",
            "t:3:9: error: `tunnel[a].local`: expected an IP address in quotes, such as \"192.0.2.1\" or \"2001:db8::1\"",
        ),
        (
            "local = \"192.0.2.1\"",
            "local = \"2001:db8::1\"",
            "t:4:10: error: `tunnel[a].remote`: `local` and `remote` must be of one address family",
        ),
        (
            "\"aes128gcm16\"",
            "\"aes128gcm61\"",
            "t:5:7: error: `tunnel[a].esp`: did you mean `aes128gcm16`? allowed: aes128gcm16, aes192gcm16, aes256gcm16, chacha20poly1305, aes128gmac, aes192gmac, aes256gmac, or aes128, aes192, aes256, null with -sha256, -sha384, -sha512, -sha1",
        ),
        (
            "0x1001",
            "255",
            "t:6:15: error: `tunnel[a].out.spi`: expected an SPI from 0x100 to 0xffffffff (0 to 255 are reserved, RFC 4303 section 2.1)",
        ),
        (key, "0001", &format!("t:6:29: error: `tunnel[a].out.key`: {gcm}; found 2 bytes")),
        (
            key,
            "xx",
            &format!("t:6:29: error: `tunnel[a].out.key`: a character that is no hexadecimal digit; {gcm}"),
        ),
        (
            "spi = 0x1001, ",
            "spi = 0x1001, integrity_key = \"00\", ",
            "t:6:39: error: `tunnel[a].out.integrity_key`: the algorithms take no such key; leave it out",
        ),
        (
            "spi = 0x1001, ",
            "spi = 0x1001, ah_spi = 0x1002, ",
            "t:6:32: error: `tunnel[a].out.ah_spi`: is of use only with `ah`, which this tunnel does not have",
        ),
        (
            "spi = 0x1001, ",
            "spi = 0x1001, sequence = 0, ",
            "t:6:34: error: `tunnel[a].out.sequence`: an outbound SA begins at 1 or above (RFC 4303 section 3.3.3)",
        ),
        (
            "out = {",
            "outt = {",
            "t:1:1: error: `tunnel[a].out`: missing; expected a table with `spi` and `key`\nt:6:1: error: `tunnel[a].outt`: unknown key; did you mean `out`?",
        ),
        (
            "local_net = [\"10.1.0.0/24\"]",
            "local_net = [\"10.1.0.1/24\"]",
            "t:8:13: error: `tunnel[a].local_net`: expected a network without host bits: with this prefix length it is \"10.1.0.0/24\"",
        ),
        (
            "local_net = [\"10.1.0.0/24\"]",
            "local_net = [\"fd00::/64\"]",
            "t:1:1: error: `tunnel[a].local_net`: the networks of the two sides have no address family in common, so nothing would ever match",
        ),
        (
            "esp = ",
            "remote_ports = \"22\"\nesp = ",
            "t:5:16: error: `tunnel[a].remote_ports`: ports need a `protocol`, for example protocol = \"tcp\"",
        ),
        (
            "esp = ",
            "replay_window = 100\nesp = ",
            "t:5:17: error: `tunnel[a].replay_window`: expected 64 to 4096 in multiples of 64, or 0 to turn the check off",
        ),
        (
            "esp = ",
            "dscp = 64\nesp = ",
            "t:5:8: error: `tunnel[a].dscp`: expected \"copy\" or a number from 0 to 63",
        ),
        (
            "esp = ",
            "worker = 3\nesp = ",
            "t:5:10: error: `tunnel[a].worker`: there are 1 workers (see datapath.cores), numbered from 0",
        ),
        (
            "esp = \"aes128gcm16\"\n",
            "",
            "t:1:1: error: `tunnel[a].esp`: missing; a tunnel needs `esp`, `ah` or both, for example esp = \"aes128gcm16\"\nt:5:15: error: `tunnel[a].out.spi`: is of use only with `esp`, which this tunnel does not have\nt:5:29: error: `tunnel[a].out.key`: is of use only with `esp`, which this tunnel does not have\nt:6:14: error: `tunnel[a].in.spi`: is of use only with `esp`, which this tunnel does not have\nt:6:28: error: `tunnel[a].in.key`: is of use only with `esp`, which this tunnel does not have",
        ),
        (
            "[[tunnel]]",
            "[datapath]\nsoket = \"/x\"\n[[tunnel]]",
            "t:2:1: error: `datapath`: unknown field `soket`, expected one of `socket`, `state`, `start`, `cores`, `frames`, `huge_pages`, `numa_local`, `need_wakeup`, `busy_poll_us`, `busy_poll_budget`, `idle`, `fragments`, `relay`, `relay_entries`, `sa_slots`, `crypto`, `interface`; did you mean `socket`?",
        ),
        (
            "[[tunnel]]",
            "[datapath]\nframes = 1000\n[[tunnel]]",
            "t:1:1: error: `datapath`: frames = 1000: must be a power of two from 512 to 4194304",
        ),
        (
            "[[tunnel]]",
            "[datapath]\nbusy_poll_us = 2000000\n[[tunnel]]",
            "t:1:1: error: `datapath`: busy_poll_us = 2000000: must be 0 (interrupts) to 1000000; 20 is usual",
        ),
        (
            "[[tunnel]]",
            "[datapath]\nbusy_poll_budget = 0\n[[tunnel]]",
            "t:1:1: error: `datapath`: busy_poll_budget = 0: must be 1 to 65535; 64 is what drivers take by themselves",
        ),
        ("[[tunnel]]", "[tunel]", "t:1:2: error: `tunel`: unknown key; did you mean `tunnel`?"),
        (
            "name = \"a\"",
            "name = ",
            "t:2:8: error: not TOML: string values must be quoted, expected literal string",
        ),
        (
            "esp = ",
            "lifetime = { soft = { bytes = 2 }, hard = { bytes = 1 } }\nesp = ",
            "t:5:12: error: `tunnel[a].lifetime.soft`: bytes: the soft limit comes after the hard one",
        ),
    ];
    for (from, to, expected) in table {
        assert!(TUNNEL.contains(from), "{from}");
        let found = match read(&TUNNEL.replacen(from, to, 1)) {
            Ok(_) => "accepted".to_owned(),
            Err(error) => error.to_string(),
        };
        assert_eq!(&found, expected, "\nafter replacing {from:?} by {to:?}");
    }
}

/// OPS-2: what sections must agree on.
#[test]
fn ops_2_sections_are_checked_against_each_other() {
    let second = TUNNEL.replace("0x1001", "0x1002").replace("0001", "aaaa").replace("2021", "bbbb");
    let twice = format!("{TUNNEL}{second}");
    let error = read(&twice).unwrap_err().to_string();
    assert!(error.contains("another tunnel has this name"), "{error}");

    let error = read(&twice.replacen("\"a\"", "\"b\"", 1)).unwrap_err().to_string();
    assert!(error.contains("tunnel \"b\" already receives ESP with SPI 0x00002001"), "{error}");

    let both = format!("{TUNNEL}{}", second.replace("0x2001", "0x2002").replace("\"a\"", "\"b\""));
    let config = read(&both).unwrap();
    let [warning] = &config.warnings[..] else { panic!("{:?}", config.warnings) };
    assert_eq!(
        warning.to_string(),
        "t:10:1: warning: `tunnel[b]`: has the same selectors as tunnel \"a\": one of the two is never used"
    );

    let error = read(
        &TUNNEL
            .replace("202122", "000102")
            .replace("232425262728292a2b2c2d2e2f30313233", "030405060708090a0b0c0d0e0f10111213"),
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the same key as tunnel \"a\", `out`, ESP"), "{error}");

    let relay = FULL.replace("to_relay = 0x3001", "to_relay = 0x2001");
    let error = read(&relay).unwrap_err().to_string();
    assert!(error.contains("tunnel \"site-b\" already receives ESP with SPI 0x00002001"), "{error}");
    let relay = FULL.replace("peer = \"192.0.2.1\", esp", "peer = \"192.0.2.1\", ah");
    let error = read(&relay).unwrap_err().to_string();
    assert!(error.contains("both partitions of a relay entry must name the same IPsec protocols"), "{error}");
}

/// OPS-4: whatever is wrong with the file, no part of a key is shown.
#[test]
fn ops_4_keys_are_never_shown() {
    let key = "c0ffee0123456789c0ffee0123456789c0ffee01";
    let with_key = TUNNEL.replace("000102030405060708090a0b0c0d0e0f10111213", key);
    let config = read(&with_key).unwrap();
    let mut shown = format!("{config:?}");
    shown = format!("{shown}{:?}", Desired::new(config));
    for (from, to) in [
        ("\"c0ff", "\"c0ffx"),
        ("\"c0ff", "c0ff"),
        ("key = \"c0", "spi = \"c0"),
        ("spi = 0x1001", "spi = \"c0ffee0123456789c0ffee0123456789c0ffee01\""),
        ("esp = \"aes128gcm16\"", "esp = \"c0ffee0123456789c0ffee0123456789c0ffee01\""),
        ("esp = \"aes128gcm16\"", "esp = \"aes128-c0ffee0123456789c0ffee0123456789c0ffee01\""),
        ("key = \"c0ffee", "\"c0ffee0123456789c0ffee0123456789c0ffee01\" = \"c0ffee"),
        ("key = \"c0", "key_file = \"/nowhere\", key = \"c0"),
        ("ee01\" }", "ee01 }"),
        ("ee01\" }", "ee01\""),
    ] {
        assert!(with_key.contains(from), "{from}");
        shown.push_str(&read(&with_key.replacen(from, to, 1)).unwrap_err().to_string());
    }
    let bytes = format!("{:?}", &[0xc0_u8, 0xff, 0xee][..]);
    for part in ["c0ffee", "123456789", bytes.trim_matches(['[', ']'])] {
        assert!(!shown.contains(part), "{part} is shown: {shown}");
    }
}

/// Key files must be private; relative ones are beside the configuration.
#[test]
fn ops_4_key_files() {
    use std::os::unix::fs::PermissionsExt;
    let directory = std::env::temp_dir().join(format!("pt-control-keys-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let key = directory.join("a.key");
    std::fs::write(&key, "000102030405060708090a0b0c0d0e0f10111213\n").unwrap();
    let file = directory.join("postern.toml");
    let text = TUNNEL.replace("key = \"000102030405060708090a0b0c0d0e0f10111213\"", "key_file = \"a.key\"");
    std::fs::write(&file, text).unwrap();

    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = load(&file).unwrap_err().to_string();
    assert!(
        error.contains(":6:34: error: `tunnel[a].out.key_file`:") && error.contains("chmod 600"),
        "{error}"
    );
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let config = load(&file).unwrap();
    assert_eq!(config.tunnels[0].outbound.esp.as_ref().unwrap().suite.encryption_key.len(), 20);
    std::fs::remove_dir_all(&directory).unwrap();
}

/// Ids survive a restart, and change with the keys and SPIs but not with anything else.
#[test]
fn ids_are_stable_and_follow_the_keys() {
    let ids = |text: &str| Desired::new(read(text).unwrap()).sas.into_keys().collect::<Vec<_>>();
    let before = ids(TUNNEL);
    assert_eq!(before, ids(TUNNEL));
    assert_eq!(before, ids(&TUNNEL.replace("esp =", "mtu = 1400\nesp =")));
    let changed = ids(&TUNNEL.replace("\"000102", "\"ff0102"));
    assert_eq!(before.iter().filter(|id| changed.contains(id)).count(), 1);
    assert!(ids(&TUNNEL.replace("\"a\"", "\"b\"")).iter().all(|id| !before.contains(id)));
}

/// DP-3: in a bundle AH is applied to the ESP packet in transport mode, and named by the ESP SA.
#[test]
fn dp_3_bundles() {
    let desired = Desired::new(read(FULL).unwrap());
    let sas = || desired.sas.values().filter(|sa| sa.tunnel == "bundle").map(|sa| &sa.config);
    assert_eq!(sas().count(), 4);
    for sa in sas() {
        let other = &desired.sas[&sa.pair.unwrap()].config;
        assert_eq!((other.pair, other.protocol), (Some(sa.id), sa.protocol));
        assert_ne!(other.direction, sa.direction);
        match sa.bundle {
            Some(ah) => {
                let ah = &desired.sas[&ah].config;
                assert_eq!((sa.protocol, ah.protocol), (IpsecProtocol::Esp, IpsecProtocol::Ah));
                assert_eq!((ah.direction, ah.mode, ah.bundle), (sa.direction, Mode::Transport, None));
            }
            None => assert_eq!(sa.protocol, IpsecProtocol::Ah),
        }
    }
}

proptest! {
    #[test]
    fn any_text(text in "\\PC{0,400}") {
        fuzz(text.as_bytes());
    }

    /// Lines of the right shape get further into the reader than noise does.
    #[test]
    fn shuffled_lines(lines in proptest::collection::vec(
        proptest::sample::select(FULL.lines().chain(ike::EVERYTHING.lines()).collect::<Vec<_>>()), 0..40)) {
        fuzz(lines.join("\n").as_bytes());
    }

    /// A right file with a few bytes changed.
    #[test]
    fn damaged_file(damage in proptest::collection::vec((any::<prop::sample::Index>(), 0x20_u8..0x7f), 1..6)) {
        let mut bytes = [FULL, ike::EVERYTHING].concat().into_bytes();
        for (place, byte) in damage {
            let at = place.index(bytes.len());
            bytes[at] = byte;
        }
        fuzz(&bytes);
    }
}

/// The seeds of the fuzz target `config` go through the same function.
#[test]
fn fuzz_seeds_hold() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../hwtests/fuzz/seeds/config");
    let mut replayed = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let seed = std::fs::read(&path).unwrap();
        assert!(std::panic::catch_unwind(|| fuzz(&seed)).is_ok(), "{}", path.display());
        replayed += 1;
    }
    assert!(replayed >= 10, "{replayed} seeds in {folder}");
}
