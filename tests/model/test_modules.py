"""The losses and the decoder block as modules: results of the ops, parameters, bad input."""

import pytest
import torch

from deco_kernels import model, ops, testing

pytestmark = pytest.mark.usefixtures("one_thread")


def test_losses_are_those_of_the_ops():
    inputs = testing.random_inputs("flow_matching_loss", image_size=(2, 24, 32)).tensors
    pred, target, weight, sample_weight = inputs.values()
    loss = model.FlowMatchingLoss(weight, 0.5)
    expected = ops.flow_matching_loss(pred, target, weight, frequency_scale=0.5, sample_weight=sample_weight)
    for actual, value in zip(loss(pred, target, sample_weight), expected, strict=True):
        assert torch.equal(actual, value)
    assert torch.equal(model.FrequencyLoss(weight)(pred, target), ops.frequency_loss(pred, target, weight))
    assert torch.equal(model.FrequencyLoss().frequency_weight, ops.jpeg_frequency_weight())
    assert not loss.state_dict() and loss.to(torch.float64).frequency_weight.dtype is torch.float64


def test_the_block_is_that_of_the_op():
    tensors = testing.random_inputs("adaln_block", width=16, image_size=(1, 16, 16), patch_size=8).tensors
    h, cond = tensors.pop("h"), tensors.pop("cond")
    block = model.AdaLNBlock(16)
    assert torch.equal(block(h, cond), h)
    block.load_state_dict(tensors)
    assert torch.equal(block(h, cond), ops.adaln_block(h, cond, **tensors))
    block(h, cond).sum().backward()
    assert all(parameter.grad.any() for parameter in block.parameters())


@pytest.mark.parametrize(
    "build, error",
    [
        (lambda: model.AdaLNBlock(0), "width: expected at least 1, got 0"),
        (lambda: model.AdaLNBlock(16, backend="gpu"), "gpu"),
        (lambda: model.FrequencyLoss(torch.ones(8, 8)), r"frequency_weight: expected \[3, 8, 8\], got \[8, 8\]; pass"),
        (lambda: model.FlowMatchingLoss(backend="gpu"), "gpu"),
    ],
)
def test_bad_arguments(build, error):
    with pytest.raises(ValueError, match=error):
        build()
