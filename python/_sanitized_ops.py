"""Forward and backward of every op and GPU backend on small tensors, for compute-sanitizer.

Every tensor gets an allocation of its own, so that an access outside of a tensor is one outside of an allocation. The
first image is not square, the others leave tiles unfilled, and the loss pads the last one. What a backend does not
serve here is said and passed over.
"""

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.names import DEVICE_BACKENDS  # noqa: E402
from deco_kernels import BackendUnavailable, testing  # noqa: E402

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
