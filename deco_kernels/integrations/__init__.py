"""Fused ops in existing models, and the models in diffusers."""

from deco_kernels.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
