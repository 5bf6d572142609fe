"""Measuring on the device at hand, and saying what will run: `shflnb.tune` and `shflnb.explain`."""

from .explain import Explanation, explain
from .tune import Measured, TuneReport, forget_device, tune

__all__ = ["Explanation", "Measured", "TuneReport", "explain", "forget_device", "tune"]
