"""What is checked of a run before its processes start, which takes seconds: model, sizes, data, samples, checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from deco_kernels import model
from deco_kernels.files import kind_at
from deco_kernels.training import setup
from deco_kernels.training.config import RepaConfig, SampleConfig, TrainConfig
from deco_kernels.training.loading import check_batches
from deco_kernels.training.sources import check_source


def check(config: TrainConfig, resumed: bool = False) -> None:
    """Refuse what no run can be set up with, as far as names, sizes and paths show it. Nothing is loaded.

    A run that is `resumed` needs no `init_from`.

    Raises:
        ValueError, TypeError, OSError: the message names the key.
    """
    if (found := kind_at(config.out)) not in ("nothing", "a folder"):
        raise ValueError(f"out: expected a folder, found {found} at {config.out}; choose another name")
    check_source(config.data)
    with torch.device("meta"):  # whose random numbers import a part of PyTorch: after the paths
        network = model.build(config.model.name, **config.model.options)
    devices, nodes = setup.processes(config)
    check_batches(config, network.trunk.patch_size, devices * nodes)
    _check_alignment(config.repa, network)
    setup.make_objective(config.objective, null_label=0)
    target, num_classes = setup.wanted(network)
    _check_samples(config.sample, num_classes)
    check_source(config.data, target, num_classes)
    if config.init_from is not None and not resumed and (found := kind_at(config.init_from)) != "a file":
        raise FileNotFoundError(
            f"init_from: expected a checkpoint file at {config.init_from}, found {found}; check the path"
        )


def _check_alignment(config: RepaConfig, network: nn.Module) -> None:
    blocks = len(network.trunk.blocks)
    if config.weight and not 1 <= config.block <= blocks:
        raise ValueError(f"repa.block: expected a block from 1 to {blocks}, got {config.block}")


def _check_samples(config: SampleConfig, num_classes: int | None) -> None:
    """Also what would stop the run at the step of its first samples."""
    if setup.shown_conditions(config, num_classes):
        try:
            setup.make_sampler(config, velocity=torch.zeros_like)
        except (TypeError, ValueError) as error:
            raise type(error)(f"sample.{error}") from None
