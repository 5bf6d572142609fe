"""What measures is right itself: statistics, timing (on a device made of Python), matrices, CSVs, peers."""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_peers
import bench_spmm
import cases
import matrices
import numpy as np
import peers
import protocol
import pytest
import records
import torch


class FakeDevice:
    """torch.cuda, as far as the protocol uses it: work costs what it says, in microseconds of a clock of its own."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.recording: list[float] | None = None
        self.slept = 0
        self.cuda = SimpleNamespace(
            Event=self._event, CUDAGraph=self._graph, Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
            stream=lambda stream: contextlib.nullcontext(), current_stream=lambda: None, synchronize=lambda: None,
            _sleep=self._sleep, clock_rate=lambda: 1755,
        )  # fmt: skip

    def work(self, us: float) -> None:
        """A launch."""
        if self.recording is not None:
            self.recording.append(us)
        else:
            self.now_us += us

    def _sleep(self, cycles: int) -> None:
        self.slept += 1
        self.now_us += cycles / 1980

    def _event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=math.nan)
        event.record = lambda: setattr(event, "at", self.now_us)
        event.elapsed_time = lambda other: (other.at - event.at) / 1e3
        return event

    def _graph(self) -> Any:
        graph = SimpleNamespace(steps=[])

        def begin(capture_error_mode: str) -> None:
            self.recording = graph.steps

        def end() -> None:
            self.recording = None

        def replay() -> None:
            self.now_us += sum(graph.steps)

        graph.capture_begin, graph.capture_end, graph.replay = begin, end, replay
        return graph


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(protocol, "torch", SimpleNamespace(cuda=fake.cuda))
    monkeypatch.setattr(protocol, "_STREAM", [])
    return fake


def test_percentiles() -> None:
    timing = protocol.summarise([float(i) for i in range(1, 12)], 7, "graph", 1755.4)
    assert (timing.median_us, timing.p10_us, timing.p90_us, timing.samples) == (6.0, 2.0, 10.0, 11)
    row = timing.row()
    assert row["sm_mhz"] == 1755 and row["launches"] == 7 and set(row) <= set(bench_spmm.FIELDS)


def test_graph_times_are_those_of_one_launch(device: FakeDevice) -> None:
    times = protocol.measure({"fast": lambda: device.work(10.0), "slow": lambda: device.work(2000.0)}, warm_s=0.0)
    assert times["fast"].median_us == pytest.approx(10.0) and times["slow"].p90_us == pytest.approx(2000.0)
    assert times["fast"].launches == 200 and times["slow"].launches == 3
    assert times["fast"].method == "graph" and times["fast"].sm_mhz == 1755 and device.slept == 0


def test_bursts_pause_before_every_sample(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(protocol.time, "sleep", pauses.append)
    calls = {"fast": lambda: device.work(10.0), "slow": lambda: device.work(2000.0)}
    times = protocol.measure(calls, rounds=4, load="burst")
    assert pauses == [protocol.BURST_PAUSE_S] * 8
    assert times["fast"].launches == 50 and times["slow"].launches == 3
    assert times["fast"].median_us == pytest.approx(10.0)
    protocol.measure(calls, rounds=4, load="sustained", warm_s=0.0)
    assert len(pauses) == 8


def test_rotation_takes_all_sets_in_turn(device: FakeDevice) -> None:
    calls = [lambda us=us: device.work(us) for us in (10.0, 20.0, 60.0)]
    timing = protocol.measure({"rotated": calls}, warm_s=0.0)["rotated"]
    assert timing.median_us == pytest.approx(30.0) and timing.launches % 3 == 0


def test_what_cannot_be_captured_is_timed_behind_a_sleep(device: FakeDevice) -> None:
    def call() -> None:
        if device.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        device.work(50.0)

    times = protocol.measure({"refused": call, "asked": lambda: device.work(5.0)}, warm_s=0.0, no_graph=["asked"])
    assert times["refused"].method == times["asked"].method == "events" and device.slept > 0
    assert times["refused"].median_us == pytest.approx(50.0) and times["asked"].median_us == pytest.approx(5.0)


def test_host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(protocol, "HOST_PAUSE_S", 0.0)

    def call() -> None:
        now[0] += 50e-6

    timing = protocol.measure({"call": call}, "cpu")["call"]
    assert timing.median_us == pytest.approx(50.0) and timing.method == "host" and timing.launches == 40


def test_pytest_benchmark_sees_measured_time() -> None:
    start = protocol.device_clock()
    protocol.tick(250.0)
    assert protocol.device_clock() - start == pytest.approx(250e-6)


def test_a_wrong_or_unwritten_result_is_seen() -> None:
    reference = torch.ones(4, 4)
    out = torch.empty(4, 4, dtype=torch.float16)

    def half_written() -> Any:
        out[:2] = 1.0
        return out

    error, is_right = protocol.check(half_written, reference, "float16", poison=out)
    assert math.isnan(error) and not is_right
    error, is_right = protocol.check(lambda: reference.half() * 1.01, reference, "float16")
    assert error == pytest.approx(0.01, rel=0.1) and not is_right
    assert protocol.check(lambda: reference.half(), reference, "float16") == (0.0, True)


@pytest.mark.parametrize(("m", "k", "v"), [(64, 48, 32), (70, 33, 32), (130, 128, 128)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_random_matrices_are_what_they_claim(m: int, k: int, v: int, dtype: str) -> None:
    packed = matrices.random_packed(m, k, v, 0.75, dtype, spread=0.5, seed=3)
    assert packed.dtype == dtype and packed.counts.sum() == round(0.25 * k) * packed.groups
    dense = matrices.dense_of(packed, "cpu")
    assert np.array_equal(dense.float().numpy(), packed.to_dense().astype(np.float32))


def test_unequal_groups_have_the_same_total() -> None:
    equal, spread = (matrices.group_counts(64, 4096, 0.75, s, 0) for s in (0.0, 0.25))
    assert set(equal) == {1024} and spread.sum() == equal.sum() and spread.min() >= 1
    assert 0.15 < spread.std() / spread.mean() < 0.35


def test_cases_do_not_repeat_a_product() -> None:
    found = bench_spmm.cases_of("full", "cuda")
    keys = [(*bench_spmm.group_key(c), c.sparsity, c.v, c.groups, c.kernel) for c in found]
    assert len(set(keys)) == len(keys)
    sizes = {(c.shape.m, c.shape.k, c.shape.n) for c in found}
    assert sizes >= {(s.m, s.k, s.n) for s in cases.all_shapes()}
    first = sum(c in bench_spmm.TABLE for c in found)  # the cases with a bar come before all others
    assert set(found[:first]) <= bench_spmm.TABLE
    for part in (found[:first], found[first:]):
        matrices_in_order = [(c.shape.m, c.shape.k) for c in part]
        runs = 1 + sum(a != b for a, b in itertools.pairwise(matrices_in_order))
        assert runs == len(set(matrices_in_order))


def test_spmm_rows_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [cases.Case(cases.Shape("small", 96, 64, 8), 0.5, 32, "float32", inputs=i) for i in ("warm", "rotated")]
    monkeypatch.setattr(bench_spmm, "CPU_CASES", small)
    monkeypatch.setattr(bench_spmm, "rotations", lambda nbytes, device: 3)
    assert bench_spmm.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    with next(tmp_path.glob("*.spmm.csv")).open() as file:
        rows = list(csv.DictReader(file))
    ours = [r for r in rows if r["what"] == "shflnb"]
    assert len(ours) == 2 and len(rows) == 6 and {r["inputs"] for r in ours} == {"warm", "rotated"}
    assert all(float(r["error"]) < 1e-5 and float(r["median_us"]) > 0 and float(r["speedup"]) > 0 for r in ours)
    assert list(tmp_path.glob("*.spmm.machine.json"))


def test_a_wrong_product_is_not_timed_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_spmm, "CPU_CASES", [cases.Case(cases.Shape("small", 64, 64, 8), 0.5, 32, "float32")])
    monkeypatch.setattr(bench_spmm.shflnb, "matmul", lambda packed, x, out: out.fill_(1.0), raising=False)
    assert bench_spmm.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    with next(tmp_path.glob("*.spmm.csv")).open() as file:
        (row,) = [r for r in csv.DictReader(file) if r["what"] == "shflnb"]
    assert row["note"] == "wrong result: not timed" and row["speedup"] == "" and float(row["error"]) > 0.1


def test_a_peer_that_fails_is_told_apart_from_one_that_is_wrong() -> None:
    o = peers.Operands(cases.Shape("small", 64, 64, 16), "cpu")

    def breaks(operands: Any, sparsity: float) -> list[peers.Variant]:
        raise RuntimeError("no such\nlibrary")

    def lies(operands: Any, sparsity: float) -> list[peers.Variant]:
        good = peers.Variant("good", lambda: o.w @ o.x, o.w)
        bad = peers.Variant("bad", lambda: 2 * (o.w @ o.x), o.w)
        turned = peers.Variant("turned", lambda: (o.w @ o.x).t(), o.w, is_token_major=True)
        return [bad, good, turned] if sparsity else [bad]

    found, why = bench_peers.checked_variants(peers.Peer("a", "", breaks), o, 0.5)
    assert not found and why == "RuntimeError: no such library"
    found, why = bench_peers.checked_variants(peers.Peer("b", "", lies), o, 0.0)
    assert not found and "its result is wrong" in why
    found, _ = bench_peers.checked_variants(peers.Peer("b", "", lies), o, 0.5)
    assert [variant.name for variant, _ in found] == ["good", "turned"]


def test_a_group_that_crashes_still_has_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    records.Results(path, bench_peers.FIELDS).close()
    owed = len(peers.expected("cusparse", bench_peers.SPARSITIES))
    assert bench_peers.account(path, "cusparse", "cpu", "its process ended with code -11") == owed
    assert bench_peers.account(path, "cusparse", "cpu", "") == 0
    assert path.read_text().count("cannot run because its process ended with code -11") == owed


@pytest.mark.parametrize("block", [16, 32])
def test_block_patterns(block: int) -> None:
    o = peers.Operands(cases.Shape("small", 64, 96, 16), "cpu")
    columns, dense = peers.random_blocks(o, block, 0.5)
    blocks = dense.view(64 // block, block, 96 // block, block).abs().sum((1, 3)) > 0
    assert (blocks.sum(1) == columns.shape[1]).all() and columns.shape[1] == round(96 // block * 0.5)
    assert torch.equal(blocks.nonzero()[:, 1].view(len(columns), -1), columns.long())


def test_results_grow_row_by_row(tmp_path: Path) -> None:
    results = records.Results(tmp_path / "x.csv", ("a", "b"))
    results.add({"a": 1})
    assert (tmp_path / "x.csv").read_text() == "a,b\n1,\n"
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        results.add({"c": 1})
    results.close()
    records.Results(tmp_path / "x.csv", ("a", "b"), append=True).close()
    assert (tmp_path / "x.csv").read_text() == "a,b\n1,\n"
