"""Whole models and the decoder module vs. golden tensors: outputs and all gradients."""

import pytest
import torch

from deco_kernels import model
from deco_kernels.testing.published_model import CodLiteDecoder
from tests.golden_files import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, golden_cases, load_golden, relative_error


def assert_gradients(module, published_names, expected):
    """Compares the gradient of every parameter, under its published name, with the expected one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)
    actual = published_names(module)
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < GRADIENT_TOLERANCE, {k: v for k, v in errors.items() if v >= GRADIENT_TOLERANCE}


@pytest.mark.parametrize("path", [*golden_cases("c2i_*"), *golden_cases("t2i_*"), *golden_cases("baseline_*")])
def test_model_matches_golden(path):
    golden = load_golden(path)
    x, t, y = (golden.tensors[f"input/{i}"] for i in range(3))
    net = model.from_published(golden.group("state"))
    with torch.no_grad():
        assert relative_error(net(x, t, y), golden.tensors["output"]) < OUTPUT_TOLERANCE
    x.requires_grad_()
    y.requires_grad_(y.is_floating_point())
    output = net(x, t, y)
    assert relative_error(output, golden.tensors["output"]) < OUTPUT_TOLERANCE
    (output * golden.tensors["grad_output"]).sum().backward()
    assert relative_error(x.grad, golden.tensors["grad_input/0"]) < GRADIENT_TOLERANCE
    if y.requires_grad:
        assert relative_error(y.grad, golden.tensors["grad_input/2"]) < GRADIENT_TOLERANCE
    assert_gradients(net, model.to_published, golden.group("grad"))


PUBLISHED_DECODER = {
    "x_embedder.embedder.0.{}": "embed_{}",
    "dec_net.cond_embed.{}": "up_{}",
    "dec_net.input_proj.{}": "input_{}",
    "dec_net.final_layer.linear.{}": "head_{}",
    "dec_net.res_blocks.#.in_ln.{}": "norm_{}",
    "dec_net.res_blocks.#.adaLN_modulation.1.{}": "mod_{}",
    "dec_net.res_blocks.#.mlp.0.{}": "fc1_{}",
    "dec_net.res_blocks.#.mlp.2.{}": "fc2_{}",
}


def published_decoder(decoder):
    """Views of the decoder's parameters under published names."""
    named = {}
    for published, ours in PUBLISHED_DECODER.items():
        for kind in ("weight", "bias"):
            parameter = getattr(decoder, ours.format(kind)).detach()
            blocks = enumerate(parameter) if "#" in published else [(0, parameter)]
            named.update({published.format(kind).replace("#", str(i)): block for i, block in blocks})
    return named


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("path", golden_cases("decoder_*"))
def test_decoder_matches_golden(path, save_memory, backend):
    golden = load_golden(path)
    count, p, width, depth, token_width = (int(golden.metadata[key]) for key in ("T", "p", "dx", "depth", "z"))
    options = dict(width=width, depth=depth, patch_size=p, save_memory=save_memory, backend=backend)
    decoder = model.PixelDecoder(token_width, **options)
    state = golden.group("state")
    with torch.no_grad():
        for name, view in published_decoder(decoder).items():
            view.copy_(state.pop(name))
    assert not state

    def as_images(pixels):
        return pixels.reshape(count, p, p, 3).permute(0, 3, 1, 2)

    image = as_images(golden.tensors["input/0"]).requires_grad_()
    tokens = golden.tensors["input/1"].requires_grad_()
    velocity = decoder(image, tokens)
    assert relative_error(velocity, as_images(golden.tensors["output"])) < OUTPUT_TOLERANCE
    velocity.backward(as_images(golden.tensors["grad_output"]))
    assert relative_error(image.grad, as_images(golden.tensors["grad_input/0"])) < GRADIENT_TOLERANCE
    assert relative_error(tokens.grad, golden.tensors["grad_input/1"]) < GRADIENT_TOLERANCE
    assert_gradients(decoder, published_decoder, golden.group("grad"))


def cod_lite_names(decoder):
    """Views of the decoder's parameters under the published names of CoD-Lite."""
    names = {
        "y_embedder_x.weight": decoder.feature_weight[:, :, None, None],
        "y_embedder_x.bias": decoder.feature_bias,
        "x_embedder.embedder.0.weight": decoder.embed_weight,
        "x_embedder.embedder.0.bias": decoder.embed_bias,
        "dec_net.cond_embed.weight": decoder.up_weight,
        "dec_net.cond_embed.bias": decoder.up_bias,
        "dec_net.input_proj.weight": decoder.input_weight,
        "dec_net.input_proj.bias": decoder.input_bias,
        "final_layer.norm.weight": decoder.head_norm_weight,
        "final_layer.linear.weight": decoder.head_weight,
        "final_layer.linear.bias": decoder.head_bias,
    }
    modules = {"norm": "in_ln", "mod": "adaLN_modulation.1", "fc1": "mlp.0", "fc2": "mlp.2"}
    for block in range(decoder.depth):
        for ours, theirs in modules.items():
            for kind in ("weight", "bias"):
                names[f"dec_net.res_blocks.{block}.{theirs}.{kind}"] = getattr(decoder, f"{ours}_{kind}")[block]
    return names


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("path", golden_cases("cod_lite_*"))
def test_decoder_with_query_tokens_matches_golden(path, backend):
    golden = load_golden(path)
    image, tokens, cond = (golden.tensors[f"input/{name}"].requires_grad_() for name in ("image", "tokens", "cond"))
    p, depth, width = (int(golden.metadata[key]) for key in ("p", "depth", "D"))
    options = dict(width=width, depth=depth, patch_size=p, query_width=cond.shape[1], head_norm="rms", backend=backend)
    decoder = model.PixelDecoder(tokens.shape[-1], **options)
    state = golden.group("state")
    with torch.no_grad():
        for name, view in cod_lite_names(decoder).items():
            view.copy_(state.pop(name))
    assert not state
    velocity = decoder(image, tokens, query_tokens=cond.flatten(2).transpose(1, 2).reshape(len(tokens), -1))
    assert relative_error(velocity, golden.tensors["output"]) < OUTPUT_TOLERANCE
    velocity.backward(golden.tensors["grad_output"])
    for name, tensor in (("image", image), ("tokens", tokens), ("cond", cond)):
        assert relative_error(tensor.grad, golden.tensors[f"grad_input/{name}"]) < GRADIENT_TOLERANCE, name
    assert_gradients(decoder, cod_lite_names, golden.group("grad"))


@pytest.mark.parametrize("path", golden_cases("cod_lite_*"))
def test_the_published_modules_match_golden(path):
    """The baseline of the benchmark and of the swap."""
    golden = load_golden(path)
    image, tokens, cond = (golden.tensors[f"input/{name}"] for name in ("image", "tokens", "cond"))
    p, depth, width = (int(golden.metadata[key]) for key in ("p", "depth", "D"))
    decoder = CodLiteDecoder(tokens.shape[-1], cond.shape[1], width, depth, p)
    decoder.load_state_dict(golden.group("state"))
    with torch.no_grad():
        assert relative_error(decoder(image, tokens, cond), golden.tensors["output"]) < OUTPUT_TOLERANCE
