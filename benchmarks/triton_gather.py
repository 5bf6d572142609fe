"""A plain Triton kernel for the v x 1 gather: what a good Triton programmer gets for the Shfl-BW pattern.

One program owns one row group and one tile of tokens, gathers the activation rows that the group keeps and feeds them
to `tl.dot`. Weights are packed offline so that a tile of them is one contiguous block. The best of CONFIGS is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from matrices import as_tensor

from shflnb.formats import ShflBWMatrix

__all__ = ["CONFIGS", "gather_calls"]

# tile of tokens, stitched columns, warps, stages
CONFIGS = ((128, 32, 4, 5), (128, 64, 4, 4), (128, 64, 8, 4), (256, 32, 8, 5), (256, 64, 8, 4), (64, 64, 4, 4))


@triton.jit(do_not_specialize=["groups"])
def gather_spmm(
    values, columns, tile_ptr, rows, x, out, groups, n, ldx, ldo,
    V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """out[rows[g * V + r], :] = sum over the tiles of group g of values[tile, r, :] @ x[columns[tile, :], :]."""
    program = tl.program_id(0)
    g = program % groups  # all groups of a tile of tokens run together: that tile of x stays in L2
    tokens = (program // groups) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, V)
    c = tl.arange(0, BLOCK_K)
    sums = tl.zeros((V, BLOCK_N), dtype=tl.float32)
    for tile in range(tl.load(tile_ptr + g), tl.load(tile_ptr + g + 1)):
        ids = tl.load(columns + tile * BLOCK_K + c)
        w = tl.load(values + tile * (V * BLOCK_K) + r[:, None] * BLOCK_K + c[None, :])
        at = x + ids[:, None].to(tl.int64) * ldx + tokens[None, :]
        stitched = tl.load(at) if IS_EVEN else tl.load(at, mask=tokens[None, :] < n, other=0.0)
        sums = tl.dot(w, stitched, sums)
    row = tl.load(rows + g * V + r)
    keep = (row[:, None] >= 0) & (tokens[None, :] < n)
    tl.store(out + row[:, None].to(tl.int64) * ldo + tokens[None, :], sums.to(out.dtype.element_ty), mask=keep)


def _packed_tiles(packed: ShflBWMatrix, tile_k: int, device: str) -> tuple[torch.Tensor, ...]:
    """Values (tiles, v, tile_k), columns (tiles, tile_k), tile_ptr, rows; padding has weight zero and column zero."""
    tiles = -(-packed.counts // tile_k)
    tile_ptr = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int32)
    place = np.arange(len(packed.indices)) + np.repeat(tile_ptr[:-1] * tile_k - packed.indptr[:-1], packed.counts)
    columns = np.zeros(int(tile_ptr[-1]) * tile_k, dtype=np.int32)
    columns[place] = packed.indices
    values = np.zeros((len(columns), packed.v), dtype=packed.values.dtype)
    values[place] = packed.values
    values = np.ascontiguousarray(values.reshape(-1, tile_k, packed.v).transpose(0, 2, 1))
    rows = np.full(packed.groups * packed.v, -1, dtype=np.int32)
    rows[: packed.shape[0]] = packed.row_perm
    return as_tensor(values, device), *(torch.from_numpy(a).to(device) for a in (columns, tile_ptr, rows))


def gather_calls(packed: ShflBWMatrix, x: torch.Tensor, out: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """A call for each config: out (m, n) = W @ x (k, n)."""
    device, n = str(x.device), x.shape[1]
    layouts = {tile_k: _packed_tiles(packed, tile_k, device) for tile_k in {config[1] for config in CONFIGS}}
    calls = {}
    for block_n, block_k, warps, stages in CONFIGS:

        def call(block_n: int = block_n, block_k: int = block_k, warps: int = warps, stages: int = stages) -> Any:
            values, columns, tile_ptr, rows = layouts[block_k]
            gather_spmm[(packed.groups * triton.cdiv(n, block_n),)](
                values, columns, tile_ptr, rows, x, out, packed.groups, n, x.stride(0), out.stride(0),
                V=packed.v, BLOCK_N=block_n, BLOCK_K=block_k, IS_EVEN=n % block_n == 0, num_warps=warps,
                num_stages=stages,
            )  # fmt: skip
            return out

        calls[f"tile {block_n} x {block_k}, {warps} warps, {stages} stages"] = call
    return calls
