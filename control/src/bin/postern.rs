//! The command line.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::{Parser, Subcommand};
use postern_control::admin::{Answer, CallError, FailureKind, Request, call, converse};
use postern_control::check::{self, Level};
use postern_control::config::{self, ConfigError};
use postern_control::ike::api::{IkeEvent, Target};
use postern_control::nvram::{self, KeyCommand, Outcome, Refusal, SnapshotCommand};
use postern_control::show;
use serde::Serialize;

/// Shows and steers a running Postern gateway.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, max_term_width = 100)]
struct Arguments {
    /// Management socket of postern-control
    #[arg(long, global = true, value_name = "PATH", default_value = "/run/postern/control.sock")]
    socket: PathBuf,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Everything at a glance: control, datapath, tunnels configured and installed, ports, problems
    Status,
    /// Security associations with their counters
    Sa {
        /// Only those of this tunnel
        name: Option<String>,
    },
    /// Policies in the order in which they are looked at
    Policy,
    /// Entries of the relay's translation table
    Relay,
    /// Dropped packets by reason, port and SA, and the XDP program's verdicts
    Drops,
    /// Time from receive to transmit of sampled packets
    Latency,
    /// IKE connections: their IKE SAs and CHILD_SAs, with names, peers, suites and ages
    #[command(visible_alias = "list")]
    Connections {
        /// Only this connection
        name: Option<String>,
    },
    /// Why a connection is up or not, in words, and what to do about it
    Explain {
        /// The connection
        name: String,
    },
    /// Establish a connection: its children with `start`, else its first one
    Up {
        /// The connection
        name: String,
        /// Only this child
        #[arg(long, value_name = "NAME")]
        child: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Delete a connection's SAs, and do not establish it again by itself
    Down {
        #[command(flatten)]
        target: Which,
        #[command(flatten)]
        wait: Wait,
    },
    /// Replace the keys of a connection's IKE SAs, or of a child, now
    Rekey {
        #[command(flatten)]
        target: Which,
        #[command(flatten)]
        wait: Wait,
    },
    /// What happened in IKE
    Log {
        /// Go on with what happens
        #[arg(long, short)]
        follow: bool,
        /// Only this connection
        #[arg(long, value_name = "NAME")]
        connection: Option<String>,
        /// How many events of the past
        #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 100)]
        lines: usize,
    },
    /// After a reset: what this start was, and which peers have been told that their SAs are gone
    Recover {
        /// Show the progress until all are told
        #[arg(long)]
        watch: bool,
    },
    /// The backup of IKE SAs for the time after a reset: how many, how large, how old
    #[command(args_conflicts_with_subcommands = true)]
    Snapshot {
        /// Write it anew now
        #[arg(long)]
        now: bool,
        #[command(subcommand)]
        file: Option<SnapshotCommand>,
    },
    /// The keys that the backup of IKE SAs is encrypted with; needs no running daemon
    #[command(subcommand)]
    Key(KeyCommand),
    /// Read the configuration file again; what did not change is not touched
    Reload {
        /// Only say what would change
        #[arg(long)]
        dry_run: bool,
    },
    /// End postern-control; the datapath goes on forwarding
    Shutdown {
        /// End the datapath too
        #[arg(long)]
        datapath: bool,
    },
    /// Preflight: what this machine has and lacks, and how to get it; needs no running daemon
    Check {
        /// Look at the interfaces and cores of this configuration
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Configuration files
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Versions of this program and of the running ones
    Version,
}

/// Part of a connection.
#[derive(Debug, clap::Args)]
struct Which {
    /// The connection
    name: String,
    /// Only this child
    #[arg(long, value_name = "NAME")]
    child: Option<String>,
    /// Only in this IKE SA, by its number in `postern connections`
    #[arg(long, value_name = "NUMBER")]
    sa: Option<u64>,
}

impl From<Which> for Target {
    fn from(which: Which) -> Self {
        Self { connection: which.name, child: which.child, sa: which.sa }
    }
}

/// Whether to wait for the end.
#[derive(Debug, clap::Args)]
struct Wait {
    /// Wait at most this many seconds until it is done
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u32,
    /// Do not wait
    #[arg(long, conflicts_with = "timeout")]
    no_wait: bool,
}

impl Wait {
    fn seconds(&self) -> Option<u32> {
        (!self.no_wait).then_some(self.timeout)
    }
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Read a file and say what is wrong with it; needs no running daemon
    Check {
        /// The file
        file: PathBuf,
    },
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  not done: the preflight check found a failure, the datapath refused something, or the daemon failed
  2  wrong arguments
  3  the configuration file has errors
  4  postern-control cannot be reached
  5  the datapath is down
  6  what was named is not there
  7  the peer and this side did not agree, or it does not answer; the reason is printed
  8  not done within the time to wait; it goes on";

/// Between two looks at the progress.
const WATCH: std::time::Duration = std::time::Duration::from_millis(200);

const FAILED: u8 = 1;
const CONFIGURATION: u8 = 3;
const UNREACHABLE: u8 = 4;
const DATAPATH_DOWN: u8 = 5;
const NOT_FOUND: u8 = 6;
const NEGOTIATION: u8 = 7;
const TIMEOUT: u8 = 8;

fn main() -> ExitCode {
    let Arguments { socket, json, command } = Arguments::parse();
    let code = match command {
        Command::Status => ask(&socket, json, &Request::Status),
        Command::Sa { name } => ask(&socket, json, &Request::Sa { name }),
        Command::Policy => ask(&socket, json, &Request::Policy),
        Command::Relay => ask(&socket, json, &Request::Relay),
        Command::Drops => ask(&socket, json, &Request::Drops),
        Command::Latency => ask(&socket, json, &Request::Latency),
        Command::Connections { name } => ask(&socket, json, &Request::Connections { name }),
        Command::Explain { name } => ask(&socket, json, &Request::Explain { name }),
        Command::Up { name, child, wait } => {
            ask(&socket, json, &Request::Up { connection: name, child, wait_seconds: wait.seconds() })
        }
        Command::Down { target, wait } => {
            ask(&socket, json, &Request::Down { target: target.into(), wait_seconds: wait.seconds() })
        }
        Command::Rekey { target, wait } => {
            ask(&socket, json, &Request::Rekey { target: target.into(), wait_seconds: wait.seconds() })
        }
        Command::Log { follow, connection, lines } => {
            ask(&socket, json, &Request::Log { backlog: lines, follow, connection })
        }
        Command::Snapshot { file: Some(file), .. } => tell(nvram::snapshot(&file, SystemTime::now()), json),
        Command::Key(command) => tell(nvram::key(&command), json),
        Command::Recover { watch: false } | Command::Snapshot { now: false, .. } => {
            ask(&socket, json, &Request::Recovery)
        }
        Command::Recover { watch: true } => watch_recovery(&socket, json),
        Command::Snapshot { now: true, .. } => ask(&socket, json, &Request::Snapshot),
        Command::Reload { dry_run } => ask(&socket, json, &Request::Reload { dry_run }),
        Command::Shutdown { datapath } => ask(&socket, json, &Request::Shutdown { datapath }),
        Command::Check { config } => preflight(config.as_deref(), json),
        Command::Config(ConfigCommand::Check { file }) => check_file(&file, json),
        Command::Version => version(&socket, json),
    };
    ExitCode::from(code)
}

fn ask(socket: &Path, json: bool, request: &Request) -> u8 {
    // Events are a line each: with --json, a JSON object a line before the answer.
    let told = |event: &IkeEvent| {
        let line = match serde_json::to_string(event) {
            Ok(line) if json => format!("{line}\n"),
            _ => show::event(event),
        };
        if std::io::stdout().write_all(line.as_bytes()).is_err() {
            // Whoever closed it (`postern log --follow | head`) wants no more.
            std::process::exit(0);
        }
    };
    let answer = match converse(socket, request, told) {
        Ok(answer) => answer,
        Err(error) => return complain(&error, json),
    };
    if json {
        match &answer {
            Answer::Connections(rows) => print_json(rows),
            Answer::Explanation(facts) => print_json(facts),
            Answer::Outcome(outcome) => print_json(outcome),
            Answer::Recovery(report) => print_json(report),
            Answer::Log => {}
            Answer::Status(report) => print_json(report),
            Answer::Sas(rows) => print_json(rows),
            Answer::Policies(rows) => print_json(rows),
            Answer::Relays(rows) => print_json(rows),
            Answer::Drops(report) => print_json(report),
            Answer::Latency(report) => print_json(report),
            Answer::Reload(report) => print_json(report),
            Answer::Stopping => print_json(&serde_json::json!({ "stopping": true })),
        }
    } else {
        print(&show::answer(&answer));
    }
    match answer {
        Answer::Reload(report) if !report.refused.is_empty() => FAILED,
        _ => 0,
    }
}

/// A line each time something has changed, until all peers are told; then the whole.
fn watch_recovery(socket: &Path, json: bool) -> u8 {
    let mut before = String::new();
    loop {
        let report = match call(socket, &Request::Recovery) {
            Ok(Answer::Recovery(report)) => report,
            Ok(_) => return FAILED,
            Err(error) => return complain(&error, json),
        };
        let Some(burst) = report.burst.as_ref().filter(|burst| !burst.done) else {
            return ask(socket, json, &Request::Recovery);
        };
        let line = if json {
            serde_json::to_string(burst).unwrap_or_default() + "\n"
        } else {
            show::burst_line(burst)
        };
        if line != before {
            print(&line);
            before = line;
        }
        std::thread::sleep(WATCH);
    }
}

/// Says what went wrong and gives the exit code for it.
fn complain(error: &CallError, json: bool) -> u8 {
    let (code, findings) = match error {
        CallError::Unreachable { .. } => (UNREACHABLE, &[][..]),
        CallError::Garbled(_) => (FAILED, &[][..]),
        CallError::Failed(failure) => {
            let code = match failure.kind {
                FailureKind::Configuration => CONFIGURATION,
                FailureKind::DatapathDown => DATAPATH_DOWN,
                FailureKind::NotFound => NOT_FOUND,
                FailureKind::Negotiation => NEGOTIATION,
                FailureKind::Timeout => TIMEOUT,
                FailureKind::Request | FailureKind::Internal => FAILED,
            };
            (code, failure.findings.as_slice())
        }
    };
    if json {
        print_json(&serde_json::json!({ "error": error.to_string(), "findings": findings }));
    } else {
        for finding in findings {
            eprintln!("{finding}");
        }
        eprintln!("postern: {error}");
        if code == UNREACHABLE {
            eprintln!("postern: is postern-control running, and is this its socket? (--socket PATH)");
        }
    }
    code
}

fn preflight(file: Option<&Path>, json: bool) -> u8 {
    let config = match file {
        Some(file) => config::load(file),
        None => config::parse("", "", &config::NoKeyFiles),
    };
    let config = match config {
        Ok(config) => config,
        Err(error) => return bad_file(&error, json),
    };
    let own = std::env::current_exe().unwrap_or_default();
    let mut findings = check::run(&config.datapath, config.control.datapath_program.as_deref(), &own);
    if config.recovery.enabled {
        let keys = config.recovery.keys(&config.control.state);
        findings.extend(nvram::check(&keys, config.recovery.device.as_deref()));
    }
    if json {
        print_json(&findings);
    } else {
        print(&check::show(&findings));
    }
    if check::worst(&findings) == Level::Fail { FAILED } else { 0 }
}

/// Prints what a command of the backup did or found.
fn tell(outcome: Result<Outcome, Refusal>, json: bool) -> u8 {
    match outcome {
        Ok(outcome) => {
            if json {
                print_json(&outcome.json);
            } else {
                print(&outcome.text);
            }
            if outcome.good { 0 } else { FAILED }
        }
        Err(refusal) => {
            if json {
                print_json(&serde_json::json!({ "error": refusal.to_string() }));
            } else {
                eprintln!("postern: {refusal}");
            }
            FAILED
        }
    }
}

fn check_file(file: &Path, json: bool) -> u8 {
    match config::load(file) {
        Ok(config) => {
            if json {
                print_json(&config.warnings);
            } else {
                for warning in &config.warnings {
                    println!("{warning}");
                }
                println!(
                    "{}: no error; {} tunnels, {} connections, {} policies, {} relay entries",
                    file.display(),
                    config.tunnels.len(),
                    config.ike.connections.len(),
                    config.policies.len(),
                    config.relays.len()
                );
            }
            0
        }
        Err(error) => bad_file(&error, json),
    }
}

fn bad_file(error: &ConfigError, json: bool) -> u8 {
    if json {
        print_json(&error.0);
    } else {
        eprintln!("{error}");
    }
    CONFIGURATION
}

fn version(socket: &Path, json: bool) -> u8 {
    let own = env!("CARGO_PKG_VERSION");
    let running = match call(socket, &Request::Status) {
        Ok(Answer::Status(report)) => Some(report),
        _ => None,
    };
    let control = running.as_ref().map(|report| report.control.version.clone());
    let datapath = running.as_ref().and_then(|report| report.datapath.version.clone());
    if json {
        print_json(&serde_json::json!({
            "postern": own, "contract": postern_contract::VERSION, "control": control, "datapath": datapath
        }));
    } else {
        let word = |version: Option<String>| version.unwrap_or_else(|| "not running".to_owned());
        println!("postern    {own} (datapath contract {})", postern_contract::VERSION);
        println!("control    {}", word(control));
        println!("datapath   {}", word(datapath));
    }
    0
}

fn print_json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => print(&format!("{text}\n")),
        Err(error) => eprintln!("postern: {error}"),
    }
}

/// Prints to standard output. Whoever closed it (`postern sa | head`) wants no more.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
