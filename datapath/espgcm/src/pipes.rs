//! Loops of independent instructions, for the bench: how many cycles the processor takes for each at best, and for the
//! mixture that a kernel is made of. So a kernel's figure can be seen beside what is possible.

use core::arch::asm;

use crate::{Kernel, Level};

/// A loop's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pipe {
    /// Twelve multiplications, each waiting for the one before: three cycles each on every processor of the last ten years,
    /// which makes a clock of it.
    Clock,
    /// 12 times VAESENC.
    Aes,
    /// 12 times VPCLMULQDQ.
    Clmul,
    /// What four vectors of AES-128-GCM need of these two: 40 times VAESENC and, with Karatsuba's trick and one reduction,
    /// 14 times VPCLMULQDQ.
    Chunk,
}

/// A loop of `$line`s.
macro_rules! run {
    ($rounds:ident, $($line:expr),+) => {
        asm!(
            "2:",
            $($line,)+
            "dec {n}",
            "jnz 2b",
            "vzeroupper",
            n = inout(reg) $rounds => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm14") _, out("xmm15") _,
            options(nomem, nostack)
        )
    };
}

/// The loops with registers of one width.
macro_rules! loops {
    ($pipe:expr, $rounds:ident, $vector:literal) => {
        match $pipe {
            Pipe::Clock => asm!(
                "2:",
                "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}",
                "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}",
                "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}", "imul {x}, {x}",
                "dec {n}",
                "jnz 2b",
                x = inout(reg) 3u64 => _,
                n = inout(reg) $rounds => _,
                options(nomem, nostack)
            ),
            Pipe::Aes => run!(
                $rounds,
                ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11",
                concat!("vaesenc ", $vector, "mm\\r, ", $vector, "mm\\r, ", $vector, "mm15"),
                ".endr"
            ),
            Pipe::Clmul => run!(
                $rounds,
                ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11",
                concat!("vpclmulqdq ", $vector, "mm\\r, ", $vector, "mm14, ", $vector, "mm15, 0"),
                ".endr"
            ),
            Pipe::Chunk => run!(
                $rounds,
                ".rept 5",
                ".irp r, 0,1,2,3,4,5,6,7",
                concat!("vaesenc ", $vector, "mm\\r, ", $vector, "mm\\r, ", $vector, "mm15"),
                ".ifeq (\\r - 1) * (\\r - 4)",
                concat!("vpclmulqdq ", $vector, "mm8, ", $vector, "mm14, ", $vector, "mm15, 0"),
                ".endif",
                ".endr",
                ".endr",
                ".irp r, 9,10,11,12",
                concat!("vpclmulqdq ", $vector, "mm\\r, ", $vector, "mm14, ", $vector, "mm15, 0"),
                ".endr"
            ),
        }
    };
}

impl Pipe {
    /// Runs the loop `rounds` times on the vectors of `level`. `false` when the processor has not the instructions.
    pub fn run(self, level: Level, rounds: u64) -> bool {
        if Kernel::new(level).is_err() {
            return false;
        }
        let rounds = rounds.max(1);
        // JUSTIFICATION: a compiler would drop instructions without a use.
        // SAFETY: the processor has the instructions, as was asked above; nothing is touched but the registers named.
        unsafe {
            if level == Level::Vaes512 {
                loops!(self, rounds, "z");
            } else {
                loops!(self, rounds, "y");
            }
        }
        true
    }

    /// What the loop has of the instruction that it measures; of the clock, cycles; of the chunk, one.
    pub const fn instructions(self) -> u32 {
        match self {
            // Three cycles each.
            Self::Clock => 36,
            Self::Aes | Self::Clmul => 12,
            Self::Chunk => 1,
        }
    }
}
