"""Golden tensors of this repository and of the folder named by DECO_GOLDEN."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from deco_kernels import testing

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


class Golden(NamedTuple):
    """One file: its tensors, and the strings of its metadata."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`/, without it."""
        return {k.removeprefix(prefix + "/"): v for k, v in self.tensors.items() if k.startswith(prefix + "/")}


def golden_cases(pattern: str) -> list:
    """One pytest parameter (a path) for every golden file whose name matches the glob pattern."""
    folders = [Path(__file__).parent / "golden", *filter(None, [os.environ.get("DECO_GOLDEN")])]
    paths = [path for folder in folders for path in sorted(Path(folder).glob(f"{pattern}.safetensors"))]
    if not paths:
        raise FileNotFoundError(f"no golden file {pattern}.safetensors in {', '.join(map(str, folders))}")
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in paths]


def load_golden(path: Path) -> Golden:
    """Reads one golden file."""
    from safetensors import safe_open  # GPU tests import this module without safetensors

    with safe_open(path, framework="pt") as file:
        return Golden({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """As `testing.relative_error`, of tensors with or without gradients."""
    return testing.relative_error(actual.detach(), expected.detach())
