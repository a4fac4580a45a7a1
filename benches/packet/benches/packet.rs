//! What a packet costs: the whole walk on memory ports, receive to transmit, from one SA to a million.
//!
//! `cargo bench -p postern-benches-packet [-- --quick] [--only encap] [--sas 1,1000] [--json FILE] [--suite aes128gcm16] [--size 64]
//! [--turns N]`.
//!
//! Nothing is skipped; ESN and a replay window of 1,024 are on. Each turn gets 64 packets that were made just before, so
//! that packet buffers are as warm as a network card leaves them, while tables are as cold as the number of SAs makes
//! them. Every SA has a peer and an inner host of its own; packets choose SAs uniformly or by Zipf's law (exponent 1).
//! Sizes are those of the inner packet; IMIX is 7 × 64, 4 × 576, 1 × 1400.
//!
//! Each turn is timed by itself, after every SA had a packet, and the median counts: what other programs on the
//! machine do to single turns is not in it.
//! *Net* is without the source: the memory port's copy into a frame and the frame's way back, measured alone.
//!
//! `--turns N` does just N turns of everything without a clock, to be counted by a tool (`benches/instructions`).
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::panic,
    reason = "a bench that cannot start has to stop, and its counts are small"
)]

use std::cell::RefCell;
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use postern_benches_packet::parts;
use postern_contract::Generation;
use postern_contract::relay::{Partition, RelayEntry, RelayId, SpiPair};
use postern_contract::request::Operation;
use postern_contract::sa::{Direction, Encryption, Integrity, Policy, PolicyId, SaId, Selector, Suite};
use postern_contract::secret::Secret;
use postern_contract::settings::Backend;
use postern_datapath::crypto::{Engine, EspKey, SequenceCounter};
use postern_datapath::frame::{Arena, BATCH, Pool};
use postern_datapath::port::memory::{MemoryHandle, MemoryPort};
use postern_datapath::port::{LinkKind, Port};
use postern_datapath::testbed::{INSIDE_MAC, Layout, OUTSIDE_MAC, Testbed};
use postern_wire::ids::Spi;

/// The gateway's address outside; clients are in 100.64.0.0/10, their inner hosts in 11.0.0.0/8, the server inside.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const CLIENTS: u32 = 0x6440_0000;
const HOSTS: u32 = 0x0b00_0000;
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const FIRST_SPI: u32 = 0x0010_0000;
const IMIX: [usize; 12] = [64, 576, 64, 64, 576, 64, 1400, 64, 576, 64, 576, 64];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Encap,
    Decap,
    Relay,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Choice {
    Uniform,
    Zipf,
}

#[derive(Clone, Copy)]
enum Size {
    Bytes(usize),
    Imix,
}

impl Size {
    fn of(self, number: usize) -> usize {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Imix => IMIX[number % IMIX.len()],
        }
    }

    fn name(self) -> String {
        match self {
            Self::Bytes(bytes) => bytes.to_string(),
            Self::Imix => "imix".to_owned(),
        }
    }

    fn mean(self) -> f64 {
        match self {
            Self::Bytes(bytes) => bytes as f64,
            Self::Imix => IMIX.iter().sum::<usize>() as f64 / IMIX.len() as f64,
        }
    }
}

const SUITES: [&str; 4] = ["aes128gcm16", "aes256gcm16", "chacha20poly1305", "aes128-sha256"];

/// `seed` tells keys apart: outbound SAs must not share any.
fn suite(name: &str, seed: u32) -> Suite {
    let key = |len: usize| {
        let seed = seed.to_be_bytes();
        Secret::new((0..len).map(|n| n as u8 ^ seed[n % 4]).collect::<Vec<u8>>())
    };
    match name {
        "aes128gcm16" => parts::aead(Encryption::AesGcm16, key(20)),
        "aes256gcm16" => parts::aead(Encryption::AesGcm16, key(36)),
        "chacha20poly1305" => parts::aead(Encryption::ChaCha20Poly1305, key(36)),
        _ => Suite {
            encryption: Encryption::AesCbc,
            encryption_key: key(16),
            integrity: Integrity::HmacSha2_256_128,
            integrity_key: key(32),
        },
    }
}

fn host(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(HOSTS + number)
}

fn client(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(CLIENTS + number)
}

fn selector(number: u32) -> Selector {
    let local: ipnet::IpNet = "10.1.0.0/24".parse().expect("a network");
    parts::selector(local.into(), parts::only(host(number)))
}

fn sa(number: u32, direction: Direction, suite: Suite) -> Operation {
    let id = SaId(u64::from(number) + 1);
    let ends = (GATEWAY.into(), client(number).into());
    let sa = parts::sa(id, direction, Spi(FIRST_SPI + number), ends, suite, selector(number));
    Operation::InstallSa(Box::new(sa))
}

fn policy(number: u32) -> Operation {
    let id = u64::from(number) + 1;
    let policy = parts::policy(PolicyId(id), selector(number), SaId(id));
    Operation::InstallPolicy(Policy { priority: 1000, ..policy })
}

fn relay_entry(number: u32) -> Operation {
    let partition = |peer: Ipv4Addr, to_relay, from_relay| Partition {
        relay: GATEWAY.into(),
        peer: peer.into(),
        encap: None,
        esp: Some(SpiPair { to_relay: Spi(to_relay), from_relay: Spi(from_relay) }),
        ah: None,
    };
    Operation::InstallRelay(RelayEntry {
        id: RelayId(u64::from(number) + 1),
        generation: Generation(1),
        client: partition(client(number), FIRST_SPI + number, 0x4000_0000 + number),
        gateway: partition(Ipv4Addr::new(203, 0, 113, 1), 0x2000_0000 + number, 0x6000_0000 + number),
    })
}

/// Which SA each packet belongs to, without end.
struct Indices {
    sas: u32,
    /// Those that had none yet begin with this one.
    first: u32,
    list: Vec<u32>,
    next: usize,
}

impl Indices {
    fn new(sas: u32, choice: Choice) -> Self {
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let harmonic = f64::from(sas).ln();
        let list = (0..if sas == 1 { 1 } else { 1 << 20 }).map(|_| {
            let index = match choice {
                Choice::Uniform => random() * f64::from(sas),
                // Ranks of Zipf's law with exponent 1, by the continuous distribution's inverse.
                Choice::Zipf => (random() * harmonic).exp() - 1.0,
            };
            scattered(index as u32, sas)
        });
        Self { sas, first: 0, list: list.collect(), next: 0 }
    }

    /// Each SA once, then by choice.
    fn next(&mut self) -> u32 {
        if self.first < self.sas {
            self.first += 1;
            return scattered(self.first - 1, self.sas);
        }
        self.next = (self.next + 1) % self.list.len();
        self.list[self.next]
    }
}

/// Neighbours in rank are not neighbours in memory.
fn scattered(rank: u32, sas: u32) -> u32 {
    // A prime, and no divisor of any number of SAs: no two ranks are one SA.
    ((u64::from(rank) * 2_654_435_761) % u64::from(sas)) as u32
}

/// Writes frames as they come from the wire.
struct Maker {
    work: Work,
    indices: Indices,
    size: Size,
    engine: Engine,
    key: EspKey,
    /// By SA.
    sequences: Vec<SequenceCounter>,
    made: usize,
    frame: Vec<u8>,
}

impl Maker {
    fn new(
        work: Work,
        suite_name: &str,
        indices: Indices,
        size: Size,
        sequences: Vec<SequenceCounter>,
    ) -> Self {
        let key = EspKey::new(&suite(suite_name, 0)).expect("a key");
        let engine = Engine::select(Backend::Auto, 16).expect("an engine");
        Self { work, indices, size, engine, key, sequences, made: 0, frame: Vec::new() }
    }

    fn fill(&mut self, port: &MemoryHandle) {
        for _ in 0..BATCH {
            self.make();
            port.push(&self.frame);
        }
    }

    fn make(&mut self) {
        let number = self.indices.next();
        let size = self.size.of(self.made);
        self.made += 1;
        let Self { frame, engine, key, sequences, .. } = self;
        let sequence = &mut sequences[number as usize];
        if self.work == Work::Encap {
            parts::cleartext(frame, INSIDE_MAC, (SERVER, host(number)), size);
            return;
        }
        let (hosts, ends) = ((host(number), SERVER), (client(number), GATEWAY));
        parts::in_esp(frame, OUTSIDE_MAC, hosts, size, ends, Spi(FIRST_SPI + number), key.layout());
        parts::seal(engine, key, sequence, &mut frame[parts::ESP_AT..]);
    }
}

/// A gateway with so many SAs (encap: outbound ones with their policies, decap: inbound ones) or relay entries.
fn bed(work: Work, suite_name: &str, sas: u32) -> (tempfile::TempDir, Testbed) {
    let state = tempfile::tempdir().expect("a directory");
    let layout = Layout { sa_slots: sas.next_power_of_two().max(4096), ..Layout::default() };
    let mut bed = Testbed::new(&layout, state.path()).expect("a testbed");
    let numbers: Vec<u32> = (0..sas).collect();
    for chunk in numbers.chunks(1024) {
        let operations = chunk.iter().flat_map(|number| match work {
            Work::Encap => {
                vec![sa(*number, Direction::Outbound, suite(suite_name, *number)), policy(*number)]
            }
            Work::Decap => vec![sa(*number, Direction::Inbound, suite(suite_name, 0))],
            Work::Relay => vec![relay_entry(*number)],
        });
        for done in bed.apply(operations.collect()) {
            done.expect("installed");
        }
        bed.settle();
    }
    bed.outside[0].discard(true);
    bed.inside[0].discard(true);
    (state, bed)
}

/// What the turn's packets cost: median and least, in nanoseconds a packet.
#[derive(Clone, Copy)]
struct Cost {
    median: f64,
    least: f64,
}

/// Times so many turns, each by itself, after a warm-up of so many.
fn time(warm_up: usize, turns: usize, mut prepare: impl FnMut(), mut turn: impl FnMut()) -> Cost {
    let mut spent = Vec::with_capacity(turns);
    for number in 0..=turns + warm_up {
        prepare();
        let start = Instant::now();
        turn();
        let took = start.elapsed();
        if number > warm_up {
            spent.push(took);
        }
    }
    spent.sort_unstable();
    let clock = clock_cost();
    let each = |took: Duration| took.saturating_sub(clock).as_nanos() as f64 / BATCH as f64;
    Cost { median: each(spent[spent.len() / 2]), least: each(spent[0]) }
}

/// What reading the clock adds to a turn.
fn clock_cost() -> Duration {
    let mut costs: Vec<Duration> = (0..101).map(|_| Instant::now().elapsed()).collect();
    costs.sort_unstable();
    costs[50]
}

/// The memory port's receive and transmit alone.
fn source_cost(turns: usize, maker: &mut Maker) -> Cost {
    let (arena, frames) = Arena::new(1024, false).expect("an arena");
    let mut pool = Pool::split(frames, 1).pop().expect("a pool");
    let (mut port, handle) = MemoryPort::new(LinkKind::Ethernet);
    handle.discard(true);
    let mut frames = ArrayVec::new();
    time(
        turns / 8,
        turns,
        || maker.fill(&handle),
        || {
            port.receive(&arena, &mut pool, &mut frames);
            black_box(&mut frames);
            port.transmit(&arena, &mut pool, &mut frames);
        },
    )
}

struct Arguments {
    quick: bool,
    only: String,
    sas: Vec<u32>,
    json: Option<String>,
    turns: Option<usize>,
    size: String,
    suite: String,
}

impl Arguments {
    fn parse() -> Self {
        let all: Vec<String> = std::env::args().skip(1).collect();
        // `cargo test` does not say `--bench`, and wants to see that it works.
        let bench = all.iter().any(|argument| argument == "--bench");
        let value = |name: &str| all.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].clone());
        let turns = value("--turns").map(|turns| turns.parse().expect("--turns N"));
        let quick = all.iter().any(|argument| argument == "--quick");
        let sas = value("--sas").unwrap_or_else(|| {
            if !bench || turns.is_some() {
                "1"
            } else if quick {
                "1,100000"
            } else {
                "1,1000,100000,1000000"
            }
            .to_owned()
        });
        Self {
            quick,
            only: value("--only").unwrap_or_default(),
            sas: sas.split(',').map(|count| count.parse().expect("--sas 1,1000")).collect(),
            json: value("--json"),
            size: value("--size").unwrap_or_default(),
            suite: value("--suite").unwrap_or_default(),
            turns: if bench { turns } else { Some(2) },
        }
    }
}

fn main() {
    let arguments = Arguments::parse();
    let works = [("encap", Work::Encap), ("decap", Work::Decap), ("relay", Work::Relay)];
    let sizes = [Size::Bytes(64), Size::Bytes(512), Size::Bytes(1400), Size::Imix];
    let turns = arguments.turns.unwrap_or(if arguments.quick { 2000 } else { 8000 });
    let mut rows = Vec::new();
    println!("work   suite                SAs choice   size     net   gross   least  source    Mpps   Gb/s");
    for (work_name, work) in
        works.into_iter().filter(|(name, _)| arguments.only.is_empty() || *name == arguments.only)
    {
        let suites = if work == Work::Relay || arguments.quick { &SUITES[..1] } else { &SUITES[..] };
        for suite_name in suites.iter().filter(|name| arguments.suite.is_empty() || **name == arguments.suite)
        {
            // Other suites differ in the cipher alone.
            for sas in arguments.sas.iter().copied().filter(|sas| *sas <= 1000 || *suite_name == SUITES[0]) {
                let (_state, mut bed) = bed(work, suite_name, sas);
                let choices = if sas > 1 { &[Choice::Uniform, Choice::Zipf][..] } else { &[Choice::Uniform] };
                let mut sequences: Vec<_> =
                    (0..sas).map(|_| SequenceCounter::new(1, u64::MAX, true)).collect();
                for choice in choices {
                    for size in sizes
                        .into_iter()
                        .filter(|size| arguments.size.is_empty() || size.name() == arguments.size)
                    {
                        let indices = Indices::new(sas, *choice);
                        let mut maker = Maker::new(work, suite_name, indices, size, sequences);
                        let choice_name = if *choice == Choice::Uniform { "uniform" } else { "zipf" };
                        let wire =
                            if work == Work::Encap { bed.inside[0].clone() } else { bed.outside[0].clone() };
                        if arguments.turns.is_some() {
                            for number in 1..=turns {
                                maker.fill(&wire);
                                turn(&bed);
                                if number % 256 == 0 {
                                    bed.publisher.collect();
                                }
                            }
                        } else {
                            let cell = RefCell::new(&mut bed);
                            let prepare = || {
                                maker.fill(&wire);
                                // The main thread's part, sequence numbers to grant, is not the packets' cost.
                                if maker.made.is_multiple_of(256 * BATCH) {
                                    cell.borrow_mut().publisher.collect();
                                }
                            };
                            // An SA's first packet is looked up in the policies and expands its key, which is
                            // not what the others cost.
                            let warm_up = (sas as usize).div_ceil(BATCH) + turns / 8;
                            let cost = time(warm_up, turns, prepare, || turn(&cell.borrow()));
                            let sent = maker.made;
                            let source = source_cost(turns, &mut maker);
                            assert_eq!(bed.all_drops(), 0, "{sent} packets");
                            let (gross, net) = (cost.median, cost.median - source.median);
                            let (mpps, gbps) = (1e3 / gross, size.mean() * 8.0 / gross);
                            println!(
                                "{work_name:6} {suite_name:16} {sas:>7} {choice_name:8} {:>4} {net:>7.1} {gross:>7.1} {:>7.1} {:>7.1} {mpps:>7.2} {gbps:>6.1}",
                                size.name(),
                                cost.least,
                                source.median,
                            );
                            rows.push(format!(
                                "{{\"work\":\"{work_name}\",\"suite\":\"{suite_name}\",\"sas\":{sas},\"choice\":\"{choice_name}\",\"size\":\"{}\",\"net_ns\":{net:.1},\"gross_ns\":{gross:.1},\"least_ns\":{:.1},\"source_ns\":{:.1},\"mpps\":{mpps:.3},\"gbps\":{gbps:.2}}}",
                                size.name(), cost.least, source.median,
                            ));
                        }
                        assert_eq!(bed.all_drops(), 0);
                        bed.publisher.collect();
                        sequences = maker.sequences;
                    }
                }
            }
        }
    }
    if let Some(path) = arguments.json {
        let text = format!("[\n{}\n]\n", rows.join(",\n"));
        if let Err(error) = std::fs::write(&path, text) {
            panic!("{path}: {error}");
        }
    }
}

fn turn(bed: &Testbed) {
    let now = *bed.now.borrow();
    for worker in bed.workers.borrow_mut().iter_mut() {
        black_box(worker.turn(now));
    }
}
