"""What hardware is found, with a driver that is only played."""

from __future__ import annotations

import sys
from pathlib import Path

from shflnb import machine


class FakeDriver:
    """The part of the CUDA driver's C interface that `find_cuda` uses, with two devices."""

    devices = (("Alpha", (9, 0), 132, 141 << 30), ("Beta", (7, 5), 40, 15 << 30))

    def __init__(self, init_code: int = 0, count_code: int = 0) -> None:
        self.init_code, self.count_code = init_code, count_code

    def cuDriverGetVersion(self, out) -> int:  # noqa: N802
        out._obj.value = 13000
        return 0

    def cuInit(self, flags) -> int:  # noqa: N802
        return self.init_code

    def cuDeviceGetCount(self, out) -> int:  # noqa: N802
        out._obj.value = len(self.devices)
        return self.count_code

    def cuDeviceGet(self, out, ordinal) -> int:  # noqa: N802
        out._obj.value = ordinal.value
        return 0

    def cuDeviceGetName(self, text, size, device) -> int:  # noqa: N802
        text.value = self.devices[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, out, device) -> int:  # noqa: N802
        out._obj.value = self.devices[device.value][3]
        return 0

    def cuDeviceGetAttribute(self, out, attribute, device) -> int:  # noqa: N802
        _, (major, minor), processors, _ = self.devices[device.value]
        out._obj.value = {16: processors, 75: major, 76: minor}[attribute.value]
        return 0


def test_find_cuda_reads_every_device(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: FakeDriver())
    found = machine.find_cuda()
    assert (found.version, found.problem) == ((13, 0), None)
    assert [(d.name, d.capability, d.multiprocessors, d.memory) for d in found.devices] == list(FakeDriver.devices)


def test_find_cuda_says_why_there_is_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: FakeDriver(init_code=100))
    assert machine.find_cuda().problem == "a driver for CUDA 13.0, but no usable GPU (cuInit: 100)"
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: FakeDriver(count_code=3))
    assert machine.find_cuda().problem == "the CUDA driver is installed, but cuDeviceGetCount failed with code 3"

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", no_library)
    assert machine.find_cuda().problem == "no CUDA driver (libcuda.so.1 is not installed)"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.find_cuda().problem == "CUDA does not exist for macOS"


def test_the_real_machine_has_a_processor() -> None:
    assert machine.usable_cores() >= 1
    assert machine.cpu_name()
    if Path("/proc/cpuinfo").exists():
        assert set(machine.cpu_features()) <= set(Path("/proc/cpuinfo").read_text().split())
