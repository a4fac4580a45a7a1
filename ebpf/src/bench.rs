//! Two programs that only the relay's bench loads: one that sends, one that receives.
//!
//! They lie in the committed object, so that the bench needs no compiler for them either.

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_TX};
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::XdpContext;
use postern_steer_maps::BENCH_HEAD_LEN;

#[map]
static BENCH_HEAD: Array<[u64; BENCH_HEAD_LEN / 8]> = Array::with_max_entries(1, 0);

/// Sends every frame that the kernel is told to run it with (`BPF_F_TEST_XDP_LIVE_FRAMES`) out of the interface that the
/// frame is said to have come in by. The kernel uses the memory of a frame again as the last receiver left it, so the
/// headers are written anew.
#[xdp]
pub fn bench_send(ctx: XdpContext) -> u32 {
    let Some(head) = BENCH_HEAD.get(0) else {
        return XDP_ABORTED;
    };
    let to = ctx.data();
    if to + BENCH_HEAD_LEN > ctx.data_end() {
        return XDP_ABORTED;
    }
    // SAFETY: inside the frame; the kernel lays frames of a test run at multiples of 64 bytes.
    unsafe { *(to as *mut [u64; BENCH_HEAD_LEN / 8]) = *head };
    XDP_TX
}

/// Takes frames off an interface, which counts them as received.
#[xdp]
pub fn bench_sink(_ctx: XdpContext) -> u32 {
    XDP_DROP
}
