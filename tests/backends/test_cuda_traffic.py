"""Bytes of global memory that the kernels of the decoder's backward move, counted by the emulator."""

import pytest
import torch

from deco_kernels import testing
from deco_kernels.backends import l2_cache
from deco_kernels.testing import emulation

pytestmark = pytest.mark.emulate

D, N, C = 32, 3, 3
ROW, IMAGE, VELOCITY = 2 * D, 4 * C, 2 * C  # bytes per pixel of an activation, a float32 image, a velocity


def backward_launches(width: int) -> list[emulation.RecordedLaunch]:
    inputs = testing.random_inputs(
        "pixel_decoder", dtype=torch.bfloat16, other_dtype=torch.float32, depth=N, image_size=(1, 16, width)
    )
    names = ("pixel_decoder_recompute", "block_backward", "pixel_decoder_embedding")
    launches = emulation.record_accesses(lambda: testing.run(inputs, emulation.BACKEND))
    return [launch for launch in launches if launch.name in names]


def test_bytes_per_pixel_of_the_backward(emulated):
    """As in docs/cuda.md. The difference of two sizes excludes weights and sums."""
    small, large = backward_launches(32), backward_launches(64)
    counts = [
        ((b.read.distinct - a.read.distinct) / 512, (b.written.distinct - a.written.distinct) / 512)
        for a, b in zip(small, large, strict=True)
    ]
    assert counts == [
        (ROW + IMAGE + VELOCITY, (N + 2) * ROW),  # recompute: cond, image, velocity's gradient; h of N blocks, s, δh
        (3 * ROW, 2 * ROW),  # block backward, launched first: h, s, δh; δh, δs
        (4 * ROW, 2 * ROW),  # between: also δs
        (5 * ROW, 2 * ROW),  # last: also cond
        (ROW + IMAGE, IMAGE),  # embedding: δh, image; gradient of the image
    ]
    assert [sum(count) for count in counts] == [402, 320, 384, 448, 88]


def test_every_chunk_reads_and_writes_the_sums(emulated, monkeypatch):
    monkeypatch.setattr(l2_cache, "chunk_pixels", lambda *_, **__: 512)
    launches = backward_launches(64)
    assert len(launches) == 2 * (N + 2)
    # The sums are the last buffer that a kernel declares.
    for index, (launch, numbers) in enumerate(
        zip(launches, [8 * (D + 1), *[5 * D * (D + 1)] * N, 16 * D] * 2, strict=True)
    ):
        sums = launch.buffers[-1]
        assert sums.written.distinct == 4 * launch.blocks * numbers
        assert sums.read.distinct == (0 if index < N + 2 else sums.written.distinct)
