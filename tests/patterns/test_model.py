from __future__ import annotations

import numpy as np
import pytest

from shflnb.errors import ArgumentError
from shflnb.patterns import prune, prune_model, share_budget

RNG = np.random.default_rng(0)
FLAT = RNG.standard_normal((64, 64)).astype(np.float32)
PEAKED = (RNG.standard_normal((48, 128)) * (np.arange(128) < 20)).astype(np.float32)
MODEL = {"encoder.0.weight": FLAT, "encoder.1.weight": PEAKED, "head": FLAT * 10}


def total_density(results: dict) -> float:
    return sum(int(r.mask.sum()) for r in results.values()) / sum(r.mask.size for r in results.values())


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("round_to_tile", [True, False])
def test_the_total_density_is_the_budget(normalise: bool, round_to_tile: bool) -> None:
    found = prune_model(
        MODEL, sparsity=0.75, block=(16, 16), quality="fast", normalise=normalise, round_to_tile=round_to_tile
    )
    assert list(found) == list(MODEL)
    assert 0.2 < total_density(found) <= 0.25 + 1e-9


def test_one_threshold_beats_the_same_sparsity_everywhere() -> None:
    shared = prune_model(MODEL, sparsity=0.75, block=(16, 16), quality="fast", normalise=False)
    even = {name: prune(w, block=(16, 16), quality="fast") for name, w in MODEL.items()}

    def kept(results: dict) -> float:
        return sum(float(abs(r.weight).sum()) for r in results.values())

    assert kept(shared) > 1.2 * kept(even)


def test_scale_counts_only_without_normalisation() -> None:
    pair = {"a": FLAT, "b": FLAT * 100}
    fair, raw = (share_budget(pair, 0.25, block=(16, 16), normalise=flag) for flag in (True, False))
    assert fair["a"] == pytest.approx(fair["b"], abs=1e-9)
    assert raw["a"] == 0.0 and raw["b"] == pytest.approx(0.5)


def test_each_pattern_has_its_own_budget() -> None:
    found = prune_model(MODEL, sparsity={"encoder": 0.75, "re:he.d": 0.5}, block=(16, 16), quality="fast")
    assert found["head"].density == pytest.approx(0.5)
    assert total_density({n: r for n, r in found.items() if n != "head"}) <= 0.25


def test_operands_of_the_score_come_by_name() -> None:
    norm = {"head": np.ones(64), "encoder.0.weight": np.arange(64.0), "encoder.1.weight": np.ones(128)}
    found = prune_model(MODEL, score="activation", norm=norm, block=(16, 16), quality="fast")
    assert found["encoder.0.weight"].mask[:, 32:].sum() > found["encoder.0.weight"].mask[:, :32].sum()
    with pytest.raises(ArgumentError, match="norm="):
        prune_model(MODEL, score="activation", norm={"head": np.ones(64)})


def test_progress_names_each_matrix() -> None:
    said: list = []
    prune_model(MODEL, block=(16, 16), quality="fast", progress=lambda *event: said.append(event))
    assert [name for name, _, _ in said] == list(MODEL) and said[-1][1] == 1.0


def test_nothing_is_left_out_silently() -> None:
    with pytest.raises(ArgumentError, match="no pattern in sparsity fits 'head'"):
        prune_model(MODEL, sparsity={"encoder": 0.5})
    with pytest.raises(ArgumentError, match="'decoder'"):
        prune_model(MODEL, sparsity={"encoder": 0.5, "head": 0.5, "decoder": 0.5})
    with pytest.raises(ArgumentError, match="regular expression"):
        prune_model(MODEL, sparsity={"re:(": 0.5})
    with pytest.raises(ArgumentError, match="sparsity"):
        prune_model(MODEL, sparsity=1.5)
    assert prune_model({}) == {}
