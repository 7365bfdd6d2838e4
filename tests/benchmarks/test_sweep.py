"""The comparison of chunk sizes and launch parameters on a GPU, as far as a CPU can show it."""

import pytest
import torch

from benchmarks.gpu_check import sweep
from deco_kernels import testing
from deco_kernels.backends import chunk_sizes


@pytest.mark.parametrize("op", sorted({*sweep.CHUNKED, *(op for op, *_ in sweep.LAUNCHES.values())}))
def test_calls_compute_outputs_and_gradients(op):
    inputs = sweep.inputs_of(op, "cpu", (1, 16, 32))
    result = sweep.call_of(inputs, "reference", False)()
    outputs = result if isinstance(result, tuple) else (result,)
    assert all(torch.equal(*pair) for pair in zip(outputs, testing.run(inputs, "reference").outputs, strict=True))
    gradients = sweep.call_of(inputs, "reference", True)()
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)


def test_chunk_sizes_are_replaced_and_restored():
    before = chunk_sizes.chunk_pixels(64), chunk_sizes.MOST_PIXELS
    with sweep.chunks_of(512):
        assert (chunk_sizes.chunk_pixels(64), chunk_sizes.MOST_PIXELS) == (512, 512)
    assert (chunk_sizes.chunk_pixels(64), chunk_sizes.MOST_PIXELS) == before


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["warps"])
    assert "unknown part 'warps'; use chunks, launches" in capsys.readouterr().err
