"""The few array operations that the search needs, once for NumPy and once for torch.

`backend_of(array)` picks one. torch is only ever found in `sys.modules`: a CUDA tensor can reach this file only if its
owner has imported torch already. CPU tensors are viewed as NumPy arrays before they come here, so `TorchBackend` is the
GPU's; it runs on CPU tensors as well, which is how it is tested without a GPU.

Nothing here uses float atomics: the same input on the same device gives the same bits.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

__all__ = ["Backend", "NumpyBackend", "TorchBackend", "backend_of"]


class NumpyBackend:
    """NumPy on the host; the heavy product goes to NumPy's BLAS."""

    # Most rounds of exchanges per sweep (see swaps.py). A round costs about as much per pair as the product does per
    # row.
    round_limit = 112

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Restart the random numbers."""
        self._rng = np.random.default_rng(seed)

    def uniform(self, shape: tuple[int, ...]) -> Any:
        """Random float32, strictly between 0 and 1."""
        return self._rng.random(shape, dtype=np.float32) * np.float32(1 - 2e-7) + np.float32(1e-7)

    def asarray(self, x: np.ndarray) -> Any:
        """A small host array, brought to where the search runs."""
        return x

    def host(self, x: Any) -> np.ndarray:
        """The way back."""
        return x

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        return np.full(shape, value, dtype=np.float32)

    def zeros_int(self, n: int) -> Any:
        return np.zeros(n, dtype=np.int64)

    def arange(self, n: int) -> Any:
        return np.arange(n)

    def to_float(self, x: Any) -> Any:
        return x.astype(np.float32)

    def copy(self, x: Any) -> Any:
        return x.copy()

    def concat(self, parts: list[Any]) -> Any:
        return np.concatenate(parts)

    def matmul(self, a: Any, b: Any) -> Any:
        return a @ b

    def take_rows(self, x: Any, rows: Any) -> Any:
        return np.take(x, rows, axis=0)

    def take_along(self, x: Any, index: Any) -> Any:
        return np.take_along_axis(x, index, 1)

    def where(self, c: Any, a: Any, b: Any) -> Any:
        return np.where(c, a, b)

    def nonzero(self, x: Any) -> Any:
        return np.flatnonzero(x)

    def positive(self, x: Any) -> Any:
        return np.maximum(x, np.float32(0), out=x)

    def log(self, x: Any) -> Any:
        return np.log(x)

    def softmax(self, x: Any) -> Any:
        x -= x.max(axis=1, keepdims=True)
        np.exp(x, out=x)
        x /= x.sum(axis=1, keepdims=True)
        return x

    def total(self, x: Any) -> float:
        return float(np.sum(x, dtype=np.float64))

    def row_totals(self, x: Any) -> Any:
        return np.sum(x, axis=1, dtype=np.float64)

    def largest(self, x: Any, axis: int) -> Any:
        return np.max(x, axis=axis)

    def top2(self, x: Any) -> tuple[Any, Any, Any]:
        """Per row: the column of the largest, the largest, the second largest (-inf where there is one column)."""
        best = np.argmax(x, axis=1)
        if x.shape[1] == 1:
            return best, x[:, 0], np.full(x.shape[0], -np.inf, dtype=x.dtype)
        two = np.partition(x, x.shape[1] - 2, axis=1)
        return best, two[:, -1], two[:, -2]

    def kth_largest(self, x: Any, count: int) -> Any:
        """The `count`-th largest of values that are not negative."""
        flat = x.ravel()
        return np.partition(flat, flat.size - count)[flat.size - count]

    def sort_rows(self, x: Any) -> Any:
        """Each row in falling order."""
        return np.sort(x, axis=1)[:, ::-1]

    def argsort(self, x: Any, *, descending: bool = False) -> Any:
        """Stable, along the last axis."""
        return np.argsort(-x if descending else x, axis=-1, kind="stable")

    def bincount(self, x: Any, n: int) -> Any:
        return np.bincount(x, minlength=n)

    def cumsum(self, x: Any) -> Any:
        return np.cumsum(x)

    def group_sums(self, s: Any, rows: Any, sizes: np.ndarray) -> Any:
        """Sum of the rows of each group; `rows` lists them group by group. A group at a time stays in the cache."""
        out = np.empty((len(sizes), s.shape[1]), dtype=np.float32)
        start = 0
        for g, size in enumerate(sizes.tolist()):
            np.add.reduce(s[rows[start : start + size]], axis=0, out=out[g])
            start += size
        return out


class TorchBackend:
    """The same operations on torch tensors; everything stays on the tensors' device."""

    # A round is some 45 small kernels, bound by their launches, while the product takes no time: fewer rounds per
    # sweep.
    round_limit = 32

    def __init__(self, device: Any) -> None:
        self.torch = sys.modules["torch"]
        self.device = device
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Restart the random numbers."""
        self._rng = self.torch.Generator(device=self.device)
        self._rng.manual_seed(seed)

    def uniform(self, shape: tuple[int, ...]) -> Any:
        """Random float32, strictly between 0 and 1."""
        return self.torch.rand(shape, generator=self._rng, device=self.device).mul_(1 - 2e-7).add_(1e-7)

    def asarray(self, x: np.ndarray) -> Any:
        """A small host array, brought to where the search runs."""
        return self.torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def host(self, x: Any) -> np.ndarray:
        """The way back."""
        return x.cpu().numpy()

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        return self.torch.full(shape, value, dtype=self.torch.float32, device=self.device)

    def zeros_int(self, n: int) -> Any:
        return self.torch.zeros(n, dtype=self.torch.int64, device=self.device)

    def arange(self, n: int) -> Any:
        return self.torch.arange(n, device=self.device)

    def to_float(self, x: Any) -> Any:
        return x.to(self.torch.float32)

    def copy(self, x: Any) -> Any:
        return x.clone()

    def concat(self, parts: list[Any]) -> Any:
        return self.torch.cat(parts)

    def matmul(self, a: Any, b: Any) -> Any:
        return a @ b

    def take_rows(self, x: Any, rows: Any) -> Any:
        return x.index_select(0, rows)

    def take_along(self, x: Any, index: Any) -> Any:
        return self.torch.take_along_dim(x, index, 1)

    def where(self, c: Any, a: Any, b: Any) -> Any:
        return self.torch.where(c, a, b)

    def nonzero(self, x: Any) -> Any:
        return self.torch.nonzero(x).reshape(-1)

    def positive(self, x: Any) -> Any:
        return x.clamp_min_(0)

    def log(self, x: Any) -> Any:
        return self.torch.log(x)

    def softmax(self, x: Any) -> Any:
        return self.torch.softmax(x, dim=1)

    def total(self, x: Any) -> float:
        return float(self.torch.sum(x, dtype=self.torch.float64))

    def row_totals(self, x: Any) -> Any:
        return self.torch.sum(x, dim=1, dtype=self.torch.float64)

    def largest(self, x: Any, axis: int) -> Any:
        return self.torch.amax(x, dim=axis)

    def top2(self, x: Any) -> tuple[Any, Any, Any]:
        """Per row: the column of the largest, the largest, the second largest (-inf where there is one column)."""
        if x.shape[1] == 1:
            return self.zeros_int(x.shape[0]), x[:, 0], self.torch.full_like(x[:, 0], -np.inf)
        values, index = self.torch.topk(x, 2, dim=1)
        return index[:, 0], values[:, 0], values[:, 1]

    def kth_largest(self, x: Any, count: int) -> Any:
        flat = x.reshape(-1)
        if flat.shape[0] <= 1 << 22:
            return self.torch.topk(flat, count, sorted=False).values.min()
        # topk would sort a copy with 64-bit indices. Floats that are not negative are ordered like their bits, so the
        # value is found bit by bit: 31 passes over `x`, and one byte of memory per element.
        bits = flat.view(self.torch.int32)
        found = self.torch.zeros((), dtype=self.torch.int32, device=self.device)
        for bit in range(30, -1, -1):
            trial = found | (1 << bit)
            found = self.torch.where((bits >= trial).sum() >= count, trial, found)
        return found.view(self.torch.float32)

    def sort_rows(self, x: Any) -> Any:
        """Each row in falling order."""
        return self.torch.sort(x, dim=1, descending=True).values

    def argsort(self, x: Any, *, descending: bool = False) -> Any:
        """Stable, along the last axis."""
        return self.torch.argsort(x, dim=-1, descending=descending, stable=True)

    def bincount(self, x: Any, n: int) -> Any:
        # torch.bincount uses atomics on CUDA and is refused under deterministic algorithms; a sorted search is not.
        edges = self.torch.arange(n + 1, device=self.device)
        return self.torch.diff(self.torch.searchsorted(self.torch.sort(x).values, edges))

    def cumsum(self, x: Any) -> Any:
        return self.torch.cumsum(x, dim=0)

    def group_sums(self, s: Any, rows: Any, sizes: np.ndarray) -> Any:
        """As for NumPy, in slabs of groups so that the gathered copy stays small beside `s`."""
        v, k = int(sizes[0]), s.shape[1]
        full = len(sizes) if int(sizes[-1]) == v else len(sizes) - 1
        out = self.torch.empty((len(sizes), k), dtype=self.torch.float32, device=self.device)
        slab = max(1, (1 << 26) // max(1, v * k))
        for g in range(0, full, slab):
            end = min(full, g + slab)
            out[g:end] = s.index_select(0, rows[g * v : end * v]).view(end - g, v, k).sum(1)
        if full < len(sizes):
            out[full] = s.index_select(0, rows[full * v :]).sum(0)
        return out


Backend = NumpyBackend | TorchBackend


def backend_of(x: Any) -> Backend:
    """The operations for `x`: NumPy for arrays, torch for tensors (of whatever device)."""
    return NumpyBackend() if isinstance(x, np.ndarray) else TorchBackend(x.device)
