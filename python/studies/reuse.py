"""Measurements of `ablate.py reuse`: sampling with the trunk at some steps only, against every step.

All contenders of a seed start from the same noise and classes.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from deco_kernels import flow
from deco_kernels.training.images import to_pixels
from images.spectra import diagonal_energies
from sampling.inputs import Conditioner, noise_of
from sampling.trunk_steps import calibrated
from studies.run import read_json, write_json

EVEN, CHOSEN, FEWER = "even", "chosen", "fewer"
SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of the steps
SEEDS = 3
SHOWN = 4  # samples of a contender in the picture
CALIBRATION_SEED = 1_000_000  # of noise that no measurement uses
TIMED_SAMPLES, TIMED_ROUNDS = 8, 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling of the study; the solver is Euler."""

    steps: int = 50
    guidance: float = 1.5
    samples: int = 32
    image_size: int = 64


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to sample that runs the trunk `count` times.

    kind: EVEN or CHOSEN, at that many steps of `flow.Sampler(trunk_steps=)`; FEWER, in that many steps altogether.
    """

    kind: str
    count: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.count}"


def contenders(steps: int) -> list[Contender]:
    """Every step first, then the kinds at each number of trunk steps from many to few."""
    counts = sorted({max(1, round(share * steps)) for share in SHARES} - {steps}, reverse=True)
    return [Contender(EVEN, steps), *(Contender(kind, count) for count in counts for kind in (EVEN, CHOSEN, FEWER))]


class Measurement:
    """Samples of a class-conditional model by every contender.

    Args:
        network: a model with `encode` and `decode`, such as DeCo. chosen: count → steps, see `chosen_steps`.
    """

    def __init__(self, network: nn.Module, settings: Settings, chosen: dict[int, list[int]]):
        self.network, self.settings, self.chosen = network, settings, chosen
        labels = [index % network.trunk.num_classes for index in range(settings.samples)]
        self.cond, self.uncond = Conditioner(network, torch.device("cpu"))(labels)

    def noise(self, seed: int) -> torch.Tensor:
        size = (self.settings.image_size,) * 2
        return torch.stack([noise_of(index, seed, size) for index in range(self.settings.samples)])

    def sampler(self, contender: Contender) -> flow.Sampler:
        if contender.kind == FEWER:
            options = dict(steps=contender.count)
        else:
            trunk_steps = self.chosen[contender.count] if contender.kind == CHOSEN else contender.count
            options = dict(steps=self.settings.steps, trunk_steps=trunk_steps)
        return flow.Sampler(self.network, guidance=self.settings.guidance, **options)

    def trajectory(self, contender: Contender, seed: int) -> torch.Tensor:
        """The states from noise to samples, [steps + 1, B, C, H, W]."""
        return torch.stack(self.sampler(contender)(self.noise(seed), self.cond, self.uncond, trajectory=True)[1])

    def results(self, seeds: int, out: Path, progress: Callable[[str], object]) -> Iterator[dict[str, Any]]:
        """One result per seed and contender, see `compare`. Those in the folders `out/runs` are read; `progress` gets
        the name of each one."""
        for seed in range(seeds):
            exact: torch.Tensor | None = None
            for contender in contenders(self.settings.steps):
                progress(f"{contender.name}, seed {seed}")
                folder = out / "runs" / f"{contender.name.replace(' ', '-')}-seed{seed}"
                if not (folder / "result.json").exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    if exact is None:
                        exact = self.trajectory(Contender(FEWER, self.settings.steps), seed)
                    self._measure(contender, seed, exact, folder)
                yield read_json(folder / "result.json", "remove it to repeat the run")

    def _measure(self, contender: Contender, seed: int, exact: torch.Tensor, folder: Path) -> None:
        """Writes samples.png, the first samples side by side, then result.json."""
        states = self.trajectory(contender, seed)
        row = np.concatenate(list(to_pixels(states[-1, :SHOWN])), axis=1)
        Image.fromarray(row).save(folder / "samples.png")
        trunk_steps = self.sampler(contender).trunk_steps
        result = {**dataclasses.asdict(contender), "seed": seed, "trunk_steps": trunk_steps}
        write_json(result | compare(states, exact), folder / "result.json")


def compare(states: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    """Distances of states [S + 1, B, C, H, W] on even times from the exact ones.

    Returns:
        "sample_error": ‖x - x_exact‖ / ‖x_exact‖ of the final samples. "velocity_error": the same of the velocities,
        averaged over the steps; None for another number of steps. "psnr": of the samples clamped to [-1, 1] in dB, the
        mean over images; None if one is equal. "difference", "sample": energies of the luminance's 8x8 DCT on each
        diagonal, of x - x_exact and of x_exact.
    """
    x, x_exact = states[-1], exact[-1]
    mse = (x.clamp(-1, 1) - x_exact.clamp(-1, 1)).square().mean((1, 2, 3))
    velocity_error = None
    if len(states) == len(exact):
        # Euler: (x_{i+1} - x_i) / (t_{i+1} - t_i) = v_i; the step cancels.
        errors = [_relative(*pair) for pair in zip(states.diff(dim=0), exact.diff(dim=0), strict=True)]
        velocity_error = sum(errors) / len(errors)
    return {
        "sample_error": _relative(x, x_exact),
        "velocity_error": velocity_error,
        "psnr": (10 * (4 / mse).log10()).mean().item() if mse.all() else None,
        "difference": diagonal_energies(x - x_exact),
        "sample": diagonal_energies(x_exact),
    }


def _relative(values: torch.Tensor, exact: torch.Tensor) -> float:
    return ((values - exact).norm() / exact.norm()).item()


def chosen_steps(network: nn.Module, settings: Settings, out: Path) -> dict[int, list[int]]:
    """Count → steps that `flow.choose_trunk_steps` chooses on a calibration batch; computed once per study, and kept in
    chosen.json."""
    path = out / "chosen.json"
    if not path.exists():
        conditioner = Conditioner(network, torch.device("cpu"))
        labels = list(range(network.trunk.num_classes))
        batch = (conditioner, labels, CALIBRATION_SEED, (settings.image_size,) * 2)
        options = dict(steps=settings.steps, guidance=settings.guidance)
        counts = [each.count for each in contenders(settings.steps) if each.kind == CHOSEN]
        write_json({str(count): calibrated(*batch, count, **options) for count in counts}, path)
    return {int(count): steps for count, steps in read_json(path, "remove it to choose the steps again").items()}


def seconds(measurement: Measurement, out: Path) -> dict[str, float]:
    """Contender → seconds for TIMED_SAMPLES samples, the least of TIMED_ROUNDS rounds in which all contenders
    alternate; measured once per study, and kept in times.json."""
    path = out / "times.json"
    if not path.exists():
        settings = dataclasses.replace(measurement.settings, samples=TIMED_SAMPLES)
        timed = Measurement(measurement.network, settings, measurement.chosen)
        noise, found = timed.noise(0), dict.fromkeys((each.name for each in contenders(settings.steps)), math.inf)
        for _ in range(TIMED_ROUNDS):
            for contender in contenders(settings.steps):
                sampler = timed.sampler(contender)
                start = time.perf_counter()
                sampler(noise, timed.cond, timed.uncond)
                found[contender.name] = min(found[contender.name], time.perf_counter() - start)
        write_json(found, path)
    return read_json(path, "remove it to measure the times again")
