"""The emulated CUDA module as a fixture."""

import pytest

from deco_kernels.testing import emulation


@pytest.fixture(scope="session")
def emulated_session():
    reason = emulation.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return emulation.emulated_module()


@pytest.fixture
def emulated(emulated_session):
    """The emulated module in its initial state: seed 1 of the order of threads, rounding to nearest, a large device."""
    emulated_session.set_seed(1)
    emulated_session.set_truncating(False)
    emulated_session.set_device_limits(emulation.MULTIPROCESSORS, emulation.LARGE_SHARED)
    return emulated_session
