"""All GPU kernels of an architecture in one list, so that a test can compile and inspect them and none is forgotten.

A new kernel family adds one function to `FAMILIES`; what a family lists here is what the selection may launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from .config import EPILOGUES
from .launch import KernelSpec
from .select import candidates
from .skinny_config import NARROW_K, SkinnyConfig
from .skinny_plan import kernel_spec as skinny_spec
from .skinny_plan import turn_in_spec, turn_out_spec
from .skinny_select import few_candidates, parts_candidates
from .spmm_plan import copy_spec, kernel_spec, transpose_spec

__all__ = ["FAMILIES", "TARGETS", "all_specs", "capability_of"]

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
"""What kernels are assembled for: "sm_90a" holds the wgmma kernels, the others the portable ones."""


def capability_of(arch: str) -> tuple[int, int]:
    """(major, minor) of an architecture's name: "sm_90a" -> (9, 0)."""
    digits = arch.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def _products(arch: str) -> Iterator[KernelSpec]:
    for v in (16, 32, 64, 128):
        for dtype in ("float16", "bfloat16"):
            for config in candidates(v, dtype, capability_of(arch)):
                if (config.kernel == "sm90") == arch.endswith("a"):
                    for epilogue in EPILOGUES:
                        yield kernel_spec(config.with_epilogue(epilogue))


def _moves(arch: str) -> Iterator[KernelSpec]:
    if not arch.endswith("a"):
        for adds in ("", "float16", "bfloat16"):
            yield transpose_spec(capability_of(arch)[0] >= 9, adds)
        yield copy_spec()


def _few_configs() -> Iterator[SkinnyConfig]:
    """All that `skinny_select.choose_few` may take, and those for several matrices at once; wide ones, too."""
    for v, tokens, dtype in itertools.product((16, 32, 64, 128), (16, 32, 64), ("float16", "bfloat16")):
        for config in (*few_candidates(v, tokens, dtype), *parts_candidates(v, tokens, dtype)):
            yield from (config.for_columns(k) for k in (NARROW_K, NARROW_K + 1))


def _few_columns(arch: str) -> Iterator[KernelSpec]:
    if arch == "sm_90":
        yield turn_in_spec()
        yield turn_out_spec()
    if arch == "sm_90a":
        for config in _few_configs():
            yield from (skinny_spec(config.with_epilogue(epilogue)) for epilogue in EPILOGUES)


FAMILIES: tuple[Callable[[str], Iterator[KernelSpec]], ...] = (_products, _few_columns, _moves)


def all_specs(arch: str) -> list[KernelSpec]:
    """Every kernel that shflnb may assemble for `arch` (one of `TARGETS`), each specialisation once.

    Examples
    --------
    >>> sorted({spec.family for spec in all_specs("sm_90a")})
    ['sm90']
    """
    specs = [spec for family in FAMILIES for spec in family(arch)]
    return list({spec.key: spec for spec in specs}.values())
