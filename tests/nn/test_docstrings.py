"""The examples in the docstrings of `shflnb.nn` run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import shflnb.nn

MODULES = ["shflnb.nn", *(info.name for info in pkgutil.iter_modules(shflnb.nn.__path__, "shflnb.nn."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_there_are_examples() -> None:
    tests = [t for name in MODULES for t in doctest.DocTestFinder().find(importlib.import_module(name)) if t.examples]
    assert len(tests) >= 6
