"""Fused kernels for per-pixel diffusion decoders (DeCo, arXiv 2511.19365).

`deco_kernels.ops` holds the ops, `deco_kernels.model` and `deco_kernels.flow` the models and their training and
sampling, `deco_kernels.integrations` runs the ops in existing models, `deco_kernels.use_backend` selects the backend.
Importing this package loads no compiler, no Triton and no GPU driver; submodules are imported at first use.
"""

from deco_kernels.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
