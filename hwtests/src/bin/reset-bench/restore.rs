//! The strategy `restore`: records of a real handshake, multiplied; how fast they are brought back, and how long a control
//! process takes for all of them.

use std::fs;
use std::net::SocketAddr;
use std::path::Path as FilePath;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use postern_control::config;
use postern_hwtests::load::{self, System};
use postern_hwtests::node::write_private;
use postern_ike::config::Strategy;
use postern_ike::message::IkeSpi;
use postern_ike::output::{Effect, Path, Persist};
use postern_ike::record::{SavedBody, SavedIke};
use postern_ike::{Endpoint, Random, Secret};
use rustix::process::Signal;
use serde_json::Value;

use crate::negotiate::{address, plan};
use crate::{Arguments, Row, start, store, watch, write_life};

/// New keys in a second, after all are back (`postern_ike::endpoint::restore`).
const RENEWALS: f64 = 200.0;

/// Records that are brought back in one go.
const CHUNK: u32 = 1000;

const CONNECTION: &str = "[[connection]]\nname = \"roadwarriors\"\nremote_nets = [\"127.0.0.0/8\"]\nreset = \"restore\"\n\
    local_auth = { method = \"psk\", id = \"gateway.example.org\", secret = \"a shared secret of some length\" }\n\
    remote_auth = { method = \"psk\", id = \"*@load\", secret = \"a shared secret of some length\" }\n\
    [[connection.child]]\nname = \"net\"\nlocal_net = [\"10.254.0.0/16\"]\nremote_net = [\"10.0.0.0/8\"]\n";

pub fn measure(arguments: &Arguments, sas: u32, dir: &FilePath) -> Result<Row> {
    let file = dir.join("postern.toml");
    write_private(&file, &(crate::config(arguments, dir) + CONNECTION))?;
    let config = config::load(&file)?;
    let connection = &config.ike.connections.first().context("no connection")?.ike;
    let (name, fingerprint) = (connection.name.clone(), connection.fingerprint);
    let local = SocketAddr::from(([127, 0, 0, 1], arguments.port));
    let remote = SocketAddr::from(([127, 0, 0, 2], arguments.port + 2));
    let path = Path { local, remote, natt: false };

    let pattern = pattern()?;
    let builds = rate(&pattern)?;
    let mut records = Vec::new();
    for number in 0..sas {
        let mut record = another(&pattern, number)?;
        record.path = path;
        record.connection = name.clone();
        if let SavedBody::Whole(whole) = &mut record.body {
            whole.fingerprint = *fingerprint.first_chunk().context("a fingerprint")?;
        }
        records.push(record);
    }
    let bytes = store(dir, "restore", records)?;
    write_life(dir)?;
    let mut control = start(dir)?;
    let report = watch(dir, &mut control, |report| report.pointer("/restored").is_some());
    control.end(Signal::KILL, Duration::from_secs(5));
    let report = report.with_context(|| fs::read_to_string(dir.join("log")).unwrap_or_default())?;
    ensure!(report.pointer("/restored").and_then(Value::as_u64) == Some(sas.into()), "{report}");
    let took = report.pointer("/restored_us").and_then(Value::as_u64).context("no time")?;
    Ok(Row {
        kind: "restore".to_owned(),
        sas,
        bytes_a_sa: bytes / f64::from(sas),
        builds,
        first: f64::NAN,
        all: Duration::from_micros(took).as_secs_f64() * 1e3,
        paced: f64::from(sas) * 1e3 / RENEWALS,
        messages: 0,
        answered: 0,
        deleted: 0,
        twice: 0,
    })
}

/// What a gateway saves of one client.
fn pattern() -> Result<SavedIke> {
    let plan = plan(Strategy::Restore)?;
    let now = load::now();
    let mut gateway = plan.gateway(now)?;
    let mut client = plan.client(now, 1, address(1))?;
    let mut random = System::default();
    let mut saved = None;
    load::begin(&mut client, now)?;
    for _ in 0..8 {
        let mut under_way = Vec::new();
        load::pump(&mut client, now, &mut |job| job.run(&mut random), &mut under_way, |_| {});
        for (path, datagram) in under_way {
            let path = Path { local: path.remote, remote: path.local, natt: path.natt };
            gateway.handle_datagram(now, path, &datagram);
        }
        while let Some(output) = gateway.poll_output() {
            match output.effect {
                Effect::Transmit { path, datagram } => {
                    let path = Path { local: path.remote, remote: path.local, natt: path.natt };
                    client.handle_datagram(now, path, &datagram);
                }
                Effect::Compute { id, job } => gateway.computed(now, id, job.run(&mut random)),
                Effect::Install(child) => gateway.installed(now, child.id, Ok(())),
                Effect::Persist(Persist::Put(record)) => saved = Some(*record),
                _ => {}
            }
        }
    }
    saved.context("nothing was saved")
}

/// The same with names and keys of its own.
fn another(pattern: &SavedIke, number: u32) -> Result<SavedIke> {
    let mut random = System::default();
    let random: &mut dyn Random = &mut random;
    let mut record = SavedIke::decode(&pattern.encode())?;
    record.spis = (IkeSpi(random.u64()), IkeSpi(random.u64()));
    record.expires = SystemTime::now() + Duration::from_hours(1);
    let SavedBody::Whole(whole) = &mut record.body else { anyhow::bail!("the record is not whole") };
    whole.identity.data = format!("client{number}@load").into_bytes();
    let mut renew = |secret: &mut Secret| *secret = Secret::new(random.bytes(secret.len()));
    renew(&mut whole.context.own);
    renew(&mut whole.context.peer);
    renew(&mut whole.sk_d);
    for child in &mut whole.children {
        for key in [&mut child.keys_in.0, &mut child.keys_out.0] {
            renew(key);
        }
    }
    for child in &mut whole.children {
        // Those that come in are this side's, which never gives one out twice.
        (child.spi_in, child.spi_out) =
            ((number + 1) << 9 | 0x100 | random.u32() & 0xff, random.u32() | 0x100);
    }
    Ok(record)
}

/// IKE SAs with a child that one core brings back in a second: records read, SAs made, and what has to be done for them
/// (children to be installed, records to be saved) handed out.
fn rate(pattern: &SavedIke) -> Result<f64> {
    let plan = plan(Strategy::Restore)?;
    let encoded: Vec<_> = (0..CHUNK)
        .map(|number| another(pattern, number).map(|record| record.encode()))
        .collect::<Result<_>>()?;
    let (mut restored, began) = (0_u32, Instant::now());
    while began.elapsed() < Duration::from_millis(500) {
        let mut gateway: Endpoint = plan.gateway(load::now())?;
        let records = encoded.iter().map(|bytes| SavedIke::decode(bytes)).collect::<Result<Vec<_>, _>>()?;
        let refused = gateway.restore(load::now(), records);
        ensure!(refused.is_empty(), "{} cannot go on", refused.len());
        while let Some(output) = gateway.poll_output() {
            std::hint::black_box(output);
        }
        restored += CHUNK;
    }
    Ok(f64::from(restored) / began.elapsed().as_secs_f64())
}
