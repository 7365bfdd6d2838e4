"""Checks of a configuration before the processes start, which takes seconds: model, sizes, data, samples."""

from __future__ import annotations

import torch

from deco_kernels import model
from deco_kernels.model.presets import Model
from deco_kernels.training import paths, setup
from deco_kernels.training.config import RepaConfig, SampleConfig, TrainConfig
from deco_kernels.training.loading import check_batches
from deco_kernels.training.sources import check_source


def check(config: TrainConfig, pretrained: bool = True) -> None:
    """Check what the paths (`paths.check`) do not show: names, sizes, and data for the model. Loads nothing.

    Args:
        pretrained: whether the configured encoder is used.

    Raises:
        ValueError, TypeError, OSError: an invalid value; the message names its key.
    """
    with torch.device("meta"):
        network = model.build(config.model.name, **config.model.options)
    devices, nodes = setup.processes(config)
    check_batches(config, network.trunk.patch_size, devices * nodes)
    _check_alignment(config.repa, network)
    setup.make_objective(config.objective, null_label=0)
    target, num_classes = setup.wanted(network)
    _check_samples(config.sample, num_classes)
    check_source(config.data, target, num_classes)
    if pretrained and target == "caption":
        paths.check_pretrained("text.encoder", config.text.encoder)


def _check_alignment(config: RepaConfig, network: Model) -> None:
    blocks = len(network.trunk.blocks)
    if config.weight and not 1 <= config.block <= blocks:
        raise ValueError(f"repa.block: expected a block from 1 to {blocks}, got {config.block}; choose one of them")


def _check_samples(config: SampleConfig, num_classes: int | None) -> None:
    """Check the settings of the samples, which the run would otherwise use only at its first samples."""
    if setup.shown_conditions(config, num_classes):
        try:
            setup.make_sampler(config, velocity=lambda x, t, cond: x)
        except (TypeError, ValueError) as error:
            raise type(error)(f"sample.{error}") from None
