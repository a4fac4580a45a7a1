//! DP-3: every kernel against the AES-GCM vectors of project Wycheproof that ESP can have: nonces of 96 bits, tags of 128
//! bits, AAD of up to a block.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test")]

mod common;

use common::{expand, kernels, open, seal};
use postern_espgcm::{HEADER, TAG, Verdict};
use wycheproof::TestResult;
use wycheproof::aead::{TestName, TestSet};

#[test]
#[cfg_attr(miri, ignore = "the vectors are parsed for minutes")]
fn dp_3_wycheproof() {
    let set = TestSet::load(TestName::AesGcm).unwrap();
    let (mut valid, mut invalid, mut other) = (0, 0, 0);
    for group in set.test_groups {
        for test in group.tests {
            let (Ok(nonce), Ok(tag)) =
                (<[u8; 12]>::try_from(&test.nonce[..]), <[u8; TAG]>::try_from(&test.tag[..]))
            else {
                other += 1;
                continue;
            };
            if test.aad.len() > 16 {
                other += 1;
                continue;
            }
            let is_valid = test.result == TestResult::Valid;
            for kernel in kernels() {
                let (name, id) = (kernel.level().name(), test.tc_id);
                let key = expand(kernel, &test.key);
                let mut packet = [&[0x5a; HEADER], &test.ct[..], &tag[..]].concat();
                let verdict = open(kernel, &key, nonce, &test.aad, &mut packet);
                let text = &packet[HEADER..HEADER + test.ct.len()];
                if is_valid {
                    assert_eq!(verdict, Verdict::Done, "{name} {id}: {}", test.comment);
                    assert_eq!(text, &test.pt[..], "{name} {id}: {}", test.comment);
                    assert_eq!(seal(kernel, &key, nonce, &test.aad, &mut packet), Verdict::Done);
                    assert_eq!(packet[HEADER..], [&test.ct[..], &tag[..]].concat(), "{name} {id}");
                } else {
                    assert_eq!(verdict, Verdict::BadTag, "{name} {id}: {}", test.comment);
                    assert!(text.iter().all(|byte| *byte == 0), "{name} {id}: {}", test.comment);
                }
            }
            *(if is_valid { &mut valid } else { &mut invalid }) += 1;
        }
    }
    println!("{valid} valid, {invalid} invalid; {other} that ESP cannot have");
    assert!(valid > 70 && invalid > 70, "{valid} {invalid}");
}
