"""`python -m benchmarks reuse`: guided sampling with the trunk at some steps only against every step, on the CPU.

Both contenders sample the same noise in turn with `flow.Sampler` and Euler steps, from random weights.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.harness.header import header
from benchmarks.harness.measure import statistics_of
from benchmarks.harness.timing import interleaved
from benchmarks.harness.verification import SEED
from benchmarks.models.end_to_end import GUIDANCE, fill_zeros
from benchmarks.names import DTYPES
from deco_kernels import flow, model
from deco_kernels.machine import keep_heap


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks reuse", description="Times sampling with the trunk at some steps only, on the CPU."
    )
    parser.add_argument("--preset", default="deco-l/16", help="class-to-image model (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, metavar="N", help="image side (default: 256)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="Euler steps (default: 10)")
    parser.add_argument("--trunk-steps", type=int, default=5, metavar="K", help="steps with the trunk (default: 5)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="PyTorch threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds (default: 7)")
    parser.add_argument("--output", metavar="FILE.json", help="write the result to this file")
    options = parser.parse_args(arguments)
    keep_heap("-m", "benchmarks", "reuse", *arguments)
    torch.set_num_threads(options.threads)
    try:
        rows = measure(options)
    except (KeyError, TypeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    result = {"header": header("cpu"), "rows": rows}
    print(table(result))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(options: argparse.Namespace) -> list[dict]:
    """One row with the trunk at every step, one with it at `options.trunk_steps` steps. Raises as `flow.Sampler`."""
    torch.manual_seed(SEED)
    network = model.build(options.preset).eval().requires_grad_(False)
    fill_zeros(network.decoder)
    dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
    noise = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.arange(options.batch) % network.null_label
    null = torch.full_like(labels, network.null_label)
    samplers = [
        flow.Sampler(network, steps=options.steps, guidance=GUIDANCE, dtype=dtype, trunk_steps=trunk_steps)
        for trunk_steps in (None, options.trunk_steps)
    ]
    calls = [lambda _, sampler=sampler: sampler(noise, labels, null) for sampler in samplers]
    times = interleaved(calls, "cpu", 0.0, options.rounds)
    what = {name: getattr(options, name) for name in ("preset", "size", "batch", "steps", "dtype")}
    return [
        what | {"trunk_steps": trunk_steps, "status": "ok", "least_ms": min(ms)} | statistics_of(ms)
        for trunk_steps, ms in zip((options.steps, options.trunk_steps), times, strict=True)
    ]


def table(result: dict) -> str:
    """The result as Markdown; the gain is that of the shortest rounds."""
    lines = ["| sampling | trunk steps | shortest round | median | gain |", "|---|---:|---:|---:|---:|"]
    every = result["rows"][0]["least_ms"]
    for row in result["rows"]:
        what = f"{row['preset']}, {row['size']}x{row['size']}, batch {row['batch']}, {row['steps']} guided Euler steps"
        cells = [f"{what}, {row['dtype']}", str(row["trunk_steps"])]
        cells += [f"{row[name] / 1e3:.2f} s" for name in ("least_ms", "ms")]
        lines.append(f"| {' | '.join(cells)} | {every / row['least_ms']:.2f} x |")
    return "\n".join(lines)
