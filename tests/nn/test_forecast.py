"""`estimate`: the table before pruning, measured or predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_models import GatedMLP, TinyLM
from torch import nn

import shflnb
from shflnb.errors import ArgumentError, DeviceError
from shflnb.nn import ShflLinear, estimate, sparsify_
from shflnb.nn.decide import Times
from shflnb.nn.facts import Facts, random_layer, stand_in
from shflnb.nn.predict import gpu_named, predicted_us

TOKENS = {"tokens": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("m", "k", "block", "sparsity"),
    [
        (128, 256, (32, 32), 0.75),
        (100, 70, (32, 16), 0.5),
        (64, 640, (64, 64), 0.8),
        (64, 64, (64, 64), 0.9),
        (33, 48, (16, 16), 1.0),
        (32, 33, (16, 16), 0.0),
    ],
)
def test_random_layers_have_the_size_asked_for(m: int, k: int, block: tuple[int, int], sparsity: float) -> None:
    layer = random_layer((m, k), block, sparsity, bias=True, dtype=torch.float32, device=torch.device("cpu"))
    packed = layer.to_packed()  # validates: sorted indices, a permutation, zeros in missing rows
    groups = -(-m // block[0])
    asked = (1 - sparsity) * k * groups
    assert asked - block[1] <= len(packed.indices) <= asked + 1e-6
    assert packed.counts.max() - packed.counts.min() <= block[1]
    if 0 < sparsity < 1:
        assert 0.5 < float(layer.values.std()) * k**0.5 < 1.5


def test_every_tensor_of_a_stand_in_is_where_the_weight_is() -> None:
    with torch.device("meta"):
        facts = Facts(torch.empty(100, 70), torch.empty(100), torch.bfloat16)
    layer = stand_in(facts, (32, 16), 0.5, {})
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"values", "bias"} and {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in parameters.values())


def test_the_estimate_is_the_table_of_sparsify(fixed_times: Callable[..., None]) -> None:
    fixed_times({(64, 32)})
    model = TinyLM()
    before = {name: p.clone() for name, p in model.named_parameters()}
    forecast = estimate(model, TOKENS, 0.5, (16, 16))
    assert not any(isinstance(m, ShflLinear) for m in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    report = sparsify_(model, 0.5, (16, 16), example_inputs=TOKENS, search="identity", measure_model=False)
    assert forecast.kind == "estimate" and forecast.basis == "random patterns"
    for a, b in zip(forecast.rows, report.rows, strict=True):
        assert (a.name, a.decision, a.n, a.calls, a.dense_us, a.sparse_us, a.fused) == (
            b.name, b.decision, b.n, b.calls, b.dense_us, b.sparse_us, b.fused)  # fmt: skip
        assert abs(a.sparsity - b.sparsity) < 0.03 and a.layout == b.layout.partition(",")[0]


def test_measured_on_the_cpu() -> None:
    forecast = shflnb.estimate(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)), torch.randn(64, 128),
                               block=(32, 32))  # fmt: skip
    assert forecast.device.startswith("CPU") and forecast.model_dense_us > 0
    assert all(row.dense_us > 0 and row.sparse_us > 0 for row in forecast.rows)


def test_a_meta_model_predicted_for_a_gpu_that_is_not_there() -> None:
    with torch.device("meta"):
        model = GatedMLP(4096, 14336)
        x = torch.empty(2, 2048, 4096)
    forecast = estimate(model, x, 0.75, (64, 64), device="H200")
    assert forecast.basis == "predicted for NVIDIA H200, not measured" and "not measured" in str(forecast)
    assert {row.decision for row in forecast.rows} == {"sparse"} and forecast["gate"].fused == "silu"
    assert all(1.5 < row.speedup < 4 for row in forecast.rows) and forecast.model_dense_us is None
    small = estimate(model, torch.empty(1, 1, 4096, device="meta"), 0.75, (64, 64), device="h200", timing="graph")
    assert all(2 < row.speedup <= 4 for row in small.rows), "bound by bytes of weights"


def test_a_meta_model_measured_here(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    with torch.device("meta"):
        model, x = GatedMLP(), torch.empty(5, 32)
    forecast = estimate(model, x, 0.5, (16, 16))
    assert len(forecast.sparse) == 3 and forecast.dtype == "float32"


def test_predictions_are_sane() -> None:
    gpu = gpu_named("h200")
    dense, sparse = predicted_us(gpu, 4096, 4096, 4096, 0.25, 64)
    assert dense == pytest.approx(196, rel=0.05) and 60 < sparse < 120
    tight = predicted_us(gpu, 4096, 4096, 4096, 0.25, 128)[1]
    assert tight < sparse, "taller groups gather less"
    assert predicted_us(gpu, 4096, 4096, 4096, 0.25, 64, transposes=2 * 4096 * 4096)[1] > sparse + 25
    assert predicted_us(gpu, 64, 64, 1, 0.25, 64) == (gpu.dense_call_us, gpu.sparse_call_us)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device": "A9000"}, DeviceError, "neither here nor known; a prediction exists for NVIDIA H200"),
        ({"sparsity": -0.1}, ArgumentError, "sparsity is -0.1"),
        ({"ignore": ["nothing"]}, ArgumentError, "matches no module"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        estimate(GatedMLP(), torch.randn(2, 32), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_torch_does_not_see() -> None:
    with pytest.raises(ArgumentError, match="torch sees no GPU; name one to predict for"):
        estimate(GatedMLP(), torch.randn(2, 32), device="cuda")


def test_a_stand_in_is_as_unequal_as_the_rows() -> None:
    """Rows of one size: equal groups. Rows of very different sizes: the groups that a search finds, roughly."""
    torch.manual_seed(0)
    weight = torch.randn(512, 256)
    known: dict[Any, ShflLinear] = {}
    alike = stand_in(Facts(weight, None, torch.float32), (32, 16), 0.75, known, "layer")
    counts = alike.indptr.diff()
    assert counts.max() - counts.min() <= 16
    steep = weight * torch.randn(512, 1).exp()
    found = stand_in(Facts(steep, None, torch.float32), (32, 16), 0.75, known, "layer")
    assert len(known) == 2 and stand_in(Facts(steep, None, torch.float32), (32, 16), 0.75, known, "layer") is found
    linear = nn.Linear(256, 512, bias=False)
    with torch.no_grad():
        linear.weight.copy_(steep)
    searched = ShflLinear.from_dense(linear, 0.75, (32, 16), quality="fast")
    guessed, real = (layer.indptr.diff().sort().values.float() for layer in (found, searched))
    assert abs(guessed.sum() / real.sum() - 1) < 0.1
    assert (guessed - real).abs().mean() < 0.25 * real.mean(), (guessed, real)
    assert guessed.max() > 2 * guessed.mean()
    equal = stand_in(Facts(steep, None, torch.float32), (32, 16), 0.75, known, "group")
    assert equal.indptr.diff().max() - equal.indptr.diff().min() <= 16


def test_a_saving_below_the_launch_margin_is_none() -> None:
    assert Times(10.0, 9.5).is_worth_it and not Times(10.0, 9.5, 1.0).is_worth_it
    assert Times(10.0, 8.9, 1.0).is_worth_it and not Times(100.0, 98.5, 1.0).is_worth_it
