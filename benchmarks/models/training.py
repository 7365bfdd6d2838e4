"""`python -m benchmarks training`: share of a training step spent waiting for data, small recipe on the CPU.

Trains python/configs/small.yaml on crops of the sample photographs and reads the recorded seconds per step and the
share of them spent waiting for the next batch. Then times the same loader without training.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import results
from benchmarks.harness.header import header
from deco_kernels.command_line import new_file, positive, thread_count

ROOT = Path(__file__).resolve().parents[2]
EVERY = 10  # steps between two records; the first record includes the loader's startup and is dropped


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training", description="Times data loading of the small recipe on the CPU."
    )
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="training steps (default: 100)")
    parser.add_argument("--threads", type=thread_count, default=2, metavar="N", help="PyTorch threads (default: 2)")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="write the result to this file")
    options = parser.parse_args(arguments)
    if options.steps < 2 * EVERY:
        parser.error(f"--steps: expected at least {2 * EVERY}, got {options.steps}")
    torch.set_num_threads(options.threads)
    result = {"header": header("cpu"), "rows": [_measure(options.steps)]}
    results.publish(result, table(result), options.output)
    return 0


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = ["| step | waiting for data | images per second, training | images per second, loader alone |"]
    lines.append("|---:|---:|---:|---:|")
    for row in result["rows"]:
        lines.append(
            f"| {1e3 * row['seconds_per_step']:.0f} ms | {row['waiting']:.2%} (at most {row['most_waiting']:.2%}) "
            f"| {row['images_per_second']:.0f} | {row['loader_images_per_second']:.0f} |"
        )
    return "\n".join(lines)


def _measure(steps: int) -> dict:
    """Medians over the records of a run, and the loader's speed without training."""
    from deco_kernels.training import config, loop

    with tempfile.TemporaryDirectory() as folder:
        crops = [sys.executable, str(ROOT / "python" / "photo_crops.py"), f"{folder}/photographs", "--count", "200"]
        subprocess.run(crops, check=True)
        changes = [f"data.path={folder}/photographs", f"out={folder}/run", f"steps={steps}", f"log_every={EVERY}"]
        changes += ["sample.every=0", "save_every=1000000"]
        given = config.load(ROOT / "python" / "configs" / "small.yaml", changes)
        loop.train(given)
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines][1:]
        alone = _loader_images_per_second(given)
    middle = {name: statistics.median(each[name] for each in records) for name in ("seconds_per_step", "waiting")}
    return {
        "status": "ok",
        "recipe": "python/configs/small.yaml",
        "steps": steps,
        "workers": given.data.workers,
        "batch_size": given.batch_size,
        **middle,
        "most_waiting": max(each["waiting"] for each in records),
        "images_per_second": given.batch_size / middle["seconds_per_step"],
        "loader_images_per_second": alone,
    }


def _loader_images_per_second(given) -> float:
    """Images per second of the run's loader without training, after its first batches."""
    from deco_kernels.training import loading, sources

    source = sources.open_source(given.data, "label")
    plan = loading.plan_batches(given, len(source), None, patch_size=16, world_size=1)
    batches = iter(loading.loader(given, source, plan, 0, rank=0, world_size=1, pin=False))
    warm, timed = 10, given.steps - 10
    for _ in range(warm):
        next(batches)
    started = time.perf_counter()
    for _ in range(timed):
        next(batches)
    return timed * given.batch_size / (time.perf_counter() - started)
