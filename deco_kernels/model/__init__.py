"""Models: the per-pixel decoder, the DeCo models, the plain DiT baseline, presets and checkpoints."""

from deco_kernels.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
