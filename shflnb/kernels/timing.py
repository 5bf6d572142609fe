"""Device memory, a stream and a clock for measuring products without a framework: what the tuner works with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DeviceError
from .launch import DeviceContext, DeviceMemory
from .views import DeviceView

__all__ = ["Bench", "Operand"]

SAMPLE_US = 400.0
"""Device time of one sample: the resolution of the events (0.5 us) is then below 0.2 %."""
MOST_LAUNCHES = 50


def launches_for(us: float, calls: int) -> int:
    """Launches that make a sample, if one takes so many microseconds; each of the calls as often as the others."""
    return max(1, int(min(MOST_LAUNCHES, SAMPLE_US / max(us, 1.0))) // calls) * calls


@dataclass(frozen=True)
class Operand(DeviceView):
    """A matrix on a device that belongs to no framework, with the stream that its calls go to."""

    stream: int = 0
    scratch: Callable[[int, int, str], Any] | None = None
    """Where calls find their workspaces."""

    def new_matrix(self, rows: int, cols: int) -> Operand:
        """An uninitialised matrix of the same dtype for the time of a call, see `views.new_matrix`."""
        if self.scratch is None:
            raise DeviceError("an Operand has workspaces only from the Bench that made it")
        found: Operand = self.scratch(rows, cols, self.dtype)
        return found

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Says that this is a device array and on which stream its calls run; `device_view` takes the record."""
        return {"stream": self.stream or None}


def check_driver(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call, or `DeviceError`."""
    if int(result[0]):
        raise DeviceError(f"{what} failed with {getattr(result[0], 'name', result[0])}; run `shflnb doctor`")
    return result[1] if len(result) > 1 else None


class Bench:
    """A stream of its own on one device; use it in a `with` block."""

    def __init__(self, context: DeviceContext) -> None:
        self.context = context
        self.driver = context.driver
        self._scratch: dict[tuple[int, int, str], list[Operand]] = {}

    def __enter__(self) -> Bench:
        with self.context.current():
            flag = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = check_driver(self.driver.cuStreamCreate(flag), "making a stream")
            self._events = [check_driver(self.driver.cuEventCreate(0), "making an event") for _ in range(2)]
        self.stream = int(self._stream)
        return self

    def __exit__(self, *_: Any) -> None:
        with self.context.current():
            self.driver.cuStreamSynchronize(self._stream)
            for event in self._events:
                self.driver.cuEventDestroy(event)
            self.driver.cuStreamDestroy(self._stream)

    def matrix(self, a: np.ndarray, dtype: str) -> Operand:
        """A copy of a C-contiguous (rows, cols) host array of 2-byte values, rows starting at 16-byte boundaries."""
        rows, cols = a.shape
        ld = -(-cols // 8) * 8
        padded = a if ld == cols else np.pad(a, ((0, 0), (0, ld - cols)))
        with self.context.current():
            memory = DeviceMemory(self.context, [padded])
        return Operand(memory.addresses[0], (rows, cols), (ld, 1), dtype, self.context.ordinal, memory, self.stream,
                       self._workspace)  # fmt: skip

    def _workspace(self, rows: int, cols: int, dtype: str) -> Operand:
        """One of two matrices of this size in turns, so that both workspaces of a call are there; kept until the end.

        Calls on one stream may share them, and a captured graph finds them again.
        """
        pair = self._scratch.setdefault((rows, cols, dtype), [])
        if len(pair) < 2:
            pair.append(self.matrix(np.zeros((rows, cols), np.uint16), dtype))
        else:
            pair.reverse()
        return pair[-1]

    def poison(self, operand: Operand) -> None:
        """Fill an operand with NaN, behind everything in the stream."""
        with self.context.current():
            count = operand.shape[0] * operand.strides[0]
            check_driver(self.driver.cuMemsetD16Async(operand.address, 0x7FFF, count, self._stream), "filling memory")

    def fetch(self, operand: Operand, dtype: np.dtype) -> np.ndarray:
        """The values of an operand on the host, once everything in the stream is done."""
        rows, cols = operand.shape
        ld = operand.strides[0]
        host = np.empty((rows, ld), dtype)
        with self.context.current():
            check_driver(self.driver.cuStreamSynchronize(self._stream), "waiting for the device")
            check_driver(self.driver.cuMemcpyDtoH(host.ctypes.data, operand.address, host.nbytes), "a copy to the host")
        return host[:, :cols]

    def median_us(self, call: Callable[[], Any] | Sequence[Callable[[], Any]], rounds: int = 7) -> float:
        """Device time of one call in microseconds: the median over replays of a CUDA graph of several calls.

        Several calls are taken in turns, each as often as the others.
        """
        calls = [call] if callable(call) else list(call)
        with self.context.current():
            for one in [*calls, *calls]:
                one()
            launches = launches_for(self._elapsed_us(calls[0]), len(calls))
            graph, replay = self._captured(calls, launches)
            wanted = launches_for(self._elapsed_us(replay) / launches, len(calls))
            if wanted > launches:  # the host was slower than the device: more of them make a sample
                self._destroy(graph)
                launches = wanted
                graph, replay = self._captured(calls, launches)
            times = [self._elapsed_us(replay) / launches for _ in range(rounds)]
            self._destroy(graph)
        return statistics.median(times)

    def _captured(
        self, calls: Sequence[Callable[[], Any]], launches: int
    ) -> tuple[tuple[Any, Any], Callable[[], None]]:
        """A graph of so many launches, the calls in turns, with what replays it; replayed once."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check_driver(self.driver.cuStreamBeginCapture(self._stream, mode), "capturing a graph")
        try:
            for number in range(launches):
                calls[number % len(calls)]()
        finally:
            graph = check_driver(self.driver.cuStreamEndCapture(self._stream), "capturing a graph")
        ready = check_driver(self.driver.cuGraphInstantiate(graph, 0), "making a graph")

        def replay() -> None:
            check_driver(self.driver.cuGraphLaunch(ready, self._stream), "replaying a graph")

        replay()
        return (graph, ready), replay

    def _destroy(self, graph: tuple[Any, Any]) -> None:
        self.driver.cuGraphExecDestroy(graph[1])
        self.driver.cuGraphDestroy(graph[0])

    def _elapsed_us(self, call: Callable[[], Any]) -> float:
        start, end = self._events
        check_driver(self.driver.cuEventRecord(start, self._stream), "recording an event")
        call()
        check_driver(self.driver.cuEventRecord(end, self._stream), "recording an event")
        check_driver(self.driver.cuEventSynchronize(end), "waiting for the device")
        return 1e3 * float(check_driver(self.driver.cuEventElapsedTime(start, end), "reading the clock"))
