"""Solvers of dx/dt = v(x, t) on given times; each yields the state after every step.

Source: DeCo (arXiv 2511.19365), section 4, as used for sampling from the published checkpoints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch


class Evaluate(Protocol):
    """The velocity at x [B, ...] and time index `at`, guided if step `step` (by default `at`) is guided."""

    def __call__(self, x: torch.Tensor, at: int, step: int | None = None) -> torch.Tensor: ...


def _euler(evaluate: Evaluate, x: torch.Tensor, times: list[float]) -> Iterator[torch.Tensor]:
    """x ← x + (t' - t)·v(x, t)."""
    for step, (start, end) in enumerate(zip(times, times[1:], strict=False)):
        x = x + (end - start) * evaluate(x, step)
        yield x


def _heun(evaluate: Evaluate, x: torch.Tensor, times: list[float], *, reuse: bool) -> Iterator[torch.Tensor]:
    """x ← x + (t' - t)·(v + v')/2 with v the slope at t and v' = v(x + (t' - t)·v, t'); the last step is Euler's.

    v is v(x, t). With `reuse`, from the second step on, it is v' of the previous step: one evaluation per step.
    """
    slope = None
    for step, (start, end) in enumerate(zip(times, times[1:], strict=False)):
        size = end - start
        if slope is None:
            slope = evaluate(x, step)
        predicted = x + size * slope
        if step == len(times) - 2:
            x = predicted
        else:
            corrected = evaluate(predicted, step + 1, step)
            x = x + size * 0.5 * (slope + corrected)
            slope = corrected if reuse else None
        yield x


def _adams(evaluate: Evaluate, x: torch.Tensor, times: list[float], *, order: int) -> Iterator[torch.Tensor]:
    """x ← x + (t' - t)·Σ w_j·v_j (Adams-Bashforth), v_j the velocities at the last `order` times, at first fewer."""
    slopes: deque[torch.Tensor] = deque(maxlen=order)
    for step, (start, end) in enumerate(zip(times, times[1:], strict=False)):
        slopes.append(evaluate(x, step))
        weights = adams_weights(times[step + 1 - len(slopes) : step + 1], end)
        x = x + (end - start) * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        yield x


def adams_weights(nodes: list[float], end: float) -> list[float]:
    """Adams-Bashforth weights of the velocities at `nodes` for the step from the last node to `end`; they sum to 1.

    They give the mean of the interpolating polynomial. With τ the time in units of the step, τ = 0 at the last node,
    the weights w solve Σ_j w_j·τ_j^k = ∫₀¹ τ^k dτ = 1/(k + 1) for k below the number of nodes.
    """
    tau = (torch.tensor(nodes, dtype=torch.float64, device="cpu") - nodes[-1]) / (end - nodes[-1])
    power = torch.arange(len(nodes), dtype=torch.float64, device="cpu")
    return torch.linalg.solve(tau ** power[:, None], 1 / (power + 1)).tolist()


class Solver(NamedTuple):
    """`advance` yields the states. With `guides_end` the guidance interval includes its upper end: lo < t <= hi."""

    advance: Callable[[Evaluate, torch.Tensor, list[float]], Iterator[torch.Tensor]]
    guides_end: bool


SOLVERS: dict[str, Solver] = {
    "euler": Solver(_euler, True),
    "heun": Solver(partial(_heun, reuse=True), True),
    "heun_exact": Solver(partial(_heun, reuse=False), True),
    "adams1": Solver(partial(_adams, order=1), False),
    "adams2": Solver(partial(_adams, order=2), False),
    "adams3": Solver(partial(_adams, order=3), False),
}
"""Solvers by name."""
