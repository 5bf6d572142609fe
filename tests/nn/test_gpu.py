"""The PyTorch side on a GPU: the same promises as on the CPU, and those that only a device can break."""

from __future__ import annotations

import copy
import gc
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import Verdicts, expected
from nn_models import Attention, GatedMLP, TinyLM, dense_by_definition, make_layer, random_packed, tensors
from torch import nn

from shflnb.errors import CaptureError, DeviceError, DtypeError
from shflnb.kernels.skinny_config import MAX_N
from shflnb.nn import ShflLinear, estimate, is_feature_major, packed_linear, sparsify_, to_feature_major
from shflnb.nn.record import record_count
from shflnb.nn.sums import SumTerm

pytestmark = pytest.mark.gpu(min_capability=(8, 0))
HALVES = [torch.float16, torch.bfloat16]
ACT = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def on_device(packed: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(t.cuda() for t in tensors(packed, dtype))


def bound(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 3e-3, "atol": 3e-3}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("m", "k", "block"), [(256, 192, (64, 64)), (130, 70, (128, 32)), (33, 50, (32, 16)), (96, 97, (16, 16))]
)
@pytest.mark.parametrize("lead", [(1,), (7,), (64,), (65,), (3, 40), (2, 5, 13)])
def test_values_and_layouts(dtype: torch.dtype, m: int, k: int, block: Any, lead: tuple[int, ...]) -> None:
    packed = random_packed(m, k, block)
    t = on_device(packed, dtype)
    w = dense_by_definition(*tensors(packed, dtype), k).double()
    x = torch.randn(*lead, k, dtype=dtype, device="cuda")
    bias = torch.randn(m, dtype=dtype, device="cuda")
    for activation in (None, "gelu"):
        want = ACT[activation](x.double().cpu() @ w.T + bias.double().cpu())
        results = []
        for inputs in (x, to_feature_major(x)):
            for layout in ("token", "feature"):
                y = packed_linear(inputs, *t, bias, k=k, tile_k=block[1], activation=activation, layout=layout)
                torch.testing.assert_close(y.double().cpu(), want, **bound(dtype))
                assert y.is_contiguous() or (layout == "feature" and is_feature_major(y))
                results.append(y)
        few = x[..., 0].numel() <= MAX_N  # then each layout of x has a kernel of its own
        alike = [results[:2], results[2:]] if few else [results]
        assert all(torch.equal(pair[0], y) for pair in alike for y in pair[1:]), "one kernel, one result"


def test_small_integers_are_exact() -> None:
    packed = random_packed(256, 192, (64, 64), integer=True)
    x = torch.randint(-3, 4, (100, 192))
    want = x.double() @ dense_by_definition(*tensors(packed), 192).T
    for dtype in HALVES:
        y = packed_linear(x.to("cuda", dtype), *on_device(packed, dtype), k=192)
        assert torch.equal(y.cpu(), want.to(dtype))


def test_gradients() -> None:
    packed = random_packed(128, 96, (64, 32))
    values, *rest = on_device(packed, torch.float16)
    values.requires_grad_()
    x = torch.randn(50, 96, dtype=torch.float16, device="cuda", requires_grad=True)
    packed_linear(x, values, *rest, k=96, tile_k=32, activation="silu").float().square().mean().backward()
    w = dense_by_definition(*tensors(packed, torch.float64), 96).requires_grad_()
    x2 = x.detach().double().cpu().requires_grad_()
    F.silu(x2 @ w.T).square().mean().backward()
    torch.testing.assert_close(x.grad.double().cpu(), x2.grad, rtol=2e-2, atol=1e-4)
    layer = ShflLinear.from_packed(packed.astype("float64"))
    layer.values = nn.Parameter(values.grad.double().cpu())
    torch.testing.assert_close(layer.dense_weight(), torch.where(w != 0, w.grad, 0.0), rtol=2e-2, atol=1e-4)


def test_the_backward_pass_is_deterministic() -> None:
    layer = make_layer(256, 192, (64, 64)).half().cuda()
    x = torch.randn(300, 192, dtype=torch.float16, device="cuda")
    grads = []
    for _ in range(3):
        x.requires_grad_()
        gx, gv = torch.autograd.grad(layer(x).float().square().sum(), (x, layer.values))
        grads.append((gx, gv))
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


def test_updates_and_moves() -> None:
    before = record_count()
    layer = make_layer(128, 96, (64, 32)).half().cuda()
    x = torch.randn(70, 96, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            layer.values.mul_(1.5)
            want = F.linear(x.double(), layer.dense_weight().double(), layer.bias.double())
            torch.testing.assert_close(layer(x).double(), want, **bound(torch.float16))
        host = copy.deepcopy(layer).cpu()
        torch.testing.assert_close(host(x.cpu()), layer(x).cpu(), **bound(torch.float16))
        with pytest.raises(DeviceError, match="x is on cuda:0, values on cpu"):
            host(x)
    del layer, host
    gc.collect()  # the traceback of the refused call holds the layer
    assert record_count() == before


def test_autocast_on_float32_weights() -> None:
    layer = make_layer(128, 96, (64, 32)).cuda()
    x = torch.randn(70, 96, device="cuda", requires_grad=True)
    with pytest.raises(DtypeError, match="float16 and bfloat16"):
        layer(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16 and layer.values.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    # Weights and x are rounded to bfloat16, the bias is not; beyond that only sums and the result round.
    weight, features = layer.dense_weight().detach().bfloat16(), x.detach().bfloat16().t()
    verdicts = Verdicts()
    verdicts.add("autocast", y.detach().t(), expected(weight, features, layer.bias.detach()))
    verdicts.check()


def test_cuda_graph() -> None:
    model = (
        nn.Sequential(make_layer(192, 96, (64, 32), activation="gelu"), make_layer(96, 192, (32, 32), seed=1))
        .half()
        .cuda()
    )
    static = torch.randn(48, 96, dtype=torch.float16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(static)  # warms up
        with torch.cuda.graph(graph):
            out = model(static)
        for _ in range(3):
            static.copy_(torch.randn_like(static))
            graph.replay()
            assert torch.equal(out, model(static))


def test_a_cold_layer_under_capture_names_the_warm_up() -> None:
    layer = make_layer(64, 64, (32, 32)).half().cuda()
    x = torch.randn(48, 64, dtype=torch.float16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), pytest.raises(CaptureError, match="call the model once"), torch.cuda.graph(graph):
        layer(x)
    torch.cuda.synchronize()
    with torch.no_grad():
        layer(x)


def test_the_callers_stream_is_used() -> None:
    layer = make_layer(512, 512, (64, 64)).half().cuda()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        x = torch.randn(2048, 512, dtype=torch.float16, device="cuda")
        want = layer(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            y = x * 0
            y += x
            got = layer(y)
        stream.synchronize()
        assert torch.equal(got, want)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (not installed)")
def test_compile_shares_the_transposes() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), Attention(64)).half().cuda()
    x = torch.randn(4, 32, 64, dtype=torch.float16, device="cuda")
    sparsify_(model, 0.5, (32, 32), example_inputs=x, search="identity", policy="always", measure_model=False)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), **bound(torch.float16))
        y = torch.randn(9, 32, 64, dtype=torch.float16, device="cuda")
        torch.testing.assert_close(compiled(y), model(y), **bound(torch.float16))


@pytest.mark.parametrize("policy", ["always", "never_slower"])
def test_sparsify_measures_and_computes_the_same(policy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(GatedMLP(512, 1024), nn.LayerNorm(512), Attention(512, 8)).to("cuda", torch.bfloat16).eval()
    dense, x = copy.deepcopy(model), torch.randn(4, 256, 512, dtype=torch.bfloat16, device="cuda")
    report = sparsify_(model, 0.75, (64, 64), example_inputs=x, search="identity", policy=policy)
    assert all(row.dense_us > 1 and row.sparse_us > 1 for row in report.rows if row.n)
    assert report.device == torch.cuda.get_device_name() and report.dtype == "bfloat16"
    if policy == "always":
        assert len(report.sparse) == 7 and model[2].q.shared is model[2].v.shared
    for row in report.sparse:
        dense.get_submodule(row.name).weight.data = model.get_submodule(row.name).dense_weight().detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), dense(x), rtol=5e-2, atol=5e-2)


def test_float32_on_a_gpu_is_left_with_the_reason() -> None:
    model = GatedMLP(128, 256).cuda()
    report = sparsify_(model, 0.5, (64, 32), example_inputs=torch.randn(8, 128, device="cuda"))
    assert all("kernels take float16 and bfloat16" in row.reason for row in report.rows) and not report.sparse


def test_estimate_on_the_device() -> None:
    tokens = {"tokens": torch.randint(0, 50, (4, 64), device="cuda")}
    forecast = estimate(TinyLM(50, 128).half().cuda(), tokens, block=(32, 32))
    assert forecast.basis == "random patterns" and forecast["mlp.0"].dense_us > 1 and forecast.model_dense_us > 1
    with torch.device("meta"):
        meta = GatedMLP(256, 512)
    there = estimate(meta, torch.empty(64, 256, device="meta"), device="cuda", dtype=torch.bfloat16, timing="graph")
    assert all(row.sparse_us > 1 for row in there.rows)


def test_nan_in_an_unused_column_does_not_spread() -> None:
    packed = random_packed(128, 96, (64, 32), density=0.2)
    used = set(packed.indices.tolist())
    unused = [c for c in range(96) if c not in used]
    assert unused
    t = on_device(packed, torch.float16)
    x = torch.randn(80, 96, dtype=torch.float16, device="cuda")
    clean = packed_linear(x, *t, k=96, tile_k=32)
    x[:, unused] = float("nan")
    assert torch.equal(packed_linear(x, *t, k=96, tile_k=32), clean)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_residual_sum_turns_the_result(dtype: torch.dtype) -> None:
    """To the bit what the layer and torch's sum give; in a graph too."""
    torch.manual_seed(0)
    model = nn.Sequential(GatedMLP(256, 512), nn.LayerNorm(256), GatedMLP(256, 512)).cuda().to(dtype).eval()
    model.requires_grad_(False)
    x = torch.randn(33, 512, 256, device="cuda", dtype=dtype)
    report = sparsify_(model, 0.5, (32, 64), example_inputs=x, policy="always", search="identity", measure_model=False)
    assert [row.layout for row in report.rows if row.name.endswith("down")] == ["feature -> token (sum)"] * 2
    down = model[0].down
    assert type(down(torch.randn(16896, 512, device="cuda", dtype=dtype))) is SumTerm
    got, twin = model(x), copy.deepcopy(model)
    for block in (twin[0], twin[2]):
        block.down.joins_sum = False
    assert type(got) is torch.Tensor and torch.equal(got, twin(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, twin(x)) and not torch.equal(out, got)
    few = torch.randn(3, 256, device="cuda", dtype=dtype)
    assert torch.equal(model(few), twin(few))
