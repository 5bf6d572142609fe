"""The few-column product: its specialisation (`SkinnyConfig`), its split over a device, and their choice. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ArgumentError, DeviceError
from ..formats.skinny_layout import SkinnyLayout
from .config import EPILOGUES, smem_limit

__all__ = ["MAX_N", "PAIR_BYTES", "RECORDS_IN_FLIGHT_KB", "SkinnyConfig", "SkinnySplit", "choose_config",
           "choose_split", "chunks_of", "forecast", "predict_us", "warps_of", "window_limit"]  # fmt: skip

MAX_N = 64
FINISHES = ("block", "cluster", "none")
SLOTS = ("window", "shared", "global")


@dataclass(frozen=True)
class SkinnyConfig:
    """How one few-column kernel is specialised."""

    v: int
    chunks: int
    """Columns of the activation, in units of 8: 1, 2, 4 or 8."""
    warps: int
    depth: int
    """Records of each warp's ring: one less is in flight."""
    finish: str = "cluster"
    """Who adds the slots of an item: "block" (one rank only), "cluster" (the ranks of a team), or "none" (a second
    kernel)."""
    slots: str = "shared"
    """Where the pieces' sums wait: shared memory of their own, "global" memory, or, one for each warp of an owned
    layout, the "window" once nobody reads x there."""
    dtype: str = "float16"
    epilogue: str = "plain"
    prefetch: int = 0
    """Bytes L2 fetches around each weight it is asked for: 0 (its own choice), 128 or 256."""
    is_chained: bool = False
    """Start before the kernel ahead in the stream is done, and let the next one do so (programmatic launch, sm_90 and
    newer)."""

    def __post_init__(self) -> None:
        if self.v not in (16, 32, 64, 128) or self.chunks not in (1, 2, 4, 8):
            raise ArgumentError(
                f"v = {self.v}, chunks = {self.chunks}; expected v 16, 32, 64 or 128 and chunks 1, 2, 4 or 8"
            )
        if self.warps not in (4, 8, 10, 12, 16) or not 2 <= self.depth <= 9:
            raise ArgumentError(
                f"warps = {self.warps}, depth = {self.depth}; expected 4, 8, 10, 12 or 16 warps and depth 2 to 9"
            )
        if self.finish not in FINISHES or self.slots not in SLOTS:
            raise ArgumentError(
                f"finish is {self.finish!r}, slots {self.slots!r}; expected one of {FINISHES} and of {SLOTS}"
            )
        if self.finish == "none" and self.slots != "global":
            raise ArgumentError("a second kernel cannot see shared memory; finish='none' needs slots='global'")
        if self.dtype not in ("float16", "bfloat16"):
            raise ArgumentError(f"dtype is {self.dtype!r}; the GPU kernels take float16 and bfloat16")
        if self.epilogue not in EPILOGUES:
            raise ArgumentError(f"epilogue is {self.epilogue!r}; expected one of {EPILOGUES}")
        if self.prefetch not in (0, 128, 256):
            raise ArgumentError(f"prefetch is {self.prefetch}; expected 0, 128 or 256 bytes")

    @property
    def strips(self) -> int:
        """16-row strips of an item."""
        return min(self.v, 64) // 16

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def record_bytes(self) -> int:
        """Bytes of a step: the weights in fragment order and 16 column places."""
        return self.strips * 512 + 32

    @property
    def slot_bytes(self) -> int:
        """Bytes of a piece's sum: 512 for each 16 x 8 tile."""
        return self.strips * self.chunks * 512

    @property
    def ring_bytes(self) -> int:
        """Shared memory of all rings."""
        return self.warps * self.depth * self.record_bytes

    @property
    def accumulators(self) -> int:
        """float32 accumulators of a thread."""
        return self.strips * self.chunks * 4

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that registers must allow on an SM: two where they are few, for a chained kernel beside this one."""
        return 2 if self.threads <= 256 and self.accumulators <= 16 else 1

    def place_rows(self, rows: int) -> int:
        """Where the row of zeros stands: after a window of `rows` rows, and where the slots of all warps end."""
        return max(rows, 32 * self.warps * self.strips - 8) if self.slots == "window" else rows

    def smem_bytes(self, rows: int, slots: int, words: int) -> int:
        """Dynamic shared memory: window of `rows` rows (a multiple of 8), table of `words` words, rings, slots."""
        window = (self.place_rows(rows) + 8) * 16 * self.chunks
        return window + 4 * words + self.ring_bytes + (slots * self.slot_bytes if self.slots == "shared" else 0)

    @property
    def name(self) -> str:
        """The kernel's name, as a profiler shows it."""
        kind = {"float16": "f16", "bfloat16": "bf16"}[self.dtype]
        return (f"shflbw_skinny_{kind}_v{self.v}_n{8 * self.chunks}_w{self.warps}_d{self.depth}_{self.finish}"
                f"_{self.slots}_h{self.prefetch}{'_chained' if self.is_chained else ''}_{self.epilogue}")  # fmt: skip

    def with_epilogue(self, epilogue: str) -> SkinnyConfig:
        """The same kernel with another epilogue."""
        return self if epilogue == self.epilogue else replace(self, epilogue=epilogue)


# --- choice: pure -----------------------------------------------------------------------------------------------------
RECORDS_IN_FLIGHT_KB = 80  # a ring deeper than this gains nothing; H200: 4.3 TB/s times 1 us is 33 KiB an SM
PAIR_BYTES = 200 * 1024  # shared memory of a block, on devices whose SM can hold two of these blocks
TABLE_BYTES = 4096  # shared memory left for a team's table when windows are cut
# what choose_split counts with, H200 (2026-11): KiB per us that an SM gets from device memory, when all of them read;
# from L2; from the shared memory of its cluster; from its own
MEMORY_KB_PER_US, L2_KB_PER_US, CLUSTER_KB_PER_US, SHARED_KB_PER_US = 32.0, 42.0, 25.0, 150.0
CLUSTER_US, BLOCK_US = 1.0, 0.3  # the barriers around the sums
SAME_SPLIT = 1.08  # up to this much slower, few columns share the layout, and the memory, of many


@dataclass(frozen=True)
class SkinnySplit:
    """How the layout of a packed matrix is cut for a device."""

    teams: int
    ranks: int
    warps: int
    window: int


def warps_of(v: int) -> int:
    """Warps of a block: the more the shorter the records; each thread keeps the registers that 64 columns need."""
    return 10 if v <= 32 else 8


def chunks_of(n: int) -> int:
    """The kernel's columns for n of them, in units of 8."""
    return next(c for c in (1, 2, 4, 8) if n <= 8 * c)


def window_limit(v: int, smem_limit: int, chunks: int = 8) -> int:
    """Rows of x that fit beside rings of depth 4 for this many columns: what the layout's windows are cut to."""
    least = SkinnyConfig(v, chunks, warps_of(v), 4, slots="global")
    rows = (smem_limit - least.ring_bytes - TABLE_BYTES) // (16 * chunks) - 8
    return min(0x7FC0, rows // 64 * 64)


def choose_split(
    steps: np.ndarray, k: int, v: int, teams_of_ranks: dict[int, int], smem_limit: int, chunks: int = 8
) -> SkinnySplit:
    """The split with the least predicted time; what is best for 64 columns also serves fewer, if that costs little.

    `steps` has the 16-column steps of every group; `teams_of_ranks` says how many teams of each size run at once.
    """

    def cost(split: SkinnySplit, columns: int) -> float:
        return predict_us(steps, k, v, split, columns)

    def options(columns: int) -> list[SkinnySplit]:
        found = []
        for ranks, teams in sorted(teams_of_ranks.items()):
            used = max(1, min(teams, len(steps) * max(1, v // 64)))
            is_owned = _team_loads(steps, v, used)[1] <= warps_of(v)
            found.append(SkinnySplit(used, ranks, warps_of(v), window_limit(v, smem_limit, 8 if is_owned else columns)))
        return found

    many = min(options(8), key=lambda split: cost(split, 8))
    if chunks > 2:
        return many
    few = min(options(2), key=lambda split: cost(split, 2))
    return many if cost(many, 2) <= SAME_SPLIT * cost(few, 2) else few


def _team_loads(steps: np.ndarray, v: int, teams: int) -> tuple[float, int]:
    """Steps of the busiest team and items of the team with most."""
    loads = [(0, 0)] * teams
    for load in np.sort(np.repeat(steps, max(1, v // 64)))[::-1].tolist():
        heapq.heapreplace(loads, (loads[0][0] + load, loads[0][1] + 1))
    return float(max(load for load, _ in loads)), max(items for _, items in loads)


def predict_us(steps: np.ndarray, k: int, v: int, split: SkinnySplit, chunks: int) -> float:
    """Microseconds that the busiest block streams weights and x and adds slots; the launch is not counted."""
    config = SkinnyConfig(v, chunks, split.warps, 2, slots="global")
    load, items = _team_loads(steps, v, split.teams)
    weights = load / split.ranks * config.record_bytes / 1024
    rows = k / split.ranks
    x = rows * 16 * chunks / 1024
    all_weights = float(steps.sum()) * max(1, v // 64) * config.record_bytes / 1024 / split.teams / split.ranks
    slots = split.warps
    if items > split.warps:  # not owned: pieces end with items and phases, and the last of them wait in L2
        slots = split.warps + (items - 1) * max(1, round(rows / split.window + 0.49))
    sums = slots * config.slot_bytes / 1024
    stream = max(
        all_weights / MEMORY_KB_PER_US,
        (weights + x + (sums if items > split.warps and chunks > 2 else 0)) / L2_KB_PER_US,
    )
    if split.ranks == 1:
        return stream + sums / SHARED_KB_PER_US + BLOCK_US
    return stream + sums * (split.ranks - 1) / split.ranks / CLUSTER_KB_PER_US + CLUSTER_US


def forecast(
    steps: np.ndarray, k: int, v: int, n: int, dtype: str, capability: tuple[int, int], sm_count: int
) -> tuple[SkinnySplit, SkinnyConfig, int, float]:
    """Split, kernel, bytes of shared memory and microseconds that a device will probably take; packs nothing."""
    limit = smem_limit(capability)
    split = choose_split(steps, k, v, {ranks: sm_count // ranks for ranks in (1, 2, 4, 8)}, limit, chunks_of(n))
    finish = "block" if split.ranks == 1 else "cluster" if capability[0] >= 9 else "none"
    is_owned = finish != "none" and _team_loads(steps, v, split.teams)[1] <= split.warps
    slots = "window" if is_owned else "global"
    config = SkinnyConfig(v, chunks_of(n), split.warps, 4, finish, slots, dtype, is_chained=capability[0] >= 9)
    rows = min(-(-k // split.ranks // 8) * 8, split.window if n > 16 else k)
    return split, config, min(limit, config.smem_bytes(rows, 0, 64)), predict_us(steps, k, v, split, chunks_of(n))


def choose_config(
    layout: SkinnyLayout, n: int, dtype: str, smem_limit: int, finish: str, is_chained: bool
) -> tuple[SkinnyConfig, bool]:
    """The kernel for n columns and whether it loads a block's whole window at once.

    Where two blocks fit an SM with rings of depth 4 they get no more: a chained kernel then starts beside the one
    before it.
    """
    warps, words = layout.warps.shape[1], layout.team_table.shape[1]
    base = SkinnyConfig(layout.v, chunks_of(n), warps, 2, finish, "global", dtype, is_chained=is_chained)
    wanted = max(3, min(9, 1 + RECORDS_IN_FLIGHT_KB * 1024 // (warps * base.record_bytes)))
    places = ("global",) if finish == "none" else ("window", "global") if layout.is_owned else ("shared", "global")
    for is_merged in (True, False):
        rows = layout.window_rows(is_merged)
        for slots in places:
            for depth in range(wanted, 2, -1):
                config = replace(base, slots=slots, depth=depth)
                size = config.smem_bytes(rows, layout.slots, words)
                if size <= smem_limit and (slots != "shared" or depth >= min(4, wanted)):
                    for shallower in range(depth, 3, -1):
                        pair = replace(config, depth=shallower)
                        if (
                            config.blocks_per_sm == 2
                            and smem_limit >= PAIR_BYTES
                            and 2 * (pair.smem_bytes(rows, layout.slots, words) + 1024) <= smem_limit + 1024
                        ):
                            return pair, is_merged
                    return config, is_merged
    raise DeviceError(
        f"{n} columns do not fit {smem_limit} bytes of shared memory a block; use the kernels for many columns"
    )
