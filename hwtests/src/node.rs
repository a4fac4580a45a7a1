//! One Postern: a control process, the datapath process it starts, and their command line, in a namespace.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::config::Config;
use crate::netns::Netns;
use crate::process::{Background, end_all, indent, is_alive, run, signal, wait_for};

/// A running node.
#[derive(Debug)]
pub struct Node {
    name: String,
    namespace: String,
    dir: PathBuf,
    control: Option<Background>,
    /// Of control, beside what all processes have.
    environment: Vec<(String, String)>,
    /// More words of control's command line.
    arguments: Vec<String>,
    /// The configuration exports keys, which control refuses without being told twice.
    keylog: bool,
}

impl Node {
    /// Writes the configuration into `dir/name`, starts control in `namespace` and waits until the datapath has
    /// everything that the configuration names.
    pub fn start(namespace: &Netns, name: &str, dir: &Path, config: Config) -> Result<Self> {
        let dir = dir.join(name);
        for part in ["state", "datapath"] {
            std::fs::create_dir_all(dir.join(part))?;
        }
        let keylog = config.ike.as_ref().is_some_and(|ike| ike.keylog.is_some());
        write_config(&dir, config)?;
        let (name, namespace) = (name.to_owned(), namespace.name().to_owned());
        let (environment, arguments) = (Vec::new(), Vec::new());
        let mut node = Self { name, namespace, dir, control: None, environment, arguments, keylog };
        node.start_control()?;
        Ok(node)
    }

    /// Starts control (again) and waits for it.
    pub fn start_control(&mut self) -> Result<()> {
        self.launch_control()?;
        let ready = wait_for(&format!("{} to be ready", self.name), Duration::from_secs(10), || {
            if !self.control.as_mut().is_some_and(Background::runs) {
                return Ok(Some(false));
            }
            Ok(self.is_ready()?.then_some(true))
        });
        match ready {
            Ok(true) => Ok(()),
            Ok(false) => bail!("{}: postern-control ended\n{}", self.name, self.log()),
            Err(error) => Err(error.context(self.log())),
        }
    }

    /// Starts control (again) and does not wait: the datapath may have what control knows nothing of.
    pub fn launch_control(&mut self) -> Result<()> {
        let command = Netns::existing(&self.namespace)?.command(binary("postern-control")?);
        self.launch(command)
    }

    /// The same by a shell that calls `first` before it becomes control.
    pub fn launch_control_after(&mut self, first: &str) -> Result<()> {
        let mut command = Netns::existing(&self.namespace)?.command("sh");
        command.args(["-c", &format!("{first} && exec \"$@\""), "sh"]).arg(binary("postern-control")?);
        self.launch(command)
    }

    fn launch(&mut self, mut command: Command) -> Result<()> {
        command
            .arg("--config")
            .arg(self.dir.join("postern.toml"))
            .env("RUST_BACKTRACE", "1")
            .env("NO_COLOR", "1")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .args(&self.arguments);
        if self.keylog {
            command.arg("--allow-keylog");
        }
        self.control = Some(Background::start(&mut command, &self.log_file())?);
        Ok(())
    }

    /// From its next start on control has this variable.
    pub fn set_variable(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// From its next start on control has this word on its command line.
    pub fn add_argument(&mut self, word: &str) {
        self.arguments.push(word.to_owned());
    }

    /// Writes another configuration, for the next start.
    pub fn configure(&self, config: Config) -> Result<()> {
        write_config(&self.dir, config)
    }

    /// Writes another configuration and has it read; ports, workers and sockets stay as they are.
    pub fn reload(&self, config: Config) -> Result<()> {
        write_config(&self.dir, config)?;
        self.cli(&["reload"]).map(drop)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Directory of its configuration, sockets, state and log.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The management socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// What both processes have logged.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.log_file()).unwrap_or_default();
        format!("log of {}:\n{}", self.name, indent(&log))
    }

    /// `postern --socket … ARGUMENTS`, as a person would see it.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("postern")?);
        run(command.arg("--socket").arg(self.socket()).args(arguments))
    }

    /// The same with `--json`, parsed.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.cli(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("postern {arguments:?} printed: {text}"))
    }

    /// Packets that this node dropped for the reason with this label.
    pub fn drops(&self, label: &str) -> Result<u64> {
        let table = self.json(&["drops"])?;
        let rows =
            table.get("reasons").and_then(Value::as_array).context("`postern drops` has no reasons")?;
        let row = rows.iter().find(|row| row.get("reason").and_then(Value::as_str) == Some(label));
        Ok(row.and_then(|row| row.get("packets")?.as_u64()).unwrap_or(0))
    }

    /// IKE's counter of this label.
    pub fn ike_counter(&self, label: &str) -> Result<u64> {
        let status = self.json(&["status"])?;
        Ok(status.pointer(&format!("/ike/counters/{label}")).and_then(Value::as_u64).unwrap_or(0))
    }

    /// Resident memory of control, in KiB.
    pub fn control_memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.control_pid()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// Frames that the workers received from and gave to the port of `interface`.
    pub fn frames(&self, interface: &str) -> Result<(u64, u64)> {
        let status = self.json(&["status"])?;
        let (mut received, mut transmitted) = (0, 0);
        each_object(&status, &mut |object| {
            if object.get("interface").and_then(Value::as_str) == Some(interface)
                && let Some(counters) = object.get("counters")
            {
                received += counters.get("received").and_then(Value::as_u64).unwrap_or(0);
                transmitted += counters.get("transmitted").and_then(Value::as_u64).unwrap_or(0);
            }
        });
        Ok((received, transmitted))
    }

    /// Packets with a verdict of the XDP programs, all interfaces.
    pub fn verdict(&self, wanted: &str) -> Result<u64> {
        let status = self.json(&["status"])?;
        let mut packets = 0;
        each_object(&status, &mut |object| {
            for verdict in object.get("verdicts").and_then(Value::as_array).into_iter().flatten() {
                if verdict.get(0).and_then(Value::as_str) == Some(wanted) {
                    packets += verdict.get(1).and_then(Value::as_u64).unwrap_or(0);
                }
            }
        });
        Ok(packets)
    }

    /// Process id of control.
    pub fn control_pid(&self) -> Result<i32> {
        self.control.as_ref().map(Background::pid).context("control does not run")
    }

    /// Process id of the datapath.
    pub fn datapath_pid(&self) -> Result<i32> {
        let mut found = None;
        for pid in Netns::existing(&self.namespace)?.pids() {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = command.split(|byte| *byte == 0);
            if words.next().is_some_and(|program| program.ends_with(b"postern-datapath")) && is_alive(pid) {
                found = Some(pid);
            }
        }
        found.with_context(|| format!("{}: no datapath runs", self.name))
    }

    /// SIGKILL to control; the datapath goes on (DP-7).
    pub fn kill_control(&mut self) -> Result<()> {
        let mut control = self.control.take().context("control does not run")?;
        control.kill()
    }

    /// A signal that control does not survive, and what it ended with.
    pub fn crash_control(&mut self, with: Signal) -> Result<ExitStatus> {
        let mut control = self.control.take().context("control does not run")?;
        control.crash(with, Duration::from_secs(5))
    }

    /// SIGTERM to control; the datapath goes on.
    pub fn end_control(&mut self) -> Result<()> {
        let mut control = self.control.take().context("control does not run")?;
        ensure!(control.end(Signal::TERM, Duration::from_secs(5)), "control did not end");
        Ok(())
    }

    /// The same, for a control that ends its datapath as well; gives how long it took.
    pub fn stop_control(&mut self) -> Result<Duration> {
        let began = std::time::Instant::now();
        self.end_control()?;
        Ok(began.elapsed())
    }

    /// SIGKILL to the datapath; control starts another. Gives the process id of the killed one.
    pub fn kill_datapath(&mut self) -> Result<i32> {
        let pid = self.datapath_pid()?;
        signal(pid, Signal::KILL);
        Ok(pid)
    }

    /// Waits until a datapath other than `old` has everything that the configuration names.
    pub fn wait_for_another_datapath(&self, old: i32) -> Result<i32> {
        let pid = wait_for(&format!("another datapath of {}", self.name), Duration::from_secs(10), || {
            let pid = self.datapath_pid().ok().filter(|pid| *pid != old);
            Ok(pid.filter(|_| self.is_ready().unwrap_or(false)))
        });
        pid.with_context(|| self.log())
    }

    /// Lets both processes run on after this value is gone (the lab).
    pub fn leave(mut self) {
        if let Some(control) = self.control.take() {
            control.leave();
        }
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Whether control answers, the datapath is up, and all that the configuration names is installed.
    fn is_ready(&self) -> Result<bool> {
        let status = self.json(&["status"])?;
        let up = status.pointer("/datapath/up").and_then(Value::as_bool).context("no datapath/up")?;
        let tables = [self.json(&["sa"])?, self.json(&["policy"])?, self.json(&["relay"])?];
        let mut rows = tables.iter().filter_map(Value::as_array).flatten();
        Ok(up && rows.all(|row| row.get("state").and_then(Value::as_str) == Some("installed")))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut control) = self.control.take() {
            control.end(Signal::TERM, Duration::from_secs(2));
            if let Ok(pid) = self.datapath_pid() {
                end_all(&[pid], Duration::from_secs(2));
            }
        }
    }
}

/// Writes the configuration of the node whose directory this is.
fn write_config(dir: &Path, mut config: Config) -> Result<()> {
    let path = |part: &str| dir.join(part).display().to_string();
    config.datapath.socket = path("datapath.sock");
    config.datapath.state = path("datapath");
    config.datapath.start = true;
    config.control.socket = path("control.sock");
    config.control.state = path("state");
    write_private(&dir.join("postern.toml"), &toml::to_string(&config)?)
}

/// Writes a file that holds keys: nobody else may read it.
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// Path of one of the workspace's programs: beside the running one, or in `POSTERN_BIN_DIR`.
pub fn binary(name: &str) -> Result<PathBuf> {
    let beside = || {
        let own = std::env::current_exe().ok()?;
        // Test programs lie one level below, in `deps`.
        own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.exists())
    };
    let chosen = std::env::var_os("POSTERN_BIN_DIR").map(|dir| PathBuf::from(dir).join(name));
    let path = chosen.or_else(beside);
    path.with_context(|| format!("{name} is not built: `cargo build --workspace --bins` first"))
}

/// Calls `visit` on every object in `value`.
pub fn each_object(value: &Value, visit: &mut impl FnMut(&serde_json::Map<String, Value>)) {
    match value {
        Value::Object(object) => {
            visit(object);
            object.values().for_each(|inner| each_object(inner, visit));
        }
        Value::Array(items) => items.iter().for_each(|inner| each_object(inner, visit)),
        _ => {}
    }
}
