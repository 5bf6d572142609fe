"""The few-column product on a device: weights in their layout, launch records, launches."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..formats.shflbw import ShflBWMatrix
from ..formats.skinny_layout import SkinnyLayout, to_skinny
from .launch import DeviceContext, DeviceMemory, KernelSpec, LoadedKernel
from .skinny_choice import PAIR_BYTES, SkinnyConfig, SkinnySplit, choose_config, choose_split, chunks_of, warps_of

__all__ = ["SkinnyPlan", "SkinnyWeights", "arrays_of", "kernel_spec", "make_plan", "out_flags", "run_skinny",
           "skinny_plan", "skinny_weights", "split_for", "sum_spec", "teams_of_ranks", "x_flags"]  # fmt: skip

ARGUMENTS = 19
HAS_RESIDUAL, TOKEN_CHUNKS, FEATURE_CHUNKS, OUT_PAIRS = (
    8,
    16,
    32,
    64,
)  # bits of the kernels' flags, as in epilogue.py and skinny_mma.py
_TEAMS: dict[tuple[int, int], dict[int, int]] = {}
_LOCK = threading.RLock()


@dataclass(frozen=True)
class SkinnyWeights:
    """A packed matrix in the few-column layout on a device; of the layout's arrays only the host's tables are kept."""

    memory: DeviceMemory
    layout: SkinnyLayout


@dataclass(frozen=True)
class SkinnyPlan:
    """Everything about a launch that does not change from call to call."""

    config: SkinnyConfig
    weights: SkinnyWeights
    kernels: tuple[tuple[LoadedKernel, Any], ...]
    """Kernels and their launch configurations, in order."""
    head: tuple[int, ...]
    tail: tuple[int, int]
    """The last two arguments: sizes of the layout."""
    work_bytes: int


def kernel_spec(config: SkinnyConfig, smem_limit: int) -> KernelSpec:
    """How to build the kernel of a config."""

    def make() -> Any:
        from .skinny_mma import make_skinny

        return make_skinny(config)

    blocks = config.blocks_per_sm if smem_limit >= PAIR_BYTES else 1
    return KernelSpec(repr(config), config.name, "skinny", make, ARGUMENTS, config.threads, smem_limit, blocks)


def sum_spec(config: SkinnyConfig) -> KernelSpec:
    """How to build the second kernel of finish="none"."""

    def make() -> Any:
        from .skinny_sum import make_skinny_sum

        return make_skinny_sum(config)

    return KernelSpec(repr(config) + " sum", config.name + "_sum", "skinny", make, ARGUMENTS, config.threads)


def teams_of_ranks(context: DeviceContext, v: int, stream: int) -> dict[int, int]:
    """How many teams of 1, 2, 4 and 8 blocks run at once on a device."""
    if context.capability[0] < 9:
        return {ranks: context.sm_count // ranks for ranks in (1, 2, 4, 8)}
    key = (context.ordinal, warps_of(v))
    found = _TEAMS.get(key)
    if found is None:
        spec = kernel_spec(SkinnyConfig(min(v, 64), 1, warps_of(v), 5), context.smem_limit)
        kernel = context.kernel(spec, stream)
        with context.current():
            found = {1: context.sm_count} | {ranks: kernel.max_clusters(ranks) for ranks in (2, 4, 8)}
        found = _TEAMS[key] = {ranks: teams for ranks, teams in found.items() if teams > 0}
    return found


def skinny_weights(packed: ShflBWMatrix, context: DeviceContext, stream: int, split: SkinnySplit) -> SkinnyWeights:
    """The layout of a packed matrix on a device; uploaded at the first call."""
    key = ("skinny weights", context.ordinal, split)
    found: SkinnyWeights | None = packed.launch_cache.get(key)
    if found is None:
        context.refuse_capture(stream, "upload the packed weights")
        with _LOCK:
            found = packed.launch_cache.get(key)
            if found is None:
                layout = to_skinny(packed, split.teams, split.ranks, split.warps, split.window)
                with context.current():
                    memory = DeviceMemory(context, arrays_of(layout))
                found = SkinnyWeights(memory, replace(layout, records=layout.records[:0]))
                packed.launch_cache[key] = found
    return found


def arrays_of(layout: SkinnyLayout) -> list[np.ndarray]:
    """What goes to the device, in the order `make_plan` expects."""
    return [layout.records, layout.warps, layout.windows[1], layout.windows[0], layout.team_table, layout.rows]


def split_for(packed: ShflBWMatrix, context: DeviceContext, n: int, stream: int) -> SkinnySplit:
    """The split for n columns of a packed matrix on a device."""
    teams = teams_of_ranks(context, packed.v, stream)
    return choose_split(-(-packed.counts // 16), packed.shape[1], packed.v, teams, context.smem_limit, chunks_of(n))


def skinny_plan(packed: ShflBWMatrix, context: DeviceContext, n: int, epilogue: str, stream: int) -> SkinnyPlan:
    """The launch record for n columns; one for every 8, 16, 32 or 64."""
    key = ("skinny plan", context.ordinal, chunks_of(n), epilogue)
    plan: SkinnyPlan | None = packed.launch_cache.get(key)
    if plan is None:
        weights = skinny_weights(packed, context, stream, split_for(packed, context, n, stream))
        finish = "block" if weights.layout.ranks == 1 else "cluster" if context.has_chaining else "none"
        config, is_merged = choose_config(
            weights.layout, n, packed.dtype, context.smem_limit, finish, context.has_chaining
        )
        plan = make_plan(weights, context, config.with_epilogue(epilogue), is_merged, stream)
        packed.launch_cache[key] = plan
    return plan


def make_plan(
    weights: SkinnyWeights, context: DeviceContext, config: SkinnyConfig, is_merged: bool, stream: int
) -> SkinnyPlan:
    """The launch record of a config."""
    layout = weights.layout
    kernel = context.kernel(kernel_spec(config, context.smem_limit), stream)
    rows, blocks, words = layout.window_rows(is_merged), layout.teams * layout.ranks, layout.team_table.shape[1]
    size = config.smem_bytes(rows, layout.slots, words)
    cluster = layout.ranks if config.finish == "cluster" else 1
    kernels = [
        (kernel, kernel.config(blocks // cluster, cluster=cluster, smem_bytes=size, is_chained=config.is_chained))
    ]
    if config.finish == "none":
        second = context.kernel(sum_spec(config), stream)
        kernels.append((second, second.config(blocks, smem_bytes=4 * words)))
    records, warps, merged, phased, *rest = weights.memory.addresses
    head = (records, warps, merged if is_merged else phased, *rest)
    shape = layout.ranks | layout.phases << 16 | config.place_rows(rows) << 32 | layout.slots << 48
    work = blocks * layout.slots * config.slot_bytes if config.slots == "global" else 0
    return SkinnyPlan(config, weights, tuple(kernels), head, (shape, words), work)


def x_flags(address: int, token_stride: int, feature_stride: int, n: int) -> int:
    """How x may be read 16 bytes at a time, as bits of the kernel's flags."""
    if address % 16:
        return 0
    if feature_stride == 1 and (n == 1 or token_stride % 8 == 0):
        return TOKEN_CHUNKS
    if token_stride == 1 and feature_stride % 8 == 0:
        return FEATURE_CHUNKS
    return 0


def out_flags(address: int, token_stride: int, feature_stride: int) -> int:
    """How two neighbouring tokens of out may be stored at once, as bits of the kernel's flags."""
    return OUT_PAIRS if token_stride == 1 and feature_stride % 2 == 0 and address % 4 == 0 else 0


def run_skinny(
    call: Any,
    x_address: int,
    token_stride: int,
    feature_stride: int,
    n: int,
    out_address: int,
    out_token_stride: int,
    out_feature_stride: int,
    bias: tuple[int, int] = (0, 0),
    residual: tuple[int, int, int] = (0, 0, 0),
    activation: str | None = None,
) -> SkinnyPlan:
    """out[t, f] = activation(sum_c W[f, c] x[t, c] + bias[f]) + residual[t, f] for n <= 64 tokens; strides in values.

    `call` has `packed`, `context`, `stream_handle` and `workspace`; bias is (address, flags), residual (address,
    token stride, feature stride). No alignment is needed; 16-byte aligned x is read faster.
    """
    plain = activation is None and not bias[0] and not residual[0]
    plan = skinny_plan(call.packed, call.context, n, "plain" if plain else activation or "identity", call.stream_handle)
    flags = bias[1] | (HAS_RESIDUAL if residual[0] else 0)
    flags |= x_flags(x_address, token_stride, feature_stride, n) | out_flags(
        out_address, out_token_stride, out_feature_stride
    )
    work, owner = 0, None
    if plan.work_bytes:
        work, _, owner = call.workspace(1, plan.work_bytes // 2)
    sizes = n | flags << 16 | call.packed.shape[1] << 32
    for kernel, launch_config in plan.kernels:
        call.context.launch(call.stream_handle, launch_config, kernel, *plan.head, x_address, out_address, bias[0],
                            residual[0], work, token_stride, feature_stride, out_token_stride, out_feature_stride,
                            residual[1], residual[2], sizes, *plan.tail)  # fmt: skip
    del owner
    return plan
