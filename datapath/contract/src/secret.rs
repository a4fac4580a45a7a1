//! Key material on its way from control to the datapath: prints nothing, is wiped on drop.

use core::fmt;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Key bytes (including the salt of counter-mode suites). Not `Clone`: [`Secret::duplicate`] says what it does.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop, PartialEq, Eq, Default)]
pub struct Secret(Box<[u8]>);

impl Secret {
    /// Takes over `bytes`; the vector is exactly sized, so no copy stays behind in a reallocated buffer.
    pub fn new(bytes: impl Into<Box<[u8]>>) -> Self {
        Self(bytes.into())
    }

    /// No key: the suite needs none.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The key bytes. Callers copy them only into types that are wiped as well.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A second copy of the key, for the one that keeps it while it is sent on.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self(self.0.clone())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OPS-4: formatting a secret shows none of its bytes.
    #[test]
    fn debug_shows_no_byte() {
        let secret = Secret::new(vec![0xab; 20]);
        let shown = format!("{secret:?} {secret:#?}");
        assert!(!shown.contains("171") && !shown.to_lowercase().contains("ab"), "{shown}");
    }
}
