"""Flow matching: the path from noise to images, the training objective and the samplers."""

from __future__ import annotations

from deco_kernels.lazy import lazy_names

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
    "choose_trunk_steps": "calibration",
    "sample": "samplers",
    "timesteps": "samplers",
    "read_trunk_steps": "trunk_steps",
    "write_trunk_steps": "trunk_steps",
}

__all__ = list(_MODULE_OF)

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
