//! AES-128-GCM alone, ours beside others, in one interleaved run.
//!
//! `cargo bench -p postern-benches --bench gcm [-- --keys]`; with `--keys` what expanding keys costs. Batches of 32 packets in buffers of their own, 8 bytes of AAD, a nonce each;
//! texts and tags are kept alive (`black_box`): a compiler that may drop a tag drops the work of computing it. Contestants
//! take turns in random order, many short runs each; shown are the medians in nanoseconds a packet with the least and the
//! most, and how many times ours that is. intel-ipsec-mb is a C program that this bench builds if its header is installed
//! (Debian `libipsec-mb-dev`); its own figures are taken by the same clock around the same batches.
//!
//! Then what the processor's pipes can do at best, from loops of independent instructions, and how near the kernel is.
#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on has to stop, and prints"
)]

use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use aes_gcm::aead::{AeadInOut, KeyInit};
use postern_espgcm::pipes::Pipe;
use postern_espgcm::{EspPacket, HEADER, Kernel, Key, Level, TAG, Verdict, Wanted};

const BATCH: usize = 32;
const SIZES: [usize; 5] = [64, 256, 576, 1024, 1424];
const KEY: [u8; 16] = [7; 16];

/// Runs of each contestant, and batches in a run.
const RUNS: usize = 101;
const BATCHES: u32 = 8;

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    Seal,
    Open,
}

/// Something that seals and opens batches.
trait Contestant {
    fn name(&self) -> String;
    /// Nanoseconds a packet, of `BATCHES` batches.
    fn run(&mut self, direction: Direction, size: usize) -> f64;
}

/// The packets of a batch as every library here takes them: header, text and tag in one piece.
struct Packets {
    packets: Vec<Vec<u8>>,
    sealed: Vec<Vec<u8>>,
}

impl Packets {
    fn new(size: usize) -> Self {
        Self { packets: vec![vec![0x5a; HEADER + size + TAG]; BATCH], sealed: Vec::new() }
    }

    /// Times `work` on `BATCHES` batches, which are as they were sealed first if they are to be opened.
    fn time(&mut self, direction: Direction, mut work: impl FnMut(Direction, &mut [Vec<u8>])) -> f64 {
        work(Direction::Seal, &mut self.packets);
        self.sealed.clone_from(&self.packets);
        let mut spent = 0;
        for _ in 0..BATCHES {
            if direction == Direction::Open {
                for (packet, sealed) in self.packets.iter_mut().zip(&self.sealed) {
                    packet.copy_from_slice(sealed);
                }
            }
            let start = Instant::now();
            work(direction, black_box(&mut self.packets));
            spent += start.elapsed().as_nanos();
            black_box(&mut self.packets);
        }
        let nanoseconds = f64::from(u32::try_from(spent).expect("seconds at most"));
        nanoseconds / f64::from(BATCHES) / f64::from(u8::try_from(BATCH).expect("32"))
    }
}

fn nonce(at: usize) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[11] = u8::try_from(at).expect("below 32");
    nonce
}

struct Ours(Kernel, Key);

impl Contestant for Ours {
    fn name(&self) -> String {
        format!("postern {}", self.0.level().name())
    }

    fn run(&mut self, direction: Direction, size: usize) -> f64 {
        let Self(kernel, key) = self;
        Packets::new(size).time(direction, |direction, packets| {
            let packet =
                |bytes| EspPacket { key: 0, salt: [7; 4], high: None, bytes, verdict: Verdict::Pending };
            let mut packets = packets.iter_mut().map(Vec::as_mut_slice).map(packet);
            let mut batch: [EspPacket<'_>; BATCH] = std::array::from_fn(|_| packets.next().expect("32"));
            let keys = std::slice::from_ref(key);
            match direction {
                Direction::Seal => kernel.seal_esp(keys, &mut batch),
                Direction::Open => kernel.open_esp(keys, &mut batch),
            }
            assert!(batch.iter().all(|packet| packet.verdict == Verdict::Done), "wrong tag");
        })
    }
}

/// Text and tag of a packet.
fn parts(packet: &mut [u8]) -> (&mut [u8], &mut [u8; TAG]) {
    packet.split_at_mut(HEADER).1.split_last_chunk_mut().expect("a tag")
}

macro_rules! ring_like {
    ($name:ident, $library:ident) => {
        struct $name($library::aead::LessSafeKey);

        impl Contestant for $name {
            fn name(&self) -> String {
                stringify!($library).replace('_', "-")
            }

            fn run(&mut self, direction: Direction, size: usize) -> f64 {
                use $library::aead::{Aad, Nonce};
                Packets::new(size).time(direction, |direction, packets| {
                    for (at, packet) in packets.iter_mut().enumerate() {
                        let nonce = Nonce::assume_unique_for_key(nonce(at));
                        let (text, tag) = parts(packet);
                        if direction == Direction::Seal {
                            let sealed = self.0.seal_in_place_separate_tag(nonce, Aad::from([1; 8]), text);
                            tag.copy_from_slice(sealed.expect("sealed").as_ref());
                        } else {
                            let (_, packet) = packet.split_at_mut(HEADER);
                            self.0.open_in_place(nonce, Aad::from([1; 8]), packet).expect("a right tag");
                        }
                    }
                })
            }
        }
    };
}

ring_like!(Ring, ring);
ring_like!(AwsLc, aws_lc_rs);

struct RustCrypto(aes_gcm::Aes128Gcm);

impl Contestant for RustCrypto {
    fn name(&self) -> String {
        "aes-gcm (portable binary)".to_owned()
    }

    fn run(&mut self, direction: Direction, size: usize) -> f64 {
        Packets::new(size).time(direction, |direction, packets| {
            for (at, packet) in packets.iter_mut().enumerate() {
                let (text, tag) = parts(packet);
                let nonce = nonce(at).into();
                if direction == Direction::Seal {
                    let sealed = self.0.encrypt_inout_detached(&nonce, &[1; 8], text.into());
                    tag.copy_from_slice(&sealed.expect("sealed"));
                } else {
                    let tag = (*tag).into();
                    self.0.decrypt_inout_detached(&nonce, &[1; 8], text.into(), &tag).expect("a right tag");
                }
            }
        })
    }
}

/// The C program.
struct IpsecMb {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    version: String,
}

impl IpsecMb {
    /// Builds and starts it; `None` when that fails, and says so.
    fn start() -> Option<Self> {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/ipsec_mb.c");
        let program = std::env::temp_dir().join(format!("postern-ipsec-mb-{}", std::process::id()));
        let built =
            Command::new("cc").args(["-O2", "-o"]).arg(&program).args([source, "-lIPSec_MB"]).output();
        match built {
            Ok(output) if output.status.success() => {}
            _ => {
                println!(
                    "intel-ipsec-mb: not compared, {source} could not be built (Debian: libipsec-mb-dev, gcc)"
                );
                return None;
            }
        }
        let mut child = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it was built");
        let input = child.stdin.take().expect("a pipe");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut version = String::new();
        output.read_line(&mut version).expect("its version");
        std::fs::remove_file(program).expect("it is ours");
        Some(Self { child, input, output, version: version.trim().to_owned() })
    }
}

impl Contestant for IpsecMb {
    fn name(&self) -> String {
        format!("ipsec-mb {}", self.version)
    }

    fn run(&mut self, direction: Direction, size: usize) -> f64 {
        let word = if direction == Direction::Seal { "seal" } else { "open" };
        writeln!(self.input, "{word} {size} {BATCHES}").expect("it runs");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("an answer");
        line.trim().parse().expect("a number: tags were right")
    }
}

impl Drop for IpsecMb {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Median, least and most.
fn summary(samples: &mut [f64]) -> (f64, f64, f64) {
    samples.sort_by(f64::total_cmp);
    let at = |index: usize| samples.get(index).copied().unwrap_or(f64::NAN);
    (at(samples.len() / 2), at(0), at(samples.len() - 1))
}

/// Nanoseconds of one instruction of the loop (of the chunk: of all of it), at best.
fn pipe(level: Level, pipe: Pipe) -> Option<f64> {
    const ROUNDS: u32 = 2000;
    let time = || {
        let start = Instant::now();
        pipe.run(level, ROUNDS.into()).then(|| start.elapsed().as_secs_f64() * 1e9)
    };
    let best = (0..400).map(|_| time()).collect::<Option<Vec<_>>>()?.into_iter().fold(f64::MAX, f64::min);
    Some(best / f64::from(ROUNDS) / f64::from(pipe.instructions()))
}

/// Nanoseconds a key that is expanded together with as many as a batch of packets may want, at best, by length.
fn expansion(kernel: Kernel, whole: bool) -> [f64; 3] {
    const TOGETHER: usize = 32;
    let mut table: Vec<Key> = (0..TOGETHER).map(|_| Key::blank()).collect();
    [16, 24, 32].map(|len| {
        let keys: Vec<Vec<u8>> = (0..).map(|seed| vec![seed; len]).take(TOGETHER).collect();
        let wanted: Vec<Wanted<'_>> =
            keys.iter().enumerate().map(|(place, key)| Wanted { place, key }).collect();
        let mut best = f64::MAX;
        for _ in 0..2000 {
            let start = Instant::now();
            kernel.expand_into(black_box(&mut table), black_box(&wanted), whole);
            best = best.min(start.elapsed().as_secs_f64() * 1e9 / 32.0);
        }
        best
    })
}

fn main() {
    if std::env::args().any(|argument| argument == "--keys") {
        for level in [Level::Vaes512, Level::Vaes256] {
            if let Ok(kernel) = Kernel::new(level) {
                for (whole, word) in [(true, "whole"), (false, "for short texts")] {
                    let [short, middle, long] = expansion(kernel, whole);
                    println!(
                        "{}, {word}: ns a key of 16, 24, 32 bytes, 32 together: {short:.1}, {middle:.1}, {long:.1}",
                        level.name()
                    );
                }
            }
        }
        return;
    }
    let mut contestants: Vec<Box<dyn Contestant>> = Vec::new();
    for level in [Level::Vaes512, Level::Vaes256] {
        match Kernel::new(level) {
            Ok(kernel) => {
                let mut key = Key::blank();
                kernel.expand(&KEY, &mut key).expect("16 bytes");
                contestants.push(Box::new(Ours(kernel, key)));
            }
            Err(lacking) => println!("{}: {lacking}", level.name()),
        }
    }
    let key = ring::aead::UnboundKey::new(&ring::aead::AES_128_GCM, &KEY).expect("16 bytes");
    contestants.push(Box::new(Ring(ring::aead::LessSafeKey::new(key))));
    let key = aws_lc_rs::aead::UnboundKey::new(&aws_lc_rs::aead::AES_128_GCM, &KEY).expect("16 bytes");
    contestants.push(Box::new(AwsLc(aws_lc_rs::aead::LessSafeKey::new(key))));
    contestants.push(Box::new(RustCrypto(aes_gcm::Aes128Gcm::new(&KEY.into()))));
    if let Some(peer) = IpsecMb::start() {
        contestants.push(Box::new(peer));
    }

    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut ours = Vec::new();
    for (direction, word) in [(Direction::Seal, "seal"), (Direction::Open, "open")] {
        for size in SIZES {
            let mut samples = vec![Vec::new(); contestants.len()];
            for _ in 0..RUNS {
                let mut order: Vec<usize> = (0..contestants.len()).collect();
                order.sort_by_key(|_| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    random >> 33
                });
                for at in order {
                    let contestant = contestants.get_mut(at).expect("one of them");
                    samples.get_mut(at).expect("one of them").push(contestant.run(direction, size));
                }
            }
            println!("\n{word} {size} bytes: ns a packet, median (least - most), times ours");
            let mut first = None;
            for (contestant, samples) in contestants.iter().zip(&mut samples) {
                let (median, least, most) = summary(samples);
                let first = *first.get_or_insert(median);
                println!(
                    "  {:28} {median:7.1} ({least:6.1} - {most:7.1})  {:5.2}",
                    contestant.name(),
                    median / first
                );
            }
            ours.push((
                word,
                size,
                samples.first().map_or(f64::NAN, |samples| summary(&mut samples.clone()).1),
            ));
        }
    }

    let (level, lanes) =
        if Kernel::new(Level::Vaes512).is_ok() { (Level::Vaes512, 4) } else { (Level::Vaes256, 2) };
    let loops = [Pipe::Clock, Pipe::Aes, Pipe::Clmul, Pipe::Chunk].map(|loop_| pipe(level, loop_));
    let [Some(cycle), Some(aes), Some(clmul), Some(chunk)] = loops else { return };
    println!(
        "\npipes of {}: {:.2} GHz; VAESENC {:.2} cycles, VPCLMULQDQ {:.2}; four vectors (40 and 14 of them) {:.1} cycles",
        level.name(),
        1.0 / cycle,
        aes / cycle,
        clmul / cycle,
        chunk / cycle
    );
    println!("the first kernel's least beside the pipes' limit for its blocks (text, tag and header):");
    for (word, size, least) in ours {
        let vectors = f64::from(u32::try_from((HEADER + size).div_ceil(16 * lanes)).expect("few"));
        let limit = vectors / 4.0 * chunk;
        println!("  {word} {size:5}: {least:6.1} ns, limit {limit:6.1} ns, {:.2} times", least / limit);
    }
}
