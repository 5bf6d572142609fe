"""A result that waits for its residual sum: who hands one on, who adds to it, and that nothing else can tell."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_models import GatedMLP, make_layer
from torch import nn

from shflnb.nn import ShflLinear, is_feature_major, sparsify_
from shflnb.nn import convert as convert_file
from shflnb.nn import modules as modules_file
from shflnb.nn import sums as sums_file
from shflnb.nn.hf import layer_records, restore_layers
from shflnb.nn.observe import Observation, observe
from shflnb.nn.planner import plan
from shflnb.nn.sums import SumTerm, as_term

HALF = torch.bfloat16


@pytest.fixture
def additions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the sums that the kernel would have taken; the CPU plays it."""
    taken: list[torch.Size] = []

    def turned_sum(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert type(y) is type(other) is torch.Tensor and is_feature_major(y) and other.is_contiguous()
        taken.append(y.shape)
        return (y.contiguous().float() + other.float()).to(y.dtype)

    monkeypatch.setattr(sums_file, "turned_sum", turned_sum)
    for file in (modules_file, convert_file):
        monkeypatch.setattr(file, "SHARE_ON", {"cpu"})
    monkeypatch.setattr(modules_file, "FEW_TOKENS", 0)
    monkeypatch.setattr(modules_file, "LEAST_VALUES", 0)
    return taken


def summing(m: int = 48, k: int = 32) -> ShflLinear:
    layer = make_layer(m, k, dtype=HALF).requires_grad_(False)
    layer.layout, layer.joins_sum = "token", True
    return layer


def term_and_plain(*lead: int) -> tuple[SumTerm, torch.Tensor, torch.Tensor]:
    """A layer's result as a term and as it is without a sum, and something to add to it."""
    torch.manual_seed(0)
    layer, x = summing(), torch.randn(*(lead or (5, 7)), 32).to(HALF)
    term = layer(x)
    layer.joins_sum = False
    return term, layer(x), torch.randn(*(lead or (5, 7)), 48).to(HALF)


ADDITIONS: dict[str, Callable[[Any, Any], Any]] = {
    "h + y": lambda y, h: h + y,
    "y + h": lambda y, h: y + h,
    "torch.add": lambda y, h: torch.add(h, y),
    "method": lambda y, h: y.add(h),
    "after dropout": lambda y, h: h + nn.Dropout(0.5).eval()(y),
    "after identity": lambda y, h: h + nn.Identity()(y),
}


@pytest.mark.parametrize("name", ADDITIONS)
@pytest.mark.parametrize("lead", [(12,), (5, 7), (2, 3, 4)])
def test_a_sum_turns_its_term(name: str, lead: tuple[int, ...], additions: list[torch.Size]) -> None:
    term, plain, h = term_and_plain(*lead)
    assert type(term) is SumTerm and not additions
    total = ADDITIONS[name](term, h)
    assert type(total) is torch.Tensor and total.is_contiguous() and torch.equal(total, h + plain)
    assert additions == [total.shape]
    assert torch.equal(term + h, total) and len(additions) == 2, "a term may be added more than once"


OTHERWISE: dict[str, Callable[[Any, Any], Any]] = {
    "twice": lambda y, h: torch.add(h, y, alpha=2),
    "to a number": lambda y, h: y + 1,
    "to a vector": lambda y, h: y + h[0, 0],
    "to another dtype": lambda y, h: h.float() + y,
    "to another order": lambda y, h: h.movedim(-1, 0).contiguous().movedim(0, -1) + y,
    "to itself": lambda y, h: y + y,
    "in place": lambda y, h: h.clone().add_(y),
    "operator in place": lambda y, h: h.clone().__iadd__(y),
    "into the term": lambda y, h: y.add_(h),
    "product": lambda y, h: y * h,
    "norm": lambda y, h: F.layer_norm(y, (48,)),
    "view": lambda y, h: y.view(-1, 8),
    "list": lambda y, h: torch.cat([y, h, y]),
    "reshaped": lambda y, h: y.reshape(5, 7, 6, 8).transpose(1, 2),
    "index": lambda y, h: y[1:, 2],
    "training dropout": lambda y, h: (torch.manual_seed(3), F.dropout(y, 0.5))[1],
    "contiguous": lambda y, h: y.contiguous(),
    "array": lambda y, h: torch.from_numpy(y.float().numpy()),
    "saved": lambda y, h: _saved(y),
    "copied": lambda y, h: copy.deepcopy(y),
}


def _saved(y: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", OTHERWISE)
def test_anything_else_finds_an_ordinary_tensor(name: str, additions: list[torch.Size]) -> None:
    term, plain, h = term_and_plain()
    found, want = OTHERWISE[name](term, h), OTHERWISE[name](plain.clone(), h)
    assert type(found) is torch.Tensor and found.stride() == want.stride() and torch.equal(found, want)
    assert not additions
    if name != "into the term":
        assert torch.equal(h + term, h + plain), "whatever was asked first"


def test_what_was_written_into_a_term_stays_there(additions: list[torch.Size]) -> None:
    term, plain, h = term_and_plain()
    term.mul_(2)
    assert torch.equal(term, plain * 2) and torch.equal(h + term, h + plain * 2) and not additions


def test_metadata_turns_nothing(additions: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    term, plain, h = term_and_plain()
    with monkeypatch.context() as patch:
        patch.setattr(sums_file, "turned", None)
        about = (term.shape, term.size(), term.size(-1), term.dtype, term.device, term.dim(), term.ndim, term.numel())
        assert not term.is_cuda and not term.requires_grad and term.is_floating_point()
    assert about == (
        plain.shape, plain.size(), 48, HALF, plain.device, plain.dim(), plain.ndim, plain.numel()
    )  # fmt: skip
    assert torch.equal(h + term, h + plain) and len(additions) == 1


def test_a_gradient_takes_torchs_addition(additions: list[torch.Size]) -> None:
    term, plain, h = term_and_plain()
    h.requires_grad_()
    total = h + term
    assert total.requires_grad and torch.equal(total, h + plain) and not additions
    total.float().sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer, x: (layer, x.requires_grad_()),
        lambda layer, x: (layer.requires_grad_(), x),
        lambda layer, x: (layer.float(), x.float()),
        lambda layer, x: (make_summing(layer, 47), x),
        lambda layer, x: (layer, x[0, 0]),
        lambda layer, x: (set_layout(layer, "feature"), x),
    ],
    ids=["x wants a gradient", "training", "float32", "odd width", "one token", "feature-major result"],
)
def test_who_hands_on_a_plain_result(spoil: Any, additions: list[torch.Size]) -> None:
    layer, x = spoil(summing(), torch.randn(5, 7, 32).to(HALF))
    assert type(layer(x)) is torch.Tensor


def make_summing(layer: ShflLinear, m: int) -> ShflLinear:
    return summing(m, layer.in_features)


def set_layout(layer: ShflLinear, layout: str) -> ShflLinear:
    layer.layout = layout
    return layer


def test_small_results_and_few_tokens_are_not_worth_it(
    additions: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = summing(), torch.randn(7, 32).to(HALF)
    assert type(layer(x)) is SumTerm
    monkeypatch.setattr(modules_file, "LEAST_VALUES", 7 * 48 + 1)
    assert type(layer(x)) is torch.Tensor
    monkeypatch.setattr(modules_file, "LEAST_VALUES", 0)
    monkeypatch.setattr(modules_file, "FEW_TOKENS", 7)
    assert type(layer(x)) is torch.Tensor


def test_modes_and_compilers_see_no_term(additions: list[torch.Size]) -> None:
    layer, x = summing(), torch.randn(7, 32).to(HALF)
    h = torch.randn(7, 48).to(HALF)
    layer.joins_sum = False
    want = h + layer(x)
    layer.joins_sum = True
    with torch.autocast("cpu", HALF):
        assert type(layer(x.float())) is torch.Tensor
    with torch.inference_mode():
        assert torch.equal(h + layer(x), want) and len(additions) == 1
    both = torch.compile(lambda h, x: h + layer(x), backend="eager", fullgraph=True)
    assert torch.equal(both(h, x), want) and len(additions) == 1


def test_an_exported_program_takes_any_number_of_tokens(
    additions: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules_file, "LEAST_VALUES", 65 * 48)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = summing()

        def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return h + self.layer(x)

    model, tokens = Sum(), torch.export.Dim("tokens", min=2, max=4096)
    x, h = torch.randn(70, 32).to(HALF), torch.randn(70, 48).to(HALF)
    program = torch.export.export(model, (h, x), dynamic_shapes=({0: tokens}, {0: tokens})).module()
    for n in (2, 70, 300):
        x, h = torch.randn(n, 32).to(HALF), torch.randn(n, 48).to(HALF)
        assert torch.equal(program(h, x), model(h, x))
    assert len(additions) == 2, "those of the eager model"


def test_a_term_from_its_tensor(additions: list[torch.Size]) -> None:
    y = torch.arange(6.0).view(2, 3).t()
    term = as_term(y)
    assert torch.equal(term.token_major(), y) and term.token_major().is_contiguous()
    assert term.token_major() is term.token_major()
    assert repr(term) == repr(y.contiguous())


# -- the planner ------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """What `join` makes of x and a layer's result."""

    def __init__(self, join: Any) -> None:
        super().__init__()
        self.a, self.b, self.drop, self.join = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(), join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(self, x, self.a(x))


JOINS: dict[str, tuple[Any, bool]] = {
    "sum": (lambda m, x, y: x + y, True),
    "sum the other way": (lambda m, x, y: y + x, True),
    "dropout": (lambda m, x, y: x + m.drop(y), True),
    "norm after it": (lambda m, x, y: F.layer_norm(x + y, (8,)), True),
    "two terms, one sum each": (lambda m, x, y: (x + y) + m.b(x), True),
    "called twice": (lambda m, x, y: (x + y) + m.a(x), True),
    "called twice, once elsewhere": (lambda m, x, y: (x + y) * m.a(x), False),
    "used twice": (lambda m, x, y: x + y + y.mean(), False),
    "half of it": (lambda m, x, y: torch.add(x, y, alpha=0.5), False),
    "bias": (lambda m, x, y: y + torch.ones(8), False),
    "two layers": (lambda m, x, y: y + m.b(x), False),
    "activated": (lambda m, x, y: x + F.relu(y), False),
    "broadcast": (lambda m, x, y: y + x[:1], False),
    "turned": (lambda m, x, y: y + torch.zeros(8, 3).t(), False),
    "in place": (lambda m, x, y: x.clone().add_(y), False),
    "returned as well": (lambda m, x, y: (x + y, y), False),
}


def watched(model: nn.Module, x: torch.Tensor) -> Observation:
    return observe(model, x, {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)})


@pytest.mark.parametrize("name", JOINS)
def test_which_results_only_join_a_sum(name: str) -> None:
    join, is_summed = JOINS[name]
    assert ("a" in watched(Residual(join), torch.randn(3, 8)).summed) == is_summed


def test_the_plan_names_them_unless_nothing_shall_be_fused() -> None:
    seen = watched(GatedMLP(), torch.randn(5, 32))
    assert seen.summed == {"down"}
    made = plan(seen, {"gate", "up", "down"})
    assert made.summed == {"down"} and made.text("down") == "feature -> token (sum)"
    assert made.text("gate") == "token -> feature"
    assert not plan(seen, {"gate"}).summed and not plan(seen, {"down"}, fuse=False).summed


def test_a_model_adds_as_planned_and_keeps_it(additions: list[torch.Size]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(GatedMLP(), nn.LayerNorm(32), GatedMLP()).to(HALF).eval().requires_grad_(False)
    x = torch.randn(5, 9, 32).to(HALF)
    report = sparsify_(model, 0.5, (16, 16), example_inputs=x, policy="always", search="identity", measure_model=False)
    assert [row.layout for row in report.rows if row.name.endswith("down")] == ["feature -> token (sum)"] * 2
    additions.clear()
    got = model(x)
    assert additions == [torch.Size((5, 9, 32))] * 2
    assert "joins_sum=True" in repr(model[0].down) and "joins_sum" not in repr(model[0].up)
    for twin in (copy.deepcopy(model), restored(model)):
        additions.clear()
        assert torch.equal(twin(x), got) and len(additions) == 2
    for block in (model[0], model[2]):
        block.down.joins_sum = False
    additions.clear()
    assert torch.equal(model(x), got) and not additions


def restored(model: nn.Module) -> nn.Module:
    """As `from_pretrained` makes it: from a skeleton, records of the layers and plain tensors."""
    twin = nn.Sequential(GatedMLP(), nn.LayerNorm(32), GatedMLP()).to(HALF).eval()
    restore_layers(twin, layer_records(model), ["0.act", "2.act"])
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(False)


def test_on_the_cpu_nothing_waits() -> None:
    model = GatedMLP().eval()
    report = sparsify_(model, 0.5, (16, 16), example_inputs=torch.randn(5, 32), policy="always", search="identity",
                       measure_model=False)  # fmt: skip
    assert not model.down.joins_sum and report["down"].layout == "feature -> token"
