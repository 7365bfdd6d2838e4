"""Named configurations: the published models and small ones for tests and the demo.

Source of the published sizes: DeCo (arXiv 2511.19365), section 4 and its checkpoints.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from deco_kernels.model.deco import DeCo
from deco_kernels.model.dit import DiT
from deco_kernels.model.text_to_image import DeCoTextToImage

PRESETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "deco-l/16": (DeCo, dict(width=1024, depth=22, heads=16, num_classes=1000)),
    "deco-xl/16": (DeCo, dict(width=1152, depth=28, heads=16, num_classes=1000)),
    "deco-xxl/16": (DeCoTextToImage, dict(width=1536, depth=16, heads=24)),
    "dit-xl/16": (DiT, dict(width=1152, depth=28, heads=16, num_classes=1000)),
    "deco-demo": (DeCo, dict(width=128, depth=4, heads=4, num_classes=1)),
    "deco-tiny": (DeCo, dict(width=24, depth=2, heads=2, num_classes=10)),
    "deco-text-tiny": (
        DeCoTextToImage,
        dict(width=24, depth=2, heads=2, text_depth=1, text_width=20, text_length=7),
    ),
    "dit-tiny": (DiT, dict(width=24, depth=2, heads=2, num_classes=10)),
}
"""Name → (class, constructor arguments)."""


def build(name: str, **overrides: Any) -> nn.Module:
    """Build a freshly initialised model.

    Args:
        name: a key of `PRESETS`.
        overrides: constructor arguments of the preset's class that replace the preset's, for example
            `decoder_width=64`. Build under `with torch.device(...)` to choose the device.

    Raises:
        ValueError: unknown name, or a size the model cannot have.
        TypeError: an argument the class does not take (the message lists those it takes), or a size that is no integer.
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {list(PRESETS)}, got {name!r}")
    cls, arguments = PRESETS[name]
    known = list(inspect.signature(cls).parameters)
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise TypeError(f"build({name!r}) got unknown options {unknown}; {cls.__name__} takes {known}")
    return cls(**{**arguments, **overrides})
