"""Signals between the blocks of one launch: counters in global memory that only rise.

Whoever finishes a part of the work counts up; whoever needs all of it waits for the number of its parts. Both carry
what was written before (release and acquire at the scope of the GPU), for the whole warp or barrier group that has met
in front of the signal. The host clears the counters before the launch. A kernel that waits like this must have all of
its blocks on the device at once (a cooperative launch).
Source: PTX ISA, "Memory Consistency Model", `red.release.gpu`, `ld.acquire.gpu`.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from .ptx import instruction

__all__ = ["count_up", "wait_for"]

u32, u64 = types.uint32, types.uint64

_load_acquire = instruction(
    "Load 4 bytes; what was written before the release that wrote them is visible afterwards.",
    "ld.acquire.gpu.global.u32 $0, [$1];", (u64,), "=r,l,~{memory}", u32)  # fmt: skip
count_up = instruction(
    "Add 1 to a counter, after all earlier writes.",
    "red.release.gpu.global.add.u32 [$0], 1;", (u64,), "l,~{memory}")  # fmt: skip
_sleep = instruction("Pause for about 50 ns.", "nanosleep.u32 50;", (), "~{memory}")


@cuda.jit(device=True, forceinline=True)
def wait_for(counter, count):
    """Wait until a counter is at `count`; every thread that goes on may read what the counting threads wrote."""
    while _load_acquire(counter) < count:
        _sleep()
