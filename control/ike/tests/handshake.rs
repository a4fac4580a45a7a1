//! Two endpoints, face to face: IKE_SA_INIT, IKE_AUTH, rekeys and deletes with nothing going wrong on the way.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test")]

use core::net::IpAddr;
use core::time::Duration;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use postern_ike::auth::identity::{Identity, IdentityPattern};
use postern_ike::config::{
    Child, Connection, LocalAuth, Mode, RemoteAuth, Selector, Start, Strategy, Unique,
};
use postern_ike::endpoint::{Host, Now, Target};
use postern_ike::message::TrafficSelector;
use postern_ike::negotiate::keyword;
use postern_ike::output::{ChildSa, Effect, Path};
use postern_ike::report::Report;
use postern_ike::settings::Settings;
use postern_ike::{Endpoint, Random, Secret};

/// A small generator, so that a run can be repeated.
struct Seeded(u64);

impl Random for Seeded {
    fn fill(&mut self, out: &mut [u8]) {
        for byte in out {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = self.0.to_be_bytes()[0];
        }
    }
}

struct TestHost {
    next: u32,
    address: IpAddr,
}

impl Host for TestHost {
    fn allocate_spi(&mut self, _: &mut dyn Random) -> u32 {
        self.next += 1;
        self.next
    }

    fn claim_spi(&mut self, _: u32) -> bool {
        true
    }

    fn release_spi(&mut self, _: u32) {}

    fn source_address(&mut self, _: IpAddr) -> Option<IpAddr> {
        Some(self.address)
    }
}

fn net(text: &str) -> Selector {
    let net: ipnet::IpNet = text.parse().unwrap();
    Selector::Fixed(TrafficSelector {
        start: net.network(),
        end: net.broadcast(),
        protocol: 0,
        ports: 0..=u16::MAX,
    })
}

/// One side, and what it did.
struct Side {
    endpoint: Endpoint,
    reports: Vec<String>,
    installed: Vec<ChildSa>,
    retired: usize,
}

fn connection(a: bool, ike: &str, esp: &str, secret: &[u8]) -> Connection {
    let (here, there) = if a { ("10.0.0.1", "10.0.0.2") } else { ("10.0.0.2", "10.0.0.1") };
    let (local, remote) = if a { ("10.1.0.0/24", "10.2.0.0/24") } else { ("10.2.0.0/24", "10.1.0.0/24") };
    Connection {
        name: "c".into(),
        fingerprint: [0; 32],
        local: vec![here.parse().unwrap()],
        remote_nets: Vec::new(),
        remote: Some(there.parse().unwrap()),
        remote_port: 500,
        proposals: vec![keyword::ike(ike).unwrap()],
        local_id: here.parse::<Identity>().unwrap(),
        remote_id: there.parse::<IdentityPattern>().unwrap(),
        local_auth: LocalAuth::Psk(Secret::new(secret)),
        remote_auth: RemoteAuth::Psk(Secret::new(secret)),
        children: vec![Child {
            name: "net".into(),
            proposals: vec![keyword::esp(esp).unwrap()],
            local_ts: vec![net(local)],
            remote_ts: vec![net(remote)],
            mode: Mode::Tunnel,
            start: Start::None,
            on_close: Start::None,
            on_dpd: Start::None,
            rekey: None,
            rekey_jitter: Duration::ZERO,
            life: None,
        }],
        pools: Vec::new(),
        dns: Vec::new(),
        request_address: (false, false),
        mobike: true,
        fragmentation: true,
        childless: false,
        force_encap: false,
        rekey: None,
        rekey_jitter: Duration::ZERO,
        over_time: Duration::ZERO,
        dpd: None,
        unique: Unique::Replace,
        reset: Strategy::Delete,
        v1: None,
    }
}

fn side(a: bool, ike: &str, esp: &str, secret: &[u8], now: Now) -> Side {
    let address = if a { "10.0.0.1" } else { "10.0.0.2" }.parse().unwrap();
    let host = TestHost { next: if a { 0x1000 } else { 0x2000 }, address };
    let mut endpoint = Endpoint::new(Settings::default(), Box::new(host), Box::new(Seeded(u64::from(a) + 7)));
    endpoint.configure(now, vec![Arc::new(connection(a, ike, esp, secret))], &[]);
    Side { endpoint, reports: Vec::new(), installed: Vec::new(), retired: 0 }
}

/// Carries everything to and fro until nothing is left.
fn run(now: Now, sides: &mut [Side; 2]) {
    let mut random = Seeded(99);
    loop {
        let mut idle = true;
        for index in 0..2 {
            while let Some(output) = sides[index].endpoint.poll_output() {
                idle = false;
                match output.effect {
                    Effect::Transmit { path, datagram } => {
                        let Path { local, remote, natt } = path;
                        let to = sides.iter().position(|_| true).map(|_| 1 - index).unwrap();
                        let path = Path { local: remote, remote: local, natt };
                        sides[to].endpoint.handle_datagram(now, path, &datagram);
                    }
                    Effect::Compute { id, job } => {
                        let done = job.run(&mut random);
                        sides[index].endpoint.computed(now, id, done);
                    }
                    Effect::Install(child) => {
                        let id = child.id;
                        sides[index].installed.push(*child);
                        sides[index].endpoint.installed(now, id, Ok(()));
                    }
                    Effect::Retire(_) => sides[index].retired += 1,
                    Effect::Report(Report::Failed { failure, .. }) => {
                        sides[index].reports.push(format!("failed: {failure}"));
                    }
                    Effect::Report(report) => sides[index].reports.push(format!("{report:?}")),
                    _ => {}
                }
            }
        }
        if idle {
            return;
        }
    }
}

fn now() -> Now {
    Now { monotonic: Instant::now(), wall: SystemTime::now() }
}

fn up(ike: &str, esp: &str) -> (Now, [Side; 2]) {
    let now = now();
    let mut sides = [side(true, ike, esp, b"secret", now), side(false, ike, esp, b"secret", now)];
    sides[0].endpoint.initiate(now, "c", None).unwrap();
    run(now, &mut sides);
    (now, sides)
}

fn assert_pair(a: &ChildSa, b: &ChildSa) {
    assert_eq!((a.spi_in, a.spi_out), (b.spi_out, b.spi_in));
    assert!(a.keys_in == b.keys_out && a.keys_out == b.keys_in, "keys differ");
    assert_eq!((&a.local_ts, &a.remote_ts), (&b.remote_ts, &b.local_ts));
    assert_eq!((a.encr, a.integ, a.esn), (b.encr, b.integ, b.esn));
}

/// IKE-1: a PSK handshake with each suite and group brings up an IKE SA and a CHILD_SA with the same keys on both sides.
#[test]
fn ike_1_a_handshake_with_each_suite() {
    for ike in [
        "aes128gcm16-prfsha256-x25519",
        "aes256gcm16-prfsha384-ecp384",
        "aes128-sha256-modp2048",
        "aes256-sha512-ecp256",
        "chacha20poly1305-prfsha512-x25519",
        "aes128gcm16-prfsha256-x25519-ke1_mlkem768",
    ] {
        for esp in ["aes128gcm16", "aes256-sha256", "chacha20poly1305-esn"] {
            let (_, sides) = up(ike, esp);
            assert_eq!(
                sides[0].installed.len(),
                1,
                "{ike} {esp}: {:?} {:?}",
                sides[0].reports,
                sides[1].reports
            );
            assert_pair(&sides[0].installed[0], &sides[1].installed[0]);
        }
    }
}

/// IKE-1: a child is rekeyed by either side, with and without a key exchange; the old one is retired on both.
#[test]
fn ike_1_child_rekey_by_either_side() {
    for esp in ["aes128gcm16", "aes128gcm16-x25519", "aes128gcm16-x25519-ke1_mlkem768-ke2_ecp256"] {
        for by in 0..2 {
            let (now, mut sides) = up("aes128gcm16-prfsha256-x25519", esp);
            let child = sides[by].installed[0].id;
            sides[by].endpoint.rekey(now, &Target::Child(child)).unwrap();
            run(now, &mut sides);
            assert_eq!(
                sides[0].installed.len(),
                2,
                "{esp} {by}: {:?} {:?}",
                sides[0].reports,
                sides[1].reports
            );
            assert_pair(&sides[0].installed[1], &sides[1].installed[1]);
            let later = Now { monotonic: now.monotonic + Duration::from_secs(6), ..now };
            for side in &mut sides {
                side.endpoint.handle_timeout(later);
            }
            run(later, &mut sides);
            assert_eq!((sides[0].retired, sides[1].retired), (1, 1));
        }
    }
}

/// IKE-1: the IKE SA is rekeyed by either side; its child goes over, and can be rekeyed in the new one.
#[test]
fn ike_1_ike_rekey_by_either_side() {
    for (by, ike) in [0, 1].into_iter().flat_map(|by| {
        ["aes128gcm16-prfsha256-x25519", "aes128gcm16-prfsha256-x25519-ke1_mlkem768"].map(|ike| (by, ike))
    }) {
        let (now, mut sides) = up(ike, "aes128gcm16");
        sides[by].endpoint.rekey(now, &Target::Connection("c".to_owned())).unwrap();
        run(now, &mut sides);
        for side in &sides {
            let sas: Vec<_> = side.endpoint.sas(now).collect();
            assert_eq!(sas.len(), 1, "{by}: {:?}", side.reports);
            assert_eq!(sas[0].children.len(), 1, "{:?}", side.reports);
            assert_eq!(side.retired, 0);
        }
        let child = sides[1 - by].installed[0].id;
        sides[1 - by].endpoint.rekey(now, &Target::Child(child)).unwrap();
        run(now, &mut sides);
        assert_pair(&sides[0].installed[1], &sides[1].installed[1]);
    }
}

/// IKE-1: a wrong secret fails on both sides, with a reason, and leaves nothing.
#[test]
fn ike_1_wrong_secret() {
    let now = now();
    let (ike, esp) = ("aes128gcm16-prfsha256-x25519", "aes128gcm16");
    let mut sides = [side(true, ike, esp, b"secret", now), side(false, ike, esp, b"other", now)];
    sides[0].endpoint.initiate(now, "c", None).unwrap();
    run(now, &mut sides);
    assert!(
        sides[1].reports.iter().any(|text| text.contains("same shared secret")),
        "{:?}",
        sides[1].reports
    );
    assert!(
        sides[0].reports.iter().any(|text| text.contains("AUTHENTICATION_FAILED")),
        "{:?}",
        sides[0].reports
    );
    assert!(sides.iter().all(|side| side.endpoint.is_empty() && side.installed.is_empty()));
}

/// IKE-1: a Delete of either side ends both.
#[test]
fn ike_1_delete_by_either_side() {
    for by in 0..2 {
        let (now, mut sides) = up("aes128gcm16-prfsha256-x25519", "aes128gcm16");
        sides[by].endpoint.terminate(now, &Target::Connection("c".to_owned())).unwrap();
        run(now, &mut sides);
        assert!(sides.iter().all(|side| side.endpoint.is_empty() && side.retired == 1), "{by}");
    }
}
