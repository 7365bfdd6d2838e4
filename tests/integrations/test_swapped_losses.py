"""A swapped model whose decoder computes the training losses: same losses and gradients, and where it cannot."""

import copy

import pytest
import torch
from torch import nn

from deco_kernels import flow, model, ops
from deco_kernels.integrations import swap_decoder
from deco_kernels.testing.published_model import PublishedDeCo
from tests.golden_files import relative_error
from tests.integrations.published import published_model
from tests.random_models import random_batch

WEIGHT = ops.jpeg_frequency_weight(85)
SMALL = dict(width=24, depth=1, heads=2)


def swapped_model(**sizes) -> nn.Module:
    net = published_model(**sizes)
    swap_decoder(net)
    return net


def losses_of(net: nn.Module, fused: bool | None, **options) -> dict[str, torch.Tensor]:
    x, _, y = random_batch()
    return flow.Objective(WEIGHT, 0.7, fused=fused, **options)(net, x, y, torch.Generator().manual_seed(1))


def gradients_of(net: nn.Module, fused: bool | None, **options):
    losses = losses_of(net, fused, **options)
    net.zero_grad(set_to_none=True)
    losses["total"].backward()
    return losses, {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("sizes", [{}, dict(patch_size=4, decoder_width=16)])
def test_losses_and_gradients_are_those_of_the_model_before_the_swap(sizes):
    net = published_model(**sizes)
    expected, expected_gradients = gradients_of(net, None)
    swap = swap_decoder(net)
    losses, gradients = gradients_of(net, None)
    assert not losses["pixel"].requires_grad and expected["pixel"].requires_grad
    assert list(losses) == list(expected)
    for key, loss in losses.items():
        assert relative_error(loss, expected[key]) <= 1e-5, key
    for name, gradient in expected_gradients.items():
        assert gradient.any() and relative_error(gradients[name], gradient) <= 1e-5, name
    with torch.no_grad():
        assert relative_error(losses_of(net, True)["total"], losses["total"]) <= 1e-6
    swap.undo()
    assert "forward" not in vars(net) and losses_of(net, None)["pixel"].requires_grad


def test_the_default_device_does_not_matter():
    net, batch = swapped_model(), random_batch()
    with torch.device("meta"):
        assert net.unfused_reason(None, *batch) is None


def test_an_image_that_is_given_by_name():
    net, (x, t, y) = swapped_model(), random_batch()
    loss = model.TrainingLoss(torch.zeros_like(x), WEIGHT)
    with pytest.raises(TypeError, match="x: expected the noised image as the first argument by position"):
        net(x=x, t=t, y=y, loss=loss)


def test_autocast_and_copies():
    net = copy.deepcopy(swapped_model())
    with torch.autocast("cpu", torch.bfloat16):
        losses, gradients = gradients_of(net, True)
        expected, expected_gradients = gradients_of(net, False)
    eps = torch.finfo(torch.bfloat16).eps  # the two ops round the velocity and its gradient; the loss is a mean
    assert losses["total"].dtype is torch.float32
    assert relative_error(losses["total"], expected["total"]) <= eps / 16
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) <= 2 * eps, name


@pytest.mark.parametrize("half", [False, True])
def test_checks_leave_no_casts_of_weights_for_training(half):
    """PyTorch 2.9 keeps autocast's casts from calls without gradients, and weights that use them get none."""
    net, (x, t, y) = swapped_model(), random_batch()
    calls = []

    def note(*_):
        calls.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))

    net.t_embedder.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        if half:
            net.encode(x, t, y)
        else:
            losses_of(net, True)
    assert calls == ([(True, True), (False, False)] if half else [(False, False), (True, True)])
    assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled()


class Alignment(nn.Module):
    block, weight = 1, 0.5

    def forward(self, features, x):
        return features.square().mean()


class WithFeatures(PublishedDeCo):
    """A forward that also returns the result of a trunk block."""

    def forward(self, x, t, y, features_after=None):
        if features_after is None:
            return super().forward(x, t, y)
        found = []
        handle = self.blocks[features_after - 1].register_forward_hook(lambda *call: found.append(call[2]))
        velocity = super().forward(x, t, y)
        handle.remove()
        return velocity, found[0]


def test_alignment():
    net = WithFeatures(**SMALL)
    net.load_state_dict(published_model(depth=1).state_dict())
    swap_decoder(net)
    losses, gradients = gradients_of(net, True, repa=Alignment())
    expected, expected_gradients = gradients_of(net, False, repa=Alignment())
    assert relative_error(losses["repa"], expected["repa"]) <= 1e-6
    assert relative_error(losses["total"], expected["total"]) <= 1e-6
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) <= 1e-5, name


def test_empty_batch():
    net = swapped_model()
    x, t, y = random_batch()
    total, *_ = net(x[:0], t[:0], y[:0], loss=model.TrainingLoss(x[:0], WEIGHT))
    total.backward()
    assert total == 0 and not net.dec_net.cond_embed.weight.grad.any()


@pytest.mark.long
def test_compiled_in_place_without_graph_break():
    net = swapped_model(depth=1)
    expected, expected_gradients = gradients_of(net, True)
    net.compile(fullgraph=True, backend="aot_eager")
    losses, gradients = gradients_of(net, True)
    assert relative_error(losses["total"], expected["total"]) <= 1e-6
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) <= 1e-5, name
    torch.compiler.reset()


# --- where the decoder cannot compute them ---------------------------------------------------------------------------


class Another(PublishedDeCo):
    """A forward that differs from the published one around the decoder."""

    def __init__(self, changed):
        super().__init__(**SMALL)
        self.changed = changed

    def forward(self, x, t, y):
        if self.changed == "pixels":
            return super().forward(2 * x, t, y)
        if self.changed == "dtype of pixels":
            return super().forward(x.double(), t, y).float()
        if self.changed == "calls":
            return super().forward(x, t, y) + super().forward(x, t, y)
        velocity = super().forward(x, t, y)
        return 2 * velocity if self.changed == "result" else velocity.bfloat16()


DIFFERENCES = {
    "pixels": "got other pixels",
    "dtype of pixels": "to pass pixels of dtype torch.float32, .* got torch.float64",
    "calls": "got 2 calls",
    "result": "got another result",
    "dtype of result": "to return an image of dtype torch.float32, .* got torch.bfloat16",
}


@pytest.mark.parametrize("changed", DIFFERENCES)
def test_a_forward_that_differs_around_the_decoder(changed, caplog):
    """Two ops compute its losses, which the log says, unless one op is demanded."""
    net = Another(changed)
    net.load_state_dict(published_model(depth=1).state_dict())
    if changed == "dtype of pixels":
        net.double()
    swap_decoder(net)
    with caplog.at_level("INFO", "deco_kernels"):
        losses, expected = losses_of(net, None), losses_of(net, False)
    assert losses["pixel"].requires_grad and torch.equal(losses["total"], expected["total"])
    said = [record.getMessage() for record in caplog.records if "as two ops" in record.getMessage()]
    assert len(said) == 1 and "its forward is expected" in said[0]
    with pytest.raises(ValueError, match=f"fused: expected None or False .* {DIFFERENCES[changed]}"):
        losses_of(net, True)
    x, t, y = random_batch()
    with pytest.raises(ValueError, match="loss: expected None, got a TrainingLoss"):
        net(x, t, y, loss=model.TrainingLoss(x, WEIGHT))


def test_reasons_for_two_ops():
    inputs = random_batch()
    net = published_model()
    swap_decoder(net, backend="reference")
    assert net.unfused_reason("cpu", *inputs) == "its decoder uses backend 'reference', the loss 'cpu'"
    assert net.unfused_reason("reference", *inputs) is None
    assert swapped_model(channels=1).unfused_reason(None, *inputs) == "its decoder has 1 channels, not 3"
    for module, name in ((net, "the model"), (net.dec_net, "dec_net")):
        handle = module.register_forward_hook(lambda module, inputs, output: None)
        assert net.unfused_reason(None, *inputs) == f"a hook on {name} awaits the velocity"
        handle.remove()
    with pytest.raises(TypeError, match="loss: expected a TrainingLoss or None, got Tensor"):
        net(*inputs, loss=inputs[0])


def test_the_check_leaves_no_trace():
    """Neither random numbers nor gradients nor a forward of its own in later calls."""
    net = swapped_model()
    calls = []
    net.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    state = torch.random.get_rng_state()
    losses_of(net, None), losses_of(net, None)
    assert calls == [False, True, True] and torch.equal(torch.random.get_rng_state(), state)


def test_a_forward_with_its_own_loss_argument_is_left_alone():
    class WithLoss(PublishedDeCo):
        def forward(self, x, t, y, loss=0.0):
            return super().forward(x, t, y) + loss

    net, batch = WithLoss(**SMALL), random_batch()
    swap_decoder(net)
    assert torch.equal(net(*batch, loss=1.0), net(*batch) + 1)
    assert losses_of(net, None)["pixel"].requires_grad
