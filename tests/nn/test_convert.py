"""`sparsify_`: what it replaces, what it leaves, and what it says."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nn_models import Attention, GatedMLP, TinyLM
from torch import nn
from torch.nn.utils import parametrize

import shflnb
from shflnb.errors import ArgumentError
from shflnb.nn import Report, ShflLinear, sparsify_

FAST: dict[str, Any] = {"block": (16, 16), "search": "identity", "measure_model": False}
TOKENS = {"tokens": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))}


def masked_twin(dense: nn.Module, sparse: nn.Module) -> nn.Module:
    """The dense model with the weights that the sparse one has."""
    twin = copy.deepcopy(dense)
    for name, module in sparse.named_modules():
        if isinstance(module, ShflLinear):
            twin.get_submodule(name).weight.data = module.dense_weight().detach()
    return twin


def test_the_sparse_model_computes_what_the_masked_dense_one_does(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    torch.manual_seed(0)
    model = TinyLM().eval()
    dense = copy.deepcopy(model)
    report = sparsify_(model, 0.5, example_inputs=TOKENS, **FAST)
    assert {row.name for row in report.sparse} == {*(f"attention.{n}" for n in "qkvo"), "mlp.0", "mlp.2"}
    with torch.no_grad():
        torch.testing.assert_close(model(**TOKENS), masked_twin(dense, model)(**TOKENS), rtol=1e-4, atol=1e-5)
    assert model.mlp[0].activation == "gelu" and isinstance(model.mlp[1], nn.Identity)
    assert model.mlp[0].layout == "feature" and model.mlp[2].layout == "token"
    q, k, v = model.attention.q, model.attention.k, model.attention.v
    assert q.shared is k.shared is v.shared is not None and q.shared.readers == 3
    for row in report.sparse:
        assert abs(row.sparsity - 0.5) < 0.02 and 0.5 < row.retained < 1 and row.n == 14 and row.speedup == 2.5


def test_no_layout_changes_the_result(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    torch.manual_seed(0)
    model = nn.Sequential(GatedMLP(), nn.LayerNorm(32), Attention())
    twin = copy.deepcopy(model)
    x = torch.randn(2, 5, 32)
    sparsify_(model, 0.5, example_inputs=x, fuse=False, **FAST)
    sparsify_(twin, 0.5, policy="always", **FAST)
    assert model[0].gate.layout == "feature" and twin[0].gate.layout == "same"
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))


def test_a_slower_layer_stays_dense_untouched(fixed_times: Callable[..., None]) -> None:
    fixed_times({(64, 32)})
    torch.manual_seed(0)
    model = GatedMLP()
    before = copy.deepcopy(model.state_dict())
    report = sparsify_(model, 0.5, example_inputs=torch.randn(5, 32), **FAST)
    assert [row.decision for row in report.rows] == ["dense", "dense", "sparse"]
    assert report["gate"].reason.startswith("dense is as fast or faster") and report["gate"].sparse_us == 150.0
    assert all(torch.equal(model.state_dict()[f"{n}.weight"], before[f"{n}.weight"]) for n in ("gate", "up"))
    assert (
        model.down.layout == "token" and report["down"].layout == "token -> token" and report["gate"].retained is None
    )


def test_a_layer_that_turns_out_slower_with_its_real_pattern(
    fixed_times: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shflnb.nn.decide as decide

    fixed_times()
    calm, count = decide.call_us, [0]

    def call_us(calls: Any, *args: Any, **kwargs: Any) -> float:
        if calls[0] == "sparse" and calls[1] == (64, 32):
            count[0] += 1
            return 40.0 if count[0] <= 1 else 150.0  # good with a random pattern, bad with the one found
        return calm(calls, *args, **kwargs)

    monkeypatch.setattr(decide, "call_us", call_us)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    weight = model[0].weight.detach().clone()
    report = sparsify_(model, 0.5, example_inputs=torch.randn(5, 32), **FAST)
    assert report["0"].decision == "dense" and report["0"].reason.endswith("with the pattern found")
    assert torch.equal(model[0].weight, weight) and isinstance(model[1], nn.GELU)
    assert model[2].layout == "token" and report["2"].layout == "token -> token"


def test_a_dense_time_that_was_disturbed_once_chooses_nothing(
    fixed_times: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shflnb.nn.decide as decide

    fixed_times({(64, 32)}, slow=150.0)
    calm, count = decide.call_us, [0]

    def call_us(calls: Any, *args: Any, **kwargs: Any) -> float:
        if calls[0] == "dense":
            count[0] += 1
            return 300.0 if count[0] == 1 else 100.0
        return calm(calls, *args, **kwargs)

    monkeypatch.setattr(decide, "call_us", call_us)
    model = nn.Sequential(nn.Linear(32, 64))
    report = sparsify_(model, 0.5, example_inputs=torch.randn(5, 32), **FAST)
    assert report["0"].decision == "dense" and report["0"].dense_us == 100.0 and count[0] == 2


@pytest.mark.parametrize("disturbed", [{1}, {2}, {1, 3}])
def test_a_sparse_time_that_was_disturbed_once_drops_nothing(
    disturbed: set[int], fixed_times: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the random pattern, with the one found, or with both."""
    import shflnb.nn.decide as decide

    fixed_times({(64, 32)})
    calm, count = decide.call_us, [0]

    def call_us(calls: Any, *args: Any, **kwargs: Any) -> float:
        if calls[0] == "sparse":
            count[0] += 1
            return 300.0 if count[0] in disturbed else 40.0
        return calm(calls, *args, **kwargs)

    monkeypatch.setattr(decide, "call_us", call_us)
    report = sparsify_(nn.Sequential(nn.Linear(32, 64)), 0.5, example_inputs=torch.randn(5, 32), **FAST)
    assert report["0"].decision == "sparse" and report["0"].sparse_us == 40.0
    assert count[0] == 2 + len(disturbed)


def test_policy_always_takes_them_all_and_says_so(fixed_times: Callable[..., None]) -> None:
    fixed_times({(64, 32), (32, 64)})
    report = sparsify_(GatedMLP(), 0.5, example_inputs=torch.randn(5, 32), policy="always", **FAST)
    assert {row.reason for row in report.rows} == {"policy always"} and len(report.sparse) == 3


def test_without_an_example() -> None:
    model = GatedMLP()
    report = sparsify_(model, 0.5, policy="always", **FAST)
    assert model.gate.layout == "same" and isinstance(model.act, nn.SiLU)
    assert report["gate"].reason == "policy always; not timed (no example inputs)" and report["gate"].n is None


def test_without_an_example_layers_are_timed_at_so_many_tokens(fixed_times: Callable[..., None]) -> None:
    fixed_times({(64, 32)})
    report = sparsify_(GatedMLP(), 0.5, tokens=77, **FAST)
    assert report["down"].n == 77 and report["down"].decision == "sparse" and report["gate"].decision == "dense"


# -- what is left out, and why ----------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.conv = nn.Conv1d(32, 32, 1)
        self.good = nn.Linear(32, 32)
        self.alias = self.good
        self.thin = nn.Linear(32, 10)
        self.short = nn.Linear(8, 32)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.sub = nn.modules.linear.NonDynamicallyQuantizableLinear(32, 32)
        self.mha = nn.MultiheadAttention(32, 2)
        self.sparse = ShflLinear(32, 32, block=(16, 16))
        self.lazy = nn.Linear(32, 32)
        self.classifier = nn.Linear(32, 32)
        self.last = nn.Linear(32, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.good(self.embed(x)))


def test_every_layer_left_out_has_its_reason(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    model = Zoo()
    report = sparsify_(model, 0.5, example_inputs=torch.randint(0, 50, (4,)), **FAST)
    reasons = {row.name: row.reason for row in report.rows}
    assert reasons == {
        "embed": "an embedding: looked up, not multiplied",
        "conv": "a Conv1d: only torch.nn.Linear is packed",
        "good": "2.50x faster",
        "thin": "10 rows, fewer than v = 16",
        "short": "8 columns, fewer than tile_k = 16",
        "normed": "parametrised (_WeightNorm): call torch.nn.utils.parametrize.remove_parametrizations first",
        "sub": "a subclass of nn.Linear (NonDynamicallyQuantizableLinear), which may compute something else; "
        "filter_fn can take it in",
        "mha": "a MultiheadAttention: only torch.nn.Linear is packed",
        "mha.out_proj": "inside nn.MultiheadAttention, which reads the weight without calling the layer",
        "sparse": "already sparse",
        "lazy": "the example inputs do not reach it, so it was not timed",
        "classifier": "output head (named classifier)",
        "last": "output head (last layer, 50 rows as the vocabulary has entries)",
    }
    assert report["good"].aliases == ("alias",) and report["alias"] is report["good"]
    assert isinstance(model.good, ShflLinear) and model.alias is model.good
    assert report["sparse"].decision == "sparse" and len(report.sparse) == 2


def test_tied_weights_stay_tied(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    model = TinyLM(tied=True)
    report = sparsify_(model, 0.5, example_inputs=TOKENS, filter_fn=lambda name, module: None, **FAST)
    assert report["out"].reason == "tied: it shares its weight with the embedding embed"
    assert model.out.weight is model.embed.weight


def test_filter_fn_and_ignore(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    model = TinyLM()
    report = sparsify_(
        model, 0.5, example_inputs=TOKENS, ignore=["mlp", r"re:attention\.[qk]$"],
        filter_fn=lambda name, module: {"out": True, "attention.o": False}.get(name), **FAST,
    )  # fmt: skip
    assert [row.name for row in report.sparse] == ["attention.v", "out"]
    assert report["mlp.2"].reason == "ignored (mlp)" and report["attention.o"].reason == "left out by filter_fn"
    with pytest.raises(ArgumentError, match=r"ignore has 'mpl', which matches no module; there are embed, "):
        sparsify_(TinyLM(), 0.5, ignore=["mpl"], **FAST)
    with pytest.raises(ArgumentError, match="no regular expression"):
        sparsify_(TinyLM(), 0.5, ignore=["re:("], **FAST)
    with pytest.raises(ArgumentError, match="ignore is the string 'mlp'"):
        sparsify_(TinyLM(), 0.5, ignore="mlp", **FAST)


def test_sparsity_by_name() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    report = sparsify_(model, {"0": 0.25, "re:[1]": 0.5, "default": 0.75}, policy="always", **FAST)
    assert [round(row.sparsity, 2) for row in report.rows] == [0.25, 0.5, 0.75]
    with pytest.raises(ArgumentError, match="sparsity has 'x', which matches no module"):
        sparsify_(nn.Sequential(nn.Linear(64, 64)), {"x": 0.5}, policy="always", **FAST)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"block": (48, 16)}, "v, rows per group"),
        ({"policy": "mostly"}, "policy is 'mostly'; expected one of never_slower, always"),
        ({"timing": "wall"}, "timing is 'wall'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"score": "activation"}, "needs calibration="),
        ({"calibration": [torch.zeros(1, 32)]}, "calibration is given, but score is 'magnitude'"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options: dict[str, Any], text: str) -> None:
    model = GatedMLP()
    with pytest.raises(ArgumentError, match=text):
        sparsify_(model, **options)
    assert all(type(m) is nn.Linear for m in (model.gate, model.up, model.down))


def test_errors_name_the_layer() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[1].weight[2, 3] = float("inf")
    with pytest.raises(ArgumentError, match=r"layer 1: w\[2, 3\] is inf.*1 layers before it are sparse already"):
        sparsify_(model, 0.5, policy="always", **FAST)


def test_calibration_weighs_the_columns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    x = torch.randn(64, 32)
    x[:, :16] *= 100
    sparsify_(model, 0.5, policy="always", score="activation", calibration=[x[:32], x[32:]], **FAST)
    assert int(model[0].indices.max()) < 16, "the loud half of the inputs is kept"
    with pytest.raises(ArgumentError, match="calibration is empty"):
        sparsify_(nn.Sequential(nn.Linear(32, 32)), 0.5, score="activation", calibration=[], **FAST)


# -- conduct ----------------------------------------------------------------------------------------------------------


def test_dense_weights_are_let_go_layer_by_layer() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    weights = [weakref.ref(layer.weight.untyped_storage()) for layer in model]
    alive: list[int] = []

    def progress(name: str, done: int, total: int) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in weights))
        assert total == 6 and done == len(alive) - 1

    sparsify_(model, 0.5, policy="always", progress=progress, **FAST)
    assert alive == [6, 5, 4, 3, 2, 1]


def test_modes_hooks_and_gradients_are_carried_over() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).train()
    model[0].eval()
    model[1].weight.requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    sparsify_(model, 0.5, policy="always", **FAST)
    assert not model[0].training and model[1].training
    assert model[0].values.requires_grad and not model[1].values.requires_grad
    model(torch.randn(2, 32))
    assert seen == ["ShflLinear"]


def test_the_fused_encoder_of_torch_still_runs(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    dense, x = copy.deepcopy(model), torch.randn(2, 5, 32)
    report = sparsify_(model, 0.5, example_inputs=x, **FAST)
    assert len(report.sparse) == 4
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    with torch.inference_mode():
        want = masked_twin(dense, model)
        torch.testing.assert_close(model(x), want(x), rtol=1e-4, atol=1e-5)
        got = model(x, src_key_padding_mask=padding)[:, :3]
        torch.testing.assert_close(got, want(x, src_key_padding_mask=padding)[:, :3], rtol=1e-4, atol=1e-5)


def test_sparsifying_twice_changes_nothing_the_second_time() -> None:
    model = GatedMLP()
    sparsify_(model, 0.5, policy="always", **FAST)
    report = sparsify_(model, 0.5, policy="always", **FAST)
    assert {row.reason for row in report.rows} == {"already sparse"} and {row.decision for row in report.rows} == {
        "sparse"
    }


def test_a_linear_alone_cannot_be_replaced_in_place() -> None:
    report = sparsify_(nn.Linear(32, 32), 0.5, policy="always", **FAST)
    assert "use ShflLinear.from_dense" in report.rows[0].reason


def test_state_of_a_sparse_model_loads_into_another(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    torch.manual_seed(0)
    model, other = TinyLM().eval(), TinyLM().eval()
    for m in (model, other):
        sparsify_(m, 0.5, example_inputs=TOKENS, **FAST)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(**TOKENS), model(**TOKENS))


def test_real_times_are_measured() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    report = shflnb.sparsify_(
        model, 0.75, (16, 16), search="identity", example_inputs=torch.randn(64, 128), policy="always"
    )
    for row in report.rows:
        assert 0.5 < row.dense_us < 1e6 and 0.5 < row.sparse_us < 1e6
    assert report.model_dense_us > 0 and report.model_sparse_us > 0 and report.speedup > 0


# -- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(fixed_times: Callable[..., None]) -> Report:
    fixed_times({(64, 32)})
    made = sparsify_(nn.Sequential(GatedMLP(), GatedMLP()), 0.5, example_inputs=torch.randn(5, 32), **FAST)
    made.model_dense_us, made.model_sparse_us = 1000.0, 900.0
    return made


def test_report_totals(report: Report) -> None:
    t = report.totals
    assert (t["layers"], t["sparse_layers"], t["weights"]) == (6, 2, 6 * 2048)
    assert t["layers_dense_us"] == 600.0 and t["layers_chosen_us"] == 480.0 and t["predicted_us"] == 880.0
    assert t["predicted_speedup"] == 1000 / 880 and t["speedup"] == 1000 / 900
    np.testing.assert_allclose(t["sparsity"], sum(r.sparsity for r in report.sparse) / 6)
    report.model_dense_us = 100.0
    assert report.predicted_us is None, "the layers alone took longer than the model: no foretelling from that"


def test_report_to_json(report: Report, tmp_path: Path) -> None:
    record = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == record
    assert [row["name"] for row in record["rows"]] == [row.name for row in report.rows]
    assert record["rows"][0]["speedup"] == pytest.approx(100 / 150) and record["options"]["search"] == "identity"
    assert record["totals"]["sparse_layers"] == 2 and record["device"].startswith("CPU")


def test_report_text_has_every_layer_and_reason(report: Report) -> None:
    text = str(report)
    assert "*.down (2 layers)" in text and "2.50x faster" in text and "dense is as fast or faster" in text
    assert "2 of 6 layers sparse" in text and "foretold" in text
    from rich.console import Console

    with open("/dev/null", "w") as sink:
        console = Console(file=sink, width=200, record=True)
        report.print(console=console, collapse=False)
    full = console.export_text()
    assert all(row.name in full for row in report.rows)


def test_report_plot(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000 and len(figure.axes[0].get_yticklabels()) == 6


def test_parametrised_by_prepare_is_told_to_finalize() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    shflnb.nn.prepare(model, 0.5, (16, 16), steps=0, search="identity")
    report = sparsify_(model, 0.5, policy="always", **FAST)
    assert report.rows[0].reason == "parametrised (ShflMask): call finalize() first"
    assert parametrize.is_parametrized(model[0])


def test_one_budget_for_the_whole_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[:, 16:] *= 0.01
    report = sparsify_(model, 0.5, policy="always", budget="model", **FAST)
    assert report["0"].sparsity < 0.3 and report["1"].sparsity > 0.7
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ArgumentError, match="budget='model' compares the scores"):
        sparsify_(GatedMLP(), 0.5, score=lambda w: w.abs(), budget="model", **FAST)
