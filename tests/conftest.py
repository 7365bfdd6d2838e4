"""Fixtures shared by all tests."""

import contextlib
import os
import random
import signal

import numpy as np
import pytest
import torch

from deco_kernels import native


def pytest_ignore_collect(collection_path, config):
    """A run of the tests marked `interpret` loads only files with this word, which saves seconds."""
    if not config.option.markexpr.startswith("interpret") or not collection_path.match("test_*.py"):
        return None
    return True if "interpret" not in collection_path.read_text() else None


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in any order and process of the tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """New tensors are filled with NaN, so that unwritten elements are detected."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])


@pytest.fixture
def make_fifo():
    """Creates a FIFO at a path. No test waits longer than ten minutes for a missing writer."""

    def give_up(*_):
        raise TimeoutError("something was opened that is not a file")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(600)
    yield os.mkfifo
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def threads(count: int):
    """Runs PyTorch with the given number of threads."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@pytest.fixture
def two_threads():
    with threads(2):
        yield


@pytest.fixture
def one_thread():
    """One thread: small tensors do not wait for threads, and bits match those of any other process."""
    with threads(1):
        yield


@contextlib.contextmanager
def instruction_set(name: str | None):
    """Selects the native CPU kernels compiled for one instruction set; None keeps the default."""
    if name is None:
        yield
        return
    module = native.cpu()
    previous = module.current_isa()
    module.select_isa(name)
    try:
        yield
    finally:
        module.select_isa(previous)


@pytest.fixture
def implementation(request):
    """The backend name of a `tests.ops.cases.IMPLEMENTATIONS` entry, with its instruction set selected."""
    backend, isa = request.param
    with instruction_set(isa):
        yield backend
