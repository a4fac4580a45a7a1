//! A whole IKEv1 endpoint from arbitrary datagrams, in the clear and under its keys. The property test and the replay of
//! the seeds call the same function.
//!
//! Run as described in `wire.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| postern_ike::exercise::v1::endpoint_on(bytes));
