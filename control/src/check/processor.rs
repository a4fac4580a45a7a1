//! The processors: what AES-GCM is computed with there, which of them the workers have, and on which memory nodes these are.

use std::collections::BTreeSet;

use postern_contract::settings::{Backend, DatapathSettings};

use super::{Finding, Machine, fail, ok, warn};

impl Machine {
    /// What the processor says of itself, in `/proc/cpuinfo`'s words.
    fn processor_flags(&self) -> BTreeSet<String> {
        let info = self.read("/proc/cpuinfo").unwrap_or_default();
        let flags = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
        let flags = flags.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags);
        flags.split_whitespace().map(str::to_owned).collect()
    }

    /// What AES-GCM will be computed with; `backend` may ask for what is not there.
    pub(super) fn crypto(&self, backend: Backend) -> Finding {
        let flags = self.processor_flags();
        let lacks = |extra: &[&str]| {
            let needed = ["avx2", "aes", "pclmulqdq", "vaes", "vpclmulqdq"].iter().chain(extra);
            needed.filter(|flag| !flags.contains(**flag)).map(|flag| flag.to_uppercase()).collect::<Vec<_>>()
        };
        let (narrow, wide) = (lacks(&[]), lacks(&["avx512f", "avx512bw", "avx512vl"]));
        let best = match (wide.is_empty(), narrow.is_empty()) {
            (true, _) => "vaes512",
            (_, true) => "vaes256",
            _ => "ring",
        };
        let missing = match backend {
            Backend::Auto => {
                return ok(
                    "crypto",
                    format!("crypto.backend = \"auto\": {best}, once it passes its self-test"),
                );
            }
            Backend::Vaes512 => wide,
            Backend::Vaes256 => narrow,
            Backend::Ring => Vec::new(),
        };
        let name = backend.name();
        if !missing.is_empty() {
            return fail(
                "crypto",
                format!("crypto.backend = \"{name}\", but the processor lacks {}", missing.join(", ")),
                format!("take \"auto\" (here: {best})"),
            );
        }
        if name != best {
            return warn(
                "crypto",
                format!("crypto.backend = \"{name}\", but {best} would be faster here"),
                "take \"auto\" unless this is a test",
            );
        }
        ok("crypto", format!("crypto.backend = \"{name}\""))
    }

    pub(super) fn processor(&self) -> Finding {
        let flags = self.processor_flags();
        let has = |wanted: &[&str]| wanted.iter().all(|flag| flags.contains(*flag));
        if has(&["aes", "vaes", "vpclmulqdq", "avx512f", "avx512bw", "avx512vl"]) {
            ok("processor", "AES instructions on 512-bit vectors (VAES, AVX-512)")
        } else if has(&["aes", "vaes", "vpclmulqdq", "avx2"]) {
            ok("processor", "AES instructions on 256-bit vectors (VAES, AVX2); AVX-512 would be faster still")
        } else if has(&["aes", "pclmulqdq"]) || has(&["aes", "pmull"]) {
            ok("processor", "AES instructions, one block at a time")
        } else {
            warn(
                "processor",
                "no AES instructions: AES-GCM will be slow",
                "turn AES-NI on in the firmware or hypervisor, or use esp = \"chacha20poly1305\"",
            )
        }
    }

    pub(super) fn cores(&self, settings: &DatapathSettings) -> Vec<Finding> {
        let online = ranges(&self.read("/sys/devices/system/cpu/online").unwrap_or_default());
        let isolated = ranges(&self.read("/sys/devices/system/cpu/isolated").unwrap_or_default());
        let absent: Vec<_> = settings.cores.iter().filter(|core| !online.contains(core)).collect();
        if !absent.is_empty() {
            let last = online.last().copied().unwrap_or_default();
            return vec![fail(
                "cores",
                format!("datapath.cores names {absent:?}, online are 0 to {last}"),
                "name cores that exist",
            )];
        }
        if settings.cores.is_empty() {
            return vec![warn(
                "cores",
                "one worker, not pinned",
                "name the workers' processors with datapath.cores",
            )];
        }
        let shared = settings.cores.iter().filter(|core| !isolated.contains(core)).count();
        if shared > 0 && online.len() > 1 {
            let list = settings.cores.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
            return vec![warn(
                "cores",
                format!(
                    "{} workers, {shared} of them on cores that other programs use too",
                    settings.workers()
                ),
                format!(
                    "for steady latency boot with isolcpus={list} and keep interrupts of other devices away"
                ),
            )];
        }
        vec![ok("cores", format!("{} workers, each with a core of its own", settings.workers()))]
    }

    /// The memory node of a processor.
    pub(super) fn node(&self, core: u16) -> Option<u32> {
        let entries = self.list(&format!("/sys/devices/system/cpu/cpu{core}"));
        entries.iter().filter_map(|name| name.strip_prefix("node")?.parse().ok()).min()
    }

    /// On which memory nodes the workers and what they need are.
    pub(super) fn nodes(&self, settings: &DatapathSettings) -> Option<Finding> {
        let nodes: BTreeSet<u32> = settings.cores.iter().filter_map(|core| self.node(*core)).collect();
        let all = self.list("/sys/devices/system/node");
        let all = all.iter().filter_map(|name| name.strip_prefix("node")?.parse::<u32>().ok()).count();
        let list = nodes.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        if nodes.is_empty() {
            return None;
        }
        Some(if settings.numa_local {
            ok(
                "memory nodes",
                format!("the workers are on node {list} of {all}, each one's memory on its own"),
            )
        } else if all > 1 {
            warn(
                "memory nodes",
                format!("the workers are on node {list} of {all}, their memory wherever the kernel puts it"),
                "leave datapath.numa_local out",
            )
        } else {
            ok("memory nodes", "one, so datapath.numa_local says nothing")
        })
    }
}

/// `0-3,8` as a set.
fn ranges(text: &str) -> BTreeSet<u16> {
    let part = |part: &str| {
        let (start, end) = part.split_once('-').unwrap_or((part, part));
        Some(start.trim().parse::<u16>().ok()?..=end.trim().parse::<u16>().ok()?)
    };
    text.split(',').filter_map(part).flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::check::Level;

    /// OPS-1, DP-3: what the configuration asks AES-GCM to be computed with, on processors of three kinds.
    #[test]
    fn ops_1_crypto_backends() {
        let root = std::env::temp_dir().join(format!("postern-check-crypto-{}", std::process::id()));
        fs::create_dir_all(root.join("proc")).unwrap();
        let machine = Machine { root: root.clone() };
        let found = |flags: &str, backend| {
            fs::write(root.join("proc/cpuinfo"), format!("processor : 0\nflags : {flags}\n")).unwrap();
            let Finding { level, text, .. } = machine.crypto(backend);
            (level, text)
        };
        let narrow = "aes avx2 pclmulqdq vaes vpclmulqdq";
        let wide = "aes avx2 pclmulqdq vaes vpclmulqdq avx512f avx512bw avx512vl";
        for (flags, best) in
            [("aes pclmulqdq", "auto\": ring"), (narrow, "auto\": vaes256"), (wide, "auto\": vaes512")]
        {
            let (level, text) = found(flags, Backend::Auto);
            assert!(level == Level::Ok && text.contains(best), "{text}");
        }
        let (level, text) = found(narrow, Backend::Vaes512);
        assert!(level == Level::Fail && text.ends_with("lacks AVX512F, AVX512BW, AVX512VL"), "{text}");
        assert_eq!(found(narrow, Backend::Vaes256).0, Level::Ok);
        assert_eq!(found(wide, Backend::Vaes512).0, Level::Ok);
        assert_eq!(found(wide, Backend::Ring).0, Level::Warn);
        assert_eq!(found("aes", Backend::Ring).0, Level::Ok);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn lists_of_processors() {
        assert_eq!(ranges("0-2,5").into_iter().collect::<Vec<_>>(), [0, 1, 2, 5]);
        assert!(ranges("").is_empty());
    }
}
