"""The few-column product of several packed matrices with the same x, in one launch: q, k and v; gate and up.

    out_i = activation_i(W_i @ x + bias_i)          for every part i, one behind the other in one allocation

A launch costs about 2.4 us beside the bytes of its weights, and a second one as much again. Nothing is copied for it:
the matrices lie where they lie for their own products, and the records of the queue say where. What is made here is
that queue, of the groups of all parts, and a table with a record for each part (see `skinny_wgmma.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..formats.shflbw import ShflBWMatrix
from .config import ceil_div
from .launch import DeviceContext, DeviceMemory
from .queue import tile_queue
from .skinny_ahead import ahead_table
from .skinny_config import ACTIVATED, TILE_K, choose_config, room_for, takes_tokens
from .skinny_plan import SkinnyPlan, SkinnyRoad, find_room, turn_of_x, weight_addresses
from .spmm_plan import device_weights

__all__ = ["Part", "Parts", "part_queue", "part_table"]


@dataclass(frozen=True)
class Part:
    """One of the matrices, and what is done with its results."""

    packed: ShflBWMatrix
    bias: int = 0
    """Address of the bias, and its flags, as `operands.check_bias` gives them."""
    bias_flags: int = 0
    is_activated: bool = False


def part_table(parts: Sequence[Part], rows: Sequence[int]) -> np.ndarray:
    """The table of `skinny_exchange.make_own_place`: uint32, (parts, 8); `rows`: addresses of the parts' rows."""
    table = np.zeros((len(parts), 8), np.uint32)
    table[:, :4] = np.array([(at, part.bias) for at, part in zip(rows, parts, strict=True)], np.uint64).view(np.uint32)
    sizes = [part.packed.shape[0] for part in parts]
    table[:, 4] = np.cumsum([0, *sizes[:-1]])
    table[:, 5] = sizes
    table[:, 6] = [part.bias_flags | (ACTIVATED if part.is_activated else 0) for part in parts]
    return table


def part_queue(
    tiles: Sequence[tuple[np.ndarray, np.ndarray]], addresses: Sequence[tuple[int, int]], clusters: int
) -> np.ndarray:
    """The queue for so many clusters: uint32, (turns, clusters, 8).

    A record is (group, first k tile, k tiles, part, address of values, address of columns); without tiles, anything.

    Parameters
    ----------
    tiles : for each part (first k tile, k tiles) of its groups
    addresses : for each part those of its values and columns
    """
    groups = [len(counts) for _, counts in tiles]
    first, counts = (np.concatenate(arrays) for arrays in zip(*tiles, strict=True))
    records = tile_queue(first, counts, 1, clusters, 1)
    part = np.repeat(np.arange(len(tiles)), groups)[records[..., 0]]
    begin = np.cumsum([0, *groups[:-1]])
    queue = np.empty((*records.shape[:2], 8), np.uint32)
    queue[..., :4] = records
    queue[..., 0] -= begin[part].astype(np.uint32)
    queue[..., 3] = part
    queue[..., 4:] = np.array(addresses, np.uint64)[part].view(np.uint32)
    return queue


class Parts:
    """Launch records for parts with the same k, v and dtype, on one device.

    Raises `CaptureError` when it would have to compile or upload while `stream` is captured; so does `road`.
    """

    def __init__(self, context: DeviceContext, parts: Sequence[Part], activation: str | None, stream: int) -> None:
        packed = parts[0].packed
        self.context, self.v, self.dtype, self.k = context, packed.v, packed.dtype, packed.shape[1]
        self.m = sum(part.packed.shape[0] for part in parts)
        self.density = sum(part.packed.stored for part in parts) / max(1, self.m * self.k)
        self.epilogue = activation or ("identity" if any(part.bias for part in parts) else "plain")
        self.weights = [device_weights(part.packed, context, "sm90", TILE_K, stream) for part in parts]
        context.refuse_capture(stream, "upload the table of layers that share an input")
        with context.current():
            self.table = DeviceMemory(context, [part_table(parts, [w.memory.addresses[2] for w in self.weights])])
        self._plans: dict[tuple[int, bool], SkinnyPlan] = {}

    def _plan(self, n: int, token_major: bool, stream: int) -> SkinnyPlan:
        key = (room_for(n), token_major)
        plan = self._plans.get(key)
        if plan is None:
            context, tiles = self.context, [(w.first, w.counts) for w in self.weights]
            groups, in_all = sum(len(counts) for _, counts in tiles), sum(int(counts.sum()) for _, counts in tiles)
            config = choose_config(self.v, n, groups, in_all, self.dtype, context.sm_count,
                                   token_major=token_major, parts=True)  # fmt: skip
            config = config.with_epilogue(self.epilogue).for_columns(self.k)
            config, kernel, clusters = find_room(config, groups, context, stream)
            context.refuse_capture(stream, "upload the work queue")
            addresses = [weight_addresses(w, config) for w in self.weights]
            records = part_queue(tiles, addresses, clusters)
            table = ahead_table(records[0], records[0, :, 4:].view(np.uint64), config)
            with context.current():
                queue = DeviceMemory(context, [records, table])
            launch_config = kernel.config(clusters, cluster=config.ranks, is_chained=True)
            head = 0, 0, queue.addresses[0], self.table.addresses[0]
            memory = (queue, self.table, *(w.memory for w in self.weights))
            ahead = queue.addresses[1], len(table)
            plan = self._plans[key] = SkinnyPlan(config, kernel, launch_config, head, memory, ahead)
        return plan

    def road(self, n: int, is_feature: bool, stream: int) -> SkinnyRoad:
        """What a call launches for contiguous token-major x (n, k) at a 16-byte boundary.

        The result has m * n values: of each part (rows, n), or token-major (n, rows), one behind the other.
        """
        token_major = n <= 16 and takes_tokens(self.m, self.k, n, self.v, self.density)
        plan = self._plan(n, token_major, stream)
        turn_in, ldx = None, self.k
        if not token_major:
            turn_in, ldx = turn_of_x(self.context, n, self.k, 0, (self.k, 1), stream), ceil_div(n, 8) * 8
        ot, of = (1, n) if is_feature else (0, 1)  # a token-major part has its own token stride
        return SkinnyRoad(self.context, plan, turn_in, None, n, self.k, self.m, ldx, ot, of, 0, 0, 0)
