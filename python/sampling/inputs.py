"""Inputs of sampling: model, conditions, solver settings and noise."""

import argparse
import csv
import hashlib
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deco_kernels import flow, model
from deco_kernels.command_line import image_size, natural, positive, thread_count
from deco_kernels.files import kind_at

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

Condition = int | str
"""A class or a prompt."""


# --- options ---------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, batch: str, count: int | None = None) -> None:
    """Adds the sampling options. Solver options default to None, for the defaults of the model.

    batch: description of the default of --batch. count: the default number of images; None for one per class, prompt
    or row.
    """
    what = parser.add_argument_group("samples (default: all classes)")
    what.add_argument("--classes", metavar="LIST", help="such as 0,7,20-29; images cycle through them")
    what.add_argument("--prompt", action="append", help="prompt for a text-to-image model (repeatable)")
    what.add_argument("--csv", type=Path, help="table with a column label or prompt, one row per image")
    default = count or "one per class, prompt or row"
    what.add_argument("--count", type=positive, default=count, help=f"number of images (default: {default})")
    what.add_argument("--seed", type=natural, default=0, help="seed; noise depends on seed and image (default: 0)")
    what.add_argument("--size", type=image_size, default=(256, 256), metavar="S|HxW", help="image size (default: 256)")
    how = parser.add_argument_group("sampling (solver defaults are those of the paper for the kind of model)")
    how.add_argument("--solver", choices=sorted(flow.SOLVERS))
    how.add_argument("--steps", type=positive, help="number of solver steps")
    how.add_argument("--guidance", type=float, help="guidance scale; 1 disables guidance")
    how.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help="interval of times with guidance"
    )
    how.add_argument("--shift", type=float, help="shift of the times")
    how.add_argument("--batch", type=positive, help=f"images computed together (default: {batch})")
    how.add_argument("--dtype", choices=sorted(DTYPES), help="default: float32 on the CPU, else bfloat16")
    how.add_argument("--device", help="PyTorch device (default: cuda if available, else cpu)")
    how.add_argument("--threads", type=thread_count, help="CPU threads; bits may depend on it")
    how.add_argument("--weights", choices=["ema", "raw"], help="weights to load (default: ema if the file has both)")
    how.add_argument(
        "--text-encoder",
        default="Qwen/Qwen3-1.7B",
        metavar="FOLDER|ID",
        help="text encoder of a text-to-image model (default: %(default)s)",
    )


def solver_settings(options: argparse.Namespace, network: nn.Module) -> dict:
    """Settings of `flow.Sampler`: the given options, and the paper's settings for the kind of model otherwise.

    Raises ValueError if `flow.Sampler` does not accept them.
    """
    defaults = flow.sampling_settings(network)
    given = {name: getattr(options, name) for name in defaults}
    settings = {name: defaults[name] if value is None else value for name, value in given.items()}
    settings["guidance_interval"] = tuple(settings["guidance_interval"])
    flow.Sampler(network, **settings)  # validates them
    return settings


def device_of(options: argparse.Namespace) -> torch.device:
    """The device to sample on; with several GPUs, that of the local rank. Also applies --threads."""
    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
        name = f"cuda:{local % torch.cuda.device_count()}"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used: {str(error).splitlines()[0]}") from None
    return probe.device


def dtype_of(options: argparse.Namespace, device: torch.device) -> str:
    return options.dtype or ("float32" if device.type == "cpu" else "bfloat16")


# --- model -----------------------------------------------------------------------------------------------------------


def load_network(path: Path, options: argparse.Namespace, device: torch.device) -> nn.Module:
    """Loads the model of a checkpoint. Raises OSError or ValueError that names the file, and ValueError for an image
    size that the model does not support."""
    network = model.load_model(path, weights=options.weights).to(device).eval().requires_grad_(False)
    patch_size = network.trunk.patch_size
    if any(side % patch_size for side in options.size):
        raise ValueError(f"--size: expected multiples of {patch_size}, the model's patch size, got {options.size}")
    return network


def sha256(path: Path) -> str:
    """Hash of the content of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def reads_text(network: nn.Module) -> bool:
    return isinstance(network, model.DeCoTextToImage)


# --- conditions ------------------------------------------------------------------------------------------------------


def read_conditions(options: argparse.Namespace, network: nn.Module) -> list[Condition]:
    """Classes or prompts to sample, by kind of model; image i uses entry i modulo their number.

    Raises ValueError for the wrong kind, unknown classes, a table without the column, or empty fields.
    """
    text = reads_text(network)
    foreign = options.classes if text else options.prompt
    if foreign is not None:
        wanted, given, use = ("prompts", "--classes", "--prompt") if text else ("classes", "--prompt", "--classes")
        raise ValueError(f"{given}: the model is conditioned on {wanted}, use {use} or --csv")
    if sum(each is not None for each in (options.classes, options.prompt, options.csv)) > 1:
        raise ValueError("--csv: expected either a table or a list, got both")
    if options.csv is not None:
        return _read_table(options.csv, "prompt" if text else "label", network)
    if text:
        if not options.prompt:
            raise ValueError("--prompt: the model is conditioned on prompts, expected --prompt or --csv")
        return [_filled(prompt, "--prompt") for prompt in options.prompt]
    count = network.trunk.num_classes
    fields = f"0-{count - 1}" if options.classes is None else options.classes
    return [label for field in fields.split(",") for label in _classes(field, count, "--classes")]


def _read_table(path: Path, column: str, network: nn.Module) -> list[Condition]:
    if (found := kind_at(path)) not in ("a file", "a FIFO"):  # a FIFO comes from the shell's <(command)
        raise ValueError(f"--csv: expected a table at {path}, found {found}; check the path")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if column not in (table.fieldnames or []):
                raise ValueError(f"--csv: expected a column {column} in {path}, found {table.fieldnames}")
            rows = [(f"--csv: line {table.line_num} of {path}", row[column]) for row in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--csv: expected commas between fields and UTF-8 in {path}, got {error}") from None
    if not rows:
        raise ValueError(f"--csv: expected rows in {path}, found none")
    if column == "prompt":
        return [_filled(text, place) for place, text in rows]
    return [_class(text or "", network.trunk.num_classes, place) for place, text in rows]


def _filled(prompt: str | None, place: str) -> str:
    if not (prompt or "").strip():
        raise ValueError(f"{place}: expected a prompt, got {prompt!r}")
    return prompt


def _class(field: str, count: int, place: str) -> int:
    if not (field.strip().isdecimal() and int(field) < count):
        raise ValueError(f"{place}: expected a class from 0 to {count - 1}, got {field!r}")
    return int(field)


def _classes(field: str, count: int, place: str) -> range:
    """The classes of "7" or "20-29"."""
    first, _, last = field.strip().partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < count):
        raise ValueError(f"{place}: expected classes from 0 to {count - 1} such as 0,7,20-29, got {field!r}")
    return range(int(first), int(last) + 1)


@dataclass
class Conditioner:
    """Converts conditions into tensors for the model.

    Attributes:
        network: the model. device: device of the tensors.
        encoder: maps prompts to features and has `empty_prompt`; None for class-conditional models.
    """

    network: nn.Module
    device: torch.device
    encoder: nn.Module | None = None

    @classmethod
    def of(cls, network: nn.Module, device: torch.device, text_encoder: str) -> "Conditioner":
        """Conditioner of a model; loads the text encoder of a text model from a folder or the hub. Raises ImportError
        without transformers, and OSError or ValueError for an encoder that cannot be used."""
        if not reads_text(network):
            return cls(network, device)
        sizes = dict(max_length=network.trunk.text_length, width=network.trunk.text_width)
        try:
            encoder = model.Qwen3TextEncoder(text_encoder, **sizes)
        except (OSError, ValueError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"--text-encoder: {str(error).removeprefix('path_or_id: ')}") from error
        return cls(network, device, encoder.to(device))

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raises ValueError for a prompt that is too long for the model."""
        if self.encoder is None:
            return
        longest = self.encoder.max_length
        for prompt, tokens in zip(conditions, self.encoder.tokenizer(list(conditions))["input_ids"], strict=True):
            if len(tokens) > longest:
                raise ValueError(
                    f"prompt {reprlib.repr(prompt)}: expected at most {longest} tokens, got {len(tokens)}; shorten it"
                )

    def __call__(self, conditions: Sequence[Condition]) -> tuple[torch.Tensor, torch.Tensor]:
        """(conditions, null conditions) [B, ...] on the device."""
        if self.encoder is None:
            labels = torch.tensor(conditions, device=self.device)
            return labels, torch.full_like(labels, self.network.null_label)
        features = self.encoder(list(conditions))
        return features, self.encoder.empty_prompt.expand_as(features)


# --- noise -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """What each image is sampled from.

    Image i has condition i modulo their number and noise i of the seed. With `per_condition`, each condition in turn
    has that many images, and the j-th of them has the first noise of seed + j.
    """

    conditions: Sequence[Condition]
    seed: int
    size: tuple[int, int]
    per_condition: int | None = None

    def condition(self, index: int) -> Condition:
        return self.conditions[index // (self.per_condition or 1) % len(self.conditions)]

    def noise(self, index: int) -> torch.Tensor:
        """See `noise_of`."""
        if self.per_condition is None:
            return noise_of(index, self.seed, self.size)
        return noise_of(0, self.seed + index % self.per_condition, self.size)


def noise_of(index: int, seed: int, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """Noise [C, H, W] of an image, float32 on the CPU; depends only on (seed, index) and the size."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.randn(channels, *size, generator=torch.Generator().manual_seed(int(state) >> 1))
