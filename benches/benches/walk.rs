//! The walk on memory ports: encapsulation, decapsulation, relay, lookups, replay window, whole turns.
//!
//! Everything that a packet goes through is there, from the port's receive (which copies the packet into a frame) to its
//! transmit; nothing is skipped. ESN and a replay window of 1,024 are on. Per packet, by criterion's throughput.
//!
//! `cargo bench -p postern-benches --bench walk`. Sizes are those of the inner packet (relay: of the packet inside ESP).
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a bench that cannot start has to stop, and its counts are small"
)]

use std::hint::black_box;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use postern_contract::relay::{Partition, RelayEntry, RelayId, SpiPair};
use postern_contract::request::Operation;
use postern_contract::sa::{
    Action, AddressRange, Direction, Encryption, FanOut, Integrity, IpsecProtocol, KeyOrigin, Lifetime, Mode,
    PathPolicy, Policy, PolicyId, SaConfig, SaId, Selector, Suite,
};
use postern_contract::secret::Secret;
use postern_contract::{Generation, Translation};
use postern_datapath::sad::lookup::{Handle, SpiTable};
use postern_datapath::sad::replay::ReplayWindow;
use postern_datapath::spd::Spd;
use postern_datapath::testbed::{INSIDE_MAC, Layout, OUTSIDE_MAC, Testbed, frame};
use postern_wire::flow::Flow;
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{ip4, udp};

const BATCH: u64 = 64;
const SIZES: [usize; 3] = [64, 576, 1424];
const HERE: &str = "192.0.2.1";
const THERE: &str = "198.51.100.1";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn range(text: &str) -> AddressRange {
    AddressRange::from(text.parse::<ipnet::IpNet>().expect("a network"))
}

fn selector(local: &str, remote: &str) -> Selector {
    Selector {
        local: range(local),
        remote: range(remote),
        protocol: None,
        local_ports: 0..=u16::MAX,
        remote_ports: 0..=u16::MAX,
    }
}

#[derive(Clone, Copy)]
enum Cipher {
    Gcm128,
    Gcm256,
    ChaCha,
    CbcSha256,
}

impl Cipher {
    const ALL: [(&str, Self); 4] = [
        ("aes128gcm16", Self::Gcm128),
        ("aes256gcm16", Self::Gcm256),
        ("chacha20poly1305", Self::ChaCha),
        ("aes128-sha256", Self::CbcSha256),
    ];

    fn suite(self, seed: u8) -> Suite {
        let key = |len: usize| Secret::new(vec![seed; len]);
        let (encryption, encryption_key, integrity, integrity_key) = match self {
            Self::Gcm128 => (Encryption::AesGcm16, key(20), Integrity::None, Secret::empty()),
            Self::Gcm256 => (Encryption::AesGcm16, key(36), Integrity::None, Secret::empty()),
            Self::ChaCha => (Encryption::ChaCha20Poly1305, key(36), Integrity::None, Secret::empty()),
            Self::CbcSha256 => (Encryption::AesCbc, key(16), Integrity::HmacSha2_256_128, key(32)),
        };
        Suite { encryption, encryption_key, integrity, integrity_key }
    }
}

fn sa(
    id: u64,
    direction: Direction,
    local: &str,
    remote: &str,
    nets: (&str, &str),
    suite: Suite,
) -> Operation {
    Operation::InstallSa(Box::new(SaConfig {
        id: SaId(id),
        generation: Generation(1),
        direction,
        protocol: IpsecProtocol::Esp,
        mode: Mode::Tunnel,
        spi: Translation::same(Spi(0x1001)),
        local: Translation::same(ip(local)),
        remote: Translation::same(ip(remote)),
        encap: None,
        suite,
        esn: true,
        replay_window: if direction == Direction::Inbound { 1024 } else { 0 },
        sequence: u64::from(direction == Direction::Outbound),
        selectors: vec![selector(nets.0, nets.1)],
        lifetime: Lifetime::default(),
        path: PathPolicy::default(),
        follow_peer: direction == Direction::Inbound,
        pair: None,
        bundle: None,
        origin: KeyOrigin::Negotiated,
        worker: None,
        fan_out: FanOut::ByLoad,
    }))
}

fn policy(sa: u64, nets: (&str, &str)) -> Operation {
    Operation::InstallPolicy(Policy {
        id: PolicyId(1),
        generation: Generation(1),
        priority: 1000,
        selectors: vec![selector(nets.0, nets.1)],
        action: Action::Protect(Some(SaId(sa))),
    })
}

/// A UDP datagram over IPv4 of `size` bytes in all.
fn packet(source: &str, destination: &str, size: usize) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (ip(source), ip(destination)) else { unreachable!() };
    let mut packet = vec![0x5a; size];
    let length = u16::try_from(size - ip4::MIN_LEN).expect("a packet");
    let header = udp::Header { source_port: 1000, destination_port: 2000, length, checksum: 0 };
    header.emit(&mut packet[ip4::MIN_LEN..]).expect("room");
    let header = ip4::Header {
        source,
        destination,
        protocol: Protocol::UDP,
        ttl: 64,
        tos: 0,
        id: 1,
        dont_fragment: true,
    };
    header.emit(&mut packet, size - ip4::MIN_LEN).expect("room");
    packet
}

const A_NETS: (&str, &str) = ("10.1.0.0/24", "10.2.0.0/16");
const B_NETS: (&str, &str) = ("10.2.0.0/16", "10.1.0.0/24");

struct Beds {
    _state: tempfile::TempDir,
    a: Testbed,
    b: Testbed,
}

fn layout_b() -> Layout {
    Layout {
        outside: vec![("198.51.100.1/24".parse().expect("net"), ip("198.51.100.254"))],
        inside: vec!["10.2.0.1/16".parse().expect("net")],
        inside_hosts: (0..64).map(|n| ip(&format!("10.2.0.{}", 2 + n))).collect(),
        ..Layout::default()
    }
}

fn beds(cipher: Cipher) -> Beds {
    let state = tempfile::tempdir().expect("a directory");
    let mut a = Testbed::new(&Layout::default(), &state.path().join("a")).expect("a testbed");
    let mut b = Testbed::new(&layout_b(), &state.path().join("b")).expect("a testbed");
    let out = sa(1, Direction::Outbound, HERE, THERE, A_NETS, cipher.suite(7));
    for done in a.apply(vec![out, policy(1, A_NETS)]) {
        done.expect("installed");
    }
    install_inbound(&mut b, cipher);
    Beds { _state: state, a, b }
}

fn install_inbound(b: &mut Testbed, cipher: Cipher) {
    let inbound = sa(1, Direction::Inbound, THERE, HERE, B_NETS, cipher.suite(7));
    for done in b.apply(vec![Operation::RemoveSa(SaId(1)), inbound]) {
        done.expect("installed");
    }
}

/// Cleartext to 64 hosts.
fn cleartexts(size: usize) -> Vec<Vec<u8>> {
    (0..64).map(|n| packet("10.1.0.2", &format!("10.2.0.{}", 2 + n), size)).collect()
}

fn turn(bed: &Testbed) {
    let now = *bed.now.borrow();
    for worker in bed.workers.borrow_mut().iter_mut() {
        black_box(worker.turn(now));
    }
}

/// Time of so many packets that the port repeats by itself. The main thread's work (reservations) is not counted.
fn repeated(bed: &mut Testbed, packets: u64) -> Duration {
    let mut spent = Duration::ZERO;
    let turns = packets.div_ceil(BATCH);
    for chunk in (0..turns).step_by(1024) {
        let start = Instant::now();
        for _ in chunk..(chunk + 1024).min(turns) {
            turn(bed);
        }
        spent += start.elapsed();
        bed.publisher.collect();
    }
    spent.mul_f64(packets as f64 / (turns * BATCH) as f64)
}

fn encap(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encap");
    group.throughput(Throughput::Elements(1));
    for (name, cipher) in Cipher::ALL {
        for size in SIZES {
            let mut beds = beds(cipher);
            beds.a.inside[0]
                .repeat(cleartexts(size).iter().map(|packet| frame(INSIDE_MAC, packet)).collect());
            beds.a.outside[0].discard(true);
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter_custom(|packets| repeated(&mut beds.a, packets));
            });
            assert_eq!(beds.a.all_drops(), 0);
        }
    }
}

fn decap(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decap");
    group.throughput(Throughput::Elements(1));
    for (name, cipher) in Cipher::ALL {
        for size in SIZES {
            let mut beds = beds(cipher);
            let clear = cleartexts(size);
            let sealed: Vec<Vec<u8>> = (0..16_384)
                .flat_map(|n: usize| beds.a.from_inside(&clear[n % clear.len()]).0)
                .map(|packet| frame(OUTSIDE_MAC, &packet))
                .collect();
            assert_eq!(sealed.len(), 16_384);
            beds.b.inside[0].discard(true);
            let mut next = 0;
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter_custom(|packets| {
                    let mut spent = Duration::ZERO;
                    let turns = packets.div_ceil(BATCH);
                    for _ in 0..turns {
                        if next == sealed.len() {
                            // All numbers were used: the same SA anew, whose window accepts them again.
                            install_inbound(&mut beds.b, cipher);
                            next = 0;
                        }
                        for packet in &sealed[next..next + 64] {
                            beds.b.outside[0].push(packet);
                        }
                        next += 64;
                        let start = Instant::now();
                        turn(&beds.b);
                        spent += start.elapsed();
                    }
                    spent.mul_f64(packets as f64 / (turns * BATCH) as f64)
                });
            });
            assert_eq!(beds.b.all_drops(), 0);
        }
    }
}

fn relay(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("relay");
    group.throughput(Throughput::Elements(1));
    for size in SIZES {
        let mut beds = beds(Cipher::Gcm128);
        let sealed: Vec<Vec<u8>> =
            cleartexts(size).iter().flat_map(|packet| beds.a.from_inside(packet).0).collect();
        let state = tempfile::tempdir().expect("a directory");
        let mut relay = Testbed::new(&layout_b(), state.path()).expect("a testbed");
        let pair =
            |to_relay: u32, from_relay: u32| SpiPair { to_relay: Spi(to_relay), from_relay: Spi(from_relay) };
        let partition = |relay: &str, peer: &str, esp| Partition {
            relay: ip(relay),
            peer: ip(peer),
            encap: None,
            esp: Some(esp),
            ah: None,
        };
        let entry = RelayEntry {
            id: RelayId(1),
            generation: Generation(1),
            client: partition(THERE, HERE, pair(0x1001, 0x2001)),
            gateway: partition(THERE, "203.0.113.1", pair(0x3001, 0x4001)),
        };
        for done in relay.apply(vec![Operation::InstallRelay(entry)]) {
            done.expect("installed");
        }
        relay.outside[0].repeat(sealed.iter().map(|packet| frame(OUTSIDE_MAC, packet)).collect());
        relay.outside[0].discard(true);
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_custom(|packets| repeated(&mut relay, packets));
        });
        assert_eq!(relay.all_drops(), 0);
    }
}

/// A cheap sequence of indices that no prefetcher follows.
struct Walk(u64);

impl Walk {
    fn next(&mut self, below: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((self.0 >> 33) % u64::from(below)).unwrap_or_default()
    }
}

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    group.throughput(Throughput::Elements(1));
    for count in [1_000u32, 100_000, 1_000_000] {
        let mut table = SpiTable::new(count.next_power_of_two());
        let mut spd = Spd::new();
        let clear = packet("10.1.0.2", "10.2.0.2", 64);
        let mut flow = Flow::parse(&clear).expect("a packet");
        for n in 0..count {
            let handle = Handle::new(0, n);
            table.insert(IpsecProtocol::Esp, Spi(0x1000 + n), handle.expect("an index"));
            let remote = IpAddr::from((0x0b00_0000 + n).to_be_bytes());
            let remote = AddressRange { start: remote, end: remote };
            let selectors = vec![Selector { remote, ..selector("10.1.0.0/24", "0.0.0.0/0") }];
            let policy = Policy {
                id: PolicyId(u64::from(n)),
                generation: Generation(1),
                priority: 1000,
                selectors,
                action: Action::Protect(None),
            };
            spd.insert(&policy, handle);
        }
        let mut walk = Walk(1);
        group.bench_function(BenchmarkId::new("spi", count), |bencher| {
            bencher.iter(|| black_box(table.get(IpsecProtocol::Esp, Spi(0x1000 + walk.next(count)))));
        });
        group.bench_function(BenchmarkId::new("spd", count), |bencher| {
            bencher.iter(|| {
                flow.destination = IpAddr::from((0x0b00_0000 + walk.next(count)).to_be_bytes());
                black_box(spd.lookup(&flow));
            });
        });
    }
}

fn replay(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("replay");
    group.throughput(Throughput::Elements(1));
    for size in [64u16, 1024, 4096] {
        let mut window = ReplayWindow::new(size, 0, true);
        let mut next = 0u64;
        group.bench_function(BenchmarkId::new("in order", size), |bencher| {
            bencher.iter(|| {
                next += 1;
                let sequence = window.recover(u32::try_from(next & 0xffff_ffff).unwrap_or_default());
                black_box((window.precheck(sequence), window.accept(sequence)))
            });
        });
        let mut window = ReplayWindow::new(size, 0, true);
        let mut next = 0u64;
        group.bench_function(BenchmarkId::new("swapped", size), |bencher| {
            bencher.iter(|| {
                // 2, 1, 4, 3, …
                next += 1;
                let number = if next % 2 == 1 { next + 1 } else { next - 1 };
                let sequence = window.recover(u32::try_from(number & 0xffff_ffff).unwrap_or_default());
                black_box((window.precheck(sequence), window.accept(sequence)))
            });
        });
    }
}

fn batch_turn(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("turn");
    for (size, count) in SIZES.iter().flat_map(|size| [0usize, 1, 16, 64].map(|count| (*size, count))) {
        if count == 0 && size != SIZES[0] {
            continue;
        }
        let mut beds = beds(Cipher::Gcm128);
        let frames: Vec<Vec<u8>> =
            cleartexts(size).iter().take(count).map(|packet| frame(INSIDE_MAC, packet)).collect();
        beds.a.outside[0].discard(true);
        group.throughput(Throughput::Elements(count.max(1) as u64));
        group.bench_function(BenchmarkId::new(format!("{size} bytes"), count), |bencher| {
            bencher.iter_custom(|turns| {
                let mut spent = Duration::ZERO;
                for number in 0..turns {
                    for packet in &frames {
                        beds.a.inside[0].push(packet);
                    }
                    let start = Instant::now();
                    turn(&beds.a);
                    spent += start.elapsed();
                    if number % 1024 == 0 {
                        beds.a.publisher.collect();
                    }
                }
                spent
            });
        });
        assert_eq!(beds.a.all_drops(), 0);
    }
}

criterion_group!(walk, encap, decap, relay, lookup, replay, batch_turn);
criterion_main!(walk);
