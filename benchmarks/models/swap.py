"""A model of the published structure before and after `swap_decoder`, with the published loss and one op for both.

`python -m benchmarks swap [times] [memory] [losses]` measures on the CPU, prints Markdown, and writes JSON with
`--output`. `python -m benchmarks swap --show FILE.json` prints an earlier result. See docs/swap.md.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.harness import results
from benchmarks.harness.header import header
from benchmarks.harness.measure import statistics_of
from benchmarks.harness.timing import interleaved
from benchmarks.report.markdown import table
from deco_kernels import flow, ops
from deco_kernels.command_line import new_file, positive, thread_count
from deco_kernels.integrations import swap_decoder
from deco_kernels.machine import default_heap, keep_heap, peak_bytes, reset_peak
from deco_kernels.testing.published import losses as published_losses
from deco_kernels.testing.published_model import PublishedDeCo

PARTS = ("times", "memory", "losses")
EAGER, FUSED = "published", "swapped"
GUIDANCE = 3.2
SEED = 0
ULP = 2.0**-23  # relative rounding of float32; smaller differences of losses count as this one


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes of a float32 training run; all other sizes are the published ones (patch 16, decoder 3×32)."""

    image_size: int = 128
    batch: int = 8
    width: int = 128
    depth: int = 4
    heads: int = 4
    learning_rate: float = 1e-4
    ema_decay: float = 0.9999


class Training:
    """Training of a model on one batch, with AdamW and averaged weights; noise and times are seeded.

    `fused` swaps the decoder and computes it and the loss as one op. Everything else is the same, including the initial
    weights.
    """

    def __init__(self, recipe: Recipe, *, fused: bool):
        torch.manual_seed(SEED)
        sizes = dict(width=recipe.width, depth=recipe.depth, heads=recipe.heads)
        self.recipe, self.fused = recipe, fused
        self.model = PublishedDeCo(**sizes)
        if fused:
            swap_decoder(self.model)
        self.labels = torch.arange(recipe.batch) % 10
        self.images = smooth_images(recipe.batch, recipe.image_size)
        self.objective = flow.Objective(ops.jpeg_frequency_weight(), fused=fused)
        self.generator = torch.Generator().manual_seed(SEED)
        options = dict(lr=recipe.learning_rate, weight_decay=0.0, fused=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))

    def step(self) -> float:
        """One training step: draw, forward, loss, backward, AdamW, averaged weights. Returns the total loss."""
        times = flow.sample_time(len(self.images), generator=self.generator)
        noise = torch.randn(self.images.shape, generator=self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        total = self.total(times, noise)
        total.backward()
        self.optimizer.step()
        self.averaged.update_parameters(self.model)
        return total.item()

    def total(self, times: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return self.objective.losses(self.model, self.images, self.labels, times, noise)["total"]
        x_t, target = flow.interpolate(self.images, noise, times)
        velocity = self.model(x_t, times, self.labels)
        return published_losses(velocity, target, self.objective.frequency_weight)[0]

    @torch.no_grad()
    def sampling_step(self) -> torch.Tensor:
        """One guided Euler step; the model runs on twice the batch."""
        labels = torch.cat((torch.full_like(self.labels, 10), self.labels))
        times = torch.full((len(labels),), 0.5)
        v_uncond, v_cond = self.model(torch.cat((self.images, self.images)), times, labels).chunk(2)
        return self.images + 0.01 * (v_uncond + GUIDANCE * (v_cond - v_uncond))


def smooth_images(count: int, size: int) -> torch.Tensor:
    """Images [count, 3, size, size] in [-1, 1]: sums of waves of random direction and phase in every channel."""
    generator = torch.Generator().manual_seed(SEED)
    frequency, phase = (torch.randn(count, 3, 4, k, 1, generator=generator) for k in (2, 1))
    axis = torch.linspace(0, 2 * math.pi, size)
    waves = (frequency[..., 0, :] * axis)[..., None, :] + (frequency[..., 1, :] * axis)[..., :, None] + 3 * phase
    return waves.sin().mean(2)


# --- times -----------------------------------------------------------------------------------------------------------


class DecoderAlone:
    """x_embedder and dec_net of a model on the inputs of one step; `train` computes all gradients."""

    def __init__(self, model: nn.Module, recipe: Recipe, images: int):
        generator = torch.Generator().manual_seed(SEED)
        tokens = images * (recipe.image_size // model.patch_size) ** 2
        shape = (tokens, 3, model.patch_size**2)
        self.model = model
        self.pixels, self.grad_output = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(2))
        self.tokens = torch.randn(tokens, recipe.width, generator=generator)
        self.parameters = [*model.x_embedder.parameters(), *model.dec_net.parameters()]

    def forward(self) -> torch.Tensor:
        return self.model.dec_net(self.model.x_embedder(self.pixels), self.tokens)

    def train(self) -> None:
        self.tokens.requires_grad_()
        torch.autograd.grad(self.forward(), [self.tokens, *self.parameters], self.grad_output)

    @torch.no_grad()
    def sample(self) -> None:
        self.forward()


def measure_times(recipe: Recipe, budget_s: float, min_rounds: int) -> list[dict]:
    """Times of whole training and sampling steps and of their decoders, of both contenders, interleaved."""
    calls = {}
    for name in (EAGER, FUSED):
        training = Training(recipe, fused=name == FUSED)
        calls["training step", "whole", name] = training.step
        calls["training step", "decoder", name] = DecoderAlone(training.model, recipe, recipe.batch).train
        calls["sampling step", "whole", name] = training.sampling_step
        calls["sampling step", "decoder", name] = DecoderAlone(training.model, recipe, 2 * recipe.batch).sample
    steps = [lambda count, call=call: call() for call in calls.values()]
    times = interleaved(steps, "cpu", budget_s, min_rounds)
    keys = ("pass", "part", "contender")
    return [dict(zip(keys, key, strict=True)) | statistics_of(ms) for key, ms in zip(calls, times, strict=True)]


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(threads: int) -> list[dict]:
    """Peak memory growth over two training steps, gradients and optimizer included; one process per contender."""
    found = []
    for name in (EAGER, FUSED):
        command = [sys.executable, "-m", "benchmarks.models.swap", name, str(threads)]
        answer = subprocess.run(command, env=default_heap(), capture_output=True, text=True, check=False)
        if answer.returncode:
            raise OSError(f"measuring the memory of {name} failed:\n{answer.stderr}")
        found.append({"contender": name, "growth_bytes": int(answer.stdout)})
    return found


def growth(name: str, threads: int) -> int:
    """Peak memory growth in bytes. A step on a small image first loads the code and starts the threads."""
    torch.set_num_threads(threads)
    Training(Recipe(image_size=16, batch=1), fused=name == FUSED).step()
    training = Training(Recipe(), fused=name == FUSED)
    before = reset_peak("cpu")
    for _ in range(2):
        training.step()
    return peak_bytes("cpu") - before


# --- losses ----------------------------------------------------------------------------------------------------------


def measure_losses(recipe: Recipe, steps: int, threads: int) -> dict[str, list[float]]:
    """Losses of the same training run: published and swapped on `threads` threads, published on one thread."""
    previous = torch.get_num_threads()
    found = {}
    try:
        for name, count in ((EAGER, threads), (FUSED, threads), (EAGER, 1)):
            torch.set_num_threads(count)
            training = Training(recipe, fused=name == FUSED)
            print(f"{steps} steps of {name} on {count} threads", file=sys.stderr, flush=True)
            found[f"{name}, {count} threads"] = [training.step() for _ in range(steps)]
    finally:
        torch.set_num_threads(previous)
    return found


def differences(losses: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative differences from the published model over the steps: of the swapped model, and of the published
    model on one thread."""
    published, swapped, single = losses.values()
    return {"swapped": largest_difference(swapped, published), "threads": largest_difference(single, published)}


def largest_difference(losses: list[float], others: list[float]) -> float:
    """Largest relative difference over the steps."""
    return max(abs(one - other) / abs(other) for one, other in zip(losses, others, strict=True))


# --- report ----------------------------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    """Tables of all measured parts, and of the targets."""
    parts = [_times_table(result), _memory_table(result), _losses_table(result), targets_table(result)]
    return "\n\n".join(part for part in parts if part)


def _ms(result: dict, pass_: str, part: str, contender: str) -> float:
    keys = {"pass": pass_, "part": part, "contender": contender}
    (row,) = (row for row in result["times"]["rows"] if keys.items() <= row.items())
    return row["ms"]


def _times_table(result: dict) -> str:
    if "times" not in result:
        return ""
    lines = []
    for pass_ in ("training step", "sampling step"):
        for part in ("whole", "decoder"):
            eager, fused = (_ms(result, pass_, part, name) for name in (EAGER, FUSED))
            what = pass_ if part == "whole" else f"its decoder, {pass_.split()[0]}"
            lines.append([what, f"{eager:.1f} ms", f"{fused:.1f} ms", f"{eager / fused:.2f} x"])
        shares = [_ms(result, pass_, "decoder", name) / _ms(result, pass_, "whole", name) for name in (EAGER, FUSED)]
        lines.append([f"decoder's share, {pass_.split()[0]}", *(f"{share:.0%}" for share in shares), "–"])
    return table(["float32", "published", "swapped", "ratio"], lines)


def _memory_table(result: dict) -> str:
    if "memory" not in result:
        return ""
    eager, fused = (row["growth_bytes"] / 1e6 for row in result["memory"]["rows"])
    line = ["peak memory of a training step", f"{eager:.0f} MB", f"{fused:.0f} MB", f"{eager / fused:.1f} x"]
    return table(["memory", "published", "swapped", "ratio"], [line])


def _losses_table(result: dict) -> str:
    if "losses" not in result:
        return ""
    losses = result["losses"]["losses"]
    found = differences(losses)
    steps = len(next(iter(losses.values())))
    lines = [
        [name.replace(" 1 threads", " 1 thread"), f"{values[0]:.4f}", f"{values[-1]:.4f}"]
        for name, values in losses.items()
    ]
    differ = [[f"largest relative difference over {steps} steps", f"{found['swapped']:.1e}", f"{found['threads']:.1e}"]]
    return "\n\n".join(
        (
            table(["loss", "first step", "last step"], lines),
            table(["losses", "swapped from published", "published on 1 thread from published"], differ),
        )
    )


def targets_table(result: dict) -> str:
    """Targets, measured values, and whether each target is met."""
    lines = []
    if "times" in result:
        ratio = _ms(result, "training step", "whole", EAGER) / _ms(result, "training step", "whole", FUSED)
        lines.append(("time of a training step, published over swapped", "≥ 1.5 x", ratio, ratio >= 1.5))
    if "memory" in result:
        eager, fused = (row["growth_bytes"] for row in result["memory"]["rows"])
        lines.append(
            ("peak memory of a training step, swapped over published", "≤ 0.5 x", fused / eager, fused / eager <= 0.5)
        )
    if "losses" in result:
        found = differences(result["losses"]["losses"])
        ratio = found["swapped"] / max(found["threads"], ULP)
        lines.append(("difference of losses, swapped over one thread", "≤ 3 x", ratio, ratio <= 3))
    cells = [[what, target, f"{reached:.2f} x", "yes" if met else "no"] for what, target, reached, met in lines]
    return table(["what", "target", "reached", "met"], cells)


# --- program ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.show:
        print(markdown(_load(options.show)))
        return 0
    parts, recipe = options.parts or PARTS, dataclasses.asdict(Recipe())
    if "losses" in parts and options.threads == 1:
        parser.error("--threads: losses are compared with those on one thread; expected at least 2, got 1")
    result = {"recipe": recipe}
    if options.output and os.path.exists(options.output):
        result = _load(options.output)
        if result["recipe"] != recipe:
            parser.error(f"--output: {options.output} has parts of the recipe {result['recipe']}; name another file")
    keep_heap("-m", "benchmarks", "swap", *arguments)
    torch.set_num_threads(options.threads)
    for part in parts:
        result[part] = {"header": header("cpu")} | _measure(part, options)
    results.publish(result, markdown(result), options.output)
    return 0


def _load(path: str) -> dict:
    """Loads an earlier result. Raises OSError or ValueError."""
    result = results.read(path)
    with results.fields_of(path, "python -m benchmarks swap --output"):
        if "recipe" not in result:
            raise KeyError("recipe")
        markdown(result)
    return result


def _measure(part: str, options: argparse.Namespace) -> dict:
    if part == "times":
        return {"rows": measure_times(Recipe(), options.seconds, min_rounds=5)}
    if part == "memory":
        return {"rows": measure_memory(options.threads)}
    return {"losses": measure_losses(Recipe(), options.steps, options.threads)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks swap", description=__doc__.split("\n")[0])
    parts = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"{parts} (default: all)")
    parser.add_argument("--threads", type=thread_count, default=2, help="CPU threads (default 2)")
    parser.add_argument("--steps", type=positive, default=200, help="training steps for the losses (default 200)")
    parser.add_argument("--seconds", type=positive, default=30, help="timing budget after warm-up (default 30)")
    parser.add_argument(
        "--output", type=new_file, metavar="FILE.json", help="write the result to this file; keeps its other parts"
    )
    parser.add_argument("--show", metavar="FILE.json", help="print an earlier result; measure nothing")
    return parser


if __name__ == "__main__":
    print(growth(sys.argv[1], int(sys.argv[2])))
