//! A bad network: loss, delay, reorder and duplication between two gateways of one segment, for IKE only or for all.
//!
//! Kernels for small machines have no netem. Here one gateway's wire is moved to a segment of its own, and two TAP
//! devices, with a thread behind each, are all that connects the two.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::netns::Netns;
use crate::packet::is_ike;
use crate::tap::Tap;
use crate::veth::segment;

/// What happens to each frame that is chosen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Impairment {
    /// Percent lost.
    pub loss: u32,
    /// Percent that come twice.
    pub duplicate: u32,
    /// Percent that are late by `late`, and so overtaken.
    pub reorder: u32,
    /// How late those are.
    pub late: Duration,
    /// Delay of all.
    pub delay: Duration,
    /// Not only IKE: ESP and everything else too.
    pub everything: bool,
    /// Of the random numbers.
    pub seed: u64,
}

/// Frames of both directions.
#[derive(Debug, Default)]
pub struct Counts {
    /// Chosen.
    pub seen: AtomicU64,
    /// Lost.
    pub lost: AtomicU64,
    /// Sent twice.
    pub duplicated: AtomicU64,
    /// Delayed.
    pub reordered: AtomicU64,
}

/// A bad network in operation; frames pass until it is dropped, then none do.
#[derive(Debug)]
pub struct BadNetwork {
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
}

impl BadNetwork {
    /// Puts itself between `port` (a gateway's wire on the segment `bridge` of `namespace`) and the rest.
    pub fn insert(namespace: &Netns, bridge: &str, port: &str, impairment: Impairment) -> Result<Self> {
        segment(namespace, "apart")?;
        namespace.sh(&format!("ip link set {port} master apart"))?;
        let near = Arc::new(Tap::plug(namespace, "tap-near", bridge)?);
        let far = Arc::new(Tap::plug(namespace, "tap-far", "apart")?);
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
        let mut threads = Vec::new();
        for (number, from, to) in [(0, &near, &far), (1, &far, &near)] {
            let way = Way {
                from: Arc::clone(from),
                to: Arc::clone(to),
                impairment,
                random: Lottery::new(impairment.seed * 2 + number),
                counts: Arc::clone(&counts),
                waiting: BinaryHeap::new(),
            };
            let stop = Arc::clone(&stop);
            threads.push(std::thread::spawn(move || way.run(&stop)));
        }
        Ok(Self { stop, counts, threads })
    }

    /// What it has done so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Ends it; says if it failed before.
    pub fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow!("the bad network panicked"))??;
        }
        Ok(())
    }
}

impl Drop for BadNetwork {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One direction.
struct Way {
    from: Arc<Tap>,
    to: Arc<Tap>,
    impairment: Impairment,
    random: Lottery,
    counts: Arc<Counts>,
    /// Frames by the time they are due; the number keeps those of one time in order.
    waiting: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
}

impl Way {
    fn run(mut self, stop: &AtomicBool) -> std::io::Result<()> {
        let (mut buffer, mut number) = ([0; 2048], 0);
        while !stop.load(Ordering::Relaxed) {
            let next = self.waiting.peek().map(|Reverse((due, ..))| *due);
            let patience = next.map_or(IDLE, |due| due.saturating_duration_since(Instant::now()).min(IDLE));
            if let Some(frame) = self.from.receive(&mut buffer, patience)? {
                for due in self.fate(frame) {
                    number += 1;
                    self.waiting.push(Reverse((due, number, frame.to_vec())));
                }
            }
            while let Some(Reverse((due, ..))) = self.waiting.peek()
                && *due <= Instant::now()
            {
                let Some(Reverse((.., frame))) = self.waiting.pop() else { break };
                // A full queue loses frames, as networks do.
                let _ = self.to.send(&frame);
            }
        }
        Ok(())
    }

    /// When the frame goes on: once, twice or never.
    fn fate(&mut self, frame: &[u8]) -> Vec<Instant> {
        let Impairment { loss, duplicate, reorder, late, delay, everything, .. } = self.impairment;
        let now = Instant::now();
        if !everything && !is_ike(frame) {
            return vec![now];
        }
        let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        add(&self.counts.seen);
        if self.random.hits(loss) {
            add(&self.counts.lost);
            return Vec::new();
        }
        let mut due = now + delay;
        if self.random.hits(reorder) {
            add(&self.counts.reordered);
            due += late;
        }
        if self.random.hits(duplicate) {
            add(&self.counts.duplicated);
            return vec![due, due + late / 2];
        }
        vec![due]
    }
}

const IDLE: Duration = Duration::from_millis(50);

/// Reproducible random numbers (splitmix64, Steele and others 2014).
#[derive(Clone, Copy, Debug)]
pub struct Lottery(u64);

impl Lottery {
    /// From a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }

    /// Yes, in so many percent of the cases.
    pub fn hits(&mut self, percent: u32) -> bool {
        self.draw() % 100 < u64::from(percent)
    }
}
