//! Backup files from arbitrary bytes, and a real one mangled as the bytes say. The property test calls the same function.
//!
//! Run as described in `wire.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| postern_nvram::exercise::read_mangled(bytes));
