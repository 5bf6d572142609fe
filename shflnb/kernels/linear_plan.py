"""The token-major product in one launch (`linear_sm90.py`): when it can run, its launch record, and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats.shflbw import ShflBWMatrix
from .config import Config, ceil_div
from .launch import DeviceContext, DeviceMemory, LoadedKernel
from .moves import UNIT_COLS, add_sweeps, plan_moves
from .queue import tile_queue
from .spmm_plan import device_weights, keep, kernel_spec

__all__ = ["TurnedPlan", "fits", "launch_turned", "turned_plan"]

TOKENS_OF_A_SWEEP = 512  # x of a sweep (4 MiB at k = 4096) and its results stay inside L2 between two kernels' halves


@dataclass(frozen=True)
class TurnedPlan:
    """Everything about such a launch that does not change from call to call."""

    context: DeviceContext
    kernel: LoadedKernel
    launch_config: Any
    head: tuple[int, ...]
    """Addresses of values, columns, queue, rows and moves."""
    counters_at: int
    """The counters as they are before a launch; every call copies them."""
    counter_bytes: int
    sweeps: int
    ld: int
    """Leading dimension of both workspaces."""
    turned_values: int
    product_values: int
    """16-bit values of the workspaces; the counters follow the product."""
    owners: tuple[Any, ...]
    """What keeps the addresses valid."""


def fits(shape: tuple[int, int], n: int, x: tuple[int, int, int], out: tuple[int, int, int]) -> bool:
    """Whether the kernel can take x and out, (address, token stride, feature stride) each."""
    m, k = shape
    if min(m, k, n) < 1 or m % 8 or k % 8 or n >= 2**31:
        return False
    return all(at % 16 == 0 and stride % 8 == 0 and feature == 1 for at, stride, feature in (x, out))


def turned_plan(packed: ShflBWMatrix, context: DeviceContext, n: int, config: Config, stream: int) -> TurnedPlan:
    """The launch record for n tokens; built at the first call with this n, then found again.

    Raises `CaptureError` when it would have to compile or upload while `stream` is captured.
    """
    key = ("plan", context.ordinal, n, "turned", config)
    plan: TurnedPlan | None = packed.launch_cache.get(key)
    if plan is not None:
        return plan
    m, k = packed.shape
    kernel = context.kernel(kernel_spec(config), stream)
    weights = device_weights(packed, context, config.kernel, config.tile_k, stream)
    context.refuse_capture(stream, "upload the work queue")
    n_tiles, grid = ceil_div(n, config.tile_n), context.sm_count
    sweep = max(1, TOKENS_OF_A_SWEEP // config.tile_n, UNIT_COLS // config.tile_n)
    queue = tile_queue(weights.first, weights.counts, n_tiles, grid, min(sweep, n_tiles))
    moves = plan_moves(m, k, n, len(weights.counts), config.tile_n, sweep, grid)
    with context.current():
        memory = DeviceMemory(context, [add_sweeps(queue, sweep), moves.records, moves.counters])
    values, columns, rows = weights.memory.addresses
    queue_at, moves_at, counters_at = memory.addresses
    ld = ceil_div(n, 8) * 8
    plan = TurnedPlan(
        context, kernel, kernel.config(grid, is_cooperative=True), (values, columns, queue_at, rows, moves_at),
        counters_at, moves.counters.nbytes, moves.counters.shape[1], ld, k * ld, m * ld, (weights, memory),
    )  # fmt: skip
    keep(packed, key, plan)
    return plan


def launch_turned(plan: TurnedPlan, stream: int, x: tuple[int, int], out: tuple[int, int], work: tuple[int, int],
                  bias: tuple[int, int], sizes: tuple[int, int, int]) -> None:  # fmt: skip
    """Enqueue the product; x and out are (address, token stride), work the addresses of the two workspaces.

    bias is (address, flags), sizes (n, k, m).
    """
    turned, product = work
    counters = product + 2 * plan.product_values
    plan.context.copy(stream, counters, plan.counters_at, plan.counter_bytes)
    plan.context.launch(stream, plan.launch_config, plan.kernel, *plan.head, counters, plan.sweeps, *x, turned, product,
                        plan.ld, *out, bias[0], *sizes, bias[1])  # fmt: skip


def work_values(plan: TurnedPlan) -> tuple[int, int]:
    """16-bit values that a caller allocates for the two workspaces, the counters among them."""
    return plan.turned_values, plan.product_values + int(np.ceil(plan.counter_bytes / 2))
