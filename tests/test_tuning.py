"""tune and explain: what they say without a GPU, the tuner's own check, the maker of the table; tuning on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_cases import random_packed
from typer.testing import CliRunner

import shflnb
from shflnb.arrays import DTYPES
from shflnb.errors import ArgumentError, DeviceError, DtypeError
from shflnb.kernels import remembered
from shflnb.kernels.config import Config, Problem
from shflnb.kernels.select import candidates, choose, table_key
from shflnb.kernels.skinny_select import LAYOUTS, few_candidates, few_key
from shflnb.kernels.spmm_plan import problem_of
from shflnb.machine import find_cuda
from shflnb.reference import matmul_definition
from shflnb.tuning.make_table import SHAPES, loss_of, pick, random_pattern, shapes_in
from shflnb.tuning.tune import Measured, Tuned, TuneReport, _Check, _widths

HAS_GPU = find_cuda().problem is None


@pytest.fixture
def packed() -> Any:
    return random_pattern(192, 160, 64, 40)


# --- tune ------------------------------------------------------------------------------------------------------------
def test_widths() -> None:
    assert _widths(5) == [5]
    assert _widths([8, 3, 8, np.int64(4)]) == [8, 3, 4]
    assert _widths(range(1, 4)) == [1, 2, 3]
    for bad in (0, -1, [], [0], [2**31], [1.5], ["8"]):
        with pytest.raises(ArgumentError, match="number of columns"):
            _widths(bad)  # type: ignore[arg-type]


def test_tune_refuses_what_it_cannot_measure(packed: Any) -> None:
    with pytest.raises(DtypeError, match=r"float32.*astype\('float16'\)"):
        shflnb.tune(packed.astype("float32"), 64)
    with pytest.raises(ArgumentError, match="nothing to measure"):
        shflnb.tune(shflnb.pack(np.zeros((0, 8), np.float16)), 64)
    packed.values[3, 3] = np.inf
    with pytest.raises(ArgumentError, match="NaN or Inf"):
        shflnb.tune(packed, 64)
    packed.values[3, 3] = 1
    if not HAS_GPU:
        with pytest.raises(DeviceError, match=r"tune measures on a CUDA GPU; found: .*shflnb\.explain"):
            shflnb.tune(packed, [64])
    else:
        with pytest.raises(DeviceError, match="device is 99"):
            shflnb.tune(packed, 64, device=99)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e3])
def test_the_tuners_check_sees_a_wrong_value(packed: Any, dtype: str, scale: float) -> None:
    with np.errstate(over="ignore"):
        values = (packed.values * np.float16(scale)).astype(DTYPES[dtype])
    given = shflnb.ShflBWMatrix(packed.shape, packed.block, packed.indptr, packed.indices, values, packed.row_perm)
    check = _Check(given, 50)
    right = matmul_definition(given, check.x).astype(DTYPES[dtype])
    assert np.isfinite(right.astype(np.float32)).all(), "far from overflow"
    assert check.worst(right) <= 1.0
    spot = (check.rows[5], check.columns[3])
    wrong = right.copy()
    wrong[spot] = float(wrong[spot]) * 1.05 + 0.05 * float(np.abs(right.astype(np.float32)).max())
    assert check.worst(wrong) > 1.0
    wrong = right.copy()
    wrong[0, 0] = np.nan
    assert check.worst(wrong) == float("inf")
    swapped = right.copy()
    swapped[check.rows] = right[np.roll(check.rows, 1)]
    assert check.worst(swapped) > 1.0


def tuned(n: int, times: dict[Config, float], before: Config) -> Tuned:
    measured = tuple(sorted((Measured(c, us, 0.1) for c, us in times.items()), key=lambda m: m.us))
    problem = Problem(192, 160, n, 64, "float16", 120, 40)
    return Tuned(
        problem, table_key(problem), before, measured, ("a_config: wrong by 7 of the bound",), measured[0], 1.25
    )


A, B, C = candidates(64, "float16", (9, 0))[:3]


def test_the_report_is_text_and_json() -> None:
    report = TuneReport("A GPU", (tuned(64, {A: 10.0, B: 8.0}, A), tuned(128, {A: 5.0}, A)), False)
    text = str(report)
    assert f"n = 64: {B.name}, 8.0 us (1.25x over {A.name}; roof 1.2 us)" in text
    assert f"n = 128: {A.name}, 5.0 us (kept; roof" in text
    assert "cache cannot be written" in text and "left out     a_config: wrong" in text
    found = json.loads(json.dumps(report.as_dict()))
    assert found["results"][0]["best"] == B.name and found["results"][0]["before_us"] == 10.0
    assert (
        json.loads(json.dumps(TuneReport("A GPU", (tuned(64, {A: 10.0}, C),), True).as_dict()))["results"][0][
            "before_us"
        ]
        is None
    )


def test_the_report_tells_layouts_of_few_columns_apart() -> None:
    problem = Problem(192, 160, 8, 64, "float16", 120, 40)
    one, two = few_candidates(64, 8, "float16")[:2]
    times = (Measured(two, 4.0, 0.1), Measured(one, 5.0, 0.1))
    report = TuneReport("A GPU", tuple(
        Tuned(problem, few_key(problem, layout), one, times, (), times[0], 1.0, layout) for layout in LAYOUTS
    ), True)  # fmt: skip
    assert f"n = 8, token-major x: {two.name}, 4.0 us (1.25x over {one.name}; roof 1.0 us)" in str(report)
    assert [r["layout"] for r in json.loads(json.dumps(report.as_dict()))["results"]] == list(LAYOUTS)


def test_the_table_takes_the_least_total_loss_of_a_bucket() -> None:
    found = [tuned(960, {A: 10.0, B: 11.0, C: 30.0}, A), tuned(1024, {A: 20.0, B: 11.0, C: 10.0}, A)]
    assert loss_of(found[0], C) == 3.0 and loss_of(found[1], B) == 1.1
    assert pick(found, [A, A]) == B
    assert pick(found, [B, B]) is None  # the rule is as good
    assert pick(found, [A, C]) is None  # the rule may differ within a bucket, and be better than any one config
    assert loss_of(tuned(64, {A: 5.0}, A), B) == 10.0


def test_the_tables_patterns_and_shapes(tmp_path: Path) -> None:
    for v in (32, 64, 128):
        packed = random_pattern(200, 96, v, 24)
        assert (packed.counts == 24).all() and packed.shape == (200, 96)
    path = tmp_path / "shapes.json"
    path.write_text(
        json.dumps({"gemm": [{"m": 1, "k": 2, "n": 64}, {"m": 1, "k": 2, "n": 64}, {"m": 1, "k": 2, "n": 8}]})
    )
    assert shapes_in(path) == [(1, 2, 64)]
    assert len(set(SHAPES)) == len(SHAPES)


def test_the_command_refuses_what_the_function_refuses(packed: Any, tmp_path: Path) -> None:
    from shflnb.cli import app

    shflnb.save(packed, tmp_path / "w.safetensors")
    for arguments in (["--n", "0"], ["--n", "64", "--device", "99"]):
        done = CliRunner().invoke(app, ["tune", str(tmp_path / "w.safetensors"), *arguments])
        assert done.exit_code != 0 and isinstance(done.exception, (ArgumentError, DeviceError))


# --- explain ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["H200", "a100", "RTX 4090", "B200"])
def test_explain_names_what_would_run(packed: Any, device: str) -> None:
    found = shflnb.explain(packed, 4096, device=device)
    assert device.lower() in found.device.lower()
    assert found.registers is None and not found.is_here
    capability = {"H200": (9, 0), "a100": (8, 0), "RTX 4090": (8, 9), "B200": (10, 0)}[device]
    config = choose(problem_of(packed, 4096), capability, 132).config if device == "H200" else None
    if config is not None:
        assert found.config == config.name and found.smem_bytes == config.smem_bytes and found.threads == config.threads
    assert ("wgmma" in found.kernel) == (device == "H200")
    assert found.predicted_us > found.roof_us > 0
    assert found.blocks_per_sm >= 1 and found.blocks >= 1
    text = str(found)
    for part in (
        found.config,
        "not compiled here",
        "a prediction",
        f"{found.smem_bytes:,} bytes",
        "on the CPU",
        found.cpu,
    ):
        assert part in text
    assert json.loads(json.dumps(found.as_dict()))["n"] == 4096


@pytest.mark.skipif(HAS_GPU, reason="about machines without a GPU")
def test_explain_without_a_gpu_is_about_an_h200(packed: Any) -> None:
    assert shflnb.explain(packed, 64).device == "NVIDIA H200"
    with pytest.raises(DeviceError, match=r"device is 0; found: .*NVIDIA H200"):
        shflnb.explain(packed, 64, device=0)


def test_explain_takes_float32_for_the_cpu(packed: Any) -> None:
    found = shflnb.explain(packed.astype("float32"), 300, device="H200")
    assert found.dtype == "float16" and "float32" in found.cpu
    assert "float64" in shflnb.explain(packed.astype("float64"), 300, device="H200").cpu


def test_explain_says_where_a_config_came_from(packed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHFLNB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(remembered, "_TABLES", {})
    rule = shflnb.explain(packed, 4096, device="H200")
    assert "least predicted time" in rule.reason or "committed" in rule.reason
    other = next(c for c in candidates(64, "float16", (9, 0)) if c.name != rule.config)
    remembered.store("NVIDIA H200", {table_key(problem_of(packed, 4096)): remembered.entry_of(other)})
    found = shflnb.explain(packed, 4096, device="H200")
    assert (found.config, found.reason) == (other.name, "tuned here")
    packed.launch_cache["tuned"] = {table_key(problem_of(packed, 4096)): remembered.entry_of(A if other != A else B)}
    assert shflnb.explain(packed, 4096, device="H200").config != other.name


def test_explain_knows_what_was_tuned_for_few_columns(packed: Any) -> None:
    rule = shflnb.explain(packed, 8, device="H200")
    assert rule.reason.endswith("; the rule") and "up to 64 columns" in rule.reason
    other = next(c for c in few_candidates(64, 8, "float16") if c.name != rule.config and c.token_major)
    packed.launch_cache["tuned"] = {few_key(problem_of(packed, 8), "token"): remembered.entry_of(other)}
    found = shflnb.explain(packed, 8, device="H200")
    assert found.config == other.name and found.reason.endswith("nothing is turned; tuned here")
    assert shflnb.explain(packed, 9, device="H200").reason.endswith("; the rule")


@pytest.mark.parametrize(("k", "is_wide"), [(65_535, False), (65_536, True)])
def test_explain_names_the_kernel_for_as_many_columns(k: int, is_wide: bool) -> None:
    found = shflnb.explain(random_packed(64, k, 64, [100]), 8, device="H200")
    assert ("_wide_" in found.config) == is_wide


def test_explain_refuses(packed: Any) -> None:
    for n in (0, -4, 2.5, None):
        with pytest.raises(ArgumentError, match="number of columns"):
            shflnb.explain(packed, n)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"'Voodoo 2'.*NVIDIA H200"):
        shflnb.explain(packed, 8, device="Voodoo 2")


# --- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_tuning_on_this_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every candidate is right and timed; the result is used, found by the next process, and gone after `forget`."""
    torch = pytest.importorskip("torch")
    from shflnb.kernels.launch import device_context
    from shflnb.kernels.spmm_plan import plan_for

    monkeypatch.setattr(remembered, "cache_dir", lambda: tmp_path / "kernels")  # compiled kernels stay where they are
    monkeypatch.setattr(remembered, "_TABLES", {})
    packed = random_pattern(1024, 1024, 64, 256)
    context = device_context(0)
    x = torch.randn(1024, 960, device="cuda").half()
    before = shflnb.matmul(packed, x)
    lines: list[str] = []
    report = shflnb.tune(packed, n=[960, 128], progress=lines.append)
    print(report)
    assert report.is_on_disk and len(report.results) == 2
    for result in report.results:
        assert not result.rejected
        assert {m.config for m in result.measured} >= set(candidates(64, "float16", context.capability))
        assert all(0.5 < m.us < 1e5 for m in result.measured)
        assert result.best.us <= 1.02 * result.measured[0].us
    assert len(lines) == sum(len(result.measured) for result in report.results)
    assert plan_for(packed, context, 960, "plain", 0).choice.config == report.results[0].best.config
    assert plan_for(packed, context, 960, "plain", 0).choice.reason == "tuned here"
    assert float((shflnb.matmul(packed, x).float() - before.float()).abs().max()) < 0.1
    monkeypatch.setattr(remembered, "_TABLES", {})
    twin = random_pattern(1024, 1024, 64, 256)
    assert plan_for(twin, context, 1000, "relu", 0).choice.config == report.results[0].best.config
    found = shflnb.explain(twin, 960)
    assert found.is_here and found.registers and found.blocks_per_sm >= 1 and found.reason == "tuned here"
    shflnb.tuning.forget_device(0)
    assert "tuned here" not in shflnb.explain(random_pattern(1024, 1024, 64, 256), 960).reason


@pytest.mark.gpu(min_capability=(9, 0))
def test_tuning_few_columns_on_this_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every kernel is right and timed for both layouts; calls take the best one, also those of the short road."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(remembered, "cache_dir", lambda: tmp_path / "kernels")  # compiled kernels stay where they are
    monkeypatch.setattr(remembered, "_TABLES", {})
    packed = random_pattern(1024, 1024, 64, 256)
    x = torch.randn(16, 1024, device="cuda").half()
    before = shflnb.linear(x, packed)
    report = shflnb.tune(packed, n=16)
    print(report)
    assert report.is_on_disk and [result.layout for result in report.results] == list(LAYOUTS)
    for result in report.results:
        assert not result.rejected and all(0.5 < m.us < 1e4 for m in result.measured)
        assert {m.config for m in result.measured} >= set(few_candidates(64, 16, "float16", result.layout))
    for _ in range(2):
        assert float((shflnb.linear(x, packed).float() - before.float()).abs().max()) < 0.1
    taken = {plan.kernel.spec.name for key, plan in packed.launch_cache.items() if key[0] == "skinny plan"}
    assert report.results[1].best.config.name in taken
    assert shflnb.explain(packed, 16).reason.endswith("tuned here")
    shflnb.tuning.forget_device(0)
