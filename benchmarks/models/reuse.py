"""`python -m benchmarks reuse`: guided sampling with the trunk at some steps only against every step.

The contenders sample the same noise in turn with `flow.Sampler` and Euler steps, from random weights. On a GPU, calls
are captured as CUDA graphs, and the published decoder is timed, too, with and without them. `--compile-trunk` adds the
contenders with a compiled trunk.
"""

import argparse
import copy
import json
from typing import NamedTuple

import torch

from benchmarks.harness import results
from benchmarks.harness.header import header
from benchmarks.harness.measure import statistics_of
from benchmarks.harness.timing import interleaved
from benchmarks.harness.verification import SEED
from benchmarks.models.end_to_end import GUIDANCE, fill_zeros, with_parts
from benchmarks.names import DTYPES, PUBLISHED
from deco_kernels import flow, model
from deco_kernels.command_line import new_file, positive, thread_count
from deco_kernels.machine import keep_heap
from deco_kernels.testing import published

FUSED = "fused"


class Contender(NamedTuple):
    """`decoder`: PUBLISHED (eager) or FUSED."""

    decoder: str
    graphs: bool
    trunk_steps: int | None
    compiled: bool = False  # the trunk


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks reuse", description="Times sampling with the trunk at some steps only."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--preset", default="deco-l/16", help="class-to-image model (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=256, metavar="N", help="image side (default: 256)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="Euler steps (default: 10)")
    parser.add_argument("--trunk-steps", type=int, default=5, metavar="K", help="steps with the trunk (default: 5)")
    parser.add_argument("--compile-trunk", action="store_true", help="time the fused ones with a compiled trunk, too")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--threads", type=thread_count, default=2, metavar="N", help="PyTorch threads on the CPU (default: 2)"
    )
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="timed rounds (default: 7)")
    parser.add_argument("--stream", action="store_true", help="print every row as a line of JSON")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="write the result to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    known = [name for name, (kind, _) in model.PRESETS.items() if kind is model.DeCo]
    if options.preset not in known:
        parser.error(f"--preset: expected one of {known}, got {options.preset!r}")
    if options.device == "cpu":
        keep_heap("-m", "benchmarks", "reuse", *arguments)
        torch.set_num_threads(options.threads)
    try:
        rows = measure(options)
    except (TypeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    for row in rows if options.stream else ():
        print(json.dumps({"benchmark": "reuse"} | row), flush=True)
    results.publish({"header": header(options.device), "rows": rows}, table(rows), options.output)
    return 0


def contenders(device: str, trunk_steps: int, compile_trunk: bool) -> list[Contender]:
    """The first one is that which the others are compared with."""
    graphs = device == "cuda"
    eager = [Contender(PUBLISHED, False, None), Contender(PUBLISHED, True, None)] if graphs else []
    fused = [Contender(FUSED, graphs, steps) for steps in (None, trunk_steps)]
    return eager + fused + [each._replace(compiled=True) for each in fused if compile_trunk]


def measure(options: argparse.Namespace) -> list[dict]:
    """One row per contender. Raises as `flow.Sampler`."""
    torch.manual_seed(SEED)
    network = model.build(options.preset).eval().requires_grad_(False)
    fill_zeros(network.decoder)
    network.to(options.device)
    networks = {FUSED: network, PUBLISHED: with_parts(network, decoder=published.eager_view(network.decoder))}
    dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
    noise = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    labels = torch.arange(options.batch, device=options.device) % network.null_label
    null = torch.full_like(labels, network.null_label)
    found = contenders(options.device, options.trunk_steps, options.compile_trunk)
    samplers = [
        flow.Sampler(
            copy.deepcopy(networks[each.decoder]) if each.compiled else networks[each.decoder],
            steps=options.steps,
            guidance=GUIDANCE,
            dtype=dtype,
            trunk_steps=each.trunk_steps,
            cuda_graph=each.graphs,
            compile_trunk=each.compiled,
        )
        for each in found
    ]
    calls = [lambda _, sampler=sampler: sampler(noise, labels, null) for sampler in samplers]
    times = interleaved(calls, options.device, 0.0, options.rounds)
    what = {name: getattr(options, name) for name in ("preset", "size", "batch", "steps", "dtype")}
    return [
        what
        | each._asdict()
        | {"trunk_steps": each.trunk_steps or options.steps, "status": "ok", "least_ms": min(ms)}
        | statistics_of(ms)
        for each, ms in zip(found, times, strict=True)
    ]


def table(rows: list[dict]) -> str:
    """The rows as Markdown; the gain is that of the shortest rounds over the first row's."""
    lines = ["| sampling | decoder | trunk steps | shortest round | median | gain |", "|---|---|---:|---:|---:|---:|"]
    every = rows[0]["least_ms"]
    for row in rows:
        what = f"{row['preset']}, {row['size']}x{row['size']}, batch {row['batch']}, {row['steps']} guided Euler steps"
        decoder = row["decoder"] + " in CUDA graphs" * row["graphs"] + ", compiled trunk" * row.get("compiled", False)
        cells = [f"{what}, {row['dtype']}", decoder, str(row["trunk_steps"])]
        cells += [f"{row[name] / 1e3:.2f} s" for name in ("least_ms", "ms")]
        lines.append(f"| {' | '.join(cells)} | {every / row['least_ms']:.2f} x |")
    return "\n".join(lines)
