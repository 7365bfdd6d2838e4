"""Reference adaln_block."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.reference.common import differentiate, prepare
from deco_kernels.signatures import AdalnBlock, BlockWeights, ModulationWeights


def formula(h: Tensor, cond: Tensor, weights: BlockWeights, eps: float) -> Tensor:
    """h' [..., D]; every tensor in one dtype, or under autocast."""
    return block(h, F.silu(cond), weights, eps)


def block(h: Tensor, silu_cond: Tensor, weights: BlockWeights, eps: float) -> Tensor:
    """The block for a given SiLU(cond), which all blocks of a decoder share."""
    modulation, fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    modulated, gate = modulate(h, silu_cond, modulation, eps)
    return h + gate * F.linear(F.silu(F.linear(modulated, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def modulate(h: Tensor, silu_cond: Tensor, weights: ModulationWeights, eps: float) -> tuple[Tensor, Tensor]:
    """(modulated, gate), each with the shape of h."""
    shift, scale, gate = F.linear(silu_cond, weights.mod_weight, weights.mod_bias).chunk(3, dim=-1)
    normed = F.layer_norm(h, h.shape[-1:], weights.norm_weight, weights.norm_bias, eps)
    return normed * (1 + scale) + shift, gate


def forward(h: Tensor, cond: Tensor, weights: BlockWeights, eps: float) -> Tensor:
    return formula(*prepare("adaln_block", AdalnBlock(h, cond, weights), h), eps).to(h.dtype).contiguous()


def backward(
    grad_out: Tensor, h: Tensor, cond: Tensor, weights: BlockWeights, eps: float, needs: Sequence[bool]
) -> Gradients:
    inputs = AdalnBlock(h, cond, weights)
    prepared = prepare("adaln_block", inputs, h)
    return differentiate(formula, (eps,), prepared, inputs, needs, (grad_out,))
