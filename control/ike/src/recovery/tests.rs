use super::*;
use crate::crypto::sk::Protection;
use crate::crypto::testing::Seeded;
use crate::message::registry::{EncrId, IntegId};
use crate::record::tests::{context, saved};

fn records(count: u64) -> Vec<SavedIke> {
    let protection = Protection::from_numbers(EncrId::AES_GCM_16, 128, IntegId::NONE).unwrap();
    let one = |number| saved(number, SavedBody::V2Context(context(protection, 3, Unanswered::None)));
    (1..=count).map(one).collect()
}

fn start(now: Instant) -> Now {
    Now { monotonic: now, wall: SystemTime::UNIX_EPOCH }
}

/// RST-9: nobody answers: each peer gets its messages with longer and longer pauses, each time one message ID more up to
/// the limit, and then it is given up; the rest of the burst does not wait for it.
#[test]
fn rst_9_nobody_answers() {
    let began = Instant::now();
    let pace = Settings { in_flight: 10, tries: 4, rate: 0, ..Settings::default() };
    let mut recovery = Recovery::new(records(100), pace, start(began), Box::new(Seeded(1)));
    let (mut now, mut sent) = (began, 0);
    loop {
        while recovery.poll(now).is_some() {
            sent += 1;
        }
        match recovery.poll_timeout() {
            Some(at) => {
                assert!(at > now, "time stands still");
                now = at;
            }
            None => break,
        }
    }
    // Try 1 with one ID, 2 with two, 3 and 4 with three.
    assert_eq!(sent, 100 * (1 + 2 + 3 + 3));
    let progress = recovery.progress();
    assert_eq!((progress.unanswered, progress.messages), (100, 900));
    assert!(progress.is_done());
    // Ten groups, each with half a second before it makes room, and the tries of the last one.
    let took = now.duration_since(began);
    assert!((Duration::from_secs(7)..Duration::from_secs(12)).contains(&took), "{took:?}");
    let ended: Vec<_> = core::iter::from_fn(|| recovery.poll_ended()).collect();
    assert_eq!(ended.len(), 100);
    assert!(ended.iter().all(|ended| ended.how == How::Unanswered));
}

/// RST-9: a peer that has a new IKE SA by the time it is given up is not counted as lost.
#[test]
fn rst_9_superseded() {
    let began = Instant::now();
    let mut recovery = Recovery::new(records(1), Settings::default(), start(began), Box::new(Seeded(1)));
    recovery.superseded("headquarters", PeerTag::of("someone.else.example.org"));
    recovery.superseded("elsewhere", PeerTag::of("peer.example.org"));
    recovery.superseded("headquarters", PeerTag::of("peer.example.org"));
    let mut now = began;
    while !recovery.progress().is_done() {
        while recovery.poll(now).is_some() {}
        now += Duration::from_secs(1);
    }
    assert_eq!(recovery.progress().superseded, 1);
}

/// RST-8: what cannot be answered is sent a number of times and then done with; a record without a message is done with at
/// once.
#[test]
fn rst_8_silent_ones() {
    let began = Instant::now();
    let message = |id: u32| [vec![0; 20], id.to_be_bytes().to_vec(), vec![0; 20]].concat();
    let silent = |deletes| Prebuilt { answered: false, doubtful: false, repeated: None, deletes };
    let records = [
        saved(1, SavedBody::Prebuilt(silent(vec![message(7)]))),
        saved(2, SavedBody::Prebuilt(silent(Vec::new()))),
    ];
    let mut recovery = Recovery::new(records, Settings::default(), start(began), Box::new(Seeded(1)));
    assert_eq!(recovery.poll_ended().unwrap().how, How::Unusable);
    let (mut now, mut sent) = (began, Vec::new());
    while !recovery.progress().is_done() {
        sent.extend(core::iter::from_fn(|| recovery.poll(now)).map(|(_, bytes)| bytes));
        now += Duration::from_millis(100);
    }
    assert_eq!(sent, vec![message(7); 3]);
    assert_eq!(recovery.progress().sent, 1);
    assert_eq!(recovery.poll_ended().unwrap().how, How::Sent);
}
