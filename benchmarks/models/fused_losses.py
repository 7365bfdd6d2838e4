"""Losses of a training run with decoder and loss as one op, as two ops, and in eager PyTorch on one and two threads.

`python -m benchmarks fused_losses` trains the preset deco-demo on the CPU, prints Markdown, and writes JSON with
`--output`. `python -m benchmarks fused_losses --show FILE.json` prints an earlier result. See docs/training.md.
"""

import argparse

import torch

from benchmarks.harness import results
from benchmarks.harness.header import header
from benchmarks.models.swap import ULP, largest_difference, smooth_images
from benchmarks.report.markdown import table
from deco_kernels import flow, model, ops
from deco_kernels.command_line import new_file, positive
from deco_kernels.testing.published import EagerObjective, eager_twin

ONE_OP, TWO_OPS = "one op, 2 threads", "two ops, 2 threads"
EAGER, ONE_THREAD = "eager, 2 threads", "eager, 1 thread"
CONTENDERS = (ONE_OP, TWO_OPS, EAGER, ONE_THREAD)
STEPS, BATCH, SIZE, LEARNING_RATE, SEED = 200, 2, 32, 1e-3, 0
MOST = 3.0  # difference of one op from two ops, over that of one thread from two or, if larger, ULP


def losses_of(contender: str, steps: int, batch: int = BATCH, size: int = SIZE) -> list[float]:
    """Total loss of every step, in float32; initial weights, images, noise and times are those of all contenders."""
    torch.manual_seed(SEED)
    network = model.build("deco-demo", num_classes=batch)
    objective = flow.Objective(ops.jpeg_frequency_weight(), distribution="uniform", fused=contender == ONE_OP)
    if contender in (EAGER, ONE_THREAD):
        network = eager_twin(network)
        objective = EagerObjective(ops.jpeg_frequency_weight(), distribution="uniform")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    images, labels = smooth_images(batch, size), torch.arange(batch)
    generator = torch.Generator().manual_seed(SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if contender == ONE_THREAD else 2)
    losses = []
    try:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            total = objective(network, images, labels, generator)["total"]
            total.backward()
            optimizer.step()
            losses.append(total.item())
    finally:
        torch.set_num_threads(threads)
    return losses


def differences(losses: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference over the steps: of one op from two ops, and of eager on one thread from two."""
    pairs = {"ops": (ONE_OP, TWO_OPS), "threads": (ONE_THREAD, EAGER)}
    return {what: largest_difference(losses[name], losses[other]) for what, (name, other) in pairs.items()}


def markdown(result: dict) -> str:
    losses = result["losses"]
    found, steps = differences(losses), len(losses[ONE_OP])
    lines = [[name, f"{losses[name][0]:.4f}", f"{losses[name][-1]:.4f}"] for name in CONTENDERS]
    ratio = found["ops"] / max(found["threads"], ULP)
    bound = [f"≤ {MOST:g} x", f"{ratio:.2f} x", "yes" if ratio <= MOST else "no"]
    heads = [f"largest relative difference over {steps} steps", "one op from two ops", "eager, 1 thread from 2"]
    differ = [["of the losses", f"{found['ops']:.1e}", f"{found['threads']:.1e}", *bound]]
    return "\n\n".join(
        (table(["loss", "first step", "last step"], lines), table([*heads, "target", "reached", "met"], differ))
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fused_losses", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="write the result to this file")
    parser.add_argument("--show", metavar="FILE.json", help="print an earlier result; measure nothing")
    options = parser.parse_args(arguments)
    if options.show:
        result = results.read(options.show)
        with results.fields_of(options.show, "python -m benchmarks fused_losses --output"):
            print(markdown(result))
        return 0
    result = {"header": header("cpu"), "losses": {name: losses_of(name, options.steps) for name in CONTENDERS}}
    results.publish(result, markdown(result), options.output)
    return 0
