"""Problem -> Config: a tuned table first, a rule second. Pure: the same question gets the same answer, on any machine.

The rule predicts a time for every candidate from a few constants and takes the least. For the wgmma kernel they are
fitted to times on an H200 (2026-11-22; fp16, warm, CUDA graphs): every candidate on 55 shapes of
`benchmarks/shapes.json`, v = 32, 64 and 128, 50 to 87.5 % zeros, groups of equal length. A stage of the ring costs its
bytes, or what the tensor cores need if that is longer; a tile costs its stages and its drain; the tiles of the busiest
multiprocessor, a launch and what device memory adds make the time. In those 495 cases the choice is within 8 % of the
fastest candidate (0.3 % on average; within 10 % also on shapes left out of a fit), and predictions are 5 % off on
average. v = 16 was not measured and gets what v = 32 gets. Consumers in turns at 64 and 128 tokens, and four warps to
a stage of so many, came later, with 29 and 15 shapes on an H100 (2026-11-26 and 27), and tiles of 96, 160 and
192 tokens, and of 512 anew, with 35 on an H200 (2026-11-28; in 96 cases within 6 % of the fastest, 0.2 % on average).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .config import Config, Problem, ceil_div, smem_limit
from .skinny_config import MAX_N

__all__ = [
    "FEW_COLUMNS",
    "Choice",
    "candidates",
    "choose",
    "has_few_columns",
    "linear_tokens",
    "predict_us",
    "roof_us",
    "sweep_of",
    "table_key",
    "tuned_table",
]

# wgmma kernel; all fitted together (H200, 2026-11-22, lab over shapes.json)
WGMMA_LAUNCH_US = 1.65  # a launch in a graph, up to the first stage's arrival
X_US_PER_KB = 0.013  # a stitched KiB of x, gathered row by row, into an SM that has L2 to itself
W_US_PER_KB = 0.0095  # a KiB of packed weights, one bulk copy a stage
BUSY_SHARE = 0.12  # longer that a stage takes when all SMs work: they share L2 and power
DRAIN_US = 0.235  # a tile's end: the results leave while the tensor cores wait
DRAIN_US_PER_KB = 0.019  # of results
EPILOGUE_US_PER_KB = {"gelu": 0.03, "silu": 0.02}  # of results, beside the drain (H100, 2026-11-26; silu: guessed)
ALTERNATE_STAGE = 0.91  # consumers in turns: time of a stage; the ring no longer stands while a tile drains
ALTERNATE_DRAIN = 0.5  # of each drain is not behind the other consumer's products; after the last tile, all of it
BESIDE_US = 0.6  # of a launch: where the tiles need half of the SMs or less, the next kernel sets up on the others
ALL_STITCH_US = 0.4  # elsewhere: with all four warps at a stage, the first is there sooner
ALL_STITCH_STAGE = {(128, 128): 1.16, (128, 64): 1.25, (64, 128): 1.18}  # and each takes longer, by (v, tile_n)
TAIL_STAGE = {(128, 96): 1.04, (128, 160): 1.10, (64, 96): 1.16, (64, 160): 1.07, (64, 192): 1.07}
"""Time of a stage whose rows are copied in two pieces, by (v, tile_n)."""
WIDE_STAGE = {"NVIDIA H100": 0.9}
"""Time of a stage of 512 tokens, by what a device's name begins with; 1 elsewhere. What they spare L2 counts on an H100
(2026-11-26); on an H200 consumers in turns with 256 are up to 9 % faster, at its power limit 11 % (2026-11-28)."""
UNEQUAL, UNEQUAL_STAGE = 1.1, 1.07
"""Where the longest group is so many times the mean one, time of a stage of 64 rows for consumers in turns: groups that
do not walk x in step read it from L2 one by one, and tiles of 512 tokens read less (H200, 2026-11-28; 7 to 9 %)."""
US_PER_MB = 0.05  # of x, weights and result: what device memory adds; three quarters of its time are hidden
SMALL_X_BYTES = 4e6  # of x, for which every order is as good
REREAD_BYTES = 40e6  # of weights that may be read from device memory again for every 512 tokens (H100, 2026-11-26)
MFLOP_PER_US = 5.6  # of one SM while all work: 740 TFLOP/s over 132 of them, what cuBLAS reaches on random data

LAUNCH_US = 2.8  # of the mma.sync kernels, few columns too
SM80_DRAIN_US = 0.4
# mma.sync kernel: TFLOP/s of the whole H200 at 4096^3, 75 %, by (v, tile_n); sm80 stages overlap across blocks
SM80_TFLOPS = {
    (128, 256): 281, (128, 128): 327, (128, 64): 220,
    (64, 256): 279, (64, 128): 303, (64, 64): 224,
    (32, 256): 197, (32, 128): 215, (32, 64): 181,
    (16, 256): 127, (16, 128): 122, (16, 64): 112,
}  # fmt: skip
H200_SMS = 132

# `linear`, when x does not fit L2: this share of L2 for what is turned at a time, a multiple of so many tokens, with so
# many tiles for each SM and at most so many times the rounds of tiles (H100, 2026-11-27, v = 64, four products: 4 to
# 10 % faster than at once; with one tile for each SM 9 % slower)
L2_SHARE, TURNED_TOKENS, TILES_AN_SM, MORE_ROUNDS = 0.68, 1024, 1.5, 1.1

# tile_n, tile_k, stages, team, alternate
_SM90_TOKENS = ((256, 64, 5, 2, True), (256, 64, 5, 2, False), (512, 32, 5, 2, False), (128, 64, 6, 1, False))
_SM90_TILES = {
    128: (
        (256, 64, 4, 4, False),
        (128, 64, 6, 2, False),
        (128, 64, 6, 4, False),
        (160, 64, 5, 4, False),
        (96, 64, 6, 2, False),
        (64, 64, 8, 2, False),
        (64, 64, 8, 4, False),
    ),
    64: (
        (256, 64, 5, 2, True),
        (256, 64, 5, 2, False),
        (512, 32, 5, 2, False),
        (192, 64, 6, 2, True),
        (160, 64, 6, 2, True),
        (128, 64, 6, 2, True),
        (128, 64, 6, 4, True),
        (96, 64, 8, 2, True),
        (64, 64, 8, 2, True),
    ),
    32: _SM90_TOKENS,
    16: _SM90_TOKENS,
}
# tile_n, tile_k, stages, blocks per SM; 48 KiB and less a block, so that they fit every architecture from sm_80 on
_SM80_TILES = {
    128: ((256, 32, 4, 1), (128, 32, 4, 2), (64, 32, 4, 2)),
    64: ((256, 32, 4, 2), (128, 32, 4, 4), (64, 32, 4, 4)),
    32: ((256, 32, 4, 2), (128, 32, 4, 4), (64, 32, 4, 4)),
    16: ((256, 32, 4, 2), (128, 32, 4, 4), (64, 32, 4, 4)),
}

# Up to here the few-column kernel is taken, on Hopper: at 64 columns it is still the faster one on every layer of a
# language model (H200, 2026-11-22), and it has room for no more.
FEW_COLUMNS = MAX_N


@dataclass(frozen=True)
class Choice:
    """A config with the reason it was taken."""

    config: Config
    reason: str
    predicted_us: float


def has_few_columns(n: int, capability: tuple[int, int]) -> bool:
    """Whether n columns go to the kernel that the weights' bytes bound (`skinny_wgmma.py`), not to a tile of these."""
    return n <= FEW_COLUMNS and capability == (9, 0)


def candidates(v: int, dtype: str, capability: tuple[int, int]) -> list[Config]:
    """Every config worth trying for groups of v rows on a device of this capability, wgmma first."""
    found = []
    if capability[0] == 9:
        for tile_n, tile_k, stages, team, alternate in _SM90_TILES[v]:
            found.append(Config("sm90", v, tile_n, tile_k, stages, dtype, team=team, alternate=alternate))
    limit = smem_limit(capability)
    for tile_n, tile_k, stages, blocks in _SM80_TILES[v]:
        config = Config("sm80", v, tile_n, tile_k, stages, dtype, blocks_per_sm=blocks)
        if config.smem_bytes <= limit:
            found.append(config)
    return found


def predict_us(problem: Problem, config: Config, sm_count: int, device_name: str = "") -> float:
    """Predicted device time in microseconds, from the constants above."""
    n_tiles = ceil_div(problem.n, config.tile_n)
    tiles = problem.groups * n_tiles
    if config.kernel == "sm80":
        tile_flops = 2.0 * problem.columns / max(1, problem.groups) * config.v * config.tile_n
        busiest = ceil_div(tiles, sm_count) if tiles < 16 * sm_count else tiles / sm_count
        rate = SM80_TFLOPS[config.v, config.tile_n] / H200_SMS * 1e6  # flops per us of one SM
        return LAUNCH_US + SM80_DRAIN_US + busiest * tile_flops / rate
    slots = sm_count * config.blocks_per_sm
    longest = ceil_div(max(1, problem.longest), config.tile_k)
    # a group's last stage is half full on average, unless the groups are whole stages
    stages = max(1.0, min(longest, problem.columns / max(1, problem.groups) / config.tile_k + 0.5))
    x_bytes = 2 * config.tile_k * config.tile_n
    copies = (x_bytes * X_US_PER_KB + config.w_stage_bytes * W_US_PER_KB) / 1024
    products = 2e-6 * config.v * config.tile_n * config.tile_k / (MFLOP_PER_US * (1 + BUSY_SHARE))
    stage = max(copies, products) * (1 + BUSY_SHARE * min(1.0, tiles / slots))
    kib = 2 * config.v * min(problem.n, config.tile_n) / 1024
    drain = DRAIN_US + kib * (DRAIN_US_PER_KB + EPILOGUE_US_PER_KB.get(problem.epilogue, 0.0))
    rounds = max(1, ceil_div(tiles, slots))
    launch, is_beside = WGMMA_LAUNCH_US, 2 * tiles <= slots
    if is_beside:
        launch -= BESIDE_US
    if config.team == 4 and (config.v, config.tile_n) in ALL_STITCH_STAGE:
        launch -= 0.0 if is_beside else ALL_STITCH_US
        stage *= ALL_STITCH_STAGE[config.v, config.tile_n]
    if config.tile_n == 512:
        stage *= next((share for name, share in WIDE_STAGE.items() if device_name.startswith(name)), 1.0)
    stage *= TAIL_STAGE.get((config.v, config.tile_n), 1.0)
    if config.alternate:
        stage *= ALTERNATE_STAGE
        if config.v == 64 and problem.longest * problem.groups > UNEQUAL * problem.columns:
            stage *= UNEQUAL_STAGE
        busy = max(rounds * (stages * stage + ALTERNATE_DRAIN * drain), longest * stage) + drain
    else:
        busy = max(rounds * (stages * stage + drain), longest * stage + drain)
    megabytes = 2e-6 * (problem.columns * problem.v + (problem.m + problem.k) * problem.n)
    return launch + busy + megabytes * US_PER_MB


def roof_us(problem: Problem, sm_count: int, clock_ghz: float = 1.755) -> tuple[float, str]:
    """The least time of the stitched design, and what sets it: the tensor cores, or L2 to shared memory (50 B a clock).

    An SM reads 2 (v + 256) bytes per kept column for a tile of 256 tokens (two groups or two token tiles do not share).
    """
    tensor = problem.flops / (sm_count * MFLOP_PER_US * 1e6)
    rows = problem.columns * problem.n / 256
    traffic = rows * 2 * (problem.v + 256) / (sm_count * 50 * clock_ghz * 1e3)
    return (tensor, "tensor cores") if tensor >= traffic else (traffic, "L2 to shared memory")


def sweep_of(config: Config, problem: Problem) -> int:
    """Column tiles that are swept over all groups before the next, so that the activations in use stay inside L2.

    wgmma and up to 64 rows a group: the fewer the better, since an SM's own half of L2 then has them (4096^3, 75 %: one
    tile is 10 to 14 % faster than four), as long as reading the weights again for every sweep costs less. 128 rows read
    less of x and more of weights: 1024 tokens (H100, 2026-11-26; the same on an H200 for 128 rows). All at once where
    all of x is small: a last sweep of cut tiles reads weights for little (33712 x 1024, 1056 tokens: 58 against 69 us).
    """
    n_tiles = ceil_div(problem.n, config.tile_n)
    if 2 * problem.k * problem.n <= SMALL_X_BYTES:
        return max(1, n_tiles)
    tokens = 1024
    if config.kernel == "sm90" and config.v <= 64:
        reread = 2 * problem.columns * config.v > REREAD_BYTES and config.v == 64 and config.tile_n == 512
        tokens = 1024 if reread else config.tile_n
    return max(1, min(n_tiles, tokens // config.tile_n))


def linear_tokens(problem: Problem, capability: tuple[int, int], sm_count: int, l2_bytes: int) -> int:
    """Tokens that a token-major product turns, multiplies and turns back at a time: all, unless x is larger than L2.

    Then what the gather reads is still in L2 from being turned, and the workspaces are as small as a part. Not where
    the parts leave more multiprocessors without a tile; measured on Hopper only.
    """
    k, n = problem.k, problem.n
    most = int(L2_SHARE * l2_bytes / (2 * max(1, k))) // TURNED_TOKENS * TURNED_TOKENS
    if capability[0] != 9 or 2 * k * n <= l2_bytes or not 0 < most < n:
        return n

    def rounds(tokens: int) -> int:
        return ceil_div(problem.groups * ceil_div(tokens, 256), sm_count)

    parts = ceil_div(n, most)
    tokens = ceil_div(ceil_div(n, parts), 256) * 256
    last = n - (parts - 1) * tokens
    if last <= 0 or problem.groups * tokens < TILES_AN_SM * 256 * sm_count:
        return n
    return tokens if (parts - 1) * rounds(tokens) + rounds(last) <= MORE_ROUNDS * rounds(n) else n


def table_key(problem: Problem) -> str:
    """Key of a tuned entry: sizes exactly, n and density by bucket, so that neighbours share what was measured."""
    bucket = 1 << (max(1, problem.n) - 1).bit_length()
    return f"v{problem.v} m{problem.m} k{problem.k} n{bucket} d{round(problem.density * 16)}"


@functools.cache
def tuned_table(device_name: str) -> dict[str, Any]:
    """The committed table of a device: key -> the fields of a config. Empty for devices nobody has tuned."""
    name = device_name.lower().replace(" ", "-") + ".json"
    resource = resources.files("shflnb").joinpath("tuning").joinpath("data").joinpath(name)
    if not resource.is_file():
        return {}
    table: dict[str, Any] = json.loads(resource.read_text())["entries"]
    return table


def choose(
    problem: Problem,
    capability: tuple[int, int],
    sm_count: int,
    device_name: str = "",
    remembered: dict[str, Any] | None = None,
    only: Iterable[Config] | None = None,
) -> Choice:
    """The config for a problem: what was measured for it (by the user, then by us), else the least prediction."""
    for source, table in (("tuned here", remembered or {}), ("tuned, committed", tuned_table(device_name))):
        entry = table.get(table_key(problem))
        if entry is not None and only is None:
            config = Config(**{**entry, "dtype": problem.dtype, "epilogue": "plain"})
            return Choice(config, source, predict_us(problem, config, sm_count, device_name))
    pool = list(only) if only is not None else candidates(problem.v, problem.dtype, capability)
    if capability[0] == 9 and only is None:
        pool = [c for c in pool if c.kernel == "sm90"]
    us = {config: predict_us(problem, config, sm_count, device_name) for config in pool}
    best = min(pool, key=us.__getitem__)
    return Choice(best, "least predicted time", us[best])
