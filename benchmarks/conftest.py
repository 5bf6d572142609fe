"""What pytest-benchmark records beside its figures: the machine as the CSVs describe it, GPU and clocks included."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Add GPU, driver, clocks and versions to the JSON that `--benchmark-save` and `--benchmark-compare` use."""
    import torch
    from records import machine

    machine_info["shflnb"] = machine("cuda" if torch.cuda.is_available() else "cpu")
