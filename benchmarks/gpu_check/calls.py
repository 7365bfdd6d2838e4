"""Forward and backward of ops on a GPU, for compute-sanitizer and ncu: `calls small|training BACKEND [OP ...]`.

`small`: run with PYTORCH_NO_CUDA_MEMORY_CACHING=1. Every tensor then has a separate allocation, so that an access
outside a tensor is also outside an allocation. The first image is not square, the others leave tiles partly filled, and
the loss pads the last one. Cases that a backend does not support are reported and skipped.

`training`: one call on 32 images of 256x256.
"""

import sys
from collections.abc import Iterable

import torch

from deco_kernels import BackendUnavailable, testing

SMALL = (
    dict(image_size=(1, 16, 48), patch_size=16, width=32, depth=3),
    dict(image_size=(3, 8, 16), patch_size=8, width=16, depth=1),
    dict(image_size=(1, 20, 20), patch_size=4, width=64, depth=2),
)
TRAINING = dict(image_size=(32, 256, 256), other_dtype=torch.bfloat16)


def small(backend: str, ops: Iterable[str]) -> None:
    for op in ops:
        for case in SMALL:
            inputs = testing.random_inputs(op, dtype=torch.bfloat16, device="cuda", **case)
            try:
                testing.run(inputs, backend)
            except BackendUnavailable as error:
                print(f"{backend}, {op}: {error}")
    torch.cuda.synchronize()


def training(backend: str, ops: Iterable[str]) -> None:
    for op in ops:
        testing.run(testing.random_inputs(op, dtype=torch.bfloat16, device="cuda", **TRAINING), backend)
    torch.cuda.synchronize()


if __name__ == "__main__":
    size, backend, *ops = sys.argv[1:]
    {"small": small, "training": training}[size](backend, ops or testing.OPS)
