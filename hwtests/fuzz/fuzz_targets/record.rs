//! Saved IKE SAs from arbitrary bytes, and the burst over what was read. The property tests call the same function.
//!
//! Run as described in `wire.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| postern_ike::record::fuzz(bytes));
