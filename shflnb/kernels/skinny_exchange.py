"""The end of a group in `skinny_wgmma.py`: the ranks' sums are added, finished and stored.

A consumer warp w holds, for packed rows 16w to 16w + 15 of every 64 of the group and all tokens, what wgmma leaves in
registers: lane l has rows l / 4 and l / 4 + 8, and of every 8 tokens 2 (l % 4) and the next. A lane's sums are counted
row by row, tokens ascending; every rank finishes as many of them, in the order of the ranks. Warp w of each rank sends
them to warp w of the others (and to itself), counted at the receiver's barrier, and adds what it gets in the order of
the ranks, so that the result never changes. There are two buffers with a barrier each, taken in turns: who has received
a group's sums from all ranks knows that they have read those of the group before; but they need not have received all
of this one yet, which is why its barrier must not count the next one's bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .epilogue import HAS_RESIDUAL, NO_ROW, make_activation, make_load_bias
from .ptx import (
    ld_global_nc_u32,
    ld_global_nc_v4,
    ld_global_u16,
    mbarrier_arrive_expect_tx,
    mbarrier_wait_parity,
    pack_pair,
    st_global_u16,
    st_global_u32,
    unpack_low,
    warp_sync,
)
from .ptx_cluster import ld_shared_f32, rank_address, st_async_f32
from .skinny_config import ACTIVATED, SkinnyConfig

__all__ = ["make_finish", "make_own_place"]

u16, u32, u64, f32 = types.uint16, types.uint32, types.uint64, types.float32


def make_own_place(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function -> (rows, out, ot, bias, flags) of a queue record's part; the arguments where there are no parts.

    The record of `rows`, of a part: addresses of its rows and of its bias, then its first row among those of all parts,
    its rows, its flags and 0 (uint32). Results of one part stand behind those of the one before: feature-major ones as
    slabs (rows, n) of one array, token-major ones (`of` is 1) each as an array (n, rows) of its own.
    """
    if config.parts:

        def own_place(part, rows, n, out, ot, of, bias, flags):
            at = rows + u64(part) * u64(32)
            where, what = ld_global_nc_v4(at), ld_global_nc_v4(at + u64(16))
            own_rows = u64(where[1]) << u64(32) | u64(where[0])
            own_bias = u64(where[3]) << u64(32) | u64(where[2])
            own_ot = u64(what[1]) if of == u64(1) else ot
            return own_rows, out + u64(what[0]) * n * u64(2), own_ot, own_bias, u32(what[2])

    else:

        def own_place(part, rows, n, out, ot, of, bias, flags):
            return rows, out, ot, bias, u32(flags)

    return cuda.jit(device=True, forceinline=True)(own_place)


def make_finished(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function (sum, flags) -> activated sum; with parts only for those that are."""
    activation = make_activation(config.epilogue)
    if config.parts:

        def finished(a, flags):
            return activation(a) if flags & u32(ACTIVATED) else a

    else:

        def finished(a, flags):
            return activation(a)

    return cuda.jit(device=True, forceinline=True)(finished)


def make_finish_row(config: SkinnyConfig, count: int) -> Callable[..., Any]:
    """Device function: `count` sums of a row, from sums[first] on, become results: bias, activation, residual.

    They are those of pairs of neighbouring tokens, 8 apart, the first one `token` (of a single sum the only one).
    """
    plain, adds_nothing = config.epilogue == "plain", config.epilogue == "plain" or config.parts
    finished, load_bias, low = make_finished(config), make_load_bias(config.dtype), unpack_low[config.dtype]

    @cuda.jit(device=True, forceinline=True)
    def finish_row(sums, first, row, token, n, bias, residual, rt, rf, flags):
        if not plain:
            own_bias = load_bias(bias, row, flags)
            for i in range(count):
                sums[first + i] = finished(sums[first + i] + own_bias, flags)
        if not adds_nothing:  # noqa: SIM102 (a condition on its own is known when the kernel is compiled)
            if flags & u32(HAS_RESIDUAL):
                at = residual + u64(row) * rf * u64(2)
                for i in range(count):
                    own = u32(token + u32(i // 2 * 8 + i % 2))
                    if own < n:
                        sums[first + i] += low(u32(ld_global_u16(at + u64(own) * rt * u64(2))))

    return finish_row


def make_store_row(config: SkinnyConfig, count: int) -> Callable[..., Any]:
    """Device function that finishes and stores the sums of a row, see `make_finish_row`; tokens below n exist."""
    finish_row, pack = make_finish_row(config, count), pack_pair[config.dtype]

    def store_row(sums, first, row, token, n, out, ot, of, bias, residual, rt, rf, flags):
        if row != u32(NO_ROW):
            finish_row(sums, first, row, token, n, bias, residual, rt, rf, flags)
            at = out + (u64(row) * of + u64(token) * ot) * u64(2)
            if ot == u64(1) and (u32(at) & u32(3)) | (n & u32(1)) == u32(0):  # a pair at a time
                for i in range(count // 2):
                    if u32(token + u32(8 * i)) < n:
                        st_global_u32(at + u64(16 * i), pack(sums[first + 2 * i], sums[first + 2 * i + 1]))
            else:
                for i in range(count // 2):
                    pair = pack(sums[first + 2 * i], sums[first + 2 * i + 1])
                    if u32(token + u32(8 * i)) < n:
                        st_global_u16(at, u16(pair & u32(0xFFFF)))
                    if u32(token + u32(8 * i + 1)) < n:
                        st_global_u16(at + ot * u64(2), u16(pair >> u32(16)))
                    at += ot * u64(16)

    def store_one(sums, first, row, token, n, out, ot, of, bias, residual, rt, rf, flags):
        if row != u32(NO_ROW):
            finish_row(sums, first, row, token, n, bias, residual, rt, rf, flags)
            if token < n:
                word = pack(sums[first], sums[first])
                st_global_u16(out + (u64(row) * of + u64(token) * ot) * u64(2), u16(word & u32(0xFFFF)))

    return cuda.jit(device=True, forceinline=True)(store_row if count > 1 else store_one)


def make_store_rows(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function that finishes and stores a rank's share of a lane's sums, `sums[: share]`.

    One function for each row, called by that of the row before: a loop over many rows stays a loop where the epilogue
    is long, and its sums go to local memory.
    """
    of_a_row, share = 2 * config.chunks, config.share
    rows, own_count = max(1, share // of_a_row), min(share, of_a_row)
    store_row = make_store_row(config, own_count)

    def make_from(i: int) -> Callable[..., Any]:
        if i == rows - 1:

            def store_from(sums, targets, token, n, out, ot, of, bias, residual, rt, rf, flags):
                store_row(sums, i * own_count, targets[i], token, n, out, ot, of, bias, residual, rt, rf, flags)

        else:
            rest = make_from(i + 1)

            def store_from(sums, targets, token, n, out, ot, of, bias, residual, rt, rf, flags):
                store_row(sums, i * own_count, targets[i], token, n, out, ot, of, bias, residual, rt, rf, flags)
                rest(sums, targets, token, n, out, ot, of, bias, residual, rt, rf, flags)

        return cuda.jit(device=True, forceinline=True)(store_from)

    return make_from(0)


def make_send(width: int) -> Callable[..., Any]:
    """Device function (address in a block of the cluster, sums, first, barrier there): send `width` sums."""
    send_words = st_async_f32[width]
    if width == 4:

        def send(to, sums, i, signal):
            send_words(to, sums[i], sums[i + 1], sums[i + 2], sums[i + 3], signal)

    elif width == 2:

        def send(to, sums, i, signal):
            send_words(to, sums[i], sums[i + 1], signal)

    else:

        def send(to, sums, i, signal):
            send_words(to, sums[i], signal)

    return cuda.jit(device=True, forceinline=True)(send)


def make_receive(width: int) -> Callable[..., Any]:
    """Device function (sums, first, address): add `width` sums that were sent to this block."""
    load = ld_shared_f32[width]
    if width == 1:

        def receive(sums, i, at):
            sums[i] += load(at)

    else:

        def receive(sums, i, at):
            words = load(at)
            for j in range(width):
                sums[i + j] += words[j]

    return cuda.jit(device=True, forceinline=True)(receive)


def make_finish(config: SkinnyConfig) -> tuple[Callable[..., Any], Callable[..., Any], int]:
    """(begin, finish, values of `targets`): `begin` asks for the rows that this warp will store to."""
    v, ranks, chunks, row_warps, total, share = (config.v, config.ranks, config.chunks, config.row_warps, config.sums,
                                                 config.share)  # fmt: skip
    store_rows, of_a_row = make_store_rows(config), 2 * chunks
    rows, width = max(1, share // of_a_row), min(4, share)
    buffer_bytes, warp_bytes, rank_bytes = config.exchange_bytes // 2, total * 128, share * 128
    send, receive = make_send(width), make_receive(width)

    @cuda.jit(device=True, forceinline=True)
    def begin(targets, row_table, group, warp, lane, rank):
        if warp < u32(row_warps):
            for i in range(rows):  # of each 64 packed rows two are this lane's, 8 apart
                place = u32(u32(rank * u32(share)) // u32(of_a_row) + u32(i))
                row = u32(group * u32(v) + (place >> u32(1)) * u32(64) + warp * u32(16) + (place & u32(1)) * u32(8)
                          + (lane >> u32(2)))  # fmt: skip
                targets[i] = ld_global_nc_u32(row_table + u64(row) * u64(4))

    @cuda.jit(device=True, forceinline=True)
    def finish(acc, targets, exchange, arrived, turn, rank, warp, lane, n, out, ot, of, bias, residual, rt, rf, flags):
        if warp < u32(row_warps):
            ordered = cuda.local.array(total, f32)  # row by row
            for i in range(total // of_a_row):
                for j in range(chunks):
                    at = i // 2 * 2 * of_a_row + i % 2 * 2 + 4 * j
                    ordered[i * of_a_row + 2 * j] = acc[at]
                    ordered[i * of_a_row + 2 * j + 1] = acc[at + 1]
            token = u32((lane & u32(3)) * u32(2))
            if ranks == 1:
                store_rows(ordered, targets, token, n, out, ot, of, bias, residual, rt, rf, flags)
            else:
                place = u32(turn & u32(1))
                signal = u32(arrived + (u32(row_warps) * place + warp) * u32(8))
                buffer = u32(exchange + place * u32(buffer_bytes) + warp * u32(warp_bytes) + lane * u32(4 * width))
                if lane == u32(0):
                    mbarrier_arrive_expect_tx(signal, u32(ranks * rank_bytes))
                own = u32(buffer + rank * u32(rank_bytes))
                for q in range(ranks):
                    to, there = rank_address(own, u32(q)), rank_address(signal, u32(q))
                    for i in range(share // width):
                        send(u32(to + u32(128 * width * i)), ordered, q * share + width * i, there)
                warp_sync()
                mbarrier_wait_parity(signal, u32((turn >> u32(1)) & u32(1)))
                sums = cuda.local.array(share, f32)
                for i in range(share):
                    sums[i] = f32(0.0)
                for q in range(ranks):
                    for i in range(share // width):
                        receive(sums, width * i, u32(buffer + u32(q * rank_bytes + 128 * width * i)))
                within = u32(u32(rank * u32(share)) & u32(of_a_row - 1))  # 0 unless a row is shared
                token = u32(token + (within >> u32(1)) * u32(8) + (within & u32(1)))
                store_rows(sums, targets, token, n, out, ot, of, bias, residual, rt, rf, flags)

    return begin, finish, rows
