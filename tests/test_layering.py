"""The walls of the house, read from the imports: which room may import which, and who may use which library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import shflnb

PACKAGE = Path(shflnb.__file__).parent

# Room by room, from the ground up: the rooms each may import (itself always). A new module must be given a room here.
ROOMS: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "machine": set(),
    "arrays": {"errors"},
    "formats": {"arrays", "errors"},
    "patterns": {"formats", "arrays", "errors"},
    "reference": {"formats", "arrays", "errors"},
    "kernels": {"machine", "formats", "arrays", "errors"},
    "ops": {"machine", "kernels", "formats", "arrays", "errors"},
    "tuning": {"machine", "ops", "kernels", "formats", "arrays", "errors"},
    "nn": {"machine", "tuning", "ops", "kernels", "patterns", "formats", "arrays", "errors", "_version"},
    "doctor": {"machine", "ops", "kernels", "formats", "errors", "_version"},
    "digits": {"errors"},
    "demo": {"digits", "machine", "nn", "ops", "kernels", "patterns", "formats", "arrays", "errors"},
    "bench": {"machine", "nn", "ops", "kernels", "formats", "arrays", "errors"},
    "cli": {"bench", "demo", "doctor", "nn", "tuning", "ops", "patterns", "formats", "arrays", "errors", "_version"},
    "__init__": {"nn", "tuning", "ops", "patterns", "reference", "formats", "errors", "_version"},
    "__main__": {"cli"},
}

# Libraries that only some rooms or modules may use; what is not named here and not in ANYWHERE nobody may use.
LIBRARIES: dict[str, set[str]] = {
    "torch": {"nn"},
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "cuda": {"kernels"},
    "scipy": {"formats", "patterns", "reference"},
    "threadpoolctl": {"bench", "doctor", "digits", "demo"},
    "safetensors": {"formats", "cli"},
    "platformdirs": {"kernels", "tuning", "doctor"},
    "filelock": {"kernels", "tuning"},
    "sklearn": {"digits"},
    "matplotlib": {"patterns", "nn", "tuning"},
    "transformers": {"nn"},
    "typer": {"cli"},
    "rich": {"cli", "doctor", "nn"},
}
ANYWHERE = {"numpy", "ml_dtypes"} | set(sys.stdlib_module_names)
NEVER_AT_IMPORT = {
    "torch": "nn",
    "matplotlib": None,
    "sklearn": None,
    "transformers": None,
}  # library: the one room where it may be

# `packed @ x` is the product: the operator of the format is the one look upward, inside the method.
EXCEPTIONS = {("formats.shflbw", "ops")}


class Import(NamedTuple):
    """One imported name: `target` is "torch.nn" for a library or ".formats.pack" for a module of shflnb."""

    module: str
    target: str
    line: int
    at_import: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import of a module, wherever it stands; the ones under TYPE_CHECKING too (they draw arrows as well)."""
    package = module.split(".") if is_package and module != "__init__" else module.split(".")[:-1]

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = at_import and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inside = False
            if isinstance(child, ast.Import):
                for alias in child.names:
                    own = alias.name.removeprefix("shflnb") if alias.name.split(".")[0] == "shflnb" else alias.name
                    yield Import(module, own or ".", child.lineno, at_import)
            elif isinstance(child, ast.ImportFrom):
                yield from resolve(child, at_import)
            else:
                yield from walk(child, inside)

    def resolve(node: ast.ImportFrom, at_import: bool) -> Iterator[Import]:
        if node.level == 0 and (node.module or "").split(".")[0] != "shflnb":
            yield Import(module, node.module or "", node.lineno, at_import)
            return
        if node.level == 0:
            base = (node.module or "").split(".")[1:]
        else:
            base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            yield Import(module, "." + ".".join(base or [alias.name]), node.lineno, at_import)

    yield from walk(ast.parse(source), True)


def room_of(module: str) -> str:
    return module.strip(".").split(".")[0]


def faults(found: Import) -> Iterator[str]:
    """What is wrong with one import, in words."""
    where = f"shflnb/{found.module} line {found.line}"
    room = room_of(found.module)
    if found.target.startswith("."):
        other = room_of(found.target)
        if (
            other != room
            and other not in ROOMS[room]
            and not ((found.module, other) in EXCEPTIONS and not found.at_import)
        ):
            yield f"{where}: {room} imports {other}; it may import {', '.join(sorted(ROOMS[room])) or 'nothing'}"
        return
    library = found.target.split(".")[0]
    if library in ANYWHERE:
        return
    allowed = LIBRARIES.get(library)
    if allowed is None:
        yield f"{where}: {library} is no library of this project"
    elif room not in allowed and found.module not in allowed:
        yield f"{where}: {library} belongs in {', '.join(sorted(allowed))} only"
    elif library in NEVER_AT_IMPORT and found.at_import and room != NEVER_AT_IMPORT[library]:
        yield f"{where}: {library} may only be imported inside the function that needs it"


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_hold_the_walls(path: Path) -> None:
    module = module_name(path)
    assert room_of(module) in ROOMS, f"{module} has no room yet; give it one in ROOMS"
    found = imports_of(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    wrong = [text for each in found for text in faults(each)]
    assert not wrong, "\n".join(wrong)


def test_rooms_point_down_only() -> None:
    order = list(ROOMS)
    for room, below in ROOMS.items():
        if room not in ("__init__", "__main__"):
            assert all(order.index(other) < order.index(room) for other in below), room


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("formats.pack", "import torch", "torch belongs in nn only"),
        ("formats.pack", "def f():\n    from torch import nn", "torch belongs in nn only"),
        ("formats.pack", "from ..ops import matmul", "formats imports ops"),
        ("formats.pack", "from .. import ops", "formats imports ops"),
        ("formats.pack", "import shflnb.kernels.launch", "formats imports kernels"),
        ("formats.pack", "from shflnb import patterns", "formats imports patterns"),
        ("formats.shflbw", "from ..ops import matmul", "formats imports ops"),
        ("formats.shflbw", "def f():\n    from ..ops import matmul", None),
        ("ops", "from .patterns import prune", "ops imports patterns"),
        ("ops", "import numba.cuda", "numba belongs in kernels only"),
        ("ops", "from .kernels.launch import launch", None),
        ("kernels.spmm_cpu", "import numba", None),
        ("kernels.launch", "import scipy", "scipy belongs in"),
        ("kernels.launch", "class A:\n    import cuda.core", None),
        ("cli", "import requests", "requests is no library of this project"),
        ("digits", "import sklearn", "may only be imported inside the function"),
        ("digits", "def f():\n    import sklearn", None),
        ("nn.op", "import torch", None),
    ],
)
def test_the_walls_are_seen(module: str, source: str, fault: str | None) -> None:
    wrong = [text for each in imports_of(source, module, is_package=False) for text in faults(each)]
    if fault is None:
        assert wrong == []
    else:
        assert len(wrong) == 1 and fault in wrong[0]


def test_a_launch_from_the_kernel_cache_needs_no_numba() -> None:
    """Importing numba.cuda takes longer than all else that the first call of a process does."""
    program = """
import subprocess
import sys
from shflnb.kernels import skinny_plan, spmm_device, spmm_plan
from shflnb.kernels.select import candidates
for spec in (skinny_plan.turn_in_spec(), skinny_plan.turn_out_spec(), spmm_plan.transpose_spec(True),
             spmm_plan.copy_spec(), spmm_plan.kernel_spec(candidates(64, "float16", (9, 0))[0])):
    print(spec.name)
print("numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
