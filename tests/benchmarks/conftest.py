"""One thread for small tensors, so that concurrent tests do not wait for each other's threads."""

import pytest


@pytest.fixture(autouse=True)
def small_tensors(one_thread):
    """Every test of this folder runs with one thread."""
