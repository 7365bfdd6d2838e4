"""Checkpoints of a training run, written atomically: a killed process or a full disk leaves the previous one intact.

A file holds "state_dict" (denoiser.*, ema_denoiser.*, diffusion_trainer.proj.0.*, the published names, so that
`model.from_published` reads it), "optimizer" (by parameter name), "step", "config" and "skipped" (images already
reported). Its tensors are unsharded, so any number of processes and either strategy can resume from it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from deco_kernels import model as models
from deco_kernels.files import kind_at
from deco_kernels.model.checkpoint_file import complete_or_absent
from deco_kernels.model.presets import Model
from deco_kernels.training.ema import MovingAverage
from deco_kernels.training.module import TrainingModule
from deco_kernels.training.paths import checkpoints_in

RAW, AVERAGED, ALIGNMENT = "denoiser.", "ema_denoiser.", "diffusion_trainer.proj.0."
_PROJECTOR = "objective.repa.projector."


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read, or does not match the configuration."""


@dataclass
class Progress:
    """State of a run between two steps."""

    module: TrainingModule
    optimizer: torch.optim.Optimizer
    average: MovingAverage
    step: int
    skipped: dict[str, str]


def write_atomically(content: Mapping[str, Any], path: Path, resume: str = "--resume auto") -> None:
    """torch.save to `path`, which afterward holds either its previous content or all of the new content.

    Raises CheckpointError with the free disk space and `resume`, the option that resumes the run.
    """
    try:
        with complete_or_absent(path, overwrite=True) as temporary:
            torch.save(content, temporary)
        folder = os.open(path.resolve().parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the new name durable
        finally:
            os.close(folder)
    except OSError as error:
        place = next(each for each in path.parents if each.exists())
        raise CheckpointError(
            f"{error}; {shutil.disk_usage(place).free / 2**30:.2f} GiB are free in {place}. Earlier checkpoints are "
            f"kept: free disk space and start again with {resume}"
        ) from error


def save(progress: Progress, config: dict[str, Any], folder: Path, keep: int, writer: bool) -> None:
    """Write the checkpoint of the current step and remove all but the newest `keep`.

    Collective: every process must call it; only the process with `writer` writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(progress.module, options=options)
    optimizer = get_optimizer_state_dict(progress.module, progress.optimizer, options=options)
    averages = {name: whole(average) for name, average in progress.average.averages.items()}
    if not writer:
        return
    raw = {
        name.removeprefix("model."): value
        for name, value in state.items()
        if name.startswith("model.") and isinstance(value, torch.Tensor)
    }
    content = {
        "state_dict": {
            **_published(progress.module.model, raw, RAW),
            **_published(progress.module.model, averages, AVERAGED),
            **{name.replace(_PROJECTOR, ALIGNMENT): v for name, v in state.items() if name.startswith(_PROJECTOR)},
        },
        "optimizer": optimizer,
        "step": progress.step,
        "config": config,
        "skipped": progress.skipped,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*.part"):  # left by killed processes
        leftover.unlink()
    write_atomically(content, folder / f"step_{progress.step:09d}.ckpt")
    for old in checkpoints_in(folder)[keep:]:
        old.unlink()


def read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, with memory-mapped tensors. Raises CheckpointError if it cannot be read."""
    if (kind := kind_at(path)) != "a file":
        raise CheckpointError(f"{path} cannot be read as a checkpoint: expected a file, found {kind}; check the path")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises many unrelated types for damaged files
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {error}; give another checkpoint, or copy it again"
        ) from error
    missing = {"state_dict", "optimizer", "step", "config", "skipped"} - set(
        content if isinstance(content, dict) else ()
    )
    if missing:
        raise CheckpointError(
            f"{path} is not a checkpoint of a training run: it has no {sorted(missing)}; "
            "give one that python/train.py wrote"
        )
    return content


def read_latest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint in a folder, or None if the folder has no checkpoints.

    Warns of each unreadable one. Raises CheckpointError if all are unreadable.
    """
    paths = checkpoints_in(folder)
    for path in paths:
        try:
            return read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}. Trying the previous one", stacklevel=2)
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be read; "
            "copy them again, or start a new run with out=FOLDER"
        )
    return None


def check_same_model(content: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless checkpoint and configuration have the same model and alignment head."""
    for key in ("model", "repa"):
        described = (each[key] for each in (content["config"], config))
        theirs, ours = (bool(each["weight"]) if key == "repa" else dict(each) for each in described)
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint of step {content['step']} was written with {key} {theirs}, the configuration has "
                f"{ours}; resume with the same one, or start a new run with out=FOLDER"
            )


def restore(content: Mapping[str, Any], progress: Progress) -> None:
    """Load a checkpoint's content into a run with the same model. Collective.

    Raises CheckpointError if names or shapes do not match, for example of a head for another teacher.
    """
    module, state = progress.module, content["state_dict"]
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    try:
        weights: dict[str, Any] = {f"model.{name}": v for name, v in _ours(module.model, state, RAW).items()}
        weights |= {name.replace(ALIGNMENT, _PROJECTOR): v for name, v in state.items() if name.startswith(ALIGNMENT)}
        set_model_state_dict(module, weights, options=options)
        set_optimizer_state_dict(module, progress.optimizer, content["optimizer"], options=options)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint of step {content['step']} does not fit the run: {error}; "
            "resume with the configuration of its run"
        ) from error
    for name, value in _ours(module.model, state, AVERAGED).items():
        average = progress.average.averages[name]
        if isinstance(average, DTensor):
            value = distribute_tensor(value.to(average.device), average.device_mesh, average.placements)
        average.copy_(value)
    progress.step, progress.skipped = content["step"], dict(content["skipped"])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor on the CPU. Collective if the tensor is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _skeleton(model: Model, parameters: Mapping[str, torch.Tensor] | None = None) -> Model:
    """A model of the same configuration with the given unsharded parameters, or with uninitialized ones."""
    with torch.device("meta"):
        skeleton = type(model)(**model.config)
    if parameters is None:
        return skeleton.to_empty(device="cpu")
    skeleton.load_state_dict(parameters, assign=True)
    return skeleton


def _published(model: Model, parameters: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Unsharded parameters, renamed to their published names."""
    return models.to_published(_skeleton(model, parameters), prefix)


def _ours(model: Model, state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors with published names, as unsharded parameters of the model."""
    skeleton = _skeleton(model)
    for name, place in models.to_published(skeleton, prefix).items():
        place.copy_(state[name])
    return skeleton.state_dict()
