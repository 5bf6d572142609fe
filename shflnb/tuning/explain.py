"""`explain`: what will run for a packed matrix and n columns, why, and how fast it should be; needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError, DeviceError, ShflnbError
from ..formats.shflbw import ShflBWMatrix
from ..kernels.config import Config, Problem, ceil_div, smem_limit
from ..kernels.select import Choice, choose, has_few_columns, roof_us
from ..kernels.skinny_config import MAX_N, TILE_K, memory_us, stores_directly
from ..kernels.skinny_config import predict_us as predict_few_us
from ..kernels.skinny_select import choose_few
from ..machine import cpu_name, find_cuda

if TYPE_CHECKING:
    from ..kernels.launch import KernelSpec

__all__ = ["GPUS", "Explanation", "explain"]

GPUS: Mapping[str, tuple[tuple[int, int], int]] = {
    "NVIDIA H200": ((9, 0), 132),
    "NVIDIA H100": ((9, 0), 132),
    "NVIDIA B200": ((10, 0), 148),
    "NVIDIA A100": ((8, 0), 108),
    "NVIDIA A10": ((8, 6), 72),
    "NVIDIA L4": ((8, 9), 58),
    "NVIDIA GeForce RTX 3090": ((8, 6), 82),
    "NVIDIA GeForce RTX 4090": ((8, 9), 128),
    "NVIDIA GeForce RTX 5090": ((12, 0), 170),
}
"""Devices that can be asked about by name: capability and multiprocessors."""
DEFAULT_GPU = "NVIDIA H200"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printable, and `as_dict` holds plain types. Times in microseconds, sizes in bytes."""

    m: int
    k: int
    n: int
    v: int
    dtype: str
    density: float
    device: str
    is_here: bool
    """Whether this machine has the device; otherwise everything is a prediction for it."""
    kernel: str
    config: str
    reason: str
    threads: int
    smem_bytes: int
    registers: int | None
    """Registers a thread; None where nothing was compiled."""
    blocks_per_sm: int
    blocks: int
    predicted_us: float
    roof_us: float
    roof: str
    """What sets the roof."""
    cpu: str
    """What the same call does with NumPy arrays and CPU tensors."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        where = self.device if self.is_here else f"{self.device} (not in this machine: a prediction)"
        rates = (
            "" if self.device == DEFAULT_GPU else f"; from rates measured on an {DEFAULT_GPU}, so only an indication"
        )
        registers = "not compiled here" if self.registers is None else str(self.registers)
        pairs = [
            (
                "product",
                f"({self.m} x {self.k}, v = {self.v}, {self.density:.1%} kept) @ ({self.k} x {self.n}), {self.dtype}",
            ),
            ("device", where),
            ("kernel", f"{self.kernel}: {self.config}"),
            ("because", self.reason),
            (
                "a block",
                f"{self.threads} threads, {self.smem_bytes:,} bytes of shared memory, registers a thread: {registers}",
            ),
            ("blocks", f"{self.blocks} in all, {self.blocks_per_sm} on a multiprocessor at a time"),
            ("time", f"about {self.predicted_us:.1f} us; not under {self.roof_us:.1f} us ({self.roof}){rates}"),
            ("on the CPU", self.cpu),
        ]
        return "\n".join(f"{name:<11}{text}" for name, text in pairs)


KERNELS = {
    "sm90": "wgmma with producer warps and persistent blocks (spmm_sm90)",
    "sm80": "mma.sync, each block one tile (spmm_sm80)",
    "skinny": "wgmma, weights streamed once, x stitched beside them (skinny_wgmma)",
}


def explain(packed: ShflBWMatrix, n: int, *, device: int | str | None = None) -> Explanation:
    """Say which kernel runs for `packed` times n columns and why, with its resources and its predicted and least time.

    Parameters
    ----------
    packed : ShflBWMatrix
        float32 and float64 matrices are explained for the CPU path; the GPU part then stands for float16.
    n : int
        Columns of x (tokens).
    device : int, str, optional
        A CUDA device of this machine, or the name of a known GPU (a part of it is enough: "A100"). The default is
        device 0, or an H200 where there is none. A device that is here is asked for the kernel's registers and
        occupancy, which compiles it; for another one nothing is compiled.

    Returns
    -------
    Explanation
        A record; `print` shows it.

    Raises
    ------
    ArgumentError
        For n below 1.
    DeviceError
        For a device that is neither here nor known.

    Examples
    --------
    >>> import numpy as np, shflnb
    >>> w = np.eye(256, dtype=np.float16)
    >>> packed = shflnb.pack(w, block=(64, 64), row_perm=np.arange(256), fill_in_warning=None)
    >>> found = shflnb.explain(packed, 4096, device="H200")
    >>> found.kernel.split()[0], found.is_here
    ('wgmma', False)
    """
    if not isinstance(n, int) or n < 1:
        raise ArgumentError(f"n is {n!r}; expected a number of columns from 1 on")
    half = packed if packed.dtype in ("float16", "bfloat16") else packed.astype("float16")
    found = find_cuda()
    if device is None:
        device = 0 if found.problem is None else DEFAULT_GPU
    if isinstance(device, int):
        if found.problem is not None or not 0 <= device < len(found.devices):
            raise DeviceError(f"device is {device}; found: {found.problem or f'{len(found.devices)} CUDA devices'}; "
                              f"name a GPU instead, such as {DEFAULT_GPU!r}")  # fmt: skip
        gpu = found.devices[device]
        return _explain(half, packed, n, gpu.name, gpu.capability, gpu.multiprocessors, device)
    name = next((known for known in GPUS if device.lower() in known.lower()), None)
    if name is None:
        raise DeviceError(f"device is {device!r}; expected a CUDA device of this machine or one of {', '.join(GPUS)}")
    return _explain(half, packed, n, name, *GPUS[name], None)


def _explain(
    half: ShflBWMatrix,
    packed: ShflBWMatrix,
    n: int,
    name: str,
    capability: tuple[int, int],
    sm_count: int,
    ordinal: int | None,
) -> Explanation:
    from ..kernels.spmm_plan import kernel_spec, problem_of, tuned_entries

    problem = problem_of(half, n)
    table = tuned_entries(half, name)
    if has_few_columns(n, capability):
        return _few_columns(half, packed, problem, name, sm_count, ordinal, table)
    choice = choose(problem, capability, sm_count, name, table)
    config = choice.config
    registers, resident = (
        (None, _resident(config, capability)) if ordinal is None else _ask(kernel_spec(config), ordinal)
    )
    tiles = problem.groups * ceil_div(n, config.tile_n)
    blocks = min(tiles, sm_count * config.blocks_per_sm) if config.kernel == "sm90" else tiles
    roof, limit = roof_us(problem, sm_count)
    return Explanation(
        m=problem.m, k=problem.k, n=n, v=problem.v, dtype=half.dtype, density=packed.density, device=name,
        is_here=ordinal is not None, kernel=KERNELS.get(config.kernel, config.kernel), config=config.name,
        reason=_reason(choice), threads=config.threads, smem_bytes=config.smem_bytes, registers=registers,
        blocks_per_sm=resident, blocks=blocks, predicted_us=choice.predicted_us, roof_us=roof, roof=limit,
        cpu=_cpu(packed, n),
    )  # fmt: skip


def _few_columns(
    half: ShflBWMatrix,
    packed: ShflBWMatrix,
    problem: Problem,
    name: str,
    sm_count: int,
    ordinal: int | None,
    table: Mapping[str, Any],
) -> Explanation:
    """The kernel for few columns of token-major x reads the packed bytes once: device memory is its roof."""
    from ..kernels.skinny_plan import kernel_spec

    m, k, n = problem.m, problem.k, problem.n
    groups, tiles = half.groups, int(np.maximum(1, -(-half.counts // TILE_K)).sum())
    choice = choose_few(problem, tiles, sm_count, "token", table)
    config = choice.config.for_columns(k)
    registers, resident = (None, config.blocks_per_sm) if ordinal is None else _ask(kernel_spec(config), ordinal)
    nbytes = half.values.nbytes
    shared = "" if config.ranks == 1 else f", {config.ranks} blocks to a group"
    turns = [] if config.token_major else ["x is turned before it"]
    is_stored = n == 1 or stores_directly(m, n, k * problem.density, stitches=config.token_major)
    turns += [] if is_stored else ["the result is turned after it"]
    layout = f"; token-major: {' and '.join(turns) or 'one kernel, nothing is turned'}"
    return Explanation(
        m=m, k=k, n=n, v=half.v, dtype=half.dtype, density=packed.density, device=name, is_here=ordinal is not None,
        kernel=KERNELS["skinny"], config=config.name,
        reason=f"up to {MAX_N} columns: the bytes of the weights are the cost{shared}{layout}; {choice.reason}",
        threads=config.threads,
        smem_bytes=config.smem_bytes, registers=registers, blocks_per_sm=resident,
        blocks=config.ranks * min(groups, sm_count * config.blocks_per_sm // config.ranks),
        predicted_us=predict_few_us(nbytes, sm_count), roof_us=memory_us(nbytes, sm_count), roof="device memory",
        cpu=_cpu(packed, n),
    )  # fmt: skip


def _reason(choice: Choice) -> str:
    return (
        f"{choice.reason} among the candidates for v = {choice.config.v}"
        if "predicted" in choice.reason
        else choice.reason
    )


def _resident(config: Config, capability: tuple[int, int]) -> int:
    """Blocks that one multiprocessor holds, by shared memory and threads; registers are taken to fit."""
    by_smem = (smem_limit(capability) + 1024) // (config.smem_bytes + 1024)
    return max(1, min(config.blocks_per_sm, by_smem, 1536 // config.threads))


def _ask(spec: KernelSpec, ordinal: int) -> tuple[int, int]:
    """Registers a thread and blocks on a multiprocessor, from the driver."""
    from ..kernels.launch import device_context

    context = device_context(ordinal)
    loaded = context.kernel(spec, 0)
    with context.current():
        resident = loaded.kernel.occupancy.max_active_blocks_per_multiprocessor(spec.threads, spec.smem_bytes)
    return loaded.registers, int(resident)


def _cpu(packed: ShflBWMatrix, n: int) -> str:
    try:
        from ..kernels.cpu_simd import machine
        from ..kernels.spmm_cpu import choose as choose_cpu
    except ShflnbError as error:
        return f"not available: {error}"
    storage = "half" if packed.values.itemsize == 2 else packed.dtype
    config = choose_cpu(storage, packed.v, n, True, machine())
    return f"{config.name} with {config.accumulate} accumulation, on {cpu_name()}"
