//! Proposals of IKEv1 (RFC 2407, RFC 2409 appendix A), made of and held against those of the configuration, which are written
//! in the words of IKEv2.
//!
//! In IKEv1 a transform is a whole suite. A configured proposal with several algorithms of a type stands for all their
//! combinations, in order. What IKEv1 has no number for (AEADs in phase 1, X25519, ChaCha20, ESN) is left out.

use core::time::Duration;

use super::hash::Hash;
use super::message::{Attribute, Payloads, Proposal, Transform};
use crate::message::Proposal as Configured;
use crate::message::registry::{EncrId, IntegId, KeMethod, ProtocolId, TransformType};
use crate::negotiate::{Additional, ChildSuite, IkeSuite, is_aead};

/// How phase 1 authenticates (RFC 2409 appendix A; with XAuth draft-ietf-ipsec-isakmp-xauth).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Method(pub(crate) u16);

impl Method {
    pub(crate) const PSK: Self = Self(1);
    pub(crate) const RSA: Self = Self(3);
    /// XAUTHInitPreShared: the initiator of phase 1 is asked for a password.
    pub(crate) const XAUTH_PSK: Self = Self(65001);
    /// XAUTHInitRSA.
    pub(crate) const XAUTH_RSA: Self = Self(65005);

    /// Without XAuth.
    pub(crate) const fn base(self) -> Self {
        match self {
            Self::XAUTH_PSK => Self::PSK,
            Self::XAUTH_RSA => Self::RSA,
            other => other,
        }
    }

    /// With XAuth.
    pub(crate) const fn with_xauth(self) -> Self {
        match self {
            Self::PSK => Self::XAUTH_PSK,
            Self::RSA => Self::XAUTH_RSA,
            other => other,
        }
    }
}

/// Suite of an IKE SA: AES-CBC, one hash for all, one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Phase1 {
    pub(crate) key_bits: u16,
    pub(crate) hash: Hash,
    pub(crate) group: KeMethod,
    pub(crate) method: Method,
}

impl Phase1 {
    /// For showing, in the terms of IKEv2.
    pub(crate) fn suite(self) -> IkeSuite {
        IkeSuite {
            encr: EncrId::AES_CBC,
            key_bits: self.key_bits,
            prf: self.hash.prf_id(),
            integ: integ_of(self.hash),
            ke: self.group,
            additional: Additional::new(),
        }
    }
}

const fn integ_of(hash: Hash) -> IntegId {
    match hash {
        Hash::Sha1 => IntegId::HMAC_SHA1_96,
        Hash::Sha256 => IntegId::HMAC_SHA2_256_128,
        Hash::Sha384 => IntegId::HMAC_SHA2_384_192,
        Hash::Sha512 => IntegId::HMAC_SHA2_512_256,
    }
}

/// Groups that IKEv1 has numbers for, which are those of IKEv2.
const GROUPS: [KeMethod; 5] =
    [KeMethod::MODP_2048, KeMethod::MODP_3072, KeMethod::MODP_4096, KeMethod::ECP_256, KeMethod::ECP_384];

/// Most transforms that are offered.
const MOST: usize = 60;

/// KEY_IKE, the only transform of phase 1.
const KEY_IKE: u8 = 1;
/// Attributes of phase 1.
mod ike {
    pub(super) const ENCRYPTION: u16 = 1;
    pub(super) const HASH: u16 = 2;
    pub(super) const METHOD: u16 = 3;
    pub(super) const GROUP: u16 = 4;
    pub(super) const LIFE_TYPE: u16 = 11;
    pub(super) const LIFE_DURATION: u16 = 12;
    pub(super) const KEY_LENGTH: u16 = 14;
    pub(super) const AES_CBC: u64 = 7;
}
/// Attributes of phase 2.
mod ipsec {
    pub(super) const LIFE_TYPE: u16 = 1;
    pub(super) const LIFE_DURATION: u16 = 2;
    pub(super) const GROUP: u16 = 3;
    pub(super) const MODE: u16 = 4;
    pub(super) const AUTH: u16 = 5;
    pub(super) const KEY_LENGTH: u16 = 6;
}

fn of_kind(proposal: &Configured, kind: TransformType) -> impl Iterator<Item = &crate::message::Transform> {
    proposal.transforms.iter().filter(move |transform| transform.kind == kind)
}

/// The suites that a configuration allows in phase 1, in order.
pub(crate) fn configured_phase_1(proposals: &[Configured], method: Method) -> Vec<Phase1> {
    let mut all = Vec::new();
    for proposal in proposals {
        for encr in of_kind(proposal, TransformType::ENCR) {
            let Some(key_bits) = encr.key_length.filter(|_| encr.id == EncrId::AES_CBC.0) else { continue };
            for prf in of_kind(proposal, TransformType::PRF) {
                let Some(hash) = Hash::of_prf(crate::message::registry::PrfId(prf.id)) else { continue };
                for group in of_kind(proposal, TransformType::KE) {
                    let suite = Phase1 { key_bits, hash, group: KeMethod(group.id), method };
                    if GROUPS.contains(&suite.group) && !all.contains(&suite) {
                        all.push(suite);
                    }
                }
            }
        }
    }
    all
}

/// The SA payload's proposals of phase 1.
pub(crate) fn offer_phase_1(suites: &[Phase1], life: Option<Duration>) -> Vec<Proposal> {
    let transforms = (1..).zip(suites.iter().take(MOST)).map(|(number, suite)| {
        let mut attributes = vec![
            Attribute::basic(ike::ENCRYPTION, 7),
            Attribute::basic(ike::KEY_LENGTH, suite.key_bits),
            Attribute::basic(ike::HASH, suite.hash.number()),
            Attribute::basic(ike::GROUP, suite.group.0),
            Attribute::basic(ike::METHOD, suite.method.0),
        ];
        attributes.extend(lifetime(ike::LIFE_TYPE, ike::LIFE_DURATION, life));
        Transform { number, id: KEY_IKE, attributes }
    });
    vec![Proposal { number: 1, protocol: ProtocolId::IKE, spi: Vec::new(), transforms: transforms.collect() }]
}

/// Life type seconds and the duration.
fn lifetime(kind: u16, duration: u16, life: Option<Duration>) -> Vec<Attribute> {
    let Some(life) = life else { return Vec::new() };
    let seconds = u32::try_from(life.as_secs()).unwrap_or(u32::MAX);
    let duration = match u16::try_from(seconds) {
        Ok(short) => Attribute::basic(duration, short),
        Err(_) => Attribute::variable(duration, seconds.to_be_bytes()),
    };
    vec![Attribute::basic(kind, 1), duration]
}

fn number(transform: &Transform, kind: u16) -> Option<u64> {
    transform.attributes.iter().find(|attribute| attribute.kind == kind)?.number()
}

fn small(transform: &Transform, kind: u16) -> Option<u16> {
    number(transform, kind).and_then(|number| u16::try_from(number).ok())
}

/// The seconds that a transform says; kilobytes are not what this side counts, and are passed over.
fn seconds(transform: &Transform, kind: u16, duration: u16) -> Option<Duration> {
    let place = transform
        .attributes
        .iter()
        .position(|attribute| attribute.kind == kind && attribute.number() == Some(1))?;
    let after = transform.attributes.get(place + 1)?;
    let seconds = (after.kind == duration).then(|| after.number()).flatten()?;
    Some(Duration::from_secs(seconds.clamp(60, u64::from(u32::MAX))))
}

/// What one transform of phase 1 means; `None` if it is not implemented.
fn read_phase_1(transform: &Transform) -> Option<(Phase1, Option<Duration>)> {
    if transform.id != KEY_IKE || number(transform, ike::ENCRYPTION)? != ike::AES_CBC {
        return None;
    }
    let suite = Phase1 {
        key_bits: small(transform, ike::KEY_LENGTH)?,
        hash: Hash::from_number(small(transform, ike::HASH)?)?,
        group: KeMethod(small(transform, ike::GROUP)?),
        method: Method(small(transform, ike::METHOD)?),
    };
    Some((suite, seconds(transform, ike::LIFE_TYPE, ike::LIFE_DURATION)))
}

/// As responder: the first configured suite that is offered, the answer that says so, and the offered lifetime.
pub(crate) fn choose_phase_1(
    configured: &[Phase1],
    offered: &[Proposal],
) -> Option<(Phase1, Vec<Proposal>, Option<Duration>)> {
    let all = || {
        let proposals = offered.iter().filter(|proposal| proposal.protocol == ProtocolId::IKE);
        proposals.flat_map(|proposal| {
            proposal.transforms.iter().map(move |transform| (proposal, transform, read_phase_1(transform)))
        })
    };
    configured.iter().find_map(|wanted| {
        all().find_map(|(proposal, transform, read)| {
            let (suite, life) = read.filter(|(suite, _)| suite == wanted)?;
            let answer = Proposal { transforms: vec![transform.clone()], ..proposal.clone() };
            Some((suite, vec![answer], life))
        })
    })
}

/// As initiator: what the answer to these suites agrees to.
pub(crate) fn accept_phase_1(offered: &[Phase1], answer: &[Proposal]) -> Option<Phase1> {
    let [Proposal { protocol: ProtocolId::IKE, transforms, .. }] = answer else { return None };
    let [transform] = transforms.as_slice() else { return None };
    let (suite, _) = read_phase_1(transform)?;
    offered.contains(&suite).then_some(suite)
}

/// What a peer offers in phase 1, for people.
pub(crate) fn describe_phase_1(offered: &[Proposal]) -> String {
    let words: Vec<String> = offered
        .iter()
        .flat_map(|proposal| &proposal.transforms)
        .take(8)
        .map(|transform| {
            if let Some((suite, _)) = read_phase_1(transform) {
                return suite.suite().to_string();
            }
            let shown = |kind, names: &[(u64, &str)]| {
                let value = number(transform, kind).unwrap_or_default();
                let name = names.iter().find(|(number, _)| *number == value);
                name.map_or_else(|| value.to_string(), |(_, name)| (*name).to_owned())
            };
            format!(
                "{}/{}/{}",
                shown(ike::ENCRYPTION, &[(1, "DES"), (5, "3DES"), (7, "AES_CBC")]),
                shown(ike::HASH, &[(1, "MD5"), (2, "SHA1"), (4, "SHA2_256")]),
                shown(ike::GROUP, &[(1, "MODP_768"), (2, "MODP_1024"), (5, "MODP_1536")]),
            )
        })
        .collect();
    words.join(", ")
}

/// How a child's packets are encapsulated: tunnel or transport, in UDP (RFC 3947 section 5.1) or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Encapsulation {
    pub(crate) transport: bool,
    pub(crate) udp: bool,
}

impl Encapsulation {
    const fn number(self) -> u16 {
        match (self.transport, self.udp) {
            (false, false) => 1,
            (true, false) => 2,
            (false, true) => 3,
            (true, true) => 4,
        }
    }

    fn read(number: u16) -> Option<Self> {
        let (transport, udp) = match number {
            1 => (false, false),
            2 => (true, false),
            3 | 61443 => (false, true),
            4 | 61444 => (true, true),
            _ => return None,
        };
        Some(Self { transport, udp })
    }
}

/// Suite of a child, without ESN, which IKEv1 has no number for in use here.
fn child_suite(
    protocol: ProtocolId,
    encr: EncrId,
    key_bits: u16,
    integ: IntegId,
    ke: KeMethod,
) -> ChildSuite {
    ChildSuite { protocol, encr, key_bits, integ, ke, additional: Additional::new(), esn: false }
}

/// The suites that a configuration allows for a child, in order.
pub(crate) fn configured_child(proposals: &[Configured]) -> Vec<ChildSuite> {
    let mut all = Vec::new();
    for proposal in proposals {
        let groups: Vec<KeMethod> = of_kind(proposal, TransformType::KE).map(|ke| KeMethod(ke.id)).collect();
        let groups = if groups.is_empty() { vec![KeMethod::NONE] } else { groups };
        let integs: Vec<IntegId> =
            of_kind(proposal, TransformType::INTEG).map(|found| IntegId(found.id)).collect();
        let encrs: Vec<(EncrId, u16)> = of_kind(proposal, TransformType::ENCR)
            .map(|encr| (EncrId(encr.id), encr.key_length.unwrap_or_default()))
            .collect();
        let encrs = if proposal.protocol == ProtocolId::AH { vec![(EncrId::NONE, 0)] } else { encrs };
        for group in groups.into_iter().filter(|group| *group == KeMethod::NONE || GROUPS.contains(group)) {
            for (encr, bits) in &encrs {
                let known = matches!(
                    *encr,
                    EncrId::NONE
                        | EncrId::NULL
                        | EncrId::AES_CBC
                        | EncrId::AES_GCM_16
                        | EncrId::NULL_AUTH_AES_GMAC
                );
                let integs = if is_aead(*encr) { &[IntegId::NONE][..] } else { &integs };
                for integ in integs.iter().filter(|_| known) {
                    let suite = child_suite(proposal.protocol, *encr, *bits, *integ, group);
                    if !all.contains(&suite) {
                        all.push(suite);
                    }
                }
            }
        }
    }
    all
}

/// Whether nothing is left to be agreed about the group, as aggressive mode needs it.
pub(crate) fn is_of_one_group(suites: &[Phase1]) -> bool {
    suites.iter().all(|suite| suites.first().is_some_and(|first| first.group == suite.group))
}

/// Only one group can be in a Quick Mode offer (RFC 2409 section 5.5), the preferred one.
pub(crate) fn of_one_group(suites: &[ChildSuite]) -> Vec<ChildSuite> {
    let group = suites.first().map(|suite| (suite.ke, suite.protocol));
    suites.iter().filter(|suite| Some((suite.ke, suite.protocol)) == group).cloned().collect()
}

/// The proposals of Quick Mode.
pub(crate) fn offer_child(
    suites: &[ChildSuite],
    spi: u32,
    encapsulation: Encapsulation,
    life: Option<Duration>,
) -> Vec<Proposal> {
    let protocol = suites.first().map_or(ProtocolId::ESP, |suite| suite.protocol);
    let transforms = (1..).zip(suites.iter().take(MOST)).map(|(number, suite)| {
        let mut attributes = vec![Attribute::basic(ipsec::MODE, encapsulation.number())];
        if suite.key_bits != 0 {
            attributes.push(Attribute::basic(ipsec::KEY_LENGTH, suite.key_bits));
        }
        if let Some((auth, _)) = AUTH.iter().find(|(_, (integ, _))| *integ == suite.integ) {
            attributes.push(Attribute::basic(ipsec::AUTH, *auth));
        }
        if suite.ke != KeMethod::NONE {
            attributes.push(Attribute::basic(ipsec::GROUP, suite.ke.0));
        }
        attributes.extend(lifetime(ipsec::LIFE_TYPE, ipsec::LIFE_DURATION, life));
        Transform { number, id: transform_id(suite), attributes }
    });
    let spi = spi.to_be_bytes().to_vec();
    vec![Proposal { number: 1, protocol, spi, transforms: transforms.collect() }]
}

/// Authentication algorithm attribute: its number, the algorithm, and the transform of AH with the same.
const AUTH: [(u16, (IntegId, u8)); 4] = [
    (2, (IntegId::HMAC_SHA1_96, 3)),
    (5, (IntegId::HMAC_SHA2_256_128, 5)),
    (6, (IntegId::HMAC_SHA2_384_192, 6)),
    (7, (IntegId::HMAC_SHA2_512_256, 7)),
];

/// Transforms of ESP; the numbers of RFC 2407 and of RFC 3602, 4106, 4543.
const ESP: [(u8, EncrId); 4] =
    [(12, EncrId::AES_CBC), (20, EncrId::AES_GCM_16), (11, EncrId::NULL), (23, EncrId::NULL_AUTH_AES_GMAC)];

fn transform_id(suite: &ChildSuite) -> u8 {
    let found = if suite.protocol == ProtocolId::AH {
        AUTH.iter().find(|(_, (integ, _))| *integ == suite.integ).map(|(_, (_, id))| *id)
    } else {
        ESP.iter().find(|(_, encr)| *encr == suite.encr).map(|(id, _)| *id)
    };
    found.unwrap_or_default()
}

/// What a Quick Mode SA payload agrees to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChosenChild {
    pub(crate) suite: ChildSuite,
    pub(crate) encapsulation: Encapsulation,
    /// The offerer's.
    pub(crate) spi: u32,
    pub(crate) life: Option<Duration>,
    /// The proposal with only this transform.
    pub(crate) proposal: Proposal,
}

fn read_child(proposal: &Proposal, transform: &Transform) -> Option<ChosenChild> {
    let spi = u32::from_be_bytes(proposal.spi.as_slice().try_into().ok()?);
    let integ = match small(transform, ipsec::AUTH) {
        None => IntegId::NONE,
        Some(auth) => AUTH.iter().find(|(number, _)| *number == auth).map(|(_, (integ, _))| *integ)?,
    };
    let encr = match proposal.protocol {
        ProtocolId::ESP => ESP.iter().find(|(id, _)| *id == transform.id).map(|(_, encr)| *encr)?,
        ProtocolId::AH => EncrId::NONE,
        _ => return None,
    };
    let ke = KeMethod(small(transform, ipsec::GROUP).unwrap_or_default());
    let key_bits = small(transform, ipsec::KEY_LENGTH).unwrap_or_default();
    let suite = child_suite(proposal.protocol, encr, key_bits, integ, ke);
    if spi < 256 || transform_id(&suite) != transform.id || is_aead(encr) != (integ == IntegId::NONE) {
        return None;
    }
    Some(ChosenChild {
        suite,
        encapsulation: Encapsulation::read(small(transform, ipsec::MODE).unwrap_or(1))?,
        spi,
        life: seconds(transform, ipsec::LIFE_TYPE, ipsec::LIFE_DURATION),
        proposal: Proposal { transforms: vec![transform.clone()], ..proposal.clone() },
    })
}

/// As responder: the first configured suite that is offered. A proposal with a number that others have too (an ESP and an
/// AH SA together) is not taken.
pub(crate) fn choose_child(configured: &[ChildSuite], offered: &[Proposal]) -> Option<ChosenChild> {
    let single =
        |proposal: &&Proposal| offered.iter().filter(|other| other.number == proposal.number).count() == 1;
    configured.iter().find_map(|wanted| {
        offered.iter().filter(single).find_map(|proposal| {
            let mut transforms = proposal.transforms.iter();
            transforms.find_map(|found| read_child(proposal, found).filter(|chosen| chosen.suite == *wanted))
        })
    })
}

/// As initiator: what the answer agrees to.
pub(crate) fn accept_child(offered: &[ChildSuite], answer: &[Proposal]) -> Option<ChosenChild> {
    let [proposal] = answer else { return None };
    let [transform] = proposal.transforms.as_slice() else { return None };
    read_child(proposal, transform).filter(|chosen| offered.contains(&chosen.suite))
}

/// What a peer offers in Quick Mode, for people.
pub(crate) fn describe_child(offered: &[Proposal]) -> String {
    let all =
        offered.iter().flat_map(|proposal| proposal.transforms.iter().map(move |found| (proposal, found)));
    let words = all.take(8).map(|(proposal, transform)| match read_child(proposal, transform) {
        Some(chosen) => chosen.suite.to_string(),
        None => format!("transform {} of protocol {}", transform.id, proposal.protocol),
    });
    words.collect::<Vec<_>>().join(", ")
}

/// Suites in words, for people.
pub(crate) fn describe_suites<T: ToString>(suites: impl Iterator<Item = T>) -> String {
    suites.take(8).map(|suite| suite.to_string()).collect::<Vec<_>>().join(", ")
}

/// For the fuzz target: what is chosen is what the offerer accepts.
pub(crate) fn fuzz(payloads: Payloads<'_>) {
    use crate::negotiate::keyword;
    let Some(offered) = payloads.sa() else { return };
    assert!(describe_phase_1(offered).len() < 4096 && describe_child(offered).len() < 4096);
    let suites = configured_phase_1(&keyword::default_ike(), Method::PSK);
    if let Some((suite, answer, _)) = choose_phase_1(&suites, offered) {
        assert_eq!(accept_phase_1(&[suite], &answer), Some(suite));
    }
    let suites = configured_child(&keyword::default_esp());
    if let Some(chosen) = choose_child(&suites, offered) {
        let answer = core::slice::from_ref(&chosen.proposal);
        assert_eq!(accept_child(core::slice::from_ref(&chosen.suite), answer).as_ref(), Some(&chosen));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::negotiate::keyword;

    fn ike(text: &str) -> Vec<Configured> {
        vec![keyword::ike(text).unwrap()]
    }

    /// IKE-2: what is offered is chosen and accepted, and our order wins.
    #[test]
    fn ike_2_phase_1_is_agreed() {
        let method = Method::PSK;
        let ours = configured_phase_1(&ike("aes128-aes256-sha256-sha1-modp2048-ecp256"), method);
        assert_eq!(ours.len(), 8);
        let theirs = configured_phase_1(&ike("aes256-sha1-ecp256-modp2048"), method);
        let offer = offer_phase_1(&theirs, Some(Duration::from_hours(24)));
        let (suite, answer, life) = choose_phase_1(&ours, &offer).unwrap();
        assert_eq!(suite.suite().to_string(), "AES_CBC_256/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048");
        assert_eq!(life, Some(Duration::from_hours(24)));
        assert_eq!(accept_phase_1(&theirs, &answer), Some(suite));
        assert_eq!(accept_phase_1(&ours[..1], &answer), None, "not offered");
        assert_eq!(accept_phase_1(&theirs, &offer), None, "no choice");
        let signed = configured_phase_1(&ike("aes256-sha1-ecp256"), Method::RSA);
        assert_eq!(choose_phase_1(&signed, &offer), None, "another method");
    }

    /// IKE-2: what IKEv1 has no number for is not offered.
    #[test]
    fn ike_2_what_version_1_lacks() {
        assert!(configured_phase_1(&ike("aes128gcm16-prfsha256-modp2048"), Method::PSK).is_empty());
        assert!(configured_phase_1(&ike("aes128-sha256-x25519"), Method::PSK).is_empty());
        assert!(!configured_phase_1(&keyword::default_ike(), Method::PSK).is_empty());
    }

    /// IKE-2: children with and without PFS, with AEADs and AH.
    #[test]
    fn ike_2_children_are_agreed() {
        let udp = Encapsulation { transport: false, udp: true };
        for text in ["aes128gcm16", "aes256-sha256-modp2048", "aes128-sha1", "null-sha256", "aes256gmac"] {
            let ours = configured_child(&[keyword::esp(text).unwrap()]);
            let offer = offer_child(&ours, 0x1234, udp, Some(Duration::from_hours(20)));
            let chosen = choose_child(&ours, &offer).unwrap();
            assert_eq!((chosen.spi, chosen.encapsulation), (0x1234, udp), "{text}");
            assert_eq!(chosen.life, Some(Duration::from_hours(20)));
            let accepted = accept_child(&ours, core::slice::from_ref(&chosen.proposal)).unwrap();
            assert_eq!(accepted, chosen);
        }
        let ours = configured_child(&[keyword::ah("sha256").unwrap()]);
        let offer = offer_child(&ours, 0x1234, Encapsulation { transport: true, udp: false }, None);
        assert!(choose_child(&ours, &offer).is_some());
        let mixed = configured_child(&[keyword::esp("aes128gcm16-modp2048-ecp256").unwrap()]);
        assert_eq!((mixed.len(), of_one_group(&mixed).len()), (2, 1));
    }
}
