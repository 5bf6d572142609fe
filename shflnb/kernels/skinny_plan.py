"""The few-column product on Hopper: how its kernels are built, launch records, and what a call launches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..formats.shflbw import ShflBWMatrix
from .config import ceil_div
from .launch import DeviceContext, DeviceMemory, KernelSpec, LoadedKernel
from .queue import tile_queue
from .skinny_ahead import Successor, ahead_table, following
from .skinny_config import (
    EQUAL_LONG_TOKENS,
    EQUAL_TOKENS,
    FOURS,
    PACED,
    SHORT_TILES,
    TILE_K,
    TURN_IN_FEATURES,
    TURN_OUT_FEATURES,
    TURN_THREADS,
    SkinnyConfig,
    without_clusters,
)
from .skinny_select import choose_few
from .spmm_plan import DeviceWeights, device_weights, keep, problem_of, tuned_entries

__all__ = ["SkinnyPlan", "SkinnyRoad", "chosen_config", "equal_groups", "find_room", "kernel_spec", "launch_skinny",
           "skinny_plan", "turn_of_out", "turn_of_x", "turn_in_spec", "turn_out_spec", "weight_addresses"]  # fmt: skip

ARGUMENTS = 18


@dataclass(frozen=True)
class SkinnyPlan:
    """Everything about a product that does not depend on the arrays."""

    config: SkinnyConfig
    kernel: LoadedKernel
    launch_config: Any
    head: tuple[int, ...]
    """Addresses of values, columns, queue and rows."""
    memory: tuple[DeviceMemory, ...]
    """What lies there."""
    ahead: tuple[int, int]
    """Address and spans of the table of what its blocks read first."""
    equal: int = 0
    """What `equal_groups` says of its groups."""
    equal_tokens: int = 0
    """Columns up to which its blocks compute their records by it."""
    density: float = 1.0
    """Kept share of the columns of its groups."""
    successor: Successor = field(default_factory=Successor, compare=False)


@dataclass(frozen=True)
class SkinnyRoad:
    """What a call launches, but for addresses: the turn of x, the product, the turn of its result."""

    context: DeviceContext
    plan: SkinnyPlan
    turn_in: tuple[LoadedKernel, Any, int, int, int] | None
    """Kernel, its launch configuration, the token and feature strides of x and flags; None where the product takes x as
    it is."""
    turn_out: tuple[LoadedKernel, Any, int, int] | None
    """Kernel, its launch configuration, the token stride of out and whether it is aligned; None where the product
    stores to out itself."""
    n: int
    k: int
    m: int
    ldx: int
    """Distance of the rows of x, or of the x that was turned; of tokens where the product takes token-major x."""
    ot: int
    of: int
    """Token and feature stride of what the product stores to."""
    rt: int
    rf: int
    flags: int

    @property
    def work_values(self) -> tuple[int, int]:
        """16-bit values of the two workspaces: x turned, the result before it is turned."""
        return self.k * self.ldx if self.turn_in else 0, self.m * self.of if self.turn_out else 0


def kernel_spec(config: SkinnyConfig) -> KernelSpec:
    """How to build the kernel of a config."""

    def make() -> Any:
        from .skinny_wgmma import make_skinny_wgmma

        return make_skinny_wgmma(config)

    return KernelSpec(repr(config), config.name, "skinny_sm90", make, ARGUMENTS, config.threads, config.smem_bytes,
                      config.resident_blocks)  # fmt: skip


def turn_in_spec() -> KernelSpec:
    """How to build the kernel that turns x."""

    def make() -> Any:
        from .skinny_turn import make_turn_in

        return make_turn_in()

    return KernelSpec("shflnb_skinny_turn_in", "shflnb_skinny_turn_in", "turn", make, 8, TURN_THREADS)


def turn_out_spec() -> KernelSpec:
    """How to build the kernel that turns a result."""

    def make() -> Any:
        from .skinny_turn import make_turn_out

        return make_turn_out()

    return KernelSpec("shflnb_skinny_turn_out", "shflnb_skinny_turn_out", "turn", make, 7, TURN_THREADS)


def find_room(
    config: SkinnyConfig, groups: int, context: DeviceContext, stream: int
) -> tuple[SkinnyConfig, LoadedKernel, int]:
    """The config, its kernel and the clusters to launch; of one block each where the device has no room for more."""
    clusters = 0
    if config.ranks > 1:
        kernel = context.kernel(kernel_spec(config), stream)
        with context.current():
            clusters = kernel.max_clusters(config.ranks)
    if clusters == 0:  # one block each, also where a part of a device has no room for a cluster
        if config.ranks > 1:
            config = without_clusters(config)
        kernel = context.kernel(kernel_spec(config), stream)
        clusters = context.sm_count * config.blocks_per_sm
    return config, kernel, min(clusters, groups)


def chosen_config(packed: ShflBWMatrix, context: DeviceContext, n: int, layout: str, stream: int) -> SkinnyConfig:
    """The kernel for n columns of x of this layout, with the epilogue "plain"; found once for each n."""
    key = ("few choice", context.ordinal, n, layout)
    found: SkinnyConfig | None = packed.launch_cache.get(key)
    if found is None:
        weights = device_weights(packed, context, "sm90", TILE_K, stream)
        tiles, known = int(weights.counts.sum()), tuned_entries(packed, context.name)
        found = choose_few(problem_of(packed, n), tiles, context.sm_count, layout, known).config
        keep(packed, key, found)
    return found


def skinny_plan(
    packed: ShflBWMatrix, context: DeviceContext, config: SkinnyConfig, epilogue: str, stream: int
) -> SkinnyPlan:
    """The launch record of a kernel with an epilogue; built at the first call that takes it, then found again.

    Raises `CaptureError` when it would have to compile or upload while `stream` is captured.
    """
    key = ("skinny plan", context.ordinal, 8 * config.chunks, epilogue, config)
    plan: SkinnyPlan | None = packed.launch_cache.get(key)
    if plan is None:
        weights = device_weights(packed, context, "sm90", TILE_K, stream)
        groups = len(weights.counts)
        config = config.with_epilogue(epilogue).for_columns(packed.shape[1])
        config, kernel, clusters = find_room(config, groups, context, stream)
        queue, spans = _device_queue(packed, context, weights, config, clusters, stream)
        launch_config = kernel.config(clusters, cluster=config.ranks, is_chained=True)
        values, columns = weight_addresses(weights, config)
        rows = weights.memory.addresses[2]
        head = values, columns, queue.addresses[0], rows
        ahead = queue.addresses[1], spans
        equal = equal_groups(weights.first, weights.counts)
        is_long = config.blocks_per_sm == 1 and weights.counts.sum() >= SHORT_TILES * groups
        plan = SkinnyPlan(config, kernel, launch_config, head, (weights.memory, queue), ahead, equal,
                          EQUAL_LONG_TOKENS if is_long else EQUAL_TOKENS, problem_of(packed, 1).density)  # fmt: skip
        keep(packed, key, plan)
    return plan


def weight_addresses(weights: DeviceWeights, config: SkinnyConfig) -> tuple[int, int]:
    """Addresses of the values and of the column ids that a kernel reads."""
    addresses = weights.memory.addresses
    return addresses[0], addresses[1 if config.wide else 3]


def equal_groups(first: np.ndarray, counts: np.ndarray) -> int:
    """Where all groups have as many k tiles, and lie in order: that number and, above it, how many they are; else 0."""
    tiles, groups = int(counts[0]), len(counts)
    is_regular = (counts == tiles).all() and (first == tiles * np.arange(groups)).all()
    return groups << 32 | tiles if is_regular else 0


def _device_queue(
    packed: ShflBWMatrix, context: DeviceContext, weights: DeviceWeights, config: SkinnyConfig, clusters: int,
    stream: int,
) -> tuple[DeviceMemory, int]:  # fmt: skip
    """The work queue and the table of what is read first, on the device, and the table's spans."""
    key = ("skinny queue", id(weights), clusters, config.ranks)
    found: tuple[DeviceMemory, int] | None = packed.launch_cache.get(key)
    if found is None:
        context.refuse_capture(stream, "upload the work queue")
        queue = tile_queue(weights.first, weights.counts, 1, clusters, 1)
        addresses = np.array([weight_addresses(weights, config)], np.uint64)
        table = ahead_table(queue[0], addresses.repeat(clusters, 0), config)
        with context.current():
            found = packed.launch_cache[key] = DeviceMemory(context, [queue, table]), len(table)
    return found


def turn_of_x(
    context: DeviceContext, n: int, k: int, address: int, strides: tuple[int, int], stream: int
) -> tuple[LoadedKernel, Any, int, int, int]:
    """`SkinnyRoad.turn_in` for x of these token and feature strides."""
    token_stride, feature_stride = strides
    kernel = context.kernel(turn_in_spec(), stream)
    aligned = address % 8 == 0 and k % 4 == 0 and feature_stride == 1 and (n == 1 or token_stride % 4 == 0)
    launch_config = _turn_config(context, kernel, ceil_div(k, TURN_IN_FEATURES) * ceil_div(n, 8))
    return kernel, launch_config, token_stride, feature_stride, FOURS if aligned else 0


def turn_of_out(
    context: DeviceContext, n: int, m: int, address: int, token_stride: int, stream: int
) -> tuple[LoadedKernel, Any, int, int]:
    """`SkinnyRoad.turn_out` for a token-major result."""
    kernel = context.kernel(turn_out_spec(), stream)
    launch_config = _turn_config(context, kernel, ceil_div(m, TURN_OUT_FEATURES) * ceil_div(n, 8))
    return kernel, launch_config, token_stride, int(address % 16 == 0 and token_stride % 8 == 0)


def _turn_config(context: DeviceContext, kernel: LoadedKernel, units: int) -> Any:
    """As many blocks as there are units for, but no more than find room beside a product: they wait there."""
    return kernel.config(max(1, min(4 * context.sm_count, ceil_div(units, TURN_THREADS))), is_chained=True)


def launch_skinny(
    road: SkinnyRoad, stream: int, x: int, out: int, work: tuple[int, int], bias: int, residual: int
) -> None:
    """Enqueue what a call launches; all but the road are addresses, `work` those of its workspaces (0 for none)."""
    launch = road.context.launch
    n, k, m, pace = road.n, road.k, road.m, 0
    if road.turn_in is not None:
        kernel, launch_config, token_stride, feature_stride, flags = road.turn_in
        launch(stream, launch_config, kernel, x, token_stride, feature_stride, work[0], road.ldx, n, k, flags)
        x, pace = work[0], PACED
    plan, to = road.plan, work[1] if road.turn_out is not None else out
    after = following(plan, road.context, stream, is_turned=road.turn_in is not None)
    launch(stream, plan.launch_config, plan.kernel, *plan.head, x, to, bias, residual, n, road.ldx, road.ot, road.of,
           road.rt, road.rf, road.flags | pace, plan.equal if n <= plan.equal_tokens else 0,
           *((0, 0) if after is None else after.ahead))  # fmt: skip
    if road.turn_out is not None:
        turn, turn_config, token_stride, aligned = road.turn_out
        launch(stream, turn_config, turn, to, road.of, out, token_stride, n, m, aligned)
