//! What the tests, the demo and the lab stand on: namespaces and wires between them, Postern nodes from generated
//! configurations, real peers, captures, traffic, and an independent implementation to compare packets with.
//!
//! Everything lives in network namespaces of its own, with names that no other process uses, and goes away when
//! its value is dropped: after success, after an error and after a panic. What a killed process leaves behind is
//! found by name and removed by [`netns::janitor`], which every new topology runs first.
#![forbid(unsafe_code)]

pub mod capture;
pub mod config;
pub mod flood;
pub mod impair;
pub mod load;
pub mod memory;
pub mod netns;
pub mod node;
pub mod oracle;
pub mod packet;
pub mod party;
pub mod peer;
pub mod pki;
pub mod process;
pub mod prog_run;
pub mod stage;
pub mod tap;
pub mod topology;
pub mod traffic;
pub mod veth;
