"""Models: the per-pixel decoder, the DeCo models, the plain DiT baseline, presets and checkpoints."""

from __future__ import annotations

from deco_kernels.lazy import lazy_names

_MODULE_OF = {
    "PixelDecoder": "pixel_decoder",
    "DiT": "dit",
    "Trunk": "dit",
    "DeCo": "deco",
    "DeCoTextToImage": "text_to_image",
    "TextTrunk": "text_to_image",
    "Qwen3TextEncoder": "text_encoder",
    "PRESETS": "presets",
    "build": "presets",
    "from_published": "checkpoint",
    "to_published": "checkpoint",
    "Checkpoint": "checkpoint_file",
    "load_model": "checkpoint_file",
    "read_checkpoint": "checkpoint_file",
    "save_model": "checkpoint_file",
    "pixel_position_features": "position",
    "rotary_angles": "position",
}

__all__ = list(_MODULE_OF)

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
