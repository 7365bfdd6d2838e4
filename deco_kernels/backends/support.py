"""Dtypes and sizes that a backend supports, the source of its refusals and of the README's table of backends."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

STORAGE = (torch.float32, torch.bfloat16, torch.float16)


class Request(NamedTuple):
    """Properties of a call that determine whether a backend can run it."""

    op: str
    device_type: str
    dtypes: tuple[torch.dtype, ...]  # of the activation (pred), then of the image (target) if any
    width: int | None = None  # D; None here and below if the op has no such size
    depth: int | None = None  # N
    patch_size: int | None = None  # p
    channels: int | None = None  # C
    pixels: int | None = None  # P, if patches need not be square
    query: bool = False  # whether a query is given
    head_norm: str | None = None
    called_as: str = ""  # the public function if its name is not `op`

    def specialized(self) -> Request:
        """With integers for the sizes that are symbolic while torch.compile traces with dynamic shapes."""
        values: list[Any] = [int(value) if isinstance(value, torch.SymInt) else value for value in self]
        return Request(*values)

    @property
    def public_name(self) -> str:
        return self.called_as or self.op


@dataclass(frozen=True)
class Support:
    """Dtypes and sizes that a backend has kernels for.

    `activations` are the dtypes of cond, tokens and h, and of pred of a loss; `images` are those of image and target.
    """

    runs_on: str
    activations: tuple[torch.dtype, ...] = STORAGE
    images: tuple[torch.dtype, ...] = STORAGE
    widths: tuple[int, ...] = (16, 32, 64)
    max_depth: int = 8
    patch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    channels: tuple[int, ...] = (1, 3, 4)
    queries: tuple[bool, ...] = (False, True)
    head_norms: tuple[str, ...] = ("layer", "rms")

    def refusal(self, request: Request) -> str | None:
        """Reason, with remedy, why the backend has no kernel for a call, or None. Skips sizes that the call lacks."""
        activation, *images = request.dtypes
        sizes, widths, channels = _words(self.patch_sizes), _words(self.widths), _words(self.channels)
        areas = [size**2 for size in self.patch_sizes]
        depths = range(1, self.max_depth + 1)
        checks: list[tuple[Any, Sequence[Any], str]] = [
            (activation, self.activations, f"activations (pred of a loss) in {_words(self.activations, 'or')}"),
            *((dtype, self.images, f"images in {_words(self.images, 'or')}") for dtype in images),
            (request.width, self.widths, f"a width D of {widths}"),
            (request.depth, depths, f"1 to {self.max_depth} blocks"),
            (request.patch_size, self.patch_sizes, f"a patch size of {sizes}"),
            (request.pixels, areas, f"square patches of size {sizes}, whose P (of h) is {_words(areas)}"),
            (request.channels, self.channels, f"{channels} image channels"),
            (request.query, self.queries, "no query"),
            (request.head_norm, self.head_norms, f"a head norm of {_words(self.head_norms)}"),
        ]
        for given, served, text in checks:
            if given is not None and given not in served:
                remedy = "use backend='reference' or leave the choice automatic"
                return f"it has kernels for {text}, not {given}; {remedy}"
        return None

    def serves(self) -> str:
        """The supported sizes and dtypes, as a cell of the README's table."""
        dtypes = "activations in " + _words(self.activations)
        if self.images != self.activations:
            dtypes += ", images in " + _words(self.images)
        return (
            f"D {_slashes(self.widths)}, N 1–{self.max_depth}, p {_slashes(self.patch_sizes)}, "
            f"C {_slashes(self.channels)}; {dtypes}"
        )


def backends_table(names: Iterable[str]) -> str:
    """Markdown table of the backends of this package."""
    rows = []
    for name in names:
        package = importlib.import_module(f"deco_kernels.backends.{name}")
        support: Support | None = getattr(package, "SUPPORT", None)
        cells = ("any device", "everything, in plain PyTorch; float64 too")
        if support is not None:
            cells = (support.runs_on, support.serves())
        rows.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    return "\n".join(["| backend | runs on | serves |", "|---|---|---|", *rows])


def _slashes(values: Iterable[int]) -> str:
    return "/".join(map(str, values))


def _words(values: Iterable[object], word: str = "and") -> str:
    *first, last = (str(value).removeprefix("torch.") for value in values)
    return f"{', '.join(first)} {word} {last}" if first else last
