"""Host overhead of the ops in whole steps: two checkouts, measured alternately in separate processes.

python -m benchmarks host_time OTHER_CHECKOUT [--pairs 7]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.report.markdown import table
from deco_kernels.command_line import positive

HERE = Path(__file__).resolve().parents[2]


def steps() -> dict[str, tuple[Callable[[], None], int]]:
    """(step, repeats per sample) by name."""
    return {
        "deco-demo, training step, batch 8, 128 x 128": (_training_step(), 1),
        "XL decoder behind a narrow trunk, sampling step, batch 1, 256 x 256": (_sampling_step(), 2),
        "pixel_decoder, one pixel, forward": (_one_pixel(training=False), 300),
        "pixel_decoder, one pixel, forward and backward": (_one_pixel(training=True), 100),
    }


def _randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module


def _training_step() -> Callable[[], None]:
    from deco_kernels import flow, model, ops

    network = _randomize(model.build("deco-demo"))
    objective = flow.Objective(ops.jpeg_frequency_weight())
    optimizer = torch.optim.AdamW(network.parameters())
    images, labels = torch.randn(8, 3, 128, 128), torch.zeros(8, dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        objective(network, images, labels)["total"].backward()
        optimizer.step()

    return step


def _sampling_step() -> Callable[[], None]:
    from deco_kernels import model

    trunk = _randomize(nn.Linear(24, 1152))
    decoder = _randomize(model.PixelDecoder(1152))
    image, features = torch.randn(1, 3, 256, 256), torch.randn(1, 256, 24)

    @torch.no_grad()
    def step() -> None:
        image.add_(decoder(image, trunk(features)), alpha=1e-3)

    return step


def _one_pixel(training: bool) -> Callable[[], None]:
    from deco_kernels import ops, testing

    inputs = testing.random_inputs("pixel_decoder", dtype=torch.float32, patch_size=1, image_size=(1, 1, 1))
    tensors = {name: tensor.requires_grad_(training) for name, tensor in inputs.tensors.items()}

    def step() -> None:
        with torch.set_grad_enabled(training):
            velocity = ops.pixel_decoder(**tensors, **inputs.options)
        if training:
            for tensor in tensors.values():
                tensor.grad = None
            velocity.backward(inputs.grad_outputs[0])

    return step


def measure(samples: int) -> dict[str, float]:
    """Median milliseconds per step, by name."""
    torch.manual_seed(0)
    found = {}
    for name, (step, repeats) in steps().items():
        times = []
        for _ in range(samples + 2):
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            times.append(1e3 * (time.perf_counter() - start) / repeats)
        found[name] = statistics.median(times[2:])
    return found


def print_measured(samples: int) -> None:
    import deco_kernels

    print(json.dumps({"ms": measure(samples), "package": deco_kernels.__file__}))


def in_process(checkout: Path, samples: int) -> dict[str, float]:
    """`measure` with the package of a checkout."""
    code = f"import runpy; runpy.run_path({__file__!r})['print_measured']({samples})"
    command = [sys.executable, "-c", code]  # imports packages from its working directory first
    lines = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    answer = json.loads(lines[-1])
    if Path(answer["package"]).parents[1] != checkout:
        raise ValueError(f"expected the package of {checkout}, got {answer['package']}; the checkout must hold it")
    return answer["ms"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host_time", description=__doc__.partition("\n\n")[0])
    parser.add_argument("other", type=Path, help="checkout to compare with; its CPU module must be built")
    parser.add_argument("--pairs", type=positive, default=7, help="pairs of processes (default: 7)")
    parser.add_argument("--samples", type=positive, default=15, help="samples per process (default: 15)")
    options = parser.parse_args(arguments)
    if not (options.other / "deco_kernels").is_dir():
        parser.error(f"other: expected a checkout with a folder deco_kernels, found none in {options.other}")
    checkouts = {"other": options.other.resolve(), "this": HERE}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for pair in range(options.pairs):
        for name in sorted(checkouts, reverse=pair % 2 == 0):
            found[name].append(in_process(checkouts[name], options.samples))
    lines = []
    for step in found["this"][0]:
        other, this = ([row[step] for row in found[name]] for name in checkouts)
        ratios = sorted(b / a for a, b in zip(other, this, strict=True))
        medians = [f"{statistics.median(values):.4g}" for values in (other, this)]
        lines.append([step, *medians, f"{statistics.median(ratios):.3f}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}"])
    print(table(["step", "other, ms", "this, ms", "this / other, median of pairs", "lowest to highest"], lines))
    return 0
