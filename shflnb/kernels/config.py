"""What is asked (`Problem`) and how it is answered (`Config`): frozen, printable, self-checking records.

A Config, with the architecture, selects a compile; a Problem selects a Config. Every size formula of a kernel stands
here once, so that the kernel, the launcher, `explain` and the tests cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ArgumentError

__all__ = ["ARCHITECTURES", "ATOM_BYTES", "CORE_BYTES", "Config", "EPILOGUES", "Problem", "SMEM_LIMIT",
           "SWIZZLE_128B", "ceil_div", "smem_limit"]  # fmt: skip

EPILOGUES = ("plain", "identity", "relu", "gelu", "silu")
"""plain: out = W @ x. The others: out = f(W @ x + bias) + residual, bias and residual optional at run time."""

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""The architectures that kernels are compiled, assembled and inspected for in CI."""

SMEM_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024,
              103: 227 * 1024, 120: 99 * 1024, 121: 99 * 1024}  # fmt: skip
"""Shared memory one block may have, in bytes, by capability (CUDA programming guide, technical specifications)."""

ATOM_BYTES, CORE_BYTES = 128, 128
"""One row of a 64-token atom of the stitched activations; an 8x8 core matrix of 2-byte values."""

SWIZZLE_128B = 1 << 62
"""Bits 62 and 63 of a wgmma descriptor."""

REGISTERS = {1: (80, 208), 2: (40, 208)}
"""sm90: registers a thread of (producers, consumers), by warpgroups of producers. All warpgroups of a block together
(two are consumers) must stay within what its launch takes: 504 with three warpgroups (168 each), 512 with four, or
setmaxnreg waits for registers that never come."""


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def smem_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory one block may have on a device of this capability; the smallest known for unknown ones."""
    return SMEM_LIMIT.get(capability[0] * 10 + capability[1], 99 * 1024)


@dataclass(frozen=True)
class Problem:
    """One product: a packed weight of (m, k) in groups of v times n columns."""

    m: int
    k: int
    n: int
    v: int
    dtype: str
    columns: int
    """Kept columns over all groups (unpadded)."""
    longest: int
    """Kept columns of the longest group."""
    epilogue: str = "plain"

    @property
    def groups(self) -> int:
        """Row groups, the short last one counted."""
        return ceil_div(self.m, self.v)

    @property
    def density(self) -> float:
        """Kept share of the weight."""
        return self.columns / max(1, self.groups * self.k)

    @property
    def flops(self) -> float:
        """Floating-point operations on kept columns (a multiply and an add each)."""
        return 2.0 * self.columns * self.v * self.n


@dataclass(frozen=True)
class Config:
    """How one kernel is specialised. Sizes of the problem are run-time arguments and never part of it."""

    kernel: str
    """"sm90" (wgmma) or "sm80" (mma.sync)."""
    v: int
    tile_n: int
    tile_k: int
    stages: int
    dtype: str = "float16"
    epilogue: str = "plain"
    blocks_per_sm: int = 1
    producers: int = 1
    """sm90: warpgroups that stitch (1 or 2)."""
    team: int = 4
    """sm90: producer warps that fill a stage together; with fewer than all of them, teams fill stages in turns."""
    alternate: bool = False
    """sm90: the consumers take tiles in turns, one storing its results while the other multiplies; v <= 64."""

    def __post_init__(self) -> None:
        if self.kernel not in ("sm80", "sm90"):
            raise ArgumentError(f"kernel is {self.kernel!r}; expected 'sm80' or 'sm90'")
        if self.dtype not in ("float16", "bfloat16"):
            raise ArgumentError(f"dtype is {self.dtype!r}; the GPU kernels take float16 and bfloat16")
        if self.epilogue not in EPILOGUES:
            raise ArgumentError(f"epilogue is {self.epilogue!r}; expected one of {EPILOGUES}")
        if self.v not in (16, 32, 64, 128):
            raise ArgumentError(f"v is {self.v}; expected 16, 32, 64 or 128")
        if self.tile_k not in (16, 32, 64) or self.stages < 2:
            raise ArgumentError(
                f"tile_k = {self.tile_k}, stages = {self.stages}; expected tile_k 16, 32 or 64 and stages >= 2"
            )
        getattr(self, f"_check_{self.kernel}")()

    def _check_sm90(self) -> None:
        if self.producers not in (1, 2) or self.team not in (1, 2, 4, 8) or self.teams < 1 or self.teams > self.stages:
            raise ArgumentError(
                f"sm90: producers = {self.producers}, team = {self.team}; expected 1 or 2 warpgroups, in teams of "
                "1, 2, 4 or 8 warps, no more teams than stages"
            )
        if self.alternate and (self.v == 128 or self.tile_n > 256):
            raise ArgumentError("sm90: tiles in turns need v <= 64 and tile_n <= 256")
        if self.copies_per_stage > 32:
            raise ArgumentError(f"sm90: {self.copies_per_stage} copies a thread; expected at most 32 (a larger team)")
        if self.tile_n == 512 and self.team < 2:
            raise ArgumentError("sm90: a stitched row of 512 tokens takes two warps: team >= 2")
        if self.tile_n not in (64, 96, 128, 160, 192, 256, 512) or self.tile_k == 16:
            raise ArgumentError(f"sm90: tile_n = {self.tile_n}, tile_k = {self.tile_k}; expected 64, 96, 128, 160, "
                                "192, 256 or 512, and 32 or 64")  # fmt: skip
        if self.copies_per_stage % 4 or self.copies_per_stage == 0:
            raise ArgumentError(
                f"sm90: tile {self.tile_n} x {self.tile_k} leaves {self.copies_per_stage} copies a thread; "
                "expected a multiple of 4"
            )
        if self.v <= 32 and self.tile_n < 128:
            raise ArgumentError("sm90: v <= 32 puts tokens on the M side, 64 for each of two warpgroups: tile_n >= 128")
        if self.tail_n and (not self.weights_are_m or self.consumer_n != self.tile_n):
            raise ArgumentError(f"sm90: consumers that share {self.tile_n} tokens would begin inside an atom of 64; "
                                "expected v = 128, or v = 64 and tiles in turns")  # fmt: skip
        if self.weights_are_m and self.consumer_n % 64 and not self.tail_n:
            raise ArgumentError(f"sm90: a consumer stores 64 tokens at a time; this tile leaves it {self.consumer_n}")
        if self.accumulators > 128:
            raise ArgumentError(f"sm90: {self.accumulators} accumulators a thread; at most 128 fit")
        if self.producers == 2 and self.accumulators > 64:
            raise ArgumentError(
                f"sm90: {self.accumulators} accumulators a thread with four warpgroups; 512 threads leave 128 "
                "registers each, room for 64"
            )
        if self.smem_bytes > SMEM_LIMIT[90]:
            raise ArgumentError(f"sm90: {self.smem_bytes} bytes of shared memory; at most {SMEM_LIMIT[90]}")

    def _check_sm80(self) -> None:
        if self.tile_n not in (64, 128, 256):
            raise ArgumentError(f"sm80: tile_n = {self.tile_n}; expected 64, 128 or 256")
        if self.smem_bytes > SMEM_LIMIT[90]:
            raise ArgumentError(f"sm80: {self.smem_bytes} bytes of shared memory; at most {SMEM_LIMIT[90]}")

    # --- what the kernel, the launcher and explain() share -----------------------------------------------------------
    @property
    def x_stage_bytes(self) -> int:
        """Bytes of one stage of stitched activations, whole atoms of 64 tokens."""
        return self.tile_k * ceil_div(self.tile_n, 64) * ATOM_BYTES

    @property
    def w_stage_bytes(self) -> int:
        """Bytes of one stage of packed weights."""
        return self.tile_k * self.v * 2

    @property
    def stage_bytes(self) -> int:
        """Bytes of one stage of the ring."""
        return self.x_stage_bytes + self.w_stage_bytes

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 256 + 128 * self.producers if self.kernel == "sm90" else 32 * self.sm80_warps

    # sm90
    @property
    def weights_are_m(self) -> bool:
        """sm90: whether the weights are the M (64-row) side of wgmma; for v <= 32 the tokens are."""
        return self.v >= 64

    @property
    def row_splits(self) -> int:
        """sm90, weights as M: consumer warpgroups that share one stitched tile by rows."""
        return self.v // 64 if self.v >= 64 else 1

    @property
    def consumer_n(self) -> int:
        """sm90: tokens that one consumer warpgroup computes."""
        return self.tile_n if self.alternate else self.tile_n * self.row_splits // 2

    @property
    def accumulators(self) -> int:
        """float32 accumulators a consumer thread holds."""
        if self.kernel == "sm80":
            return self.sm80_warp_m // 16 * (self.sm80_warp_n // 8) * 4
        return self.consumer_n // 2 if self.weights_are_m else self.consumer_n // 64 * (self.v // 2)

    @property
    def head_n(self) -> int:
        """sm90: tokens of a stitched row that a power of two of producer threads copies, a 16-byte chunk each."""
        return 1 << (self.tile_n.bit_length() - 1)

    @property
    def tail_n(self) -> int:
        """sm90: the tokens behind them, which are copied after them, by fewer threads to a row; 0 for most tiles."""
        return self.tile_n - self.head_n

    @property
    def copies_per_stage(self) -> int:
        """sm90: 16-byte copies each producer thread issues for a stage's heads of rows."""
        return self.tile_k * self.head_n // 8 // (32 * self.team)

    @property
    def tail_copies(self) -> int:
        """sm90: those for their tails; whole, as a head's are a multiple of four and no tail is less than a quarter."""
        return self.tile_k * self.tail_n // 8 // (32 * self.team)

    @property
    def teams(self) -> int:
        """sm90: teams of producer warps."""
        return 4 * self.producers // self.team

    @property
    def producer_rows(self) -> int:
        """sm90: stitched rows that one producer warp copies in a stage."""
        return self.tile_k * max(1, self.tile_n // 256) // self.team

    @property
    def registers(self) -> tuple[int, int]:
        """sm90: registers a thread of a producer and of a consumer warpgroup has after the start."""
        return REGISTERS[self.producers]

    @property
    def ids_bytes(self) -> int:
        """sm90: shared memory of the column ids on their way: 8 stages for each producer warp."""
        return 4 * self.producers * 8 * self.producer_rows * 4

    @property
    def staging_bytes(self) -> int:
        """Shared memory through which the results leave."""
        if self.kernel == "sm80":
            return self.sm80_warps * 16 * (self.sm80_warp_n * 2 + 16)
        if self.weights_are_m:
            return 8 * 16 * 144
        return 2 * self.v * (self.consumer_n * 2 + 16)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""
        if self.kernel == "sm90":
            return self.stages * self.stage_bytes + 256 + self.ids_bytes + self.staging_bytes
        return max(self.stages * self.stage_bytes, self.staging_bytes)

    # sm80
    @property
    def sm80_warps(self) -> int:
        """sm80: warps of a block."""
        return self.v // self.sm80_warp_m * (self.tile_n // self.sm80_warp_n)

    @property
    def sm80_warp_m(self) -> int:
        """sm80: weight rows one warp computes."""
        return min(self.v, 64)

    @property
    def sm80_warp_n(self) -> int:
        """sm80: tokens one warp computes."""
        return 32 if self.tile_n >= 128 else 16

    @property
    def name(self) -> str:
        """The kernel's name, as a profiler shows it."""
        kind = {"float16": "f16", "bfloat16": "bf16"}[self.dtype]
        return (f"shflbw_{self.kernel}_{kind}_v{self.v}_n{self.tile_n}_k{self.tile_k}_s{self.stages}"
                f"_p{self.producers}t{self.team}_b{self.blocks_per_sm}_{self.epilogue}"
                f"{'_alternate' if self.alternate else ''}")  # fmt: skip

    def with_epilogue(self, epilogue: str) -> Config:
        """The same tiling with another epilogue."""
        return self if epilogue == self.epilogue else replace(self, epilogue=epilogue)
