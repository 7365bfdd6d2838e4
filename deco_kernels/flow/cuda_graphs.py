"""Replay of a model's calls as CUDA graphs: at small batches a step is bound by kernel launches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [B, ...], t [B], cond [B, ...]) → velocity shaped like x."""

logger = logging.getLogger(__name__)


class CaptureFailed(Exception):
    """The call runs, but cannot be captured."""


class CudaGraph:
    """One captured call of `velocity`: static copies of its arguments, the graph and its output, a tensor or a tuple.

    Raises CaptureFailed if the call cannot be captured.
    """

    WARM_UP_CALLS = 3

    def __init__(self, velocity: Callable[..., Any], *arguments: torch.Tensor):
        self.arguments = [argument.clone(memory_format=torch.contiguous_format) for argument in arguments]
        with torch.cuda.device(arguments[0].device):
            # Lazy initialization (kernel compilation, library handles, workspaces) must precede the capture.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self.WARM_UP_CALLS):
                    velocity(*self.arguments)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.output = velocity(*self.arguments)
            except RuntimeError as error:
                raise CaptureFailed(str(error)) from error

    def __call__(self, *arguments: torch.Tensor) -> Any:
        for static, argument in zip(self.arguments, arguments, strict=True):
            static.copy_(argument)
        self.graph.replay()
        if isinstance(self.output, tuple):
            return tuple(part.clone() for part in self.output)
        return self.output.clone()


class GraphedVelocity:
    """Captures `velocity` once per shapes, dtypes and devices and replays it; calls it directly after a failed capture.

    The result is new tensors: solvers keep velocities while later replays overwrite the output of the graph.
    """

    def __init__(self, velocity: Callable[..., Any], capture: Callable[..., Callable[..., Any]]):
        self.velocity, self.capture = velocity, capture
        self.graphs: dict[tuple[object, ...], Callable[..., Any]] = {}
        self.failed = False

    def __call__(self, *arguments: torch.Tensor) -> Any:
        if self.failed:
            return self.velocity(*arguments)
        key = tuple((argument.shape, argument.dtype, argument.device) for argument in arguments)
        if key not in self.graphs:
            try:
                self.graphs[key] = self.capture(self.velocity, *arguments)
            except CaptureFailed as error:
                logger.warning("sampling without CUDA graphs: capturing the model's call failed: %s", error)
                self.failed = True
                return self.velocity(*arguments)
        return self.graphs[key](*arguments)
