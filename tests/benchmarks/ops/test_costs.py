"""Bytes and FLOPs of the benchmarks vs. counts while the op runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.steps import require_gradients
from benchmarks.names import OPS
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import Size

SIZES = (
    Size(batch=2, height=8, width=12, patch_size=4, decoder_width=16, depth=2, token_width=24),
    Size(batch=1, height=16, width=24, patch_size=8, decoder_width=32, depth=1, token_width=40),
)


@pytest.mark.parametrize("patch_size", (3, 16, 128))
def test_contenders_are_checked_on_whole_patches(patch_size):
    size = problem_of("pixel_decoder").check_size(Size(height=384, width=384, patch_size=patch_size))
    assert size.pixels >= 4096 and size.height % patch_size == size.width % patch_size == 0


@pytest.mark.parametrize("training", (False, True), ids=("forward", "training"))
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_flops_are_those_of_the_matrix_products(op, size, training):
    problem = problem_of(op)
    operands = problem.make_operands(size, torch.float32, torch.Generator().manual_seed(0))
    require_gradients(problem, operands, training)
    with FlopCounterMode(display=False) as counter:
        outputs = problem.best_eager(operands.tensors(), size)
        if training:
            torch.autograd.backward(outputs[: len(operands.incoming)], operands.incoming)
    assert problem.flops(size, training) == counter.get_total_flops()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bytes_are_those_of_the_tensors(op, size, dtype):
    problem = problem_of(op)
    operands = problem.make_operands(size, dtype, torch.Generator().manual_seed(0))
    require_gradients(problem, operands, True)
    outputs = problem.fused(operands.tensors(), size, "reference")
    torch.autograd.backward(outputs[: len(operands.incoming)], operands.incoming)
    arguments = [tensor for tensor in problem.given(operands.tensors(), size).values() if tensor is not None]
    forward = sum(tensor.nbytes for tensor in (*arguments, *outputs))
    gradients = sum(tensor.grad.nbytes for tensor in arguments if tensor.grad is not None)
    assert problem.bytes_moved(size, dtype, training=False) == forward
    backward = 3 * gradients if problem.one_pass else gradients if problem.keeps_gradient else forward + gradients
    assert problem.bytes_moved(size, dtype, training=True) == forward + backward
    assert problem.backward_bytes(size, dtype) == forward + gradients


def test_the_published_decoder_is_counted_after_the_fold():
    problem, size = problem_of("pixel_decoder"), Size(height=16, width=16)
    assert problem.flops(size, training=False) == 2 * 15_552 * size.pixels
