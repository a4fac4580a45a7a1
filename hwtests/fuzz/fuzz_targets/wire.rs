//! Every parser and every in-place change of the wire crate on arbitrary bytes. The property tests and the replay of
//! the seeds call the same function.
//!
//! From the top of the repository, on stable Rust (cargo-fuzz wants the sanitizer flags of nightly; new inputs go to
//! the first directory, which is not committed):
//!
//! ```sh
//! mkdir -p hwtests/fuzz/corpus/wire
//! RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir hwtests/fuzz wire \
//!     hwtests/fuzz/corpus/wire hwtests/fuzz/seeds/wire -- -max_total_time=60 -max_len=2048
//! ```
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| postern_wire::exercise::all(bytes));
