//! MODP groups of RFC 3526: exponentiation in constant time, with short exponents.
//!
//! RFC 3526 section 8 gives 220 to 320 bits for the exponent of the 2048-bit group, 260 to 420 and 310 to 480 for the two
//! longer ones; here it is 256, 320 and 384 bits, at least twice the strength that each group is credited with.
//!
//! Powers of the generator, half of all the work, are computed with a table (Lim and Lee's comb) in a third of the time.

use std::sync::LazyLock;

use crypto_bigint::modular::{ConstMontyForm, ConstMontyParams};
use crypto_bigint::{CtAssign, CtEq, U384, U2048, U3072, U4096, Uint, const_monty_params};
use zeroize::{Zeroize, Zeroizing};

use crate::message::registry::KeMethod;
use crate::{Random, Secret};

/// A group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    /// Group 14.
    Modp2048,
    /// Group 15.
    Modp3072,
    /// Group 16.
    Modp4096,
}

/// A private exponent; wiped on drop.
pub(super) struct Exponent(Box<U384>);

impl Group {
    /// The group of a key exchange method.
    pub(super) fn of(method: KeMethod) -> Option<Self> {
        match method {
            KeMethod::MODP_2048 => Some(Self::Modp2048),
            KeMethod::MODP_3072 => Some(Self::Modp3072),
            KeMethod::MODP_4096 => Some(Self::Modp4096),
            _ => None,
        }
    }

    /// Bits of a private exponent.
    const fn exponent_bits(self) -> u32 {
        match self {
            Self::Modp2048 => 256,
            Self::Modp3072 => 320,
            Self::Modp4096 => 384,
        }
    }

    /// A random exponent.
    pub(super) fn exponent(self, random: &mut dyn Random) -> Exponent {
        let mut bytes = Zeroizing::new([0; U384::BYTES]);
        let unused = U384::BITS - self.exponent_bits();
        random.fill(&mut *bytes);
        Exponent(Box::new(U384::from_be_slice(&*bytes).shr_vartime(unused)))
    }

    /// The public value g^x, as long as the prime (RFC 7296 section 3.4: "the length of the public value MUST be equal to
    /// the length of the prime modulus … prepending zero bits if necessary").
    pub(super) fn public(self, x: &Exponent) -> Vec<u8> {
        match self {
            Self::Modp2048 => COMB_2048.public(x),
            Self::Modp3072 => COMB_3072.public(x),
            Self::Modp4096 => COMB_4096.public(x),
        }
    }

    /// The secret g^xy, as long as the prime (section 2.14: "padded with zeros if necessary to make it the length of the
    /// modulus"). `None` if the peer's value has another length or is not in 2 to p - 2 (RFC 6989 section 2.1).
    pub(super) fn agree(self, x: &Exponent, public: &[u8]) -> Option<Secret> {
        match self {
            Self::Modp2048 => agree::<P2048, _>(public, x, self.exponent_bits()),
            Self::Modp3072 => agree::<P3072, _>(public, x, self.exponent_bits()),
            Self::Modp4096 => agree::<P4096, _>(public, x, self.exponent_bits()),
        }
    }
}

const_monty_params!(
    P2048,
    U2048,
    "\
         FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
         EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
         EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
         83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
         E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
         15728E5A8AACAA68FFFFFFFFFFFFFFFF"
);
const_monty_params!(
    P3072,
    U3072,
    "\
         FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
         EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
         EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
         83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
         E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
         15728E5A8AAAC42DAD33170D04507A33A85521ABDF1CBA64ECFB850458DBEF0A8AEA71575D060C7DB3970F85A6E1E4C7\
         ABF5AE8CDB0933D71E8C94E04A25619DCEE3D2261AD2EE6BF12FFA06D98A0864D87602733EC86A64521F2B18177B200C\
         BBE117577A615D6C770988C0BAD946E208E24FA074E5AB3143DB5BFCE0FD108E4B82D120A93AD2CAFFFFFFFFFFFFFFFF"
);
const_monty_params!(
    P4096,
    U4096,
    "\
         FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
         EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
         EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
         83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
         E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
         15728E5A8AAAC42DAD33170D04507A33A85521ABDF1CBA64ECFB850458DBEF0A8AEA71575D060C7DB3970F85A6E1E4C7\
         ABF5AE8CDB0933D71E8C94E04A25619DCEE3D2261AD2EE6BF12FFA06D98A0864D87602733EC86A64521F2B18177B200C\
         BBE117577A615D6C770988C0BAD946E208E24FA074E5AB3143DB5BFCE0FD108E4B82D120A92108011A723C12A787E6D7\
         88719A10BDBA5B2699C327186AF4E23C1A946834B6150BDA2583E9CA2AD44CE8DBBBC2DB04DE8EF92E8EFC141FBECAA6\
         287C59474E6BC05D99B2964FA090C3A2233BA186515BE7ED1F612970CEE2D7AFB81BDD762170481CD0069127D5B05AA9\
         93B4EA988D8FDDC186FFB7DC90A6C08F4DF435C934063199FFFFFFFFFFFFFFFF"
);

static COMB_2048: LazyLock<Comb<P2048, { U2048::LIMBS }>> = LazyLock::new(|| Comb::new(Group::Modp2048));
static COMB_3072: LazyLock<Comb<P3072, { U3072::LIMBS }>> = LazyLock::new(|| Comb::new(Group::Modp3072));
static COMB_4096: LazyLock<Comb<P4096, { U4096::LIMBS }>> = LazyLock::new(|| Comb::new(Group::Modp4096));

/// The exponent's bits, written in `TEETH` rows of as many columns as are needed; a column is looked up at once.
const TEETH: u32 = 6;

/// The generator's powers for every value of a column, 2^TEETH of them: 16 to 32 KiB, made on first use.
struct Comb<M: ConstMontyParams<LIMBS>, const LIMBS: usize> {
    columns: u32,
    powers: Vec<ConstMontyForm<M, LIMBS>>,
}

impl<M: ConstMontyParams<LIMBS>, const LIMBS: usize> Comb<M, LIMBS> {
    fn new(group: Group) -> Self {
        let columns = group.exponent_bits().div_ceil(TEETH);
        let mut powers = vec![ConstMontyForm::<M, LIMBS>::ONE];
        let mut row = ConstMontyForm::new(&Uint::from_u8(2));
        for _ in 0..TEETH {
            let with_row: Vec<_> = powers.iter().map(|power| power.mul(&row)).collect();
            powers.extend(with_row);
            row = row.square_repeat_vartime(columns);
        }
        Self { columns, powers }
    }

    /// 2^x. Every power is read for every column, so that neither time nor memory access tells the exponent.
    fn public(&self, x: &Exponent) -> Vec<u8> {
        let mut product = Zeroizing::new(ConstMontyForm::<M, LIMBS>::ONE);
        let mut factor = Zeroizing::new(ConstMontyForm::<M, LIMBS>::ONE);
        for column in (0..self.columns).rev() {
            let value = (0..TEETH).rev().fold(0_u64, |value, tooth| {
                value << 1 | u64::from(x.0.bit_vartime(tooth * self.columns + column))
            });
            for (index, power) in (0_u64..).zip(&self.powers) {
                factor.ct_assign(power, index.ct_eq(&value));
            }
            *product = product.square().mul(&factor);
        }
        product.retrieve().to_be_bytes().as_slice().to_vec()
    }
}

fn agree<M: ConstMontyParams<LIMBS>, const LIMBS: usize>(
    public: &[u8],
    x: &Exponent,
    bits: u32,
) -> Option<Secret> {
    if public.len() != Uint::<LIMBS>::BYTES {
        return None;
    }
    let public = Uint::<LIMBS>::from_be_slice(public);
    let last = M::PARAMS.modulus().as_ref().wrapping_sub(&Uint::ONE);
    // The value is the peer's and no secret; RFC 6989 section 2.1: "1 < r < p-1".
    if public <= Uint::ONE || public >= last {
        return None;
    }
    // What can be timed is `bits`, the length of exponents of this group.
    let power = Zeroizing::new(ConstMontyForm::<M, LIMBS>::new(&public).pow_bounded_exp(&*x.0, bits));
    let value = Zeroizing::new(power.retrieve());
    let bytes = Zeroizing::new(value.to_be_bytes());
    Some(Secret::new(bytes.as_slice()))
}

impl Drop for Exponent {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
impl Group {
    /// The prime, big endian.
    pub(super) fn prime(self) -> Vec<u8> {
        match self {
            Self::Modp2048 => P2048::PARAMS.modulus().as_ref().to_be_bytes().as_slice().to_vec(),
            Self::Modp3072 => P3072::PARAMS.modulus().as_ref().to_be_bytes().as_slice().to_vec(),
            Self::Modp4096 => P4096::PARAMS.modulus().as_ref().to_be_bytes().as_slice().to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fixed-point number of 32-bit digits, most significant first; the first is the integer part.
    type Digits = Vec<u32>;

    fn low(value: u64) -> u32 {
        u32::try_from(value & 0xffff_ffff).unwrap()
    }

    fn divide(n: &mut Digits, by: u64) {
        let mut rest = 0;
        for digit in n {
            let value = rest << 32 | u64::from(*digit);
            *digit = u32::try_from(value / by).unwrap();
            rest = value % by;
        }
    }

    fn multiply(n: &mut Digits, by: u64) {
        let mut carry = 0;
        for digit in n.iter_mut().rev() {
            let value = u64::from(*digit) * by + carry;
            *digit = low(value);
            carry = value >> 32;
        }
    }

    /// `n + add` modulo 2^(32 * digits); subtracts if `minus`.
    fn add(n: &mut Digits, add: &Digits, minus: bool) {
        let mut carry = u64::from(minus);
        for (digit, add) in n.iter_mut().zip(add).rev() {
            let value = u64::from(*digit) + u64::from(if minus { !*add } else { *add }) + carry;
            *digit = low(value);
            carry = value >> 32;
        }
    }

    fn number(digits: usize, integer: u32) -> Digits {
        let mut n = vec![0; digits];
        n[0] = integer;
        n
    }

    /// arctan(1 / x) = 1/x - 1/3x^3 + 1/5x^5 - …
    fn arctan_of_inverse(x: u64, digits: usize) -> Digits {
        let mut power = number(digits, 1);
        divide(&mut power, x);
        let mut sum = power.clone();
        for k in 1.. {
            divide(&mut power, x * x);
            if power.iter().all(|digit| *digit == 0) {
                break;
            }
            let mut term = power.clone();
            divide(&mut term, 2 * k + 1);
            add(&mut sum, &term, k % 2 == 1);
        }
        sum
    }

    /// Machin: pi = 4 (4 arctan(1/5) - arctan(1/239)).
    fn pi(digits: usize) -> Digits {
        let mut pi = arctan_of_inverse(5, digits);
        multiply(&mut pi, 4);
        add(&mut pi, &arctan_of_inverse(239, digits), true);
        multiply(&mut pi, 4);
        pi
    }

    /// IKE-4: RFC 3526 sections 3 to 5, the prime is 2^n - 2^(n-64) - 1 + 2^64 * { [2^(n-130) pi] + k }.
    #[test]
    fn ike_4_primes_are_what_pi_makes_them() {
        for (group, bits, k) in [
            (Group::Modp2048, 2048, 124_476),
            (Group::Modp3072, 3072, 1_690_314),
            (Group::Modp4096, 4096, 240_904),
        ] {
            // pi * 2^(n-130), the integer part; two digits more than that for what the series cuts off.
            let digits = (bits - 130_usize).div_ceil(32);
            let mut value = pi(1 + digits + 2);
            value.truncate(1 + digits);
            // Now it is scaled by 2^(32 * digits).
            divide(&mut value, 1 << (32 * digits - (bits - 130)));
            let length = value.len();
            // The upper and the lower 64 bits are those of 2^n - 2^(n-64) - 1; its -1 borrows one from what is between.
            add(&mut value, &[vec![0; length - 1], vec![k - 1]].concat(), false);
            let middle: Vec<u8> = value.iter().flat_map(|digit| digit.to_be_bytes()).collect();
            let middle = &middle[middle.len() - (bits - 128) / 8..];
            assert_eq!(group.prime(), [&[0xff; 8], middle, &[0xff; 8]].concat());
        }
    }
}
