"""The token-major product in one launch, on a GPU: exactness, promise 2, guards, repeats, graphs, two streams."""

# ruff: noqa: E402  (what is imported needs torch and numba-cuda, and the tests skip without them)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba.cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from gpu_cases import (
    ACTIVATION_OF,
    MARK,
    Verdicts,
    capability,
    dense_of,
    equal_packed,
    expected,
    prebuild,
    random_packed,
)

import shflnb
from shflnb.errors import ArgumentError, CaptureError
from shflnb.kernels import select
from shflnb.kernels.config import Config
from shflnb.kernels.memo import TurnedMemo
from shflnb.kernels.select import linear_candidates
from shflnb.kernels.spmm_device import device_linear, device_matmul

pytestmark = pytest.mark.gpu(min_capability=(9, 0))

HEIGHTS = (16, 32, 64, 128)


def config_of(v: int, dtype: str = "float16") -> Config:
    found = linear_candidates(v, dtype, capability())
    if not found:
        pytest.skip("the kernel is for capability 9.0")
    return found[0]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    wanted = [
        c for v in HEIGHTS for dtype in ("float16", "bfloat16") for c in linear_candidates(v, dtype, capability())
    ]
    prebuild(c.with_epilogue(e) for c in wanted for e in ("plain", *(ACTIVATION_OF if c.v == 64 else ())))


def integers(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-2, 3, shape).astype(np.float32)).cuda().to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("v", HEIGHTS)
def test_small_integers_are_exact_and_nothing_else_is_written(v: int, dtype: str) -> None:
    """Odd groups and numbers of tokens, one to several sweeps; out inside a marked matrix."""
    seen = Verdicts()
    config = config_of(v, dtype)
    for number, (m, k) in enumerate(((8, 8), (3 * v + 8, 200), (5 * v, 1032), (264, 72))):
        lengths = [int(c) for c in np.random.default_rng(number).integers(0, min(k, 128) + 1, -(-m // v))]
        packed = random_packed(m, k, v, lengths, dtype, number, integers=True)
        dense = dense_of(packed).double()
        for n in (1, 7, 8, 63, 64, 129, 512, 513, 777, 1600):
            wide = integers((n, k + 16), dtype, n)
            memory = torch.full((n + 2, m + 24), MARK, dtype=torch.int16, device="cuda")
            out = memory[1 : n + 1, 8 : m + 8].view(wide.dtype)
            for x in (wide[:, :k].contiguous(), wide[:, 8 : k + 8]):
                device_linear(x, packed, out=out, config=config)
                seen.same(f"{m}x{k}x{n} v{v}", (out.double() == x.double() @ dense.T).all())
            out.view(torch.int16).fill_(MARK)
            seen.same(f"{m}x{k}x{n} v{v} around", (memory == MARK).all())
    seen.check()


@pytest.mark.parametrize("v", HEIGHTS)
def test_layers_keep_the_error_rule_and_repeat_exactly(v: int) -> None:
    seen = Verdicts()
    noise = torch.randn(2048, 2048, device="cuda")
    for m, k, n in ((4096, 4096, 4096), (1024, 4096, 960), (3072, 1024, 1056), (2048, 2048, 4096)):
        packed = random_packed(m, k, v, None if v == 64 else [k // 4] * (m // v))
        x = torch.randn(n, k, device="cuda").half()
        y = device_linear(x, packed, config=config_of(v))
        seen.add(f"{m}x{k}x{n} v{v}", y.T, expected(dense_of(packed), x.T))
        for again in range(20):
            if again % 4 == 0:
                noise @ noise
            seen.same(f"{m}x{k}x{n} again", (device_linear(x, packed, config=config_of(v)) == y).all())
    seen.check()


@pytest.mark.parametrize("epilogue", list(ACTIVATION_OF)[1:])
def test_epilogues(epilogue: str) -> None:
    seen = Verdicts()
    for dtype in ("float16", "bfloat16"):
        packed = random_packed(5 * 64 - 8, 304, 64, dtype=dtype, seed=3)
        x = torch.randn(700, 304, device="cuda").to(getattr(torch, dtype)) * 0.1
        for bias in (torch.randn(312, device="cuda"), torch.randn(312, device="cuda").to(x.dtype)):
            y = device_linear(x, packed, bias, activation=ACTIVATION_OF[epilogue], config=config_of(64, dtype))
            want = expected(dense_of(packed), x.T, bias, ACTIVATION_OF[epilogue])
            seen.add(f"{epilogue} {dtype} {bias.dtype}", y.T, want)
    seen.check()


def test_two_streams_at_once() -> None:
    """Two launches that both want every SM: each must find all of its blocks on the device, or wait."""
    packed = equal_packed(2048, 2048, 64, 512)
    config = config_of(64)
    xs = [torch.randn(2048, 2048, device="cuda").half() for _ in range(2)]
    wanted = [device_linear(x, packed, config=config) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    results: list[list[Any]] = [[], []]
    for _ in range(30):
        for x, stream, found in zip(xs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(device_linear(x, packed, config=config))
    torch.cuda.synchronize()
    for want, found in zip(wanted, results, strict=True):
        assert all(torch.equal(want, y) for y in found)


def test_graph_replay_and_a_cold_call_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "TURNED_FROM", 1)
    packed = random_packed(640, 512, 64, seed=2)
    x = torch.randn(600, 512, device="cuda").half()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(CaptureError, match="warm it up"):
        shflnb.linear(x, packed)
    torch.cuda.synchronize()
    y = shflnb.linear(x, packed)
    assert torch.equal(shflnb.linear(x, packed), y)  # by memo
    assert sum(isinstance(kept, TurnedMemo) for kept in packed.launch_cache.values()) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = shflnb.linear(x, packed)
        second = shflnb.linear(first[:, :512].contiguous(), packed)
    want = shflnb.linear(y[:, :512].contiguous(), packed)
    for _ in range(3):
        first.fill_(float("nan"))
        second.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, y) and torch.equal(second, want)


def test_what_the_kernel_cannot_take() -> None:
    config = config_of(64)
    packed = random_packed(640, 512, 64)
    x = torch.randn(64, 512, device="cuda").half()
    with pytest.raises(ArgumentError, match="token-major x and out, 16-byte aligned"):
        device_linear(x.T.contiguous().T, packed, config=config)
    with pytest.raises(ArgumentError, match="no residual"):
        device_linear(x, packed, residual=torch.zeros(64, 640, device="cuda").half(), config=config)
    with pytest.raises(ArgumentError, match="multiples of 8"):
        device_linear(x, random_packed(636, 512, 64), config=config)
    with pytest.raises(ArgumentError, match="a kernel for linear"):
        device_matmul(packed, x.T.contiguous(), config=config)
