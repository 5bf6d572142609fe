"""`shflnb bench` on the CPU: what it measures is right, what it prints is what it measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from shflnb import bench, cli
from shflnb.errors import ArgumentError, DeviceError

SMALL = ["bench", "--device", "cpu", "--size", "96,64,5", "--sparsity", "0.75", "--v", "32"]


def invoke(arguments: Sequence[str]) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE_S", 0.0)
    monkeypatch.setattr(bench, "ROUNDS", 2)


def test_a_row_is_consistent() -> None:
    (row,) = bench.run("cpu", bench.cases("cpu", [(96, 64, 5)], [0.75], [32]))
    assert (row.m, row.k, row.n, row.v, row.sparsity, row.dtype) == (96, 64, 5, 32, 0.75, "float32")
    assert row.is_right and row.error < 1e-6
    assert row.speedup == pytest.approx(row.dense_us / row.sparse_us)
    assert row.roof_us == pytest.approx(0.25 * row.dense_us)
    assert row.percent_of_roof == pytest.approx(100 * row.roof_us / row.sparse_us)


def test_json_and_table_say_the_same() -> None:
    found = invoke([*SMALL, "--json"])
    assert found.exit_code == 0
    report = json.loads(found.stdout)
    assert report["kind"] == "cpu" and [r["v"] for r in report["rows"]] == [32]
    found = invoke([*SMALL, "--v", "64"])
    assert found.exit_code == 0
    lines = [line.split() for line in found.stdout.splitlines() if line.strip().startswith("96 x 64")]
    assert [line[5] for line in lines] == ["32", "64"] and all(line[8].endswith("x") for line in lines)
    assert "of roof" in found.stdout and "Largest error" in found.stdout


def test_a_wrong_product_is_named_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(packed: Any, x: np.ndarray, *, out: np.ndarray) -> np.ndarray:
        out[:] = 1.0
        return out

    monkeypatch.setattr(bench, "matmul", wrong)
    found = invoke(SMALL)
    assert found.exit_code == 1 and "WRONG" in found.stdout


def test_an_unwritten_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "matmul", lambda packed, x, *, out: out)
    (row,) = bench.run("cpu", bench.cases("cpu", [(96, 64, 5)], [0.75], [32]))
    assert not row.is_right


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size", "96,64"], "needed is m,k,n"),
        (["--size", "0,64,5"], "at least 1"),
        (["--sparsity", "1.0"], "expected a share"),
        (["--v", "48"], "expected one of"),
        (["--device", "tpu"], "expected 'cpu' or 'cuda'"),
    ],
)
def test_bad_requests_are_refused(arguments: list[str], text: str) -> None:
    found = invoke(["bench", "--device", "cpu", *arguments] if "--device" not in arguments else ["bench", *arguments])
    assert isinstance(found.exception, ArgumentError) and text in str(found.exception)


def test_without_a_gpu_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_cuda", lambda: type("None_", (), {"problem": "no CUDA driver", "devices": ()}))
    assert bench.choose_device(None)[0] == "cpu"
    with pytest.raises(DeviceError, match=r"no CUDA driver.*--device cpu"):
        bench.choose_device("cuda")


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    pytest.importorskip("torch")
    (row,) = bench.run("cuda", bench.cases("cuda", [(256, 256, 128)], [0.75], [64]))
    assert row.is_right and row.sparse_us > 0 and row.dense_us > 0 and row.roof_us > 0
