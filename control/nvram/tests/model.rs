//! Arbitrary histories against a map, and arbitrary bytes against the reader (RST-11).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{InMemory, State, batch, contents, options};
use postern_nvram::exercise::{Medium, Survival, read_mangled};
use postern_nvram::{Backup, Device, NoCounter, PrivateKey, PublicKey, Store, generate};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Commit {
        removes: Vec<u8>,
        puts: Vec<(u8, Vec<u8>)>,
    },
    Checkpoint,
    /// A power cut, a new start, and either all is taken over or the old generation stays beside the new one.
    Reset {
        adopt: bool,
    },
    Erase,
}

fn step() -> impl Strategy<Value = Step> {
    let put = (0..12_u8, proptest::collection::vec(any::<u8>(), 0..80));
    let commit = (proptest::collection::vec(0..12_u8, 0..4), proptest::collection::vec(put, 0..5));
    prop_oneof![
        6 => commit.prop_map(|(removes, puts)| Step::Commit { removes, puts }),
        1 => Just(Step::Checkpoint),
        1 => any::<bool>().prop_map(|adopt| Step::Reset { adopt }),
        1 => Just(Step::Erase),
    ]
}

fn open(medium: &Medium, public: &PublicKey) -> Store {
    Store::open_in(Box::new(medium.clone()), options(), public, Box::new(NoCounter)).unwrap()
}

fn read(medium: &Medium, private: &PrivateKey) -> State {
    contents(&Backup::read_from(medium, &InMemory::new(&[private]), &mut NoCounter).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn rst_11_any_history_reads_back_as_a_map_would(steps in proptest::collection::vec(step(), 1..25)) {
        let (public, private) = generate();
        let mut medium = Medium::default();
        let mut store = open(&medium, &public);
        // What older generations hold, and what this one does: removed there, a record is back until they are erased.
        let (mut older, mut own) = (State::new(), State::new());
        for step in steps {
            match step {
                Step::Commit { removes, puts } => {
                    store.commit(&batch(&removes, &puts)).unwrap();
                    for key in &removes {
                        own.remove(key);
                        // The removal is in the journal until a checkpoint.
                        older.remove(key);
                    }
                    own.extend(puts);
                }
                Step::Checkpoint => {
                    // Without older generations this changes nothing; with them, they are erased first here, as the
                    // order of things in the crate's documentation has it.
                    store.erase_older().unwrap();
                    older.clear();
                    store.checkpoint().unwrap();
                }
                Step::Reset { adopt } => {
                    medium = medium.after_power_cut(Survival::Nothing);
                    let mut all = older.clone();
                    all.extend(own.clone());
                    store = open(&medium, &public);
                    (older, own) = (all, State::new());
                    if adopt {
                        let puts: Vec<_> = older.clone().into_iter().collect();
                        store.commit(&batch(&[], &puts)).unwrap();
                        own.clone_from(&older);
                        store.erase_older().unwrap();
                        older.clear();
                    }
                }
                Step::Erase => {
                    store.erase_older().unwrap();
                    older.clear();
                }
            }
            let mut all = older.clone();
            all.extend(own.clone());
            prop_assert_eq!(read(&medium, &private), all);
            prop_assert_eq!(store.len(), own.len());
        }
    }

    #[test]
    fn rst_11_any_history_on_a_device_reads_back_as_a_map_would(
        steps in proptest::collection::vec(step(), 1..25),
    ) {
        let (public, private) = generate();
        let ring = InMemory::new(&[&private]);
        let mut medium = Medium::device(256 << 10);
        let heir = |medium: &Medium| {
            let backup = Backup::read_device(medium, &ring, &mut NoCounter).unwrap();
            let device = Device::open_in(Box::new(medium.clone())).unwrap();
            let counter = Box::new(NoCounter);
            Store::take_over_in(Box::new(device), options(), &public, counter, &backup.records).unwrap().0
        };
        let mut store = heir(&medium);
        let mut all = State::new();
        for step in steps {
            match step {
                Step::Commit { removes, puts } => {
                    store.commit(&batch(&removes, &puts)).unwrap();
                    all.retain(|key, _| !removes.contains(key));
                    all.extend(puts);
                }
                Step::Checkpoint | Step::Erase => drop(store.checkpoint().unwrap()),
                Step::Reset { .. } => {
                    medium = medium.after_power_cut(Survival::Nothing);
                    store = heir(&medium);
                }
            }
            let backup = Backup::read_device(&medium, &ring, &mut NoCounter).unwrap();
            prop_assert_eq!(contents(&backup), all.clone());
            prop_assert!(backup.report.is_clean() && backup.report.files.len() == 1);
        }
    }

    #[test]
    fn rst_11_mangled_files_never_panic_and_never_yield_what_was_not_put(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        read_mangled(&bytes);
    }
}
