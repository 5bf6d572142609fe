"""Times of one layer, dense and sparse, on the device it lives on and in the way the model will be called.

    timing="eager"   a loop of calls: what Python, torch and the kernel cost together, whichever is longest
    timing="graph"   replays of a CUDA graph: the kernels alone

A small weight that is multiplied again and again stays in the cache, which it does not do between two passes of a
model. So few tokens are timed *cold*: on a GPU something else is read through the cache before each call, and the time
of that alone is taken off; on the CPU the calls rotate over copies of the layer that together exceed the cache.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ArgumentError
from .layout import to_feature_major
from .modules import ShflLinear
from .op import activate, turned

__all__ = [
    "COLD_BELOW",
    "TIMINGS",
    "call_us",
    "dense_call",
    "device_name",
    "sparse_call",
    "synchronize",
    "transpose_us",
]

TIMINGS = ("eager", "graph")
_ROUNDS = 7
_SECONDS = {"cuda": 0.04, "cpu": 0.12}
_CPU_CACHE_BYTES = 64 << 20
COLD_BELOW = 512
"""Tokens from which on a layer is bound by arithmetic, so that the place of its weights does not matter."""
_COLD_CALLS, _COLD_ROUNDS = 20, 11


def call_us(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    timing: str = "eager",
    *,
    is_cold: bool = False,
    seconds: float | None = None,
) -> float:
    """Microseconds of one call: the mean over a round of calls taken in turn, of all rounds the median.

    On the CPU the shortest round counts instead: what else runs on the machine only ever makes a round longer.

    Parameters
    ----------
    calls : callables of the same work on different memory
        One is enough on a GPU, and where caching does not matter.
    device : torch.device
    timing : "eager" or "graph"
        "graph" needs a CUDA device; on the CPU both are a loop.
    is_cold : bool
        On a GPU: let each call find its weights in memory, not in the cache. In a loop of eager calls the host's cost
        counts where it is longer.
    seconds : float, optional
        About how long to measure.
    """
    if timing not in TIMINGS:
        raise ArgumentError(f"timing is {timing!r}; expected one of {', '.join(TIMINGS)}")
    seconds = _SECONDS.get(device.type, 0.12) if seconds is None else seconds
    # Events and captures belong to the current device: on another one they would time nothing.
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), current:
        once = _once(calls, device)
        if is_cold and device.type == "cuda":
            cold = _cold_us(calls[0], device)
            return cold if timing == "graph" else max(cold, _loop_us(calls, device, "eager", seconds, once))
        return _loop_us(calls, device, timing, seconds, once)


def _once(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Seconds of a call, roughly, after one to warm up."""
    for call in calls:
        call()
    synchronize(device)
    start = time.perf_counter()
    for call in calls:
        call()
    synchronize(device)
    return max((time.perf_counter() - start) / len(calls), 1e-7)


def _loop_us(
    calls: Sequence[Callable[[], Any]], device: torch.device, timing: str, seconds: float, once: float
) -> float:
    turns = max(1, min(200, round(seconds / _ROUNDS / once / len(calls))))
    run, per_run = _runner(calls, turns, device, timing)
    run()
    # A whole model that takes seconds is not run seven times.
    rounds = _ROUNDS if once * _ROUNDS < 2.5 else 3
    times = [_timed(run, device) for _ in range(rounds)]
    return (min(times) if device.type == "cpu" else statistics.median(times)) / per_run * 1e6


def _cold_us(call: Callable[[], Any], device: torch.device) -> float:
    """Device microseconds of a call whose operands are not in the cache, by the difference of two CUDA graphs."""
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    # Read, not written: dirty lines would have to go back to memory while the call runs.
    other = torch.zeros(2 * cache // 4, dtype=torch.float32, device=device)

    def sweep() -> None:
        other.sum()

    def sweep_and_call() -> None:
        other.sum()
        call()

    with_call, _ = _runner([sweep_and_call], _COLD_CALLS, device, "graph")
    without, _ = _runner([sweep], _COLD_CALLS, device, "graph")
    with_call(), without()
    differences = [_timed(with_call, device) - _timed(without, device) for _ in range(_COLD_ROUNDS)]
    return max(0.5, statistics.median(differences) / _COLD_CALLS * 1e6)


def _runner(
    calls: Sequence[Callable[[], Any]], turns: int, device: torch.device, timing: str
) -> tuple[Callable[[], None], int]:
    def loop() -> None:
        for _ in range(turns):
            for call in calls:
                call()

    if timing == "eager" or device.type != "cuda":
        return loop, turns * len(calls)
    graph = torch.cuda.CUDAGraph()
    turns = min(turns, max(1, 64 // len(calls)))
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    return graph.replay, turns * len(calls)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run; on a device between two events, which a slow host delays as it delays the model."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """What the device is called: "NVIDIA H200", or "CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _input(n: int, k: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device=like.device).manual_seed(n * 31 + k)
    return torch.randn(n, k, generator=generator, device=like.device, dtype=dtype)


def _copies(n: int, nbytes: int, device: torch.device) -> int:
    if n >= COLD_BELOW or device.type != "cpu":
        return 1
    return max(1, min(16, -(-_CPU_CACHE_BYTES // max(1, nbytes))))


def dense_call(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    dtype: torch.dtype,
    activation: str | None = None,
    *,
    summed: bool = False,
) -> list[Callable[[], Any]]:
    """Calls of the dense layer on `n` tokens, token-major as in the dense model, with the activation and the sum that
    would be fused.
    """
    weight = weight.detach().to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    x = _input(n, weight.shape[1], weight, dtype)
    copies = _copies(n, weight.numel() * weight.element_size(), weight.device)
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]

    def call(w: torch.Tensor) -> Callable[[], Any]:
        return lambda: activate(F.linear(x, w, bias), activation)

    calls = [call(w) for w in weights]
    return _with_sum(calls, _input(n, weight.shape[0], weight, dtype)) if summed else calls


def _with_sum(calls: Sequence[Callable[[], Any]], residual: torch.Tensor) -> list[Callable[[], Any]]:
    """The calls, and the sum that their results go into."""

    def summed(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: residual + call()

    return [summed(call) for call in calls]


def sparse_call(
    layer: ShflLinear,
    n: int,
    dtype: torch.dtype,
    *,
    feature_in: bool,
    layout: str,
    activation: str | None = None,
    summed: bool = False,
) -> list[Callable[[], Any]]:
    """Calls of a packed layer on `n` tokens in the layouts of the plan, with the sum that its result goes into."""
    x = _input(n, layer.in_features, layer.values, dtype)
    x = to_feature_major(x) if feature_in else x
    copies = _copies(n, layer.values.numel() * layer.values.element_size(), layer.values.device)
    layers = []
    for number in range(copies):
        twin = layer if number == 0 and layer.values.dtype == dtype else copy.deepcopy(layer).to(dtype)
        twin = _detached(twin)
        twin.layout, twin.shared, twin.joins_sum = layout, None, summed
        twin.set_activation(activation)
        layers.append(twin)

    def call(one: nn.Module) -> Callable[[], Any]:
        return lambda: one(x)

    calls = [call(one) for one in layers]
    return _with_sum(calls, _input(n, layer.out_features, layer.values, dtype)) if summed else calls


def _detached(layer: ShflLinear) -> ShflLinear:
    """A second module on the same tensors, so that layout and activation can be tried without touching the model."""
    twin = copy.copy(layer)
    twin.__dict__["_buffers"] = dict(layer._buffers)
    return twin


def transpose_us(n: int, k: int, like: torch.Tensor, dtype: torch.dtype, timing: str) -> float:
    """Microseconds to make a token-major (n, k) tensor feature-major."""
    x = _input(n, k, like, dtype)
    return call_us([lambda: turned(x)], like.device, timing)
