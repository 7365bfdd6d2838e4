"""Reference pixel_decoder_from_tokens."""

import torch.nn.functional as F

from deco_kernels.backends.reference import pixel_decoder
from deco_kernels.backends.reference.common import differentiate, round_weights, widen


def formula(image, tokens, up_weight, up_bias, *arguments):
    """velocity [B, C, H, W]; every tensor in one dtype, or under autocast."""
    pixels, width = arguments[1].shape
    cond = F.linear(tokens, up_weight, up_bias).unflatten(-1, (pixels, width))
    return pixel_decoder.formula(image, cond, *arguments)


def _prepare(image, tokens, up_weight, up_bias, pixel_weight, pixel_table, norm_weight, norm_bias, *weights):
    return (
        *widen(image, tokens),
        *round_weights(tokens, (up_weight, up_bias, pixel_weight, pixel_table)),
        *widen(norm_weight, norm_bias),
        *round_weights(tokens, weights),
    )


def forward(*arguments):
    *tensors, patch_size, eps = arguments
    return formula(*_prepare(*tensors), patch_size, eps).to(tensors[1].dtype).contiguous()


def backward(grad_velocity, *arguments):
    *tensors, patch_size, eps, needs = arguments
    return differentiate(lambda *t: formula(*t, patch_size, eps), _prepare(*tensors), tensors, needs, (grad_velocity,))
