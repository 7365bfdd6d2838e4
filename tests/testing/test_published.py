"""The published formulation in eager PyTorch: position features, and agreement with the fused ops."""

import pytest
import torch

from deco_kernels import flow, ops, testing
from deco_kernels.testing import published
from tests.random_models import random_model


def test_position_features():
    features = published.position_features(16).reshape(16, 16, 8, 8)
    frequencies = torch.linspace(0, 8, 8)
    ky, kx, i, j = 3, 11, 5, 2
    in_x = torch.cos(torch.pi * frequencies[i] * kx / 15)
    in_y = torch.cos(torch.pi * frequencies[j] * ky / 15)
    torch.testing.assert_close(features[ky, kx, i, j], in_x * in_y / (1 + frequencies[i] * frequencies[j]))


def losses_and_gradients(network, objective, x, y):
    losses = objective(network, x, y, torch.Generator().manual_seed(3))
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(losses["total"], list(parameters.values()))
    return losses, dict(zip(parameters, gradients, strict=True))


def test_eager_contender_computes_the_same_function():
    """In float64 the fused ops and the published formulation agree to rounding, for every loss and gradient."""
    network = random_model(num_classes=2).double()
    twin = published.eager_twin(network)
    x = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    weight = ops.jpeg_frequency_weight()
    fused, fused_gradients = losses_and_gradients(network, flow.Objective(weight.double(), 0.3), x, y)
    eager, eager_gradients = losses_and_gradients(twin, published.EagerObjective(weight, 0.3), x, y)
    for name in ("total", "pixel", "frequency"):
        assert eager[name].item() == pytest.approx(fused[name].item(), rel=1e-12)
    assert fused_gradients.keys() == eager_gradients.keys()
    for name, gradient in fused_gradients.items():
        assert gradient.abs().max() > 0, name
        assert testing.relative_error(eager_gradients[name], gradient) < 1e-10, name


def test_eager_contender_runs_no_fused_op(monkeypatch):
    network = published.eager_twin(random_model(num_classes=1))
    for name in ("pixel_decoder", "pixel_decoder_from_tokens", "flow_matching_loss", "frequency_loss"):
        monkeypatch.setattr(ops, name, None)
    x = torch.randn(1, 3, 32, 32)
    losses, _ = losses_and_gradients(network, published.EagerObjective(torch.ones(3, 8, 8)), x, torch.tensor([0]))
    assert losses["total"] > 0


class Identity(torch.nn.Module):
    """A model with parameters, as the objective expects."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, t, y):
        return x


def test_eager_objective_draws_on_the_device_of_the_images():
    """The device without data stands for a GPU."""
    objective, images = published.EagerObjective(torch.ones(3, 8, 8)).to("meta"), torch.zeros(2, 3, 8, 8, device="meta")
    assert objective(Identity(), images, torch.zeros(2, device="meta"))["total"].device.type == "meta"
