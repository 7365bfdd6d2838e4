"""`python -m benchmarks.gpu_check sweep`: times of ops on a GPU with other chunk sizes and other launch parameters.

Chunk sizes of the GPU backends (deco_kernels/backends/chunk_sizes.py) and launch parameters of the Triton kernels
(deco_kernels/backends/triton/table.py), for 32 images of 256x256, D 32, N 3, bfloat16. Nothing is changed; the rows are
printed and written for the engineer who does. Time of the GPU alone, all gradients.
"""

import argparse
import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.header import header
from benchmarks.harness.measure import statistics_of
from benchmarks.harness.timing import interleaved
from deco_kernels import ops, testing
from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.triton import table
from deco_kernels.backends.triton.table import Launch

IMAGE = (32, 256, 256)
CHUNKS = tuple(1 << bits for bits in range(15, 22))
CHUNKED = ("pixel_decoder", "pixel_decoder_loss", "pixel_decoder_from_tokens", "upsample_modulate")
_TOKEN_WIDTH, _ROUNDS = 1152, 9
_CONSTANT = ("target", "frequency_weight", "sample_weight")


def _grid(tiles: list[tuple[int, int]], stages: list[int], programs: list[int]) -> list[Launch]:
    return [Launch(*tile, count, each) for tile, count, each in itertools.product(tiles, stages, programs)]


LAUNCHES = {  # kernel of the table -> (op, whether with its backward, parameters)
    "pixel_decoder": ("pixel_decoder", False, _grid([(64, 4), (128, 4), (128, 8), (256, 8)], [1, 2, 3], [2, 3, 4, 12])),
    "adaln_block": ("adaln_block", False, _grid([(64, 4), (128, 4), (128, 8)], [1, 2], [2, 3, 4, 12])),
    "pixel_decoder_recompute": ("pixel_decoder", True, _grid([(64, 4), (128, 4), (128, 8)], [1, 2], [1, 2, 3])),
    "adaln_block_backward": ("pixel_decoder", True, _grid([(32, 4), (64, 4), (64, 8), (128, 8)], [1, 2], [1, 2, 3])),
    "pixel_decoder_embedding": ("pixel_decoder", True, _grid([(64, 4), (128, 4), (128, 8)], [1, 2], [1, 2, 4])),
    "pixel_decoder_head": ("pixel_decoder_loss", True, _grid([(64, 4), (128, 4), (128, 8)], [1, 2], [1, 2, 4])),
    "flow_matching_loss": ("flow_matching_loss", False, _grid([(32, 4), (64, 4), (64, 8)], [1, 2], [1, 2, 4])),
    "flow_matching_loss_backward": ("flow_matching_loss", True, _grid([(32, 4), (64, 4), (64, 8)], [1, 2], [1, 2, 3])),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check sweep", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="chunks, launches (default: both)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result to this file")
    options = parser.parse_args(arguments)
    parts = {"chunks": chunk_rows, "launches": launch_rows}
    unknown = [part for part in options.parts if part not in parts]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; use {', '.join(parts)}")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; run it on a machine with a GPU")
    result: dict[str, Any] = {"header": header("cuda"), "rows": []}
    for part in options.parts or parts:
        for row in parts[part]():
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def chunk_rows() -> Iterator[dict]:
    for op, backend, training in itertools.product(CHUNKED, ("cuda", "triton"), (False, True)):
        call = call_of(inputs_of(op), backend, training)
        for pixels in CHUNKS:
            what = {"op": op, "backend": backend, "backward": training, "chunk_pixels": pixels}
            with chunks_of(pixels):
                yield what | _timed(call)


def launch_rows() -> Iterator[dict]:
    """The row of the table first."""
    for kernel, (op, training, candidates) in LAUNCHES.items():
        call, what = call_of(inputs_of(op), "triton", training), {"kernel": kernel, "op": op, "backward": training}
        yield what | {"launch": "table"} | _timed(call)
        for parameters in candidates:
            with table.replaced(kernel, parameters):
                yield what | {"launch": list(parameters)} | _timed(call)


def call_of(inputs: testing.Inputs, backend: str, training: bool) -> Callable[[], Any]:
    """A forward, or a forward and backward that returns all gradients."""
    tensors = {
        name: tensor.detach().requires_grad_(training and name not in _CONSTANT)
        for name, tensor in inputs.tensors.items()
        if tensor is not None
    }
    function = functools.partial(getattr(ops, inputs.op), **tensors, **inputs.options, backend=backend)
    if not training:
        return torch.no_grad()(function)
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]

    def both() -> tuple[torch.Tensor, ...]:
        result = function()
        outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if out.requires_grad]
        return torch.autograd.grad(outputs, wanted, inputs.grad_outputs[: len(outputs)])

    return both


@functools.cache
def inputs_of(op: str, device: str = "cuda", image_size: tuple[int, int, int] = IMAGE) -> testing.Inputs:
    sizes = dict(width=32, image_size=image_size, token_width=_TOKEN_WIDTH)
    return testing.random_inputs(op, dtype=torch.bfloat16, other_dtype=torch.bfloat16, device=device, **sizes)


@contextlib.contextmanager
def chunks_of(pixels: int) -> Iterator[None]:
    before = chunk_sizes.chunk_pixels, chunk_sizes.MOST_PIXELS
    chunk_sizes.chunk_pixels, chunk_sizes.MOST_PIXELS = lambda bytes_per_pixel: pixels, pixels
    try:
        yield
    finally:
        chunk_sizes.chunk_pixels, chunk_sizes.MOST_PIXELS = before


def _timed(call: Callable[[], object]) -> dict:
    try:
        (times,) = interleaved([lambda _: call()], "cuda", 0.0, _ROUNDS, asleep=True)
    except (RuntimeError, ValueError) as error:  # of Triton, too: more shared memory than the device has
        return {"ms": None, "reason": str(error).splitlines()[0][:200]}
    return statistics_of(times)
