"""The examples of the PyTorch side run, in their short mode."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "needs", "says"),
    [
        ("sparsify_model", None, "12 of 12 layers sparse"),
        ("finetune_language_model", None, "87.5% pruned at once"),
        ("huggingface_bert", "transformers", "equal after reload: True"),
        ("estimate_before_pruning", None, "predicted for NVIDIA H200, not measured"),
    ],
)
def test_example_runs(name: str, needs: str | None, says: str) -> None:
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs} (not installed)")
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--short"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
