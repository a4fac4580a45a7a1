//! What the tests of the store share.
#![allow(dead_code, reason = "not every test uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use postern_nvram::{
    Backup, Change, CounterError, Key, KeyError, KeyHolder, KeyRing, MonotonicCounter, Options, PrivateKey,
};
use zeroize::Zeroizing;

/// What a store should hold: the first byte of the key, and the record.
pub type State = BTreeMap<u8, Vec<u8>>;

/// A holder for tests: the text of its keys.
pub struct InMemory(Zeroizing<String>);

impl InMemory {
    /// Holds these.
    pub fn new(keys: &[&PrivateKey]) -> Self {
        Self(Zeroizing::new(keys.iter().map(|key| key.to_text().to_string()).collect()))
    }
}

impl KeyHolder for InMemory {
    fn unseal(&self) -> Result<KeyRing, KeyError> {
        KeyRing::from_text(&self.0).map_err(|reason| KeyError::Text { what: self.describe(), reason })
    }

    fn describe(&self) -> String {
        "memory".into()
    }
}

/// A counter that storage cannot rewind: clones are the same one.
#[derive(Clone)]
pub struct Counter(Arc<Mutex<u64>>);

impl Counter {
    /// With this value.
    pub fn at(value: u64) -> Self {
        Self(Arc::new(Mutex::new(value)))
    }

    /// Its value.
    pub fn value(&self) -> u64 {
        *self.0.lock().unwrap()
    }
}

impl MonotonicCounter for Counter {
    fn read(&mut self) -> Result<Option<u64>, CounterError> {
        Ok(Some(self.value()))
    }

    fn advance(&mut self) -> Result<u64, CounterError> {
        let mut value = self.0.lock().unwrap();
        *value += 1;
        Ok(*value)
    }
}

/// The key that begins with this byte.
pub fn key(byte: u8) -> Key {
    Key([byte; 16])
}

/// A batch: the removals, then the records.
pub fn batch(removes: &[u8], puts: &[(u8, Vec<u8>)]) -> Vec<Change> {
    let removes = removes.iter().map(|byte| Change::Remove { key: key(*byte) });
    let puts =
        puts.iter().map(|(byte, record)| Change::Put { key: key(*byte), record: record.clone().into() });
    removes.chain(puts).collect()
}

/// What came back.
pub fn contents(backup: &Backup) -> State {
    backup.records.iter().map(|(key, record)| (key.0[0], record.to_vec())).collect()
}

/// For a store that is not in a directory.
pub fn options() -> Options {
    Options::new("")
}
