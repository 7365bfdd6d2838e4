"""The alignment loss by formula, and the DINOv2 teacher on a tiny random model."""

import pytest
import torch
import torch.nn.functional as F

from deco_kernels import flow, ops
from tests.random_models import random_model, randomize
from tests.tiny_dinov2 import TEACHER_WIDTH, save_tiny_dinov2


@pytest.fixture(scope="module")
def tiny_dinov2(tmp_path_factory):
    return save_tiny_dinov2(tmp_path_factory.mktemp("dinov2"))


def random_images(height=32, width=48):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_loss_by_formula():
    target = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    seen = []
    alignment = flow.Alignment(8, lambda x: seen.append(x) or target, teacher_width=5, block=1, weight=0.5)
    randomize(alignment)
    features, x = torch.randn(2, 6, 8, requires_grad=True), random_images()
    h = features
    for layer in (0, 2, 4):
        h = F.linear(h if layer == 0 else F.silu(h), *alignment.projector[layer].parameters())
    cosine = (h * target).sum(-1) / (h.norm(dim=-1) * target.norm(dim=-1))
    loss = alignment(features, x)
    torch.testing.assert_close(loss, (1 - cosine).mean())
    assert seen[0] is x and 0 < loss < 2
    loss.backward()
    assert features.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in alignment.parameters())
    assert [tuple(p.shape) for p in alignment.parameters()] == [(8, 8), (8,), (8, 8), (8,), (5, 8), (5,)]


def test_teacher_is_no_part_of_the_module():
    alignment = flow.Alignment(8, torch.nn.Conv2d(3, 5, 16), teacher_width=5)
    assert all(name.startswith("projector.") for name in alignment.state_dict())


def test_teacher_of_another_shape_is_refused():
    alignment = flow.Alignment(8, lambda x: torch.zeros(2, 4, 5), teacher_width=5)
    with pytest.raises(ValueError, match=r"teacher: .*\(2, 6, 5\), got \(2, 4, 5\)"):
        alignment(torch.randn(2, 6, 8), random_images())


def test_dinov2_features_by_formula(tiny_dinov2):
    from transformers import Dinov2Model

    teacher, x = flow.DinoV2Teacher(tiny_dinov2), random_images()
    found = teacher(x)
    assert found.shape == (2, 2 * 3, TEACHER_WIDTH) and teacher.width == TEACHER_WIDTH and not found.requires_grad
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    small = F.interpolate(x / 2 + 0.5, (28, 42), mode="bicubic")
    normalized = (small - mean[:, None, None]) / std[:, None, None]
    network = Dinov2Model.from_pretrained(tiny_dinov2).eval()
    with torch.no_grad():
        expected = network(normalized).last_hidden_state[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny"])
def test_objective_with_dinov2(name, tiny_dinov2):
    teacher = flow.DinoV2Teacher(str(tiny_dinov2))
    model = random_model(name)
    alignment = randomize(flow.Alignment(model.trunk.width, teacher, teacher_width=teacher.width, block=1))
    objective = flow.Objective(ops.jpeg_frequency_weight(85), repa=alignment)
    losses = objective(model, random_images(), torch.arange(2), torch.Generator().manual_seed(3))
    torch.testing.assert_close(losses["total"], losses["pixel"] + losses["frequency"] + 0.5 * losses["repa"])
    losses["total"].backward()
    assert all(p.grad.abs().sum() > 0 for p in alignment.parameters())


def test_missing_teacher(tmp_path):
    with pytest.raises(OSError, match="(?s)no DINOv2 at .*pass its folder"):
        flow.DinoV2Teacher(str(tmp_path / "nowhere"))


def test_teacher_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="(?s)no DINOv2 at 'nobody/no-such-dinov2'.*Without a network"):
        flow.DinoV2Teacher("nobody/no-such-dinov2")
