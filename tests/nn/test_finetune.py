"""Masks, schedule, and the way from a trained masked model to a packed one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from nn_models import TinyLM
from torch import nn
from torch.nn.utils import parametrize

from shflnb.errors import ArgumentError
from shflnb.formats import pack
from shflnb.nn import ShflLinear, ShflMask, finalize, prepare


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def train(model: nn.Module, preparation: object, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        model(torch.randn(16, 32)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        preparation.step()  # type: ignore[attr-defined]


def test_progress_follows_the_cubic_curve() -> None:
    preparation = prepare(mlp(), 0.5, (16, 16), steps=100, every=1000, search="identity")
    assert preparation.progress == 0.0
    preparation.done = 50
    assert preparation.progress == pytest.approx(0.875)
    preparation.done = 500
    assert preparation.progress == 1.0
    assert prepare(mlp(), 0.5, (16, 16), steps=0, search="identity").progress == 1.0


def test_sparsity_rises_and_the_pattern_is_packable() -> None:
    model = mlp()
    preparation = prepare(model, {"0": 0.5, "default": 0.75}, (16, 16), steps=20, every=5, search="identity")
    densities = []
    for _ in range(4):
        train(model, preparation, 5)
        densities.append([float(mask.mask.float().mean()) for mask in preparation.layers.values()])
    assert densities[0][1] > densities[3][1] and densities == sorted(densities, reverse=True)
    assert densities[3] == [0.5, 0.25]
    for name, mask in preparation.layers.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight == 0, ~mask.mask)
        packed = pack(weight.detach(), (16, 16), row_perm=mask.row_perm.numpy())
        assert packed.fill_in == 1.0, "the mask has the pattern exactly"
    masks = [mask.mask.clone() for mask in preparation.layers.values()]
    train(model, preparation, 7)
    assert all(torch.equal(a, mask.mask) for a, mask in zip(masks, preparation.layers.values(), strict=True))


def test_masked_weights_get_no_gradient_and_may_come_back() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    preparation = prepare(model, 0.5, (16, 16), steps=0, search="identity", hysteresis=0.0)
    mask = preparation.layers["0"]
    model(torch.randn(8, 32)).square().sum().backward()
    original = model[0].parametrizations.weight.original
    assert bool((original.grad[~mask.mask] == 0).all()) and bool((original.grad[mask.mask] != 0).any())
    out = mask.mask.logical_not()
    with torch.no_grad():
        original[out] = 100.0
    preparation.refresh()
    assert bool(mask.mask[out].all())


def test_hysteresis_holds_on_to_what_is_kept() -> None:
    kept = {}
    for hysteresis in (0.0, 10.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        preparation = prepare(model, 0.5, (16, 16), steps=0, search="identity", hysteresis=hysteresis)
        before = preparation.layers["0"].mask.clone()
        with torch.no_grad():
            model[0].parametrizations.weight.original.add_(0.1 * torch.randn(64, 64))
        preparation.refresh()
        kept[hysteresis] = float((preparation.layers["0"].mask & before).sum() / before.sum())
    assert kept[10.0] == 1.0 > kept[0.0]


def test_finalize_computes_what_the_masked_model_did(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    model = mlp()
    preparation = prepare(model, 0.75, (16, 16), steps=10, every=5)
    train(model, preparation, 12)
    x = torch.randn(5, 32)
    with torch.no_grad():
        want = model(x)
        report = preparation.finalize(example_inputs=x, measure_model=False)
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    assert isinstance(model[0], ShflLinear) and isinstance(model[1], nn.Identity) and len(report.sparse) == 2
    assert all(0.25 < row.retained < 1 for row in report.sparse)


def test_finalize_never_slower_leaves_the_zeros_in_a_dense_layer(fixed_times: Callable[..., None]) -> None:
    fixed_times({(64, 32)})
    model = mlp()
    prepare(model, 0.75, (16, 16), steps=0, search="identity")
    x = torch.randn(5, 32)
    with torch.no_grad():
        want = model(x)
        report = finalize(model, example_inputs=x, policy="never_slower", measure_model=False)
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    assert type(model[0]) is nn.Linear and float((model[0].weight == 0).float().mean()) == 0.75
    assert report["0"].decision == "dense" and report["2"].decision == "sparse"
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


def test_only_prepared_layers_are_packed() -> None:
    model = mlp()
    prepare(model, 0.5, (16, 16), steps=0, search="identity", ignore=["0"])
    report = finalize(model)
    assert type(model[0]) is nn.Linear and report["0"].reason == "not prepared for fine-tuning"
    assert isinstance(model[2], ShflLinear)


def test_an_interrupted_run_goes_on() -> None:
    runs = []
    for stop in (None, 7):
        model = mlp()
        preparation = prepare(model, 0.5, (16, 16), steps=20, every=5, search="identity")
        noise = torch.Generator().manual_seed(1)
        for done in range(20):
            if done == stop:
                state, schedule = copy.deepcopy(model.state_dict()), preparation.state_dict()
                model = mlp()
                preparation = prepare(model, 0.5, (16, 16), steps=20, every=5, search="identity")
                model.load_state_dict(state)
                preparation.load_state_dict(schedule)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01 * torch.randn(p.shape, generator=noise))
            preparation.step()
        runs.append([mask.mask for mask in preparation.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_prepared_model_compiles() -> None:
    model = mlp()
    prepare(model, 0.5, (16, 16), steps=0, search="identity")
    torch._dynamo.reset()
    x = torch.randn(4, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_heads_and_embeddings_are_left_alone() -> None:
    preparation = prepare(TinyLM(), 0.5, (16, 16), steps=10)
    assert set(preparation.layers) == {*(f"attention.{n}" for n in "qkvo"), "mlp.0", "mlp.2"}
    assert all(isinstance(mask, ShflMask) for mask in preparation.layers.values())


def test_errors() -> None:
    with pytest.raises(ArgumentError, match=r"no layer to prune .*10 rows, fewer than v = 64"):
        prepare(nn.Sequential(nn.Linear(64, 10)), steps=1)
    with pytest.raises(ArgumentError, match="steps is -1"):
        prepare(mlp(), steps=-1)
    with pytest.raises(ArgumentError, match="no layer of the model was prepared"):
        finalize(mlp())
    model = mlp()
    preparation = prepare(model, 0.5, (16, 16), steps=1)
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = float("nan")
    with pytest.raises(ArgumentError, match=r"layer 2: .*\[0, 0\]"):
        preparation.step()
