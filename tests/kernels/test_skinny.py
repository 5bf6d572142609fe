"""The few-column product without a GPU: layout round trips, the split of the work emulated, sizes, choices,
compiles."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.emulate_skinny import emulate

from shflnb import errors
from shflnb.formats import ShflBWMatrix, pack
from shflnb.formats.skinny_layout import LAST_STEP, PADDING, from_skinny, place_of_row, to_skinny
from shflnb.kernels.config import SMEM_LIMIT, smem_limit
from shflnb.kernels.registry import capability_of
from shflnb.kernels.skinny_choice import (
    SkinnyConfig,
    SkinnySplit,
    choose_config,
    choose_split,
    chunks_of,
    warps_of,
    window_limit,
)
from shflnb.kernels.skinny_plan import kernel_spec, sum_spec, x_flags

splits = st.tuples(
    st.integers(1, 5), st.sampled_from((1, 2, 3, 8)), st.sampled_from((1, 4, 8)), st.sampled_from((128, 192, 1024))
)


def packed_of(m: int, k: int, v: int, counts: list[int], dtype: str = "float16", seed: int = 0) -> ShflBWMatrix:
    """A packed matrix of small integers whose groups keep `counts` columns, placed at random."""
    rng = np.random.default_rng(seed)
    columns = [np.sort(rng.choice(k, count, replace=False)) for count in counts]
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    values = strategies.draw_values(rng, (int(indptr[-1]), v), dtype, integers=True)
    if m % v:
        values[int(indptr[-2]) :, m % v :] = 0
    return ShflBWMatrix((m, k), (v, 16), indptr, np.concatenate(columns).astype(np.int32), values,
                        rng.permutation(m).astype(np.int32))  # fmt: skip


@settings(max_examples=40)
@given(strategies.packed_matrices(dtypes=strategies.HALF_NAMES, largest=150), splits)
def test_round_trip(packed: ShflBWMatrix, split: tuple[int, int, int, int]) -> None:
    layout = to_skinny(packed, *split)
    indices, values, indptr = from_skinny(layout)
    assert np.array_equal(indptr, packed.indptr) and np.array_equal(indices, packed.indices)
    assert np.array_equal(values.view(np.uint16), packed.values.view(np.uint16)) and values.dtype == packed.values.dtype


@pytest.mark.parametrize(
    ("m", "k", "v", "n", "split", "merged"),
    [
        (40, 203, 16, 3, (3, 4, 4, 128), True),
        (67, 300, 32, 8, (2, 1, 4, 1024), True),
        (200, 300, 64, 9, (2, 2, 4, 128), False),
        (200, 300, 64, 16, (5, 3, 8, 128), True),
        (130, 270, 64, 17, (1, 8, 4, 192), True),
        (150, 270, 128, 40, (2, 2, 4, 128), False),
        (300, 130, 128, 64, (3, 1, 4, 128), True),
    ],
)
def test_emulated_product_is_exact(
    m: int, k: int, v: int, n: int, split: tuple[int, int, int, int], merged: bool
) -> None:
    """NaN in rows of x that no group keeps, and in what the kernel never wrote, would show."""
    rng = np.random.default_rng(m + n)
    counts = [int(count) for count in rng.integers(0, k // 2, -(-m // v))]
    counts[0] = 0
    packed = packed_of(m, k, v, counts)
    x = rng.integers(-4, 5, (n, k)).astype(np.float64)
    x[:, np.setdiff1d(np.arange(k), packed.indices)] = np.nan
    layout = to_skinny(packed, *split)
    out = emulate(layout, next(c for c in (1, 2, 4, 8) if n <= 8 * c), x, m, merged)
    assert np.array_equal(out, np.nan_to_num(x) @ packed.to_dense().astype(np.float64).T)


def test_work_is_cut_evenly() -> None:
    packed = packed_of(64 * 12, 2048, 64, [512] * 12)
    layout = to_skinny(packed, teams=4, ranks=4, warps=2, window=1024)
    steps = layout.warps[:, :, 2]
    assert layout.steps == 12 * 32 and layout.phases == 1 and not layout.is_owned
    assert set(steps.sum(axis=1).tolist()) == {24} and steps.max() == 12 and steps.min() == 12
    assert layout.window_rows(True) < 2048 // 4 * 1.3
    # each piece ends once, and its slot is named by one entry
    places = layout.records[:, layout.item_rows * 16 :]
    ends = (places[:, 0] & LAST_STEP) != 0
    team = np.repeat(
        np.repeat(np.arange(4), np.diff(layout.teams_ptr)), np.diff(layout.entry_ptr)[: len(layout.item_ids)]
    )
    assert ends.sum() == len(layout.entries) == len({*zip(team.tolist(), layout.entries.tolist(), strict=True)})
    assert ((places & LAST_STEP) != 0).all(axis=1).sum() == ends.sum()


def test_an_owned_layout_gives_a_warp_one_piece() -> None:
    """Through all phases; warps go to the items with most steps, and none has more than its fair share by much."""
    packed = packed_of(64 * 12, 2048, 64, [512] * 11 + [1024])
    layout = to_skinny(packed, teams=4, ranks=2, warps=8, window=256)
    assert layout.is_owned and layout.phases > 1 and layout.slots == 8
    steps = layout.warps[:, :, 2]
    assert steps.min() > 0 and steps.max() <= 16 * 32 // (4 * 8) + 6
    ends = (layout.records[:, layout.item_rows * 16] & LAST_STEP) != 0
    assert ends.sum() == 4 * 2 * 8 == len(layout.entries)
    assert layout.warps[:, :, 1].tolist() == [list(range(8))] * 8


def test_neighbours_fall_into_different_banks() -> None:
    packed = packed_of(64 * 4, 2048, 64, [512] * 4)
    layout = to_skinny(packed, teams=2, ranks=2, warps=2, window=1024)
    places = (layout.records[:, layout.item_rows * 16 :] & PADDING).reshape(-1, 8)
    conflicts = np.array([np.bincount(row & 7).max() for row in places if (row != PADDING).all()])
    assert conflicts.mean() < 1.8  # a random order gives 2.6


def test_place_of_row_is_its_own_inverse_and_spreads() -> None:
    row = np.arange(512)
    place = place_of_row(row)
    assert np.array_equal(place_of_row(place), row) and sorted(place.tolist()) == row.tolist()
    for first in (0, 64, 448):
        assert all(len({*(place[first + 8 * i : first + 8 * i + 8] & 7)}) == 8 for i in range(8))
        assert all(len({*(place[first + j : first + 64 : 8] & 7)}) == 8 for j in range(8))


def test_sparse_groups_are_cut_at_the_window() -> None:
    packed = packed_of(32, 4000, 16, [20, 3])
    layout = to_skinny(packed, teams=1, ranks=1, warps=4, window=128)
    assert layout.window_rows(False) <= 128 and layout.phases > 1
    x = np.random.default_rng(0).integers(-4, 5, (2, 4000)).astype(np.float64)
    assert np.array_equal(emulate(layout, 1, x, 32, False), x @ packed.to_dense().astype(np.float64).T)


def test_layout_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(errors.DtypeError, match="float16"):
        to_skinny(pack(np.ones((16, 16), np.float32), block=(16, 16)), 1, 1, 8, 1024)
    packed = packed_of(16, 32, 16, [16])
    for split in ((0, 1, 8, 1024), (1, 1, 8, 64), (1, 1, 8, 40000)):
        with pytest.raises(errors.ArgumentError, match="window"):
            to_skinny(packed, *split)


# --- config and choice ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [{"v": 48}, {"chunks": 3}, {"warps": 5}, {"depth": 1}, {"depth": 10}, {"finish": "atomics"}, {"slots": "local"},
     {"finish": "none", "slots": "shared"}, {"finish": "none", "slots": "window"}, {"dtype": "float32"},
     {"epilogue": "tanh"}, {"prefetch": 64}],
)  # fmt: skip
def test_config_checks_itself(wrong: dict) -> None:
    with pytest.raises(errors.ArgumentError):
        dataclasses.replace(SkinnyConfig(64, 1, 8, 4), **wrong)


@pytest.mark.parametrize("v", [16, 32, 64, 128])
@pytest.mark.parametrize("limit", sorted(set(SMEM_LIMIT.values())))
def test_every_n_has_a_config_that_fits(v: int, limit: int) -> None:
    counts = [500] * (512 // v) + [3, 0]
    packed = packed_of(v * len(counts), 3000, v, counts)
    teams = {1: 132, 2: 66, 4: 32, 8: 16}
    for n in (1, 8, 9, 33, 64):
        split = choose_split(-(-packed.counts // 16), 3000, v, teams, limit, chunks_of(n))
        assert split.window >= window_limit(v, limit) >= 128
        layout = to_skinny(packed, split.teams, split.ranks, split.warps, split.window)
        for finish in ("cluster", "none"):
            config, is_merged = choose_config(layout, n, "float16", limit, finish, True)
            assert config.smem_bytes(layout.window_rows(is_merged), layout.slots, layout.team_table.shape[1]) <= limit
            assert 8 * config.chunks >= n and config.depth >= 3


def test_split_uses_every_block() -> None:
    teams = {1: 132, 2: 66, 4: 32, 8: 16}
    large = choose_split(np.full(448, 64), 4096, 64, teams, SMEM_LIMIT[90])
    assert large.teams * large.ranks >= 128
    small = choose_split(np.full(16, 64), 4096, 64, teams, SMEM_LIMIT[90])
    assert small == SkinnySplit(16, 8, warps_of(64), window_limit(64, SMEM_LIMIT[90]))
    few, many = (choose_split(np.full(448, 64), 4096, 64, teams, SMEM_LIMIT[90], chunks) for chunks in (1, 8))
    assert few == many  # one layout in memory
    assert choose_split(np.zeros(1, np.int64), 16, 16, teams, SMEM_LIMIT[90]).teams == 1


@pytest.mark.parametrize(
    ("address", "token", "feature", "n", "flags"),
    [(256, 4096, 1, 8, 16), (256, 4097, 1, 1, 16), (256, 4097, 1, 2, 0), (258, 4096, 1, 8, 0), (256, 1, 64, 64, 32),
     (256, 1, 63, 64, 0), (256, 3, 200, 8, 0)],
)  # fmt: skip
def test_how_x_is_read(address: int, token: int, feature: int, n: int, flags: int) -> None:
    assert x_flags(address, token, feature, n) == flags


# --- compiles --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("sm_80", SkinnyConfig(64, 8, 8, 4, "none", "global", "bfloat16", "gelu")),
        ("sm_89", SkinnyConfig(16, 2, 10, 5, "block", "window")),
        ("sm_90", SkinnyConfig(64, 8, 8, 5, "cluster", "global", "float16", "silu", is_chained=True)),
        ("sm_90", SkinnyConfig(128, 1, 8, 5, "cluster", "shared", "bfloat16", is_chained=True)),
        ("sm_90", SkinnyConfig(64, 8, 8, 4, "cluster", "window", "bfloat16", "gelu", is_chained=True)),
        ("sm_90", SkinnyConfig(64, 2, 8, 5, "block", "window", "float16", "silu", is_chained=True)),
        ("sm_90", SkinnyConfig(32, 8, 10, 4, "cluster", "window", "float16", "gelu", is_chained=True)),
        ("sm_100", SkinnyConfig(32, 8, 10, 5, "cluster", "global", "float16", "gelu", is_chained=True)),
        ("sm_120", SkinnyConfig(32, 2, 10, 5, "cluster", "shared", "float16", "relu", is_chained=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_compiles_without_spills(arch: str, config: SkinnyConfig) -> None:
    compiler = pytest.importorskip("shflnb.kernels.compiler")
    pytest.importorskip("numba.cuda")
    specs = [kernel_spec(config, smem_limit(capability_of(arch)))]
    specs += [sum_spec(config)] if config.finish == "none" else []
    for spec in specs:
        ptx = compiler.compile_ptx(spec.make(), spec.signature(), arch, spec.name, spec.threads, spec.blocks_per_sm)
        assert ".local" not in ptx
        if compiler.find_tool("ptxas") is None:
            pytest.skip("needs ptxas (wheel nvidia-cuda-nvcc); found none")
        _, text = compiler.ptxas_assemble(ptx, arch)
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", text), text
