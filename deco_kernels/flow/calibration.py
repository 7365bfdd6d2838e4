"""Choice of the steps at which the trunk runs, from the tokens of a calibration batch."""

from __future__ import annotations

from typing import Any

import torch

from deco_kernels.flow.cuda_graphs import Velocity
from deco_kernels.flow.samplers import Sampler, timesteps
from deco_kernels.flow.trunk_steps import MEASURES, best_trunk_steps, resolve_trunk_steps, token_distances


class _Recorder:
    """A model's halves; keeps the tokens of the last encoding at each time, on the CPU."""

    def __init__(self, model: Any):
        self.model = model
        self.tokens: dict[float, torch.Tensor] = {}

    def encode(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        tokens = self.model.encode(x, t, y)
        self.tokens[float(t[0])] = tokens.cpu()
        return tokens

    def decode(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.decode(x, t, tokens)


def choose_trunk_steps(
    model: Velocity,
    noise: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None = None,
    *,
    steps: int,
    trunk_steps: int,
    measure: str = "cosine",
    **settings: Any,
) -> list[int]:
    """Choose the steps at which the trunk runs by a calibration batch, for `Sampler(model, trunk_steps=...)`.

    Samples once with the trunk at every step, measures how far the tokens of every step are from those of every later
    step, and finds the steps of least total distance by dynamic programming (as DDT does, arXiv 2504.05741).

    Args:
        model: a model with `encode` and `decode`, such as DeCo.
        noise, cond, uncond: the calibration batch [B, ...], as in `sample`. The CPU keeps the tokens of all steps.
        steps: number of steps of sampling.
        trunk_steps: number of steps to choose, from 1 to `steps`.
        measure: "cosine" or "l2", see `token_distances`.
        settings: further arguments of `Sampler`: solver, guidance, guidance_interval, shift, dtype, compile_trunk.

    Returns:
        The indices of the chosen steps, increasing from 0; `write_trunk_steps` writes them as JSON.

    Raises:
        TypeError, ValueError: as `Sampler` does.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {list(MEASURES)}, got {measure!r}; choose one of them")
    times = timesteps(steps, settings.get("shift", 1.0))
    if isinstance(trunk_steps, bool) or not isinstance(trunk_steps, int):
        raise TypeError(
            f"trunk_steps: expected an int, got {type(trunk_steps).__name__}; "
            "pass the number of steps that run the trunk"
        )
    count = len(resolve_trunk_steps(trunk_steps, times))
    sampler = Sampler(model, steps=steps, trunk_steps=range(steps), **settings | {"cuda_graph": False})
    recorder = _Recorder(sampler.model)
    sampler.model = recorder
    sampler(noise, cond, uncond)
    tokens = [recorder.tokens[time] for time in times[:-1].tolist()]
    return best_trunk_steps(token_distances(tokens, measure), count)
