"""The fused decoder in models of the published structure: same function, same names, and undo."""

import copy
import io
import re
import threading
import warnings

import pytest
import torch
from torch import nn

from deco_kernels import BackendUnavailable, flow, model, ops, testing
from deco_kernels.integrations import is_swapped, swap_decoder, undo_swap
from deco_kernels.testing import published_model as published_structure
from deco_kernels.testing.published_model import PublishedDeCo
from tests.golden_files import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, golden_cases, load_golden, relative_error
from tests.integrations.published import gradients_of, published_model
from tests.random_models import random_batch

SIZES = [{}, dict(patch_size=8, decoder_width=16, decoder_depth=1), dict(patch_size=4, decoder_width=64, channels=1)]


class DecoderAlone(nn.Module):
    """x_embedder and dec_net of a model, on pixels [T, P, C] and tokens [T, Z]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.x_embedder, self.dec_net = net.x_embedder, net.dec_net

    def forward(self, pixels, tokens):
        return self.dec_net(self.x_embedder(pixels), tokens)


def decoder_inputs(net: nn.Module, count: int = 16):
    generator = torch.Generator().manual_seed(1)
    shape = (count, net.patch_size**2, net.dec_net.final_layer.linear.out_features)
    pixels, grad_output = (torch.randn(shape, generator=generator) for _ in range(2))
    return (pixels, torch.randn(count, net.dec_net.cond_embed.in_features, generator=generator)), grad_output


# --- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_cases("c2i_*"))
def test_swapped_model_matches_golden(path):
    golden = load_golden(path)
    inputs = tuple(golden.tensors[f"input/{i}"] for i in range(3))
    state = golden.group("state")
    config = model.from_published(state).config
    names = ("width", "depth", "heads", "num_classes", "patch_size", "channels", "decoder_width", "decoder_depth")
    net = PublishedDeCo(**{name: config[name] for name in names})
    net.load_state_dict(state)
    for swapped in (False, True):
        if swapped:
            swap_decoder(net)
        with torch.no_grad():
            assert relative_error(net(*inputs), golden.tensors["output"]) < OUTPUT_TOLERANCE
        output, gradients = gradients_of(net, inputs, golden.tensors["grad_output"])
        assert relative_error(output, golden.tensors["output"]) < OUTPUT_TOLERANCE
        expected = golden.group("grad")
        assert gradients.keys() == expected.keys()
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("sizes", SIZES)
def test_same_output_and_gradients_in_float64(sizes):
    net = published_model(**sizes).double()
    channels = sizes.get("channels", 3)
    x, t, y = random_batch(2, 32, 48)
    inputs = (x[:, :channels].double(), t.double(), y)
    grad_output = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before, expected = gradients_of(net, inputs, grad_output)
    swap_decoder(net)
    after, gradients = gradients_of(net, inputs, grad_output)
    assert after.shape == before.shape and relative_error(after, before) < 1e-12
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert relative_error(gradients[name], gradient) < 1e-10, name


def test_position_features_of_the_text_model(monkeypatch):
    """They are always taken from the model."""
    monkeypatch.setattr(published_structure, "position_features", lambda p: model.pixel_position_features(p, "text"))
    net = DecoderAlone(published_model()).double()
    inputs, _ = decoder_inputs(published_model())
    inputs = tuple(tensor.double() for tensor in inputs)
    before = net(*inputs)
    swap_decoder(net)
    assert relative_error(net(*inputs), before) < 1e-12


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_decoder_keeps_the_rule_of_error(dtype, save_memory):
    """Compared with float64 and the model's own forward, in float32 and under autocast to bfloat16."""
    net = DecoderAlone(published_model())
    inputs, grad_output = decoder_inputs(published_model())
    exact, exact_gradients = gradients_of(
        copy.deepcopy(net).double(), tuple(tensor.double() for tensor in inputs), grad_output.double()
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        own, own_gradients = gradients_of(net, inputs, grad_output)
        swap_decoder(net, save_memory=save_memory)
        fused, fused_gradients = gradients_of(net, inputs, grad_output)
        with torch.no_grad():
            sampled = net(*inputs)
    assert own.dtype == fused.dtype == sampled.dtype == dtype
    for actual in (fused, sampled):
        bound = testing.error_bound(dtype, relative_error(own, exact), gradient=False)
        assert relative_error(actual, exact) <= bound
    for name, gradient in exact_gradients.items():
        bound = testing.error_bound(dtype, relative_error(own_gradients[name], gradient), gradient=True)
        assert relative_error(fused_gradients[name], gradient) <= bound, name


def test_which_op_runs(monkeypatch):
    calls = []

    def recorded(name, op):
        def call(*tensors, **options):
            calls.append((name, options.get("save_memory"), options["backend"]))
            return op(*tensors, **options)

        return call

    for name in ("pixel_decoder", "pixel_decoder_from_tokens"):
        monkeypatch.setattr(ops, name, recorded(name, getattr(ops, name)))
    net, batch = published_model(), random_batch()
    swap = swap_decoder(net)
    calls.clear()
    net(*batch)
    swap.undo()
    net(*batch)
    assert calls == [("pixel_decoder_from_tokens", False, None)]
    swap_decoder(net, save_memory=True, backend="reference")
    calls.clear()
    net(*batch)
    assert calls == [("pixel_decoder_from_tokens", True, "reference")]


# --- the two halves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_forward_is_decode_after_encode_bit_for_bit(dtype):
    net, (x, t, y) = published_model(), random_batch()
    swap_decoder(net)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        tokens = net.encode(x, t, y)
        assert tokens.shape == (2, 6, 24) and torch.equal(net.decode(x, t, tokens), net(x, t, y))
    later = torch.rand(2)
    ours = model.from_published(net.state_dict())
    expected = ours.decode(x, later, ours.encode(x, t, y))
    assert relative_error(net.decode(x, later, net.encode(x, t, y)), expected) < 1e-5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sampling_with_the_trunk_at_some_steps(dtype):
    """All trunk steps give the bits of sampling without; few give those of this package's model."""
    net, (noise, _, y) = published_model(), random_batch()
    swap_decoder(net)
    null = torch.full_like(y, 10)
    options = dict(steps=3, guidance=2.0, guidance_interval=(0.2, 0.8), dtype=dtype)
    plain = flow.Sampler(net, **options)(noise, y, null)
    assert torch.equal(flow.Sampler(net, trunk_steps=3, **options)(noise, y, null), plain)
    few = flow.Sampler(net, trunk_steps=2, **options)(noise, y, null)
    expected = flow.Sampler(model.from_published(net.state_dict()), trunk_steps=2, **options)(noise, y, null)
    assert relative_error(few, plain) > 1e-2
    assert relative_error(few, expected) < (1e-5 if dtype is None else 2e-2)


def test_the_halves_take_an_empty_batch():
    net, (x, t, y) = published_model(), random_batch()
    swap_decoder(net)
    x, t, y = x[:0], t[:0], y[:0]
    assert net.decode(x, t, net.encode(x, t, y)).shape == x.shape


def test_threads_share_a_model():
    """One thread encodes while another runs the whole model."""
    net, batch = published_model(), random_batch()
    swap_decoder(net)
    tokens, velocity = net.encode(*batch), net(*batch)
    encoding, done, found = threading.Event(), threading.Event(), []
    encoder = threading.Thread(target=lambda: found.append(net.encode(*batch)))

    def wait(*_):
        if threading.current_thread() is encoder:
            encoding.set()
            done.wait(60)

    net.blocks[-1].register_forward_pre_hook(wait)
    encoder.start()
    encoding.wait(60)
    meanwhile = net(*batch)
    done.set()
    encoder.join()
    assert torch.equal(meanwhile, velocity) and torch.equal(found[0], tokens)


def test_halves_come_and_go_with_the_swap():
    net, batch = published_model(), random_batch()
    swap = swap_decoder(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert not net.encode(*batch).any() and other.encode(*batch).any()
    swap.undo()
    assert not hasattr(net, "encode") and not hasattr(net, "decode") and hasattr(other, "encode")
    with pytest.raises(TypeError, match="model: expected one with encode and decode, such as DeCo, for trunk_steps"):
        flow.Sampler(net, steps=2, trunk_steps=1)


def test_a_trunk_of_another_structure_has_no_halves():
    net = published_model()
    net.blocks = nn.Sequential(*net.blocks)
    swap_decoder(net)
    with pytest.raises(TypeError, match="model: expected one with encode and decode"):
        flow.Sampler(net, steps=2, trunk_steps=1)


class AnotherForward(PublishedDeCo):
    """A forward that differs from the published one around the decoder."""

    changed = ""

    def forward(self, x, t, y):
        if self.changed == "condition":
            return super().forward(x, 1000 * t, y)
        if self.changed == "pixels":
            return super().forward(2 * x, t, y)
        return super().forward(x, t, y) * (2 if self.changed == "result" else 1)


@pytest.mark.parametrize(
    ("changed", "found"), [("condition", "another condition"), ("pixels", "other pixels"), ("result", "another result")]
)
def test_a_forward_that_differs_around_the_decoder_is_refused(changed, found):
    net, batch = AnotherForward(width=24, depth=1, heads=2), random_batch()
    swap_decoder(net)
    net.encode(*batch)
    other = AnotherForward(width=24, depth=1, heads=2)
    other.changed = changed
    swap_decoder(other)
    x, t, y = batch
    assert other.encode(x * float("nan"), t, y).isnan().all()  # shows no difference, and does not count as the check
    with pytest.raises(ValueError, match=f"model: expected its forward .* got {found}; trunk_steps"):
        other.encode(*batch)


def test_tokens_and_images_that_do_not_fit_decode():
    net, (x, t, y) = published_model(), random_batch()
    swap_decoder(net)
    with pytest.raises(ValueError, match=r"tokens: expected shape \[2, 6, 24\] for an image \[2, 3, 32, 48\]"):
        net.decode(x, t, torch.zeros(2, 5, 24))
    with pytest.raises(ValueError, match=r"x: expected an image \[B, C, H, W\], H and W multiples of 16"):
        net.decode(x[..., :40], t, net.encode(x, t, y))


class PaddingForward(PublishedDeCo):
    """Takes any size: pads the image with zeros, and cuts the velocity."""

    def forward(self, x, t, y):
        height, width = x.shape[2:]
        padded = torch.nn.functional.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return super().forward(padded, t, y)[:, :, :height, :width]


def test_an_image_that_is_not_whole_patches_is_named():
    sizes = dict(width=24, depth=1, heads=2, num_classes=10, patch_size=8, decoder_width=16, decoder_depth=1)
    net, (x, t, y) = published_model(**sizes), random_batch()
    swap_decoder(net)
    expected = r"x: expected an image \[B, C, H, W\] with H and W multiples of 8, .* got \[2, 3, 32, 20\]; crop or pad"
    expected += r" the image\. The error of the model's forward: \S"
    for call in (lambda x: net(x, t, y), lambda x: net(y=y, x=x, t=t), lambda x: net.encode(x, t, y)):
        with pytest.raises(ValueError, match=expected) as found:
            call(x[..., :20])
        assert isinstance(found.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError):  # of other arguments
        net(x, t[:1].expand(3), y)
    padding = PaddingForward(**sizes)
    swap_decoder(padding)
    assert padding(x[..., :20], t, y).shape == (2, 3, 32, 20)
    with pytest.raises(ValueError, match="The error of the model's forward: The size of tensor a"):
        padding(x[..., :20], t[:1].expand(3), y)


# --- the same names, and back again ----------------------------------------------------------------------------------


def test_names_parameters_and_modules_stay():
    net = published_model()
    before = dict(net.named_parameters()), list(net.state_dict()), dict(net.named_modules())
    swap = swap_decoder(net)
    for swapped in (True, False):
        after = dict(net.named_parameters()), list(net.state_dict()), dict(net.named_modules())
        assert before[1] == after[1]
        assert all(list(one) == list(two) for one, two in zip(before, after, strict=True))
        assert all(before[i][name] is after[i][name] for i in (0, 2) for name in before[i])
        assert is_swapped(net) is swapped
        if swapped:
            swap.undo()
    assert not list(net.buffers())


def test_undo_restores_every_bit_and_keeps_what_was_trained():
    net, batch = published_model(), random_batch()
    before = net(*batch)
    swap = swap_decoder(net)
    assert not torch.equal(net(*batch), before)
    swap.undo()
    assert torch.equal(net(*batch), before)
    swap_decoder(net)
    net.load_state_dict(published_model(seed=5).state_dict())
    swapped = net(*batch)
    undo_swap(net)
    assert torch.equal(net(*batch), published_model(seed=5)(*batch))
    assert 0 < relative_error(swapped, net(*batch)) < 1e-5


def test_swapped_model_is_read_as_a_published_checkpoint():
    net, batch = published_model(), random_batch()
    swap_decoder(net)
    ours = model.from_published(net.state_dict())
    assert relative_error(ours(*batch), net(*batch)) < 1e-5


def test_copies_and_files_are_swapped_on_their_own():
    net, batch = published_model(), random_batch()
    swap = swap_decoder(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    expected = net(*batch)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert is_swapped(other) and torch.equal(other(*batch), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other(*batch).any() and torch.equal(net(*batch), expected)
        undo_swap(other)
        assert is_swapped(net) and not is_swapped(other)
    swap.undo()


def test_moves_and_casts_reach_the_fused_decoder():
    """By the rule of error: eager is the model without the swap."""
    net, eager, (x, t, y) = published_model(), published_model(), random_batch()
    exact = copy.deepcopy(eager).double()(x.double(), t.double(), y)
    swap_decoder(net)
    errors = [relative_error(each.bfloat16()(x.bfloat16(), t.bfloat16(), y), exact) for each in (net, eager)]
    assert errors[0] <= testing.error_bound(torch.bfloat16, errors[1], gradient=False)


def test_swap_twice_and_undo_twice():
    net = published_model()
    swap = swap_decoder(net)
    with pytest.raises(ValueError, match="already swapped"):
        swap_decoder(net)
    swap.undo()
    with pytest.raises(ValueError, match="expected one that swap_decoder has swapped"):
        swap.undo()


def test_random_state_is_left_alone():
    net = published_model()
    state = torch.random.get_rng_state()
    swap_decoder(net)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_compiled_without_graph_break():
    """Compiled after the swap as a single graph; the compiled model follows the undo."""
    net, batch = published_model(depth=1), random_batch()
    grad_output = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(2))
    own = torch.compile(net, fullgraph=True, backend="aot_eager")(*batch).detach()
    torch.compiler.reset()
    swap = swap_decoder(net)
    output, expected = gradients_of(net, batch, grad_output)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    result = compiled(*batch)
    gradients = torch.autograd.grad(result, list(net.parameters()), grad_output)
    assert relative_error(result, output) < 1e-6 and not torch.equal(result, own)
    assert max(map(relative_error, gradients, expected.values())) < 1e-5
    swap.undo()
    assert torch.equal(compiled(*batch), own)
    torch.compiler.reset()


# --- what does not fit -----------------------------------------------------------------------------------------------


def replaced(path: str, make):
    """A model with the module at `path` replaced by make(old)."""
    net = published_model()
    net.set_submodule(path, make(net.get_submodule(path)), strict=True)
    return net


def without(path: str):
    net = published_model()
    parent, _, name = path.rpartition(".")
    delattr(net.get_submodule(parent), name)
    return net


def with_parameter(path: str):
    net = published_model()
    net.get_submodule(path).extra = nn.Parameter(torch.zeros(3))
    return net


def without_bias(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features, bias=False)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


DIFFERENT = {
    "x_embedder": lambda: without("x_embedder"),
    "dec_net": lambda: without("dec_net"),
    "x_embedder.embedder": lambda: without("x_embedder.embedder"),
    "x_embedder.embedder differs from the published structure: expected Sequential of Linear, got Sequential of "
    "Linear, SiLU": lambda: replaced("x_embedder.embedder", lambda old: nn.Sequential(*old, nn.SiLU())),
    "dec_net.cond_embed": lambda: replaced("dec_net.cond_embed", lambda old: nn.Linear(24, 100)),
    "dec_net.input_proj": lambda: replaced("dec_net.input_proj", without_bias),
    "dec_net.res_blocks": lambda: replaced("dec_net.res_blocks", lambda old: nn.ModuleList()),
    "dec_net.res_blocks[1].in_ln": lambda: replaced("dec_net.res_blocks.1.in_ln", lambda old: nn.LayerNorm(32)),
    "dec_net.res_blocks[2].mlp": lambda: replaced("dec_net.res_blocks.2.mlp", lambda old: old[:2]),
    "dec_net.res_blocks[0].mlp[1]": lambda: replaced("dec_net.res_blocks.0.mlp.1", lambda old: nn.GELU()),
    "dec_net differs": lambda: replaced("dec_net.res_blocks.0.mlp.2", lambda old: Adapted(32, 32)),
    "dec_net.res_blocks[0].adaLN_modulation": lambda: without("dec_net.res_blocks.0.adaLN_modulation"),
    "dec_net.res_blocks[1].adaLN_modulation[1]": lambda: replaced(
        "dec_net.res_blocks.1.adaLN_modulation.1", lambda old: nn.Linear(32, 64)
    ),
    "dec_net.final_layer.norm_final": lambda: replaced(
        "dec_net.final_layer.norm_final", lambda old: nn.LayerNorm(32, eps=1e-6)
    ),
    "dec_net.final_layer.linear": lambda: replaced("dec_net.final_layer.linear", lambda old: nn.Linear(16, 3)),
    "dec_net.final_layer.extra": lambda: with_parameter("dec_net.final_layer"),
    "x_embedder.extra": lambda: with_parameter("x_embedder"),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_first_difference_is_named(difference):
    net = DIFFERENT[difference]()
    with pytest.raises(ValueError) as caught:
        swap_decoder(net)
    assert str(caught.value).startswith(f"model: {difference}")
    assert not is_swapped(net) and "fused_positions" not in dict(net.named_buffers())


FORMULAS = {
    "scale without 1 +": lambda n, shift, scale: n * scale + shift,
    "shift and scale exchanged": lambda n, shift, scale: n * (1 + shift) + scale,
    "a factor of 1.001": lambda n, shift, scale: 1.001 * (n * (1 + scale) + shift),
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_another_formula_in_the_same_structure_is_found(formula, monkeypatch):
    """Even in a new model, whose modulation and head are zero."""
    modulate = FORMULAS[formula]
    net = PublishedDeCo(width=24, depth=1, heads=2)

    def forward(block, h, cond):
        shift, scale, gate = block.adaLN_modulation(cond).chunk(3, dim=-1)
        return h + gate * block.mlp(modulate(block.in_ln(h), shift, scale))

    monkeypatch.setattr(type(net.dec_net.res_blocks[0]), "forward", forward)
    with pytest.raises(ValueError, match="dec_net differs .* expected the published formula, got a relative diff"):
        swap_decoder(net)
    assert not is_swapped(net) and not list(net.buffers())


class BlockWithModes(nn.Module):
    """A block with the published formula that applies `training` or `evaluation` to its result, by mode."""

    def __init__(self, block: nn.Module, training: nn.Module, evaluation: nn.Module):
        super().__init__()
        self.in_ln, self.mlp, self.adaLN_modulation = block.in_ln, block.mlp, block.adaLN_modulation
        self.when_training, self.when_evaluating = training, evaluation

    def forward(self, h, cond):
        shift, scale, gate = self.adaLN_modulation(cond).chunk(3, dim=-1)
        h = h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)
        return self.when_training(h) if self.training else self.when_evaluating(h)


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_another_formula_in_one_mode_is_found_in_both(mode, present):
    modes = {"training": nn.Identity(), "evaluation": nn.Identity(), mode: nn.SiLU()}
    net = replaced("dec_net.res_blocks.1", lambda block: BlockWithModes(block, **modes)).train(present)
    with pytest.raises(ValueError, match=f"dec_net .* the published formula, got .* random weights in {mode} mode"):
        swap_decoder(net)
    assert not is_swapped(net) and all(module.training is present for module in net.modules())


def test_dropout_is_found_and_the_random_state_left_alone():
    net = replaced("dec_net.res_blocks.1", lambda block: BlockWithModes(block, nn.Dropout(0.5), nn.Identity())).eval()
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="in training mode"):
        swap_decoder(net)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("place", ["x_embedder.embedder.0", "dec_net.cond_embed", "dec_net.res_blocks.2.mlp.0"])
def test_weights_that_a_hook_computes_are_refused(place):
    net = published_model()
    nn.utils.weight_norm(net.get_submodule(place))
    named = re.sub(r"\.(\d+)", r"[\1]", place)
    with pytest.raises(ValueError) as caught:
        swap_decoder(net)
    assert str(caught.value).startswith(f"model: {named}.weight differs")
    assert "expected a parameter, got a tensor that a hook computes from weight_g, weight_v" in str(caught.value)


def test_parametrized_weights_are_followed():
    """Weights of nn.utils.parametrizations are recomputed whenever they are read."""
    net, batch = published_model(), random_batch()
    nn.utils.parametrizations.weight_norm(net.dec_net.res_blocks[2].mlp[0])
    grad_output = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(2))
    before, expected = gradients_of(net, batch, grad_output)
    swap_decoder(net)
    after, gradients = gradients_of(net, batch, grad_output)
    assert relative_error(after, before) < 1e-5
    assert max(relative_error(gradients[name], expected[name]) for name in expected) < GRADIENT_TOLERANCE


def test_a_fresh_model_can_be_swapped():
    net = PublishedDeCo(width=24, depth=1, heads=2)
    swap_decoder(net)
    assert not net(*random_batch()).any()


def test_an_embedder_that_fails_is_named(monkeypatch):
    net = published_model()
    monkeypatch.setattr(type(net.x_embedder), "forward", lambda self, pixels, scale: pixels)
    with pytest.raises(ValueError, match=r"x_embedder .* expected to run on \[1, 256, 3\], got TypeError"):
        swap_decoder(net)


def test_meta_models_are_refused():
    with torch.device("meta"):
        net = PublishedDeCo(width=24, depth=1, heads=2)
    with pytest.raises(ValueError, match="meta device; call to_empty"):
        swap_decoder(net)


def test_wrapped_and_compiled_models_are_refused():
    whole = published_model()
    for wrapped in (torch.compile(whole), nn.DataParallel(whole)):
        with pytest.raises(TypeError, match="model: expected a bare module"):
            swap_decoder(wrapped)
    whole.compile()
    with pytest.raises(TypeError, match="torch.compile has wrapped or compiled; call swap_decoder on the model first"):
        swap_decoder(whole)
    part = published_model()
    part.dec_net.res_blocks[1].compile()
    with pytest.raises(TypeError, match="dec_net.res_blocks.1: expected a bare module"):
        swap_decoder(part)
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got dict"):
        swap_decoder({})
    trunk = published_model()
    trunk.blocks[0].compile()
    swap_decoder(trunk)


def test_models_of_this_package_need_no_swap():
    with pytest.raises(ValueError, match="model: .*, got this package's DeCo, .* the fused ops already; use it as it"):
        swap_decoder(model.build("deco-tiny"))


def test_options_that_are_wrong_change_nothing():
    net = published_model()
    with pytest.raises(ValueError, match="backend: unknown name 'gpu'; use one of 'auto', 'reference', 'cpu'"):
        swap_decoder(net, backend="gpu")
    with pytest.raises(TypeError, match="swap_decoder: save_memory: expected True or False, got 'no'; pass one"):
        swap_decoder(net, save_memory="no")
    assert not is_swapped(net)


def test_backends_that_cannot_serve_are_refused_when_called():
    net, batch = published_model(), random_batch()
    swap_decoder(net, backend="triton")
    with pytest.raises(BackendUnavailable, match="triton"):
        net(*batch)


def test_changed_pixels_are_refused():
    net = published_model()
    swap_decoder(net)
    with pytest.raises(ValueError, match=r"expected the pixels \[tokens, 256, channels\] .* got shape \[2, 255, 3\]"):
        net.dec_net(torch.zeros(2, 255, 3), torch.zeros(2, 24))


@pytest.mark.parametrize("place", ["x_embedder.embedder", "dec_net.cond_embed", "dec_net.res_blocks.0.mlp.2"])
def test_modules_replaced_after_the_swap_are_named(place):
    net, batch = published_model(), random_batch()
    before = net(*batch)
    swap = swap_decoder(net)
    owner, name = net.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
    original = getattr(owner, name)
    setattr(owner, name, torch.nn.Sequential(original, torch.nn.Identity()))
    with pytest.raises(ValueError, match=f"{place}: expected the module that was there .* undo the swap"):
        net(*batch)
    swap.undo()
    setattr(owner, name, original)
    assert torch.equal(net(*batch), before)


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_on_replaced_parts_are_named():
    net = published_model()
    calls = []

    def hook(module, *_):
        calls.append(module)

    net.dec_net.res_blocks[1].mlp.register_forward_hook(hook)
    net.x_embedder.register_forward_pre_hook(hook)
    net.dec_net.cond_embed.register_full_backward_hook(hook)
    net.blocks[0].register_forward_hook(hook)
    net.dec_net.register_forward_hook(hook)
    with pytest.warns(UserWarning) as said:
        swap_decoder(net)
    (warning,) = said
    assert "hooks on x_embedder, dec_net.cond_embed, dec_net.res_blocks.1.mlp:" in str(warning.message)
    assert warning.filename == __file__ and not calls


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    net = published_model()
    net.x_embedder.register_forward_pre_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="hooks on x_embedder"):
            swap_decoder(net)
    assert not is_swapped(net) and not dict(net.named_buffers())


def test_hooks_that_keep_their_meaning_are_not_warned_of():
    net, batch = published_model(), random_batch()
    seen = []
    net.dec_net.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net.register_forward_pre_hook(lambda module, inputs: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_decoder(net)
    assert not seen
    net(*batch)
    assert seen[0].shape == (2 * 2 * 3, 256, 3)
