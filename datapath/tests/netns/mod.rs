//! A network namespace for one test, gone when it is dropped, and with it its interfaces.

#![allow(clippy::panic, reason = "a part of tests")]

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A namespace with a name of its own.
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes one; the name begins with `pt-port-` and is not used by any other test or run.
    pub fn new(label: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pt-port-{label}-{}-{n}", std::process::id());
        run(&["ip", "netns", "add", &name]);
        let netns = Self { name };
        netns.ip("link set lo up");
        netns
    }

    /// `ip` in this namespace.
    pub fn ip(&self, arguments: &str) {
        let mut words = vec!["ip", "-n", &self.name];
        words.extend(arguments.split_whitespace());
        run(&words);
    }

    /// A command in this namespace; what it printed.
    pub fn exec(&self, command: &str) -> String {
        let mut words = vec!["ip", "netns", "exec", &self.name];
        words.extend(command.split_whitespace());
        run(&words)
    }

    /// Waits until an interface carries packets: the kernel activates it some time after both ends are up.
    pub fn wait_until_up(&self, interface: &str) {
        for _ in 0..500 {
            if run(&["ip", "-n", &self.name, "link", "show", interface]).contains("state UP") {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{interface} did not come up");
    }

    /// Moves the calling thread, and the threads it makes from now on, into the namespace.
    pub fn enter(&self) {
        let file = File::open(Path::new("/run/netns").join(&self.name)).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// Runs `work` on a thread in the namespace.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let handle = scope.spawn(|| {
                self.enter();
                work()
            });
            match handle.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Its name, for a second `ip` argument.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(
        output.status.success(),
        "`{}` failed (these tests need root and iproute2): {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
