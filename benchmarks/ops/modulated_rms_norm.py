"""RMS normalization and modulation, the part of a decoder block that Liger-Kernel implements.

Not an op of this package: the decoder uses LayerNorm, and its ops also compute shift, scale and the MLP. These rows
show the speedup of a fused normalization over eager PyTorch at this width.
"""

import importlib.util

import torch
import torch.nn.functional as F

from benchmarks.names import LIGER
from benchmarks.ops.problem import Outputs, Problem, Shapes, Tensors
from benchmarks.ops.sizes import Size
from deco_kernels.testing.published import EPS


class ModulatedRmsNorm(Problem):
    """(1 + scale)·RMSNorm(h) + shift on rows [T, P, D]."""

    op = "modulated_rms_norm"
    activations = trained = ("h", "scale", "shift")

    def arguments(self, size: Size) -> Shapes:
        rows = (size.tokens, size.patch_pixels, size.decoder_width)
        return {"h": rows, "scale": rows, "shift": rows, "norm_weight": (size.decoder_width,)}

    def outputs(self, size: Size) -> Shapes:
        return {"modulated": (size.tokens, size.patch_pixels, size.decoder_width)}

    def multiply_adds(self, size: Size, training: bool) -> int:
        """The op has no matmuls."""
        return 0

    def best_eager(self, tensors: Tensors, size: Size) -> Outputs:
        h, weight = tensors["h"], tensors["norm_weight"]
        wide = torch.promote_types(h.dtype, torch.float32)
        normed = F.rms_norm(h.to(wide), weight.shape, weight, EPS).to(h.dtype)
        return (normed * (1 + tensors["scale"]) + tensors["shift"],)

    def fused(self, tensors: Tensors, size: Size, backend: str) -> Outputs:
        """The function of Liger-Kernel; `backend` is `LIGER`."""
        from liger_kernel.transformers.functional import liger_modulated_rms_norm

        h, weight, scale, shift = (tensors[name] for name in ("h", "norm_weight", "scale", "shift"))
        return (liger_modulated_rms_norm(h, weight, scale, shift, eps=EPS, in_place=False),)


def installed() -> bool:
    """Whether Liger-Kernel is installed and has the function."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return False
    return hasattr(functional, "liger_modulated_rms_norm")


BACKENDS = (LIGER,)
PROBLEM = ModulatedRmsNorm()
