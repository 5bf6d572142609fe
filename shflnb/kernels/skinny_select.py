"""Which few-column kernel takes a product, for x of either layout: what was measured here first, else the rule. Pure.

A call with feature-major x can only take kernels for such x. One with token-major x may also take a kernel that
stitches it value by value; with the others x is turned first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import Problem
from .remembered import FEW
from .select import table_key
from .skinny_config import (
    DEEP_STAGES,
    MOST_STAGES,
    PARTS_RANKS,
    STITCH_ALONE_STAGES,
    STITCH_FEW_STAGES,
    STITCH_STAGES,
    TOKENS_STAGES_32,
    TURNED_STAGES,
    SkinnyConfig,
    choose_config,
    config_of,
    has_parts,
    room_for,
    takes_tokens,
)

__all__ = ["LAYOUTS", "FewChoice", "choose_few", "few_candidates", "few_key", "fits_few", "parts_candidates"]

LAYOUTS = ("feature", "token")
"""Layouts of x, and of the result beside it."""


ALONE = {(128, 16): (1, 2, 4, 8), (64, 16): (2,), (64, 32): (1, 2, 8)}
"""By rows of a group and room for tokens: the ranks with which a block alone on its multiprocessor stitches token-major
x with eight warps. Where there are no clusters, there is one rank."""


@dataclass(frozen=True)
class FewChoice:
    """A kernel for few columns with the reason it was taken."""

    config: SkinnyConfig
    reason: str


def few_candidates(v: int, n: int, dtype: str, layout: str = "token") -> list[SkinnyConfig]:
    """Every kernel for groups of v rows and n columns (16, 32 or 64 have room) that x of this layout may take."""
    tokens, found = room_for(n), []
    for ranks in (r for r in (1, 2, 4, 8) if r <= v // 8):
        if v < 128 and (tokens < 64 or ranks == 1):
            found.append(config_of(v, tokens, ranks, dtype, 2))
        if v == 128 or tokens == 64:
            found.append(config_of(v, tokens, ranks, dtype, 1, stages=TURNED_STAGES if v == 64 else MOST_STAGES))
        elif v == 64 and ranks <= 2:
            found += [config_of(v, tokens, ranks, dtype, 1, stages=stages) for stages in (TURNED_STAGES, DEEP_STAGES)]
        if (v, tokens, ranks) == (32, 16, 2):
            found.append(config_of(v, tokens, ranks, dtype, 2, stages=TOKENS_STAGES_32))
        if layout == "feature" or tokens == 64:
            continue
        if tokens == 16 and v == 64:
            kinds = (STITCH_STAGES, STITCH_FEW_STAGES) if ranks <= 2 else (STITCH_STAGES,)
            found += [config_of(v, tokens, ranks, dtype, 2, token_major=True, stages=stages) for stages in kinds]
        elif tokens == 16 and v < 128:
            found.append(config_of(v, tokens, ranks, dtype, 2, token_major=True))
            if (v, ranks) == (32, 2):
                found.append(config_of(v, tokens, ranks, dtype, 2, token_major=True, stitchers=8))
        if ranks in ALONE.get((v, tokens), ()):
            stages = STITCH_ALONE_STAGES if (v, tokens) == (64, 16) else MOST_STAGES
            found.append(config_of(v, tokens, ranks, dtype, 1, token_major=True, stitchers=8, stages=stages))
    return found


def parts_candidates(v: int, n: int, dtype: str) -> list[SkinnyConfig]:
    """Every kernel for several matrices at once, of token-major x that may have been turned; none where v is too small.

    They are those of one matrix with two blocks on a multiprocessor, or with one where v is 128.
    """
    blocks, stitchers = (1, 8) if v == 128 else (2, 4)
    found = []
    for ranks in (r for r in (1, 2, 4, 8) if has_parts(v) and r <= PARTS_RANKS):
        found.append(config_of(v, n, ranks, dtype, blocks, parts=True))
        if room_for(n) == 16:
            found.append(config_of(v, n, ranks, dtype, blocks, token_major=True, parts=True, stitchers=stitchers))
    return found


def fits_few(config: SkinnyConfig, v: int, n: int, dtype: str, layout: str) -> bool:
    """Whether a kernel can take n columns of x of this layout."""
    return (
        (config.v, config.dtype, config.parts) == (v, dtype, False)
        and n <= 8 * config.chunks
        and (layout == "token" or not config.token_major)
    )


def few_key(problem: Problem, layout: str) -> str:
    """Key of a tuned entry: that of `select.table_key`, for x of a layout."""
    return f"{FEW}{table_key(problem)} {layout}"


def choose_few(
    problem: Problem, tiles: int, sm_count: int, layout: str, remembered: Mapping[str, Mapping[str, Any]]
) -> FewChoice:
    """The kernel for a problem of so many k tiles in all, its epilogue "plain".

    Parameters
    ----------
    layout : one of `LAYOUTS`
        Of x.
    remembered : `few_key` -> fields of a `SkinnyConfig`
        What was measured on the device; an entry that does not fit is passed over.
    """
    entry = remembered.get(few_key(problem, layout))
    if entry is not None:
        config = SkinnyConfig(**{**entry, "dtype": problem.dtype, "epilogue": "plain", "parts": False})
        if fits_few(config, problem.v, problem.n, problem.dtype, layout):
            return FewChoice(config, "tuned here")
    token_major = layout == "token" and takes_tokens(problem.m, problem.k, problem.n, problem.v, problem.density)
    config = choose_config(problem.v, problem.n, problem.groups, tiles, problem.dtype, sm_count,
                           token_major=token_major, is_turned=layout == "token" and not token_major)  # fmt: skip
    return FewChoice(config, "the rule")
