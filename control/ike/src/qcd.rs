//! Quick crash detection (RFC 6290). Each side gives the other, inside the IKE SA, a token that only it can make. A side
//! that has lost the SA in a reset presents it in the clear when the peer asks about the SA, and the peer, which has no other
//! reason to believe an unprotected message, forgets the SA at once.
//!
//! It covers what the Delete after a reset (RST-5) cannot: SAs that are younger than the last record on disk. A token is
//! made from the SPIs and one secret that outlives resets, so that nothing of the SA is needed for it.

use crate::Secret;
use crate::message::legality::Payloads;
use crate::message::parse::{Body, Parsed};
use crate::message::registry::NotifyType;
use crate::message::{Head, IkeSpi, Notify, Payload, emit};
use crate::v1::hash::Hash;

/// "The token taker MUST support at least four" in one message.
const PRESENTED: usize = 4;

/// Makes tokens.
#[derive(Debug)]
pub struct TokenMaker {
    secret: Secret,
}

impl TokenMaker {
    /// With a secret of at least 32 bytes that outlives resets.
    pub const fn new(secret: Secret) -> Self {
        Self { secret }
    }

    /// The token of the IKE SA with these SPIs: 32 bytes that tell nothing of another's.
    fn token(&self, spi_i: IkeSpi, spi_r: IkeSpi) -> Secret {
        let (spi_i, spi_r) = (spi_i.0.to_be_bytes(), spi_r.0.to_be_bytes());
        Hash::Sha256.prf(self.secret.expose(), &[b"postern qcd token", &spi_i, &spi_r])
    }

    /// Gives it to the peer, inside the IKE SA.
    pub(crate) fn notify(&self, spi_i: IkeSpi, spi_r: IkeSpi) -> Payload {
        Payload::Notify(Notify::new(NotifyType::QCD_TOKEN, self.token(spi_i, spi_r).expose()))
    }

    /// What a protected request about an IKE SA that this side does not have is answered with (section 4.5): SPIs and
    /// message ID are the request's.
    pub(crate) fn answer(&self, head: &Head) -> Vec<u8> {
        let payloads = [
            Payload::Notify(Notify::new(NotifyType::INVALID_IKE_SPI, [])),
            self.notify(head.spi_i, head.spi_r),
        ];
        let head = Head { response: true, from_initiator: !head.from_initiator, ..*head };
        emit::plain(&head, &payloads)
    }
}

/// The token that the peer gives, if it gives one of a length that section 4.1 allows.
pub(crate) fn given(payloads: &Payloads<'_>) -> Option<Secret> {
    let notify = payloads.notify(NotifyType::QCD_TOKEN)?;
    (16..=128).contains(&notify.data.len()).then(|| Secret::new(notify.data.as_slice()))
}

/// Whether an unprotected message presents the token `expected`: its sender has made it, and has lost the SA.
pub(crate) fn presents(parsed: &Parsed<'_>, expected: Option<&Secret>) -> bool {
    let (Body::Plain(payloads), Some(expected), true) = (&parsed.body, expected, parsed.head.response) else {
        return false;
    };
    if Payloads(payloads).notify(NotifyType::INVALID_IKE_SPI).is_none() {
        return false;
    }
    let tokens = payloads.iter().filter_map(|payload| match payload {
        Payload::Notify(notify) if notify.kind == NotifyType::QCD_TOKEN => Some(&notify.data),
        _ => None,
    });
    tokens.take(PRESENTED).any(|token| Secret::new(token.as_slice()) == *expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::parse;
    use crate::message::registry::ExchangeType;

    fn head() -> Head {
        Head {
            spi_i: IkeSpi(7),
            spi_r: IkeSpi(9),
            exchange: ExchangeType::INFORMATIONAL,
            response: false,
            from_initiator: true,
            message_id: 41,
        }
    }

    /// RFC 6290: a token belongs to one pair of SPIs and one secret; what is presented is recognised, and nothing else.
    #[test]
    fn rst_4_tokens_of_quick_crash_detection() {
        let maker = TokenMaker::new(Secret::new([1; 32]));
        let token = maker.token(IkeSpi(7), IkeSpi(9));
        assert_eq!(token.len(), 32);
        assert_ne!(token, maker.token(IkeSpi(9), IkeSpi(7)));
        assert_ne!(token, TokenMaker::new(Secret::new([2; 32])).token(IkeSpi(7), IkeSpi(9)));
        let bytes = maker.answer(&head());
        let parsed = parse::message(&bytes).unwrap();
        let Head { spi_i, spi_r, message_id, response, from_initiator, .. } = parsed.head;
        assert_eq!(
            (spi_i, spi_r, message_id, response, from_initiator),
            (IkeSpi(7), IkeSpi(9), 41, true, false)
        );
        assert!(presents(&parsed, Some(&token)));
        assert!(!presents(&parsed, None));
        assert!(!presents(&parsed, Some(&maker.token(IkeSpi(7), IkeSpi(8)))));
        let request = emit::plain(&head(), &[maker.notify(IkeSpi(7), IkeSpi(9))]);
        assert!(
            !presents(&parse::message(&request).unwrap(), Some(&token)),
            "no request, no INVALID_IKE_SPI"
        );
        for (length, fits) in [(15, false), (16, true), (128, true), (129, false)] {
            let payloads = [Payload::Notify(Notify::new(NotifyType::QCD_TOKEN, vec![1; length]))];
            assert_eq!(given(&Payloads(&payloads)).is_some(), fits, "{length}");
        }
    }
}
