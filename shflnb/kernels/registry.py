"""All GPU kernels of an architecture in one list, so that a test can compile and inspect them and none is forgotten.

A new kernel family adds one function to `FAMILIES`; what a family lists here is what the selection may launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .config import EPILOGUES, smem_limit
from .launch import KernelSpec
from .select import candidates
from .skinny_choice import RECORDS_IN_FLIGHT_KB, SkinnyConfig, warps_of
from .skinny_plan import kernel_spec as skinny_spec
from .skinny_plan import sum_spec
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
        yield transpose_spec(capability_of(arch)[0] >= 9)
        yield copy_spec()


def _few_columns(arch: str) -> Iterator[KernelSpec]:
    """What `skinny_plan.choose_config` takes, at the depth it starts from."""
    if arch.endswith("a"):
        return
    capability = capability_of(arch)
    has_clusters = capability[0] >= 9
    for v in (16, 32, 64, 128):
        warps = warps_of(v)
        for chunks in (1, 2, 4, 8):
            places = ("window", "shared", "global")
            pairs = [("block", slots) for slots in places]
            pairs += [("cluster", slots) for slots in places] if has_clusters else [("none", "global")]
            for finish, slots in pairs:
                for dtype in ("float16", "bfloat16"):
                    for epilogue in EPILOGUES:
                        shallow = SkinnyConfig(
                            v, chunks, warps, 2, finish, slots, dtype, epilogue, is_chained=has_clusters
                        )
                        depth = 1 + RECORDS_IN_FLIGHT_KB * 1024 // (warps * shallow.record_bytes)
                        config = replace(shallow, depth=max(3, min(9, depth)))
                        yield skinny_spec(config, smem_limit(capability))
                        if finish == "none":
                            yield sum_spec(config)


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
