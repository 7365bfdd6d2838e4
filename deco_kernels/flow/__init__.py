"""Flow matching: the path from noise to images, the training objective and the samplers."""

from deco_kernels.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
