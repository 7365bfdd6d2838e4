"""Sizes of chunks by the L2 cache."""

import types

import pytest
import torch

from deco_kernels.backends import l2_cache
from deco_kernels.backends.chunks import image_chunks

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def device(monkeypatch):
    """A function that gives a CUDA device with this much L2 cache, on any machine."""

    def make(megabytes: int, **properties) -> torch.device:
        found = types.SimpleNamespace(L2_cache_size=megabytes * MIB, **properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        l2_cache.cache_bytes.cache_clear()
        return torch.device("cuda")

    yield make
    l2_cache.cache_bytes.cache_clear()


@pytest.mark.parametrize("megabytes", [40, 50, 72, 126])
@pytest.mark.parametrize("bytes_per_pixel", [64, 128, 256, 320, 640])
def test_a_chunk_fills_its_share_of_the_cache(device, megabytes, bytes_per_pixel):
    pixels = l2_cache.chunk_pixels(device(megabytes), bytes_per_pixel, least=1000)
    share = 0.6 * megabytes * MIB
    assert pixels * bytes_per_pixel <= share
    assert (pixels + 1) * bytes_per_pixel > share or pixels == l2_cache.LARGE_PIXELS


def test_cpu_tensors_have_the_chunks_of_an_h100(device):
    assert l2_cache.chunk_pixels(CPU, 320, least=1) == l2_cache.chunk_pixels(device(50), 320, least=1) == 98_304


def test_a_cache_that_is_too_small_does_not_limit_a_chunk(device):
    assert l2_cache.chunk_pixels(device(6), 320, least=11_796) == 11_796
    assert l2_cache.chunk_pixels(device(6), 320, least=11_797) == 150_000_000 // 320
    assert l2_cache.chunk_pixels(device(6), 64, least=1 << 20) == 1 << 19
    assert l2_cache.large_pixels(1 << 40) == 1


def test_the_last_level_cache_of_gfx942_counts(device):
    assert l2_cache.cache_bytes(device(4, gcnArchName="gfx942:sramecc+:xnack-")) == 256 * MIB
    assert l2_cache.cache_bytes(device(4, gcnArchName="gfx90a")) == 4 * MIB


@pytest.mark.parametrize(
    ("pixels", "size"),
    [(1, (1, 8)), (500, (1, 8)), (512, (1, 16)), (1279, (1, 24)), (1280, (1, 40)), (2560, (2, 40)), (1 << 20, (3, 40))],
)
def test_chunks_are_whole_images_or_rows_of_patches(pixels, size):
    """Three images of 40x32 in patches of 8x8; five rows of patches in parts of two, two and one."""
    image = torch.arange(3 * 40 * 32).view(3, 1, 40, 32)
    assert l2_cache.chunk_of_images(image, 8, pixels) == size
    chunks = list(image_chunks(image.shape, 8, *size))
    assert torch.equal(torch.cat([chunk.of(image).flatten() for chunk in chunks]), image.flatten())
    for chunk in chunks:
        count = chunk.of(image).numel()
        assert count <= max(pixels, 8 * 32) and count == 64 * chunk.token_count
    assert chunks[0].tokens.start == 0 and chunks[-1].tokens.stop == 3 * 5 * 4
    assert all(first.tokens.stop == second.tokens.start for first, second in zip(chunks, chunks[1:], strict=False))
