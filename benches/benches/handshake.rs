//! IKE handshakes by pre-shared key, between endpoints in one process, without a network: CPU time of the responder and of
//! the initiator apart, and memory of an established IKE SA with a child at the responder.
//!
//! `cargo bench -p postern-benches --bench handshake [-- --count 2000 --runs 5 --sas 100000]`. CPU time is the thread's, so
//! that other load on the machine shows in it only through caches; of several runs the median counts. Memory is counted
//! two ways: bytes asked of the allocator, and growth of the process's resident set, which has the allocator's own
//! overhead in it.
#![expect(
    clippy::cast_precision_loss,
    clippy::indexing_slicing,
    reason = "a bench: counts are small, and what is sorted is not empty"
)]

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use allocation_counter::measure;
use anyhow::{Context, Result};
use postern_hwtests::load::{self, Plan, System};
use postern_ike::Endpoint;
use postern_ike::job::Job;
use rustix::time::{ClockId, clock_gettime};

const GROUPS: [(&str, &str); 4] = [
    ("X25519", "aes128gcm16-prfsha256-x25519"),
    ("P-256", "aes128gcm16-prfsha256-ecp256"),
    ("MODP-2048", "aes128gcm16-prfsha256-modp2048"),
    ("X25519 + ML-KEM-768", "aes128gcm16-prfsha256-x25519-ke1_mlkem768"),
];

const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// What the command line can say.
struct Arguments {
    /// Handshakes of a run.
    count: u32,
    /// Runs with each group; the median is shown.
    runs: usize,
    /// IKE SAs for measuring memory; 0: not measured.
    sas: u32,
    /// Only groups whose name begins so.
    only: String,
}

impl Arguments {
    fn parse() -> Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        // What cargo says to benches; `cargo test` does not say it, and wants to see that it works.
        let mut this = if arguments.iter().any(|argument| argument == "--bench") {
            Self { count: 2000, runs: 5, sas: 100_000, only: String::new() }
        } else {
            Self { count: 10, runs: 1, sas: 100, only: String::new() }
        };
        for pair in arguments.windows(2) {
            match pair[0].as_str() {
                "--count" => this.count = pair[1].parse()?,
                "--runs" => this.runs = pair[1].parse()?,
                "--sas" => this.sas = pair[1].parse()?,
                "--only" => this.only.clone_from(&pair[1]),
                _ => {}
            }
        }
        Ok(this)
    }
}

/// CPU time that this thread has used.
fn used() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Of one handshake, in microseconds.
#[derive(Clone, Copy, Default)]
struct Cost {
    responder: f64,
    /// Of that, key exchanges.
    responder_jobs: f64,
    initiator: f64,
    initiator_jobs: f64,
}

/// Of one run.
#[derive(Clone, Copy)]
struct Run {
    responder: f64,
    responder_p50: f64,
    responder_p99: f64,
    responder_jobs: f64,
    initiator: f64,
    initiator_jobs: f64,
    /// Wall time of both sides.
    both_p50: f64,
    both_p99: f64,
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// The client of this number has an address of its own.
fn address(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number))
}

fn handshake(plan: &Plan, gateway: &mut Endpoint, number: u32, random: &mut System) -> Result<Cost> {
    let now = load::now();
    let mut client = plan.client(now, number, address(number))?;
    let mut cost = Cost::default();
    let jobs = std::cell::Cell::new(0.0);
    let mut run = |job: Job| {
        let before = used();
        let done = job.run(random);
        jobs.set(jobs.get() + micros(used().saturating_sub(before)));
        done
    };
    load::handshake(gateway, &mut client, now, &mut run, |at_gateway, step| {
        let before = used();
        step();
        let taken = micros(used().saturating_sub(before));
        let jobs = jobs.take();
        if at_gateway {
            cost.responder += taken;
            cost.responder_jobs += jobs;
        } else {
            cost.initiator += taken;
            cost.initiator_jobs += jobs;
        }
    })?;
    Ok(cost)
}

fn run(plan: &Plan, count: u32) -> Result<Run> {
    let mut random = System::default();
    let mut gateway = plan.gateway(load::now())?;
    let (mut costs, mut walls) = (Vec::new(), Vec::new());
    for number in 1..=count {
        let begun = Instant::now();
        costs.push(handshake(plan, &mut gateway, number, &mut random)?);
        walls.push(micros(begun.elapsed()));
    }
    let sorted = |values: &mut dyn Iterator<Item = f64>| {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let mean = |part: fn(&Cost) -> f64| costs.iter().map(part).sum::<f64>() / f64::from(count);
    let responder = sorted(&mut costs.iter().map(|cost| cost.responder));
    let walls = sorted(&mut walls.into_iter());
    let (middle, last) = (walls.len() / 2, walls.len() * 99 / 100);
    Ok(Run {
        responder: mean(|cost| cost.responder),
        responder_p50: responder[middle],
        responder_p99: responder[last],
        responder_jobs: mean(|cost| cost.responder_jobs),
        initiator: mean(|cost| cost.initiator),
        initiator_jobs: mean(|cost| cost.initiator_jobs),
        both_p50: walls[middle],
        both_p99: walls[last],
    })
}

/// Resident set of this process in bytes.
fn resident() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kibibytes * 1024.0)
}

fn memory(count: u32) -> Result<()> {
    let plan = plan(GROUPS[0].1)?;
    let mut random = System::default();
    let mut gateway = plan.gateway(load::now())?;
    // Whatever is allocated once, is.
    for number in 1..=100 {
        handshake(&plan, &mut gateway, number, &mut random)?;
    }
    let before = resident()?;
    for number in 101..=count + 100 {
        handshake(&plan, &mut gateway, number, &mut random)?;
    }
    let resident = (resident()? - before) / f64::from(count);
    let freed = measure(|| drop(gateway));
    let each = f64::from(count + 100);
    println!(
        "memory of an IKE SA with a child, of {count}: {:.0} bytes in {:.1} allocations; resident set {resident:.0} bytes",
        -(freed.bytes_current as f64) / each,
        -(freed.count_current as f64) / each,
    );
    Ok(())
}

fn plan(ike: &str) -> Result<Plan> {
    Plan::new(GATEWAY, "10.255.0.0/16", ike, "aes128gcm16", "a shared secret of some length")
}

fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn main() -> Result<()> {
    let arguments = Arguments::parse()?;
    println!(
        "CPU microseconds a handshake, mean (of that key exchanges); the responder's p50 and p99; wall p50 and p99"
    );
    println!("of both sides one after the other. Median of {} runs of {}.", arguments.runs, arguments.count);
    for (name, ike) in GROUPS.iter().filter(|(name, _)| name.starts_with(&arguments.only)) {
        let plan = plan(ike)?;
        let runs: Vec<Run> =
            (0..arguments.runs.max(1)).map(|_| run(&plan, arguments.count)).collect::<Result<_>>()?;
        let median = |part: fn(&Run) -> f64| {
            let mut values: Vec<f64> = runs.iter().map(part).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        println!(
            "{name:20} responder {:6.1} ({:6.1}) p50 {:6.1} p99 {:6.1} = {:6.0}/s a core; initiator {:6.1} ({:6.1}); wall {:6.0} {:6.0}; load average {}",
            median(|run| run.responder),
            median(|run| run.responder_jobs),
            median(|run| run.responder_p50),
            median(|run| run.responder_p99),
            1e6 / median(|run| run.responder),
            median(|run| run.initiator),
            median(|run| run.initiator_jobs),
            median(|run| run.both_p50),
            median(|run| run.both_p99),
            load_average(),
        );
    }
    if arguments.sas > 0 {
        memory(arguments.sas)?;
    }
    Ok(())
}
