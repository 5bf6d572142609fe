"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import shflnb

# torch is optional, and device code has no docstring examples that a machine without a GPU could run.
MODULES = [
    info.name
    for info in pkgutil.walk_packages(shflnb.__path__, "shflnb.")
    if not info.name.startswith(("shflnb.nn", "shflnb.kernels")) and not info.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_there_are_examples() -> None:
    found = [
        example
        for name in MODULES
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(found) >= 5
