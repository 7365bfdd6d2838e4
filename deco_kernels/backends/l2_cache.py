"""Sizes of the chunks that the GPU backends process one after the other, by the L2 cache of the device.

The kernels of a chunk hand values to each other through global memory. If a chunk is small enough, these values stay in
the L2 cache, and only inputs and results of the chunk move between cache and memory. Inputs and results pass through
the cache too, so the values between kernels may take SHARE of it.
"""

from __future__ import annotations

import functools
import math

import torch

SHARE = 0.6
"""Part of the L2 cache for the values that stay in it."""
ONE_PASS_SHARE = 0.55
"""The same in pixel_decoder_loss, whose chunks read inputs and write gradients more than once."""

LARGE_PIXELS = 1 << 19
"""Pixels of a chunk at most."""
LARGE_BYTES = 150_000_000
"""Bytes between the kernels of a chunk at most, if they cannot stay in the cache."""

_H100_BYTES = 50 << 20
# PyTorch reports the L2 cache of one of eight dies; all of them share a larger last-level cache.
_LAST_LEVEL_BYTES = {"gfx942": 256 << 20}


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's L2 cache; those of an H100 for CPU tensors, whose kernels are emulated or only recorded."""
    if device.type != "cuda":
        return _H100_BYTES
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", "").split(":")[0]
    return _LAST_LEVEL_BYTES.get(architecture, properties.L2_cache_size)


def chunk_pixels(device: torch.device, bytes_per_pixel: int, least: int, share: float = SHARE) -> int:
    """Pixels of a chunk whose kernels hand on `bytes_per_pixel`, at most LARGE_PIXELS.

    As many as fit in `share` of the L2 cache. If these are fewer than `least`, too few to occupy the device or to pay
    for what every chunk costs, the chunk does not fit in the cache, and `large_pixels` limits it.
    """
    fitting = int(share * cache_bytes(device)) // bytes_per_pixel
    return min(fitting, LARGE_PIXELS) if fitting >= least else large_pixels(bytes_per_pixel)


def chunk_of_images(image: torch.Tensor, patch_size: int, pixels: int) -> tuple[int, int]:
    """(images, rows of pixels) of chunks of at most `pixels` pixels: whole images, or whole rows of patches of one.

    All chunks have this size, except the last images and the last rows of an image.
    """
    batch, _, height, width = image.shape
    most_rows, most_images = pixels // width, pixels // (height * width)
    return _parts(batch, most_images, 1), _parts(height, most_rows, patch_size)


def _parts(size: int, most: int, step: int) -> int:
    """Size of equal parts of `size`, at most `most` and multiples of `step`, at least one step."""
    steps = size // step
    parts = math.ceil(steps / max(1, min(most // step, steps)))
    return step * math.ceil(steps / parts)


def large_pixels(bytes_per_pixel: int) -> int:
    """Pixels of a chunk that does not fit in the cache: LARGE_PIXELS, or fewer if LARGE_BYTES do not suffice."""
    return min(LARGE_PIXELS, max(1, LARGE_BYTES // bytes_per_pixel))
