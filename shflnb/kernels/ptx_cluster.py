"""One Python function per PTX instruction for clusters and programmatic launch, and what else only the few-column
kernels need; nothing else. See `ptx.py`.

Clusters and programmatic launch need capability 9.0 (PTX ISA, "barrier.cluster", "mapa", "st.async", "griddepcontrol").
"""

from __future__ import annotations

from numba.cuda import types

from .ptx import f32, instruction, u32, u64

__all__ = ["bulk_copy_g2s_hint", "bulk_prefetch_l2", "cluster_arrive_relaxed", "cluster_wait", "evict_first",
           "grid_launch_dependents", "grid_wait", "high_halves", "ld_global_l2_u16_below", "ld_global_u16_below",
           "ld_shared_f32", "low_halves", "nanosleep", "rank_address", "st_async_f32"]  # fmt: skip

# --- clusters --------------------------------------------------------------------------------------------------------
cluster_arrive_relaxed = instruction(
    "Arrive at the cluster's barrier without making earlier writes visible, but for initialised mbarriers.",
    "barrier.cluster.arrive.relaxed.aligned;", (), "~{memory}")  # fmt: skip
cluster_wait = instruction(
    "Wait for every thread of the cluster to arrive.", "barrier.cluster.wait.acquire.aligned;", (), "~{memory}"
)
rank_address = instruction(
    "Address, in the cluster's shared window, that a shared address of this block has in the block of a rank.",
    "mapa.shared::cluster.u32 $0, $1, $2;", (u32, u32), "=r,r,r", u32, volatile=False)  # fmt: skip
_st_async_f32 = instruction(
    "Send a float32 to the shared memory of a block of the cluster; it completes 4 bytes on a barrier there.",
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [$0], $1, [$2];", (u32, f32, u32),
    "r,f,r,~{memory}")  # fmt: skip
_st_async_v2_f32 = instruction(
    "Send 2 float32.", "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [$0], {$1,$2}, [$3];",
    (u32, f32, f32, u32), "r,f,f,r,~{memory}")  # fmt: skip
_st_async_v4_f32 = instruction(
    "Send 4 float32.", "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [$0], {$1,$2,$3,$4}, [$5];",
    (u32, f32, f32, f32, f32, u32), "r,f,f,f,f,r,~{memory}")  # fmt: skip
st_async_f32 = {1: _st_async_f32, 2: _st_async_v2_f32, 4: _st_async_v4_f32}

# --- programmatic launch ---------------------------------------------------------------------------------------------
grid_wait = instruction(
    "Wait until the kernels before this one in the stream are done and their writes visible.",
    "griddepcontrol.wait;", (), "~{memory}")  # fmt: skip
grid_launch_dependents = instruction(
    "Let the next kernel of the stream start, if it was launched to wait for this one by itself.",
    "griddepcontrol.launch_dependents;", (), "~{memory}")  # fmt: skip

# --- loads and arithmetic --------------------------------------------------------------------------------------------
_ld_shared_f32 = instruction("Load a float32.", "ld.shared.f32 $0, [$1];", (u32,), "=f,r,~{memory}", f32)
_ld_shared_v2_f32 = instruction(
    "Load 2 float32.", "ld.shared.v2.f32 {$0,$1}, [$2];", (u32,), "=f,=f,r,~{memory}", types.UniTuple(f32, 2)
)
_ld_shared_v4_f32 = instruction(
    "Load 4 float32.", "ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", (u32,), "=f,=f,=f,=f,r,~{memory}",
    types.UniTuple(f32, 4))  # fmt: skip
ld_shared_f32 = {1: _ld_shared_f32, 2: _ld_shared_v2_f32, 4: _ld_shared_v4_f32}
_U16_BELOW = "{{ .reg .pred p; setp.lt.u32 p, $2, $3; mov.u32 $0, 0; @p {} $0, [$1]; }}"
ld_global_u16_below = instruction(
    "Load 2 bytes, with zeros above them, if the second argument is below the third; else read nothing and give 0.",
    _U16_BELOW.format("ld.global.u16"), (u64, u32, u32), "=r,l,r,r,~{memory}", u32)  # fmt: skip
ld_global_l2_u16_below = instruction(
    "As `ld_global_u16_below`, past L1.",
    _U16_BELOW.format("ld.global.cg.u16"), (u64, u32, u32), "=r,l,r,r,~{memory}", u32)  # fmt: skip
evict_first = instruction(
    "L2 policy of data that are the first to leave.", "createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", (), "=l",
    u64)  # fmt: skip
bulk_copy_g2s_hint = instruction(
    "As `ptx.bulk_copy_g2s`, with an L2 policy.",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$0], [$1], $2, [$3], $4;",
    (u32, u64, u32, u32, u64), "r,l,r,r,l,~{memory}")  # fmt: skip
bulk_prefetch_l2 = instruction(
    "Fetch `bytes` (a multiple of 16, from a 16-byte boundary) from global memory into L2 with the copy engine.",
    "cp.async.bulk.prefetch.L2.global [$0], $1;", (u64, u32), "l,r,~{memory}")  # fmt: skip
nanosleep = instruction("Stand still for about so many nanoseconds.", "nanosleep.u32 $0;", (u32,), "r")
low_halves = instruction(
    "Lower halves of two words, the first in the lower half.", "prmt.b32 $0, $1, $2, 0x5410;", (u32, u32), "=r,r,r",
    u32, volatile=False)  # fmt: skip
high_halves = instruction(
    "Upper halves of two words, the first in the lower half.", "prmt.b32 $0, $1, $2, 0x7632;", (u32, u32), "=r,r,r",
    u32, volatile=False)  # fmt: skip
