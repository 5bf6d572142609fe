"""The public call: options, results, kinds of arrays, edges."""

from __future__ import annotations

import builtins

import ml_dtypes
import numpy as np
import pytest

import shflnb
from shflnb.errors import ArgumentError, DtypeError, MissingDependencyError, ShapeError
from shflnb.patterns import prune

RNG = np.random.default_rng(0)
W = RNG.standard_normal((100, 72)).astype(np.float32)


def check(result: shflnb.PruneResult, w: np.ndarray) -> None:
    """The result is a Shfl-BW pattern of `w`, and says the truth about itself."""
    m = w.shape[0]
    v = result.block[0]
    mask, order = np.asarray(result.mask), result.row_perm
    assert mask.dtype == bool and order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(m))
    np.testing.assert_array_equal(np.asarray(result.weight), np.where(mask, w, 0))
    assert len(result.counts) == -(-m // v)
    for g, start in enumerate(range(0, m, v)):
        rows = order[start : start + v]
        assert (mask[rows] == mask[rows[0]]).all() and mask[rows[0]].sum() == result.counts[g]
        assert (np.diff(rows) > 0).all()
    assert result.density == pytest.approx(mask.mean() if mask.size else 0.0)


@pytest.mark.parametrize("search", ["identity", "paper", "refined"])
@pytest.mark.parametrize("shape", [(100, 72), (64, 64), (17, 5), (3, 200), (1, 1), (16, 1), (0, 8), (8, 0), (0, 0)])
def test_any_shape(search: str, shape: tuple[int, int]) -> None:
    w = RNG.standard_normal(shape).astype(np.float32)
    check(prune(w, block=(16, 16), search=search, quality="fast"), w)


@pytest.mark.parametrize("search", ["identity", "paper", "refined"])
@pytest.mark.parametrize("budget", ["layer", "group"])
def test_sparsity_zero_keeps_all_and_one_keeps_nothing(search: str, budget: str) -> None:
    everything = prune(W, sparsity=0.0, block=(16, 64), search=search, budget=budget)
    assert everything.mask.all() and everything.retained == 1.0 and everything.density == 1.0
    nothing = prune(W, sparsity=1.0, block=(16, 64), search=search, budget=budget)
    assert not nothing.mask.any() and nothing.retained == 0.0 and not nothing.weight.any()
    check(nothing, W)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9, 0.98])
@pytest.mark.parametrize("budget", ["layer", "group"])
def test_lengths_are_whole_tiles_and_spend_the_density(sparsity: float, budget: str) -> None:
    w = RNG.standard_normal((128, 1024)).astype(np.float32)
    for tile_k in (16, 32):
        result = prune(w, sparsity=sparsity, block=(32, tile_k), budget=budget, quality="fast")
        step = tile_k if tile_k <= (1 - sparsity) * 1024 else 16
        assert not (result.counts % step).any()
        left = (1 - sparsity) * w.size - result.mask.sum()
        assert -1e-6 < left < 32 * step
        check(result, w)


def test_rounding_costs_little() -> None:
    w = RNG.standard_normal((256, 512)).astype(np.float32)
    rounded, free = (prune(w, block=(32, 32), round_to_tile=flag).retained for flag in (True, False))
    assert free * 0.99 <= rounded


def test_all_zero_weights_and_rows() -> None:
    zero = prune(np.zeros((40, 32), dtype=np.float32), block=(16, 16))
    assert zero.retained == 1.0
    w = W.copy()
    w[::2] = 0
    result = prune(w, block=(16, 16), round_to_tile=False)
    check(result, w)
    # 50 live rows and 50 dead ones: groups of live rows get (nearly) the whole budget.
    assert result.mask[1::2].sum() > 0.9 * result.mask.sum()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_keep_their_dtype(dtype: type) -> None:
    w = W.astype(dtype)
    result = prune(w, block=(32, 16), quality="fast")
    assert result.weight.dtype == w.dtype
    check(result, w)


def test_any_strides_and_the_input_is_not_touched() -> None:
    base = np.zeros((72, 200), dtype=np.float32)
    view = base.T[::2]
    view[...] = W
    before = base.copy()
    a, b = prune(view, block=(16, 16), quality="fast"), prune(W, block=(16, 16), quality="fast")
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_array_equal(base, before)


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.from_numpy(W).to(dtype).requires_grad_()
        result = prune(w, block=(16, 16), quality="fast")
        assert (
            result.weight.dtype == dtype and result.mask.dtype == torch.bool and isinstance(result.row_perm, np.ndarray)
        )
        assert torch.equal(result.weight, torch.where(result.mask, w.detach(), torch.zeros((), dtype=dtype)))
        same = prune(w.detach().float().numpy(), block=(16, 16), quality="fast")
        np.testing.assert_array_equal(result.mask.numpy(), same.mask)


def test_scores_steer_the_search() -> None:
    norm = np.ones(72)
    norm[:18] = 1000.0
    result = prune(W, block=(16, 16), score="activation", norm=norm, round_to_tile=False)
    assert result.mask[:, :18].all() and not result.mask[:, 18:].any()
    assert result.score == "activation"
    target = np.zeros((100, 72))
    target[:, 60:] = 1
    assert prune(W, sparsity=0.8, block=(16, 16), score=target, round_to_tile=False).mask[:, 60:].all()


def test_pack_stores_what_was_kept() -> None:
    result = prune(W, block=(32, 16))
    packed = result.pack()
    np.testing.assert_array_equal(packed.to_dense(), result.weight)
    np.testing.assert_array_equal(np.diff(packed.indptr), result.counts)
    np.testing.assert_array_equal(packed.row_perm, result.row_perm)
    assert packed.block == (32, 16)


def test_pack_keeps_zeros_that_the_mask_keeps() -> None:
    w = W.copy()
    w[:, 0] = 0
    s = abs(w)
    s[:, 0] = 100
    result = prune(w, block=(16, 16), score=s, quality="fast")
    packed = result.pack()
    np.testing.assert_array_equal(np.diff(packed.indptr), result.counts)
    np.testing.assert_array_equal(packed.to_dense(), result.weight)


def test_summary_says_what_matters() -> None:
    text = prune(W, block=(32, 16), quality="fast").summary()
    for part in ("100 x 72", "block 32 x 16", "refined (fast)", "score magnitude", "of the score", "4 groups"):
        assert part in text
    assert prune(np.zeros((0, 0), dtype=np.float32)).summary()


def test_plot_shows_before_and_after(tmp_path: object) -> None:
    pytest.importorskip("matplotlib")
    result = prune(W, block=(16, 16), quality="fast")
    path = f"{tmp_path}/mask.png"
    figure = result.plot(path)
    before, after, lengths = figure.axes
    np.testing.assert_array_equal(after.images[0].get_array(), result.mask[result.row_perm])
    np.testing.assert_array_equal(before.images[0].get_array(), result.mask)
    assert [bar.get_height() for bar in lengths.patches] == result.counts.tolist()
    with open(path, "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    result = prune(W, block=(16, 16), quality="fast")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"shflnb\[plots\]"):
        result.plot()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"block": (8, 64)}, r"block is \(8, 64\)"),
        ({"block": (64, 8)}, r"tile_k in \(16, 32, 64\)"),
        ({"block": (64,)}, "block is"),
        ({"block": 64}, "block is 64"),
        ({"sparsity": "75%"}, "sparsity is '75%'"),
        ({"search": "greedy"}, "refined, paper, identity"),
        ({"budget": "model"}, "layer, group"),
        ({"quality": "better"}, "fast, default, best"),
        ({"score": "weight"}, "magnitude, squared"),
    ],
)
def test_bad_options_are_refused(options: dict, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        prune(W, **options)


def test_bad_weights_are_refused() -> None:
    w = W.copy()
    w[5, 7] = np.nan
    with pytest.raises(ArgumentError, match=r"w\[5, 7\] is nan"):
        prune(w)
    with pytest.raises(ShapeError, match="flatten"):
        prune(np.ones((2, 2, 2)))
    with pytest.raises(DtypeError, match="list"):
        prune([[1.0, 2.0]])  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="int64"):
        prune(np.ones((2, 2), dtype=np.int64))
