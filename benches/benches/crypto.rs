//! ESP packets sealed and opened through the batch seam: each suite at 64, 576 and 1424 bytes of plaintext.
//!
//! `cargo bench -p postern-benches --bench crypto`. One element is one packet. A batch has 32 packets: of one SA
//! (`run`), or each of another SA (`mixed`), where no key is made ready for more than one packet, or each of another of so
//! many SAs that no key is found expanded (`cold`). `black_box` keeps the whole packets alive, ciphertext and ICV: a compiler that may drop the ICV drops the work of computing it.
#![expect(clippy::expect_used, reason = "a bench that cannot start has to stop")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use postern_contract::sa::{Encryption, Integrity, Suite};
use postern_contract::secret::Secret;
use postern_contract::settings::Backend;
use postern_datapath::crypto::{
    ESP_HEADER, Engine, EspKey, OpenOp, Outcome, SealOp, SealOutcome, SequenceCounter,
};

const BATCH: usize = 32;

/// `BATCH` as criterion counts.
const PACKETS: u64 = 32;

/// SAs of which most have no line in any cache of the processor.
const COLD: u32 = 200_000;

const SIZES: [usize; 3] = [64, 576, 1424];

/// A suite and the lengths of its keys, the first with its salt.
struct Measured {
    name: &'static str,
    encryption: Encryption,
    key_len: usize,
    integrity: Integrity,
    integrity_key_len: usize,
}

impl Measured {
    const fn new(
        name: &'static str,
        encryption: Encryption,
        key_len: usize,
        integrity: Integrity,
        integrity_key_len: usize,
    ) -> Self {
        Self { name, encryption, key_len, integrity, integrity_key_len }
    }

    fn material(&self, sa: u32) -> Suite {
        let key = |len| sa.to_le_bytes().into_iter().cycle().take(len).collect::<Vec<u8>>();
        Suite {
            encryption: self.encryption,
            encryption_key: Secret::new(key(self.key_len)),
            integrity: self.integrity,
            integrity_key: Secret::new(key(self.integrity_key_len)),
        }
    }
}

#[rustfmt::skip]
const SUITES: [Measured; 11] = [
    Measured::new("aes128-gcm", Encryption::AesGcm16, 20, Integrity::None, 0),
    Measured::new("aes192-gcm", Encryption::AesGcm16, 28, Integrity::None, 0),
    Measured::new("aes256-gcm", Encryption::AesGcm16, 36, Integrity::None, 0),
    Measured::new("chacha20-poly1305", Encryption::ChaCha20Poly1305, 36, Integrity::None, 0),
    Measured::new("aes128-gmac", Encryption::NullAuthAesGmac, 20, Integrity::None, 0),
    Measured::new("aes128-cbc+sha1-96", Encryption::AesCbc, 16, Integrity::HmacSha1_96, 20),
    Measured::new("aes128-cbc+sha256-128", Encryption::AesCbc, 16, Integrity::HmacSha2_256_128, 32),
    Measured::new("aes256-cbc+sha384-192", Encryption::AesCbc, 32, Integrity::HmacSha2_384_192, 48),
    Measured::new("aes256-cbc+sha512-256", Encryption::AesCbc, 32, Integrity::HmacSha2_512_256, 64),
    Measured::new("null+sha1-96", Encryption::Null, 0, Integrity::HmacSha1_96, 20),
    Measured::new("null+sha256-128", Encryption::Null, 0, Integrity::HmacSha2_256_128, 32),
];

/// Keys of one suite, the packets of a batch, and the numbers of the next one.
struct Bench {
    keys: Vec<EspKey>,
    /// The key of the next batch's first packet.
    next: usize,
    packets: Vec<Vec<u8>>,
    counter: SequenceCounter,
}

impl Bench {
    fn new(suite: &Measured, size: usize, sas: u32) -> Self {
        let keys: Vec<EspKey> =
            (0..sas).map(|sa| EspKey::new(&suite.material(sa)).expect("a valid suite")).collect();
        let layout = keys.first().expect("a key").layout();
        let len = ESP_HEADER + usize::from(layout.iv_len) + size + usize::from(layout.icv_len);
        Self {
            keys,
            next: 0,
            packets: vec![vec![0x5a; len]; BATCH],
            counter: SequenceCounter::new(1, u64::MAX, true),
        }
    }

    fn seal(&mut self, engine: &mut Engine) {
        let mut ops: ArrayVec<SealOp<'_>, BATCH> = ArrayVec::new();
        let keys = self.keys.iter().skip(self.next).chain(&self.keys).cycle();
        for (packet, key) in self.packets.iter_mut().zip(keys) {
            let sequence = self.counter.reserve().expect("a number");
            ops.push(SealOp { key: key.into(), sequence, esn: true, packet });
        }
        let outcomes = engine.seal(ops);
        assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "not sealed");
        self.next = (self.next + BATCH) % self.keys.len();
        black_box(&mut self.packets);
    }

    /// Opens what `seal` sealed last.
    fn open(&mut self, engine: &mut Engine) {
        let first = self.counter.last() + 1 - PACKETS;
        let mut ops: ArrayVec<OpenOp<'_>, BATCH> = ArrayVec::new();
        for ((packet, key), sequence) in self.packets.iter_mut().zip(self.keys.iter().cycle()).zip(first..) {
            ops.push(OpenOp { key: key.into(), sequence, esn: true, packet, outcome: Outcome::Pending });
        }
        engine.open(&mut ops);
        assert!(ops.iter().all(|op| op.outcome == Outcome::Opened), "not opened");
        drop(ops);
        black_box(&mut self.packets);
    }

    /// The time of `batches` calls of `open` on the same sealed packets.
    fn time_open(&mut self, engine: &mut Engine, batches: u64) -> Duration {
        self.seal(engine);
        let sealed = self.packets.clone();
        let mut spent = Duration::ZERO;
        for _ in 0..batches {
            for (packet, sealed) in self.packets.iter_mut().zip(&sealed) {
                packet.copy_from_slice(sealed);
            }
            let start = Instant::now();
            self.open(engine);
            spent += start.elapsed();
        }
        spent
    }
}

fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(PACKETS));
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
    group
}

fn seal(criterion: &mut Criterion) {
    let mut engine = Engine::select(Backend::Auto, 4096).expect("self test");
    for (name, sas) in [("seal/run", 1), ("seal/mixed", 32)] {
        let mut group = group(criterion, name);
        for suite in &SUITES {
            for size in SIZES {
                let mut bench = Bench::new(suite, size, sas);
                group.bench_function(BenchmarkId::new(suite.name, size), |b| {
                    b.iter(|| bench.seal(&mut engine));
                });
            }
        }
    }
    let mut group = group(criterion, "seal/cold");
    for suite in SUITES.iter().take(5) {
        let mut bench = Bench::new(suite, 64, COLD);
        group.bench_function(BenchmarkId::new(suite.name, 64), |b| b.iter(|| bench.seal(&mut engine)));
    }
}

fn open(criterion: &mut Criterion) {
    let mut engine = Engine::select(Backend::Auto, 4096).expect("self test");
    for (name, sas) in [("open/run", 1), ("open/mixed", 32)] {
        let mut group = group(criterion, name);
        for suite in &SUITES {
            for size in SIZES {
                let mut bench = Bench::new(suite, size, sas);
                group.bench_function(BenchmarkId::new(suite.name, size), |b| {
                    b.iter_custom(|batches| bench.time_open(&mut engine, batches));
                });
            }
        }
    }
}

/// What installing and removing an SA costs: the schedule of its key and the wiping of it.
fn keys(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("key");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
    for suite in &SUITES {
        let material = suite.material(1);
        group.bench_function(BenchmarkId::new("expand and wipe", suite.name), |b| {
            b.iter(|| black_box(EspKey::new(black_box(&material))).is_ok());
        });
    }
}

criterion_group!(benches, seal, open, keys);
criterion_main!(benches);
