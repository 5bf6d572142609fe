"""One Numba intrinsic per idea that plain Numba cannot say: a register tile, a memory copy, an atomic add, a bit cast.

The register tile is the whole of the arithmetic. It keeps `scalars x vectors` vector accumulators in registers and, for
each kept column, loads `vectors` vectors from one operand and broadcasts `scalars` numbers from the other:

    acc[q, p*lanes + l] += sum over j of  scalar[j, q] * vector[j, p*lanes + l]          (numpy: acc += S.T @ V)

One of the two operands is stitched: its row is `indices[start + j]`; the other is the packed weights, read in order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

__all__ = ["Machine", "as_bits", "as_float", "copy_bytes", "fetch_add", "machine", "make_tile"]

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


@dataclass(frozen=True)
class Machine:
    """The vector unit that Numba compiles for: bytes of a vector register, and how many of them there are."""

    vector_bytes: int
    registers: int

    def lanes(self, itemsize: int) -> int:
        """Numbers of `itemsize` bytes in one vector."""
        return self.vector_bytes // itemsize


@functools.cache
def machine() -> Machine:
    """Read the vector unit from Numba's own target, so that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are obeyed."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    words = set(features.split(","))
    if triple.startswith(("x86_64", "i686", "amd64")):
        if "+avx512f" in words:
            return Machine(64, 32)
        return Machine(32 if "+avx" in words else 16, 16)
    return Machine(16, 32)  # NEON, VSX


def _pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """The data pointer of a Numba array."""
    return context.make_array(array_type)(context, builder, array).data


def _at(builder: Any, base: Any, index: Any, pointer_type: Any = None) -> Any:
    place = builder.gep(base, [index])
    return place if pointer_type is None else builder.bitcast(place, pointer_type.as_pointer())


def make_tile(vectors: int, scalars: int, vector_bytes: int, stitch_vectors: bool) -> Any:
    """Make the intrinsic of a register tile of `vectors x scalars` accumulators:

        tile((vec, at, row), (sca, at, row, step), (indices, start, count), (acc, at, row), fresh)

    All arrays are 1-D, places and strides count elements. Row j of `vec` and `sca` begins at `at + r * row`, where r
    is `indices[start + j]` for the stitched operand (the vectors if `stitch_vectors`, else the scalars) and `start + j`
    for the other; `step` lies between the scalars of a row. The sum over `j < count` runs in the order of j from zero;
    it is then added to `acc` once, or put there if `fresh`. The bits depend on nothing else.
    """
    shape = (vectors, scalars, vector_bytes, stitch_vectors)

    @intrinsic
    def tile(_context, vec, sca, kept, acc, fresh):
        signature = types.void(vec, sca, kept, acc, types.boolean)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            operands = []
            for given, value in zip(sig.args[:4], args[:4], strict=True):
                array, *numbers = cgutils.unpack_tuple(builder, value)
                operands.append((_pointer(context, builder, given[0], array), *numbers))
            _emit_tile(builder, shape, acc[0].dtype, operands, args[4])
            return context.get_dummy_value()

        return signature, codegen

    return tile


def _emit_tile(builder: Any, shape: tuple[int, int, int, bool], dtype: Any, operands: list[Any], fresh: Any) -> None:
    """Write the loop over kept columns of one tile as LLVM IR."""
    vectors, scalars, vector_bytes, stitch_vectors = shape
    vec, vec_at, vec_row = operands[0]
    sca, sca_at, sca_row, sca_step = operands[1]
    indices, start, count = operands[2]
    acc, acc_at, acc_row = operands[3]
    single = dtype == types.float32
    itemsize = 4 if single else 8
    lanes = vector_bytes // itemsize
    element = ir.FloatType() if single else ir.DoubleType()
    vector = ir.VectorType(element, lanes)
    # fmuladd: one rounding where the target has FMA, and never the library call that `llvm.fma` becomes elsewhere
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3),
                                         f"llvm.fmuladd.v{lanes}f{8 * itemsize}")  # fmt: skip
    zero, undefined = ir.Constant(vector, None), ir.Constant(vector, ir.Undefined)
    lane_zero = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)

    before = builder.block
    loop, done = builder.append_basic_block("tile.loop"), builder.append_basic_block("tile.done")
    builder.cbranch(builder.icmp_signed(">", count, _I64(0)), loop, done)

    builder.position_at_end(loop)
    j = builder.phi(_I64)
    sums = [builder.phi(vector) for _ in range(vectors * scalars)]
    packed_row = builder.add(start, j)
    stitched_row = builder.sext(builder.load(_at(builder, indices, packed_row)), _I64)
    vec_r, sca_r = (stitched_row, packed_row) if stitch_vectors else (packed_row, stitched_row)
    vec_base = _at(builder, vec, builder.add(vec_at, builder.mul(vec_r, vec_row)))
    sca_base = _at(builder, sca, builder.add(sca_at, builder.mul(sca_r, sca_row)))
    loaded = []
    for p in range(vectors):
        loaded.append(builder.load(_at(builder, vec_base, _I64(p * lanes), vector), align=itemsize))
    new = []
    for q in range(scalars):
        number = builder.load(_at(builder, sca_base, builder.mul(sca_step, _I64(q))))
        spread = builder.shuffle_vector(builder.insert_element(undefined, number, _I32(0)), undefined, lane_zero)
        new += [builder.call(fma, [loaded[p], spread, sums[q * vectors + p]]) for p in range(vectors)]
    following = builder.add(j, _I64(1))
    again = builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    again.set_metadata("llvm.loop", _never_unroll(builder.module))
    j.add_incoming(_I64(0), before)
    j.add_incoming(following, loop)

    builder.position_at_end(done)
    totals = [builder.phi(vector) for _ in new]
    for phi, total, result in zip(sums, totals, new, strict=True):
        phi.add_incoming(zero, before)
        phi.add_incoming(result, loop)
        total.add_incoming(zero, before)
        total.add_incoming(result, loop)
    for q in range(scalars):
        row = builder.add(acc_at, builder.mul(acc_row, _I64(q)))
        for p in range(vectors):
            place = _at(builder, acc, builder.add(row, _I64(p * lanes)), vector)
            old = builder.load(place, align=itemsize)
            total = totals[q * vectors + p]
            builder.store(builder.select(fresh, total, builder.fadd(old, total)), place, align=itemsize)


def _never_unroll(module: Any) -> Any:
    """Metadata of a loop that LLVM must not unroll: it would hoist loads until accumulators spill to the stack."""
    option = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop = ir.MDValue(module, [option, option], name=str(len(module.metadata)))
    loop.operands = (loop, option)  # a loop's metadata names itself first
    return loop


@intrinsic
def copy_bytes(_context, dst, dst_byte, src, src_byte, count):
    """`memcpy` of `count` bytes between byte offsets of two arrays that do not overlap."""
    i = types.intp
    signature = types.void(dst, i, src, i, i)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = []
        for a in (0, 2):
            start = builder.bitcast(_pointer(context, builder, sig.args[a], args[a]), _I8.as_pointer())
            places.append(_at(builder, start, args[a + 1]))
        cgutils.raw_memcpy(builder, *places, args[4], 1)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def fetch_add(_context, counters, slot, amount):
    """Add `amount` to `counters[slot]` atomically and return what stood there before (int64)."""
    signature = types.int64(counters, types.intp, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _at(builder, _pointer(context, builder, sig.args[0], args[0]), args[1])
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return signature, codegen


@intrinsic
def as_bits(_context, number):
    """The 32 bits of a float32 as uint32."""
    return types.uint32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], _I32)


@intrinsic
def as_float(_context, bits):
    """The float32 that has these 32 bits (uint32)."""
    return types.float32(types.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())
