use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::{Random, Secret};

/// Gives out what it was filled with, then a counter.
struct Fixed(Vec<u8>, u8);

impl Random for Fixed {
    fn fill(&mut self, out: &mut [u8]) {
        for byte in out {
            *byte = if self.0.is_empty() {
                self.1 = self.1.wrapping_add(1);
                self.1
            } else {
                self.0.remove(0)
            };
        }
    }
}

fn random() -> Fixed {
    Fixed(Vec::new(), 0)
}

fn hex(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

fn users(list: &[(&str, &str)]) -> Arc<HashMap<String, Secret>> {
    Arc::new(list.iter().map(|(name, word)| ((*name).to_owned(), Secret::new(word.as_bytes()))).collect())
}

/// Runs both ends against each other.
fn run(
    server: &mut Server,
    client: &mut Client,
) -> (Result<(Secret, String), String>, Result<Secret, String>) {
    let (mut s, mut c) = (random(), Fixed(Vec::new(), 100));
    let mut message = server.start(&mut s);
    loop {
        let answer = match client.handle(&message, &mut c) {
            ClientStep::Send(answer) => answer,
            ClientStep::Success { .. } => panic!("the client is done before the server"),
            ClientStep::Failure { why } => return (Err("client gave up".to_owned()), Err(why)),
        };
        match server.handle(&answer, &mut s) {
            ServerStep::Send(next) => message = next,
            ServerStep::Success { send, msk, user } => {
                let end = match client.handle(&send, &mut c) {
                    ClientStep::Success { msk } => Ok(msk),
                    other => Err(format!("{other:?}")),
                };
                return (Ok((msk, user)), end);
            }
            ServerStep::Failure { send, why } => {
                let end = match client.handle(&send, &mut c) {
                    ClientStep::Failure { why } => why,
                    other => panic!("{other:?}"),
                };
                return (Err(why), Err(end));
            }
        }
    }
}

/// IKE-3: both ends come to the same MSK of 64 bytes; the user is the configured one.
#[test]
fn ike_3_both_ends_agree() {
    let mut server = Server::new(users(&[("joe", "höhle"), ("ann", "x")]), "gw.example.org");
    let mut client = Client::new("joe", Secret::new("höhle".as_bytes()));
    let (server, client) = run(&mut server, &mut client);
    let (msk, user) = server.unwrap();
    assert_eq!(user, "joe");
    assert_eq!(msk.len(), 64);
    assert_eq!(msk, client.unwrap());
}

/// IKE-3: what Windows puts in front of the name is no part of it.
#[test]
fn ike_3_a_domain_is_no_part_of_the_name() {
    let mut server = Server::new(users(&[("joe", "secret")]), "gw");
    let mut client = Client::new("EXAMPLE\\joe", Secret::new(b"secret".as_slice()));
    let (server, client) = run(&mut server, &mut client);
    assert_eq!(server.unwrap().1, "joe");
    client.unwrap();
}

/// IKE-3: a wrong password and an unknown user look the same to the client and not to the gateway's log.
#[test]
fn ike_3_wrong_password_and_unknown_user() {
    let list = users(&[("joe", "secret")]);
    let refused = "the gateway refuses the user: wrong name or password";
    for (user, word, why) in [
        ("joe", "Secret", "the password of user \"joe\" is wrong"),
        ("joe", "", "the password of user \"joe\" is wrong"),
        ("moe", "secret", "there is no user \"moe\""),
        ("moe", "", "there is no user \"moe\""),
        ("", "", "there is no user \"\""),
    ] {
        let mut client = Client::new(user, Secret::new(word.as_bytes()));
        let (server, client) = run(&mut Server::new(Arc::clone(&list), "gw"), &mut client);
        assert_eq!(server.unwrap_err(), why);
        assert_eq!(client.unwrap_err(), refused);
    }
}

/// IKE-3: a gateway that does not know the password is found out, also if it says Success without proof.
#[test]
fn ike_3_an_impostor_is_found_out() {
    let mut client = Client::new("joe", Secret::new(b"secret".as_slice()));
    let challenge = mschap(Code::REQUEST, 7, OpCode::CHALLENGE, 7, &[&[16], &[9; 16], b"gw"]);
    assert!(matches!(client.handle(&challenge, &mut random()), ClientStep::Send(_)));
    let proof = format!("S={} M=OK", "0123456789ABCDEF0123".repeat(2));
    let success = mschap(Code::REQUEST, 8, OpCode::SUCCESS, 7, &[proof.as_bytes()]);
    let ClientStep::Failure { why } = client.handle(&success, &mut random()) else { panic!() };
    assert_eq!(why, "the gateway does not know the user's password");

    for rounds in 0..2 {
        let mut client = Client::new("joe", Secret::new(b"secret".as_slice()));
        if rounds == 1 {
            client.handle(&challenge, &mut random());
        }
        let end = packet(Code::SUCCESS, 8, None, &[]);
        let ClientStep::Failure { why } = client.handle(&end, &mut random()) else { panic!() };
        assert!(why.contains("without having proven"), "{why}");
    }
}

/// IKE-3: the example of RFC 2759 section 9.2, "User", "clientPass", through both machines' messages.
#[test]
fn ike_3_example_of_rfc_2759() {
    let authenticator = hex("5B 5D 7C 7D 7B 3F 2F 3E 3C 2C 60 21 32 26 26 28");
    let peer = hex("21 40 23 24 25 5E 26 2A 28 29 5F 2B 3A 33 7C 7E");
    let response = hex("82 30 9E CD 8D 70 8B 5E A0 8F AA 39 81 CD 83 54 42 33 11 4A 3D 85 D6 DF");

    let mut client = Client::new("User", Secret::new(b"clientPass".as_slice()));
    let challenge = mschap(Code::REQUEST, 1, OpCode::CHALLENGE, 1, &[&[16], &authenticator, b"gw"]);
    let ClientStep::Send(answer) = client.handle(&challenge, &mut Fixed(peer.clone(), 0)) else { panic!() };
    let expected =
        [&hex("02 01 00 3F 1A 02 01 00 3A 31")[..], &peer, &[0; 8], &response, &[0], b"User"].concat();
    assert_eq!(answer, expected);

    let mut server = Server::new(users(&[("User", "clientPass")]), "gw");
    let mut random = Fixed([vec![0], authenticator].concat(), 0);
    server.start(&mut random);
    let identity = packet(Code::RESPONSE, 0, Some(Kind::IDENTITY), &[b"User"]);
    assert!(matches!(server.handle(&identity, &mut random), ServerStep::Send(sent) if sent == challenge));
    let ServerStep::Send(proof) = server.handle(&answer, &mut random) else { panic!() };
    let text = b"S=407A5589115FD0D6209F510FE9C04566932CDA56";
    assert!(proof.windows(text.len()).any(|window| window == text));
    let ClientStep::Send(_) = client.handle(&proof, &mut random) else { panic!() };
}

/// IKE-3: an exchange of two strongSwan 5.9.8 (`eap-identity`, `eap-mschapv2`; user alice, password wonderland), read from
/// their logs at level 4. In the place of either one Postern sends the same bytes and comes to the same MSK.
#[test]
fn ike_3_exchange_of_strongswan() {
    let identity_request = hex("0100000501");
    let identity = hex("0200000a01616c696365");
    let challenge = hex("01e400241a01e4001f10dbc72971bfbf5bff5b061c9fcf1aba947374726f6e675377616e");
    let response = hex(
        "02e400401a02e4003b311b0c4b87179e278f90e8f3403dee369b0000000000000000fe58a2a915ef7872982fbafb72221b2b9d48abe1
         0daec22600616c696365",
    );
    let proof = hex(
        "01e500491a03e40044533d344237374534373330343341324446444636464443394144463935463932324138463243303634
         41204d3d57656c636f6d65327374726f6e675377616e00",
    );
    let believed = hex("02e500061a03");
    let success = hex("03e50004");
    let expected = Secret::new(
        [hex("99BD9D85E7392A847AFDE740B3BCC3B0AFA94A6B5AC029AB2BE32D8C92A0450C"), vec![0; 32]].concat(),
    );

    let mut random = Fixed(response[10..26].to_vec(), 0);
    let mut client = Client::new("alice", Secret::new(b"wonderland".as_slice()));
    for (request, answer) in [(&identity_request, &identity), (&challenge, &response), (&proof, &believed)] {
        let step = client.handle(request, &mut random);
        let ClientStep::Send(sent) = step else { panic!("{step:?}") };
        assert_eq!(sent, *answer);
    }
    assert!(matches!(client.handle(&success, &mut random), ClientStep::Success { msk } if msk == expected));

    let mut random = Fixed([&[0xe3], &challenge[10..26]].concat(), 0);
    let mut server = Server::new(users(&[("alice", "wonderland")]), "strongSwan");
    server.start(&mut random);
    let identity = [&[2, 0xe3], &identity[2..]].concat();
    assert!(matches!(server.handle(&identity, &mut random), ServerStep::Send(sent) if sent == challenge));
    let ServerStep::Send(sent) = server.handle(&response, &mut random) else { panic!() };
    // All but the words of welcome.
    let (head, words) = (10, proof.len() - "Welcome2strongSwan\0".len());
    assert_eq!(sent[head..words], proof[head..words]);
    let ServerStep::Success { send, msk, user } = server.handle(&believed, &mut random) else { panic!() };
    assert_eq!((send, msk, user.as_str()), (success, expected, "alice"));
}

/// IKE-3: a client that wants another method, or whose message does not fit, is refused with a reason.
#[test]
fn ike_3_what_does_not_fit_is_refused() {
    let fresh = || {
        let mut server = Server::new(users(&[("joe", "secret")]), "gw");
        let mut random = Fixed(vec![6], 0);
        server.start(&mut random);
        let identity = packet(Code::RESPONSE, 6, Some(Kind::IDENTITY), &[b"joe"]);
        assert!(matches!(server.handle(&identity, &mut random), ServerStep::Send(_)));
        server
    };
    let id = 7;
    let cases = [
        (packet(Code::RESPONSE, id, Some(Kind::NAK), &[&[25, 13]]), "EAP method 25 or 13"),
        (packet(Code::RESPONSE, id - 1, Some(Kind::IDENTITY), &[b"joe"]), "another EAP request"),
        (packet(Code::RESPONSE, id, Some(Kind::IDENTITY), &[b"joe"]), "does not fit"),
        (packet(Code::SUCCESS, id, None, &[]), "code 3"),
        (mschap(Code::RESPONSE, id, OpCode::RESPONSE, id, &[&[49], &[0; 48]]), "cannot be read"),
        (mschap(Code::RESPONSE, id, OpCode::RESPONSE, 77, &[&[49], &[0; 49]]), "does not fit"),
        (vec![2, id, 0], "cannot be read"),
        (vec![2, id, 0xff, 0xff, 1], "cannot be read"),
    ];
    for (message, expected) in cases {
        let mut server = fresh();
        let ServerStep::Failure { send, why } = server.handle(&message, &mut Fixed(Vec::new(), 0)) else {
            panic!("{expected}")
        };
        assert!(why.contains(expected), "{why}");
        assert_eq!(send, [4, id, 0, 4]);
    }
}

/// RFC 3748 sections 5.2 and 5.3.1: the client answers a notification, and offers MSCHAPv2 instead of another method.
#[test]
fn the_client_answers_what_it_must() {
    let mut client = Client::new("joe", Secret::new(b"x".as_slice()));
    for (request, expected) in [
        (packet(Code::REQUEST, 1, Some(Kind::NOTIFICATION), &[b"hello"]), vec![2, 1, 0, 5, 2]),
        (packet(Code::REQUEST, 2, Some(Kind(13)), &[&[0x20]]), vec![2, 2, 0, 6, 3, 26]),
        (packet(Code::REQUEST, 3, Some(Kind::IDENTITY), &[]), vec![2, 3, 0, 8, 1, b'j', b'o', b'e']),
    ] {
        let ClientStep::Send(answer) = client.handle(&request, &mut random()) else { panic!() };
        assert_eq!(answer, expected);
    }
}

/// OPS-4: formatting shows no secret.
#[test]
fn ops_4_debug_shows_no_secret() {
    let mut server = Server::new(users(&[("joe", "sesame")]), "gw");
    let mut client = Client::new("joe", Secret::new(b"sesame".as_slice()));
    let mut random = random();
    let request = server.start(&mut random);
    let ClientStep::Send(answer) = client.handle(&request, &mut random) else { panic!() };
    let step = server.handle(&answer, &mut random);
    let ServerStep::Send(request) = &step else { panic!() };
    client.handle(request, &mut random);
    let shown = format!("{server:?} {client:?} {server:#?} {client:#?}");
    assert!(!shown.contains("sesame") && !shown.contains("S="), "{shown}");
}

/// The seeds of the fuzz target `ike_eap` go through the same function. With `POSTERN_WRITE_SEEDS` set they are made anew
/// first: good exchanges up to each of their messages, and what does not fit.
#[test]
fn fuzz_seeds_hold() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../hwtests/fuzz/seeds/ike_eap");
    if std::env::var_os("POSTERN_WRITE_SEEDS").is_some() {
        let framed = |messages: &[Vec<u8>]| -> Vec<u8> {
            messages.iter().flat_map(|m| [&[u8::try_from(m.len()).unwrap()], &m[..]].concat()).collect()
        };
        for length in 1..8 {
            // The other end's own messages, unchanged.
            std::fs::write(format!("{folder}/good-{length}"), framed(&vec![vec![0xff]; length])).unwrap();
        }
        let odd = [
            packet(Code::REQUEST, 0, Some(Kind::NOTIFICATION), &[b"hello"]),
            packet(Code::REQUEST, 0, Some(Kind(25)), &[&[0x20]]),
            mschap(Code::REQUEST, 1, OpCode::CHALLENGE, 1, &[&[16], &[9; 16], b"gw"]),
            mschap(Code::RESPONSE, 1, OpCode::RESPONSE, 1, &[&[49], &[9; 49], b"joe"]),
            mschap(
                Code::REQUEST,
                2,
                OpCode::SUCCESS,
                1,
                &[b"S=0123456789ABCDEF0123456789ABCDEF01234567 M=OK"],
            ),
            mschap(Code::REQUEST, 2, OpCode::FAILURE, 1, &[b"E=648 R=1 C=00 V=3 M=no"]),
            packet(Code::SUCCESS, 2, None, &[]),
            packet(Code::FAILURE, 2, None, &[]),
        ];
        for (number, message) in odd.iter().enumerate() {
            let messages = [vec![0xff], message.clone(), vec![0xff]];
            std::fs::write(format!("{folder}/odd-{number}"), framed(&messages)).unwrap();
        }
    }
    let mut replayed = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let seed = std::fs::read(&path).unwrap();
        assert!(std::panic::catch_unwind(|| super::fuzz(&seed)).is_ok(), "{}", path.display());
        replayed += 1;
    }
    assert!(replayed >= 15, "{replayed} seeds in {folder}");
}

proptest! {
    /// IKE-3: any messages, in any state, make neither end panic, and a stranger's never succeed.
    #[test]
    fn ike_3_any_messages(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..20)) {
        super::fuzz(&messages.concat());
        let mut server = Server::new(users(&[("joe", "secret")]), "gw");
        let mut client = Client::new("joe", Secret::new(b"secret".as_slice()));
        server.start(&mut random());
        for message in &messages {
            let succeeds = matches!(server.handle(message, &mut random()), ServerStep::Success { .. });
            prop_assert!(!succeeds);
            let succeeds = matches!(client.handle(message, &mut random()), ClientStep::Success { .. });
            prop_assert!(!succeeds);
        }
    }

    /// IKE-3: with one byte of one message changed, the ends never disagree on success with different keys.
    #[test]
    fn ike_3_damaged_messages(which in 0_usize..7, at in any::<prop::sample::Index>(), flip in 1_u8..) {
        let mut server = Server::new(users(&[("joe", "secret")]), "gw");
        let mut client = Client::new("joe", Secret::new(b"secret".as_slice()));
        let mut count = 0;
        let mut damage = |mut message: Vec<u8>| {
            if count == which {
                let at = at.index(message.len());
                message[at] ^= flip;
            }
            count += 1;
            message
        };
        let (mut s, mut c) = (random(), Fixed(Vec::new(), 100));
        let mut message = damage(server.start(&mut s));
        let mut keys = (None, None);
        for _ in 0..8 {
            match client.handle(&message, &mut c) {
                ClientStep::Send(answer) => match server.handle(&damage(answer), &mut s) {
                    ServerStep::Send(next) => message = damage(next),
                    ServerStep::Success { send, msk, .. } => {
                        keys.0 = Some(msk);
                        message = damage(send);
                    }
                    ServerStep::Failure { .. } => break,
                },
                ClientStep::Success { msk } => {
                    keys.1 = Some(msk);
                    break;
                }
                ClientStep::Failure { .. } => break,
            }
        }
        if let (Some(a), Some(b)) = keys {
            prop_assert_eq!(a, b);
        }
    }
}
