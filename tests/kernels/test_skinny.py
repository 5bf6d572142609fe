"""The few-column product without a GPU: its specialisations, sizes and choice. What it computes: `test_emulated.py`."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from shflnb import errors
from shflnb.kernels.config import SMEM_LIMIT
from shflnb.kernels.registry import all_specs
from shflnb.kernels.select import has_few_columns
from shflnb.kernels.skinny_config import (
    BESIDE_BYTES,
    MAX_N,
    SkinnyConfig,
    choose_config,
    config_of,
    is_paced,
    memory_us,
    predict_us,
    room_for,
    stores_directly,
    takes_tokens,
    without_clusters,
)
from shflnb.kernels.skinny_plan import equal_groups, kernel_spec
from shflnb.kernels.skinny_select import LAYOUTS, few_candidates, parts_candidates


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"v": 48}, "v = 48"), ({"chunks": 1}, "chunks = 1"), ({"ranks": 3}, "ranks = 3"), ({"ranks": 8}, "v / 8 = 4"),
        ({"stages": 3}, "3 stages"), ({"stitchers": 6}, "6 stitching warps"), ({"stitchers": 8}, "8 stitching warps"),
        ({"stages": 21}, "21 stages"), ({"dtype": "float32"}, "float32"),
        ({"epilogue": "tanh"}, "tanh"), ({"blocks_per_sm": 3}, "3 blocks"), ({"stages": 20, "chunks": 8}, "bytes of"),
    ],
)  # fmt: skip
def test_a_config_checks_itself(wrong: dict[str, object], message: str) -> None:
    fine = {"v": 32, "chunks": 2, "ranks": 2, "stages": 6}
    SkinnyConfig(**fine)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match=message):
        SkinnyConfig(**(fine | wrong))  # type: ignore[arg-type]


def test_as_many_stages_as_fit() -> None:
    for v in (16, 32, 64, 128):
        for n in (1, 16, 17, 32, 33, 64):
            for ranks in (r for r in (1, 2, 4, 8) if r <= v // 8):
                config = config_of(v, n, ranks, "float16", 1)
                assert config.chunks * 8 == room_for(n) >= n
                left = SMEM_LIMIT[90] - BESIDE_BYTES - config.smem_bytes
                assert left >= 0 and (left < config.stage_bytes or config.stages == (12 if v == 32 else 20))
                assert config_of(v, n, ranks, "float16", 1, stages=5).stages == 5


@pytest.mark.parametrize(
    ("v", "n", "ranks", "blocks", "stitchers", "stages"),
    [
        # rings that leave 156 KiB to L1, or 92 KiB; a stage for each warp that stitches
        (64, 16, 2, 1, 8, 8), (64, 16, 8, 1, 8, 8), (64, 16, 2, 2, 8, 8), (64, 32, 8, 1, 8, 8),
        (64, 16, 2, 2, 4, 6), (32, 16, 2, 1, 8, 12), (128, 16, 8, 1, 8, 8), (128, 16, 2, 1, 4, 7),
        (16, 16, 1, 2, 4, 12), (32, 16, 2, 2, 4, 8),
    ],
)  # fmt: skip
def test_stitched_token_major_x_leaves_room_for_l1(
    v: int, n: int, ranks: int, blocks: int, stitchers: int, stages: int
) -> None:
    config = config_of(v, n, ranks, "float16", blocks, token_major=True, stitchers=stitchers)
    assert config.stages == stages


def test_every_choice_is_a_kernel_that_the_registry_knows() -> None:
    known = {spec.key for spec in all_specs("sm_90a")}
    for v in (16, 32, 64, 128):
        for n, token_major in ((1, True), (16, True), (16, False), (17, v == 64), (32, False), (64, False)):
            for groups, tiles in ((1, 1), (1, 99), (16, 256), (16, 896), (32, 3584), (64, 256), (64, 3584), (64, 7168),
                                  (96, 1536), (448, 7168), (448, 3584)):  # fmt: skip
                for is_turned in (False, not token_major):
                    config = choose_config(v, n, groups, tiles, "bfloat16", 132, token_major=token_major,
                                           is_turned=is_turned)  # fmt: skip
                    assert config.dtype == "bfloat16" and config.token_major == token_major
                    assert kernel_spec(config).key in known


def test_without_clusters_there_is_a_kernel_of_one_rank_for_the_same_call() -> None:
    known = {spec.key for spec in all_specs("sm_90a")}
    for v, n in itertools.product((16, 32, 64, 128), (16, 32, 64)):
        for config in (*few_candidates(v, n, "float16"), *parts_candidates(v, n, "float16")):
            alone = without_clusters(config.with_epilogue("gelu"))
            same = replace(alone, epilogue="plain", ranks=config.ranks, stages=config.stages,
                           blocks_per_sm=config.blocks_per_sm, stitchers=config.stitchers)  # fmt: skip
            assert alone.ranks == 1 and same == config
            assert kernel_spec(alone).key in known


@pytest.mark.parametrize(
    ("m", "k", "v", "n", "ranks", "blocks", "stages"),
    [
        # measured best, or within 3 % of it, at 75 % on one H200 (2026-11-28), x turned before
        (28672, 4096, 64, 16, 1, 1, 16), (28672, 4096, 64, 32, 1, 1, 16), (28672, 4096, 64, 64, 1, 1, 10),
        (14336, 4096, 64, 16, 1, 1, 16), (14336, 4096, 64, 32, 1, 1, 16), (8192, 8192, 64, 32, 1, 1, 16),
        (4096, 14336, 64, 16, 2, 1, 16), (4096, 14336, 64, 32, 2, 1, 16), (4096, 14336, 64, 64, 2, 1, 10),
        (4096, 4096, 64, 32, 2, 1, 10), (6144, 4096, 64, 64, 1, 1, 10), (8192, 28672, 64, 32, 1, 1, 16),
        (28672, 4096, 128, 32, 2, 1, 9), (4096, 14336, 128, 64, 2, 1, 6), (14336, 4096, 128, 64, 1, 1, 8),
        (4096, 14336, 32, 16, 2, 2, 12), (28672, 4096, 32, 16, 2, 2, 8), (28672, 4096, 32, 32, 1, 2, 12),
        (4096, 14336, 32, 32, 2, 2, 11), (28672, 4096, 32, 64, 1, 2, 8), (4096, 4096, 32, 64, 1, 1, 12),
    ],
)  # fmt: skip
def test_the_choice_on_measured_layers(m: int, k: int, v: int, n: int, ranks: int, blocks: int, stages: int) -> None:
    groups = m // v
    config = choose_config(v, n, groups, groups * (k // 4 // 64), "float16", 132, is_turned=True)
    assert (config.ranks, config.blocks_per_sm, config.stages) == (ranks, blocks, stages)


@pytest.mark.parametrize(
    ("m", "k", "v", "n", "ranks", "blocks"),
    [
        # the same of feature-major x, within 5 %
        (28672, 4096, 64, 16, 2, 2), (28672, 4096, 64, 32, 2, 2), (28672, 4096, 64, 64, 1, 2),
        (14336, 4096, 64, 8, 2, 2), (14336, 4096, 64, 32, 2, 2), (14336, 4096, 64, 64, 1, 2),
        (4096, 14336, 64, 8, 2, 1), (4096, 14336, 64, 32, 2, 1), (4096, 14336, 64, 64, 2, 1),
        (4096, 4096, 64, 16, 2, 2), (4096, 4096, 64, 32, 2, 2), (4096, 4096, 64, 64, 1, 1),
        (1024, 4096, 64, 8, 8, 2), (4096, 14336, 32, 16, 2, 2), (28672, 4096, 32, 64, 1, 2),
    ],
)  # fmt: skip
def test_the_choice_for_feature_major_x(m: int, k: int, v: int, n: int, ranks: int, blocks: int) -> None:
    groups = m // v
    config = choose_config(v, n, groups, groups * (k // 4 // 64), "float16", 132)
    assert (config.ranks, config.blocks_per_sm) == (ranks, blocks)


def test_two_ranks_fill_the_last_round_of_long_groups() -> None:
    """448 groups are 3.4 rounds of 132 blocks, or 6.8 of 66 pairs; shorter groups would not repay the exchange."""
    for n, tiles, ranks in ((32, 32, 2), (32, 16, 1), (64, 32, 1), (16, 32, 1)):
        assert choose_config(64, n, 448, 448 * tiles, "float16", 132, is_turned=True).ranks == ranks
    assert choose_config(64, 32, 396, 396 * 32, "float16", 132, is_turned=True).ranks == 1


def test_where_short_groups_are_split_for_token_major_x() -> None:
    def ranks(n: int, tiles: int, groups: int = 448) -> int:
        return choose_config(64, n, groups, groups * tiles, "float16", 132, token_major=True).ranks

    assert (ranks(8, 7), ranks(8, 8), ranks(4, 8), ranks(4, 15), ranks(4, 16)) == (1, 2, 1, 1, 2)
    assert (ranks(4, 8, 395), ranks(4, 8, 396)) == (2, 1)


@pytest.mark.parametrize(
    ("v", "k", "sparsity", "ranks"),
    [(128, 14336, 0.75, 8), (128, 14336, 0.875, 2), (64, 14336, 0.75, 2), (16, 14336, 0.5, 2), (64, 4096, 0.75, 2)],
)
def test_long_groups_of_128_rows_are_split_further_for_token_major_x(
    v: int, k: int, sparsity: float, ranks: int
) -> None:
    groups = 4096 // v
    config = choose_config(v, 8, groups, groups * int(k * (1 - sparsity)) // 64, "float16", 132, token_major=True)
    assert config.ranks == ranks


@pytest.mark.parametrize(
    ("m", "k", "v", "n", "kept", "blocks", "stitchers", "stages"),
    [
        # measured best with token-major x, or within 6 % of it, on one H200 (2026-11-28)
        (4096, 4096, 64, 1, 4, 1, 8, 10), (4096, 4096, 64, 16, 4, 1, 8, 10), (6144, 4096, 64, 8, 4, 1, 8, 10),
        (6144, 4096, 64, 16, 4, 1, 8, 10), (14336, 4096, 64, 8, 4, 2, 4, 8), (14336, 4096, 64, 8, 8, 2, 4, 8),
        (28672, 4096, 64, 1, 4, 2, 4, 8), (28672, 4096, 64, 8, 4, 2, 4, 8), (28672, 4096, 64, 8, 8, 2, 4, 6),
        (28672, 4096, 64, 9, 4, 2, 4, 6), (4096, 14336, 64, 8, 4, 1, 8, 10), (4096, 14336, 64, 8, 8, 1, 8, 10),
        (28672, 4096, 32, 8, 4, 2, 4, 8), (14336, 4096, 32, 8, 4, 2, 4, 8), (6144, 4096, 32, 8, 4, 2, 8, 8),
        (4096, 14336, 32, 8, 4, 2, 8, 8), (4096, 14336, 128, 16, 4, 1, 8, 8), (28672, 4096, 128, 8, 4, 1, 8, 8),
        # and on one H100 (2026-11-27 and 28)
        (4096, 14336, 64, 32, 4, 1, 8, 8), (1024, 14336, 64, 8, 4, 2, 4, 6), (1024, 1024, 64, 8, 4, 1, 8, 10),
        (1024, 4096, 64, 8, 4, 2, 4, 6), (1024, 4096, 64, 32, 4, 1, 8, 8),
    ],
)  # fmt: skip
def test_blocks_that_stitch(
    m: int, k: int, v: int, n: int, kept: int, blocks: int, stitchers: int, stages: int
) -> None:
    groups = m // v
    config = choose_config(v, n, groups, groups * (k // kept // 64), "float16", 132, token_major=True)
    assert (config.blocks_per_sm, config.stitchers, config.stages) == (blocks, stitchers, stages)


def test_two_blocks_fit_only_where_they_may() -> None:
    """A block that is to have its multiprocessor alone asks for too much shared memory for two."""
    for layout in LAYOUTS:
        for v, n in itertools.product((16, 32, 64, 128), (16, 32, 64)):
            for config in few_candidates(v, n, "float16", layout):
                assert (2 * (config.smem_bytes + 1024) <= SMEM_LIMIT[90] + 1024) == (config.blocks_per_sm == 2)
                assert config.resident_blocks * (config.smem_bytes + 1024) <= SMEM_LIMIT[90] + 1024


def test_the_crossovers() -> None:
    assert has_few_columns(MAX_N, (9, 0)) and not has_few_columns(MAX_N + 1, (9, 0))
    assert not has_few_columns(1, (8, 0)) and not has_few_columns(1, (10, 0))
    assert stores_directly(28672, 8, 1024) and stores_directly(28672, 12, 1024) and not stores_directly(28672, 16, 1024)
    assert stores_directly(28672, 4, 512) and not stores_directly(28672, 8, 512) and stores_directly(14336, 8, 512)
    assert not stores_directly(131072, 8) and not stores_directly(4096, 16) and not stores_directly(4096, 32)
    assert stores_directly(2048, 32) and stores_directly(1024, 64) and stores_directly(3072, 16)
    assert stores_directly(4096, 16, stitches=True)
    assert stores_directly(4096, 32, stitches=True) and not stores_directly(28672, 16, stitches=True)
    assert stores_directly(8192, 16, parts=True) and not stores_directly(14336, 16, parts=True, stitches=True)
    small, long = (4096, 4096), (4096, 14336)
    assert takes_tokens(*small, 16, 64, 0.25) and not takes_tokens(*small, 17, 64, 0.5)
    assert takes_tokens(*small, 16, 64, 0.11) and not takes_tokens(*small, 16, 64, 0.1)
    assert takes_tokens(*small, 8, 64, 0.06) and takes_tokens(6144, 4096, 16, 64, 0.25)
    assert not takes_tokens(6144, 4096, 16, 64, 0.125) and takes_tokens(6144, 4096, 8, 64, 0.125)
    assert takes_tokens(14336, 4096, 16, 64, 0.5) and not takes_tokens(14336, 4096, 16, 64, 0.25)
    assert takes_tokens(28672, 4096, 16, 64, 0.25) and not takes_tokens(28672, 4096, 16, 64, 0.125)
    assert takes_tokens(28672, 4096, 16, 128, 0.25) and not takes_tokens(14336, 4096, 16, 128, 0.25)
    assert takes_tokens(*small, 6, 16, 0.25) and not takes_tokens(*small, 7, 16, 0.25)
    assert takes_tokens(*long, 8, 32, 0.25) and not takes_tokens(*long, 13, 32, 0.25)
    assert takes_tokens(*small, 16, 32, 0.25) and not takes_tokens(28672, 4096, 16, 32, 0.25)
    assert takes_tokens(*long, 8, 64, 0.125) and not takes_tokens(*long, 9, 64, 0.125)
    assert takes_tokens(1024, 4096, 32, 64, 0.25) and not takes_tokens(1024, 4096, 32, 32, 0.25)
    assert not takes_tokens(8192, 28672, 32, 64, 0.25) and not takes_tokens(28672, 14336, 32, 64, 0.25)
    assert not takes_tokens(*long, 32, 64, 0.25) and not takes_tokens(*long, 33, 64, 0.25)
    assert not takes_tokens(*long, 32, 64, 0.125) and not takes_tokens(*long, 32, 128, 0.25)
    assert not takes_tokens(*small, 20, 64, 0.0)
    assert takes_tokens(*long, 16, 128, 0.25) and not takes_tokens(*long, 16, 128, 0.125)
    assert not takes_tokens(*small, 32, 128, 0.125)
    assert takes_tokens(1024, 4096, 32, 64, 0.5) and not takes_tokens(1024, 4096, 33, 64, 0.5)
    assert not takes_tokens(28672, 8192, 16, 64, 0.25)
    assert takes_tokens(28672, 8192, 8, 64, 0.25) and takes_tokens(28672, 14336, 16, 128, 0.25)
    assert not takes_tokens(28672, 14336, 16, 64, 0.25) and not takes_tokens(28672, 14336, 16, 32, 0.25)
    assert not takes_tokens(*small, 1, 64, 0.0)
    assert is_paced(*small, 16, 0.25) and not is_paced(*small, 8, 0.25) and not is_paced(*small, 16, 0.5)
    assert is_paced(*long, 4, 0.125) and not is_paced(*long, 4, 0.25) and not is_paced(*small, 4, 0.125)
    assert is_paced(*long, 8, 0.125) and not is_paced(*small, 8, 0.125) and not is_paced(*long, 7, 0.125)


def test_times_are_those_of_memory() -> None:
    nbytes = 28672 * 1024 * 2
    assert memory_us(nbytes, 132) == pytest.approx(nbytes / 4.42e6, rel=0.01)
    assert predict_us(nbytes, 132) == pytest.approx(14.8, abs=0.5)
    assert memory_us(nbytes, 66) == pytest.approx(2 * memory_us(nbytes, 132))


def test_equal_groups_are_told_from_others() -> None:
    first = np.arange(5) * 7
    assert equal_groups(first, np.full(5, 7)) == 5 << 32 | 7 and equal_groups(first[:1], np.array([3])) == 1 << 32 | 3
    assert equal_groups(first, np.array([7, 7, 7, 7, 6])) == 0 and equal_groups(first[::-1], np.full(5, 7)) == 0
