"""Capture of calls as CUDA graphs, and their replay: at small batches a step is bound by kernel launches."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [B, ...], t [B], cond [B, ...]) → velocity shaped like x."""

logger = logging.getLogger(__name__)


Result = TypeVar("Result")
_abandoned: list[torch.cuda.CUDAGraph] = []


class CaptureFailed(RuntimeError):
    """The call runs, but cannot be captured."""


def capture(call: Callable[[], Result], warm_up: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture `call` on the current device, after `warm_up` on a side stream.

    Lazy initialization (kernel compilation, library handles, workspaces) must precede the capture.

    Returns the graph and the result of the call, which every replay overwrites.

    Raises:
        CaptureFailed: the call cannot be captured. Then the device can be used as before.
    """
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        warm_up()
    current.wait_stream(side)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    cause: Exception | None = None
    try:
        # PyTorch leaves its own stream current where ending the capture raises; the outer context does not.
        with _no_collection(), torch.cuda.stream(current), torch.cuda.graph(graph, pool=pool):
            try:
                result = call()
            except Exception as error:  # ending the capture then raises another one
                cause = error
                raise
    except RuntimeError as error:
        _abandon(graph, pool)
        cause = cause or error
        raise CaptureFailed(str(cause)) from cause
    finally:
        del cause  # its traceback holds this frame, and with it the memory of the capture
    return graph, result


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Context without garbage collection: destroying another graph is not permitted during a capture and ends it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Undo what a capture leaves behind if ending it raised: `pool` takes allocations, the generator is capturing."""
    native: Any = torch._C
    with contextlib.suppress(RuntimeError):  # raised if the capture ended after all
        native._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        native._cuda_releasePool(torch.cuda.current_device(), pool)
        _abandoned.append(graph)  # the allocator of pinned memory still asks it whether its capture is under way
    # The end of a capture that succeeds resets the generator.
    with _no_collection(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


class CudaGraph:
    """One captured call of `velocity`: static copies of its arguments, the graph and its output, a tensor or a tuple.

    Raises CaptureFailed if the call cannot be captured.
    """

    WARM_UP_CALLS = 3

    def __init__(self, velocity: Callable[..., Any], *arguments: torch.Tensor):
        self.arguments = [argument.clone(memory_format=torch.contiguous_format) for argument in arguments]
        with torch.cuda.device(arguments[0].device):
            self.graph, self.output = capture(
                call=lambda: velocity(*self.arguments),
                warm_up=lambda: [velocity(*self.arguments) for _ in range(self.WARM_UP_CALLS)],
            )

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
