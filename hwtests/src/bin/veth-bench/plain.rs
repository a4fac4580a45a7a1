//! The reference: a forwarder on the same rings that does nothing but swap link-layer addresses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use arrayvec::ArrayVec;
use ipnet::IpNet;
use postern_contract::settings::{FragmentPolicy, InterfaceSettings, PortKind, Role, XdpMode};
use postern_datapath::frame::{Arena, BATCH, Pool};
use postern_datapath::port::Port;
use postern_datapath::port::xsk::{Umem, XskOptions, XskSocket};
use postern_datapath::steer::Steer;
use postern_hwtests::netns::Netns;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, sched_setaffinity};

/// As many frames as a datapath has by default.
const FRAMES: u32 = 8192;
/// Turns without a frame after which it sleeps, like a worker.
const SPINS: u32 = 256;

/// A running forwarder; ended when dropped.
pub struct Plain {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    id: i32,
}

impl Plain {
    /// Forwards between `inside` and `outside` of `namespace` on the processor `core`.
    pub fn start(namespace: &Netns, core: usize) -> Result<Self> {
        let name = namespace.name().to_owned();
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let (ready, started) = channel();
        let thread = std::thread::spawn(move || {
            let namespace = Netns::existing(&name);
            let ran = namespace.and_then(|namespace| namespace.enter(|| forward(core, &until, &ready)));
            // An error is told to whoever waits for the start; later there is none.
            if let Err(error) = ran {
                let _ = ready.send(Err(error));
            }
        });
        // Dropped, and so ended, if it does not start.
        let mut plain = Self { stop, thread: Some(thread), id: 0 };
        plain.id = started.recv().map_err(|_| anyhow!("the forwarder ended"))??;
        Ok(plain)
    }

    /// The kernel's number of the thread.
    pub fn thread_id(&self) -> i32 {
        self.id
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the forwarder panicked");
        }
    }
}

fn forward(core: usize, stop: &AtomicBool, ready: &Sender<Result<i32>>) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(core);
    sched_setaffinity(None, &cpus)?;
    let (arena, frames) = Arena::new(FRAMES, false)?;
    let mut pool = Pool::split(frames, 1).pop().context("no pool")?;
    let umem = Umem::new(arena.clone());
    let everything: IpNet = "0.0.0.0/0".parse()?;
    let (mut steers, mut ports) = (Vec::new(), Vec::new());
    for name in ["inside", "outside"] {
        let settings = InterfaceSettings {
            name: name.to_owned(),
            role: Role::Inside,
            port: PortKind::Xsk,
            xdp: XdpMode::Native,
            zero_copy: false,
            mtu: None,
        };
        let mut steer = Steer::attach(&settings, FragmentPolicy::Drop, None)?;
        steer.protect(everything, None)?;
        let options = XskOptions { zero_copy: false, ..XskOptions::default() }.for_sockets(FRAMES, 2);
        let socket = XskSocket::bind(&umem, name, 0, options)?;
        steer.register_xsk(0, socket.fd().context("a socket")?)?;
        steers.push(steer);
        ports.push(socket);
    }
    let [mut a, mut b]: [XskSocket; 2] = ports.try_into().map_err(|_| anyhow!("two sockets"))?;
    for port in [&mut a, &mut b] {
        port.flush(&arena, &mut pool);
    }
    // Nobody waits for it only if the start was given up.
    let _ = ready.send(Ok(rustix::thread::gettid().as_raw_nonzero().get()));
    let mut quiet = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut busy = pass(&arena, &mut pool, &mut a, &mut b);
        busy |= pass(&arena, &mut pool, &mut b, &mut a);
        for port in [&mut a, &mut b] {
            port.flush(&arena, &mut pool);
        }
        quiet = if busy { 0 } else { quiet + 1 };
        if quiet >= SPINS && !a.busy() && !b.busy() {
            let waiting = [&a, &b].into_iter().filter_map(Port::wait_fd);
            let mut fds: ArrayVec<PollFd<'_>, 2> =
                waiting.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            // Whatever woke it, the next turn looks at everything.
            let _ = poll(&mut fds, Some(&limit));
        } else if !busy {
            std::hint::spin_loop();
        }
    }
    drop(steers);
    // What was received before the program was detached.
    std::thread::sleep(Duration::from_millis(1));
    a.drain(&arena, &mut pool);
    b.drain(&arena, &mut pool);
    Ok(())
}

/// One batch; says whether there was one.
fn pass(arena: &Arena, pool: &mut Pool, from: &mut XskSocket, to: &mut XskSocket) -> bool {
    let mut frames = ArrayVec::<_, BATCH>::new();
    from.receive(arena, pool, &mut frames);
    if frames.is_empty() {
        return false;
    }
    for frame in &mut frames {
        if let Some(addresses) = arena.bytes_mut(frame).first_chunk_mut::<12>() {
            addresses.rotate_left(6);
        }
    }
    to.transmit(arena, pool, &mut frames);
    // A full ring: dropped.
    frames.drain(..).for_each(|frame| pool.give(frame));
    true
}
