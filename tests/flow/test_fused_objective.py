"""The objective whose model computes decoder and loss as one op: same losses and gradients, and where it applies."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from deco_kernels import flow, model, ops
from deco_kernels.testing import published, relative_error
from tests.random_models import random_model

WEIGHT = ops.jpeg_frequency_weight(85)


def objective(**changes):
    return flow.Objective(WEIGHT, 0.7, **changes)


def batch(net, count=2, seed=0):
    """Clean images of 32x48 pixels and conditions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 32, 48, generator=generator) * 2 - 1
    if isinstance(net, model.DeCoTextToImage):
        return x, torch.randn(count, net.trunk.text_length, net.trunk.text_width, generator=generator)
    return x, torch.arange(count)


def losses_of(net, **changes):
    return objective(**changes)(net, *batch(net), torch.Generator().manual_seed(1))


def is_fused(net, **changes):
    """The parts have no gradients of their own then."""
    return not losses_of(net, **changes)["pixel"].requires_grad


def gradients_of(net, **changes):
    losses = losses_of(net, **changes)
    net.zero_grad(set_to_none=True)
    losses["total"].backward()
    return losses, {name: parameter.grad for name, parameter in net.named_parameters()}


class Alignment(nn.Module):
    block, weight = 1, 0.5

    def forward(self, features, x):
        return features.float().square().mean()


@pytest.mark.parametrize(
    ("name", "repa", "dtype"),
    [
        ("deco-tiny", None, torch.float32),
        ("deco-tiny", Alignment(), torch.bfloat16),
        ("deco-text-tiny", None, torch.float32),
    ],
)
def test_losses_and_gradients_are_those_of_two_ops(name, repa, dtype):
    net = random_model(name)
    bound = (
        5e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    )  # two ops round the velocity and its gradient
    with torch.autocast("cpu", dtype) if dtype is not torch.float32 else contextlib.nullcontext():
        losses, gradients = gradients_of(net, repa=repa)
        expected, expected_gradients = gradients_of(net, repa=repa, fused=False)
    assert not losses["pixel"].requires_grad and expected["pixel"].requires_grad
    assert list(losses) == list(expected)
    for key, loss in losses.items():
        assert loss.dtype is torch.float32 and relative_error(loss, expected[key]) <= bound, key
    for key, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[key]) <= bound, key


def test_without_gradients():
    net = random_model()
    with torch.no_grad():
        losses, expected = losses_of(net), losses_of(net, fused=False)
    assert relative_error(losses["total"], expected["total"]) <= 1e-6


def forward_hook(module, arguments, output):
    return None


def backward_hook(module, grad_input, grad_output):
    return None


@pytest.mark.parametrize("place", ["", "decoder"])
def test_hooks_that_await_the_velocity(place):
    net = random_model()
    module = net.get_submodule(place)
    hooks = ((module.register_forward_hook, forward_hook), (module.register_full_backward_hook, backward_hook))
    for register, hook in hooks:
        handle = register(hook)
        assert "awaits the velocity" in net.unfused_reason()
        handle.remove()
        assert net.unfused_reason() is None
    module.register_forward_hook(forward_hook)
    assert not is_fused(net)


def test_models_that_compute_only_the_velocity():
    assert not is_fused(random_model("dit-tiny"))
    assert random_model(backend="reference").unfused_reason() is None
    assert random_model().unfused_reason("reference") is None
    two_backends = random_model(backend="reference").unfused_reason("cpu")
    assert two_backends == "its decoder uses backend 'reference', the loss 'cpu'"
    assert "interaction 'add'" in random_model(interaction="add").unfused_reason()
    assert "decoder_patch 2" in random_model(decoder_patch=2).unfused_reason()
    assert random_model(channels=1).unfused_reason() == "its decoder has 1 channels, not 3"
    twin = published.eager_twin(random_model())
    assert twin.unfused_reason() == "the forward of its decoder has been replaced"
    twin.decoder = nn.Identity()
    assert twin.unfused_reason() == "its decoder is no PixelDecoder but a module Identity"
    replaced = random_model()
    replaced.decoder.forward = replaced.decoder.forward
    assert replaced.unfused_reason() == "the forward of its decoder has been replaced"

    class Scaled(type(replaced)):
        def forward(self, x, t, y):
            return 2 * super().forward(x, t, y)

    assert Scaled(**replaced.config).unfused_reason() == "its forward has been replaced"


def test_two_ops_are_logged_once_and_refused_where_one_is_demanded(caplog):
    net = random_model(decoder_patch=4)
    with caplog.at_level("INFO", "deco_kernels"):
        losses_of(net), losses_of(net)
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "as two ops" in line and "decoder_patch 4" in line]) == 1
    with pytest.raises(ValueError, match="fused: expected None or False .* decoder_patch 4"):
        losses_of(net, fused=True)
    with pytest.raises(ValueError, match="fused: expected None or False .* DiT is neither a DeCo model"):
        losses_of(random_model("dit-tiny"), fused=True)
    with pytest.raises(TypeError, match="fused: expected None, True or False, got 1"):
        objective(fused=1)


def test_a_decoder_without_the_op_refuses_the_loss():
    net = random_model(interaction="add")
    x, y = batch(net)
    with pytest.raises(ValueError, match="loss: expected None for a decoder with decoder_patch > 1 or interaction"):
        net(x, torch.rand(len(x)), y, loss=model.TrainingLoss(x, WEIGHT))
    with pytest.raises(TypeError, match="loss: expected a TrainingLoss or None, got Tensor"):
        random_model()(x, torch.rand(len(x)), y, loss=x)


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel_models(one_process_group):
    """DDP passes the loss on; FSDP2 gathers the decoder's parameters, and its hooks take any output."""
    net = random_model()
    expected = gradients_of(net)[1]
    wrapped = nn.parallel.DistributedDataParallel(net)
    assert is_fused(wrapped)
    for name, gradient in gradients_of(wrapped)[1].items():
        assert relative_error(gradient, expected[name.removeprefix("module.")]) <= 1e-6, name
    sharded = random_model()
    mesh = dist.init_device_mesh("cpu", (1,))
    fully_shard(sharded.decoder, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert is_fused(sharded)
    for name, gradient in gradients_of(sharded)[1].items():
        assert relative_error(gradient.full_tensor(), expected[name]) <= 1e-6, name
    wrapped.register_forward_hook(forward_hook)
    assert not is_fused(wrapped)
