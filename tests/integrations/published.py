"""Small models in the published structure, every parameter random."""

import torch
from torch import nn

from deco_kernels.testing.published_model import PublishedDeCo
from tests.random_models import randomize

SMALL = dict(width=24, depth=2, heads=2, num_classes=10)


def published_model(seed: int = 0, **overrides) -> PublishedDeCo:
    """Widths as in the preset deco-tiny."""
    return randomize(PublishedDeCo(**{**SMALL, **overrides}), seed)


def gradients_of(model: nn.Module, inputs: tuple[torch.Tensor, ...], grad_output: torch.Tensor):
    """(output, {parameter name: gradient})."""
    output = model(*inputs)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(output, list(parameters.values()), grad_output.to(output.dtype))
    return output.detach(), dict(zip(parameters, gradients, strict=True))
