//! SHA-256, where control names or compares things by digest.

use ring::digest::{Context, SHA256};

/// SHA-256 over the parts, each preceded by its length so that no two lists of parts collide.
pub(crate) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        context.update(part);
    }
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    out
}

/// The first eight bytes of [`sha256`], as a number.
pub(crate) fn short(parts: &[&[u8]]) -> u64 {
    sha256(parts).first_chunk().copied().map(u64::from_be_bytes).unwrap_or_default()
}

/// The first sixteen bytes of [`sha256`].
pub(crate) fn half(parts: &[&[u8]]) -> [u8; 16] {
    sha256(parts).first_chunk().copied().unwrap_or_default()
}
