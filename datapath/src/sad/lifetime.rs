//! Soft and hard limits of an SA in seconds, bytes and packets (RFC 4301 section 4.4.2.1, DP-4).
//!
//! > "there SHOULD be two kinds of lifetime: a soft lifetime that warns the implementation to initiate action such
//! > as setting up a replacement SA, and a hard lifetime when the current SA ends and is destroyed."
//!
//! A packet costs two compares, against the nearest total of packets and of bytes at which something happens. Call
//! [`account`](LifetimeState::account) *before* a packet is let through, with the totals that include it: the packet
//! that would exceed a hard limit is refused. Once [`is_expired`](LifetimeState::is_expired) no packet may pass.
//!
//! Time comes as an argument: seconds since the process started.

use postern_contract::event::LimitKind;
use postern_contract::sa::{Lifetime, Limits};

/// A limit was reached. Each is reported once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifetimeEvent {
    /// The SA should be renewed; the packet may pass.
    Soft(LimitKind),
    /// The SA has ended; the packet must not pass, nor any after it.
    Hard(LimitKind),
}

/// The limits that an SA has not reached yet.
#[derive(Clone, Debug)]
pub struct LifetimeState {
    /// Totals at which [`Self::account`] has something to say.
    next_packets: u64,
    next_bytes: u64,
    /// What is left of the limits; `None` where there are none, as in most SAs of manual keys.
    pending: Option<Box<Pending>>,
    /// Second at which [`Self::check_time`] has something to say, `u64::MAX` for never.
    next_second: u64,
    installed: u64,
    expired: bool,
}

const _: () = assert!(size_of::<LifetimeState>() <= 48);

/// Totals and seconds at which an event is due, `u64::MAX` for never or already reported.
#[derive(Clone, Debug)]
struct Pending {
    soft: Due,
    hard: Due,
}

#[derive(Clone, Debug)]
struct Due {
    packets: u64,
    bytes: u64,
    second: u64,
}

impl LifetimeState {
    /// Limits of an SA installed at second `now`.
    pub fn new(lifetime: &Lifetime, now: u64) -> Self {
        let mut state = Self {
            next_packets: u64::MAX,
            next_bytes: u64::MAX,
            pending: None,
            next_second: u64::MAX,
            installed: now,
            expired: false,
        };
        state.replace(lifetime);
        state
    }

    /// Other limits, still counted from the installation. An SA that has ended stays ended.
    pub fn replace(&mut self, lifetime: &Lifetime) {
        let Lifetime { soft, hard } = lifetime;
        self.pending = (*lifetime != Lifetime::default()).then(|| {
            let mut hard = Due::new(hard, self.installed);
            // The packet that reaches a hard limit still passes, the one that would exceed it does not.
            hard.packets = hard.packets.saturating_add(1);
            hard.bytes = hard.bytes.saturating_add(1);
            Box::new(Pending { soft: Due::new(soft, self.installed), hard })
        });
        self.rearm();
    }

    /// Whether a hard limit was reached.
    pub const fn is_expired(&self) -> bool {
        self.expired
    }

    /// Looks at the totals *with* the packet at hand. Where one packet reaches several limits, the next call reports
    /// the next one; a hard limit comes first.
    #[inline]
    #[must_use = "a hard limit stops the packet"]
    pub fn account(&mut self, packets: u64, bytes: u64) -> Option<LifetimeEvent> {
        if packets < self.next_packets && bytes < self.next_bytes {
            return None;
        }
        self.reached(packets, bytes)
    }

    /// Looks at the time limits; to be called about once a second. `now` never goes back.
    #[must_use = "a hard limit stops the SA"]
    pub fn check_time(&mut self, now: u64) -> Option<LifetimeEvent> {
        if now < self.next_second || self.expired {
            return None;
        }
        let pending = self.pending.as_mut()?;
        let event = if now >= pending.hard.second {
            LifetimeEvent::Hard(LimitKind::Seconds)
        } else if now >= pending.soft.second {
            pending.soft.second = u64::MAX;
            LifetimeEvent::Soft(LimitKind::Seconds)
        } else {
            return None;
        };
        self.note(event);
        Some(event)
    }

    #[cold]
    fn reached(&mut self, packets: u64, bytes: u64) -> Option<LifetimeEvent> {
        if self.expired {
            return None;
        }
        let Pending { soft, hard } = self.pending.as_deref_mut()?;
        let event = if packets >= hard.packets {
            LifetimeEvent::Hard(LimitKind::Packets)
        } else if bytes >= hard.bytes {
            LifetimeEvent::Hard(LimitKind::Bytes)
        } else if packets >= soft.packets {
            soft.packets = u64::MAX;
            LifetimeEvent::Soft(LimitKind::Packets)
        } else if bytes >= soft.bytes {
            soft.bytes = u64::MAX;
            LifetimeEvent::Soft(LimitKind::Bytes)
        } else {
            return None;
        };
        self.note(event);
        Some(event)
    }

    fn note(&mut self, event: LifetimeEvent) {
        if matches!(event, LifetimeEvent::Hard(_)) {
            self.expired = true;
            self.pending = None;
        }
        self.rearm();
    }

    fn rearm(&mut self) {
        (self.next_packets, self.next_bytes, self.next_second) = match self.pending.as_deref() {
            None => (u64::MAX, u64::MAX, u64::MAX),
            Some(Pending { soft, hard }) => {
                (soft.packets.min(hard.packets), soft.bytes.min(hard.bytes), soft.second.min(hard.second))
            }
        };
    }
}

impl Due {
    fn new(limits: &Limits, installed: u64) -> Self {
        let Limits { seconds, bytes, packets } = limits;
        Self {
            packets: packets.unwrap_or(u64::MAX),
            bytes: bytes.unwrap_or(u64::MAX),
            second: seconds.map_or(u64::MAX, |seconds| seconds.saturating_add(installed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::LifetimeEvent::{Hard, Soft};
    use super::*;

    fn limits(packets: u64, bytes: u64, seconds: u64) -> Limits {
        let some = |n| (n != 0).then_some(n);
        Limits { packets: some(packets), bytes: some(bytes), seconds: some(seconds) }
    }

    /// DP-4: the soft limit warns once, the hard limit stops the packet that would exceed it.
    #[test]
    fn dp_4_packets() {
        let lifetime = Lifetime { soft: limits(3, 0, 0), hard: limits(5, 0, 0) };
        let mut state = LifetimeState::new(&lifetime, 0);
        let events: Vec<_> = (1..=8).map(|packet| state.account(packet, packet * 100)).collect();
        let expected = [
            None,
            None,
            Some(Soft(LimitKind::Packets)),
            None,
            None,
            Some(Hard(LimitKind::Packets)),
            None,
            None,
        ];
        assert_eq!(events, expected);
        assert!(state.is_expired());
    }

    /// DP-4: exactly the hard limit in bytes passes, one byte more does not.
    #[test]
    fn dp_4_bytes() {
        let lifetime = Lifetime { soft: limits(0, 1000, 0), hard: limits(0, 1500, 0) };
        let mut state = LifetimeState::new(&lifetime, 0);
        assert_eq!(state.account(1, 999), None);
        assert_eq!(state.account(2, 1000), Some(Soft(LimitKind::Bytes)));
        assert_eq!(state.account(3, 1500), None);
        assert!(!state.is_expired());
        assert_eq!(state.account(4, 1501), Some(Hard(LimitKind::Bytes)));
        assert!(state.is_expired());
    }

    /// DP-4: one packet that reaches several limits; the events come one a call.
    #[test]
    fn dp_4_several_limits_at_once() {
        let lifetime = Lifetime { soft: limits(10, 1000, 0), hard: limits(20, 0, 0) };
        let mut state = LifetimeState::new(&lifetime, 0);
        assert_eq!(state.account(10, 5000), Some(Soft(LimitKind::Packets)));
        assert_eq!(state.account(11, 5500), Some(Soft(LimitKind::Bytes)));
        assert_eq!(state.account(12, 6000), None);
        assert_eq!(state.account(21, 9000), Some(Hard(LimitKind::Packets)));
    }

    /// DP-4: seconds count from the installation.
    #[test]
    fn dp_4_seconds() {
        let lifetime = Lifetime { soft: limits(0, 0, 60), hard: limits(0, 0, 90) };
        let mut state = LifetimeState::new(&lifetime, 1000);
        assert_eq!(state.check_time(1059), None);
        assert_eq!(state.check_time(1061), Some(Soft(LimitKind::Seconds)));
        assert_eq!(state.check_time(1089), None);
        assert_eq!(state.check_time(1090), Some(Hard(LimitKind::Seconds)));
        assert_eq!(state.check_time(1091), None);
        assert!(state.is_expired());
        assert_eq!(state.account(u64::MAX, u64::MAX), None);
    }

    /// DP-4: no limits, nothing allocated, nothing reported; a hard limit of nothing stops the first packet.
    #[test]
    fn dp_4_none_and_zero() {
        let mut state = LifetimeState::new(&Lifetime::default(), 7);
        assert!(state.pending.is_none());
        assert_eq!((state.account(u64::MAX, u64::MAX), state.check_time(u64::MAX)), (None, None));
        let zero =
            Lifetime { soft: Limits::default(), hard: Limits { packets: Some(0), ..Limits::default() } };
        assert_eq!(LifetimeState::new(&zero, 0).account(1, 1), Some(Hard(LimitKind::Packets)));
    }

    /// Other limits take effect, but do not bring back an SA that has ended.
    #[test]
    fn dp_4_replaced_limits() {
        let mut state = LifetimeState::new(&Lifetime { hard: limits(5, 0, 0), ..Lifetime::default() }, 0);
        state.replace(&Lifetime { hard: limits(9, 0, 0), ..Lifetime::default() });
        assert_eq!(state.account(6, 6), None);
        assert_eq!(state.account(10, 10), Some(Hard(LimitKind::Packets)));
        state.replace(&Lifetime::default());
        assert!(state.is_expired());
    }

    proptest! {
        /// DP-4: whatever the limits, no total above a hard limit ever passes, and no event comes twice.
        #[test]
        fn dp_4_hard_limits_hold(
            soft in (0_u64..50, 0_u64..5000),
            hard in (0_u64..50, 0_u64..5000),
            sizes in proptest::collection::vec(1_u64..300, 1..80),
        ) {
            let lifetime = Lifetime { soft: limits(soft.0, soft.1, 0), hard: limits(hard.0, hard.1, 0) };
            let mut state = LifetimeState::new(&lifetime, 0);
            let (mut packets, mut bytes, mut events) = (0, 0, Vec::new());
            for size in sizes {
                if state.is_expired() {
                    break;
                }
                let event = state.account(packets + 1, bytes + size);
                events.extend(event);
                if matches!(event, Some(Hard(_))) {
                    let over = |limit: Option<u64>, total| limit.is_some_and(|limit| total > limit);
                    prop_assert!(over(lifetime.hard.packets, packets + 1) || over(lifetime.hard.bytes, bytes + size));
                    continue;
                }
                (packets, bytes) = (packets + 1, bytes + size);
                prop_assert!(lifetime.hard.packets.is_none_or(|limit| packets <= limit));
                prop_assert!(lifetime.hard.bytes.is_none_or(|limit| bytes <= limit));
            }
            for (index, event) in events.iter().enumerate() {
                prop_assert!(!events.iter().skip(index + 1).any(|other| other == event));
            }
        }
    }
}
