"""pixel_decoder_from_tokens on Triton: PyTorch's matmul for the upsample and the fused decoder, chunk by chunk.

See upsample.py and pixel_decoder.py. The backward holds one chunk of conditions and of their gradients besides the
decoder's own workspace.
"""

from __future__ import annotations

import torch

from .launching import chunks, contiguous, device_guard
from .pixel_decoder import CHUNK_TOKENS, DecoderBackward, run_forward
from .upsample import Upsample
from .weights import pack


def forward(image, tokens, up_weight, up_bias, pixel_weight, pixel_table, norm_weight, norm_bias, mod_weight, mod_bias,
            fc1_weight, fc1_bias, fc2_weight, fc2_bias, head_weight, head_bias, patch_size, eps):  # fmt: skip
    """velocity [B, C, H, W] in tokens' dtype."""
    block_weights = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    velocity = torch.empty(image.shape, dtype=tokens.dtype, device=tokens.device)
    with device_guard(tokens), torch.no_grad():
        packed = pack(block_weights, tokens.dtype)
        decoder_weights = contiguous(pixel_weight, pixel_table, head_weight, head_bias)
        upsample = Upsample(tokens, up_weight, up_bias, pixel_table.shape)
        for start, length in chunks(upsample.tokens.shape[0], CHUNK_TOKENS):
            cond = upsample.cond(start, length)
            run_forward(image, cond, packed, decoder_weights, velocity, start, patch_size, eps)
    return velocity


def backward(grad_velocity, image, tokens, up_weight, up_bias, pixel_weight, pixel_table, norm_weight, norm_bias,
             mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, head_weight, head_bias,
             patch_size, eps, needs):  # fmt: skip
    """Gradients of (image, tokens, up_weight, up_bias, the 12 weights); None where `needs` is False."""
    weights = (pixel_weight, pixel_table, norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias,
               fc2_weight, fc2_bias, head_weight, head_bias)  # fmt: skip
    upsample_needs = tuple(needs[1:4])
    needed = (needs[0], any(upsample_needs), any(needs[4:]))
    with device_guard(tokens), torch.no_grad():
        sums = DecoderBackward(image, grad_velocity, weights, tokens.dtype, patch_size, eps, needed)
        upsample = Upsample(tokens, up_weight, up_bias, pixel_table.shape)
        for start, length in chunks(upsample.tokens.shape[0], sums.chunk_tokens(more=2)):
            cond = upsample.cond(start, length)
            grad_cond = torch.empty_like(cond)
            sums.add(cond, start, grad_cond)
            upsample.add_gradients(start, grad_cond, upsample_needs)
        grad_weights = sums.grad_weights() if needed[2] else (None,) * 12
        grads = (sums.grad_image, *upsample.grads(upsample_needs), *grad_weights)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
