"""Prompts and folders of the text-to-image benchmarks GenEval and DPG-Bench, for sample.py --layout.

    geneval   OUT/00000/metadata.jsonl       line 0 of evaluation_metadata.jsonl
              OUT/00000/samples/00000.png    its sample 0, and so on
    dpg       OUT/dpg/NAME.png               2x2 grid of the samples of the prompt in NAME.txt

Source: GenEval (arXiv 2310.11513), evaluation/evaluate_images.py; DPG-Bench (ELLA, arXiv 2403.05135),
dpg_bench/compute_dpg_bench.py.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from deco_kernels.command_line import positive
from deco_kernels.files import kind_at
from deco_kernels.training.images import as_grid
from sampling.folder import SampleFolder, write_once
from sampling.inputs import reads_text

GENEVAL, DPG = "geneval", "dpg"
PER_PROMPT = 4  # of both benchmarks; the most that a grid of DPG-Bench holds


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text-to-image benchmarks (docs/sampling.md)")
    group.add_argument("--layout", choices=[GENEVAL, DPG], help="write the folders that this benchmark reads")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE|FOLDER",
        help="evaluation_metadata.jsonl of geneval; the .txt files of dpg",
    )
    group.add_argument("--per-prompt", type=positive, metavar="N", help=f"samples per prompt (default: {PER_PROMPT})")


@dataclass(frozen=True)
class Benchmark:
    """layout: GENEVAL or DPG. records: line of metadata of each prompt, or for DPG its name. per_prompt: samples."""

    layout: str
    prompts: list[str]
    records: list[str]
    per_prompt: int

    @property
    def count(self) -> int:
        return len(self.prompts) * self.per_prompt

    def folder(self, *arguments: Any) -> SampleFolder:
        """The folder of the layout; arguments and errors as in `SampleFolder`."""
        return (GenEvalFolder if self.layout == GENEVAL else DpgFolder)(self, *arguments)


def settings_of(benchmark: Benchmark | None) -> dict[str, Any]:
    """The settings for run.json beyond the prompts."""
    return {name: getattr(benchmark, name, None) for name in ("layout", "records", "per_prompt")}


def read_benchmark(options: argparse.Namespace, network: nn.Module) -> Benchmark | None:
    """The prompts of --layout; None without it.

    Raises ValueError for options that do not go together, a model that does not read text, or wrong prompts.
    """
    if options.layout is None:
        for name in ("prompts", "per_prompt"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: belongs to --layout; add --layout {GENEVAL} or {DPG}")
        return None
    for name in ("prompt", "csv", "classes", "count"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: --layout takes all prompts of --prompts; leave it out")
    if not reads_text(network):
        raise ValueError(
            f"--layout: expected a text-to-image model, got {type(network).__name__}, which is conditioned on classes"
        )
    if options.prompts is None:
        raise ValueError("--layout: expected --prompts with the benchmark's file or folder, got none")
    per_prompt = options.per_prompt or PER_PROMPT
    if options.layout == GENEVAL:
        return Benchmark(GENEVAL, *read_geneval(options.prompts), per_prompt)
    if per_prompt > PER_PROMPT:
        raise ValueError(f"--per-prompt: a grid of {DPG} holds at most {PER_PROMPT} samples, got {per_prompt}")
    if options.size[0] != options.size[1]:
        raise ValueError(f"--size: {DPG} reads square samples, got {options.size[0]}x{options.size[1]}")
    return Benchmark(DPG, *read_dpg(options.prompts), per_prompt)


def read_geneval(path: Path) -> tuple[list[str], list[str]]:
    """(prompts, lines) of a file whose lines are JSON objects with the key prompt."""
    if (found := kind_at(path)) != "a file":
        raise ValueError(f"--prompts: expected a file such as evaluation_metadata.jsonl at {path}, found {found}")
    lines = _text(path).rstrip().split("\n")
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            prompts.append(_filled(record["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"--prompts: line {number} of {path}: expected a JSON object with a prompt, got {line[:80]!r}"
            ) from None
    return prompts, [line.strip() for line in lines]


def read_dpg(folder: Path) -> tuple[list[str], list[str]]:
    """(prompts, names) of the files NAME.txt in a folder, by name."""
    if (found := kind_at(folder)) != "a folder":
        raise ValueError(f"--prompts: expected a folder of .txt files at {folder}, found {found}")
    paths = sorted(path for path in folder.glob("*.txt") if kind_at(path) == "a file")
    if not paths:
        raise ValueError(f"--prompts: expected .txt files in {folder}, found none")
    prompts = []
    for path in paths:
        try:
            prompts.append(_filled(_text(path)))
        except TypeError:
            raise ValueError(f"--prompts: expected a prompt in {path}, found none") from None
    return prompts, [path.stem for path in paths]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--prompts: expected UTF-8 in {path}; convert it") from None


def _filled(prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise TypeError("no prompt")
    return prompt.strip()


class GenEvalFolder(SampleFolder):
    """A `SampleFolder` with one folder per prompt, in which images have their place and metadata.jsonl its line."""

    IMAGES = "."

    def __init__(self, benchmark: Benchmark, *arguments: Any):
        self.per_prompt = benchmark.per_prompt
        super().__init__(*arguments)
        for number, line in enumerate(benchmark.records):
            self.image(number * self.per_prompt).parent.mkdir(parents=True, exist_ok=True)
            metadata = f"{line}\n".encode()
            write_once(self._of_prompt(number) / "metadata.jsonl", lambda path, text=metadata: path.write_bytes(text))

    def _of_prompt(self, number: int) -> Path:
        return self.images / f"{number:05d}"

    def image(self, index: int) -> Path:
        number, sample = divmod(index, self.per_prompt)
        return self._of_prompt(number) / "samples" / f"{sample:05d}.png"


class DpgFolder(SampleFolder):
    """A `SampleFolder` that also assembles the grid of each prompt."""

    def __init__(self, benchmark: Benchmark, *arguments: Any):
        super().__init__(*arguments)
        self.names, self.per_prompt = benchmark.records, benchmark.per_prompt

    def assemble(self, grid: int, npz: bool) -> list[Path]:
        made, folder = super().assemble(grid, npz), self.folder / DPG
        folder.mkdir(exist_ok=True)
        for number, name in enumerate(self.names):
            indices = range(number * self.per_prompt, (number + 1) * self.per_prompt)
            write_once(folder / f"{name}.png", lambda path, indices=indices: self._grid(indices).save(path, "PNG"))
        return [*made, folder]

    def _grid(self, indices: range) -> Image.Image:
        return Image.fromarray(as_grid(np.stack([self.read(index) for index in indices])))
