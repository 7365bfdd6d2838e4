"""Training of a small DeCo on a few photographs: recipe, contenders, and comparisons of two contenders."""

import dataclasses
import statistics
import time

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from deco_kernels import flow, model, ops
from deco_kernels.testing.published import EagerObjective, eager_twin


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of training and sampling, and the required PSNR."""

    image_size: int = 64
    batch_size: int = 4  # at least one image of each photograph
    steps: int = 3000
    learning_rate: float = 3e-3  # peak of a one-cycle schedule, reached after the fraction `warmup` of the steps
    warmup: float = 0.1
    distribution: str = "uniform"  # of the training times; "lognormal" rarely draws times near 0 and 1
    ema_decay: float = 0.995
    sample_steps: int = 50
    compared_steps: int = 100  # steps of both contenders, alternating
    psnr_every: int = 250
    required_psnr: float = 25.0  # dB, for every photograph

    def shortened(self, steps: int) -> "Recipe":
        """The recipe with another number of steps and without a required PSNR."""
        compared = min(steps, self.compared_steps)
        every = max(1, min(steps, self.psnr_every))
        return dataclasses.replace(self, steps=steps, compared_steps=compared, psnr_every=every, required_psnr=0.0)

    def as_dict(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)


FULL = Recipe()
SHORT = dataclasses.replace(FULL, steps=600, ema_decay=0.98, compared_steps=20, psnr_every=150, required_psnr=14.0)


class Contender:
    """A model in training, with optimizer, schedule, averaged weights and a separate random generator.

    Args:
        photographs: [n, 3, S, S] in [-1, 1]; photograph i is class i. A batch cycles through them.
        eager: use plain PyTorch instead of the fused ops; initial weights, noise, times and order are the same.
    """

    def __init__(self, recipe: Recipe, photographs: torch.Tensor, seed: int, *, eager: bool):
        self.recipe, self.photographs = recipe, photographs
        torch.manual_seed(seed)
        self.model = model.build("deco-demo", num_classes=len(photographs))
        if eager:
            self.model = eager_twin(self.model)
        self.objective = (EagerObjective if eager else flow.Objective)(
            ops.jpeg_frequency_weight(), distribution=recipe.distribution
        )
        self.labels = torch.arange(max(recipe.batch_size, len(photographs))) % len(photographs)
        self.images = photographs[self.labels]
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, recipe.learning_rate, recipe.steps, pct_start=recipe.warmup, cycle_momentum=False
        )
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        self.losses: list[float] = []
        self.step_seconds: list[float] = []

    def step(self) -> float:
        """One training step; returns and records the total loss."""
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        total = self.objective(self.model, self.images, self.labels, self.generator)["total"]
        total.backward()
        self.optimizer.step()
        self.schedule.step()
        self.averaged.update_parameters(self.model)
        self.losses.append(total.item())
        self.step_seconds.append(time.perf_counter() - started)
        return self.losses[-1]

    def sample(self, seed: int = 0) -> torch.Tensor:
        """One sample per photograph from the averaged weights, [n, 3, S, S]."""
        noise = torch.randn(self.photographs.shape, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(len(self.photographs))
        return flow.sample(self.averaged, noise, labels, steps=self.recipe.sample_steps)


def compare_steps(fused: Contender, eager: Contender) -> dict[str, float]:
    """Runs `compared_steps` of both, alternating, so that other load affects both equally; returns median times.

    The first tenth of the steps is warm-up and is not counted.
    """
    count = fused.recipe.compared_steps
    for _ in tqdm(range(count), desc="fused and eager side by side", unit="step"):
        eager.step()
        fused.step()
    step_ms = [1e3 * statistics.median(each.step_seconds[count // 10 :]) for each in (eager, fused)]
    return {"step_ms_eager": step_ms[0], "step_ms_fused": step_ms[1], "speedup": step_ms[0] / step_ms[1]}


def loss_difference(fused: Contender, eager: Contender) -> float:
    """Largest relative difference of the losses over the steps that both have taken."""
    return max(abs(one - other) / abs(other) for one, other in zip(fused.losses, eager.losses, strict=False))


def gradient_errors(fused: Contender, seed: int) -> dict[str, tuple[float, float]]:
    """Relative L2 error of the gradient of every parameter against the published formulation in float64, at the current
    weights of `fused`: {name: (fused, eager in float32)}."""
    twin = eager_twin(fused.model)
    eager_objective = EagerObjective(ops.jpeg_frequency_weight(), distribution=fused.recipe.distribution)

    def gradients(objective, network):
        generator = torch.Generator().manual_seed(seed)
        total = objective(network, fused.images, fused.labels, generator)["total"]
        found = torch.autograd.grad(total, list(network.parameters()))
        return [gradient.double() for gradient in found]

    names = [name for name, _ in fused.model.named_parameters()]
    order = {name: index for index, (name, _) in enumerate(twin.named_parameters())}
    ours = gradients(fused.objective, fused.model)
    eager = gradients(eager_objective, twin)
    exact = gradients(eager_objective, twin.double())

    def error(actual, index):
        return ((actual - exact[index]).norm() / exact[index].norm()).item()

    return {name: (error(ours[i], order[name]), error(eager[order[name]], order[name])) for i, name in enumerate(names)}


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1], clamped."""
    return ((images + 1) / 2).clamp(0, 1)


def psnr(images: torch.Tensor, references: torch.Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of each image [n, 3, H, W] in [-1, 1] after clamping, peak 1 in [0, 1]."""
    error = (to_unit(images) - to_unit(references)).square().flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-12))).tolist()


def train(contender: Contender, seed: int) -> tuple[list[tuple[int, list[float]]], torch.Tensor]:
    """Trains to the end of the recipe. Returns ([(step, PSNR of each photograph)], the last samples)."""
    recipe, curve = contender.recipe, []
    with tqdm(
        total=recipe.steps, initial=len(contender.losses), desc="training with the fused ops", unit="step"
    ) as bar:
        while True:
            done = len(contender.losses)
            if done % recipe.psnr_every == 0 or done >= recipe.steps:
                samples = contender.sample(seed)
                curve.append((done, psnr(samples, contender.photographs)))
                loss = f"{contender.losses[-1]:.3f}" if contender.losses else "none yet"
                bar.set_postfix(psnr=f"{min(curve[-1][1]):.1f} dB", loss=loss)
            if done >= recipe.steps:
                return curve, samples
            contender.step()
            bar.update()
