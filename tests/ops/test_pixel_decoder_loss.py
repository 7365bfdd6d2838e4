"""Tests specific to the ops of decoder and loss: agreement with two ops, repeated backwards, loss scales, log line."""

import functools
import logging
import re

import pytest
import torch

from deco_kernels import native, ops, testing
from deco_kernels.backends import composition
from deco_kernels.backends.cpu import flow_matching_loss
from deco_kernels.ops.one_pass import scaled
from deco_kernels.signatures import OPS
from tests.operators import OperatorNames
from tests.ops.cases import BACKENDS, BF16, F16, F32, IMPLEMENTATIONS, small_inputs

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
each_backend = pytest.mark.parametrize("implementation", BACKENDS, indirect=True)
needs_module = pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason="needs the native CPU module")
OP, FROM_TOKENS = "pixel_decoder_loss", "pixel_decoder_loss_from_tokens"
WEIGHTS = ("pixel_weight", "mod_weight", "fc2_bias", "head_bias")


def block_inputs(dtype=F32, patch_size=8, op=OP, **changes):
    """A few whole 8x8 blocks."""
    return small_inputs(op, dtype, patch_size=patch_size, **{"image_size": (3, 16, 32), **changes})


def two_ops(tensors, options, backend):
    decoder = {name: tensors[name] for name in OPS["pixel_decoder"].names if name in tensors}
    decoder |= {name: options[name] for name in ("patch_size", "head_norm")}
    velocity = ops.pixel_decoder(**decoder, backend=backend)
    return ops.flow_matching_loss(
        velocity,
        tensors["target"],
        tensors["frequency_weight"],
        sample_weight=tensors["sample_weight"],
        frequency_scale=options["frequency_scale"],
        backend=backend,
    )


def one_op(tensors, options, backend):
    return ops.pixel_decoder_loss(**tensors, **options, backend=backend)


def losses_and_gradients(function, inputs, backend, factor=1.0):
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in inputs.tensors.items()}
    losses = function(leaves, inputs.options, backend)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(losses[0] * factor, list(given.values()))
    return [loss.detach() for loss in losses], dict(zip(given, gradients, strict=True))


@each_implementation
@pytest.mark.parametrize(("dtype", "patch_size"), [(F32, 16), (BF16, 8), (F16, 4)])
def test_agrees_with_the_two_ops(implementation, dtype, patch_size, **changes):
    """The two ops round the velocity, and its gradient, to the activation dtype, by at most half a unit each; in the
    losses, means over pixels, such errors average out."""
    inputs = block_inputs(dtype, patch_size, **changes)
    factor = 2.0**10 if dtype is F16 else 1.0  # the two ops need a loss scale
    losses, gradients = losses_and_gradients(one_op, inputs, implementation, factor)
    expected, expected_gradients = losses_and_gradients(two_ops, inputs, implementation, factor)
    for loss, other in zip(losses, expected, strict=True):
        assert testing.relative_error(loss, other) <= max(1e-6, torch.finfo(dtype).eps / 16)
    for name, gradient in gradients.items():
        bound = max(5e-6, torch.finfo(dtype).eps)
        assert gradient.any(), name
        assert testing.relative_error(gradient, expected_gradients[name]) <= bound, name


@needs_module
def test_from_tokens_agrees_with_the_formula(backend="cpu", **changes):
    """Every loss and gradient, within a unit in the last place of each; the losses are means over pixels."""
    inputs = block_inputs(BF16, op=FROM_TOKENS, image_size=(1, 8, 16), width=16, depth=1, **changes)
    found, expected = testing.run(inputs, backend), testing.run(inputs, "reference")
    for loss, other in zip(found.outputs, expected.outputs, strict=True):
        assert testing.relative_error(loss, other) <= torch.finfo(BF16).eps / 8
    for name, gradient in found.gradients.items():
        assert testing.relative_error(gradient, expected.gradients[name]) <= 2 * torch.finfo(BF16).eps, name


@each_backend
def test_without_frequency_loss_and_sample_weights(implementation):
    inputs = block_inputs()
    tensors, options = inputs.tensors | {"sample_weight": None}, inputs.options | {"frequency_scale": 0.0}
    inputs = inputs._replace(tensors=tensors, options=options)
    losses, gradients = losses_and_gradients(one_op, inputs, implementation)
    expected, expected_gradients = losses_and_gradients(two_ops, inputs, "reference")
    for loss, other in zip(losses, expected, strict=True):
        assert testing.relative_error(loss, other) <= 1e-6
    for name, gradient in gradients.items():
        assert testing.relative_error(gradient, expected_gradients[name]) <= 5e-6, name


@each_backend
@pytest.mark.parametrize(("op", "dtype"), [(OP, F32), (OP, BF16), (OP, F16), (FROM_TOKENS, F16)])
def test_a_repeated_backward_gives_the_same_gradients(implementation, op, dtype):
    """The gradients that are kept are not changed, whatever a caller does to the results."""
    inputs = block_inputs(dtype, op=op)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    total = 2.0**10 * getattr(ops, op)(**leaves, **inputs.options, backend=implementation)[0]
    first = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(torch.nan)
    doubled = torch.autograd.grad(total, list(leaves.values()), torch.tensor(2.0), retain_graph=True)
    for gradient, other in zip(doubled, copies, strict=True):
        assert testing.relative_error(gradient, 2 * other) <= 1e-5  # float16: subnormal values
    total.backward()
    for leaf, other in zip(leaves.values(), copies, strict=True):
        assert torch.equal(leaf.grad, other)


@each_backend
def test_losses_may_be_changed_in_place(implementation):
    """As a sum over processes changes them for a log."""
    inputs = block_inputs()
    expected = losses_and_gradients(one_op, inputs, implementation)[1]
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    losses = one_op(leaves, inputs.options, implementation)
    for loss in losses:
        loss.detach().mul_(3)
    total = losses[0]
    total += 1
    total.backward()
    for name, gradient in expected.items():
        assert torch.equal(leaves[name].grad, gradient), name


@needs_module
def test_gradients_of_an_empty_batch_are_kept_as_those_of_others():
    """Their dtypes are those that fake tensors have."""
    inputs = block_inputs(F16, patch_size=4)
    tensors = {n: t[:0] if n in ("image", "cond", "target", "sample_weight") else t for n, t in inputs.tensors.items()}
    in_order = [tensors.get(name) for name in OPS[OP].names]
    options = (4, 0.7, "layer", 1e-6, "cpu", [tensor is not None for tensor in in_order])
    operator = torch.ops.deco_kernels.pixel_decoder_loss_with_gradients.default
    kept = operator(*in_order, *options)
    on_meta = operator(*[None if tensor is None else tensor.to("meta") for tensor in in_order], *options)
    assert [gradient.dtype for gradient in kept] == [gradient.dtype for gradient in on_meta]


@each_backend
def test_gradients_accumulate(implementation):
    inputs, other = block_inputs(), block_inputs(seed=1)
    weights = OPS["pixel_decoder"].names[2:-1]
    leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in weights}
    for one in (inputs, other):
        total, _, _ = one_op(one.tensors | leaves, inputs.options, implementation)
        (total / 2).backward()
    expected = [
        losses_and_gradients(
            one_op, one._replace(tensors=one.tensors | {n: inputs.tensors[n] for n in weights}), implementation
        )[1]
        for one in (inputs, other)
    ]
    for name, leaf in leaves.items():
        assert testing.relative_error(leaf.grad, (expected[0][name] + expected[1][name]) / 2) <= 1e-6, name


@each_backend
def test_the_incoming_gradient_is_not_rounded(implementation):
    """1.35 is 1.3516 in bfloat16."""
    inputs = block_inputs(BF16)
    gradient, scaled = (
        losses_and_gradients(one_op, inputs, implementation, factor)[1]["cond"].double() for factor in (1.0, 1.35)
    )
    assert abs((scaled * gradient).sum() / gradient.square().sum() - 1.35) <= 2e-4


def test_a_backward_on_a_device_reads_each_kept_gradient_once():
    """On the device "meta" as on a GPU: one kernel for each 16-bit gradient, and one for all others."""
    dtypes = (F32, BF16, F32, F32, BF16)
    kept = [torch.empty(5, 7, dtype=dtype, device="meta") for dtype in dtypes]
    with OperatorNames() as names:
        found = scaled(kept, torch.empty((), device="meta"))
    assert [product.dtype for product in found] == list(dtypes)
    assert sorted(name for name in names if "mul" in name) == ["aten._foreach_mul.Tensor", *["aten.mul.out"] * 2]
    assert not [name for name in names if "copy" in name]


def test_the_product_of_a_16_bit_gradient_is_rounded_once():
    """What `scaled` relies on for 16-bit gradients on a device."""
    gradient, factor = torch.randn(1000).to(BF16), torch.tensor(1.3519)
    found = torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient))
    assert torch.equal(found, (gradient.double() * factor.double()).to(BF16))
    assert torch.equal(found, scaled([gradient], factor)[0])


@needs_module
@pytest.mark.parametrize(("op", "patch_size"), [(OP, 8), (OP, 4), (FROM_TOKENS, 8)])
def test_float16_with_a_loss_scale_of_2_to_the_16(op, patch_size):
    check_loss_scale("cpu", patch_size, op)


def check_loss_scale(backend, patch_size, op=OP):
    """Without the scale the gradient of cond or tokens, about 1e-6, would be subnormal in float16."""
    inputs = block_inputs(F16, patch_size, op=op, image_size=(4, 32, 64), width=16, depth=1)
    if op == FROM_TOKENS:
        inputs.tensors["up_weight"] /= 16
    scale = 2.0**16

    def call(tensors, options, backend):
        return getattr(ops, op)(**tensors, **options, backend=backend)

    _, found = losses_and_gradients(call, inputs, backend, scale)
    _, expected = losses_and_gradients(call, testing.in_float64(inputs), "reference", scale)
    name = "cond" if op == OP else "tokens"
    assert expected[name].abs().mean() < scale * torch.finfo(F16).smallest_normal / 2
    for name, gradient in found.items():
        assert testing.relative_error(gradient, expected[name]) <= 2 * torch.finfo(F16).eps, name


@each_backend
def test_autocast_casts_cond(implementation):
    """The gradients come back in the dtype of the arguments, and the losses stay in float32."""
    inputs = block_inputs()
    cast = inputs._replace(tensors=inputs.tensors | {"cond": inputs.tensors["cond"].to(BF16)})
    losses, gradients = losses_and_gradients(one_op, cast, implementation)
    with torch.autocast("cpu", BF16):
        found = losses_and_gradients(one_op, inputs, implementation)
    for loss, other in zip(found[0], losses, strict=True):
        assert loss.dtype is F32 and torch.equal(loss, other)
    for name, gradient in found[1].items():
        assert gradient.dtype is F32 and torch.equal(gradient, gradients[name].to(F32)), name


@each_backend
def test_only_total_is_differentiable(implementation):
    inputs = block_inputs()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    total, pixel, frequency = one_op(leaves, inputs.options, implementation)
    assert total.requires_grad and not pixel.requires_grad and not frequency.requires_grad


@each_implementation
@pytest.mark.parametrize("op", [OP, FROM_TOKENS])
def test_losses_without_gradients(implementation, op, dtype=F32):
    """Computed by other code than with gradients, which takes the query and the head norm too."""
    query = "given" if op == OP else "tokens"
    sizes = {"image_size": (2, 16, 16), "width": 16, "depth": 1}
    inputs = block_inputs(dtype, op=op, query=query, head_norm="rms", **sizes)
    with torch.no_grad():
        found = getattr(ops, op)(**inputs.tensors, **inputs.options, backend=implementation)
    with_gradients = testing.run(inputs, implementation).outputs
    exact = testing.exact_results(inputs).outputs
    for loss, same, expected in zip(found, with_gradients, exact, strict=True):
        assert testing.relative_error(loss, same) <= 1e-6
        assert testing.relative_error(loss, expected) <= max(1e-6, torch.finfo(dtype).eps)


def test_without_gradients_only_the_losses_are_computed():
    inputs = block_inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_op(inputs.tensors, inputs.options, None)
        with torch.no_grad():
            one_op({name: tensor.requires_grad_() for name, tensor in inputs.tensors.items()}, inputs.options, None)
    names = [event.name for event in profile.events() if event.name.startswith("deco_kernels")]
    assert names == ["deco_kernels::pixel_decoder_loss"] * 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_gradient_that_a_transform_hides():
    """In vmap a tensor does not show that it needs a gradient: the backward runs the pass again."""
    inputs = block_inputs()
    cond, factors = inputs.tensors["cond"].detach().requires_grad_(), torch.tensor([1.0, 2.0])

    def total(factor):
        return one_op(inputs.tensors | {"cond": cond * factor}, inputs.options, None)[0]

    (mapped,) = torch.autograd.grad(torch.vmap(total)(factors).sum(), cond)
    expected = sum(torch.autograd.grad(total(factor), cond)[0] for factor in factors)
    assert testing.relative_error(mapped, expected) <= 1e-6


@needs_module
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_composition_of_a_training_step_takes_the_loss_in_one_pass(dtype, monkeypatch):
    """Only weights of the decoder need gradients. With one of target too, the loss takes two passes."""
    inputs, calls = block_inputs(dtype, patch_size=4), []
    for name in ("forward", "forward_with_gradient", "backward"):
        function = getattr(flow_matching_loss, name)
        recorded = functools.partial(
            lambda name, function, *given: calls.append(name) or function(*given), name, function
        )
        monkeypatch.setattr(flow_matching_loss, name, recorded)
    found = []
    for trained, expected in ((WEIGHTS, ["forward_with_gradient"]), ((*WEIGHTS, "target"), ["forward", "backward"])):
        calls.clear()
        leaves = {n: None if t is None else t.detach().requires_grad_(n in trained) for n, t in inputs.tensors.items()}
        losses = one_op(leaves, inputs.options, "cpu")
        (0.3 * losses[0]).backward()
        found.append(([loss.detach() for loss in losses], [leaves[name].grad for name in WEIGHTS]))
        assert calls == expected
    (losses, gradients), (other_losses, other_gradients) = found
    assert all(map(torch.equal, losses, other_losses)) and all(map(torch.equal, gradients, other_gradients))
    assert all(gradient.any() for gradient in gradients)


@needs_module
def test_the_composition_is_logged_once(caplog):
    composition.log_composition.cache_clear()
    inputs = block_inputs(patch_size=4)
    with caplog.at_level(logging.INFO, "deco_kernels"):
        for _ in range(2):
            testing.run(inputs, "cpu")
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "pixel_decoder_loss" in caplog.text and "'cpu'" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 4}, "image: expected 3 channels, got 4"),
        ({"image_size": (1, 4, 8)}, "image: expected a height of at least 5 pixels, got 4"),
        ({"image_size": (1, 8, 4)}, "image: expected a width of at least 5 pixels, got 4"),
    ],
)
def test_images_that_the_loss_does_not_take(changes, message):
    inputs = small_inputs(OP, patch_size=4, **changes)
    with pytest.raises(ValueError, match=f"{OP}: {message}"):
        one_op(inputs.tensors, inputs.options, None)


def test_frequency_scale():
    inputs = block_inputs()
    with pytest.raises(TypeError, match=f"{OP}: frequency_scale"):
        one_op(inputs.tensors, inputs.options | {"frequency_scale": None}, None)


class FaultyGradient:
    """The native module with gradients of a slightly different frequency_scale."""

    def __init__(self, module):
        self.module = module

    def pixel_decoder_loss(self, *arguments):
        function = self.module.pixel_decoder_loss
        names = re.search("Arguments: (.*)[.] Writes", function.__doc__)[1].split(", ")
        scale, backward = names.index("frequency_scale"), names.index("backward")
        changed = list(arguments)
        changed[scale] *= 1.001
        function(*changed)
        losses_only = [0 if name == "backward" else value for name, value in zip(names, arguments, strict=True)]
        assert arguments[backward] == 1
        function(*losses_only)


@needs_module
def test_a_fault_in_the_loss_gradient_is_caught(monkeypatch):
    inputs = testing.random_inputs(OP, image_size=(1, 64, 64), depth=1, width=16)
    exact, eager = (results(inputs).gradients for results in (testing.exact_results, testing.eager_results))

    def passes():
        found = testing.run(inputs, "cpu").gradients
        pair = (eager["cond"], exact["cond"])
        return testing.compare_tensors("cond", found["cond"], pair, dtype=F32, gradient=True).passed

    assert passes()
    module = native.cpu()
    monkeypatch.setattr(native, "cpu", lambda: FaultyGradient(module))
    assert not passes()
