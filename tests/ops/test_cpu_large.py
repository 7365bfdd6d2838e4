"""Results of the CPU kernels larger than the caches, which are written with non-temporal stores."""

import pytest
import torch

from deco_kernels import native, testing
from tests.ops.cases import BF16, F32

pytestmark = pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason="needs the native CPU module")


def part_of(inputs, images, tokens):
    """The arguments of some images, whose tokens are `tokens`."""

    def cut(name, tensor):
        if name == "image":
            return tensor[images]
        return tensor[tokens] if name in ("h", "cond", "tokens") else tensor

    gradients = tuple(grad[images if inputs.op == "pixel_decoder" else tokens] for grad in inputs.grad_outputs)
    tensors = {name: cut(name, tensor) for name, tensor in inputs.tensors.items()}
    return inputs._replace(tensors=tensors, grad_outputs=gradients)


@pytest.mark.parametrize("op", ["adaln_block", "upsample_modulate", "pixel_decoder"])
@pytest.mark.parametrize(
    ("dtype", "width", "height"), [(F32, 32, 160), (F32, 16, 320), (BF16, 32, 320), (BF16, 64, 160)]
)
def test_a_batch_gives_what_its_halves_give(op, dtype, width, height):
    """Outputs and activation gradients of two images, 5.2 MB each, equal those of each image alone, bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inputs = testing.random_inputs(
            op, dtype=dtype, width=width, depth=1, image_size=(2, height, 128), token_width=16
        )
        whole = testing.run(inputs, "cpu")
        half = height // 16 * 8
        parts = [
            testing.run(part_of(inputs, slice(i, i + 1), slice(i * half, (i + 1) * half)), "cpu") for i in range(2)
        ]
    finally:
        torch.set_num_threads(before)
    for index, output in enumerate(whole.outputs):
        assert torch.equal(output, torch.cat([part.outputs[index] for part in parts]))
    for name in ("h", "cond", "image"):
        if name in whole.gradients:
            assert torch.equal(whole.gradients[name], torch.cat([part.gradients[name] for part in parts])), name
