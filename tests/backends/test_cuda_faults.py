"""Faults planted in the real kernels are noticed: by the emulator, by the order of warps, or by the rule of error."""

import pytest
import torch

from deco_kernels import native, ops, testing
from tests import emulation

pytestmark = pytest.mark.emulate


@pytest.fixture
def plant(emulated, tmp_path):
    """A function that changes one text of csrc/cuda and makes the module so built serve CPU tensors."""

    def build(source, file, text, replacement):
        module = emulation.build_with_fault(source, file, text, replacement, tmp_path)
        native.emulate_cuda(module)
        return module

    yield build
    native.emulate_cuda(emulated)


def decoder_inputs(**changes):
    sizes = {"dtype": torch.bfloat16, "width": 16, "depth": 1, "patch_size": 4, "image_size": (1, 32, 32)}
    return testing.random_inputs("pixel_decoder", **(sizes | changes))


def run_forward(inputs):
    with torch.no_grad():
        return ops.pixel_decoder(**inputs.tensors, **inputs.options, backend=emulation.BACKEND)


BARRIER = "        block_barrier();\n        add_tiles();"


def gradients_of_two_seeds(module):
    for seed in (1, 2):
        module.set_seed(seed)
        yield testing.run(decoder_inputs(), emulation.BACKEND).gradients["fc1_weight"]


def test_without_a_fault_the_results_are_right(plant, emulated):
    expected = testing.run(decoder_inputs(), emulation.BACKEND).gradients["fc1_weight"]
    module = plant("block_backward", "block_backward.cu", BARRIER, BARRIER)
    assert module is not emulated
    assert all(torch.equal(gradient, expected) for gradient in gradients_of_two_seeds(module))


def test_a_missing_barrier_before_the_weight_gradients(plant):
    module = plant("block_backward", "block_backward.cu", BARRIER, "        add_tiles();")
    first, second = gradients_of_two_seeds(module)
    assert not torch.isfinite(first).all() or not torch.equal(first, second)


def test_swapped_fragments(plant):
    """Two quadrants of the left operand of the gradient of pixel_weight change places."""
    plant(
        "decoder_embedding",
        "gradient_sums.h",
        "transpose(h.k_step[k][2]), transpose(h.k_step[k][1]),",
        "transpose(h.k_step[k][1]), transpose(h.k_step[k][2]),",
    )
    inputs = decoder_inputs(image_size=(1, 64, 64))
    failed = {row.name for row in testing.compare(inputs, testing.run(inputs, emulation.BACKEND)) if not row.passed}
    assert failed == {"grad pixel_weight"}


def test_rows_read_one_pixel_outside(plant):
    module = plant(
        "pixel_decoder",
        "pixel_decoder.cu",
        "const uint32_t pixel = min(first + 16 * m + 8 * r, p.pixels - 1);",
        "const uint32_t pixel = min(first + 16 * m + 8 * r, p.pixels);",
    )
    with pytest.raises(module.Fault, match="pixel_decoder_forward: read outside"):
        run_forward(decoder_inputs(patch_size=1, image_size=(1, 5, 5)))


def test_a_shuffle_under_divergence(plant):
    module = plant(
        "pixel_decoder",
        "tile.h",
        "  x += shuffle_xor(x, 1);\n  return x + shuffle_xor(x, 2);",
        "  if (lane() < 16) x += shuffle_xor(x, 1);\n  return x + shuffle_xor(x, 2);",
    )
    with pytest.raises(module.Fault, match="diverge|deadlock"):
        run_forward(decoder_inputs())
