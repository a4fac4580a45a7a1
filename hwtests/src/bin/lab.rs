//! The lab: the tests' topologies left standing, for hands-on work and for any other IPsec software.
//!
//! Namespaces are called `lab-TOPOLOGY-ROLE`; configurations, sockets, state and logs are in a directory each under
//! `/run/postern-lab/TOPOLOGY/ROLE`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use postern_hwtests::config::{AES128GCM, AH_SUITES, ESP_SUITES, Suite};
use postern_hwtests::netns::{self, Netns};
use postern_hwtests::node::binary;
use postern_hwtests::topology::{Family, Kind, Topology, inside};
use postern_hwtests::veth::Wire;

#[derive(Parser)]
#[command(
    name = "hwtests/lab",
    about = "Network topologies with Postern in them, left standing for hands-on work"
)]
struct Arguments {
    /// Directory of the nodes' files; must be short, since sockets lie in it.
    #[arg(long, default_value = "/run/postern-lab", global = true)]
    dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build a topology and start Postern in its gateways.
    Up {
        /// Which one; see `list`.
        #[arg(value_parser = kind)]
        topology: Kind,
        /// IP version between the gateways; inside, both go through.
        #[arg(long, value_enum, default_value = "v4")]
        outer: Outer,
        /// ESP suite, or `none` with --ah.
        #[arg(long, default_value = "aes128gcm16", value_parser = esp)]
        esp: Choice,
        /// AH suite; with ESP an SA bundle.
        #[arg(long, value_parser = ah)]
        ah: Option<Suite>,
        /// ESP in UDP on port 4500.
        #[arg(long)]
        natt: bool,
        /// Start no Postern: the place for other software.
        #[arg(long)]
        bare: bool,
    },
    /// Remove a topology, or all of them, with all processes in it.
    Down {
        /// Which one; all if left out.
        #[arg(value_parser = kind)]
        topology: Option<Kind>,
    },
    /// Run a command inside one of a topology's namespaces.
    Exec {
        /// Which topology.
        #[arg(value_parser = kind)]
        topology: Kind,
        /// Which namespace: h1, g1, wire, relay, router, g2, h2.
        role: String,
        /// The command.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// List the topologies and which of them stand.
    List,
    /// Show addresses, sockets and commands to try.
    Show {
        /// Which topology.
        #[arg(value_parser = kind)]
        topology: Kind,
    },
    /// Remove what killed test processes left behind.
    Tidy,
}

#[derive(Clone, Copy, ValueEnum)]
enum Outer {
    V4,
    V6,
}

/// An ESP suite or none.
#[derive(Clone, Copy)]
struct Choice(Option<Suite>);

fn kind(text: &str) -> Result<Kind, String> {
    let names = Kind::ALL.map(Kind::name).join(", ");
    Kind::ALL.into_iter().find(|kind| kind.name() == text).ok_or(format!("one of {names}"))
}

fn suite(text: &str, all: &[Suite]) -> Result<Suite, String> {
    let names: Vec<_> = all.iter().map(|suite| suite.name).collect();
    all.iter().find(|suite| suite.name == text).copied().ok_or(format!("one of {}", names.join(", ")))
}

fn esp(text: &str) -> Result<Choice, String> {
    if text == "none" { Ok(Choice(None)) } else { suite(text, &ESP_SUITES).map(|suite| Choice(Some(suite))) }
}

fn ah(text: &str) -> Result<Suite, String> {
    suite(text, &AH_SUITES)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(Arguments { dir, command }: Arguments) -> Result<ExitCode> {
    match command {
        Command::Up { topology, outer, esp: Choice(esp), ah, natt, bare } => {
            up(&dir, topology, outer, esp, ah, natt, bare)?;
        }
        Command::Down { topology } => {
            for kind in topology.map_or(Kind::ALL.to_vec(), |kind| vec![kind]) {
                down(&dir, kind)?;
            }
        }
        Command::Exec { topology, role, command } => {
            let name = format!("{}-{role}", prefix(topology));
            let namespace =
                Netns::existing(&name).with_context(|| format!("`lab up {}` first", topology.name()))?;
            let (program, rest) = command.split_first().context("no command")?;
            let status = namespace.command(program).args(rest).status()?;
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
        }
        Command::List => {
            for kind in Kind::ALL {
                let state = if stands(kind) { "up  " } else { "down" };
                println!("{:7} {state}  {}", kind.name(), kind.help());
            }
        }
        Command::Show { topology } => show(&dir, topology)?,
        Command::Tidy => {
            let removed = netns::janitor();
            if removed > 0 {
                println!("removed {removed} namespaces that dead tests left behind");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn prefix(kind: Kind) -> String {
    format!("lab-{}", kind.name())
}

fn stands(kind: Kind) -> bool {
    !netns::list(&format!("{}-", prefix(kind))).is_empty()
}

fn up(
    dir: &Path,
    kind: Kind,
    outer: Outer,
    esp: Option<Suite>,
    ah: Option<Suite>,
    natt: bool,
    bare: bool,
) -> Result<()> {
    if stands(kind) {
        bail!("{0} stands already: `lab show {0}`, `lab down {0}`", kind.name());
    }
    ensure!(bare || kind != Kind::Roam, "roam is for IKE: static tunnels do not fit it, use --bare");
    ensure!(esp.is_some() || ah.is_some(), "neither ESP nor AH: nothing would be protected");
    ensure!(!natt || ah.is_none(), "AH cannot be encapsulated in UDP (RFC 3948)");
    let outer = match outer {
        Outer::V4 => Family::V4,
        Outer::V6 => Family::V6,
    };
    let files = dir.join(kind.name());
    std::fs::create_dir_all(&files)?;
    let mut topology = Topology::build_named(kind, Wire::default(), &prefix(kind), files)?;
    if !bare {
        let mut pairs = Vec::new();
        for (number, inner) in (0..).zip(Family::ALL) {
            let mut pair =
                topology.tunnel(number, esp.or(ah.is_none().then_some(AES128GCM)), ah, outer, inner)?;
            pair.natt = natt;
            pairs.push(pair);
        }
        topology.start(&pairs)?;
    }
    topology.leave();
    println!("{} stands.\n", kind.name());
    show(dir, kind)
}

fn down(dir: &Path, kind: Kind) -> Result<()> {
    let names = netns::list(&format!("{}-", prefix(kind)));
    for name in &names {
        netns::remove(name);
    }
    let files = dir.join(kind.name());
    if files.exists() {
        std::fs::remove_dir_all(&files)?;
    }
    if !names.is_empty() {
        println!("{} is gone ({} namespaces).", kind.name(), names.len());
    }
    Ok(())
}

fn show(dir: &Path, kind: Kind) -> Result<()> {
    if !stands(kind) {
        bail!("{0} does not stand: `lab up {0}`", kind.name());
    }
    println!("{}", kind.help());
    for role in kind.roles() {
        let name = format!("{}-{role}", prefix(kind));
        let addresses = Netns::existing(&name)?.sh("ip -brief address show scope global")?;
        println!("\n{role} (namespace {name})");
        for line in addresses.lines() {
            println!(
                "  {}",
                line.split_whitespace().filter(|word| *word != "UP").collect::<Vec<_>>().join("  ")
            );
        }
        let files = dir.join(kind.name()).join(role);
        if files.join("control.sock").exists() {
            println!("  configuration  {}", files.join("postern.toml").display());
            println!("  log            {}", files.join("log").display());
            println!(
                "  tables         {} --socket {} sa",
                binary("postern")?.display(),
                files.join("control.sock").display()
            );
        }
    }
    let name = kind.name();
    println!("\nTry:");
    let (host, families) =
        if kind == Kind::Roam { ("client", &Family::ALL[..1]) } else { ("h1", &Family::ALL[..]) };
    for family in families {
        println!("  hwtests/lab exec {name} {host} ping {}", inside(*family, 2, 10));
    }
    println!("  hwtests/lab exec {name} wire tcpdump -ni left");
    println!("  hwtests/lab down {name}");
    Ok(())
}
