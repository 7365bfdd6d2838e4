"""Forward and backward of every op and GPU backend on small tensors, for compute-sanitizer.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1: every tensor then has a separate allocation, so that an access outside a
tensor is also outside an allocation. The first image is not square, the others leave tiles partly filled, and the loss
pads the last one. Cases that a backend does not support are reported and skipped.
"""

import torch

from benchmarks.names import DEVICE_BACKENDS
from deco_kernels import BackendUnavailable, testing

CASES = (
    dict(image_size=(1, 16, 48), patch_size=16, width=32, depth=3),
    dict(image_size=(3, 8, 16), patch_size=8, width=16, depth=1),
    dict(image_size=(1, 20, 20), patch_size=4, width=64, depth=2),
)


def main() -> None:
    for backend in DEVICE_BACKENDS["cuda"]:
        for op in testing.OPS:
            for case in CASES:
                inputs = testing.random_inputs(op, dtype=torch.bfloat16, device="cuda", **case)
                try:
                    testing.run(inputs, backend)
                except BackendUnavailable as error:
                    print(f"{backend}, {op}: {error}")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
