"""Named configurations: the published models, and small ones for tests and the demo.

Source of the published sizes: DeCo (arXiv 2511.19365), section 4, and the published checkpoints.
"""

from __future__ import annotations

import inspect
from typing import Any

from deco_kernels.model.deco import DeCo
from deco_kernels.model.dit import DiT
from deco_kernels.model.text_to_image import DeCoTextToImage

Model = DeCo | DeCoTextToImage | DiT

PRESETS: dict[str, tuple[type[Model], dict[str, Any]]] = {
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


def build(name: str, **overrides: Any) -> Model:
    """Build a newly initialized model.

    Args:
        name: a key of `PRESETS`.
        overrides: constructor arguments that replace those of the preset, for example `decoder_width=64`.

    Returns:
        The model, with float32 parameters on the current default device (`with torch.device(...)` chooses another).

    Raises:
        ValueError: unknown name, or an invalid size.
        TypeError: an argument that the class does not accept (the message lists those it accepts), or a size that is
            not an integer.
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {list(PRESETS)}, got {name!r}; choose one of them")
    cls, arguments = PRESETS[name]
    known = list(inspect.signature(cls).parameters)
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise TypeError(f"build({name!r}) got unknown options {unknown}; {cls.__name__} accepts {known}")
    return cls(**{**arguments, **overrides})
