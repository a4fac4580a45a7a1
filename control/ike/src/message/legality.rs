//! Which payloads a message must and may have (RFC 7296 appendix C, RFC 9242, RFC 9370), and looking them up.
//!
//! [`check`] comes before anything in a message is believed, and [`Payloads`] finds what it then may rely on: of every
//! payload that is looked up as one there is at most one. Payloads of unknown type, vendor IDs and unknown notifications
//! may stand anywhere and mean nothing; a known payload in a message that it does not belong into is refused, as is a
//! notification whose data cannot be what its type says.
//!
//! An answer that refuses has only notifications, of which at least one is an error (or a cookie in IKE_SA_INIT).

use super::registry::{AuthMethod, CertEncoding, ExchangeType, NotifyType, PayloadType, ProtocolId};
use super::{Configuration, IdData, KeyExchangeData, Notify, Payload, Proposal, TrafficSelector};

/// The payloads of one message.
#[derive(Clone, Copy, Debug)]
pub struct Payloads<'a>(pub &'a [Payload]);

/// Which of an IKE SA's exchanges of a type it is. It makes a difference for requests of IKE_AUTH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The first.
    First,
    /// A later one: in IKE_AUTH, EAP is under way or has ended (section 2.16).
    Later,
}

/// How often a payload stands in a message.
#[derive(Clone, Copy)]
struct Row(PayloadType, Times);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Times {
    Once,
    AtMostOnce,
    Any,
}

use Times::{Any, AtMostOnce, Once};

/// Appendix C.1. A cookie is a notification, and those are in every table.
const INIT_REQUEST: &[Row] =
    &[Row(PayloadType::SA, Once), Row(PayloadType::KE, Once), Row(PayloadType::NONCE, Once)];

const INIT_RESPONSE: &[Row] = &[
    Row(PayloadType::SA, Once),
    Row(PayloadType::KE, Once),
    Row(PayloadType::NONCE, Once),
    Row(PayloadType::CERTREQ, Any),
];

/// RFC 9242 section 3.2 leaves the content to others; RFC 9370 section 2.2.2 puts a key exchange in it.
const INTERMEDIATE: &[Row] = &[Row(PayloadType::KE, AtMostOnce)];

/// Appendix C.2 and, for the first request of C.3, the same without AUTH.
const AUTH_REQUEST: &[Row] = &[
    Row(PayloadType::ID_I, Once),
    Row(PayloadType::CERT, Any),
    Row(PayloadType::CERTREQ, Any),
    Row(PayloadType::ID_R, AtMostOnce),
    Row(PayloadType::AUTH, AtMostOnce),
    Row(PayloadType::CONFIGURATION, AtMostOnce),
    Row(PayloadType::SA, AtMostOnce),
    Row(PayloadType::TS_I, AtMostOnce),
    Row(PayloadType::TS_R, AtMostOnce),
];

/// Appendix C.3: EAP, or AUTH once it has succeeded.
const AUTH_REQUEST_LATER: &[Row] = &[Row(PayloadType::EAP, AtMostOnce), Row(PayloadType::AUTH, AtMostOnce)];

/// The responses of appendices C.2 and C.3 in one: which of them it is, its IDr, AUTH and EAP say.
const AUTH_RESPONSE: &[Row] = &[
    Row(PayloadType::ID_R, AtMostOnce),
    Row(PayloadType::CERT, Any),
    Row(PayloadType::AUTH, AtMostOnce),
    Row(PayloadType::EAP, AtMostOnce),
    Row(PayloadType::CONFIGURATION, AtMostOnce),
    Row(PayloadType::SA, AtMostOnce),
    Row(PayloadType::TS_I, AtMostOnce),
    Row(PayloadType::TS_R, AtMostOnce),
];

/// Appendices C.4 and C.5.
const CREATE_CHILD_SA: &[Row] = &[
    Row(PayloadType::SA, Once),
    Row(PayloadType::NONCE, Once),
    Row(PayloadType::KE, AtMostOnce),
    Row(PayloadType::CONFIGURATION, AtMostOnce),
    Row(PayloadType::TS_I, AtMostOnce),
    Row(PayloadType::TS_R, AtMostOnce),
];

/// Appendix C.6.
const INFORMATIONAL: &[Row] = &[Row(PayloadType::DELETE, Any), Row(PayloadType::CONFIGURATION, AtMostOnce)];

/// RFC 9370 section 2.2.4.
const FOLLOWUP_KE: &[Row] = &[Row(PayloadType::KE, Once)];

/// Checks which payloads a message has. `phase` counts exchanges of this type in the IKE SA.
///
/// # Errors
/// With what is wrong, to be read after "the message". The answer to such a request is INVALID_SYNTAX.
pub fn check(
    exchange: ExchangeType,
    response: bool,
    phase: Phase,
    payloads: &[Payload],
) -> Result<(), &'static str> {
    let view = Payloads(payloads);
    for notify in view.all_notifies() {
        check_notify(notify)?;
    }
    for &kind in LONE_NOTIFIES {
        if view.notifies(kind).nth(1).is_some() {
            return Err("has a notification twice that makes sense once");
        }
    }
    if response && is_refusal(exchange, view) {
        return Ok(());
    }
    match (exchange, response) {
        (ExchangeType::IKE_SA_INIT, false) => count(INIT_REQUEST, view),
        (ExchangeType::IKE_SA_INIT, true) => count(INIT_RESPONSE, view),
        (ExchangeType::IKE_INTERMEDIATE, _) => count(INTERMEDIATE, view),
        (ExchangeType::IKE_AUTH, false) if phase == Phase::First => {
            count(AUTH_REQUEST, view)?;
            child_is_whole(view)
        }
        (ExchangeType::IKE_AUTH, false) => {
            count(AUTH_REQUEST_LATER, view)?;
            let one = view.eap().is_some() != view.auth().is_some();
            one.then_some(()).ok_or("has neither an EAP nor an AUTH payload, or both")
        }
        (ExchangeType::IKE_AUTH, true) => {
            count(AUTH_RESPONSE, view)?;
            child_is_whole(view)?;
            let eap = view.eap().is_some();
            if eap && view.sa().is_some() {
                return Err("has an SA payload before EAP has ended");
            }
            (eap || view.auth().is_some()).then_some(()).ok_or("has neither an EAP nor an AUTH payload")
        }
        (ExchangeType::CREATE_CHILD_SA, _) => {
            count(CREATE_CHILD_SA, view)?;
            create_child_is_whole(view)
        }
        (ExchangeType::INFORMATIONAL, _) => count(INFORMATIONAL, view),
        (ExchangeType::IKE_FOLLOWUP_KE, false) => {
            count(FOLLOWUP_KE, view)?;
            let link = view.notify(NotifyType::ADDITIONAL_KEY_EXCHANGE).is_some();
            link.then_some(()).ok_or("does not say which exchange it follows")
        }
        (ExchangeType::IKE_FOLLOWUP_KE, true) => count(FOLLOWUP_KE, view),
        _ => Err("is of an exchange that is not known here"),
    }
}

fn is_refusal(exchange: ExchangeType, view: Payloads<'_>) -> bool {
    let bare = |payload: &Payload| {
        matches!(payload, Payload::Notify(_) | Payload::VendorId(_) | Payload::Unknown { .. })
    };
    let refuses = |notify: &Notify| {
        notify.kind.is_error() || (exchange == ExchangeType::IKE_SA_INIT && notify.kind == NotifyType::COOKIE)
    };
    view.0.iter().all(bare) && view.all_notifies().any(refuses)
}

fn count(rows: &[Row], view: Payloads<'_>) -> Result<(), &'static str> {
    for payload in view.0 {
        let kind = payload.kind();
        let anywhere = matches!(payload, Payload::Notify(_) | Payload::VendorId(_) | Payload::Unknown { .. });
        if !anywhere && !rows.iter().any(|row| row.0 == kind) {
            return Err(foreign(kind));
        }
    }
    for &Row(kind, times) in rows {
        match view.0.iter().filter(|payload| payload.kind() == kind).count() {
            0 if times == Once => return Err(missing(kind)),
            2.. if times != Any => return Err(surplus(kind)),
            _ => (),
        }
    }
    Ok(())
}

/// A CHILD_SA needs all three; RFC 6023 leaves all three out.
fn child_is_whole(view: Payloads<'_>) -> Result<(), &'static str> {
    match (view.sa(), view.ts_i(), view.ts_r()) {
        (Some(_), Some(_), Some(_)) | (None, None, None) => Ok(()),
        _ => Err("has not all of an SA payload and two traffic selector payloads"),
    }
}

/// Section 1.3.2: when an IKE SA is rekeyed there is a key exchange and there are no traffic selectors; for a CHILD_SA it is
/// the other way around.
fn create_child_is_whole(view: Payloads<'_>) -> Result<(), &'static str> {
    let of_ike =
        view.sa().and_then(<[_]>::first).is_some_and(|proposal| proposal.protocol == ProtocolId::IKE);
    match (of_ike, view.ke(), view.ts()) {
        (true, Some(_), None) if view.ts_i().is_none() && view.ts_r().is_none() => Ok(()),
        (true, None, _) => Err("has no KE payload for a new IKE SA"),
        (true, ..) => Err("has traffic selectors for an IKE SA"),
        (false, _, Some(_)) => Ok(()),
        (false, _, None) => Err("has not two traffic selector payloads"),
    }
}

/// Notifications of which a second one would contradict the first.
const LONE_NOTIFIES: &[NotifyType] = &[
    NotifyType::COOKIE,
    NotifyType::COOKIE2,
    NotifyType::REKEY_SA,
    NotifyType::NAT_DETECTION_DESTINATION_IP,
    NotifyType::SIGNATURE_HASH_ALGORITHMS,
    NotifyType::INVALID_KE_PAYLOAD,
    NotifyType::ADDITIONAL_KEY_EXCHANGE,
    NotifyType::SET_WINDOW_SIZE,
];

/// Lengths that the RFCs fix for data and SPI.
fn check_notify(notify: &Notify) -> Result<(), &'static str> {
    let fits = match (notify.kind, notify.data.len()) {
        (NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD, length) => length == 1,
        (NotifyType::INVALID_KE_PAYLOAD, length) => length == 2,
        (NotifyType::SET_WINDOW_SIZE | NotifyType::ADDITIONAL_IP4_ADDRESS, length) => length == 4,
        (NotifyType::ADDITIONAL_IP6_ADDRESS, length) => length == 16,
        // Section 2.23: "a SHA-1 digest".
        (NotifyType::NAT_DETECTION_SOURCE_IP | NotifyType::NAT_DETECTION_DESTINATION_IP, length) => {
            length == 20
        }
        // Section 2.6: "between 1 and 64 octets".
        (NotifyType::COOKIE, length) => (1..=64).contains(&length),
        // RFC 4555 section 4.2.5: "between 8 and 64 octets".
        (NotifyType::COOKIE2, length) => (8..=64).contains(&length),
        (NotifyType::SIGNATURE_HASH_ALGORITHMS, length) => length >= 2 && length.is_multiple_of(2),
        (NotifyType::REKEY_SA, _) => {
            notify.spi.len() == 4 && matches!(notify.protocol, ProtocolId::ESP | ProtocolId::AH)
        }
        _ => true,
    };
    fits.then_some(()).ok_or("has a notification of the wrong length")
}

macro_rules! texts {
    ($name:ident, $before:literal, $after:literal) => {
        fn $name(kind: PayloadType) -> &'static str {
            match kind {
                PayloadType::SA => concat!($before, "SA", $after),
                PayloadType::KE => concat!($before, "KE", $after),
                PayloadType::ID_I => concat!($before, "IDi", $after),
                PayloadType::ID_R => concat!($before, "IDr", $after),
                PayloadType::CERT => concat!($before, "CERT", $after),
                PayloadType::CERTREQ => concat!($before, "CERTREQ", $after),
                PayloadType::AUTH => concat!($before, "AUTH", $after),
                PayloadType::NONCE => concat!($before, "nonce", $after),
                PayloadType::DELETE => concat!($before, "Delete", $after),
                PayloadType::TS_I => concat!($before, "TSi", $after),
                PayloadType::TS_R => concat!($before, "TSr", $after),
                PayloadType::CONFIGURATION => concat!($before, "CP", $after),
                PayloadType::EAP => concat!($before, "EAP", $after),
                _ => concat!($before, "certain", $after),
            }
        }
    };
}

texts!(missing, "has no ", " payload");
texts!(surplus, "has more than one ", " payload");
texts!(foreign, "has a ", " payload, which does not belong there");

impl<'a> Payloads<'a> {
    fn find<T>(self, pick: impl FnMut(&'a Payload) -> Option<T>) -> Option<T> {
        self.0.iter().find_map(pick)
    }

    fn all_notifies(self) -> impl Iterator<Item = &'a Notify> {
        self.0
            .iter()
            .filter_map(|payload| if let Payload::Notify(found) = payload { Some(found) } else { None })
    }

    /// SA.
    pub fn sa(self) -> Option<&'a [Proposal]> {
        self.find(|payload| if let Payload::Sa(found) = payload { Some(found.as_slice()) } else { None })
    }

    /// KE.
    pub fn ke(self) -> Option<&'a KeyExchangeData> {
        self.find(|payload| if let Payload::Ke(found) = payload { Some(found) } else { None })
    }

    /// Nonce.
    pub fn nonce(self) -> Option<&'a [u8]> {
        self.find(|payload| if let Payload::Nonce(found) = payload { Some(found.as_slice()) } else { None })
    }

    /// The first notification of this type.
    pub fn notify(self, kind: NotifyType) -> Option<&'a Notify> {
        self.all_notifies().find(|notify| notify.kind == kind)
    }

    /// The notifications of this type.
    pub fn notifies(self, kind: NotifyType) -> impl Iterator<Item = &'a Notify> {
        self.all_notifies().filter(move |notify| notify.kind == kind)
    }

    /// The first notification of an error.
    pub fn error_notify(self) -> Option<&'a Notify> {
        self.all_notifies().find(|notify| notify.kind.is_error())
    }

    /// The protocol and SPI of the CHILD_SA that a request of CREATE_CHILD_SA replaces; the SPI is the sender's own
    /// (section 1.3.3: "the SPI … the exchange initiator would expect in inbound ESP or AH packets").
    pub fn rekeyed_child(self) -> Option<(ProtocolId, u32)> {
        let notify = self.notify(NotifyType::REKEY_SA)?;
        Some((notify.protocol, u32::from_be_bytes(notify.spi.as_slice().try_into().ok()?)))
    }

    /// TSi.
    pub fn ts_i(self) -> Option<&'a [TrafficSelector]> {
        self.find(|payload| if let Payload::TsI(found) = payload { Some(found.as_slice()) } else { None })
    }

    /// TSr.
    pub fn ts_r(self) -> Option<&'a [TrafficSelector]> {
        self.find(|payload| if let Payload::TsR(found) = payload { Some(found.as_slice()) } else { None })
    }

    /// TSi and TSr.
    pub fn ts(self) -> Option<(&'a [TrafficSelector], &'a [TrafficSelector])> {
        self.ts_i().zip(self.ts_r())
    }

    /// IDi.
    pub fn id_i(self) -> Option<&'a IdData> {
        self.find(|payload| if let Payload::IdI(found) = payload { Some(found) } else { None })
    }

    /// IDr.
    pub fn id_r(self) -> Option<&'a IdData> {
        self.find(|payload| if let Payload::IdR(found) = payload { Some(found) } else { None })
    }

    /// AUTH.
    pub fn auth(self) -> Option<(AuthMethod, &'a [u8])> {
        self.find(|payload| match payload {
            Payload::Auth { method, data } => Some((*method, data.as_slice())),
            _ => None,
        })
    }

    /// Certificates and CRLs in the order of the message: section 3.6 puts the peer's own first.
    pub fn certs(self) -> impl Iterator<Item = (CertEncoding, &'a [u8])> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::Cert { encoding, data } => Some((*encoding, data.as_slice())),
            _ => None,
        })
    }

    /// Certificate requests: the encoding that is asked for, and hashes of the keys of CAs.
    pub fn cert_requests(self) -> impl Iterator<Item = (CertEncoding, &'a [u8])> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::CertReq { encoding, authorities } => Some((*encoding, authorities.as_slice())),
            _ => None,
        })
    }

    /// Configuration.
    pub fn cp(self) -> Option<&'a Configuration> {
        self.find(|payload| if let Payload::Cp(found) = payload { Some(found) } else { None })
    }

    /// EAP.
    pub fn eap(self) -> Option<&'a [u8]> {
        self.find(|payload| if let Payload::Eap(found) = payload { Some(found.as_slice()) } else { None })
    }

    /// Deletes.
    pub fn deletes(self) -> impl Iterator<Item = (ProtocolId, &'a [u32])> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::Delete { protocol, spis } => Some((*protocol, spis.as_slice())),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests;
