//! IKEv1 messages from arbitrary bytes, and what is negotiated from them. The property tests and the replay of the seeds
//! call the same function.
//!
//! Run as described in `wire.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| postern_ike::v1::fuzz_message(bytes));
