//! DP-3: the kernels touch nothing but the packet. Packets stand right before a page that may not be touched, right
//! behind one, and at every alignment.
#![cfg(not(miri))]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test")]

mod common;

use common::{Work, batch, bytes, expand, kernels, open, seal};
use postern_espgcm::{Aad, EspPacket, HEADER, Kernel, Key, Packet, TAG, Verdict, Wanted};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

const PAGE: usize = 4096;
const PAGES: usize = 4;

/// `PAGES` pages between two that fault when they are touched.
fn guarded() -> &'static mut [u8] {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let len = (PAGES + 2) * PAGE;
    // JUSTIFICATION: pages that fault are what the test is about.
    // SAFETY: a new mapping of `len` bytes, which is never unmapped; its first and last page are not in the slice.
    unsafe {
        let base = mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE).unwrap();
        mprotect(base, PAGE, MprotectFlags::empty()).unwrap();
        mprotect(base.add((PAGES + 1) * PAGE), PAGE, MprotectFlags::empty()).unwrap();
        std::slice::from_raw_parts_mut(base.cast::<u8>().add(PAGE), PAGES * PAGE)
    }
}

fn round_trip(kernel: Kernel, key: &Key, packet: &mut [u8], expected: &[u8]) {
    let text = bytes(packet.len() - HEADER - TAG, 0x3c);
    packet.fill(0xa5);
    packet[HEADER..HEADER + text.len()].copy_from_slice(&text);
    assert_eq!(seal(kernel, key, [3; 12], &[1; 8], packet), Verdict::Done);
    assert_eq!(packet[HEADER..], *expected);
    assert_eq!(open(kernel, key, [3; 12], &[1; 8], packet), Verdict::Done);
    assert_eq!(packet[HEADER..HEADER + text.len()], text);
    for work in [Kernel::seal as Work, Kernel::open] {
        assert_eq!(batch(work, kernel, key, [3; 12], &[1; 8], [&mut *packet]), [Verdict::Done]);
    }
    assert_eq!(packet[HEADER..HEADER + text.len()], text);
}

#[test]
fn dp_3_nothing_outside_the_packet_is_touched() {
    let memory = guarded();
    let total = memory.len();
    for kernel in kernels() {
        let key = expand(kernel, &[7; 16]);
        for text in (0..600).chain([1423, 1424, 1425, 8999, 9000]) {
            let len = HEADER + text + TAG;
            let mut reference = vec![0xa5; len];
            reference[HEADER..HEADER + text].copy_from_slice(&bytes(text, 0x3c));
            assert_eq!(seal(kernel, &key, [3; 12], &[1; 8], &mut reference), Verdict::Done);
            let expected = reference.split_off(HEADER);
            round_trip(kernel, &key, &mut memory[..len], &expected);
            round_trip(kernel, &key, &mut memory[total - len..], &expected);
            // In the middle: every alignment, with bytes around that have to stay.
            let at = 64 + text % 64;
            memory[..at].fill(0x77);
            memory[at + len..at + len + 128].fill(0x77);
            round_trip(kernel, &key, &mut memory[at..at + len], &expected);
            assert!(memory[..at].iter().all(|byte| *byte == 0x77), "{text}: before");
            assert!(memory[at + len..at + len + 128].iter().all(|byte| *byte == 0x77), "{text}: behind");
        }
    }
}

/// What is no packet is refused and stays as it is.
#[test]
fn dp_3_refused() {
    for kernel in kernels() {
        let key = expand(kernel, &[7; 16]);
        for len in 0..HEADER + TAG {
            let mut packet = vec![0xa5; len];
            assert_eq!(seal(kernel, &key, [0; 12], &[], &mut packet), Verdict::Refused);
            assert_eq!(open(kernel, &key, [0; 12], &[], &mut packet), Verdict::Refused);
            assert!(packet.iter().all(|byte| *byte == 0xa5));
        }
        let mut long = vec![0xa5; postern_espgcm::LONGEST + 1];
        assert_eq!(seal(kernel, &key, [0; 12], &[], &mut long), Verdict::Refused);
        let mut packet = [0xa5; 64];
        assert_eq!(seal(kernel, &Key::blank(), [0; 12], &[], &mut packet), Verdict::Refused);
        assert_eq!(packet, [0xa5; 64]);
        let mut short = Key::blank();
        assert!(kernel.expand(&[0; 15], &mut short).is_err() && short.is_blank());
    }
    assert!(Aad::new(&[0; 17]).is_none());
}

/// The AAD of packet `n`: with an extended number or not.
fn aad(n: usize) -> &'static [u8] {
    if n.is_multiple_of(2) { &[1, 1, 1, 1, 0, 0, 0, 7, 2, 2, 2, 2] } else { &[1, 1, 1, 1, 2, 2, 2, 2] }
}

/// Packets of several keys, key lengths and sizes in one batch, one of them forged and one not pending.
#[test]
fn dp_3_batches() {
    for kernel in kernels() {
        let keys: Vec<Key> =
            (0..6).map(|n: u8| expand(kernel, &bytes([16, 24, 32][usize::from(n % 3)], n))).collect();
        let sizes = (0..97).map(|n| (n * 37) % 1500);
        let mut packets: Vec<Vec<u8>> = sizes.map(|size| common::packet(&bytes(size, 9))).collect();
        let mut alone = packets.clone();
        let mut batch: Vec<Packet<'_>> = packets
            .iter_mut()
            .enumerate()
            .map(|(n, bytes)| Packet {
                key: &keys[n % 6],
                nonce: [u8::try_from(n).unwrap(); 12],
                aad: Aad::new(aad(n)).unwrap(),
                bytes,
                verdict: Verdict::Pending,
            })
            .collect();
        kernel.seal(&mut batch);
        assert!(batch.iter().all(|packet| packet.verdict == Verdict::Done));
        for (n, packet) in alone.iter_mut().enumerate() {
            let nonce = [u8::try_from(n).unwrap(); 12];
            assert_eq!(seal(kernel, &keys[n % 6], nonce, aad(n), packet), Verdict::Done);
        }
        for (packet, alone) in batch.iter_mut().zip(&alone) {
            assert!(packet.bytes == alone);
            packet.verdict = Verdict::Pending;
        }
        batch[40].bytes[HEADER] ^= 1;
        batch[41].verdict = Verdict::BadTag;
        kernel.open(&mut batch);
        for (n, packet) in batch.iter().enumerate() {
            let expected = if n == 40 || n == 41 { Verdict::BadTag } else { Verdict::Done };
            assert_eq!(packet.verdict, expected, "{n}");
        }
        assert!(batch[41].bytes == &alone[41][..], "not pending, so left alone");
    }
}

/// Short packets go two at a time if they are alike in length, number and key: whatever stands beside a packet, what becomes of
/// it is what becomes of it alone.
#[test]
fn dp_3_short_packets_side_by_side() {
    let mut state = 1_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    for kernel in kernels() {
        // The last key is for short texts only.
        let mut keys: Vec<Key> =
            (0..4).map(|n: u8| expand(kernel, &bytes([16, 16, 24, 32][usize::from(n)], n))).collect();
        keys.push(Key::blank());
        kernel.expand_into(&mut keys, &[Wanted { place: 4, key: &[9; 16] }], false);
        for _ in 0..2000 {
            let texts = [0, 4, 44, 48, 49, 68, 96, 97, 112, 113, 160, 176, 177, 204, 240, 241];
            let (few, count) = (random(texts.len()), 1 + random(9));
            let chosen: Vec<(usize, Option<u32>, Verdict, Vec<u8>)> = (0..count)
                .map(|n| {
                    let text = texts[if random(4) == 0 { random(texts.len()) } else { few }];
                    let mut packet = common::packet(&bytes(text, 1));
                    packet[..HEADER].copy_from_slice(&bytes(HEADER, u8::try_from(n + 1).unwrap()));
                    let high = [Some(7), Some(7), None][random(3)];
                    let verdict = if random(12) == 0 { Verdict::Refused } else { Verdict::Pending };
                    // Now and then a key that is not there.
                    (if random(12) == 0 { 5 } else { random(5) }, high, verdict, packet)
                })
                .collect();
            let mut together: Vec<Vec<u8>> = chosen.iter().map(|packet| packet.3.clone()).collect();
            let mut alone = together.clone();
            for opening in [false, true] {
                if opening {
                    let (forged, at) = (random(count), random(HEADER + TAG));
                    for packets in [&mut together, &mut alone] {
                        packets[forged][at] ^= 0x10;
                    }
                }
                let work = if opening { Kernel::open_esp } else { Kernel::seal_esp };
                let all = |packets: &mut [Vec<u8>], each: usize| -> Vec<Verdict> {
                    let mut batch: Vec<EspPacket<'_>> = packets
                        .iter_mut()
                        .zip(&chosen)
                        .map(|(bytes, (key, high, verdict, _))| EspPacket {
                            key: *key,
                            salt: [3; 4],
                            high: *high,
                            bytes,
                            verdict: *verdict,
                        })
                        .collect();
                    batch.chunks_mut(each).for_each(|packets| work(kernel, &keys, packets));
                    batch.iter().map(|packet| packet.verdict).collect()
                };
                assert_eq!(all(&mut together, count), all(&mut alone, 1), "{kernel:?} {chosen:?}");
                assert!(together == alone, "{kernel:?} {chosen:?}");
            }
        }
    }
}

/// RFC 4106 sections 4 and 5: nonce and AAD of ESP packets are made of salt, header, IV and the number's high half. In one
/// batch are several keys, a forgery, a packet whose key is not there, and one that is not pending.
#[test]
fn dp_3_esp() {
    for kernel in kernels() {
        let keys: Vec<Key> =
            (0..6).map(|n: u8| expand(kernel, &bytes([16, 24, 32][usize::from(n % 3)], n))).collect();
        let high = |n: usize| n.is_multiple_of(2).then_some(0x0102_0304);
        let texts: Vec<Vec<u8>> = (0..97).map(|n| bytes((n * 37) % 1500, 9)).collect();
        let header =
            |n: usize| [&bytes(HEADER, u8::try_from(n).unwrap())[..], &texts[n], &[0xa5; TAG]].concat();
        let mut sealed: Vec<Vec<u8>> = (0..texts.len()).map(header).collect();
        let expected: Vec<Vec<u8>> = (0..texts.len())
            .map(|n| {
                let mut packet = header(n);
                let aad = match high(n) {
                    None => packet[..8].to_vec(),
                    Some(_) => [&packet[..4], &[1, 2, 3, 4], &packet[4..8]].concat(),
                };
                let nonce = [&[9, 8, 7, 6], &packet[8..16]].concat().try_into().unwrap();
                assert_eq!(seal(kernel, &keys[n % 6], nonce, &aad, &mut packet), Verdict::Done);
                packet
            })
            .collect();
        let mut batch: Vec<EspPacket<'_>> = sealed
            .iter_mut()
            .enumerate()
            .map(|(n, bytes)| {
                let salt = [9, 8, 7, 6];
                EspPacket { key: n % 6, salt, high: high(n), bytes, verdict: Verdict::Pending }
            })
            .collect();
        kernel.seal_esp(&keys, &mut batch);
        for (packet, expected) in batch.iter_mut().zip(&expected) {
            assert!(packet.verdict == Verdict::Done && packet.bytes == expected);
            packet.verdict = Verdict::Pending;
        }
        batch[40].high = Some(0x0102_0305);
        batch[41].verdict = Verdict::BadTag;
        batch[42].key = 6;
        kernel.open_esp(&keys, &mut batch);
        for (n, packet) in batch.iter().enumerate() {
            let (verdict, text) = match n {
                40 => (Verdict::BadTag, &vec![0; texts[n].len()][..]),
                41 => (Verdict::BadTag, &expected[n][HEADER..][..texts[n].len()]),
                42 => (Verdict::Refused, &expected[n][HEADER..][..texts[n].len()]),
                _ => (Verdict::Done, &texts[n][..]),
            };
            assert!(packet.verdict == verdict && &packet.bytes[HEADER..][..text.len()] == text, "{n}");
        }
    }
}

/// OPS-4: a key is wiped, and neither it nor a packet is shown.
#[test]
fn ops_4_keys() {
    for kernel in kernels() {
        let mut key = expand(kernel, &[0xab; 32]);
        assert!(!key.is_blank());
        let mut bytes = [0xab; 64];
        let aad = Aad::new(&[]).unwrap();
        let packet = Packet { key: &key, nonce: [0; 12], aad, bytes: &mut bytes, verdict: Verdict::Pending };
        let shown = format!("{packet:?} {:?} {kernel:?}", packet.key);
        assert!(!shown.contains("171") && !shown.to_lowercase().contains("ab, "), "{shown}");
        key.wipe();
        assert!(key.is_blank());
    }
}
