"""The products on CUDA arrays: exactness, promise 2 on thousands of shapes, NaN, memory, strides, determinism.

References are computed on the GPU in float64 from the fields of the packed matrix, and read once per test.
"""

# ruff: noqa: E402  (what is imported needs torch and numba-cuda, and the tests skip without them)

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba.cuda", reason="needs numba-cuda (extra cu12 or cu13)")

import gpu_cases as cases
from gpu_cases import ACTIVATION_OF, DTYPE_NAMES, Guarded, Verdicts, dense_of, equal_packed, expected, random_packed

from shflnb.errors import ArgumentError
from shflnb.kernels.config import EPILOGUES, Config
from shflnb.kernels.launch import device_context
from shflnb.kernels.memo import FewColumnsMemo, ProductMemo
from shflnb.kernels.spmm_device import device_linear, device_matmul
from shflnb.kernels.spmm_plan import tokens_at_once

pytestmark = pytest.mark.gpu

KERNELS = ("sm90", "sm80")
HEIGHTS = (16, 32, 64, 128)


def exact_cases() -> list[tuple[Config, str]]:
    """(config, epilogue): every kernel, v, dtype and epilogue, the tiles taken in turns; every tile in plain."""
    found = []
    for v, dtype in itertools.product(HEIGHTS, DTYPE_NAMES):
        for kernel in KERNELS:
            tiles = [c for c in cases.configs(dtype, v) if c.kernel == kernel]
            found += [(c, "plain") for c in tiles]
            found += [(tiles[i % len(tiles)], e) for i, e in enumerate(EPILOGUES[1:]) if tiles]
    return found


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    cases.prebuild(config.with_epilogue(epilogue) for config, epilogue in exact_cases())


def integers(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-2, 3, shape).astype(np.float32)).cuda().to(getattr(torch, dtype))


def normal(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", dtype=torch.float32, generator=generator).to(getattr(torch, dtype))


def test_small_integers_are_exact() -> None:
    """Every kernel, v, dtype, epilogue and tile; sums of at most 32 products of -2..2 are exact in bfloat16 too."""
    seen = Verdicts()
    for number, (config, epilogue) in enumerate(exact_cases()):
        for m, k, n in ((config.v * 2 + 3, 71, config.tile_n + 5), (5, 3, 1), (config.v, 64, 8)):
            rng = np.random.default_rng(number)
            lengths = [int(c) for c in rng.integers(0, min(k, 32) + 1, -(-m // config.v))]
            packed = random_packed(m, k, config.v, lengths, config.dtype, number, integers=True)
            x = integers((k, n), config.dtype, number)
            bias = residual = None
            if epilogue != "plain":
                bias = integers((m,), "float32" if number % 2 else config.dtype, number + 1)
                residual = integers((m, n), config.dtype, number + 2)
            activation = ACTIVATION_OF[epilogue]
            y = device_matmul(packed, x, bias=bias, activation=activation, residual=residual, config=config)
            want = expected(dense_of(packed), x, bias, activation, residual)
            name = f"{config.name} {epilogue} {m} x {k} x {n}"
            if epilogue in ("gelu", "silu"):
                seen.add(name, y, want)
            else:
                seen.same(name, (y.double() == want.reference).all())
    assert len(seen.names) >= 240
    seen.check()


def test_error_rule_on_thousands_of_shapes() -> None:
    """Promise 2 on 15 matrices x 14 widths for every config: 5,040 products on an H200, some into guarded memory."""
    seen = Verdicts()
    for number, in_dtypes in enumerate(zip(*(cases.configs(dtype) for dtype in DTYPE_NAMES), strict=True)):
        for place, (m, k) in enumerate(cases.error_cases(in_dtypes[0].v)):
            config = in_dtypes[(number + place) % 2]
            dtype = config.dtype
            packed = random_packed(m, k, config.v, dtype=dtype, seed=place)
            columns = cases.widths(config.tile_n)
            x = normal((k, -(-max(columns) // 8) * 8), dtype, place)
            want = expected(dense_of(packed), x)
            for turn, n in enumerate(columns):
                name = f"{config.name} {m} x {k} x {n}"
                given = x[:, :n] if (turn + place) % 2 else x[:, :n].contiguous()
                if turn % 3 == 0:
                    out = Guarded(m, n, dtype, ld=None if turn % 2 else n, shift=turn % 2)
                    y = device_matmul(packed, given, out=out.matrix, config=config).clone()
                    seen.add(name, y, want, n, out.intact())
                else:
                    seen.add(name, device_matmul(packed, given, config=config), want, n)
    if torch.cuda.get_device_capability()[0] == 9:
        assert len(seen.names) >= 5000
    seen.check()


@pytest.mark.parametrize("epilogue", EPILOGUES[1:])
def test_epilogues_keep_the_error_rule(epilogue: str) -> None:
    """bias of either dtype or none, residual or none, on the tiles of the exactness test."""
    seen = Verdicts()
    activation = ACTIVATION_OF[epilogue]
    for number, (config, own) in enumerate(exact_cases()):
        if own != epilogue:
            continue
        for m, k, n in ((3 * config.v - 7, 300, 531), (2 * config.v, 256, 512)):
            packed = random_packed(m, k, config.v, dtype=config.dtype, seed=number)
            x = normal((k, n), config.dtype, number) * 0.1
            for has_bias, has_residual in (
                (None, True),
                ("float32", False),
                (config.dtype, True),
                (config.dtype, False),
            ):
                bias = normal((m,), has_bias, 1) if has_bias else None
                residual = normal((m, n), config.dtype, 2) if has_residual else None
                y = device_matmul(packed, x, bias=bias, activation=activation, residual=residual, config=config)
                name = f"{config.name} {epilogue} {m} x {k} x {n} bias {has_bias} residual {has_residual}"
                seen.add(name, y, expected(dense_of(packed), x, bias, activation, residual))
    assert seen.names
    seen.check()


def test_the_chosen_config_is_right_without_help() -> None:
    """What `choose` takes for layer sizes, without config=."""
    seen = Verdicts()
    for v, dtype, (m, k, n) in itertools.product(
        HEIGHTS, DTYPE_NAMES, ((1024, 1024, 960), (4096, 1024, 128), (320, 4096, 65), (768, 3072, 3))
    ):
        packed = random_packed(m, k, v, dtype=dtype, seed=v)
        x, bias = normal((k, n), dtype), normal((m,), dtype, 3)
        seen.add(f"v{v} {dtype} {m} x {k} x {n}", device_matmul(packed, x), expected(dense_of(packed), x))
        y = device_matmul(packed, x, bias=bias, activation="relu")
        seen.add(f"v{v} {dtype} {m} x {k} x {n} relu", y, expected(dense_of(packed), x, bias, "relu"))
    seen.check()


# --- what a pruned place must not do ---------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_exactly_the_groups_that_keep_the_column(bad: float) -> None:
    """Also when shared memory still holds the NaN of a launch before: padding reads zeros, not what was there."""
    seen = Verdicts()
    for number, config in enumerate(cases.configs() + cases.configs("bfloat16")):
        m, k, n = 3 * config.v + 5, 150, config.tile_n + 9
        packed = random_packed(m, k, config.v, dtype=config.dtype, seed=number)
        kept = dense_of(packed, "kept")
        x = normal((k, n), config.dtype, number)
        clean = device_matmul(packed, x, config=config)
        device_matmul(packed, torch.full_like(x, float("nan")), config=config)  # poisons shared memory and registers
        unused = x.clone()
        unused[kept.sum(0) == 0] = bad
        unused[:, n // 2] = bad  # a token that is bad in every feature spoils its own column only
        y = device_matmul(packed, unused, config=config)
        rest = torch.arange(n, device="cuda") != n // 2
        seen.same(f"{config.name} unused rows", (y[:, rest] == clean[:, rest]).all())
        spots = torch.zeros(k, n, device="cuda")
        spots[number % k, ::3] = 1
        spots[(7 * number + 3) % k, 1] = 1
        y = device_matmul(packed, torch.where(spots > 0, torch.full_like(x, float("nan")), x), config=config)
        seen.same(f"{config.name} placement", (torch.isnan(y) == (kept @ spots > 0)).all())
        seen.same(f"{config.name} elsewhere", ((y == clean) | torch.isnan(y)).all())
    seen.check()


def test_nan_in_weights_bias_and_residual_follow_ieee() -> None:
    config = cases.configs(v=64)[0]
    packed = equal_packed(128, 96, 64, 40)
    packed.values[3, 5] = np.nan
    x, bias, residual = normal((96, 24), "float16"), normal((128,), "float16"), normal((128, 24), "float16")
    weight_row, bias_row, residual_row = (int(packed.row_perm[i]) for i in (5, 20, 30))
    bias[bias_row], residual[residual_row, 11] = float("nan"), float("inf")
    for activation in (None, "relu", "gelu", "silu"):
        y = device_matmul(packed, x, bias=bias, activation=activation, residual=residual, config=config)
        assert torch.isnan(y[weight_row]).all(), activation
        assert torch.isnan(y[bias_row]).all(), activation
        assert float(y[residual_row, 11]) == float("inf"), activation
        assert int(torch.isnan(y).any(1).sum()) == 2, activation


def test_empty_groups_and_empty_matrices_give_the_epilogue_of_zero() -> None:
    for config in cases.configs():
        packed = random_packed(2 * config.v + 1, 70, config.v, [0, 0, 0])
        x, bias = (
            torch.full((70, 50), float("nan"), dtype=torch.float16, device="cuda"),
            normal((packed.shape[0],), "float16"),
        )
        out = torch.full((packed.shape[0], 50), float("nan"), dtype=torch.float16, device="cuda")
        assert bool((device_matmul(packed, x, out=out, config=config) == 0).all()), config.name
    y = device_matmul(packed, x, bias=bias, activation="relu")
    assert bool((y == torch.relu(bias)[:, None]).all())
    for m, k, n in ((0, 8, 8), (8, 0, 8), (8, 8, 0)):
        packed = random_packed(m, k, 16, [0] * -(-m // 16))
        y = device_matmul(packed, torch.ones(k, n, dtype=torch.float16, device="cuda"))
        assert tuple(y.shape) == (m, n) and bool((y == 0).all())
        y = device_linear(torch.ones(n, k, dtype=torch.float16, device="cuda"), packed)
        assert tuple(y.shape) == (n, m) and bool((y == 0).all())


# --- memory ----------------------------------------------------------------------------------------------------------
def layouts_of(x: Any) -> dict[str, Any]:
    """The same (k, n) values in every memory order a caller may have."""
    k, n = x.shape
    wide = torch.full((k, n + 13), float("nan"), dtype=x.dtype, device="cuda")
    wide[:, 3 : n + 3] = x
    room = torch.full((k * n + 1,), float("nan"), dtype=x.dtype, device="cuda")
    room[1:] = x.reshape(-1)
    rows = torch.full((2 * k, n), float("nan"), dtype=x.dtype, device="cuda")
    rows[::2] = x
    columns = torch.full((k, 2 * n), float("nan"), dtype=x.dtype, device="cuda")
    columns[:, ::2] = x
    return {
        "contiguous": x.contiguous(),
        "a window": wide[:, 3 : n + 3],
        "misaligned by one value": room[1:].view(k, n),
        "every other row": rows[::2],
        "every other column": columns[:, ::2],
        "transposed": x.T.contiguous().T,
        "one column for all": x[:, :1].expand(k, n),
        "one row for all": x[:1].expand(k, n),
    }


@pytest.mark.parametrize("n", [1, 24, 37])
def test_any_strides_of_x_out_and_residual(n: int) -> None:
    seen = Verdicts()
    packed = random_packed(150, 90, 64, seed=4)
    w = dense_of(packed)
    for name, x in layouts_of(normal((90, n), "float16")).items():
        seen.add(f"x {name}", device_matmul(packed, x), expected(w, x))
    x = normal((90, n), "float16", 1)
    for name, residual in layouts_of(normal((150, n), "float16", 2)).items():
        seen.add(f"residual {name}", device_matmul(packed, x, residual=residual), expected(w, x, residual=residual))
    for name, out in layouts_of(torch.full((150, n), float("nan"), dtype=torch.float16, device="cuda")).items():
        if "for all" not in name:
            assert device_matmul(packed, x, out=out) is out
            seen.add(f"out {name}", out.clone(), expected(w, x))
            before = normal((150, n), "float16", 5)
            out.copy_(before)
            device_matmul(packed, x, residual=out, out=out)
            seen.add(f"in place, {name}", out.clone(), expected(w, x, residual=before))
    seen.check()


def test_nothing_outside_out_is_written() -> None:
    """Every config, odd sizes, aligned and misaligned out; memory before, between and behind rows keeps its marks."""
    seen = Verdicts()
    for config in cases.configs():
        packed = random_packed(2 * config.v + 3, 40, config.v, seed=1)
        w = dense_of(packed)
        for n, ld, shift in ((13, 24, 0), (13, 13, 0), (16, 24, 1), (config.tile_n + 1, None, 0), (1, 8, 3)):
            x = normal((40, n), "float16", n)
            residual = normal((packed.shape[0], n), "float16", 3)
            for extra in (None, residual):
                out = Guarded(packed.shape[0], n, "float16", ld=ld, shift=shift)
                y = device_matmul(packed, x, out=out.matrix, residual=extra, config=config).clone()
                seen.add(
                    f"{config.name} n {n} ld {ld} shift {shift}", y, expected(w, x, residual=extra), None, out.intact()
                )
    seen.check()


def test_a_vector_is_a_matrix_of_one_column() -> None:
    packed = random_packed(100, 70, 32, seed=2)
    x, bias, residual = normal((70,), "float16"), normal((100,), "float16", 1), normal((100,), "float16", 2)
    y = device_matmul(packed, x, bias=bias, activation="silu", residual=residual)
    assert tuple(y.shape) == (100,)
    seen = Verdicts()
    seen.add("vector", y[:, None], expected(dense_of(packed), x[:, None], bias, "silu", residual[:, None]))
    out = torch.empty(200, dtype=torch.float16, device="cuda")[::2]
    assert device_matmul(packed, x[:], out=out) is out
    seen.add("strided vector", out.clone()[:, None], expected(dense_of(packed), x[:, None]))
    seen.check()


# --- linear ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("lead", [(1,), (3,), (65,), (2, 37), (4, 3, 8), ()])
def test_linear_is_the_meaning_of_torch_linear(lead: tuple[int, ...], dtype: str) -> None:
    seen = Verdicts()
    for v, (m, k) in itertools.product((32, 128), ((200, 96), (131, 77), (64, 1), (1, 64))):
        packed = random_packed(m, k, v, dtype=dtype, seed=v)
        w = dense_of(packed)
        x, bias, residual = normal((*lead, k), dtype), normal((m,), dtype, 1), normal((*lead, m), dtype, 2)
        columns = x.reshape(-1, k).T
        for activation, layout in ((None, "token"), ("gelu", "token"), ("relu", "feature")):
            for b, r in ((None, None), (bias, residual)):
                for _ in range(2):  # the second call takes the short road of remembered shapes
                    y = device_linear(x, packed, b, activation=activation, residual=r, layout=layout)
                assert tuple(y.shape) == (*lead, m)
                if layout == "feature" and m > 1 and lead != () and y.reshape(-1, m).shape[0] > 1:
                    assert y.stride()[-1] > 1
                flat = None if r is None else r.reshape(-1, m).T
                name = f"v{v} {m} x {k} {activation} {layout} {b is not None}"
                seen.add(name, y.reshape(-1, m).T, expected(w, columns, b, activation, flat))
        out = torch.full((*lead, m), float("nan"), dtype=x.dtype, device="cuda")
        assert device_linear(x, packed, out=out) is out
        seen.add(f"v{v} {m} x {k} out", out.reshape(-1, m).T, expected(w, columns))
    seen.check()


def test_linear_takes_the_view_that_linear_returned() -> None:
    """feature-major between layers: the second product reads the first one's view without a copy."""
    first, second = random_packed(96, 64, 32, seed=1), random_packed(80, 96, 32, seed=2)
    x = normal((40, 64), "float16") * 0.1
    hidden = device_linear(x, first, activation="relu", layout="feature")
    assert hidden.stride() == (1, 40)
    y = device_linear(hidden, second)
    seen = Verdicts()
    seen.add("chain", y.T, expected(dense_of(second), hidden.T))
    seen.check()


@pytest.mark.parametrize("n", [8, 16, 40, 200])
def test_results_given_again_and_again(n: int) -> None:
    """The first call remembers what the next ones launch; another result is written by the same launches."""
    seen = Verdicts()
    packed = random_packed(640, 512, 64, seed=n)
    x = normal((n, 512), "float16")
    feature, want = x.T.contiguous(), expected(dense_of(packed), x.T)
    for number in range(3):
        token_out, feature_out = (torch.full(shape, float("nan"), dtype=x.dtype, device="cuda")
                                  for shape in ((n, 640), (640, n)))  # fmt: skip
        assert device_linear(x, packed, out=token_out) is token_out
        assert device_matmul(packed, feature, out=feature_out) is feature_out
        seen.add(f"linear {n} {number}", token_out.T, want)
        seen.add(f"matmul {n} {number}", feature_out, want)
        kept = [memo for memo in packed.launch_cache.values() if isinstance(memo, FewColumnsMemo | ProductMemo)]
        assert len(kept) == 2
    seen.check()
    both = torch.zeros(640 * n, dtype=x.dtype, device="cuda")
    with pytest.raises(ArgumentError, match="overlaps"):
        device_matmul(packed, both[: 512 * n].view(512, n), out=both.view(640, n))


@pytest.mark.parametrize("v", [64, 128])
def test_linear_in_parts_of_the_tokens(v: int) -> None:
    """x larger than L2, the last part cut: the long road, the short one and a given out, against the same product."""
    context = device_context(0)
    m, k, n = 4090, 8192, 8187
    packed = equal_packed(m, k, v, 192, seed=v)
    if context.capability[0] == 9:
        assert tokens_at_once(packed, context, n) < n
    x, bias = normal((n, k), "float16"), normal((m,), "float16", 1)
    seen = Verdicts()
    want = expected(dense_of(packed), x.T, bias, "relu", None)
    long_road, short_road = (device_linear(x, packed, bias, activation="relu") for _ in range(2))
    seen.add(f"v{v} long road", long_road.T, want)
    seen.add(f"v{v} short road", short_road.T, want)
    wide = torch.full((n, m + 6), float("nan"), dtype=x.dtype, device="cuda")
    device_linear(x, packed, bias, activation="relu", out=wide[:, :m])
    seen.same(f"v{v} the same bits", (long_road == short_road).all())
    seen.same(f"v{v} out of another pitch", (wide[:, :m] == long_road).all() & wide[:, m:].isnan().all())
    seen.check()


# --- the same bits every time ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("v", HEIGHTS)
def test_two_hundred_repeats_beside_another_kernel_give_the_same_bits(v: int) -> None:
    noise_stream = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    for config in cases.configs(v=v):
        packed = random_packed(5 * v + 3, 700, v, seed=v)
        x = normal((700, 333), "float16")
        first = device_matmul(packed, x, config=config)
        same = torch.ones((), dtype=torch.bool, device="cuda")
        for turn in range(200):
            if turn % 10 == 0:
                with torch.cuda.stream(noise_stream):
                    torch.mm(noise, noise)
            y = device_matmul(packed, x, config=config)
            same &= (y.view(torch.int16) == first.view(torch.int16)).all()
        assert bool(same), config.name


def test_columns_do_not_depend_on_their_neighbours() -> None:
    """A token's result has the same bits whatever else is in the batch, as long as the config is the same."""
    for config in cases.configs():
        packed = random_packed(3 * config.v, 200, config.v, seed=3)
        x = normal((200, 100), "float16")
        whole = device_matmul(packed, x, config=config)
        part = device_matmul(packed, x[:, 24:61], config=config)
        assert bool((whole[:, 24:61] == part).all()), config.name


# --- more than 2^31 elements -----------------------------------------------------------------------------------------
def big(rows: int, cols: int) -> Any:
    """Random float16 in place, without float32 beside it."""
    return torch.empty(rows, cols, dtype=torch.float16, device="cuda").normal_(0, 1)


def enough_memory(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, found {free:.0f}")


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_of_more_than_2_to_31_elements(kernel: str) -> None:
    enough_memory(16)
    m, k, n = 65600, 64, 32840
    config = next(c for c in cases.configs(v=128) if c.kernel == kernel)
    packed = random_packed(m, k, 128, [24] * -(-m // 128))
    x = big(k, n)
    y = device_matmul(packed, x, config=config)
    assert y.numel() > 2**31
    rows = torch.tensor([0, 1, 127, 32767, 32768, 65391, 65407, 65535, 65536, m - 1], device="cuda")
    seen = Verdicts()
    seen.add("rows", y[rows], expected(dense_of(packed)[rows], x))
    seen.add("last columns", y[:, -9:], expected(dense_of(packed), x[:, -9:]))
    seen.check()


@pytest.mark.parametrize(("n", "shift"), [(24576, 0), (30672, 0), (30688, 0), (32768, 0), (32760, 1)])
def test_activations_of_more_than_2_to_31_bytes_and_elements(n: int, shift: int) -> None:
    """Beyond 2^31 bytes, just under and over 2^32, and (shifted by one value) through the copy of misaligned arrays."""
    enough_memory(20)
    k = 70000
    packed = random_packed(96, k, 32, [64, 64, 64])
    packed.indices[-1] = k - 1
    memory = big(k, n + shift)
    x = memory[:, shift:]
    assert x.numel() > (2**31 if n > 30680 else 2**30)
    used = torch.from_numpy(np.unique(packed.indices).astype(np.int64)).cuda()
    seen = Verdicts()
    for kernel in KERNELS:
        config = next((c for c in cases.configs(v=32) if c.kernel == kernel), None)
        if config is not None:
            seen.add(kernel, device_matmul(packed, x, config=config), expected(dense_of(packed)[:, used], x[used]))
    seen.check()


def test_token_major_arrays_of_more_than_2_to_31_elements() -> None:
    enough_memory(24)
    n, k = 70000, 32768
    packed = random_packed(64, k, 64, [128])
    packed.indices[-1] = k - 1
    x = big(n, k)
    used = torch.from_numpy(packed.indices.astype(np.int64)).cuda()
    seen = Verdicts()
    y = device_linear(x, packed)
    seen.add("linear", y.T, expected(dense_of(packed)[:, used], x[:, used].T))
    seen.check()
