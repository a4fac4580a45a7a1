//! A packet generator within the kernel, faster than any datapath on veth, and a sink that counts: for rates and latencies.
//!
//! The generator is an XDP program (`prog_run.c`) that `BPF_PROG_RUN` calls with live frames
//! (Documentation/bpf/bpf_prog_run.rst): it copies a packet from a map and has it sent out of an interface. It paces itself, as
//! frames for which nothing is due yet are thrown away. The sink sits at the ingress of the far interface, before the stack.
//! Both note times by the packet's number, so that each packet's way is known. Needs root, clang and Linux 6.6.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, MapData};
use aya::programs::tc::TcAttachType;
use aya::programs::{SchedClassifier, TestRun, TestRunAttrs, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::netns::Netns;
use crate::process::run;

/// The longest frame.
pub const SLOT: usize = 1536;
/// Calls of one `BPF_PROG_RUN`: with fewer, setting it up is what is measured.
const REPEAT: u32 = 1 << 21;
/// Packets that may be late without [`Order::catch_up`].
const BEHIND: u64 = 64;
/// Field counts of the structures in `prog_run.c`.
type Plan = [u64; 10];
type Sent = [u64; 3];
type Seen = [u64; 5];

/// Generator and sink.
pub struct ProgRun {
    ebpf: Ebpf,
    slots: u32,
}

/// What is to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// The interface it leaves by, in the generator's namespace; the other end of it must have an XDP program.
    pub ifindex: u32,
    /// Bytes of each frame.
    pub length: usize,
    /// How many of the stored frames are sent in turn, a power of two.
    pub frames: u32,
    /// Packets in all.
    pub packets: u32,
    /// Packets a second, evenly.
    pub rate: f64,
    /// Where the generator writes each packet's number (four bytes); a stored frame may have it already.
    pub number_at: Option<u16>,
    /// Where the sink finds a number that grows by one a packet (four bytes): then times are noted.
    pub look_at: Option<u16>,
    /// Whether packets that are late are sent all at once: for a rate that is kept whatever else the processor does. A latency
    /// would be that of the queue which it makes; then time stands still while the generator does not run.
    pub catch_up: bool,
    /// Frames that the kernel handles at a time: many for rates, few where a frame must not wait for others.
    pub batch: u32,
    /// The processor to work on.
    pub core: usize,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Packets that were sent.
    pub sent: u64,
    /// Packets that came to the sink.
    pub received: u64,
    /// Packets a second at the sink, in the middle of the time.
    pub rate: f64,
    /// Nanoseconds from generator to sink, of each packet that came, if they were noted. A packet that overtook another or
    /// was lost makes them wrong where the numbers are given by someone on the way: look at the counts.
    pub latencies: Vec<u64>,
}

impl ProgRun {
    /// Builds and loads both programs, with room for so many frames and times. Files go to `dir`.
    pub fn load(dir: &Path, slots: u32) -> Result<Self> {
        let (source, object) = (dir.join("prog_run.c"), dir.join("prog_run.o"));
        std::fs::write(&source, include_str!("prog_run.c"))?;
        let built = run(Command::new("clang")
            .args(["-O2", "-g", "-target", "bpf", "-c"])
            .arg(source)
            .arg("-o")
            .arg(&object));
        built.context("building the generator (Debian: clang)")?;
        let mut loader = EbpfLoader::new();
        for map in ["packets", "sent_at", "seen_at"] {
            loader.map_max_entries(map, slots);
        }
        let mut ebpf = loader.load_file(object).context("loading the generator (this needs root)")?;
        let program: &mut Xdp = ebpf.program_mut("generate").context("no generator")?.try_into()?;
        program.load()?;
        Ok(Self { ebpf, slots })
    }

    /// Has the sink at the ingress of `interface`, until this value is dropped. Nothing that comes there gets any further.
    pub fn sink(&mut self, namespace: &Netns, interface: &str) -> Result<()> {
        let program: &mut SchedClassifier = self.ebpf.program_mut("sink").context("no sink")?.try_into()?;
        if program.fd().is_err() {
            program.load()?;
        }
        namespace.enter(|| {
            program.attach(interface, TcAttachType::Ingress)?;
            Ok(())
        })
    }

    /// Room for so many frames, and for the times of so many packets.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Stores frames, from slot 0 on.
    pub fn store<'a>(&mut self, frames: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
        let mut map: Array<_, [u8; SLOT]> = self.map("packets")?;
        let mut slot = [0; SLOT];
        for (at, frame) in frames.into_iter().enumerate() {
            slot.get_mut(..frame.len()).context("a frame that is too long")?.copy_from_slice(frame);
            map.set(u32::try_from(at)?, slot, 0)?;
        }
        Ok(())
    }

    /// Sends as ordered from `namespace`, and waits until all is sent and came, or `limit` is over.
    pub fn send(&mut self, namespace: &Netns, order: Order, limit: Duration) -> Result<Outcome> {
        ensure!(order.packets > 0 && order.rate > 0.0 && order.frames.is_power_of_two(), "{order:?}");
        ensure!(order.frames <= self.slots && order.length <= SLOT, "{order:?}");
        ensure!(order.look_at.is_none() || order.packets <= self.slots, "times of more packets than slots");
        if order.look_at.is_some() {
            let mut map: Array<_, u64> = self.map("seen_at")?;
            (0..order.packets).try_for_each(|at| map.set(at, 0, 0))?;
        }
        self.map::<Sent>("sent")?.set(0, [0; 3], 0)?;
        self.map::<Seen>("seen")?.set(0, [0; 5], 0)?;
        let lasting = Duration::from_secs_f64(f64::from(order.packets) / order.rate);
        // Neither the beginning nor the end, where a queue fills and empties.
        let window = (lasting / 8, lasting * 7 / 8);
        let plan: Plan = [
            order.ifindex.into(),
            u64::try_from(order.length)?,
            u64::from(order.frames) - 1,
            order.packets.into(),
            nanoseconds(Duration::from_secs_f64(1024.0 / order.rate)),
            nanoseconds(window.0),
            nanoseconds(window.1),
            if order.catch_up { u64::MAX } else { BEHIND },
            order.number_at.unwrap_or(0).into(),
            order.look_at.unwrap_or(0).into(),
        ];
        self.map::<Plan>("plan")?.set(0, plan, 0)?;

        let deadline = Instant::now() + lasting + limit;
        let template = vec![0_u8; order.length];
        let program: &Xdp = generator(&self.ebpf)?;
        let sent: Array<_, Sent> = Array::try_from(self.ebpf.map("sent").context("no map sent")?)?;
        let generate = || {
            let mut cpus = CpuSet::new();
            cpus.set(order.core);
            sched_setaffinity(None, &cpus)?;
            while sent.get(&0, 0)?[0] < order.packets.into() && Instant::now() < deadline {
                program.test_run(TestRunOptions {
                    data_in: Some(&template),
                    repeat: REPEAT,
                    attrs: TestRunAttrs::new().xdp_live_frames(order.batch),
                    ..TestRunOptions::new()
                })?;
            }
            Ok(())
        };
        namespace.enter(generate)?;

        let mut before = u64::MAX;
        let (sent, seen) = loop {
            let [sent, ..] = self.map::<Sent>("sent")?.get(&0, 0)?;
            let seen = self.map::<Seen>("seen")?.get(&0, 0)?;
            // All came, or no more comes.
            if seen[0] >= sent || seen[0] == before || Instant::now() > deadline {
                break (sent, seen);
            }
            before = seen[0];
            std::thread::sleep(Duration::from_millis(20));
        };
        let latencies = match order.look_at {
            Some(_) => self.latencies(order.packets)?,
            None => Vec::new(),
        };
        let [received, in_window, ..] = seen;
        let counted = f64::from(u32::try_from(in_window)?);
        let rate = counted / window.1.saturating_sub(window.0).as_secs_f64();
        Ok(Outcome { sent, received, rate, latencies })
    }

    fn latencies(&mut self, packets: u32) -> Result<Vec<u64>> {
        let sent: Array<_, u64> = Array::try_from(self.ebpf.map("sent_at").context("no times")?)?;
        let seen: Array<_, u64> = Array::try_from(self.ebpf.map("seen_at").context("no times")?)?;
        let mut latencies = Vec::new();
        for at in 0..packets {
            let (sent, seen) = (sent.get(&at, 0)?, seen.get(&at, 0)?);
            if seen != 0 {
                latencies.push(seen.saturating_sub(sent));
            }
        }
        Ok(latencies)
    }

    fn map<V: aya::Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, V>> {
        let map = self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        Ok(Array::try_from(map)?)
    }
}

fn generator(ebpf: &Ebpf) -> Result<&Xdp> {
    Ok(ebpf.program("generate").context("no generator")?.try_into()?)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
