use super::*;
use crate::Secret;
use crate::crypto::keys::Seed;
use crate::message::registry::{EncrId, IntegId, KeMethod, PrfId, ProtocolId};
use crate::negotiate::Additional;
use crate::negotiate::IkeSuite;

struct Zeros;

impl Random for Zeros {
    fn fill(&mut self, out: &mut [u8]) {
        out.fill(0);
    }
}

const SPIS: (IkeSpi, IkeSpi) = (IkeSpi(1), IkeSpi(2));
const INFORMATIONAL: ExchangeType = ExchangeType::INFORMATIONAL;

fn suite() -> IkeSuite {
    IkeSuite {
        encr: EncrId::AES_GCM_16,
        key_bits: 128,
        prf: PrfId::HMAC_SHA2_256,
        integ: IntegId::NONE,
        ke: KeMethod::CURVE25519,
        additional: Additional::new(),
    }
}

fn keys(secret: u8) -> IkeKeys {
    let seed = Seed { nonce_i: &[1; 32], nonce_r: &[2; 32], spi_i: SPIS.0, spi_r: SPIS.1 };
    IkeKeys::initial(&suite(), &Secret::new([secret; 32]), &seed).unwrap()
}

fn channel(initiator: bool, change: impl FnOnce(&mut ChannelConfig)) -> Channel {
    let mut config = ChannelConfig {
        initiator,
        spi_i: SPIS.0,
        spi_r: SPIS.1,
        fragment_size: None,
        retransmit: Retransmit::default(),
        next_request: u32::from(initiator),
        expected_request: u32::from(!initiator),
    };
    change(&mut config);
    Channel::new(&config, &keys(7)).unwrap()
}

fn pair() -> (Channel, Channel) {
    (channel(true, |_| ()), channel(false, |_| ()))
}

fn fragmenting() -> (Channel, Channel) {
    let change = |config: &mut ChannelConfig| config.fragment_size = Some(500);
    (channel(true, change), channel(false, change))
}

fn payloads(length: usize) -> Vec<Payload> {
    vec![Payload::Notify(Notify::new(NotifyType::COOKIE2, vec![3; length]))]
}

fn give(channel: &mut Channel, now: Instant, datagram: &[u8]) -> Received {
    channel.receive(now, &parse::message(datagram).unwrap(), datagram)
}

/// Gives all datagrams; what the last one led to.
fn give_all(channel: &mut Channel, now: Instant, datagrams: &Datagrams) -> Received {
    let received = datagrams.iter().map(|datagram| give(channel, now, datagram));
    received.last().unwrap()
}

#[track_caller]
fn request(received: Received) -> (u32, Vec<Payload>) {
    match received {
        Received::Request { id, payloads, .. } => (id, payloads),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn response(received: Received) -> Vec<Payload> {
    match received {
        Received::Response { payloads, .. } => payloads,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn ignored(received: Received) -> Ignored {
    match received {
        Received::Ignored(reason) => reason,
        other => panic!("{other:?}"),
    }
}

/// IKE-1: requests and responses both ways, each direction with message IDs of its own.
#[test]
fn ike_1_exchanges_both_ways() {
    let now = Instant::now();
    let (mut a, mut b) = pair();
    for round in 0..3 {
        for (from, to, first) in [(0, 1, 1), (1, 0, 0)] {
            let ends = [&mut a, &mut b];
            let datagrams = ends[from].request(now, INFORMATIONAL, &payloads(round), &mut Zeros);
            assert!(!ends[from].may_request());
            let (id, asked) = request(give_all(ends[to], now, &datagrams));
            assert_eq!((usize::try_from(id).unwrap(), asked), (round + first, payloads(round)));
            assert!(ends[to].is_answering());
            let datagrams = ends[to].respond(INFORMATIONAL, id, &payloads(round + 9), &mut Zeros);
            assert_eq!(response(give_all(ends[from], now, &datagrams)), payloads(round + 9));
            assert!(ends[from].may_request() && !ends[to].is_answering());
            assert_eq!(ignored(give_all(ends[from], now, &datagrams)), Ignored::MessageId);
        }
    }
    assert_eq!((a.next_request_id(), a.expected_request_id()), (4, 3));
    assert_eq!((b.next_request_id(), b.expected_request_id()), (3, 4));
}

/// IKE-1: "the responder ... MUST ... retransmit the response" to a repeated request, and does not act on it again.
#[test]
fn ike_1_a_repeated_request_gets_the_same_answer() {
    let now = Instant::now();
    let (mut a, mut b) = pair();
    let asked = a.request(now, INFORMATIONAL, &payloads(1), &mut Zeros);
    let (id, _) = request(give_all(&mut b, now, &asked));
    assert_eq!(ignored(give_all(&mut b, now, &asked)), Ignored::Busy);
    let answer = b.respond(INFORMATIONAL, id, &payloads(2), &mut Zeros);
    for _ in 0..3 {
        match give_all(&mut b, now, &asked) {
            Received::Duplicate(again) => assert_eq!(again, answer),
            other => panic!("{other:?}"),
        }
    }
    // Somebody who only knows SPIs and message ID gets no answer.
    let mut forged = asked.iter().next().unwrap().clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(ignored(give(&mut b, now, &forged)), Ignored::Integrity);
    // After the next request the answer before is gone.
    response(give_all(&mut a, now, &answer));
    let next = a.request(now, INFORMATIONAL, &payloads(3), &mut Zeros);
    request(give_all(&mut b, now, &next));
    assert_eq!(ignored(give_all(&mut b, now, &asked)), Ignored::MessageId);
}

#[test]
fn an_answer_is_forgotten_after_minutes() {
    let now = Instant::now();
    let (mut a, mut b) = pair();
    let asked = a.request(now, INFORMATIONAL, &[], &mut Zeros);
    let (id, _) = request(give_all(&mut b, now, &asked));
    assert_eq!(b.deadline(), None);
    b.respond(INFORMATIONAL, id, &[], &mut Zeros);
    let forget = b.deadline().unwrap();
    assert_eq!(forget - now, REPLY_LIFETIME);
    assert_eq!(b.expire(forget, &mut Zeros), None);
    assert_eq!(b.deadline(), None);
    assert_eq!(ignored(give_all(&mut b, forget, &asked)), Ignored::MessageId);
}

#[test]
fn a_request_is_repeated_with_growing_waits_and_then_given_up() {
    let start = Instant::now();
    let (mut a, _) = pair();
    let asked = a.request(start, INFORMATIONAL, &[], &mut Zeros);
    let mut waits = Vec::new();
    let mut before = start;
    loop {
        let due = a.deadline().unwrap();
        assert_eq!(a.expire(due.checked_sub(Duration::from_nanos(1)).unwrap(), &mut Zeros), None);
        waits.push((due - before).as_secs_f32());
        before = due;
        match a.expire(due, &mut Zeros).unwrap() {
            Expired::Resend(again) => assert_eq!(again, asked),
            Expired::Dead => break,
        }
    }
    // `Zeros` takes a tenth off each.
    let expected = [0.9, 1.62, 2.916, 5.249, 9.448, 17.006, 30.611];
    let close = |(wait, expected): (&f32, f32)| (wait - expected).abs() < 0.01;
    assert!(waits.len() == 7 && waits.iter().zip(expected).all(close), "{waits:?}");
}

#[test]
fn a_moved_request_starts_over() {
    let start = Instant::now();
    let (mut a, mut b) = pair();
    assert_eq!(a.resend(start, &mut Zeros), None);
    let asked = a.request(start, INFORMATIONAL, &[], &mut Zeros);
    a.expire(a.deadline().unwrap(), &mut Zeros).unwrap();
    let later = a.deadline().unwrap();
    assert_eq!(a.resend(later, &mut Zeros), Some(asked.clone()));
    assert_eq!(a.deadline().unwrap() - later, Duration::from_millis(900));
    request(give_all(&mut b, later, &asked));
}

#[test]
fn jitter_is_a_tenth_at_most() {
    struct Ones;
    impl Random for Ones {
        fn fill(&mut self, out: &mut [u8]) {
            out.fill(0xff);
        }
    }
    let wait = Duration::from_secs(10);
    assert_eq!(jittered(wait, &mut Zeros), Duration::from_secs(9));
    let most = jittered(wait, &mut Ones);
    assert!(most > Duration::from_millis(10_999) && most <= Duration::from_secs(11), "{most:?}");
}

#[test]
fn what_does_not_fit_is_ignored_and_changes_nothing() {
    let now = Instant::now();
    let (mut a, mut b) = pair();
    let asked = a.request(now, INFORMATIONAL, &payloads(1), &mut Zeros);
    let asked = asked.iter().next().unwrap();
    // Reflected to the one who sent it.
    assert_eq!(ignored(give(&mut a, now, asked)), Ignored::Flags);
    let changed = |at: usize, to: u8| {
        let mut changed = asked.clone();
        changed[at] = to;
        changed
    };
    assert_eq!(ignored(give(&mut b, now, &changed(7, 9))), Ignored::UnknownSpi);
    for id in [2, 255] {
        assert_eq!(ignored(give(&mut b, now, &changed(23, id))), Ignored::MessageId);
    }
    assert_eq!(ignored(give(&mut b, now, &changed(18, 36))), Ignored::Integrity);
    assert_eq!(ignored(give(&mut b, now, &changed(19, 0x28))), Ignored::MessageId);
    let head = a.head(INFORMATIONAL, false, 1);
    let plain = emit::plain(&head, &payloads(1));
    assert_eq!(ignored(give(&mut b, now, &plain)), Ignored::Unprotected);
    let (id, _) = request(give(&mut b, now, asked));
    assert_eq!(ignored(give(&mut b, now, &plain)), Ignored::Unprotected);
    let head = b.head(ExchangeType::CREATE_CHILD_SA, true, id);
    let answer = b.seal(&head, &[], &mut Zeros);
    assert_eq!(ignored(give_all(&mut a, now, &answer)), Ignored::Exchange);
    let answer = b.respond(INFORMATIONAL, id, &[], &mut Zeros);
    assert_eq!(response(give_all(&mut a, now, &answer)), []);
}

/// IKE-1: unreadable but authentic payloads get INVALID_SYNTAX or UNSUPPORTED_CRITICAL_PAYLOAD under their ID.
#[test]
fn ike_1_authentic_but_unreadable() {
    let now = Instant::now();
    let (mut a, mut b) = pair();
    let unknown = Payload::Unknown { kind: PayloadType(200), critical: true };
    let asked = a.request(now, INFORMATIONAL, &[unknown], &mut Zeros);
    let answer = match give_all(&mut b, now, &asked) {
        Received::Malformed { exchange, id, notify } => {
            assert_eq!(notify, Notify::new(NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD, [200]));
            b.respond(exchange, id, &[Payload::Notify(notify)], &mut Zeros)
        }
        other => panic!("{other:?}"),
    };
    response(give_all(&mut a, now, &answer));
    let asked = a.request(now, INFORMATIONAL, &[Payload::Nonce(vec![1])], &mut Zeros);
    let id = match give_all(&mut b, now, &asked) {
        Received::Malformed { id, notify, .. } if notify.kind == NotifyType::INVALID_SYNTAX => id,
        other => panic!("{other:?}"),
    };
    let answer = b.respond(INFORMATIONAL, id, &[Payload::Nonce(vec![1])], &mut Zeros);
    match give_all(&mut a, now, &answer) {
        Received::MalformedResponse { .. } => (),
        other => panic!("{other:?}"),
    }
    assert!(a.may_request());
}

/// IKE-6: RFC 7383 both ways, with loss, repetition and another order.
#[test]
fn ike_6_fragments_both_ways() {
    let now = Instant::now();
    let (mut a, mut b) = fragmenting();
    assert_eq!(a.request(now, INFORMATIONAL, &payloads(300), &mut Zeros).len(), 1);
    let (mut a, _) = fragmenting();
    let asked = a.request(now, INFORMATIONAL, &payloads(2_000), &mut Zeros);
    assert_eq!(asked.len(), 5);
    assert!(asked.iter().all(|datagram| datagram.len() <= 500));
    let at = |index: usize| asked.iter().nth(index).unwrap();
    for index in [4, 1, 2, 3] {
        assert!(matches!(give(&mut b, now, at(index)), Received::Pending));
        assert_eq!(ignored(give(&mut b, now, at(index))), Ignored::Fragment);
    }
    let mut forged = at(0).clone();
    forged[40] ^= 1;
    assert_eq!(ignored(give(&mut b, now, &forged)), Ignored::Integrity);
    let (id, payloads_of_request) = request(give(&mut b, now, at(0)));
    assert_eq!(payloads_of_request, payloads(2_000));
    let answer = b.respond(INFORMATIONAL, id, &payloads(3_000), &mut Zeros);
    assert!(answer.len() > 5);
    // RFC 7383 section 2.6.1: only fragment 1 brings the answer again.
    assert_eq!(ignored(give(&mut b, now, at(3))), Ignored::Fragment);
    assert!(matches!(give(&mut b, now, at(0)), Received::Duplicate(again) if again == answer));
    assert_eq!(response(give_all(&mut a, now, &answer)), payloads(3_000));
    assert_eq!(ignored(give(&mut a, now, answer.iter().next().unwrap())), Ignored::MessageId);
}

/// The peer sends the same request in smaller fragments: it is new until it is whole, and known afterwards.
#[test]
fn smaller_fragments_of_the_same_request() {
    let now = Instant::now();
    let (mut a, mut b) = fragmenting();
    let mut small = channel(true, |config| config.fragment_size = Some(400));
    let first = a.request(now, INFORMATIONAL, &payloads(2_000), &mut Zeros);
    assert!(matches!(give(&mut b, now, first.iter().next().unwrap()), Received::Pending));
    let second = small.request(now, INFORMATIONAL, &payloads(2_000), &mut Zeros);
    let (id, _) = request(give_all(&mut b, now, &second));
    let answer = b.respond(INFORMATIONAL, id, &[], &mut Zeros);
    match give(&mut b, now, first.iter().next().unwrap()) {
        Received::Duplicate(again) => assert_eq!(again, answer),
        other => panic!("{other:?}"),
    }
}

/// RFC 9370: answers sealed with the keys before stay answers to requests sealed with the keys before.
#[test]
fn keys_change_between_exchanges() {
    const INTERMEDIATE: ExchangeType = ExchangeType::IKE_INTERMEDIATE;
    let now = Instant::now();
    let (mut a, mut b) = pair();
    let asked = a.request(now, INTERMEDIATE, &payloads(1), &mut Zeros);
    let (id, _) = request(give_all(&mut b, now, &asked));
    let answer = b.respond(INTERMEDIATE, id, &[], &mut Zeros);
    assert!(b.rekey(&keys(8)));
    assert!(matches!(give_all(&mut b, now, &asked), Received::Duplicate(again) if again == answer));
    response(give_all(&mut a, now, &answer));
    assert!(a.rekey(&keys(8)));
    let asked = a.request(now, INFORMATIONAL, &payloads(1), &mut Zeros);
    request(give_all(&mut b, now, &asked));
    let mut old = channel(false, |_| ());
    assert_eq!(ignored(give_all(&mut old, now, &asked)), Ignored::MessageId);
}

/// RFC 7296 section 2.2: "the Message ID ... MUST NOT wrap".
#[test]
fn message_ids_do_not_wrap() {
    let now = Instant::now();
    let mut a = channel(true, |config| config.next_request = u32::MAX - 1);
    let mut b = channel(false, |config| config.expected_request = u32::MAX - 1);
    let asked = a.request(now, INFORMATIONAL, &[], &mut Zeros);
    let (id, _) = request(give_all(&mut b, now, &asked));
    let answer = b.respond(INFORMATIONAL, id, &[], &mut Zeros);
    response(give_all(&mut a, now, &answer));
    assert!(a.is_exhausted() && b.is_exhausted() && !a.may_request());
    assert!(matches!(give_all(&mut b, now, &asked), Received::Duplicate(_)));
    let head = a.head(INFORMATIONAL, false, u32::MAX);
    let beyond = a.seal(&head, &[], &mut Zeros);
    assert_eq!(ignored(give_all(&mut b, now, &beyond)), Ignored::MessageId);
}

/// 100,000 of them live at a time.
#[test]
fn a_channel_is_small() {
    assert!(size_of::<Channel>() <= 512, "{}", size_of::<Channel>());
    let delete = Payload::Delete { protocol: ProtocolId::IKE, spis: vec![] };
    let (mut a, _) = pair();
    let datagrams = a.request(Instant::now(), INFORMATIONAL, &[delete], &mut Zeros);
    assert!(datagrams.iter().all(|datagram| datagram.capacity() == datagram.len()));
}
