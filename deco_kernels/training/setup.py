"""Builds a run from its configuration: processes, data, model, objective, optimizer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import nn

from deco_kernels import flow, model, ops
from deco_kernels.flow.cuda_graphs import Velocity
from deco_kernels.model.presets import Model
from deco_kernels.model.text_to_image import DeCoTextToImage
from deco_kernels.training import checkpoints
from deco_kernels.training.batches import BatchPlan
from deco_kernels.training.config import ObjectiveConfig, RepaConfig, SampleConfig, TrainConfig, to_dict
from deco_kernels.training.ema import MovingAverage
from deco_kernels.training.loading import plan_batches
from deco_kernels.training.module import TrainingModule, shard
from deco_kernels.training.paths import checkpoint_folder
from deco_kernels.training.sources import Source, open_source

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Shown = TypeVar("Shown")
Teacher = Callable[[torch.Tensor], torch.Tensor]


class Encoder(Protocol):
    """Captions → text features [B, S, F]; its attribute `empty_prompt` [S, F] holds those of the null condition."""

    @property
    def empty_prompt(self) -> torch.Tensor: ...

    def __call__(self, captions: list[str], /) -> torch.Tensor: ...


@dataclass
class Parts:
    """Objects of the training loop. `forward` and `optimizer` are Fabric's wrappers of those in `progress`.

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
    """The checkpoint to resume from, or None for a new run. Raises CheckpointError if its model is another."""
    if resume == "never":
        return None
    folder = checkpoint_folder(config)
    content = checkpoints.read_latest(folder) if resume == "auto" else checkpoints.read(Path(resume))
    if content is not None:
        checkpoints.check_same_model(content, to_dict(config))
    return content


def processes(config: TrainConfig) -> tuple[int, int]:
    """(processes on this machine, machines).

    torchrun sets them in the environment. Under SLURM, devices and num_nodes must match srun.
    """
    local, world = (int(os.environ.get(name, 0)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if local:
        return local, world // local
    if config.devices is not None:
        return config.devices, config.num_nodes
    cuda = config.accelerator != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if cuda else 1, config.num_nodes


def launch(config: TrainConfig) -> Fabric:
    """Start or join the processes of the run. Raises ValueError if Fabric refuses the settings."""
    from lightning_fabric import Fabric  # takes seconds: imported after the checks
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    devices, nodes = processes(config)
    if config.strategy == "fsdp2":
        strategy = ModelParallelStrategy(shard, data_parallel_size=devices * nodes, tensor_parallel_size=1)
    elif config.strategy == "ddp" or devices * nodes > 1:
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    else:
        strategy = "auto"
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=config.precision,
        )
    except Exception as error:  # Fabric raises many unrelated types
        given = f"{config.accelerator}, {devices}, {config.precision}"
        raise ValueError(f"accelerator, devices, precision: {given} cannot be used: {error}") from error
    fabric.launch()
    return fabric


def prepare(
    config: TrainConfig, fabric: Fabric, teacher: Teacher | None, encoder: Encoder | None, resumed: bool
) -> Parts:
    """Open the data, build model, objective and optimizer, and wrap them by the strategy.

    With `resumed`, `init_from` is not read: the weights come from the checkpoint.
    """
    torch.manual_seed(config.seed)
    network = model.build(config.model.name, **config.model.options)
    target, num_classes = wanted(network)
    shown = shown_conditions(config.sample, num_classes)
    with fabric.rank_zero_first():  # the first process converts tables and shards for all
        source = open_source(config.data, target, num_classes)
    sizes = None
    if config.data.buckets:  # one process reads the headers for all
        sizes = fabric.broadcast(source.sizes(config.data.workers) if fabric.is_global_zero else None)
    plan = plan_batches(config, len(source), sizes, network.trunk.patch_size, fabric.world_size)
    null_label: int | torch.Tensor
    if isinstance(network, DeCoTextToImage):
        if encoder is None:
            length, width = network.trunk.text_length, network.trunk.text_width
            encoder = model.Qwen3TextEncoder(config.text.encoder, max_length=length, width=width, truncate=True)
            encoder = encoder.to(fabric.device)
        null_label = encoder.empty_prompt
    else:
        encoder, null_label = None, network.null_label
    alignment = make_alignment(config.repa, network, teacher)
    objective = make_objective(config.objective, null_label, alignment)
    if config.init_from is not None and not resumed:
        initialize(network, Path(config.init_from))
    if config.compile:
        network.compile_trunk()
    module = TrainingModule(network, objective)
    forward = fabric.setup_module(module)
    beta1, beta2 = config.optimizer.betas
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=config.optimizer.lr,
        betas=(beta1, beta2),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    average = MovingAverage(network, config.ema_decay)
    progress = checkpoints.Progress(module, optimizer, average, step=0, skipped={})
    optimizer = fabric.setup_optimizers(optimizer)
    return Parts(source, plan, objective, encoder, shown, forward, optimizer, progress)


def wanted(network: Model) -> tuple[str, int | None]:
    """Condition of the model: ("label", number of classes) or ("caption", None)."""
    return ("caption", None) if isinstance(network, DeCoTextToImage) else ("label", network.trunk.num_classes)


def shown_conditions(config: SampleConfig, num_classes: int | None) -> list[int] | list[str]:
    """The label, or the prompt if num_classes is None, of each of the `count` samples; empty if `every` is 0.

    Raises ValueError if there is nothing to show, or for labels that are not classes of the model.
    """
    if not config.every:
        return []
    if config.count < 1:
        raise ValueError(f"sample.count: expected at least 1, got {config.count}; sample.every=0 draws no samples")
    if num_classes is None:
        return _cycled("prompts", config.prompts, config.count)
    if config.labels is None:
        return [i * num_classes // config.count for i in range(config.count)]
    wrong = [label for label in config.labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(
            f"sample.labels: expected classes of the model, from 0 to {num_classes - 1}, got {wrong}; "
            "choose among these"
        )
    return _cycled("labels", config.labels, config.count)


def _cycled(name: str, shown: list[Shown], count: int) -> list[Shown]:
    if not shown:
        raise ValueError(f"sample.{name}: expected at least one, got none; sample.every=0 draws no samples")
    return [shown[i % len(shown)] for i in range(count)]


def make_sampler(config: SampleConfig, velocity: Velocity) -> flow.Sampler:
    """Sampler of the sample grids. Raises ValueError or TypeError for invalid settings."""
    return flow.Sampler(
        velocity,
        solver=config.solver,
        steps=config.steps,
        guidance=config.guidance,
        guidance_interval=cast("tuple[float, float]", tuple(config.guidance_interval)),
        shift=config.shift,
        cuda_graph=False,
    )


def make_alignment(config: RepaConfig, network: Model, teacher: Teacher | None) -> flow.Alignment | None:
    """The alignment loss with its head; None if its weight is 0."""
    if not config.weight:
        return None
    if teacher is None:
        teacher = flow.DinoV2Teacher(config.teacher, network.trunk.patch_size)
    return flow.Alignment(
        network.trunk.width,
        teacher,
        teacher_width=getattr(teacher, "width", 768),
        block=config.block,
        weight=config.weight,
    )


def make_objective(
    config: ObjectiveConfig, null_label: int | torch.Tensor, alignment: flow.Alignment | None = None
) -> flow.Objective:
    """The objective. Raises ValueError for invalid settings of the frequency table or the times."""
    return flow.Objective(
        ops.jpeg_frequency_weight(config.quality, config.mode, config.gamma),
        config.frequency_scale,
        alignment,
        distribution=config.distribution,
        shift=config.shift,
        label_dropout=config.label_dropout,
        null_label=null_label,
        fused=config.fused,
    )


def initialize(network: nn.Module, path: Path) -> None:
    """Copy the EMA weights of a checkpoint of this package or a published one into a model of the same class and sizes.

    Raises ValueError for another class or other sizes.
    """
    found = model.load_model(path)
    if type(found) is not type(network):
        raise ValueError(
            f"init_from: {path} holds a {type(found).__name__}, expected a {type(network).__name__}; "
            "give a checkpoint of this class, or leave init_from out"
        )
    try:
        network.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"init_from: {path} holds a {type(network).__name__} of other sizes: {error}; "
            "give a checkpoint of the same sizes, or change those in the configuration"
        ) from error


def warn_of_changes(content: dict[str, Any], config: TrainConfig) -> None:
    """Warn of the keys whose values differ from those in the checkpoint."""
    before, now = (_flat(each) for each in (content["config"], to_dict(config)))
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key] and key != "out"]
    if changed:
        warnings.warn(f"resuming with another configuration: {', '.join(changed)}", stacklevel=2)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
