"""The oracles agree with each other and with plain loops; the bounds let right results pass and wrong ones not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from shflnb import errors, reference
from shflnb.arrays import DTYPES
from shflnb.formats import ShflBWMatrix, pack
from shflnb.reference import (
    activate,
    error_bound,
    judge,
    matmul_core_matrices,
    matmul_definition,
    matmul_fragments,
    matmul_scipy,
    relative_error,
)

EMULATIONS = (matmul_fragments, matmul_core_matrices)
ACTIVATIONS = (None, "relu", "gelu", "silu")


def product_by_loops(packed: ShflBWMatrix, x: np.ndarray) -> np.ndarray:
    """Every stored place once, straight from the arrays of the format, in Python floats."""
    y = np.zeros((packed.shape[0], x.shape[1]))
    for g in range(packed.groups):
        for j in range(packed.indptr[g], packed.indptr[g + 1]):
            for r in range(min(packed.v, packed.shape[0] - g * packed.v)):
                row = packed.row_perm[g * packed.v + r]
                for column in range(x.shape[1]):
                    y[row, column] += float(packed.values[j, r]) * float(x[packed.indices[j], column])
    return y


def scalar_activation(name: str | None, t: float) -> float:
    if name is None:
        return t
    if name == "relu":
        return max(t, 0.0)
    if name == "gelu":
        return t * 0.5 * (1 + math.erf(t / math.sqrt(2)))
    return t / (1 + math.exp(-t))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_their_formulas(name: str | None) -> None:
    t = np.linspace(-9, 9, 101)
    expected = [scalar_activation(name, float(each)) for each in t]
    np.testing.assert_allclose(activate(t, name), expected, rtol=1e-14, atol=1e-15)
    assert np.isnan(activate(np.array([np.nan]), name)).all()


def test_unknown_activation() -> None:
    with pytest.raises(errors.ArgumentError, match="activation is 'tanh'; expected None, 'relu', 'gelu' or 'silu'"):
        activate(np.zeros(1), "tanh")


@settings(max_examples=30)
@given(strategies.packed_matrices(largest=40), st.integers(0, 5), strategies.seeds)
def test_definition_against_loops(packed: ShflBWMatrix, n: int, seed: int) -> None:
    x = strategies.make_activations(packed.shape[1], n, packed.dtype, seed)
    y = matmul_definition(packed, x)
    assert y.dtype == np.float64 and y.shape == (packed.shape[0], n)
    np.testing.assert_allclose(y, product_by_loops(packed, x), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(strategies.packed_matrices(), st.sampled_from((0, 1, 3, 8, 17)), strategies.seeds)
def test_scipy_agrees(packed: ShflBWMatrix, n: int, seed: int) -> None:
    x = strategies.make_activations(packed.shape[1], n, packed.dtype, seed)
    np.testing.assert_allclose(matmul_scipy(packed, x), matmul_definition(packed, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("emulate", EMULATIONS)
@pytest.mark.parametrize("dtype", strategies.HALF_NAMES)
@settings(max_examples=20)
@given(data=st.data())
def test_emulations_are_exact_for_small_integers(emulate: object, dtype: str, data: st.DataObject) -> None:
    packed = data.draw(strategies.packed_matrices(dtypes=(dtype,), integers=True))
    n = data.draw(st.sampled_from((0, 1, 7, 8, 9, 20)))
    tile_k = data.draw(st.sampled_from((None, 16, 48, 64)))
    x = strategies.make_activations(packed.shape[1], n, dtype, data.draw(strategies.seeds), integers=True)
    np.testing.assert_array_equal(emulate(packed, x, tile_k=tile_k), matmul_definition(packed, x))


@pytest.mark.parametrize("emulate", EMULATIONS)
@pytest.mark.parametrize("v", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", strategies.HALF_NAMES)
def test_emulations_hold_the_promise(emulate: object, v: int, dtype: str) -> None:
    packed = pack(strategies.make_patterned(3 * v + 5, 300, v, dtype=dtype, seed=v).w, (v, 32))
    x = strategies.make_activations(300, 21, dtype, seed=1)
    expected, bound = error_bound(packed, x)
    y = emulate(packed, x)
    assert 0 < relative_error(y, expected) < 1e-6, "float32 accumulation, no rounding to the input dtype yet"
    assert relative_error(y.astype(DTYPES[dtype]), expected) <= bound


@pytest.mark.parametrize("multiply", [matmul_definition, matmul_scipy, *EMULATIONS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_order(multiply: object, activation: str | None) -> None:
    """activation(W @ x + bias) + residual, for matrices and vectors."""
    packed = pack(strategies.make_patterned(37, 30, 16, dtype="float16", seed=1).w, (16, 16))
    rng = np.random.default_rng(0)
    x, bias, residual = rng.standard_normal((30, 4)), rng.standard_normal(37), rng.standard_normal((37, 4))
    x = x.astype(np.float16)
    plain = multiply(packed, x)
    expected = [
        [scalar_activation(activation, plain[i, j] + bias[i]) + residual[i, j] for j in range(4)] for i in range(37)
    ]
    np.testing.assert_allclose(multiply(packed, x, bias, activation, residual), expected, rtol=1e-12, atol=1e-12)
    vector = multiply(packed, x[:, 2], bias, activation, residual[:, 2])
    assert vector.shape == (37,)
    np.testing.assert_allclose(vector, np.array(expected)[:, 2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("multiply", [matmul_definition, *EMULATIONS])
def test_nan_reaches_exactly_the_groups_that_keep_the_column(multiply: object) -> None:
    made = strategies.make_patterned(80, 40, 16, dtype="bfloat16", density=0.3, seed=8)
    w = made.w
    w[made.row_perm[3], made.columns[0][0]] = 0  # a stored zero: 0 * NaN is NaN there
    packed = pack(w, (16, 16), row_perm=made.row_perm, mask=None)
    for column in range(40):
        x = strategies.make_activations(40, 3, "bfloat16", seed=column)
        x[column, 1] = np.nan
        y = multiply(packed, x)
        expected = np.zeros((80, 3), dtype=bool)
        for g, kept in enumerate(made.columns):
            if column in kept:
                expected[made.row_perm[16 * g : 16 * g + 16], 1] = True
        np.testing.assert_array_equal(np.isnan(y), expected)


def test_infinite_weights_follow_ieee() -> None:
    w = np.zeros((16, 4), dtype=np.float16)
    w[:, 1] = 1
    w[2, 1] = np.inf
    w[3, 1] = np.nan
    packed = pack(w, (16, 16))
    for multiply in (matmul_definition, *EMULATIONS):
        with np.errstate(invalid="ignore"):
            y = multiply(packed, np.array([[np.nan], [-2.0], [np.inf], [np.nan]], dtype=np.float16))
        assert y[2, 0] == -np.inf and np.isnan(y[3, 0]) and (np.delete(y[:, 0], [2, 3]) == -2).all()


def test_torch_activations() -> None:
    torch = pytest.importorskip("torch")
    packed = pack(strategies.make_patterned(20, 9, 16, dtype="bfloat16").w, (16, 16))
    x = torch.randn(9, 5, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    dense = torch.from_numpy(packed.to_dense().astype(np.float64))
    np.testing.assert_allclose(matmul_definition(packed, x), (dense @ x.double()).numpy(), rtol=1e-12)


class TestErrorBound:
    @settings(max_examples=40)
    @given(strategies.packed_matrices(), st.sampled_from((1, 2, 8, 33)), strategies.seeds)
    def test_a_right_result_passes(self, packed: ShflBWMatrix, n: int, seed: int) -> None:
        """Another order of the same sums, as any kernel has: columns reversed, summed in two parts."""
        x = strategies.make_activations(packed.shape[1], n, packed.dtype, seed)
        expected, bound = error_bound(packed, x)
        compute = np.float64 if packed.dtype == "float64" else np.float32
        w, half = packed.to_dense().astype(compute)[:, ::-1], packed.shape[1] // 2
        x_reversed = x.astype(compute)[::-1]
        y = w[:, :half] @ x_reversed[:half] + w[:, half:] @ x_reversed[half:]
        assert relative_error(y.astype(x.dtype), expected) <= bound

    @pytest.mark.parametrize("dtype", strategies.DTYPE_NAMES)
    def test_a_lost_column_does_not(self, dtype: str) -> None:
        packed = pack(strategies.make_patterned(128, 512, 64, dtype=dtype, seed=2).w, (64, 64))
        x = strategies.make_activations(512, 64, dtype, seed=3)
        expected, bound = error_bound(packed, x)
        assert relative_error(expected.astype(DTYPES[dtype]), expected) <= bound
        column = packed.indices[packed.indptr[1] - 1]
        rows = packed.row_perm[:64]
        missed = expected.astype(np.float64)
        missed[rows] -= np.outer(packed.to_dense().astype(np.float64)[rows, column], x[column].astype(np.float64))
        assert relative_error(missed.astype(DTYPES[dtype]), expected) > bound

    def test_accumulation_in_half_precision_does_not(self) -> None:
        packed = pack(strategies.make_patterned(64, 1024, 64, density=0.5, dtype="float16", seed=2).w, (64, 64))
        x = strategies.make_activations(1024, 32, "float16", seed=3)
        expected, bound = error_bound(packed, x)
        w, y = packed.to_dense(), np.zeros((64, 32), dtype=np.float16)
        for column in range(1024):
            y += np.outer(w[:, column], x[column])
        assert relative_error(y, expected) > bound

    @pytest.mark.parametrize(("dtype", "slack"), [("float16", 0.01), ("bfloat16", 0.001), ("float32", 0.2)])
    def test_the_bound_is_twice_the_dense_error(self, dtype: str, slack: float) -> None:
        packed = pack(strategies.make_patterned(256, 256, 64, dtype=dtype, seed=2).w, (64, 64))
        x = strategies.make_activations(256, 128, dtype, seed=3)
        expected, bound = error_bound(packed, x, activation="gelu")
        dense = packed.to_dense().astype(np.float32) @ x.astype(np.float32)
        dense = activate(dense, "gelu").astype(DTYPES[dtype])
        assert bound == pytest.approx(2 * relative_error(dense, expected), rel=slack)

    def test_integers_leave_no_room(self) -> None:
        packed = pack(strategies.make_patterned(64, 64, 64, dtype="bfloat16", integers=True).w, (64, 64))
        x = strategies.make_activations(64, 64, "bfloat16", integers=True)
        expected, _ = error_bound(packed, x)
        np.testing.assert_array_equal(matmul_fragments(packed, x), expected)
        assert expected.dtype == np.float64

    def test_float64_is_judged_in_longdouble(self) -> None:
        packed = pack(strategies.make_patterned(64, 64, 64, dtype="float64").w, (64, 64))
        x = strategies.make_activations(64, 8, "float64")
        expected, bound = error_bound(packed, x)
        assert expected.dtype == np.longdouble and bound < 1e-14

    def test_relative_error(self) -> None:
        assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0.0
        assert relative_error(np.array([3.0, 9.0]), np.array([3.0, 4.0])) == 1.0
        assert relative_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0
        assert relative_error(np.ones(2), np.zeros(2)) == float("inf")
        assert math.isnan(relative_error(np.array([np.nan]), np.ones(1)))


class TestJudge:
    def case(self, dtype: str, n: int = 64) -> tuple[ShflBWMatrix, np.ndarray]:
        packed = pack(strategies.make_patterned(128, 512, 64, dtype=dtype, seed=2).w, (64, 64))
        return packed, strategies.make_activations(512, n, dtype, seed=3)

    @settings(max_examples=60)
    @given(
        strategies.packed_matrices(), st.sampled_from((0, 1, 2, 8, 33)), st.sampled_from(ACTIVATIONS), strategies.seeds
    )
    def test_a_right_result_holds(self, packed: ShflBWMatrix, n: int, activation: str | None, seed: int) -> None:
        rng = np.random.default_rng(seed)
        (m, k), dtype = packed.shape, DTYPES[packed.dtype]
        x = strategies.make_activations(k, n, packed.dtype, seed)
        bias, residual = rng.standard_normal(m).astype(dtype), rng.standard_normal((m, n)).astype(dtype)
        compute = np.float64 if packed.dtype == "float64" else np.float32
        w, half = packed.to_dense().astype(compute)[:, ::-1], k // 2
        x_reversed = x.astype(compute)[::-1]
        y = w[:, :half] @ x_reversed[:half] + w[:, half:] @ x_reversed[half:] + bias.astype(compute)[:, None]
        y = activate(y, activation) + residual.astype(compute)
        verdict = judge(y.astype(dtype), packed, x, bias, activation, residual)
        assert verdict.holds, str(verdict)

    @pytest.mark.parametrize("dtype", strategies.DTYPE_NAMES)
    def test_one_wrong_output(self, dtype: str) -> None:
        packed, x = self.case(dtype)
        y = matmul_definition(packed, x).astype(DTYPES[dtype])
        assert judge(y, packed, x).holds
        for wrong in (1.0, np.nan, np.inf):
            broken = y.copy()
            broken[5, 7] += DTYPES[dtype].type(wrong)
            verdict = judge(broken, packed, x)
            assert not verdict.holds and verdict.where == (5, 7) and verdict.worst > 2
            assert "worst output (5, 7)" in str(verdict)

    def test_vectors_and_torch(self) -> None:
        torch = pytest.importorskip("torch")
        packed, x = self.case("bfloat16", 1)
        y = torch.from_numpy(matmul_definition(packed, x[:, 0])).bfloat16()
        assert judge(y, packed, x[:, 0]).holds
        y[9] += 2
        assert judge(y, packed, x[:, 0]).where == (9,)

    def test_nan_and_overflow_must_be_the_same(self) -> None:
        packed, x = self.case("float16")
        x[packed.indices[0], 3] = np.nan
        x[:, 4] *= 3_000
        with np.errstate(over="ignore"):
            y = matmul_definition(packed, x).astype(np.float16)
        assert np.isnan(y[:, 3]).any() and np.isinf(y[:, 4]).any() and judge(y, packed, x).holds
        for row, column in (np.argwhere(np.isnan(y))[0], np.argwhere(np.isinf(y))[0]):
            for wrong in (0.0, -y[row, column]):
                if np.isnan(wrong):
                    continue
                broken = y.copy()
                broken[row, column] = wrong
                verdict = judge(broken, packed, x)
                assert not verdict.holds and verdict.where == (row, column)


def test_nothing_of_the_kernels_is_used() -> None:
    """An oracle that shares code with what it judges is none."""
    with open(reference.__file__, encoding="utf-8") as f:
        assert "kernels" not in "".join(line for line in f if "import" in line)
