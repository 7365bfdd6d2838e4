"""Reference adaln_block."""

import torch.nn.functional as F

from deco_kernels.backends.reference.common import differentiate, prepare


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


def forward(*arguments):
    *tensors, eps = arguments
    h = tensors[0]
    return formula(*prepare("adaln_block", tensors, h), eps).to(h.dtype).contiguous()


def backward(grad_out, *arguments):
    *tensors, eps, needs = arguments
    inputs = prepare("adaln_block", tensors, tensors[0])
    return differentiate(lambda *t: formula(*t, eps), inputs, tensors, needs, (grad_out,))
