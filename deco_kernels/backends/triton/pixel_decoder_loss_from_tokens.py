"""pixel_decoder_loss_from_tokens on Triton: matmuls of PyTorch and pixel_decoder_loss, in chunks of tokens."""

from __future__ import annotations

from deco_kernels.backends import l2_cache
from deco_kernels.backends.loss_from_tokens import LossFromTokens
from deco_kernels.backends.triton import pixel_decoder_loss
from deco_kernels.signatures import UpsampleWeights


def _chunk_tokens(up: UpsampleWeights) -> int:
    """Every chunk reads and writes the sum of up_weight's gradients: more tokens than stay in the L2 cache."""
    values = up.up_weight.shape[0]
    return max(1, l2_cache.LARGE_BYTES // (4 * values))


_from_tokens = LossFromTokens(pixel_decoder_loss, _chunk_tokens)
forward = _from_tokens.forward
forward_with_gradients = _from_tokens.forward_with_gradients
