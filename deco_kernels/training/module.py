"""The module that training strategies wrap (model and objective), its FSDP2 sharding, and random draws per image."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from deco_kernels.flow import Objective
from deco_kernels.model import PixelDecoder
from deco_kernels.model.presets import Model


class TrainingModule(nn.Module):
    """Model and objective behind one forward, around which strategies synchronize gradients and gather shards."""

    def __init__(self, model: Model, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """With noise, `Objective.losses` for clean images x; without, the model's velocity for noised images x."""
        if noise is None:
            return self.model(x, t, y)
        return self.objective.losses(self.model, x, y, t, noise)


def shard(module: TrainingModule, mesh: DeviceMesh) -> TrainingModule:
    """Apply FSDP2 over the mesh's data-parallel dimension: one unit per trunk block, for the decoder, and for the rest.

    All units are resharded after the forward, so that none stays gathered after sampling.
    """
    mesh = mesh["data_parallel"]
    for part in module.model.modules():
        if isinstance(part, nn.ModuleList):
            for block in part:
                fully_shard(block, mesh=mesh)
    for part in module.model.modules():
        if isinstance(part, PixelDecoder):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def draw_per_image(
    objective: Objective, x: torch.Tensor, y: torch.Tensor, samples: list[int], seed: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Objective.draw` for images x [B, 3, H, W], each with its own random stream.

    The stream depends only on (seed, sample index in the run), so the values do not depend on the number of processes
    or on resuming. The generator is reseeded for every image.
    """
    draws = []
    for i, sample in enumerate(samples):
        state = np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0]
        draws.append(objective.draw(x[i : i + 1], y[i : i + 1], generator.manual_seed(int(state) >> 1)))
    labels, t, noise = (torch.cat(parts) for parts in zip(*draws, strict=True))
    return labels, t, noise
