"""Layers that share an input compute together: who asks when, for which x, with which weights. The device is played."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nn_models import Attention, make_layer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shflnb.nn import ShflLinear, forget, is_feature_major, sparsify_
from shflnb.nn import joint as joint_file
from shflnb.nn import modules as modules_file
from shflnb.nn.modules import SharedInput
from shflnb.nn.op import activate
from shflnb.nn.record import record_count


class PlayedDevice:
    """Computes joint launches in torch, with the weights of the time when they were prepared, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches, self.preparations, self.stream, self.room = 0, 0, 0, 10**6
        monkeypatch.setattr(modules_file, "SHARE_ON", {"cpu"})
        monkeypatch.setattr(joint_file, "make_parts", self.make_parts)
        monkeypatch.setattr(joint_file, "launch", self.launch)
        monkeypatch.setattr(joint_file, "stores_results", lambda m, n: m * n <= self.room)
        monkeypatch.setattr(joint_file, "stream_of", lambda x: self.stream)

    def make_parts(self, layers: Any) -> Any:
        self.preparations += 1
        device, weights = self, [torch.from_numpy(own.packed.to_dense().astype(np.float64)) for own in layers]
        biases, activations = [own.bias for own in layers], [own.rest[0] for own in layers]

        class Played:
            k, m = weights[0].shape[1], sum(len(w) for w in weights)

            def road(self, n: int, is_feature: bool, stream: int) -> Callable[[torch.Tensor], torch.Tensor]:
                assert stream == device.stream

                def run(x: torch.Tensor) -> torch.Tensor:
                    results = []
                    for w, bias, activation in zip(weights, biases, activations, strict=True):
                        y = x.reshape(n, -1).double() @ w.T
                        y = activate(y if bias is None else y + bias, activation)
                        results.append((y.T if is_feature else y).reshape(-1))
                    return torch.cat(results)

                return run

        return Played()

    def launch(self, road: Any, stream: int, x: torch.Tensor, out: torch.Tensor) -> None:
        self.launches += 1
        out.copy_(road(x))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PlayedDevice:
    return PlayedDevice(monkeypatch)


def siblings(count: int = 3, **options: Any) -> nn.ModuleList:
    """Layers of different sizes that share their input; the first with an activation, the second without a bias."""
    shared = SharedInput(count)
    layers = nn.ModuleList(
        make_layer((80, 37, 48)[s], seed=s, bias=s != 1, activation="silu" if s == 0 else None, **options)
        for s in range(count)
    )
    for layer in layers:
        layer.share(shared)
    return layers.requires_grad_(False)


def by_definition(layer: ShflLinear, x: torch.Tensor) -> torch.Tensor:
    return layer.to_dense()(x)


def agree(layers: Any, x: torch.Tensor) -> bool:
    """Whether all layers, called in turn, give what they should."""
    return all(torch.allclose(layer(x), by_definition(layer, x), rtol=1e-4, atol=1e-4) for layer in layers)


# -- one launch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (5, 96), (2, 4, 96), (64, 96)])
def test_one_launch_for_all(device: PlayedDevice, shape: tuple[int, ...], mode: type) -> None:
    layers = siblings()
    with mode():
        x = torch.randn(shape)
        for call in range(1, 4):
            results = [layer(x) for layer in layers]
            assert device.launches == call and device.preparations == 1
            for layer, y in zip(layers, results, strict=True):
                torch.testing.assert_close(y, by_definition(layer, x), rtol=1e-4, atol=1e-4)
                assert y.shape == (*shape[:-1], layer.out_features) and y.is_contiguous()
    assert layers[0].shared.joint._waiting is None, "nothing is kept when all have asked"


def test_any_order_of_calls(device: PlayedDevice) -> None:
    layers = siblings()
    with torch.no_grad():
        for number in range(3):
            assert agree([layers[number], layers[number - 1], layers[number - 2]], torch.randn(4, 96))
    assert device.launches == 3 and layers[0].shared.joint.misses == 0


def test_planned_layouts(device: PlayedDevice) -> None:
    """Feature-major results where rows start at 16-byte boundaries; token-major ones else; alone where plans differ."""
    layers = siblings()
    for layer in layers:
        layer.layout = "feature"
    device.room = 0  # token-major results would need a turn
    with torch.no_grad():
        for shape, launches in (((8, 96), 1), ((2, 8, 96), 2), ((5, 96), 2)):
            x = torch.randn(shape)
            results = [layer(x) for layer in layers]
            assert device.launches == launches
            for layer, y in zip(layers, results, strict=True):
                torch.testing.assert_close(y, by_definition(layer, x), rtol=1e-4, atol=1e-4)
                assert is_feature_major(y) == (shape != (5, 96))
        device.room = 10**6
        assert agree(layers, torch.randn(6, 96)) and device.launches == 3
        layers[1].layout = "token"
        agree(layers, torch.randn(16, 96))  # the first of them cannot know yet that a later one has changed
        before = device.launches
        assert agree(layers, torch.randn(16, 96)) and device.launches == before
        assert agree(layers, torch.randn(7, 96)) and device.launches == before + 1, "token-major all of them"


def test_results_are_tensors_of_their_own(device: PlayedDevice) -> None:
    layers = siblings()
    with torch.no_grad():
        x = torch.randn(4, 96)
        first, second = layers[0](x), layers[1](x)
        kept = second.clone()
        first.add_(1)
        assert torch.equal(second, kept) and second._version == 0 and not second.requires_grad


# -- when a result is not the one that waits --------------------------------------------------------------------------


def test_a_change_of_x_between_the_calls(device: PlayedDevice) -> None:
    layers = siblings(2)
    with torch.no_grad():
        x = torch.randn(4, 96)
        layers[0](x)
        x.mul_(2)
        assert agree(layers[1:], x) and device.launches == 2


def test_another_stream(device: PlayedDevice) -> None:
    layers = siblings(2)
    with torch.no_grad():
        x = torch.randn(4, 96)
        layers[0](x)
        device.stream = 7
        layers[1].shared.joint._joint._memos.clear()
        assert agree(layers[1:], x) and device.launches == 2


def test_an_equal_tensor_is_another_one(device: PlayedDevice) -> None:
    layers = siblings(2)
    with torch.no_grad():
        x = torch.randn(4, 96)
        layers[0](x)
        assert agree(layers[1:], x.clone()) and device.launches == 2


def test_layers_that_are_not_called_are_not_computed_for_long(device: PlayedDevice) -> None:
    layers = siblings()
    xs = [torch.randn(4, 96) for _ in range(5)]
    with torch.no_grad():
        for x in xs:
            assert agree(layers[:2], x)
        assert layers[0].shared.joint.misses == 2 and device.launches == 2
        assert agree(layers, xs[0]) and device.launches == 2, "for good"


def test_results_go_with_x(device: PlayedDevice) -> None:
    layers = siblings()
    with torch.no_grad():
        x = torch.randn(4, 96)
        layers[0](x)
        piece = weakref.ref(next(iter(layers[0].shared.joint._waiting.pieces.values())))
        del x
        assert piece() is None and layers[0].shared.joint._waiting is None and layers[0].shared.joint.misses == 1


def test_a_layer_that_is_called_twice(device: PlayedDevice) -> None:
    layers = siblings(2)
    with torch.no_grad():
        x = torch.randn(4, 96)
        assert agree([layers[0], layers[0], layers[1]], x) and layers[0].shared.joint.misses == 1


# -- weights ----------------------------------------------------------------------------------------------------------


def test_updates_are_seen(device: PlayedDevice) -> None:
    layers = siblings()
    x, other = torch.randn(4, 96), make_layer(37, seed=9, bias=False)

    def write_past_torch() -> None:
        layers[0].values.data.mul_(2)
        forget(layers[0].values)

    changes: list[Callable[[], Any]] = [
        lambda: layers[0].values.mul_(2), lambda: layers[1].values.mul_(3), lambda: layers[2].bias.add_(1),
        lambda: layers[1].load_state_dict(other.state_dict()), lambda: layers[1].set_activation("silu"),
        lambda: setattr(layers[1], "bias", nn.Parameter(torch.randn(37), requires_grad=False)),
        lambda: setattr(layers[2].values, "data", layers[2].values.data * 2), write_past_torch,
    ]  # fmt: skip
    with torch.no_grad():
        assert agree(layers, x)
        for number, change in enumerate(changes):
            change()
            assert agree(layers, x), number
            before = device.launches
            assert agree(layers, x) and device.launches == before + 1
        layers.double()
        assert agree(layers, x.double())
    assert layers[0].shared.joint.misses == 0


def test_an_update_between_the_calls(device: PlayedDevice) -> None:
    layers = siblings()
    x = torch.randn(4, 96)
    with torch.no_grad():
        layers[0](x)
        layers[1].values.mul_(2)
        assert agree(layers[1:], x) and device.launches == 2


def test_nothing_is_kept_alive(device: PlayedDevice) -> None:
    gc.collect()
    before = record_count()
    gc.disable()
    try:
        layers = siblings()
        with torch.no_grad():
            agree(layers, torch.randn(4, 96))
        parts = weakref.ref(layers[0].shared.joint._joint.parts)
        layers[1].values = nn.Parameter(layers[1].values.clone(), requires_grad=False)
        assert parts() is None, "the weights of one layer went"
        del layers
        assert record_count() == before
    finally:
        gc.enable()


def test_layers_that_do_not_fit_together(device: PlayedDevice) -> None:
    x = torch.randn(4, 96)
    for change in (lambda layer: layer.set_activation("relu"), None):
        layers = siblings(2)
        if change is None:
            layers[1] = make_layer(64, block=(32, 32), seed=3).requires_grad_(False)
            layers[1].share(layers[0].shared)
        else:
            change(layers[1])
        with torch.no_grad():
            assert agree(layers, x) and agree(layers, x)
    assert device.launches == 0


# -- copies and modes -------------------------------------------------------------------------------------------------


def saved(layers: nn.ModuleList) -> nn.ModuleList:
    file = io.BytesIO()
    torch.save(list(layers), file)
    file.seek(0)
    return nn.ModuleList(torch.load(file, weights_only=True))


@pytest.mark.parametrize("how", [copy.deepcopy, saved])
def test_copies_compute_together(device: PlayedDevice, how: Callable[[Any], Any]) -> None:
    layers = siblings()
    state = {key: value.clone() for key, value in layers.state_dict().items()}
    with torch.no_grad():
        agree(layers, torch.randn(4, 96))
        copies = how(layers)
        copies[1].values.mul_(2)
        assert device.launches == 1 and agree(copies, torch.randn(4, 96)) and device.launches == 2
        assert agree(layers, torch.randn(4, 96)) and device.launches == 3
    assert copies[0].shared.joint is copies[2].shared.joint is not layers[0].shared.joint
    assert layers.state_dict().keys() == state.keys()


def test_a_second_module_on_the_same_tensors_goes_alone(device: PlayedDevice) -> None:
    layers = siblings()
    twin = copy.copy(layers[0])
    with torch.no_grad():
        assert agree([twin], torch.randn(4, 96)) and device.launches == 0
        assert agree(layers, torch.randn(4, 96)) and device.launches == 1


def test_a_layer_that_was_replaced(device: PlayedDevice) -> None:
    layers = siblings()
    layers[1] = nn.Linear(96, 37)
    with torch.no_grad():
        x = torch.randn(4, 96)
        for layer in (layers[0], layers[2]):
            torch.testing.assert_close(layer(x), by_definition(layer, x), rtol=1e-4, atol=1e-4)
    assert device.launches == 0


def test_modes_in_which_layers_go_alone(device: PlayedDevice) -> None:
    layers, x = siblings(2), torch.randn(4, 96)
    assert agree(layers, x)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layers[0](x).dtype == torch.bfloat16
        with FlopCounterMode(display=False):
            layers[0](x)
        assert agree(layers, torch.randn(65, 96)) and agree(layers, torch.randn(4, 192)[:, ::2])
        assert device.launches == 0
        assert agree(layers, x) and device.launches == 1
        layers[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layers[1](x).dtype == torch.bfloat16, "what waits was computed in another mode"


def test_sparsify_joins_what_reads_one_tensor(device: PlayedDevice) -> None:
    model, x = Attention(64).eval().requires_grad_(False), torch.randn(2, 4, 64)
    sparsify_(model, 0.5, (32, 32), example_inputs=x, policy="always", measure_model=False)
    dense = copy.deepcopy(model)
    for name in "qkvo":
        setattr(dense, name, getattr(model, name).to_dense())
    with torch.no_grad():
        before = device.launches
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)
        assert device.launches == before + 1
