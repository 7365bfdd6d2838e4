"""The comparison of chunk sizes and launch parameters on a GPU, as far as a CPU can show it."""

import pytest
import torch

from benchmarks.gpu_check import sweep
from deco_kernels import testing
from deco_kernels.backends import chunk_sizes


@pytest.mark.parametrize("op", [*sweep.CHUNKED, "flow_matching_loss"])
def test_calls_compute_outputs_and_gradients(op, monkeypatch):
    inputs = testing.random_inputs(op, width=16, patch_size=8, image_size=(1, 16, 16), token_width=8)
    monkeypatch.setattr(sweep, "inputs_of", lambda _: inputs)
    result = sweep.call_of(op, "reference", False)()
    outputs = result if isinstance(result, tuple) else (result,)
    assert all(torch.equal(*pair) for pair in zip(outputs, testing.run(inputs, "reference").outputs, strict=True))
    gradients = sweep.call_of(op, "reference", True)()
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
