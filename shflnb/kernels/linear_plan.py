"""The token-major product in one launch (`linear_sm90.py`): when it can run, its launch record, and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..formats.shflbw import ShflBWMatrix
from .config import Config, ceil_div
from .launch import DeviceContext, LoadedKernel
from .spmm_plan import device_queue, device_weights, keep, kernel_spec

__all__ = ["TurnedPlan", "fits", "launch_turned", "turned_plan", "work_values"]


@dataclass(frozen=True)
class TurnedPlan:
    """Everything about such a launch that does not change from call to call."""

    context: DeviceContext
    kernel: LoadedKernel
    launch_config: Any
    head: tuple[int, ...]
    """Addresses of values, columns, queue and rows."""
    n: int
    k: int
    m: int
    groups: int
    sweeps: int
    ld: int
    """Leading dimension of both workspaces."""


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
    n_tiles, grid = ceil_div(n, config.tile_n), context.sm_count
    queue = device_queue(packed, context, weights, (n_tiles, grid, min(config.sweep // config.tile_n, n_tiles)), stream)
    values, columns, rows = weights.memory.addresses
    plan = TurnedPlan(
        context, kernel, kernel.config(grid, is_cooperative=True), (values, columns, queue.addresses[0], rows),
        n, k, m, len(weights.counts), ceil_div(n, config.sweep), ceil_div(n, 8) * 8,
    )  # fmt: skip
    keep(packed, key, plan)
    return plan


def work_values(plan: TurnedPlan) -> tuple[int, int]:
    """16-bit values of the two workspaces: x turned, and the product with two counters a sweep behind it."""
    return plan.k * plan.ld, plan.m * plan.ld + 4 * plan.sweeps


def launch_turned(plan: TurnedPlan, stream: int, x: tuple[int, int], out: tuple[int, int], work: tuple[int, int],
                  bias: tuple[int, int]) -> None:  # fmt: skip
    """Enqueue the product; x and out are (address, token stride), bias (address, flags).

    work is the addresses of the two workspaces, 16-byte aligned.
    """
    turned, product = work
    counters = product + 2 * plan.m * plan.ld
    plan.context.clear(stream, counters, 2 * plan.sweeps)
    plan.context.launch(
        stream, plan.launch_config, plan.kernel, *plan.head, counters, plan.sweeps, *x, turned, product, plan.ld, *out,
        bias[0], plan.n, plan.k, plan.m, plan.groups, bias[1],
    )  # fmt: skip
