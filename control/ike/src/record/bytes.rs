//! Bytes of a record, written and read with their lengths checked by hand.

use zeroize::Zeroizing;

use super::{MAX_RECORD, RecordError};

/// Appends; the buffer never grows, so no copy of a key stays behind. What does not fit makes it unusable.
pub(super) struct Writer {
    bytes: Zeroizing<Vec<u8>>,
    overflowed: bool,
}

impl Writer {
    pub(super) fn new() -> Self {
        Self { bytes: Zeroizing::new(Vec::with_capacity(MAX_RECORD)), overflowed: false }
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.overflowed |= self.bytes.len() + bytes.len() > MAX_RECORD;
        if !self.overflowed {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// Number of the things that follow.
    pub(super) fn count(&mut self, count: usize) {
        let short = u8::try_from(count);
        self.overflowed |= short.is_err();
        self.bytes(&[short.unwrap_or(u8::MAX)]);
    }

    /// Up to 255 bytes; what is beyond is cut off, and no caller has more.
    pub(super) fn short(&mut self, bytes: &[u8]) {
        let length = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
        self.bytes(&[length]);
        self.bytes(bytes.get(..usize::from(length)).unwrap_or_default());
    }

    /// Up to 65,535 bytes.
    pub(super) fn long(&mut self, bytes: &[u8]) {
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        self.bytes(&length.to_be_bytes());
        self.bytes(bytes.get(..usize::from(length)).unwrap_or_default());
    }

    /// All of it; nothing that can be read if it did not fit.
    pub(super) fn finish(self) -> Zeroizing<Vec<u8>> {
        if self.overflowed { Zeroizing::default() } else { self.bytes }
    }

    /// All of it, if it is not longer than `limit`.
    pub(super) fn finish_within(self, limit: usize) -> Option<Zeroizing<Vec<u8>>> {
        (!self.overflowed && self.bytes.len() <= limit).then_some(self.bytes)
    }
}

/// Takes off the front.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], RecordError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(RecordError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(RecordError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, RecordError> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, RecordError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, RecordError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, RecordError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn short(&mut self) -> Result<&'a [u8], RecordError> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }

    pub(super) fn long(&mut self) -> Result<&'a [u8], RecordError> {
        let length = self.u16()?;
        self.take(usize::from(length))
    }

    pub(super) const fn finish(self) -> Result<(), RecordError> {
        if self.0.is_empty() { Ok(()) } else { Err(RecordError::Trailing) }
    }
}
