"""Every GPU kernel compiled, assembled and inspected without a GPU: no spills, no local memory, the right instructions.

The kernels come from `registry.all_specs`. By default every (kernel, tiling, architecture) is built in one of its
dtypes and epilogues, and in another one for the newer architectures; `pytest -m full tests/kernels/test_compile_all.py`
builds all. Compiling takes far longer than assembling, so what the compiler treats alike is compiled once (`ALIKE`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from shflnb.kernels import compiler
from shflnb.kernels.config import Config
from shflnb.kernels.launch import KernelSpec
from shflnb.kernels.registry import TARGETS, all_specs, capability_of
from shflnb.kernels.select import candidates
from shflnb.machine import usable_cores

needs_tools = pytest.mark.skipif(
    compiler.find_tool("ptxas") is None or compiler.find_tool("cuobjdump") is None,
    reason="needs ptxas and cuobjdump (extra cu13)",
)
pytestmark = needs_tools


def give_way() -> None:
    """Let the process that runs the other tests go first: a kernel that is done later delays nothing."""
    if hasattr(os, "nice"):
        os.nice(10)


@dataclass(frozen=True)
class Inspection:
    """What was found in one assembled kernel."""

    entries: tuple[str, ...]
    spilled: int
    stack: int
    registers: int
    static_smem: int
    opcodes: Counter[str]
    """How often each machine instruction occurs, by the word before its first dot."""


@functools.cache
def specs_of(arch: str) -> dict[str, KernelSpec]:
    return {spec.key: spec for spec in all_specs(arch)}


ALIKE = (("sm_80", "sm_86", "sm_89", "sm_90"), ("sm_100", "sm_120"), ("sm_90a",))
"""Architectures for which Numba's PTX differs in the name of the target only: NVVM has two code generators."""


def alike(arch: str) -> tuple[str, ...]:
    return next(group for group in ALIKE if arch in group)


def ptx_of(arch: str, key: str) -> str:
    spec = specs_of(arch)[key]
    return compiler.compile_ptx(spec.make(), spec.signature(), arch, spec.name, spec.threads, spec.blocks_per_sm)


def retarget(ptx: str, arch: str) -> str:
    """The PTX for another architecture that is alike."""
    text, count = re.subn(r"(?m)^\.target \w+", f".target {arch}", ptx)
    assert count == 1
    return text


def inspect(key: str, archs: tuple[str, ...]) -> dict[str, Inspection]:
    """Compile a kernel to PTX; for each of these architectures, which are alike, assemble, disassemble, count."""
    ptx = ptx_of(archs[0], key)
    return {arch: examine(retarget(ptx, arch), arch) for arch in archs}


def examine(ptx: str, arch: str) -> Inspection:
    cubin, report = compiler.ptxas_assemble(ptx, arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        program = compiler.find_tool("cuobjdump")
        assert program is not None
        sass = subprocess.run([program, "-sass", str(path)], capture_output=True, text=True, check=True).stdout

    def total(pattern: str) -> int:
        found = re.findall(pattern, report)
        assert found or "smem" in pattern, f"ptxas -v said nothing of {pattern}: {report}"
        return sum(int(number) for number in found)

    return Inspection(
        entries=tuple(re.findall(r"Function : (\S+)", sass)),
        spilled=total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads"),
        stack=total(r"(\d+) bytes stack frame"),
        registers=total(r"Used (\d+) registers"),
        static_smem=total(r"(\d+) bytes smem"),
        opcodes=Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE)),
    )


Built = dict[tuple[str, str], Future[dict[str, Inspection]]]
"""(architecture, key) -> what comes of it, beside what comes of the same PTX elsewhere."""


# --- what is built ---------------------------------------------------------------------------------------------------
def tiling_of(spec: KernelSpec) -> str:
    """The kernel's name without dtype and epilogue."""
    return re.sub(r"_(bf16|f16|plain|identity|relu|gelu|silu)(?=_|$)", "", spec.name)


@functools.cache
def architectures_of(tiling: str) -> tuple[str, ...]:
    return tuple(arch for arch in TARGETS if any(tiling_of(spec) == tiling for spec in specs_of(arch).values()))


def chosen(arch: str) -> Iterator[str]:
    """Keys of the default run: of each tiling one variant, another one for each of `ALIKE`; two of wgmma's tiles."""
    by_tiling: dict[str, list[str]] = {}
    for spec in specs_of(arch).values():
        by_tiling.setdefault(tiling_of(spec), []).append(spec.key)
    for place, variants in enumerate(by_tiling.values()):
        picks = {(place + 3 * ALIKE.index(alike(arch))) % len(variants)}
        if specs_of(arch)[variants[0]].family == "sm90":
            picks = {5 * (place % 2) % len(variants), (2 + 3 * place) % len(variants)}
        yield from (variants[pick] for pick in sorted(picks))


DEFAULT = [(arch, key) for arch in TARGETS for key in chosen(arch)]
REST = [(arch, key) for arch in TARGETS for key in specs_of(arch) if (arch, key) not in set(DEFAULT)]


def name_of(job: tuple[str, str]) -> str:
    return f"{job[0]}-{specs_of(job[0])[job[1]].name}"


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    """All kernels that the selected tests need, on their way through a pool of processes; see `tests/conftest.py`."""
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for item in request.session.items:
        if item.path == Path(__file__) and hasattr(item, "callspec") and "job" in item.callspec.params:
            arch, key = item.callspec.params["job"]
            together.setdefault((key, alike(arch)), []).append(arch)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(2, usable_cores()), mp_context=context, initializer=give_way) as pool:
        futures = {}
        for (key, _), archs in together.items():
            future = pool.submit(inspect, key, tuple(archs))
            futures.update({(arch, key): future for arch in archs})
        yield futures
        pool.shutdown(cancel_futures=True)


# --- what is expected ------------------------------------------------------------------------------------------------
EXPECTED = {
    # family: (instructions that must be there, instructions that must not)
    "sm90": ({"HGMMA", "LDGSTS", "UBLKCP", "STSM", "SYNCS", "USETMAXREG"}, {"HMMA"}),
    "sm80": ({"HMMA", "LDGSTS", "LDSM"}, {"HGMMA"}),
    "skinny_sm90": ({"HGMMA", "LDGSTS", "UBLKCP", "SYNCS", "ACQBULK"}, {"HMMA"}),
    "turn": ({"LDG", "STG"}, {"LDS", "STS"}),
    "transpose": ({"LDGSTS", "LDSM"}, {"BAR", "HMMA"}),
    "copy": ({"LDG", "STG"}, {"LDS", "HMMA"}),
}
"""SASS: HGMMA is wgmma, HMMA mma.sync, LDGSTS cp.async, UBLKCP the bulk copy, LDSM and STSM ldmatrix and stmatrix."""


def multiplies(config: Config) -> tuple[str, int]:
    """(instruction, how many of them one stage of the ring takes in a warp or warpgroup), from the tile alone."""
    if config.kernel == "sm90":
        m, n = (64, config.tile_n * max(1, config.v // 64) // 2) if config.v >= 64 else (config.tile_n // 2, config.v)
        return "HGMMA", m // 64 * (config.tile_k // 16) * max(1, n // 256)
    rows = min(config.v, 64)
    columns = 32 if config.tile_n >= 128 else 16
    return "HMMA", rows // 16 * (columns // 8) * (config.tile_k // 16)


CONFIGS = {
    spec_key: config
    for arch in TARGETS
    for v in (16, 32, 64, 128)
    for dtype in ("float16", "bfloat16")
    for base in candidates(v, dtype, capability_of(arch))
    for config in (base.with_epilogue(e) for e in ("plain", "identity", "relu", "gelu", "silu"))
    for spec_key in (repr(config),)
}


def check(job: tuple[str, str], found: Inspection) -> None:
    arch, key = job
    spec = specs_of(arch)[key]
    assert found.entries == (spec.name,)
    assert found.spilled == 0 and found.stack == 0, f"{found.spilled} bytes spilled, {found.stack} bytes of stack"
    assert found.opcodes["LDL"] == 0 and found.opcodes["STL"] == 0, "local memory is used"
    assert found.registers * spec.threads * spec.blocks_per_sm <= 65536, "the blocks of one SM do not fit its registers"
    if spec.family in EXPECTED and not spec.name.endswith("_sum"):
        needed, forbidden = EXPECTED[spec.family]
        missing = {word for word in needed if not found.opcodes[word]}
        assert not missing, f"no {missing} among {sorted(found.opcodes)}"
        assert not {word for word in forbidden if found.opcodes[word]}
    if key in CONFIGS:
        word, count = multiplies(CONFIGS[key])
        assert found.opcodes[word] % count == 0 and found.opcodes[word] >= count, (word, found.opcodes[word], count)


@pytest.mark.parametrize("job", DEFAULT, ids=name_of)
def test_kernel(job: tuple[str, str], built: Built) -> None:
    check(job, built[job].result()[job[0]])


@pytest.mark.full
@pytest.mark.parametrize("job", REST, ids=name_of)
def test_other_variant(job: tuple[str, str], built: Built) -> None:
    check(job, built[job].result()[job[0]])


def test_what_is_alike_is_alike() -> None:
    """A product and what every architecture has, compiled for each of them: the same instructions.

    Their order and the numbers of registers differ from one compile to the next.
    """

    def instructions(arch: str, key: str) -> Counter[str]:
        lines = retarget(ptx_of(arch, key), "any").splitlines()
        generated = re.compile(r"NumbaEnv|_cudapy_smem")
        return Counter(re.sub(r"(%[a-z]+|\$L__BB\d+_)\d+", r"\1", line) for line in lines if not generated.search(line))

    product = next(key for key, spec in specs_of("sm_80").items() if spec.family == "sm80" and "_v16_n64_" in spec.name)
    copies = next(key for key, spec in specs_of("sm_80").items() if spec.family == "copy")
    for group in ALIKE[:2]:
        for key, archs in ((product, (group[0], group[-1])), (copies, group)):
            first, *others = (instructions(arch, key) for arch in archs)
            assert all(other == first for other in others), (key, archs)
    assert instructions("sm_80", copies) != instructions("sm_100", copies), "one compile would do for all"


def test_every_candidate_is_listed_and_built() -> None:
    """What the selection can return is in the registry, and the default run covers each tiling on each architecture."""
    for arch in TARGETS:
        wanted = {
            repr(config)
            for v in (16, 32, 64, 128)
            for config in candidates(v, "bfloat16", capability_of(arch))
            if (config.kernel == "sm90") == (arch == "sm_90a")
        }
        assert wanted <= set(specs_of(arch))
        tilings = {tiling_of(spec) for spec in specs_of(arch).values()}
        built_here = {tiling_of(specs_of(a)[key]) for a, key in DEFAULT if a == arch}
        assert tilings == built_here
    assert {tiling_of(specs_of(arch)[key]) for arch, key in DEFAULT} == {
        tiling_of(spec) for arch in TARGETS for spec in specs_of(arch).values()
    }
    families = {spec.family for arch in TARGETS for spec in specs_of(arch).values()}
    assert families >= {"sm90", "sm80", "transpose", "copy"}


def test_default_run_has_both_dtypes_and_every_epilogue_of_each_kernel() -> None:
    for kernel in ("sm90", "sm80"):
        configs = [CONFIGS[key] for _, key in DEFAULT if key in CONFIGS and CONFIGS[key].kernel == kernel]
        assert {(c.dtype, c.epilogue) for c in configs} == {
            (d, e) for d in ("float16", "bfloat16") for e in ("plain", "identity", "relu", "gelu", "silu")
        }
        for v in (16, 32, 64, 128):
            epilogues = {c.epilogue for c in configs if c.v == v}
            assert "plain" in epilogues and epilogues & {"relu", "gelu", "silu"}, (kernel, v)


def test_spills_are_seen() -> None:
    """The inspection finds what it looks for: a kernel with a local array that is indexed at run time."""
    from numba import cuda
    from numba.cuda import types

    def make():
        def kernel(at, count):
            scratch = cuda.local.array(64, types.float32)
            for i in range(count):
                scratch[(i * at) % 64] += types.float32(i)
            if scratch[at % 64] == types.float32(7.0):
                cuda.syncthreads()

        return kernel

    spec = KernelSpec("spilling", "spilling", "test", make, 2, 128)
    specs_of("sm_80")["spilling"] = spec
    try:
        found = inspect("spilling", ("sm_80",))["sm_80"]
    finally:
        del specs_of("sm_80")["spilling"]
    assert found.stack > 0
    assert found.opcodes["STL"] > 0
