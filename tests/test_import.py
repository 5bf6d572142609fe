"""`import shflnb` is light: no heavy library, no CUDA context; and every public name is there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import shflnb

PROBE = """
import json, sys
before = set(sys.modules)
import shflnb
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
try:
    maps = open("/proc/self/maps").read()
except OSError:
    maps = ""
print(json.dumps({"loaded": sorted(loaded), "driver": "libcuda.so" in maps, "runtime": "libcudart" in maps}))
"""
HEAVY = {"torch", "numba", "numba_cuda", "llvmlite", "scipy", "cuda", "matplotlib", "sklearn", "typer", "rich"}


def probe(program: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_import_loads_nothing_heavy_and_no_cuda() -> None:
    found = probe(PROBE)
    assert "shflnb" in found["loaded"]
    assert not HEAVY & set(found["loaded"])
    assert not found["driver"] and not found["runtime"]


def test_the_probe_can_fail() -> None:
    found = probe(PROBE.replace("import shflnb", "import shflnb, scipy.sparse"))
    assert "scipy" in found["loaded"]


def test_formats_and_patterns_load_no_compiler() -> None:
    found = probe(PROBE.replace("import shflnb", "import shflnb; shflnb.pack, shflnb.prune, shflnb.save"))
    assert not {"torch", "numba", "numba_cuda", "llvmlite", "cuda", "sklearn"} & set(found["loaded"])


@pytest.mark.parametrize("name", shflnb.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    if name in ("estimate", "sparsify_"):
        pytest.importorskip("torch")
    value = getattr(shflnb, name)
    assert name == "__version__" or (value.__doc__ or "").strip()
    assert name in dir(shflnb)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'shflnb' has no attribute 'prunes'"):
        shflnb.prunes  # noqa: B018
    assert not hasattr(shflnb, "torch")


def test_errors_can_be_caught_as_one_and_as_the_builtin() -> None:
    for name in shflnb.__all__:
        if name.endswith("Error") and name != "ShflnbError":
            assert issubclass(getattr(shflnb, name), shflnb.ShflnbError)
    assert issubclass(shflnb.ShapeError, ValueError) and issubclass(shflnb.DtypeError, TypeError)
