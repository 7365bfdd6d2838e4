"""Models with random parameters: zero-initialized layers would hide most results from a test."""

import math

import torch
from torch import nn

from deco_kernels import model


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fills all parameters in place: matrices N(0, 1/fan-in), norm weights N(1, 0.1²), biases N(0, 0.3²)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    return module


def random_model(name: str = "deco-tiny", seed: int = 0, **overrides) -> nn.Module:
    """A preset with random parameters."""
    return randomize(model.build(name, **overrides), seed)


def random_batch(batch: int = 2, height: int = 32, width: int = 48, seed: int = 1):
    """Image [batch, 3, height, width], times and labels (classes 0 to 9)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, height, width, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randint(0, 10, (batch,), generator=generator)
