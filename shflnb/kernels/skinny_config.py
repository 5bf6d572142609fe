"""How the few-column kernel for Hopper (`skinny_wgmma.py`) is specialised: a frozen, self-checking record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from ..errors import ArgumentError
from .config import EPILOGUES, SMEM_LIMIT

__all__ = ["ACTIVATED", "BARRIER_BYTES", "DEEP_STAGES", "EQUAL_LONG_TOKENS", "EQUAL_TOKENS", "FIRST_PLACES", "FOURS",
           "MAX_N", "MOST_STAGES", "NARROW_K", "PACED", "PARTS_RANKS", "SHORT_TILES",
           "STITCH_ALONE_STAGES", "STITCH_FEW_STAGES", "STITCH_STAGES", "TILE_K", "TOKENS_STAGES_32", "TURNED_STAGES",
           "TURN_CHUNKS", "TURN_IN_FEATURES", "TURN_OUT_FEATURES", "TURN_THREADS", "SkinnyConfig", "choose_config",
           "config_of", "has_parts", "is_paced", "memory_us", "predict_us", "room_for", "stores_directly",
           "takes_tokens", "without_clusters"]  # fmt: skip

MAX_N = 64
"""Columns that the kernel has room for."""

TILE_K = 64
"""Kept columns of a stage."""

NARROW_K = 0xFFFF
"""Most columns of a matrix whose ids have 2 bytes. They are read once with the weights: with 4 bytes they are 3 % of
these in groups of 64 rows, 6 % in groups of 32 (28672 x 4096, 75 %, 1 column: 13.3 us in place of 13.5, groups of 32
rows 14.3 in place of 14.6; H200, 2026-11-28)."""

MOST_STAGES = 20
"""Of a ring."""

BARRIER_BYTES = 512
"""Shared memory of the barriers."""

FIRST_PLACES = 0x9E3779B1
"""A group begins at this multiple of its number, in 2**32-ths of its k tiles: the golden ratio's, so that any groups
that run at once begin far apart."""

MEMORY_BYTES_PER_US = 33_500.0
"""Bytes that a multiprocessor's share of device memory delivers: 4.4 TB/s over 132 of them, which a product with one
column of 28672 x 4096 nearly gets (H200, 2026-11-28)."""

START_US = 1.5
"""What a product costs beside the bytes of its weights: 0.2 us with one column of a large layer to 2.3 with eight of a
small one (H200, 2026-11-28, 8 to 60 MB, CUDA graphs)."""

FILLED = 0.9
"""Share of the multiprocessors that must have work before a group is not split further."""

FILLED_TURNED, FILLED_SHORT = 0.7, 0.45
"""The same for blocks with 64 rows, alone on their multiprocessor, whose x was turned: 6144 x 4096, 75 %, 64 columns:
8.3 us with a block to a group, on 96 multiprocessors, 9.5 with two; of feature-major x with 33 columns and more, and
the second where groups are short (`SHORT_TILES`): 4096 x 4096, 75 %: 4.8 us on 64, 5.1 with two (H200, 2026-11-28)."""

MANY_64 = 1.5
"""Groups of 64 rows for each multiprocessor from which two blocks share one with 33 columns and more of feature-major x
(14336 x 4096, 75 %: 9.4 us, alone 10.2; H200, 2026-11-28)."""

TURN_THREADS = 64
"""Threads of a block of the kernels that turn; 128 are 2 to 3 % slower (H100, 2026-11-26)."""

TURN_IN_FEATURES, TURN_OUT_FEATURES = 4, 8
"""Features that a thread of them turns."""

TURN_CHUNKS = 4
"""Most 16-byte chunks (8 tokens) of the same features that neighbouring threads turn, so that what a warp stores
together fills sectors of x, and lines of the result. 4096 x 4096, 75 %, 64 columns, both turns included: 7.4 us with 4,
7.8 with 2 or 8, 8.1 with chunks of x one after the other (H200, 2026-11-28)."""

FOURS = 1
"""Flag of the kernel that turns x: features are contiguous, a multiple of four, and each four start at 8-byte
boundaries."""

ACTIVATED = 16
"""Flag of a part whose results the epilogue's activation is for, beside those of `epilogue.py`."""

PACED = 32
"""Flag, beside those, of a product whose first weights are asked for slowly: one whose x is turned before it, or that
reads much of x (`is_paced`). At full speed they hold up what all blocks wait for. A turn has stored what it has to
within a microsecond, but then counts as done only two later; a product's last stages come late."""

FILL_NS, FILL_ALONE_NS = 2000, 500
"""Nanoseconds in which such a product fills its ring, the second for a block that has its multiprocessor alone and
stitches token-major x. 14336 x 4096, 75 %, 32 columns: 12.5 us at full speed, 11.8 in 2000 ns, 12.0 in 4000; 4096 x
4096, 75 %, 16 columns: 5.77 us at full speed, 5.45 in 500 ns, 5.50 in 2000, 6.9 in 3500 (H200, 2026-11-28)."""

PACED_TOKENS, PACED_FEW_TOKENS, PACED_VALUES = 60, 30, 4_000_000
"""Tokens per share of kept columns from which a product that stitches token-major x is paced: what it reads of x is
then no less than its weights. The second up to `EQUAL_TOKENS`, where weights are asked for sooner (14336 x 4096, 87.5
%, 4 columns: 5.45 us in place of 5.9; H200, 2026-11-28). With up to 8 tokens only where more values are kept than the
blocks' rings hold (4096 x 14336, 87.5 %, 8 columns: 6.1 us in place of 6.3; 4096 x 4096: 3.9 in place of 3.6; H200,
2026-11-28)."""

EQUAL_TOKENS, EQUAL_LONG_TOKENS = 4, 16
"""Columns up to which blocks compute their records where groups are equal, instead of reading them: their weights and
ids are asked for sooner (14336 x 4096, 87.5 %, 4 columns: 5.5 us in place of 6.1; H200, 2026-11-28). With more columns
that is too soon: they hold up the last stages of the product before (4096 x 4096, 75 %, 16 columns: 6.0 us in place of
5.3). The second for blocks alone on their multiprocessor with long groups (`SHORT_TILES`), where less depends on it
(4096 x 14336, 75 %, 8 columns: 8.8 us in place of 8.9)."""

WHOLE_TOKENS, WHOLE_64 = 4, 3
"""Columns up to which short groups of 64 rows are not shared where there are so many for each multiprocessor (28672 x
4096, 87.5 %, 1 column: 7.2 us, shared 7.7; 14336 x 4096, 4 columns: 5.9, shared 5.1; H200, 2026-11-28)."""

STITCH_STAGES, STITCH_FEW_STAGES, STITCH_FEW_TOKENS, STITCH_ALONE_STAGES = 6, 8, 8, 10
"""Stages of two blocks with 64 rows that stitch token-major x of up to 16 columns, the second up to so many of them,
whose x needs less of L1 (28672 x 4096, 75 %: 8 columns 15.4 us with 8, 15.7 with 6; 16 columns 17.4 with 8, 16.6 with
6), unless their results are turned, which 6 are better for (87.5 %, 8 columns: 9.4 us in place of 9.7); and of one that
has its multiprocessor alone (4096 x 14336, 87.5 %, 8 columns: 5.7 us, 5.8 with 8; H200, 2026-11-28)."""

PARTS_RANKS = 4
"""Most blocks of a cluster where a matrix has parts: they have few groups only if all of them are small."""

LONG_TILES = 48
"""k tiles of a group of 128 rows from which eight blocks share it, if they stitch token-major x: what each reads of x
then stays in L1. Of smaller groups there are too many: only 15 clusters of eight find room at a time."""

TOKENS_SMEM = {1: 104 * 1024, 2: 164 * 1024}
"""Shared memory of a multiprocessor that one or two blocks which stitch token-major x may have: the rest is L1, which x
is read through. A deeper ring is slower: 4096 x 14336, 75 %, 16 columns: 14.2 us with 20 stages, 12.3 with 11 (H100,
2026-11-28); 10.2 with nine, 10.1 with eight (H200, 2026-11-28). L1 has what remains of the next larger of 100, 132, 164
and 196 KiB."""

TOKENS_SMEM_128 = 164 * 1024
"""The first of these for groups of 128 rows, whose stages are large."""

TOKENS_STAGES, TOKENS_STAGES_32 = 12, 8
"""Most stages of such a block, and of one with groups of 32 rows: 14336 x 4096, 75 %, 8 columns: 11.5 us with 8, 13.3
with 12 (H200, 2026-11-28)."""

MANY_32 = 2
"""Groups of 32 rows for each multiprocessor from which four stitching warps a block are better than eight, as three of
its blocks then find room (28672 x 4096, 75 %, 8 columns: 17.0 us, with eight 19.3; 6144 x 4096: 6.0, with eight 5.65;
H200, 2026-11-28), from which a group is not shared with 17 columns or more, and from which eight stages are enough for
up to 16."""

SHORT_TILES = 24
"""k tiles of a group below which its end counts: it is then not shared for the sake of an even last round. Few groups
that are longer have blocks alone on their multiprocessor also with feature-major x (4096 x 14336, 75 %, 16 columns:
8.2 us, two blocks 9.5; H200, 2026-11-28)."""

TURNED_STAGES, DEEP_STAGES, DEEP_TILES = 10, 16, 27
"""Stages of a block with 64 rows, alone on its multiprocessor; up to 32 columns of turned x the second where each
multiprocessor has at least so many k tiles (H200, 2026-11-28, 32 columns: 28672 x 4096, 75 %: 19.8 us with 10,
18.8 with 16; 4096 x 14336, 87.5 %: 7.85 with 10, 8.3 with 16)."""

TOKENS_SPREAD, FAR_SPREAD = {16: 25, 32: 100, 64: 256, 128: 256}, {16: 25, 32: 50, 64: 100, 128: 256}
"""Tokens, by rows of a group, per share of kept columns up to which token-major x is stitched value by value: the fewer
columns are kept, the fewer of a sector's values are; small groups read x more often. The second where x has more than
`FAR_X` values, or groups of 32 rows more than `FAR_KEPT` in all. From nine tokens in groups of 64 rows and more
`READ_X` decides."""

FAR_X, FAR_KEPT = 150_000, 5_000_000

READ_X = {64: 40_000_000, 128: 25_000_000}
"""Values of x, by rows of a group, per share of kept columns that all groups may read together, so that nine to 16
tokens are stitched, and not turned before. H200, 2026-11-28, 16 tokens: 6144 x 4096, 75 %: 6.45 us, turned 6.9; 87.5 %:
5.8, turned 5.5; 14336 x 4096, 50 %: 17.8, turned 18.1; 75 %: 11.2, turned 10.4."""

READ_X_TURNED = 3
"""So many times more where the result is turned in any case, if x stays in L1 (`X_VALUES`): 28672 x 4096, 75 %: 17.6
us, turned 18.0; 87.5 %: 11.7, turned 11.3."""

WIDE_VALUES = 3_000_000
"""Kept values up to which token-major x of 17 to 32 tokens is stitched, too, in groups of 64 rows: two launches
less."""

MANY_ROWS = 8192
"""With more rows a block has many groups, so that what it reads of x must stay in L1 (`X_VALUES`)."""

X_VALUES, X_VALUES_LONG = 65_536, 262_144
"""Most values of x that two and eight blocks can keep in L1 between them."""

DIRECT_VALUES, DIRECT_TURNED_VALUES, DIRECT_FEW_VALUES = 80_000, 60_000, 400_000
"""Values of a token-major result that are stored one by one, with 16 columns or more, with just 16 if x was turned
before (4096 x 14336, 87.5 %: 7.3 us, results turned 6.9), and with fewer; more of them are turned by a kernel of their
own. L2 takes 30 to 80 such stores a nanosecond, and that kernel costs 1.5 to 3 us (H100, 2026-11-26; H200, 2026-11-28).
Three times the first where the product also stitches x: then its groups end one after the other, and there is no other
launch around it (14336 x 4096, 75 %, 16 columns: 12.7 against 13.7 us; H100, 2026-11-28)."""

DIRECT_HIDDEN_VALUES, DIRECT_KEPT = 150_000, 80
"""With fewer than 16 columns more than so many values only if so many columns of a group are kept for each of the
result: while their weights arrive the stores go unnoticed (28672 x 4096, 8 columns: 75 % 15.3 us, turned 15.7; 87.5 %
9.9, turned 9.4; H200, 2026-11-28)."""

BESIDE_BYTES = 4096
"""Shared memory of a multiprocessor that products leave to the kernels that turn x and results: 1 KiB a block."""

ALONE_BYTES = (SMEM_LIMIT[90] + 1024) // 2 - 1024 + 16
"""Shared memory of which two blocks do not fit on a multiprocessor."""


@dataclass(frozen=True)
class SkinnyConfig:
    """How one kernel is specialised. Sizes of the problem are run-time arguments and never part of it."""

    v: int
    chunks: int
    """Room for tokens in a stitched row, in units of 8: 2, 4 or 8."""
    ranks: int
    """Blocks of a cluster that share the kept columns of a group: 1, 2, 4 or 8."""
    stages: int
    dtype: str = "float16"
    epilogue: str = "plain"
    blocks_per_sm: int = 2
    token_major: bool = False
    """Whether x is token-major; else it is feature-major, its rows at 16-byte boundaries."""
    parts: bool = False
    """Whether there are several packed matrices, each with its own result (`skinny_parts.py`)."""
    stitchers: int = 4
    """Warps that stitch x, each a stage at a time: 4 or 8, and no more than there are stages."""
    wide: bool = False
    """Whether column ids have 4 bytes and not 2, as they must where k is more than `NARROW_K`."""

    def __post_init__(self) -> None:
        if self.v not in (16, 32, 64, 128) or self.chunks not in (2, 4, 8):
            raise ArgumentError(f"v = {self.v}, chunks = {self.chunks}; expected v 16..128 and chunks 2, 4 or 8")
        if self.ranks not in (1, 2, 4, 8) or self.ranks > self.v // 8:
            raise ArgumentError(f"ranks = {self.ranks}; expected 1, 2, 4 or 8, and at most v / 8 = {self.v // 8}")
        if self.dtype not in ("float16", "bfloat16"):
            raise ArgumentError(f"dtype is {self.dtype!r}; the GPU kernels take float16 and bfloat16")
        if self.epilogue not in EPILOGUES:
            raise ArgumentError(f"epilogue is {self.epilogue!r}; expected one of {EPILOGUES}")
        if self.blocks_per_sm not in (1, 2) or not 4 <= self.stages <= MOST_STAGES:
            raise ArgumentError(f"{self.blocks_per_sm} blocks, {self.stages} stages; expected 1 or 2, and 4 to "
                                f"{MOST_STAGES}")  # fmt: skip
        if self.stitchers not in (4, 8) or self.stitchers > self.stages:
            raise ArgumentError(f"{self.stitchers} stitching warps, {self.stages} stages; expected 4 or 8, and as many "
                                "stages")  # fmt: skip
        room = _smem_room(self.blocks_per_sm)
        if self.smem_bytes > room:
            raise ArgumentError(f"{self.smem_bytes} bytes of shared memory; {self.blocks_per_sm} blocks have {room}")

    @property
    def resident_blocks(self) -> int:
        """Blocks of a multiprocessor that there must be registers for."""
        is_small = self.v <= 32 and self.token_major and self.stitchers == 4
        return 3 if is_small and self.blocks_per_sm == 2 else self.blocks_per_sm

    @property
    def row_bytes(self) -> int:
        """Bytes of a stitched row of x."""
        return 16 * self.chunks

    @property
    def x_bytes(self) -> int:
        """Bytes of a stage of stitched x."""
        return TILE_K * self.row_bytes

    @property
    def w_bytes(self) -> int:
        """Bytes of a stage of packed weights."""
        return TILE_K * self.v * 2

    @property
    def stage_bytes(self) -> int:
        """Bytes of one stage of the ring."""
        return self.x_bytes + self.w_bytes

    @property
    def row_warps(self) -> int:
        """Consumer warps that hold rows that exist, 16 each of every 64."""
        return min(4, self.v // 16)

    @property
    def sums(self) -> int:
        """Sums a lane of such a warp has: of two rows for every 64 of the group, a quarter of their tokens."""
        return 4 * self.chunks * max(1, self.v // 64)

    @property
    def share(self) -> int:
        """Those of them that one rank finishes."""
        return self.sums // self.ranks

    @property
    def pace_ns(self) -> int:
        """Nanoseconds between the first copies of weights of a product that is `PACED`."""
        is_alone = self.token_major and self.blocks_per_sm == 1
        return (FILL_ALONE_NS if is_alone else FILL_NS) // self.stages

    @property
    def threads(self) -> int:
        """Threads of a block: 4 warps multiply, others stitch x, one copies weights."""
        return 32 * (4 + self.stitchers + 1)

    @property
    def id_bytes(self) -> int:
        """Bytes of a column id."""
        return 4 if self.wide else 2

    @property
    def no_column(self) -> int:
        """The column id of a place without a column."""
        return (1 << 8 * self.id_bytes) - 1

    @property
    def id_slots(self) -> int:
        """Stages of column ids that a stitching warp keeps in shared memory, a power of two."""
        return 8 if self.stitchers == 4 else 4

    @property
    def ids_ahead(self) -> int:
        """A stitching warp's stages between the fetch of ids and their use; the slots outnumber it by two."""
        return 5 if self.stitchers == 4 else 2

    @property
    def ids_bytes(self) -> int:
        """Shared memory of the column ids on their way, for all stitching warps; as much as wide ones need."""
        return self.stitchers * self.id_slots * TILE_K * 4

    @property
    def exchange_bytes(self) -> int:
        """Shared memory in which the ranks' sums arrive, twice: as many from each rank as this one finishes."""
        return 2 * self.row_warps * 32 * 4 * self.sums if self.ranks > 1 else 0

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes: too much for two where a block has its multiprocessor alone."""
        return max(self.used_bytes, 0 if self.blocks_per_sm == 2 else ALONE_BYTES)

    @property
    def used_bytes(self) -> int:
        """Those of them that are used."""
        return self.stages * self.stage_bytes + BARRIER_BYTES + self.ids_bytes + self.exchange_bytes

    @property
    def name(self) -> str:
        """The kernel's name, as a profiler shows it."""
        kind = {"float16": "f16", "bfloat16": "bf16"}[self.dtype]
        ways = f"{'_tokens' if self.token_major else ''}{'_parts' if self.parts else ''}"
        ways += ("" if self.stitchers == 4 else f"_w{self.stitchers}") + ("_wide" if self.wide else "")
        return (f"shflbw_skinny90_{kind}_v{self.v}_n{8 * self.chunks}_r{self.ranks}_s{self.stages}"
                f"_b{self.blocks_per_sm}{ways}_{self.epilogue}")  # fmt: skip

    def with_epilogue(self, epilogue: str) -> SkinnyConfig:
        """The same kernel with another epilogue."""
        return self if epilogue == self.epilogue else replace(self, epilogue=epilogue)

    def for_columns(self, k: int) -> SkinnyConfig:
        """The same kernel for the column ids of a matrix with k columns."""
        return replace(self, wide=k > NARROW_K)


def _smem_room(blocks_per_sm: int) -> int:
    """Bytes of shared memory a block has where so many share a multiprocessor; each also costs 1 KiB of it."""
    return (SMEM_LIMIT[90] + 1024 - BESIDE_BYTES) // blocks_per_sm - 1024


def room_for(n: int) -> int:
    """Tokens that a stitched row has room for."""
    return next(tokens for tokens in (16, 32, 64) if n <= tokens)


def config_of(
    v: int, n: int, ranks: int, dtype: str, blocks_per_sm: int, *, token_major: bool = False, parts: bool = False,
    stitchers: int = 4, stages: int = MOST_STAGES,
) -> SkinnyConfig:  # fmt: skip
    """The kernel for n columns and this many ranks, with as many stages as fit, and are good unless `stages` are given;
    at most so many.
    """
    base = SkinnyConfig(v, room_for(n) // 8, ranks, stitchers, dtype, blocks_per_sm=1, token_major=token_major,
                        parts=parts, stitchers=stitchers)  # fmt: skip
    rest = base.used_bytes - base.stages * base.stage_bytes
    most = min(stages, (_smem_room(blocks_per_sm) - rest) // base.stage_bytes)
    if token_major and stages == MOST_STAGES:
        smem = TOKENS_SMEM_128 if v == 128 and blocks_per_sm == 1 else TOKENS_SMEM[blocks_per_sm]
        beside = (smem // blocks_per_sm - 1024 - rest) // base.stage_bytes
        good = TOKENS_STAGES_32 if v == 32 and blocks_per_sm == 2 else TOKENS_STAGES
        most = min(most, good, max(beside, stitchers))
    elif v == 32 and not token_major:
        most = min(most, TOKENS_STAGES)
    return replace(base, stages=most, blocks_per_sm=blocks_per_sm)


def choose_config(
    v: int, n: int, groups: int, tiles: int, dtype: str, sm_count: int, *, token_major: bool = False,
    is_turned: bool = False, parts: bool = False,
) -> SkinnyConfig:  # fmt: skip
    """The kernel for a packed matrix of so many groups and k tiles in all, on a device of so many multiprocessors.

    `token_major`: it stitches token-major x; `is_turned`: token-major x is turned before. Else x is feature-major, and
    nothing stands between two products but the end of one and the start of the next.

    By measurement over layers of language models at 50 to 94 % (H200, 2026-11-22 and 28; H100, 2026-11-26 to 28). Every
    multiprocessor needs about a group of 64 rows, or a share of one. With `parts` there are fewer kernels to choose
    from, so that there are fewer to compile and check.
    """
    if token_major:
        return _choose_stitching(v, n, groups, tiles, dtype, sm_count, parts)
    if v == 64 and not parts:
        choose = _choose_turned if is_turned else _choose_feature
        ranks, blocks, stages = choose(n, groups, tiles, sm_count)
    elif v == 32 and is_turned and not parts:
        ranks, blocks, stages = _choose_turned_32(n, groups, sm_count)
    else:
        ranks, blocks, stages = _choose_plain(v, n, groups, tiles, sm_count, parts)
    return config_of(v, n, min(ranks, v // 8), dtype, blocks, parts=parts, stages=stages)


def _ranks_that_fill(share: float, work: float, sm_count: int) -> int:
    """Ranks so that this share of the multiprocessors has work, which is so many blocks where groups are not shared."""
    return next((r for r in (1, 2, 4) if r * work >= share * sm_count), 8)


def _choose_plain(v: int, n: int, groups: int, tiles: int, sm_count: int, parts: bool) -> tuple[int, int, int]:
    """(ranks, blocks on a multiprocessor, most stages) where nothing else holds.

    With up to 32 columns and 16 tiles a group, two ranks are a few percent better than one: their blocks end closer to
    each other.
    """
    work = groups * v / 64
    ranks = _ranks_that_fill(FILLED, work, sm_count)
    if ranks == 1 and n <= 32 and tiles >= 16 * groups:
        ranks = 2
    is_alone = v == 128 or (n > 32 and ranks * work < 2 * FILLED * sm_count and not parts)
    return min(ranks, PARTS_RANKS if parts else 8), 1 if is_alone else 2, MOST_STAGES


def _choose_feature(n: int, groups: int, tiles: int, sm_count: int) -> tuple[int, int, int]:
    """The same for groups of 64 rows of feature-major x: two share a multiprocessor where there is work for both.

    The next product's first block finds room beside one of them.
    """
    room, is_long = room_for(n), tiles >= SHORT_TILES * groups
    if room == 64:
        share = FILLED_TURNED if is_long else FILLED_SHORT
        is_shared = groups >= MANY_64 * sm_count
        return (1, 2, MOST_STAGES) if is_shared else (_ranks_that_fill(share, groups, sm_count), 1, TURNED_STAGES)
    ranks, blocks, stages = _choose_plain(64, n, groups, tiles, sm_count, parts=False)
    if ranks == 2 and is_long and groups < (sm_count if room == 32 else sm_count / 2):
        return ranks, 1, TURNED_STAGES
    return ranks, blocks, stages


def _choose_turned(n: int, groups: int, tiles: int, sm_count: int) -> tuple[int, int, int]:
    """The same for groups of 64 rows of x that was turned.

    A block has its multiprocessor alone, if no more than two share a group.
    """
    room, ranks = room_for(n), _ranks_that_fill(FILLED_TURNED, groups, sm_count)
    if ranks == 1 and room == 32 and tiles >= SHORT_TILES * groups:
        ranks = 2 if _evenness(groups, max(1, sm_count // 2)) > _evenness(groups, sm_count) + 0.1 else 1
    if ranks > 2 and room <= 32:
        return ranks, 2, MOST_STAGES
    is_deep = room <= 32 and tiles >= DEEP_TILES * sm_count
    return ranks, 1, DEEP_STAGES if is_deep else TURNED_STAGES


def _choose_turned_32(n: int, groups: int, sm_count: int) -> tuple[int, int, int]:
    """The same with 32 rows: two blocks share a multiprocessor, but for 33 columns and more of a few groups."""
    room, is_many = room_for(n), groups >= MANY_32 * sm_count
    if room == 64:
        return _ranks_that_fill(FILLED, groups, sm_count), 2 if is_many else 1, MOST_STAGES
    ranks = 1 if room == 32 and is_many else max(2, _ranks_that_fill(FILLED, groups / 2, sm_count))
    return ranks, 2, TOKENS_STAGES_32 if room == 16 and is_many else MOST_STAGES


def _evenness(groups: int, clusters: int) -> float:
    """Share of the rounds of so many clusters at a time that groups fill."""
    return groups / (clusters * -(-groups // clusters))


def _choose_stitching(
    v: int, n: int, groups: int, tiles: int, dtype: str, sm_count: int, parts: bool
) -> SkinnyConfig:  # fmt: skip
    """The kernel that stitches token-major x.

    Long groups of 128 rows have eight ranks. Two blocks share a multiprocessor unless a stage is large, or there is no
    more than a group of 64 rows for each, or there are more than 16 columns.
    """
    ranks = _ranks_that_fill(FILLED, groups * v / 64, sm_count)
    is_whole = v == 64 and n <= WHOLE_TOKENS and tiles < 16 * groups and groups >= WHOLE_64 * sm_count and not parts
    if ranks == 1 and tiles >= 8 * groups and not is_whole:
        ranks = 2
    if v == 128 and tiles >= LONG_TILES * groups:
        ranks = 8
    elif n > 16:
        ranks = 2 if ranks <= 2 else 8
    else:  # two k tiles for each
        ranks = next((r for r in (8, 4, 2) if r <= ranks and 2 * r * groups <= tiles), 1)
    ranks = min(ranks, v // 8, PARTS_RANKS if parts else 8)
    is_alone = v == 128 or (not parts and (n > 16 or (v == 64 and ranks == 2 and groups <= sm_count)))
    stitchers, stages = 8 if is_alone else 4, MOST_STAGES
    if v == 64 and n <= 16 and is_alone:
        stages = STITCH_ALONE_STAGES
    elif v == 64 and n <= 16 and not parts:
        is_direct = stores_directly(groups * v, n, TILE_K * tiles / groups, stitches=True)
        stages = STITCH_FEW_STAGES if n <= STITCH_FEW_TOKENS and ranks <= 2 and is_direct else STITCH_STAGES
    elif v == 32 and ranks == 2 and groups <= MANY_32 * sm_count and not parts:
        stitchers = 8
    return config_of(v, n, ranks, dtype, 1 if is_alone else 2, token_major=True, parts=parts, stitchers=stitchers,
                     stages=stages)  # fmt: skip


def without_clusters(config: SkinnyConfig) -> SkinnyConfig:
    """The kernel that takes the place of another where a device has no room for clusters, as a part of one may."""
    blocks, stitchers, n = config.blocks_per_sm, config.stitchers, 8 * config.chunks
    stages = config.stages if config.v == 64 and blocks == 1 else MOST_STAGES
    if config.token_major and config.v < 128 and n == 16:
        blocks, stitchers, stages = 2, 4, STITCH_STAGES if config.v == 64 and not config.parts else MOST_STAGES
    alone = config_of(config.v, n, 1, config.dtype, blocks, token_major=config.token_major, parts=config.parts,
                      stitchers=stitchers, stages=stages)  # fmt: skip
    return replace(alone, epilogue=config.epilogue, wide=config.wide)


def memory_us(nbytes: int, sm_count: int) -> float:
    """The least time to read so many bytes from device memory, scaled from an H200 by multiprocessors."""
    return nbytes / (MEMORY_BYTES_PER_US * sm_count)


def predict_us(nbytes: int, sm_count: int) -> float:
    """Predicted time of a product whose packed matrix has so many bytes, without turning x or its result."""
    return START_US + memory_us(nbytes, sm_count)


def takes_tokens(m: int, k: int, n: int, v: int, density: float) -> bool:
    """Whether the product stitches token-major x itself, at this share of kept columns; else it is turned first."""
    if n > 16:
        return n <= 32 and v == 64 and 0 < m * k * density <= WIDE_VALUES
    is_long = v == 128 and k * density >= LONG_TILES * TILE_K
    fits = k * n <= (X_VALUES_LONG if is_long else X_VALUES)
    if n > 8 and v >= 64 and not is_long:
        is_turned_in_any_case = fits and not stores_directly(m, n, k * density, stitches=True)
        return m * k * n <= READ_X[v] * v * density * (READ_X_TURNED if is_turned_in_any_case else 1)
    is_far = k * n > FAR_X or (v == 32 and m * k * density > FAR_KEPT)
    return (m <= MANY_ROWS or fits) and n <= (FAR_SPREAD if is_far else TOKENS_SPREAD)[v] * density


def is_paced(m: int, k: int, n: int, density: float) -> bool:
    """Whether a product that stitches token-major x asks for its first weights slowly (`PACED`)."""
    tokens = PACED_FEW_TOKENS if n <= EQUAL_TOKENS else PACED_TOKENS
    return n >= tokens * density and (n > 8 or m * k * density >= PACED_VALUES)


def stores_directly(m: int, n: int, kept: float = inf, *, parts: bool = False, stitches: bool = False) -> bool:
    """Whether the product itself stores a token-major result, 2 bytes at a time.

    `kept`: columns of a group. `stitches`: it also stitches token-major x. With `parts` m is that of all of them
    together: the alternative is to turn each, by a launch of its own.
    """
    if n < 16:
        is_hidden = parts or m * n <= DIRECT_HIDDEN_VALUES or kept >= DIRECT_KEPT * n
        return m * n <= DIRECT_FEW_VALUES and is_hidden
    if n == 16 and not (parts or stitches):
        return m * n <= DIRECT_TURNED_VALUES
    return m * n <= DIRECT_VALUES * (2 if parts else 3 if stitches else 1)


def has_parts(v: int) -> bool:
    """Whether products with groups of v rows are joined; the least would only double the kernels of this family."""
    return v >= 32
