"""The operator: values against the definition, gradients against finite differences, and what torch makes of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nn_models import dense_by_definition, make_layer, random_packed, tensors

from shflnb.errors import ArgumentError, DeviceError, DtypeError, FormatError, ShapeError
from shflnb.nn import dense_weight, is_feature_major, packed_linear, to_feature_major
from shflnb.nn.op import is_plain_call

ACTIVATIONS = (None, "relu", "gelu", "silu")
ACT = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
# m, k, block, shape of the leading dimensions
CASES = [
    (40, 24, (16, 16), (3, 5)),
    (33, 17, (32, 16), (4,)),
    (64, 32, (64, 32), (1, 1)),
    (7, 5, (16, 16), (2, 3)),
    (130, 70, (128, 64), (9,)),
    (48, 33, (16, 32), ()),
    (32, 32, (32, 16), (0, 4)),
]
OP = torch.ops.shflnb.linear.default


def make(m: int, k: int, block: tuple[int, int], lead: tuple[int, ...], **options: Any) -> tuple[Any, ...]:
    packed = random_packed(m, k, block, **options)
    generator = torch.Generator().manual_seed(m * k)
    x = torch.randn(*lead, k, dtype=torch.float64, generator=generator)
    return packed, tensors(packed), x, torch.randn(m, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("m", "k", "block", "lead"), CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_are_those_of_the_definition(m: int, k: int, block: Any, lead: Any, activation: Any) -> None:
    _, t, x, bias = make(m, k, block, lead)
    w = dense_by_definition(*t, k)
    want = ACT[activation](x @ w.T + bias)
    for inputs in (x, to_feature_major(x)):
        for layout in ("same", "token", "feature"):
            y = packed_linear(inputs, *t, bias, k=k, tile_k=block[1], activation=activation, layout=layout)
            torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


def test_small_integers_are_exact_in_every_dtype() -> None:
    packed = random_packed(80, 96, (16, 16), integer=True)
    x = torch.randint(-3, 4, (11, 96)).double()
    w = dense_by_definition(*tensors(packed), 96)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        t = tensors(packed, dtype)
        want = (x @ w.T).to(dtype)
        assert torch.equal(packed_linear(x.to(dtype), *t, k=96, tile_k=16), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_do_not_depend_on_the_layout(dtype: torch.dtype) -> None:
    t = tensors(random_packed(100, 70, (32, 32)), dtype)
    x = torch.randn(2, 9, 70).to(dtype)
    results = [
        packed_linear(a, *t, k=70, tile_k=32, layout=layout, activation="gelu")
        for a in (x, to_feature_major(x)) for layout in ("token", "feature")
    ]  # fmt: skip
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_layout_of_the_result() -> None:
    t = tensors(random_packed(40, 24, (16, 16)), torch.float32)
    x = torch.randn(3, 5, 24)
    token = packed_linear(x, *t, k=24, tile_k=16)
    feature = packed_linear(to_feature_major(x), *t, k=24, tile_k=16)
    assert token.is_contiguous() and not is_feature_major(token)
    assert is_feature_major(feature) and feature.stride() == (5, 1, 15)
    assert packed_linear(to_feature_major(x), *t, k=24, layout="token").is_contiguous()
    assert is_feature_major(F.gelu(feature) + 1), "elementwise operations keep the layout"


def test_other_strides_are_taken_too() -> None:
    t = tensors(random_packed(40, 24, (16, 16)))
    wide = torch.randn(6, 5, 48, dtype=torch.float64)
    x = wide[::2, :, 1::2]
    torch.testing.assert_close(packed_linear(x, *t, k=24), packed_linear(x.contiguous(), *t, k=24))


def test_unused_columns_are_never_read() -> None:
    packed = random_packed(32, 24, (16, 16), seed=3)
    unused = np.setdiff1d(np.arange(24), packed.indices)
    used_by_second = packed.indices[packed.indptr[1] :]
    only_first = np.setdiff1d(packed.indices[: packed.indptr[1]], used_by_second)
    assert len(only_first), "the case needs a column that one group uses and the other does not"
    x = torch.randn(4, 24, dtype=torch.float64)
    clean = packed_linear(x, *tensors(packed), k=24, tile_k=16)
    x[:, unused] = float("nan")
    assert torch.equal(packed_linear(x, *tensors(packed), k=24, tile_k=16), clean)
    x[:, only_first] = float("nan")
    y = packed_linear(x, *tensors(packed), k=24, tile_k=16)
    rows = torch.from_numpy(packed.row_perm[16:].astype(np.int64))
    assert torch.equal(y[:, rows], clean[:, rows]) and y.isnan().sum() == 4 * 16


def test_dense_weight_is_that_of_the_definition() -> None:
    for m, k, block, _ in CASES:
        t = tensors(random_packed(m, k, block))
        assert torch.equal(dense_weight(*t, k), dense_by_definition(*t, k))


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["token", "feature"])
def test_gradcheck(activation: str | None, layout: str) -> None:
    _, t, x, bias = make(18, 4, (16, 16), (1, 2))
    operands = [a.clone().requires_grad_() for a in (x, t[0], bias)]

    def f(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, values, *t[1:], bias, k=4, tile_k=16, activation=activation, layout=layout)

    # Places of rows that the last group does not have must stay zero, so they are no free numbers to differentiate by.
    mask = torch.ones_like(t[0])
    mask[int(t[2][-2]) :, 18 % 16 :] = 0

    def g(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return f(x, values * mask, bias)

    assert torch.autograd.gradcheck(g, operands)
    if activation in (None, "gelu", "silu"):
        assert torch.autograd.gradgradcheck(g, operands, fast_mode=True)


def test_gradients_are_those_of_the_dense_layer() -> None:
    _, t, x, bias = make(40, 24, (16, 16), (3, 5))
    values = t[0].clone().requires_grad_()
    x = x.requires_grad_()
    y = packed_linear(to_feature_major(x), values, *t[1:], bias, k=24, tile_k=16, activation="gelu")
    y.square().sum().backward()
    w = dense_by_definition(*t, 24).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    F.gelu(F.linear(x2, w, bias)).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(dense_weight(values.grad, *t[1:], 24), torch.where(w != 0, w.grad, 0.0))


def test_a_frozen_layer_keeps_no_activations_alive() -> None:
    import weakref

    _, t, x, _ = make(40, 24, (16, 16), (3, 5))
    leaf = x.requires_grad_()
    hidden = leaf * 2
    y = packed_linear(hidden, *t, k=24, tile_k=16)
    alive = weakref.ref(hidden)
    del hidden
    assert alive() is None
    y.sum().backward()
    assert leaf.grad is not None


# -- what torch makes of it -------------------------------------------------------------------------------------------


def op_samples() -> list[tuple[Any, ...]]:
    samples = []
    shapes = [(40, 24, (16, 16)), (33, 17, (32, 16)), (7, 5, (16, 16))]
    leads = [(3,), (2, 3), (1, 4), (2, 1, 2), ()]
    for (m, k, block), lead, activation, with_bias in itertools.product(shapes, leads, ACTIVATIONS, (False, True)):
        for layout in (0, 1):
            samples.append((m, k, block, lead, activation, with_bias, layout))
    return samples[::2] + samples[1::4]


def test_opcheck_on_many_samples() -> None:
    samples = op_samples()
    assert len(samples) >= 100
    for number, (m, k, block, lead, activation, with_bias, layout) in enumerate(samples):
        _, t, x, bias = make(m, k, block, lead)
        dtype = (torch.float32, torch.float64, torch.bfloat16)[number % 3]
        x = to_feature_major(x.to(dtype)) if number % 2 else x.to(dtype)
        x = x.detach().requires_grad_(number % 4 < 2)
        args = (x, t[0].to(dtype), *t[1:], bias.to(dtype) if with_bias else None, k, block[1], activation, bool(layout))
        # The slow one of the checks (tracing with dynamic shapes) on some of the samples, the others on all.
        names = ["test_schema", "test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(OP, args, test_utils=[*names, "test_aot_dispatch_dynamic"] if number % 12 == 0 else names)


def test_compile_has_no_graph_break_and_takes_any_batch() -> None:
    layer = make_layer(activation="gelu")
    model = torch.nn.Sequential(layer, torch.nn.LayerNorm(80), make_layer(32, 80, seed=1))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for shape in ((4, 96), (9, 96), (17, 96)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    x = torch.randn(5, 96, requires_grad=True)
    compiled(x).square().sum().backward()
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, want)


def test_compile_with_inductor() -> None:
    layer = make_layer(activation="silu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x * 2) + 1, fullgraph=True)
    with torch.no_grad():
        for x in (torch.randn(2, 6, 96), to_feature_major(torch.randn(2, 6, 96))):
            torch.testing.assert_close(compiled(x), layer(x * 2) + 1)


def test_export_with_a_dynamic_batch() -> None:
    layer = make_layer()
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(layer, (torch.randn(4, 96),), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["shflnb.linear.default"]
    x = torch.randn(11, 96)
    assert torch.equal(program.module()(x), layer(x))


def test_autocast_casts_x_and_rounds_the_values() -> None:
    layer = make_layer()
    x = torch.randn(5, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        layer(x).sum().backward()
    assert y.dtype == torch.bfloat16 and layer.values.grad is not None and layer.values.grad.dtype == torch.float32
    want = layer.to(torch.bfloat16)(x.bfloat16())
    # The bias stays float32 under autocast, which can only be nearer to the truth.
    torch.testing.assert_close(y.float(), want.float(), rtol=2e-2, atol=2e-2)


def test_vmap() -> None:
    layer = make_layer(dtype=torch.float64)
    x = torch.randn(3, 4, 96, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    torch.testing.assert_close(torch.vmap(layer, in_dims=1, out_dims=1)(x), layer(x))


def test_the_short_way_is_taken_only_when_nothing_is_in_between() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    layer = make_layer()
    layer.requires_grad_(False)
    x = torch.randn(4, 96)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    assert is_plain_call(x, layer.values, layer.bias)
    assert not is_plain_call(x.clone().requires_grad_(), layer.values, layer.bias)
    with torch.no_grad():
        assert is_plain_call(x.clone().requires_grad_(), layer.values, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_plain_call(x, layer.values, layer.bias)
    with Watch():
        y = layer(x)
    assert "shflnb.linear.default" in seen and torch.equal(y, layer(x))
    with torch.inference_mode():
        assert is_plain_call(torch.randn(4, 96), layer.values, layer.bias)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_say_what_is_needed() -> None:
    t = tensors(random_packed(40, 24, (16, 16)), torch.float32)
    with pytest.raises(ShapeError, match=r"x has shape \(3, 25\).*\(\.\.\., 24\)"):
        packed_linear(torch.zeros(3, 25), *t, k=24)
    with pytest.raises(ShapeError, match=r"bias has shape \(39,\).*\(40,\)"):
        packed_linear(torch.zeros(3, 24), *t, torch.zeros(39), k=24)
    bias = torch.zeros(40)
    with pytest.raises(DeviceError, match=r"x is on meta, values on cpu"):
        packed_linear(torch.zeros(3, 24, device="meta"), *t, bias, k=24)
    with pytest.raises(DeviceError, match=r"x is on cpu, bias on meta"):
        packed_linear(torch.zeros(3, 24), *t, bias.to("meta"), k=24)
    with pytest.raises(ArgumentError, match=r"activation is 'tanh'.*relu, gelu, silu"):
        packed_linear(torch.zeros(3, 24), *t, k=24, activation="tanh")
    with pytest.raises(ArgumentError, match="layout is 'row'"):
        packed_linear(torch.zeros(3, 24), *t, k=24, layout="row")
    with pytest.raises(DtypeError, match=r"x is torch\.int64"):
        packed_linear(torch.zeros(3, 24, dtype=torch.int64), *t, k=24)
    with pytest.raises(DtypeError, match=r"layer enc\.fc: x is torch\.float64, the layer torch\.float32"):
        make_layer(name="enc.fc")(torch.zeros(2, 96, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"layer enc.fc: x has shape \(2, 95\)"):
        make_layer(name="enc.fc")(torch.zeros(2, 95))


@pytest.mark.parametrize("bad", ["index", "order", "perm", "indptr"])
def test_damaged_tensors_never_reach_a_kernel(bad: str) -> None:
    values, indices, indptr, row_perm = (a.clone() for a in tensors(random_packed(40, 24, (16, 16)), torch.float32))
    if bad == "index":
        indices[-1] = 24
    elif bad == "order":
        indices[int(indptr[1])] = 23
    elif bad == "perm":
        row_perm[0] = row_perm[1]
    else:
        indptr[1] = int(indptr[-1]) + 1
    with pytest.raises(FormatError):
        packed_linear(torch.zeros(3, 24), values, indices, indptr, row_perm, k=24)
