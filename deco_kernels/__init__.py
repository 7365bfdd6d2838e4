"""Fused kernels for per-pixel diffusion decoders (DeCo, arXiv 2511.19365).

`deco_kernels.ops` holds the ops, `deco_kernels.model` and `deco_kernels.flow` the models and their training and
sampling, `deco_kernels.integrations` runs the ops in existing models, `deco_kernels.use_backend` selects the backend.
Importing this package loads no compiler, no Triton and no GPU driver; submodules are imported at first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = ("ops", "model", "flow", "integrations")
_REGISTRY_NAMES = ("use_backend", "BackendUnavailable")

__all__ = ["BackendUnavailable", "__version__", "flow", "integrations", "model", "ops", "use_backend"]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _REGISTRY_NAMES:
        return getattr(importlib.import_module(f"{__name__}.ops.registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
