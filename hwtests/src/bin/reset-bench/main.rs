//! The reset bench: a backup of many IKE SAs, a control process that finds it after a crash, and survivors that act only on
//! what is authentic; for each strategy, and beside it what negotiating anew costs. And what keeping the backup costs
//! while connections come up.

mod journal;
mod negotiate;
mod restore;

use std::collections::HashMap;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use nix::sys::socket::{setsockopt, sockopt};
use postern_control::recovery::{Access, keys};
use postern_hwtests::node::{binary, write_private};
use postern_hwtests::process::{Background, run};
use postern_ike::crypto::sk::{Opener, Protection, Sealer};
use postern_ike::message::parse::{self, Body};
use postern_ike::message::registry::{EncrId, ExchangeType, IntegId, PayloadType};
use postern_ike::message::{Head, IkeSpi, emit};
use postern_ike::output::Path;
use postern_ike::record::{PeerTag, SavedBody, SavedIke, Unanswered, V2Context};
use postern_ike::{Random, Secret};
use postern_nvram::{Change, Key, NoCounter, Options, Store};
use ring::rand::{SecureRandom, SystemRandom};
use rustix::process::Signal;
use serde_json::Value;

/// Writes the backup of a gateway with many IKE SAs, starts postern-control on it as after a crash, answers as the peers
/// would, and prints how long it took until all were told, and what the backup takes.
///
/// Everything is on loopback, in one survivor thread; run it where nothing else is busy. The kinds:
///
/// delete, prebuilt: until the last peer has answered, at the configured pace. built/s: Deletes that one core builds.
///
/// restore: until all IKE SAs are there again (their CHILD_SAs follow when the datapath takes them; there is none here).
/// built/s: IKE SAs with a child that one core brings back. paced: until all have new keys.
///
/// negotiate: what has to be done instead where nothing is saved, once peers have found out: built/s are handshakes that
/// one core can do as the responder; the time is computed from that.
#[derive(Parser)]
#[command(name = "postern-reset-bench")]
struct Arguments {
    /// IKE SAs
    #[arg(long, value_delimiter = ',', default_value = "300,10000,100000")]
    sas: Vec<u32>,
    /// What is compared: delete, prebuilt, restore, negotiate
    #[arg(long, value_delimiter = ',', default_value = "delete,prebuilt,restore,negotiate")]
    kinds: Vec<String>,
    /// Instead: how fast IKE SAs come up with the backup on, against off; so many of them
    #[arg(long, value_name = "COUNT", num_args = 0..=1, default_missing_value = "4000")]
    journal: Option<u32>,
    /// With --journal: connections that come up at the same time
    #[arg(long, default_value_t = 256)]
    concurrent: u32,
    /// Where the backup is written; as a rule a temporary directory
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Messages a second; 0: no limit
    #[arg(long, default_value_t = 100_000)]
    rate: u32,
    /// With delete and prebuilt: control is killed so often in the middle of its burst, each time at a random moment after
    /// its first message, and started again
    #[arg(long, default_value_t = 0)]
    kills: u32,
    /// UDP port of the gateway; the next one is its port for NAT, the one after that the survivors'
    #[arg(long, default_value_t = 15_500)]
    port: u16,
}

struct System(SystemRandom);

impl Random for System {
    fn fill(&mut self, out: &mut [u8]) {
        // Numbers of a bench: what is not filled is zero.
        let _ = self.0.fill(out);
    }
}

/// One peer's side of an IKE SA.
struct Survivor {
    opener: Opener,
    sealer: Sealer,
    initiator: bool,
    expected: u32,
    deleted: u32,
    /// All that came of the other side, if control is killed: message ID, IV, and the message.
    seen: Vec<(u32, [u8; 8], Vec<u8>)>,
}

impl Survivor {
    /// Whether a message ID or an IV was used before with other content.
    fn contradicts(&mut self, message_id: u32, sealed: &[u8], message: &[u8]) -> bool {
        let Some(iv) = sealed.first_chunk::<8>() else { return true };
        let same = |(id, other, _): &&(u32, [u8; 8], Vec<u8>)| *id == message_id || other == iv;
        if let Some((_, _, before)) = self.seen.iter().find(same) {
            return before != message;
        }
        self.seen.push((message_id, *iv, message.to_vec()));
        false
    }
}

/// What the survivors tell while they survive.
#[derive(Default)]
struct Told {
    stop: AtomicBool,
    /// Messages that have come.
    messages: AtomicU64,
    /// Message IDs or IVs with more than one content.
    contradictions: AtomicU64,
}

/// All peers, by SPIs.
type Survivors = HashMap<(IkeSpi, IkeSpi), Survivor>;

/// What one run gave.
struct Row {
    kind: String,
    sas: u32,
    bytes_a_sa: f64,
    builds: f64,
    first: f64,
    all: f64,
    /// The pace alone would take so long, in milliseconds.
    paced: f64,
    messages: u64,
    answered: u64,
    deleted: u32,
    twice: u32,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(count) = arguments.journal {
        return journal::compare(count, arguments.concurrent, &scratch(&arguments));
    }
    let mut rows = Vec::new();
    for kind in &arguments.kinds {
        for sas in &arguments.sas {
            rows.push(one(&arguments, kind, *sas)?);
        }
    }
    println!(
        "{:10} {:>8} {:>10} {:>14} {:>14} {:>14} {:>14} {:>10} {:>9} {:>9} {:>6}",
        "kind",
        "IKE SAs",
        "bytes/SA",
        "built/s/core",
        "first sent ms",
        "recovered ms",
        "paced ms",
        "messages",
        "answered",
        "deleted",
        "twice"
    );
    for row in &rows {
        let Row { kind, sas, bytes_a_sa, builds, first, all, paced, messages, answered, deleted, twice } =
            row;
        println!(
            "{kind:10} {sas:>8} {bytes_a_sa:>10.0} {builds:>14.0} {first:>14.1} {all:>14.1} {paced:>14.1} {messages:>10} {answered:>9} {deleted:>9} {twice:>6}"
        );
    }
    let told = |row: &&Row| ["delete", "prebuilt"].contains(&row.kind.as_str());
    ensure!(
        rows.iter().filter(told).all(|row| row.deleted == row.sas && row.twice == 0),
        "not all were deleted once"
    );
    Ok(())
}

/// A directory of this process.
fn scratch(arguments: &Arguments) -> PathBuf {
    let parent = arguments.directory.clone().unwrap_or_else(std::env::temp_dir);
    parent.join(format!("postern-reset-bench-{}", std::process::id()))
}

fn one(arguments: &Arguments, kind: &str, sas: u32) -> Result<Row> {
    let dir = scratch(arguments);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(dir.join("state"))?;
    let result = match kind {
        "delete" | "prebuilt" => measure(arguments, kind, sas, &dir),
        "restore" => restore::measure(arguments, sas, &dir),
        "negotiate" => negotiate::measure(sas),
        _ => Err(anyhow::anyhow!("no kind is called {kind}")),
    };
    fs::remove_dir_all(&dir)?;
    result.with_context(|| format!("{kind}, {sas} IKE SAs"))
}

fn measure(arguments: &Arguments, kind: &str, sas: u32, dir: &FilePath) -> Result<Row> {
    let port = arguments.port;
    let socket = UdpSocket::bind(("127.0.0.2", port + 2))?;
    setsockopt(&socket, sockopt::RcvBufForce, &(256 << 20))?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let path =
        Path { local: SocketAddr::from(([127, 0, 0, 1], port)), remote: socket.local_addr()?, natt: false };
    let (records, survivors) = make(sas, path)?;
    let builds = build_rate(&records);
    let bytes = store(dir, kind, records)?;
    write_life(dir)?;

    let told = Arc::new(Told::default());
    let shared = Arc::clone(&told);
    let killed = arguments.kills > 0;
    let peers = std::thread::spawn(move || survive(&socket, survivors, killed, &shared));
    write_private(&dir.join("postern.toml"), &config(arguments, dir))?;
    let control = kills(arguments.kills, dir, &told);
    let report = control.and_then(|mut control| {
        let done = |report: &Value| report.pointer("/burst/done") == Some(&Value::Bool(true));
        let report = watch(dir, &mut control, done);
        control.end(Signal::TERM, Duration::from_secs(5));
        report
    });
    told.stop.store(true, Ordering::Relaxed);
    let survivors = peers.join().map_err(|_| anyhow::anyhow!("the survivors panicked"))??;
    let report = report.with_context(|| fs::read_to_string(dir.join("log")).unwrap_or_default())?;
    let number = |key: &str| report.pointer(&format!("/burst/{key}")).and_then(Value::as_u64);
    let millis = |key: &str| number(key).map_or(f64::NAN, |us| Duration::from_micros(us).as_secs_f64() * 1e3);
    // An answer that is lost does not come again: who has deleted its SA says nothing more.
    let ended = number("told").unwrap_or_default() + number("unanswered").unwrap_or_default();
    ensure!(killed || ended == u64::from(sas), "{report}");
    let contradictions = told.contradictions.load(Ordering::Relaxed);
    ensure!(
        contradictions == 0,
        "{contradictions} message IDs or IVs were used twice with different content"
    );
    Ok(Row {
        kind: kind.to_owned(),
        sas,
        bytes_a_sa: bytes / f64::from(sas),
        builds,
        first: millis("first_message_us"),
        all: millis("last_answer_us"),
        paced: f64::from(sas) * 1e3 / f64::from(arguments.rate),
        messages: number("messages").unwrap_or_default(),
        answered: number("told").unwrap_or_default(),
        deleted: u32::try_from(survivors.values().filter(|survivor| survivor.deleted > 0).count())?,
        twice: u32::try_from(survivors.values().filter(|survivor| survivor.deleted > 1).count())?,
    })
}

/// Control as it is after so many kills.
fn kills(count: u32, dir: &FilePath, told: &Told) -> Result<Background> {
    let mut random = System(SystemRandom::new());
    let mut control = start(dir)?;
    for number in 0..count {
        let before = told.messages.load(Ordering::Relaxed);
        let began = Instant::now();
        while told.messages.load(Ordering::Relaxed) == before {
            let in_time = began.elapsed() < Duration::from_secs(20);
            ensure!(in_time, "the burst was over before kill {number}: more SAs, or a lower rate");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(random.u64() % 60_000));
        let heard = told.messages.load(Ordering::Relaxed) - before;
        println!("kill {} after {heard} messages of this life", number + 1);
        control.kill()?;
        control = start(dir)?;
    }
    Ok(control)
}

/// Of a control process without a datapath.
fn config(arguments: &Arguments, dir: &FilePath) -> String {
    format!(
        "[datapath]\nsocket = \"{d}/datapath.sock\"\nstate = \"{d}/datapath\"\nstart = false\n\
         [control]\nsocket = \"{d}/control.sock\"\nstate = \"{d}/state\"\n\
         [ike]\nport = {}\nnat_port = {}\n[recovery]\nrate = {}\n",
        arguments.port,
        arguments.port + 1,
        arguments.rate,
        d = dir.display()
    )
}

fn start(dir: &FilePath) -> Result<Background> {
    let mut command = std::process::Command::new(binary("postern-control")?);
    command.arg("--config").arg(dir.join("postern.toml")).env("NO_COLOR", "1");
    Background::start(&mut command, &dir.join("log"))
}

/// What the process before wrote last: that it runs.
fn write_life(dir: &FilePath) -> Result<()> {
    let text = r#"{"boot_id":"BOOT","ended":null}"#.replace("BOOT", &boot_id());
    Ok(fs::write(dir.join("state/life"), text)?)
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Both sides of so many IKE SAs.
fn make(sas: u32, path: Path) -> Result<(Vec<SavedIke>, Survivors)> {
    let mut random = System(SystemRandom::new());
    let protection =
        Protection::from_numbers(EncrId::AES_GCM_16, 128, IntegId::NONE).context("AES-GCM-128")?;
    let (mut records, mut survivors) = (Vec::new(), HashMap::new());
    for number in 0..sas {
        let spis = (IkeSpi(random.u64()), IkeSpi(random.u64()));
        let initiator = number % 2 == 0;
        let key = |random: &mut System| Secret::new(random.bytes(protection.encr_length()));
        let (own, peer) = (key(&mut random), key(&mut random));
        let survivor = Survivor {
            opener: Opener::from_saved(protection, &own).context("keys")?,
            sealer: Sealer::from_saved(protection, &peer).context("keys")?,
            initiator: !initiator,
            expected: number % 100,
            deleted: 0,
            seen: Vec::new(),
        };
        survivors.insert(spis, survivor);
        let context =
            V2Context { protection, own, peer, next_request: number % 100, unanswered: Unanswered::None };
        records.push(SavedIke {
            spis,
            initiator,
            connection: "roadwarriors".into(),
            peer: PeerTag::of(&format!("client{number}@example.org")),
            path,
            expires: SystemTime::now() + Duration::from_hours(1),
            body: SavedBody::V2Context(context),
        });
    }
    Ok((records, survivors))
}

/// Deletes that one core builds in a second.
fn build_rate(records: &[SavedIke]) -> f64 {
    let began = Instant::now();
    let mut built = 0_u32;
    while began.elapsed() < Duration::from_millis(300) {
        for record in records.iter().take(1000) {
            if let SavedBody::V2Context(context) = &record.body
                && let Some(builder) = context.builder(record.spis, record.initiator)
            {
                built += u32::from(!std::hint::black_box(builder.build(context.next_request)).is_empty());
            }
        }
    }
    f64::from(built) / began.elapsed().as_secs_f64()
}

/// Writes the backup as the gateway would; gives its size.
fn store(dir: &FilePath, kind: &str, records: Vec<SavedIke>) -> Result<f64> {
    let directory = dir.join("state/recovery");
    let (recipient, _) = keys::prepare(&directory, &Access::default())?;
    let mut store = Store::open(Options::new(directory.join("backup")), &recipient, Box::new(NoCounter))?;
    for chunk in records.into_iter().collect::<Vec<_>>().chunks_mut(1000) {
        let mut changes = Vec::new();
        for record in chunk {
            let prebuilt = match (&record.body, kind) {
                (SavedBody::V2Context(context), "prebuilt") => {
                    Some(context.prebuilt(record.spis, record.initiator))
                }
                (_, "delete" | "restore") => None,
                _ => bail!("no kind of record is called {kind}"),
            };
            if let Some(prebuilt) = prebuilt {
                record.body = SavedBody::Prebuilt(prebuilt);
            }
            changes.push(Change::Put { key: Key(record.key()), record: record.encode() });
        }
        store.commit(&changes)?;
    }
    let bytes = store.checkpoint()?.bytes;
    Ok(f64::from(u32::try_from(bytes)?))
}

/// Answers until told to stop.
fn survive(socket: &UdpSocket, mut survivors: Survivors, killed: bool, told: &Told) -> Result<Survivors> {
    let mut buffer = [0; 2048];
    let mut random = System(SystemRandom::new());
    while !told.stop.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let Some(message) = buffer.get(..length) else { continue };
        let Ok(parsed) = parse::message(message) else { continue };
        let Some(survivor) = survivors.get_mut(&(parsed.head.spi_i, parsed.head.spi_r)) else { continue };
        told.messages.fetch_add(1, Ordering::Relaxed);
        let Body::Encrypted { first_inner: PayloadType::DELETE, aad, sealed } = parsed.body else { continue };
        let Head { spi_i, spi_r, message_id, .. } = parsed.head;
        if killed {
            if survivor.contradicts(message_id, sealed, message) {
                told.contradictions.fetch_add(1, Ordering::Relaxed);
            }
            // Whose answer was lost is told again, and has nothing any more that it could delete.
            if survivor.deleted > 0 {
                continue;
            }
        }
        if message_id != survivor.expected || survivor.opener.open(aad, sealed).is_none() {
            continue;
        }
        survivor.expected += 1;
        survivor.deleted += 1;
        let head = Head {
            spi_i,
            spi_r,
            exchange: ExchangeType::INFORMATIONAL,
            from_initiator: survivor.initiator,
            response: true,
            message_id,
        };
        let prefix = emit::sk_prefix(&head, PayloadType::NONE, survivor.sealer.sealed_length(0));
        socket.send_to(&survivor.sealer.seal(&mut random, prefix, &[]), from)?;
    }
    Ok(survivors)
}

/// Waits until it is `done`.
fn watch(dir: &FilePath, control: &mut Background, done: impl Fn(&Value) -> bool) -> Result<Value> {
    let began = Instant::now();
    while began.elapsed() < Duration::from_mins(2) {
        std::thread::sleep(Duration::from_millis(100));
        ensure!(control.runs(), "postern-control has ended");
        let mut command = std::process::Command::new(binary("postern")?);
        command.arg("--socket").arg(dir.join("control.sock")).args(["recover", "--json"]);
        let Ok(text) = run(&mut command) else { continue };
        let report: Value = serde_json::from_str(&text)?;
        if done(&report) {
            return Ok(report);
        }
    }
    bail!("not done after {:?}", began.elapsed())
}
