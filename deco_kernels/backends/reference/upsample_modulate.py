"""Reference upsample_modulate."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.reference.adaln_block import modulate
from deco_kernels.backends.reference.common import differentiate, prepare, upsample
from deco_kernels.signatures import ModulationWeights, UpsampleModulate, UpsampleWeights


def formula(
    h: Tensor, tokens: Tensor, up: UpsampleWeights, weights: ModulationWeights, eps: float
) -> tuple[Tensor, Tensor]:
    """(modulated, gate), both [..., P, D]; every tensor in one dtype, or under autocast."""
    return modulate(h, F.silu(upsample(tokens, up, h.shape[-2:])), weights, eps)


def forward(
    h: Tensor,
    tokens: Tensor,
    up: UpsampleWeights,
    weights: ModulationWeights,
    eps: float,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = prepare("upsample_modulate", UpsampleModulate(h, tokens, up, weights), h)
    if cond is not None:
        cond.copy_(upsample(inputs.tokens, inputs.up, h.shape[-2:]))
    modulated, gate = formula(*inputs, eps)
    return modulated.to(h.dtype).contiguous(), gate.to(h.dtype).contiguous()


def backward(
    grad_modulated: Tensor,
    grad_gate: Tensor,
    h: Tensor,
    tokens: Tensor,
    up: UpsampleWeights,
    weights: ModulationWeights,
    eps: float,
    needs: Sequence[bool],
    cond: Tensor | None = None,
) -> Gradients:
    """Differentiates the formula, which computes the condition again."""
    inputs = UpsampleModulate(h, tokens, up, weights)
    prepared = prepare("upsample_modulate", inputs, h)
    return differentiate(formula, (eps,), prepared, inputs, needs, (grad_modulated, grad_gate))
