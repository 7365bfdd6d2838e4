"""Additional columns of GPU rows: host time per call, and time per call in a CUDA graph."""

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness.timing import interleaved
from benchmarks.ops.problem import Operands
from deco_kernels.flow import cuda_graphs

_CALLS = 10  # few enough not to fill the launch queue
_REPEATS = 5


def host_microseconds(call: Callable[[int], object]) -> float:
    """Median host time per call, starting from an empty queue, without synchronization."""
    samples = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for count in range(_CALLS):
            call(count)
        samples.append(1e6 * (time.perf_counter() - start) / _CALLS)
    torch.cuda.synchronize()
    return sorted(samples)[_REPEATS // 2]


def graph_columns(
    steps: Sequence[Callable[[Operands], object]], buffers: list[Operands], budget_s: float, min_rounds: int
) -> list[dict]:
    """`graph_ms`, the time per call of every step captured in a CUDA graph and replayed, interleaved; `graph_reason` if
    it cannot be captured. One graph contains a call on every buffer, so that buffers stay cold.
    """
    graphs: list[torch.cuda.CUDAGraph | None] = []
    columns: list[dict] = []
    for step in steps:
        try:
            graphs.append(capture(step, buffers))
            columns.append({})
        except RuntimeError as error:  # of the capture or the warm-up, CUDA's among them
            graphs.append(None)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            columns.append({"graph_ms": None, "graph_reason": lines[0]})
    replays = [lambda count, graph=graph: graph.replay() for graph in graphs if graph is not None]
    times = iter(interleaved(replays, "cuda", budget_s, min_rounds) if replays else ())
    for graph, column in zip(graphs, columns, strict=True):
        if graph is not None:
            column["graph_ms"] = torch.tensor(next(times)).median().item() / len(buffers)
    return columns


def capture(step: Callable[[Operands], object], buffers: list[Operands]) -> torch.cuda.CUDAGraph:
    """A graph with one call per buffer."""

    def calls(some: list[Operands]) -> None:
        for operands in some:
            step(operands)

    graph, _ = cuda_graphs.capture(lambda: calls(buffers), warm_up=lambda: calls(buffers[:3]))
    for operands in buffers:
        for tensor in operands.tensors().values():
            tensor.grad = None
    return graph
