"""The C++ sources of backend "cpu"."""

import re
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"


def test_functions_that_only_prefetch_are_always_inlined():
    """GCC drops the calls of one that is not: it takes a prefetch for no effect."""
    lines = [line.strip() for path in sorted(SOURCES.glob("*.[hc]*")) for line in path.read_text().splitlines()]
    functions = [line for line in lines if re.search(r"\bvoid prefetch\w*\(", line)]
    assert len(functions) >= 4
    assert all(line.startswith("DECO_INLINE void ") for line in functions), functions
