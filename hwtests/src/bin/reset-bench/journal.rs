//! What the backup costs while connections come up (RST-1): the same gateway takes as many clients with the journal on and
//! off, in turns.
//!
//! The engine and the journal are the real ones, the journal's thread and its directory too: an IKE SA's answer waits until
//! its record is durable, as in the daemon, while others go on. Clients are in the same process, and there is no
//! network, no socket and no datapath. Two rates are given: with the clients' time left out, that of one core that does
//! nothing but handshakes as the responder (what the gateway waits for the storage while clients compute does not show
//! in it); and with it, all that passed on the clock.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::net::IpAddr;
use std::path::Path as FilePath;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use postern_control::recovery::{Access, Committed, Journal, Opening, keys};
use postern_hwtests::load::{self, Event, Plan, System};
use postern_ike::Endpoint;
use postern_ike::config::Strategy;
use postern_ike::job::Job;
use postern_ike::output::{Effect, Path, Persist, SaId};
use postern_ike::report::Report;
use postern_nvram::{Change, Key, Place};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::negotiate::{address, plan};

/// Runs of each kind.
const RUNS: usize = 5;

/// The gateway as the driver drives it.
struct Gateway {
    endpoint: Endpoint,
    journal: Option<(Journal, UnboundedReceiver<Committed>)>,
    blocked: HashMap<SaId, VecDeque<Effect>>,
    changes: Vec<Change>,
    waiting: Vec<SaId>,
    up: u32,
    random: System,
}

pub fn compare(count: u32, concurrent: u32, dir: &FilePath) -> Result<()> {
    let result = runs(count, concurrent, dir);
    let _ = fs::remove_dir_all(dir);
    let (on, off, p99) = result?;
    println!(
        "{count} clients, {concurrent} at a time, {RUNS} runs each in turns; X25519, shared secret; backup in {}",
        dir.parent().unwrap_or(dir).display()
    );
    println!("IKE SAs/s in one thread, no network and no datapath; medians");
    for (what, part) in [("responder alone", 0), ("with its clients", 1)] {
        let rate = |rates: &[[f64; 2]]| {
            let mut rates: Vec<f64> = rates.iter().filter_map(|both| both.get(part).copied()).collect();
            rates.sort_by(f64::total_cmp);
            rates.get(rates.len() / 2).copied().unwrap_or_default()
        };
        let (on, off) = (rate(&on), rate(&off));
        println!("{what:17} journal off {off:8.0}, on {on:8.0}: {:5.1} %", on / off * 100.0);
    }
    println!("a record was durable after {:.2} ms (99 %)", p99.as_secs_f64() * 1e3);
    Ok(())
}

/// Rates of the responder alone, and with its clients.
type Rates = [f64; 2];

/// Rates with the journal on, rates with it off, and the longest of the on runs' 99 % of waiting times.
fn runs(count: u32, concurrent: u32, dir: &FilePath) -> Result<(Vec<Rates>, Vec<Rates>, Duration)> {
    let plan = plan(Strategy::Delete)?;
    let (mut on, mut off, mut p99) = (Vec::new(), Vec::new(), Duration::ZERO);
    run(&plan, count / 4, concurrent, None)?;
    for number in 0..RUNS {
        off.push(run(&plan, count, concurrent, None)?.0);
        let (rate, time) = run(&plan, count, concurrent, Some(&dir.join(number.to_string())))?;
        on.push(rate);
        p99 = p99.max(time.unwrap_or_default());
    }
    Ok((on, off, p99))
}

fn run(
    plan: &Plan,
    count: u32,
    concurrent: u32,
    dir: Option<&FilePath>,
) -> Result<(Rates, Option<Duration>)> {
    let journal = dir.map(open).transpose()?;
    let mut gateway = Gateway {
        endpoint: plan.gateway(load::now())?,
        journal,
        blocked: HashMap::new(),
        changes: Vec::new(),
        waiting: Vec::new(),
        up: 0,
        random: System::default(),
    };
    let mut random = System::default();
    let mut clients: HashMap<IpAddr, Endpoint> = HashMap::new();
    let (mut begun, mut done, mut spent) = (0, 0, Duration::ZERO);
    let mut to_gateway: Vec<(Path, Vec<u8>)> = Vec::new();
    let start = Instant::now();
    while done < count {
        while begun < count && u32::try_from(clients.len())? < concurrent {
            begun += 1;
            let mut client = plan.client(load::now(), begun, address(begun))?;
            load::begin(&mut client, load::now())?;
            pump_client(&mut client, &mut random, &mut to_gateway)?;
            clients.insert(address(begun), client);
        }
        let before = Instant::now();
        let answers = gateway.turn(&mut to_gateway)?;
        spent += before.elapsed();
        for (path, datagram) in answers {
            let Some(client) = clients.get_mut(&path.remote.ip()) else { continue };
            client.handle_datagram(load::now(), reverse(path), &datagram);
            if pump_client(client, &mut random, &mut to_gateway)? {
                clients.remove(&path.remote.ip());
                done += 1;
            }
        }
    }
    let wall = start.elapsed();
    ensure!(gateway.up == count, "{} of {count} came up", gateway.up);
    let p99 = gateway.journal.as_ref().and_then(|(journal, _)| journal.stats().latency.quantile(990));
    if let Some((journal, _)) = &gateway.journal {
        let stats = journal.stats();
        ensure!(stats.problem.is_none() && stats.records == u64::from(count), "{stats:?}");
    }
    Ok(([spent, wall].map(|time| f64::from(count) / time.as_secs_f64()), p99))
}

fn open(dir: &FilePath) -> Result<(Journal, UnboundedReceiver<Committed>)> {
    let (recipient, _) = keys::prepare(dir, &Access::default()).context("keys")?;
    let (committed, durable) = unbounded_channel();
    let opening = Opening {
        place: Place::Directory(dir.join("backup")),
        checkpoint: Duration::from_mins(5),
        recipient,
        access: Access::default(),
        carried: Vec::new(),
        keep_older: false,
    };
    let journal = Journal::start(opening, committed)?;
    let (done, open) = tokio::sync::oneshot::channel();
    journal.is_open(done);
    ensure!(open.blocking_recv()?, "the backup cannot be opened");
    Ok((journal, durable))
}

const fn reverse(path: Path) -> Path {
    Path { local: path.remote, remote: path.local, natt: path.natt }
}

/// Whether its child is up.
fn pump_client(client: &mut Endpoint, random: &mut System, out: &mut Vec<(Path, Vec<u8>)>) -> Result<bool> {
    let (mut up, mut down) = (false, None);
    let mut run = |job: Job| job.run(random);
    load::pump(client, load::now(), &mut run, out, |event| match event {
        Event::Up => up = true,
        Event::Down(why) => down = Some(why),
    });
    ensure!(down.is_none(), "a client failed: {}", down.unwrap_or_default());
    Ok(up)
}

impl Gateway {
    /// Takes what clients sent and gives the answers; waits for the storage if there is nothing else to do.
    fn turn(&mut self, incoming: &mut Vec<(Path, Vec<u8>)>) -> Result<Vec<(Path, Vec<u8>)>> {
        let mut answers = Vec::new();
        let idle = incoming.is_empty();
        for (path, datagram) in incoming.drain(..) {
            self.endpoint.handle_datagram(load::now(), reverse(path), &datagram);
            self.pump(&mut answers);
        }
        let mut durable = Vec::new();
        if let Some((journal, committed)) = &mut self.journal {
            if !self.changes.is_empty() {
                journal.commit(std::mem::take(&mut self.changes), std::mem::take(&mut self.waiting));
            }
            if idle && answers.is_empty() {
                durable.extend(committed.blocking_recv().context("the journal has ended")?);
            }
            while let Ok(more) = committed.try_recv() {
                durable.extend(more);
            }
        }
        for sa in durable {
            let Some(mut effects) = self.blocked.remove(&sa) else { continue };
            while let Some(effect) = effects.pop_front() {
                if self.perform(sa, effect, &mut answers) {
                    self.blocked.insert(sa, effects);
                    break;
                }
            }
        }
        self.pump(&mut answers);
        Ok(answers)
    }

    fn pump(&mut self, answers: &mut Vec<(Path, Vec<u8>)>) {
        while let Some(output) = self.endpoint.poll_output() {
            let sa = output.sa.unwrap_or(SaId(0));
            match self.blocked.get_mut(&sa) {
                Some(behind) => behind.push_back(output.effect),
                None => {
                    if self.perform(sa, output.effect, answers) {
                        self.blocked.insert(sa, VecDeque::new());
                    }
                }
            }
        }
    }

    /// Whether the IKE SA has to wait.
    fn perform(&mut self, sa: SaId, effect: Effect, answers: &mut Vec<(Path, Vec<u8>)>) -> bool {
        match effect {
            Effect::Transmit { path, datagram } => answers.push((path, datagram)),
            Effect::Compute { id, job } => {
                let done = job.run(&mut self.random);
                self.endpoint.computed(load::now(), id, done);
            }
            Effect::Install(child) => self.endpoint.installed(load::now(), child.id, Ok(())),
            Effect::Report(Report::ChildUp { .. }) => self.up += 1,
            Effect::Persist(Persist::Put(saved)) if self.journal.is_some() => {
                self.changes.push(Change::Put { key: Key(saved.key()), record: saved.encode() });
                self.waiting.push(sa);
                return true;
            }
            _ => {}
        }
        false
    }
}
