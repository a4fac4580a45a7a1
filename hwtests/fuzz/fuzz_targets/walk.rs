//! The whole walk between two gateways on memory ports, with a valid SA of every kind. The property tests and the replay
//! of the seeds call the same function.
//!
//! From the top of the repository, on stable Rust (as `wire.rs` says):
//!
//! ```sh
//! mkdir -p hwtests/fuzz/corpus/walk
//! RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir hwtests/fuzz walk \
//!     hwtests/fuzz/corpus/walk hwtests/fuzz/seeds/walk -- -max_total_time=60 -max_len=4096
//! ```
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| postern_datapath::exercise::walk(bytes));
