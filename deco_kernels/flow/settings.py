"""Settings with which the published checkpoints are sampled.

Source: DeCo (arXiv 2511.19365), section 4.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deco_kernels.model.text_to_image import DeCoTextToImage

_CLASS = dict(solver="euler", steps=100, guidance=3.2, guidance_interval=(0.1, 1.0), shift=1.0)
_TEXT = dict(solver="adams2", steps=25, guidance=4.0, guidance_interval=(0.0, 1.0), shift=3.0)


def sampling_settings(model: nn.Module) -> dict[str, Any]:
    """The paper's settings of `Sampler` for the kind of model: class-to-image at 256×256, or text-to-image.

    Returns the keys solver, steps, guidance, guidance_interval and shift.
    """
    return dict(_TEXT if isinstance(model, DeCoTextToImage) else _CLASS)
