"""The losses of backend "cuda", their kernels run by the emulator: accuracy, layouts, determinism, bad input."""

import pytest
import torch

from deco_kernels import BackendUnavailable, ops, testing
from deco_kernels.testing import emulation
from tests.golden_files import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, golden_cases, load_golden
from tests.ops import test_flow_matching_loss as losses
from tests.ops import test_kept_gradient as kept
from tests.ops.cases import BF16, CASES, F16, F32, Case, aligned, offset, small_inputs, transposed

pytestmark = pytest.mark.emulate

BACKEND = emulation.BACKEND
OPS = ("flow_matching_loss", "frequency_loss")
# What kernels read in place: sizes divisible by 8, dtypes of a pair; groups of blocks that an image does not fill.
IN_PLACE = [
    Case(BF16, image_size=(3, 40, 72)),
    Case(F16, image_size=(1, 64, 72)),
    Case(BF16, image_size=(2, 8, 264), other_dtype=F32),
    Case(F16, image_size=(1, 136, 32), other_dtype=F32),
]
# What goes through the padded difference: other sizes, and other pairs of dtypes.
PADDED = [Case(BF16, image_size=(1, 64, 72), other_dtype=F16), Case(F16, image_size=(1, 63, 68), other_dtype=F32)]
SHARED = [case for case in CASES["flow_matching_loss"] if case.dtype is not F32]
each_op = pytest.mark.parametrize("op", OPS)
each_path = pytest.mark.parametrize("size", [(2, 16, 40), (2, 13, 37)], ids=["in-place", "padded"])


def assert_same_bits(first: testing.Results, second: testing.Results):
    assert all(torch.equal(*pair) for pair in zip(first.outputs, second.outputs, strict=True))
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


def assert_close(first: testing.Results, second: testing.Results):
    """Within the rounding of the gradients' dtypes."""
    for output, other in zip(first.outputs, second.outputs, strict=True):
        assert testing.relative_error(output, other) <= 2e-6
    for name, gradient in first.gradients.items():
        assert testing.relative_error(gradient, second.gradients[name]) <= max(5e-6, torch.finfo(gradient.dtype).eps)


@each_op
@pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in (*IN_PLACE, *PADDED, *SHARED)])
def test_loss_rule_of_error(emulated, op, case, poisoned_memory):
    """What kernels read in place also with truncated sums of products."""
    inputs = case.inputs(op)
    before = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
    emulated.set_truncating(case in IN_PLACE)
    results = testing.run(inputs, BACKEND)
    failed = [str(row) for row in testing.compare(inputs, results) if not row.passed]
    assert not failed, "\n".join(failed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.tensors.items())
    assert all(output.dtype is F32 and output.dim() == 0 for output in results.outputs)
    for name, gradient in results.gradients.items():
        tensor = inputs.tensors[name]
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape and gradient.is_contiguous(), name


@each_op
@each_path
def test_barriers_order_all_accesses_of_shared_memory(emulated, op, size):
    inputs = testing.random_inputs(op, dtype=BF16, image_size=size)
    with emulation.checked_for_races(emulated):
        testing.run(inputs, BACKEND)


@pytest.mark.parametrize("path", golden_cases("freq_*"))
def test_loss_golden(emulated, path):
    """The golden pred is float32: rounded to bfloat16, with target shifted so that their difference stays."""
    tensors, metadata = load_golden(path)
    weight = ops.jpeg_frequency_weight(int(metadata["q"]), metadata["mode"], float(metadata["gamma"]))
    pred = tensors["pred"].to(BF16)
    target = (tensors["target"] - (tensors["pred"] - pred.float())).requires_grad_()
    _, pixel, frequency = ops.flow_matching_loss(pred, target, weight, backend=BACKEND)
    alone = ops.frequency_loss(pred, target, weight, backend=BACKEND)
    assert torch.equal(alone, frequency)
    for loss, name in ((pixel, "fm"), (frequency, "freq"), (alone, "freq")):
        assert testing.relative_error(loss, tensors[f"{name}_loss"].squeeze()) <= OUTPUT_TOLERANCE
        (gradient,) = torch.autograd.grad(loss, target, retain_graph=True)
        assert testing.relative_error(-gradient, tensors[f"grad_{name}"]) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("size", [(24, 40), (13, 40), (24, 9), (5, 7), (15, 8), (8, 131)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_constant_weights_give_the_squared_error_in_ycbcr(emulated, size, scale):
    """Parseval. The gradient of a float32 target comes out in float32."""
    target = torch.randn(2, 3, *size, requires_grad=True)
    pred, weight = torch.randn(2, 3, *size).to(BF16), torch.full((3, 8, 8), scale)
    loss = ops.frequency_loss(pred, target, weight, backend=BACKEND)
    (gradient,) = torch.autograd.grad(loss, target)
    exact = target.detach().double().requires_grad_()
    expected = ops.frequency_loss(pred.double(), exact, weight.double())
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert testing.relative_error(loss, expected) <= 5e-7
    assert testing.relative_error(gradient, expected_gradient) <= 5e-7


# --- determinism -----------------------------------------------------------------------------------------------------


@each_op
@each_path
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_loss_bits_do_not_depend_on_the_order_of_warps(emulated, op, size, dtype):
    inputs = testing.random_inputs(op, dtype=dtype, image_size=size)
    results = []
    for seed in (1, 2):
        emulated.set_seed(seed)
        results.append(testing.run(inputs, BACKEND))
    assert_same_bits(*results)


@each_path
def test_losses_and_image_gradients_do_not_depend_on_the_device(emulated, size):
    """Partial sums are stored per group of blocks; the gradient of frequency_weight has one per warp of the grid."""
    inputs = testing.random_inputs("flow_matching_loss", dtype=BF16, image_size=size)
    results = []
    for multiprocessors in (1, 3):
        emulated.set_device_limits(multiprocessors, emulation.SMALL_SHARED)
        results.append(testing.run(inputs, BACKEND))
        results[-1].gradients.pop("frequency_weight")
    assert_same_bits(*results)


# --- layouts ---------------------------------------------------------------------------------------------------------


def _channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@each_path
@pytest.mark.parametrize("view", [aligned, offset, transposed, _channels_last])
@pytest.mark.parametrize("name", ["pred", "target"])
def test_loss_of_views(emulated, size, view, name):
    inputs = testing.random_inputs("flow_matching_loss", dtype=BF16, image_size=size)
    viewed = inputs._replace(tensors=inputs.tensors | {name: view(inputs.tensors[name])})
    results, expected = testing.run(viewed, BACKEND), testing.run(inputs, BACKEND)
    if view is aligned or size[1] % 8:
        assert_same_bits(results, expected)
    else:
        assert_close(results, expected)  # pixel and frequency gradient are added in another order


@each_path
def test_loss_of_expanded_images_and_strided_weights(emulated, size):
    inputs = testing.random_inputs("flow_matching_loss", dtype=BF16, image_size=size)
    tensors = dict(inputs.tensors)
    tensors["pred"] = tensors["pred"][:1].expand_as(tensors["pred"])
    tensors["frequency_weight"] = transposed(tensors["frequency_weight"])
    tensors["sample_weight"] = torch.stack([tensors["sample_weight"]] * 2, 1)[:, 0]
    expanded = inputs._replace(tensors=tensors)
    contiguous = inputs._replace(tensors={name: tensor.contiguous() for name, tensor in tensors.items()})
    assert_same_bits(testing.run(expanded, BACKEND), testing.run(contiguous, BACKEND))


def test_loss_offsets_beyond_2_to_the_31_elements(emulated):
    """Two samples more than 2**31 elements apart in memory; only touched pages are backed by memory."""
    distance = 2**31 + 64
    far = torch.empty(distance + 3 * 64, dtype=BF16).as_strided((2, 3, 8, 8), (distance, 64, 8, 1))
    near = torch.randn(2, 3, 8, 8).to(BF16)
    far.copy_(near)
    target, weight = torch.randn(2, 3, 8, 8), ops.jpeg_frequency_weight()
    expected = ops.flow_matching_loss(near, target, weight, backend=BACKEND)
    assert all(map(torch.equal, ops.flow_matching_loss(far, target, weight, backend=BACKEND), expected))


@each_op
def test_loss_of_an_empty_batch(emulated, op, poisoned_memory):
    inputs = testing.random_inputs(op, dtype=BF16, image_size=(0, 8, 12))
    results = testing.run(inputs, BACKEND)
    assert not any(output.any() for output in results.outputs)
    for name, gradient in results.gradients.items():
        assert gradient.shape == inputs.tensors[name].shape and not gradient.any(), name


# --- outputs, inputs and gradients one by one ------------------------------------------------------------------------


@each_op
@each_path
def test_only_the_loss_gradients_asked_for(emulated, op, size):
    inputs = testing.random_inputs(op, dtype=BF16, image_size=size)
    expected = testing.run(inputs, BACKEND).gradients
    for wanted in inputs.tensors:
        leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in inputs.tensors.items()}
        outputs = getattr(ops, op)(**leaves, **inputs.options, backend=BACKEND)
        torch.autograd.backward(outputs if isinstance(outputs, tuple) else (outputs,), inputs.grad_outputs)
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
        assert torch.equal(leaves[wanted].grad, expected[wanted]), wanted


@each_path
@pytest.mark.parametrize("index", [0, 1, 2], ids=["total", "pixel", "frequency"])
def test_each_loss_has_its_gradient(emulated, size, index):
    inputs = testing.random_inputs("flow_matching_loss", dtype=BF16, other_dtype=F32, image_size=size)
    grads = tuple(gradient if i == index else torch.zeros(()) for i, gradient in enumerate(inputs.grad_outputs))
    inputs = inputs._replace(grad_outputs=grads)
    results, expected = testing.run(inputs, BACKEND), testing.exact_results(inputs)
    for name in ("target", "frequency_weight", "sample_weight"):
        assert testing.relative_error(results.gradients[name], expected.gradients[name]) <= 5e-6, name
    assert testing.relative_error(results.gradients["pred"], expected.gradients["pred"]) <= torch.finfo(BF16).eps
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    ops.flow_matching_loss(**leaves, **inputs.options, backend=BACKEND)[index].backward(grads[index])
    for name, leaf in leaves.items():  # without zeros for the others
        assert torch.equal(leaf.grad, results.gradients[name]), name


@each_path
def test_no_sample_weight_means_ones_on_cuda(emulated, size):
    inputs = testing.random_inputs("flow_matching_loss", dtype=BF16, image_size=size)
    ones, none = (
        testing.run(inputs._replace(tensors=inputs.tensors | {"sample_weight": weight}), BACKEND)
        for weight in (torch.ones(2), None)
    )
    ones.gradients.pop("sample_weight")
    assert_same_bits(ones, none)


@each_path
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_loss_weights_in_half_precision(emulated, size, dtype):
    inputs = testing.random_inputs("flow_matching_loss", dtype=BF16, image_size=size)
    for name in ("frequency_weight", "sample_weight"):
        inputs.tensors[name] = inputs.tensors[name].to(dtype)
    results, expected = testing.run(inputs, BACKEND), testing.exact_results(inputs)
    for name in ("frequency_weight", "sample_weight"):
        assert results.gradients[name].dtype == dtype
        assert testing.relative_error(results.gradients[name], expected.gradients[name]) <= torch.finfo(dtype).eps


@each_path
def test_float16_gradients_survive_a_loss_scale_of_2_to_the_16(emulated, size):
    losses.check_loss_scale(BACKEND, size, part=2.0**-10)


@each_op
@pytest.mark.parametrize("size", [(2, 16, 40), (2, 9, 16)], ids=["in-place", "repeated in the block below"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_the_losses(emulated, op, size, value):
    """For non-finite gradients the single matmul may give NaN where DCT, weighting and inverse give infinity."""
    inputs = testing.random_inputs(op, dtype=BF16, image_size=size)
    inputs.tensors["pred"][1, 0, 4, 3] = value
    results, expected = testing.run(inputs, BACKEND), testing.exact_results(inputs)
    for actual, exact in zip(results.outputs, expected.outputs, strict=True):
        assert torch.equal(actual.isnan(), exact.isnan()) and torch.equal(actual.isinf(), exact.isinf())
    for name in ("pred", "target"):
        assert torch.equal(results.gradients[name].isfinite(), expected.gradients[name].isfinite()), name


# --- losses and gradient in one pass ---------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in (*IN_PLACE, PADDED[1])])
def test_kept_gradient_has_the_bits_of_two_passes(emulated, op, case, poisoned_memory):
    tensors = dict(case.inputs("flow_matching_loss").tensors)
    for factor in (1.0, 0.3):
        losses, expected = kept.in_two_passes(op, tensors, factor, BACKEND)
        pred = tensors["pred"].detach().requires_grad_()
        first, kept_losses = kept.first_loss(op, tensors | {"pred": pred}, BACKEND)
        (gradient,) = torch.autograd.grad(first * factor, pred)
        assert torch.equal(gradient, expected)
        for loss, other in zip(kept_losses, losses, strict=True):
            assert testing.relative_error(loss, other) <= 2e-7


@each_op
@each_path
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_second_backward_has_its_own_gradient_on_cuda(emulated, op, size, factor):
    """And the first one leaves a kept gradient as it is only for an incoming gradient of 1."""
    tensors = dict(testing.random_inputs("flow_matching_loss", dtype=BF16, image_size=size).tensors)
    _, expected = kept.in_two_passes(op, tensors, factor, BACKEND)
    pred = tensors["pred"].detach().requires_grad_()
    first, _ = kept.first_loss(op, tensors | {"pred": pred}, BACKEND)
    keeps = size[1] % 8 == 0
    assert hasattr(first.grad_fn, "gradient") == keeps
    if keeps:
        first.grad_fn.gradient[0, 0, 0, 0] = 7
    gradients = [torch.autograd.grad(first * factor, pred, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(gradients[1], expected)
    assert torch.equal(gradients[0], expected) == (not keeps or factor != 1)


@each_op
def test_barriers_order_all_accesses_of_one_pass(emulated, op):
    tensors = dict(testing.random_inputs("flow_matching_loss", dtype=BF16, image_size=(2, 16, 40)).tensors)
    tensors["pred"].requires_grad_()
    with emulation.checked_for_races(emulated):
        for factor in (1.0, 0.3):
            (kept.first_loss(op, tensors, BACKEND)[0] * factor).backward()


# --- PyTorch's checks, and bad input ---------------------------------------------------------------------------------


@each_op
def test_loss_opcheck(emulated, op):
    inputs = small_inputs(op, BF16)
    arguments = (*inputs.in_order(), *inputs.options.values(), BACKEND)
    torch.library.opcheck(getattr(torch.ops.deco_kernels, op).default, arguments)
    for needs in ([True] * 4, [True, False, True, False]):
        backward = getattr(torch.ops.deco_kernels, f"{op}_backward").default
        torch.library.opcheck(backward, (*inputs.grad_outputs, *arguments, needs))


@each_op
def test_float32_predictions_are_refused_by_name(emulated, op):
    with pytest.raises(BackendUnavailable, match="pred of a loss.*bfloat16 or float16, not torch.float32"):
        testing.run(small_inputs(op, F32, other_dtype=BF16), BACKEND)


def test_loss_failures_name_the_op_and_its_sizes(emulated):
    image, nothing = (0, 1, 0, 0, 0, 1), (0,) * 3
    description, losses = ((2, 16, 24), image, image, (0, 0, 0, 0), 1.0), (nothing, (0.0, 0.0), (0, 0))
    needed = emulated.flow_matching_loss_forward_workspace(0, *description, *losses)
    workspace = torch.empty(needed, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"flow_matching_loss on pred \[2, 3, 16, 24\].*workspace"):
        emulated.flow_matching_loss_forward((0, 0, workspace.data_ptr(), needed - 1), *description, *losses)
    gradients = (nothing, (1, 0) * 4, 0)
    needed = emulated.flow_matching_loss_backward_workspace(0, *description, *gradients)
    with pytest.raises(RuntimeError, match=r"flow_matching_loss_backward on pred \[2, 3, 16, 24\].*workspace"):
        emulated.flow_matching_loss_backward((0, 0, 0, needed - 1), *description, *gradients)
    too_many = ((1, 1 << 16, 1 << 15), *description[1:])
    with pytest.raises(ValueError, match="2\\^31 or more pixels"):
        emulated.flow_matching_loss_forward((0, 0, 0, 1 << 40), *too_many, *losses)
