"""pixel_decoder_loss_from_tokens on Triton: matmuls of PyTorch and pixel_decoder_loss, in chunks of tokens."""

from __future__ import annotations

from deco_kernels.backends import l2_cache
from deco_kernels.backends.loss_from_tokens import LossFromTokens
from deco_kernels.backends.triton import pixel_decoder_loss

# Larger chunks than stay in the L2 cache: every chunk reads and writes the sum of up_weight's gradients.
chunked = LossFromTokens(pixel_decoder_loss, l2_cache.LARGE_PIXELS)
forward = chunked.forward
forward_with_gradients = chunked.forward_with_gradients
