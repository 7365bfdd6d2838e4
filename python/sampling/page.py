"""Sampling for the page of app.py: the image, states of its trajectory, and their DCT spectra."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from deco_kernels import flow
from deco_kernels.training.images import to_pixels
from images.spectra import diagonal_energies
from sampling.inputs import Conditioner, noise_of, reads_text

MOST_STEPS = 250  # that the page offers
FRAMES = 8  # states of the trajectory to show, noise and sample included


@dataclass
class Shown:
    """image: uint8 [H, W, 3]. frames: [(image, caption)] from noise to sample. spectrum: plot for the frames."""

    image: np.ndarray
    frames: list[tuple[np.ndarray, str]]
    spectrum: Figure


@dataclass
class Painter:
    """Samples one image at a time from a model.

    steps, guidance: initial values on the page. settings: other settings of `flow.Sampler`. size: (height, width).
    """

    network: nn.Module
    conditioner: Conditioner
    steps: int
    guidance: float
    settings: dict
    size: tuple[int, int]

    def __call__(
        self, condition: float | str, steps: float, guidance: float, seed: float, trunk_steps: float = MOST_STEPS
    ) -> Shown:
        """Samples one image, with the trunk at `trunk_steps` steps spread evenly, or at every step if it is at least
        `steps`. Numbers may be floats, as the fields of the page return them.

        Raises:
            ValueError: unsupported condition, invalid number, or a sample that is not finite.
        """
        condition = self._condition(condition)
        steps, seed, guidance = _integer("steps", steps, 1), _integer("seed", seed, 0), _number("guidance", guidance)
        encoded = _integer("trunk steps", trunk_steps, 1)
        sampler = flow.Sampler(
            self.network,
            steps=steps,
            guidance=guidance,
            trunk_steps=encoded if encoded < steps else None,
            cuda_graph=False,
            **self.settings,
        )
        cond, uncond = self.conditioner([condition])
        noise = noise_of(0, seed, self.size).to(cond.device)[None]
        _, states = sampler(noise, cond, uncond, trajectory=True, progress=True)
        if not states[-1].isfinite().all():
            raise ValueError("the sample is not finite; use a smaller guidance; otherwise the checkpoint is corrupted")
        shown = sorted({round(i * steps / (FRAMES - 1)) for i in range(FRAMES)})
        times = [*flow.timesteps(steps, self.settings["shift"]).tolist()[:-1], 1.0]
        captions = [f"step {step}, t = {times[step]:.2f}" for step in shown]
        frames = [(to_pixels(states[step])[0], caption) for step, caption in zip(shown, captions, strict=True)]
        return Shown(frames[-1][0], frames, spectrum([states[step] for step in shown], captions))

    def _condition(self, given: float | str) -> int | str:
        if reads_text(self.network):
            if not str(given or "").strip():
                raise ValueError("prompt: expected text, got none")
            self.conditioner.check([str(given)])
            return str(given)
        label, classes = _integer("class", given, 0), self.network.trunk.num_classes
        if label >= classes:
            raise ValueError(f"class: expected 0 to {classes - 1}, got {label}")
        return label


def spectrum(states: list[torch.Tensor], captions: list[str]) -> Figure:
    """Plots the mean energy of the 8x8 DCT of luminance on each diagonal, for every state [1, 3, H, W]."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for number, (state, caption) in enumerate(zip(states, captions, strict=True)):
        shade = number / max(1, len(states) - 1)
        axis.plot(range(15), diagonal_energies(state.float().cpu()), color=(shade, 0.2, 1 - shade), label=caption)
    axis.set(xlabel="vertical + horizontal frequency", ylabel="energy of luminance", yscale="log")
    axis.set_title("8x8 DCT of the trajectory's states")
    axis.legend(fontsize=7)
    return figure


def _number(name: str, value: float | None, expected: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def _integer(name: str, value: float | None, least: int) -> int:
    expected = f"an integer of at least {least}"
    _number(name, value, expected)
    if int(value) != value or value < least:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return int(value)
