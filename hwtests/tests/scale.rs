//! DP-2: how long many SAs take to install through the contract, and how much memory they need.
//!
//! A datapath process of the release build, with XDP on two veth interfaces, one worker and its ledger on disk, is given
//! pairs of SAs with a policy each, as control describes them by default: AES-128-GCM with keys of its own for every SA,
//! ESN, a replay window of 1024, a host behind each peer. Bounds are asserted, figures printed.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use postern_contract::request::{Done, Operation, Reply, Request, Status};
use postern_contract::sa::{
    Action, AddressRange, Direction, Encryption, FanOut, Integrity, IpsecProtocol, KeyOrigin, Lifetime, Mode,
    PathPolicy, Policy, PolicyId, SaConfig, SaId, Selector, Suite,
};
use postern_contract::secret::Secret;
use postern_contract::transport::{Connection, Ready};
use postern_contract::{Generation, Translation, VERSION};
use postern_hwtests::netns::{Netns, janitor, scratch_dir, unique_prefix};
use postern_hwtests::process::{Background, run, wait_for};
use postern_hwtests::veth::{End, Wire};
use postern_wire::ids::Spi;

/// Pairs in one message: each is three operations of together some 400 bytes.
const PAIRS: u32 = 64;
/// Messages under way: the rest of the socket's buffer is for the answers.
const IN_FLIGHT: u32 = 64;

/// 100,000 SAs with their policies are in use 2 s after the first of them was sent.
#[test]
fn dp_2_a_hundred_thousand_sas_in_two_seconds() -> Result<()> {
    let mut gateway = Gateway::start("slots100k", 1 << 17)?;
    let requests: Vec<Request> = requests(50_000).collect();
    let before = gateway.resident()?;
    let spent = gateway.install(requests.into_iter())?;
    let after = gateway.resident()?;
    gateway.check(50_000)?;
    println!(
        "100,000 SAs and 50,000 policies: {spent:.2?}, {} MiB before, {} MiB after",
        mib(before),
        mib(after)
    );
    ensure!(spent < Duration::from_secs(2), "{spent:?}");
    Ok(())
}

/// DP-2: 1,000,000 SAs with their policies, and all else that the process needs, fit in 1 GiB.
#[test]
fn dp_2_a_million_sas_in_a_gibibyte() -> Result<()> {
    let mut gateway = Gateway::start("slots1m", 1 << 20)?;
    let before = gateway.resident()?;
    let spent = gateway.install(requests(500_000))?;
    let after = gateway.resident()?;
    gateway.check(500_000)?;
    println!(
        "1,000,000 SAs and 500,000 policies: {spent:.2?}, {} MiB before, {} MiB after, {} bytes an SA; XDP maps (kernel): {} MiB",
        mib(before),
        mib(after),
        (after - before) / 1_000_000,
        mib(gateway.maps()?),
    );
    ensure!(after < 1 << 30, "{after} bytes");
    Ok(())
}

const fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// A datapath process with nothing but its contract.
struct Gateway {
    process: Background,
    control: Connection,
    dir: PathBuf,
    /// Last: the process ends first.
    _namespaces: [Netns; 2],
}

impl Gateway {
    fn start(name: &str, sa_slots: u32) -> Result<Self> {
        let program = release_build()?;
        janitor();
        let prefix = unique_prefix();
        let (gateway, hosts) = (Netns::create(&prefix, "g1")?, Netns::create(&prefix, "hosts")?);
        for interface in ["wan0", "lan0"] {
            let here = End { namespace: &gateway, interface };
            Wire::default().connect(here, End { namespace: &hosts, interface })?;
        }
        gateway.sh("ip address add 192.0.2.1/24 dev wan0")?;
        gateway.sh("ip address add 10.1.0.1/24 dev lan0")?;
        let dir = scratch_dir(&prefix)?;
        let socket = dir.join("datapath.sock");
        let text = format!(
            "[datapath]\nsocket = '{}'\nstate = '{}'\nsa_slots = {sa_slots}\nframes = 8192\n\
             interface = [{{ name = \"wan0\", role = \"outside\" }}, {{ name = \"lan0\", role = \"inside\" }}]\n",
            socket.display(),
            dir.join("state").display()
        );
        let config = dir.join(format!("{name}.toml"));
        std::fs::write(&config, text)?;
        let log = dir.join("log");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", gateway.name()]).arg(program).arg("--config").arg(config);
        let process = Background::start(&mut command, &log)?;
        let control = wait_for("the datapath's socket", Duration::from_secs(10), || {
            Ok(Connection::connect(&socket).ok())
        })
        .with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
        let mut this = Self { process, control, dir, _namespaces: [gateway, hosts] };
        this.control.set_timeout(Some(Duration::from_secs(30)));
        match this.ask(&Request::Hello { version: VERSION })? {
            Reply::Hello { .. } => Ok(this),
            other => bail!("{other:?}"),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Reply> {
        self.control.send(request)?;
        Ok(self.control.receive()?)
    }

    /// Sends the requests, many at a time, and gives the time until the last of them was acknowledged.
    fn install(&mut self, requests: impl Iterator<Item = Request>) -> Result<Duration> {
        let mut requests = requests.peekable();
        let start = Instant::now();
        let (mut sent, mut answered) = (0, 0);
        while answered < sent || requests.peek().is_some() {
            if sent - answered < IN_FLIGHT
                && let Some(request) = requests.peek()
                && self.control.try_send(request)?
            {
                requests.next();
                sent += 1;
                continue;
            }
            let ready =
                self.control.wait(Ready { receive: true, send: false }, Some(Duration::from_secs(30)))?;
            ensure!(ready.receive, "no answer within 30 s");
            while let Some(reply) = self.control.try_receive()? {
                let Reply::Applied { results, .. } = reply else { bail!("{reply:?}") };
                let bad = results.iter().find(|result| **result != Ok(Done::Applied));
                ensure!(bad.is_none(), "{bad:?}");
                answered += 1;
            }
        }
        Ok(start.elapsed())
    }

    /// The datapath has as many of everything as it should, and steers to each.
    fn check(&mut self, pairs: u32) -> Result<()> {
        let Reply::Status(status) = self.ask(&Request::Status)? else { bail!("no status") };
        let Status { sas, policies, ref workers, .. } = status;
        ensure!((sas, policies) == (2 * u64::from(pairs), pairs.into()), "{sas} SAs, {policies} policies");
        let [worker] = workers.as_slice() else { bail!("{} workers", workers.len()) };
        ensure!((worker.inbound_sas, worker.outbound_sas) == (pairs.into(), pairs.into()), "{worker:?}");
        let Reply::Sa(Some(last)) = self.ask(&Request::Sa(SaId(2 * u64::from(pairs))))? else {
            bail!("the last SA is missing")
        };
        ensure!(last.direction == Direction::Outbound && last.counters.sequence == 0, "{last:?}");
        let log = std::fs::read_to_string(self.dir.join("log"))?;
        ensure!(!log.contains("ERROR"), "{log}");
        Ok(())
    }

    /// The datapath itself: `ip netns exec` becomes the program it starts.
    fn proc(&self, part: &str) -> PathBuf {
        Path::new("/proc").join(self.process.pid().to_string()).join(part)
    }

    /// Bytes of memory in use.
    fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(self.proc("status"))?;
        kib(&status, "VmRSS:").context("no VmRSS")
    }

    /// Bytes of the XDP programs' maps, which the kernel keeps outside the process.
    fn maps(&self) -> Result<u64> {
        let infos = std::fs::read_dir(self.proc("fdinfo"))?;
        let texts = infos.filter_map(|info| std::fs::read_to_string(info.ok()?.path()).ok());
        let sizes = texts.filter(|text| text.contains("map_type:")).filter_map(|text| {
            text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse::<u64>().ok())
        });
        Ok(sizes.sum())
    }
}

fn kib(text: &str, field: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(value.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// The program as it is shipped; these bounds say nothing about a debug build. Built here, so that it is never older than
/// its source; `hwtests/test` has built it before.
fn release_build() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    // target/<profile>/deps/<this>
    let target = own.ancestors().nth(3).context("no target directory")?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--quiet", "--release", "--package", "postern-datapath", "--target-dir"])
        .arg(target);
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    // What cargo tells this test about its own package; build scripts that look at it would build everything again.
    for (name, _) in std::env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|own| name.to_string_lossy().starts_with(own)) {
            cargo.env_remove(name);
        }
    }
    run(&mut cargo)?;
    Ok(target.join("release/postern-datapath"))
}

fn requests(pairs: u32) -> impl Iterator<Item = Request> {
    (0..pairs.div_ceil(PAIRS)).map(move |token| {
        let operations = (token * PAIRS..pairs.min((token + 1) * PAIRS)).flat_map(pair).collect();
        Request::Apply { token: token.into(), operations }
    })
}

/// The SAs to and from one peer, and the policy for the one host behind it.
fn pair(number: u32) -> [Operation; 3] {
    let host = IpAddr::from(Ipv4Addr::from(0x0b00_0000 + number));
    let peer = IpAddr::from(Ipv4Addr::from(0xac10_0000 + number));
    let range = |start, end| AddressRange { start, end };
    let selector = Selector {
        local: range([10, 1, 0, 0].into(), [10, 1, 0, 255].into()),
        remote: range(host, host),
        protocol: None,
        local_ports: 0..=u16::MAX,
        remote_ports: 0..=u16::MAX,
    };
    let id = |direction| SaId(2 * u64::from(number) + if direction == Direction::Inbound { 1 } else { 2 });
    let sa = |direction, other| {
        Operation::InstallSa(Box::new(SaConfig {
            id: id(direction),
            generation: Generation(1),
            direction,
            protocol: IpsecProtocol::Esp,
            mode: Mode::Tunnel,
            spi: Translation::same(Spi(0x1000_0000 + number)),
            local: Translation::same([192, 0, 2, 1].into()),
            remote: Translation::same(peer),
            encap: None,
            suite: Suite {
                encryption: Encryption::AesGcm16,
                encryption_key: key(id(direction)),
                integrity: Integrity::None,
                integrity_key: Secret::empty(),
            },
            esn: true,
            replay_window: if direction == Direction::Inbound { 1024 } else { 0 },
            sequence: u64::from(direction == Direction::Outbound),
            selectors: vec![selector.clone()],
            lifetime: Lifetime::default(),
            path: PathPolicy::default(),
            follow_peer: true,
            pair: Some(id(other)),
            bundle: None,
            origin: KeyOrigin::Static,
            worker: None,
            fan_out: FanOut::ByLoad,
        }))
    };
    let policy = Policy {
        id: PolicyId(u64::from(number) + 1),
        generation: Generation(1),
        priority: 1000,
        selectors: vec![selector.clone()],
        action: Action::Protect(Some(id(Direction::Outbound))),
    };
    [
        sa(Direction::Inbound, Direction::Outbound),
        sa(Direction::Outbound, Direction::Inbound),
        Operation::InstallPolicy(policy),
    ]
}

/// Key and salt, different for each SA (Steele, Lea, Flood: splitmix64).
fn key(id: SaId) -> Secret {
    let words = (0..3_u64).map(|word| {
        let mut z = (id.0 * 3 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    });
    Secret::new(words.flat_map(u64::to_be_bytes).take(20).collect::<Vec<_>>())
}
