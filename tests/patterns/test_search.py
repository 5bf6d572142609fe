"""The searches against the optimum, against each other, and against planted patterns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shflnb.patterns import prune
from shflnb.patterns.backend import NumpyBackend, TorchBackend, backend_of
from shflnb.patterns.columns import Budget
from shflnb.patterns.grouping import alternate, better, consecutive_labels, evaluate, group_sizes
from shflnb.patterns.paper import balanced_kmeans, pre_mask, search_paper
from shflnb.patterns.pruning import find_grouping
from shflnb.patterns.search import falling_density, plans_for
from shflnb.patterns.swaps import Schedule, anneal, tournament

XP = NumpyBackend()
TINY = [(4, 2, 4, 0.5), (6, 3, 8, 0.25), (8, 2, 6, 0.5), (8, 4, 10, 0.5)]


def layer(m: int = 96, k: int = 80, seed: int = 0) -> np.ndarray:
    """Something between structure and noise: rows of a few types, columns of different scale."""
    rng = np.random.default_rng(seed)
    types = rng.random((5, k)) ** 4
    return (types[rng.integers(0, 5, m)] + 0.5 * abs(rng.standard_normal((m, k)))).astype(np.float32)


def test_best_reaches_the_optimum_of_tiny_cases_and_never_beats_it(
    brute_force: Callable[[np.ndarray, int, int], float],
) -> None:
    hits = []
    for seed in range(24):
        m, v, k, density = TINY[seed % len(TINY)]
        s = np.random.default_rng(seed).random((m, k), dtype=np.float32) ** 2
        budget = Budget(group_sizes(m, v), k, density)
        best = brute_force(s, v, int(budget.weights // v))
        found = find_grouping(XP, s, budget, seed=seed, quality="best").kept_score
        assert found <= best * (1 + 1e-6)
        hits.append(found >= best * (1 - 1e-6))
    assert np.mean(hits) >= 0.95


@pytest.mark.parametrize("v", [16, 32, 64, 128])
@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_planted_patterns_come_back(v: int, noise: float, planted: Callable) -> None:
    # The stated level: unit weights, noise of a quarter of their standard deviation everywhere, k >= 64, 4 groups.
    w, mask = planted(4 * v, 96, v, noise, seed=v)
    found = prune(w, sparsity=0.75, block=(v, 16), round_to_tile=False, quality="fast")
    np.testing.assert_array_equal(found.mask, mask)
    groups = found.row_perm.reshape(4, v)
    assert all((mask[rows] == mask[rows[0]]).all() for rows in groups)


@pytest.mark.parametrize("noise", [0.5, 0.7, 1.0, 1.5])
def test_under_heavy_noise_the_search_keeps_at_least_what_the_planted_pattern_keeps(
    noise: float, planted: Callable
) -> None:
    w, mask = planted(256, 128, 32, noise, seed=5)
    truth = abs(w[mask]).sum() / abs(w).sum()
    assert prune(w, block=(32, 16), round_to_tile=False).retained >= truth * (1 - 1e-6)


CASES = {
    "layer": layer(),
    "noise": np.random.default_rng(1).standard_normal((96, 64)).astype(np.float32),
    "short last group": layer(90, 70, 1),
    "one row over": layer(81, 33, 2),
    "fewer rows than a group": layer(9, 64, 3),
    "one column": layer(64, 1, 4),
    "one row": layer(1, 64, 5),
    "sorted rows": np.repeat(np.eye(6, 60, dtype=np.float32), 16, axis=0) + 0.01,
    "dead rows": np.concatenate([layer(50, 64, 6), np.zeros((46, 64), dtype=np.float32)]),
    "equal rows": np.tile(layer(1, 64, 7), (64, 1)),
    "huge scale": layer(64, 64, 8) * np.float32(1e36),
    "tiny scale": layer(64, 64, 9) * np.float32(1e-36),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, {"round_to_tile": False}, {"budget": "group"}, {"sparsity": 0.9}])
def test_refined_is_never_below_paper_and_identity(name: str, options: dict) -> None:
    w = CASES[name]
    kept = {
        search: prune(w, block=(16, 16), search=search, quality="fast", **options)
        for search in ("identity", "paper", "refined")
    }
    assert kept["refined"].retained >= max(kept["identity"].retained, kept["paper"].retained) * (1 - 1e-6)
    for result in kept.values():
        assert result.density <= 1 - options.get("sparsity", 0.75) + 1e-9
        assert result.mask.sum() == round(result.density * w.size)
        s = abs(w).astype(np.float64)
        np.testing.assert_allclose(result.retained, s[result.mask].sum() / s.sum(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_better_quality_never_keeps_less(seed: int) -> None:
    w = layer(64, 48, seed)
    kept = [prune(w, block=(16, 16), seed=seed, quality=quality).retained for quality in ("fast", "default", "best")]
    assert kept[1] >= kept[0] * (1 - 1e-6) and kept[2] >= kept[1] * (1 - 1e-6)


def test_the_plans_of_a_better_quality_begin_with_those_of_a_lesser_one() -> None:
    fast, default, best = (plans_for(1024, 512, 16, quality) for quality in ("fast", "default", "best"))
    assert default[: len(fast)] == fast and best[: len(default)] == default


def test_refined_finds_structure_that_paper_misses(planted: Callable) -> None:
    w, _ = planted(256, 128, 32, 0.5, seed=1)
    refined, paper = (prune(w, block=(32, 16), search=search).retained for search in ("refined", "paper"))
    assert refined > 1.05 * paper


@pytest.mark.parametrize("search", ["identity", "paper", "refined"])
def test_same_seed_same_bits(search: str) -> None:
    w = layer(80, 64)
    a, b = (prune(w, block=(16, 16), search=search, seed=7) for _ in range(2))
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_array_equal(a.row_perm, b.row_perm)


@pytest.mark.parametrize("search", ["paper", "refined"])
@pytest.mark.parametrize("m", [96, 90])
def test_the_order_of_the_rows_does_not_matter(search: str, m: int) -> None:
    w = np.random.default_rng(3).standard_normal((m, 64)).astype(np.float32)
    shuffle = np.random.default_rng(0).permutation(m)
    a = prune(w, block=(16, 16), search=search)
    b = prune(w[shuffle], block=(16, 16), search=search)
    assert a.retained == pytest.approx(b.retained, rel=1e-6)
    np.testing.assert_array_equal(a.mask[shuffle], b.mask)


def test_paper_follows_its_recipe() -> None:
    s = layer(64, 40)
    bits = pre_mask(XP, s, 0.5)
    assert bits.sum() == 64 * 20 and s[bits == 1].min() >= s[bits == 0].max()
    sizes = group_sizes(64, 16)
    labels = balanced_kmeans(XP, bits, sizes, seed=3)
    assert np.bincount(labels).tolist() == [16] * 4
    budget = Budget(sizes, 40, 0.25)
    found = search_paper(XP, s, budget, seed=3)
    np.testing.assert_array_equal(found.labels, labels)
    sums = np.stack([s[labels == g].sum(0) for g in range(4)])
    assert found.keep.sum() == 40 and sums[found.keep].min() >= sums[~found.keep].max()


def test_balanced_kmeans_finds_clear_clusters() -> None:
    truth = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 16))
    x = (np.eye(3, 30, dtype=np.float32)[truth] * 5) + np.random.default_rng(1).random((48, 30), dtype=np.float32)
    found = [balanced_kmeans(XP, x, np.array([16, 16, 16]), seed=seed) for seed in range(5)]
    assert any(len(set(zip(labels.tolist(), truth.tolist(), strict=True))) == 3 for labels in found)


def test_alternation_and_exchanges_never_lose() -> None:
    s = np.random.default_rng(0).random((90, 50), dtype=np.float32)
    budget = Budget(group_sizes(90, 16), 50, 0.25)
    start = evaluate(XP, s, consecutive_labels(XP, budget.sizes), budget)
    turned = alternate(XP, s, start, budget)
    swapped = anneal(XP, s, turned, budget, Schedule(5, 10))
    assert start.kept_score <= turned.kept_score <= swapped.kept_score
    assert swapped.kept_score > turned.kept_score
    hot = anneal(XP, s, swapped, budget, Schedule(5, 10, 50.0))
    assert hot.kept_score >= swapped.kept_score
    assert np.bincount(hot.labels).tolist() == budget.sizes.tolist()
    assert evaluate(XP, s, hot.labels, budget).kept_score == pytest.approx(hot.kept_score, rel=1e-6)
    assert better(start, swapped) is swapped and better(swapped, swapped) is swapped


def test_falling_density_ends_on_the_budget() -> None:
    s = layer(64, 40)
    budget = Budget(group_sizes(64, 16), 40, 0.25)
    found = falling_density(XP, s, consecutive_labels(XP, budget.sizes), budget)
    assert found.keep.sum() == 40 and np.bincount(found.labels).tolist() == [16] * 4


@pytest.mark.parametrize("groups", [2, 3, 8, 9])
def test_in_a_tournament_everybody_meets_everybody_once(groups: int) -> None:
    seen = set()
    for me, partner in tournament(XP, groups, np.random.default_rng(0)):
        assert len(set(me.tolist())) == len(me)
        half = len(me) // 2
        np.testing.assert_array_equal(me[half:], partner[:half])
        seen |= {tuple(sorted(pair)) for pair in zip(me[:half].tolist(), partner[:half].tolist(), strict=True)}
    assert len(seen) == groups * (groups - 1) // 2


def test_progress_tells_of_a_retained_score_that_rises_to_the_result() -> None:
    said: list[tuple[str, float, float]] = []
    found = prune(layer(), block=(16, 16), progress=lambda *event: said.append(event))
    assert {stage for stage, _, _ in said} >= {"starts", "exchanges"}
    assert all(0 <= fraction <= 1 for _, fraction, _ in said)
    assert said[-1][2] == pytest.approx(found.retained, rel=1e-5)
    assert said[0][2] <= said[-1][2]


@pytest.mark.parametrize(
    ("m", "options"), [(64, {"step": 1}), (57, {"step": 1}), (57, {"step": 8}), (64, {"step": 1, "equal": True})]
)
def test_the_torch_backend_does_the_same_work(m: int, options: dict) -> None:
    torch = pytest.importorskip("torch")
    s = layer(m, 64)
    tensor = torch.from_numpy(s)
    xp = backend_of(tensor)
    assert isinstance(xp, TorchBackend) and isinstance(backend_of(s), NumpyBackend)
    budget = Budget(group_sizes(m, 16), 64, 0.25, **options)
    for search in ("identity", "paper", "refined"):
        there = find_grouping(xp, tensor, budget, search=search)
        here = find_grouping(XP, s, budget, search=search)
        # Other random numbers and another order of additions: the same to a per cent or so, and exact in itself.
        close = {"identity": 1e-6, "paper": 0.05, "refined": 0.01}[search]
        assert there.kept_score == pytest.approx(here.kept_score, rel=close)
        again = evaluate(XP, s, there.labels.numpy(), budget)
        assert again.kept_score == pytest.approx(there.kept_score, rel=1e-5)
        np.testing.assert_array_equal(again.keep, there.keep.numpy())


def test_the_kth_largest_of_many_values_is_found_by_their_bits() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).random((2050, 2050), dtype=np.float32) ** 8
    x[:100] = 0.25
    xp = TorchBackend(torch.device("cpu"))
    for count in (1, 5, 300_000, x.size // 2, x.size):
        assert float(xp.kth_largest(torch.from_numpy(x), count)) == XP.kth_largest(x, count)


@pytest.mark.gpu
def test_cuda_tensors_are_searched_where_they_are() -> None:
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(layer(320, 256)).cuda().bfloat16()
    kept = {search: prune(w, block=(32, 16), search=search) for search in ("identity", "paper", "refined")}
    assert kept["refined"].mask.is_cuda and kept["refined"].weight.dtype == torch.bfloat16
    assert kept["refined"].retained >= max(kept["paper"].retained, kept["identity"].retained)
    host = prune(w.cpu(), block=(32, 16))
    assert kept["refined"].retained == pytest.approx(host.retained, rel=0.01)
    again = prune(w, block=(32, 16))
    assert torch.equal(again.mask, kept["refined"].mask)
