"""One Python function per PTX instruction that only the few-column kernel needs; nothing else. See `ptx.py`.

Clusters and programmatic launch need capability 9.0 (PTX ISA, "barrier.cluster", "mapa", "griddepcontrol").
"""

from __future__ import annotations

from numba.cuda import types

from .ptx import f32, instruction, u32, u64

__all__ = ["cluster_arrive", "cluster_wait", "cp_async_16_if", "cp_async_16_streamed", "grid_launch_dependents",
           "grid_wait", "high_halves", "ld_cluster_v4_f32_if", "ld_global_cg_v4_f32_if", "ld_global_nc_v4_if",
           "ld_shared_v4_f32_if", "low_halves",
           "min_u32", "rank_address", "st_global_u32", "st_global_v4_f32", "st_shared_v4_f32"]  # fmt: skip

_LOAD_IF = ("{{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; "
            "mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; @p ld.{}.v4.f32 {{$0,$1,$2,$3}}, [$4]; }}")  # fmt: skip
_F32X4, _U32X4 = types.UniTuple(f32, 4), types.UniTuple(u32, 4)

# --- clusters --------------------------------------------------------------------------------------------------------
cluster_arrive = instruction(
    "Arrive at the cluster's barrier; earlier writes become visible to its waiters.",
    "barrier.cluster.arrive.release.aligned;", (), "~{memory}")  # fmt: skip
cluster_wait = instruction(
    "Wait for every thread of the cluster to arrive.", "barrier.cluster.wait.acquire.aligned;", (), "~{memory}"
)
rank_address = instruction(
    "Address, in the cluster's shared window, that a shared address of this block has in the block of a rank.",
    "mapa.shared::cluster.u32 $0, $1, $2;", (u32, u32), "=r,r,r", u32, volatile=False)  # fmt: skip
ld_cluster_v4_f32_if = instruction(
    "Load 4 float32 from the shared memory of a block of the cluster if the last argument is not 0; zeros otherwise.",
    _LOAD_IF.format("shared::cluster"), (u32, u32), "=&f,=&f,=&f,=&f,r,r,~{memory}", _F32X4)  # fmt: skip

# --- programmatic launch ---------------------------------------------------------------------------------------------
grid_wait = instruction(
    "Wait until the kernels before this one in the stream are done and their writes visible.",
    "griddepcontrol.wait;", (), "~{memory}")  # fmt: skip
grid_launch_dependents = instruction(
    "Let the next kernel of the stream start, if it was launched to wait for this one by itself.",
    "griddepcontrol.launch_dependents;", (), "~{memory}")  # fmt: skip

# --- copies ----------------------------------------------------------------------------------------------------------
cp_async_16_streamed = {
    hint: instruction(
        "Copy 16 bytes from global to shared memory" + (f"; L2 fetches the {hint} bytes around them." if hint else "."),
        f"cp.async.cg.shared.global{f'.L2::{hint}B' if hint else ''} [$0], [$1], 16;", (u32, u64), "r,l,~{memory}")
    for hint in (0, 128, 256)
}  # fmt: skip
cp_async_16_if = instruction(
    "Copy 16 bytes from global to shared memory if the last argument is not 0.",
    "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.cg.shared.global [$0], [$1], 16; }",
    (u32, u64, u32), "r,l,r,~{memory}")  # fmt: skip

# --- plain loads and stores ------------------------------------------------------------------------------------------
ld_global_nc_v4_if = instruction(
    "Load 16 bytes of read-only data if the last argument is not 0; zeros otherwise.",
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; "
    "@p ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4]; }",
    (u64, u32), "=&r,=&r,=&r,=&r,l,r", _U32X4)  # fmt: skip
ld_global_cg_v4_f32_if = instruction(
    "Load 4 float32 from L2 if the last argument is not 0; zeros otherwise.",
    _LOAD_IF.format("global.cg"), (u64, u32), "=&f,=&f,=&f,=&f,l,r,~{memory}", _F32X4)  # fmt: skip
st_global_v4_f32 = instruction(
    "Store 4 float32.", "st.global.v4.f32 [$0], {$1,$2,$3,$4};", (u64, f32, f32, f32, f32), "l,f,f,f,f,~{memory}"
)
st_global_u32 = instruction("Store 4 bytes.", "st.global.u32 [$0], $1;", (u64, u32), "l,r,~{memory}")
ld_shared_v4_f32_if = instruction(
    "Load 4 float32 if the last argument is not 0; zeros otherwise.",
    _LOAD_IF.format("shared"), (u32, u32), "=&f,=&f,=&f,=&f,r,r,~{memory}", _F32X4)  # fmt: skip
st_shared_v4_f32 = instruction(
    "Store 4 float32.", "st.shared.v4.f32 [$0], {$1,$2,$3,$4};", (u32, f32, f32, f32, f32), "r,f,f,f,f,~{memory}"
)

# --- arithmetic ------------------------------------------------------------------------------------------------------
low_halves = instruction(
    "Lower halves of two words, the first in the lower half.", "prmt.b32 $0, $1, $2, 0x5410;", (u32, u32), "=r,r,r",
    u32,
    volatile=False)  # fmt: skip
high_halves = instruction(
    "Upper halves of two words, the first in the lower half.", "prmt.b32 $0, $1, $2, 0x7632;", (u32, u32), "=r,r,r",
    u32,
    volatile=False)  # fmt: skip
min_u32 = instruction("The lesser of two.", "min.u32 $0, $1, $2;", (u32, u32), "=r,r,r", u32, volatile=False)
