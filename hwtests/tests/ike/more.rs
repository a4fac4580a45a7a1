//! What one gateway pair over IPv4 does not show: IKE over IPv6, transport mode, extended sequence numbers, a start on the
//! first packet, reloads under traffic, and port 4500 changing hands between control and the datapath.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::config::ike::{Connection, Link};
use postern_hwtests::netns::Netns;
use postern_hwtests::party::{Party, SETTLE};
use postern_hwtests::peer::Version;
use postern_hwtests::process::wait_for;
use postern_hwtests::stage::{Stage, host, postern, swan};
use postern_hwtests::topology::Family;
use postern_hwtests::traffic::{IperfServer, Ping};

/// What the left end's only child negotiated, in words.
fn suite(stage: &Stage) -> Result<String> {
    let rows = stage.left.node()?.json(&["connections"])?;
    let child = rows.pointer("/0/sas/0/children/0/suite").and_then(|suite| suite.as_str());
    child.map(str::to_owned).with_context(|| format!("no child in {rows}"))
}

/// IKE-1: both ends' outer addresses are IPv6.
#[test]
fn ike_1_over_ipv6() -> Result<()> {
    for version in Version::ALL {
        let stage = Stage::pair(&postern(), &swan(version))?;
        let link = Link { outer: stage.topology().outer(Family::V6), ..stage.link("six") };
        for from_left in [true, false] {
            stage
                .check(|stage| {
                    stage.load(&link)?;
                    let settled = stage.establish("six", from_left)?;
                    ensure!(settled.remote.parse::<IpAddr>()?.is_ipv6(), "{settled:?}");
                    stage.carry()?;
                    stage.left.rekey_child("six")?;
                    stage.agreed_where("six", "a rekey", |now| now.spi_in != settled.spi_in)?;
                    stage.carry()?;
                    stage.close("six", from_left)
                })
                .with_context(|| format!("{}, from the left: {from_left}", version.name()))?;
        }
    }
    Ok(())
}

/// IKE-1: extended sequence numbers (RFC 7296 section 3.3.2, transform type 5). strongSwan's userspace ESP has none, so
/// two Posterns agree on them, and with strongSwan on doing without.
#[test]
fn ike_1_extended_sequence_numbers() -> Result<()> {
    for (right, esp, expected) in [
        (postern(), "aes128gcm16-esn", "/EXT_SEQ"),
        (postern(), "aes256-sha256-esn", "/EXT_SEQ"),
        (swan(Version::V6), "aes128gcm16-noesn", "/NO_EXT_SEQ"),
    ] {
        let stage = Stage::pair(&postern(), &right)?;
        let link = Link { esp: esp.to_owned(), ..stage.link("esn") };
        stage.load(&link)?;
        stage.check(|stage| {
            let first = stage.establish("esn", true)?;
            ensure!(suite(stage)?.ends_with(expected), "{}", suite(stage)?);
            stage.carry()?;
            stage.right.rekey_child("esn")?;
            stage.agreed_where("esn", "a rekey", |now| now.spi_in != first.spi_in)?;
            ensure!(suite(stage)?.ends_with(expected), "after the rekey: {}", suite(stage)?);
            stage.carry()?;
            stage.close("esn", false)
        })?;
    }
    Ok(())
}

/// What is for the peer goes into the TUN device, except IKE and what the datapath itself sends.
fn into_the_device(namespace: &Netns, own: IpAddr, peer: IpAddr) -> Result<()> {
    let ip = if own.is_ipv4() { "ip -4" } else { "ip -6" };
    namespace.sh(&format!("{ip} route replace {peer} dev pt0 src {own} table 100"))?;
    // Packets of raw sockets that bring their own header have protocol 255 in the kernel's eyes.
    namespace.sh(&format!("{ip} rule add pref 10 ipproto 255 lookup main"))?;
    namespace.sh(&format!("{ip} rule add pref 11 ipproto udp sport 500 lookup main"))?;
    namespace.sh(&format!("{ip} rule add pref 12 ipproto udp sport 4500 lookup main"))?;
    namespace.sh(&format!("{ip} rule add pref 20 to {peer} lookup 100")).map(drop)
}

/// IKE-1: transport mode (RFC 7296 section 1.3.1, `USE_TRANSPORT_MODE`) between two hosts, over both IP versions. Of
/// strongSwan only the kernel's ESP has transport mode, which these peers do not use.
#[test]
fn ike_1_transport_mode() -> Result<()> {
    for family in Family::ALL {
        let stage = Stage::pair(&host(), &host())?;
        let ends = stage.topology().outer(family);
        let nets = (ends.0.to_string(), ends.1.to_string());
        let link = Link { outer: ends, nets, ..stage.link("hosts") };
        let transport = |mut view: Connection| {
            if let Some(child) = view.child() {
                child.mode = Some("transport");
            }
            view
        };
        stage.left.load(vec![transport(link.left())], vec![])?;
        stage.right.load(vec![transport(link.right())], vec![])?;
        stage.check(|stage| {
            let (g1, g2) = (stage.topology().ns("g1")?, stage.topology().ns("g2")?);
            into_the_device(g1, ends.0, ends.1)?;
            into_the_device(g2, ends.1, ends.0)?;
            let server = IperfServer::start(g2, ends.1, stage.topology().dir())?;
            for from_left in [true, false] {
                let first = stage.establish("hosts", from_left)?;
                let sas = stage.left.node()?.json(&["sa"])?.to_string();
                ensure!(sas.contains("transport"), "no SA is in transport mode: {sas}");
                Ping::default().all(g1, ends.1)?;
                Ping::default().all(g2, ends.0)?;
                server.tcp_bytes(g1, 500_000)?;
                stage.left.rekey_child("hosts")?;
                stage.agreed_where("hosts", "a rekey", |now| now.spi_in != first.spi_in)?;
                server.tcp_bytes(g1, 500_000)?;
                stage.close("hosts", from_left)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// OPS-2: a reload that adds, changes and removes other connections leaves this one alone: the same SAs, and no datagram
/// is lost.
#[test]
fn ops_2_reload_loses_nothing() -> Result<()> {
    let stage = Stage::pair(&postern(), &swan(Version::V6))?;
    let link = stage.link("stays");
    let other = |secret: &str| {
        let mut view = link.left();
        "other".clone_into(&mut view.name);
        view.remote = Some([192, 0, 2, 77].into());
        for auth in [&mut view.local_auth, &mut view.remote_auth] {
            auth.secret = Some(secret.to_owned());
        }
        if let Some(child) = view.child() {
            "other".clone_into(&mut child.name);
            child.remote_net = vec!["10.77.0.0/24".to_owned()];
        }
        view
    };
    stage.load(&link)?;
    stage.check(|stage| {
        let before = stage.establish("stays", true)?;
        stage.carry()?;
        stage.without_loss(|| {
            for others in [vec![], vec![other("first secret")], vec![other("second secret")], vec![]] {
                let all = std::iter::once(link.left()).chain(others).collect();
                stage.left.load(all, vec![])?;
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        })?;
        ensure!(stage.agreed("stays")? == before, "the connection was begun anew");
        stage.carry()?;
        // What is changed is closed, at the peer too.
        let mut changed = link.left();
        changed.dpd_s = 17;
        stage.left.load(vec![changed], vec![])?;
        stage.right.quiet()
    })
}

/// IKE-1: `start = "trap"`: the first packet brings the connection up, at either family of peers, and one that waited
/// for it is not sent in the clear.
#[test]
fn ike_1_traffic_starts_it() -> Result<()> {
    for right in [swan(Version::V5), swan(Version::V6), postern()] {
        let stage = Stage::pair(&postern(), &right)?;
        let link = stage.link("trapped");
        let mut near = link.left();
        if let Some(child) = near.child() {
            child.start = Some("trap");
        }
        stage.right.load(vec![link.right()], vec![])?;
        stage.left.load(vec![near], vec![])?;
        stage.check(|stage| {
            let (h1, _, _, far) = stage.hosts()?;
            for round in 0..2 {
                std::thread::sleep(Duration::from_millis(500));
                ensure!(stage.left.sas()? == 0, "round {round}: an IKE SA without traffic");
                let (first, _) = Ping { count: 1, ..Ping::default() }.run(h1, far)?;
                let settled = stage.agreed("trapped")?;
                ensure!(settled.initiator, "the peer began it");
                println!("round {round}: {} of {} first packets were answered", first.received, first.sent);
                stage.carry()?;
                stage.right.terminate("trapped")?;
                stage.left.quiet()?;
                stage.right.quiet()?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// OPS-1: on a host, control and the datapath share port 4500: whoever of them is restarted, and in whatever order,
/// control listens there afterwards, and while it is away no peer is told that nobody receives.
#[test]
fn ops_1_port_4500_changes_hands() -> Result<()> {
    let mut stage = Stage::roam(&host(), &swan(Version::V6))?;
    let held = |stage: &Stage, by: &str| -> Result<()> {
        let client = stage.topology().ns("client")?;
        wait_for(&format!("port 4500 at {by}"), SETTLE, || {
            let sockets = client.sh("ss -Huanp sport = :4500")?;
            Ok((sockets.contains(by)).then_some(()))
        })
    };
    held(&stage, "postern-control")?;
    stage.left.node_mut()?.kill_control()?;
    held(&stage, "postern-datapa")?;
    let old = stage.left.node()?.datapath_pid()?;
    stage.left.node_mut()?.start_control()?;
    held(&stage, "postern-control")?;
    stage.left.node_mut()?.kill_datapath()?;
    stage.left.node()?.wait_for_another_datapath(old)?;
    held(&stage, "postern-control")
}

/// IKE-1: a connection that starts by itself comes back by itself when its peer was dead, without traffic and without
/// `on_dpd` in the file.
#[test]
fn ike_1_comes_back_with_its_peer() -> Result<()> {
    for version in Version::ALL {
        let mut stage = Stage::pair(&postern(), &swan(version))?;
        let link = stage.link("kept");
        let (mut near, far) = (link.left(), link.right());
        near.dpd_s = 1;
        if let Some(child) = near.child() {
            (child.start, child.on_dpd) = (Some("start"), None);
        }
        stage.right.load(vec![far.clone()], vec![])?;
        stage.left.load(vec![near], vec![])?;
        let first = stage.agreed("kept").with_context(|| stage.report())?;
        stage.right.crash()?;
        // Longer than it takes to notice, and than the first attempt goes on.
        wait_for("the dead peer to be noticed", Duration::from_secs(30), || {
            Ok(stage.left.state("kept")?.is_none().then_some(()))
        })?;
        let explained = stage.left.node()?.cli(&["explain", "kept"])?;
        std::thread::sleep(Duration::from_secs(8));
        stage.right =
            Party::start(&swan(version), stage.topology().ns("g2")?, "right", stage.topology().dir())?;
        stage.right.load(vec![far], vec![])?;
        let back = std::time::Instant::now();
        let second = wait_for("the connection to be back", Duration::from_mins(1), || {
            let (left, right) = (stage.left.state("kept")?, stage.right.state("kept")?);
            Ok(left.zip(right).map(|(left, _)| left))
        })
        .with_context(|| stage.report())?;
        println!("{}: back {:?} after the peer; meanwhile: {explained}", version.name(), back.elapsed());
        ensure!(second.ike != first.ike, "the dead peer's IKE SA is still there");
        stage.check(Stage::carry)?;
    }
    Ok(())
}
