"""`ShflLinear`: building, state, copies, and the shared transpose."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from nn_models import make_layer, random_packed
from torch import nn

from shflnb import prune
from shflnb.errors import ArgumentError, ShapeError
from shflnb.nn import ShflLinear, is_feature_major, to_feature_major, to_token_major
from shflnb.nn import modules as modules_file
from shflnb.nn.modules import SharedInput


def test_from_dense_is_prune_and_pack() -> None:
    linear = nn.Linear(96, 80)
    layer = ShflLinear.from_dense(linear, 0.5, (16, 16), search="identity", name="fc")
    want = prune(linear.weight.detach(), sparsity=0.5, block=(16, 16), search="identity").weight
    assert torch.equal(layer.dense_weight(), want) and layer.bias is linear.bias
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, want, linear.bias))
    assert repr(layer) == "ShflLinear(in_features=96, out_features=80, bias=True, sparsity=50.0%, block=(16, 16))"


@pytest.mark.parametrize(("m", "k", "block"), [(80, 96, (16, 16)), (33, 17, (32, 16)), (5, 3, (128, 64))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_packing_without_pruning_loses_nothing(m: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    linear = nn.Linear(k, m, dtype=dtype)
    with torch.no_grad():
        linear.weight[:, ::3] = 0
    layer = ShflLinear.from_dense(linear, None, block)
    back = layer.to_dense()
    assert torch.equal(back.weight, linear.weight) and torch.equal(back.bias, linear.bias)
    assert layer.values.dtype == dtype
    assert np.array_equal(layer.to_packed().to_dense().astype(float), linear.weight.detach().double().numpy())


def test_to_dense_computes_the_same() -> None:
    x = torch.randn(4, 96)
    for activation in (None, "relu", "gelu", "silu"):
        layer = make_layer(activation=activation).eval()
        dense = layer.to_dense()
        torch.testing.assert_close(dense(x), layer(x))
        assert isinstance(dense, nn.Linear if activation is None else nn.Sequential)


@pytest.mark.parametrize(("named", "of_bias", "default"), [
    ("meta", "cpu", "cpu"), ("cpu", "cpu", "meta"), (None, "meta", "cpu"), (None, "cpu", "meta"), (None, None, "meta"),
])  # fmt: skip
def test_from_packed_puts_all_tensors_in_one_place(named: str | None, of_bias: str | None, default: str) -> None:
    packed = random_packed(40, 24, (16, 16))
    bias = None if of_bias is None else torch.zeros(40, dtype=torch.float64, device=of_bias)
    with torch.device(default):
        layer = ShflLinear.from_packed(packed, bias, device=named)
    where = {t.device.type for t in (*layer.parameters(), *layer.buffers())}
    assert where == {named or of_bias or default} and (layer.bias is None) == (bias is None)


def test_from_packed_shares_the_bias_and_checks_it() -> None:
    packed = random_packed(40, 24, (16, 16))
    bias = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    assert ShflLinear.from_packed(packed, bias).bias is bias
    with pytest.raises(ShapeError, match=r"bias has shape \(39,\); packed needs \(40,\)"):
        ShflLinear.from_packed(packed, torch.zeros(39))
    with pytest.raises(ArgumentError, match="activation is 'mish'"):
        ShflLinear.from_packed(packed, activation="mish")


def test_an_empty_layer_is_zero() -> None:
    layer = ShflLinear(24, 40, block=(16, 16))
    assert torch.equal(layer(torch.randn(3, 24)), torch.zeros(3, 40))


def test_errors_of_the_search_name_the_layer() -> None:
    linear = nn.Linear(32, 32)
    with torch.no_grad():
        linear.weight[3, 5] = float("nan")
    with pytest.raises(ArgumentError, match=r"layer enc\.fc: .*\[3, 5\] is nan"):
        ShflLinear.from_dense(linear, 0.5, (16, 16), name="enc.fc")


# -- state ------------------------------------------------------------------------------------------------------------


def test_state_dict_is_plain_tensors_and_loads_anywhere() -> None:
    layer, x = make_layer(activation="gelu"), torch.randn(3, 96)
    state = layer.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    empty = ShflLinear(96, 80, block=(64, 64))
    assert empty.load_state_dict(state) == ([], [])
    with torch.device("meta"):
        meta = ShflLinear(96, 80)
    meta.load_state_dict(state, assign=True)
    for other in (empty, meta):
        assert torch.equal(other(x), layer(x)) and other.block == (16, 16) and other.activation == "gelu"


def test_a_saved_layer_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="saved layer is 80 x 96; this one is 80 x 95"):
        ShflLinear(95, 80).load_state_dict(make_layer().state_dict())


def test_the_whole_module_loads_with_weights_only() -> None:
    layer, x = make_layer(), torch.randn(3, 96)
    layer.shared = SharedInput(3)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = torch.load(file, weights_only=True)
    assert torch.equal(other(x), layer(x)) and other.shared.readers == 3


def test_deepcopy_and_moves() -> None:
    layer, x = make_layer(activation="relu"), torch.randn(3, 96)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.values is not layer.values
    for move, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        moved = getattr(copy.deepcopy(layer), move)()
        assert (
            moved(x.to(dtype)).dtype == dtype
            and moved.indices.dtype == torch.int32
            and moved.indptr.dtype == torch.int64
        )
        torch.testing.assert_close(moved(x.to(dtype)).float(), layer(x), rtol=0.05, atol=0.05)
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.empty(3, 96, device="meta")).shape == (3, 80)


def test_deepcopy_of_a_model_keeps_the_sharing_among_the_copies() -> None:
    pair = nn.ModuleList([make_layer(seed=1), make_layer(seed=2)])
    pair[0].shared = pair[1].shared = SharedInput(2)
    twin = copy.deepcopy(pair)
    assert twin[0].shared is twin[1].shared and twin[0].shared is not pair[0].shared


def test_reading_weight_warns() -> None:
    layer = make_layer(name="enc.fc")
    with pytest.warns(UserWarning, match=r"enc\.fc: \.weight builds the dense matrix"):
        assert torch.equal(layer.weight, layer.dense_weight())


def test_training_moves_kept_values_only() -> None:
    torch.manual_seed(0)
    layer = make_layer()
    zeros = layer.dense_weight() == 0
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    x, target = torch.randn(64, 96), torch.randn(64, 80)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert bool((layer.dense_weight()[zeros] == 0).all())


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_feature_major_by_definition() -> None:
    x = torch.randn(2, 3, 5)
    y = to_feature_major(x)
    assert torch.equal(x, y) and y.stride() == (3, 1, 6) and is_feature_major(y) and not is_feature_major(x)
    assert to_feature_major(y).data_ptr() == y.data_ptr() and torch.equal(to_token_major(y), x)
    assert not is_feature_major(torch.randn(5)) and to_feature_major(torch.randn(5)).shape == (5,)
    assert not is_feature_major(torch.zeros(8, 4).T[::2]), "a strided view is no contiguous (features, tokens) array"


class CountedCopies:
    """Counts the transposes that a model makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(modules_file, "turned", self)
        monkeypatch.setattr(modules_file, "SHARE_ON", {"cpu"})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x.t().contiguous()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_three_readers_share_one_transpose(monkeypatch: pytest.MonkeyPatch, mode: type) -> None:
    copies = CountedCopies(monkeypatch)
    layers = [make_layer(seed=s) for s in range(3)]
    x = torch.randn(5, 16, 96)
    want = [layer(x).detach() for layer in layers]
    shared = SharedInput(3)
    for layer in layers:
        layer.shared = shared
    with mode():
        x = x.clone()
        got = [layer(x) for layer in layers]
    assert copies.count == 1 and all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, want, strict=True))
    assert shared._entry is None, "after the last reader the copy is let go"


def test_a_compiled_graph_shares_the_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules_file, "SHARE_ON", {"cpu"})
    layers = nn.ModuleList([make_layer(seed=s) for s in range(3)])
    shared = SharedInput(3)
    for layer in layers:
        layer.shared = shared
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: [layer(x) for layer in layers], fullgraph=True, backend=keep)
    for shape in ((5, 16, 96), (5, 16, 96), (7, 16, 96)):
        x = torch.randn(shape)
        with torch.no_grad():
            got, want = compiled(x), [layer(x) for layer in layers]
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, want, strict=True))
    assert all(graph.count("shflnb.linear.default") == 3 for graph in graphs)
    assert all(graph.count("contiguous") == 4 for graph in graphs), "one transpose in, three out"
    assert shared._source is None and shared._copy is None
    few = torch.randn(3, 96)
    with torch.no_grad():
        compiled(few)
    assert "contiguous" not in graphs[-1], "few tokens are not transposed"


def test_a_changed_input_is_transposed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = CountedCopies(monkeypatch)
    a, b = make_layer(seed=0), make_layer(seed=1)
    a.shared = b.shared = SharedInput(2)
    x = torch.randn(5, 16, 96)
    with torch.no_grad():
        a(x)
        x.mul_(2)
        torch.testing.assert_close(b(x), b.to_dense()(x))
        assert copies.count == 2
        a(x.clone())
        y = torch.randn(80, 96)
        torch.testing.assert_close(b(y), b.to_dense()(y))


def test_few_tokens_are_not_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = CountedCopies(monkeypatch)
    layer = make_layer()
    layer.shared = SharedInput(2)
    with torch.no_grad():
        layer(torch.randn(64, 96))
        assert copies.count == 0
        layer(torch.randn(65, 96))
        assert copies.count == 1


def test_the_shared_copy_goes_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    CountedCopies(monkeypatch)
    layer = make_layer()
    layer.shared = SharedInput(2)
    with torch.no_grad():
        x = torch.randn(5, 16, 96)
        layer(x)
        assert layer.shared._entry is not None
        del x
        assert layer.shared._entry is None


def test_no_warning_on_ordinary_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = make_layer()
        layer(torch.randn(2, 96)).sum().backward()
        copy.deepcopy(layer).half()


def test_a_parametrised_bias_is_the_one_that_counts() -> None:
    """torch keeps the original elsewhere then, and computes the attribute at each call."""

    class Twice(nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return 2 * t

    layer, x = make_layer(), torch.randn(4, 96)
    want = torch.nn.functional.linear(x, layer.dense_weight(), 2 * layer.bias)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Twice())
    with torch.no_grad():
        assert torch.allclose(layer(x), want, atol=1e-5)
