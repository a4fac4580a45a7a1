//! What the tests of the kernels share: every kernel that this processor can run, and packets.
#![allow(dead_code, reason = "each test uses its part")]

use postern_espgcm::{Aad, HEADER, Kernel, Key, Level, Packet, TAG, Verdict};

/// Every kernel there is here; says which are not.
pub fn kernels() -> Vec<Kernel> {
    let levels = [Level::Vaes512, Level::Vaes256, Level::Portable2, Level::Portable4];
    let mut kernels = Vec::new();
    for level in levels {
        match Kernel::new(level) {
            // Miri runs the portable ones, and the others if it is told to.
            Ok(_)
                if cfg!(miri)
                    && level.name().starts_with("vaes")
                    && option_env!("ESPGCM_VECTORS").is_none() => {}
            Ok(kernel) => kernels.push(kernel),
            Err(lacking) => eprintln!("{} is not tested: {lacking}", level.name()),
        }
    }
    kernels
}

/// `key` expanded by `kernel`.
pub fn expand(kernel: Kernel, key: &[u8]) -> Key {
    let mut expanded = Key::blank();
    kernel.expand(key, &mut expanded).unwrap();
    expanded
}

/// Bytes that differ from place to place.
pub fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 7 + at / 251) % 256).unwrap() ^ seed).collect()
}

/// Header, `text` and room for the tag, which hold 0xa5.
pub fn packet(text: &[u8]) -> Vec<u8> {
    [&[0xa5; HEADER], text, &[0xa5; TAG]].concat()
}

/// Seals `packet` in place: a copy by itself, and it beside another copy, as the kernels do with short ones. All have to
/// agree.
pub fn seal(kernel: Kernel, key: &Key, nonce: [u8; 12], aad: &[u8], packet: &mut [u8]) -> Verdict {
    both(Kernel::seal, kernel, key, nonce, aad, packet)
}

/// Opens `packet` in place, as [`seal`].
pub fn open(kernel: Kernel, key: &Key, nonce: [u8; 12], aad: &[u8], packet: &mut [u8]) -> Verdict {
    both(Kernel::open, kernel, key, nonce, aad, packet)
}

/// What is done with a batch.
pub type Work = fn(Kernel, &mut [Packet<'_>]);

fn both(work: Work, kernel: Kernel, key: &Key, nonce: [u8; 12], aad: &[u8], packet: &mut [u8]) -> Verdict {
    let (mut copy, mut beside) = (packet.to_vec(), packet.to_vec());
    let [alone] = batch(work, kernel, key, nonce, aad, [&mut copy[..]]);
    let [first, second] = batch(work, kernel, key, nonce, aad, [&mut beside[..], &mut *packet]);
    assert!(alone == first && alone == second, "{alone:?} {first:?} {second:?}");
    assert!(copy == packet && beside == packet);
    alone
}

/// Seals or opens packets in place, in one batch.
pub fn batch<const N: usize>(
    work: Work,
    kernel: Kernel,
    key: &Key,
    nonce: [u8; 12],
    aad: &[u8],
    packets: [&mut [u8]; N],
) -> [Verdict; N] {
    let aad = Aad::new(aad).unwrap();
    let mut batch = packets.map(|bytes| Packet { key, nonce, aad, bytes, verdict: Verdict::Pending });
    work(kernel, &mut batch);
    batch.map(|packet| packet.verdict)
}
