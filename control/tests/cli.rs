//! Both programs from end to end, with a mock datapath behind them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::unnecessary_debug_formatting,
    reason = "a test program: a panic is its way to fail"
)]

mod mock;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mock::{Mock, Scratch, eventually, tunnel};
use rustix::process::{Pid, Signal, kill_process};

/// A running postern-control, ended when dropped.
struct Daemon {
    child: Child,
}

impl Daemon {
    fn start(scratch: &Scratch, arguments: &[&str]) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_postern-control"))
            .arg("--config")
            .arg(scratch.path("postern.toml"))
            .args(arguments)
            .stderr(std::fs::OpenOptions::new().create(true).append(true).open(scratch.path("log")).unwrap())
            .spawn()
            .unwrap();
        let daemon = Self { child };
        eventually("the management socket is there", || scratch.path("control.sock").exists());
        daemon
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn wait(&mut self) -> Option<i32> {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(20) {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("postern-control does not end");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_config(scratch: &Scratch, datapath: &str, rest: &str) {
    let text = format!(
        "[datapath]\nsocket = {:?}\nstate = {:?}\n{datapath}[control]\nsocket = {:?}\nstate = {:?}\n\
         datapath_program = {:?}\n{rest}",
        scratch.path("datapath.sock"),
        scratch.path("datapath"),
        scratch.path("control.sock"),
        scratch.path("control"),
        scratch.path("datapath-program"),
    );
    let path = scratch.path("postern.toml");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn postern(scratch: &Scratch, arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_postern"))
        .arg("--socket")
        .arg(scratch.path("control.sock"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let Output { status, stdout, stderr } = output;
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn json(scratch: &Scratch, arguments: &[&str]) -> serde_json::Value {
    let mut all = arguments.to_vec();
    all.push("--json");
    let (code, stdout, stderr) = postern(scratch, &all);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

/// OPS-3: what Prometheus gets, over HTTP as it asks.
#[test]
fn ops_3_metrics_over_http() {
    let scratch = Scratch::new("metrics");
    let _mock = Mock::start(&scratch.path("datapath.sock"), 7);
    let port = {
        // Free again at once, and not given away soon.
        let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        probe.local_addr().unwrap().port()
    };
    let metrics = format!("metrics = \"127.0.0.1:{port}\"\nmetrics_of_tunnels = true\n");
    write_config(&scratch, "", &format!("{metrics}{}", tunnel("site-a", 1, "1a")));
    let _daemon = Daemon::start(&scratch, &[]);
    let get = |path: &str| {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    eventually("in step", || get("/metrics").contains("\npostern_datapath_up 1\n"));
    eventually("installed", || get("/metrics").contains("\npostern_tunnel_up{tunnel=\"site-a\"} 1\n"));
    let answer = get("/metrics");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\ncontent-type: application/openmetrics-text"), "{answer}");
    assert!(answer.contains("\npostern_drops_total{reason=\"bad_icv\"} 7\n"), "{answer}");
    assert!(answer.contains("\npostern_latency_nanoseconds{quantile=\"0.99\"} 4000\n"), "{answer}");
    assert!(answer.ends_with("# EOF\n"), "{answer}");
    assert!(get("/").starts_with("HTTP/1.1 404"));
}

/// OPS-3: every command, for people and as JSON.
#[test]
fn ops_3_every_command_answers() {
    let scratch = Scratch::new("cli");
    let mock = Mock::start(&scratch.path("datapath.sock"), 7);
    let relay = "[[relay]]\nname = \"joe\"\n\
        client = { relay = \"192.0.2.10\", peer = \"192.0.2.1\", esp = { to_relay = 0x3001, from_relay = 0x4001 } }\n\
        gateway = { relay = \"198.51.100.10\", peer = \"198.51.100.2\", esp = { to_relay = 0x3002, from_relay = 0x4002 } }\n";
    write_config(&scratch, "", &format!("{}{}{relay}", tunnel("site-a", 1, "1a"), tunnel("site-b", 2, "2b")));
    let mut daemon = Daemon::start(&scratch, &[]);
    let mode = std::fs::metadata(scratch.path("control.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "OPS-4: the management socket is private");
    eventually("in step", || json(&scratch, &["status"])["datapath"]["up"] == true);

    let status = json(&scratch, &["status"]);
    assert_eq!(status["tunnels"].as_array().unwrap().len(), 2);
    assert_eq!(status["tunnels"][0]["state"], "installed");
    assert_eq!(status["tunnels"][1]["in_packets"], 42);
    assert_eq!(status["datapath"]["workers"][0]["ports"][0]["counters"]["received"], 12_345);
    let (code, shown, _) = postern(&scratch, &["status"]);
    assert_eq!(code, 0);
    for expected in
        ["datapath  up 1m 1s", "4 SAs, 2 policies, 1 relay entries", "site-a  installed  tunnel", "12.3 k"]
    {
        assert!(shown.contains(expected), "{expected:?} is not in\n{shown}");
    }

    let sas = json(&scratch, &["sa", "site-a"]);
    assert_eq!(sas.as_array().unwrap().len(), 2);
    assert_eq!((&sas[0]["spi"], &sas[0]["direction"]), (&"0x00001001".into(), &"out".into()));
    assert_eq!(sas[0]["key_check"], "01d9b64816bab807");
    assert!(postern(&scratch, &["sa"]).1.contains("0x00020002"));
    assert_eq!(postern(&scratch, &["sa", "nobody"]).0, 6);

    let policies = json(&scratch, &["policy"]);
    assert_eq!(policies[0]["selectors"][0], "10.1.0.0/24 > 172.16.0.1");
    assert!(postern(&scratch, &["policy"]).1.contains("protect"));
    assert_eq!(json(&scratch, &["relay"])[0]["client"]["spis"][0], "esp 0x00003001 > 0x00004001");
    assert!(postern(&scratch, &["relay"]).1.contains("198.51.100.2"));
    let drops = json(&scratch, &["drops"]);
    assert_eq!(
        (&drops["reasons"][0]["reason"], &drops["reasons"][0]["packets"]),
        (&"bad_icv".into(), &7.into())
    );
    assert!(postern(&scratch, &["drops"]).1.contains("The integrity check failed."));
    assert_eq!(json(&scratch, &["latency"])["p99"], 4000);
    assert!(postern(&scratch, &["latency"]).1.contains("4.0 µs"));
    assert_eq!(json(&scratch, &["version"])["datapath"], "mock");

    // OPS-2: reload.
    let applies = || mock.tables.lock().unwrap().applies;
    let before = applies();
    write_config(&scratch, "frames = 1024\n", &tunnel("site-a", 1, "1a"));
    let report = json(&scratch, &["reload", "--dry-run"]);
    assert_eq!((report["changes"].as_array().unwrap().len(), report["dry_run"].as_bool()), (4, Some(true)));
    assert!(report["notes"][0].as_str().unwrap().starts_with("[datapath] changed"));
    assert_eq!(applies(), before);
    write_config(&scratch, "", &tunnel("site-a", 1, "zz"));
    let (code, _, stderr) = postern(&scratch, &["reload"]);
    assert_eq!(code, 3);
    assert!(stderr.contains("postern.toml:13:27: error: `tunnel[site-a].out.key`"), "{stderr}");
    assert_eq!(applies(), before, "with an error in the file nothing is touched");
    write_config(&scratch, "", &tunnel("site-a", 1, "1a"));
    let (code, shown, _) = postern(&scratch, &["reload"]);
    assert_eq!((code, shown.lines().last()), (0, Some("4 changes, 0 refused")), "{shown}");
    assert_eq!(mock.tables.lock().unwrap().sas.len(), 2);
    write_config(&scratch, "", &format!("{}{}", tunnel("site-a", 1, "1a"), tunnel("site-c", 3, "4d")));
    daemon.signal(Signal::HUP);
    eventually("SIGHUP reloads", || mock.tables.lock().unwrap().sas.len() == 4);

    // A second instance must not disturb the first.
    let second = Command::new(env!("CARGO_BIN_EXE_postern-control"))
        .arg("--config")
        .arg(scratch.path("postern.toml"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(4));
    assert_eq!(json(&scratch, &["status"])["datapath"]["up"], true);

    // DP-7: kill -9 of control and a new one.
    let before = applies();
    daemon.signal(Signal::KILL);
    daemon.wait();
    assert_eq!(postern(&scratch, &["status"]).0, 4);
    let mut daemon = Daemon::start(&scratch, &[]);
    eventually("in step again", || postern(&scratch, &["status"]).1.contains("datapath  up"));
    assert_eq!(applies(), before, "the datapath was adopted untouched");

    // A datapath that is gone is shown as such, and its tunnels do not vanish.
    drop(mock);
    eventually("down", || json(&scratch, &["status"])["datapath"]["up"] == false);
    let status = json(&scratch, &["status"]);
    assert_eq!(
        (status["tunnels"].as_array().unwrap().len(), &status["tunnels"][0]["state"]),
        (2, &"down".into())
    );
    assert_eq!(postern(&scratch, &["drops"]).0, 5);
    assert!(postern(&scratch, &["status"]).1.contains("datapath  DOWN"));

    assert_eq!(postern(&scratch, &["shutdown"]).0, 0);
    assert_eq!(daemon.wait(), Some(0));
    assert!(!scratch.path("control.sock").exists());
    let log = std::fs::read_to_string(scratch.path("log")).unwrap();
    assert!(!log.contains("1a1a1a") && log.contains("adopted the datapath as it is"), "{log}");
}

/// DP-7: control starts the datapath in a session of its own, starts it again when it died, and leaves it when it ends.
#[test]
fn dp_7_the_datapath_is_started_and_outlives_control() {
    let scratch = Scratch::new("launch");
    let program = scratch.path("datapath-program");
    // Stands for the datapath: says who it is, and stays.
    let script = format!(
        "#!/bin/sh\necho \"$$ $(ps -o sid= -p $$) $*\" >> {}\nexec sleep 60\n",
        scratch.path("lives").display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    write_config(&scratch, "start = true\n", "");
    let mut daemon = Daemon::start(&scratch, &[]);
    let lives = || {
        let text = std::fs::read_to_string(scratch.path("lives")).unwrap_or_default();
        text.lines()
            .map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    eventually("started", || lives().len() == 1);
    let first = lives().remove(0);
    assert_eq!(first[0], first[1], "it leads a session of its own: {first:?}");
    assert_eq!(first[2..], ["--config".to_owned(), scratch.path("postern.toml").display().to_string()]);
    let pid = |life: &[String]| Pid::from_raw(life[0].parse().unwrap()).unwrap();
    kill_process(pid(&first), Signal::KILL).unwrap();
    eventually("started again", || lives().len() == 2);
    let second = lives().remove(1);
    eventually("the end is logged", || {
        std::fs::read_to_string(scratch.path("log")).unwrap().contains("the datapath ended after")
    });
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait(), Some(0));
    let alive = Path::new("/proc").join(&second[0]).exists();
    kill_process(pid(&second), Signal::KILL).unwrap();
    assert!(alive, "it goes on without control");
}

/// Exit codes of what needs no daemon.
#[test]
fn exit_codes_are_distinct() {
    let scratch = Scratch::new("codes");
    write_config(&scratch, "", &tunnel("a", 1, "1a"));
    let file = scratch.path("postern.toml").display().to_string();
    let (code, stdout, _) = postern(&scratch, &["config", "check", &file]);
    assert_eq!(code, 0);
    assert!(stdout.contains("no error; 1 tunnels"), "{stdout}");
    write_config(&scratch, "cores = [0, 0]\n", "");
    let (code, _, stderr) = postern(&scratch, &["config", "check", &file]);
    assert_eq!(code, 3);
    assert!(stderr.contains("processor 0 is named twice"), "{stderr}");
    assert_eq!(postern(&scratch, &["config", "check", "/nonexistent.toml"]).0, 3);
    assert_eq!(postern(&scratch, &["sta"]).0, 2);
    assert_eq!(postern(&scratch, &["status"]).0, 4);
    assert_eq!(postern(&scratch, &["--help"]).0, 0);
    let check =
        Command::new(env!("CARGO_BIN_EXE_postern-control")).args(["--check", "--config", &file]).output();
    assert_eq!(check.unwrap().status.code(), Some(3));
    let bare = std::fs::read_to_string(&file).unwrap().replace("cores = [0, 0]", "start = true");
    let nowhere = format!("{:?}", scratch.path("datapath-program"));
    std::fs::write(&file, bare.replace(&nowhere, "\"postern-nowhere\"")).unwrap();
    let start = Command::new(env!("CARGO_BIN_EXE_postern-control")).args(["--config", &file]).output();
    assert_eq!(start.unwrap().status.code(), Some(5));
}
