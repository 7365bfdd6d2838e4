"""Loads the images of each step in worker processes, starting at any step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from deco_kernels.training.batches import BatchPlan, crop_shapes, group_by_shape
from deco_kernels.training.config import TrainConfig
from deco_kernels.training.images import center_crop, open_image, to_uint8, upright_rgb
from deco_kernels.training.sources import Source

ATTEMPTS = 100  # consecutive unusable images before an error


Index = tuple[int, int, int]
"""(group, number of the sample, number of the image)."""

Item = tuple[torch.Tensor, int | str, int, dict[str, str]]
"""(image, label or caption, number of the sample, what was skipped for it)."""


@dataclass
class Batch:
    """Batch of one process and one accumulation part.

    images: uint8 [B, 3, H, W].
    targets: labels int64 [B], or B captions.
    samples: index of every sample in the whole run, int64 [B].
    skipped: unusable images that were replaced by others, name → reason.
    """

    images: torch.Tensor
    targets: torch.Tensor | list[str]
    samples: torch.Tensor
    skipped: dict[str, str]

    def pin_memory(self) -> Batch:
        self.images = self.images.pin_memory()
        if isinstance(self.targets, torch.Tensor):
            self.targets = self.targets.pin_memory()
        return self

    def to(self, device: torch.device) -> Batch:
        """The batch with images and labels on the device; copies from pinned memory do not wait for the device."""
        targets = self.targets
        if isinstance(targets, torch.Tensor):
            targets = targets.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), targets=targets)


class Images(Dataset[Item]):
    """Decoded and cropped images, indexed by (group, sample index in the run, image index)."""

    def __init__(self, source: Source, plan: BatchPlan, min_side: int):
        self.source, self.plan, self.min_side = source, plan, min_side

    def __getitem__(self, index: Index) -> Item:
        group, sample, number = index
        skipped: dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            try:
                stored, target = self.source.read(number)
                return self._decode(stored, *self.plan.shapes[group]), target, sample, skipped
            except Exception as error:  # Pillow raises many unrelated types
                skipped[self.source.name(number)] = str(error) or type(error).__name__
            number = self.plan.substitute(group, sample, attempt)
        examples = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(
            f"data.path: {ATTEMPTS} consecutive images cannot be used, such as {examples}; "
            "check these files and data.min_side"
        )

    def _decode(self, stored: str | bytes | None, height: int, width: int) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata in images that decode
            with open_image(stored) as image:
                if min(image.size) < self.min_side:
                    raise ValueError(f"{image.width}x{image.height} pixels, below data.min_side={self.min_side}")
                return to_uint8(center_crop(upright_rgb(image), height, width))


class Parts(Sampler[list[Index]]):
    """Indices of this process's share of each batch: contiguous, in rank order, from `first_step` to `last_step`."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int, accumulate: int, rank: int, world_size: int):
        self.plan, self.steps = plan, range(first_step, last_step)
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[Index]]:
        size = self.plan.batch_size
        for step in self.steps:
            group, numbers = self.plan.step(step)
            samples = np.arange(step * size, (step + 1) * size)
            for part in np.split(np.arange(size), self.accumulate):
                mine = np.split(part, self.world_size)[self.rank]
                yield [(group, int(samples[i]), int(numbers[i])) for i in mine]


def check_batches(config: TrainConfig, patch_size: int, world_size: int) -> None:
    """Raise ValueError unless processes and parts divide batch_size and patch_size divides image_size."""
    if config.batch_size % (world_size * config.accumulate):
        raise ValueError(
            f"batch_size: expected a multiple of processes x accumulate = {world_size} x {config.accumulate}, got "
            f"{config.batch_size}; change one of the three"
        )
    if config.image_size % patch_size:
        raise ValueError(
            f"image_size: expected a multiple of the patch size {patch_size}, got {config.image_size}; "
            "choose such a size"
        )


def plan_batches(
    config: TrainConfig, count: int, sizes: np.ndarray | None, patch_size: int, world_size: int
) -> BatchPlan:
    """Group `count` images by crop size and plan the steps.

    Args:
        sizes: (height, width) in pixels of every image [count, 2] for rectangular crops, or None for square crops.

    Raises ValueError as `check_batches`, and if no image can be read.
    """
    check_batches(config, patch_size, world_size)
    size = config.image_size
    if sizes is None:
        groups = {(size, size): np.arange(count)}
    else:
        shapes = crop_shapes(size, patch_size, config.data.max_aspect)
        groups = group_by_shape(sizes, shapes, config.batch_size)
        if not groups:
            raise ValueError(f"data.path: no image in {config.data.path} can be read; check the files")
    return BatchPlan(groups, config.batch_size, config.seed)


def loader(
    config: TrainConfig, source: Source, plan: BatchPlan, first_step: int, rank: int, world_size: int, pin: bool
) -> DataLoader[Item]:
    """Loader of this process's batches from `first_step` to the end of the run, config.accumulate per step."""
    workers = config.data.workers
    return DataLoader(
        Images(source, plan, config.data.min_side),
        batch_sampler=Parts(plan, first_step, config.steps, config.accumulate, rank, world_size),
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=config.data.prefetch if workers else None,
        pin_memory=pin,
    )


@contextlib.contextmanager
def without_worker_traceback() -> Iterator[None]:
    """Re-raise a ValueError of a loader process without that process's traceback in the message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).rpartition("\nValueError: ")[2].strip()) from error


def _collate(items: list[Item]) -> Batch:
    images, targets, samples, skipped = zip(*items, strict=True)
    numeric = isinstance(targets[0], int)
    together = {name: reason for each in skipped for name, reason in each.items()}
    return Batch(
        torch.stack(images), torch.tensor(targets) if numeric else list(targets), torch.tensor(samples), together
    )
