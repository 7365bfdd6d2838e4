"""From prompts to samples: trains a tiny text-to-image model on encoded prompts and samples with every solver."""

import pytest
import torch

from deco_kernels import flow, model, ops
from tests.installed import installed
from tests.tiny_qwen3 import HIDDEN, save_tiny_qwen3

installed("transformers")
COLORS = {"red": (0.8, -0.6, -0.6), "green": (-0.6, 0.7, -0.5), "blue": (-0.6, -0.5, 0.9), "grey": (0.1, 0.1, 0.1)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(network, encoder, losses of 20 steps): four prompts, each with a flat image of the color it names."""
    folder = save_tiny_qwen3(tmp_path_factory.mktemp("qwen3"))
    encoder = model.Qwen3TextEncoder(folder, max_length=12, width=HIDDEN, dtype=torch.float32)
    features = encoder([f"a {color} cat" for color in COLORS]).repeat(2, 1, 1)
    images = torch.tensor(list(COLORS.values())).repeat(2, 1)[:, :, None, None].expand(-1, -1, 32, 32).contiguous()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = model.build("deco-text-tiny", text_width=HIDDEN, text_length=12)
    objective = flow.Objective(
        ops.jpeg_frequency_weight(85), shift=2.0, label_dropout=0.25, null_label=encoder.empty_prompt
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(20):
        optimizer.zero_grad()
        total = objective(net, images, features, generator)["total"]
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return net, encoder, losses


def test_training_lowers_the_loss_and_reaches_every_parameter(trained):
    net, _, losses = trained
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not missing, missing


@pytest.mark.parametrize("solver", sorted(flow.SOLVERS))
def test_sampling_from_prompts(trained, solver):
    net, encoder, _ = trained
    cond = encoder(["a red cat", "a blue cat"])
    uncond = encoder.empty_prompt.expand_as(cond)
    noise = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    options = dict(solver=solver, steps=4, guidance=4.0, shift=3.0)
    samples = flow.Sampler(net, **options)(noise, cond, uncond)
    assert samples.shape == noise.shape and samples.isfinite().all()
    other = flow.Sampler(net, **options)(noise, cond.flip(0), uncond)
    assert not torch.allclose(samples, other)
