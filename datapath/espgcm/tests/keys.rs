//! DP-3: keys that are expanded together are those that are expanded alone.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test")]

mod common;

use common::{bytes, expand, kernels, packet, seal};
use postern_espgcm::{Kernel, Key, Verdict, Wanted};
use proptest::prelude::*;

/// What a key does to a packet that needs all of its powers.
fn trace(kernel: Kernel, key: &Key) -> Option<Vec<u8>> {
    let mut packet = packet(&bytes(1424, 1));
    (seal(kernel, key, [3; 12], &[1; 12], &mut packet) == Verdict::Done).then_some(packet)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 300 }))]

    /// In any number, of any lengths, in any order of places; the last one that wants a place has it, and no other place
    /// changes.
    #[test]
    fn dp_3_keys_together_are_keys_alone(
        wanted in prop::collection::vec((0_usize..20, prop::sample::select(vec![16_usize, 24, 32])), 0..40),
    ) {
        let keys: Vec<Vec<u8>> = (0..).zip(&wanted).map(|(seed, (_, len))| bytes(*len, seed)).collect();
        for kernel in kernels() {
            let old = vec![0x77; 32];
            let mut table: Vec<Key> = (0..16).map(|_| expand(kernel, &old)).collect();
            let all: Vec<Wanted<'_>> =
                wanted.iter().zip(&keys).map(|((place, _), key)| Wanted { place: *place, key }).collect();
            kernel.expand_into(&mut table, &all, true);
            for (place, key) in table.iter().enumerate() {
                let last = wanted.iter().rposition(|(at, _)| *at == place);
                let alone = expand(kernel, last.map_or(&old, |last| &keys[last]));
                prop_assert_eq!(trace(kernel, key), trace(kernel, &alone));
            }
        }
    }
}

/// What is no key leaves none, and a place that is none is left out.
#[test]
fn dp_3_no_keys() {
    for kernel in kernels() {
        let mut table = [expand(kernel, &[1; 16]), expand(kernel, &[2; 32])];
        let wanted = [(0, vec![0; 15]), (1, vec![3; 16]), (2, vec![3; 16]), (usize::MAX, vec![3; 16])];
        let wanted: Vec<_> = wanted.iter().map(|(place, key)| Wanted { place: *place, key }).collect();
        kernel.expand_into(&mut table, &wanted, true);
        assert!(table[0].is_blank());
        assert_eq!(trace(kernel, &table[1]), trace(kernel, &expand(kernel, &[3; 16])));
    }
}
