//! How many packets a second a relay delivers over veth, translated in the XDP program and by a worker, interleaved in one
//! run.
//!
//! ```text
//! generator (out) ── (left) relay (right) ── (in) sink
//! ```
//!
//! The generator is the kernel itself: `BPF_PROG_RUN` with live frames sends several million packets a second, more than an
//! AF_XDP socket could. The sink's interface counts what arrives; an XDP program takes it off there.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::Array;
use aya::programs::{TestRun, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use clap::Parser;
use postern_hwtests::config::{Partition, Relay, Spis};
use postern_hwtests::netns::{Netns, janitor, scratch_dir, unique_prefix};
use postern_hwtests::node::Node;
use postern_hwtests::topology::{RelayPath, relay_config};
use postern_hwtests::veth::{End, Wire, address};
use postern_steer_maps::{BENCH_HEAD_LEN, name};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Compares a relay that translates in its XDP program with one that does so in an AF_XDP worker.
///
/// Both are the same Postern in the same namespace with the other setting of `datapath.relay`, started anew for every round.
/// The generator keeps one processor busy, the worker has another; what XDP does it does on the generator's. Needs root and
/// a machine with nothing else to do. Prints packets a second that arrived at the far end.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Rounds; each measures both paths at all lengths.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Bytes of an IP packet; may be given several times.
    #[arg(long = "length", value_name = "BYTES", default_values_t = [114, 1450])]
    lengths: Vec<usize>,
    /// Packets sent for one measurement.
    #[arg(long, default_value_t = 1 << 21)]
    packets: u32,
    /// Processor of the generator, and of what the kernel does with its packets.
    #[arg(long, default_value_t = 0)]
    generator: u16,
    /// Processor of the relay's worker.
    #[arg(long, default_value_t = 1)]
    worker: u16,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

const OBJECT: &[u8] = aya::include_bytes_aligned!("../../../ebpf/postern-steer.o");

const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const RELAY_LEFT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const RELAY_RIGHT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const SPI: u32 = 0x7001;
/// Packets before a measurement, so that neighbours, caches and clocks are as they stay.
const WARM_UP: u32 = 1 << 18;

/// The network, with the sink's program in place.
struct Lab {
    generator: Netns,
    relay: Netns,
    sink: Netns,
    dir: PathBuf,
    /// Keep the programs attached.
    _programs: Vec<Ebpf>,
}

impl Lab {
    fn build() -> Result<Self> {
        janitor();
        let prefix = unique_prefix();
        let [generator, relay, sink] = ["gen", "relay", "sink"].map(|role| Netns::create(&prefix, role));
        let (generator, relay, sink) = (generator?, relay?, sink?);
        let out = End { namespace: &generator, interface: "out" };
        let left = End { namespace: &relay, interface: "left" };
        let right = End { namespace: &relay, interface: "right" };
        let far = End { namespace: &sink, interface: "in" };
        Wire::default().connect(out, left)?;
        Wire::default().connect(right, far)?;
        address(left, RELAY_LEFT.into(), 24)?;
        address(right, RELAY_RIGHT.into(), 24)?;
        for (peer, end, at) in [(CLIENT, out, "left"), (GATEWAY, far, "right")] {
            relay.sh(&format!("ip neigh replace {peer} dev {at} lladdr {} nud permanent", text_mac(end)?))?;
        }
        // A veth sends frames of others only while its other end has a program, and takes none for a test run without.
        let programs = vec![attach(&generator, "out")?, attach(&sink, "in")?];
        Ok(Self { generator, relay, sink, dir: scratch_dir(&prefix)?, _programs: programs })
    }

    /// Packets that arrived at the far end so far.
    fn arrived(&self) -> Result<u64> {
        let text = self.sink.sh("cat /sys/class/net/in/statistics/rx_packets")?;
        Ok(text.trim().parse()?)
    }

    fn start(&self, path: RelayPath, worker: u16) -> Result<Node> {
        let side = |relay: Ipv4Addr, peer: Ipv4Addr, to_relay, from_relay| Partition {
            relay: relay.into(),
            peer: IpAddr::V4(peer),
            encap: None,
            esp: Some(Spis { to_relay, from_relay }),
            ah: None,
        };
        let mut config = relay_config(vec![Relay {
            name: "bench".to_owned(),
            client: side(RELAY_LEFT, CLIENT, SPI, SPI + 1),
            gateway: side(RELAY_RIGHT, GATEWAY, SPI + 2, SPI + 3),
        }]);
        config.datapath.relay = Some(path.name());
        config.datapath.cores = vec![worker];
        Node::start(&self.relay, path.name(), &self.dir, config)
    }

    /// Sends packets from a processor and says how long it took.
    fn send(&self, processor: u16, frame: &[u8], packets: u32) -> Result<Duration> {
        self.generator.enter(|| {
            let mut set = CpuSet::new();
            set.set(usize::from(processor));
            sched_setaffinity(None, &set)?;
            let mut ebpf = EbpfLoader::new().load(OBJECT)?;
            let mut head: Array<_, [u64; BENCH_HEAD_LEN / 8]> =
                ebpf.map_mut(name::BENCH_HEAD).context("no BENCH_HEAD")?.try_into()?;
            let (words, _) = frame.as_chunks::<8>();
            let words = words.first_chunk().context("frame too short")?;
            head.set(0, words.map(u64::from_ne_bytes), 0)?;
            let index = interface("out")?;
            let program: &mut Xdp =
                ebpf.program_mut(name::BENCH_SEND).context("no bench_send")?.try_into()?;
            program.load()?;
            // The kernel's `xdp_md`: data, end of data, metadata, interface it came in by, queue, interface it leaves by.
            let context = [0, u32::try_from(frame.len())?, 0, index, 0, 0].map(u32::to_ne_bytes).concat();
            let start = Instant::now();
            program.test_run(TestRunOptions {
                data_in: Some(frame),
                ctx_in: Some(&context),
                repeat: packets,
                attrs: TestRunAttrs::new().xdp_live_frames(64),
                ..TestRunOptions::default()
            })?;
            Ok(start.elapsed())
        })
    }

    /// Packets a second that arrive.
    fn measure(&self, arguments: &Arguments, frame: &[u8]) -> Result<f64> {
        self.send(arguments.generator, frame, WARM_UP)?;
        std::thread::sleep(Duration::from_millis(100));
        let before = self.arrived()?;
        let took = self.send(arguments.generator, frame, arguments.packets)?;
        // What still is in a ring belongs to it; a full ring is less than a thousandth of the packets.
        std::thread::sleep(Duration::from_millis(100));
        let arrived = self.arrived()? - before;
        Ok(f64::from(u32::try_from(arrived)?) / took.as_secs_f64())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Files that are left are the janitor's.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Number of an interface of the calling thread's namespace.
fn interface(name: &str) -> Result<u32> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(socket, name)?)
}

fn text_mac(end: End<'_>) -> Result<String> {
    let text = end.namespace.sh(&format!("cat /sys/class/net/{}/address", end.interface))?;
    Ok(text.trim().to_owned())
}

fn mac(end: End<'_>) -> Result<Vec<u8>> {
    text_mac(end)?.split(':').map(|byte| Ok(u8::from_str_radix(byte, 16)?)).collect()
}

/// Has an interface take frames and drop them.
fn attach(namespace: &Netns, interface: &str) -> Result<Ebpf> {
    namespace.enter(|| {
        let mut ebpf = EbpfLoader::new().load(OBJECT)?;
        let program: &mut Xdp = ebpf.program_mut(name::BENCH_SINK).context("no bench_sink")?.try_into()?;
        program.load()?;
        program.attach(interface, XdpMode::Driver)?;
        Ok(ebpf)
    })
}

/// An ESP packet of `length` bytes from the client to the relay, with its link header.
fn frame(lab: &Lab, length: usize) -> Result<Vec<u8>> {
    ensure!((48..=1500).contains(&length), "--length {length}: must be 48 to 1500");
    let to = mac(End { namespace: &lab.relay, interface: "left" })?;
    let from = mac(End { namespace: &lab.generator, interface: "out" })?;
    let mut header = vec![0x45, 0];
    header.extend(u16::try_from(length)?.to_be_bytes());
    header.extend([0, 1, 0x40, 0, 64, 50, 0, 0]);
    header.extend(CLIENT.octets());
    header.extend(RELAY_LEFT.octets());
    let (words, _) = header.as_chunks::<2>();
    let sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let check = !u16::try_from((folded & 0xffff) + (folded >> 16))?;
    if let Some(place) = header.get_mut(10..12) {
        place.copy_from_slice(&check.to_be_bytes());
    }
    let mut frame = [to, from, vec![8, 0], header].concat();
    frame.extend(SPI.to_be_bytes());
    frame.extend([0, 0, 0, 1]);
    frame.resize(14 + length, 0xa5);
    Ok(frame)
}

/// Lowest, median and highest.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or_default();
    [at(0), at(values.len() / 2), at(values.len().saturating_sub(1))]
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(rustix::process::geteuid().is_root(), "network namespaces and XDP need root");
    ensure!((1..=100).contains(&arguments.rounds), "--rounds: must be 1 to 100");
    ensure!(arguments.packets <= 1 << 26, "--packets: must be at most {}", 1 << 26);
    let lab = Lab::build()?;
    let frames = arguments.lengths.iter().map(|length| frame(&lab, *length)).collect::<Result<Vec<_>>>()?;
    let mut results = vec![[Vec::new(), Vec::new()]; frames.len()];
    for _ in 0..arguments.rounds {
        for (column, path) in RelayPath::ALL.into_iter().enumerate() {
            let node = lab.start(path, arguments.worker)?;
            for (frame, result) in frames.iter().zip(&mut results) {
                let rate = lab.measure(&arguments, frame)?;
                result.get_mut(column).context("two paths")?.push(rate);
            }
            let relayed = node.verdict("relayed")?;
            ensure!((relayed > 0) == (path == RelayPath::Xdp), "{}: {relayed} packets in XDP", path.name());
        }
    }
    print(&arguments, results);
    Ok(())
}

fn print(arguments: &Arguments, results: Vec<[Vec<f64>; 2]>) {
    if !arguments.json {
        println!("Mpps delivered over veth, {} rounds: median (lowest to highest)", arguments.rounds);
        println!("{:>6}  {:>22}  {:>22}  {:>5}", "bytes", "XDP", "AF_XDP worker", "ratio");
    }
    for (length, [xdp, worker]) in arguments.lengths.iter().zip(results) {
        let [xdp, worker] = [spread(xdp), spread(worker)].map(|values| values.map(|rate| rate / 1e6));
        let ([low, median, high], [worker_low, worker_median, worker_high]) = (xdp, worker);
        let ratio = median / worker_median;
        if arguments.json {
            let line = serde_json::json!({
                "bytes": length,
                "xdp_mpps": { "median": median, "min": low, "max": high },
                "worker_mpps": { "median": worker_median, "min": worker_low, "max": worker_high },
                "ratio": ratio,
            });
            println!("{line}");
        } else {
            let column = |low: f64, median: f64, high: f64| format!("{median:.2} ({low:.2} to {high:.2})");
            println!(
                "{length:>6}  {:>22}  {:>22}  {ratio:>5.2}",
                column(low, median, high),
                column(worker_low, worker_median, worker_high)
            );
        }
    }
}
