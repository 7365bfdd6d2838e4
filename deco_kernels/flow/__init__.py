"""Flow matching: the path from noise to images, the training objective, and the samplers."""

from __future__ import annotations

import importlib

_MODULE_OF = {
    "interpolate": "path",
    "sample_time": "path",
    "shift_time": "path",
    "Objective": "objective",
    "drop_labels": "objective",
    "Alignment": "repa",
    "DinoV2Teacher": "repa",
    "SOLVERS": "solvers",
    "Sampler": "samplers",
    "sample": "samplers",
    "timesteps": "samplers",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
