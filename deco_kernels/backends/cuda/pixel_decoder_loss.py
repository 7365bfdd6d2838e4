"""pixel_decoder_loss on CUDA devices: the kernels of pixel_decoder and flow_matching_loss, one after the other."""

from __future__ import annotations

from deco_kernels.backends.composition import Composition
from deco_kernels.backends.cuda import flow_matching_loss, pixel_decoder

_composition = Composition("cuda", pixel_decoder, flow_matching_loss)
forward = _composition.forward
forward_with_gradients = _composition.forward_with_gradients
