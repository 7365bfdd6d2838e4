"""`pytest benchmarks --benchmark-only`: the ops in pytest-benchmark, to track their speed from commit to commit.

Runs the published formulation and every backend at the standard size, verified as in `python -m benchmarks`.
Contenders are timed sequentially; use `python -m benchmarks` for ratios between them. `--benchmark-compare` and
`--benchmark-autosave` are options of pytest-benchmark.
"""

import functools

import pytest
import torch

from benchmarks.harness.measure import rotating, rotating_buffers
from benchmarks.harness.steps import Step, contenders_of
from benchmarks.harness.verification import Verification, verify
from benchmarks.names import DEVICE_BACKENDS, FORWARD, OPS, PUBLISHED, TRAINING
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import STANDARD, size_of

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = tuple(name for name in DEVICE_BACKENDS[DEVICE] if name != "reference")


@functools.cache
def checked(op: str, dtype: torch.dtype, training: bool) -> Verification:
    problem, size = problem_of(op), size_of(STANDARD, op)
    return verify(problem, size, dtype, DEVICE, training, contenders_of(problem, size, BACKENDS))


@pytest.mark.parametrize("contender", (PUBLISHED, *BACKENDS))
@pytest.mark.parametrize("pass_", (FORWARD, TRAINING))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, op, dtype, pass_, contender):
    problem, size, training = problem_of(op), size_of(STANDARD, op), pass_ == TRAINING
    status, reason = checked(op, dtype, training).refused.get(contender, ("ok", ""))
    if status == "unavailable":
        pytest.skip(reason)
    assert status == "ok", reason
    chosen = next(each for each in contenders_of(problem, size, BACKENDS) if each.name == contender)
    call = rotating(
        Step(problem, chosen, dtype, DEVICE, training), rotating_buffers(problem, size, dtype, DEVICE, training)
    )
    counter = iter(range(1 << 62))

    def once():
        call(next(counter))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {str(dtype).removeprefix('torch.')} {pass_}"
    benchmark.extra_info |= {
        "size": str(size),
        "bytes": problem.bytes_moved(size, dtype, training),
        "flops": problem.flops(size, training),
    }
    benchmark(once)
