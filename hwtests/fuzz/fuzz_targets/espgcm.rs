//! The AES-GCM kernels on arbitrary keys, nonces, AAD and batches, against the `aes-gcm` crate. The property tests call
//! the same function. `wire.rs` says how to run it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| postern_espgcm::exercise::all(bytes));
