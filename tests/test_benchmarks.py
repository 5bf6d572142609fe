"""What measures is right itself: statistics, timing (on a device made of Python), matrices, CSVs, peers."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_all
import bench_peers
import bench_spmm
import cases
import compare_runs
import cusparselt_search
import keep_faster
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


def test_a_slow_host_does_not_shorten_the_samples(device: FakeDevice) -> None:
    """Three launches of 10 us take 60 us each where the host needs as long to start one; in a graph they do not."""

    def call() -> None:
        device.work(10.0 if device.recording is not None else 60.0)

    timing = protocol.measure({"small": call}, warm_s=0.0)["small"]
    assert timing.launches == 200 and timing.median_us == pytest.approx(10.0)
    rotated = protocol.measure({"small": [call] * 7}, warm_s=0.0)["small"]
    assert rotated.launches == 203


def test_bursts_pause_before_every_sample(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(protocol.time, "sleep", pauses.append)
    calls = {"fast": lambda: device.work(10.0), "slow": lambda: device.work(2000.0)}
    times = protocol.measure(calls, rounds=4, load="burst")
    assert pauses == pytest.approx([0.005, 0.005] + [0.005, 0.01] * 3)  # "slow" takes 6 ms at least, not half of one
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


@pytest.mark.parametrize(("results", "wanted"), [((1, 1, 1), 0.0), ((1, 1.5, 1), 0.5), ((1, math.nan, 2), math.nan)])
def test_a_chain_is_wrong_where_one_of_its_results_is(
    results: tuple[float, ...], wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, out, left = torch.ones(4, 4), torch.empty(4, 4, dtype=torch.float16), list(results)

    def replay() -> None:
        assert out.isnan().all()
        out.fill_(left.pop(0))

    chain = SimpleNamespace(stream=None, graph=SimpleNamespace(replay=replay))
    monkeypatch.setattr(protocol, "_Graph", lambda calls, sample_us: chain)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    error, is_right = protocol.check_chained([lambda: out], reference, "float16", poison=out)
    assert (error == wanted or (math.isnan(error) and math.isnan(wanted))) and not left
    assert is_right == (wanted == 0.0)
    assert protocol.check_chained([lambda: out.fill_(1)], reference, "float16", "cpu", poison=out) == (0.0, True)


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


def test_cases_with_a_bar_come_first_then_few_columns() -> None:
    found = bench_spmm.cases_of("full", "cuda")
    ranks = [bench_spmm.rank_of(c) for c in found]
    assert ranks == sorted(ranks) and set(ranks) == {0, 1, 2, 3}
    assert {c for c in found if bench_spmm.rank_of(c) == 0} <= bench_spmm.TABLE
    for rank in range(4):
        in_order = [(c.shape.m, c.shape.k) for c in found if bench_spmm.rank_of(c) == rank]
        runs = [key for key, _ in itertools.groupby(in_order)]
        assert len(runs) == len(set(runs))  # the weights of a (m, k) are made once
        if rank == 1:
            assert runs[:2] == [(4096, 14336), (6144, 4096)]
    assert {c.shape.n for c in found if bench_spmm.rank_of(c) == 1} == {1, 2, 4, 8, 16, 32, 64}


def test_a_chosen_kernel_is_named_whatever_its_kind_of_plan() -> None:
    def plan(name: str) -> Any:
        return SimpleNamespace(kernel=SimpleNamespace(spec=SimpleNamespace(name=name)))

    cache: dict[Any, Any] = {
        "tuned": {}, ("memo", 8): None, ("plan", 0, 4096, "none", None): plan("many"),
        ("plan", 0, 2048, "none", "forced"): plan("forced"), ("skinny plan", 0, 16, "none"): plan("up to 16"),
        ("skinny plan", 0, (8,), "none"): plan("token-major 8"), ("skinny plan", 0, (4,), "none"): None,
        ("narrow plan", 0, 1, "none"): plan("narrow 1"), ("skinny plan", 0, 16, "bias"): plan("up to 16, bias"),
    }  # fmt: skip
    packed = SimpleNamespace(launch_cache=cache)
    expected = {4096: "many", 2048: "", 1: "narrow 1", 8: "token-major 8", 4: "up to 16, bias", 17: "", 65: ""}
    assert {n: bench_spmm.config_name(packed, n) for n in expected} == expected
    cache["few choice", 0, 8, "token"] = SimpleNamespace(name="chosen")
    assert [bench_spmm.config_name(packed, 8, layout) for layout in ("token", "feature")] == ["chosen", "token-major 8"]


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


def test_a_result_with_more_rounding_than_allowed_is_timed_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loose(o: peers.Operands, sparsity: float) -> list[peers.Variant]:
        return [peers.Variant("loose", lambda: (o.w @ o.x) * 1.004, o.w)]

    monkeypatch.setitem(peers.GROUPS, "main", [peers.Peer("loose", "any", loose)])
    monkeypatch.setattr(bench_peers, "measure", lambda subjects, *_, **__: {
        name: protocol.summarise([100.0], 1, "host") for name in subjects
    })  # fmt: skip
    results = records.Results(tmp_path / "x.csv", bench_peers.FIELDS)
    bench_peers.run_shape("main", cases.Shape("small", 64, 64, 16), "cpu", results, {}, records.Budget(60.0))
    results.close()
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    timed = [r for r in rows if r["peer"] == "loose"]
    assert len(timed) == 3 and all(
        r["speedup"] == "1" and "0.004, is above the limit of 0.001" in r["note"] for r in timed
    )
    assert all(r["note"] == "" and r["speedup"] for r in rows if r["peer"].startswith("cuBLAS"))


def test_groups_share_the_time_and_pass_on_what_they_leave() -> None:
    groups = list(peers.GROUPS)
    assert set(bench_peers.SHARES) == set(groups)
    left, given = 420.0, []
    for number in range(len(groups)):
        given.append(bench_peers.share_of(groups[number:], left))
        left -= given[-1] / 2  # each takes half of its share
    total = sum(bench_peers.SHARES.values())
    assert given[0] == pytest.approx(420.0 * bench_peers.SHARES[groups[0]] / total)
    assert all(share > 420.0 * bench_peers.SHARES[g] / total for g, share in zip(groups[1:], given[1:], strict=True))
    assert bench_peers.share_of(groups[-1:], 33.0) == 33.0 and bench_peers.share_of(groups, -5.0) == 0.0


def test_what_compiles_is_compiled_ahead_in_processes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = bench_peers.tasks_ahead(list(peers.GROUPS), "cuda")
    kinds = [peers.GROUPS[group][int(number)].compiles for group, number, _ in (task.split(":") for task in tasks)]
    assert kinds.count("shape") == len(cases.PEER_SHAPES) and kinds.count("all") == 9 and len(set(tasks)) == len(tasks)
    assert bench_peers.tasks_ahead(["cusparse"], "cuda") == []
    called: list[tuple[Any, ...]] = []

    def prepare(o: peers.Operands, sparsity: float) -> list[peers.Variant]:
        called.append((o.shape, sparsity, peers.TUNE_S))
        return [peers.Variant("a", lambda: o.w @ o.x, o.w)]

    monkeypatch.setitem(peers.GROUPS, "main", [peers.Peer("a", "any", prepare, compiles="shape")])
    monkeypatch.setattr(peers, "TUNE_S", 6.0)
    assert bench_peers.tasks_ahead(["main"], "cpu") == ["main:0:0"]
    assert bench_peers.main(["--device", "cpu", "--ahead", "main:0:0"]) == 0
    assert called == [(bench_peers.CPU_SHAPES[0], s, peers.TUNE_AHEAD_S) for s in bench_peers.SPARSITIES]
    sleeps = tmp_path / "sleeps.py"
    sleeps.write_text("import sys, time\ntime.sleep(60 if 'main:0:0' in sys.argv else 0)\n")
    monkeypatch.setattr(bench_peers, "__file__", str(sleeps))
    assert 1.0 <= bench_peers.compile_ahead(["main"], "cpu", 1.0) < 10.0
    assert "main:0:0 ended with code -9" in capsys.readouterr().out


def test_small_shapes_come_first() -> None:
    flops = [shape.flops for shape in bench_peers.shapes_of("cuda")]
    assert flops == sorted(flops) and set(bench_peers.shapes_of("cuda")) == set(cases.PEER_SHAPES)


def test_the_order_of_blocked_ell_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Library:
        def __init__(self, columns: torch.Tensor, values: torch.Tensor, k: int, order: str) -> None:
            made.append(order)
            rows, _, block, _ = values.shape
            self.dense = torch.zeros(rows, block, k // block, block, dtype=values.dtype)
            for row in range(rows):
                for place, column in enumerate(columns[row].tolist()):
                    self.dense[row, :, column] = values[row, place]
            if order == "rows":
                self.dense = self.dense * 2

        def product(self, x: torch.Tensor, out: torch.Tensor) -> Any:
            return lambda: out.copy_(self.dense.view(len(out), -1) @ x)

    monkeypatch.setitem(sys.modules, "blocked_ell", SimpleNamespace(BlockedEll=Library))
    peers.ell_order.cache_clear()
    peer = peers.Peer("ell", "", peers.blocked_ell(16))
    for k in (64, 96):
        found, why = bench_peers.checked_variants(peer, peers.Operands(cases.Shape("small", 64, k, 16), "cpu"), 0.5)
        assert [variant.name for variant, _ in found] == ["row-major, blocks", "column-major, blocks"], why
    assert made == ["rows", "blocks", "blocks", "blocks"]
    peers.ell_order.cache_clear()


def test_the_tuner_begins_where_it_ended_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_BSR_TUNED", {})
    assert peers.bsr_start(64, 4096) == peers.BSR_START | {"SPLIT_N": 32}
    peers._BSR_TUNED[64, 4096, True] = {"GROUP_SIZE_ROW": 2, "SPLIT_N": 16, "num_stages": 4, "num_warps": 8}
    assert peers.bsr_start(64, 8192) == {"GROUP_SIZE_ROW": 2, "SPLIT_N": 32, "num_stages": 4, "num_warps": 8}
    assert peers.bsr_start(32, 4096) == peers.BSR_START | {"SPLIT_N": 32}

    testing = SimpleNamespace(do_bench=lambda call, warmup, rep: call())
    triton = SimpleNamespace(testing=testing)
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(peers, "TUNE_S", -1.0)  # over before it began
    from torch.sparse import _triton_ops_meta as meta_module

    tried = []

    def target(meta: dict[str, int]) -> float:
        tried.append(meta["x"])
        return triton.testing.do_bench(lambda: abs(meta["x"] - 7.0) + 1.0)

    with peers._quick_tuner(meta_module, {"x": 5}):
        best, *_ = meta_module.minimize(target, {"x": 1}, {"x": 0}, lambda name, value, step, meta: value + step)
    assert best == {"x": 5} and tried[:2] == [0, 5] and testing.do_bench(lambda: 3, 0, 0) == 3
    monkeypatch.setattr(peers, "TUNE_S", 60.0)
    with peers._quick_tuner(meta_module, {"x": 5}):
        best, *_ = meta_module.minimize(target, {"x": 1}, {"x": 0}, lambda name, value, step, meta: value + step)
    assert best == {"x": 7}
    with peers._quick_tuner(meta_module, {"x": 50}):  # worse than the reference, from which it begins again
        best, *_ = meta_module.minimize(target, {"x": 1}, {"x": 6}, lambda name, value, step, meta: value + step)
    assert best["x"] in (6, 7)


CRASHING = """
import json, os, sys
layout, order = sys.argv[1], json.load(sys.stdin)
def say(**event):
    print(json.dumps(event), flush=True)
for shape in order["shapes"]:
    for step in ("library", "0", "1", "2"):
        if step in order["skip"]:
            continue
        say(**{"try": step})
        if step in CRASHES:
            os._exit(CODE)
    say(shape=shape, options={"alg_id": 2}, text=f"{len(order['skip'])} left out")
"""


@pytest.mark.parametrize("crashes", [(), ("library",), ("library", "1")])
def test_a_search_goes_on_without_what_killed_its_process(crashes: tuple[str, ...]) -> None:
    shapes = [cases.Shape("a", 64, 64, 16), cases.Shape("b", 64, 64, 32)]
    program = CRASHING.replace("CRASHES", repr(crashes)).replace("CODE", "7")
    steps = ("library", "0", "1", "2")
    found, why = cusparselt_search.search_layout("W @ X", shapes, steps, 60.0, (sys.executable, "-c", program))
    assert {shape: choice.text for shape, choice in found.items()} == dict.fromkeys(shapes, f"{len(crashes)} left out")
    assert [line.rpartition(":")[0] for line in why] == [f"W @ X, {step}" for step in crashes]
    assert all("ended with code 7" in line for line in why)


def test_a_search_that_never_begins_is_not_repeated() -> None:
    command = (sys.executable, "-c", "import sys; sys.exit(3)")
    shapes = [cases.Shape("a", 64, 64, 16)]
    found, why = cusparselt_search.search_layout("W @ X", shapes, ("library", "4"), 60.0, command)
    assert not found and why == ["W @ X: its process ended with code 3"]
    hanging = (sys.executable, "-c", 'import time; print(\'{"try": "4"}\', flush=True); time.sleep(60)')
    found, why = cusparselt_search.search_layout("W @ X", shapes, ("library", "4"), 1.0, hanging)
    assert not found and why == ["W @ X, 4: not done within 1 s"]


def test_a_search_ends_when_nothing_is_left_to_try() -> None:
    program = CRASHING.replace("CRASHES", "('library',)").replace("CODE", "7")
    shapes = [cases.Shape("a", 64, 64, 16)]
    found, why = cusparselt_search.search_layout("W @ X", shapes, ("library",), 60.0, (sys.executable, "-c", program))
    assert not found and why == ["W @ X, library: its process ended with code 7"]


@pytest.mark.parametrize("works", [True, False])
def test_algorithms_are_numbered_only_where_no_layout_could_be_searched(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []
    shape, choice = cases.Shape("a", 64, 64, 16), cusparselt_search.Choice({"alg_id": 2}, "algorithm 2")

    def search_layout(layout: str, shapes: Any, steps: tuple[str, ...], seconds: float) -> Any:
        asked.append((layout, steps))
        return ({shape: choice}, []) if works and layout == cusparselt_search.LAYOUTS[2] else ({}, [f"{layout}: no"])

    monkeypatch.setattr(cusparselt_search, "search_layout", search_layout)
    cusparselt_search.search.cache_clear()
    found, why = cusparselt_search.search((shape,))
    cusparselt_search.search.cache_clear()
    rounds = [("library",)] if works else [("library",), cusparselt_search.NUMBERS]
    assert asked == [(layout, steps) for steps in rounds for layout in cusparselt_search.LAYOUTS]
    assert any(found.values()) == works and len(why) == (3 if works else 8)


@pytest.mark.parametrize("layout", cusparselt_search.LAYOUTS)
@pytest.mark.parametrize("library", ["fails", "works"])
def test_algorithms_are_tried_one_by_one(layout: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(o: peers.Operands) -> tuple[Any, torch.Tensor]:
        return SimpleNamespace(packed=o.w), o.w

    def product(packed: torch.Tensor, x: torch.Tensor, transpose_result: bool, alg_id: int) -> torch.Tensor:
        if alg_id > 3:
            raise RuntimeError("invalid value")
        out = packed @ x
        return (out.t() if transpose_result else out) * (2 if alg_id == 1 else 1)

    def search(packed: torch.Tensor, x: torch.Tensor, is_transposed: bool) -> dict[str, int]:
        if library == "fails":
            raise RuntimeError("internal\nerror")
        return {"alg_id": 3}

    monkeypatch.setattr(cusparselt_search, "two_of_four", compress)
    monkeypatch.setattr(cusparselt_search, "library_search", search)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(cusparselt_search, "measure", lambda subjects, *_, **__: {
        step: protocol.summarise([{"0": 5.0, "2": 3.0}.get(step, 4.0)], 1, "host") for step in subjects
    })  # fmt: skip
    events: list[dict[str, Any]] = []
    steps = [cusparselt_search.LIBRARY, *cusparselt_search.NUMBERS]
    order = {"shapes": [("a", 64, 48, 16), ("b", 32, 64, 16)], "steps": steps, "skip": []}
    assert cusparselt_search.try_layout(layout, order, "cpu", events.append) == 0
    json.dumps(events)
    tried = [event["try"] for event in events if "try" in event]
    best = [(event["options"], event["text"]) for event in events if "shape" in event]
    if library == "works":
        assert tried == ["library"] * 2
        assert best == [({"alg_id": 3}, "algorithm 3, split-k 1, by its own search")] * 2
        return
    each = [str(number) for number in range(7)]  # after three failures in a row there are no more
    assert tried == ["library", *each, *each]
    assert best == [({"alg_id": 2}, "algorithm 2, the fastest of 3 tried one by one")] * 2
    failed = {event["failed"]: event["why"] for event in events if "failed" in event}
    assert failed["library"] == "internal error" and "wrong" in failed["1"] and set(failed) == {"library", *"1456"}


def test_a_dead_context_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(packed: torch.Tensor, x: torch.Tensor, is_transposed: bool) -> dict[str, int]:
        raise RuntimeError("CUDA error: internal error")

    monkeypatch.setattr(cusparselt_search, "two_of_four", lambda o: (SimpleNamespace(packed=o.w), o.w))
    monkeypatch.setattr(cusparselt_search, "library_search", dies)
    monkeypatch.setattr(cusparselt_search, "is_alive", lambda device: False)
    events: list[dict[str, Any]] = []
    order = {"shapes": [("a", 64, 48, 16)], "steps": [cusparselt_search.LIBRARY], "skip": []}
    assert cusparselt_search.try_layout("W @ X", order, "cpu", events.append) == 1 and len(events) == 2


def test_peers_of_a_searched_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = cases.Shape("a", 64, 48, 16)
    choice = cusparselt_search.Choice({"alg_id": 2}, "algorithm 2")
    monkeypatch.setattr(peers, "two_of_four", lambda o: (SimpleNamespace(packed=o.w), o.w))
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda w, x, transpose_result, alg_id: (
        (w @ x).t() if transpose_result else w @ x
    ))  # fmt: skip
    found = {layout: {shape: choice} for layout in cusparselt_search.LAYOUTS[1:]}
    monkeypatch.setattr(cusparselt_search, "search", lambda shapes: (found, ["W @ X: its own search: no"]))
    peer = peers.GROUPS["searched"][0]
    right, why = bench_peers.checked_variants(peer, peers.Operands(shape, "cpu"), 0.5)
    assert len(right) == 3 and not why and right[0][0].name == "W @ X, transposed result, algorithm 2"
    found.clear()
    right, why = bench_peers.checked_variants(peer, peers.Operands(shape, "cpu"), 0.5)
    assert not right and why == "RuntimeError: W @ X: its own search: no"


def run_of(path: Path, times: dict[tuple[int, str], float], **more: Any) -> Path:
    """A made-up run: (v, config) -> microseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = records.Results(path, bench_spmm.FIELDS)
    common = {"gpu": "testgpu", "date": "2026-01-02", "m": 64, "k": 32, "n": 8, "sparsity": 0.75, "what": "shflnb"}
    for (v, config), us in times.items():
        kernel = "sm80" if config == "forced" else ""
        results.add(common | {"v": v, "kernel": kernel, "config": config, "median_us": us} | more)
    results.add(common | {"v": 1, "note": "wrong result: not timed"})
    results.close()
    return path


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_of(tmp_path / "a/testgpu.spmm.csv", {(v, "") : 100.0 for v in range(40)} | {
        (40, ""): 100.0, (41, ""): 15.0, (42, "here only"): 50.0, (40, "forced"): 200.0
    })  # fmt: skip
    second = run_of(tmp_path / "b/testgpu.spmm.csv", {(v, "other"): 101.0 for v in range(40)} | {
        (40, ""): 104.0, (41, ""): 18.0, (40, "forced"): 198.0
    }, date="2026-01-03")  # fmt: skip
    assert compare_runs.main([str(first), str(second), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "  4.0 %  64 x 32, n = 8, 75 %, v = 40, shflnb" and len(printed) == 2
    assert printed[1].startswith("testgpu spmm: 42 times above 20 us, 97.6 % of them within 3 %; difference 1.00 % in ")
    assert printed[1].endswith("1 shorter, 1 in one run only")
    (row,) = csv.DictReader((tmp_path / "testgpu.repeat.csv").open())
    assert row == {
        "gpu": "testgpu", "date": "2026-01-03", "kind": "spmm", "rows": "42", "within": "0.9762",
        "median_percent": "1", "worst_percent": "4", "worst": "64 x 32, n = 8, 75 %, v = 40, shflnb", "below": "1",
        "unmatched": "1",
    }  # fmt: skip
    third = run_of(tmp_path / "c/testgpu.spmm.csv", {(v, ""): 104.0 for v in range(41)})
    assert compare_runs.main([str(first), str(third), "--out", str(tmp_path)]) == 1
    (row,) = csv.DictReader((tmp_path / "testgpu.repeat.csv").open())
    assert row["within"] == "0"  # in the place of the last comparison of this kind


def test_kinds_share_the_csv_of_a_card(tmp_path: Path) -> None:
    for kind in ("spmm", "skinny"):
        runs = [str(run_of(tmp_path / side / f"testgpu.{kind}.csv", {(64, ""): 30.0})) for side in "ab"]
        assert compare_runs.main([*runs, "--out", str(tmp_path)]) == 0
    assert [r["kind"] for r in csv.DictReader((tmp_path / "testgpu.repeat.csv").open())] == ["spmm", "skinny"]


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run_of(tmp_path / "a/testgpu.spmm.csv", {(64, ""): 30.0})
    other = run_of(tmp_path / "b/other.spmm.csv", {(64, ""): 30.0}, gpu="other")
    kind = run_of(tmp_path / "b/testgpu.skinny.csv", {(64, ""): 30.0})
    short = run_of(tmp_path / "b/testgpu.spmm.csv", {(64, ""): 10.0, (32, ""): 2.0})
    records.Results(tmp_path / "c/testgpu.spmm.csv", ("gpu", "seconds")).close()
    refused = {
        other: "on ['other', 'testgpu']",
        kind: "['skinny', 'spmm']",
        short: "above 20 us",
        tmp_path / "c/testgpu.spmm.csv": "no column median_us",
        tmp_path / "d": "No such file",
    }
    for second, said in refused.items():
        with pytest.raises(SystemExit):
            compare_runs.main([str(one), str(second), "--out", str(tmp_path)])
        assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.repeat.csv"))


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


@pytest.mark.parametrize("level", list(bench_all.PARTS))
def test_all_scripts_fit_into_the_time(level: str) -> None:
    parts, seconds = bench_all.PARTS[level], bench_all.SECONDS[level]
    assert sum(part.least_s for part in parts) <= seconds
    assert all((Path(bench_all.__file__).parent / part.command[0]).exists() for part in parts)
    for slow in (False, True):
        left = seconds
        for number, part in enumerate(parts):
            share = bench_all.share_of(parts[number:], left)
            assert part.least_s <= share <= part.most_s
            left -= share if slow else part.least_s
        assert left >= 0
    assert bench_all.share_of(parts, -5.0) == 0.0


def test_one_script_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"a": "sys.exit(3)", "b": "time.sleep(60)", "c": "print(sys.argv[1:])"}.items():
        (tmp_path / f"{name}.py").write_text(f"import sys, time\n{text}\n")
    parts = [bench_all.Part((f"{name}.py",), 0.0, 0.5, "--budget-s" if name == "c" else "") for name in "abc"]
    monkeypatch.setitem(bench_all.PARTS, "full", parts)
    monkeypatch.setattr(bench_all, "__file__", str(tmp_path / "bench_all.py"))
    monkeypatch.setattr(bench_all, "GRACE_S", 2.0)
    assert bench_all.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "exit code 3" in said and "longer than its time" in said and "of 0 s, exit code 0" in said
    monkeypatch.setitem(bench_all.PARTS, "full", parts[2:])
    assert bench_all.main(["--budget-s", "30"]) == 0


def test_what_an_earlier_search_found_is_kept_where_it_was_faster(tmp_path: Path) -> None:
    paths = [tmp_path / f"{side}.peers.csv" for side in ("earlier", "later")]
    row = {"gpu": "testgpu", "m": 8, "k": 8, "n": 8, "dtype": "float16", "sparsity": 0.5}
    times = {
        "torch BSR 64, tuned": ("5.0", "6.0", "5.0"), "torch BSR 128, tuned": ("7.0", "6.0", "6.0"),
        "torch BSR 32, tuned": ("5.0", "", "5.0"), "torch.compile": ("", "6.0", "6.0"),
        "torch BSR 64": ("5.0", "6.0", "6.0"), "cuSPARSELt 2:4, searched": (None, "6.0", "6.0"),
    }  # fmt: skip
    for side, path in enumerate(paths):
        results = records.Results(path, bench_peers.FIELDS)
        for peer, given in times.items():
            if given[side] is not None:
                results.add(row | {"peer": peer, "median_us": given[side], "date": f"2026-01-0{side + 1}"})
        results.close()
    assert keep_faster.main([str(path) for path in paths]) == 0
    kept = {r["peer"]: r for r in csv.DictReader(paths[1].open())}
    assert {peer: r["median_us"] for peer, r in kept.items()} == {peer: given[2] for peer, given in times.items()}
    assert kept["torch BSR 64, tuned"]["date"] == "2026-01-01" and kept["torch BSR 64"]["date"] == "2026-01-02"
    records.Results(paths[0], bench_peers.FIELDS).add(row | {"gpu": "other", "peer": "torch.compile"})
    with pytest.raises(SystemExit, match="different cards: other, testgpu"):
        keep_faster.main([str(path) for path in paths])
    records.Results(paths[0], ("gpu", "seconds")).close()
    with pytest.raises(SystemExit, match=r"not a CSV of bench_peers\.py"):
        keep_faster.main([str(path) for path in paths])


def test_the_tuner_s_finds_serve_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of as many columns, and only for the same block."""
    meta = {"SPLIT_N": 32, "num_warps": 8}
    monkeypatch.setattr(peers, "_BSR_TUNED", {(64, 4096, True): meta, (32, 4096, True): {"SPLIT_N": 16}})
    assert peers.known_metas(64, 4096) == [meta]
    assert peers.known_metas(64, 8192) == [{"SPLIT_N": 64, "num_warps": 8}] == [peers.bsr_start(64, 8192)]
    assert peers.known_metas(128, 4096) == []
