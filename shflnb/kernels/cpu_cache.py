"""Disk cache of the compiled CPU kernels: Numba's object code behind a checksum, one file per kernel and signature.

Numba's own `cache=True` trusts what it finds (a cut index raises, a flipped bit in the object code may crash the
process) and refuses to start where it can write nowhere. Here a file that is missing, truncated, garbled or written by
two processes at once means a recompute, and a directory that cannot be written means a slower start. The key holds the
sources of the kernels, the versions of Numba and llvmlite, the processor, and the kernel's own configuration.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from .disk_cache import cache_dir, read_sealed, write_sealed

__all__ = ["KernelCache", "attach"]

_MAGIC = b"shflnb-cpu-1\n"


@functools.cache
def _fingerprint() -> str:
    """Digest of the sources of the CPU kernels and of the versions of what compiles them."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    for path in sorted(Path(__file__).parent.glob("*cpu*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class KernelCache(_Cache):
    """Stands where Numba keeps the cache of one dispatcher (`Dispatcher._cache`); its methods are Numba's protocol."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def cache_path(self) -> str:
        """The folder of the files."""
        return str(cache_dir() / "cpu")

    def path(self, signature: Any, codegen: Any) -> Path:
        """The file that holds this signature for this processor."""
        words = f"{self._name}|{signature}|{codegen.magic_tuple()}|{_fingerprint()}"
        return Path(self.cache_path) / f"{self._name}-{hashlib.sha256(words.encode()).hexdigest()[:32]}.bin"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel, or None when there is no sound file for it."""
        target_context.refresh()
        body = read_sealed(self.path(sig, target_context.codegen()), _MAGIC)
        if body is None:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(body))

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the compiled kernel; a folder that cannot be written costs a compile at the next start."""
        write_sealed(self.path(sig, data.codegen), _MAGIC, dumps(data._reduce()))

    def enable(self) -> None:
        """Always on."""

    def disable(self) -> None:
        """Always on."""

    def flush(self) -> None:
        """Nothing is held back."""


def attach(dispatcher: Any, name: str) -> None:
    """Let `dispatcher` (made by `numba.njit` without `cache=`) keep its machine code under `name`."""
    dispatcher._cache = KernelCache(name)
