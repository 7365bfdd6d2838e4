"""Two threads, so that the kernels split their work."""

import pytest


@pytest.fixture(autouse=True)
def divided_work(two_threads):
    """Every test of this folder runs with two threads, unless it sets another number."""
