"""cuSPARSE's product with a Blocked-ELL matrix, called through ctypes: torch and CuPy do not offer it.

Source: cuSPARSE documentation, "Blocked Ellpack Format" and `cusparseSpMM`.
"""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["BlockedEll"]

REAL_16F, REAL_32F = 2, 0
ORDER_COL, ORDER_ROW = 1, 2
INDEX_32I, BASE_ZERO, NO_TRANSPOSE = 2, 0, 0
SPMM_BLOCKED_ELL_ALG1 = 13


@functools.cache
def _library() -> ctypes.CDLL:
    names = ["libcusparse.so.12", "libcusparse.so.13", "libcusparse.so"]
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    names += [str(path) for path in sorted(wheels.glob("*/lib/libcusparse.so.*"))]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("libcusparse was not found")


@functools.cache
def _handle() -> ctypes.c_void_p:
    """One for the process: it is never given back."""
    handle = ctypes.c_void_p()
    _check(_library().cusparseCreate(ctypes.byref(handle)), "cusparseCreate")
    return handle


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} returned status {status}")


class BlockedEll:
    """A float16 matrix (m, k) of square blocks, equally many in each block row, on the device.

    `columns` (m / block, blocks) int32 names the block columns, rising; `values` (m / block, blocks, block, block)
    holds the blocks. What the documentation does not settle is the order of the values when a block row has several
    blocks: "rows" stores row by row over all of them, "blocks" block after block. The check of the result decides.
    """

    def __init__(self, columns: torch.Tensor, values: torch.Tensor, k: int, order: str) -> None:
        self.lib, self.handle = _library(), _handle()
        block_rows, blocks, block, _ = values.shape
        self.m, self.k = block_rows * block, k
        self.columns = columns.contiguous()
        self.values = (values.transpose(1, 2) if order == "rows" else values).contiguous()
        self.matrix = ctypes.c_void_p()
        _check(
            self.lib.cusparseCreateBlockedEll(
                ctypes.byref(self.matrix), ctypes.c_int64(self.m), ctypes.c_int64(k), ctypes.c_int64(block),
                ctypes.c_int64(blocks * block), ctypes.c_void_p(self.columns.data_ptr()),
                ctypes.c_void_p(self.values.data_ptr()), INDEX_32I, BASE_ZERO, REAL_16F,
            ),
            "cusparseCreateBlockedEll",
        )  # fmt: skip
        self._keep: list[torch.Tensor] = []

    def _dense(self, a: torch.Tensor) -> ctypes.c_void_p:
        """Descriptor of a (rows, cols) tensor that is contiguous along either dimension."""
        found = ctypes.c_void_p()
        order, ld = (ORDER_ROW, a.stride(0)) if a.stride(1) == 1 else (ORDER_COL, a.stride(1))
        _check(
            self.lib.cusparseCreateDnMat(
                ctypes.byref(found), ctypes.c_int64(a.shape[0]), ctypes.c_int64(a.shape[1]), ctypes.c_int64(ld),
                ctypes.c_void_p(a.data_ptr()), REAL_16F, order,
            ),
            "cusparseCreateDnMat",
        )  # fmt: skip
        self._keep.append(a)
        return found

    def product(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A call that computes out (m, n) = W @ x (k, n) on the current stream."""
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        b, c, size = self._dense(x), self._dense(out), ctypes.c_size_t()
        head = (self.handle, NO_TRANSPOSE, NO_TRANSPOSE, ctypes.byref(one), self.matrix, b, ctypes.byref(zero), c)
        tail = (REAL_32F, SPMM_BLOCKED_ELL_ALG1)
        _check(self.lib.cusparseSpMM_bufferSize(*head, *tail, ctypes.byref(size)), "cusparseSpMM_bufferSize")
        buffer = torch.empty(max(size.value, 16), dtype=torch.uint8, device=x.device)

        def call() -> torch.Tensor:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            _check(self.lib.cusparseSetStream(self.handle, stream), "cusparseSetStream")
            _check(self.lib.cusparseSpMM(*head, *tail, ctypes.c_void_p(buffer.data_ptr())), "cusparseSpMM")
            return out

        return call
