//! Why a message was not acted on: every way has a name, and the name is a counter.

macro_rules! ignored {
    ($( $(#[$doc:meta])* $variant:ident = $label:literal, $text:literal; )+) => {
        /// Why a message was not acted on; the label names the counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Ignored { $( $(#[$doc])* $variant, )+ }

        impl Ignored {
            /// All.
            pub const ALL: &'static [Self] = &[$( Self::$variant, )+];

            /// Name of the counter.
            pub const fn label(self) -> &'static str {
                match self { $( Self::$variant => $label, )+ }
            }

            /// In words.
            pub const fn text(self) -> &'static str {
                match self { $( Self::$variant => $text, )+ }
            }
        }
    };
}

ignored! {
    /// Shorter than a header, or its length field lies.
    Truncated = "truncated", "no whole IKE message";
    /// Another major version.
    Version = "version", "another version of IKE";
    /// No IKE SA has these SPIs.
    UnknownSpi = "unknown_spi", "no IKE SA has its SPIs";
    /// The exchange does not exist or does not fit the state.
    Exchange = "exchange", "an exchange that does not fit";
    /// A flag says something else than the exchange.
    Flags = "flags", "flags that do not fit";
    /// The chain of payloads cannot be read.
    Syntax = "syntax", "payloads that cannot be read";
    /// A payload is missing, or there more often than allowed.
    Legality = "legality", "payloads that do not belong into this message";
    /// Message ID outside the window.
    MessageId = "message_id", "a message ID outside the window";
    /// A request that was answered; the answer was sent again.
    Duplicate = "duplicate", "a request that was answered before";
    /// The ICV is wrong.
    Integrity = "integrity", "a wrong integrity check value";
    /// A fragment that does not fit the others.
    Fragment = "fragment", "a fragment that fits no message";
    /// Too many half-open IKE SAs.
    HalfOpen = "half_open", "too many half-open IKE SAs";
    /// Too many from this source.
    SourceLimit = "source_limit", "too many half-open IKE SAs of this source";
    /// A cookie was asked for.
    CookieDemanded = "cookie_demanded", "no cookie; one was sent";
    /// A wrong or old cookie.
    CookieWrong = "cookie_wrong", "a wrong or old cookie";
    /// It arrived while a job of the same SA was running.
    Busy = "busy", "the IKE SA is waiting for a computation";
    /// Longer than anything that makes sense.
    Oversized = "oversized", "a message or a count that is too large";
    /// An unprotected error message about an SA that is being established.
    Unprotected = "unprotected", "an unprotected notification";
    /// No connection is configured for the peer's address.
    NoConnection = "no_connection", "no connection is configured for this peer";
}
