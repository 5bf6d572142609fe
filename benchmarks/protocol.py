"""How every benchmark here measures, in one place: check, warm by time, replay, median.

    1. The result is compared with a float32 product of the dequantised weight before anything is timed; that of few
       columns also at the end of a chain of launches.
    2. Device times are replays of a CUDA graph of several launches between two events. An untimed replay of the same
       graph runs right before the timed one, so that neither the host nor what ran before is in the figure.
       What cannot be captured is launched behind a kernel that sleeps until the host is done ("events").
    3. All subjects of a comparison are timed in turns, round by round, so that clocks and temperature meet all of them
       (on the CPU one after the other: see `_measure_host`).
    4. Two loads. "burst": samples of half a millisecond with longer pauses between them, so that the card keeps its
       clock: what one product takes. "sustained": samples of 2 ms without pauses, dense and sparse in turns, at the
       card's power limit: what a stream of nothing but products takes.
    5. Median, 10th and 90th percentile over the rounds. `inputs` says "warm" (one set of operands, replayed) or
       "rotated" (as many sets in turn as exceed the L2 cache twice).
    6. Every row goes to the CSV as soon as it is known, with the error of its check and the clock it ran at.

On the CPU (`device="cpu"`) the same code times with the host's clock. Run scripts from the root of the repository.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from shflnb.kernels.compiler import collector_paused

__all__ = [
    "ERROR_LIMIT",
    "ROUNDS",
    "STEADY_S",
    "Timing",
    "check",
    "check_chained",
    "device_clock",
    "eager_us",
    "feed",
    "measure",
    "relative_error",
    "rotations",
    "sm_clock_mhz",
    "summarise",
]

ROUNDS = 15
SAMPLE_US = 2000.0  # a replay begins 5 to 10 us after its event: with few launches that time would count as theirs
"""Device time of one sample: enough launches that the resolution of the events (0.5 us) stays below 0.1 %."""
BURST_SAMPLE_US, BURST_PAUSES, BURST_PAUSE_S = 500.0, 5.0, 0.01
"""A pause lasts this many times as long as a sample and its untimed replay, but no longer than these seconds."""
MOST_LAUNCHES, SLOW_US = 300, 5e3
"""Most launches of a sample; and a launch so long that one is enough."""
STEADY_S = 0.4
"""Seconds of running after which the clock has found its place under the power limit; samples before that depend on
what ran before (with 0.03 s two runs of the tables differed by up to 5 %)."""
CHAIN_US, CHAINS = 500.0, 3
"""Device time of a chain of launches whose last result is checked, and how many such chains."""
HOST_PAUSE_S = 0.08
ERROR_LIMIT = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 1e-12}
"""Largest ||out - reference|| / ||reference||: the rounding of the result, doubled and more."""

Call = Callable[[], Any]


# -- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch: percentiles over `samples` samples of `launches` launches each."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    launches: int
    method: str
    """"graph", "events" or "host"."""
    sm_mhz: float | None = None

    def row(self) -> dict[str, Any]:
        """The columns of a CSV row that a timing fills."""
        return {
            "median_us": round(self.median_us, 3), "p10_us": round(self.p10_us, 3), "p90_us": round(self.p90_us, 3),
            "samples": self.samples, "launches": self.launches, "method": self.method,
            "sm_mhz": "" if self.sm_mhz is None else round(self.sm_mhz),
        }  # fmt: skip


def summarise(samples: Sequence[float], launches: int, method: str, sm_mhz: float | None = None) -> Timing:
    """The `Timing` of samples in microseconds per launch."""
    p10, median, p90 = np.percentile(np.asarray(samples, dtype=np.float64), (10, 50, 90))
    return Timing(float(median), float(p10), float(p90), len(samples), launches, method, sm_mhz)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in float32 or wider; NaN if `out` has any."""
    wide = reference if reference.dtype == torch.float64 else reference.float()
    difference = torch.linalg.vector_norm(out.to(wide.dtype) - wide)
    return float(difference / torch.linalg.vector_norm(wide).clamp_min(1e-30))


def check(call: Call, reference: torch.Tensor, dtype: str, *, poison: torch.Tensor | None = None) -> tuple[float, bool]:
    """(error, whether it is small enough) of a call's result; `poison` is its output buffer, filled with NaN before."""
    if poison is not None:
        poison.fill_(float("nan"))
    error = relative_error(call(), reference)
    return error, error <= ERROR_LIMIT[dtype]


def check_chained(
    calls: Sequence[Call], reference: torch.Tensor, dtype: str, device: str = "cuda", *, poison: torch.Tensor
) -> tuple[float, bool]:
    """As `check`, of calls as they are timed: in a CUDA graph, where a kernel may begin before the last one has ended.

    All calls write the same result to `poison`; what the last launch left there counts, of several replays.
    """
    if not device.startswith("cuda"):
        return check(calls[-1], reference, dtype, poison=poison)
    chain, errors = _Graph(calls, CHAIN_US), []
    for _ in range(CHAINS):
        with torch.cuda.stream(chain.stream):
            poison.fill_(float("nan"))
            chain.graph.replay()
            errors.append(relative_error(poison, reference))
    return max(errors, key=lambda e: (e != e, e)), all(e <= ERROR_LIMIT[dtype] for e in errors)


# -- timing -----------------------------------------------------------------------------------------------------------


class _Runner(Protocol):
    method: str
    launches: int

    def sample(self) -> Callable[[], float]:
        """Start one sample; what is returned gives its microseconds per launch once the device is done."""


def _launches(sample_us: float, once_us: float, calls: int, least: int, most: int = MOST_LAUNCHES) -> int:
    """Launches that fill a sample, from `least` to `most`, rounded up to a multiple of the number of calls."""
    return calls * -(-max(min(round(sample_us / max(once_us, 0.5)), most), least) // calls)


class _Graph:
    """Replays of a captured graph on a stream of its own."""

    method = "graph"

    def __init__(self, calls: Sequence[Call], sample_us: float) -> None:
        self.stream = _side_stream()
        with torch.cuda.stream(self.stream):
            self._capture(calls, _launches(sample_us, _estimate_us(calls), len(calls), least=3))
            wanted = _launches(sample_us, self._replay_us() / self.launches, len(calls), least=3)
            if wanted > 1.25 * self.launches:  # the host was slower than the device: more of them fit
                self._capture(calls, wanted)

    def _capture(self, calls: Sequence[Call], launches: int) -> None:
        """Into `graph`, so many launches, the calls in turns."""
        self.launches = launches
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        self.graph.capture_begin(capture_error_mode="thread_local")
        try:
            for number in range(launches):
                calls[number % len(calls)]()
        finally:
            self.graph.capture_end()

    def _replay_us(self) -> float:
        """Microseconds of a replay, with its start."""
        self.graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3

    def sample(self) -> Callable[[], float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            self.graph.replay()
            begin.record()
            self.graph.replay()
            end.record()
        return lambda: begin.elapsed_time(end) * 1e3 / self.launches


class _Events:
    """Launches between two events, queued while the device sleeps, so that a slow host does not count."""

    method = "events"

    def __init__(self, calls: Sequence[Call], sample_us: float) -> None:
        self.calls = calls
        self.stream = _side_stream()  # the graphs' stream, so that no two subjects run at once
        with torch.cuda.stream(self.stream):
            once_us = _estimate_us(calls)
            start = time.perf_counter()
            for call in calls:
                call()
            host_us = (time.perf_counter() - start) * 1e6 / len(calls)
            torch.cuda.synchronize()
        self.launches = _launches(sample_us, once_us, len(calls), least=1 if once_us > SLOW_US else 2, most=40)
        self.sleep_cycles = int(min(50_000.0, 200.0 + 1.5 * host_us * self.launches) * 1980)

    def sample(self) -> Callable[[], float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(self.sleep_cycles)
            begin.record()
            for number in range(self.launches):
                self.calls[number % len(self.calls)]()
            end.record()
        return lambda: begin.elapsed_time(end) * 1e3 / self.launches


class _Host:
    """Calls between two readings of the host's clock."""

    method = "host"

    def __init__(self, calls: Sequence[Call], sample_us: float) -> None:
        self.calls = calls
        calls[0]()
        start = time.perf_counter()
        for call in calls:
            call()
        once_us = (time.perf_counter() - start) * 1e6 / len(calls)
        self.launches = _launches(sample_us, once_us, len(calls), least=1)

    def sample(self) -> Callable[[], float]:
        start = time.perf_counter()
        for number in range(self.launches):
            self.calls[number % len(self.calls)]()
        elapsed_us = (time.perf_counter() - start) * 1e6 / self.launches
        return lambda: elapsed_us


def measure(
    subjects: Mapping[str, Call | Sequence[Call]],
    device: str = "cuda",
    *,
    rounds: int = ROUNDS,
    sample_us: float | None = None,
    warm_s: float = 0.03,
    no_graph: Iterable[str] = (),
    load: str = "sustained",
) -> dict[str, Timing]:
    """Time every subject, in turns.

    Parameters
    ----------
    subjects : name -> call, or a sequence of calls on different operands that are taken in turn ("rotated")
    device : "cuda" or "cpu"
    rounds, sample_us, warm_s
        Samples of each subject, device microseconds of a sample, and seconds of running before the first one counts.
        Without `sample_us` those of the load.
    no_graph : names
        Subjects that must not be captured into a CUDA graph.
    load : one of `cases.LOADS`
        Whether the device pauses before each sample; the CPU knows no difference.
    """
    is_burst = load == "burst"
    if sample_us is None:
        sample_us = BURST_SAMPLE_US if is_burst and device.startswith("cuda") else SAMPLE_US
    runners: dict[str, _Runner] = {}
    uncaptured = set(no_graph)
    if not device.startswith("cuda"):
        return {name: _measure_host(_as_list(given), rounds, sample_us) for name, given in subjects.items()}
    for name, given in subjects.items():
        runners[name] = _runner(_as_list(given), device, sample_us, name not in uncaptured)
    deadline = time.perf_counter() + (0.0 if is_burst else warm_s)
    while time.perf_counter() < deadline:
        for runner in runners.values():
            runner.sample()
        torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in runners}
    clock, last_us = None, dict[str, float]()
    for number in range(rounds):
        pending = {}
        for name, runner in runners.items():
            if is_burst:
                torch.cuda.synchronize()
                time.sleep(min(BURST_PAUSE_S, BURST_PAUSES * 2e-6 * last_us.get(name, sample_us)))
            pending[name] = runner.sample()
        clock = clock if number else sm_clock_mhz()  # read while the device is busy
        torch.cuda.synchronize()
        for name, read in pending.items():
            samples[name].append(read())
            last_us[name] = samples[name][-1] * runners[name].launches
    return {n: summarise(samples[n], r.launches, r.method, clock) for n, r in runners.items()}


def _measure_host(calls: Sequence[Call], rounds: int, sample_us: float) -> Timing:
    """One subject after the other: threads of OpenMP and BLAS spin after a call and would take a core from the next."""
    time.sleep(HOST_PAUSE_S)
    runner = _Host(calls, sample_us)
    return summarise([runner.sample()() for _ in range(rounds)], runner.launches, runner.method)


def _as_list(given: Call | Sequence[Call]) -> list[Call]:
    return [given] if callable(given) else list(given)


def _runner(calls: Sequence[Call], device: str, sample_us: float, capture: bool) -> _Runner:
    if not device.startswith("cuda"):
        return _Host(calls, sample_us)
    if capture:
        try:
            return _Graph(calls, sample_us)
        except RuntimeError as error:  # what cannot be captured is timed the other way, and its row says so
            print(f"  not capturable ({str(error).splitlines()[0][:120]}); timed with events", file=sys.stderr)
            torch.cuda.synchronize()
    return _Events(calls, sample_us)


_STREAM: list[torch.cuda.Stream] = []


def _side_stream() -> torch.cuda.Stream:
    if not _STREAM:
        _STREAM.append(torch.cuda.Stream())
    _STREAM[0].wait_stream(torch.cuda.current_stream())
    return _STREAM[0]


def _estimate_us(calls: Sequence[Call]) -> float:
    """Rough device microseconds of a call, after every call has run once (which compiles what must be compiled)."""
    for call in calls:
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for number in range(3):
        calls[number % len(calls)]()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / 3


def eager_us(call: Call, device: str = "cuda", *, device_us: float = 0.0, batches: int = 7) -> float:
    """Microseconds of a call in a plain loop: the host's cost or the device's (`device_us`), whichever is longer.

    Without Python's garbage collection, as in `timeit`.
    """
    is_cuda = device.startswith("cuda")
    calls = int(min(20.0, max(3.0, 5e3 / max(device_us, 1.0))))
    if device_us > SLOW_US:
        calls, batches = 1, 3
    found = []
    with collector_paused():
        for _ in range(batches):
            if is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if is_cuda:
                torch.cuda.synchronize()
            found.append((time.perf_counter() - start) / calls * 1e6)
    return float(np.median(found))


def rotations(set_bytes: int, device: str = "cuda", *, times: int = 2, most: int = 128) -> int:
    """Sets of operands of `set_bytes` bytes that together exceed the L2 cache so many times (two to `most` sets).

    What is loaded as the first to leave L2 leaves before what was there: of twice its size, read again and again, some
    is found there each time. Eight times its size shows no more of that.
    """
    cache = 64 << 20
    if device.startswith("cuda"):
        cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return int(min(most, max(2, -(-times * cache // max(set_bytes, 1)))))


def sm_clock_mhz() -> float | None:
    """Clock of the GPU's multiprocessors now, or None where NVML is not installed."""
    try:
        return float(torch.cuda.clock_rate())
    except Exception:  # noqa: BLE001 (NVML's own errors, or no NVML: the figure is then missing, nothing else)
        return None


# -- pytest-benchmark -------------------------------------------------------------------------------------------------

_CLOCK_S = [0.0]


def device_clock() -> float:
    """The clock that pytest-benchmark reads (`timer=device_clock`): `tick` moves it on by measured device time."""
    return _CLOCK_S[0]


def tick(microseconds: float) -> None:
    """Let `device_clock` advance by a measured time."""
    _CLOCK_S[0] += microseconds * 1e-6


def feed(
    benchmark: Any, call: Call | Sequence[Call], device: str, *, rounds: int = ROUNDS, capture: bool = True
) -> None:
    """Give pytest-benchmark `rounds` samples of device time for a checked call; needs `timer=device_clock`."""
    runner = _runner(_as_list(call), device, SAMPLE_US, capture)

    def one_sample() -> None:
        read = runner.sample()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        tick(read())

    benchmark.extra_info.update(method=runner.method, launches=runner.launches)
    benchmark.pedantic(one_sample, rounds=rounds, warmup_rounds=3)
