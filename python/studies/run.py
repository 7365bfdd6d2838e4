"""One run of a study: trains a small model and evaluates its averaged weights on held-out crops. Resumable."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deco_kernels import flow, model, ops
from deco_kernels.backends.reference.flow_matching_loss import block_dct_ycbcr
from deco_kernels.model.checkpoint_file import complete_or_absent
from deco_kernels.training.batches import BatchPlan
from deco_kernels.training.checkpoints import write_atomically
from deco_kernels.training.ema import MovingAverage
from deco_kernels.training.images import to_signed
from deco_kernels.training.module import draw_per_image
from studies.crops import Images
from studies.learned_weight import LearnedWeightObjective

Groups = dict[tuple[int, int], Images]

LOW_FREQUENCIES = 4  # 8x8 DCT coefficients with row + column below this are "low"
WEIGHT_RATE = 0.02  # learning rate of the frequency weights
_JUDGED_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings shared by all runs of a study."""

    steps: int
    batch_size: int = 8
    image_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 30  # steps
    ema_decay: float = 0.98
    preset: str = "deco-demo"
    save_every: int = 100


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant of a comparison.

    model: constructor arguments that override the preset.
    quality: JPEG quality of the frequency weights; learned: rule for learning them instead, or None.
    native: train on crops at their native shape instead of the square center.
    """

    name: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    quality: int = 85
    learned: str | None = None
    native: bool = False


class Run:
    """Training of a variant.

    All variants with the same seed see the same images, times and noise in the same order, and draw their initial
    weights with that seed.

    Args:
        training: crops by shape. num_classes: classes of the model. folder: folder of the run, see `finish`.
    """

    def __init__(self, variant: Variant, recipe: Recipe, seed: int, training: Groups, num_classes: int, folder: Path):
        self.variant, self.recipe, self.seed, self.training, self.folder = variant, recipe, seed, training, folder
        torch.manual_seed(seed)
        self.model = model.build(recipe.preset, num_classes=num_classes, **variant.model)
        self.objective = make_objective(variant)
        groups = [{"params": list(self.model.parameters()), "rate": recipe.learning_rate}]
        if variant.learned:
            groups.append({"params": list(self.objective.parameters()), "rate": WEIGHT_RATE})
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
        self.average = MovingAverage(self.model, recipe.ema_decay)
        # The plan numbers the images consecutively across groups.
        members, first = {}, 0
        for shape, images in training.items():
            members[shape] = torch.arange(first, first + len(images.labels)).numpy()
            first += len(images.labels)
        self.pixels = [pixels for images in training.values() for pixels in images.pixels]
        self.labels = torch.cat([images.labels for images in training.values()])
        self.plan = BatchPlan(members, recipe.batch_size, seed)
        self.generator = torch.Generator()
        self.losses: list[float] = []

    def train(self, progress: Callable[[int], object]) -> None:
        """Trains from the last saved step; calls `progress` with the number of steps done, first with those saved."""
        self._restore()
        progress(len(self.losses))
        while len(self.losses) < self.recipe.steps:
            self._step()
            progress(1)
            if len(self.losses) % self.recipe.save_every == 0:
                self._save()

    def finish(self, held_out: dict[str, Groups]) -> dict[str, Any]:
        """Evaluates the averaged weights, writes model.safetensors, then result.json, and removes the saved state."""
        with self.average.swapped():
            errors = {name: velocity_errors(self.model, groups) for name, groups in held_out.items()}
            model.save_model(self.model, self.folder / "model.safetensors", overwrite=True)
        result = {
            "variant": self.variant.name,
            "seed": self.seed,
            "steps": len(self.losses),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "decoder_parameters": sum(parameter.numel() for parameter in self.model.decoder.parameters()),
            "errors": errors,
            "pixel_losses": self.losses,
            "frequency_weight": self.objective.frequency_weight.detach().tolist(),
        }
        write_json(result, self.folder / "result.json")
        self._state.unlink(missing_ok=True)
        return result

    def _step(self) -> None:
        step, size = len(self.losses), self.recipe.batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self._schedule(step)
        _, numbers = self.plan.step(step)
        x, y = to_signed(torch.stack([self.pixels[number] for number in numbers])), self.labels[numbers]
        samples = range(step * size, (step + 1) * size)
        y, t, noise = draw_per_image(self.objective, x, y, list(samples), self.seed, self.generator)
        losses = self.objective.losses(self.model, x, y, t, noise)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.losses.append(losses["pixel"].item())

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then linear decay to a tenth."""
        recipe = self.recipe
        return min((step + 1) / recipe.warmup, 1 - 0.9 * step / recipe.steps)

    @property
    def _state(self) -> Path:
        return self.folder / "state.pt"

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.averages,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
        }
        write_atomically(state, self._state, resume="--resume")

    def _restore(self) -> None:
        """Loads the saved state if there is one. Raises ValueError if it is damaged."""
        if not self._state.exists():
            return
        try:
            state = torch.load(self._state, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name, average in self.average.averages.items():
                average.copy_(state["average"][name])
            self.losses = state["losses"]
        except Exception as error:  # torch.load raises many types for damaged archives
            raise ValueError(
                f"--resume: {self._state} is damaged ({type(error).__name__}); remove it to restart the run"
            ) from error


def make_objective(variant: Variant) -> flow.Objective:
    """The objective with uniform times: lognormal times rarely reach the ends in short runs."""
    if variant.learned:
        return LearnedWeightObjective(variant.learned, distribution="uniform")
    return flow.Objective(ops.jpeg_frequency_weight(variant.quality), distribution="uniform")


@torch.no_grad()
def velocity_errors(network: torch.nn.Module, groups: Groups) -> dict[str, float]:
    """Mean squared error of the velocity over all images, with fixed times and noise.

    Returns:
        "pixel"; "jpeg85", weighted by `ops.jpeg_frequency_weight(85)`; "low" and "high", of the luminance coefficients
        with row + column below LOW_FREQUENCIES, and from it on.
    """
    generator = torch.Generator().manual_seed(20)
    sums: dict[str, float] = dict.fromkeys(("pixel", "jpeg85", "low", "high"), 0.0)
    frequency = torch.arange(8)
    low = frequency[:, None] + frequency < LOW_FREQUENCIES
    weight, count = ops.jpeg_frequency_weight(85), 0
    for images in groups.values():
        n = len(images.labels)
        t = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=generator)]
        noise = torch.randn(images.pixels.shape, generator=generator)
        for part in torch.arange(n).split(_JUDGED_AT_ONCE):
            x_t, target = flow.interpolate(to_signed(images.pixels[part]), noise[part], t[part])
            error = network(x_t, t[part], images.labels[part]) - target
            energy = block_dct_ycbcr(error).square().mean((0, 2, 3))
            found = {
                "pixel": error.square().mean(),
                "jpeg85": (weight * energy).mean(),
                "low": energy[0][low].mean(),
                "high": energy[0][~low].mean(),
            }
            for name, value in found.items():
                sums[name] += len(part) * value.item()
        count += n
    return {name: value / count for name, value in sums.items()}


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads the JSON object of a file. Raises ValueError with the remedy if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"--resume: {path} is damaged; {remedy}")
    return content


def write_json(content: Any, path: Path) -> None:
    """Writes JSON atomically."""
    with complete_or_absent(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
