"""The stop watch: what it runs, how it counts."""

from __future__ import annotations

import time

import pytest
import torch
from nn_models import make_layer

from shflnb.errors import ArgumentError
from shflnb.nn.measure import call_us, dense_call, device_name, sparse_call

CPU = torch.device("cpu")


def test_a_call_that_sleeps_takes_as_long() -> None:
    found = call_us([lambda: time.sleep(0.002)], CPU, seconds=0.02)
    assert 2000 <= found < 50_000
    assert call_us([lambda: time.sleep(0.002), lambda: time.sleep(0.004)], CPU, seconds=0.02) >= 3000


def test_every_call_has_its_turn_without_gradients() -> None:
    seen: set[int] = set()

    def call(number: int) -> None:
        assert not torch.is_grad_enabled()
        seen.add(number)

    call_us([lambda: call(1), lambda: call(2)], CPU, seconds=0.001)
    assert seen == {1, 2}
    with pytest.raises(ArgumentError, match="timing is 'wall'; expected one of eager, graph"):
        call_us([lambda: None], CPU, "wall")


def test_the_calls_compute_the_layer() -> None:
    weight, bias = torch.randn(80, 96), torch.randn(80)
    few, many = dense_call(weight, bias, 4, torch.float32, "relu"), dense_call(weight, None, 600, torch.float32)
    assert len(few) > 1 and len(many) == 1, "few tokens rotate over copies of the weight"
    assert few[0]().shape == (4, 80) and torch.equal(few[0](), few[1]()) and bool((few[0]() >= 0).all())

    layer = make_layer()
    calls = sparse_call(layer, 600, torch.float32, feature_in=True, layout="feature", activation="gelu")
    assert len(calls) == 1 and calls[0]().stride() == (1, 600)
    assert layer.layout == "same" and layer.activation is None, "the model's own layer is left as it is"
    half = sparse_call(layer, 4, torch.bfloat16, feature_in=False, layout="token")
    assert half[0]().dtype == torch.bfloat16 and layer.values.dtype == torch.float32


def test_device_names() -> None:
    assert device_name(CPU) == f"CPU, {torch.get_num_threads()} threads"
