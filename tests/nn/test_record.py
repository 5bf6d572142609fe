"""Launch records follow the tensors: through updates, moves, copies and death."""

from __future__ import annotations

import copy
import gc
import threading

import torch
from nn_models import make_layer

from shflnb.nn import forget
from shflnb.nn.record import launch_record, record_count


def reference(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)


def agrees(layer: torch.nn.Module, x: torch.Tensor) -> bool:
    want = reference(layer, x)
    with torch.no_grad():  # sums of large terms may be small: the tolerance is one of the largest result
        return torch.allclose(layer(x), want, atol=1e-5 * max(1.0, float(want.abs().max())))


def test_a_second_call_finds_the_first_ones_record() -> None:
    layer = make_layer()
    args = (layer.values, layer.indices, layer.indptr, layer.row_perm, 96, 16, torch.float32)
    assert launch_record(*args) is launch_record(*args)


def test_updates_in_place_are_seen() -> None:
    layer, x = make_layer(), torch.randn(4, 96)
    assert agrees(layer, x)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        assert agrees(layer, x)
    with torch.no_grad():
        layer.values.copy_(torch.randn_like(layer.values) * (layer.values != 0))
    assert agrees(layer, x)
    other = make_layer(seed=5)
    layer.load_state_dict(other.state_dict())
    assert agrees(layer, x) and torch.equal(layer(x), other(x))


def test_new_storage_under_the_same_parameter_is_seen() -> None:
    layer, x = make_layer(), torch.randn(4, 96)
    assert agrees(layer, x)
    layer.values.data = layer.values.data * 3
    assert agrees(layer, x)
    layer.double()
    assert torch.allclose(layer(x.double()).float(), reference(layer.float(), x), atol=1e-5)


def test_a_change_of_the_pattern_alone_is_seen() -> None:
    layer, x = make_layer(), torch.randn(4, 96)
    assert agrees(layer, x)
    with torch.no_grad():
        layer.row_perm.copy_(layer.row_perm.flip(0))
    assert agrees(layer, x)


def test_forget_after_a_write_that_torch_cannot_see() -> None:
    layer, x = make_layer(dtype=torch.float32), torch.randn(4, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = layer(x)
        layer.values.data.mul_(2)  # the rounded copy for autocast does not notice ...
        forget(layer.values)  # ... until told
        assert not torch.equal(layer(x), before)


def test_records_die_with_their_tensors_and_addresses_are_not_confused() -> None:
    gc.collect()
    before = record_count()
    x = torch.randn(4, 96)
    for seed in range(20):  # freed memory is used again at once, most likely at the same address
        layer = make_layer(seed=seed)
        assert agrees(layer, x)
        del layer
    assert record_count() == before


def test_copies_have_records_of_their_own() -> None:
    layer, x = make_layer(), torch.randn(4, 96)
    layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.values.zero_()
        layer(x)
    assert agrees(twin, x) and agrees(layer, x)
    assert not torch.equal(twin(x), layer(x))


def test_views_of_one_storage_are_told_apart() -> None:
    a, b = make_layer(seed=1), make_layer(seed=2)
    flat = torch.cat([a.values.detach().flatten(), b.values.detach().flatten()])
    count = a.values.numel()
    a.values = torch.nn.Parameter(flat[:count].view(-1, 16))
    b.values = torch.nn.Parameter(flat[count:].view(-1, 16))
    x = torch.randn(4, 96)
    assert agrees(a, x) and agrees(b, x) and agrees(a, x)


def test_inference_tensors_work() -> None:
    with torch.inference_mode():
        layer, x = make_layer(), torch.randn(4, 96)
        assert torch.equal(layer(x), layer(x)) and agrees(layer, x)


def test_threads() -> None:
    layer, x = make_layer(), torch.randn(4, 96)
    layer.requires_grad_(False)
    want, bad = reference(layer, x), []

    def work() -> None:
        for _ in range(50):
            if not torch.allclose(layer(x), want, atol=1e-5):
                bad.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad
