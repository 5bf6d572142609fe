"""Phases of the CPU kernels that move numbers: x to the slab, weights to a chunk, accumulators to the rows of out.

`make_runs(half)` gives the four phases for one kind of storage: "half" storage is uint16 views of float16 (`form` is
`FLOAT16`) or bfloat16, widened to float32 on the way in and rounded once on the way out; else numbers move as they are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba import njit

from .cpu_math import FLOAT16, activate, narrow_bfloat16, narrow_float16, widen_bfloat16, widen_float16
from .cpu_simd import copy_bytes

__all__ = ["Runs", "make_runs"]

_FAST = {"error_model": "numpy", "nogil": True}
_INLINE = {**_FAST, "forceinline": True}


class Runs(NamedTuple):
    """The jitted phases; see `make_runs`."""

    load_block: Any
    load_weights: Any
    finish_rows: Any
    finish_columns: Any


@njit(**_FAST)
def _copy_run(slab, at, x, i, j, count, form):
    """slab[at:at+count] = x[i, j:j+count] where x has unit stride along its second axis."""
    size = slab.itemsize
    copy_bytes(slab, at * size, x, i * x.strides[0] + j * size, count * size)


@njit(**_FAST)
def _widen_run(slab, at, x, i, j, count, form):
    """As `_copy_run`, for 16-bit numbers widened to float32."""
    to, row = slab[at : at + count], x[i]
    if form == FLOAT16:
        for c in range(count):
            to[c] = widen_float16(row[j + c])
    else:
        for c in range(count):
            to[c] = widen_bfloat16(row[j + c])


@njit(**_FAST)
def _copy_back(acc, at, count, out, i, j, form):
    """out[i, j:j+count] = acc[at:at+count] where out has unit stride along its second axis."""
    size = acc.itemsize
    copy_bytes(out, i * out.strides[0] + j * size, acc, at * size, count * size)


@njit(**_FAST)
def _narrow_back(acc, at, count, out, i, j, form):
    """As `_copy_back`, rounded to 16 bits."""
    row, to = acc[at : at + count], out[i]
    if form == FLOAT16:
        for c in range(count):
            to[j + c] = narrow_float16(row[c])
    else:
        for c in range(count):
            to[j + c] = narrow_bfloat16(row[c])


@njit(**_INLINE)
def _same(number, form):
    return number


@njit(**_INLINE)
def _widen(number, form):
    return widen_float16(number) if form == FLOAT16 else widen_bfloat16(number)


@njit(**_INLINE)
def _narrow(number, form):
    return narrow_float16(number) if form == FLOAT16 else narrow_bfloat16(number)


@functools.cache
def make_runs(half: bool) -> Runs:
    """The phases for native (float32, float64) or 16-bit storage."""
    run_in, run_out = (_widen_run, _narrow_back) if half else (_copy_run, _copy_back)
    read, write = (_widen, _narrow) if half else (_same, _same)

    @njit(**_FAST)
    def load_block(slab, ld, x, i0, rows, j0, cols, form):
        """slab[i*ld + j] = x[i0+i, j0+j] for i < rows, j < cols; any strides."""
        if x.strides[1] == x.itemsize or cols == 1:
            if ld == cols and x.strides[0] == cols * x.itemsize:
                run_in(slab, 0, x, i0, j0, rows * cols, form)
            elif cols > 1:
                for i in range(rows):
                    run_in(slab, i * ld, x, i0 + i, j0, cols, form)
            else:
                for i in range(rows):
                    slab[i * ld] = read(x[i0 + i, j0], form)
            return
        for block in range(0, rows, 16):  # 16 rows at a time: both sides stay within a few cache lines
            for j in range(cols):
                for i in range(block, min(block + 16, rows)):
                    slab[i * ld + j] = read(x[i0 + i, j0 + j], form)

    @njit(**_FAST)
    def load_weights(values, weights, start, count, form):
        """Widened `values[start:start+count]` in `weights` (16-bit storage), or `values` itself.

        Returns the array and the place in it where `values[0]` is or would be.
        """
        if half:
            _widen_run(weights, 0, values.reshape((1, values.shape[0])), 0, start, count, form)
            return weights, -start
        return values, 0

    @njit(**_FAST)
    def finish_rows(acc, width, cols, places, c0, out, bias, residual, activation, form):
        """out[places[r], c0:c0+cols] = act(acc[r*width:r*width+cols] + bias[places[r]]) + residual at the same places.

        `acc` is used up.
        """
        rows = places.shape[0]
        if bias.shape[0] > 0 or activation > 0 or residual.shape[0] > 0:
            for r in range(rows):
                row, o = acc[r * width : r * width + cols], places[r]
                if bias.shape[0] > 0:
                    b = bias[o]
                    for c in range(cols):
                        row[c] += b
                activate(row, activation)
                if residual.shape[0] > 0:
                    other = residual[o]
                    for c in range(cols):
                        row[c] += read(other[c0 + c], form)
        if out.strides[1] == out.itemsize:
            for r in range(rows):
                run_out(acc, r * width, cols, out, places[r], c0, form)
            return
        for c in range(cols):
            for r in range(rows):
                out[places[r], c0 + c] = write(acc[r * width + c], form)

    @njit(**_FAST)
    def finish_columns(acc, v, cols, places, c0, out, bias, residual, activation, form):
        """out[places[r], c0+t] = act(acc[t*v+r] + bias[places[r]]) + residual at the same place, t < cols.

        `acc` is used up.
        """
        rows = places.shape[0]
        for t in range(cols):
            row = acc[t * v : t * v + rows]
            if bias.shape[0] > 0:
                for r in range(rows):
                    row[r] += bias[places[r]]
            activate(row, activation)
            if residual.shape[0] > 0:
                for r in range(rows):
                    row[r] += read(residual[places[r], c0 + t], form)
            for r in range(rows):
                out[places[r], c0 + t] = write(row[r], form)

    return Runs(load_block, load_weights, finish_rows, finish_columns)
