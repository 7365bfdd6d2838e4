"""Tests specific to the losses: golden tensors, Parseval, padding, separate losses, loss scaling, JPEG tables."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deco_kernels import ops, testing
from deco_kernels.backends.reference import flow_matching_loss as formulas
from deco_kernels.ops import registry
from tests.golden_files import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, golden_cases, load_golden, relative_error
from tests.ops.cases import BF16, F16, F32, IMPLEMENTATIONS

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
TENSORS = ("pred", "target", "frequency_weight", "sample_weight")


def random_loss_inputs(size=(2, 21, 30), **changes):
    """By default fewer than 4,096 pixels; height and width are not multiples of 8."""
    return testing.random_inputs("flow_matching_loss", image_size=size, **changes)


def gradients(inputs, implementation, combine):
    """Gradients of combine(total, pixel, frequency) with respect to every tensor."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    losses = ops.flow_matching_loss(**leaves, **inputs.options, backend=implementation)
    found = torch.autograd.grad(combine(*losses), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


class OperatorNames(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.found.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


# Of PyTorch's list of operators that raise on a GPU under torch.use_deterministic_algorithms(True).
RAISING = re.compile(
    "reflection_pad.*_backward|upsample_.*_backward|cumsum|scatter_reduce|put_|index_put.*|grid_sampl.*"
)


def test_the_reference_runs_with_deterministic_algorithms():
    """Also for images that are padded. What F.pad runs is found."""
    inputs = random_loss_inputs()
    with OperatorNames() as names:
        formulas.forward(**inputs.tensors, **inputs.options)
        formulas.backward(*inputs.grad_outputs, *inputs.tensors.values(), *inputs.options.values(), [True] * 4)
    assert "mm" in names.found or "bmm" in names.found
    assert not list(filter(RAISING.fullmatch, names.found))
    with OperatorNames() as names:
        F.pad(inputs.tensors["pred"].requires_grad_(), (0, 2, 0, 3), mode="reflect").sum().backward()
    assert list(filter(RAISING.fullmatch, names.found)) == ["reflection_pad2d_backward"]


# --- golden tensors --------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("path", golden_cases("freq_*"))
def test_golden(implementation, path):
    golden = load_golden(path)
    tensors, metadata = golden.tensors, golden.metadata
    weight = ops.jpeg_frequency_weight(int(metadata["q"]), metadata["mode"], float(metadata["gamma"]))
    assert relative_error(weight, tensors["weight"]) <= 1e-6

    pred = tensors["pred"].requires_grad_()
    _, pixel, frequency = ops.flow_matching_loss(pred, tensors["target"], weight, backend=implementation)
    assert relative_error(pixel, tensors["fm_loss"].squeeze()) <= OUTPUT_TOLERANCE
    assert relative_error(frequency, tensors["freq_loss"].squeeze()) <= OUTPUT_TOLERANCE
    alone = ops.frequency_loss(pred, tensors["target"], weight, backend=implementation)
    assert relative_error(alone, tensors["freq_loss"].squeeze()) <= OUTPUT_TOLERANCE
    for loss, name in ((pixel, "grad_fm"), (frequency, "grad_freq"), (alone, "grad_freq")):
        (gradient,) = torch.autograd.grad(loss, pred, retain_graph=True)
        assert relative_error(gradient, tensors[name]) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("path", golden_cases("freq_*"))
def test_golden_coefficients(path):
    tensors = load_golden(path).tensors
    assert relative_error(formulas.block_dct_ycbcr(tensors["pred"]), tensors["dct_of_pred_ycbcr"]) <= OUTPUT_TOLERANCE


# --- identities ------------------------------------------------------------------------------------------------------


def ycbcr(image):
    return torch.einsum("kc,bchw->bkhw", image.new_tensor(formulas.RGB_TO_YCBCR), image)


@each_implementation
@pytest.mark.parametrize("size", [(24, 40), (13, 40), (24, 9), (5, 7), (15, 8), (8, 531)])
def test_at_quality_100_the_frequency_loss_is_the_squared_error_in_ycbcr(implementation, size):
    """Parseval: the DCT is orthonormal. The squared error is that of the padded images."""
    pred, target = torch.randn(2, 3, *size), torch.randn(2, 3, *size)
    pred.requires_grad_()
    loss = ops.frequency_loss(pred, target, ops.jpeg_frequency_weight(100), backend=implementation)
    (gradient,) = torch.autograd.grad(loss, pred)

    exact = pred.detach().double().requires_grad_()
    height, width = size
    padded = F.pad(ycbcr(exact - target.double()), (0, -width % 8, 0, -height % 8), mode="reflect")
    expected = padded.square().mean()
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert relative_error(loss, expected) <= 2e-6
    assert relative_error(gradient, expected_gradient) <= 5e-6


@each_implementation
@pytest.mark.parametrize("size", [(9, 16), (15, 8), (16, 13), (19, 29), (5, 5), (17, 523), (16, 519)])
def test_the_gradient_is_the_adjoint_of_the_padding(implementation, size):
    """The frequency loss is quadratic in d = pred - target, so <gradient, d> = 2 * loss."""
    inputs = random_loss_inputs((2, *size))
    found = gradients(inputs, implementation, lambda total, pixel, frequency: frequency)["pred"]
    exact = testing.in_float64(inputs)
    expected = gradients(exact, "reference", lambda total, pixel, frequency: frequency)["pred"]
    loss = ops.flow_matching_loss(**exact.tensors, **exact.options)[2]
    difference = exact.tensors["pred"] - exact.tensors["target"]
    assert abs((found.double() * difference).sum() / (2 * loss) - 1) <= 5e-6
    assert relative_error(found, expected) <= 5e-6


# --- outputs and inputs one by one -----------------------------------------------------------------------------------


COMBINATIONS = {
    "total": lambda total, pixel, frequency: total,
    "pixel": lambda total, pixel, frequency: pixel,
    "frequency": lambda total, pixel, frequency: frequency,
    "all": lambda total, pixel, frequency: 0.3 * total - 1.7 * pixel + 2.5 * frequency,
}


@each_implementation
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_each_loss_alone_and_all_together(implementation, combination):
    inputs = random_loss_inputs()
    found = gradients(inputs, implementation, COMBINATIONS[combination])
    expected = gradients(testing.in_float64(inputs), "reference", COMBINATIONS[combination])
    for name in TENSORS:
        if combination == "pixel" and name == "frequency_weight":
            assert found[name] is None or not found[name].any()
            continue
        assert relative_error(found[name], expected[name]) <= 5e-6, name


@each_implementation
@pytest.mark.parametrize("used", [0, 1, 2], ids=["total", "pixel", "frequency"])
def test_a_loss_that_is_not_used_needs_no_zeros(implementation, used, monkeypatch):
    """The backend gets None, and the same gradients follow."""
    given, serve = [], registry.serve

    def recorded(function, *arguments):
        if function == "backward":
            given.extend(arguments[3:6])
        return serve(function, *arguments)

    inputs = random_loss_inputs()
    expected = gradients(inputs, implementation, lambda *losses: losses[used] + 0 * sum(losses))
    monkeypatch.setattr(registry, "serve", recorded)
    found = gradients(inputs, implementation, lambda *losses: losses[used])
    assert [gradient is not None for gradient in given] == [index == used for index in range(3)]
    for name in TENSORS:
        assert torch.equal(found[name], expected[name]), name


@each_implementation
def test_total_is_pixel_plus_scaled_frequency(implementation):
    inputs = random_loss_inputs()
    for scale in (0.0, 1.0, -2.5):
        total, pixel, frequency = ops.flow_matching_loss(
            **inputs.tensors, frequency_scale=scale, backend=implementation
        )
        assert relative_error(total, pixel.double() + scale * frequency.double()) <= 1e-6
        assert all(loss.dtype is F32 and loss.dim() == 0 for loss in (total, pixel, frequency))


@each_implementation
def test_frequency_loss_is_the_second_loss(implementation):
    inputs = random_loss_inputs()
    _, _, frequency = ops.flow_matching_loss(**inputs.tensors, backend=implementation)
    assert torch.equal(ops.frequency_loss(**inputs.tensors, backend=implementation), frequency)


@each_implementation
def test_the_gradient_of_target_is_that_of_pred_negated(implementation):
    found = gradients(random_loss_inputs(), implementation, COMBINATIONS["total"])
    assert found["pred"].any() and torch.equal(found["pred"], -found["target"])


@each_implementation
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("other_dtype", [F32, BF16, F16])
def test_every_mix_of_dtypes(implementation, dtype, other_dtype):
    inputs = random_loss_inputs((1, 61, 75), dtype=dtype, other_dtype=other_dtype)
    rows = testing.compare(inputs, testing.run(inputs, implementation))
    assert not [str(row) for row in rows if not row.passed]


# --- sample weights --------------------------------------------------------------------------------------------------


@each_implementation
def test_sample_weights_are_not_renormalised(implementation):
    inputs = random_loss_inputs((3, 16, 24))
    weights = torch.tensor([0.5, 0.0, -3.0])
    whole = ops.flow_matching_loss(**{**inputs.tensors, "sample_weight": weights}, backend=implementation)
    single = [
        ops.flow_matching_loss(
            inputs.tensors["pred"][b : b + 1],
            inputs.tensors["target"][b : b + 1],
            inputs.tensors["frequency_weight"],
            backend=implementation,
        )
        for b in range(3)
    ]
    for index in range(3):
        expected = sum(weights[b].double() * single[b][index].double() for b in range(3)) / 3
        assert relative_error(whole[index], expected) <= 2e-6


@each_implementation
def test_no_sample_weight_means_ones(implementation):
    inputs = random_loss_inputs()
    ones, none = (
        testing.run(inputs._replace(tensors={**inputs.tensors, "sample_weight": weight}), implementation)
        for weight in (torch.ones(2), None)
    )
    assert all(torch.equal(*pair) for pair in zip(ones.outputs, none.outputs, strict=True))
    for name in ("pred", "target", "frequency_weight"):
        assert torch.equal(ones.gradients[name], none.gradients[name])


@each_implementation
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_weights_in_half_precision_have_gradients_of_their_dtype(implementation, dtype):
    inputs = random_loss_inputs()
    for name in ("frequency_weight", "sample_weight"):
        inputs.tensors[name] = inputs.tensors[name].to(dtype)
    found = gradients(inputs, implementation, COMBINATIONS["total"])
    expected = gradients(testing.in_float64(inputs), "reference", COMBINATIONS["total"])
    for name in ("frequency_weight", "sample_weight"):
        assert found[name].dtype == dtype
        assert relative_error(found[name], expected[name]) <= torch.finfo(dtype).eps


# --- loss scaling ----------------------------------------------------------------------------------------------------


@each_implementation
def test_float16_with_a_loss_scale_of_2_to_the_16(implementation):
    check_loss_scale(implementation, (16, 64, 96))


def check_loss_scale(backend, size, part=1.0):
    """Without the scale the gradients of a part of the loss, about 1e-6, would be subnormal in float16."""
    inputs, scale = random_loss_inputs(size, dtype=F16), 2.0**16
    scaled, unscaled = (
        gradients(inputs, backend, lambda total, *_, factor=factor: total * factor)["pred"]
        for factor in (part * scale, part)
    )
    exact = gradients(testing.in_float64(inputs), "reference", COMBINATIONS["total"])["pred"] * part
    rounding = relative_error((exact * scale).to(F16), exact * scale)
    assert relative_error(scaled, exact * scale) <= 1.1 * rounding
    assert relative_error(unscaled, exact) > 4 * rounding


# --- large tensors ---------------------------------------------------------------------------------------------------


@each_implementation
def test_gradients_larger_than_the_caches(implementation):
    """They are written with non-temporal stores, from rows whose ends are not aligned to a vector."""
    for size, dtype in (((2, 250, 701), F32), ((2, 360, 512), F32), ((3, 333, 709), BF16)):
        inputs = random_loss_inputs(size, dtype=dtype)
        found = gradients(inputs, implementation, COMBINATIONS["total"])
        expected = gradients(inputs._replace(tensors=in_float32(inputs)), "reference", COMBINATIONS["total"])
        for name in ("pred", "target"):
            assert relative_error(found[name], expected[name].to(dtype)) <= (5e-6 if dtype is F32 else 2e-4), name


def in_float32(inputs):
    return {name: tensor.to(F32) for name, tensor in inputs.tensors.items()}


@each_implementation
def test_offsets_beyond_2_to_the_31_elements(implementation):
    """Two samples more than 2**31 elements apart in memory; only touched pages are backed by memory."""
    distance = 2**31 + 64
    storage = torch.empty(distance + 3 * 8 * 8, dtype=BF16)
    far = storage.as_strided((2, 3, 8, 8), (distance, 64, 8, 1))
    near = torch.randn(2, 3, 8, 8).to(BF16)
    far.copy_(near)
    target, weight = torch.randn(2, 3, 8, 8), ops.jpeg_frequency_weight()
    for images in ((far, target), (target, far)):
        expected = [near if image is far else image for image in images]
        for actual, other in zip(
            ops.flow_matching_loss(*images, weight, backend=implementation),
            ops.flow_matching_loss(*expected, weight, backend=implementation),
            strict=True,
        ):
            assert torch.equal(actual, other)


# --- JPEG tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "first_row"),
    [
        (1, [255] * 8),  # scale 5000: 10 * 50 = 500 and more, clamped
        (49, [16, 11, 10, 16, 24, 41, 52, 62]),  # scale 5000/49
        (50, [16, 11, 10, 16, 24, 40, 51, 61]),  # scale 100: the table itself
        (85, [5, 3, 3, 5, 7, 12, 15, 18]),  # scale 30
        (100, [1] * 8),  # scale 0, clamped
    ],
)
def test_jpeg_quantisers(quality, first_row):
    """In mode "inv" the weights of a row are proportional to 1 / quantizer."""
    weight = ops.jpeg_frequency_weight(quality, "inv")
    assert weight.shape == (3, 8, 8) and weight.dtype is F32
    expected = 1 / torch.tensor(first_row, dtype=torch.float64)
    assert relative_error(weight[0, 0] / weight[0, 0, 0], expected / expected[0]) <= 1e-6
    assert torch.equal(weight[1], weight[2])
    assert torch.allclose(weight.mean((1, 2)), torch.ones(3))


def test_jpeg_weights_on_any_device():
    expected = ops.jpeg_frequency_weight()
    with torch.device("meta"):
        assert ops.jpeg_frequency_weight().device.type == "meta"
        found = ops.jpeg_frequency_weight(device="cpu")
    assert torch.equal(found, expected)


def test_jpeg_weight_modes():
    """ "inv_gamma" is a power of "inv" up to normalization; the published choice is the default."""
    inverse = ops.jpeg_frequency_weight(85, "inv").double()
    for gamma in (0.0, 0.5, 1.0, 2.0):
        power = inverse**gamma
        expected = power / power.mean((1, 2), keepdim=True)
        assert relative_error(ops.jpeg_frequency_weight(85, "inv_gamma", gamma), expected) <= 1e-6
    assert torch.equal(ops.jpeg_frequency_weight(), ops.jpeg_frequency_weight(85, "inv_gamma", 1.0))
    assert torch.equal(ops.jpeg_frequency_weight(100), torch.ones(3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quality": 0}, ValueError, "quality: expected 1 to 100, got 0"),
        ({"quality": 101}, ValueError, "quality: expected 1 to 100, got 101"),
        ({"quality": "85"}, TypeError, "quality: expected a Python float, got str"),
        ({"quality": True}, TypeError, "quality"),
        ({"mode": "inverse"}, ValueError, "mode: expected 'inv' or 'inv_gamma', got 'inverse'"),
        ({"gamma": None}, TypeError, "gamma"),
        ({"gamma": float("inf")}, ValueError, "gamma: expected a finite number"),
        ({"gamma": 1e6}, ValueError, "gamma: expected an exponent whose weights are finite"),
    ],
)
def test_jpeg_weight_errors(arguments, error, message):
    with pytest.raises(error, match=f"jpeg_frequency_weight: {message}"):
        ops.jpeg_frequency_weight(**arguments)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [ops.flow_matching_loss, ops.frequency_loss])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred": torch.randn(2, 4, 16, 16)}, r"pred: expected shape \[B, 3, H, W\] = \[2, 3, 16, 16\]"),
        ({"target": torch.randn(2, 3, 16, 24)}, r"target: expected shape .*got \[2, 3, 16, 24\]"),
        ({"frequency_weight": torch.ones(8, 8)}, r"frequency_weight: expected shape \[3, 8, 8\]"),
        ({"sample_weight": torch.ones(3)}, r"sample_weight: expected shape \[B\] = \[2\], got \[3\]"),
        ({"sample_weight": torch.ones(2, 1)}, r"sample_weight: expected shape \[B\]"),
    ],
)
def test_bad_shapes(loss, changes, message):
    arguments = {
        "pred": torch.randn(2, 3, 16, 16),
        "target": torch.randn(2, 3, 16, 16),
        "frequency_weight": torch.ones(3, 8, 8),
    } | changes
    with pytest.raises(ValueError, match=f"{loss.__name__}: {message}"):
        loss(**arguments)
