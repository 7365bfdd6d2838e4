"""In-memory crops of photographs for the studies: training crops, and held-out crops from another region."""

import random
from typing import NamedTuple

import torch
from PIL import Image

from deco_kernels.training.batches import crop_shapes
from deco_kernels.training.images import center_crop, to_uint8

TRAINING_PART = 0.75  # of a photograph's width, from the left; the rest is held out
LARGEST_SIDE = 256  # of a crop before downscaling
MAX_ASPECT = 2.0


class Images(NamedTuple):
    """Crops of one shape: pixels uint8 [n, 3, H, W], and labels int64 [n], the number of the photograph."""

    pixels: torch.Tensor
    labels: torch.Tensor


Crop = tuple[Image.Image, int, tuple[int, int]]  # cropped region, label, target (height, width)


def cut(photographs: list[Image.Image], shapes: list[tuple[int, int]], count: int, seed: int, *, held_out: bool):
    """Random crops, `count` per photograph; their aspect ratios cycle through `shapes`.

    Crops for training come from the left part of a photograph, held-out ones from the rest; none is enlarged.

    Raises:
        ValueError: a photograph is too small for a crop.
    """
    drawn = random.Random(2 * seed + held_out)
    crops: list[Crop] = []
    for label, photograph in enumerate(photographs):
        split = int(TRAINING_PART * photograph.width)
        left, right = (split, photograph.width) if held_out else (0, split)
        for number in range(count):
            height, width = shapes[number % len(shapes)]
            largest = min((right - left) / width, photograph.height / height, LARGEST_SIDE / max(height, width))
            if largest < 1:
                raise ValueError(
                    f"photograph {label + 1}: {photograph.width}x{photograph.height} pixels are too few for crops of "
                    f"{width}x{height} from a region of {right - left}x{photograph.height}; use a larger one"
                )
            scale = drawn.uniform(1, largest)
            w, h = int(scale * width), int(scale * height)
            x, y = drawn.randint(left, right - w), drawn.randint(0, photograph.height - h)
            crops.append((photograph.crop((x, y, x + w, y + h)), label, (height, width)))
    return crops


def at_own_shape(crops: list[Crop]) -> dict[tuple[int, int], Images]:
    """Every crop scaled to its target shape, grouped by shape."""
    groups = {shape: [crop for crop in crops if crop[2] == shape] for shape in sorted({crop[2] for crop in crops})}
    return {shape: _stack(group, shape) for shape, group in groups.items()}


def at_square(crops: list[Crop], size: int) -> dict[tuple[int, int], Images]:
    """The center of every crop, size x size."""
    return {(size, size): _stack(crops, (size, size))}


def native_shapes(size: int, patch_size: int) -> list[tuple[int, int]]:
    """Rectangles of about size² pixels from 1:2 to 2:1."""
    return crop_shapes(size, patch_size, MAX_ASPECT)


def _stack(crops: list[Crop], shape: tuple[int, int]) -> Images:
    pixels = torch.stack([to_uint8(center_crop(image, *shape)) for image, _, _ in crops])
    return Images(pixels, torch.tensor([label for _, label, _ in crops]))
