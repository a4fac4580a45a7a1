//! One SA on one worker and on two (DP-8): `cargo bench -p postern-benches-packet --bench elephant`
//!
//! A port whose frames were made before hands them out and takes them back, so that neither side of the walk waits for
//! packets to be made or copied; 2,048 of them, as a ring has, in memory of their own. A pass is timed from the moment when
//! they are there to the one when the last is transmitted; then the order is looked at: ESP numbers going
//! out, numbers in the payload coming in. One and two workers take turns, on threads of their own on the first two
//! processors. `--size 1400`, `--work decap`, `--rounds N`, `--json FILE`.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::print_stdout,
    reason = "a bench stops where something is not as it expects; its figures are small"
)]

use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use postern_benches_packet::parts;
use postern_contract::request::Operation;
use postern_contract::sa::{Direction, Encryption, FanOut, PolicyId, SaConfig, SaId, Suite};
use postern_contract::secret::Secret;
use postern_contract::settings::{Backend, Idle, Role};
use postern_datapath::assembly::{Assembly, Interface, Parts, assemble};
use postern_datapath::core::PortInfo;
use postern_datapath::crypto::{Engine, EspKey, SequenceCounter};
use postern_datapath::fib::Resolver;
use postern_datapath::frame::{Arena, BATCH, Frame, HEADROOM, Pool};
use postern_datapath::numa::Placement;
use postern_datapath::port::{LinkKind, Port};
use postern_datapath::publish::Publisher;
use postern_datapath::reserve::Ledger;
use postern_datapath::testbed::{self, INSIDE_MAC, Layout, OUTSIDE_MAC};
use postern_datapath::worker::{Clock, Worker};
use postern_wire::ether;
use postern_wire::ids::Spi;
use postern_wire::{esp, ip4, udp};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 2);
const SPI: u32 = 0x1001;
/// As many as a receive ring has.
const FRAMES: usize = 2048;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Encap,
    Decap,
}

/// Frames on their way into a worker, and those that came out, in order.
#[derive(Default)]
struct Lane {
    arriving: Vec<Frame>,
    departed: Vec<Frame>,
    last: Option<Instant>,
}

struct LanePort {
    lane: Arc<Mutex<Lane>>,
    gone: Arc<AtomicUsize>,
    /// When this many are out, the clock is read.
    whole: usize,
    serves: bool,
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port for LanePort {
    fn receive(&mut self, _: &Arena, _: &mut Pool, out: &mut ArrayVec<Frame, BATCH>) {
        if self.serves {
            let mut lane = lock(&self.lane);
            let from = lane.arriving.len().saturating_sub(out.remaining_capacity());
            // They lie there the last one first.
            out.extend(lane.arriving.drain(from..).rev());
        }
    }

    fn transmit(&mut self, _: &Arena, _: &mut Pool, frames: &mut ArrayVec<Frame, BATCH>) -> usize {
        let count = frames.len();
        let mut lane = lock(&self.lane);
        lane.departed.extend(frames.drain(..));
        if lane.departed.len() == self.whole {
            lane.last = Some(Instant::now());
        }
        self.gone.fetch_add(count, Ordering::Release);
        count
    }

    fn flush(&mut self, _: &Arena, _: &mut Pool) {}

    fn drain(&mut self, _: &Arena, _: &mut Pool) {}

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn link(&self) -> LinkKind {
        LinkKind::Ethernet
    }

    fn describe(&self) -> String {
        "frames made before".to_owned()
    }
}

fn suite() -> Suite {
    parts::aead(Encryption::AesGcm16, Secret::new(vec![7; 20]))
}

/// A gateway with one SA on its first worker, and the way into it.
struct Gateway {
    _state: tempfile::TempDir,
    publisher: Publisher,
    workers: Vec<Worker>,
    arena: Arena,
    lane: Arc<Mutex<Lane>>,
    gone: Arc<AtomicUsize>,
    frames: Vec<Frame>,
    maker: Maker,
}

impl Gateway {
    fn new(work: Work, size: usize, count: usize, workers: usize, fan_out: FanOut) -> Self {
        let state = tempfile::tempdir().expect("a directory");
        let (arena, mut frames) = Arena::new(count as u32 + 1024, false).expect("an arena");
        let own = frames.split_off(1024);
        let (lane, gone) = (Arc::new(Mutex::new(Lane::default())), Arc::new(AtomicUsize::new(0)));
        let queues = |serves: bool| {
            let queue = |worker| {
                let port = LanePort {
                    lane: Arc::clone(&lane),
                    gone: Arc::clone(&gone),
                    whole: count,
                    serves: serves && worker == 0,
                };
                Some(Box::new(port) as Box<dyn Port>)
            };
            (0..workers).map(queue).collect::<Vec<_>>()
        };
        let info = |name: &str, role, mac| PortInfo {
            name: name.to_owned(),
            role,
            link: LinkKind::Ethernet,
            mac,
            host: false,
            socket: false,
        };
        let interfaces = vec![
            Interface {
                info: info("outside", Role::Outside, OUTSIDE_MAC),
                queues: queues(work == Work::Decap),
            },
            Interface { info: info("inside", Role::Inside, INSIDE_MAC), queues: queues(work == Work::Encap) },
        ];
        let Assembly { publisher, workers, bell: _ } = assemble(Parts {
            arena: arena.clone(),
            frames,
            interfaces,
            fib: testbed::fib(&Layout::default()),
            resolver: Resolver::unattended(),
            ledger: Ledger::open(state.path()).expect("a ledger"),
            sa_slots: 4096,
            backend: Backend::Auto,
            placement: Placement::anywhere(workers),
        })
        .expect("workers");
        let maker = Maker::new(work, size);
        let mut gateway = Self { _state: state, publisher, workers, arena, lane, gone, frames: own, maker };
        gateway.install(work, fan_out);
        gateway
    }

    fn install(&mut self, work: Work, fan_out: FanOut) {
        let selector = parts::selector(parts::only(NEAR), parts::only(FAR));
        let direction = if work == Work::Encap { Direction::Outbound } else { Direction::Inbound };
        let ends = (GATEWAY.into(), PEER.into());
        let sa = SaConfig {
            worker: Some(0),
            fan_out,
            ..parts::sa(SaId(1), direction, Spi(SPI), ends, suite(), selector.clone())
        };
        let policy = parts::policy(PolicyId(1), selector, SaId(1));
        let mut operations = vec![Operation::InstallSa(Box::new(sa))];
        if work == Work::Encap {
            operations.push(Operation::InstallPolicy(policy));
        }
        let Self { publisher, workers, .. } = self;
        let stop = AtomicBool::new(false);
        let clock = Clock::start();
        std::thread::scope(|scope| {
            for worker in workers {
                let stop = &stop;
                scope.spawn(move || worker.run(clock, Idle::Poll, stop));
            }
            for done in publisher.apply(&[operations], 1).pop().expect("an answer") {
                done.expect("installed");
            }
            stop.store(true, Ordering::Relaxed);
            publisher.workers().iter().for_each(|worker| worker.inbox.bell().wake());
        });
    }

    /// Some passes; nanoseconds a packet of each.
    fn passes(&mut self, count: usize) -> Vec<f64> {
        let Self { publisher, workers, arena, lane, gone, frames, maker, .. } = self;
        let stop = AtomicBool::new(false);
        let clock = Clock::start();
        let all = workers.len();
        std::thread::scope(|scope| {
            for (core, worker) in workers.iter_mut().enumerate() {
                let stop = &stop;
                let work = move || {
                    let mut set = rustix::thread::CpuSet::new();
                    set.set(core);
                    let _ = rustix::thread::sched_setaffinity(None, &set);
                    worker.run(clock, Idle::Spin, stop);
                };
                // Named, so that a profile tells them apart.
                let name = format!("worker {core} of {all}");
                std::thread::Builder::new().name(name).spawn_scoped(scope, work).expect("a thread");
            }
            let mut spent = Vec::new();
            for _ in 0..count {
                let all = frames.len();
                for frame in frames.iter_mut() {
                    maker.make(arena, frame);
                }
                frames.reverse();
                gone.store(0, Ordering::Relaxed);
                // What making them left undone is not the walk's.
                std::thread::sleep(Duration::from_millis(2));
                let start = {
                    let mut lane = lock(lane);
                    lane.last = None;
                    lane.arriving.append(frames);
                    Instant::now()
                };
                let patience = Instant::now() + Duration::from_secs(10);
                while gone.load(Ordering::Acquire) < all {
                    assert!(Instant::now() < patience, "{} of {all} came out", gone.load(Ordering::Acquire));
                    std::thread::sleep(Duration::from_micros(500));
                }
                let mut lane = lock(lane);
                let end = lane.last.expect("all came out");
                frames.append(&mut lane.departed);
                drop(lane);
                maker.check(arena, frames);
                spent.push((end - start).as_nanos() as f64 / all as f64);
                publisher.collect();
            }
            stop.store(true, Ordering::Relaxed);
            publisher.workers().iter().for_each(|worker| worker.inbox.bell().wake());
            spent
        })
    }

    fn drops(&self) -> u64 {
        self.workers.iter().map(|worker| worker.core.cells.all_drops()).sum()
    }

    fn helped(&self) -> u64 {
        self.workers.iter().map(|worker| worker.core.cells.helped.get()).sum()
    }
}

/// Writes frames as they come from the wire, and knows what has to become of them.
struct Maker {
    work: Work,
    size: usize,
    engine: Engine,
    key: EspKey,
    sequence: SequenceCounter,
    template: Vec<u8>,
    made: u64,
    seen: u64,
}

impl Maker {
    fn new(work: Work, size: usize) -> Self {
        let key = EspKey::new(&suite()).expect("a key");
        let mut template = Vec::new();
        if work == Work::Encap {
            parts::cleartext(&mut template, INSIDE_MAC, (NEAR, FAR), size);
        } else {
            let (hosts, ends) = ((FAR, NEAR), (PEER, GATEWAY));
            parts::in_esp(&mut template, OUTSIDE_MAC, hosts, size, ends, Spi(SPI), key.layout());
        }
        Self {
            work,
            size,
            engine: Engine::select(Backend::Auto, 16).expect("an engine"),
            key,
            sequence: SequenceCounter::new(1, u64::MAX, true),
            template,
            made: 0,
            seen: 0,
        }
    }

    fn make(&mut self, arena: &Arena, frame: &mut Frame) {
        frame.truncate(0);
        let place = frame.headroom();
        let moved = if place < HEADROOM {
            frame.grow_back(HEADROOM - place).and_then(|()| frame.shrink_front(HEADROOM - place))
        } else {
            frame.grow_front(place - HEADROOM)
        };
        moved.expect("room");
        frame.truncate(0);
        frame.grow_back(self.template.len()).expect("room");
        let bytes = arena.bytes_mut(frame);
        if self.work == Work::Encap {
            // The payload is what it became the last time: as good as any, and where it was.
            let head = ether::LEN + ip4::MIN_LEN + udp::LEN;
            bytes[..head].copy_from_slice(&self.template[..head]);
            return;
        }
        bytes.copy_from_slice(&self.template);
        let payload = ether::LEN + ip4::MIN_LEN + esp::HEADER_LEN + 8 + ip4::MIN_LEN + udp::LEN;
        bytes[payload..payload + 8].copy_from_slice(&self.made.to_be_bytes());
        self.made += 1;
        parts::seal(&mut self.engine, &self.key, &mut self.sequence, &mut bytes[parts::ESP_AT..]);
    }

    /// Everything is there and in order.
    fn check(&mut self, arena: &Arena, frames: &[Frame]) {
        for frame in frames {
            let packet = &arena.bytes(frame)[ether::LEN..];
            self.seen += 1;
            if self.work == Work::Encap {
                let number = esp::Header::parse(&packet[ip4::MIN_LEN..]).expect("ESP").sequence;
                assert_eq!(u64::from(number), self.seen, "out of order");
            } else {
                assert_eq!(packet.len(), self.size);
                let number = packet[28..36].try_into().map(u64::from_be_bytes).expect("eight bytes");
                assert_eq!(number + 1, self.seen, "out of order");
            }
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| arguments.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].clone());
    // `cargo test` does not say `--bench`, and wants to see that it works.
    let bench = arguments.iter().any(|argument| argument == "--bench");
    let number =
        |name: &str, otherwise: usize| value(name).map_or(otherwise, |text| text.parse().expect("a number"));
    let rounds = number("--rounds", if bench { 5 } else { 1 });
    let (passes, count) = if bench { (150, FRAMES) } else { (2, FRAMES) };
    let (wanted, direction) = (value("--size"), value("--work"));
    let mut rows = Vec::new();
    println!(
        "work   size  one worker: ns   Mpps   Gb/s  two workers: ns   Mpps   Gb/s  ratio   best ns: one, two  ratio  helped"
    );
    for (name, work) in [("encap", Work::Encap), ("decap", Work::Decap)] {
        for size in [64_usize, 512, 1400] {
            let named =
                |wanted: &Option<String>, this: &str| wanted.as_ref().is_none_or(|wanted| wanted == this);
            if !named(&wanted, &size.to_string()) || !named(&direction, name) {
                continue;
            }
            let mut one = Gateway::new(work, size, count, 1, FanOut::ByLoad);
            let mut two = Gateway::new(work, size, count, 2, FanOut::Always);
            let (mut alone, mut both) = (Vec::new(), Vec::new());
            // Each begins with a pass that warms up.
            for _ in 0..rounds {
                alone.extend(one.passes(passes + 1).drain(1..));
                both.extend(two.passes(passes + 1).drain(1..));
            }
            assert_eq!(one.drops() + two.drops(), 0);
            // The median, and the best twentieth: what it is on a machine that does nothing else.
            let cost = |list: &mut Vec<f64>| {
                list.sort_by(f64::total_cmp);
                (list[list.len() / 2], list[list.len() / 20])
            };
            let ((alone, alone_best), (both, both_best)) = (cost(&mut alone), cost(&mut both));
            let share = two.helped() as f64 / (count * (passes + 1) * rounds) as f64;
            let rate = |ns: f64| (1e3 / ns, size as f64 * 8.0 / ns);
            let ((m1, g1), (m2, g2)) = (rate(alone), rate(both));
            println!(
                "{name:6} {size:>4} {alone:>15.1} {m1:>6.2} {g1:>6.1} {both:>16.1} {m2:>6.2} {g2:>6.1} {:>6.2} {alone_best:>12.1} {both_best:>6.1} {:>6.2} {:>6.0} %",
                alone / both,
                alone_best / both_best,
                share * 100.0
            );
            rows.push(format!(
                "{{\"work\":\"{name}\",\"size\":{size},\"one_ns\":{alone:.1},\"two_ns\":{both:.1},\"ratio\":{:.3},\"best_ratio\":{:.3},\"helped\":{share:.3}}}",
                alone / both,
                alone_best / both_best
            ));
        }
    }
    if let Some(path) = value("--json")
        && let Err(error) = std::fs::write(&path, format!("[\n{}\n]\n", rows.join(",\n")))
    {
        panic!("{path}: {error}");
    }
}
