"""Query and head norm of the decoders of CoD-Lite: golden results, equal ways to give a query, gradients, bad input."""

import pytest
import torch

from deco_kernels import ops, testing
from deco_kernels.model.position import pixel_position_features
from tests.golden_files import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, golden_cases, load_golden, relative_error
from tests.ops.cases import F32, IMPLEMENTATIONS, small_inputs

REFERENCE = "reference"
DECODERS = ("pixel_decoder", "pixel_decoder_from_tokens", "pixel_decoder_loss", "pixel_decoder_loss_from_tokens")
FROM_TOKENS = DECODERS[1::2]
each_decoder = pytest.mark.parametrize("op", DECODERS)
KINDS = [(op, kind) for op in DECODERS for kind in ("given", "tokens") if kind == "given" or op in FROM_TOKENS]


def cod_lite_arguments(state, image, tokens, cond, patch_size, depth):
    """Arguments of pixel_decoder_from_tokens from the published parameters and inputs."""
    channels, pixels = image.shape[1], patch_size**2
    embed, project = state["x_embedder.embedder.0.weight"], state["dec_net.input_proj.weight"]
    colors, features, positions = embed.split((channels, len(embed), 64), dim=1)
    table = (
        pixel_position_features(patch_size, "class", embed.device) @ positions.T + state["x_embedder.embedder.0.bias"]
    )
    feature_map, features = state["y_embedder_x.weight"][:, :, 0, 0], project @ features

    def stacked(name):
        return torch.stack([state[f"dec_net.res_blocks.{block}.{name}"] for block in range(depth)])

    blocks = {
        f"{ours}_{kind}": stacked(f"{theirs}.{kind}")
        for ours, theirs in (("norm", "in_ln"), ("mod", "adaLN_modulation.1"), ("fc1", "mlp.0"), ("fc2", "mlp.2"))
        for kind in ("weight", "bias")
    }
    return {
        "image": image,
        "tokens": tokens,
        "up_weight": state["dec_net.cond_embed.weight"],
        "up_bias": state["dec_net.cond_embed.bias"],
        "pixel_weight": project @ colors,
        "pixel_table": table @ project.T + state["dec_net.input_proj.bias"],
        **blocks,
        "head_weight": state["final_layer.linear.weight"] * state["final_layer.norm.weight"],
        "head_bias": state["final_layer.linear.bias"],
        "query_tokens": cond.flatten(2).transpose(1, 2).reshape(len(tokens), -1),
        # row feature * P + pixel of the published map, row pixel * D + channel of ours
        "query_weight": torch.einsum("df,fpz->pdz", features, feature_map.unflatten(0, (-1, pixels))).flatten(0, 1),
        "query_bias": torch.einsum("df,fp->pd", features, state["y_embedder_x.bias"].view(-1, pixels)).flatten(),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("path", golden_cases("cod_lite_*"))
def test_golden(path, implementation):
    check_golden(path, implementation)


def check_golden(path, backend, dtype=F32, tolerance=None):
    """Output and gradients of all parameters and inputs, with activations of this dtype."""
    golden = load_golden(path)
    state = {name: tensor.requires_grad_() for name, tensor in golden.group("state").items()}
    inputs = {name: tensor.requires_grad_() for name, tensor in golden.group("input").items()}
    patch_size, depth = int(golden.metadata["p"]), int(golden.metadata["depth"])
    tensors = cod_lite_arguments(state, *(inputs[name] for name in ("image", "tokens", "cond")), patch_size, depth)
    tensors |= {name: tensors[name].to(dtype) for name in ("tokens", "query_tokens")}
    output = ops.pixel_decoder_from_tokens(**tensors, patch_size=patch_size, head_norm="rms", backend=backend)
    assert relative_error(output, golden.tensors["output"]) <= (tolerance or OUTPUT_TOLERANCE)
    output.backward(golden.tensors["grad_output"].to(dtype))
    expected = golden.group("grad") | golden.group("grad_input")
    assert len(expected) == len(state) + len(inputs)
    for name, tensor in (state | inputs).items():
        assert relative_error(tensor.grad, expected[name]) <= (tolerance or GRADIENT_TOLERANCE), name


@pytest.mark.parametrize("op", FROM_TOKENS)
def test_both_ways_to_give_a_query_agree(op):
    inputs = small_inputs(op, torch.float64, query="tokens", head_norm="rms")
    tensors = dict(inputs.tensors)
    tokens, weight, bias = (tensors.pop(name) for name in ("query_tokens", "query_weight", "query_bias"))
    query = (tokens @ weight.T + bias).view(len(tokens), *tensors["pixel_table"].shape)
    one, other = (getattr(ops, op)(**t, **inputs.options) for t in (inputs.tensors, {**tensors, "query": query}))
    for result, expected in zip(*((r if isinstance(r, tuple) else (r,)) for r in (one, other)), strict=True):
        assert testing.relative_error(result, expected) <= 1e-13


@each_decoder
def test_a_query_of_zeros_and_the_default_norm_change_nothing(op):
    inputs = small_inputs(op, F32, query="given")
    tensors = dict(inputs.tensors)
    tensors["query"] = torch.zeros_like(tensors["query"])
    plain = {name: tensor for name, tensor in tensors.items() if name != "query"}
    options = {name: value for name, value in inputs.options.items() if name != "head_norm"}
    one, other = (getattr(ops, op)(**t, **options, backend=REFERENCE) for t in (tensors, plain))
    assert all(map(torch.equal, *((r if isinstance(r, tuple) else (r,)) for r in (one, other))))


@pytest.mark.parametrize(("op", "query"), KINDS)
def test_gradcheck_in_float64(op, query):
    sizes = {"patch_size": 2, "image_size": (2, 4, 2), "width": 4, "depth": 1, "token_width": 3}
    if "loss" in op:
        sizes |= {"patch_size": 3, "image_size": (1, 9, 6), "width": 2}
    inputs = small_inputs(op, torch.float64, query=query, head_norm="rms", **sizes)

    def function(*tensors):
        return getattr(ops, op)(**dict(zip(inputs.tensors, tensors, strict=True)), **inputs.options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs.tensors.values()], fast_mode=True)


# --- bad input -------------------------------------------------------------------------------------------------------


def call(op, kind, **changes):
    inputs = small_inputs(op, query=kind)
    return getattr(ops, op)(**{**inputs.tensors, **inputs.options, **changes})


@each_decoder
def test_head_norm_that_is_not_known(op):
    with pytest.raises(ValueError, match=f"{op}: head_norm: expected one of .*'layer', 'rms'.* got 'batch'"):
        call(op, None, head_norm="batch")


@each_decoder
def test_query_of_another_dtype(op):
    name = "tokens" if op in FROM_TOKENS else "cond"
    with pytest.raises(TypeError, match=f"{op}: query: expected dtype torch.float32 like {name}, got torch.bfloat16"):
        call(op, "given", query=small_inputs(op, query="given").tensors["query"].bfloat16())


@each_decoder
def test_query_of_another_shape(op):
    query = small_inputs(op, query="given").tensors["query"]
    for wrong in (query[..., :-1], query[:-1], query[0], query.unsqueeze(0)):
        with pytest.raises(ValueError, match=f"{op}: query: expected shape|{op}: query: expected at least"):
            call(op, "given", query=wrong)


@pytest.mark.parametrize("op", FROM_TOKENS)
def test_query_and_query_tokens_together(op):
    with pytest.raises(ValueError, match=f"{op}: query: expected None beside query_tokens"):
        call(op, "tokens", query=small_inputs(op, query="given").tensors["query"])


@pytest.mark.parametrize("op", FROM_TOKENS)
@pytest.mark.parametrize("name", ["query_tokens", "query_weight", "query_bias"])
def test_a_part_of_a_query_that_is_missing(op, name):
    with pytest.raises(ValueError, match=f"{op}: {name}: expected a tensor, got None"):
        call(op, "tokens", **{name: None})


@pytest.mark.parametrize("op", FROM_TOKENS)
@pytest.mark.parametrize("name", ["query_tokens", "query_weight", "query_bias"])
def test_sizes_of_query_tokens(op, name):
    tensor = small_inputs(op, query="tokens").tensors[name]
    for axis in range(tensor.dim()):
        with pytest.raises(ValueError, match=f"{op}: query_"):
            call(op, "tokens", **{name: torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)})
    with pytest.raises(TypeError, match=f"{op}: {name}: expected a torch.Tensor"):
        call(op, "tokens", **{name: "text"})
    if name == "query_tokens":
        with pytest.raises(TypeError, match=f"{op}: {name}: expected dtype"):
            call(op, "tokens", **{name: tensor.bfloat16()})
