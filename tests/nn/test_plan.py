"""What one forward pass shows, and what the planner makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nn_models import Attention, GatedMLP, TinyLM
from torch import nn

from shflnb.nn.observe import Observation, call_model, observe
from shflnb.nn.planner import components, plan


def watched(model: nn.Module, inputs: object) -> Observation:
    return observe(model, inputs, {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)})


def test_an_mlp_stays_feature_major_inside() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8), nn.LayerNorm(8))
    seen = watched(model, torch.randn(2, 3, 8))
    assert seen.calls == {"0": [6], "3": [6]} and seen.edges == {"0": {"3"}} and seen.escaped == {"3"}
    assert seen.fusable == {"0": ("1", "gelu")}
    made = plan(seen, {"0", "3"})
    assert made.layout("0") == "feature" and made.layout("3") == "token" and made.feature_in == {"3"}
    assert plan(seen, {"0"}).layout("0") == "token", "a dense reader wants token-major"
    assert plan(seen, {"3"}).feature_in == frozenset()
    assert plan(seen, {"0", "3"}, fuse=False).fused == {}


def test_gate_and_up_agree_on_one_layout_and_share_their_input() -> None:
    seen = watched(GatedMLP(), torch.randn(5, 32))
    assert seen.meets == [frozenset({"gate", "up"})] and seen.shared == [("gate", "up")]
    assert seen.fusable == {"gate": ("act", "silu")} and seen.escaped == {"down"}
    made = plan(seen, {"gate", "up", "down"})
    assert made.feature_out == {"gate", "up"} and made.feature_in == {"down"} and made.readers("gate") == 2
    assert plan(seen, {"gate", "down"}).feature_out == frozenset(), "up is dense, so gate must be token-major as well"
    assert components(seen, ["gate", "up", "down"]) == [["gate", "up", "down"]]


def test_attention_shares_the_input_of_q_k_v_and_wants_token_major_results() -> None:
    seen = watched(Attention(), torch.randn(2, 7, 32))
    assert seen.shared == [("q", "k", "v")] and seen.escaped == {"q", "k", "v", "o"} and not seen.edges
    made = plan(seen, {"q", "k", "v", "o"})
    assert made.shared == (("q", "k", "v"),) and made.feature_out == frozenset()
    assert plan(seen, {"q", "v"}).readers("q") == 2 and plan(seen, {"q", "o"}).readers("q") == 1
    assert components(seen, seen.order) == [["q", "k", "v"], ["o"]]


class Custom(nn.Module):
    """Two layers with whatever `between` does in between."""

    def __init__(self, between: object) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.between(self, self.a(x), x))


CASES = {
    "plain": (lambda m, y, x: y, True, False),
    "module": (lambda m, y, x: m.act(y), True, True),
    "scaled": (lambda m, y, x: F.relu(y * 2 + 1), True, False),
    "in place": (lambda m, y, x: y.mul_(2).relu_(), True, False),
    "bias vector": (lambda m, y, x: y + torch.ones(8), True, False),
    "flattened": (lambda m, y, x: y.view(-1, 8), True, False),
    "residual": (lambda m, y, x: y + x, False, False),
    "norm": (lambda m, y, x: F.layer_norm(y, (8,)), False, False),
    "softmax": (lambda m, y, x: y.softmax(-1), False, False),
    "heads": (lambda m, y, x: y.view(2, 3, 4, 2).reshape(2, 3, 8), False, False),
    "transposed": (lambda m, y, x: y.transpose(0, 1), False, False),
    "used twice": (lambda m, y, x: m.act(y) + y.mean(), False, False),
    "twice activated": (lambda m, y, x: m.act(m.act(y)), True, False),
}


@pytest.mark.parametrize("name", CASES)
def test_what_keeps_the_layout_and_what_does_not(name: str) -> None:
    between, keeps, fusable = CASES[name]
    seen = watched(Custom(between), torch.randn(2, 3, 8))
    assert ("a" in plan(seen, {"a", "b"}).feature_out) is keeps
    assert ("a" in seen.fusable) is fusable


def test_gelu_by_tanh_is_not_the_exact_one() -> None:
    assert not watched(nn.Sequential(nn.Linear(8, 8), nn.GELU("tanh")), torch.randn(2, 8)).fusable
    assert watched(nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(2, 8)).fusable


def test_one_activation_module_for_two_layers_is_left_alone() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 8), act)
    assert watched(model, torch.randn(2, 8)).fusable == {}


def test_readers_with_a_write_in_between_do_not_share() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            y = self.a(x)
            x.add_(1)
            return y + self.b(x)

    assert watched(Writes(), torch.randn(2, 8)).shared == []


def test_a_layer_called_more_than_once() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.relu(self.a(x[:2])))

    seen = watched(Recurrent(), torch.randn(5, 8))
    assert seen.calls == {"a": [2, 2]} and seen.tokens("a") == {2: 2}
    assert plan(seen, {"a"}).feature_out == frozenset(), "its result also leaves the model"


def test_observing_leaves_the_model_as_it_was() -> None:
    model = TinyLM().train()
    model.norm.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = watched(model, {"tokens": torch.randint(0, 50, (2, 7))})
    assert seen.order[0] == "attention.q" and len(seen.calls) == 7
    assert model.training and not model.norm.training and model.mlp.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_fused_encoder_is_opened() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    model = model.eval()
    names = {m: n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert len(observe(model, torch.randn(2, 5, 32), names).calls) == 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_inputs_of_every_form() -> None:
    model = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    assert torch.equal(call_model(model, x), call_model(model, (x,)))
    assert torch.equal(call_model(model, x), call_model(model, {"input": x}))
