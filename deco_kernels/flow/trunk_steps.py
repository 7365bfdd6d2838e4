"""Steps of sampling at which the trunk runs; the decoder runs at all of them on the newest tokens.

DeCo's trunk models slow semantics and its decoder fast detail, so tokens of one step approximate those of the next.
DDT (arXiv 2504.05741), a model with the same separation, chooses the steps by dynamic programming, as here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

TrunkSteps = int | Sequence[int]
"""A number of steps, spread evenly, or the indices of the steps."""

MEASURES = ("cosine", "l2")
"""Distances between the tokens of two steps: 1 - cosine similarity, and ‖a - b‖ / ‖b‖."""


def resolve_trunk_steps(trunk_steps: TrunkSteps, times: torch.Tensor) -> list[int]:
    """Indices of the steps at which the trunk runs.

    Args:
        trunk_steps: K, for K steps spread evenly in the shifted time, the first always among them; or the indices.
        times: the steps + 1 times of sampling, see `timesteps`.

    Raises:
        TypeError: neither an int nor a sequence of ints.
        ValueError: K is not from 1 to steps; or indices that do not increase from 0 or reach beyond the last step.
    """
    steps = len(times) - 1
    if isinstance(trunk_steps, int) and _is_int(trunk_steps):
        if not 1 <= trunk_steps <= steps:
            raise ValueError(
                f"trunk_steps: expected from 1 to {steps}, the number of steps, got {trunk_steps}; "
                "choose one in this range"
            )
        return _spread(trunk_steps, times[:-1].tolist())
    if not isinstance(trunk_steps, Sequence) or isinstance(trunk_steps, str) or not all(map(_is_int, trunk_steps)):
        raise TypeError(f"trunk_steps: expected an int or a sequence of ints, got {trunk_steps!r}; pass one of them")
    chosen = list(trunk_steps)
    if chosen[:1] != [0]:
        raise ValueError(
            f"trunk_steps: expected 0 as the first index, since the first step has no earlier tokens, got {chosen}; "
            "start with 0"
        )
    if any(later <= earlier for earlier, later in zip(chosen, chosen[1:], strict=False)):
        raise ValueError(f"trunk_steps: expected increasing indices, got {chosen}; sort them, each once")
    if chosen[-1] >= steps:
        raise ValueError(
            f"trunk_steps: expected indices below {steps}, the number of steps, got {chosen}; leave the others out"
        )
    return chosen


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _spread(count: int, starts: list[float]) -> list[int]:
    """The steps that start closest to the times 0, 1/count, 2/count, ..., each after the previous one."""
    chosen: list[int] = []
    for number in range(count):
        earliest, latest = (chosen[-1] + 1 if chosen else 0), len(starts) - (count - number)
        chosen.append(min(range(earliest, latest + 1), key=lambda step: abs(starts[step] - number / count)))
    return chosen


def token_distances(tokens: Sequence[torch.Tensor], measure: str = "cosine") -> torch.Tensor:
    """Distances [S, S] between the tokens of S steps, float64 on the CPU; [i, j] is that of step i from step j.

    Args:
        tokens: per step [B, L, Z]. Where B differs (a guided step has both conditions, first the null condition), the
            last rows of both are compared.
        measure: "cosine", 1 - cosine similarity per token, or "l2", ‖a_i - a_j‖ / ‖a_j‖ per token; averaged.

    Raises ValueError for another measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {list(MEASURES)}, got {measure!r}; choose one of them")
    found = torch.zeros(len(tokens), len(tokens), dtype=torch.float64, device="cpu")
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            if i != j:
                rows = min(len(a), len(b))
                found[i, j] = _distance(a[len(a) - rows :].float(), b[len(b) - rows :].float(), measure)
    return found


def _distance(a: torch.Tensor, b: torch.Tensor, measure: str) -> float:
    if measure == "cosine":
        return 1 - F.cosine_similarity(a, b, dim=-1).double().mean().item()
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).double().mean().item()


def best_trunk_steps(distances: torch.Tensor, count: int) -> list[int]:
    """The `count` steps, the first among them, of least total distance, by dynamic programming.

    Every step s contributes distances[e, s], with e the last chosen step up to s.
    """
    steps = len(distances)
    # serving[e][end]: total distance of the steps from e up to end - 1, all with the tokens of step e.
    serving = [[0.0] * e + [0.0, *distances[e, e:].cumsum(0).tolist()] for e in range(steps)]
    # least[end]: (distance, chosen) of the steps before `end` with the number of chosen steps so far.
    least = {end: (serving[0][end], [0]) for end in range(1, steps + 1)}
    for _ in range(count - 1):
        least = {
            end: min((least[e][0] + serving[e][end], [*least[e][1], e]) for e in least if e < end)
            for end in range(min(least) + 1, steps + 1)
        }
    return least[steps][1]


def write_trunk_steps(file: str | os.PathLike[str], trunk_steps: Sequence[int], *, steps: int, **settings: Any) -> None:
    """Write the choice for sampling in `steps` steps as JSON; `settings` (solver, shift, ...) are recorded with it."""
    Path(file).write_text(json.dumps({"steps": steps, "trunk_steps": list(trunk_steps), **settings}, indent=1) + "\n")


def read_trunk_steps(file: str | os.PathLike[str], *, steps: int) -> list[int]:
    """Read a choice written by `write_trunk_steps`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no such choice, or one for another number of steps.
    """
    try:
        found = json.loads(Path(file).read_text())
        chosen, recorded = list(found["trunk_steps"]), int(found["steps"])
        if any(type(step) is not int for step in chosen):
            raise TypeError(f"the steps {chosen}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(file)}: expected JSON with steps and trunk_steps, as choose_trunk_steps' result is written by "
            f"write_trunk_steps, got {type(error).__name__}: {error}"
        ) from error
    if recorded != steps:
        raise ValueError(
            f"{os.fspath(file)}: expected trunk steps chosen for {steps} steps, got those for {recorded}; choose them "
            "again for this number of steps"
        )
    return chosen
