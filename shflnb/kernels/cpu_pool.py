"""Worker threads and workspaces of the CPU kernels.

Our own few threads, not `numba.prange`: Numba's default layer aborts the process when two threads launch at once, its
choice of layer is global to the process, and its parallel functions take seconds to compile. A kernel here is a `nogil`
function that claims pieces of work from a shared counter until none is left, so the calling thread never waits for a
worker that has not started: it does the work itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np

from ..errors import ArgumentError
from ..machine import usable_cores

__all__ = ["get_num_threads", "run", "set_num_threads", "workspace"]

KEPT_BYTES = 64 << 20
"""A thread keeps a workspace up to this size between calls; a larger one lives for one call only."""


class _Job:
    """One launch: the kernel call, and a lock that opens when the last piece is done."""

    __slots__ = ("call", "done")

    def __init__(self, call: Callable[[], bool]) -> None:
        self.call = call
        self.done = threading.Lock()
        self.done.acquire()


class _Pool:
    """Daemon threads that wait for jobs; they are started when first needed and again after a fork."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self.started = 0
        self.lock = threading.Lock()

    def grow(self, threads: int) -> None:
        with self.lock:
            while self.started < threads:
                threading.Thread(target=_work, args=(self.jobs,), name="shflnb-cpu", daemon=True).start()
                self.started += 1


def _work(jobs: SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
        try:
            if job.call():
                job.done.release()
        except MemoryError:  # no workspace for this thread: the others do its share
            pass
        del job  # while it waits for the next job it must keep no array of this one alive


_pool = _Pool()
_threads = 0


def _after_fork() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def get_num_threads() -> int:
    """Threads that a CPU product may use, the calling one included.

    Set by `set_num_threads`, else by the environment (SHFLNB_NUM_THREADS, OMP_NUM_THREADS or NUMBA_NUM_THREADS, the
    first that holds a positive number), else the processors this process may run on.
    """
    global _threads
    if not _threads:
        _threads = _default_threads()
    return _threads


def _default_threads() -> int:
    for name in ("SHFLNB_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        text = os.environ.get(name, "").partition(",")[0].strip()
        if text.isdigit() and int(text) > 0:
            return int(text)
    return usable_cores()


def set_num_threads(threads: int) -> None:
    """Let CPU products use `threads` threads from now on (the result has the same bits for any number)."""
    global _threads
    if not isinstance(threads, int) or threads < 1:
        raise ArgumentError(f"threads is {threads!r}; expected a positive int")
    _threads = threads


def run(call: Callable[[], bool], helpers: int) -> None:
    """Run `call` here and on up to `helpers` workers; return when every piece of its work is done.

    `call` claims pieces until none is left and returns True in the one thread that finished the last piece.
    """
    if helpers == 0:
        call()
        return
    pool = _pool
    if pool.started < helpers:
        pool.grow(helpers)
    job = _Job(call)
    for _ in range(helpers):
        pool.jobs.put(job)
    if not call():
        job.done.acquire()


class _Kept(threading.local):
    buffers: dict[tuple[str, str], np.ndarray] | None = None


_kept = _Kept()


def workspace(size: int, dtype: str, role: str = "kernel") -> np.ndarray:
    """At least `size` uninitialised numbers, 64-byte aligned, that this thread alone uses; kept for its next call."""
    if _kept.buffers is None:
        _kept.buffers = {}
    found = _kept.buffers.get((dtype, role))
    if found is not None and found.size >= size:
        return found
    itemsize = np.dtype(dtype).itemsize
    raw = np.empty(size * itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    made = raw[start : start + size * itemsize].view(dtype)
    if raw.nbytes <= KEPT_BYTES:
        _kept.buffers[dtype, role] = made
    return made
