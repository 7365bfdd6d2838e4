"""Keeps freed memory in the process, as `python -m benchmarks` does, so that timings exclude page faults."""

import ctypes
import sys

# mallopt parameters from <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def pytest_configure(config):
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 268435456)):
            if mallopt is not None:
                mallopt(parameter, value)
