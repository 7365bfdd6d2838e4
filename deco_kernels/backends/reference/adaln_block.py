"""Reference adaln_block."""

import torch.nn.functional as F

from deco_kernels.backends.reference.common import differentiate, round_weights, widen


def formula(h, cond, norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    """h' [..., D]; every tensor in one dtype, or under autocast."""
    return block(
        h, F.silu(cond), norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps
    )


def block(h, silu_cond, norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    """The block given SiLU(cond), which all blocks of a decoder share."""
    shift, scale, gate = F.linear(silu_cond, mod_weight, mod_bias).chunk(3, dim=-1)
    normed = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, eps)
    modulated = normed * (1 + scale) + shift
    return h + gate * F.linear(F.silu(F.linear(modulated, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def _prepare(h, cond, norm_weight, norm_bias, *weights):
    return *widen(h, cond, norm_weight, norm_bias), *round_weights(h, weights)


def forward(*arguments):
    *tensors, eps = arguments
    return formula(*_prepare(*tensors), eps).to(tensors[0].dtype).contiguous()


def backward(grad_out, *arguments):
    *tensors, eps, needs = arguments
    return differentiate(lambda *t: formula(*t, eps), _prepare(*tensors), tensors, needs, (grad_out,))
