"""pixel_decoder_loss_from_tokens on Triton: matmuls of PyTorch and pixel_decoder_loss, in chunks of tokens."""

from __future__ import annotations

from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.loss_from_tokens import LossFromTokens
from deco_kernels.backends.triton import pixel_decoder_loss

chunked = LossFromTokens(pixel_decoder_loss, chunk_sizes.MOST_PIXELS)
forward = chunked.forward
forward_with_gradients = chunked.forward_with_gradients
