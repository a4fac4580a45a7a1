//! Loops of independent instructions, for the bench: how many cycles the processor takes for each at best, and for the
//! mixture that a kernel on 256-bit vectors is made of. So a kernel's figure can be seen beside what is possible.

use core::arch::asm;

/// A loop's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pipe {
    /// Four multiplications, each waiting for the one before: 12 cycles on every processor of the last ten years, which
    /// makes a clock of it.
    Clock,
    /// 12 times VAESENC on 256 bits.
    Aes,
    /// 12 times VPCLMULQDQ on 256 bits.
    Clmul,
    /// What 8 blocks of AES-128-GCM need of these two: 40 times VAESENC and, with Karatsuba's trick and one reduction, 14
    /// times VPCLMULQDQ.
    Chunk,
}

impl Pipe {
    /// Runs the loop `rounds` times. `false` when the processor has not the instructions.
    pub fn run(self, rounds: u64) -> bool {
        if crate::Kernel::new(crate::Level::Vaes256).is_err() {
            return false;
        }
        let rounds = rounds.max(1);
        // JUSTIFICATION: a compiler would drop instructions without a use.
        // SAFETY: the processor has the instructions, as was asked above; nothing is touched but the registers named.
        unsafe {
            match self {
                Self::Clock => asm!(
                    "2:",
                    "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}",
                    "dec {n}",
                    "jnz 2b",
                    x = inout(reg) 3u64 => _,
                    n = inout(reg) rounds => _,
                    options(nomem, nostack)
                ),
                Self::Aes => asm!(
                    "2:",
                    ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11",
                    "vaesenc ymm\\r, ymm\\r, ymm15",
                    ".endr",
                    "dec {n}",
                    "jnz 2b",
                    "vzeroupper",
                    n = inout(reg) rounds => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm15") _,
                    options(nomem, nostack)
                ),
                Self::Clmul => asm!(
                    "2:",
                    ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11",
                    "vpclmulqdq ymm\\r, ymm14, ymm15, 0",
                    ".endr",
                    "dec {n}",
                    "jnz 2b",
                    "vzeroupper",
                    n = inout(reg) rounds => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm14") _, out("xmm15") _,
                    options(nomem, nostack)
                ),
                Self::Chunk => asm!(
                    "2:",
                    ".rept 5",
                    ".irp r, 0,1,2,3,4,5,6,7",
                    "vaesenc ymm\\r, ymm\\r, ymm15",
                    ".ifeq (\\r - 1) * (\\r - 4)",
                    "vpclmulqdq ymm8, ymm14, ymm15, 0",
                    ".endif",
                    ".endr",
                    ".endr",
                    ".irp r, 9,10,11,12",
                    "vpclmulqdq ymm\\r, ymm14, ymm15, 0",
                    ".endr",
                    "dec {n}",
                    "jnz 2b",
                    "vzeroupper",
                    n = inout(reg) rounds => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm14") _, out("xmm15") _,
                    options(nomem, nostack)
                ),
            }
        }
        true
    }

    /// What the loop has of the instruction that it measures; of the chunk, one.
    pub const fn instructions(self) -> u32 {
        match self {
            Self::Clock | Self::Aes | Self::Clmul => 12,
            Self::Chunk => 1,
        }
    }
}
