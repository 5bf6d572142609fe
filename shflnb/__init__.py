"""shflnb: Shuffled Block-wise (Shfl-BW) sparse weights, pruned, packed and multiplied from pure Python.

    pruned = shflnb.prune(w, sparsity=0.75, block=(64, 64))     # which weights to keep
    packed = pruned.pack()                                      # what is stored; shflnb.pack(w) takes any matrix
    y = shflnb.matmul(packed, x)                                # (m, k) @ (k, n); also packed @ x
    y = shflnb.linear(x, packed, bias)                          # the meaning of torch.nn.functional.linear
    shflnb.save(packed, path); packed = shflnb.load(path)       # safetensors
    report = shflnb.sparsify_(model, 0.75, (64, 64), example_inputs=x)      # a whole torch model, in place
    forecast = shflnb.estimate(model, x)                        # the same table before pruning

Public names are loaded when they are first used: `import shflnb` itself loads neither NumPy nor Numba, SciPy or torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .errors import (
        ArgumentError,
        CaptureError,
        DeviceError,
        DtypeError,
        FillInWarning,
        FormatError,
        MissingDependencyError,
        ShapeError,
        ShflnbError,
    )
    from .formats import ShflBWMatrix, load, pack, save
    from .nn import estimate, sparsify_
    from .ops import linear, matmul
    from .patterns import PruneResult, prune
    from .tuning import explain, tune

__all__ = [
    "ArgumentError",
    "CaptureError",
    "DeviceError",
    "DtypeError",
    "FillInWarning",
    "FormatError",
    "MissingDependencyError",
    "PruneResult",
    "ShapeError",
    "ShflBWMatrix",
    "ShflnbError",
    "__version__",
    "estimate",
    "explain",
    "linear",
    "load",
    "matmul",
    "pack",
    "prune",
    "save",
    "sparsify_",
    "tune",
]

_HOME = {
    **dict.fromkeys(("ShflBWMatrix", "load", "pack", "save"), "formats"),
    **dict.fromkeys(("linear", "matmul"), "ops"),
    **dict.fromkeys(("estimate", "sparsify_"), "nn"),
    **dict.fromkeys(("PruneResult", "prune"), "patterns"),
    **dict.fromkeys(("explain", "tune"), "tuning"),
    **dict.fromkeys((name for name in __all__ if name.endswith(("Error", "Warning"))), "errors"),
}
_SUBPACKAGES = ("errors", "formats", "nn", "ops", "patterns", "reference", "tuning")


def __getattr__(name: str) -> Any:
    """Load a public name, or a subpackage, at its first use (PEP 562)."""
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
