"""Tests of `shflnb.nn` need torch; times are stood in for, so that decisions do not depend on the machine's load."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

if importlib.util.find_spec("torch") is None:  # an extra: without it there is nothing here to test
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the stop watch: sparse layers of the shapes named take `slow` us, others 40, dense layers 100."""
    import shflnb.nn.decide as decide
    from shflnb.nn.modules import ShflLinear

    def install(slow_shapes: set[tuple[int, int]] = frozenset(), slow: float = 150.0) -> None:  # type: ignore[assignment]
        def dense(*args: Any, **kwargs: Any) -> tuple[str, Any]:
            return ("dense", None)

        def sparse(layer: ShflLinear, *args: Any, **kwargs: Any) -> tuple[str, Any]:
            return ("sparse", (layer.out_features, layer.in_features))

        def call_us(calls: tuple[str, Any], *args: Any, **kwargs: Any) -> float:
            kind, shape = calls
            return 100.0 if kind == "dense" else slow if shape in slow_shapes else 40.0

        monkeypatch.setattr(decide, "dense_call", dense)
        monkeypatch.setattr(decide, "sparse_call", sparse)
        monkeypatch.setattr(decide, "call_us", call_us)

    return install
