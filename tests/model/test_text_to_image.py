"""The text-to-image model: initialization, attention, rotary modes, gradients, dtypes, bad input."""

import math

import pytest
import torch

from deco_kernels import model
from deco_kernels.model.position import pair_rotation, rotate_pairs
from deco_kernels.model.text_to_image import TextAttention
from tests.golden_files import relative_error
from tests.model.test_models import check_dtypes
from tests.random_models import random_batch, random_model, randomize

LENGTH, WIDTH = 7, 20  # of the text features of the preset "deco-text-tiny"


def text_batch(batch=2, height=32, width=48):
    """Image, times and text features."""
    x, t, _ = random_batch(batch, height, width)
    return x, t, torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5))


def test_fresh_model():
    net = model.build("deco-text-tiny", text_length=100)
    x, t, _ = random_batch()
    output = net(x, t, torch.randn(2, 100, WIDTH))
    assert output.shape == x.shape and not output.any()
    assert net.trunk.text_position.std().item() == pytest.approx(1, rel=0.1)
    assert net.trunk.blocks[0].modulation.weight.any() and (net.trunk.text_norm.weight == 1).all()
    assert not net.trunk.patch_embed.bias.any()
    again = model.DeCoTextToImage(**net.config)
    again.load_state_dict(net.state_dict())


def test_every_parameter_and_input_matters():
    net = random_model("deco-text-tiny")
    x, t, y = text_batch()
    net(x.requires_grad_(), t, y.requires_grad_()).square().sum().backward()
    assert not [key for key, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # No text position is masked, whatever its features.
    assert x.grad.any() and y.grad.any(dim=2).all()


def test_text_attention_by_formula():
    """Head by head, with explicit softmax, in float64: patches are rotated, text is not; both keys share one norm."""
    width, heads, text_length = 24, 2, 5
    attention = randomize(TextAttention(width, heads).double())
    x, text = torch.randn(1, 6, width, dtype=torch.float64), torch.randn(1, text_length, width, dtype=torch.float64)
    rotation = pair_rotation(model.rotary_angles(2, 3, 12, extent=(3.0, 2.0)).double())
    q, k, v = (x[0] @ attention.qkv.weight.T).split(width, dim=1)
    text_k, text_v = (text[0] @ attention.text_kv.weight.T).split(width, dim=1)

    def normalize(u, norm):
        return u / torch.sqrt(u.square().mean(1, keepdim=True) + 1e-6) * norm.weight

    results = []
    for head in range(heads):
        part = slice(head * 12, head * 12 + 12)
        queries = rotate_pairs(normalize(q[:, part], attention.q_norm), rotation)
        patch_keys = rotate_pairs(normalize(k[:, part], attention.k_norm), rotation)
        keys = torch.cat((normalize(text_k[:, part], attention.k_norm), patch_keys))
        scores = queries @ keys.T / math.sqrt(12)
        results.append(scores.softmax(1) @ torch.cat((text_v[:, part], v[:, part])))
    expected = torch.cat(results, dim=1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x, rotation, text)[0], expected)


@pytest.mark.parametrize(("mode", "x_end", "y_end"), [("published", 2, 3), ("corrected", 3, 2)])
def test_rotary_modes_of_a_rectangle(mode, x_end, y_end):
    """2 rows and 3 columns of patches: columns end at H/p = 2 as published, at W/p = 3 corrected; rows conversely."""
    trunk = model.build("deco-text-tiny", rotary=mode).trunk
    angles = trunk.rotary_angles(2, 3, torch.device("cpu"))
    assert angles.shape == (6, 6)
    assert angles[2, 0].item() == pytest.approx(x_end) and angles[3, 1].item() == pytest.approx(y_end)
    assert angles[1, 0].item() == pytest.approx(x_end / 2) and angles[3, 0] == 0 and angles[2, 1] == 0


def test_rotary_modes_differ_on_rectangles_alone():
    published, corrected = (random_model("deco-text-tiny", rotary=mode) for mode in ("published", "corrected"))
    with torch.no_grad():
        square, wide = text_batch(2, 32, 32), text_batch(2, 32, 48)
        assert torch.equal(published(*square), corrected(*square))
        assert relative_error(published(*wide), corrected(*wide)) > 1e-3
    # A checkpoint does not store the mode; the published one is assumed.
    assert model.from_published(model.to_published(corrected)).trunk.rotary == "published"


def test_batch_entries_do_not_mix():
    net = random_model("deco-text-tiny")
    for height, width in ((16, 64), (64, 16), (48, 32)):
        x, t, y = text_batch(2, height, width)
        with torch.no_grad():
            both, single = net(x, t, y), net(x[1:], t[1:], y[1:])
        assert both.shape == x.shape and relative_error(both[1:], single) < 1e-5


def test_dtypes():
    check_dtypes(*(random_model("deco-text-tiny", backend=name) for name in (None, "reference")), text_batch())


def test_features_after_a_block():
    net = random_model("deco-text-tiny", depth=3)
    x, t, y = text_batch()
    with torch.no_grad():
        velocity, features = net(x, t, y, features_after=2)
        assert torch.equal(velocity, net(x, t, y)) and features.shape == (2, 6, 24)
    with pytest.raises(ValueError, match="features_after: expected a block from 1 to 3, got 4"):
        net(x, t, y, features_after=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 3, 32, 40)), ValueError, "x: expected height and width to be positive multiples"),
        (dict(x=torch.zeros(2, 3, 0, 32)), ValueError, "x: expected height and width to be positive multiples"),
        (dict(t=torch.zeros(3)), ValueError, "t: expected shape"),
        (dict(y="a cat"), TypeError, "y: expected a torch.Tensor, got str"),
        (dict(y=torch.zeros(2, 8, WIDTH)), ValueError, r"y: expected text features \[2, 7, 20\].*\[2, 8, 20\]"),
        (dict(y=torch.zeros(2, 0, WIDTH)), ValueError, "y: expected text features"),
        (dict(y=torch.zeros(2, LENGTH, WIDTH - 1)), ValueError, "y: expected text features"),
        (dict(y=torch.zeros(1, LENGTH, WIDTH)), ValueError, "y: expected text features"),
        (dict(y=torch.zeros(2, dtype=torch.int64)), ValueError, "y: expected text features"),
        (dict(y=torch.zeros(2, LENGTH, WIDTH, dtype=torch.int64)), TypeError, "y: expected floating-point text"),
    ],
)
def test_bad_inputs(change, error, message):
    net = model.build("deco-text-tiny")
    inputs = dict(x=torch.zeros(2, 3, 32, 32), t=torch.zeros(2), y=torch.zeros(2, LENGTH, WIDTH))
    net(**inputs)
    with pytest.raises(error, match=message):
        net(**{**inputs, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rotary="swapped"), r"rotary: expected one of \['published', 'corrected'\], got 'swapped'"),
        (dict(text_depth=0), "text_depth: expected at least 1, got 0"),
        (dict(text_length=0), "text_length: expected at least 1, got 0"),
        (dict(heads=5), "heads: expected width / heads to be a multiple of 4"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        model.build("deco-text-tiny", **options)
