"""One Python function per PTX instruction, usable inside `numba.cuda` kernels; nothing else.

Addresses in shared memory are `uint32` (the shared window), addresses in global memory `uint64`. Keep address
arithmetic in one unsigned type: Numba turns a mix of int64 and uint64 into float64. Instructions with a memory effect
are volatile and clobber memory, so their order in the source is their order in the PTX.

Source: PTX ISA 8.x/9.x, the section named in each group's comment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

u32, u64, f32 = types.uint32, types.uint64, types.float32
_F32, _I64 = ir.FloatType(), ir.IntType(64)


def _call_asm(builder: Any, ret: Any, args: list[Any], text: str, constraints: str, volatile: bool = True) -> Any:
    function_type = ir.FunctionType(ret, [a.type for a in args])
    return builder.call(ir.InlineAsm(function_type, text, constraints, side_effect=volatile), args)


def instruction(
    doc: str, text: str, args: tuple[Any, ...], constraints: str, ret: Any = types.void, volatile: bool = True
) -> Callable[..., Any]:
    """An intrinsic of scalar arguments whose body is the inline assembly `text` ($0.. are outputs, then inputs)."""

    def build(*_: Any) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            if ret == types.void:
                llvm_ret = ir.VoidType()
            elif isinstance(ret, types.UniTuple):
                llvm_ret = ir.LiteralStructType([context.get_value_type(ret.dtype)] * ret.count)
            else:
                llvm_ret = context.get_value_type(ret)
            result = _call_asm(builder, llvm_ret, list(values), text, constraints, volatile)
            if ret == types.void:
                return context.get_dummy_value()
            if isinstance(ret, types.UniTuple):
                items = [builder.extract_value(result, i) for i in range(ret.count)]
                return context.make_tuple(builder, ret, items)
            return result

        return ret(*args), codegen

    # `intrinsic` reads the argument names of the function it wraps, so it must have exactly as many as the instruction
    names = ", ".join(f"a{i}" for i in range(len(args)))
    scope: dict[str, Any] = {"build": build}
    exec(f"def stub(typingctx{', ' if names else ''}{names}):\n    return build({names})\n", scope)
    wrapped = intrinsic(scope["stub"])
    wrapped.__doc__ = doc
    return wrapped


def _array_data(context: Any, builder: Any, array_type: Any, value: Any) -> Any:
    from numba.cuda.np import arrayobj

    return arrayobj.make_array(array_type)(context, builder, value).data


# --- addresses and special registers ---------------------------------------------------------------------------------
@intrinsic
def smem_address(typingctx: Any, array: Any) -> Any:
    """Address of a shared array in the shared window, uint32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.ptrtoint(_array_data(context, builder, sig.args[0], args[0]), _I64)
        wide = _call_asm(builder, _I64, [pointer], "cvta.to.shared.u64 $0, $1;", "=l,l", volatile=False)
        return builder.trunc(wide, ir.IntType(32))

    return u32(array), codegen


# --- mbarrier (PTX ISA 9.7.13.15) ------------------------------------------------------------------------------------
mbarrier_init = instruction(
    "Set up the barrier at a shared address for `count` arrivals per phase.",
    "mbarrier.init.shared::cta.b64 [$0], $1;", (u32, u32), "r,r,~{memory}")  # fmt: skip
mbarrier_init_fence = instruction(
    "Make initialised barriers visible to the asynchronous proxy.",
    "fence.mbarrier_init.release.cluster;", (), "~{memory}")  # fmt: skip
mbarrier_arrive = instruction(
    "Arrive once at the barrier.", "mbarrier.arrive.shared::cta.b64 _, [$0];", (u32,), "r,~{memory}"
)
mbarrier_arrive_expect_tx = instruction(
    "Arrive once and announce `bytes` of asynchronous copies that complete on the barrier.",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", (u32, u32), "r,r,~{memory}")  # fmt: skip
mbarrier_wait_parity = instruction(
    "Wait until the phase of the given parity has completed.",
    "{ .reg .pred p; WAIT_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra DONE_${:uid}; "
    "bra WAIT_${:uid}; DONE_${:uid}: }", (u32, u32), "r,r,~{memory}")  # fmt: skip

# --- copies (PTX ISA 9.7.9.25) ---------------------------------------------------------------------------------------
cp_async_16 = instruction(
    "Copy `bytes` (0..16) from a 16-byte aligned global address to shared memory and zero the rest of the 16; "
    "0 reads nothing.",
    "cp.async.cg.shared.global [$0], [$1], 16, $2;", (u32, u64, u32), "r,l,r,~{memory}")  # fmt: skip
cp_async_16_unless_negative = instruction(
    "Copy 16 bytes from a 16-byte aligned global address to shared memory; with a negative last argument read nothing "
    "and write zeros. One machine instruction, where a byte count known only at run time costs ten.",
    "{ .reg .pred skip; setp.lt.s32 skip, $2, 0; cp.async.cg.shared.global [$0], [$1], 16, skip; }",
    (u32, u64, u32), "r,l,r,~{memory}")  # fmt: skip
cp_async_16_below = instruction(
    "The same, if the third argument is below the fourth; else read nothing and write zeros.",
    "{ .reg .pred skip; setp.ge.u32 skip, $2, $3; cp.async.cg.shared.global [$0], [$1], 16, skip; }",
    (u32, u64, u32, u32), "r,l,r,r,~{memory}")  # fmt: skip
cp_async_16_whole = instruction(
    "Copy 16 bytes between 16-byte aligned addresses, global to shared memory.",
    "cp.async.cg.shared.global [$0], [$1], 16;", (u32, u64), "r,l,~{memory}")  # fmt: skip
cp_async_commit = instruction("Close the current group of cp.async.", "cp.async.commit_group;", (), "~{memory}")
cp_async_mbarrier_arrive_noinc = instruction(
    "Arrive at the barrier when all earlier cp.async of this thread are done; the count of 1 is part of the barrier's.",
    "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", (u32,), "r,~{memory}")  # fmt: skip
bulk_copy_g2s = instruction(
    "Copy `bytes` (a multiple of 16) from global to shared memory with the copy engine, completing on a barrier.",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    (u32, u64, u32, u32), "r,l,r,r,~{memory}")  # fmt: skip
cp_async_wait = {
    pending: instruction(
        f"Wait until at most {pending} groups of cp.async are in flight.",
        f"cp.async.wait_group {pending};", (), "~{memory}")
    for pending in range(8)
}  # fmt: skip
fence_proxy_async = instruction(
    "Order generic-proxy writes to shared memory before asynchronous-proxy reads (wgmma).",
    "fence.proxy.async.shared::cta;", (), "~{memory}")  # fmt: skip

# --- plain loads and stores ------------------------------------------------------------------------------------------
ld_global_u16 = instruction("Load 2 bytes.", "ld.global.u16 $0, [$1];", (u64,), "=h,l,~{memory}", types.uint16)
ld_global_u16_u32 = instruction(
    "Load 2 bytes, with zeros above them.", "ld.global.u16 $0, [$1];", (u64,), "=r,l,~{memory}", u32
)
ld_global_u32 = instruction("Load 4 bytes.", "ld.global.u32 $0, [$1];", (u64,), "=r,l,~{memory}", u32)
ld_global_v2 = instruction(
    "Load 8 bytes.", "ld.global.v2.u32 {$0,$1}, [$2];", (u64,), "=r,=r,l,~{memory}", types.UniTuple(u32, 2)
)
ld_global_v4 = instruction(
    "Load 16 bytes.", "ld.global.v4.u32 {$0,$1,$2,$3}, [$4];", (u64,), "=r,=r,=r,=r,l,~{memory}",
    types.UniTuple(u32, 4))  # fmt: skip
ld_global_nc_u32 = instruction(
    "Load 4 bytes of read-only data.", "ld.global.nc.u32 $0, [$1];", (u64,), "=r,l", u32)  # fmt: skip
ld_global_nc_f32 = instruction(
    "Load a float32 of read-only data.", "ld.global.nc.f32 $0, [$1];", (u64,), "=f,l", f32)  # fmt: skip
ld_global_nc_v2 = instruction(
    "Load 8 bytes of read-only data.", "ld.global.nc.v2.u32 {$0,$1}, [$2];", (u64,), "=r,=r,l",
    types.UniTuple(u32, 2))  # fmt: skip
ld_global_nc_v4 = instruction(
    "Load 16 bytes of read-only data.", "ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", (u64,), "=r,=r,=r,=r,l",
    types.UniTuple(u32, 4))  # fmt: skip
st_global_v4 = instruction(
    "Store 16 bytes.", "st.global.v4.u32 [$0], {$1,$2,$3,$4};", (u64, u32, u32, u32, u32), "l,r,r,r,r,~{memory}"
)
st_global_v4_unless = instruction(
    "Store 16 bytes, unless the last two arguments are equal: a branch around the store costs more.",
    "{ .reg .pred other; setp.ne.u32 other, $5, $6; @other st.global.v4.u32 [$0], {$1,$2,$3,$4}; }",
    (u64, u32, u32, u32, u32, u32, u32), "l,r,r,r,r,r,r,~{memory}")  # fmt: skip
st_global_stream_v4 = instruction(
    "Store 16 bytes that are not needed again soon: first to leave the cache.",
    "st.global.cs.v4.u32 [$0], {$1,$2,$3,$4};", (u64, u32, u32, u32, u32), "l,r,r,r,r,~{memory}")  # fmt: skip
st_global_u16 = instruction("Store 2 bytes.", "st.global.u16 [$0], $1;", (u64, types.uint16), "l,h,~{memory}")
st_global_u32 = instruction("Store 4 bytes.", "st.global.u32 [$0], $1;", (u64, u32), "l,r,~{memory}")
st_global_f32 = instruction("Store a float32.", "st.global.f32 [$0], $1;", (u64, f32), "l,f,~{memory}")
ld_shared_u16 = instruction("Load 2 bytes.", "ld.shared.u16 $0, [$1];", (u32,), "=h,r,~{memory}", types.uint16)
ld_shared_u32 = instruction("Load 4 bytes.", "ld.shared.u32 $0, [$1];", (u32,), "=r,r,~{memory}", u32)
ld_shared_v2 = instruction(
    "Load 8 bytes of shared memory as 2 words.", "ld.shared.v2.u32 {$0,$1}, [$2];", (u32,), "=r,=r,r,~{memory}",
    types.UniTuple(u32, 2))  # fmt: skip
ld_shared_v4 = instruction(
    "Load 16 bytes.", "ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", (u32,), "=r,=r,=r,=r,r,~{memory}",
    types.UniTuple(u32, 4))  # fmt: skip
st_shared_u32 = instruction("Store 4 bytes.", "st.shared.u32 [$0], $1;", (u32, u32), "r,r,~{memory}")
st_shared_v4 = instruction(
    "Store 16 bytes.", "st.shared.v4.u32 [$0], {$1,$2,$3,$4};", (u32, u32, u32, u32, u32), "r,r,r,r,r,~{memory}"
)


def _copy_values(source: str, target: str) -> Callable[..., Any]:
    """`copy(target, source, count)`, one by one: a loop that no compiler unrolls, since unrolled in every place where
    rows may be cut it fills the instruction cache.
    """
    kinds = {"shared": ("u32", "r", u32), "global": ("u64", "l", u64)}
    (from_kind, from_letter, from_type), (to_kind, to_letter, to_type) = kinds[source], kinds[target]
    return instruction(
        f"Copy `count` (at least 1) values of 2 bytes from {source} to {target} memory.",
        f"{{ .reg .pred more; .reg .u16 value; .reg .{to_kind} to; .reg .{from_kind} from; .reg .u32 left; "
        f"mov.{to_kind} to, $0; mov.{from_kind} from, $1; mov.u32 left, $2; "
        f"NEXT_${{:uid}}: .pragma \\22nounroll\\22; ld.{source}.u16 value, [from]; st.{target}.u16 [to], value; "
        f"add.{from_kind} from, from, 2; add.{to_kind} to, to, 2; sub.u32 left, left, 1; setp.ne.u32 more, left, 0; "
        "@more bra NEXT_${:uid}; }", (to_type, from_type, u32), f"{to_letter},{from_letter},r,~{{memory}}")  # fmt: skip


copy_values_s2g = _copy_values("shared", "global")
copy_values_g2s = _copy_values("global", "shared")

# --- matrix loads and stores (PTX ISA 9.7.14.5.15, .16) --------------------------------------------------------------
ldmatrix_x4_trans = instruction(
    "Load four 8x8 b16 matrices transposed; lanes 8i..8i+7 name the rows of matrix i.",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];", (u32,), "=r,=r,=r,=r,r,~{memory}",
    types.UniTuple(u32, 4))  # fmt: skip
stmatrix_x4 = instruction(
    "Store four 8x8 b16 matrices; lane l gives the address of row l % 8 of matrix l // 8 (sm_90).",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1,$2,$3,$4};", (u32, u32, u32, u32, u32),
    "r,r,r,r,r,~{memory}")  # fmt: skip
stmatrix_x4_trans = instruction(
    "Store four 8x8 b16 matrices transposed (sm_90).",
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1,$2,$3,$4};", (u32, u32, u32, u32, u32),
    "r,r,r,r,r,~{memory}")  # fmt: skip

# --- conversions (PTX ISA 9.7.9.22) ----------------------------------------------------------------------------------
pack_pair = {
    "float16": instruction(
        "Two float32 to float16x2, round to nearest even; the first is the lower half.",
        "cvt.rn.f16x2.f32 $0, $2, $1;", (f32, f32), "=r,f,f", u32, volatile=False),
    "bfloat16": instruction(
        "Two float32 to bfloat16x2, round to nearest even; the first is the lower half.",
        "cvt.rn.bf16x2.f32 $0, $2, $1;", (f32, f32), "=r,f,f", u32, volatile=False),
}  # fmt: skip
unpack_low = {
    "float16": instruction(
        "Lower half of a float16x2 as float32.",
        "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.f32.f16 $0, lo; }", (u32,), "=f,r", f32, volatile=False),
    "bfloat16": instruction(
        "Lower half of a bfloat16x2 as float32.",
        "{ .reg .b32 w; shl.b32 w, $1, 16; mov.b32 $0, w; }", (u32,), "=f,r", f32, volatile=False),
}  # fmt: skip
unpack_high = {
    "float16": instruction(
        "Upper half of a float16x2 as float32.",
        "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.f32.f16 $0, hi; }", (u32,), "=f,r", f32, volatile=False),
    "bfloat16": instruction(
        "Upper half of a bfloat16x2 as float32.",
        "{ .reg .b32 w; and.b32 w, $1, 0xffff0000; mov.b32 $0, w; }", (u32,), "=f,r", f32, volatile=False),
}  # fmt: skip

float_of_bits = instruction("The float32 of these bits.", "mov.b32 $0, $1;", (u32,), "=f,r", f32, volatile=False)

# --- arithmetic that must not become Python's (checked, widening) arithmetic -----------------------------------------
mad_wide_u32 = instruction(
    "a * b + c with 32-bit factors and a 64-bit sum.", "mad.wide.u32 $0, $1, $2, $3;", (u32, u32, u64), "=l,r,r,l", u64,
    volatile=False)  # fmt: skip
div_u32 = instruction("Unsigned quotient.", "div.u32 $0, $1, $2;", (u32, u32), "=r,r,r", u32, volatile=False)

opaque = instruction(
    "The argument, of which the optimiser no longer knows anything: it counts no loop's rounds by it.",
    "mov.u32 $0, $1;", (u32,), "=r,r", u32)  # fmt: skip
no_unroll = instruction(
    "As the first statement of a loop: the assembler leaves it a loop.", ".pragma \\22nounroll\\22;", (), ""
)

# --- barriers and registers ------------------------------------------------------------------------------------------
bar_sync = instruction(
    "Barrier `id` among `threads` threads of the block.", "bar.sync $0, $1;", (u32, u32), "r,r,~{memory}"
)
shuffle = instruction(
    "The value of another lane of the warp.", "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", (u32, u32), "=r,r,r",
    u32)  # fmt: skip
warp_sync = instruction("Barrier among the 32 lanes of a warp.", "bar.warp.sync 0xffffffff;", (), "~{memory}")
setmaxnreg_dec = {
    count: instruction(
        f"Give registers of the warpgroup back, down to {count} a thread.",
        f"setmaxnreg.dec.sync.aligned.u32 {count};", (), "~{memory}")
    for count in (40, 80)
}  # fmt: skip
setmaxnreg_inc = {
    count: instruction(
        f"Raise the warpgroup's registers to {count} a thread.",
        f"setmaxnreg.inc.sync.aligned.u32 {count};", (), "~{memory}")
    for count in (208,)
}  # fmt: skip

# --- mma.sync (PTX ISA 9.7.14.5.8) -----------------------------------------------------------------------------------
_PTX_TYPE = {"float16": "f16", "bfloat16": "bf16"}


def make_mma_m16n8k16(dtype: str) -> Callable[..., Any]:
    """Build `mma(acc, first, a0..a3, b0, b1)`: acc[first:first+4] += A (16x16) @ B (16x8), float32 accumulation.

    Lane l holds D rows l//4 and l//4 + 8, columns 2(l%4), +1 in acc[first..first+3].
    """
    kind = _PTX_TYPE[dtype]

    @intrinsic
    def mma(typingctx: Any, acc: Any, first: Any, a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array_data(context, builder, sig.args[0], args[0])
            slots = [builder.gep(data, [builder.add(args[1], ir.Constant(_I64, i))], inbounds=True) for i in range(4)]
            text = (
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
                "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};"
            )
            constraints = "=f,=f,=f,=f,0,1,2,3,r,r,r,r,r,r"
            old = [builder.load(s) for s in slots]
            ret = ir.LiteralStructType([_F32] * 4)
            result = _call_asm(builder, ret, old + list(args[2:]), text, constraints, volatile=False)
            for i, slot in enumerate(slots):
                builder.store(builder.extract_value(result, i), slot)
            return context.get_dummy_value()

        return types.void(acc, types.int64, u32, u32, u32, u32, u32, u32), codegen

    return mma


# --- wgmma (PTX ISA 9.7.15) ------------------------------------------------------------------------------------------
wgmma_fence = instruction(
    "Order register and shared accesses before the first wgmma.", "wgmma.fence.sync.aligned;", (), "~{memory}"
)
wgmma_commit = instruction("Close the current group of wgmma.", "wgmma.commit_group.sync.aligned;", (), "~{memory}")
wgmma_wait = {
    pending: instruction(
        f"Wait until at most {pending} groups of wgmma are in flight.",
        f"wgmma.wait_group.sync.aligned {pending};", (), "~{memory}")
    for pending in (0, 1)
}  # fmt: skip


def make_wgmma(n: int, dtype: str, *, first: int = 0, a_mn_major: bool = False, b_mn_major: bool = False) -> Any:
    """Build `wgmma(acc, desc_a, desc_b)`: acc[first:first+n/2] += A (64x16) @ B (16xn), both in shared memory.

    Warp w of the warpgroup, lane l holds rows 16w + l//4 and +8; register 4j + {0, 1, 2, 3} is columns 8j + 2(l%4), +1
    of the first row, then of the second. The accumulators are tied registers of the asm, so `acc` must be a local array
    that the optimiser can keep in registers (constant indices only).
    """
    kind = _PTX_TYPE[dtype]
    count = n // 2

    @intrinsic
    def wgmma(typingctx: Any, acc: Any, desc_a: Any, desc_b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array_data(context, builder, sig.args[0], args[0])
            slots = [builder.gep(data, [ir.Constant(_I64, first + i)], inbounds=True) for i in range(count)]
            registers = ", ".join(f"${i}" for i in range(count))
            text = (
                f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{registers}}}, "
                f"${2 * count}, ${2 * count + 1}, 1, 1, 1, {int(a_mn_major)}, {int(b_mn_major)};"
            )
            constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l", "l"])
            old = [builder.load(s) for s in slots]
            ret = ir.LiteralStructType([_F32] * count)
            result = _call_asm(builder, ret, old + list(args[1:]), text, constraints)
            for i, slot in enumerate(slots):
                builder.store(builder.extract_value(result, i), slot)
            return context.get_dummy_value()

        return types.void(acc, u64, u64), codegen

    return wgmma
