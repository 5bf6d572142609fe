"""What a product with few columns has fetched into L2 for the product that follows it."""

from __future__ import annotations

import gc
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from emulated import EmulatedDevice, install
from gpu_cases import random_packed

from shflnb.formats.shflbw import ShflBWMatrix
from shflnb.kernels import skinny_ahead
from shflnb.kernels.skinny_ahead import Successor, ahead_table, following
from shflnb.kernels.skinny_config import config_of
from shflnb.kernels.spmm_device import device_linear


# --- the table -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("most", [1, 40_000, 1 << 30])
@pytest.mark.parametrize(
    ("v", "ranks", "k"), [(64, 1, 4096), (64, 2, 70_000), (32, 4, 65_535), (128, 8, 65_536), (16, 2, 1)]
)
def test_the_table_names_what_each_block_reads_first(
    v: int, ranks: int, k: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skinny_ahead, "AHEAD_BYTES", most)
    rng = np.random.default_rng(v + ranks)
    config = config_of(v, 16, ranks, "float16", 1).for_columns(k)
    records = np.zeros((6, 4), np.uint32)
    records[:, 0] = rng.integers(0, 1 << 20, 6)
    records[:, 2] = tiles = rng.integers(1, 20, 6)
    records[:, 1] = first = rng.integers(0, 1 << 20, 6)
    addresses = rng.integers(1 << 33, 1 << 47, (6, 2)).astype(np.uint64) // np.uint64(256) * np.uint64(256)
    want = set()
    tile_bytes = (64 * v * 2, 64 * (2 if k < 65_536 else 4))
    for cluster in range(6):
        for rank in range(ranks):
            begin, end = tiles[cluster] * rank // ranks, tiles[cluster] * (rank + 1) // ranks
            own = end - begin
            turned = int(records[cluster, 0]) * 0x9E3779B1 % 2**32 * int(own) // 2**32  # where the block begins
            for step in range(min(own, max(1, most // (6 * ranks * sum(tile_bytes))))):
                tile = int(first[cluster] + begin) + (turned + step) % int(own)
                want |= {int(addresses[cluster, place]) + tile * tile_bytes[place] + byte
                         for place in (0, 1) for byte in range(0, tile_bytes[place], 16)}  # fmt: skip
    table = ahead_table(records, addresses, config)
    assert table.dtype == np.uint32 and table.shape[1] == 4 and not table[:, 3].any()
    spans = [(int(low) | int(high) << 32, int(count)) for low, high, count, _ in table]
    named = [at + byte for at, count in spans for byte in range(0, count, 16)]
    assert len(set(named)) == len(named) and set(named) == want
    assert all(at % 16 == 0 and count % 16 == 0 for at, count in spans)


# --- what follows what -----------------------------------------------------------------------------------------------
class Plan(SimpleNamespace):
    """As much of a plan as `following` looks at."""

    def __init__(self, name: int) -> None:
        super().__init__(name=name, memory=(object(),), successor=Successor())


def context_with(capturing: int = 0) -> Any:
    ok = type("Ok", (), {"__int__": lambda self: 0})()
    driver = SimpleNamespace(CUstream=lambda handle: handle, cuStreamIsCapturing=lambda stream: (ok, capturing))
    return SimpleNamespace(latest={}, driver=driver)


def told(plans: list[Plan], order: list[int], context: Any, stream: int = 0) -> list[int]:
    """What each product of a sequence fetches for: the number of a plan, 0 for nothing."""
    found = [following(plans[i], context, stream) for i in order]
    return [0 if plan is None else plan.name for plan in found]


def test_the_product_that_came_after_is_foretold() -> None:
    plans = [Plan(i) for i in range(4)]
    order = [1, 2, 3]
    context = context_with()
    assert told(plans, order, context) == [0, 0, 0]
    assert told(plans, order, context) == [2, 3, 1]
    assert told(plans, order, context, stream=7) == [2, 3, 1], "learned on one stream, used on another"


def test_a_product_alone_fetches_nothing() -> None:
    plans = [Plan(i) for i in range(2)]
    assert told(plans, [1, 1, 1, 1], context_with()) == [0, 0, 0, 0]


def test_what_changes_is_not_foretold_until_it_comes_twice() -> None:
    plans = [Plan(i) for i in range(4)]
    context = context_with()
    # the second time 3 follows 1, so neither is trusted the third time; then 3 has come twice
    assert told(plans, [1, 2, 1, 3, 1, 3, 1], context)[::2] == [0, 2, 0, 3]
    assert told(plans, [2, 1, 3, 1, 2, 1], context)[1::2] == [0, 0, 0]


def test_streams_do_not_follow_each_other() -> None:
    plans, context = [Plan(i) for i in range(3)], context_with()
    for _ in range(3):
        assert told(plans, [1], context, 1) == told(plans, [2], context, 2) == [0]


def test_nothing_is_fetched_where_x_is_turned_or_the_other_is_gone() -> None:
    plans, context = [Plan(i) for i in range(3)], context_with()
    assert told(plans, [1, 2, 1, 2], context) == [0, 0, 2, 1]
    assert following(plans[1], context, 0, is_turned=True) is None
    assert told(plans, [2, 1], context) == [1, 2]
    plans[2] = Plan(9)  # the plan of before is freed
    gc.collect()
    context.latest.clear()
    assert told(plans, [1], context) == [0]


def test_a_capture_keeps_what_its_graph_reads() -> None:
    plans, context = [Plan(i) for i in range(3)], context_with(capturing=1)
    told(plans, [1, 2, 1], context)
    kept = plans[2].memory
    plans[2] = Plan(9)
    gc.collect()
    assert [held is kept for held in plans[1].successor._held] == [True]
    told(plans, [1, 1], context)
    assert len(plans[1].successor._held) == 1


# --- on a device -----------------------------------------------------------------------------------------------------
def spans_of(packed: ShflBWMatrix) -> list[tuple[int, int]]:
    """(address, bytes) of the values and columns of a matrix that has been on the device."""
    weights = next(kept for key, kept in packed.launch_cache.items() if key[0] == "weights")
    (values, _, _, ids), tiles = weights.memory.addresses, int(weights.counts.sum())
    return [(values, tiles * 64 * packed.v * 2), (ids, tiles * 128)]


def test_products_in_turns_fetch_each_others_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(5, sm_count=24))  # clusters for all groups
    one, two = (random_packed(150, 130, 64, [130, 0, 70], seed=s, integers=True) for s in (1, 2))
    x = device.array(np.random.default_rng(0).integers(-2, 3, (3, 130)).astype(np.float16))
    first = [device.read(device_linear(x, packed)) for packed in (one, two)]
    assert not device.machine.prefetched
    for packed, other, y in ((one, two, first[0]), (two, one, first[1])) * 2:
        device.machine.prefetched.clear()
        assert np.array_equal(device.read(device_linear(x, packed)), y)
        fetched, places = sorted(device.machine.prefetched), spans_of(other)
        assert fetched and all(
            any(at <= a and a + count <= at + size for at, size in places) for a, count in fetched
        ), "only what the other product reads"
        assert all(a + count <= b for (a, count), (b, _) in itertools.pairwise(fetched)), "nothing twice"
        assert sum(count for _, count in fetched) == sum(size for _, size in places), "small matrices whole"


def test_memory_goes_with_its_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of captures nobody holds the weights of what came after."""
    device = install(monkeypatch, EmulatedDevice(5, sm_count=4))
    one, two = (random_packed(70, 64, 64, seed=s, integers=True) for s in (1, 2))
    x = device.array(np.ones((2, 64), np.float16))
    for packed in (one, two, one):
        device_linear(x, packed)
    memory = weakref.ref(next(kept for key, kept in two.launch_cache.items() if key[0] == "weights").memory)
    del packed, two
    gc.collect()
    assert memory() is None
    device.machine.prefetched.clear()
    device_linear(x, one)
    assert not device.machine.prefetched
