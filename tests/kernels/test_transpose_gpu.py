"""The layout kernels on a GPU, bit for bit: transposes and strided copies of any size, alignment and stride."""

# ruff: noqa: E402  (what is imported needs torch and numba-cuda, and the tests skip without them)

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba.cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from gpu_cases import GUARD, MARK, dense_of, random_packed

import shflnb
from shflnb.errors import DtypeError, ShapeError
from shflnb.kernels.config import ceil_div
from shflnb.kernels.device_call import Call
from shflnb.kernels.spmm_device import device_transpose
from shflnb.kernels.views import device_view

pytestmark = pytest.mark.gpu

SIZES = (1, 2, 3, 7, 8, 9, 31, 63, 64, 65, 127, 129, 200, 521)


class Area:
    """A (rows, cols) int16 matrix with leading dimension `ld`, `shift` values behind an aligned address, all marked."""

    def __init__(self, rows: int, cols: int, ld: int, shift: int) -> None:
        self.memory = torch.full(((rows + 2 * GUARD) * ld + shift + 64,), MARK, dtype=torch.int16, device="cuda")
        at = GUARD * ld
        at += -at % 8 + shift
        self.matrix = torch.as_strided(self.memory, (rows, cols), (ld, 1), at)

    def taken(self) -> Any:
        """(a copy of the matrix, whether nothing else was written)."""
        inside = self.matrix.clone()
        self.matrix.fill_(MARK)
        return inside, (self.memory == MARK).all()


def numbers(rows: int, cols: int) -> Any:
    return torch.randint(-32768, 32767, (rows, cols), dtype=torch.int16, device="cuda")


def call_on(x: Any) -> Any:
    """What a product uses to launch its layout kernels."""
    return Call(random_packed(16, 8, 16), x, device_view(x, what="x"))


@pytest.mark.parametrize("rows", SIZES)
def test_transpose(rows: int) -> None:
    good = []
    for place, cols in enumerate(SIZES):
        for wide_src, wide_dst, shift in ((False, False, 0), (True, True, 0), (True, False, 1), (False, True, 3)):
            src = Area(rows, cols, ceil_div(cols, 8) * 8 + 8 if wide_src else cols, shift * (place % 2))
            dst = Area(cols, rows, ceil_div(rows, 8) * 8 + 8 if wide_dst else rows, shift)
            values = numbers(rows, cols)
            src.matrix.copy_(values)
            src_at, dst_at = (part.matrix.data_ptr() for part in (src, dst))
            lds, ldd = (part.matrix.stride(0) for part in (src, dst))
            call_on(src.matrix).transpose(src_at, lds, dst_at, ldd, rows, cols, is_result=bool((rows + cols) % 2))
            result, intact = dst.taken()
            good.append(((result == values.T).all() & intact, (rows, cols, wide_src, wide_dst, shift)))
    verdict = torch.stack([g for g, _ in good]).cpu()
    assert bool(verdict.all()), [case for ok, (_, case) in zip(verdict, good, strict=True) if not ok][:10]


@pytest.mark.parametrize("is_result", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_transpose_of_more_tiles_than_blocks(shift: int, is_result: bool) -> None:
    """Blocks take several tiles each, and blocks behind them the rest; rows are cut, or misaligned as well."""
    rows, cols = 5003, 8195
    src = Area(rows, cols, cols + 5, 0)
    src.matrix.copy_(numbers(rows, cols))
    dst = Area(cols, rows, rows + 5 + shift, shift)
    src_at, dst_at = (part.matrix.data_ptr() for part in (src, dst))
    call_on(src.matrix).transpose(src_at, cols + 5, dst_at, rows + 5 + shift, rows, cols, is_result)
    result, intact = dst.taken()
    assert bool((result == src.matrix.T).all()) and bool(intact)


def test_transpose_of_millions_of_tokens() -> None:
    """4.2 million tokens of 8 features, through `linear`: more than 65535 tiles of 64 tokens."""
    n = 65535 * 64 + 77
    packed = random_packed(16, 8, 16, [8], integers=True)
    x = torch.randint(-2, 3, (n, 8), dtype=torch.int8, device="cuda").to(torch.float16)
    y = shflnb.linear(x, packed)
    assert bool((y == x @ dense_of(packed).T).all())


@pytest.mark.parametrize("rows", [1, 3, 255, 70000])
def test_strided_copy(rows: int) -> None:
    for cols in (1, 2, 255, 256, 257) if rows < 1000 else (3, 17):
        values = numbers(rows, cols)
        for src in (values, values.T.contiguous().T, values[:1].expand(rows, cols), values[:, :1].expand(rows, cols)):
            for turned in (False, True):
                dst = Area(cols, rows, rows + 3, 1) if turned else Area(rows, cols, cols + 5, 1)
                strides = dst.matrix.stride()[::-1] if turned else dst.matrix.stride()
                to = (dst.matrix.data_ptr(), *strides)
                call_on(src).copy((src.data_ptr(), *src.stride()), to, rows, cols)
                result, intact = dst.taken()
                assert bool((result == (src.T if turned else src)).all()) and bool(intact), (rows, cols, turned)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_addend_is_added_as_torch_adds_it(dtype: str, in_place: bool) -> None:
    """To the bit, over cut tiles, tiles behind each other, and rows of the source at any address."""
    kind, good = getattr(torch, dtype), []
    for rows, cols in ((8, 1), (8, 521), (32, 64), (64, 127), (136, 65), (1000, 777), (4104, 5003)):
        values, others = (torch.randn(r, c, device="cuda").to(kind) for r, c in ((rows, cols), (cols, rows)))
        want = others + values.t().contiguous()
        dst, addend = (Area(cols, rows, rows + 8, 0) for _ in range(2))
        target = addend if in_place else dst
        addend.matrix.copy_(others.view(torch.int16))
        call_on(values).transpose(values.data_ptr(), cols, target.matrix.data_ptr(), rows + 8, rows, cols, True,
                                  addend=(addend.matrix.data_ptr(), rows + 8))  # fmt: skip
        result, intact = target.taken()
        good.append(((result == want.view(torch.int16)).all() & intact, (rows, cols)))
    verdict = torch.stack([g for g, _ in good]).cpu()
    assert bool(verdict.all()), [case for ok, (_, case) in zip(verdict, good, strict=True) if not ok]


def test_a_second_transpose_of_the_same_size_takes_the_short_road() -> None:
    """With the same result, and not for another dtype, order or address."""
    x, h = torch.randn(200, 96, device="cuda").half(), torch.randn(96, 200, device="cuda").half()
    for addend in (None, h):
        want = x.t().contiguous() if addend is None else h + x.t()
        for _ in range(2):
            assert torch.equal(device_transpose(x, is_result=True, addend=addend), want)
    shifted = torch.randn(200 * 96 + 1, device="cuda").half()[1:].view(200, 96)
    assert torch.equal(device_transpose(shifted), shifted.t())
    assert torch.equal(device_transpose(x.bfloat16(), addend=h.bfloat16()), h.bfloat16() + x.bfloat16().t())
    wide = torch.randn(200, 104, device="cuda").half()[:, :96]
    assert torch.equal(device_transpose(wide, addend=h), h + wide.t())
    for bad in (h.float(), h[:95], h.t()):
        with pytest.raises(ShapeError, match="addend is"):
            device_transpose(x, addend=bad)
    with pytest.raises(DtypeError, match="x is int16"):
        device_transpose(x.view(torch.int16))
