//! Two daemons on loopback that negotiate with each other, each with a mock datapath, steered by `postern`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a test program: a panic is its way to fail"
)]

mod mock;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Output, Stdio};

use mock::{Mock, Scratch, eventually};

/// A gateway: daemon, mock datapath, directory.
struct Gateway {
    child: Child,
    mock: Mock,
    scratch: Scratch,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Port of first messages; they go on at port 4500, so that each test program has addresses of its own.
const PORT: u16 = 20_500;

fn address(number: u8) -> String {
    format!("127.9.{}.{number}", 1 + std::process::id() % 250)
}

impl Gateway {
    fn start(name: &str, number: u8, connections: &str) -> Self {
        let scratch = Scratch::new(name);
        let mock = Mock::start(&scratch.path("datapath.sock"), u64::from(number));
        let own = address(number);
        let text = format!(
            "[datapath]\nsocket = '{}'\nstate = '{}'\n[control]\nsocket = '{}'\nstate = '{}'\n\
             [ike]\naddresses = [\"{own}\"]\nport = {PORT}\n\
             retransmit_first_ms = 200\nretransmit_tries = 3\n{connections}",
            scratch.path("datapath.sock").display(),
            scratch.path("datapath").display(),
            scratch.path("control.sock").display(),
            scratch.path("control").display(),
        );
        let path = scratch.path("postern.toml");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(scratch.path("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_postern-control"))
            .arg("--config")
            .arg(path)
            .stderr(log)
            .spawn()
            .unwrap();
        let gateway = Self { child, mock, scratch };
        eventually("the management socket is there", || gateway.scratch.path("control.sock").exists());
        eventually("in step", || gateway.json(&["status"])["datapath"]["up"] == true);
        gateway
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_postern"));
        command.arg("--socket").arg(self.scratch.path("control.sock")).args(arguments).stdin(Stdio::null());
        command
    }

    fn postern(&self, arguments: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let mut all = arguments.to_vec();
        all.push("--json");
        let (code, stdout, stderr) = self.postern(&all);
        assert_eq!(code, 0, "{stdout}{stderr}");
        serde_json::from_str(&stdout).unwrap()
    }
}

/// A connection between two addresses.
fn connection(name: &str, own: u8, peer: u8, secret: &str) -> String {
    let (local, remote) = (address(own), address(peer));
    format!(
        "[[connection]]\nname = \"{name}\"\nlocal = [\"{local}\"]\nremote = \"{remote}\"\nremote_port = {PORT}\n\
         local_auth = {{ method = \"psk\", secret = \"{secret}\" }}\n\
         remote_auth = {{ method = \"psk\", secret = \"{secret}\" }}\n\
         [[connection.child]]\nname = \"net\"\nlocal_net = [\"10.{own}.0.0/24\"]\nremote_net = [\"10.{peer}.0.0/24\"]\n"
    )
}

/// OPS-3, IKE-1: up, everything that is shown of it, rekey, down; each waits for its end.
#[test]
fn ops_3_a_connection_from_up_to_down() {
    let a = Gateway::start("ike-a", 1, &connection("b", 1, 2, "correct horse battery"));
    let b = Gateway::start("ike-b", 2, &connection("a", 2, 1, "correct horse battery"));
    let (_, idle, _) = a.postern(&["explain", "b"]);
    assert!(idle.contains("b is not up. It waits for the peer, or for `postern up b`."), "{idle}");
    let mut follow = b.command(&["log", "--follow"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();

    let (code, shown, problem) = a.postern(&["up", "b"]);
    assert_eq!((code, problem.as_str()), (0, ""), "{shown}");
    assert!(
        shown.contains("b #1: IKE SA established with 127.9.") && shown.contains("CHILD_SA up"),
        "{shown}"
    );
    assert!(shown.ends_with("done\n"), "{shown}");
    let (code, again, _) = a.postern(&["up", "b"]);
    assert_eq!((code, again.as_str()), (0, "nothing had to be done\n"));
    assert!(lines.any(|line| line.unwrap().contains("CHILD_SA up")), "the follower on the other side saw it");

    let row = &a.json(&["connections", "b"])[0];
    assert_eq!(
        (row["state"].as_str(), row["sas"][0]["children"][0]["state"].as_str()),
        (Some("up"), Some("installed"))
    );
    let (_, table, _) = b.postern(&["connections"]);
    assert!(
        table.contains("responder") && table.contains("a/net") && table.contains("10.2.0.0/24 > 10.1.0.0/24"),
        "{table}"
    );
    assert_eq!(a.mock.tables.lock().unwrap().sas.len(), 2, "both directions are installed");
    eventually("the answerer has installed them too", || b.mock.tables.lock().unwrap().sas.len() == 2);

    // What the datapath holds is shown with the connection's name.
    let sas = a.json(&["sa"]);
    let names: Vec<_> = sas.as_array().unwrap().iter().map(|row| row["tunnel"].as_str().unwrap()).collect();
    assert!(names.len() == 2 && names.iter().all(|name| name.starts_with('b')), "{names:?}");
    assert!(sas.as_array().unwrap().iter().all(|row| row["state"] == "installed"), "{sas}");
    assert_eq!(a.json(&["sa", "b"]), sas);
    assert_eq!(a.json(&["sa", "b/net"]), sas);
    assert_eq!(a.postern(&["sa", "c"]).0, 6);
    let policies = a.json(&["policy"]);
    assert!(policies[0]["name"].as_str().unwrap().starts_with('b'), "{policies}");
    assert_eq!(policies[0]["state"], "installed");
    let status = a.json(&["status"]);
    assert_eq!(status["ike"]["ike_sas"], 1);
    assert_eq!(status["ike"]["connections"]["up"], 1);
    assert_eq!(status["problems"].as_array().unwrap().len(), 0, "{status}");
    let (_, shown, _) = a.postern(&["status"]);
    assert!(shown.contains("1 connections (1 up); 1 IKE SAs, 1 CHILD_SAs"), "{shown}");
    let (_, up, _) = a.postern(&["explain", "b"]);
    assert!(
        up.starts_with("b is up.\nIKE SA #1 with 127.9.") && up.contains("Child net is installed"),
        "{up}"
    );

    for arguments in [&["rekey", "b"][..], &["rekey", "b", "--child", "net"]] {
        let (code, shown, problem) = a.postern(arguments);
        assert_eq!(code, 0, "{arguments:?}: {shown}{problem}");
        assert!(shown.contains("rekeyed") && shown.ends_with("done\n"), "{shown}");
    }
    let (code, _, problem) = a.postern(&["rekey", "b", "--child", "none"]);
    assert_eq!(code, 6, "{problem}");

    let (code, shown, problem) = a.postern(&["down", "b"]);
    assert_eq!(code, 0, "{shown}{problem}");
    eventually("the SAs are gone on both sides", || {
        [&a, &b].iter().all(|gateway| gateway.mock.tables.lock().unwrap().sas.is_empty())
    });
    let (code, _, problem) = a.postern(&["down", "b"]);
    assert_eq!((code, problem.contains("nothing of that is up")), (6, true), "{problem}");
    let (code, log, _) = a.postern(&["log", "-n", "3", "--connection", "b"]);
    assert!(code == 0 && log.lines().count() <= 3 && log.contains("IKE SA closed: told to"), "{log}");
    follow.kill().unwrap();
    follow.wait().unwrap();
}

/// OPS-3: what fails says why, with an exit code of its own, and can be asked for later.
#[test]
fn ops_3_failures_are_explained() {
    let silent = connection("silent", 3, 5, "correct horse battery");
    let a =
        Gateway::start("ike-c", 3, &format!("{}{silent}", connection("b", 3, 4, "correct horse battery")));
    let _b = Gateway::start("ike-d", 4, &connection("a", 4, 3, "another one altogether"));
    let (code, shown, problem) = a.postern(&["up", "b"]);
    assert_eq!(code, 7, "{shown}{problem}");
    assert!(
        problem.contains("AUTHENTICATION_FAILED") && problem.contains("compare identities, secrets"),
        "{problem}"
    );
    let (_, text, _) = a.postern(&["explain", "b"]);
    assert!(text.contains("It failed") && text.contains("compare identities, secrets"), "{text}");
    assert!(text.contains("The peer was heard"), "{text}");

    let (code, _, problem) = a.postern(&["up", "silent", "--timeout", "0"]);
    assert_eq!(code, 8, "{problem}");
    assert!(
        problem.contains("net is not up within 0 s; it goes on, see `postern explain silent`"),
        "{problem}"
    );
    eventually("it gives up", || a.json(&["explain", "silent"])["failures"] != 0);
    let (_, text, _) = a.postern(&["explain", "silent"]);
    assert!(text.contains("does not answer") && text.contains("Nothing was heard from the peer"), "{text}");
    let (code, _, problem) = a.postern(&["up", "silent", "--no-wait"]);
    assert_eq!(code, 0, "{problem}");

    for arguments in
        [&["up", "x"][..], &["down", "x"], &["rekey", "x"], &["explain", "x"], &["connections", "x"]]
    {
        let (code, _, problem) = a.postern(arguments);
        assert!(code == 6 && problem.contains("no connection is called \"x\""), "{arguments:?}: {problem}");
    }
    let log = std::fs::read_to_string(a.scratch.path("log")).unwrap();
    assert!(!log.contains("correct horse"), "OPS-4: {log}");
}
