"""assert_equivalent: right pairs of functions pass, wrong ones fail with a table."""

import functools

import pytest
import torch
import torch.nn.functional as F

from deco_kernels import ops, testing

pytestmark = pytest.mark.usefixtures("one_thread")


def block_inputs(dtype=torch.float32):
    return testing.random_inputs("adaln_block", dtype=dtype, image_size=(1, 64, 64)).tensors


def block(h, cond, norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    shift, scale, gate = F.linear(F.silu(cond), mod_weight, mod_bias).chunk(3, -1)
    x = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, 1e-6) * (1 + scale) + shift
    return h + gate * F.linear(F.silu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fused_op_is_equivalent_to_its_reference(dtype, capsys):
    autocast = None if dtype is torch.float32 else dtype
    rows = testing.assert_equivalent(ops.adaln_block, block, block_inputs(dtype), autocast=autocast)
    assert [row.name for row in rows] == ["output 0", *(f"grad {name}" for name in block_inputs())]
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in rows) and "wrong" not in printed


def test_positional_inputs_and_outputs_alone():
    rows = testing.assert_equivalent(ops.adaln_block, block, list(block_inputs().values()), gradients=False)
    assert [row.name for row in rows] == ["output 0"]


def test_a_loss_computes_in_float32_on_16_bit_inputs():
    inputs = testing.random_inputs("flow_matching_loss", dtype=torch.bfloat16, image_size=(2, 64, 64)).tensors

    def ours(**tensors):
        return ops.flow_matching_loss(**tensors)[0]

    def reference(**tensors):
        return testing.eager("flow_matching_loss", tensors, {"frequency_scale": 1.0})[0]

    testing.assert_equivalent(ours, reference, inputs, dtype=torch.float32)
    with pytest.raises(AssertionError, match="allows: output 0"):
        testing.assert_equivalent(lambda **tensors: ours(**tensors) * 1.00001, reference, inputs, dtype=torch.float32)


@functools.cache
def scaled_gradient(factor):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor

    return Scaled.apply


def test_a_wrong_gradient_fails_with_a_table():
    tensors = block_inputs()

    def ours(h, cond, **weights):
        return ops.adaln_block(h, scaled_gradient(1.0001)(cond), **weights)

    with pytest.raises(AssertionError, match=r"allows: grad cond\n(.*\n)+grad cond .* wrong"):
        testing.assert_equivalent(ours, block, tensors)


def test_errors_of_rounding_are_compared_with_more_calls():
    """A single number whose eager error happens to be 0 or small in this call."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        testing.assert_equivalent(lambda x: x.flip(0).sum(), lambda x: x.sum(), [x], seed=seed)


@pytest.mark.parametrize(
    "ours, reference, inputs, error",
    [
        (torch.sin, lambda x: (x.sin(), x), [torch.ones(4)], "outputs: expected 2, as the reference returns, got 1"),
        (torch.sum, torch.sin, [torch.ones(4)], r"output 0: expected \(4,\), got \(\)"),
        (lambda x: x.sin().detach(), torch.sin, [torch.ones(4)], "only that of the reference is differentiable"),
        (lambda x: x.detach(), lambda x: x.detach(), [torch.ones(4)], "differentiable one, got none; pass gradients=F"),
    ],
)
def test_functions_of_another_form(ours, reference, inputs, error):
    with pytest.raises(AssertionError, match=error):
        testing.assert_equivalent(ours, reference, inputs)


def test_bad_arguments():
    with pytest.raises(TypeError, match="inputs: expected at least one floating-point tensor, got none"):
        testing.assert_equivalent(torch.sin, torch.sin, {"input": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(TypeError, match="reference: expected float64 results for float64 inputs, got torch.float32"):
        testing.assert_equivalent(torch.sin, lambda x: x.float().sin(), [torch.ones(3)])
    with pytest.raises(TypeError, match="float64 inputs, got RuntimeError: .*pass its weights as inputs"):
        testing.assert_equivalent(torch.sin, torch.nn.Linear(3, 3), [torch.ones(3)])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        testing.assert_equivalent(torch.sin, torch.nn.Linear(3, 3), [torch.ones(2, 4)])
    with pytest.raises(TypeError, match="inputs: expected arguments by name or .*, got Tensor; pass a dictionary or"):
        testing.assert_equivalent(torch.sin, torch.sin, torch.ones(3))
    with pytest.raises(TypeError, match="autocast: expected None, torch.bfloat16 or torch.float16, got 'bf16'; pass"):
        testing.assert_equivalent(torch.sin, torch.sin, [torch.ones(3)], autocast="bf16")
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16, .* got torch.float64"):
        testing.assert_equivalent(torch.sin, torch.sin, [torch.ones(3, dtype=torch.float64)])
    for outputs, name in (([torch.ones(3)], "list"), ({}, "dict"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"a tensor or a tuple of tensors, got {name}"):
            testing.assert_equivalent(lambda x, outputs=outputs: outputs, torch.sin, [torch.ones(3)])


@pytest.mark.parametrize("factor, dtype", [(float("nan"), torch.float32), (1e5, torch.float16)])
def test_results_that_are_not_finite_give_no_bound(factor, dtype):
    """NaN in the exact results, or infinity in those of eager: a wrong function must not pass."""
    with pytest.raises(ValueError, match="expected finite results, .* got others for output 0"):
        testing.assert_equivalent(lambda x: x * 7, lambda x: x * factor, [torch.ones(4, dtype=dtype)])
