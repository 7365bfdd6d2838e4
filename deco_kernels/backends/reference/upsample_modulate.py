"""Reference upsample_modulate."""

import torch.nn.functional as F

from deco_kernels.backends.reference.common import differentiate, prepare


def formula(h, tokens, up_weight, up_bias, norm_weight, norm_bias, mod_weight, mod_bias, eps):
    """(modulated, gate), both [..., P, D]; every tensor in one dtype, or under autocast."""
    cond = F.linear(tokens, up_weight, up_bias).unflatten(-1, h.shape[-2:])
    shift, scale, gate = F.linear(F.silu(cond), mod_weight, mod_bias).chunk(3, dim=-1)
    normed = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, eps)
    return normed * (1 + scale) + shift, gate


def forward(*arguments):
    *tensors, eps = arguments
    h = tensors[0]
    return tuple(output.to(h.dtype).contiguous() for output in formula(*prepare("upsample_modulate", tensors, h), eps))


def backward(grad_modulated, grad_gate, *arguments):
    *tensors, eps, needs = arguments
    inputs = prepare("upsample_modulate", tensors, tensors[0])
    return differentiate(lambda *t: formula(*t, eps), inputs, tensors, needs, (grad_modulated, grad_gate))
