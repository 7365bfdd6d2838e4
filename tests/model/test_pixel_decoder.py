"""The decoder module: variants vs. formulas written out pixel by pixel, fold, initialization, dtypes."""

import math

import pytest
import torch
import torch.nn.functional as F

from deco_kernels import model, testing
from deco_kernels.testing import published
from tests.golden_files import relative_error
from tests.random_models import randomize


def layer_norm(h):
    centered = h - h.mean()
    return centered / torch.sqrt(centered.square().mean() + 1e-6)


def pixel_by_pixel(decoder, image, tokens):
    """The velocity of one image [C, H, W] in float64, one decoder position at a time, without fold or stacking."""
    w = {name: parameter.detach().double() for name, parameter in decoder.named_parameters()}
    channels, height, width = image.shape
    p, r, dim = decoder.patch_size, decoder.decoder_patch, decoder.width
    grid, image, tokens = p // r, image.double(), tokens.double()
    features = decoder.position_features.double()
    velocity = torch.empty_like(image)
    for top in range(0, height, r):
        for left in range(0, width, r):
            s = tokens[top // p * (width // p) + left // p]
            k = top % p // r * grid + left % p // r
            pixels = image[:, top : top + r, left : left + r].flatten()  # order (channel, row, column)
            y = w["up_weight"][k * dim : (k + 1) * dim] @ s + w["up_bias"][k * dim : (k + 1) * dim]
            h = w["embed_weight"] @ torch.cat((pixels, features[k])) + w["embed_bias"]
            h = w["input_weight"] @ h + w["input_bias"]
            if decoder.interaction == "add":
                h = h + y
            for i in range(decoder.depth):
                n = layer_norm(h) * w["norm_weight"][i] + w["norm_bias"][i]
                gate = 1.0
                if decoder.interaction == "adaln":
                    shift, scale, gate = (w["mod_weight"][i] @ F.silu(y) + w["mod_bias"][i]).chunk(3)
                    n = n * (1 + scale) + shift
                hidden = F.silu(w["fc1_weight"][i] @ n + w["fc1_bias"][i])
                h = h + gate * (w["fc2_weight"][i] @ hidden + w["fc2_bias"][i])
            v = w["head_weight"] @ layer_norm(h) + w["head_bias"]
            velocity[:, top : top + r, left : left + r] = v.reshape(channels, r, r)
    return velocity


def random_decoder(**options):
    return randomize(model.PixelDecoder(12, **{**dict(width=16, depth=2), **options}), seed=4)


def random_input(height=16, width=32, channels=3, batch=1):
    generator = torch.Generator().manual_seed(9)
    image = torch.randn(batch, channels, height, width, generator=generator)
    return image, torch.randn(batch, height * width // 256, 12, generator=generator)


@pytest.mark.parametrize("interaction", ["adaln", "add"])
@pytest.mark.parametrize("decoder_patch", [1, 4, 16])
@pytest.mark.parametrize("training", [False, True])
def test_variants_by_formula(decoder_patch, interaction, training):
    decoder = random_decoder(decoder_patch=decoder_patch, interaction=interaction)
    image, tokens = random_input()
    with torch.set_grad_enabled(training):
        velocity = decoder(image, tokens)
    assert velocity.requires_grad == training
    assert relative_error(velocity[0], pixel_by_pixel(decoder, image[0], tokens[0])) < 2e-6


@pytest.mark.parametrize("options", [dict(depth=1), dict(channels=1), dict(channels=4, position_features="text")])
def test_sizes_by_formula(options):
    decoder = random_decoder(**options)
    image, tokens = random_input(channels=decoder.channels)
    velocity = decoder(image, tokens)
    assert relative_error(velocity[0], pixel_by_pixel(decoder, image[0], tokens[0])) < 2e-6


@pytest.mark.parametrize("options", [{}, dict(head_norm="rms", query_width=10, query_features=5)])
def test_float64(options):
    decoder = random_decoder(**options)
    image, tokens = random_input()
    inputs = [image, tokens, None] + ([torch.randn(1, 2, 10)] if options else [])
    velocity = decoder(*inputs)
    exact = decoder.double()(*(None if each is None else each.double() for each in inputs))
    assert exact.dtype is torch.float64 and relative_error(velocity, exact) < 2e-6


@pytest.mark.parametrize("interaction", ["adaln", "add"])
@pytest.mark.parametrize("decoder_patch", [1, 4])
def test_variants_train_every_parameter(decoder_patch, interaction):
    decoder = random_decoder(decoder_patch=decoder_patch, interaction=interaction)
    image, tokens = random_input(32, 32, batch=2)
    image.requires_grad_(), tokens.requires_grad_()
    decoder(image, tokens).square().sum().backward()
    gradients = dict(decoder.named_parameters(), image=image, tokens=tokens)
    assert not [name for name, tensor in gradients.items() if tensor.grad is None or not tensor.grad.any()]


def test_save_memory_and_training_agree():
    image, tokens = random_input(32, 48, batch=2)
    grads = []
    for save_memory in (False, True):
        decoder = random_decoder(save_memory=save_memory)
        velocity = decoder(image, tokens)
        velocity.square().sum().backward()
        grads.append([velocity, *(parameter.grad for parameter in decoder.parameters())])
    for (name, _), stored, recomputed in zip([("output", 0), *decoder.named_parameters()], *grads, strict=True):
        assert relative_error(recomputed, stored) < 1e-5, name


def test_class_position_features():
    features = model.pixel_position_features(16)
    assert features.shape == (256, 64) and features.dtype == torch.float32
    kx, ky, i, j = 5, 11, 3, 6
    u, v, f = kx / 15, ky / 15, [8 * m / 7 for m in range(8)]
    expected = math.cos(math.pi * u * f[i]) * math.cos(math.pi * v * f[j]) / (1 + f[i] * f[j])
    assert features[ky * 16 + kx, i * 8 + j].item() == pytest.approx(expected, abs=1e-6)


def test_text_position_features():
    features = model.pixel_position_features(16, "text")
    assert features.shape == (256, 64)
    kx, ky, m = 5, 11, 7
    g = 10000 ** (-4 * m / 128)
    pixel = features[ky * 16 + kx]
    assert pixel[2 * m].item() == pytest.approx(math.cos(kx * 16 / 15 * g), abs=1e-6)
    assert pixel[2 * m + 1].item() == pytest.approx(math.cos(ky * 16 / 15 * g), abs=1e-6)


def test_fold_ignores_autocast():
    decoder = random_decoder()
    expected = decoder.fold_input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded = decoder.fold_input()
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(folded, expected, strict=True))


@pytest.mark.parametrize("interaction", ["adaln", "add"])
@pytest.mark.parametrize("training", [False, True])
def test_activation_dtype(interaction, training):
    """bf16 by autocast and by bf16 parameters: output dtype, and the rule of error."""
    image, tokens = random_input(32, 48, batch=2)
    exact = random_decoder(interaction=interaction).double()(image.double(), tokens.double())

    plain = interaction == "add"  # the decoder is plain PyTorch
    eager = random_decoder(interaction=interaction) if plain else published.eager_view(random_decoder())
    decoder = random_decoder(interaction=interaction)
    with torch.set_grad_enabled(training):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error, by_autocast = relative_error(eager(image, tokens), exact), decoder(image, tokens)
        by_parameters = decoder.bfloat16()(image, tokens.bfloat16())
    assert error > 1e-4
    for velocity in (by_autocast, by_parameters):
        assert velocity.dtype == torch.bfloat16
        assert relative_error(velocity, exact) <= testing.error_bound(torch.bfloat16, error, gradient=False)


def test_fresh_decoder_returns_zero_and_is_initialised_as_published():
    decoder = model.PixelDecoder(48)
    image, tokens = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 48)
    assert not decoder(image, tokens).any()
    zero = {name for name, parameter in decoder.named_parameters() if not parameter.any()}
    biases = {name for name, _ in decoder.named_parameters() if name.endswith("_bias")}
    assert zero == biases | {"mod_weight", "head_weight"}
    assert torch.equal(decoder.norm_weight, torch.ones(3, 32))
    for weight in (decoder.fc1_weight[1], decoder.up_weight, decoder.input_weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_materialised_from_meta_device():
    with torch.device("meta"):
        decoder = model.PixelDecoder(12)
    decoder.to_empty(device="cpu").reset_parameters()
    fresh = model.PixelDecoder(12)
    assert torch.equal(decoder.position_features, fresh.position_features)
    assert set(decoder.state_dict()) == set(fresh.state_dict()) == set(dict(fresh.named_parameters()))


@pytest.mark.parametrize("interaction", ["adaln", "add"])
def test_compiles_to_one_graph(interaction):
    decoder = random_decoder(interaction=interaction)
    image, tokens = random_input(32, 32, batch=2)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(compiled(image, tokens), decoder(image, tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=0), "depth: expected at least 1, got 0"),
        (dict(decoder_patch=3), "decoder_patch: expected a divisor of patch_size 16, got 3"),
        (dict(interaction="cross"), r"interaction: expected one of \['adaln', 'add'\], got 'cross'"),
        (dict(position_features="sine"), "position_features: expected one of"),
        (dict(head_norm="batch"), r"head_norm: expected one of \['layer', 'rms'\], got 'batch'"),
        (dict(query_width=0), "query_width: expected at least 1, got 0"),
        (dict(query_width=8, query_features=0), "query_features: expected at least 1, got 0"),
        (dict(query_width=8, interaction="add"), "query_width, head_norm: expected None and 'layer'"),
        (dict(head_norm="rms", decoder_patch=2), "query_width, head_norm: expected None and 'layer'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        model.PixelDecoder(12, **options)


@pytest.mark.parametrize("interaction", ["adaln", "add"])
@pytest.mark.parametrize(
    ("image_shape", "token_shape", "message"),
    [
        ((1, 3, 24, 32), (1, 2, 12), r"image: expected .* multiples of 16, got \(1, 3, 24, 32\); crop or pad"),
        ((1, 4, 32, 32), (1, 4, 12), r"image: expected \[B, 3, H, W\]"),
        ((3, 32, 32), (1, 4, 12), r"image: expected \[B, 3, H, W\]"),
        ((1, 3, 32, 32), (1, 3, 12), "tokens: expected .* with 4 tokens.*; check patch_size 16 and the image's size"),
        ((1, 3, 32, 32), (1, 4, 11), r"tokens: expected \[..., 12\]"),
    ],
)
def test_bad_inputs(image_shape, token_shape, message, interaction):
    decoder = random_decoder(interaction=interaction)
    with pytest.raises(ValueError, match=message):
        decoder(torch.randn(image_shape), torch.randn(token_shape))


@pytest.mark.parametrize("interaction", ["adaln", "add"])
def test_empty_batch(interaction):
    decoder = random_decoder(interaction=interaction)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert decoder(torch.randn(0, 3, 32, 32), torch.randn(0, 4, 12)).shape == (0, 3, 32, 32)


def test_the_meta_device_gives_the_shape():
    decoder = random_decoder().to("meta")
    image, tokens = (tensor.to("meta") for tensor in random_input(32, 48, batch=2))
    velocity = decoder(image, tokens)
    assert velocity.is_meta and velocity.shape == image.shape


@pytest.mark.parametrize("name", ["image", "tokens"])
def test_what_is_not_a_tensor_is_refused(name):
    decoder = model.PixelDecoder(8, width=16, depth=1, patch_size=2)
    arguments = dict(image=torch.zeros(1, 3, 4, 4), tokens=torch.zeros(1, 4, 8))
    assert decoder(**arguments).shape == (1, 3, 4, 4)
    with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor, got list"):
        decoder(**(arguments | {name: [0.0]}))


@pytest.mark.parametrize(
    ("query_width", "shape", "message"),
    [
        (None, (1, 4, 8), "query_tokens: expected None for a decoder with query_width=None, got a tensor"),
        (8, None, r"query_tokens: expected \[..., 8\] for a decoder with query_width=8, got None"),
        (8, (1, 4, 9), r"query_tokens: expected \(1, 4, 8\), leading sizes as tokens, got \(1, 4, 9\)"),
        (8, (4, 8), r"query_tokens: expected \(1, 4, 8\)"),
    ],
)
def test_bad_query_tokens(query_width, shape, message):
    decoder = random_decoder(query_width=query_width)
    query_tokens = None if shape is None else torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        decoder(torch.randn(1, 3, 32, 32), torch.randn(1, 4, 12), query_tokens=query_tokens)


def test_a_new_decoder_with_query_tokens_returns_zero():
    decoder = model.PixelDecoder(12, query_width=8, head_norm="rms")
    velocity = decoder(torch.randn(1, 3, 32, 32), torch.randn(1, 4, 12), query_tokens=torch.randn(1, 4, 8))
    assert torch.equal(velocity, torch.zeros_like(velocity))
