"""Puts a run together from its configuration: processes, data, model, objective, optimiser."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from deco_kernels import flow, model, ops
from deco_kernels.files import kind_at
from deco_kernels.training import checkpoints
from deco_kernels.training.batches import BatchPlan
from deco_kernels.training.config import SampleConfig, TrainConfig, to_dict
from deco_kernels.training.ema import MovingAverage
from deco_kernels.training.loading import plan_batches
from deco_kernels.training.module import TrainingModule, shard
from deco_kernels.training.sources import Source, open_source

Teacher = Callable[[torch.Tensor], torch.Tensor]
Encoder = Callable[[list[str]], torch.Tensor]
"""Captions → text features [B, S, F]; its attribute `empty_prompt` [S, F] stands for no caption."""


@dataclass
class Parts:
    """What the loop works with. `forward` and `optimizer` are Fabric's wrappers of what `progress` holds bare.

    shown: the label or prompt of every sample in a grid.
    """

    source: Source
    plan: BatchPlan
    objective: flow.Objective
    encoder: Encoder | None
    shown: list[int] | list[str]
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    progress: checkpoints.Progress


def find_checkpoint(config: TrainConfig, resume: str) -> dict[str, Any] | None:
    """The checkpoint to resume from, its model checked against the configuration's; None for a new run."""
    folder = checkpoint_folder(config)
    if resume == "never":
        if checkpoints.found(folder):
            raise ValueError(f"out: {folder} holds checkpoints already; resume with --resume auto or choose another")
        return None
    content = checkpoints.read_latest(folder) if resume == "auto" else checkpoints.read(Path(resume))
    if content is not None:
        checkpoints.check_same_model(content, to_dict(config))
    return content


def checkpoint_folder(config: TrainConfig) -> Path:
    return Path(config.out) / "checkpoints"


def launch(config: TrainConfig) -> Fabric:
    """Start, or join, the processes of the run.

    Under torchrun their number comes from its environment; under SLURM, devices and num_nodes must say what srun does.
    """
    local, world = (int(os.environ.get(name, 0)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    devices, nodes = (local, world // local) if local else (config.devices, config.num_nodes)
    if devices is None:
        cuda = config.accelerator != "cpu" and torch.cuda.is_available()
        devices = torch.cuda.device_count() if cuda else 1
    if config.strategy == "fsdp2":
        strategy = ModelParallelStrategy(shard, data_parallel_size=devices * nodes, tensor_parallel_size=1)
    elif config.strategy == "ddp" or devices * nodes > 1:
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    else:
        strategy = "auto"
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=config.precision,
    )
    fabric.launch()
    return fabric


def prepare(
    config: TrainConfig, fabric: Fabric, teacher: Teacher | None, encoder: Encoder | None, resumed: bool
) -> Parts:
    """Open the data, build model, objective and optimiser, and hand them to the strategy.

    A run that is `resumed` gets its weights from the checkpoint afterwards and needs no `init_from`.
    """
    torch.manual_seed(config.seed)
    network = model.build(config.model.name, **config.model.options)
    reads_text = isinstance(network, model.DeCoTextToImage)
    wanted = ("caption",) if reads_text else ("label", network.trunk.num_classes)
    shown = shown_conditions(config.sample, None if reads_text else network.trunk.num_classes)
    with fabric.rank_zero_first():  # the first process converts tables and shards, the others find them converted
        source = open_source(config.data, *wanted)
    sizes = None
    if config.data.buckets:  # one process reads the headers for all
        sizes = fabric.broadcast(source.sizes(config.data.workers) if fabric.is_global_zero else None)
    plan = plan_batches(config, len(source), sizes, network.trunk.patch_size, fabric.world_size)
    if reads_text and encoder is None:
        sizes = dict(max_length=network.trunk.text_length, width=network.trunk.text_width)
        encoder = model.Qwen3TextEncoder(config.text.encoder, **sizes, truncate=True).to(fabric.device)
    objective = make_objective(config, network, teacher, encoder.empty_prompt if reads_text else network.null_label)
    if config.init_from is not None and not resumed:
        initialise(network, Path(config.init_from))
    if config.compile:
        network.compile_trunk()
    module = TrainingModule(network, objective)
    forward = fabric.setup_module(module)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=config.optimizer.lr,
        betas=tuple(config.optimizer.betas),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    average = MovingAverage(network, config.ema_decay)
    progress = checkpoints.Progress(module, optimizer, average, step=0, skipped={})
    optimizer = fabric.setup_optimizers(optimizer)
    return Parts(source, plan, objective, encoder if reads_text else None, shown, forward, optimizer, progress)


def shown_conditions(config: SampleConfig, num_classes: int | None) -> list[int] | list[str]:
    """The label, or with num_classes None the prompt, of each of the `count` samples; none where `every` is 0.

    Raises ValueError where there is nothing to show, and for labels that are no classes of the model.
    """
    if not config.every:
        return []
    if config.count < 1:
        raise ValueError(f"sample.count: expected at least 1, got {config.count}; sample.every=0 draws no samples")
    name, shown = ("prompts", config.prompts) if num_classes is None else ("labels", config.labels)
    if shown is None:
        return [i * num_classes // config.count for i in range(config.count)]
    if not shown:
        raise ValueError(f"sample.{name}: expected at least one, got none; sample.every=0 draws no samples")
    wrong = [label for label in shown if num_classes is not None and not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"sample.labels: expected classes of the model, from 0 to {num_classes - 1}, got {wrong}")
    return [shown[i % len(shown)] for i in range(config.count)]


def make_objective(
    config: TrainConfig, network: nn.Module, teacher: Teacher | None, null_label: int | torch.Tensor
) -> flow.Objective:
    """The objective, with an alignment head where its weight is not 0."""
    given, repa = config.objective, None
    if config.repa.weight:
        if not 1 <= config.repa.block <= len(network.trunk.blocks):
            raise ValueError(
                f"repa.block: expected a block from 1 to {len(network.trunk.blocks)}, got {config.repa.block}"
            )
        if teacher is None:
            teacher = flow.DinoV2Teacher(config.repa.teacher, network.trunk.patch_size)
        repa = flow.Alignment(
            network.trunk.width,
            teacher,
            teacher_width=getattr(teacher, "width", 768),
            block=config.repa.block,
            weight=config.repa.weight,
        )
    return flow.Objective(
        ops.jpeg_frequency_weight(given.quality, given.mode, given.gamma),
        given.frequency_scale,
        repa,
        distribution=given.distribution,
        shift=given.shift,
        label_dropout=given.label_dropout,
        null_label=null_label,
    )


def initialise(network: nn.Module, path: Path) -> None:
    """Copy the averaged weights of a checkpoint, ours or a published one, into a model of the same kind and size."""
    if (kind := kind_at(path)) != "a file":
        raise FileNotFoundError(f"init_from: expected a checkpoint file at {path}, found {kind}; check the path")
    found = model.load_model(path)
    if type(found) is not type(network):
        raise ValueError(f"init_from: {path} holds a {type(found).__name__}, expected a {type(network).__name__}")
    try:
        network.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise ValueError(f"init_from: {path} holds a {type(network).__name__} of other sizes: {error}") from error


def warn_of_changes(content: dict[str, Any], config: TrainConfig) -> None:
    """Name the keys that differ from those the checkpoint was written with."""
    before, now = (_flat(each) for each in (content["config"], to_dict(config)))
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key] and key != "out"]
    if changed:
        warnings.warn(f"resuming with another configuration: {', '.join(changed)}", stacklevel=2)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
