"""flow_matching_loss: the pixel loss and the frequency loss of a training batch."""

import dataclasses

import torch

from benchmarks.ops.problem import Operands, Outputs, Problem, Shapes, Tensors
from benchmarks.ops.sizes import Size
from deco_kernels import ops
from deco_kernels.signatures import BLOCK
from deco_kernels.testing import published

FREQUENCY_SCALE = 1.0


class FlowMatchingLoss(Problem):
    op = "flow_matching_loss"
    activations = ("pred", "target")
    full_precision = ("target",)
    trained = ("pred",)
    constants = ("frequency_weight",)
    autocast = False  # losses are computed in float32
    has_backward_alone = True
    keeps_gradient = True

    def arguments(self, size: Size) -> Shapes:
        images = (size.batch, 3, size.height, size.width)
        return {"pred": images, "target": images, "frequency_weight": (3, BLOCK, BLOCK)}

    def outputs(self, size: Size) -> Shapes:
        return {"total": (), "pixel": (), "frequency": ()}

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def multiply_adds(self, size: Size, training: bool) -> int:
        return loss_multiply_adds(size, training)

    def make_weights(self, size: Size, generator: torch.Generator) -> Tensors:
        return {"frequency_weight": ops.jpeg_frequency_weight(device=generator.device)}

    def make_incoming(self, size: Size, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
        """Only `total` is differentiated."""
        return (torch.ones((), device=generator.device),)

    def check_size(self, size: Size) -> Size:
        """Sides that are not multiples of 8, to cover the padding."""
        return dataclasses.replace(size, batch=2, height=60, width=52, patch_size=4)

    def published(self, tensors: Tensors, size: Size) -> Outputs:
        return published.losses(
            tensors["pred"], tensors["target"], tensors["frequency_weight"], frequency_scale=FREQUENCY_SCALE
        )

    def row_width(self, size: Size) -> int:
        return size.channels

    def options(self, size: Size) -> dict[str, int | float | str]:
        return {"frequency_scale": FREQUENCY_SCALE}

    def backward_alone(self, operands: Operands, size: Size, backend: str) -> Outputs:
        tensors = operands.tensors()
        one = operands.incoming[0]
        gradients = torch.ops.deco_kernels.flow_matching_loss_backward(
            one,
            torch.zeros_like(one),
            torch.zeros_like(one),
            *self.given(tensors, size).values(),
            None,  # sample_weight
            FREQUENCY_SCALE,
            backend,
            [True, False, False, False],
        )
        return gradients[:1]


def loss_multiply_adds(size: Size, training: bool) -> int:
    """Per pixel of the difference: the 3x3 color matrix, then two 8-point DCTs per channel as dense matmuls on the
    padded size. The gradient applies the transposes of both."""
    padded = size.batch * _padded(size.height) * _padded(size.width)
    return (9 * size.pixels + 3 * 2 * BLOCK * padded) * (2 if training else 1)


def _padded(side: int) -> int:
    return -(-side // BLOCK) * BLOCK


PROBLEM = FlowMatchingLoss()
