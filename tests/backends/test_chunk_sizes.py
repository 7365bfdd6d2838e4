"""Sizes of chunks."""

import pytest
import torch

from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.chunks import image_chunks


@pytest.mark.parametrize(("bytes_per_pixel", "pixels"), [(1, 1 << 20), (320, 1 << 20), (640, 625_000), (1 << 40, 1)])
def test_pixels_and_bytes_of_a_chunk_are_limited(bytes_per_pixel, pixels):
    assert chunk_sizes.chunk_pixels(bytes_per_pixel) == pixels


@pytest.mark.parametrize(
    ("pixels", "size"),
    [(1, (1, 8)), (500, (1, 8)), (512, (1, 16)), (1279, (1, 24)), (1280, (1, 40)), (2560, (2, 40)), (1 << 20, (3, 40))],
)
def test_chunks_are_whole_images_or_rows_of_patches(pixels, size):
    """Three images of 40x32 in patches of 8x8; five rows of patches in parts of two, two and one."""
    image = torch.arange(3 * 40 * 32).view(3, 1, 40, 32)
    assert chunk_sizes.chunk_of_images(image, 8, pixels) == size
    chunks = list(image_chunks(image.shape, 8, *size))
    assert torch.equal(torch.cat([chunk.of(image).flatten() for chunk in chunks]), image.flatten())
    for chunk in chunks:
        count = chunk.of(image).numel()
        assert count <= max(pixels, 8 * 32) and count == 64 * chunk.token_count
    assert chunks[0].tokens.start == 0 and chunks[-1].tokens.stop == 3 * 5 * 4
    assert all(first.tokens.stop == second.tokens.start for first, second in zip(chunks, chunks[1:], strict=False))
