"""Time per pixel vs. number of pixels: one image, from a single token to the largest size that fits in memory."""

import torch

from benchmarks.harness.measure import Options, available_memory, eager_bytes, row_of, time_contenders
from benchmarks.harness.steps import Contender, contenders_of
from benchmarks.harness.verification import can_be_timed, flagged, verify
from benchmarks.names import FORWARD, TRAINING
from benchmarks.ops.problem import Problem, problem_of
from benchmarks.ops.sizes import Size

OPS = ("pixel_decoder", "flow_matching_loss")
SIDES = {
    "cpu": ((16, 16), (64, 64), (256, 256), (512, 512), (1024, 1024), (2048, 2048)),
    "cuda": ((16, 16), (64, 64), (256, 256), (1024, 1024), (1024, 2048), (2048, 2048), (4096, 4096)),
}
CHECKED = Size()  # contenders are verified against float64 and float32 at this size before any is timed


def measure_scaling(
    op: str, dtype: torch.dtype, pass_: str, options: Options, sides: tuple[tuple[int, int], ...] | None = None
) -> list[dict]:
    """Rows as in `measure`, for images of the given sides (by default those of the device)."""
    problem = problem_of(op)
    checked = contenders_of(problem, CHECKED, options.backends)
    refused = verify(problem, CHECKED, dtype, options.device, pass_ == TRAINING, checked).refused
    rows = [
        row_of(problem, CHECKED, dtype, pass_) | {"contender": name, "status": status, "reason": reason}
        for name, (status, reason) in refused.items()
        if not can_be_timed(refused, name)
    ]
    for height, width in sides or SIDES[options.device]:
        size = Size(height=height, width=width)
        fitting = []
        for contender in contenders_of(problem, size, options.backends):
            if not can_be_timed(refused, contender.name):
                continue
            needed, available = bytes_needed(problem, size, pass_, contender), available_memory(options.device)
            if needed <= available:
                fitting.append(contender)
                continue
            reason = f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"
            row = {"contender": contender.name, "status": "unavailable", "reason": reason}
            rows.append(row_of(problem, size, dtype, pass_) | row)
        rows += flagged(time_contenders(problem, size, dtype, pass_, options, fitting), refused)
    return rows


def bytes_needed(problem: Problem, size: Size, pass_: str, contender: Contender) -> int:
    """Approximate bytes in float32: eager saves activations; fused ops hold arguments, outputs and gradients."""
    if contender.eager:
        return eager_bytes(problem, size, pass_)
    return problem.bytes_moved(size, torch.float32, training=pass_ != FORWARD)
