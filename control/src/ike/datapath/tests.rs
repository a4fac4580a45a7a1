use std::collections::BTreeMap;

use postern_contract::counters::SaCounters;
use postern_contract::request::{Done, SaReport};
use postern_contract::sa::{KeyOrigin, SaConfig};
use postern_ike::Secret;
use postern_ike::config::{Connection, Mode};
use postern_ike::message::registry::{EncrId, IntegId, ProtocolId};
use postern_wire::ids::Protocol;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::leftovers::LEFTOVER;
use super::*;
use crate::config::{NoKeyFiles, parse};
use crate::datapath::reconcile::Installed;

const FILE: &str = r#"
[[connection]]
name = "a"
remote = "192.0.2.2"
local_auth = { method = "psk", id = "a.example.org", secret = "a secret that is long enough" }
remote_auth = { method = "psk", id = "b.example.org", secret = "a secret that is long enough" }
[[connection.child]]
name = "net"
local_net = ["10.1.0.0/24"]
remote_net = ["10.2.0.0/24"]
start = "trap"
"#;

/// The driver's half and a datapath that does what it is told.
struct World {
    datapath: Datapath,
    orders: UnboundedReceiver<Order>,
    connection: Arc<Connection>,
    settings: ChildSettings,
    sas: BTreeMap<DatapathSa, SaConfig>,
    policies: BTreeMap<PolicyId, Policy>,
    /// Every SA that was ever installed, and in which lives.
    history: HashMap<DatapathSa, HashSet<u64>>,
    instance: u64,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let mut config = parse("t", FILE, &NoKeyFiles).unwrap().ike.connections;
        let crate::config::ike::Connection { ike, mut children, .. } = config.remove(0);
        let (orders, receiver) = unbounded_channel();
        Self {
            datapath: Datapath::new(orders, Arc::new(Mutex::new(Spis::new(64)))),
            orders: receiver,
            connection: ike,
            settings: children.remove(0),
            sas: BTreeMap::new(),
            policies: BTreeMap::new(),
            history: HashMap::new(),
            instance: 1,
            now: Instant::now(),
        }
    }

    fn child(&self, id: u64, net: u8, in_use: bool) -> Box<ChildSa> {
        let selector = |net: String| {
            let net: ipnet::IpNet = net.parse().unwrap();
            vec![postern_ike::message::TrafficSelector::new(net, 0, 0..=u16::MAX)]
        };
        let key = |side: u8| (Secret::new(vec![side; 20]), Secret::default());
        let number = u8::try_from(id).unwrap();
        Box::new(ChildSa {
            id: ChildId(id),
            connection: Arc::clone(&self.connection),
            child: 0,
            protocol: ProtocolId::ESP,
            mode: Mode::Tunnel,
            spi_in: 0x1000 + u32::from(number),
            spi_out: 0x2000 + u32::from(number),
            encr: EncrId::AES_GCM_16,
            integ: IntegId::NONE,
            esn: true,
            keys_in: key(number),
            keys_out: key(number | 0x80),
            local_ts: selector("10.1.0.0/24".to_owned()),
            remote_ts: selector(format!("10.2.{net}.0/24")),
            local: "192.0.2.1".parse().unwrap(),
            remote: "192.0.2.2".parse().unwrap(),
            encap: None,
            replaces: None,
            in_use,
            leases: Vec::new(),
            origin: postern_ike::output::Origin::Negotiated,
        })
    }

    fn install(&mut self, id: u64, net: u8, in_use: bool) {
        let child = self.child(id, net, in_use);
        self.datapath.install(self.now, child, self.settings.clone()).unwrap();
    }

    fn inventory(&self) -> Installed {
        let report = |sa: &SaConfig| SaReport {
            id: sa.id,
            generation: sa.generation,
            direction: sa.direction,
            protocol: sa.protocol,
            mode: sa.mode,
            spi: sa.spi,
            local: sa.local,
            remote: sa.remote,
            encap: sa.encap,
            worker: 0,
            stopped: false,
            key_check: sa.suite.key_check(),
            counters: SaCounters::default(),
        };
        Installed {
            sas: self.sas.values().map(|sa| (sa.id, report(sa))).collect(),
            policies: self.policies.clone(),
            relays: BTreeMap::new(),
        }
    }

    fn connect(&mut self) -> Vec<Told> {
        let notice = Notice::Connected { instance: self.instance, installed: self.inventory() };
        self.datapath.notice(self.now, notice)
    }

    /// The datapath ends and begins anew, empty.
    fn restart(&mut self) {
        self.datapath.notice(self.now, Notice::Lost);
        self.sas.clear();
        self.policies.clear();
        self.instance += 1;
    }

    /// Carries out all orders and says so; gives what IKE is told.
    fn settle(&mut self) -> Vec<Told> {
        let mut told = Vec::new();
        while let Ok(Order { token, operations }) = self.orders.try_recv() {
            let mut outcomes = Vec::new();
            for operation in operations {
                self.apply(operation);
                outcomes.push(Ok(Done::Applied));
            }
            told.extend(self.datapath.notice(self.now, Notice::Applied { token, outcomes: Ok(outcomes) }));
        }
        told
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::InstallSa(config) => {
                self.history.entry(config.id).or_default().insert(self.instance);
                if let Some(old) = self.sas.get(&config.id) {
                    assert!(old.generation <= config.generation);
                }
                self.sas.insert(config.id, *config);
            }
            Operation::RemoveSa(id) => {
                self.sas.remove(&id);
            }
            Operation::InstallPolicy(policy) => {
                if let Some(old) = self.policies.get(&policy.id) {
                    assert!(old.generation < policy.generation);
                }
                self.policies.insert(policy.id, policy);
            }
            Operation::RemovePolicy(id) => {
                self.policies.remove(&id);
            }
            Operation::InstallRelay(_) | Operation::RemoveRelay(_) => panic!("no relays here"),
        }
    }

    /// Where traffic to 10.2.NET.9 goes.
    fn lookup(&self, net: u8) -> Goes {
        let address: IpAddr = [10, 2, net, 9].into();
        let matching = self
            .policies
            .values()
            .filter(|policy| policy.selectors.iter().any(|selector| selector.remote.contains(address)));
        let Some(first) = matching.min_by_key(|policy| (policy.priority, policy.id)) else {
            return Goes::Free;
        };
        let Action::Protect(sa) = first.action else { panic!("{first:?}") };
        match sa.and_then(|sa| self.sas.get(&sa)) {
            Some(sa) => Goes::Through(sa.spi.on_wire.0),
            None => Goes::Nowhere,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Goes {
    /// Through the SA of this SPI.
    Through(u32),
    /// Held.
    Nowhere,
    /// No policy takes it.
    Free,
}

fn installed(told: &[Told]) -> Vec<(u64, bool)> {
    told.iter()
        .filter_map(|told| match told {
            Told::Installed(id, result) => Some((id.0, result.is_ok())),
            _ => None,
        })
        .collect()
}

/// IKE-1: a child is installed with its policy, a rekey switches the policy in one step, and what is retired goes.
#[test]
fn ike_1_install_use_retire() {
    let mut world = World::new();
    world.install(1, 0, true);
    assert!(world.settle().is_empty(), "it waits for a connection");
    world.connect();
    assert_eq!(installed(&world.settle()), [(1, true)]);
    assert_eq!(world.lookup(0), Goes::Through(0x2001));
    let policy = *world.policies.keys().next().unwrap();
    let [inbound, outbound] =
        [0x1001, 0x2001].map(|spi| world.sas.values().find(|sa| sa.spi.on_wire.0 == spi).unwrap());
    assert_eq!((inbound.pair, outbound.pair), (Some(outbound.id), Some(inbound.id)));
    assert!(
        inbound.origin == KeyOrigin::Negotiated
            && inbound.esn
            && inbound.sequence == 0
            && outbound.sequence == 1
    );
    assert_eq!(inbound.selectors.len(), 1);

    world.install(2, 0, false);
    assert_eq!(installed(&world.settle()), [(2, true)]);
    assert_eq!(world.lookup(0), Goes::Through(0x2001), "the new one only receives");
    assert!(world.datapath.put_in_use(SaId(9), ChildId(2)));
    assert!(matches!(world.settle()[..], [Told::Resume(SaId(9))]));
    assert_eq!(world.lookup(0), Goes::Through(0x2002));
    assert_eq!(world.policies.keys().collect::<Vec<_>>(), [&policy], "the policy is the same one");
    world.datapath.retire(ChildId(1));
    world.settle();
    assert_eq!((world.sas.len(), world.lookup(0)), (2, Goes::Through(0x2002)));

    let moved = ("192.0.2.1".parse().unwrap(), "198.51.100.7".parse().unwrap());
    assert!(world.datapath.move_to(SaId(9), ChildId(2), moved, Some((4500, 1234))));
    world.settle();
    assert!(world.sas.values().all(|sa| sa.remote.on_wire == moved.1 && sa.encap.is_some()));
    world.datapath.retire(ChildId(2));
    world.settle();
    assert_eq!((world.sas.len(), world.policies.len()), (0, 0));
}

/// RFC 7296 section 2.8.1: of two rekeys at once one is deleted; traffic goes on through the other.
#[test]
fn ike_1_simultaneous_rekey() {
    let mut world = World::new();
    world.connect();
    for id in [1, 2, 3] {
        world.install(id, 0, true);
    }
    world.settle();
    assert_eq!(world.lookup(0), Goes::Through(0x2003));
    assert!(
        world.datapath.put_in_use(SaId(9), ChildId(1)),
        "one that was in use before is put in front again"
    );
    world.settle();
    assert_eq!(world.lookup(0), Goes::Through(0x2001));
    assert!(world.datapath.put_in_use(SaId(9), ChildId(3)));
    assert!(!world.datapath.put_in_use(SaId(9), ChildId(3)), "it is in use already");
    world.settle();
    assert_eq!(world.lookup(0), Goes::Through(0x2003));
    world.datapath.retire(ChildId(3));
    world.settle();
    assert_eq!(world.lookup(0), Goes::Through(0x2001), "the one used before it");
    world.datapath.retire(ChildId(1));
    world.settle();
    assert_eq!(world.lookup(0), Goes::Through(0x2002));
}

/// DP-4, DP-6: no negotiated SA is installed in two lives of the datapath; its traffic is held, and IKE told to make new
/// keys. An installation whose answer was lost fails if that life is over, and goes on if it is not.
#[test]
fn dp_4_no_sa_has_two_lives() {
    let mut world = World::new();
    world.connect();
    world.install(1, 0, true);
    world.settle();
    world.install(2, 1, true);
    let order = world.orders.try_recv().unwrap();
    let unclear = Notice::Applied { token: order.token, outcomes: Err("broken".to_owned()) };
    assert!(world.datapath.notice(world.now, unclear).is_empty());
    for operation in order.operations {
        world.apply(operation);
    }
    world.datapath.notice(world.now, Notice::Lost);
    world.connect();
    assert_eq!(installed(&world.settle()), [(2, true)], "the same life");

    world.install(3, 2, true);
    let order = world.orders.try_recv().unwrap();
    world
        .datapath
        .notice(world.now, Notice::Applied { token: order.token, outcomes: Err("broken".to_owned()) });
    world.restart();
    let told = world.connect();
    assert_eq!(installed(&told), [(3, false)]);
    let lost = told.iter().find_map(|told| match told {
        Told::Lost(lost) => Some(lost.iter().map(|id| id.0).collect::<HashSet<_>>()),
        _ => None,
    });
    assert_eq!(lost, Some(HashSet::from([1, 2])));
    world.settle();
    assert_eq!(world.sas.len(), 0);
    assert_eq!((world.lookup(0), world.lookup(1)), (Goes::Nowhere, Goes::Nowhere), "held, not in the clear");
    world.install(4, 0, false);
    world.settle();
    world.datapath.put_in_use(SaId(1), ChildId(4));
    world.settle();
    world.datapath.retire(ChildId(1));
    world.settle();
    assert_eq!(world.lookup(0), Goes::Through(0x2004));
    assert!(world.history.values().all(|lives| lives.len() == 1), "{:?}", world.history);
}

/// A child waits for a datapath that is away, but not for ever.
#[test]
fn ike_1_patience_ends() {
    let mut world = World::new();
    world.install(1, 0, true);
    assert!(world.datapath.tick(world.now + PATIENCE / 2).is_empty());
    assert_eq!(installed(&world.datapath.tick(world.now + PATIENCE)), [(1, false)]);
    world.connect();
    world.settle();
    assert_eq!((world.sas.len(), world.policies.len()), (0, 0));
}

/// RST-4, DP-7: SAs of an earlier control process go on until they are replaced, and their SPIs are not given out.
#[test]
fn dp_7_leftovers_are_replaced() {
    let mut before = World::new();
    before.connect();
    before.install(1, 0, true);
    before.install(2, 1, true);
    before.settle();

    let mut world = World::new();
    (world.sas, world.policies) = (before.sas, before.policies);
    let told = world.connect();
    let [Told::Connected { leftovers }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(*leftovers, HashSet::from(["192.0.2.2".parse().unwrap()]));
    world.settle();
    assert_eq!((world.lookup(0), world.lookup(1)), (Goes::Through(0x2001), Goes::Through(0x2002)));
    assert!(world.datapath.spis.lock().unwrap().is_taken(0x1001));

    let policies = world.policies.keys().copied().collect::<Vec<_>>();
    let mut child = world.child(3, 0, true);
    child.remote = "198.51.100.1".parse().unwrap();
    world.datapath.install(world.now, child, world.settings.clone()).unwrap();
    world.settle();
    assert_eq!(world.lookup(0), Goes::Through(0x2003));
    assert_eq!(world.policies.keys().copied().collect::<Vec<_>>(), policies, "without a gap");
    assert_eq!(world.sas.len(), 6, "what is under way still arrives");
    assert!(world.datapath.tick(Instant::now() + DRAIN + DRAIN).is_empty());
    world.settle();
    assert_eq!((world.sas.len(), world.lookup(1)), (4, Goes::Through(0x2002)), "only what was replaced");
    assert!(!world.datapath.spis.lock().unwrap().is_taken(0x1001));
    assert!(world.datapath.spis.lock().unwrap().is_taken(0x1002));

    // The peer of the other one comes back, with other selectors.
    world.install(4, 7, true);
    world.settle();
    world.datapath.tick(Instant::now() + DRAIN + DRAIN);
    world.settle();
    assert_eq!((world.sas.len(), world.lookup(1)), (4, Goes::Free));
    world.datapath.tick(Instant::now() + LEFTOVER + DRAIN);
    world.settle();
    assert_eq!(world.sas.len(), 4, "children are not leftovers");
}

/// IKE-1: traffic of a child that is not up is held and asks for it, not too often; the child's own policy comes first.
#[test]
fn ike_1_traps() {
    let mut world = World::new();
    let config = &world.connection.children[0];
    let selectors = trap_of(&world.connection, config);
    let trap =
        Trap { connection: "a".into(), child: "net".into(), priority: world.settings.priority, selectors };
    world.datapath.set_traps(vec![trap.clone()]);
    world.connect();
    world.settle();
    assert_eq!(world.lookup(0), Goes::Nowhere);
    let policy = *world.policies.keys().next().unwrap();
    let acquire = || {
        Notice::Events(vec![Event::Acquire {
            policy,
            source: "10.1.0.1".parse().unwrap(),
            destination: "10.2.0.1".parse().unwrap(),
            protocol: Protocol(6),
            ports: (1, 2),
        }])
    };
    assert!(
        matches!(&world.datapath.notice(world.now, acquire())[..], [Told::Acquire { child, .. }] if &**child == "net")
    );
    assert!(world.datapath.notice(world.now, acquire()).is_empty());
    assert_eq!(world.datapath.notice(world.now + ACQUIRE, acquire()).len(), 1);

    world.install(1, 0, true);
    world.settle();
    assert_eq!(world.lookup(0), Goes::Through(0x2001));
    world.restart();
    world.connect();
    world.settle();
    assert_eq!(world.policies.len(), 2);
    world.datapath.retire(ChildId(1));
    world.settle();
    assert_eq!(world.lookup(0), Goes::Nowhere);
    world.datapath.set_traps(vec![trap]);
    assert!(world.orders.try_recv().is_err(), "nothing changed");
    world.datapath.set_traps(Vec::new());
    world.settle();
    assert_eq!(world.lookup(0), Goes::Free);
}

fn trap_of(connection: &Connection, child: &postern_ike::config::Child) -> Vec<Selector> {
    crate::ike::describe::trap_selectors(connection, child, |_| None).unwrap()
}
