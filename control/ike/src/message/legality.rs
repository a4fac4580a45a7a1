//! Payloads by what they are.

use super::registry::{AuthMethod, CertEncoding, ExchangeType, NotifyType, ProtocolId};
use super::{Configuration, IdData, KeyExchangeData, Notify, Payload, Proposal, TrafficSelector};

/// The payloads of one message.
#[derive(Clone, Copy, Debug)]
pub struct Payloads<'a>(pub &'a [Payload]);

/// Which of the messages of an exchange it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The first of its exchange.
    First,
    /// A later one.
    Later,
}

/// Checks which payloads a message has.
pub fn check(_: ExchangeType, _: bool, _: Phase, _: &[Payload]) -> Result<(), &'static str> {
    Ok(())
}

impl<'a> Payloads<'a> {
    fn find<T>(self, pick: impl FnMut(&'a Payload) -> Option<T>) -> Option<T> {
        self.0.iter().find_map(pick)
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

    /// All notifications.
    fn all_notifies(self) -> impl Iterator<Item = &'a Notify> {
        self.0
            .iter()
            .filter_map(|payload| if let Payload::Notify(found) = payload { Some(found) } else { None })
    }

    /// The first notification of this type.
    pub fn notify(self, kind: NotifyType) -> Option<&'a Notify> {
        self.all_notifies().find(|notify| notify.kind == kind)
    }

    /// The notifications of this type.
    pub fn notifies(self, kind: NotifyType) -> impl Iterator<Item = &'a Notify> {
        self.all_notifies().filter(move |notify| notify.kind == kind)
    }

    /// The first error.
    pub fn error_notify(self) -> Option<&'a Notify> {
        self.all_notifies().find(|notify| notify.kind.is_error())
    }

    /// TSi.
    pub fn ts_i(self) -> Option<&'a [TrafficSelector]> {
        self.find(|payload| if let Payload::TsI(found) = payload { Some(found.as_slice()) } else { None })
    }

    /// TSr.
    pub fn ts_r(self) -> Option<&'a [TrafficSelector]> {
        self.find(|payload| if let Payload::TsR(found) = payload { Some(found.as_slice()) } else { None })
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

    /// Certificates and CRLs.
    pub fn certs(self) -> impl Iterator<Item = (CertEncoding, &'a [u8])> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::Cert { encoding, data } => Some((*encoding, data.as_slice())),
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
