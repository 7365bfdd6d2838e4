"""pixel_decoder_loss_from_tokens on the CPU: PyTorch's matmuls and the op pixel_decoder_loss, in chunks of tokens."""

from __future__ import annotations

from deco_kernels.backends.cpu import pixel_decoder_loss
from deco_kernels.backends.loss_from_tokens import LossFromTokens

chunked = LossFromTokens(pixel_decoder_loss, 1 << 17)
forward = chunked.forward
forward_with_gradients = chunked.forward_with_gradients
