//! postern-datapath: moves, protects and translates packets, as control tells it.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use postern_contract::settings::DatapathSettings;
use postern_datapath::appliance::Appliance;
use postern_datapath::serve::Server;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Postern's datapath: steers IPsec packets by XDP into AF_XDP sockets and opens, seals or translates them.
///
/// It begins with empty tables; postern-control connects to its socket and fills them. It goes on forwarding with what
/// it has while control is away. SIGTERM and SIGINT detach it from all interfaces and end it.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit status:
  0  ended by a signal
  2  the command line is wrong
  3  the configuration is wrong
  4  the datapath could not start (interface, permission, memory, state directory); the message says what to do
  5  a worker died"
)]
struct Arguments {
    /// Configuration file; only its [datapath] section is read.
    #[arg(long, value_name = "FILE", default_value = "/etc/postern/postern.toml")]
    config: PathBuf,
    /// Check the configuration, print what it comes to, and end.
    #[arg(long)]
    check: bool,
    /// What to log: error, warn, info, debug, trace, or a tracing filter.
    #[arg(long, value_name = "FILTER", default_value = "info", env = "POSTERN_LOG")]
    log: String,
}

const CONFIGURATION: u8 = 3;
const START: u8 = 4;
const WORKER: u8 = 5;

/// The file, as far as the datapath cares.
#[derive(serde::Deserialize)]
struct File {
    datapath: DatapathSettings,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(&arguments.log);
    let Ok(filter) = filter else {
        eprintln!(
            "postern-datapath: --log {:?}: not a filter such as `info` or `postern_datapath=debug`",
            arguments.log
        );
        return ExitCode::from(2);
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    // Before the file, which may hold keys, is read.
    harden();
    let settings = match read(&arguments.config) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("postern-datapath: {}: {error}", arguments.config.display());
            return ExitCode::from(CONFIGURATION);
        }
    };
    if arguments.check {
        println!("{settings:#?}");
        return ExitCode::SUCCESS;
    }
    run(&settings)
}

fn read(path: &Path) -> Result<DatapathSettings, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let file: File = toml::from_str(&text).map_err(|error| {
        // The error's own rendering quotes the line, which may hold a key.
        let start = error.span().map_or(0, |span| span.start);
        let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
        format!("line {line}: {}", error.message())
    })?;
    file.datapath.validate().map_err(|error| format!("[datapath] {error}"))?;
    Ok(file.datapath)
}

fn run(settings: &DatapathSettings) -> ExitCode {
    let started = Appliance::start(settings);
    let appliance = match started {
        Ok(appliance) => appliance,
        Err(error) => {
            tracing::error!("cannot start: {error}");
            return ExitCode::from(START);
        }
    };
    let stop = match signals() {
        Ok(stop) => stop,
        Err(error) => {
            tracing::error!("cannot listen for signals: {error}");
            return ExitCode::from(START);
        }
    };
    let server = instance().and_then(|instance| {
        let DatapathSettings { socket, cores, crypto, .. } = settings;
        Server::bind(appliance, socket, instance, cores.clone(), crypto.backend)
    });
    let mut server = match server {
        Ok(server) => server,
        Err(error) => {
            tracing::error!("cannot listen on {}: {error}", settings.socket.display());
            return ExitCode::from(START);
        }
    };
    tracing::info!(socket = %settings.socket.display(), workers = settings.workers(), "ready");
    match server.run(stop.as_fd()) {
        Ok(()) => {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(WORKER)
        }
    }
}

/// OPS-4: keys stay out of core files, and other processes of the same user cannot look into this one.
fn harden() {
    let nothing = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, nothing) {
        tracing::warn!(%error, "cannot turn core files off");
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "cannot make this process undumpable");
    }
}

/// Becomes readable when the process is to end.
fn signals() -> std::io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

/// Random at each start, so that control sees that this is another process with empty tables.
fn instance() -> std::io::Result<u64> {
    use ring::rand::SecureRandom;
    let mut bytes = [0u8; 8];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| std::io::Error::other("no random numbers"))?;
    Ok(u64::from_ne_bytes(bytes))
}
