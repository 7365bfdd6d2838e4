"""Architectures as parameters of tests that compile ahead of time."""

from collections.abc import Iterable

import pytest

from benchmarks.static.figures import CONSUMER


def in_make_test(architectures: Iterable[str]) -> list:
    """The architectures, those of GPUs outside data centers marked `aot_all`."""
    return [pytest.param(name, marks=pytest.mark.aot_all) if name in CONSUMER else name for name in architectures]
