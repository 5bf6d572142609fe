"""Launch records of the product: how kernels are built, weights and work queues on a device, and a plan for every n.

Plans, weights and queues are kept in the packed matrix's `launch_cache`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..formats.layout import KernelLayout, to_mma, to_wgmma
from ..formats.shflbw import ShflBWMatrix
from .config import Config, Problem, ceil_div
from .launch import DeviceContext, DeviceMemory, KernelSpec, LoadedKernel
from .queue import tile_queue
from .remembered import load as remembered_entries
from .select import Choice, choose, linear_tokens, sweep_of
from .skinny_config import NARROW_K, TILE_K
from .transpose_config import COPY_THREADS, TRANSPOSE_THREADS, transpose_grid, transpose_smem

__all__ = ["DeviceWeights", "Plan", "copy_spec", "device_queue", "device_weights", "drop_plans", "keep", "kernel_spec",
           "plan_for", "problem_of", "tokens_at_once", "transpose_launch", "transpose_spec",
           "tuned_entries", "weight_copies"]  # fmt: skip

PLANS_KEPT = 1024  # launch records a packed matrix keeps; a model whose batch changes at every call stays bounded
NO_ROW = np.uint32(0xFFFFFFFF)
_BUILD_LOCK = threading.RLock()


@dataclass(frozen=True)
class DeviceWeights:
    """A packed matrix in a kernel's layout on a device."""

    memory: DeviceMemory
    """Values, columns and rows, as the kernels take them; where the few-column kernel reads them, also the columns in 2
    bytes each, -1 as 0xFFFF, unless there are too many (`NARROW_K`)."""
    first: np.ndarray
    counts: np.ndarray
    """First k tile and number of k tiles of each group."""


@dataclass(frozen=True)
class Plan:
    """Everything about a launch that does not change from call to call."""

    choice: Choice
    kernel: LoadedKernel
    launch_config: Any
    weights: DeviceWeights
    queue: DeviceMemory
    head: tuple[int, ...]
    """Addresses of values, columns, queue and rows."""


def kernel_spec(config: Config) -> KernelSpec:
    """How to build the kernel of a config."""

    def make() -> Any:
        if config.kernel == "sm90":
            from .spmm_sm90 import make_spmm_sm90

            return make_spmm_sm90(config)
        from .spmm_sm80 import make_spmm_sm80

        return make_spmm_sm80(config)

    return KernelSpec(
        repr(config), config.name, config.kernel, make, 13, config.threads, config.smem_bytes, config.blocks_per_sm
    )


def transpose_spec(is_chained: bool, adds: str = "") -> KernelSpec:
    """How to build the transpose kernel; with a dtype `adds` the one that adds a matrix to what it has turned."""

    def make() -> Any:
        from .transpose import make_transpose

        return make_transpose(is_chained, adds)

    name = f"shflnb_transpose{f'_add_{adds}' if adds else ''}{'_chained' if is_chained else ''}"
    arguments, smem = 10 if adds else 8, transpose_smem(bool(adds))
    return KernelSpec(name, name, "transpose", make, arguments, TRANSPOSE_THREADS, smem)


def transpose_launch(
    context: DeviceContext, stream: int, rows: int, cols: int, adds: str = ""
) -> tuple[LoadedKernel, Any, int]:
    """The transpose kernel, its launch configuration and its `at_once` for a (rows, cols) matrix; kept by the context,
    for the configuration takes as long to make as to launch.
    """
    found: tuple[LoadedKernel, Any, int] | None = context.transposes.get((rows, cols, adds))
    if found is None:
        kernel = context.kernel(transpose_spec(context.has_chaining, adds), stream)
        blocks, at_once = transpose_grid(context.sm_count, context.smem_limit, rows, cols, kernel.spec.smem_bytes)
        found = kernel, kernel.config(blocks, is_chained=context.has_chaining), at_once
        if len(context.transposes) >= PLANS_KEPT:
            context.transposes.clear()
        context.transposes[rows, cols, adds] = found
    return found


def copy_spec() -> KernelSpec:
    """How to build the kernel that copies between any strides."""

    def make() -> Any:
        from .transpose import make_copy_strided

        return make_copy_strided()

    return KernelSpec("copy_strided", "shflnb_copy_strided", "copy", make, 9, COPY_THREADS)


def problem_of(packed: ShflBWMatrix, n: int, epilogue: str = "plain") -> Problem:
    """The product of a packed matrix with n columns, as the selection sees it."""
    m, k = packed.shape
    lengths = np.diff(packed.indptr)
    return Problem(m, k, n, packed.block[0], packed.dtype, int(packed.indptr[-1]), int(lengths.max(initial=0)),
                   epilogue)  # fmt: skip


def tuned_entries(packed: ShflBWMatrix, device_name: str) -> dict[str, dict[str, Any]]:
    """What was measured on a device: what the user's cache has, and before it what was measured for this matrix."""
    return {**remembered_entries(device_name), **packed.launch_cache.get("tuned", {})}


def tokens_at_once(packed: ShflBWMatrix, context: DeviceContext, n: int) -> int:
    """Tokens of a token-major product that are turned, multiplied and turned back at a time."""
    return linear_tokens(problem_of(packed, n), context.capability, context.sm_count, context.l2_bytes)


def _kernel_arrays(layout: KernelLayout, packed: ShflBWMatrix) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """([values, columns, rows], first k tile, k tiles) of a layout; an empty group gets a tile of padding."""
    counts = np.diff(layout.tile_ptr).astype(np.int64)
    first = layout.tile_ptr[:-1].astype(np.int64)
    values, columns = layout.values, layout.columns
    if (counts == 0).any():
        first = np.where(counts == 0, layout.tiles, first)
        counts = np.maximum(counts, 1)
        values = np.concatenate([values, np.zeros(layout.tile_k * layout.v, values.dtype)])
        columns = np.concatenate([columns, np.full(layout.tile_k, -1, np.int32)])
    rows = np.full(len(counts) * layout.v, NO_ROW, np.uint32)
    rows[: packed.shape[0]] = packed.row_perm
    return [values.view(np.uint16), columns, rows], first, counts


def _arrays_for(packed: ShflBWMatrix, kernel: str, tile_k: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """As `_kernel_arrays`, in the layout of a kernel, "sm90" or "sm80"."""
    arrays, first, counts = _kernel_arrays((to_wgmma if kernel == "sm90" else to_mma)(packed, tile_k), packed)
    if kernel == "sm90" and tile_k == TILE_K and packed.shape[1] <= NARROW_K:
        arrays.append(arrays[1].astype(np.uint16))
    return arrays, first, counts


def device_weights(
    packed: ShflBWMatrix, context: DeviceContext, kernel: str, tile_k: int, stream: int
) -> DeviceWeights:
    """The packed matrix in the layout of a kernel ("sm90" or "sm80") and tile_k; uploaded at the first call."""
    key = ("weights", context.ordinal, kernel, tile_k)
    found = packed.launch_cache.get(key)
    if found is None:
        context.refuse_capture(stream, "upload the packed weights")
        with _BUILD_LOCK:
            found = packed.launch_cache.get(key)
            if found is None:
                arrays, first, counts = _arrays_for(packed, kernel, tile_k)
                with context.current():
                    found = packed.launch_cache[key] = DeviceWeights(DeviceMemory(context, arrays), first, counts)
    return found


def weight_copies(
    packed: ShflBWMatrix, context: DeviceContext, kernel: str, tile_k: int, count: int
) -> list[ShflBWMatrix]:
    """So many matrices equal to this one, each with its own device memory in the layout of a kernel.

    For measuring with weights that no cache holds.
    """
    arrays, first, counts = _arrays_for(packed, kernel, tile_k)
    copies = [replace(packed) for _ in range(count)]
    for copy in copies:
        with context.current():
            weights = DeviceWeights(DeviceMemory(context, arrays), first, counts)
        copy.launch_cache["weights", context.ordinal, kernel, tile_k] = weights
    return copies


def device_queue(
    packed: ShflBWMatrix, context: DeviceContext, weights: DeviceWeights, shape: tuple[int, int, int], stream: int
) -> DeviceMemory:
    """The work queue for (column tiles, grid, sweep), shared by every n that has as many column tiles."""
    key = ("queue", id(weights), shape)
    found: DeviceMemory | None = packed.launch_cache.get(key)
    if found is None:
        context.refuse_capture(stream, "upload the work queue")
        with context.current():
            found = DeviceMemory(context, [tile_queue(weights.first, weights.counts, *shape)])
        packed.launch_cache[key] = found
    return found


def plan_for(
    packed: ShflBWMatrix, context: DeviceContext, n: int, epilogue: str, stream: int, config: Config | None = None
) -> Plan:
    """The launch record for n columns; built at the first call with this n, then found again.

    Raises `CaptureError` when it would have to compile or upload while `stream` is captured.
    """
    key = ("plan", context.ordinal, n, epilogue, config)
    plan: Plan | None = packed.launch_cache.get(key)
    if plan is None:
        problem = problem_of(packed, n, epilogue)
        if config is None:
            known = tuned_entries(packed, context.name)
            choice = choose(problem, context.capability, context.sm_count, context.name, known)
        else:
            choice = choose(problem, context.capability, context.sm_count, only=[config])
        chosen = choice.config.with_epilogue(epilogue)
        kernel = context.kernel(kernel_spec(chosen), stream)
        weights = device_weights(packed, context, chosen.kernel, chosen.tile_k, stream)
        n_tiles = ceil_div(n, chosen.tile_n)
        tiles = len(weights.counts) * n_tiles
        grid = min(context.sm_count * chosen.blocks_per_sm, tiles) if chosen.kernel == "sm90" else tiles
        memory = device_queue(packed, context, weights, (n_tiles, grid, sweep_of(chosen, problem)), stream)
        values, columns, rows = weights.memory.addresses[:3]
        launch_config = kernel.config(grid, is_chained=chosen.kernel == "sm90")
        plan = Plan(choice, kernel, launch_config, weights, memory, (values, columns, memory.addresses[0], rows))
        keep(packed, key, plan)
    return plan


def keep(packed: ShflBWMatrix, key: Any, record: Any) -> None:
    """Keep a plan, memo or choice, after dropping all of them where they have become many."""
    if len(packed.launch_cache) > PLANS_KEPT:
        drop_plans(packed)
    packed.launch_cache[key] = record


def drop_plans(packed: ShflBWMatrix) -> None:
    """Forget plans, memos and choices of kernels, which are cheap to make again.

    Weights and queues stay, since a captured graph may hold their addresses; so do the plans for few columns, which
    hold for it what their products fetch ahead.
    """
    for key in list(packed.launch_cache):  # a copy made in one step: other threads may be adding to it
        if key[0] in ("plan", "memo", "few choice"):
            packed.launch_cache.pop(key, None)
