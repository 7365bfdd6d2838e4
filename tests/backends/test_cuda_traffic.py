"""Bytes of global memory that the kernels of the decoder's backward, of pixel_decoder_loss and of the losses move,
counted by the emulator."""

import pytest
import torch

from deco_kernels import testing
from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.cuda import flow_matching_loss, pixel_decoder_loss
from deco_kernels.signatures import OPS, Loss, flat
from deco_kernels.testing import emulation

pytestmark = pytest.mark.emulate

D, N, C = 32, 3, 3
ROW, IMAGE, VELOCITY = 2 * D, 4 * C, 2 * C  # bytes per pixel of an activation, a float32 image, a velocity


def decoder_launches(width: int, save_memory: bool = True) -> list[emulation.RecordedLaunch]:
    """Of the kernels of the backward, and with kept activations that of the forward."""
    inputs = testing.random_inputs(
        "pixel_decoder", dtype=torch.bfloat16, other_dtype=torch.float32, depth=N, image_size=(1, 16, width)
    )
    inputs = inputs._replace(options=inputs.options | {"save_memory": save_memory})
    first = ("pixel_decoder_recompute",) if save_memory else ("pixel_decoder_keeping_forward", "pixel_decoder_head")
    launches = emulation.record_accesses(lambda: testing.run(inputs, emulation.BACKEND))
    return [launch for launch in launches if launch.name in (*first, "block_backward_ahead", "pixel_decoder_embedding")]


def bytes_per_pixel(small: list, large: list) -> list[tuple[float, float]]:
    """(read, written) of each launch. The difference of two sizes, 512 pixels apart, excludes weights and sums."""
    return [
        ((b.read.distinct - a.read.distinct) / 512, (b.written.distinct - a.written.distinct) / 512)
        for a, b in zip(small, large, strict=True)
    ]


def test_bytes_per_pixel_of_the_backward(emulated):
    """As in docs/cuda.md."""
    counts = bytes_per_pixel(decoder_launches(32), decoder_launches(64))
    assert counts == [
        (ROW + IMAGE + VELOCITY, (N + 2) * ROW),  # recompute: cond, image, velocity's gradient; h of N blocks, s, δh
        (3 * ROW, 2 * ROW),  # block backward, launched first: h, s, δh; δh, δs
        (4 * ROW, 2 * ROW),  # between: also δs
        (5 * ROW, 2 * ROW),  # last: also cond
        (ROW + IMAGE, IMAGE),  # embedding: δh, image; gradient of the image
    ]
    assert [sum(count) for count in counts] == [402, 320, 384, 448, 88]


def test_bytes_per_pixel_with_kept_activations(emulated):
    counts = bytes_per_pixel(decoder_launches(64, save_memory=False), decoder_launches(96, save_memory=False))
    assert counts[:2] == [
        (ROW + IMAGE, VELOCITY + (N + 2) * ROW),  # forward: cond, image; velocity, h of N blocks and of the head, s
        (ROW + VELOCITY, ROW),  # head: h, velocity's gradient; δh
    ]
    assert [sum(count) for count in counts[2:]] == [320, 384, 448, 88]


def test_every_chunk_reads_and_writes_the_sums(emulated, monkeypatch):
    monkeypatch.setattr(chunk_sizes, "chunk_pixels", lambda *_, **__: 512)
    launches = decoder_launches(64)
    assert len(launches) == 2 * (N + 2)
    # The sums are the last buffer that a kernel declares.
    for index, (launch, numbers) in enumerate(
        zip(launches, [8 * (D + 1), *[5 * D * (D + 1)] * N, 16 * D] * 2, strict=True)
    ):
        sums = launch.buffers[-1]
        assert sums.written.distinct == 4 * launch.blocks * numbers
        assert sums.read.distinct == (0 if index < N + 2 else sums.written.distinct)


def bytes_outside_the_workspace(columns: int) -> dict[str, tuple[int, int]]:
    """Bytes of the inputs and gradients that one chunk of pixel_decoder_loss reads and writes, each once."""
    call = testing.random_inputs(
        "pixel_decoder_loss", dtype=torch.bfloat16, other_dtype=torch.float32, depth=N, image_size=(1, 16, columns)
    )
    tensors, inputs = call.tensors, call.groups()
    without = ("target", "frequency_weight", "sample_weight", "query")
    needs = [name not in without for name in OPS["pixel_decoder_loss"].names]
    kept = []
    launches = emulation.record_accesses(
        lambda: kept.extend(pixel_decoder_loss.forward_with_gradients(inputs, 16, 1.0, "layer", 1e-6, needs)[1])
    )
    places = {"cond": tensors["cond"], "image": tensors["image"], "target": tensors["target"]}
    places |= {"grad image": kept[0], "grad cond": kept[1]}
    assert len(flat(inputs)) == len(kept)
    return {
        name: tuple(max(getattr(buffer, way).distinct for buffer in found) for way in ("read", "written"))
        for name, tensor in places.items()
        if (found := [b for launch in launches for b in launch.buffers if b.address == tensor.data_ptr()])
    }


def test_bytes_per_pixel_that_leave_a_chunk_of_the_one_pass(emulated):
    """As in docs/pixel_decoder_loss.md: the least that moves between L2 and memory, if a chunk stays in L2."""
    small, large = bytes_outside_the_workspace(32), bytes_outside_the_workspace(64)
    per_pixel = {name: tuple((b - a) / 512 for a, b in zip(small[name], large[name], strict=True)) for name in small}
    assert per_pixel == {
        "cond": (ROW, 0),
        "image": (IMAGE, 0),
        "target": (IMAGE, 0),
        "grad image": (0, IMAGE),
        "grad cond": (ROW, ROW),  # the gradients of s of the decoder blocks, then that of cond
    }
    assert sum(sum(counts) for counts in per_pixel.values()) == 228


@pytest.mark.parametrize(("incoming", "again"), [(1.0, False), (0.3, True)])
def test_bytes_of_the_losses_in_one_pass(emulated, incoming, again):
    """Both images are read once and the gradient is written once, unless the incoming gradient is not 1."""
    pred, target = torch.randn(2, 1, 3, 32, 40).to(torch.bfloat16)
    inputs = Loss(pred, target, torch.rand(3, 8, 8), None)
    kept = []
    launches = emulation.record_accesses(lambda: kept.append(flow_matching_loss.forward_with_gradient(inputs, 1.0)[1]))
    backward = emulation.record_accesses(
        lambda: flow_matching_loss.kept_backward(kept[0], torch.tensor(incoming), inputs, 1.0)
    )

    def moved(launches, tensor, way):
        found = [b for launch in launches for b in launch.buffers if b.address == tensor.data_ptr()]
        return sum(getattr(buffer, way).distinct for buffer in found)

    assert len(launches) == 2 and len(backward) == 1
    assert moved(launches, pred, "read") == moved(launches, target, "read") == pred.nbytes
    assert moved(launches, kept[0], "written") == pred.nbytes
    assert moved(backward, pred, "read") == moved(backward, kept[0], "written") == again * pred.nbytes
