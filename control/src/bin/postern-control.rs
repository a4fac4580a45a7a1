//! The control daemon.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use postern_control::admin::server::{Daemon, Socket, WATCHERS, serve};
use postern_control::config::{self, Config};
use postern_control::datapath::launch::{self, DETACH, Launch};
use postern_control::datapath::supervisor::{Command, Negotiator, Options, Supervisor};
use postern_control::desired::Desired;
use postern_control::ike::{self, driver};
use postern_control::metrics;
use postern_control::recovery;
use postern_control::state::Generations;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};
use tracing::{error, info, warn};

/// A handshake makes some hundred small objects and as many are gone at its end, on three threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Postern's control daemon: reads the configuration, keeps the datapath in step with it, answers `postern`.
///
/// Runs in the foreground and logs to standard error. SIGTERM and SIGINT end it; the datapath goes on forwarding with
/// what it has, unless --stop-datapath is given. SIGHUP reads the configuration again: what did not change is not
/// touched, and with an error in the file nothing is.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/postern/postern.toml")]
    config: PathBuf,
    /// Check the configuration file, say what is wrong with it, and end
    #[arg(long)]
    check: bool,
    /// End the datapath too when this program is told to end
    #[arg(long)]
    stop_datapath: bool,
    /// Allow `ike.keylog`, which writes the keys of all SAs to files
    #[arg(long)]
    allow_keylog: bool,
    /// What is logged, instead of the file's `control.log`: error, warn, info, debug, trace, or a filter
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  told to end and ended; with --check: the file has no error
  1  failed while running
  2  wrong arguments
  3  the configuration file has errors
  4  cannot start: the state directory or the management socket cannot be used, or another instance uses them
  5  the datapath's program is nowhere to be found, though datapath.start is set";

const FAILED: u8 = 1;
const CONFIGURATION: u8 = 3;
const CANNOT_START: u8 = 4;
const NO_DATAPATH: u8 = 5;

fn main() -> ExitCode {
    let began = Instant::now();
    let mut raw = std::env::args_os().skip(1);
    if raw.next().is_some_and(|first| first == DETACH) {
        let error = launch::become_detached(raw);
        eprintln!("postern-control: cannot start the datapath: {error}");
        return ExitCode::from(FAILED);
    }
    let arguments = Arguments::parse();
    // Before the first secret is read.
    let hidden = hide_memory();
    let config = match config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(CONFIGURATION);
        }
    };
    if arguments.check {
        for warning in &config.warnings {
            eprintln!("{warning}");
        }
        println!("{}: no error, {} warnings", arguments.config.display(), config.warnings.len());
        return ExitCode::SUCCESS;
    }
    let filter = arguments.log.as_deref().unwrap_or(&config.control.log);
    let Ok(filter) = tracing_subscriber::EnvFilter::try_new(filter) else {
        eprintln!(
            "--log: not a filter; expected a level such as info, or a list such as info,postern_control=debug"
        );
        return ExitCode::from(2);
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    if let Err(error) = hidden {
        warn!("the memory cannot be hidden from core dumps and other processes: {error}");
    }

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(&arguments, config, began)),
        Err(error) => Err((FAILED, error.to_string())),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, message)) => {
            error!("{message}");
            ExitCode::from(code)
        }
    }
}

async fn run(arguments: &Arguments, mut config: Config, began: Instant) -> Result<(), (u8, String)> {
    if config.ike.keylog.is_some() && !arguments.allow_keylog {
        let message =
            "ike.keylog is set: it gives the keys of all tunnels away, so --allow-keylog has to be given too";
        return Err((CONFIGURATION, message.to_owned()));
    }
    let cannot_start = |error: &dyn std::fmt::Display| (CANNOT_START, error.to_string());
    let control = config.control.clone();
    let datapath = config.datapath.clone();
    let socket = Socket::bind(&control.socket)
        .map_err(|error| (CANNOT_START, format!("{}: {error}", control.socket.display())))?;
    let metrics = match control.metrics {
        Some(address) => Some(
            metrics::bind(address)
                .await
                .map_err(|error| (CANNOT_START, format!("metrics: {address}: {error}")))?,
        ),
        None => None,
    };
    let (generations, lost) = Generations::open(&control.state).map_err(|error| cannot_start(&error))?;
    if let Some(lost) = lost {
        warn!("{lost}");
    }
    for warning in &config.warnings {
        warn!("{warning}");
    }
    let launch = if datapath.start { Some(how_to_launch(arguments, &config)?) } else { None };
    let warnings = Mutex::new(config.warnings.clone());
    let options = Options { socket: datapath.socket.clone(), launch };
    let ike = std::mem::take(&mut config.ike);
    let recovery = recovery::Start {
        settings: config.recovery.clone(),
        state: control.state.clone(),
        datapath: datapath.socket.clone(),
    };
    let config_recovery = config.recovery.clone();
    let desired = Desired::new(config);
    info!(
        tunnels = desired.tunnels.len(),
        relays = desired.relays.len(),
        "postern-control {} begins with {}",
        env!("CARGO_PKG_VERSION"),
        arguments.config.display()
    );

    let (commands, receiver) = mpsc::channel(16);
    let (orders, to_datapath) = mpsc::unbounded_channel();
    let (notices, from_datapath) = mpsc::unbounded_channel();
    let (ike_commands, ike_receiver) = mpsc::channel(64);
    let (ike_stop, ike_stopped) = oneshot::channel();
    let parts = driver::Parts {
        config: ike,
        slots: datapath.sa_slots,
        taken: desired.inbound_spis(),
        interface: ike::virtual_interface(&datapath),
        shares_natt: ike::shares_natt(&datapath),
        orders,
        notices: from_datapath,
        recovery,
        began,
        commands: ike_receiver,
        stop: ike_stopped,
    };
    let ike_task = ike::spawn(parts).map_err(|error| (FAILED, format!("IKE: {error}")))?;
    let (stop, mut stopped) = mpsc::channel(1);
    let daemon = Arc::new(Daemon {
        config: arguments.config.clone(),
        commands: commands.clone(),
        ike: ike_commands,
        watchers: Semaphore::new(WATCHERS),
        started: began,
        in_force: (datapath, control, config_recovery),
        warnings,
        stop,
    });
    let listen = |kind| signal(kind).map_err(|error| (FAILED, format!("signals: {error}")));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hang_up = listen(SignalKind::hangup())?;
    let negotiator = Negotiator { orders: to_datapath, notices };
    let supervisor = Supervisor::new(options, generations, desired).with_negotiator(negotiator);
    let mut supervisor = tokio::spawn(supervisor.run(receiver));
    let server = tokio::spawn(serve(socket, Arc::clone(&daemon)));
    if let Some(listener) = metrics {
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move {
            if let Err(error) = metrics::serve(listener, daemon).await {
                warn!("metrics: {error}");
            }
        });
    }

    let stop_datapath = loop {
        tokio::select! {
            _ = terminate.recv() => break arguments.stop_datapath,
            _ = interrupt.recv() => break arguments.stop_datapath,
            Some(datapath) = stopped.recv() => break datapath || arguments.stop_datapath,
            _ = hang_up.recv() => match daemon.reload(false).await {
                Ok(report) => for note in report.notes {
                    warn!("{note}");
                },
                Err(failure) => {
                    error!("{failure}");
                    for finding in failure.findings {
                        error!("{finding}");
                    }
                }
            },
            end = &mut supervisor => {
                return Err((FAILED, format!("the datapath's supervisor ended: {end:?}")));
            }
        }
    };
    let (done, ended) = oneshot::channel();
    if ike_stop.send(driver::Stop { delete: stop_datapath, done }).is_ok() {
        // An error means that IKE is gone already, which is what we wait for.
        let _ = ended.await;
    }
    let _ = ike_task.join();
    let (done, ended) = oneshot::channel();
    if commands.send(Command::Stop { datapath: stop_datapath, done }).await.is_ok() {
        // An error means that the supervisor is gone already, which is what we wait for.
        let _ = ended.await;
    }
    server.abort();
    // Dropped with the task: the socket's file goes.
    let _ = server.await;
    info!(datapath = if stop_datapath { "stopped" } else { "left running" }, "postern-control ends");
    Ok(())
}

fn how_to_launch(arguments: &Arguments, config: &Config) -> Result<Launch, (u8, String)> {
    let own = std::env::current_exe().map_err(|error| (FAILED, format!("own program: {error}")))?;
    let configured = config.control.datapath_program.as_deref();
    let program = launch::find_program(configured, &own).ok_or_else(|| {
        let message = "datapath.start is set, but its program is neither beside this one nor in PATH; \
                       name it with control.datapath_program";
        (NO_DATAPATH, message.to_owned())
    })?;
    // The datapath may be started long after this directory was left.
    let config = std::path::absolute(&arguments.config).unwrap_or_else(|_| arguments.config.clone());
    Ok(Launch { launcher: own, program, config })
}

/// OPS-4: no core dump and no other process of this user sees the keys in memory.
fn hide_memory() -> Result<(), rustix::io::Errno> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    // Each holds without the other too.
    setrlimit(Resource::Core, none).and(set_dumpable_behavior(DumpableBehavior::NotDumpable))
}
