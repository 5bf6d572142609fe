"""matmul and linear as a caller sees them: kinds of arrays, shapes, memory orders, laws of the product, error texts."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

import shflnb
from shflnb import ops
from shflnb.arrays import DTYPES, kind_of
from shflnb.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from shflnb.formats import pack
from shflnb.kernels import spmm_cpu
from shflnb.ops import linear, matmul
from shflnb.reference import judge, matmul_definition

KINDS = ("numpy", "torch")


def make(m=100, k=70, v=32, dtype="float32", **options):
    made = strategies.make_patterned(m, k, v, dtype=dtype, **options)
    return pack(made.w, made.block, row_perm=made.row_perm, fill_in_warning=None)


def as_kind(a: np.ndarray, kind: str):
    """A NumPy array as it is, or as a tensor with the same memory and strides (torch allows no negative ones)."""
    if kind == "numpy":
        return a
    torch = pytest.importorskip("torch")
    if a.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def to_numpy(a) -> np.ndarray:
    if isinstance(a, np.ndarray):
        return a
    return a.detach().float().numpy() if str(a.dtype) == "torch.bfloat16" else a.detach().numpy()


def dtype_name(a) -> str:
    return str(a.dtype).removeprefix("torch.")


# -- meaning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul(kind, dtype):
    packed = make(dtype=dtype)
    bias = np.random.default_rng(0).standard_normal(100).astype(DTYPES[dtype])
    for shape in ((70,), (70, 0), (70, 1), (70, 5), (70, 64), (70, 131)):
        x = strategies.draw_values(np.random.default_rng(1), shape, dtype)
        y = matmul(packed, as_kind(x, kind), bias=as_kind(bias, kind), activation="gelu")
        assert kind_of(y) == kind and dtype_name(y) == dtype and tuple(y.shape) == (100, *shape[1:])
        assert to_numpy(y).flags.c_contiguous
        found = judge(y, packed, x, bias, "gelu")
        assert found.holds, f"{shape}: {found}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(kind, dtype):
    packed = make(dtype=dtype)
    bias = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    for lead, layout in itertools.product(((), (0,), (1,), (33,), (2, 3), (2, 0, 4), (3, 5, 7)), ("token", "feature")):
        x = strategies.draw_values(np.random.default_rng(1), (*lead, 70), dtype)
        y = linear(as_kind(x, kind), packed, as_kind(bias, kind), activation="silu", layout=layout)
        assert kind_of(y) == kind and dtype_name(y) == dtype and tuple(y.shape) == (*lead, 100)
        memory = to_numpy(y)
        if layout == "feature":
            memory = np.moveaxis(memory, -1, 0)
        assert memory.flags.c_contiguous, f"{lead} {layout}: strides {memory.strides}"
        found = judge(to_numpy(y).astype(DTYPES[dtype]).reshape(-1, 100).T, packed, x.reshape(-1, 70).T, bias, "silu")
        assert found.holds, f"{lead} {layout}: {found}"


def test_linear_means_torch_linear():
    torch = pytest.importorskip("torch")
    packed = make()
    x, bias = torch.randn(4, 9, 70), torch.randn(100)
    expected = torch.nn.functional.linear(x, torch.from_numpy(packed.to_dense()), bias)
    for layout in ("token", "feature"):
        torch.testing.assert_close(linear(x, packed, bias, layout=layout), expected)


def test_operator_and_public_names():
    packed, x = make(), strategies.make_activations(70, 8, "float32")
    np.testing.assert_array_equal(packed @ x, matmul(packed, x))
    assert shflnb.matmul is matmul and shflnb.linear is linear


@pytest.mark.parametrize(("m", "k"), [(0, 5), (5, 0), (0, 0), (1, 1), (17, 0)])
def test_empty_matrices(m, k):
    packed = make(m, k, 16)
    for n in (0, 1, 4, 40):
        x, bias = np.ones((k, n), np.float32), np.arange(m, dtype=np.float32)
        expected = packed.to_dense() @ x + bias[:, None]
        np.testing.assert_array_equal(matmul(packed, x, bias=bias), expected)
        np.testing.assert_array_equal(linear(x.T, packed, bias), expected.T)


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_residual(kind):
    packed, rng = make(), np.random.default_rng(0)
    x = strategies.make_activations(70, 40, "float32")
    residual = rng.standard_normal((100, 40)).astype(np.float32)
    expected = matmul(packed, x, residual=residual)
    assert judge(expected, packed, x, residual=residual).holds
    wide = np.full((200, 90), np.nan, np.float32)
    for out in (np.empty((100, 40), np.float32), np.empty((40, 100), np.float32).T, wide[::2, 5:85:2]):
        out[...] = np.nan
        given_out = as_kind(out, kind)
        assert matmul(packed, as_kind(x, kind), residual=as_kind(residual, kind), out=given_out) is given_out
        np.testing.assert_array_equal(out, expected)
        out[...] = residual
        matmul(packed, as_kind(x, kind), residual=given_out, out=given_out)
        np.testing.assert_array_equal(out, expected)
    assert np.isnan(wide[1::2]).all() and np.isnan(wide[:, 6:85:2]).all(), "something was written beside out"


@pytest.mark.parametrize("kind", KINDS)
def test_linear_out_of_any_strides(kind):
    packed = make()
    x = strategies.draw_values(np.random.default_rng(1), (3, 5, 70), "float32")
    residual = strategies.draw_values(np.random.default_rng(2), (3, 5, 100), "float32")
    expected = linear(x, packed, residual=residual)
    for out in (
        np.empty((3, 5, 100), np.float32),
        np.empty((100, 3, 5), np.float32).transpose(1, 2, 0),
        np.empty((5, 3, 100), np.float32).transpose(1, 0, 2),  # no view flattens (3, 5)
        np.empty((4, 6, 210), np.float32)[1:, 1:, 10:][:, :, ::2],
    ):
        out[...] = residual
        given_out = as_kind(out, kind)
        assert linear(as_kind(x, kind), packed, residual=given_out, out=given_out) is given_out
        np.testing.assert_array_equal(out, expected)


def test_x_of_any_strides():
    packed = make()
    x = strategies.make_activations(70, 40, "float32")
    expected = matmul(packed, x)
    wide = np.full((140, 41), np.nan, np.float32)
    wide[::2, 1:] = x
    unaligned = np.empty(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    unaligned[...] = x
    for other in (np.asfortranarray(x), wide[::2, 1:], np.ascontiguousarray(x[::-1])[::-1], unaligned):
        np.testing.assert_array_equal(matmul(packed, other), expected)
        np.testing.assert_array_equal(linear(other.T, packed), expected.T)
    column = np.broadcast_to(x[:, :1], (70, 40))
    np.testing.assert_array_equal(matmul(packed, column), np.broadcast_to(expected[:, :1], (100, 40)))
    x3 = np.ascontiguousarray(x.reshape(70, 5, 8).transpose(2, 1, 0)).transpose(1, 0, 2)  # no view flattens (5, 8)
    np.testing.assert_array_equal(linear(x3, packed), expected.T.reshape(5, 8, 100))
    unaligned_out = np.empty(expected.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(expected.shape)
    np.testing.assert_array_equal(matmul(packed, x, out=unaligned_out), expected)


def test_kinds_may_be_mixed_beside_x():
    torch = pytest.importorskip("torch")
    packed, x, bias = make(), strategies.make_activations(70, 8, "float32"), np.ones(100, np.float32)
    y = matmul(packed, x, bias=torch.from_numpy(bias))
    assert isinstance(y, np.ndarray)
    assert torch.equal(matmul(packed, torch.from_numpy(x), bias=bias), torch.from_numpy(y))


# -- laws ---------------------------------------------------------------------------------------------------------

integer_products = st.tuples(
    strategies.packed_matrices(largest=90, integers=True), strategies.sizes(60), strategies.seeds
)


@settings(deadline=None, max_examples=40)
@given(integer_products)
def test_linearity(drawn):
    """Exact for small integers: W (a x + b z) = a W x + b W z."""
    packed, n, seed = drawn
    x, z = (strategies.make_activations(packed.shape[1], n, "float32", seed + i, integers=True) for i in (0, 1))
    packed = packed.astype("float32")
    np.testing.assert_array_equal(matmul(packed, 2 * x - 3 * z), 2 * matmul(packed, x) - 3 * matmul(packed, z))


@settings(deadline=None, max_examples=40)
@given(integer_products, st.floats(0, 1))
def test_split_of_k(drawn, share):
    """Exact for small integers: W x is the sum of the products of two blocks of columns."""
    packed, n, seed = drawn
    packed = packed.astype("float32")
    w, cut = packed.to_dense(), round(share * packed.shape[1])
    x = strategies.make_activations(packed.shape[1], n, "float32", seed, integers=True)
    parts = [
        matmul(pack(w[:, part].copy(), packed.block, row_perm=packed.row_perm, fill_in_warning=None), x[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    np.testing.assert_array_equal(parts[0] + parts[1], matmul(packed, x))


@settings(deadline=None, max_examples=40)
@given(strategies.packed_matrices(largest=120), strategies.sizes(120), st.floats(0, 1), strategies.seeds)
def test_concatenation_of_n(packed, n, share, seed):
    """Bit for bit: columns side by side do not see each other, whichever kernel they go through."""
    x = strategies.make_activations(packed.shape[1], n, packed.dtype, seed)
    cut = round(share * n)
    parts = [matmul(packed, x[:, :cut], activation="gelu"), matmul(packed, x[:, cut:], activation="gelu")]
    assert np.hstack(parts).tobytes() == matmul(packed, x, activation="gelu").tobytes()
    token = linear(np.ascontiguousarray(x.T), packed, activation="gelu")
    assert np.ascontiguousarray(token.T).tobytes() == np.hstack(parts).tobytes()


@settings(deadline=None, max_examples=30)
@given(integer_products)
def test_integers_are_exact_in_every_dtype(drawn):
    packed, n, seed = drawn
    x = strategies.make_activations(packed.shape[1], n, packed.dtype, seed, integers=True)
    expected = matmul_definition(packed, x).astype(DTYPES[packed.dtype])
    np.testing.assert_array_equal(matmul(packed, x), expected)


# -- refused ------------------------------------------------------------------------------------------------------

PACKED = make(6, 4, 16)
X = np.ones((4, 3), np.float32)
READ_ONLY = np.ones((6, 3), np.float32)
READ_ONLY.flags.writeable = False
BUFFER = np.ones((10, 3), np.float32)

REFUSED = {
    "packed is dense": (
        lambda: matmul(PACKED.to_dense(), X),
        DtypeError,
        "packed is a ndarray; needed is a ShflBWMatrix, which shflnb.pack makes",
    ),
    "arguments swapped": (lambda: matmul(X, PACKED), DtypeError, "packed is a ndarray"),
    "x is a list": (lambda: matmul(PACKED, [[1.0]]), DtypeError, "x is a list; expected a NumPy array"),
    "x is a number": (lambda: linear(1.0, PACKED), DtypeError, "x is a float; expected a NumPy array"),
    "x is masked": (
        lambda: matmul(PACKED, np.ma.masked_array(X, X > 0)),
        DtypeError,
        "x is a masked array, and a product would drop the mask",
    ),
    "dtype": (
        lambda: matmul(PACKED, X.astype(np.float64)),
        DtypeError,
        "x is float64, packed is float32; make them one: packed.astype('float64')",
    ),
    "integers": (
        lambda: matmul(PACKED, X.astype(np.int64)),
        DtypeError,
        "x is int64; needed is the dtype of packed, float32",
    ),
    "byte order": (lambda: matmul(PACKED, X.astype(">f4")), DtypeError, "x is >f4; needed is the dtype of packed"),
    "rows of x": (
        lambda: matmul(PACKED, np.ones((5, 3), np.float32)),
        ShapeError,
        "x has shape (5, 3); packed is 6 x 4 and needs (k, n) or (k,) with k = 4",
    ),
    "token-major x in matmul": (lambda: matmul(PACKED, X.T), ShapeError, "k = 4; shflnb.linear takes (..., k)"),
    "three dimensions in matmul": (lambda: matmul(PACKED, np.ones((4, 3, 2), np.float32)), ShapeError, "x has shape"),
    "no dimension": (lambda: matmul(PACKED, np.float32(1)[...]), ShapeError, "x has shape ()"),
    "columns of x": (
        lambda: linear(np.ones((3, 5), np.float32), PACKED),
        ShapeError,
        "x has shape (3, 5); packed is 6 x 4 and needs (..., k) with k = 4",
    ),
    "feature-major x in linear": (lambda: linear(X, PACKED), ShapeError, "k = 4; shflnb.matmul takes (k, n)"),
    "no dimension in linear": (lambda: linear(np.float32(1)[...], PACKED), ShapeError, "x has shape ()"),
    "activation": (
        lambda: matmul(PACKED, X, activation="tanh"),
        ArgumentError,
        "activation is 'tanh'; expected None, 'relu', 'gelu' or 'silu'",
    ),
    "activation function": (
        lambda: matmul(PACKED, X, activation=np.tanh),
        ArgumentError,
        "activation is <ufunc 'tanh'>",
    ),
    "layout": (
        lambda: linear(X.T, PACKED, layout="n"),
        ArgumentError,
        "layout is 'n'; expected 'token' or 'feature'",
    ),
    "layout and out": (
        lambda: linear(X.T, PACKED, layout="feature", out=np.empty((3, 6), np.float32)),
        ArgumentError,
        "layout='feature' came together with out",
    ),
    "bias shape": (
        lambda: matmul(PACKED, X, bias=np.ones((6, 1), np.float32)),
        ShapeError,
        "bias has shape (6, 1); needed is (6,), one number per row of packed",
    ),
    "bias dtype": (
        lambda: matmul(PACKED, X, bias=np.ones(6)),
        DtypeError,
        "bias is float64; needed is the dtype of x (float32) or float32",
    ),
    "bias is a number": (lambda: matmul(PACKED, X, bias=1.0), DtypeError, "bias is a float; expected a NumPy array"),
    "residual shape": (
        lambda: linear(X.T, PACKED, residual=np.ones((6, 3), np.float32)),
        ShapeError,
        "residual has shape (6, 3); the result has (3, 6)",
    ),
    "residual dtype": (
        lambda: matmul(PACKED, X, residual=np.ones((6, 3))),
        DtypeError,
        "residual is float64; the result is float32",
    ),
    "out shape": (
        lambda: matmul(PACKED, X, out=np.ones((6, 4), np.float32)),
        ShapeError,
        "out has shape (6, 4); the result has (6, 3)",
    ),
    "out dtype": (lambda: matmul(PACKED, X, out=np.ones((6, 3))), DtypeError, "out is float64; the result is float32"),
    "out is a list": (lambda: matmul(PACKED, X, out=[]), DtypeError, "out is a list; expected a NumPy array"),
    "out is read-only": (lambda: matmul(PACKED, X, out=READ_ONLY), ArgumentError, "out is read-only"),
    "out is broadcast": (
        lambda: matmul(PACKED, X, out=np.lib.stride_tricks.as_strided(np.ones(3, np.float32), (6, 3), (0, 4))),
        ArgumentError,
        "out is a broadcast array",
    ),
    "out overlaps x": (
        lambda: matmul(PACKED, BUFFER[:4], out=BUFFER[3:9]),
        ArgumentError,
        "out overlaps x, which is still read while out is written",
    ),
    "out overlaps bias": (
        lambda: matmul(PACKED, X, bias=BUFFER[:6, 0], out=BUFFER[:6]),
        ArgumentError,
        "out overlaps bias",
    ),
    "out overlaps residual": (
        lambda: matmul(PACKED, X, residual=BUFFER[1:7], out=BUFFER[:6]),
        ArgumentError,
        "out overlaps residual in part",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, monkeypatch):
    call, error, text = REFUSED[case]

    def forbidden(*args, **kwargs):
        raise AssertionError("allocated or launched before all checks were done")

    monkeypatch.setattr(ops, "empty_like_kind", forbidden)
    monkeypatch.setattr(ops, "_spmm", forbidden)
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_interleaved_out_is_no_overlap():
    both = np.ones((6, 6), np.float32)
    packed = make(6, 6, 16)
    expected = matmul(packed, both[:, 1::2].copy())
    np.testing.assert_array_equal(matmul(packed, both[:, 1::2], out=both[:, ::2]), expected)


def test_refused_torch_arguments():
    torch = pytest.importorskip("torch")
    x, bias = torch.ones(4, 3), torch.ones(6)
    cases = [
        (lambda: matmul(PACKED, x.to_sparse()), DtypeError, r"x is a sparse torch tensor \(torch.sparse_coo\)"),
        (lambda: matmul(PACKED, x.to("meta")), DtypeError, "x is a Tensor on meta; expected a NumPy array"),
        (lambda: matmul(PACKED, x.double()), DtypeError, r"packed.astype\('float64'\)"),
        (lambda: matmul(PACKED, x.long()), DtypeError, "x is int64; needed is the dtype of packed, float32"),
        (lambda: matmul(PACKED, x, bias=bias.double()), DtypeError, "bias is float64"),
        (
            lambda: matmul(PACKED, x, out=np.ones((6, 3), np.float32)),
            DtypeError,
            "needed is the kind of array that x is",
        ),
        (lambda: matmul(PACKED, X, out=torch.ones(6, 3)), DtypeError, r"the kind of array that x is \(NumPy\)"),
        (lambda: matmul(PACKED, x, out=torch.ones(3).expand(6, 3)), ArgumentError, "out is a broadcast array"),
        (lambda: matmul(PACKED, x, out=torch._neg_view(torch.ones(6, 3))), ArgumentError, "lazily negated view"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


def test_a_negated_view_is_read_right():
    torch = pytest.importorskip("torch")
    x = torch.ones(4, 3)
    assert torch.equal(matmul(PACKED, torch._neg_view(x)), -matmul(PACKED, x))


def test_no_gradient_is_dropped_in_silence():
    torch = pytest.importorskip("torch")
    x, bias = torch.ones(4, 3), torch.ones(6)
    leaf = x.clone().requires_grad_()
    calls = [
        ("x", lambda: matmul(PACKED, leaf)),
        ("x", lambda: linear(leaf.T, PACKED)),
        ("x", lambda: linear(leaf.T * 2, PACKED)),
        ("bias", lambda: matmul(PACKED, x, bias=bias.clone().requires_grad_())),
        ("residual", lambda: matmul(PACKED, x, residual=torch.ones(6, 3, requires_grad=True))),
        ("out", lambda: matmul(PACKED, x, out=torch.ones(6, 3, requires_grad=True))),
    ]
    for what, call in calls:
        with pytest.raises(DtypeError, match=rf"{what} requires a gradient.*shflnb.nn.ShflLinear.*{what}.detach\(\)"):
            call()
        with torch.no_grad():
            assert not call().requires_grad or what == "out"
        with torch.inference_mode():
            call()
    assert torch.equal(matmul(PACKED, leaf.detach()), matmul(PACKED, x))


# -- devices ------------------------------------------------------------------------------------------------------


class DeviceArray:
    """What `__cuda_array_interface__` exporters look like from outside."""

    shape, dtype = (4, 3), np.dtype(np.float32)

    @property
    def __cuda_array_interface__(self):
        return {"shape": (4, 3), "typestr": "<f4", "data": (0, False), "version": 3}


def test_device_arrays_are_handed_on_as_they_are(monkeypatch):
    seen = []

    def record(name):
        return lambda *args, **options: seen.append((name, args, options)) or "result"

    monkeypatch.setattr(ops, "_device", lambda: types.SimpleNamespace(matmul=record("matmul"), linear=record("linear")))
    x = DeviceArray()
    assert matmul(PACKED, x, bias=1, activation="relu", residual=2, out=3) == "result"
    assert linear(x, PACKED, 1, residual=2, layout="feature") == "result"
    assert seen == [
        ("matmul", (PACKED, x), {"bias": 1, "activation": "relu", "residual": 2, "out": 3}),
        ("linear", (x, PACKED, 1), {"activation": None, "residual": 2, "out": None, "layout": "feature"}),
    ]


@pytest.mark.parametrize("what", ["bias", "residual", "out"])
def test_host_and_device_do_not_mix(what):
    with pytest.raises(DeviceError, match=f"{what} is on a CUDA device, x on the CPU"):
        matmul(PACKED, X, **{what: DeviceArray()})


# -- processes and threads ----------------------------------------------------------------------------------------


def test_numba_and_torch_are_not_imported_with_ops():
    program = (
        "import sys, numpy as np, shflnb, shflnb.ops, shflnb.formats\n"
        "assert not {'torch', 'numba', 'llvmlite'} & set(sys.modules), 'imported too early'\n"
        "w = np.ones((16, 3), np.float32)\n"
        "y = shflnb.matmul(shflnb.pack(w, block=(16, 16)), np.ones((3, 20), np.float32))\n"
        "assert (y == 3).all() and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_from_several_threads(monkeypatch):
    monkeypatch.setattr(spmm_cpu, "SPAN_WORK", 1)
    packed = make(300, 200, 64)
    inputs = [strategies.make_activations(200, 30 + 40 * i, "float32", i) for i in range(4)]
    expected = [matmul(packed, x).tobytes() for x in inputs]
    fresh = make(300, 200, 64)  # no launch record yet: the threads make it at the same time
    wrong = []

    def call(i):
        for _ in range(20):
            if matmul(fresh, inputs[i]).tobytes() != expected[i]:
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
