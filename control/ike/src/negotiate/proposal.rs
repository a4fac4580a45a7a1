//! Choosing among proposals (RFC 7296 section 3.3.6).
//!
//! The one who answers calls [`choose`]; the one who asked writes what it offers with [`offer`] and checks the answer with
//! [`accepts`]. The order of what is configured here decides, not that of what is offered.
//!
//! A transform type that is left out means NONE, or sequence numbers of 32 bits, where there is such a thing. AES comes with
//! its key length, and everything that has only one without. What comes with an attribute that is not known is not chosen;
//! a proposal with a transform type that is not known, or that belongs to another protocol, is passed over.

use super::{Additional, ChildSuite, Chosen, IkeSuite, Suite, is_aead};
use crate::message::registry::{EncrId, EsnId, IntegId, KeMethod, PrfId, ProtocolId, TransformType};
use crate::message::{Proposal, Transform};

/// Transform types of additional key exchanges (RFC 9370), in order.
pub const ADDKE: [TransformType; 7] = [
    TransformType::ADDKE1,
    TransformType::ADDKE2,
    TransformType::ADDKE3,
    TransformType::ADDKE4,
    TransformType::ADDKE5,
    TransformType::ADDKE6,
    TransformType::ADDKE7,
];

/// Chooses from what a peer offers, or `None` if nothing fits: NO_PROPOSAL_CHOSEN.
///
/// SPIs of ESP and AH proposals are checked: 4 bytes and not reserved. Those of IKE proposals have to be absent or of 8
/// bytes, and which of the two it must be is for the caller to know ([`Chosen::ike_spi`]).
pub fn choose(configured: &[Proposal], offered: &[Proposal]) -> Option<Chosen> {
    configured.iter().find_map(|ours| offered.iter().find_map(|theirs| agree(ours, theirs)))
}

/// Checks the answer to what this side offered: a single proposal with the number of one that was offered, and of each
/// type one transform that was in it. `None` if it is anything else.
pub fn accepts(offered_by_us: &[Proposal], answer: &[Proposal]) -> Option<Chosen> {
    let [answer] = answer else { return None };
    let twice = (1..).zip(&answer.transforms).any(|(after, transform)| {
        answer.transforms.iter().skip(after).any(|other| other.kind == transform.kind)
    });
    if twice {
        return None;
    }
    let ours = offered_by_us.iter().find(|ours| ours.number == answer.number)?;
    agree(ours, answer)
}

/// What to offer: the configured proposals, numbered from 1, each with `spi`. At most 255.
pub fn offer(configured: &[Proposal], spi: &[u8]) -> Vec<Proposal> {
    let numbered = (1..=u8::MAX).zip(configured);
    numbered.map(|(number, proposal)| Proposal { number, spi: spi.to_vec(), ..proposal.clone() }).collect()
}

/// The proposals without key exchanges, as they are in IKE_AUTH, where none can be done (section 1.2).
pub fn without_key_exchange(proposals: &[Proposal]) -> Vec<Proposal> {
    let kept =
        |transform: &&Transform| transform.kind != TransformType::KE && !ADDKE.contains(&transform.kind);
    let mut result: Vec<Proposal> = Vec::with_capacity(proposals.len());
    for proposal in proposals {
        let transforms = proposal.transforms.iter().filter(kept).copied().collect();
        let stripped = Proposal { transforms, ..proposal.clone() };
        // Those that differed in their key exchange only are now the same.
        let known =
            |other: &Proposal| other.protocol == stripped.protocol && other.transforms == stripped.transforms;
        if !result.iter().any(known) {
            result.push(stripped);
        }
    }
    result
}

/// One proposal of ours against one of theirs.
fn agree(ours: &Proposal, theirs: &Proposal) -> Option<Chosen> {
    let protocol = theirs.protocol;
    if ours.protocol != protocol
        || !theirs.transforms.iter().all(|transform| belongs(protocol, transform.kind))
    {
        return None;
    }
    let common = |kind| {
        let mut found = common(ours, theirs, kind);
        // Neither NONE is one (section 3.3.3: both types are mandatory).
        if protocol == ProtocolId::IKE && matches!(kind, TransformType::PRF | TransformType::KE) {
            found.retain(|transform| transform.id != 0);
        }
        found
    };
    let (encr, integ) = protection(protocol, &common(TransformType::ENCR), &common(TransformType::INTEG))?;
    let prf = *common(TransformType::PRF).first()?;
    let esn = *common(TransformType::ESN).first()?;
    let mut methods = Vec::with_capacity(8);
    if !exchanges(&[&[TransformType::KE], &ADDKE[..]].concat(), &common, &mut methods) {
        return None;
    }
    let (&ke, additional) = methods.split_first()?;

    let chosen = [encr, prf, integ, esn].into_iter().chain(methods.iter().copied());
    // Section 3.3: the answer has one transform of each type that was offered, NONE included, and no others.
    let offered = |transform: &Transform| theirs.transforms.iter().any(|other| other.kind == transform.kind);
    let transforms = chosen.filter(offered).collect();
    let additional: Additional = additional
        .iter()
        .map(|transform| KeMethod(transform.id))
        .filter(|&method| method != KeMethod::NONE)
        .collect();

    let key_bits = match EncrId(encr.id) {
        EncrId::CHACHA20_POLY1305 => 256,
        _ => encr.key_length.unwrap_or(0),
    };
    let (encr, integ, ke) = (EncrId(encr.id), IntegId(integ.id), KeMethod(ke.id));
    let suite = if protocol == ProtocolId::IKE {
        Suite::Ike(IkeSuite { encr, key_bits, prf: PrfId(prf.id), integ, ke, additional })
    } else {
        Suite::Child(ChildSuite {
            protocol,
            encr,
            key_bits,
            integ,
            ke,
            additional,
            esn: EsnId(esn.id) == EsnId::ESN,
        })
    };
    let proposal = Proposal { number: theirs.number, protocol, spi: theirs.spi.clone(), transforms };
    let chosen = Chosen { number: theirs.number, spi: theirs.spi.clone(), suite, proposal };
    let spi_fits = match protocol {
        ProtocolId::IKE => chosen.spi.is_empty() || chosen.ike_spi().is_some(),
        _ => chosen.child_spi().is_some(),
    };
    spi_fits.then_some(chosen)
}

/// Section 3.3.3, and RFC 9370 section 2.2.1 for additional key exchanges: which transform types go with a protocol.
fn belongs(protocol: ProtocolId, kind: TransformType) -> bool {
    match kind {
        TransformType::ENCR => protocol == ProtocolId::IKE || protocol == ProtocolId::ESP,
        TransformType::PRF => protocol == ProtocolId::IKE,
        TransformType::ESN => protocol == ProtocolId::ESP || protocol == ProtocolId::AH,
        TransformType::INTEG | TransformType::KE => true,
        kind => ADDKE.contains(&kind),
    }
}

/// Transforms of a type that both have, in our order; for a type that one has none of, the one that is meant then. NONE
/// and NO_ESN are 0, and so is what a protocol has no use for.
fn common(ours: &Proposal, theirs: &Proposal, kind: TransformType) -> Vec<Transform> {
    let left_out = Transform { kind, id: 0, key_length: None, unknown_attribute: false };
    let of = |proposal: &Proposal| {
        let found: Vec<_> =
            proposal.transforms.iter().filter(|transform| transform.kind == kind).copied().collect();
        if found.is_empty() { vec![left_out] } else { found }
    };
    let theirs = of(theirs);
    of(ours)
        .into_iter()
        .filter(|transform| !transform.unknown_attribute && theirs.contains(transform))
        .collect()
}

/// The first pair of encryption and integrity that makes sense.
fn protection(
    protocol: ProtocolId,
    encr: &[Transform],
    integ: &[Transform],
) -> Option<(Transform, Transform)> {
    let pairs = encr.iter().flat_map(|&encr| integ.iter().map(move |&integ| (encr, integ)));
    let sound = |&(encr, integ): &(Transform, Transform)| {
        let (encr, integ) = (EncrId(encr.id), IntegId(integ.id));
        match protocol {
            ProtocolId::AH => integ != IntegId::NONE,
            ProtocolId::IKE if matches!(encr, EncrId::NULL | EncrId::NULL_AUTH_AES_GMAC) => false,
            // Encryption without integrity is never agreed to, and an AEAD has both in one (section 3.3).
            _ => encr != EncrId::NONE && is_aead(encr) == (integ == IntegId::NONE),
        }
    };
    pairs.into_iter().find(sound)
}

/// Chooses a key exchange method for each type in `kinds`, the first in our order that goes with the others.
///
/// RFC 9370 section 2.2.2: no method may be chosen twice, NONE aside. Without a first key exchange there is none after it.
fn exchanges(
    kinds: &[TransformType],
    common: &impl Fn(TransformType) -> Vec<Transform>,
    chosen: &mut Vec<Transform>,
) -> bool {
    let Some((&kind, rest)) = kinds.split_first() else { return true };
    for transform in common(kind) {
        let method = KeMethod(transform.id);
        let fits = method == KeMethod::NONE
            || (chosen.first().is_none_or(|first| first.id != KeMethod::NONE.0)
                && chosen.iter().all(|before| before.id != transform.id));
        if fits {
            chosen.push(transform);
            if exchanges(rest, common, chosen) {
                return true;
            }
            chosen.pop();
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::keyword::{self, ah, esp, ike};
    use super::*;

    fn with_spi(mut proposal: Proposal, spi: &[u8]) -> Proposal {
        proposal.spi = spi.to_vec();
        proposal
    }

    fn child(text: &str) -> Proposal {
        with_spi(esp(text).unwrap(), &[0xc0, 1, 2, 3])
    }

    fn transform(kind: TransformType, id: u16, key_length: Option<u16>) -> Transform {
        Transform { kind, id, key_length, unknown_attribute: false }
    }

    /// The suite as text, or what was refused.
    fn outcome(configured: &[&str], offered: &[&str]) -> Option<String> {
        let read = |texts: &[&str]| texts.iter().map(|text| ike(text).unwrap()).collect::<Vec<_>>();
        let chosen = choose(&read(configured), &offer(&read(offered), &[]))?;
        Some(format!("{} {}", chosen.number, chosen.ike().unwrap()))
    }

    fn child_outcome(configured: &[&str], offered: &[&str]) -> Option<String> {
        let read = |texts: &[&str]| texts.iter().map(|text| esp(text).unwrap()).collect::<Vec<_>>();
        let chosen = choose(&read(configured), &offer(&read(offered), &[0xc0, 1, 2, 3]))?;
        assert_eq!(chosen.child_spi(), Some(0xc001_0203));
        Some(format!("{} {}", chosen.number, chosen.child().unwrap()))
    }

    /// IKE-1: our order decides, and the names are strongSwan's.
    #[test]
    fn ike_1_our_order() {
        let all = "aes128gcm16-aes256gcm16-prfsha256-prfsha384-ecp256-x25519";
        assert_eq!(
            outcome(&["aes256gcm16-aes128gcm16-prfsha384-x25519-ecp256"], &[all]).unwrap(),
            "1 AES_GCM_16_256/PRF_HMAC_SHA2_384/CURVE_25519"
        );
        assert_eq!(
            outcome(
                &["aes128-sha256-modp2048", "aes128gcm16-prfsha256-x25519"],
                &[all, "aes128-sha256-modp2048"]
            )
            .unwrap(),
            "2 AES_CBC_128/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/MODP_2048"
        );
        assert_eq!(outcome(&["aes192-sha256-modp2048"], &["aes128-aes256-sha256-modp2048"]), None);
        assert_eq!(outcome(&["aes128-sha256-modp2048"], &["aes128-sha384-prfsha256-modp2048"]), None);
        assert_eq!(
            outcome(
                &["chacha20poly1305-prfsha256-x25519-ke1_mlkem768"],
                &["chacha20poly1305-prfsha256-x25519-ke1_none-ke1_mlkem768"]
            )
            .unwrap(),
            "1 CHACHA20_POLY1305/PRF_HMAC_SHA2_256/CURVE_25519/KE1_ML_KEM_768"
        );
    }

    /// IKE-4, RFC 9370 section 2.2.2: additional key exchanges by their slots, none of them twice, none demanded of a peer
    /// that leaves them out.
    #[test]
    fn ike_4_additional_key_exchanges() {
        let base = "aes128gcm16-prfsha256-x25519";
        let with = |more: &str| format!("{base}-{more}");
        let outcome = |ours: &str, theirs: &str| outcome(&[ours], &[theirs]);
        assert_eq!(outcome(&with("ke1_mlkem768"), base), None);
        assert_eq!(outcome(base, &with("ke1_mlkem768")), None);
        assert_eq!(
            outcome(&with("ke1_mlkem768-ke1_none"), base).unwrap(),
            "1 AES_GCM_16_128/PRF_HMAC_SHA2_256/CURVE_25519"
        );
        assert_eq!(
            outcome(base, &with("ke1_mlkem768-ke1_none")).unwrap(),
            "1 AES_GCM_16_128/PRF_HMAC_SHA2_256/CURVE_25519"
        );
        assert_eq!(
            outcome(
                &with("ke1_x25519-ke1_ecp256-ke2_ecp256-ke2_ecp384"),
                &with("ke1_x25519-ke1_ecp256-ke2_ecp256-ke2_ecp384")
            )
            .unwrap(),
            "1 AES_GCM_16_128/PRF_HMAC_SHA2_256/CURVE_25519/KE1_ECP_256/KE2_ECP_384"
        );
        // The first choice of slot 1 would leave nothing for slot 2.
        assert_eq!(
            outcome(&with("ke1_ecp256-ke1_ecp384-ke2_ecp256"), &with("ke1_ecp256-ke1_ecp384-ke2_ecp256"))
                .unwrap(),
            "1 AES_GCM_16_128/PRF_HMAC_SHA2_256/CURVE_25519/KE1_ECP_384/KE2_ECP_256"
        );
        assert_eq!(outcome(&with("ke1_x25519"), &with("ke1_x25519")), None);
    }

    /// IKE-1: perfect forward secrecy is what both have or both can do without.
    #[test]
    fn ike_1_child_key_exchange() {
        let outcome = |ours: &str, theirs: &str| child_outcome(&[ours], &[theirs]);
        assert_eq!(outcome("aes128gcm16", "aes128gcm16").unwrap(), "1 ESP:AES_GCM_16_128/NO_EXT_SEQ");
        assert_eq!(outcome("aes128gcm16-x25519", "aes128gcm16"), None);
        assert_eq!(outcome("aes128gcm16", "aes128gcm16-x25519"), None);
        assert_eq!(
            outcome("aes128gcm16", "aes128gcm16-x25519-none").unwrap(),
            "1 ESP:AES_GCM_16_128/NO_EXT_SEQ"
        );
        assert_eq!(
            outcome("aes128gcm16-x25519-none", "aes128gcm16-none-x25519").unwrap(),
            "1 ESP:AES_GCM_16_128/CURVE_25519/NO_EXT_SEQ"
        );
        let stripped = without_key_exchange(&[
            child("aes128gcm16-x25519-ke1_mlkem768"),
            child("aes128gcm16-ecp256"),
            child("aes256gcm16"),
        ]);
        assert_eq!(keyword::List(&stripped).to_string(), "aes128gcm16, aes256gcm16");
    }

    /// DP-1: sequence numbers: what both have in our order; left out means 32 bits.
    #[test]
    fn sequence_numbers() {
        let outcome = |ours: &str, theirs: &str| child_outcome(&[ours], &[theirs]);
        assert_eq!(
            outcome("aes128-sha256-esn-noesn", "aes128-sha256-noesn-esn").unwrap(),
            "1 ESP:AES_CBC_128/HMAC_SHA2_256_128/EXT_SEQ"
        );
        assert_eq!(
            outcome("aes128-sha256-noesn-esn", "aes128-sha256-esn").unwrap(),
            "1 ESP:AES_CBC_128/HMAC_SHA2_256_128/EXT_SEQ"
        );
        assert_eq!(outcome("aes128-sha256-esn", "aes128-sha256"), None);
        let mut without = child("aes128gcm16");
        without.transforms.retain(|transform| transform.kind != TransformType::ESN);
        let chosen = choose(&[child("aes128gcm16-esn-noesn")], &[without.clone()]).unwrap();
        assert!(!chosen.child().unwrap().esn);
        assert_eq!(chosen.proposal, without, "the answer leaves out what was left out");
        assert_eq!(choose(&[child("aes128gcm16-esn")], &[without]), None);
    }

    /// IKE-1, section 3.3: "Combined-mode ciphers … MUST either offer no integrity algorithm or a single integrity algorithm
    /// of 'NONE'".
    #[test]
    fn ike_1_integrity_next_to_an_aead() {
        let ours = [ike("aes128gcm16-prfsha256-x25519").unwrap()];
        let mut theirs = ours[0].clone();
        theirs.transforms.push(transform(TransformType::INTEG, 0, None));
        let chosen = choose(&ours, core::slice::from_ref(&theirs)).unwrap();
        assert_eq!(chosen.ike().unwrap().integ, IntegId::NONE);
        assert!(chosen.proposal.transforms.contains(&transform(TransformType::INTEG, 0, None)));
        theirs.transforms.pop();
        theirs.transforms.push(transform(TransformType::INTEG, 12, None));
        assert_eq!(choose(&ours, &[theirs]), None);
        // Nor is encryption without integrity agreed to.
        let mut bare = child("aes128-sha256");
        bare.transforms.retain(|transform| transform.kind != TransformType::INTEG);
        assert_eq!(choose(&[bare.clone()], &[bare]), None);
    }

    /// IKE-1, section 3.3.6: what is not understood is not chosen, and what stands next to it still is.
    #[test]
    fn ike_1_what_is_not_understood() {
        let ours = [ike("aes256-sha256-x25519").unwrap()];
        let good = ours[0].clone();
        let changed = |change: &dyn Fn(&mut Vec<Transform>)| {
            let mut theirs = good.clone();
            change(&mut theirs.transforms);
            choose(&ours, &[theirs])
        };
        assert!(changed(&|_| ()).is_some());
        let strange = transform(TransformType(77), 1, None);
        assert_eq!(
            changed(&|transforms| transforms.push(strange)),
            None,
            "a transform type that is not known"
        );
        assert_eq!(changed(&|transforms| transforms.push(transform(TransformType::ESN, 0, None))), None);
        assert!(
            changed(&|transforms| transforms.insert(0, transform(TransformType::ENCR, 999, None))).is_some()
        );
        assert_eq!(changed(&|transforms| transforms[0].unknown_attribute = true), None);
        assert!(
            changed(&|transforms| {
                transforms.insert(0, Transform { unknown_attribute: true, ..transforms[0] });
            })
            .is_some()
        );
        assert_eq!(changed(&|transforms| transforms[0].key_length = None), None, "AES without a key length");
        assert_eq!(changed(&|transforms| transforms[0].key_length = Some(128)), None);
        assert_eq!(changed(&|transforms| transforms[1].key_length = Some(256)), None, "a prf with one");
        for index in 0..good.transforms.len() {
            assert_eq!(
                changed(&|transforms| {
                    transforms.remove(index);
                }),
                None,
                "type {index} is left out"
            );
        }
        let both =
            [Proposal { transforms: vec![strange], ..good.clone() }, Proposal { number: 2, ..good.clone() }];
        assert_eq!(choose(&ours, &both).unwrap().number, 2);
        // A proposal without pseudorandom function is none, even if both have none.
        let mut bare = good;
        bare.transforms.retain(|transform| transform.kind != TransformType::PRF);
        assert_eq!(choose(&[bare.clone()], &[bare]), None);
    }

    /// IKE-1: SPIs of the right length that can be used.
    #[test]
    fn ike_1_spis() {
        let ours = [child("aes128gcm16")];
        for spi in [&[][..], &[1, 2, 3], &[0, 0, 0, 255], &[1; 8]] {
            assert_eq!(choose(&ours, &[with_spi(ours[0].clone(), spi)]), None);
        }
        assert_eq!(
            choose(&ours, &[with_spi(ours[0].clone(), &[0, 0, 1, 0])]).unwrap().child_spi(),
            Some(256)
        );
        let ours = [ike("aes128-sha256-x25519").unwrap()];
        for spi in [&[1, 2, 3, 4][..], &[0; 8]] {
            assert_eq!(choose(&ours, &[with_spi(ours[0].clone(), spi)]), None);
        }
        assert_eq!(
            choose(&ours, &[with_spi(ours[0].clone(), &[1; 8])]).unwrap().ike_spi(),
            Some(0x0101_0101_0101_0101)
        );
    }

    /// IKE-1: AH is not ESP.
    #[test]
    fn ike_1_protocols() {
        let ours = with_spi(ah("sha256-esn").unwrap(), &[1, 2, 3, 4]);
        let chosen = choose(core::slice::from_ref(&ours), &[child("aes128-sha256"), ours.clone()]).unwrap();
        assert_eq!(chosen.child().unwrap().to_string(), "AH:HMAC_SHA2_256_128/EXT_SEQ");
        assert_eq!(chosen.child().unwrap().key_bits, 0);
        let as_esp = Proposal { protocol: ProtocolId::ESP, ..ours.clone() };
        assert_eq!(choose(core::slice::from_ref(&as_esp), core::slice::from_ref(&as_esp)), None);
        assert_eq!(choose(&[ours], &[as_esp]), None);
    }

    /// IKE-1, section 2.7: the one who asked checks that the answer is one of its own proposals.
    #[test]
    fn ike_1_answers() {
        let ours = offer(
            &[ike("aes128gcm16-aes256gcm16-prfsha256-x25519").unwrap(), ike("aes128-sha256-x25519").unwrap()],
            &[],
        );
        let answer = |number: u8, text: &str| Proposal { number, ..ike(text).unwrap() };
        assert!(accepts(&ours, &[answer(1, "aes256gcm16-prfsha256-x25519")]).is_some());
        assert!(accepts(&ours, &[answer(2, "aes128-sha256-x25519")]).is_some());
        assert_eq!(
            accepts(&ours, &[answer(1, "aes128-sha256-x25519")]),
            None,
            "it is the other one's number"
        );
        assert_eq!(accepts(&ours, &[answer(3, "aes128-sha256-x25519")]), None);
        assert_eq!(
            accepts(&ours, &[answer(1, "aes128gcm16-aes256gcm16-prfsha256-x25519")]),
            None,
            "no choice"
        );
        assert_eq!(accepts(&ours, &[answer(1, "aes192gcm16-prfsha256-x25519")]), None);
        assert_eq!(accepts(&ours, &[answer(1, "aes128gcm16-prfsha256-x25519-ke1_mlkem768")]), None);
        assert_eq!(accepts(&ours, &[]), None);
        let two = [answer(1, "aes256gcm16-prfsha256-x25519"), answer(2, "aes128-sha256-x25519")];
        assert_eq!(accepts(&ours, &two), None);
    }

    type Model = (u8, u16, Option<u16>);

    /// Choosing by trying everything, written without a thought for speed: every combination of one transform, or none, of
    /// each type of ours, in order, is held against the rules.
    fn model(configured: &[Proposal], offered: &[Proposal]) -> Option<(u8, Vec<Model>)> {
        const KINDS: [u8; 12] = [1, 3, 2, 5, 4, 6, 7, 8, 9, 10, 11, 12];
        fn combinations(ours: &Proposal, kinds: &[u8]) -> Vec<Vec<Model>> {
            let Some((&kind, rest)) = kinds.split_first() else { return vec![Vec::new()] };
            let mut own: Vec<_> = ours
                .transforms
                .iter()
                .filter(|transform| transform.kind.0 == kind)
                .map(|transform| (kind, transform.id, transform.key_length))
                .collect();
            if own.is_empty() {
                own.push((kind, 0, None));
            }
            let after = combinations(ours, rest);
            own.iter().flat_map(|first| after.iter().map(|rest| [&[*first], &rest[..]].concat())).collect()
        }
        let legal = |protocol: u8, combination: &[Model]| {
            let id = |kind| combination.iter().find(|transform| transform.0 == kind).unwrap().1;
            let aead = [20, 21, 28].contains(&id(1));
            let methods: Vec<_> = combination
                .iter()
                .filter(|t| t.0 == 4 || t.0 > 5)
                .map(|t| t.1)
                .filter(|&id| id != 0)
                .collect();
            let distinct = methods.iter().collect::<std::collections::BTreeSet<_>>().len() == methods.len();
            let additional = methods.len() > usize::from(id(4) != 0);
            let encrypted = id(1) != 0 && (aead == (id(3) == 0));
            distinct
                && !(additional && id(4) == 0)
                && match protocol {
                    1 => encrypted && id(2) != 0 && id(4) != 0 && id(5) == 0 && id(1) != 11 && id(1) != 21,
                    2 => id(1) == 0 && id(3) != 0 && id(2) == 0,
                    _ => encrypted && id(2) == 0,
                }
        };
        for ours in configured {
            for theirs in offered {
                let allowed: &[u8] = match theirs.protocol.0 {
                    1 => &[1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12],
                    2 => &[3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
                    _ => &[1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
                };
                if ours.protocol != theirs.protocol
                    || theirs.transforms.iter().any(|transform| !allowed.contains(&transform.kind.0))
                {
                    continue;
                }
                for combination in combinations(ours, &KINDS) {
                    let offered = combination.iter().all(|&(kind, id, key_length)| {
                        let mut of_kind =
                            theirs.transforms.iter().filter(|transform| transform.kind.0 == kind).peekable();
                        if of_kind.peek().is_none() {
                            return (id, key_length) == (0, None);
                        }
                        of_kind.any(|t| (t.id, t.key_length, t.unknown_attribute) == (id, key_length, false))
                    });
                    if offered && legal(theirs.protocol.0, &combination) {
                        return Some((theirs.number, combination));
                    }
                }
            }
        }
        None
    }

    fn any_transform() -> impl Strategy<Value = Transform> {
        let known = prop_oneof![
            4 => prop::sample::select(vec![(1, 20, Some(128)), (1, 20, Some(256)), (1, 12, Some(128)), (1, 28, None), (1, 11, None)]),
            3 => prop::sample::select(vec![(3, 12, None), (3, 14, None), (3, 0, None)]),
            2 => prop::sample::select(vec![(5, 0, None), (5, 1, None)]),
            3 => prop::sample::select(vec![(4, 31, None), (4, 19, None), (4, 0, None)]),
            2 => prop::sample::select(vec![(6, 31, None), (6, 36, None), (6, 0, None), (8, 36, None), (8, 0, None)]),
        ];
        (known, prop::bool::weighted(0.03)).prop_map(|((kind, id, key_length), unknown_attribute)| {
            Transform { kind: TransformType(kind), id, key_length, unknown_attribute }
        })
    }

    fn any_proposal() -> impl Strategy<Value = Proposal> {
        let prfs = prop::collection::vec(prop::sample::select(vec![5_u16, 6, 7]), 0..3);
        (0..6_u8, prop::collection::vec(any_transform(), 0..9), prfs).prop_map(
            |(protocol, mut transforms, prfs)| {
                let protocol = [
                    ProtocolId::IKE,
                    ProtocolId::IKE,
                    ProtocolId::ESP,
                    ProtocolId::ESP,
                    ProtocolId::ESP,
                    ProtocolId::AH,
                ][usize::from(protocol)];
                if protocol == ProtocolId::IKE {
                    transforms.extend(prfs.into_iter().map(|id| transform(TransformType::PRF, id, None)));
                    transforms.retain(|transform| transform.kind != TransformType::ESN || transform.id == 1);
                }
                if protocol == ProtocolId::AH {
                    transforms.retain(|transform| transform.kind != TransformType::ENCR);
                }
                let spi = if protocol == ProtocolId::IKE { Vec::new() } else { vec![1, 2, 3, 4] };
                Proposal { number: 1, protocol, spi, transforms }
            },
        )
    }

    fn any_proposals() -> impl Strategy<Value = Vec<Proposal>> {
        prop::collection::vec(any_proposal(), 0..4).prop_map(|mut proposals| {
            for (number, proposal) in (1..).zip(&mut proposals) {
                proposal.number = number;
            }
            proposals
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// IKE-1: the choice is that of the model, and the one who asked accepts it.
        #[test]
        fn ike_1_choice_is_the_models(configured in any_proposals(), mut offered in any_proposals(), same: bool) {
            if same && let (Some(ours), Some(theirs)) = (configured.first(), offered.first_mut()) {
                *theirs = Proposal { number: 1, ..ours.clone() };
            }
            // Attributes are what a peer sends; none of ours has an unknown one.
            let mut configured = configured;
            for transform in configured.iter_mut().flat_map(|proposal| &mut proposal.transforms) {
                transform.unknown_attribute = false;
            }
            let chosen = choose(&configured, &offered);
            let expected = model(&configured, &offered);
            prop_assert_eq!(chosen.as_ref().map(|chosen| chosen.number), expected.as_ref().map(|expected| expected.0));
            let (Some(chosen), Some((_, combination))) = (chosen, expected) else { return Ok(()) };
            for transform in &chosen.proposal.transforms {
                prop_assert!(combination.contains(&(transform.kind.0, transform.id, transform.key_length)));
            }
            let id = |kind| combination.iter().find(|transform| transform.0 == kind).unwrap().1;
            let methods: Vec<_> = combination.iter().filter(|t| t.0 > 5 && t.1 != 0).map(|t| KeMethod(t.1)).collect();
            match &chosen.suite {
                Suite::Ike(suite) => {
                    prop_assert_eq!((suite.encr.0, suite.prf.0, suite.integ.0, suite.ke.0), (id(1), id(2), id(3), id(4)));
                    prop_assert_eq!(suite.additional.as_slice(), methods);
                }
                Suite::Child(suite) => {
                    prop_assert_eq!((suite.encr.0, suite.integ.0, suite.ke.0), (id(1), id(3), id(4)));
                    prop_assert_eq!((suite.esn, suite.additional.as_slice()), (id(5) == 1, &methods[..]));
                }
            }
            // What the answerer chose is what the asker reads from the answer.
            let accepted = accepts(&offered, core::slice::from_ref(&chosen.proposal)).unwrap();
            prop_assert_eq!(accepted, chosen);
        }
    }
}
