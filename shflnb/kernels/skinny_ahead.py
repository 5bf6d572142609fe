"""Products with few columns that follow one another: each has the next one's first weights fetched into L2.

A product with few columns lasts as long as its weights take from device memory, and device memory idles while the
product ends, while the next one begins, and while whatever lies between them runs (norms, attention). So each remembers
which product came after it on its stream, and, once its own weights are on their way, asks L2 for the first ones of
that product. They are constants, and a fetch into L2 changes no result: when another product follows, some bytes were
read in vain.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol, TypeVar

import numpy as np

from .launch import DeviceContext, DeviceMemory, is_capturing
from .skinny_config import FIRST_PLACES, TILE_K, SkinnyConfig

__all__ = ["AHEAD_BYTES", "Successor", "ahead_table", "following"]

AHEAD_BYTES = 4 << 20
"""Bytes of the next product that are fetched ahead at most: what its blocks ask for first. 2 MB gain less, and 8 MB and
more lose again with more than a few columns (H100, 2026-11-26)."""


def ahead_table(records: np.ndarray, addresses: np.ndarray, config: SkinnyConfig) -> np.ndarray:
    """What the blocks of a product read first: uint32, (spans, 4); a span is (address, low and high, bytes, 0).

    Parameters
    ----------
    records : uint32 array, (clusters, 4 or more)
        The first turn of the queue: (group, first k tile, k tiles, ...).
    addresses : uint64 array, (clusters, 2)
        Where the k tiles of each record count from: of its values and its columns.
    """
    ranks = np.arange(config.ranks, dtype=np.uint64)
    group, first, tiles = (records[:, i, None].astype(np.uint64) for i in (0, 1, 2))
    # as `make_own_tiles` and `first_place` of `skinny_wgmma.py`
    begin, end = tiles * ranks // config.ranks, tiles * (ranks + 1) // config.ranks
    place = (group * FIRST_PLACES % 2**32) * (end - begin) >> 32
    tile_bytes = np.array([config.w_bytes, TILE_K * config.id_bytes], np.uint64)
    most = np.uint64(max(1, AHEAD_BYTES // (begin.size * int(tile_bytes.sum()))))
    to_end = np.minimum(end - begin - place, most)
    from_begin = np.minimum(place, most - to_end)  # where it goes on after the last tile
    start, count = np.stack([begin + place, begin]), np.stack([to_end, from_begin])
    at = addresses[:, None, :] + (first + start)[..., None] * tile_bytes
    table = np.zeros((*at.shape, 4), np.uint32)
    table[..., :2] = at[..., None].view(np.uint32)
    table[..., 2] = count[..., None] * tile_bytes
    return table.reshape(-1, 4)[table[..., 2].ravel() > 0]


class Following(Protocol):
    """What is known here of a product; the launch record of `skinny_plan.py` is one."""

    @property
    def memory(self) -> tuple[DeviceMemory, ...]:
        """What it reads of its own, the table of what is read first among it."""

    @property
    def successor(self) -> Successor:
        """What came after it."""


Plan = TypeVar("Plan", bound=Following)


class Successor:
    """The product that came after another on its stream, as seen so far."""

    __slots__ = ("_held", "_is_trusted", "_plan")

    def __init__(self) -> None:
        self._plan: weakref.ref[Any] | None = None
        self._is_trusted = True
        self._held: list[tuple[DeviceMemory, ...]] = []

    def learn(self, plan: Following) -> None:
        """Note what came after; another one than last time is not foretold until it comes twice."""
        known = self._plan
        if known is not None and known() is plan:
            self._is_trusted = True
        else:
            self._is_trusted = known is None
            self._plan = weakref.ref(plan)

    def plan(self) -> Any:
        """What will come after; None where that cannot be foretold."""
        return self._plan() if self._plan is not None and self._is_trusted else None

    def hold(self, memory: tuple[DeviceMemory, ...]) -> None:
        """Keep it as long as this object lives: a captured graph reads it."""
        if not any(held is memory for held in self._held):
            self._held.append(memory)


def following(plan: Plan, context: DeviceContext, stream: int, *, is_turned: bool = False) -> Plan | None:
    """The plan whose first weights a product fetches, to be held until the product is enqueued; None for no fetch.

    Called for each product, in the order of the stream. Where x is turned first nothing is fetched: the time that
    could be gained goes to the turning kernel.
    """
    latest = context.latest.get(stream)
    before = None if latest is None else latest()
    if before is not None:
        before.successor.learn(plan)
    if before is not plan:
        context.latest[stream] = weakref.ref(plan)
    after: Plan | None = plan.successor.plan()
    if is_turned or after is None or after is plan:
        return None
    if is_capturing(context, stream):
        plan.successor.hold(after.memory)
    return after
