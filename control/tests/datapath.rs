//! The contract client and the supervisor against a mock datapath.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a test program: a panic is its way to fail"
)]

mod mock;

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mock::{Mock, Scratch, Tables, eventually, tunnel};
use postern_contract::event::Event;
use postern_contract::request::Operation;
use postern_contract::sa::SaId;
use postern_control::config::{NoKeyFiles, parse};
use postern_control::datapath::client::{Client, ClientError};
use postern_control::datapath::supervisor::{
    Changes, Command, Negotiator, Notice, Options, Order, Supervisor, View,
};
use postern_control::desired::{Desired, NEGOTIATED};
use postern_control::state::Generations;
use postern_wire::ids::Spi;
use tokio::sync::{mpsc, oneshot};

fn desired(text: &str) -> Desired {
    Desired::new(parse("t", text, &NoKeyFiles).unwrap())
}

/// A control process without its rim, in a thread.
struct Control {
    commands: mpsc::Sender<Command>,
    thread: JoinHandle<()>,
}

impl Control {
    fn start(scratch: &Scratch, text: &str) -> Self {
        Self::begin(scratch, text, None)
    }

    fn begin(scratch: &Scratch, text: &str, negotiator: Option<Negotiator>) -> Self {
        let (generations, _) = Generations::open(&scratch.path("state")).unwrap();
        let options = Options { socket: scratch.path("datapath.sock"), launch: None };
        let mut supervisor = Supervisor::new(options, generations, desired(text));
        if let Some(negotiator) = negotiator {
            supervisor = supervisor.with_negotiator(negotiator);
        }
        let (commands, receiver) = mpsc::channel(4);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(supervisor.run(receiver));
        });
        Self { commands, thread }
    }

    fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> T {
        let (reply, answer) = oneshot::channel();
        self.commands.blocking_send(command(reply)).unwrap();
        answer.blocking_recv().unwrap()
    }

    fn look(&self) -> View {
        self.ask(Command::Look)
    }

    fn replace(&self, text: &str, dry_run: bool) -> Changes {
        let desired = desired(text);
        self.ask(|done| Command::Replace { desired, dry_run, done }).unwrap()
    }

    /// Ends it as kill -9 would: the datapath is told nothing.
    fn kill(self) {
        drop(self.commands);
        self.thread.join().unwrap();
    }

    fn wait_until_connected(&self) {
        eventually("connected", || self.look().connected.is_some());
    }
}

/// DP-7: a control process that comes back adopts what is running without touching it.
#[test]
fn dp_7_a_restarted_control_sends_nothing() {
    let scratch = Scratch::new("adopt");
    let text = format!("{}{}{}", tunnel("a", 1, "1a"), tunnel("b", 2, "2b"), RELAY);
    let mock = Mock::start(&scratch.path("datapath.sock"), 1);
    let control = Control::start(&scratch, &text);
    control.wait_until_connected();
    let applies = mock.tables.lock().unwrap().applies;
    assert!(applies > 0);
    assert_eq!(mock.tables.lock().unwrap().sas.len(), 4);
    control.kill();

    let control = Control::start(&scratch, &text);
    control.wait_until_connected();
    let view = control.look();
    assert_eq!(view.installed.sas.len(), 4);
    assert!(
        view.installed.sas.values().all(|report| report.counters.packets == 42),
        "counters are shown again"
    );
    {
        let tables = mock.tables.lock().unwrap();
        assert_eq!((tables.applies, tables.hellos), (applies, 2), "no Apply was sent");
    }
    assert_eq!(control.replace(&text, false), Changes::default());
    assert_eq!(mock.tables.lock().unwrap().applies, applies, "nor for a reload of the same file");
}

/// DP-7: a datapath that was started anew gets everything again, one that only lost the connection gets nothing.
#[test]
fn dp_7_a_restarted_datapath_gets_its_sas_back() {
    let scratch = Scratch::new("restart");
    let socket = scratch.path("datapath.sock");
    let mock = Mock::start(&socket, 1);
    let control = Control::start(&scratch, &tunnel("a", 1, "1a"));
    control.wait_until_connected();
    let Tables { sas, policies, applies, .. } = mock.end();
    eventually("the loss is seen", || control.look().connected.is_none());
    let view = control.look();
    assert!(view.problem.is_some());
    assert_eq!(view.desired.tunnels.len(), 1, "a tunnel that is down does not vanish");

    let kept = Tables {
        version: postern_contract::VERSION,
        instance: 1,
        sas,
        policies,
        applies,
        page: 3,
        ..Tables::default()
    };
    let mock = Mock::with(&socket, kept);
    eventually("connected again", || control.look().connected.is_some());
    assert_eq!(mock.end().applies, applies);

    let mock = Mock::start(&socket, 2);
    eventually("installed again", || mock.tables.lock().unwrap().sas.len() == 2);
    eventually("its new life is shown", || {
        control.look().connected.is_some_and(|(_, instance)| instance == 2)
    });
}

/// IKE-1, DP-7: what was negotiated is left alone by reconciliation, and reported to the negotiator at each connection.
#[test]
fn dp_7_negotiated_objects_belong_to_the_negotiator() {
    let scratch = Scratch::new("negotiator");
    let socket = scratch.path("datapath.sock");
    let mock = Mock::start(&socket, 1);
    let channels = || {
        let (orders, receiver) = mpsc::unbounded_channel();
        let (notices, told) = mpsc::unbounded_channel();
        (Negotiator { orders: receiver, notices }, orders, told)
    };
    let negotiated = |number: u32| {
        let wanted = desired(&tunnel("n", number, &format!("{number:x}c")));
        let id = |id: SaId| SaId(id.0 | NEGOTIATED);
        let install = |sa: postern_control::desired::WantedSa| {
            let config = postern_contract::sa::SaConfig {
                id: id(sa.config.id),
                pair: sa.config.pair.map(id),
                ..sa.config
            };
            Operation::InstallSa(Box::new(config))
        };
        wanted.sas.into_values().map(install).collect::<Vec<_>>()
    };

    let (negotiator, orders, mut told) = channels();
    let control = Control::begin(&scratch, &tunnel("a", 1, "1a"), Some(negotiator));
    let Some(Notice::Connected { instance: 1, installed }) = told.blocking_recv() else { panic!() };
    assert_eq!(installed.sas.len(), 0);
    for token in [7, 8] {
        orders.send(Order { token, operations: negotiated(u32::try_from(token).unwrap()) }).unwrap();
    }
    for expected in [7, 8] {
        let Some(Notice::Applied { token, outcomes: Ok(outcomes) }) = told.blocking_recv() else { panic!() };
        assert_eq!((token, outcomes.len()), (expected, 2));
        assert!(outcomes.iter().all(Result::is_ok));
    }
    let changes = control.replace(&tunnel("b", 2, "2b"), false);
    assert_eq!(changes.steps.len(), 6, "{changes:?}");
    assert_eq!(mock.tables.lock().unwrap().sas.len(), 6, "the reload left them alone");
    let soft = |id| Event::SoftLimit { sa: id, kind: postern_contract::event::LimitKind::Bytes };
    mock.tables.lock().unwrap().events = vec![soft(SaId(1)), soft(SaId(NEGOTIATED | 1))];
    let Some(Notice::Events(events)) = told.blocking_recv() else { panic!() };
    assert_eq!(events, [soft(SaId(NEGOTIATED | 1))]);
    control.kill();

    let (negotiator, orders, mut told) = channels();
    let control = Control::begin(&scratch, &tunnel("b", 2, "2b"), Some(negotiator));
    let Some(Notice::Connected { installed, .. }) = told.blocking_recv() else { panic!() };
    assert_eq!(installed.sas.len(), 4, "what an earlier life negotiated");
    drop(mock);
    let Some(Notice::Lost) = told.blocking_recv() else { panic!() };
    orders.send(Order { token: 9, operations: negotiated(9) }).unwrap();
    loop {
        match told.blocking_recv() {
            Some(Notice::Applied { token: 9, outcomes: Err(_) }) => break,
            Some(Notice::Lost) => {}
            other => panic!("{other:?}"),
        }
    }
    control.kill();
}

/// OPS-2: a reload touches what changed and makes before it breaks; where both cannot be there, the old goes just before.
#[test]
fn ops_2_reload_makes_before_it_breaks() {
    let scratch = Scratch::new("reload");
    let mock = Mock::start(&scratch.path("datapath.sock"), 1);
    let before = format!("{}{}", tunnel("a", 1, "1a"), tunnel("b", 2, "2b"));
    let control = Control::start(&scratch, &before);
    control.wait_until_connected();
    let log = || std::mem::take(&mut mock.tables.lock().unwrap().log);
    let mut first = log();
    first.sort();
    assert_eq!(
        first,
        [
            "install esp in 20001 seq 0",
            "install esp in 20002 seq 0",
            "install esp out 1001 seq 1",
            "install esp out 1002 seq 1",
            "policy 1",
            "policy 2"
        ]
    );

    let rekeyed =
        format!("{}{}", tunnel("a", 1, "1a"), tunnel("b", 2, "3c").replace("spi = 131074", "spi = 131075"));
    let dry = control.replace(&rekeyed, true);
    assert_eq!(dry.steps.len(), 5, "{dry:?}");
    assert!(log().is_empty(), "a dry run sends nothing");
    control.replace(&rekeyed, false);
    let steps = log();
    let place = |word: &str| steps.iter().position(|step| step.starts_with(word)).unwrap();
    assert_eq!(steps.len(), 5, "{steps:?}");
    assert!(place("install esp out 1002") < place("policy 2"), "{steps:?}");
    assert!(place("policy 2") < place("remove esp out 1002"), "{steps:?}");
    assert!(place("install esp in 20003") < place("remove esp in 20002"), "{steps:?}");

    // New keys for the inbound SPI that is in use.
    control.replace(&rekeyed.replace("fa1a", "fe1a"), false);
    assert_eq!(
        log(),
        ["remove esp in 20001 seq 0", "install esp in 20001 seq 0", "install esp out 1001 seq 1"],
        "the pair names the new one"
    );

    // What an installed SA cannot change: it is replaced, and its numbers go on.
    control.replace(
        &rekeyed.replace("fa1a", "fe1a").replacen("priority", "replay_window = 64\npriority", 1),
        false,
    );
    let mut steps = log();
    steps.sort();
    assert_eq!(steps, ["install esp in 20001 seq 1234", "remove esp in 20001 seq 0"]);

    // The same keys under another name: no two SAs may count with them.
    let changes = control.replace(&rekeyed.replace("\"b\"", "\"c\""), false);
    assert_eq!(changes.refused, [""; 0]);
    let steps = log();
    let place = |word: &str| steps.iter().position(|step| step.starts_with(word)).unwrap();
    assert!(place("remove esp out 1002") < place("install esp out 1002"), "{steps:?}");

    control.replace("", false);
    assert!(mock.tables.lock().unwrap().sas.is_empty() && mock.tables.lock().unwrap().policies.is_empty());
}

/// What is refused is shown with the reason, and what worked before goes on.
#[test]
fn refusals_leave_the_old_state_working() {
    let scratch = Scratch::new("refuse");
    let mock = Mock::start(&scratch.path("datapath.sock"), 1);
    let control = Control::start(&scratch, &tunnel("a", 1, "1a"));
    control.wait_until_connected();
    mock.tables.lock().unwrap().refuse.insert(Spi(0x1001));
    let changes = control.replace(&tunnel("a", 1, "2b").replace("spi = 131073", "spi = 131079"), false);
    assert_eq!(changes.refused.len(), 1, "{changes:?}");
    assert!(changes.refused[0].contains("the table is full"), "{changes:?}");
    let tables = mock.tables.lock().unwrap();
    let old = tables.sas.values().filter(|sa| sa.suite.encryption_key.expose()[0] == 0x1a).count();
    assert_eq!(old, 1, "the old outbound SA is still there");
    let policy = tables.policies.values().next().unwrap();
    let postern_contract::sa::Action::Protect(Some(used)) = policy.action else { panic!() };
    assert!(tables.sas.contains_key(&used), "and its policy still names it");
    drop(tables);
    assert_eq!(control.look().refused.len(), 1);
}

/// Events are counted.
#[test]
fn events_are_counted() {
    let scratch = Scratch::new("events");
    let mock = Mock::start(&scratch.path("datapath.sock"), 1);
    let control = Control::start(&scratch, &tunnel("a", 1, "1a"));
    control.wait_until_connected();
    let sa = *mock.tables.lock().unwrap().sas.keys().next().unwrap();
    let moved = Event::NewPath { sa, remote: "198.51.100.7".parse().unwrap(), port: Some(4500) };
    mock.tables.lock().unwrap().events =
        vec![moved, Event::SequenceExhausted { sa: SaId(1) }, Event::Lost { count: 5 }];
    eventually("counted", || control.look().events.len() == 3);
    assert_eq!(control.look().events["lost"], 5);
}

/// A datapath of another version is left alone.
#[test]
fn other_versions_are_refused() {
    let scratch = Scratch::new("version");
    let tables = Tables { version: postern_contract::VERSION + 1, ..Tables::default() };
    let mock = Mock::with(&scratch.path("datapath.sock"), tables);
    let control = Control::start(&scratch, &tunnel("a", 1, "1a"));
    eventually("the reason is shown", || control.look().problem.is_some_and(|text| text.contains("version")));
    assert_eq!(mock.tables.lock().unwrap().applies, 0);
}

/// Issue 2: 100,000 SAs are sent and acknowledged in messages of bounded size; the order and each outcome are kept.
#[test]
fn many_sas_are_pipelined() {
    let scratch = Scratch::new("many");
    let socket = scratch.path("datapath.sock");
    let mock = Mock::start(&socket, 1);
    mock.tables.lock().unwrap().page = 200;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let count = 100_000_u64;
    let took = runtime.block_on(async {
        let mut client = Client::connect(&socket).await.unwrap();
        assert!(client.inventory().await.unwrap().sas.is_empty());
        let begin = Instant::now();
        let outcomes = client.apply(&mut (0..count).map(|id| Operation::RemoveSa(SaId(id)))).await.unwrap();
        assert_eq!(outcomes.len() as u64, count);
        assert!(outcomes.iter().all(|outcome| *outcome == Ok(postern_contract::request::Done::Already)));
        begin.elapsed()
    });
    assert!(took < Duration::from_secs(10), "{took:?}");
    let applies = mock.tables.lock().unwrap().applies;
    assert!(applies > 1, "they did not fit one message");
}

#[test]
fn an_absent_datapath_is_told_apart() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(Client::connect(Path::new("/nonexistent/datapath.sock"))).unwrap_err();
    assert!(error.is_absent());
    assert!(!ClientError::Unexpected.is_absent());
}

const RELAY: &str = r#"
[[relay]]
name = "joe"
client = { relay = "192.0.2.10", peer = "192.0.2.1", esp = { to_relay = 0x3001, from_relay = 0x4001 } }
gateway = { relay = "198.51.100.10", peer = "198.51.100.2", esp = { to_relay = 0x3002, from_relay = 0x4002 } }
"#;
