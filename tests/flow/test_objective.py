"""The objective: losses by formula, inputs of the model, label dropping."""

import math

import pytest
import torch
from torch import nn

from deco_kernels import flow, ops
from tests.random_models import random_model


class Recorder(nn.Module):
    """Returns a scaled input and records its arguments."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, y, features_after=None):
        self.x, self.t, self.y, self.block = x, t, y, features_after
        velocity = self.scale * x
        return velocity if features_after is None else (velocity, x.flatten(2)[:, :, :5])


def images(batch=4, size=16):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_losses_by_formula():
    weight, x, y = ops.jpeg_frequency_weight(100), images(), torch.arange(4)
    model, objective = Recorder(), flow.Objective(weight, 0.5)
    losses = objective(model, x, y, torch.Generator().manual_seed(5))
    t = losses["t"]
    assert torch.equal(model.t, t) and torch.equal(model.y, y)
    assert list(losses) == ["total", "pixel", "frequency", "t"]
    assert all(losses[name].shape == () for name in ("total", "pixel", "frequency"))
    factor = t.reshape(-1, 1, 1, 1)
    noise = (model.x - factor * x) / (1 - factor)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    difference = model.scale * model.x - (x - noise)
    torch.testing.assert_close(losses["pixel"], difference.square().mean(), rtol=1e-4, atol=0)
    # At quality 100 the weights are 1, and the orthonormal transform keeps the squared error of YCbCr.
    matrix = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    ycbcr = torch.einsum("ij,bjhw->bihw", matrix, difference)
    torch.testing.assert_close(losses["frequency"], ycbcr.square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["total"], losses["pixel"] + 0.5 * losses["frequency"])
    losses["total"].backward()
    assert model.scale.grad is not None


def test_same_generator_same_losses():
    objective = flow.Objective(ops.jpeg_frequency_weight(85), label_dropout=0.5, null_label=10)
    model, x, y = random_model(), images(size=32), torch.arange(4)
    first, second = (objective(model, x, y, torch.Generator().manual_seed(2)) for _ in range(2))
    other = objective(model, x, y, torch.Generator().manual_seed(3))
    assert torch.equal(first["total"], second["total"]) and torch.equal(first["t"], second["t"])
    assert not torch.equal(first["total"], other["total"])


def test_alignment_loss_is_added():
    class Alignment(nn.Module):
        block, weight = 8, 0.5

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, features, x):
            assert features.shape == (4, 3, 5) and x.shape == (4, 3, 16, 16)
            return self.gain * features.square().mean()

    objective, model = flow.Objective(ops.jpeg_frequency_weight(85), repa=Alignment()), Recorder()
    losses = objective(model, images(), torch.arange(4), torch.Generator().manual_seed(5))
    assert model.block == 8 and len(list(objective.parameters())) == 1
    assert list(losses) == ["total", "pixel", "frequency", "repa", "t"]
    torch.testing.assert_close(losses["total"], losses["pixel"] + losses["frequency"] + 0.5 * losses["repa"])
    losses["total"].backward()
    assert objective.repa.gain.grad is not None


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.2, 1.0])
def test_label_dropping_rate(probability):
    count = 20_000
    y = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(0))
    kept = y.clone()
    dropped = flow.drop_labels(y, 10, probability, torch.Generator().manual_seed(1))
    assert torch.equal(y, kept) and dropped.dtype == y.dtype
    null = dropped == 10
    assert torch.equal(dropped[~null], y[~null])
    assert abs(null.float().mean().item() - probability) <= 4 * math.sqrt(probability * (1 - probability) / count)


def test_objective_drops_labels():
    objective = flow.Objective(ops.jpeg_frequency_weight(85), label_dropout=1.0, null_label=10)
    model = Recorder()
    objective(model, images(), torch.arange(4))
    assert model.y.tolist() == [10] * 4


def test_dropped_text_becomes_the_empty_prompt():
    """Whole prompts are replaced at the requested rate, by the same draws as labels; features keep their dtype."""
    features = torch.randn(2000, 3, 4, dtype=torch.bfloat16)
    empty = torch.full((3, 4), 7.0)
    kept = features.clone()
    dropped = flow.drop_labels(features, empty, 0.2, torch.Generator().manual_seed(1))
    labels = flow.drop_labels(torch.arange(2000), -1, 0.2, torch.Generator().manual_seed(1))
    null = labels == -1
    assert torch.equal(features, kept) and dropped.dtype == features.dtype and 300 < null.sum() < 500
    assert (dropped[null] == 7).all() and torch.equal(dropped[~null], features[~null])


def test_objective_with_text_features():
    features, empty = torch.randn(4, 3, 5), torch.randn(3, 5)
    objective = flow.Objective(ops.jpeg_frequency_weight(85), label_dropout=1.0, null_label=empty)
    model = Recorder()
    objective(model, images(), features)
    assert torch.equal(model.y, empty.expand(4, 3, 5))
    assert not objective.state_dict() and objective.to(torch.float64).null_label.dtype == torch.float64


def test_bad_options():
    weight = ops.jpeg_frequency_weight(85)
    with pytest.raises(ValueError, match="null_label: .*, got None; pass model.null_label"):
        flow.Objective(weight, label_dropout=0.1)
    with pytest.raises(ValueError, match="backend: unknown name 'gpu'; use one of 'auto'"):
        flow.Objective(weight, backend="gpu")
    with pytest.raises(ValueError, match="label_dropout"):
        flow.Objective(weight, label_dropout=1.1, null_label=10)
    with pytest.raises(ValueError, match=r"null_label: expected the shape of one condition, \[3, 5\], got \[5\]"):
        flow.drop_labels(torch.zeros(2, 3, 5), torch.zeros(5), 0.1)
    with pytest.raises(ValueError, match="probability"):
        flow.drop_labels(torch.arange(3), 10, -0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_labels_out_of_range_never_pass(name, dropout, wrapped):
    """They are rejected even if all labels are dropped and the model does not see them."""
    net = random_model(name)
    wrapper = nn.Module()
    wrapper.module, wrapper.forward = net, net.forward
    objective = flow.Objective(ops.jpeg_frequency_weight(85), label_dropout=dropout, null_label=net.null_label)
    for wrong in ([0, 1, 2, 11], [0, -1, 2, 3]):
        with pytest.raises(ValueError, match=r"y: expected labels from 0 to 10 \(the null class\), got labels from"):
            objective(wrapper if wrapped else net, images(size=32), torch.tensor(wrong))
    assert objective(wrapper if wrapped else net, images(size=32), torch.tensor([0, 1, 9, 10]))["total"].isfinite()
    assert objective(net, images(size=32)[:0], torch.empty(0, dtype=torch.int64))["t"].shape == (0,)


def test_images_and_conditions_that_are_none():
    objective = flow.Objective(ops.jpeg_frequency_weight(85), label_dropout=0.5, null_label=10)
    model, x, y = Recorder(), images(), torch.arange(4)
    said = r"x: expected floating-point images in \[-1, 1\], got torch.uint8; convert 8-bit ones: x.float\(\) / 127.5"
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(TypeError, match=said):
        objective(model, pixels, y)
    with pytest.raises(TypeError, match=said):
        objective.losses(model, pixels, y, torch.rand(4), x)
    with pytest.raises(TypeError, match="x: expected a torch.Tensor, got ndarray"):
        objective(model, x.numpy(), y)
    with pytest.raises(TypeError, match="y: expected a torch.Tensor, got list; pass a tensor"):
        objective(model, x, [0, 1, 2, 3])
    with pytest.raises(TypeError, match="frequency_weight: expected a torch.Tensor, got int"):
        flow.Objective(85)


def test_draws_per_image_make_a_batch():
    objective, x, y = flow.Objective(ops.jpeg_frequency_weight(85)), images(), torch.arange(4)
    draws = [objective.draw(x[i : i + 1], y[i : i + 1], torch.Generator().manual_seed(i)) for i in range(4)]
    labels, t, noise = (torch.cat(parts) for parts in zip(*draws, strict=True))
    assert torch.equal(labels, y) and t.shape == (4,) and noise.shape == x.shape
    model = Recorder()
    together = objective.losses(model, x, labels, t, noise)["pixel"]
    alone = [objective.losses(model, x[i : i + 1], *draws[i])["pixel"] for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone).mean())
