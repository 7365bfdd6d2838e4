"""Exponential moving average of a model's parameters, with the same sharding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class MovingAverage:
    """average ← decay·average + (1 - decay)·parameter after every step, in the dtype of the parameters.

    Initialized with the current parameters. Under FSDP2 each process averages its own shards.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages after a step."""
        averages = [_local(average) for average in self.averages.values()]
        parameters = [_local(parameter) for parameter in self.model.parameters()]
        torch._foreach_lerp_(averages, parameters, 1 - self.decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Context in which the model's parameters are the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.model.named_parameters():
            average = self.averages[name]
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
