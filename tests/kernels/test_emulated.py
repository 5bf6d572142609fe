"""Every kernel family, run without a GPU by `ptx_emulator.py`, from the checks of a call to the last store.

Small integers must be exact, floats within promise 2; warps and copies take random turns, and a store outside an
array, a wait that is missing or a wait without end is an error. What the emulator cannot judge is speed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from emulated import EmulatedArray, EmulatedDevice, EmulatedKernel, install, turned
from gpu_cases import DTYPES, random_packed

from shflnb.errors import ArgumentError, DeviceError
from shflnb.kernels import device_call, memo, remembered, select, skinny_plan, skinny_select, spmm_device, timing
from shflnb.kernels.config import Config
from shflnb.kernels.epilogue import HAS_BIAS
from shflnb.kernels.launch import DeviceMemory
from shflnb.kernels.memo import quick_product
from shflnb.kernels.operands import rows_of
from shflnb.kernels.queue import tile_queue
from shflnb.kernels.select import candidates
from shflnb.kernels.skinny_config import config_of as few_config
from shflnb.kernels.spmm_device import device_linear, device_matmul
from shflnb.reference import judge
from shflnb.tuning.tune import measure_few

HOPPER, AMPERE = (9, 0), (8, 0)


def config_of(kernel: str, v: int, tile_n: int, dtype: str = "float16") -> Config:
    """A candidate; "alternate": consumers take tiles in turns, "all": all producer warps stitch one stage."""
    kind, *ways = kernel.split()
    known = (c for c in candidates(v, dtype, HOPPER) if c.kernel == kind and c.tile_n == tile_n)
    return next(c for c in known if c.alternate == ("alternate" in ways) and ("all" not in ways or c.team == 4))


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.integers(-2, 3, shape).astype(DTYPES[dtype])


def floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (rng.standard_normal(shape, np.float32) * 0.5).astype(DTYPES[dtype])


def product(w: Any, x: np.ndarray) -> np.ndarray:
    return w.to_dense().astype(np.float64) @ x.astype(np.float64)


# --- products on feature-major arrays --------------------------------------------------------------------------------
STITCHED = [
    ("sm90", 128, 256, "float16"), ("sm90", 64, 512, "bfloat16"), ("sm90", 64, 256, "float16"),
    ("sm90", 32, 256, "float16"), ("sm90", 16, 128, "bfloat16"),
    ("sm80", 128, 128, "float16"), ("sm80", 64, 256, "bfloat16"), ("sm80", 32, 64, "float16"),
    ("sm80", 16, 128, "float16"),
    ("sm90 alternate", 64, 256, "float16"), ("sm90 alternate", 32, 256, "bfloat16"),
    ("sm90 alternate", 16, 256, "float16"), ("sm90 alternate", 64, 128, "bfloat16"),
    ("sm90 alternate", 64, 64, "float16"), ("sm90", 32, 512, "bfloat16"),
    ("sm90 all", 128, 64, "bfloat16"), ("sm90 alternate all", 64, 128, "float16"),
    ("sm90 all", 128, 160, "float16"), ("sm90", 128, 96, "bfloat16"), ("sm90 alternate", 64, 192, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "v", "tile_n", "dtype"), STITCHED)
def test_matmul_on_odd_sizes(kernel: str, v: int, tile_n: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut last group, empty and full groups, n that cuts a chunk, aligned and misaligned x and out, one value."""
    config = config_of(kernel, v, tile_n, dtype)
    sizes = ((2 * v + 5, 150, tile_n + 43), (7 * v, 270, 16), (3, 129, 9), (1, 1, 1))
    for seed, (m, k, n) in enumerate(sizes):
        device = install(monkeypatch, EmulatedDevice(seed))
        rng = np.random.default_rng(seed)
        packed = random_packed(m, k, v, dtype=dtype, seed=seed, integers=True)
        x = integers(rng, (k, n), dtype)
        want = product(packed, x)
        aligned = device.array(x, pitch=-(-n // 8) * 8)
        for name, given in (("aligned", aligned), ("misaligned", device.array(x, pitch=n + 3, shift=5))):
            out = device.empty(m, n, dtype, pitch=n + (8 - n % 8 if name == "aligned" else 1))
            y = device.read(device_matmul(packed, given, out=out, config=config))
            assert (y.astype(np.float64) == want).all(), (m, k, n, name)
        assert device.machine.memory.unwritten_reads == 0


def test_consumers_that_alternate_lose_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one stage each: nothing but their turns keeps the warps of a consumer together."""
    config = config_of("sm90 alternate", 64, 64, "float16")
    packed = random_packed(12 * 64, 64, 64, [9, 0, 64] * 4, seed=3, integers=True)
    x = integers(np.random.default_rng(3), (64, 16), "float16")
    want = product(packed, x)
    for seed in range(8):
        device = install(monkeypatch, EmulatedDevice(seed, sm_count=1))
        packed.launch_cache.clear()
        y = device.read(device_matmul(packed, device.array(x), config=config))
        assert (y.astype(np.float64) == want).all()


@pytest.mark.parametrize(
    ("kernel", "v", "tile_n"), [("sm90", 128, 128), ("sm90 alternate", 32, 256), ("sm80", 64, 64), ("sm90", 128, 96)]
)
@pytest.mark.parametrize("activation", ["gelu", None])
def test_bias_activation_and_residual(
    kernel: str, v: int, tile_n: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = install(monkeypatch, EmulatedDevice(7))
    rng = np.random.default_rng(v)
    packed = random_packed(v + 9, 90, v, seed=v)
    m, k = packed.shape
    x, residual, bias = (floats(rng, shape, "float16") for shape in ((k, 107), (m, 107), (m,)))
    y = device_matmul(packed, device.array(x), bias=device.array(bias), activation=activation,
                      residual=device.array(residual), config=config_of(kernel, v, tile_n))  # fmt: skip
    verdict = judge(device.read(y), packed, x, bias, activation, residual)
    assert verdict.holds, verdict


# --- products on token-major arrays ----------------------------------------------------------------------------------
def test_linear_by_transposes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transpose, product, transpose; k and m that no chunk of 8 divides go value by value."""
    device = install(monkeypatch, EmulatedDevice(1))
    rng = np.random.default_rng(1)
    config = config_of("sm90", 64, 256)
    for m, k, n in ((133, 77, 70), (72, 136, 8)):
        packed = random_packed(m, k, 64, seed=m, integers=True)
        x = integers(rng, (n, k), "float16")
        for given in (device.array(x), turned(device.array(np.ascontiguousarray(x.T)))):
            y = device.read(device_linear(given, packed, config=config))
            assert (y.astype(np.float64) == product(packed, x.T).T).all()
    assert sum("transpose" in name for name in device.launched) >= 6


# --- few columns -----------------------------------------------------------------------------------------------------
FEW = [
    # v, n, m, k, multiprocessors, ranks
    (64, 1, 64 * 3, 700, 4, 2),
    (64, 13, 69, 77, 1, 1),
    (16, 8, 48, 500, 16, 2),
    (32, 20, 101, 203, 2, 1),
    (32, 33, 101, 403, 9, 4),
    (128, 64, 133, 777, 4, 1),
    (128, 3, 133, 777, 16, 4),
    (64, 20, 128, 600, 12, 8),
    (64, 64, 200, 900, 2, 1),
]


@pytest.mark.parametrize(("v", "n", "m", "k", "sms", "ranks"), FEW)
def test_few_columns(v: int, n: int, m: int, k: int, sms: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls on both layouts, unequal and empty groups; every bit the same for another order of events."""
    packed = random_packed(m, k, v, seed=n, integers=True)
    x = integers(np.random.default_rng(n), (k, n), "float16")
    want = product(packed, x)
    for seed in range(2):
        device = install(monkeypatch, EmulatedDevice(seed, sm_count=sms))
        packed.launch_cache.clear()
        feature, token = device.array(x), device.array(np.ascontiguousarray(x.T), pitch=k + 5)
        for given in (feature, turned(token))[: 2 - seed]:
            assert (device.read(device_matmul(packed, given)).astype(np.float64) == want).all()
        y = device.read(device_linear(token, packed))
        assert (y.T.astype(np.float64) == want).all()
        assert any(f"_r{ranks}_" in name for name in device.launched), device.launched
        assert device.machine.memory.unwritten_reads == 0


@pytest.mark.parametrize("pitch", [20, 21])
def test_neighbouring_tokens_are_stored_together_where_they_may(pitch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows an odd number of values apart every other one starts within a word; the emulator refuses that."""
    device = install(monkeypatch, EmulatedDevice(1, sm_count=2))
    packed = random_packed(69, 130, 64, seed=pitch, integers=True)
    x = integers(np.random.default_rng(pitch), (130, 20), "float16")
    out = device.empty(69, 20, "float16", pitch=pitch)
    device_matmul(packed, device.array(x), out=out)
    assert (device.read(out).astype(np.float64) == product(packed, x)).all()


MANY = [
    # v, n, ranks, whether the product stitches token-major x, warps that stitch
    (64, 16, 4, False, 4), (32, 64, 2, False, 4), (64, 30, 8, False, 4), (16, 9, 1, False, 4), (128, 40, 2, False, 4),
    (64, 16, 4, True, 8), (32, 7, 2, True, 8), (64, 13, 8, True, 4), (16, 9, 1, True, 4), (128, 1, 2, True, 8),
    (64, 16, 2, True, 8), (64, 30, 8, True, 8), (64, 17, 2, True, 8),
]  # fmt: skip


@pytest.mark.parametrize(("v", "n", "ranks", "token_major", "stitchers"), MANY)
def test_groups_outnumber_clusters(
    v: int, n: int, ranks: int, token_major: bool, stitchers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cluster for many groups: buffers and barriers are used again and again; some ranks have no columns."""
    device = install(monkeypatch, EmulatedDevice(1, sm_count=1))
    monkeypatch.setattr(device, "sm_count", ranks)  # one cluster of them
    packed = random_packed(6 * v - 3, 300, v, [300, 0, 64, 1, 130, 200], dtype="bfloat16", seed=v, integers=True)
    config = few_config(v, n, ranks, "bfloat16", 1, token_major=token_major, stitchers=stitchers)
    x = integers(np.random.default_rng(n), (n, 300), "bfloat16")
    y = device.read(device_linear(device.array(x, pitch=305), packed, config=config))
    assert any("_tokens_" in name for name in device.launched) == token_major
    assert device.machine.memory.unwritten_reads == 0
    assert (y.T.astype(np.float64) == product(packed, x.T)).all()


@pytest.mark.parametrize(("k", "is_wide"), [(65_535, False), (65_536, True)])
@pytest.mark.parametrize(("n", "token_major"), [(3, True), (20, True), (3, False), (16, False), (40, False)])
def test_column_ids_of_either_width(
    k: int, is_wide: bool, n: int, token_major: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups keep the last column, and have places without one."""
    device = install(monkeypatch, EmulatedDevice(k, sm_count=2))
    packed = random_packed(69, k, 32, [70, 1, 129], seed=n, integers=True)
    indices = packed.indices.copy()
    indices[packed.indptr[1:] - 1] = k - 1
    packed = replace(packed, indices=indices)
    config = few_config(32, n, 2, "float16", 1, token_major=token_major)
    rng = np.random.default_rng(n)
    x = np.full((n, k), np.nan, np.float16)  # what nobody keeps does no harm
    x[:, indices] = integers(rng, (n, len(indices)), "float16")
    want = product(packed, np.where(np.isnan(x), 0, x).T)
    if token_major:
        y = device.read(device_linear(device.array(x), packed, config=config)).T
    else:
        y = device.read(device_matmul(packed, device.array(np.ascontiguousarray(x.T)), config=config))
    assert (y.astype(np.float64) == want).all()
    assert any("_wide_" in name for name in device.launched) == is_wide


@pytest.mark.parametrize(
    ("v", "n", "ranks", "token_major", "stitchers"), [(64, 2, 2, True, 8), (32, 1, 4, False, 4), (16, 2, 1, True, 4)]
)
def test_equal_groups_are_found_without_a_queue(
    v: int, n: int, ranks: int, token_major: bool, stitchers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = install(monkeypatch, EmulatedDevice(1, sm_count=1))
    monkeypatch.setattr(device, "sm_count", 2 * ranks)  # two clusters
    monkeypatch.setattr(skinny_plan, "tile_queue", lambda *given: np.full_like(tile_queue(*given), 0xFFFF))
    monkeypatch.setattr(skinny_plan, "ahead_table", lambda *_: np.zeros((0, 4), np.uint32))
    packed = random_packed(5 * v - 3, 300, v, [150] * 5, dtype="bfloat16", seed=v, integers=True)
    config = few_config(v, n, ranks, "bfloat16", 1, token_major=token_major, stitchers=stitchers)
    x = integers(np.random.default_rng(n), (n, 300), "bfloat16")
    y = device.read(device_linear(device.array(x, pitch=305), packed, config=config))
    assert (y.T.astype(np.float64) == product(packed, x.T)).all()


def test_a_config_that_cannot_take_the_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(2))
    packed = random_packed(70, 66, 64, seed=1)
    x = device.array(np.ones((66, 20), np.float16))
    for config, n in ((few_config(32, 16, 1, "float16", 2), 16), (few_config(64, 16, 1, "float16", 2), 20),
                      (few_config(64, 16, 1, "bfloat16", 2), 16), (few_config(64, 16, 1, "float16", 2, parts=True), 16),
                      (few_config(64, 16, 1, "float16", 2, token_major=True), 16)):  # fmt: skip
        with pytest.raises(ArgumentError, match=f"cannot take {n} columns of feature-major float16, v = 64"):
            device_matmul(packed, device.array(np.ones((66, n), np.float16)), config=config)
    assert not device.launched and x.shape == (66, 20)


class PlayedBench:
    """`timing.Bench` on an emulated device; a call takes as long as its kernels' names are said to."""

    stream = 0

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def __enter__(self) -> PlayedBench:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing was opened."""

    def matrix(self, a: np.ndarray, dtype: str) -> EmulatedArray:
        return self.device.array(a)

    def poison(self, operand: EmulatedArray) -> None:
        values = np.full(operand.shape, np.nan, DTYPES[operand.dtype])
        self.device.machine.memory.data[self.device._places(operand)] = values.view(np.uint8)

    def fetch(self, operand: EmulatedArray, dtype: np.dtype) -> np.ndarray:
        return self.device.read(operand)

    def median_us(self, calls: list[Any]) -> float:
        self.device.launched.clear()
        for call in calls[:2]:
            call()
        names = self.device.launched
        return 5.0 if any("_r2_" in name and "_tokens_" in name for name in names) else 5.0 + len(names)


def test_few_columns_are_tuned_for_either_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Every kernel is checked and timed on copies of the weights; the next calls take the best of their layout."""
    monkeypatch.setenv("SHFLNB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(remembered, "_TABLES", {})
    device = install(monkeypatch, EmulatedDevice(5, sm_count=8))
    device.l2_bytes = 20_000
    monkeypatch.setattr(timing, "Bench", PlayedBench)
    packed = random_packed(37, 140, 16, seed=3)
    said: list[str] = []
    feature, token = measure_few(packed, 5, device, said.append)
    assert (feature.layout, token.layout) == ("feature", "token") and not feature.rejected and not token.rejected
    assert {m.config for m in feature.measured} == set(skinny_select.few_candidates(16, 5, "float16", "feature"))
    assert {m.config for m in token.measured} == set(skinny_select.few_candidates(16, 5, "float16", "token"))
    assert len(said) == len(feature.measured) + len(token.measured) and "token-major x: shflbw_skinny90" in said[-1]
    assert feature.best.config == feature.before and token.best.config != token.before
    assert token.best.config.token_major and token.best.config.ranks == 2
    entries = {t.key: remembered.entry_of(t.best.config) for t in (feature, token)}
    assert remembered.store(device.name, entries)
    monkeypatch.setattr(remembered, "_TABLES", {})  # as another process finds it
    packed.launch_cache.clear()
    x = np.random.default_rng(0).standard_normal((8, 140)).astype(np.float16)
    for n, is_tuned in ((8, True), (4, False), (5, True)):
        device.launched.clear()
        y = device.read(device_linear(device.array(x[:n]), packed))
        assert judge(y.T, packed, x[:n].T).holds
        assert any("_r2_" in name for name in device.launched) == is_tuned, (n, device.launched)


def in_parts(monkeypatch: pytest.MonkeyPatch, seed: int, capability: tuple[int, int] = HOPPER) -> EmulatedDevice:
    """A device whose L2 has room for 256 tokens of 70 features."""
    device = install(monkeypatch, EmulatedDevice(seed, capability=capability))
    device.l2_bytes = 60_000
    monkeypatch.setattr(select, "TURNED_TOKENS", 256)
    monkeypatch.setattr(select, "TILES_AN_SM", 1.0)
    return device


@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
def test_linear_in_parts_of_the_tokens(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts, the last one cut; rows that lie further apart; bias, activation and residual. On Hopper only."""
    device = in_parts(monkeypatch, 8, capability)
    rng = np.random.default_rng(8)
    packed = random_packed(67, 70, 32, seed=8)
    x, residual, bias = (floats(rng, shape, "float16") for shape in ((600, 70), (600, 67), (67,)))
    out = device.empty(600, 67, "float16", pitch=80)
    y = device_linear(device.array(x, pitch=77, shift=3), packed, device.array(bias), activation="relu",
                      residual=device.array(residual, pitch=70), out=out)  # fmt: skip
    verdict = judge(device.read(y).T, packed, x.T, bias, "relu", residual.T)
    assert verdict.holds, verdict
    assert sum("sm90" in name or "sm80" in name for name in device.launched) == (3 if capability == HOPPER else 1)
    device.launched.clear()
    feature_major = device.empty(67, 600, "float16")
    device_linear(device.array(x), packed, out=turned(feature_major))
    assert sum("sm90" in name or "sm80" in name for name in device.launched) == 1, "a result that is not turned back"


class PlayedTensor:
    """What the short road asks of a torch tensor, over emulated memory."""

    def __init__(self, device: EmulatedDevice, view: EmulatedArray) -> None:
        self.device, self.view, self.dtype, self.shape = device, view, view.dtype, view.shape
        self.requires_grad = False

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def is_contiguous(self) -> bool:
        return self.view.strides == (self.shape[1], 1)

    def data_ptr(self) -> int:
        return self.view.address

    def stride(self) -> tuple[int, ...]:
        return self.view.strides

    def get_device(self) -> int:
        return 0

    def new_empty(self, shape: tuple[int, ...]) -> PlayedTensor:
        return PlayedTensor(self.device, self.device.empty(*(1, *shape)[-2:], self.dtype))

    def new_empty_strided(self, shape: tuple[int, int], stride: tuple[int, int]) -> PlayedTensor:
        assert stride[0] == 1
        return PlayedTensor(self.device, turned(self.device.empty(shape[1], shape[0], self.dtype, pitch=stride[1])))


@pytest.mark.parametrize("layout", ["token", "feature"])
@pytest.mark.parametrize("is_feature", [False, True])
@pytest.mark.parametrize("n", [77, 16])
def test_the_short_road_between_layouts(n: int, is_feature: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the long road launches and remembers, launched again by what it remembers; n cuts a chunk of the result."""
    device = install(monkeypatch, EmulatedDevice(11, capability=HOPPER))
    monkeypatch.setattr(memo, "torch_stream", lambda ordinal: 0)
    m, k = 67, 72
    packed = random_packed(m, k, 32, dtype="float16", seed=11, integers=True)
    values, bias = (integers(np.random.default_rng(11), shape, "float16") for shape in ((n, k), (m,)))
    view = turned(device.array(values.T, pitch=80)) if is_feature else device.array(values)
    at, bias_at = device.array(bias), (0, 0)
    out = turned(device.empty(m, n, "float16", pitch=80)) if layout == "feature" else device.empty(n, m, "float16")
    call, bias_at = device_call.Call(packed, view, view), (at.address, HAS_BIAS)
    stride = out.strides if layout == "feature" else None
    made = spmm_device._enqueue_linear(call, rows_of(view), rows_of(out), bias_at, None, "relu", None, (n, m), stride)
    launched, want = list(device.launched), np.maximum(product(packed, values.T) + bias[:, None], 0)
    x, played_bias = PlayedTensor(device, view), PlayedTensor(device, at)
    packed.launch_cache[memo.memo_key(memo.KINDS[layout], x, played_bias, "relu")] = made
    y = quick_product(packed, memo.KINDS[layout], x, played_bias, "relu")
    assert device.launched == 2 * launched
    assert n < 64 or len(launched) == 1 + (not is_feature) + (layout == "token")
    assert y.stride() == out.strides and device.machine.memory.unwritten_reads == 0
    given, shifted = (PlayedTensor(device, device.empty(n, m, "float16", shift=shift)) for shift in (0, 1))
    found = [quick_product(packed, memo.KINDS[layout], x, played_bias, "relu", result) for result in (given, shifted)]
    assert found == ([None, None] if layout == "feature" else [given, None])
    for result in (out, y.view, *(one.view for one in found if one is not None)):
        assert (device.read(result).T.astype(np.float64) == want).all()


@pytest.mark.parametrize("m", [72, 67])
def test_the_short_road_takes_the_same_parts(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = in_parts(monkeypatch, 9)
    monkeypatch.setattr(memo, "torch_stream", lambda ordinal: 0)
    packed = random_packed(m, 72, 32, seed=9, integers=True)
    values = integers(np.random.default_rng(9), (600, 72), "float16")
    x = PlayedTensor(device, device.array(values))
    call = device_call.Call(packed, x.view, x.view)
    assert quick_product(packed, "linear", x, None, None) is None
    made = spmm_device._product_memo(call, 600, 0, 0, (0, 0), None, (600, m), None)
    assert [(part.start, part.n) for part in made.parts] == [(0, 256), (256, 256), (512, 88)]
    packed.launch_cache[memo.memo_key("linear", x, None, None)] = made
    y = device.read(quick_product(packed, "linear", x, None, None).view)
    assert (y.T.astype(np.float64) == product(packed, values.T)).all()
    assert len(device.launched) == 9 and device.machine.memory.unwritten_reads == 0


def test_few_columns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(0))
    packed = random_packed(8, 0, 16, [0])
    y = device.read(device_linear(device.array(np.zeros((8, 0), np.float16)), packed))
    assert y.shape == (8, 8) and (y == 0).all()


def test_a_device_without_room_for_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(4, sm_count=16))
    monkeypatch.setattr(EmulatedKernel, "max_clusters", lambda self, cluster: 0)
    packed = random_packed(133, 70, 64, seed=6, integers=True)
    x = integers(np.random.default_rng(6), (70, 8), "float16")
    for token_major in (False, True):
        device.launched.clear()
        given = device.array(np.ascontiguousarray(x.T) if token_major else x)
        y = device.read(device_linear(given, packed)).T if token_major else device.read(device_matmul(packed, given))
        assert (y.astype(np.float64) == product(packed, x)).all()
        assert len(device.launched) == 1 and "_r1_" in device.launched[0]
        assert ("_tokens_" in device.launched[0]) == token_major


@pytest.mark.parametrize(
    ("m", "n", "k"), [(133, 20, 70), (136, 32, 72), (1, 17, 9), (70, 11, 64), (70, 40, 20), (9, 64, 130)]
)
def test_token_major_operands_are_turned(m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """x before and the result behind the product, whole chunks and parts of them, aligned and not."""
    monkeypatch.setattr(skinny_select, "takes_tokens", lambda *_: False)
    monkeypatch.setattr(device_call, "stores_directly", lambda *_, **__: False)
    packed = random_packed(m, k, 64, seed=5, integers=True)
    x = integers(np.random.default_rng(5), (n, k), "float16")
    for pitch, shift in ((k, 0), (k + 1, 3), (-(-k // 8) * 8 + 8, 0)):
        device = install(monkeypatch, EmulatedDevice(3, sm_count=3))
        packed.launch_cache.clear()
        out = device.empty(n, m, "float16", pitch=m + pitch - k, shift=shift)
        y = device.read(device_linear(device.array(x, pitch=pitch, shift=shift), packed, out=out))
        assert (y.T.astype(np.float64) == product(packed, x.T)).all()
        names = ["shflnb_skinny_turn_in", "shflnb_skinny_turn_out"]
        assert [device.launched[0], *device.launched[2:]] == names[: 1 + (m > 1)]
        assert device.machine.memory.unwritten_reads == 0


def test_few_columns_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    device = install(monkeypatch, EmulatedDevice(2, sm_count=8))
    rng = np.random.default_rng(2)
    packed = random_packed(150, 600, 64, dtype="bfloat16", seed=2)
    x, residual, bias = (floats(rng, shape, "bfloat16") for shape in ((600, 3), (150, 3), (150,)))
    y = device_matmul(packed, device.array(x), bias=device.array(bias), activation="silu",
                      residual=device.array(residual))  # fmt: skip
    verdict = judge(device.read(y), packed, x, bias, "silu", residual)
    assert verdict.holds, verdict


def test_device_memory_disturbs_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is had and given back in the relaxed mode, whatever happens, and the thread is left in the mode it was in."""
    device, seen = EmulatedDevice(0), []
    for call in ("cuMemAlloc", "cuMemcpyHtoD", "cuStreamSynchronize", "cuMemFree"):
        done = getattr(device.driver, call)
        watched = lambda *args, call=call, done=done: (seen.append((call, device.capture_mode)), done(*args))[1]  # noqa: E731
        setattr(device.driver, call, watched)
    memory = DeviceMemory(device, [np.arange(5), np.zeros(0)])  # type: ignore[arg-type]
    assert device.capture_mode == "global" and [call for call, _ in seen] == [
        "cuMemAlloc", "cuMemcpyHtoD", "cuStreamSynchronize"
    ]  # fmt: skip
    del memory
    assert seen[-1][0] == "cuMemFree" and {mode for _, mode in seen} == {"relaxed"}
    assert device.capture_mode == "global"
    full = type("Full", (), {"__int__": lambda self: 2, "name": "CUDA_ERROR_OUT_OF_MEMORY"})()
    device.driver.cuMemAlloc = lambda count: (full, None)
    with pytest.raises(DeviceError, match="could not be allocated"):
        DeviceMemory(device, [np.arange(5)])  # type: ignore[arg-type]
    assert device.capture_mode == "global"


def test_results_outside_an_array_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard works: an out that is a row too short for the product is an error, not a quiet store."""
    device = install(monkeypatch, EmulatedDevice(0))
    packed = random_packed(64, 64, 64, [64])
    whole = device.empty(64, 64, "float16")
    place = whole.address - device.machine.memory.base
    device.machine.memory.open[place + 63 * 128 : place + 64 * 128] = False
    out = EmulatedArray(whole.address, (64, 64), (64, 1), "float16", 0, None)
    x = device.array(np.ones((64, 64), np.float16))
    with pytest.raises(AssertionError, match="leaves its array in global memory"):
        device_matmul(packed, x, out=out, config=config_of("sm90", 64, 256))
