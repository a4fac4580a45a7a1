//! AF_XDP on veth pairs, with the kernel's own stack and packet sockets at the other end.
//!
//! Each test has network namespaces of its own: `near`, where our sockets are, and `far`, the world. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, which clippy does not take for tests"
)]

#[path = "netns/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod netns;
#[path = "netns/redirect.rs"]
mod redirect;
#[path = "netns/wire.rs"]
mod wire;

use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use netns::Netns;
use postern_contract::counters::DropReason;
use postern_contract::settings::{Backend, Role};
use postern_datapath::assembly::{Assembly, Interface, Parts, assemble};
use postern_datapath::core::PortInfo;
use postern_datapath::fib::{Fib, Resolver};
use postern_datapath::frame::{Arena, BATCH, Frame, HEADROOM, Pool};
use postern_datapath::numa::Placement;
use postern_datapath::port::netdev::Netdev;
use postern_datapath::port::xsk::{BusyPoll, Umem, XskError, XskOptions, XskSocket};
use postern_datapath::port::{LinkKind, Port, PortStats};
use postern_datapath::reserve::Ledger;
use postern_wire::ether::Mac;
use redirect::Redirect;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use wire::{Wire, index};

/// Two namespaces joined by `pairs` veth pairs, `n0`-`f0`, `n1`-`f1` …, of so many queues each.
fn veth(pairs: usize, queues: u32) -> (Netns, Netns) {
    let (near, far) = (Netns::new("near"), Netns::new("far"));
    for pair in 0..pairs {
        near.ip(&format!(
            "link add name n{pair} numtxqueues {queues} numrxqueues {queues} type veth \
             peer name f{pair} numtxqueues {queues} numrxqueues {queues} netns {}",
            far.name()
        ));
        for (side, name) in [(&near, format!("n{pair}")), (&far, format!("f{pair}"))] {
            // Nothing but the test's own packets: no IPv6 neighbour discovery.
            side.exec(&format!("sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1"));
            side.ip(&format!("link set {name} up"));
        }
        near.wait_until_up(&format!("n{pair}"));
        far.wait_until_up(&format!("f{pair}"));
    }
    (near, far)
}

/// An Ethernet frame of a type that no stack answers, with a payload that tells packets apart.
fn packet(number: u32, length: usize) -> Vec<u8> {
    let mut packet = vec![0xff; 6];
    packet.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    packet.extend(number.to_be_bytes());
    packet.resize(length, 0x5a);
    packet
}

fn number(packet: &[u8]) -> u32 {
    u32::from_be_bytes(packet[14..18].try_into().unwrap())
}

struct World {
    near: Netns,
    far: Netns,
    arena: Arena,
    umem: Umem,
    pool: Pool,
}

fn world(pairs: usize, queues: u32, frames: u32) -> World {
    let (near, far) = veth(pairs, queues);
    let (arena, all) = Arena::new(frames, false).unwrap();
    let pool = Pool::split(all, 1).pop().unwrap();
    World { near, far, umem: Umem::new(arena.clone()), arena, pool }
}

impl World {
    /// A socket on queue 0 of a near interface, with the program attached and frames lent.
    fn socket(&mut self, interface: &str, options: XskOptions) -> (XskSocket, Redirect) {
        let (umem, name) = (self.umem.clone(), interface.to_owned());
        let (mut socket, program) = self.near.within(move || {
            let socket = XskSocket::bind(&umem, &name, 0, options).unwrap();
            let program = Redirect::attach(index(&name));
            program.set(0, socket.fd().unwrap());
            (socket, program)
        });
        socket.flush(&self.arena, &mut self.pool);
        (socket, program)
    }

    fn wire(&self, interface: &str) -> Wire {
        self.far.within(|| Wire::open(interface))
    }

    /// Receives until `count` frames came or two seconds passed.
    fn receive(&mut self, socket: &mut XskSocket, count: usize) -> Vec<Frame> {
        let until = Instant::now() + Duration::from_secs(2);
        let mut all = Vec::new();
        let mut batch = ArrayVec::<Frame, BATCH>::new();
        while all.len() < count && Instant::now() < until {
            socket.receive(&self.arena, &mut self.pool, &mut batch);
            all.extend(batch.drain(..));
            socket.flush(&self.arena, &mut self.pool);
        }
        all
    }

    fn give(&mut self, frames: Vec<Frame>) {
        for frame in frames {
            self.pool.give(frame);
        }
    }
}

const OPTIONS: XskOptions =
    XskOptions { zero_copy: false, ring: 256, fill: 256, need_wakeup: true, busy_poll: None };

/// DP-1: what the program redirects is received, in order, with the headroom that encapsulation needs; the descriptor becomes
/// readable for a worker that waits.
#[test]
fn dp_1_frames_are_received() {
    let mut world = world(1, 1, 1024);
    let (mut socket, _program) = world.socket("n0", OPTIONS);
    assert_eq!(socket.describe(), "xsk copy n0 queue 0");
    assert_eq!(socket.link(), LinkKind::Ethernet);
    let wire = world.wire("f0");
    for n in 0..200 {
        wire.send(&packet(n, 60 + usize::try_from(n).unwrap()));
    }
    let mut fds = [PollFd::from_borrowed_fd(socket.wait_fd().unwrap(), PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).unwrap(), 1);
    let frames = world.receive(&mut socket, 200);
    assert_eq!(frames.len(), 200);
    for (n, frame) in (0..200).zip(&frames) {
        assert_eq!(world.arena.bytes(frame), packet(n, 60 + usize::try_from(n).unwrap()));
        assert!(frame.headroom() >= HEADROOM, "{}", frame.headroom());
    }
    world.give(frames);
    socket.drain(&world.arena, &mut world.pool);
    assert_eq!(world.pool.available(), 1024);
}

/// DP-2: a header is put before a packet in its headroom and the frame leaves where it lies.
#[test]
fn dp_2_frames_are_sent_with_headers_put_before_them() {
    let mut world = world(1, 1, 1024);
    let (mut socket, _program) = world.socket("n0", OPTIONS);
    let wire = world.wire("f0");
    let mut expected = Vec::new();
    for n in 0..150_u32 {
        let mut batch = ArrayVec::<Frame, BATCH>::new();
        let mut frame = world.pool.take().unwrap();
        frame.grow_back(50).unwrap();
        world.arena.bytes_mut(&mut frame).fill(0x5a);
        let header = packet(n, 14 + 4 + usize::try_from(n).unwrap());
        frame.grow_front(header.len()).unwrap();
        world.arena.bytes_mut(&mut frame)[..header.len()].copy_from_slice(&header);
        expected.push(world.arena.bytes(&frame).to_vec());
        batch.push(frame);
        assert_eq!(socket.transmit(&world.arena, &mut world.pool, &mut batch), 1);
        if n % 50 == 49 {
            socket.flush(&world.arena, &mut world.pool);
        }
    }
    for expected in expected {
        assert_eq!(wire.receive().unwrap(), expected);
    }
    assert_eq!(wire.receive(), None);
    assert_eq!(socket.statistics().unwrap().tx_invalid, 0);
    socket.drain(&world.arena, &mut world.pool);
    assert_eq!(world.pool.available(), 1024);
    assert_eq!(socket.lent(), 0);
}

/// Whatever the kernel is told of wakeups, packets come and go, and all frames return.
fn both_ways(options: XskOptions) {
    let mut world = world(1, 1, 1024);
    let (mut socket, _program) = world.socket("n0", options);
    let wire = world.wire("f0");
    for round in 0..10 {
        for n in 0..100 {
            wire.send(&packet(round * 100 + n, 200));
        }
        let mut frames = world.receive(&mut socket, 100);
        assert_eq!(frames.len(), 100, "in round {round}");
        for (n, frame) in (0..).zip(&frames) {
            assert_eq!(number(world.arena.bytes(frame)), round * 100 + n);
        }
        while !frames.is_empty() {
            let mut batch: ArrayVec<Frame, BATCH> = frames.drain(..frames.len().min(BATCH)).collect();
            let count = batch.len();
            assert_eq!(socket.transmit(&world.arena, &mut world.pool, &mut batch), count);
            socket.flush(&world.arena, &mut world.pool);
        }
        for n in 0..100 {
            assert_eq!(wire.receive().map(|packet| number(&packet)), Some(round * 100 + n));
        }
        assert!(!socket.busy());
    }
    socket.drain(&world.arena, &mut world.pool);
    assert_eq!((socket.stats(), world.pool.available()), (PortStats::default(), 1024));
}

/// DP-2: without need_wakeup nothing in the rings asks for a call, and what is to be sent is sent.
#[test]
fn dp_2_need_wakeup_may_be_off() {
    both_ways(XskOptions { need_wakeup: false, ..OPTIONS });
}

const BUSY: XskOptions = XskOptions { busy_poll: Some(BusyPoll { microseconds: 20, budget: 64 }), ..OPTIONS };

/// DP-2: busy polling, with and without need_wakeup.
#[test]
fn dp_2_busy_polling_works_both_ways() {
    both_ways(BUSY);
    both_ways(XskOptions { need_wakeup: false, ..BUSY });
}

/// DP-2: a worker that polls runs the driver's receive loop itself: while it does, interrupts are put off as the interface
/// is told, and packets come when they are asked for.
#[test]
fn dp_2_busy_polling_runs_the_drivers_loop() {
    let mut world = world(1, 1, 1024);
    // A veth's receive loop has a number when XDP comes only if GRO made it begin before.
    world.near.exec("ethtool -K n0 gro on");
    let (mut socket, _program) = world.socket("n0", BUSY);
    assert_eq!(socket.describe(), "xsk copy n0 queue 0, busy poll");
    for (file, value) in [("napi_defer_hard_irqs", 100), ("gro_flush_timeout", 1_500_000_000)] {
        world.near.exec(&format!("echo {value} > /sys/class/net/n0/{file}"));
    }
    let wire = world.wire("f0");
    wire.send(&packet(0, 60));
    let frames = world.receive(&mut socket, 1);
    assert_eq!(frames.len(), 1);
    world.give(frames);
    socket.ask_kernel();
    if !socket.is_busy_polled() {
        // From 6.14 on the kernel takes the loop that the driver told it of, and veth tells it of none.
        eprintln!("not checked: this kernel knows no receive loop of a veth");
        return;
    }
    let mut batch = ArrayVec::<Frame, BATCH>::new();
    // The loop is the worker's from here on.
    socket.receive(&world.arena, &mut world.pool, &mut batch);
    assert!(batch.is_empty());
    for n in 1..=40 {
        wire.send(&packet(n, 60));
    }
    let mut fds = [PollFd::from_borrowed_fd(socket.wait_fd().unwrap(), PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 })).unwrap(), 0);
    socket.receive(&world.arena, &mut world.pool, &mut batch);
    assert_eq!(batch.len(), 40);
    world.give(batch.drain(..).collect());
    socket.drain(&world.arena, &mut world.pool);
    assert_eq!(world.pool.available(), 1024);
}

/// OPS-1: a kernel that refuses busy polling is told of, with what to do.
#[test]
fn ops_1_refused_busy_polling_is_told() {
    let world = world(1, 1, 256);
    let umem = world.umem.clone();
    let error = world.near.within(move || {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).unwrap();
        XskSocket::bind(&umem, "n0", 0, BUSY).unwrap_err()
    });
    let text = error.to_string();
    assert!(text.contains("interface n0") && text.contains("busy_poll_us = 0"), "{text}");
    assert!(text.contains("not permitted") && text.contains("CAP_NET_ADMIN"), "{text}");
}

/// DP-6: a burst has all frames that are lent; a queue that stands, batch after batch, has a few; and once it is empty, all
/// are lent again.
#[test]
fn dp_6_a_queue_that_stands_has_few_frames() {
    let mut world = world(1, 1, 4096);
    let options = XskOptions { ring: 2048, fill: 2048, ..OPTIONS };
    let (mut socket, _program) = world.socket("n0", options);
    let wire = world.wire("f0");
    (0..2048).for_each(|n| wire.send(&packet(n, 60)));
    let mut batch = ArrayVec::<Frame, BATCH>::new();
    let (mut rounds, mut received) = (0, 0);
    while rounds < 200 {
        (0..BATCH).for_each(|_| wire.send(&packet(0, 60)));
        socket.receive(&world.arena, &mut world.pool, &mut batch);
        assert_eq!(batch.len(), BATCH, "in round {rounds}");
        received += batch.len();
        world.give(batch.drain(..).collect());
        socket.flush(&world.arena, &mut world.pool);
        rounds += 1;
        if rounds < 64 {
            assert_eq!(socket.lent(), 2048, "in round {rounds}");
        }
    }
    assert_eq!(socket.lent(), 512);
    loop {
        socket.receive(&world.arena, &mut world.pool, &mut batch);
        if batch.is_empty() {
            break;
        }
        received += batch.len();
        world.give(batch.drain(..).collect());
    }
    socket.flush(&world.arena, &mut world.pool);
    assert_eq!(socket.lent(), 2048);
    socket.ask_kernel();
    let sent = 2048 + 200 * BATCH;
    assert_eq!(usize::try_from(socket.stats().fill_ring_empty).unwrap() + received, sent);
    socket.drain(&world.arena, &mut world.pool);
    assert_eq!(world.pool.available(), 4096);
}

/// DP-2: interfaces share the packet memory, so a frame received on one is sent on the other where it lies, uncopied.
#[test]
fn dp_2_a_frame_crosses_from_one_interface_to_another_uncopied() {
    let mut world = world(2, 1, 1024);
    let (mut one, _program) = world.socket("n0", OPTIONS);
    let (mut two, _other) = world.socket("n1", OPTIONS);
    let (from, to) = (world.wire("f0"), world.wire("f1"));
    for round in 0..20 {
        for n in 0..64 {
            from.send(&packet(round * 64 + n, 200));
        }
        let frames = world.receive(&mut one, 64);
        assert_eq!(frames.len(), 64);
        let places: Vec<_> = frames.iter().map(|frame| world.arena.bytes(frame).as_ptr()).collect();
        let mut batch: ArrayVec<Frame, BATCH> = frames.into_iter().collect();
        assert!(batch.iter().zip(places).all(|(frame, place)| world.arena.bytes(frame).as_ptr() == place));
        assert_eq!(two.transmit(&world.arena, &mut world.pool, &mut batch), 64);
        two.flush(&world.arena, &mut world.pool);
        for n in 0..64 {
            assert_eq!(number(&to.receive().unwrap()), round * 64 + n);
        }
    }
    for socket in [&mut one, &mut two] {
        socket.drain(&world.arena, &mut world.pool);
        assert_eq!(socket.stats(), postern_datapath::port::PortStats::default());
    }
    assert_eq!(world.pool.available(), 1024);
}

/// DP-6: full rings lose packets in a place that is counted, and no frame.
#[test]
fn dp_6_full_rings_are_counted_and_lose_no_frame() {
    let mut world = world(1, 1, 1024);
    let options = XskOptions { ring: 64, fill: 64, ..OPTIONS };
    let (mut socket, _program) = world.socket("n0", options);
    // Receive: nobody empties the ring. 64 frames were lent, the rest finds none.
    let wire = world.wire("f0");
    for n in 0..500 {
        wire.send(&packet(n, 60));
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(socket.stats(), PortStats::default(), "not asked yet");
    socket.ask_kernel();
    assert_eq!(socket.stats(), PortStats { fill_ring_empty: 500 - 64, ..PortStats::default() });
    let frames = world.receive(&mut socket, 64);
    assert_eq!(frames.len(), 64);
    assert_eq!(number(world.arena.bytes(&frames[63])), 63);
    world.give(frames);
    // It goes on afterwards.
    wire.send(&packet(1000, 60));
    let frames = world.receive(&mut socket, 1);
    assert_eq!(number(world.arena.bytes(&frames[0])), 1000);
    world.give(frames);
    // Transmit: nobody wakes the kernel. The second batch does not fit and stays with the caller.
    let mut batch = ArrayVec::<Frame, BATCH>::new();
    for n in 0..100 {
        let mut frame = world.pool.take().unwrap();
        frame.grow_back(60).unwrap();
        world.arena.bytes_mut(&mut frame).copy_from_slice(&packet(n, 60));
        batch.push(frame);
        if batch.is_full() {
            socket.transmit(&world.arena, &mut world.pool, &mut batch);
        }
    }
    assert_eq!(batch.len(), 36);
    assert_eq!(socket.transmit(&world.arena, &mut world.pool, &mut batch), 0);
    assert!(socket.busy());
    world.give(batch.drain(..).collect());
    // An empty frame never gets to the kernel, which would lose it.
    socket.flush(&world.arena, &mut world.pool);
    assert!(!socket.busy());
    batch.push(world.pool.take().unwrap());
    assert_eq!(socket.transmit(&world.arena, &mut world.pool, &mut batch), 1);
    assert_eq!(socket.stats().malformed, 1);
    socket.drain(&world.arena, &mut world.pool);
    assert_eq!(world.pool.available(), 1024);
}

/// DP-6: a worker that cannot keep up: what was sent to it was received, and dropped for its reason, or was dropped by the
/// kernel and is counted all the same, for the interface, within a second.
#[test]
fn dp_6_overload_is_counted() {
    const SENT: u32 = 3000;
    let mut world = world(1, 1, 1024);
    let (socket, _program) = world.socket("n0", XskOptions { ring: 128, fill: 128, ..OPTIONS });
    let state = tempfile::tempdir().unwrap();
    let info = PortInfo {
        name: "n0".to_owned(),
        role: Role::Inside,
        link: LinkKind::Ethernet,
        mac: Mac([2, 0, 0, 0, 0, 1]),
        host: false,
        socket: false,
    };
    let frames = std::iter::from_fn(|| world.pool.take()).collect();
    let Assembly { publisher, mut workers, bell: _ } = assemble(Parts {
        arena: world.arena.clone(),
        frames,
        interfaces: vec![Interface { info, queues: vec![Some(Box::new(socket))] }],
        fib: Fib::empty(),
        resolver: Resolver::unattended(),
        ledger: Ledger::open(state.path()).unwrap(),
        sa_slots: 64,
        backend: Backend::Auto,
        placement: Placement::anywhere(1),
    })
    .unwrap();
    let worker = &mut workers[0];
    worker.turn(Duration::ZERO);
    let wire = world.wire("f0");
    for n in 0..SENT {
        wire.send(&packet(n, 60));
        // Slower than the wire, but not stopped.
        if n % 500 == 499 {
            std::thread::sleep(Duration::from_millis(10));
            worker.turn(Duration::ZERO);
        }
    }
    std::thread::sleep(Duration::from_millis(50));
    while worker.turn(Duration::ZERO) {}
    let cells = &publisher.workers()[0].cells;
    let received = cells.ports[0].received.get();
    assert!(received >= 128 && received < u64::from(SENT) / 2, "{received}");
    assert_eq!(cells.drops(DropReason::NotForUs), received);
    assert_eq!(cells.all_drops(), received, "the kernel is not asked in every turn");
    worker.turn(Duration::from_secs(1));
    assert_eq!(cells.drops(DropReason::FillRingEmpty), u64::from(SENT) - received);
    assert_eq!(cells.all_drops(), u64::from(SENT));
    assert_eq!(worker.refused(), u64::from(SENT) - received);
    let label = DropReason::FillRingEmpty.label();
    assert!(cells.ports[0].snapshot().drops.iter().any(|(reason, _)| reason.label() == label));
}

/// DP-2: one UMEM for all queues of all interfaces; each queue's socket has frames lent and sends.
#[test]
fn dp_2_queues_of_several_workers_share_the_umem() {
    let mut world = world(2, 2, 2048);
    let mut sockets = Vec::new();
    for interface in ["n0", "n1"] {
        for queue in 0..2 {
            let umem = world.umem.clone();
            let bind = move || XskSocket::bind(&umem, interface, queue, OPTIONS).unwrap();
            sockets.push(world.near.within(bind));
        }
    }
    let wires = [world.wire("f0"), world.wire("f1")];
    for socket in &mut sockets {
        socket.flush(&world.arena, &mut world.pool);
        assert_eq!(socket.lent(), 256);
        let mut batch = ArrayVec::<Frame, BATCH>::new();
        let mut frame = world.pool.take().unwrap();
        frame.grow_back(60).unwrap();
        world.arena.bytes_mut(&mut frame).copy_from_slice(&packet(socket.queue(), 60));
        batch.push(frame);
        socket.transmit(&world.arena, &mut world.pool, &mut batch);
        socket.flush(&world.arena, &mut world.pool);
    }
    for wire in &wires {
        let mut seen = [number(&wire.receive().unwrap()), number(&wire.receive().unwrap())];
        seen.sort_unstable();
        assert_eq!(seen, [0, 1]);
    }
    // Whoever registered the memory may go first.
    for mut socket in sockets {
        socket.drain(&world.arena, &mut world.pool);
    }
    assert_eq!(world.pool.available(), 2048);
}

/// OPS-1: what preflight and configuration ask of an interface: queues, address, MTU, driver, XDP abilities.
#[test]
fn ops_1_interfaces_are_described() {
    let (near, far) = veth(1, 4);
    near.ip("link set n0 address 02:00:00:00:00:07 mtu 1400");
    far.ip("link set f0 down");
    let query = |name: &'static str| near.within(move || Netdev::query(name).unwrap());
    let device = query("n0");
    assert_eq!(device.mac.unwrap().0, [2, 0, 0, 0, 0, 7]);
    assert_eq!(
        (device.name.as_str(), device.driver.as_str(), device.mtu, device.up),
        ("n0", "veth", 1400, true)
    );
    assert_eq!(device.queues, 4);
    assert_eq!(device.index, near.within(|| index("n0")));
    // Linux 6.3 and later tell; veth has no zero-copy.
    if let Some(xdp) = device.xdp {
        assert!(!xdp.zero_copy);
    }
    let device = query("lo");
    assert_eq!((device.mac, device.driver.as_str(), device.queues), (None, "", 1));
    assert_eq!(device.xdp.map(|xdp| xdp.native), device.xdp.map(|_| false));
}

/// OPS-1: what stands in the way is told by name; asking for zero-copy where there is none falls back to copy.
#[test]
fn ops_1_obstacles_are_named() {
    let mut world = world(1, 1, 256);
    let wish = XskOptions { zero_copy: true, ..OPTIONS };
    let (mut socket, program) = world.socket("n0", wish);
    assert!(!socket.is_zero_copy());
    let bind = |interface: &'static str, queue| {
        let umem = world.umem.clone();
        world.near.within(move || XskSocket::bind(&umem, interface, queue, OPTIONS).unwrap_err())
    };
    assert!(matches!(bind("n0", 0), XskError::QueueBusy(..)));
    assert!(matches!(bind("n0", 7), XskError::NoQueue(..)));
    assert!(matches!(bind("none", 0), XskError::NoInterface(..)));
    // Another registration of the same memory meets the same queue.
    let other = Umem::new(world.arena.clone());
    let error = world.near.within(move || XskSocket::bind(&other, "n0", 0, OPTIONS).unwrap_err());
    assert!(matches!(error, XskError::QueueBusy(..)), "{error}");
    // Once it is drained, the queue is free again.
    socket.drain(&world.arena, &mut world.pool);
    assert!(socket.fd().is_none());
    drop(program);
    let (mut again, _program) = world.socket("n0", OPTIONS);
    let wire = world.wire("f0");
    wire.send(&packet(1, 60));
    let frames = world.receive(&mut again, 1);
    assert_eq!(frames.len(), 1);
    world.give(frames);
    again.drain(&world.arena, &mut world.pool);
    assert_eq!(world.pool.available(), 256);
}

/// Frames in flight when the far end goes away come back, and an interface that is down does not hang the worker.
#[test]
fn an_interface_that_goes_down_loses_no_frame() {
    let mut world = world(1, 1, 512);
    let (mut socket, _program) = world.socket("n0", OPTIONS);
    world.near.ip("link set n0 down");
    let mut batch = ArrayVec::<Frame, BATCH>::new();
    for _ in 0..BATCH {
        let mut frame = world.pool.take().unwrap();
        frame.grow_back(60).unwrap();
        batch.push(frame);
    }
    assert_eq!(socket.transmit(&world.arena, &mut world.pool, &mut batch), BATCH);
    socket.flush(&world.arena, &mut world.pool);
    world.near.ip("link set n0 up");
    socket.flush(&world.arena, &mut world.pool);
    socket.drain(&world.arena, &mut world.pool);
    assert_eq!(world.pool.available(), 512);
}
