"""Reference upsample_modulate."""

import torch.nn.functional as F

from deco_kernels.backends.reference.common import differentiate, round_weights, widen


def formula(h, tokens, up_weight, up_bias, norm_weight, norm_bias, mod_weight, mod_bias, eps):
    """(modulated, gate), both [..., P, D]; every tensor in one dtype, or under autocast."""
    cond = F.linear(tokens, up_weight, up_bias).unflatten(-1, h.shape[-2:])
    shift, scale, gate = F.linear(F.silu(cond), mod_weight, mod_bias).chunk(3, dim=-1)
    normed = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, eps)
    return normed * (1 + scale) + shift, gate


def _prepare(h, tokens, up_weight, up_bias, norm_weight, norm_bias, *weights):
    return (
        *widen(h, tokens),
        *round_weights(h, (up_weight, up_bias)),
        *widen(norm_weight, norm_bias),
        *round_weights(h, weights),
    )


def forward(*arguments):
    *tensors, eps = arguments
    return tuple(output.to(tensors[0].dtype).contiguous() for output in formula(*_prepare(*tensors), eps))


def backward(grad_modulated, grad_gate, *arguments):
    *tensors, eps, needs = arguments
    return differentiate(lambda *t: formula(*t, eps), _prepare(*tensors), tensors, needs, (grad_modulated, grad_gate))
