//! What of a [`Channel`] is saved for the time after a reset, and one that goes on from there.

use std::time::Instant;

use super::{Channel, ChannelConfig, Datagrams, Last, Outstanding, REPLY_LIFETIME, Retransmission};
use crate::Random;
use crate::crypto::sk::Sealer;
use crate::message::registry::ExchangeType;
use crate::message::{Head, parse};
use crate::record::whole::{LONGEST_ANSWER, Whole};
use crate::record::{Unanswered, V2Context};

impl Channel {
    /// What a Delete after a reset needs. Of a request that is outstanding the message itself is kept if it is short: the
    /// peer may not have seen it, and takes nothing before it.
    pub fn saved(&self) -> V2Context {
        let (protection, own) = self.sealer.saved();
        let unanswered = match self.outstanding.as_deref().map(|outstanding| &outstanding.retransmission) {
            None => Unanswered::None,
            Some(retransmission) => Unanswered::of(&retransmission.datagrams),
        };
        V2Context {
            protection,
            own: own.duplicate(),
            peer: self.opener.saved().duplicate(),
            next_request: self.next_request,
            unanswered,
        }
    }

    /// What else is saved of an IKE SA that is to go on: the message ID of the peer's next request, the last answer if it
    /// is short, and the life that this is.
    pub fn saved_window(&self) -> (u32, Option<Vec<u8>>, u16) {
        let reply = self.last.as_ref().and_then(|last| last.reply.as_ref());
        let answer = reply.and_then(|reply| match reply.iter().as_slice() {
            [one] if one.len() <= LONGEST_ANSWER => Some(one.clone()),
            _ => None,
        });
        (self.expected_request, answer, self.sealer.life())
    }

    /// Goes on after a reset, in the life after the saved one. What was saved as unanswered is outstanding again, and the
    /// saved answer is repeated if it is asked for. `None` if that cannot be: the keys are of no known algorithm, there
    /// are no more lives, or what is unanswered is more than a short INFORMATIONAL request, so that what became of it
    /// cannot be known.
    pub fn restore(
        config: &ChannelConfig,
        now: Instant,
        whole: &Whole,
        random: &mut dyn Random,
    ) -> Option<Self> {
        let &ChannelConfig { initiator, spi_i, spi_r, fragment_size, retransmit, .. } = config;
        let V2Context { protection, own, next_request, unanswered, .. } = &whole.context;
        let outstanding = match unanswered {
            Unanswered::None => None,
            Unanswered::Long => return None,
            Unanswered::Kept(request) => {
                let Head { exchange, response, message_id: id, .. } = parse::peek(request)?.head;
                let known = exchange == ExchangeType::INFORMATIONAL && !response;
                if !known || id.checked_add(1) != Some(*next_request) {
                    return None;
                }
                let datagrams = Datagrams::from(vec![request.clone()]);
                let retransmission = Retransmission::new(now, datagrams, retransmit, random);
                Some(Box::new(Outstanding { id, exchange, retransmission, joining: None }))
            }
        };
        let last = whole.answer.as_ref().map(|answer| {
            let reply = Some(Datagrams::from(vec![answer.clone()]));
            Box::new(Last { digest: None, reply, forget: now + REPLY_LIFETIME })
        });
        Some(Self {
            initiator,
            spi_i,
            spi_r,
            sealer: Sealer::restored(*protection, own, whole.life.checked_add(1)?)?,
            opener: whole.context.opener()?,
            fragment_size,
            retransmit,
            next_request: *next_request,
            expected_request: whole.expected_request,
            outstanding,
            last,
            joining: None,
        })
    }
}
