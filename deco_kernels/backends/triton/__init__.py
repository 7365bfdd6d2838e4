"""Backend "triton": kernels for NVIDIA (sm_80 and later) and AMD GPUs, compiled at the first call.

Importing this package imports neither Triton nor the kernels. `unavailable_reason` tries to import Triton once.
"""

from __future__ import annotations

import functools
import os
import re

import torch

from deco_kernels.backends.support import Support

SUPPORT = Support("NVIDIA GPUs from sm_80; AMD GPUs through ROCm")
unsupported_reason = SUPPORT.refusal

_OLDEST = (3, 3)  # oldest tested version


@functools.cache
def import_failure() -> str | None:
    try:
        import triton
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed; install it with `pip install triton`"
        return f"Triton is installed but cannot be imported ({error}); reinstall it with `pip install -U triton`"
    except Exception as error:  # a broken installation can raise anything
        return f"Triton is installed but fails on import ({type(error).__name__}: {error}); reinstall it"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < _OLDEST:
        return f"Triton {triton.__version__} is older than 3.3; update it with `pip install -U triton`"
    return None


def driver_failure() -> str | None:
    """Reason why Triton cannot launch on this machine's GPU, or None. It builds its launcher with the C compiler."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # compiler and driver errors have many types
        return (
            f"Triton cannot drive the GPU ({type(error).__name__}: {error}); it needs a C compiler (gcc, clang or the "
            "one named by CC), Python's headers and the GPU's driver library"
        )
    return None


@functools.cache
def unavailable_reason(device: torch.device) -> str | None:
    """Reason, with remedy, why no kernel of this backend can run on `device`, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if device.type == "cpu" and not interpreted:
        return (
            "Triton kernels run on GPUs; for tests on the CPU start Python with TRITON_INTERPRET=1, "
            "otherwise move the tensors to a GPU or choose another backend"
        )
    if device.type not in ("cpu", "cuda"):
        return f"its kernels run on CUDA and ROCm devices, not on {device.type!r}; choose another backend"
    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return (
                f"it needs an NVIDIA GPU of compute capability 8.0 or later, {torch.cuda.get_device_name(device)} has "
                f"{capability[0]}.{capability[1]}; use backend='reference'"
            )
    return import_failure() or (driver_failure() if device.type == "cuda" else None)
