"""The clock of the tuner, on a device that only keeps time."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from shflnb.kernels.timing import MOST_LAUNCHES, SAMPLE_US, Bench, launches_for


class PlayedClock:
    """A driver whose calls cost `host_us` one by one and `device_us` in a graph, and each replay 2 us more."""

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, host_us: float, device_us: float) -> None:
        self.host_us, self.device_us, self.now = host_us, device_us, 0.0
        self.captured: int | None = None
        self.called: list[int] = []
        self.alive: set[Any] = set()
        self.events: dict[int, float] = {}

    def call(self, number: int) -> None:
        if self.captured is None:
            self.now += self.host_us
        else:
            self.captured += 1
            self.called.append(number)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802 (the driver's names)
        self.captured, self.called = 0, []
        return (0,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, Any]:  # noqa: N802
        launches, self.captured = self.captured, None
        self.alive.add(("graph", launches))
        return 0, ("graph", launches)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:  # noqa: N802
        self.alive.add(("ready", graph[1]))
        return 0, ("ready", graph[1])

    def cuGraphLaunch(self, ready: Any, stream: int) -> tuple[int]:  # noqa: N802
        assert ready in self.alive
        self.now += 2.0 + self.device_us * ready[1]
        return (0,)

    def cuGraphExecDestroy(self, ready: Any) -> None:  # noqa: N802
        self.alive.remove(ready)

    cuGraphDestroy = cuGraphExecDestroy  # noqa: N815

    def cuStreamCreate(self, flag: int) -> tuple[int, int]:  # noqa: N802
        return 0, 7

    def cuEventCreate(self, flags: int) -> tuple[int, int]:  # noqa: N802
        self.events[len(self.events)] = 0.0
        return 0, len(self.events) - 1

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:  # noqa: N802
        self.events[event] = self.now
        return (0,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:  # noqa: N802
        return 0, (self.events[end] - self.events[start]) / 1e3

    def cuEventSynchronize(self, event: int) -> tuple[int]:  # noqa: N802
        return (0,)

    cuStreamSynchronize = cuEventDestroy = cuStreamDestroy = cuEventSynchronize  # noqa: N815


@pytest.mark.parametrize(
    ("host_us", "device_us", "launches"),
    [(4.0, 4.0, MOST_LAUNCHES), (90.0, 4.0, MOST_LAUNCHES), (90.0, 20.0, 19), (300.0, 300.0, 1), (20.0, 900.0, 20)],
)
def test_a_sample_is_long_enough_on_a_slow_host(host_us: float, device_us: float, launches: int) -> None:
    """Also where a call takes the host longer than the device: the start of a replay must not count for much."""
    clock = PlayedClock(host_us, device_us)
    context: Any = SimpleNamespace(driver=clock, current=contextlib.nullcontext)
    with Bench(context) as bench:
        us = bench.median_us(lambda: clock.call(0))
    assert len(clock.called) == launches and us == pytest.approx(device_us + 2.0 / launches)
    assert not clock.alive
    assert us * launches >= min(SAMPLE_US, MOST_LAUNCHES * device_us) * 0.9 or launches == 1


def test_several_calls_are_taken_in_turns() -> None:
    clock = PlayedClock(60.0, 5.0)
    context: Any = SimpleNamespace(driver=clock, current=contextlib.nullcontext)
    with Bench(context) as bench:
        bench.median_us([lambda number=number: clock.call(number) for number in range(3)])
    assert clock.called == [0, 1, 2] * (MOST_LAUNCHES // 3)


def test_every_call_is_launched_at_least_once() -> None:
    assert launches_for(1e6, 7) == 7 and launches_for(0.0, 7) == 49 and launches_for(100.0, 1) == 4
