"""pixel_decoder_loss_from_tokens on the CPU: PyTorch's matmuls and the op pixel_decoder_loss, in chunks of tokens."""

from __future__ import annotations

from deco_kernels.backends.cpu import pixel_decoder_loss
from deco_kernels.backends.loss_from_tokens import LossFromTokens
from deco_kernels.backends.upsample import chunk_tokens

# Half of the tokens of other chunks, as the conditions of a chunk have their gradient beside them.
_from_tokens = LossFromTokens(pixel_decoder_loss, lambda up: max(1, chunk_tokens(up) // 2))
forward = _from_tokens.forward
forward_with_gradients = _from_tokens.forward_with_gradients
