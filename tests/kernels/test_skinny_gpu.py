"""The few-column product on the GPU: exactness, promise 2, strides, epilogues, determinism, graphs, the short road."""

# ruff: noqa: E402  (what is imported needs torch and numba-cuda, and the tests skip without them)

from __future__ import annotations

import gc
import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba.cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from gpu_cases import ACTIVATION_OF, Verdicts, dense_of, expected, random_packed

import shflnb
from shflnb.errors import CaptureError
from shflnb.kernels.memo import FewColumnsMemo

pytestmark = pytest.mark.gpu(min_capability=(9, 0))


def integers(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-2, 3, shape).astype(np.float32)).cuda().to(getattr(torch, dtype))


@pytest.mark.parametrize(("v", "dtype"), [(16, "float16"), (32, "bfloat16"), (64, "float16"), (128, "bfloat16")])
def test_small_integers_are_exact(v: int, dtype: str) -> None:
    """Both calls, many n, x and out in every layout and alignment; empty groups and short last ones."""
    seen = Verdicts()
    for number, (m, k) in enumerate(((3 * v + 5, 203), (7, 3), (40 * v, 96))):
        lengths = [int(c) for c in np.random.default_rng(number).integers(0, min(k, 32) + 1, -(-m // v))]
        packed = random_packed(m, k, v, lengths, dtype, number, integers=True)
        dense = dense_of(packed).double()
        for n in (1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64):
            wide = integers((max(n, 8) + 3, k + 9), dtype, n)
            for name, x in (("token", wide[:n, :k].contiguous()), ("strided", wide[:n, 1 : k + 1]),
                            ("feature", wide[:n, :k].T.contiguous().T)):  # fmt: skip
                want = x.double() @ dense.T
                for _ in range(2):  # the second call takes the short road
                    seen.same(f"{m}x{k}x{n} linear {name}", (shflnb.linear(x, packed).double() == want).all())
                    seen.same(f"{m}x{k}x{n} matmul {name}", (shflnb.matmul(packed, x.T).double() == want.T).all())
                out = torch.full((n, m + 3), float("nan"), device="cuda", dtype=x.dtype)
                shflnb.linear(x, packed, out=out[:, :m])
                seen.same(f"{m}x{k}x{n} out {name}", (out[:, :m].double() == want).all() & out[:, m:].isnan().all())
    seen.check()


@pytest.mark.parametrize("k", [65_535, 65_536, 131_100])
def test_column_ids_of_either_width(k: int) -> None:
    """With more columns than 2 bytes can name, in every layout."""
    packed = random_packed(200, k, 64, [3000, 0, 64, 1], seed=k, integers=True)
    dense = dense_of(packed).double()
    seen = Verdicts()
    for n in (1, 8, 16, 33, 64):
        x = integers((n, k), "float16", n)
        want = x.double() @ dense.T
        seen.same(f"{k} linear n{n}", (shflnb.linear(x, packed).double() == want).all())
        seen.same(f"{k} matmul n{n}", (shflnb.matmul(packed, x.T.contiguous()).double() == want.T).all())
    seen.check()


@pytest.mark.parametrize("epilogue", list(ACTIVATION_OF)[1:])
def test_epilogues_keep_the_error_rule(epilogue: str) -> None:
    seen = Verdicts()
    activation = ACTIVATION_OF[epilogue]
    for (v, dtype), n in itertools.product(((32, "float16"), (64, "bfloat16")), (3, 16, 40)):
        packed = random_packed(5 * v - 3, 300, v, dtype=dtype, seed=n)
        m, k = packed.shape
        x = torch.randn(k, n, device="cuda").to(getattr(torch, dtype)) * 0.1
        residual = torch.randn(m, n, device="cuda").to(x.dtype)
        for bias, added in (
            (torch.randn(m, device="cuda"), None),
            (residual[:, 0].contiguous(), residual),
            (None, residual),
        ):
            want = expected(dense_of(packed), x, bias, activation, added)
            y = shflnb.matmul(packed, x, bias=bias, activation=activation, residual=added)
            seen.add(f"{epilogue} v{v} {dtype} n{n} matmul", y, want)
            turned = None if added is None else added.T.contiguous()
            y = shflnb.linear(x.T.contiguous(), packed, bias, activation=activation, residual=turned)
            seen.add(f"{epilogue} v{v} {dtype} n{n} linear", y.T, want)
    seen.check()


def test_layers_keep_the_error_rule_and_repeat_exactly() -> None:
    """Sizes that use every team, several ranks and, with 64 columns, several phases."""
    seen = Verdicts()
    for (m, k, v), n in itertools.product(((4096, 4096, 64), (8192, 1024, 32), (1024, 14336, 128)), (1, 8, 16, 64)):
        packed = random_packed(m, k, v, [k // 4] * (m // v))
        x = torch.randn(n, k, device="cuda").half()
        y = shflnb.linear(x, packed)
        seen.add(f"{m}x{k}x{n} v{v}", y.T, expected(dense_of(packed), x.T))
        for _ in range(3):
            seen.same(f"{m}x{k}x{n} again", (shflnb.linear(x, packed) == y).all())
    seen.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_column_nobody_keeps_does_no_harm(bad: float) -> None:
    packed = random_packed(200, 150, 64, [60, 0, 3, 90], seed=4)
    x = torch.randn(9, 150, device="cuda").half()
    clean = shflnb.linear(x, packed)
    x[:, np.setdiff1d(np.arange(150), packed.indices)] = bad
    assert torch.equal(shflnb.linear(x, packed), clean)


def test_capture_needs_a_warm_call_and_then_replays() -> None:
    packed = random_packed(640, 512, 64, seed=2)
    x = torch.randn(5, 512, device="cuda").half()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(CaptureError, match=r"captured into a CUDA graph.*warm it up"):
        shflnb.linear(x, packed)
    torch.cuda.synchronize()
    y = shflnb.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = shflnb.linear(x, packed)
        second = shflnb.linear(x, packed)  # chained to the first
    for result in (first, second):
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(first, y) and torch.equal(second, y)


@pytest.mark.parametrize("n", [8, 24, 64])
def test_products_that_follow_one_another_are_each_right(n: int) -> None:
    """Of a chain in a graph each kernel begins before the one ahead of it ends, its blocks wherever there is room."""
    matrices = [random_packed(4096, 2048, 64, [448] * 64, seed=seed, integers=True) for seed in range(4)]
    x = integers((n, 2048), "float16", n)
    wanted = [(x.double() @ dense_of(packed).double().T).half() for packed in matrices]
    for packed in matrices:
        shflnb.linear(x, packed)
    outs = [torch.empty_like(wanted[0]) for _ in range(24)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number, out in enumerate(outs):
            shflnb.linear(x, matrices[number % 4], out=out)
    for _ in range(8):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, wanted[number % 4]) for number, out in enumerate(outs))


@pytest.mark.parametrize("n", [1, 8, 16, 40])
def test_each_product_reads_what_the_one_before_it_wrote(n: int) -> None:
    """It begins before that one ends, and reads x through L1, where what the last but one has read may still stand."""
    shapes = ((4096, 1024), (1024, 4096))
    forth, back = (random_packed(m, k, 64, [256] * (m // 64), seed=m) for m, k in shapes)
    for packed in (forth, back):
        packed.values[:] = packed.values / np.float16(16)  # keeps the size of the numbers
    start = torch.randn(n, 1024, device="cuda").half()

    def rounds(is_slow: bool) -> Any:
        x = start
        for packed in (forth, back) * 8:
            x = shflnb.linear(x, packed)
            if is_slow:
                torch.cuda.synchronize()
        return x

    slow, graph = rounds(True), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast = rounds(False)
    assert bool(slow.isfinite().all()) and float(slow.abs().max()) > 0.01
    for _ in range(8):
        fast.fill_(float("nan"))
        graph.replay()
        assert torch.equal(fast, slow)


def test_a_graph_outlives_the_product_it_fetches_for() -> None:
    """Each product asks L2 for the next one's first weights; in a graph these stay, whatever becomes of the matrix."""
    one, two = (random_packed(640, 512, 64, seed=seed) for seed in (3, 4))
    x = torch.randn(5, 512, device="cuda").half()
    wanted = [shflnb.linear(x, packed) for packed in (one, two, one)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = shflnb.linear(x, one)
    plan = next(kept for key, kept in one.launch_cache.items() if key[0] == "skinny plan")
    assert plan.successor.plan() is not None and plan.successor._held
    del two
    gc.collect()
    filler = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    found.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted[0]) and len(filler) == 8
    assert torch.equal(shflnb.linear(x, one), wanted[2])


def test_a_warm_call_takes_the_short_road() -> None:
    packed = random_packed(640, 512, 64, seed=2)
    x = torch.randn(5, 512, device="cuda").half()
    shflnb.linear(x, packed)
    shflnb.matmul(packed, x.T.contiguous())
    assert sum(isinstance(kept, FewColumnsMemo) for kept in packed.launch_cache.values()) == 2
    misaligned = torch.zeros(5 * 512 + 1, device="cuda", dtype=x.dtype)[1:].view(5, 512).copy_(x)
    assert torch.equal(shflnb.linear(misaligned, packed), shflnb.linear(x, packed))
