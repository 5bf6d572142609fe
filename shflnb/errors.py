"""The errors and warnings that shflnb raises; every one of them is a `ShflnbError` or a `UserWarning`."""

__all__ = [
    "ArgumentError",
    "CaptureError",
    "DeviceError",
    "DtypeError",
    "FillInWarning",
    "FormatError",
    "MissingDependencyError",
    "ShapeError",
    "ShflnbError",
]


class ShflnbError(Exception):
    """Base of all errors raised on purpose by shflnb; catch this to catch them all."""


class ArgumentError(ShflnbError, ValueError):
    """An option has a value that is not allowed (a sparsity of 1.5, an unknown activation, ...)."""


class ShapeError(ShflnbError, ValueError):
    """Array shapes do not fit each other or the packed matrix."""


class DtypeError(ShflnbError, TypeError):
    """An array has a dtype, or is of a kind, that the call does not take."""


class FormatError(ShflnbError, ValueError):
    """A packed matrix or a file breaks an invariant of the format and was refused."""


class DeviceError(ShflnbError, RuntimeError):
    """The device cannot run what was asked (no GPU, wrong device, unsupported capability, too little memory)."""


class CaptureError(DeviceError):
    """A call under CUDA graph capture would have had to compile, tune or upload; warm it up before the capture."""


class MissingDependencyError(ShflnbError, ImportError):
    """An optional dependency is needed for this call; the text names the extra to install."""


class FillInWarning(UserWarning):
    """`pack` had to store more than 1.25 times the non-zeros: the matrix does not have the Shfl-BW pattern."""
