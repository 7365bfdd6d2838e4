"""Options of sample.py for the steps at which the trunk runs, and their calibration."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from deco_kernels import flow
from deco_kernels.command_line import positive
from deco_kernels.files import kind_at
from sampling.inputs import Condition, Conditioner, noise_of

IMAGES = 8  # of the calibration batch


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trunk at some steps only, an approximation (docs/sampling.md)")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--trunk-steps",
        metavar="K|LIST|FILE",
        help="K steps spread evenly, a list such as 0,5,20, or a file of --calibrate-trunk-steps (default: every step)",
    )
    one.add_argument(
        "--calibrate-trunk-steps",
        type=positive,
        metavar="K",
        help="choose K steps by a calibration batch, sample with them, and write them to OUT/trunk_steps.json",
    )


def given(text: str | None, steps: int) -> flow.TrunkSteps | None:
    """The value of --trunk-steps: a number, a list, or the list in a file; None for every step.

    Raises ValueError or OSError for a file that is not one of calibrated steps for this number of steps.
    """
    if text is None:
        return None
    fields = text.split(",")
    if all(field.strip().isdecimal() for field in fields):
        numbers = [int(field) for field in fields]
        return numbers if len(numbers) > 1 else numbers[0]
    if (found := kind_at(Path(text))) not in ("a file", "a FIFO"):
        raise ValueError(
            f"--trunk-steps: expected a number of steps, a list such as 0,5,20 or a file, got {text!r} and found "
            f"{found} there"
        )
    return flow.read_trunk_steps(text, steps=steps)


def calibrated(
    conditioner: Conditioner, conditions: Sequence[Condition], seed: int, size: tuple[int, int], count: int, **settings
) -> list[int]:
    """The `count` steps chosen by `flow.choose_trunk_steps` with these settings, from IMAGES conditions that are spread
    evenly over the given ones, and the first noises of the seed at a size (height, width).

    Raises as `flow.choose_trunk_steps`.
    """
    cond, uncond = conditioner([conditions[index * len(conditions) // IMAGES] for index in range(IMAGES)])
    batch = torch.stack([noise_of(index, seed, size) for index in range(IMAGES)]).to(conditioner.device)
    return flow.choose_trunk_steps(conditioner.network, batch, cond, uncond, trunk_steps=count, **settings)
