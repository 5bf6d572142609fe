"""The transpose kernel and its grid without a GPU, bit for bit: odd sizes, any alignment, more tiles than blocks.

Nothing lies between the rows of an array here: a read or a store outside of it is an error of the emulator.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from emulated import DTYPES, EmulatedDevice, install

from shflnb.errors import ShapeError
from shflnb.kernels.config import ceil_div, smem_limit
from shflnb.kernels.device_call import Call
from shflnb.kernels.spmm_device import device_transpose
from shflnb.kernels.transpose_config import TILE_COLS, TILE_ROWS, TILES_A_BLOCK, transpose_grid, transpose_smem

SMALL = (8, 6)  # one block fits an SM, nothing is chained
HOPPER = (9, 0)  # three


def numbers(rows: int, cols: int) -> np.ndarray:
    """Every bit pattern is as good as another, NaN too; compare as uint16."""
    return np.random.default_rng(rows * 1009 + cols).integers(1, 65536, (rows, cols), np.uint16).view(np.float16)


def turn(
    device: EmulatedDevice, rows: int, cols: int, *, wide: tuple[int, int] = (8, 8), shift: tuple[int, int] = (0, 0),
    is_result: bool = False, is_padded: bool = False,
) -> None:  # fmt: skip
    """Transpose between arrays whose rows begin at multiples of `wide` values, `shift` values further; check it all."""
    values, up = numbers(rows, cols), ceil_div(rows, 8) * 8 if is_padded else rows
    src = device.array(values, pitch=ceil_div(cols + 3, wide[0]) * wide[0], shift=shift[0])
    dst = device.empty(cols, up, "float16", pitch=ceil_div(up + 3, wide[1]) * wide[1], shift=shift[1])
    call = Call(None, src, src)  # type: ignore[arg-type]  # no product is made
    call.transpose(src.address, src.strides[0], dst.address, dst.strides[0], rows, cols, is_result, is_padded)
    found = device.read(dst).view(np.uint16)
    want = np.zeros((cols, up), np.uint16)
    want[:, :rows] = values.view(np.uint16).T
    assert (found == want).all(), (rows, cols, wide, shift, is_result, is_padded)
    assert device.machine.memory.unwritten_reads == 0


SIZES = [(1, 1), (1, 203), (203, 1), (7, 9), (32, 64), (33, 65), (64, 128), (65, 129), (130, 70)]


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_odd_sizes(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(rows + cols, capability=HOPPER, sm_count=2))
    turn(device, rows, cols)
    turn(device, rows, cols, is_padded=True)
    turn(device, rows, cols, is_result=True)


@pytest.mark.parametrize("is_result", [False, True])
def test_misaligned_rows_go_value_by_value(is_result: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and cut tiles, either side or both, by the address or by the distance of the rows."""
    device = install(monkeypatch, EmulatedDevice(5, capability=SMALL, sm_count=16))
    for rows, cols in ((64, 128), (41, 75)):
        turn(device, rows, cols, shift=(1, 0), is_result=is_result)
        turn(device, rows, cols, wide=(8, 1), is_result=is_result)
        turn(device, rows, cols, wide=(1, 8), shift=(0, 3), is_result=is_result, is_padded=True)


@pytest.mark.parametrize("capability", [SMALL, HOPPER])
@pytest.mark.parametrize(("rows", "cols", "sms"), [(460, 9, 1), (11, 1700, 1), (150, 520, 2), (200, 300, 16)])
def test_more_tiles_than_blocks(
    rows: int, cols: int, sms: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages are used again, some blocks have a tile less than others, and some a span after another."""
    for seed in range(2):
        device = install(monkeypatch, EmulatedDevice(seed, capability=capability, sm_count=sms))
        turn(device, rows, cols, is_result=bool(seed))


@pytest.mark.parametrize("is_result", [False, True])
def test_features_first_and_tokens_from_the_last(is_result: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(1, capability=SMALL, sm_count=1))
    rows, cols = 2 * TILE_ROWS, 3 * TILE_COLS
    src, dst = device.array(numbers(rows, cols)), device.empty(cols, rows, "float16")
    memory, seen = device.machine.memory, []
    store = memory.store

    def watched(addresses: np.ndarray, values: np.ndarray) -> None:
        place = (int(addresses[0]) - dst.address) // 2
        if 0 <= place < rows * cols:
            r, c = place % rows, place // rows
            if r % TILE_ROWS < 32 and c % TILE_COLS < 64:  # one of the warps, which go on by themselves
                seen.append((r // TILE_ROWS, c // TILE_COLS))
        store(addresses, values)

    monkeypatch.setattr(memory, "store", watched)
    Call(None, src, src).transpose(src.address, cols, dst.address, rows, rows, cols, is_result)  # type: ignore[arg-type]
    tiles = [(r, c) for r in (1, 0) for c in (2, 1, 0)]  # tokens are the rows
    if is_result:
        tiles = [(r, c) for c in (2, 1, 0) for r in (1, 0)]
    assert list(dict.fromkeys(seen)) == tiles


# --- what is added to a turned result --------------------------------------------------------------------------------
def turn_and_add(
    device: EmulatedDevice, rows: int, cols: int, dtype: str = "float16", *, shift: int = 0, in_place: bool = False
) -> None:
    """dst = src.T + addend, against NumPy's sum in float32; NaN stays NaN."""
    kind = np.dtype(DTYPES[dtype])
    random = np.random.default_rng(rows * 7919 + cols)
    values = (random.standard_normal((rows, cols)) * 9).astype(kind)
    others = (random.standard_normal((cols, rows)) * 9).astype(kind)
    others[cols // 2, rows // 2] = np.nan
    src = device.array(values, pitch=ceil_div(cols + 3, 8) * 8, shift=shift)
    addend = device.array(others, pitch=rows + 8)
    dst = addend if in_place else device.empty(cols, rows, dtype, pitch=rows + 16)
    call = Call(None, src, src)  # type: ignore[arg-type]  # no product is made
    call.transpose(src.address, src.strides[0], dst.address, dst.strides[0], rows, cols, is_result=True,
                   addend=(addend.address, addend.strides[0]))  # fmt: skip
    want = (values.T.astype(np.float32) + others.astype(np.float32)).astype(kind)
    np.testing.assert_array_equal(device.read(dst).astype(np.float32), want.astype(np.float32))
    assert device.machine.memory.unwritten_reads == 0
    assert device.launched[-1].startswith(f"shflnb_transpose_add_{dtype}")


@pytest.mark.parametrize(("rows", "cols"), [(8, 1), (8, 203), (32, 64), (40, 65), (64, 128), (72, 129), (136, 70)])
def test_an_addend_of_any_size(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(rows + cols, capability=HOPPER, sm_count=2))
    turn_and_add(device, rows, cols)
    turn_and_add(device, rows, cols, in_place=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("capability", [SMALL, HOPPER])
def test_an_addend_comes_with_each_tile(
    dtype: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tiles than blocks, so that stages are used again; a misaligned src goes value by value."""
    device = install(monkeypatch, EmulatedDevice(3, capability=capability, sm_count=1))
    turn_and_add(device, 136, 520, dtype)
    turn_and_add(device, 72, 140, dtype, shift=1)


def test_an_addend_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(1, capability=HOPPER))
    src = device.array(np.ones((16, 24), np.float16))
    fits = device.array(np.ones((24, 16), np.float16))
    device_transpose(src, is_result=True, addend=fits, out=fits)
    assert (device.read(fits) == 2).all()
    for bad in (device.array(np.ones((16, 24), np.float16)), device.array(np.ones((24, 16), np.float16), pitch=24)):
        with pytest.raises(ShapeError, match=r"addend is float16 of shape .* expected a C-contiguous"):
            device_transpose(src, is_result=True, addend=bad)
    with pytest.raises(ShapeError, match="addend has rows of 12 values"):
        device_transpose(device.array(np.ones((12, 8), np.float16)), addend=device.array(np.ones((8, 12), np.float16)))
    assert len(device.launched) == 1


# --- the grid --------------------------------------------------------------------------------------------------------
def test_the_grid_with_an_addend_has_more_shared_memory_a_block() -> None:
    for sms, limit, per_sm in ((132, smem_limit((9, 0)), 2), (82, smem_limit((8, 6)), 1)):
        assert transpose_grid(sms, limit, 1 << 14, 1 << 12, transpose_smem(True))[1] == per_sm * sms


@pytest.mark.parametrize(("capability", "per_sm"), [((8, 0), 2), ((8, 6), 1), ((9, 0), 3), ((10, 0), 3), ((12, 0), 1)])
def test_the_grid_takes_every_tile_once(capability: tuple[int, int], per_sm: int) -> None:
    """By the kernel's arithmetic, for any number of multiprocessors; no block has more tiles than it should."""
    for sms in (*range(1, 17), 82, 132):
        for rows, cols in ((1, 1), (64, 128), (65, 129), (1, 70000), (960, 1024), (4096, 4096), (16384, 4097)):
            blocks, at_once = transpose_grid(sms, smem_limit(capability), rows, cols)
            tiles = ceil_div(rows, TILE_ROWS) * ceil_div(cols, TILE_COLS)
            assert at_once == min(tiles, per_sm * sms) and blocks % at_once == 0
            span = ceil_div(tiles, blocks) * at_once
            taken = [
                tile
                for block in range(blocks)
                for first in (block // at_once * span,)
                for tile in range(first + block % at_once, min(tiles, first + span), at_once)
            ]
            assert sorted(taken) == list(range(tiles))
            assert ceil_div(tiles, blocks) <= TILES_A_BLOCK
