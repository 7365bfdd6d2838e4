"""The fused decoder in models of the structure of CoD-Lite and Mage-VAE, and fused blocks in any model."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from deco_kernels.integrations import is_swapped, swap_blocks, swap_decoder, undo_swap
from deco_kernels.testing.published_model import CodLiteDecoder, ResBlock
from tests.golden_files import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, golden_cases, load_golden, relative_error

SIZES = dict(token_width=12, query_width=10, width=16, depth=2, patch_size=4)


class MageVae(nn.Module):
    """A decoder below the name that Mage-VAE gives it."""

    def __init__(self, name, decoder):
        super().__init__()
        self.name = name
        setattr(self, name, decoder)

    def forward(self, *inputs):
        return getattr(self, self.name)(*inputs)


class CountedLinear(nn.Linear):
    """A subclass with a forward of its own that computes the same."""

    def forward(self, x):
        return super().forward(x) + 0


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return module


def random_inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 8, 12), (12, 12), (2, 10, 2, 3))
    return tuple(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)


def results(model, inputs):
    output = model(*inputs)
    leaves = [*inputs, *model.parameters()]
    return output.detach(), torch.autograd.grad(output.square().sum(), leaves)


def assert_same(found, expected):
    assert relative_error(found[0], expected[0]) <= OUTPUT_TOLERANCE
    for gradient, other in zip(found[1], expected[1], strict=True):
        assert relative_error(gradient, other) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("path", golden_cases("cod_lite_*"))
def test_golden(path):
    golden = load_golden(path)
    inputs = {name: golden.tensors[f"input/{name}"].requires_grad_() for name in ("image", "tokens", "cond")}
    p, depth, width = (int(golden.metadata[key]) for key in ("p", "depth", "D"))
    net = CodLiteDecoder(inputs["tokens"].shape[1], inputs["cond"].shape[1], width, depth, p)
    net.load_state_dict(golden.group("state"))
    swap = swap_decoder(net)
    assert swap.structure == "CoD-Lite" and is_swapped(net)
    output = net(*inputs.values())
    assert relative_error(output, golden.tensors["output"]) <= OUTPUT_TOLERANCE
    output.backward(golden.tensors["grad_output"])
    for name, expected in golden.group("grad").items():
        assert relative_error(net.get_parameter(name).grad, expected) <= GRADIENT_TOLERANCE, name
    for name, expected in golden.group("grad_input").items():
        assert relative_error(inputs[name].grad, expected) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("name", ["pipeline", "decoder_model"])
def test_mage_vae(name):
    net, inputs = MageVae(name, randomized(CodLiteDecoder(**SIZES))), random_inputs()
    expected, names = results(net, inputs), list(net.state_dict())
    swap = swap_decoder(net)
    assert swap.structure == "Mage-VAE" and is_swapped(net) and list(net.state_dict()) == names
    assert_same(results(net, inputs), expected)
    swap.undo()
    assert not is_swapped(net)
    assert torch.equal(results(net, inputs)[0], expected[0])
    with pytest.raises(ValueError, match="expected one that swap_decoder has swapped"):
        undo_swap(net)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_swapped(copied):
    net, inputs = randomized(CodLiteDecoder(**SIZES)), random_inputs()
    swap_decoder(net)
    expected = results(net, inputs)
    other = copied(net)
    swap_decoder(randomized(CodLiteDecoder(**SIZES)))
    undo_swap(net)
    assert is_swapped(other) and not is_swapped(net)
    assert_same(results(other, inputs), expected)


def test_the_features_are_not_computed():
    """The model concatenates pixels with no features."""
    net, seen = randomized(CodLiteDecoder(**SIZES)), []
    swap_decoder(net)
    net.x_embedder.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    net(*random_inputs())
    assert seen == [(12, 16, 3)]


def test_an_image_that_is_not_whole_patches_is_named():
    net, (image, tokens, cond) = randomized(CodLiteDecoder(**SIZES)), random_inputs()
    swap_decoder(net)
    with pytest.raises(ValueError, match=r"x: expected .* multiples of 4, the patch size, got \[2, 3, 8, 14\]; crop"):
        net(torch.cat((image, image[..., :2]), dim=-1), tokens, cond)


def test_the_decoder_net_needs_a_condition():
    net, (image, tokens, cond) = randomized(CodLiteDecoder(**SIZES)), random_inputs()
    swap_decoder(net)
    expected = net(image, tokens, cond)
    pixels = torch.zeros(12, 16, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected a call of y_embedder_x before it in the same thread"):
            net.dec_net(pixels, tokens)
    failures = []
    net.y_embedder_x(cond)

    def other_thread():
        try:
            net.dec_net(pixels, tokens)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert len(failures) == 1
    assert torch.equal(net(image, tokens, cond), expected)


@pytest.mark.parametrize("held", [lambda net: net, lambda net: MageVae("pipeline", net)], ids=["own", "held"])
def test_an_exception_leaves_no_condition_behind(held):
    net, (image, tokens, cond) = randomized(CodLiteDecoder(**SIZES)), random_inputs()
    swap = swap_decoder(held(net))
    expected = net(image, tokens, cond)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):  # after y_embedder_x
        swap.model(image, tokens, cond[:, :, :, :2])
    with pytest.raises(RuntimeError, match="expected a call of y_embedder_x before it"):
        net.dec_net(torch.zeros(12, 16, 3), tokens)
    assert torch.equal(net(image, tokens, cond), expected)
    swap.undo()
    assert "forward" not in vars(net)


def test_checkpointing_of_the_whole_decoder():
    net, inputs = randomized(CodLiteDecoder(**SIZES)), random_inputs()
    swap_decoder(net)
    expected = results(net, inputs)
    output = torch.utils.checkpoint.checkpoint(net, *inputs, use_reentrant=False)
    gradients = torch.autograd.grad(output.square().sum(), [*inputs, *net.parameters()])
    assert_same((output.detach(), gradients), expected)


def test_compiled_without_graph_break():
    net, inputs = randomized(CodLiteDecoder(**(SIZES | {"depth": 1}))), random_inputs()
    swap_decoder(net)
    expected = results(net, inputs)
    assert_same(results(torch.compile(net, fullgraph=True, backend="aot_eager"), inputs), expected)
    torch.compiler.reset()


def test_float64():
    model = randomized(CodLiteDecoder(**SIZES)).double()
    inputs = [tensor.detach().double().requires_grad_() for tensor in random_inputs()]
    expected = results(model, inputs)
    swap_decoder(model)
    output, gradients = results(model, inputs)
    assert relative_error(output, expected[0]) < 1e-12
    for gradient, other in zip(gradients, expected[1], strict=True):
        assert relative_error(gradient, other) < 1e-12


def test_subclasses_of_linear():
    """One that computes the same is accepted, another is refused by the comparison."""
    net, inputs = randomized(CodLiteDecoder(**SIZES)), random_inputs()
    expected = results(net, inputs)
    net.dec_net.input_proj.__class__ = CountedLinear
    swap = swap_decoder(net)
    assert_same(results(net, inputs), expected)
    swap.undo()
    net.dec_net.input_proj.__class__ = ScaledLinear
    with pytest.raises(ValueError, match="dec_net differs .* a relative difference of"):
        swap_decoder(net)
    assert not is_swapped(net) and not hasattr(net.x_embedder, "fused_positions")


class Norm(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.eps = weight, 1e-6

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: delattr(net, "final_layer"), "final_layer differs .* expected a module, got none of this name"),
        (lambda net: setattr(net.final_layer, "norm", nn.LayerNorm(16)), "final_layer.norm differs .* an RMSNorm"),
        (lambda net: setattr(net.dec_net, "final_layer", nn.Linear(16, 3)), "dec_net.final_layer differs .* outside"),
        (lambda net: setattr(net, "y_embedder_x", nn.Conv2d(10, 256, 3)), "y_embedder_x differs .* 1x1 convolution"),
        (lambda net: setattr(net, "y_embedder_x", nn.Conv2d(10, 128, 1)), "y_embedder_x differs .* to 256 channels"),
        (lambda net: setattr(net.final_layer, "norm", Norm(net.final_layer.norm.weight)), "dec_net differs .* formula"),
    ],
)
def test_the_first_difference_is_named(change, message):
    net = randomized(CodLiteDecoder(**SIZES))
    change(net)
    with pytest.raises(ValueError, match=message):
        swap_decoder(net)


# --- blocks ----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self, width=16, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))

    def forward(self, h, cond):
        for block in self.blocks:
            h = block(h, cond)
        return h


def test_the_default_device_does_not_matter():
    block = ResBlock(16)
    with torch.device("meta"):
        assert swap_blocks(block).names == [""]


def test_blocks_of_any_model():
    net = randomized(Stack())
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(3, 5, 16, generator=generator, requires_grad=True) for _ in range(2))
    expected, names = results(net, inputs), list(net.state_dict())
    swap = swap_blocks(net)
    assert swap.names == ["blocks.0", "blocks.1"] and list(net.state_dict()) == names
    assert_same(results(net, inputs), expected)
    with pytest.raises(ValueError, match="at least one block with in_ln, mlp and adaLN_modulation that is not swapped"):
        swap_blocks(net)
    swap.undo()
    assert torch.equal(net(*inputs), expected[0])
    with pytest.raises(ValueError, match="restored before"):
        swap.undo()


def test_a_condition_that_is_broadcast():
    net = randomized(Stack())
    h, cond = torch.randn(3, 5, 16), torch.randn(3, 1, 16)
    expected = net(h, cond)
    swap_blocks(net)
    assert relative_error(net(h, cond), expected) <= OUTPUT_TOLERANCE


def test_blocks_that_differ_are_refused():
    class Other(ResBlock):
        def forward(self, h, cond):
            return super().forward(h, cond) + h

    net = Stack(depth=1)
    net.blocks.append(Other(16))
    with pytest.raises(ValueError, match=r"blocks\.1: expected h \+ gate·mlp"):
        swap_blocks(net)
    assert all("forward" not in vars(block) for block in net.blocks)
    net.blocks[1] = ResBlock(16)
    net.blocks[1].mlp[1] = nn.GELU()
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\[1\] differs .* expected SiLU, got GELU"):
        swap_blocks(net)
    with pytest.raises(ValueError, match="backend: unknown name 'gpu'"):
        swap_blocks(Stack(), backend="gpu")
    with pytest.raises(ValueError, match="at least one block"):
        swap_blocks(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        swap_blocks("net")
