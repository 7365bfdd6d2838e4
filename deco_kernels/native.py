"""Loads the native modules on first use and says what went wrong where one is missing or broken."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

ISA_VARIABLE = "DECO_KERNELS_CPU_ISA"


@lru_cache(maxsize=1)
def _load_cpu() -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, why it cannot be used). The environment is read here, once."""
    import torch  # noqa: F401  its OpenMP runtime must be in the process before the kernels look for one

    try:
        module = importlib.import_module("deco_kernels._native_cpu")
    except ImportError as error:
        return None, (
            f"the native CPU module deco_kernels._native_cpu cannot be imported ({error}). Build it with a C++17 "
            "compiler: `DECO_KERNELS_BUILD=cpu pip install .`, or `python setup.py build_ext --inplace` in a checkout"
        )
    isa = os.environ.get(ISA_VARIABLE, "").strip()
    if isa:
        try:
            module.select_isa(isa)
        except ValueError as error:
            return None, f"{ISA_VARIABLE}={isa}: {error}"
    return module, None


def cpu() -> ModuleType:
    """The native CPU module. Raises ImportError with the reason and the remedy if it cannot be used."""
    module, reason = _load_cpu()
    if module is None:
        raise ImportError(reason)
    return module


def cpu_unavailable_reason() -> str | None:
    """Why `cpu()` would raise, or None if it would not."""
    return _load_cpu()[1]
