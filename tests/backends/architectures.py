"""Architectures as parameters of tests that compile ahead of time."""

from collections.abc import Iterable

import pytest

IN_MAKE_TEST = ("sm_80", "sm_90", "sm_90a", "gfx942")
"""One per kind of instructions; compiling for all of them takes too long for every run."""
PARTLY = "sm_80"
"""Whose budgets `make test` checks for some kernels alone: the same sources are compiled for sm_90 or sm_90a, and
`make aot-all` compiles all of them for every architecture."""


def in_make_test(architectures: Iterable[str]) -> list:
    """The architectures, those that are not IN_MAKE_TEST marked `aot_all`."""
    return [name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.aot_all) for name in architectures]
