//! Resets on the wire (RST-4 to RST-7, RST-10): everything of Postern is killed at once and started again. The survivor is
//! an unmodified strongSwan, and does not look for dead peers: it learns what it learns from the Delete.

mod holders;
mod places;
mod secrets;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use postern_hwtests::config::ike::{Connection, Credential, Link, Pool};
use postern_hwtests::node::binary;
use postern_hwtests::party::{Make, Party};
use postern_hwtests::peer::Version;
use postern_hwtests::process::{run, wait_for};
use postern_hwtests::stage::{Stage, postern, swan};
use postern_hwtests::topology::Topology;
use postern_hwtests::traffic::{Ping, Stream};
use serde_json::Value;

const NAME: &str = "site";

/// Between the power failure and the next start.
const DARK: Duration = Duration::from_secs(1);

/// What one reset cost.
struct Outage {
    what: String,
    /// From the start of Postern to the first Delete on the wire.
    delete: Option<Duration>,
    /// From the start to the peer's answer.
    answer: Option<Duration>,
    /// From the start until traffic flows again.
    traffic: Duration,
}

fn print(rows: &[Outage]) {
    let millis = |time: Option<Duration>| {
        time.map_or("-".to_owned(), |time| format!("{:.1}", time.as_secs_f64() * 1e3))
    };
    println!(
        "{:44} {:>12} {:>12} {:>12}",
        "ms after the start of the reset side", "Delete sent", "answered", "traffic"
    );
    for Outage { what, delete, answer, traffic } in rows {
        println!("{what:44} {:>12} {:>12} {:>12}", millis(*delete), millis(*answer), millis(Some(*traffic)));
    }
}

fn microseconds(report: &Value, key: &str) -> Option<Duration> {
    report.pointer(&format!("/burst/{key}"))?.as_u64().map(Duration::from_micros)
}

/// Both views of the connection: who survives begins anew when its child is closed.
fn views(stage: &Stage) -> (Connection, Connection) {
    let link = stage.link(NAME);
    let (mut near, mut far) = (link.left(), link.right());
    (near.dpd_s, far.dpd_s) = (0, 0);
    if let Some(child) = far.child() {
        child.on_close = Some("start");
    }
    (near, far)
}

/// The version of IKE, with suites of it.
fn in_version(ike: u8, near: &mut Connection, far: &mut Connection) {
    if ike == 1 {
        for view in [near, far] {
            view.version = Some(1);
            view.proposals = vec!["aes128-sha256-ecp256".to_owned()];
        }
    }
}

/// The left party loses everything and comes back.
fn crash_and_restart(stage: &mut Stage, make: &Make, dark: Duration) -> Result<Instant> {
    stage.left.crash()?;
    std::thread::sleep(dark);
    let again = Instant::now();
    match &mut stage.left {
        Party::Postern { node, .. } => node.start_control()?,
        Party::Swan(_) => {
            let topology: &Topology = stage.topology();
            stage.left = Party::start(make, topology.ns("g1")?, "left", topology.dir())?;
        }
    }
    Ok(again)
}

/// From the start until traffic of the survivor arrives again.
fn outage(
    stage: &mut Stage,
    make: &Make,
    after: impl FnOnce(&Stage) -> Result<()>,
) -> Result<(Duration, Duration)> {
    let (h1, near, h2, _) = stage.hosts()?;
    let stream = Stream::start(h2, h1, near, 500, 100)?;
    std::thread::sleep(Duration::from_millis(500));
    let killed = Instant::now();
    let again = crash_and_restart(stage, make, DARK)?;
    after(stage)?;
    wait_for("traffic again", Duration::from_mins(1), || {
        let (h1, _, _, far) = stage.hosts()?;
        let (pings, _) = Ping { count: 1, ..Ping::default() }.run(h1, far)?;
        Ok((pings.received == 1).then_some(()))
    })
    .with_context(|| stage.report())?;
    std::thread::sleep(Duration::from_millis(300));
    let gap = stream.finish()?.longest_gap;
    let dark = again.duration_since(killed);
    Ok((gap.saturating_sub(dark), dark))
}

/// RST-5, RST-6: against both versions, on 500 and on 4500, with either side as the initiator and both kinds of record.
#[test]
fn rst_6_strongswan_survives() -> Result<()> {
    let mut rows = Vec::new();
    // Of 5.9.8 all is in UDP on 4500; of 6.0.1, what is told to be.
    for (ike, version, force_encap, from_left, kind) in [
        (2, Version::V6, false, false, "delete"),
        (2, Version::V6, false, true, "prebuilt"),
        (2, Version::V6, true, true, "delete"),
        (2, Version::V6, true, false, "prebuilt"),
        (2, Version::V5, false, false, "prebuilt"),
        (2, Version::V5, false, true, "delete"),
        (1, Version::V6, false, false, "delete"),
        (1, Version::V6, false, true, "prebuilt"),
        (1, Version::V6, true, true, "delete"),
        (1, Version::V6, true, false, "prebuilt"),
        (1, Version::V5, false, true, "delete"),
        (1, Version::V5, false, false, "prebuilt"),
    ] {
        let make = postern();
        let mut stage = Stage::pair(&make, &swan(version))?;
        let (mut near, mut far) = views(&stage);
        near.reset = Some(kind);
        if force_encap {
            (near.force_encap, far.force_encap) = (Some(true), Some(true));
        }
        in_version(ike, &mut near, &mut far);
        stage.left.load(vec![near], vec![])?;
        stage.right.load(vec![far], vec![])?;
        let before = stage.establish(NAME, from_left)?;
        stage.carry()?;
        let lines = stage.right.log_text().len();
        let mut report = Value::Null;
        let (traffic, _) = outage(&mut stage, &make, |stage| {
            let node = stage.left.node()?;
            report = wait_for("the peer to be told", Duration::from_secs(20), || {
                let report = node.json(&["recover"])?;
                Ok((report.pointer("/burst/done") == Some(&Value::Bool(true))).then_some(report))
            })?;
            Ok(())
        })
        .with_context(|| stage.report())?;
        let port = if before.encap { 4500 } else { 500 };
        ensure!(before.encap == (force_encap || version == Version::V5), "{before:?}");
        stage.check(|stage| {
            let log = stage.right.log_text();
            let log = log.get(lines..).unwrap_or_default();
            ensure!(log.contains("received DELETE for IKE_SA"), "the survivor has seen no Delete");
            ensure!(report.pointer("/cause") == Some(&Value::from("crashed")), "{report}");
            // IKEv1 has no answer to a Delete: it is said several times.
            let how = if ike == 1 { "/burst/sent" } else { "/burst/told" };
            ensure!(report.pointer(how) == Some(&Value::from(1)), "{report}");
            let after = stage.agreed(NAME)?;
            ensure!(after.ike != before.ike, "the IKE SA is the same");
            // Nothing of the old one is left, at either end.
            ensure!(stage.left.sas()? == 1 && stage.right.sas()? == 1);
            let backup = stage.left.node()?.json(&["snapshot"])?;
            ensure!(backup.pointer("/backup/records") == Some(&Value::from(1)), "{backup}");
            stage.carry()
        })?;
        rows.push(Outage {
            what: format!("IKEv{ike}, {kind}, survivor {} on {port}", version.name()),
            delete: microseconds(&report, "first_message_us"),
            answer: microseconds(&report, "last_answer_us"),
            traffic,
        });
    }
    for (version, from_left) in [(Version::V6, false), (Version::V5, true)] {
        rows.push(goes_on(version, from_left)?);
    }
    rows.push(between_strongswans()?);
    print(&rows);
    for row in rows.iter().filter(|row| !row.what.starts_with("strongSwan")) {
        ensure!(row.delete < Some(Duration::from_millis(250)), "{}: the Delete came late", row.what);
        ensure!(row.traffic < Duration::from_secs(4), "{}: traffic came back late", row.what);
    }
    Ok(())
}

/// With `reset = "restore"`: traffic is back without a negotiation, then everything gets new keys. The survivor sees no
/// Delete and no new IKE SA from the start.
fn goes_on(version: Version, from_left: bool) -> Result<Outage> {
    let make = postern();
    let mut stage = Stage::pair(&make, &swan(version))?;
    let (mut near, far) = views(&stage);
    near.reset = Some("restore");
    stage.left.load(vec![near], vec![])?;
    stage.right.load(vec![far], vec![])?;
    let before = stage.establish(NAME, from_left)?;
    stage.carry()?;
    let lines = stage.right.log_text().len();
    let (traffic, _) = outage(&mut stage, &make, |_| Ok(())).with_context(|| stage.report())?;
    stage.check(|stage| {
        let report = stage.left.node()?.json(&["recover"])?;
        ensure!(report.pointer("/cause") == Some(&Value::from("crashed")), "{report}");
        ensure!(report.pointer("/restored") == Some(&Value::from(1)), "{report}");
        ensure!(report.get("burst").is_none(), "{report}");
        stage.agreed_where(NAME, "new keys", |state| state.ike != before.ike)?;
        let log = stage.right.log_text();
        let log = log.get(lines..).unwrap_or_default();
        for word in ["received DELETE for IKE_SA NAME[1]", "IKE_SA_INIT", "IKE_AUTH"] {
            let word = word.replace("NAME", NAME);
            let first = log.find(&word);
            // The old IKE SA is deleted, but only by the rekey that replaced it.
            let rekeyed = log.find("CREATE_CHILD_SA").filter(|at| first.is_none_or(|first| *at < first));
            ensure!(
                !word.starts_with("IKE") || first.is_none(),
                "the survivor has {word} in its log:\n{log}"
            );
            ensure!(first.is_none() || rekeyed.is_some(), "{word} before any rekey:\n{log}");
        }
        ensure!(stage.left.sas()? == 1 && stage.right.sas()? == 1);
        let backup = stage.left.node()?.json(&["snapshot"])?;
        ensure!(backup.pointer("/backup/records") == Some(&Value::from(1)), "{backup}");
        stage.carry()
    })?;
    let port = if before.encap { 4500 } else { 500 };
    let what = format!("IKEv2, restore, survivor {} on {port}", version.name());
    Ok(Outage { what, delete: None, answer: None, traffic })
}

/// RST-9: the power fails while an exchange of either side is under way: it goes on, or, in the middle of a key exchange of
/// the reset side, the peer is told; traffic is back in either case.
#[test]
fn rst_9_restore_in_the_middle_of_exchanges() -> Result<()> {
    let make = postern();
    let mut stage = Stage::pair(&make, &swan(Version::V6))?;
    let (mut near, mut far) = views(&stage);
    near.reset = Some("restore");
    // Of an IKE SA that the peer made by a rekey whose answer was lost with the power, nobody can tell it anything.
    far.dpd_s = 3;
    if let Some(child) = far.child() {
        child.on_dpd = Some("start");
    }
    stage.left.load(vec![near], vec![])?;
    stage.right.load(vec![far], vec![])?;
    stage.establish(NAME, false)?;
    stage.carry()?;
    for round in 0..6_u64 {
        let busy = if round % 2 == 0 { &stage.left } else { &stage.right };
        match round / 2 {
            0 => busy.rekey_child(NAME)?,
            1 => busy.rekey_ike(NAME)?,
            _ => {
                busy.rekey_child(NAME)?;
                busy.rekey_ike(NAME)?;
            }
        }
        std::thread::sleep(Duration::from_millis(3 * round));
        stage.left.crash()?;
        std::thread::sleep(Duration::from_millis(300));
        let again = Instant::now();
        stage.left.node_mut()?.start_control()?;
        stage
            .check(|stage| {
                wait_for("traffic again", Duration::from_mins(1), || {
                    let (h1, _, _, far) = stage.hosts()?;
                    let (pings, _) = Ping { count: 1, ..Ping::default() }.run(h1, far)?;
                    Ok((pings.received == 1).then_some(()))
                })?;
                let took = again.elapsed();
                let report = stage.left.node()?.json(&["recover"])?;
                let restored = report.pointer("/restored").and_then(Value::as_u64);
                println!("round {round}: {restored:?} went on, traffic after {took:?}");
                stage.agreed(NAME)?;
                stage.carry()
            })
            .with_context(|| format!("round {round}"))?;
        // Everything has new keys before the next one.
        std::thread::sleep(Duration::from_secs(2));
    }
    Ok(())
}

/// What others do: the survivor finds out by dead peer detection, here every 5 s and with fast retransmission.
fn between_strongswans() -> Result<Outage> {
    let make = swan(Version::V6);
    let mut stage = Stage::pair(&make, &swan(Version::V6))?;
    let (near, mut far) = views(&stage);
    far.dpd_s = 5;
    if let Some(child) = far.child() {
        child.on_dpd = Some("start");
    }
    stage.left.load(vec![near.clone()], vec![])?;
    stage.right.load(vec![far], vec![])?;
    stage.establish(NAME, false)?;
    stage.carry()?;
    let (traffic, _) = outage(&mut stage, &make, |stage| stage.left.load(vec![near], vec![]))?;
    Ok(Outage {
        what: "strongSwan, survivor strongSwan, DPD 5 s".to_owned(),
        delete: None,
        answer: None,
        traffic,
    })
}

/// RST-9: the real control process is killed ten times in the middle of its burst, at random moments: all of the 6,000
/// peers, which act on nothing that is not authentic, are told; no message ID and no IV has two contents.
#[test]
fn rst_9_killed_in_the_burst() -> Result<()> {
    postern_hwtests::netns::janitor();
    for (kind, port) in [("delete", "15600"), ("prebuilt", "15610")] {
        let mut bench = std::process::Command::new(binary("postern-reset-bench")?);
        bench.args(["--sas", "6000", "--rate", "4000", "--kills", "10", "--kinds", kind, "--port", port]);
        println!("{}", run(&mut bench)?);
    }
    Ok(())
}

/// RST-10: a client behind a NAT is told where it was last seen, and comes back.
#[test]
fn rst_10_behind_nat() -> Result<()> {
    for version in Version::ALL {
        for ike in [2, 1] {
            behind_nat(ike, version).with_context(|| format!("IKEv{ike}, {}", version.name()))?;
        }
    }
    Ok(())
}

fn behind_nat(ike: u8, version: Version) -> Result<()> {
    let make = postern();
    let mut client = postern_hwtests::peer::Options::new(version);
    client.virtual_address = true;
    let mut stage = Stage::roam(&Make::Swan(client), &make)?;
    let link = Link {
        nets: ("dynamic".to_owned(), "10.2.0.0/24".to_owned()),
        auth: (Credential::psk("left.example"), Credential::psk("right.example")),
        ..stage.link(NAME)
    };
    let (mut near, mut far) = (link.left(), link.right());
    near.local.clear();
    near.request_address = vec!["v4"];
    near.dpd_s = 0;
    if let Some(child) = near.child() {
        child.on_close = Some("start");
    }
    far.remote = None;
    far.dpd_s = 0;
    far.pools = vec!["pool".to_owned()];
    in_version(ike, &mut near, &mut far);
    let pools = vec![Pool { name: "pool".to_owned(), range: "10.99.0.10-10.99.0.250".to_owned() }];
    stage.right.load(vec![far], pools)?;
    stage.left.load(vec![near], vec![])?;
    let before = stage.establish(NAME, true).with_context(|| stage.report())?;
    ensure!(before.encap, "no UDP encapsulation behind a NAT");
    stage.right.crash()?;
    std::thread::sleep(DARK);
    let again = Instant::now();
    stage.right.node_mut()?.start_control()?;
    stage.check(|stage| {
        let after = stage.agreed_where(NAME, "the client is back", |state| state.ike != before.ike)?;
        let (took, name) = (again.elapsed(), version.name());
        println!("IKEv{ike}, {name} behind a NAT: the client is back {took:?} after the start");
        ensure!(after.encap);
        let report = stage.right.node()?.json(&["recover"])?;
        if ike == 2 {
            ensure!(report.pointer("/burst/told") == Some(&Value::from(1)), "{report}");
        }
        ensure!(
            stage.left.log_text().contains("received DELETE for IKE_SA"),
            "the client has seen no Delete"
        );
        let (client, _, _, far) = stage.hosts()?;
        Ping::default().all(client, far)
    })
}

/// RST-4, RFC 6290: an IKE SA that was never saved is proven lost by its token, the first time that the survivor asks.
#[test]
fn rst_4_what_was_not_saved_is_proven_lost() -> Result<()> {
    let make = postern();
    let mut stage = Stage::pair(&make, &make)?;
    let (mut near, mut far) = views(&stage);
    near.reset = Some("none");
    far.dpd_s = 2;
    stage.left.load(vec![near], vec![])?;
    stage.right.load(vec![far], vec![])?;
    let before = stage.establish(NAME, false)?;
    stage.carry()?;
    let again = crash_and_restart(&mut stage, &make, DARK)?;
    stage.check(|stage| {
        stage.agreed_where(NAME, "a new IKE SA", |now| now.ike != before.ike)?;
        println!("not saved, DPD every 2 s: back {:?} after the start", again.elapsed());
        ensure!(stage.right.log_text().contains("the peer has lost it in a reset"), "it was not the token");
        let report = stage.left.node()?.json(&["recover"])?;
        ensure!(report.get("burst").is_none(), "something was saved: {report}");
        stage.carry()
    })
}

/// RST-4, DP-7: control alone is killed or restarted: the datapath forwards, nobody is told that anything is gone, and no
/// packet is lost.
#[test]
fn rst_4_control_restarts() -> Result<()> {
    let mut stage = Stage::pair(&postern(), &swan(Version::V6))?;
    let (mut near, far) = views(&stage);
    // With a known peer control begins anew at once, and the peer drops what it had before the new SA is installed here.
    near.remote = None;
    near.remote_nets = vec!["192.0.2.0/24".to_owned()];
    stage.left.load(vec![near], vec![])?;
    stage.right.load(vec![far], vec![])?;
    stage.establish(NAME, false)?;
    stage.carry()?;
    let lines = stage.right.log_text().len();
    for (how, cause) in [("killed", "control_died"), ("told to end", "restarted")] {
        let (h1, near, h2, far) = stage.hosts()?;
        let forth = Stream::start(h1, h2, far, 500, 100)?;
        let back = Stream::start(h2, h1, near, 500, 100)?;
        std::thread::sleep(Duration::from_millis(300));
        let node = stage.left.node_mut()?;
        if how == "killed" {
            node.kill_control()?;
        } else {
            node.end_control()?;
        }
        std::thread::sleep(Duration::from_millis(300));
        node.launch_control()?;
        std::thread::sleep(Duration::from_secs(2));
        let (forth, back) = (forth.finish()?, back.finish()?);
        let report = stage.left.node()?.json(&["recover"])?;
        stage.check(|stage| {
            ensure!(report.pointer("/cause") == Some(&Value::from(cause)), "{how}: {report}");
            ensure!(report.get("burst").is_none(), "{how}: {report}");
            ensure!(forth.lost() == 0 && back.lost() == 0, "{how}: {forth:?}, {back:?}");
            let log = stage.right.log_text();
            let log = log.get(lines..).unwrap_or_default();
            ensure!(!log.contains("received DELETE for IKE_SA"), "{how}: the peer was told to delete");
            Ok(())
        })?;
    }
    Ok(())
}
