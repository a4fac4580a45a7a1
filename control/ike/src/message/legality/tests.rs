//! Tests of `legality`: the tables of RFC 7296 appendix C, and what is not in them.

use super::*;
use crate::message::registry::{CfgType, IdType, KeMethod};
use crate::negotiate::keyword;

fn notify(kind: NotifyType, length: usize) -> Payload {
    Payload::Notify(Notify::new(kind, vec![0; length]))
}

fn rekey(protocol: ProtocolId, spi: &[u8]) -> Payload {
    Payload::Notify(Notify { protocol, spi: spi.to_vec(), ..Notify::new(NotifyType::REKEY_SA, []) })
}

/// Payloads by the short names of RFC 7296 appendix C.
fn payloads(names: &str) -> Vec<Payload> {
    let payload = |name: &str| match name {
        "SA" => Payload::Sa(vec![keyword::esp("aes128gcm16").unwrap()]),
        "SAike" => Payload::Sa(vec![keyword::ike("aes128-sha256-x25519").unwrap()]),
        "KE" => Payload::Ke(KeyExchangeData { method: KeMethod::CURVE25519, data: vec![0; 32] }),
        "N" => Payload::Nonce(vec![0; 32]),
        "IDi" => Payload::IdI(IdData { kind: IdType::FQDN, data: Vec::new() }),
        "IDr" => Payload::IdR(IdData { kind: IdType::FQDN, data: Vec::new() }),
        "CERT" => Payload::Cert { encoding: CertEncoding::X509_SIGNATURE, data: Vec::new() },
        "CERTREQ" => Payload::CertReq { encoding: CertEncoding::X509_SIGNATURE, authorities: Vec::new() },
        "AUTH" => Payload::Auth { method: AuthMethod::SHARED_KEY, data: Vec::new() },
        "TSi" => Payload::TsI(Vec::new()),
        "TSr" => Payload::TsR(Vec::new()),
        "CP" => Payload::Cp(Configuration { kind: CfgType::REQUEST, attributes: Vec::new() }),
        "EAP" => Payload::Eap(vec![3, 0, 0, 4]),
        "D" => Payload::Delete { protocol: ProtocolId::IKE, spis: Vec::new() },
        "V+" => Payload::VendorId(Vec::new()),
        "?" => Payload::Unknown { kind: PayloadType(200), critical: false },
        "cookie" => notify(NotifyType::COOKIE, 8),
        "error" => notify(NotifyType::NO_PROPOSAL_CHOSEN, 0),
        "status" => notify(NotifyType::MOBIKE_SUPPORTED, 0),
        "unknown" => notify(NotifyType(40_000), 3),
        "REKEY" => rekey(ProtocolId::ESP, &[1, 2, 3, 4]),
        "ADDITIONAL" => notify(NotifyType::ADDITIONAL_KEY_EXCHANGE, 8),
        other => panic!("{other}"),
    };
    names.split_whitespace().map(payload).collect()
}

const INIT: ExchangeType = ExchangeType::IKE_SA_INIT;
const AUTH: ExchangeType = ExchangeType::IKE_AUTH;
const CHILD: ExchangeType = ExchangeType::CREATE_CHILD_SA;
const INFO: ExchangeType = ExchangeType::INFORMATIONAL;
const INTER: ExchangeType = ExchangeType::IKE_INTERMEDIATE;
const FOLLOW: ExchangeType = ExchangeType::IKE_FOLLOWUP_KE;

/// Messages of an exchange (request or response, phase) by the names of their payloads.
type Table<T> = &'static [(ExchangeType, bool, Phase, &'static [T])];

const LEGAL: Table<&str> = &[
    (INIT, false, Phase::First, &["SA KE N", "cookie SA KE N status unknown V+ V+", "? SA N KE"]),
    (
        INIT,
        true,
        Phase::First,
        &["SA KE N CERTREQ CERTREQ status V+", "cookie", "error", "error status V+ ?"],
    ),
    (INTER, false, Phase::First, &["KE", "", "status"]),
    (INTER, true, Phase::First, &["KE", "error"]),
    (
        AUTH,
        false,
        Phase::First,
        &[
            "IDi CERT CERT CERTREQ IDr AUTH CP status SA TSi TSr status V+",
            "IDi AUTH SA TSi TSr",
            "IDi AUTH",
            "IDi SA TSi TSr",
        ],
    ),
    (AUTH, false, Phase::Later, &["EAP", "AUTH", "EAP status"]),
    (
        AUTH,
        true,
        Phase::First,
        &[
            "IDr CERT AUTH CP SA TSi TSr",
            "IDr AUTH error",
            "error",
            "IDr CERT AUTH EAP",
            "IDr EAP",
            "IDr AUTH",
        ],
    ),
    (AUTH, true, Phase::Later, &["EAP", "AUTH CP SA TSi TSr status", "error", "AUTH error"]),
    (CHILD, false, Phase::Later, &["REKEY SA N TSi TSr", "CP status SA N KE TSi TSr", "SAike N KE"]),
    (
        CHILD,
        true,
        Phase::Later,
        &["SA N TSi TSr", "CP SA N KE TSi TSr status", "SAike N KE", "error", "SAike N KE ADDITIONAL"],
    ),
    (INFO, false, Phase::Later, &["", "D", "D D", "error", "status status CP", "?"]),
    (INFO, true, Phase::Later, &["", "D", "CP", "error"]),
    (FOLLOW, false, Phase::Later, &["KE ADDITIONAL"]),
    (FOLLOW, true, Phase::Later, &["KE", "KE ADDITIONAL", "error"]),
];

/// With what is said of them.
const ILLEGAL: Table<(&str, &str)> = &[
    (
        INIT,
        false,
        Phase::First,
        &[
            ("", "has no SA payload"),
            ("KE N", "has no SA payload"),
            ("SA N", "has no KE payload"),
            ("SA KE", "has no nonce payload"),
            ("SA SA KE N", "has more than one SA payload"),
            ("SA KE N IDi", "has a IDi payload"),
            ("SA KE N CERTREQ", "does not belong there"),
            ("cookie cookie SA KE N", "twice"),
            ("cookie", "has no SA payload"),
            ("error", "has no SA payload"),
        ],
    ),
    (
        INIT,
        true,
        Phase::First,
        &[("SA KE", "has no nonce"), ("status", "has no SA"), ("SA error", "has no KE")],
    ),
    (INTER, false, Phase::First, &[("KE KE", "more than one KE"), ("AUTH", "does not belong")]),
    (
        AUTH,
        false,
        Phase::First,
        &[
            ("AUTH SA TSi TSr", "has no IDi"),
            ("IDi AUTH SA TSi", "has not all of an SA payload"),
            ("IDi AUTH TSi TSr", "has not all of an SA payload"),
            ("IDi AUTH AUTH", "more than one AUTH"),
            ("IDi AUTH KE", "does not belong"),
            ("IDi AUTH N", "does not belong"),
            ("IDi EAP", "does not belong"),
            ("error", "has no IDi"),
        ],
    ),
    (
        AUTH,
        false,
        Phase::Later,
        &[
            ("EAP AUTH", "or both"),
            ("", "neither"),
            ("IDi AUTH", "does not belong"),
            ("AUTH SA TSi TSr", "does not belong"),
        ],
    ),
    (
        AUTH,
        true,
        Phase::First,
        &[
            ("IDr", "neither"),
            ("", "neither"),
            ("status", "neither"),
            ("IDr AUTH SA", "not all of an SA"),
            ("IDr EAP SA TSi TSr", "before EAP has ended"),
            ("IDi AUTH", "does not belong"),
            ("IDr IDr AUTH", "more than one IDr"),
        ],
    ),
    (
        CHILD,
        false,
        Phase::Later,
        &[
            ("SA TSi TSr", "no nonce"),
            ("SA N", "has not two traffic selector payloads"),
            ("SA N TSi", "has not two traffic selector payloads"),
            ("SAike N", "no KE payload for a new IKE SA"),
            ("SAike N KE TSi TSr", "traffic selectors for an IKE SA"),
            ("SAike N KE TSr", "traffic selectors for an IKE SA"),
            ("REKEY REKEY SA N TSi TSr", "twice"),
            ("D SA N TSi TSr", "does not belong"),
            ("error", "has no SA"),
        ],
    ),
    (CHILD, true, Phase::Later, &[("", "has no SA"), ("SA TSi TSr", "no nonce"), ("error KE", "has no SA")]),
    (
        INFO,
        false,
        Phase::Later,
        &[("SA", "does not belong"), ("AUTH", "does not belong"), ("CP CP", "more than one CP")],
    ),
    (FOLLOW, false, Phase::Later, &[("KE", "which exchange it follows"), ("ADDITIONAL", "no KE")]),
    (ExchangeType(99), false, Phase::Later, &[("", "exchange that is not known")]),
];

/// IKE-1: the messages of RFC 7296 appendix C, RFC 9242 and RFC 9370.
#[test]
fn ike_1_legal() {
    for &(exchange, response, phase, messages) in LEGAL {
        for names in messages {
            assert_eq!(
                check(exchange, response, phase, &payloads(names)),
                Ok(()),
                "{exchange} {response}: {names}"
            );
        }
    }
}

/// IKE-1: messages that are none of these, and what is said of them.
#[test]
fn ike_1_illegal() {
    for &(exchange, response, phase, messages) in ILLEGAL {
        for (names, expected) in messages {
            let said = check(exchange, response, phase, &payloads(names)).expect_err(names);
            assert!(said.contains(expected), "{exchange} {response}: {names}: {said}");
        }
    }
}

/// IKE-1: notifications whose data cannot be what their type says.
#[test]
fn ike_1_notify_lengths() {
    let check = |payload: Payload| super::check(INFO, false, Phase::Later, &[payload]);
    for (kind, right, wrong) in [
        (NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD, 1..=1, [0, 2]),
        (NotifyType::INVALID_KE_PAYLOAD, 2..=2, [1, 3]),
        (NotifyType::SET_WINDOW_SIZE, 4..=4, [0, 5]),
        (NotifyType::ADDITIONAL_IP4_ADDRESS, 4..=4, [3, 16]),
        (NotifyType::ADDITIONAL_IP6_ADDRESS, 16..=16, [4, 17]),
        (NotifyType::NAT_DETECTION_SOURCE_IP, 20..=20, [0, 32]),
        (NotifyType::NAT_DETECTION_DESTINATION_IP, 20..=20, [19, 21]),
        (NotifyType::COOKIE, 1..=64, [0, 65]),
        (NotifyType::COOKIE2, 8..=64, [7, 65]),
        (NotifyType::SIGNATURE_HASH_ALGORITHMS, 2..=2, [0, 3]),
    ] {
        for length in right {
            assert_eq!(check(notify(kind, length)), Ok(()), "{kind} {length}");
        }
        for length in wrong {
            assert_eq!(
                check(notify(kind, length)),
                Err("has a notification of the wrong length"),
                "{kind} {length}"
            );
        }
    }
    assert_eq!(check(rekey(ProtocolId::AH, &[1, 2, 3, 4])), Ok(()));
    for (protocol, spi) in
        [(ProtocolId::ESP, &[1, 2, 3][..]), (ProtocolId::IKE, &[1, 2, 3, 4]), (ProtocolId::ESP, &[0; 8])]
    {
        assert!(check(rekey(protocol, spi)).is_err());
    }
    let found = payloads("REKEY SA N TSi TSr");
    assert_eq!(Payloads(&found).rekeyed_child(), Some((ProtocolId::ESP, 0x0102_0304)));
}

/// Every lookup finds its own payload and nothing else.
#[test]
fn lookups() {
    let all = payloads("SA KE N IDi IDr CERT CERT CERTREQ AUTH TSi TSr CP EAP D D error status unknown V+ ?");
    let found = Payloads(&all);
    assert!(found.sa().is_some() && found.ke().is_some() && found.nonce().is_some() && found.cp().is_some());
    assert!(
        found.id_i().is_some() && found.id_r().is_some() && found.auth().is_some() && found.eap().is_some()
    );
    assert!(found.ts_i().is_some() && found.ts_r().is_some() && found.ts().is_some());
    assert_eq!((found.certs().count(), found.cert_requests().count(), found.deletes().count()), (2, 1, 2));
    assert_eq!(found.error_notify().map(|notify| notify.kind), Some(NotifyType::NO_PROPOSAL_CHOSEN));
    assert_eq!(found.notifies(NotifyType::MOBIKE_SUPPORTED).count(), 1);
    assert!(found.notify(NotifyType::COOKIE).is_none());
    let none = payloads("V+ ?");
    let nothing = Payloads(&none);
    assert!(
        nothing.sa().is_none()
            && nothing.ke().is_none()
            && nothing.nonce().is_none()
            && nothing.cp().is_none()
    );
    assert!(nothing.id_i().is_none() && nothing.id_r().is_none() && nothing.auth().is_none());
    assert!(nothing.eap().is_none() && nothing.ts().is_none() && nothing.error_notify().is_none());
    assert_eq!(
        (nothing.certs().count(), nothing.cert_requests().count(), nothing.deletes().count()),
        (0, 0, 0)
    );
}
