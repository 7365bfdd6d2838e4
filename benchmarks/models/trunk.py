"""`python -m benchmarks trunk`: speedup of `compile_trunk()` on the CPU, and the cost of compilation.

Uses one thread and CPU time, to be insensitive to other load on the machine. Only the trunk is timed, eager and
compiled alternately.
"""

import argparse
import copy
import os
import statistics
import time

import torch
from torch import nn

from benchmarks.harness import results
from benchmarks.harness.header import header
from benchmarks.names import DTYPES, FORWARD, TRAINING
from deco_kernels import model
from deco_kernels.command_line import new_file, positive
from deco_kernels.machine import keep_heap

# (image edge, batch, width, heads), each with 4 blocks and 16x16 patches.
SIZES = {"128x128, batch 8, width 128": (128, 8, 128, 4), "256x256, batch 2, width 768": (256, 2, 768, 12)}
DEPTH = 4
COMPILED_DEPTHS = (1, 8)  # compile time is measured at both: it does not depend on the depth
MAX_ERROR = {"float32": 1e-5, "bfloat16": 3e-2}  # relative L2 error of compiled vs. eager
DISABLE_CACHES = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks trunk", description="Times compile_trunk() on the CPU.")
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="timed rounds per row (default: 15)")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="write the result to this file")
    options = parser.parse_args(arguments)
    keep_heap("-m", "benchmarks", "trunk", *arguments, **DISABLE_CACHES)
    torch.set_num_threads(1)
    result = {
        "header": header("cpu"),
        "rows": [
            _row(size, pass_, dtype, options.rounds)
            for size in SIZES
            for pass_ in (FORWARD, TRAINING)
            for dtype in DTYPES[:2]
        ],
        "compile_seconds": {str(depth): _compile_seconds(depth) for depth in COMPILED_DEPTHS},
    }
    results.publish(result, table(result), options.output)
    return 0


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = ["| trunk of 4 blocks | pass | dtype | eager | compiled | gain |", "|---|---|---|---:|---:|---:|"]
    for row in result["rows"]:
        gain = row["eager_ms"] / row["compiled_ms"]
        pass_ = row["pass"].replace("_", " and ")
        cells = (row["size"], pass_, row["dtype"], f"{row['eager_ms']:.1f} ms", f"{row['compiled_ms']:.1f} ms")
        lines.append(f"| {' | '.join(cells)} | {gain:.2f} x |")
    costs = ", ".join(f"{seconds:.0f} s for {depth} blocks" for depth, seconds in result["compile_seconds"].items())
    return "\n".join(lines) + f"\n\nFirst training step, compilation included, width 128: {costs}.".replace(
        " 1 blocks", " 1 block"
    )


def _step(size: str, dtype: str, training: bool, depth: int = DEPTH):
    """(trunk, function that runs one pass of a given trunk and returns its tokens)."""
    edge, batch, width, heads = SIZES[size]
    torch.manual_seed(0)
    trunk = model.Trunk(width=width, depth=depth, heads=heads, num_classes=10, patch_size=16)
    inputs = torch.randn(batch, 3, edge, edge), torch.rand(batch), torch.arange(batch)

    def run(module: nn.Module) -> torch.Tensor:
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            tokens = module(*inputs)[0]
        if training:
            module.zero_grad()
            tokens.float().square().mean().backward()
        return tokens.detach()

    return trunk, run


def _row(size: str, pass_: str, dtype: str, rounds: int) -> dict:
    """Median times of eager and compiled, after checking that they agree."""
    eager, run = _step(size, dtype, pass_ == TRAINING)
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks()
    expected, actual = run(eager).double(), run(compiled).double()
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error <= MAX_ERROR[dtype]:
        raise ValueError(f"{size}, {pass_}, {dtype}: compiled differs from eager by {error:.1e}")
    times: dict[nn.Module, list[float]] = {eager: [], compiled: []}
    for round_ in range(rounds + 2):
        for module in (eager, compiled) if round_ % 2 else (compiled, eager):
            start = time.process_time()
            run(module)
            if round_ >= 2:
                times[module].append(1e3 * (time.process_time() - start))
    eager_ms, compiled_ms = (statistics.median(times[module]) for module in (eager, compiled))
    torch._dynamo.reset()
    return {
        "size": size,
        "pass": pass_,
        "dtype": dtype,
        "status": "ok",
        "error": error,
        "eager_ms": eager_ms,
        "compiled_ms": compiled_ms,
    }


def _compile_seconds(depth: int) -> float:
    """CPU seconds of the first training step of a compiled trunk, in float32 at the first size."""
    trunk, run = _step(next(iter(SIZES)), "float32", True, depth)
    trunk.compile_blocks()
    torch._dynamo.reset()
    start = sum(os.times()[:4])  # user and system time of this process and of finished compiler processes
    run(trunk)
    return sum(os.times()[:4]) - start
