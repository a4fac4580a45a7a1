//! Who may begin an IKE SA: stateless cookies and limits on half-open IKE SAs (RFC 7296 section 2.6, RFC 8019 section 4.2).
//!
//! A request without a cookie costs one HMAC and leaves nothing behind, however many arrive. One source with many
//! half-open IKE SAs, perhaps an office behind one address, is asked for cookies but goes on being admitted with them, up
//! to a quarter of all that may be half-open, so that it cannot shut out everybody else.

use core::fmt;
use core::net::IpAddr;
use core::time::Duration;
use std::collections::HashMap;
use std::time::Instant;

use aws_lc_rs::hmac;

use crate::Random;
use crate::ignored::Ignored;
use crate::message::IkeSpi;
use crate::settings::Settings;

/// Counts half-open IKE SAs and judges new ones.
#[derive(Debug)]
pub struct Admission {
    cookie_threshold: u32,
    half_open_limit: u32,
    source_threshold: u32,
    half_open: u32,
    /// Half-open IKE SAs by source; sources without any are not kept, so there are at most `half_open_limit`. With
    /// SipHash under a random key: the sources are chosen by whoever floods.
    sources: HashMap<Source, u32>,
    cookies: Cookies,
}

/// What becomes of an IKE_SA_INIT request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on. [`Admission::opened`] is to be called if it makes an IKE SA.
    Admit,
    /// It is answered with a COOKIE notification and nothing else.
    DemandCookie {
        /// Data of the notification.
        cookie: Vec<u8>,
        /// [`Ignored::CookieDemanded`] or [`Ignored::CookieWrong`].
        reason: Ignored,
    },
    /// It is not answered.
    Refuse(Ignored),
}

impl Admission {
    /// With these thresholds.
    pub fn new(settings: &Settings) -> Self {
        Self {
            cookie_threshold: settings.cookie_threshold,
            half_open_limit: settings.half_open_limit,
            source_threshold: settings.source_threshold,
            half_open: 0,
            sources: HashMap::new(),
            cookies: Cookies::default(),
        }
    }

    /// Half-open IKE SAs.
    pub fn half_open(&self) -> u32 {
        self.half_open
    }

    /// Whether a request from there without a cookie would not be admitted.
    pub fn is_wary_of(&self, source: IpAddr) -> bool {
        self.half_open >= self.cookie_threshold || self.of(source) >= self.source_threshold
    }

    fn of(&self, source: IpAddr) -> u32 {
        self.sources.get(&Source::from(source)).copied().unwrap_or_default()
    }

    /// Judges an IKE_SA_INIT request. A cookie that was not demanded is not looked at.
    pub fn judge(
        &mut self,
        now: Instant,
        source: IpAddr,
        spi_i: IkeSpi,
        nonce: &[u8],
        cookie: Option<&[u8]>,
        random: &mut dyn Random,
    ) -> Verdict {
        let of_source = self.of(source);
        if self.half_open >= self.half_open_limit {
            return Verdict::Refuse(Ignored::HalfOpen);
        }
        if of_source >= (self.half_open_limit / 4).max(1) {
            return Verdict::Refuse(Ignored::SourceLimit);
        }
        if !self.is_wary_of(source) {
            return Verdict::Admit;
        }
        self.cookies.rotate(now, random);
        let reason = match cookie {
            Some(cookie) if self.cookies.verify(cookie, source, spi_i, nonce) => return Verdict::Admit,
            // RFC 7296 section 2.6.1: as if there were none.
            Some(_) => Ignored::CookieWrong,
            None => Ignored::CookieDemanded,
        };
        match self.cookies.make(source, spi_i, nonce) {
            Some(cookie) => Verdict::DemandCookie { cookie, reason },
            None => Verdict::Refuse(Ignored::HalfOpen),
        }
    }

    /// An IKE SA that `source` began is half-open now.
    pub fn opened(&mut self, source: IpAddr) {
        self.half_open = self.half_open.saturating_add(1);
        let count = self.sources.entry(Source::from(source)).or_default();
        *count = count.saturating_add(1);
    }

    /// It is established, or it is gone. Once for each [`opened`](Self::opened), with the same source.
    pub fn closed(&mut self, source: IpAddr) {
        let source = Source::from(source);
        let Some(count) = self.sources.get_mut(&source) else { return };
        *count -= 1;
        if *count == 0 {
            self.sources.remove(&source);
        }
        self.half_open = self.half_open.saturating_sub(1);
        // A flood leaves no large table behind.
        if self.sources.is_empty() {
            self.sources.shrink_to(64);
        }
    }
}

/// One IPv4 address, or one IPv6 network of 64 bits: what one attacker has as a matter of course.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    V4(u32),
    V6(u64),
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => Self::V6(u64::try_from(address.to_bits() >> 64).unwrap_or_default()),
        }
    }
}

/// Makes and checks cookies with a secret that changes.
///
/// RFC 7296 section 2.6: `Cookie = <VersionIDofSecret> | Hash(Ni | IPi | SPIi | <secret>)`; here HMAC-SHA-256 with the
/// secret as its key. The source port is left out: it need not be the same behind some NATs.
#[derive(Default)]
struct Cookies {
    current: Option<Generation>,
    /// The secret before, still valid: a cookie made just before a change comes back after it.
    previous: Option<Generation>,
}

struct Generation {
    number: u8,
    since: Instant,
    key: hmac::Key,
}

/// A secret is used for this long, and is valid for this long again.
const LIFETIME: Duration = Duration::from_mins(1);

impl Cookies {
    fn rotate(&mut self, now: Instant, random: &mut dyn Random) {
        let age = |generation: &Generation| now.saturating_duration_since(generation.since);
        if self.current.as_ref().is_some_and(|current| age(current) < LIFETIME) {
            return;
        }
        let number = self.current.as_ref().map_or(0, |current| current.number.wrapping_add(1));
        let mut secret = [0; 32];
        random.fill(&mut secret);
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        zeroize::Zeroize::zeroize(&mut secret);
        self.previous = self.current.take().filter(|current| age(current) < 2 * LIFETIME);
        self.current = Some(Generation { number, since: now, key });
    }

    fn make(&self, source: IpAddr, spi_i: IkeSpi, nonce: &[u8]) -> Option<Vec<u8>> {
        let generation = self.current.as_ref()?;
        let tag = generation.tag(source, spi_i, nonce);
        Some([&[generation.number], tag.as_ref()].concat())
    }

    fn verify(&self, cookie: &[u8], source: IpAddr, spi_i: IkeSpi, nonce: &[u8]) -> bool {
        let Some((&number, tag)) = cookie.split_first() else { return false };
        [&self.current, &self.previous]
            .into_iter()
            .flatten()
            .filter(|generation| generation.number == number)
            .any(|generation| {
                let right = generation.tag(source, spi_i, nonce);
                aws_lc_rs::constant_time::verify_slices_are_equal(right.as_ref(), tag).is_ok()
            })
    }
}

impl Generation {
    /// The nonce is the only part of variable length, and the last.
    fn tag(&self, source: IpAddr, spi_i: IkeSpi, nonce: &[u8]) -> hmac::Tag {
        let address = match source {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        };
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&address);
        context.update(&spi_i.0.to_be_bytes());
        context.update(nonce);
        context.sign()
    }
}

impl fmt::Debug for Cookies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cookies(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter(u8);

    impl Random for Counter {
        fn fill(&mut self, out: &mut [u8]) {
            self.0 += 1;
            out.fill(self.0);
        }
    }

    const SPI: IkeSpi = IkeSpi(7);
    const NONCE: &[u8] = &[9; 32];

    fn admission() -> Admission {
        Admission::new(&Settings {
            cookie_threshold: 4,
            source_threshold: 2,
            half_open_limit: 16,
            ..Settings::default()
        })
    }

    fn source(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn judge(admission: &mut Admission, now: Instant, last: u8, cookie: Option<&[u8]>) -> Verdict {
        admission.judge(now, source(last), SPI, NONCE, cookie, &mut Counter(0))
    }

    fn demanded(verdict: Verdict, expected: Ignored) -> Vec<u8> {
        match verdict {
            Verdict::DemandCookie { cookie, reason } if reason == expected => cookie,
            other => panic!("{other:?}"),
        }
    }

    /// IKE-1: "When a responder detects a large number of half-open IKE SAs, it SHOULD reply to IKE_SA_INIT requests with
    /// a response containing the COOKIE notification."
    #[test]
    fn ike_1_cookies_above_the_threshold() {
        let now = Instant::now();
        let mut admission = admission();
        for last in 0..4 {
            assert_eq!(judge(&mut admission, now, last, None), Verdict::Admit);
            admission.opened(source(last));
        }
        let cookie = demanded(judge(&mut admission, now, 9, None), Ignored::CookieDemanded);
        assert!((1..=64).contains(&cookie.len()));
        assert_eq!(judge(&mut admission, now, 9, Some(&cookie)), Verdict::Admit);
        // Of another address, SPI or nonce, or changed, it is worth nothing.
        demanded(judge(&mut admission, now, 8, Some(&cookie)), Ignored::CookieWrong);
        for (spi, nonce) in [(IkeSpi(8), NONCE), (SPI, &[9; 31][..])] {
            let verdict = admission.judge(now, source(9), spi, nonce, Some(&cookie), &mut Counter(0));
            demanded(verdict, Ignored::CookieWrong);
        }
        for index in 0..cookie.len() {
            let mut wrong = cookie.clone();
            wrong[index] ^= 1;
            demanded(judge(&mut admission, now, 9, Some(&wrong)), Ignored::CookieWrong);
        }
        demanded(judge(&mut admission, now, 9, Some(&[])), Ignored::CookieWrong);
        admission.closed(source(0));
        assert_eq!(judge(&mut admission, now, 9, Some(b"not looked at")), Verdict::Admit);
    }

    #[test]
    fn a_cookie_outlives_one_change_of_the_secret() {
        let start = Instant::now();
        let mut admission = admission();
        (0..4).for_each(|last| admission.opened(source(last)));
        let mut random = Counter(0);
        let mut judge = |seconds, cookie: Option<&[u8]>| {
            admission.judge(start + Duration::from_secs(seconds), source(9), SPI, NONCE, cookie, &mut random)
        };
        let cookie = demanded(judge(0, None), Ignored::CookieDemanded);
        assert_eq!(judge(59, Some(&cookie)), Verdict::Admit);
        assert_eq!(judge(61, Some(&cookie)), Verdict::Admit);
        let second = demanded(judge(61, None), Ignored::CookieDemanded);
        assert_ne!(cookie, second);
        demanded(judge(122, Some(&cookie)), Ignored::CookieWrong);
        assert_eq!(judge(122, Some(&second)), Verdict::Admit);
        // After a long silence no old secret is taken for the previous one.
        demanded(judge(10_000, Some(&second)), Ignored::CookieWrong);
    }

    /// RFC 8019: users behind one shared address are asked for cookies, and admitted with them.
    #[test]
    fn one_source_with_many_is_asked_for_cookies_others_are_not() {
        let now = Instant::now();
        let mut admission = admission();
        admission.opened(source(1));
        admission.opened(source(1));
        let cookie = demanded(judge(&mut admission, now, 1, None), Ignored::CookieDemanded);
        assert_eq!(judge(&mut admission, now, 1, Some(&cookie)), Verdict::Admit);
        assert_eq!(judge(&mut admission, now, 2, None), Verdict::Admit);
        admission.opened(source(1));
        admission.opened(source(1));
        assert_eq!(judge(&mut admission, now, 1, Some(&cookie)), Verdict::Refuse(Ignored::SourceLimit));
    }

    #[test]
    fn an_ipv6_network_is_one_source() {
        let now = Instant::now();
        let mut admission = admission();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        admission.opened(address("2001:db8::1"));
        admission.opened(address("2001:db8::2"));
        let mut judge =
            |text| admission.judge(now, address(text), SPI, NONCE, None, &mut Counter(0)) == Verdict::Admit;
        assert!(!judge("2001:db8::3"));
        assert!(judge("2001:db8:0:1::3"));
    }

    #[test]
    fn the_limit_holds_even_with_cookies_and_nothing_is_left_behind() {
        let now = Instant::now();
        let mut admission = admission();
        (0..16).for_each(|last| admission.opened(source(last)));
        assert_eq!(judge(&mut admission, now, 99, None), Verdict::Refuse(Ignored::HalfOpen));
        (0..16).for_each(|last| admission.closed(source(last)));
        admission.closed(source(0));
        assert_eq!((admission.half_open(), admission.sources.len()), (0, 0));
        assert_eq!(judge(&mut admission, now, 99, None), Verdict::Admit);
    }
}
