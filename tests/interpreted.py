"""Marks of tests whose Triton kernels run in Triton's interpreter."""

import importlib.metadata
import os
import re

import pytest

LEAST_VERSION = (3, 9)  # the interpreter of 3.6 knows no bfloat16 constants and does not run with NumPy 2.4


def _usable() -> bool:
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", found)[:2]) >= LEAST_VERSION


INTERPRETED = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a separate run: TRITON_INTERPRET=1 python -m pytest -m interpret",
    ),
    pytest.mark.skipif(not _usable(), reason="needs the interpreter of Triton 3.9 or later"),
]


def interpreted(test):
    """Puts the marks on one test."""
    for mark in INTERPRETED:
        test = mark(test)
    return test
