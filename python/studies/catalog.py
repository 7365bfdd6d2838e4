"""The studies of `ablate.py`: variants, what the small form shows, and additional plots."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from deco_kernels import ops
from studies.run import Recipe, Variant

ROOT = Path(__file__).resolve().parents[2]

Results = list[dict[str, Any]]  # results of all runs, see `studies.run.Run.finish`
Costs = dict[str, dict[str, float]]  # variant → column → value


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of variants.

    steps, seeds: defaults of the study. native: crops have the aspect ratios of `studies.crops.native_shapes`, not 1.
    cost: measures the cost of a variant, or None. draw: fills additional axes; panels: their number.
    """

    title: str
    variants: tuple[Variant, ...]
    steps: int
    seeds: int
    shows: str
    cannot: str
    native: bool = False
    cost: Callable[[Variant, Recipe], dict[str, float]] | None = None
    draw: Callable[[list[Axes], Study, Results, Costs], None] | None = None
    panels: int = 0


CANNOT = (
    "The model has a few million parameters and trains for a few hundred steps on crops of a few photographs. It has "
    "not converged, and the ranking may change with more steps, data or width. The held-out crops come from another "
    "part of the same photographs. The errors are not FIDs and do not measure the published models."
)


def decoder_cost(variant: Variant, recipe: Recipe) -> dict[str, float]:
    """Time and FLOPs of only the decoder in a training step of the recipe's batch, float32, on this CPU."""
    side, decoder = recipe.image_size, variant.model
    size = f"B={recipe.batch_size},H={side},W={side},D={decoder['decoder_width']},N={decoder['decoder_depth']}"
    command = [sys.executable, "-m", "benchmarks.models.decoder_cost", size]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise OSError(f"measuring the decoder of {variant.name} failed:\n{answer.stderr}")
    return json.loads(answer.stdout)


def mean_error(results: Results, variant: str, images: str = "squares", metric: str = "pixel") -> float:
    values = [result["errors"][images][metric] for result in results if result["variant"] == variant]
    return sum(values) / len(values)


def mean_weight(results: Results, variant: str) -> torch.Tensor:
    """Frequency weights of a variant, averaged over its runs, [3, 8, 8]."""
    return torch.tensor([result["frequency_weight"] for result in results if result["variant"] == variant]).mean(0)


def draw_capacity(axes: list[Axes], study: Study, results: Results, costs: Costs) -> None:
    """Error and time over D x N, and error vs. time."""
    widths, depths = (sorted({v.model[key] for v in study.variants}) for key in ("decoder_width", "decoder_depth"))
    at = {(v.model["decoder_depth"], v.model["decoder_width"]): v.name for v in study.variants}
    surfaces = (
        ("held-out velocity error", lambda name: mean_error(results, name)),
        ("decoder in a training step [ms]", lambda name: costs[name]["decoder, ms"]),
    )
    for axis, (title, value) in zip(axes, surfaces, strict=False):
        grid = torch.tensor([[value(at[depth, width]) for width in widths] for depth in depths])
        axis.imshow(grid.numpy(), cmap="viridis", origin="lower", aspect="auto")
        middle = (grid.min() + grid.max()) / 2
        for row, values in enumerate(grid.tolist()):
            for column, each in enumerate(values):
                color = "black" if each > middle else "white"  # viridis is bright where values are high
                axis.text(column, row, f"{each:.4g}", ha="center", va="center", color=color, fontsize=9)
        axis.set(title=title, xlabel="D", ylabel="N")
        axis.set_xticks(range(len(widths)), widths)
        axis.set_yticks(range(len(depths)), depths)
    for variant in study.variants:
        point = costs[variant.name]["decoder, ms"], mean_error(results, variant.name)
        axes[2].plot(*point, "o", color="tab:blue")
        axes[2].annotate(variant.name, point, fontsize=7)
    axes[2].set(title="error vs. cost", xlabel="ms", xscale="log")


def draw_weights(axes: list[Axes], study: Study, results: Results, costs: Costs) -> None:
    """Luminance weights of JPEG quality 85 and learned ones, on the same logarithmic scale."""
    shown = [("JPEG 85", ops.jpeg_frequency_weight(85)[0])]
    shown += [(variant.name, mean_weight(results, variant.name)[0]) for variant in study.variants if variant.learned]
    for axis, (name, weight) in zip(axes, shown, strict=True):
        picture = axis.imshow(weight.clamp_min(1e-3).log10().numpy(), cmap="RdBu_r", vmin=-1.5, vmax=1.5)
        axis.set(title=f"log10 weight of Y: {name}", xlabel="horizontal frequency", ylabel="vertical frequency")
    axes[0].figure.colorbar(picture, ax=axes, shrink=0.8)


STUDIES = {
    "interaction": Study(
        "AdaLN vs. addition in the pixel decoder",
        (Variant("adaln"), Variant("add", {"interaction": "add"})),
        steps=500,
        seeds=3,
        shows="Whether modulation by the tokens learns faster than adding them to the pixel features, with the same "
        "data, times and noise. Points are seeds, so that their spread can be compared with the difference.",
        cannot=CANNOT,
    ),
    "capacity": Study(
        "Width D and depth N of the pixel decoder",
        tuple(
            Variant(f"D{width} N{depth}", {"decoder_width": width, "decoder_depth": depth})
            for width in (16, 32, 64)
            for depth in (1, 3, 6)
        ),
        steps=300,
        seeds=1,
        shows="How the error early in training and the decoder's cost on this machine change over D x N. With more "
        "than one seed (--seeds) also the spread.",
        cannot=CANNOT + " Differences between neighboring sizes at one seed may be chance. The upsample grows with D, "
        "so the models also differ in parameters.",
        cost=decoder_cost,
        draw=draw_capacity,
        panels=3,
    ),
    "frequency": Study(
        "JPEG quality behind the frequency weights, and weights that are learned",
        (
            *(Variant(f"JPEG {quality}", quality=quality) for quality in (50, 85, 100)),
            Variant("learned by loss", learned="loss"),
            Variant("learned by likelihood", learned="likelihood"),
        ),
        steps=400,
        seeds=2,
        shows="How the weights shift the error between low and high frequencies, and which weights training chooses: "
        "descent on the loss moves weight from hard to easy coefficients; under the likelihood the weights approach "
        "the inverse of the error.",
        cannot=CANNOT + " The study does not measure perceived quality: every column is an error of the velocity, and "
        "a run tends to be best in the column that its own weights resemble.",
        draw=draw_weights,
        panels=3,
    ),
    "aspect": Study(
        "Native aspect ratio vs. square center crop",
        (Variant("square"), Variant("native", native=True)),
        steps=500,
        seeds=3,
        native=True,
        shows="Whether training on rectangles of about the same number of pixels costs anything on squares, and what "
        "training only on squares costs on rectangles.",
        cannot=CANNOT
        + " Aspect ratios reach only 2:1, and all images have about the same number of pixels: larger sizes "
        "are not tested.",
    ),
}
