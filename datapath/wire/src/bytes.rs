//! Big-endian reads and writes at an offset, shared by the protocol files. All of them fail as `None` past the end.

/// The `N` bytes at `at`.
pub fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..)?.first_chunk()
}

/// The `N` bytes at `at`, to write to.
pub fn array_at_mut<const N: usize>(bytes: &mut [u8], at: usize) -> Option<&mut [u8; N]> {
    bytes.get_mut(at..)?.first_chunk_mut()
}

/// The byte at `at`.
pub fn u8_at(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

/// The 16-bit value at `at`.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(|field| u16::from_be_bytes(*field))
}

/// The 32-bit value at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(|field| u32::from_be_bytes(*field))
}

/// Writes the byte at `at`.
pub fn put_u8(bytes: &mut [u8], at: usize, value: u8) -> Option<()> {
    *bytes.get_mut(at)? = value;
    Some(())
}

/// Writes the 16-bit value at `at`.
pub fn put_u16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *array_at_mut(bytes, at)? = value.to_be_bytes();
    Some(())
}

/// Writes `value` at `at`.
pub fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Option<()> {
    *array_at_mut(bytes, at)? = value;
    Some(())
}

/// The bytes of a test vector written in hexadecimal; white space is ignored.
#[cfg(test)]
pub fn hex(text: &str) -> std::vec::Vec<u8> {
    let digits: std::vec::Vec<u32> =
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).unwrap()).collect();
    digits.chunks_exact(2).map(|pair| u8::try_from(pair[0] << 4 | pair[1]).unwrap()).collect()
}
