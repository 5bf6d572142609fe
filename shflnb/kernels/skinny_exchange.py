"""The end of a group in `skinny_wgmma.py`: the ranks' sums are added, finished and stored.

A consumer warp holds, for 16 tokens and every unit of 8 packed rows, what wgmma leaves in registers: lane l has rows
2 (l % 4) and +1 of tokens l / 4 and l / 4 + 8. Every rank finishes its own share of the units: warp w of each rank
sends it to warp w of the others (and to itself), 16 bytes a lane, counted at the receiver's barrier. Sums are added in
the order of the ranks, so that the result never changes. There are two buffers with a barrier each, taken in turns: who
has received a group's sums from all ranks knows that they have read those of the group before; but they need not have
received all of this one yet, which is why its barrier must not count the next one's bytes.

Storing takes longer than adding: a result's values go to as many places. With fewer than 64 tokens some warps hold
none, and share the units of those that do, also where there is only one rank. All wait for each other before the next
group is sent, so that a buffer has been read by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .epilogue import HAS_RESIDUAL, NO_ROW, make_activation, make_load_bias
from .ptx import (
    bar_sync,
    ld_global_nc_v2,
    ld_global_nc_v4,
    ld_global_u16,
    mbarrier_arrive_expect_tx,
    mbarrier_wait_parity,
    pack_pair,
    st_global_u16,
    unpack_low,
    warp_sync,
)
from .ptx_cluster import ld_shared_v4_f32, rank_address, st_async_v4_f32, st_shared_v4_f32
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


def make_store_four(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function that finishes and stores two rows of tokens t and t + 8, those that exist."""
    plain, adds_nothing = config.epilogue == "plain", config.epilogue == "plain" or config.parts
    finished, load_bias = make_finished(config), make_load_bias(config.dtype)
    pack, low = pack_pair[config.dtype], unpack_low[config.dtype]

    @cuda.jit(device=True, forceinline=True)
    def store_pair(first, second, row, token, n, out, ot, of, residual, rt, rf, flags):
        if row != u32(NO_ROW) and token < n:
            later = u32(token + u32(8))
            if not adds_nothing:  # noqa: SIM102 (a condition on its own is known when the kernel is compiled)
                if flags & u32(HAS_RESIDUAL):
                    at = residual + (u64(row) * rf + u64(token) * rt) * u64(2)
                    first = first + low(u32(ld_global_u16(at)))
                    if later < n:
                        second = second + low(u32(ld_global_u16(at + rt * u64(16))))
            halves = pack(first, second)
            to = out + (u64(row) * of + u64(token) * ot) * u64(2)
            st_global_u16(to, u16(halves & u32(0xFFFF)))
            if later < n:
                st_global_u16(to + ot * u64(16), u16(halves >> u32(16)))

    def store_four(a0, a1, a2, a3, row0, row1, token, n, out, ot, of, bias, residual, rt, rf, flags):
        bias0, bias1 = f32(0.0), f32(0.0)
        if not plain:
            bias0, bias1 = load_bias(bias, row0, flags), load_bias(bias, row1, flags)
        store_pair(finished(a0 + bias0, flags), finished(a2 + bias0, flags), row0, token, n, out, ot, of, residual, rt,
                   rf, flags)  # fmt: skip
        store_pair(finished(a1 + bias1, flags), finished(a3 + bias1, flags), row1, token, n, out, ot, of, residual, rt,
                   rf, flags)  # fmt: skip

    return cuda.jit(device=True, forceinline=True)(store_four)


def make_finish(config: SkinnyConfig) -> tuple[Callable[..., Any], Callable[..., Any], int]:
    """(begin, finish, values of `targets`): `begin` asks for the rows that this warp will store to."""
    v, ranks, token_warps, octets = config.v, config.ranks, config.token_warps, config.octets
    store_four = make_store_four(config)
    unit_bytes, buffer_bytes = token_warps * 512, config.exchange_bytes // 2
    helpers = 4 // token_warps  # warps that share the units of 16 tokens
    shares, half = max(1, octets // helpers), (octets + 1) // 2

    @cuda.jit(device=True, forceinline=True)
    def begin(targets, rows, group, warp, lane, rank):
        own = u32(warp // u32(token_warps))
        first = u32(group * u32(v) + rank * u32(8 * octets) + own * u32(8) + (lane & u32(3)) * u32(2))
        if own < u32(octets):
            for i in range(shares):
                two = ld_global_nc_v2(rows + u64(first + u32(8 * helpers * i)) * u64(4))
                targets[2 * i] = two[0]
                targets[2 * i + 1] = two[1]

    @cuda.jit(device=True, forceinline=True)
    def store_octet(acc, targets, i, token, n, out, ot, of, bias, residual, rt, rf, flags):
        store_four(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3], targets[2 * i], targets[2 * i + 1],
                   token, n, out, ot, of, bias, residual, rt, rf, flags)  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def finish_alone(acc, targets, exchange, arrived, turn, rank, warp, lane, n, out, ot, of, bias, residual, rt, rf,
                     flags):  # fmt: skip
        token = u32(warp * u32(16) + (lane >> u32(2)))
        for i in range(half):  # in two loops: one of 16 with GELU stays a loop, and its accumulators go to local memory
            store_octet(acc, targets, i, token, n, out, ot, of, bias, residual, rt, rf, flags)
        for i in range(half, octets):
            store_octet(acc, targets, i, token, n, out, ot, of, bias, residual, rt, rf, flags)

    @cuda.jit(device=True, forceinline=True)
    def finish_together(acc, targets, exchange, arrived, turn, rank, warp, lane, n, out, ot, of, bias, residual, rt, rf,
                        flags):  # fmt: skip
        place = u32(turn & u32(1))
        holder = u32(warp % u32(token_warps))  # the warp whose tokens this one finishes
        signal = u32(arrived + (u32(token_warps) * place + holder) * u32(8))
        buffer = u32(exchange + place * u32(buffer_bytes) + holder * u32(512) + lane * u32(16))
        if helpers > 1:
            bar_sync(u32(1), u32(128))
        if warp < u32(token_warps):
            own = u32(buffer + rank * u32(octets * unit_bytes))
            if ranks > 1:
                if lane == u32(0):
                    mbarrier_arrive_expect_tx(signal, u32(ranks * octets * 512))
                for q in range(ranks):
                    to, there = rank_address(own, u32(q)), rank_address(signal, u32(q))
                    for i in range(octets):
                        j = 4 * (q * octets + i)
                        st_async_v4_f32(
                            u32(to + u32(i * unit_bytes)), acc[j], acc[j + 1], acc[j + 2], acc[j + 3], there
                        )
                warp_sync()
            else:
                for i in range(octets):
                    st_shared_v4_f32(u32(own + u32(i * unit_bytes)), acc[4 * i], acc[4 * i + 1], acc[4 * i + 2],
                                     acc[4 * i + 3])  # fmt: skip
        if ranks > 1:
            mbarrier_wait_parity(signal, u32((turn >> u32(1)) & u32(1)))
        else:
            bar_sync(u32(1), u32(128))
        token = u32(holder * u32(16) + (lane >> u32(2)))
        first = u32(warp // u32(token_warps))
        if first < u32(octets):
            for i in range(shares):
                s0, s1, s2, s3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                for q in range(ranks):
                    unit = u32(u32(q * octets + helpers * i) + first)
                    four = ld_shared_v4_f32(u32(buffer + unit * u32(unit_bytes)))
                    s0 += four[0]
                    s1 += four[1]
                    s2 += four[2]
                    s3 += four[3]
                store_four(s0, s1, s2, s3, targets[2 * i], targets[2 * i + 1], token, n, out, ot, of, bias, residual,
                           rt, rf, flags)  # fmt: skip

    return begin, finish_together if config.exchange_bytes else finish_alone, 2 * shares
