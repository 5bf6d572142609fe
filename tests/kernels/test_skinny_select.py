"""Which few-column kernel is taken: measured here first, else the rule; entries that do not fit are passed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shflnb.kernels import remembered
from shflnb.kernels.config import Config, Problem
from shflnb.kernels.registry import all_specs
from shflnb.kernels.skinny_config import SkinnyConfig, choose_config, config_of, takes_tokens
from shflnb.kernels.skinny_plan import kernel_spec
from shflnb.kernels.skinny_select import LAYOUTS, choose_few, few_candidates, few_key, fits_few

PROBLEM = Problem(4096, 4096, 8, 64, "bfloat16", 64 * 1024, 1024)
TILES = 64 * 16


@pytest.mark.parametrize("v", [16, 32, 64, 128])
@pytest.mark.parametrize("n", [1, 16, 17, 64])
def test_candidates_fit_and_are_known(v: int, n: int) -> None:
    known = {spec.key for spec in all_specs("sm_90a")}
    for layout in LAYOUTS:
        found = few_candidates(v, n, "float16", layout)
        assert found and len(set(found)) == len(found)
        for config in found:
            assert fits_few(config, v, n, "float16", layout) and kernel_spec(config).key in known
    token, feature = (set(few_candidates(v, n, "float16", layout)) for layout in ("token", "feature"))
    assert feature == {config for config in token if not config.token_major}
    assert (token != feature) == (n <= 16 or (v == 64 and n <= 32))


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (config_of(64, 16, 2, "float16", 2), LAYOUTS), (config_of(64, 64, 2, "float16", 2), LAYOUTS),
        (config_of(64, 16, 2, "float16", 2, token_major=True), ("token",)), (config_of(64, 16, 2, "bfloat16", 2), ()),
        (config_of(32, 16, 2, "float16", 2), ()), (config_of(64, 16, 2, "float16", 2, parts=True), ()),
    ],
)  # fmt: skip
def test_what_a_kernel_can_take(config: SkinnyConfig, fits: tuple[str, ...]) -> None:
    assert tuple(layout for layout in LAYOUTS if fits_few(config, 64, 16, "float16", layout)) == fits
    assert config.chunks == 8 or not fits_few(config, 64, 17, "float16", "token")


def test_without_a_measurement_the_rule_decides() -> None:
    for layout in LAYOUTS:
        for n in (1, 8, 16, 17, 40):
            problem = replace(PROBLEM, n=n)
            choice = choose_few(problem, TILES, 132, layout, {})
            token_major = layout == "token" and takes_tokens(4096, 4096, n, 64, 0.25)
            rule = choose_config(64, n, 64, TILES, "bfloat16", 132, token_major=token_major,
                                 is_turned=layout == "token" and not token_major)  # fmt: skip
            assert choice.config == rule
            assert choice.reason == "the rule"


def test_what_was_measured_comes_first_for_its_layout_and_its_n() -> None:
    other = config_of(64, 8, 4, "float16", 2)
    assert few_key(PROBLEM, "token") == "few v64 m4096 k4096 n8 d4 token"
    table = {few_key(PROBLEM, "token"): remembered.entry_of(replace(other, epilogue="gelu"))}
    found = choose_few(PROBLEM, TILES, 132, "token", table)
    assert found.config == replace(other, dtype="bfloat16") and found.reason == "tuned here"
    assert choose_few(replace(PROBLEM, n=5), TILES, 132, "token", table).config == found.config
    elsewhere = (
        (PROBLEM, "feature"), (replace(PROBLEM, n=4), "token"), (replace(PROBLEM, n=9), "token"),
        (replace(PROBLEM, columns=32 * 1024), "token"), (replace(PROBLEM, k=4100), "token"),
    )  # fmt: skip
    for problem, layout in elsewhere:
        assert choose_few(problem, TILES, 132, layout, table).reason == "the rule"


def test_an_entry_that_cannot_take_the_call_is_passed_over() -> None:
    table = {few_key(PROBLEM, "feature"): remembered.entry_of(config_of(64, 8, 2, "float16", 2, token_major=True))}
    assert choose_few(PROBLEM, TILES, 132, "feature", table).reason == "the rule"
    wide = replace(PROBLEM, n=30)
    table = {few_key(wide, "token"): remembered.entry_of(config_of(64, 16, 2, "float16", 2))}
    assert choose_few(wide, TILES, 132, "token", table).reason == "the rule"


def test_both_kinds_of_entries_are_kept_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHFLNB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(remembered, "_TABLES", {})
    few, tile = config_of(64, 8, 4, "float16", 2), Config("sm90", 64, 256, 64, 4)
    entries = {few_key(PROBLEM, "token"): remembered.entry_of(few), "v64 m1 k1 n128 d4": remembered.entry_of(tile)}
    assert remembered.store("a gpu", entries)
    monkeypatch.setattr(remembered, "_TABLES", {})
    assert remembered.load("a gpu") == entries


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("few v32 m1 k1 n8 d4 token", {}), ("v64 m1 k1 n8 d4", {}), ("few v64x m1", {}), ("few", {}),
        ("few v64 m1 k1 n8 d4 token", {"ranks": 3}), ("few v64 m1 k1 n8 d4 token", {"warps": 3}),
        ("few v64 m1 k1 n8 d4 token", {"v": 32}),
    ],
)  # fmt: skip
def test_damaged_entries_count_as_none(key: str, change: dict[str, Any]) -> None:
    good = remembered.entry_of(config_of(64, 8, 4, "float16", 2))
    kept = {"few v64 m1 k1 n8 d4 feature": good}
    assert remembered.valid_entries({key: {**good, **change}, **kept}) == kept
