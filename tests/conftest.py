"""What all tests share: the markers `gpu`, which skips with a reason that names what was found, and `full`."""

from __future__ import annotations

import importlib.util

import hypothesis
import pytest

from shflnb.machine import CudaDriver, find_cuda

# No timing in tests: a slow or busy machine must not fail one.
hypothesis.settings.register_profile("shflnb", deadline=None)
hypothesis.settings.load_profile("shflnb")


def missing_gpu(found: CudaDriver, min_capability: tuple[int, int]) -> str | None:
    """Why a test that needs a GPU cannot run here, or None when it can."""
    wanted = f"needs a CUDA GPU of capability {min_capability[0]}.{min_capability[1]} or newer"
    if found.problem is not None:
        return f"{wanted}; found: {found.problem}"
    best = max(found.devices, key=lambda device: device.capability)
    if best.capability < min_capability:
        return f"{wanted}; found: {best.name} of capability {best.capability[0]}.{best.capability[1]}"
    if importlib.util.find_spec("numba_cuda") is None:
        return f"{wanted}; found: {best.name}, but numba-cuda is not installed (extra cu12 or cu13)"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full") is not None])
        items[:] = [item for item in items if item.get_closest_marker("full") is None]
    # one of the tests that build kernels begins, so that the others' are built beside all other tests; these come last
    builds = [item for item in items if item.path.name == "test_compile_all.py"]
    items[:] = [*builds[:1], *(item for item in items if item.path.name != "test_compile_all.py"), *builds[1:]]
    marked = [(item, marker) for item in items if (marker := item.get_closest_marker("gpu")) is not None]
    if not marked:
        return
    found = find_cuda()
    for item, marker in marked:
        reason = missing_gpu(found, marker.kwargs.get("min_capability", (8, 0)))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
