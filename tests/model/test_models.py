"""DeCo, the plain DiT and the presets: sizes, initialization, attention, rectangular images, dtypes, bad input."""

import copy
import math

import numpy as np
import pytest
import torch

from deco_kernels import model, testing
from deco_kernels.model.dit import Attention, RMSNorm
from deco_kernels.model.position import pair_rotation, rotate_pairs
from tests.golden_files import relative_error
from tests.random_models import random_batch, random_model, randomize


@pytest.mark.parametrize(
    ("name", "parameters", "mlp_width"),
    [
        ("deco-l/16", 426_938_019, 2730),
        ("deco-xl/16", 682_282_851, 3072),
        ("dit-xl/16", 676_360_128, 3072),
        ("deco-xxl/16", 1_133_759_395, 6144),
    ],
)
def test_published_parameter_counts(name, parameters, mlp_width):
    with torch.device("meta"):
        net = model.build(name)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert net.trunk.blocks[0].mlp.w2.in_features == mlp_width
    assert name == "deco-xxl/16" or net.null_label == 1000


@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny", "deco-demo"])
def test_fresh_model_returns_zero(name):
    net = model.build(name)
    x, t, _ = random_batch()
    y = torch.tensor([0, net.null_label])
    output = net(x, t, y)
    assert output.shape == x.shape and not output.any()
    assert net.trunk.blocks[0].modulation.weight.any()
    assert net.trunk.label_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert net.trunk.time_embed.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    patch_embed = net.trunk.patch_embed
    assert not patch_embed.bias.any()
    assert patch_embed.weight.std().item() == pytest.approx(math.sqrt(2 / sum(patch_embed.weight.shape)), rel=0.05)


def test_build_overrides_and_config():
    net = model.build("deco-tiny", decoder_width=16, decoder_depth=1, decoder_patch=4, interaction="add", num_classes=3)
    assert net.decoder.width == 16 and net.decoder.depth == 1 and net.decoder.interaction == "add"
    again = model.DeCo(**net.config)
    again.load_state_dict(net.state_dict())


def test_build_errors():
    with pytest.raises(ValueError, match=r"name: expected one of \['deco-l/16'.*got 'deco-s'"):
        model.build("deco-s")
    with pytest.raises(TypeError, match=r"unknown options \['decoder_size'\]; DeCo accepts .*'decoder_width'"):
        model.build("deco-tiny", decoder_size=64)
    with pytest.raises(TypeError, match=r"unknown options \['decoder_width'\]; DiT accepts"):
        model.build("dit-tiny", decoder_width=64)
    with pytest.raises(ValueError, match="heads: expected width / heads to be a multiple of 4"):
        model.build("deco-tiny", heads=5)
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        model.build("deco-tiny", depth=0)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("deco-tiny", size) for size in ("width", "depth", "heads", "num_classes", "patch_size", "channels")),
        *(("deco-tiny", size) for size in ("mlp_width", "decoder_width", "decoder_depth", "decoder_patch")),
        *(("deco-text-tiny", size) for size in ("width", "text_depth", "text_length", "mlp_width", "decoder_width")),
        *(("dit-tiny", size) for size in ("width", "mlp_width")),
    ],
)
def test_sizes_are_integers(name, size):
    for wrong, said in (("a", r"'a' \(str\)"), (1.5, r"1.5 \(float\)"), (True, r"True \(bool\)")):
        with pytest.raises(TypeError, match=f"^{size}: expected an int, got {said}; pass an integer"):
            model.build(name, **{size: wrong})
    with pytest.raises(ValueError, match=f"^{size}: expected at least 1, got 0"):
        model.build(name, **{size: 0})


def test_sizes_may_be_integers_of_numpy(tmp_path):
    net = model.build("deco-tiny", depth=np.int64(3), decoder_width=np.int32(16))
    model.save_model(net, tmp_path / "model.ckpt")
    assert model.load_model(tmp_path / "model.ckpt").config == net.config


def rms_normalized(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def assert_rounded_once(actual, exact):
    """As near to the float64 result as its rounding to the dtype of `actual`; a second rounding adds some 40 %."""
    assert relative_error(actual, exact) <= 1.02 * relative_error(exact.to(actual.dtype), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_in_16_bits_rounds_once(dtype):
    """With float32 weights, and values whose squares overflow float16."""
    norm = randomize(RMSNorm(64))
    x = (300 * torch.randn(50, 64)).to(dtype)
    actual = norm(x)
    assert actual.dtype is dtype
    assert_rounded_once(actual, rms_normalized(x.double(), norm.weight.double()))


def test_queries_and_keys_in_16_bits_round_once():
    attention, rotation = randomize(Attention(24, 2)), pair_rotation(model.rotary_angles(2, 3, 12))
    x = torch.randn(40, 6, 24).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention.queries_keys_values(x, rotation)
        parts = attention.qkv(x).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    assert torch.equal(found[2], parts[2])
    for actual, part, norm in zip(found, parts, (attention.q_norm, attention.k_norm), strict=False):
        assert actual.dtype is torch.bfloat16
        exact = rms_normalized(part.double(), norm.weight.double())
        assert_rounded_once(actual, rotate_pairs(exact, rotation.double()))


@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny"])
def test_every_parameter_matters(name):
    net = random_model(name)
    x, t, y = random_batch()
    net(x.requires_grad_(), t, y).square().sum().backward()
    assert x.grad.any()
    assert not [key for key, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]


def test_rotary_angles_of_a_rectangle():
    rows, columns, head_dim = 3, 5, 12
    angles = model.rotary_angles(rows, columns, head_dim)
    assert angles.shape == (15, 6)
    row, column, m = 2, 3, 1
    frequency = 10000 ** (-4 * m / head_dim)
    token = angles[row * columns + column]
    assert token[2 * m].item() == pytest.approx(16 * column / (columns - 1) * frequency, rel=1e-6)
    assert token[2 * m + 1].item() == pytest.approx(16 * row / (rows - 1) * frequency, rel=1e-6)


@pytest.mark.parametrize("compiling", [False, True])
def test_pairs_of_channels_are_rotated(monkeypatch, compiling):
    """By either formula, that of torch.compile without complex numbers, and of any strides."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, angles = torch.randn(2, 3, 15, 12, dtype=torch.float64), model.rotary_angles(3, 5, 12).double()
    a, b, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
    rotated = rotate_pairs(x, pair_rotation(angles))
    torch.testing.assert_close(rotated[..., ::2], a * cos - b * sin)
    torch.testing.assert_close(rotated[..., 1::2], b * cos + a * sin)
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(rotate_pairs(strided, pair_rotation(angles)), rotated)


def test_attention_by_formula():
    """Queries, keys and values head by head, softmax written out, in float64."""
    width, heads, length = 24, 2, 6
    attention = randomize(Attention(width, heads).double())
    x, rotation = torch.randn(1, length, width).double(), pair_rotation(model.rotary_angles(2, 3, 12).double())
    q, k, v = (x[0] @ attention.qkv.weight.T).split(width, dim=1)
    results = []
    for head in range(heads):
        part = slice(head * 12, head * 12 + 12)

        def position(u, norm):
            u = u / torch.sqrt(u.square().mean(1, keepdim=True) + 1e-6) * norm.weight
            return rotate_pairs(u, rotation)

        scores = position(q[:, part], attention.q_norm) @ position(k[:, part], attention.k_norm).T / math.sqrt(12)
        results.append(scores.softmax(1) @ v[:, part])
    expected = torch.cat(results, dim=1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x, rotation)[0], expected)


@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny"])
def test_transposed_sizes_are_not_confused(name):
    """Wide images, the same batch split, and tall images: shapes are right and images do not mix."""
    net = random_model(name)
    for height, width in ((16, 64), (64, 16), (48, 32)):
        x, t, y = random_batch(2, height, width)
        with torch.no_grad():
            both = net(x, t, y)
            single = net(x[1:], t[1:], y[1:])
        assert both.shape == x.shape and relative_error(both[1:], single) < 1e-5


@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny"])
def test_views_and_autocast(name):
    net = random_model(name)
    x, t, y = random_batch()
    with torch.no_grad():
        expected = net(x, t, y)
        view = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        torch.testing.assert_close(net(view, t, y), expected)
    options = {"backend": "reference"} if name == "deco-tiny" else {}
    check_dtypes(net, random_model(name, **options), (x, t, y))


@torch.no_grad()
def check_dtypes(net, eager, inputs):
    """float32 against float64, and bfloat16, by autocast and by parameters, against the same model in eager PyTorch."""
    exact = copy.deepcopy(eager).double()(*(each.double() if each.is_floating_point() else each for each in inputs))
    assert relative_error(net(*inputs), exact) < 1e-5

    def in_bfloat16(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            by_autocast = model(*inputs)
        return by_autocast, copy.deepcopy(model).bfloat16()(*inputs)

    for found, own in zip(in_bfloat16(net), in_bfloat16(eager), strict=True):
        error = relative_error(own, exact)
        assert found.dtype == own.dtype == torch.bfloat16 and error > 1e-4
        assert relative_error(found, exact) <= testing.error_bound(torch.bfloat16, error, gradient=False)


def test_compiles_to_one_graph_and_trains_under_autocast():
    net = random_model()
    x, t, y = random_batch()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (net, compiled):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run(x, t, y).float().square().mean()
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    assert all(relative_error(b, a) < torch.finfo(torch.bfloat16).eps for a, b in zip(*gradients, strict=True))


def test_averaged_copy_samples_like_the_model():
    net = random_model()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(net)
    x, t, y = random_batch()
    with torch.no_grad():
        assert torch.equal(average(x, t, y), net(x, t, y))


def test_features_after_a_block():
    net = random_model(depth=3)
    x, t, y = random_batch()
    with torch.no_grad():
        velocity, features = net(x, t, y, features_after=2)
        assert torch.equal(velocity, net(x, t, y)) and features.shape == (2, 6, 24)
        net.trunk.blocks[2].modulation.weight.zero_()
        assert torch.equal(net(x, t, y, features_after=2)[1], features)
    for block in (0, 4):
        with pytest.raises(ValueError, match="features_after: expected a block from 1 to 3"):
            net(x, t, y, features_after=block)


@pytest.mark.parametrize("of_model", [False, True])
def test_float64_of_image_and_parameters_goes_together(of_model):
    net, x, t, y = model.build("deco-tiny"), torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 2])
    net, x = (net.double(), x) if of_model else (net, x.double())
    parameters, image = ("float64", "float32") if of_model else ("float32", "float64")
    with pytest.raises(
        TypeError, match=f"^x: expected torch.{parameters} like the model's parameters, got torch.{image}"
    ):
        net(x, t, y)


@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 3, 32, 40)), ValueError, "x: expected height and width to be positive multiples"),
        (dict(x=torch.zeros(2, 3, 0, 32)), ValueError, "x: expected height and width to be positive multiples"),
        (dict(x=torch.zeros(2, 1, 32, 32)), ValueError, r"x: expected images \[B, 3, H, W\]"),
        (dict(x=torch.zeros(3, 32, 32)), ValueError, r"x: expected images .*, got shape \(3, 32, 32\); add the batch"),
        (dict(x=torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), TypeError, "x and t: expected floating-point.*127.5"),
        (dict(x=None), TypeError, "x: expected a torch.Tensor, got NoneType"),
        (dict(t=0.5), TypeError, "t: expected a torch.Tensor, got float"),
        (dict(y=[1, 2]), TypeError, "y: expected a torch.Tensor, got list"),
        (dict(t=torch.zeros(())), ValueError, r"t: expected shape \(2,\) .*; pass one time per image"),
        (dict(y=torch.zeros(3, dtype=torch.int64)), ValueError, "y: expected shape .*; pass one label per image"),
        (dict(y=torch.zeros(2)), TypeError, "y: expected int64 or int32 labels, got torch.float32; convert them"),
        (dict(y=torch.tensor([3, 11])), ValueError, "y: expected labels from 0 to 10 .*, got .* 3 to 11"),
        (dict(y=torch.tensor([-1, 3], dtype=torch.int32)), ValueError, "y: expected labels from 0 to 10 .* -1 to 3"),
    ],
)
def test_bad_inputs(name, change, error, message):
    net = model.build(name)
    inputs = dict(x=torch.zeros(2, 3, 32, 32), t=torch.zeros(2), y=torch.zeros(2, dtype=torch.int64))
    net(**inputs)
    with pytest.raises(error, match=message):
        net(**{**inputs, **change})
