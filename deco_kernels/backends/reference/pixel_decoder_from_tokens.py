"""Reference pixel_decoder_from_tokens."""

import torch.nn.functional as F

from deco_kernels.backends.reference import pixel_decoder
from deco_kernels.backends.reference.common import differentiate, prepare


def formula(image, tokens, up_weight, up_bias, *arguments):
    """velocity [B, C, H, W]; every tensor in one dtype, or under autocast."""
    pixels, width = arguments[1].shape
    cond = F.linear(tokens, up_weight, up_bias).unflatten(-1, (pixels, width))
    return pixel_decoder.formula(image, cond, *arguments)


def forward(*arguments):
    *tensors, patch_size, eps = arguments
    tokens = tensors[1]
    return (
        formula(*prepare("pixel_decoder_from_tokens", tensors, tokens), patch_size, eps).to(tokens.dtype).contiguous()
    )


def backward(grad_velocity, *arguments):
    *tensors, patch_size, eps, needs = arguments
    return differentiate(
        lambda *t: formula(*t, patch_size, eps),
        prepare("pixel_decoder_from_tokens", tensors, tensors[1]),
        tensors,
        needs,
        (grad_velocity,),
    )
