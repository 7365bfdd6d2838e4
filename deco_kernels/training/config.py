"""The configuration of a training run: typed defaults, overridden by a YAML file, overridden by `key=value` arguments.

Source of the published values: DeCo (arXiv 2511.19365), section 4.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deco_kernels.files import kind_at

STRATEGIES = ("auto", "ddp", "fsdp2")
DATA_KINDS = ("folder", "table", "webdataset")
LEAST = {
    **dict.fromkeys(("image_size", "batch_size", "accumulate", "steps", "devices", "num_nodes"), 1),
    **dict.fromkeys(("log_every", "save_every", "keep"), 1),
    **dict.fromkeys(("data.max_aspect", "data.prefetch"), 1),
    **dict.fromkeys(("seed", "data.min_side", "data.workers", "objective.frequency_scale", "repa.weight"), 0),
    **dict.fromkeys(("optimizer.lr", "optimizer.weight_decay", "optimizer.warmup_steps", "optimizer.clip_norm"), 0),
    "sample.every": 0,
}
"""Minimum of each key. Values must be finite; null is allowed if it is the default."""


@dataclass
class ModelConfig:
    """`model.build(name, **options)`."""

    name: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Source of the images and requirements on them.

    kind: "folder" (one folder per class), "table" (CSV or parquet) or "webdataset" (tar shards).
    path: the folder, tables or shards; tables and shards may be given by wildcards.
    image_column, label_column, caption_column: columns of tables and shards; without image_column, the first column of
        images. Class models use the label, text models the caption.
    buckets: group images by aspect ratio into rectangles of about image_size² pixels instead of cropping squares.
    max_aspect: maximum aspect ratio of the rectangles, longer side over shorter.
    min_side: images with a side shorter than this many pixels are skipped; other small images are enlarged.
    workers: loader processes per training process.
    prefetch: batches that each loader process prefetches.
    cache_dir: cache of `datasets` for converted tables and shards; its default if null.
    """

    kind: str = "folder"
    path: str = MISSING
    image_column: str | None = None
    label_column: str = "label"
    caption_column: str = "caption"
    buckets: bool = False
    max_aspect: float = 2.0
    min_side: int = 32
    workers: int = 8
    prefetch: int = 4
    cache_dir: str | None = None


@dataclass
class ObjectiveConfig:
    """Training times, label dropout, and the frequency loss with its JPEG table (quality, mode, gamma).

    fused: compute decoder and loss as one op; null where the model can, see `flow.Objective`.
    """

    distribution: str = "lognormal"
    shift: float = 1.0
    label_dropout: float = 0.1
    frequency_scale: float = 1.0
    quality: int = 85
    mode: str = "inv_gamma"
    gamma: float = 1.0
    fused: bool | None = None


@dataclass
class RepaConfig:
    """Alignment with the patch features of a frozen teacher; weight 0 disables it."""

    weight: float = 0.5
    block: int = 8
    teacher: str = "facebook/dinov2-base"


@dataclass
class TextConfig:
    """The frozen caption encoder of text-to-image models."""

    encoder: str = "Qwen/Qwen3-1.7B"


@dataclass
class OptimizerConfig:
    """AdamW. The learning rate warms up linearly over `warmup_steps`; clip_norm bounds the global gradient norm."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip_norm: float | None = None


@dataclass
class SampleConfig:
    """Grids of samples from the EMA weights, `count` samples every `every` steps; 0 disables them.

    labels: classes, repeated in turn; null spreads `count` evenly over the model's classes.
    prompts: captions of text models, repeated in turn.
    """

    every: int = 10_000
    count: int = 16
    steps: int = 50
    guidance: float = 3.2
    guidance_interval: list[float] = field(default_factory=lambda: [0.1, 1.0])
    shift: float = 1.0
    solver: str = "euler"
    labels: list[int] | None = None
    prompts: list[str] = field(default_factory=lambda: ["a photograph of a mountain lake at dawn"])


@dataclass
class TrainConfig:
    """Configuration of a run.

    batch_size: images per step, over all processes and accumulation parts.
    accumulate: gradient accumulation parts per step.
    precision: precision of Fabric, "bf16-mixed" or "32-true".
    compile: compile the trunk with torch.compile.
    strategy: "auto" (DDP for several processes), "ddp" or "fsdp2".
    accelerator, devices, num_nodes: arguments of Fabric.
    backend: backend of the fused ops, see `deco_kernels.use_backend`.
    init_from: checkpoint whose EMA weights initialize a new run, for example that of the previous stage.
    save_every: steps between checkpoints.
    keep: number of checkpoints kept, the newest.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    repa: RepaConfig = field(default_factory=RepaConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    out: str = MISSING
    image_size: int = 256
    batch_size: int = 256
    accumulate: int = 1
    steps: int = 200_000
    seed: int = 0
    ema_decay: float = 0.9999
    precision: str = "bf16-mixed"
    compile: bool = False
    strategy: str = "auto"
    accelerator: str = "auto"
    devices: int | None = None
    num_nodes: int = 1
    backend: str | None = None
    init_from: str | None = None
    log_every: int = 50
    save_every: int = 5_000
    keep: int = 2


def load(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a YAML file and apply `key=value` overrides (nested keys with dots, values in YAML).

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key (the message names the closest known one), a value of the wrong type or out of range,
            or a required key without a value.
    """
    if (found := kind_at(path)) != "a file":
        raise FileNotFoundError(f"configuration: expected a YAML file, found {found} at {path}; check the path")
    try:
        parts = [(str(path), "a key", OmegaConf.load(path))]
    except Exception as error:  # YAML errors have several unrelated types
        raise ValueError(f"{path}: not valid YAML: {error}; correct the file") from error
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise ValueError(f"override: expected key=value, got {override!r}; write it as KEY=VALUE")
        try:
            parts.append(("command line", key, OmegaConf.from_dotlist([override])))
        except Exception as error:
            raise ValueError(
                f"override: the value of {override!r} is not valid YAML; quote it, as in 'data.path=\"*.csv\"'"
            ) from error
    config = OmegaConf.structured(TrainConfig)
    for source, key, part in parts:
        if not isinstance(part, DictConfig):
            raise ValueError(
                f"{source}: expected a mapping of keys to values, got a list or a single value; write lines KEY: VALUE"
            )
        _refuse_unknown(OmegaConf.to_container(part), TrainConfig, source)
        try:
            config = OmegaConf.merge(config, part)
        except (OmegaConfBaseException, TypeError) as error:
            key = getattr(error, "full_key", None) or key
            raise ValueError(f"{source}: {key}: {str(error).splitlines()[0]}") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"configuration: no value for {', '.join(missing)}; add it to {path} or as KEY=VALUE")
    result = OmegaConf.to_object(config)
    _check(result)
    return result


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _refuse_unknown(given: dict[Any, Any], schema: type, source: str, prefix: str = "") -> None:
    known = {each.name: each.default_factory for each in fields(schema)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(prefix + k for k in known)}"
            raise ValueError(f"{source}: unknown key {prefix}{key}; {hint}")
        below = known[key]
        if isinstance(below, type) and is_dataclass(below):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{source}: {prefix}{key}: expected keys below it, got {value!r}; set those, such as "
                    f"{prefix}{key}.{fields(below)[0].name}"
                )
            _refuse_unknown(value, below, source, f"{prefix}{key}.")


def _check(config: TrainConfig) -> None:
    """Raise ValueError for values out of range."""
    for name, least in LEAST.items():
        value: Any = functools.reduce(getattr, name.split("."), config)
        if value is not None and not least <= value < math.inf:
            kind = "a finite number of at least" if isinstance(value, float) else "at least"
            raise ValueError(f"{name}: expected {kind} {least}, got {value}; choose such a number")
    for name, path in (("out", config.out), ("data.path", config.data.path)):
        if not path:
            raise ValueError(f"{name}: expected a path, got {path!r}; give one")
    if config.seed >= 2**63:
        raise ValueError(f"seed: expected less than 2**63, got {config.seed}; choose a smaller one")
    for name, value, choices in (
        ("strategy", config.strategy, STRATEGIES),
        ("data.kind", config.data.kind, DATA_KINDS),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}; choose one of them")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(
            f"ema_decay: expected a number from 0 to below 1, got {config.ema_decay}; choose one in this range"
        )
    if not 0 <= config.objective.label_dropout <= 1:
        raise ValueError(
            f"objective.label_dropout: expected a number from 0 to 1, got {config.objective.label_dropout}; "
            "choose one in this range"
        )
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"optimizer.betas: expected two numbers from 0 to below 1, got {betas}; give two in this range"
        )
