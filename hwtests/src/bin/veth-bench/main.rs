//! The veth bench: what a gateway delivers on AF_XDP in copy mode beside a forwarder that does nothing, and how long a packet
//! takes through it.
#![forbid(unsafe_code)]

mod cpu;
mod packets;
mod plain;
mod wires;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use hdrhistogram::Histogram;
use postern_hwtests::config::{AES128GCM, Pair};
use postern_hwtests::netns::{janitor, scratch_dir, unique_prefix};
use postern_hwtests::node::Node;
use postern_hwtests::process::share_like_ours;
use postern_hwtests::prog_run::{Order, Outcome, ProgRun};
use postern_hwtests::topology::gateway_config;
use serde_json::{Value, json};

use crate::cpu::{Cost, Thread};
use crate::packets::{NUMBER, SEQUENCE, Sealer, clear};
use crate::plain::Plain;
use crate::wires::{OUTSIDE, PEER, Wires};

/// Measures rates and latencies on veth: ESP encapsulation and decapsulation (AES-128-GCM, ESN, replay window) through a
/// real datapath, beside a plain forwarder on the same rings that only swaps link-layer addresses.
///
/// One processor has the worker, one the generator (BPF_PROG_RUN). Rounds take turns; shown are medians with least and most, and
/// what a packet costs the worker's thread in its own code and in the kernel, where receivers on veth are served as well.
/// Latency is from the generator's program to the far interface's ingress, at half of each one's own rate. Needs root, two
/// processors where nothing else runs, and a release build (with postern-control and postern-datapath beside it).
#[derive(Parser)]
#[command(name = "postern-veth-bench")]
struct Arguments {
    /// Bytes of the inner packets
    #[arg(long, value_delimiter = ',', default_value = "64,1400")]
    sizes: Vec<usize>,
    /// Rounds of each
    #[arg(long, default_value_t = 15)]
    rounds: u32,
    /// Only: rate, or latency (which needs a rate, so it measures a few rounds of that)
    #[arg(long)]
    only: Option<String>,
    /// Few rounds of few packets, to see that it works
    #[arg(long)]
    smoke: bool,
    /// Fail if the datapath delivers less than this part of what the plain forwarder does
    #[arg(long)]
    at_least: Option<f64>,
    /// Processors of generator and worker
    #[arg(long, value_delimiter = ',', default_value = "0,1")]
    cores: Vec<u16>,
    /// Where results go besides, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Plain,
    Encap,
    Decap,
}

impl Way {
    const ALL: [Self; 3] = [Self::Plain, Self::Encap, Self::Decap];

    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Encap => "encap",
            Self::Decap => "decap",
        }
    }
}

/// Everything that stands while it is measured.
struct Bench {
    generator: ProgRun,
    sealer: Sealer,
    gateway: Node,
    /// The worker, and the forwarder that does nothing.
    worker: Thread,
    idle: Thread,
    _plain: Plain,
    /// Last: what runs in them ends first.
    postern: Wires,
    reference: Wires,
    core: usize,
    _scratch: Scratch,
}

/// A directory that goes with this value.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left is the janitor's.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Bench {
    fn build(cores: [u16; 2], slots: u32) -> Result<Self> {
        janitor();
        let prefix = unique_prefix();
        let scratch = Scratch(scratch_dir(&prefix)?);
        let dir = scratch.0.as_path();
        let (postern, reference) = (Wires::lay(&prefix, "postern")?, Wires::lay(&prefix, "plain")?);
        let mut generator = ProgRun::load(dir, slots)?;
        for wires in [&postern, &reference] {
            generator.sink(&wires.far, "lan0")?;
            generator.sink(&wires.far, "wan0")?;
        }
        let nets = ("10.1.0.0/24", "10.2.0.0/24");
        let pair = Pair::new(0, Some(AES128GCM), None, (OUTSIDE.into(), PEER.into()), nets)?;
        let [_, [key, ..]] = &pair.keys;
        let sealer = Sealer::new(pair.spis.1, key)?;
        let mut config = gateway_config(vec![pair.left()]);
        config.datapath.cores = vec![cores[1]];
        let gateway = Node::start(&postern.gateway, "g1", dir, config)?;
        share_like_ours(gateway.datapath_pid()?)?;
        let worker = Thread::named(gateway.datapath_pid()?, "worker-0")?;
        let plain = Plain::start(&reference.gateway, cores[1].into())?;
        Ok(Self {
            worker,
            idle: Thread::new(i32::try_from(std::process::id())?, plain.thread_id()),
            generator,
            sealer,
            gateway,
            _plain: plain,
            postern,
            reference,
            core: cores[0].into(),
            _scratch: scratch,
        })
    }

    /// Sends `packets` at `rate` one way.
    fn run(&mut self, way: Way, size: usize, packets: u32, rate: f64, latency: bool) -> Result<Outcome> {
        let wires = if way == Way::Plain { &self.reference } else { &self.postern };
        let (port, frames) = match way {
            // Numbered by the generator.
            Way::Plain | Way::Encap => (wires.lan, vec![clear(wires.lan.gateway, size)?]),
            Way::Decap => (wires.wan, self.sealer.frames(wires.wan.gateway, size, packets)?),
        };
        self.generator.store(frames.iter().map(Vec::as_slice))?;
        let order = Order {
            ifindex: port.ifindex,
            length: frames.first().map_or(0, Vec::len),
            frames: u32::try_from(frames.len())?.next_power_of_two(),
            packets,
            rate,
            number_at: if way == Way::Decap { None } else { Some(u16::try_from(NUMBER)?) },
            look_at: if latency {
                Some(u16::try_from(if way == Way::Encap { SEQUENCE } else { NUMBER })?)
            } else {
                None
            },
            catch_up: !latency,
            batch: if latency { 4 } else { 64 },
            core: self.core,
        };
        let far = &wires.far;
        self.generator.send(far, order, Duration::from_secs(1))
    }

    /// What the thread that goes this way has spent so far.
    fn spent(&self, way: Way) -> Result<[f64; 2]> {
        if way == Way::Plain { self.idle.spent() } else { self.worker.spent() }
    }

    /// Whether every packet comes through at a rate that is nothing.
    fn check(&mut self, size: usize) -> Result<()> {
        for way in Way::ALL {
            let outcome = self.run(way, size, 1000, 20_000.0, true)?;
            ensure!(
                outcome.sent == 1000 && outcome.received == 1000 && outcome.latencies.len() == 1000,
                "{} of {size} bytes: {outcome:?}\n{}",
                way.name(),
                self.gateway.log()
            );
        }
        Ok(())
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn ends(values: &[f64]) -> (f64, f64) {
    (values.iter().copied().fold(f64::INFINITY, f64::min), values.iter().copied().fold(0.0, f64::max))
}

/// Rates of one size: rounds in turn. Gives the medians, and the row.
fn rates(bench: &mut Bench, size: usize, rounds: u32) -> Result<([f64; 3], Value)> {
    // More than anyone can take, and not so much more that packets are used up.
    let packets = bench.generator.slots();
    let mut most = 1.0e6_f64;
    let mut rates = [const { Vec::new() }; 3];
    let mut costs = [Cost::default(); 3];
    for round in 0..=rounds {
        for ((way, rates), cost) in Way::ALL.into_iter().zip(&mut rates).zip(&mut costs) {
            let before = bench.spent(way)?;
            let outcome = bench.run(way, size, packets, most, false)?;
            // The first round is only to see how much is more than enough.
            if round > 0 {
                rates.push(outcome.rate);
                cost.add(before, bench.spent(way)?, &outcome);
            }
            most = most.max(outcome.rate * 1.3);
        }
    }
    let medians = rates.each_ref().map(|rates| median(rates));
    let [plain, ..] = medians;
    let mut rows = Vec::new();
    for (((way, rates), rate), cost) in Way::ALL.into_iter().zip(&rates).zip(medians).zip(&costs) {
        let (least, most) = ends(rates);
        let ratio = rate / plain;
        let [own, kernel] = cost.each();
        println!(
            "{:6} {size:>5} B  {:6.3} Mpps ({:.3} - {:.3})  {:5.1} % of plain  {:6.2} Gb/s  {own:4.0} ns own, {kernel:4.0} ns kernel",
            way.name(),
            rate / 1e6,
            least / 1e6,
            most / 1e6,
            100.0 * ratio,
            rate * f64::from(u32::try_from(size)?) * 8.0 / 1e9
        );
        rows.push(json!({
            "way": way.name(), "size": size, "pps": rate, "least": least, "most": most, "of_plain": ratio,
            "own_ns": own, "kernel_ns": kernel,
        }));
    }
    println!("       offered: {:.3} Mpps", most / 1e6);
    Ok((medians, Value::from(rows)))
}

/// Latencies of one size at half of these rates.
fn latencies(bench: &mut Bench, size: usize, rates: [f64; 3], rounds: u32) -> Result<Value> {
    let packets = bench.generator.slots();
    let mut rows = Vec::new();
    let mut all = Vec::new();
    for _ in Way::ALL {
        // Two significant digits up to a second.
        all.push((Histogram::<u64>::new_with_bounds(1, 1_000_000_000, 2)?, 0, 0));
    }
    for _ in 0..rounds {
        for ((way, rate), (histogram, sent, received)) in Way::ALL.into_iter().zip(rates).zip(&mut all) {
            let outcome = bench.run(way, size, packets, rate / 2.0, true)?;
            *sent += outcome.sent;
            *received += outcome.received;
            // Encapsulated packets are known by the sequence number that they got: after a loss by a wrong one.
            if way != Way::Encap || outcome.sent == outcome.received {
                outcome.latencies.iter().for_each(|time| histogram.saturating_record(*time));
            }
        }
    }
    for ((way, rate), (histogram, sent, received)) in Way::ALL.into_iter().zip(rates).zip(&all) {
        let at = |quantile| microseconds(histogram.value_at_quantile(quantile));
        println!(
            "{:6} {size:>5} B at {:.3} Mpps: p50 {:.1}  p90 {:.1}  p99 {:.1}  p99.9 {:.1}  p99.99 {:.1}  most {:.1} µs; {} packets timed, {} of {sent} lost",
            way.name(),
            rate / 2e6,
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            at(0.9999),
            microseconds(histogram.max()),
            histogram.len(),
            sent - received,
        );
        let buckets: Vec<Value> = histogram
            .iter_recorded()
            .map(|bucket| json!([bucket.value_iterated_to(), bucket.count_at_value()]))
            .collect();
        rows.push(json!({
            "way": way.name(), "size": size, "pps": rate / 2.0, "sent": sent, "received": received,
            "p50_us": at(0.5), "p90_us": at(0.9), "p99_us": at(0.99), "p999_us": at(0.999),
            "p9999_us": at(0.9999), "max_us": microseconds(histogram.max()), "histogram_ns": buckets,
        }));
        print_histogram(histogram);
    }
    Ok(Value::from(rows))
}

fn microseconds(nanoseconds: u64) -> f64 {
    f64::from(u32::try_from(nanoseconds).unwrap_or(u32::MAX)) / 1000.0
}

/// All of it, a line for each doubling of time.
fn print_histogram(histogram: &Histogram<u64>) {
    let total = histogram.len().max(1);
    let mut below = 0;
    for bucket in histogram.iter_log(1000, 2.0) {
        let count = bucket.count_since_last_iteration();
        below += count;
        if count > 0 {
            let share = |count: u64| 1e-4 * f64::from(u32::try_from(count * 1_000_000 / total).unwrap_or(0));
            println!(
                "         below {:>9.1} µs {count:>10} {:>8.4} % {:>9.4} %",
                microseconds(bucket.value_iterated_to()),
                share(count),
                share(below)
            );
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let cores: [u16; 2] = arguments.cores.clone().try_into().ok().context("--cores takes two")?;
    let (rounds, slots) = if arguments.smoke { (1, 1 << 14) } else { (arguments.rounds, 1 << 18) };
    let mut bench = Bench::build(cores, slots)?;
    let (mut rate_rows, mut latency_rows) = (Vec::new(), Vec::new());
    let mut lowest = f64::INFINITY;
    for size in &arguments.sizes {
        bench.check(*size)?;
        let only_latency = arguments.only.as_deref() == Some("latency");
        let (medians, row) = rates(&mut bench, *size, if only_latency { 3 } else { rounds })?;
        let [plain, rest @ ..] = medians;
        lowest = rest.iter().fold(lowest, |lowest, rate| lowest.min(rate / plain));
        rate_rows.push(row);
        if arguments.only.as_deref() != Some("rate") {
            latency_rows.push(latencies(&mut bench, *size, medians, rounds.div_ceil(3))?);
        }
    }
    if let Some(path) = &arguments.json {
        let all = json!({ "rates": rate_rows, "latencies": latency_rows });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    if let Some(least) = arguments.at_least {
        ensure!(lowest >= least, "the datapath delivers {lowest:.3} of what the plain forwarder does");
    }
    Ok(())
}
