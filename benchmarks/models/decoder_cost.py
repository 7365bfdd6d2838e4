"""`python -m benchmarks.models.decoder_cost SIZE`: cost of the decoder in a float32 training step on the CPU.

Used by python/ablate.py. Prints a JSON object: milliseconds with the fastest backend and with the published
formulation, and forward and backward FLOPs per pixel in thousands.
"""

import json
import sys

import torch

from benchmarks.harness.measure import Options, measure
from benchmarks.names import DEVICE_BACKENDS, PUBLISHED, TRAINING
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import size_of


def main(text: str) -> None:
    op = "pixel_decoder"
    size, backends = size_of(text, op), DEVICE_BACKENDS["cpu"]
    options = Options("cpu", backends, compiled=(), budget_s=1.0, min_rounds=3)
    rows = measure(problem_of(op), size, torch.float32, TRAINING, options)
    ms = {row["contender"]: row["ms"] for row in rows if row["status"] == "ok" and row["pass"] == TRAINING}
    cost = {
        "decoder, ms": min(ms[name] for name in backends if name in ms),
        "in published eager, ms": ms[PUBLISHED],
        "kFLOP per pixel": rows[0]["flops"] / size.pixels / 1e3,
    }
    print(json.dumps(cost))


if __name__ == "__main__":
    main(*sys.argv[1:])
