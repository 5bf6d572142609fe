"""The list of all GPU kernels of an architecture, so that a test can compile and inspect every one and none is forgotten.

A new kernel family adds one function to `FAMILIES`; what a family lists here is what the selection may launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .config import EPILOGUES
from .launch import KernelSpec
from .select import candidates
from .spmm_device import copy_spec, kernel_spec, transpose_spec

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
        yield transpose_spec()
        yield copy_spec()


FAMILIES: tuple[Callable[[str], Iterator[KernelSpec]], ...] = (_products, _moves)


def all_specs(arch: str) -> list[KernelSpec]:
    """Every kernel that shflnb may assemble for `arch` (one of `TARGETS`), each specialisation once.

    Examples
    --------
    >>> sorted({spec.family for spec in all_specs("sm_90a")})
    ['sm90']
    """
    specs = [spec for family in FAMILIES for spec in family(arch)]
    return list({spec.key: spec for spec in specs}.values())
