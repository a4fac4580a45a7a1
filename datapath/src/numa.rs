//! Whose memory is near: that of the node which a worker's processor belongs to (NUMA).
//!
//! Contract: the kernel is told no policy. What is touched first by a thread is put on the node of the processor that the
//! thread runs on; so whatever a worker needs is made and touched by a thread on its processor, see [`Placement::near`].

use std::collections::BTreeMap;
use std::path::Path;

use rustix::thread::{CpuSet, sched_setaffinity};

/// Which workers share a memory node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Never empty.
    workers: Vec<Place>,
    groups: usize,
}

/// Of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// The processor that makes its memory; `None`: whichever asks.
    core: Option<u16>,
    node: Option<u32>,
    group: usize,
}

impl Placement {
    /// So many workers (at least one) whose memory may be anywhere: one group.
    pub fn anywhere(workers: usize) -> Self {
        let place = Place { core: None, node: None, group: 0 };
        Self { workers: vec![place; workers.max(1)], groups: 1 }
    }

    /// A worker on each of these processors, in this order. Without processors: one worker, anywhere.
    pub fn of_cores(cores: &[u16]) -> Self {
        Self::with_nodes(cores, |core| node_of_core(Path::new("/sys"), core))
    }

    /// The same where `node_of` tells the nodes. Processors whose node is unknown are a group of their own.
    pub fn with_nodes(cores: &[u16], node_of: impl Fn(u16) -> Option<u32>) -> Self {
        if cores.is_empty() {
            return Self::anywhere(1);
        }
        let nodes: Vec<_> = cores.iter().map(|core| node_of(*core)).collect();
        // Groups in the order of their nodes.
        let mut groups: BTreeMap<Option<u32>, usize> = nodes.iter().map(|node| (*node, 0)).collect();
        for (number, group) in groups.values_mut().enumerate() {
            *group = number;
        }
        let place = |(core, node): (&u16, &Option<u32>)| {
            let group = groups.get(node).copied().unwrap_or_default();
            Place { core: Some(*core), node: *node, group }
        };
        Self { workers: cores.iter().zip(&nodes).map(place).collect(), groups: groups.len() }
    }

    /// Number of workers.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Number of groups of workers that share a node.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// The group of a worker, below [`Self::groups`].
    pub fn group_of(&self, worker: usize) -> usize {
        self.workers.get(worker).map_or(0, |place| place.group)
    }

    /// The node of a worker's processor.
    pub fn node_of(&self, worker: usize) -> Option<u32> {
        self.workers.get(worker)?.node
    }

    /// How many workers are in the groups before this one.
    pub fn workers_before(&self, group: usize) -> usize {
        self.workers.iter().filter(|place| place.group < group).count()
    }

    /// Runs `make` on the processor of the worker, so that the memory it touches first is on that node; here, if the worker
    /// may be anywhere.
    pub fn near<R: Send>(&self, worker: usize, make: impl FnOnce() -> R + Send) -> R {
        on(self.workers.get(worker).and_then(|place| place.core), make)
    }

    /// The same for a group.
    pub fn near_group<R: Send>(&self, group: usize, make: impl FnOnce() -> R + Send) -> R {
        on(self.workers.iter().find(|place| place.group == group).and_then(|place| place.core), make)
    }
}

/// Runs `make` on a thread on this processor, or here.
fn on<R: Send>(core: Option<u16>, make: impl FnOnce() -> R + Send) -> R {
    let Some(core) = core else { return make() };
    let pinned = || {
        let mut set = CpuSet::new();
        set.set(usize::from(core));
        // Told when the worker is pinned; what is made here is right on any processor, and slower to reach at worst.
        let _ = sched_setaffinity(None, &set);
        make()
    };
    std::thread::scope(|scope| match scope.spawn(pinned).join() {
        Ok(made) => made,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// The memory node of a processor, by the files under `sys`; `None` if the kernel knows no nodes, or not this processor.
pub fn node_of_core(sys: &Path, core: u16) -> Option<u32> {
    let directory = sys.join(format!("devices/system/cpu/cpu{core}"));
    let entries = std::fs::read_dir(directory).ok()?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.strip_prefix("node")?.parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// DP-2: workers are grouped by node, whatever the order of their processors.
    #[test]
    fn dp_2_workers_are_grouped_by_node() {
        let node = |core: u16| (core < 8).then_some(u32::from(core / 4));
        let placement = Placement::with_nodes(&[5, 0, 9, 6, 1], node);
        assert_eq!((placement.workers(), placement.groups()), (5, 3));
        let groups: Vec<_> = (0..5).map(|worker| placement.group_of(worker)).collect();
        assert_eq!(groups, [2, 1, 0, 2, 1]);
        assert_eq!((placement.node_of(0), placement.node_of(2)), (Some(1), None));
        assert_eq!([0, 1, 2, 3].map(|group| placement.workers_before(group)), [0, 1, 3, 5]);
        assert_eq!(Placement::with_nodes(&[], node), Placement::anywhere(1));
        assert_eq!(Placement::anywhere(0).workers(), 1);
    }

    /// DP-2: nodes are read from the kernel's files.
    #[test]
    fn dp_2_nodes_are_read() {
        let sys = tempfile::tempdir().unwrap();
        for path in ["cpu3/node1", "cpu3/cache", "cpu4/cache"] {
            std::fs::create_dir_all(sys.path().join("devices/system/cpu").join(path)).unwrap();
        }
        assert_eq!([3, 4, 5].map(|core| node_of_core(sys.path(), core)), [Some(1), None, None]);
    }

    /// DP-2: what a worker needs is made on its processor.
    #[test]
    fn dp_2_memory_is_made_on_the_workers_processor() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let cores: Vec<u16> = (0..1024).filter(|core| allowed.is_set(usize::from(*core))).collect();
        let placement = Placement::of_cores(&cores);
        for (worker, core) in cores.iter().enumerate() {
            let (ran, thread) =
                placement.near(worker, || (rustix::thread::sched_getcpu(), std::thread::current().id()));
            assert_eq!(ran, usize::from(*core));
            assert_ne!(thread, std::thread::current().id());
        }
        let here = Placement::anywhere(1).near(0, || std::thread::current().id());
        assert_eq!(here, std::thread::current().id());
    }
}
