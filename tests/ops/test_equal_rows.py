"""Hard cases of the norms: rows of equal or nearly equal channels, and rows whose variance or square overflows."""

import functools
import itertools

import pytest
import torch

from deco_kernels import testing
from tests.ops.cases import BF16, F16, F32, IMPLEMENTATIONS, small_inputs

OPS = ("adaln_block", "upsample_modulate", "pixel_decoder", "pixel_decoder_from_tokens")
OFFSETS, DEVIATIONS = (0.0, 1.0, 10.0, 100.0, 1000.0), (1e-7, 1e-4, 1.0)
WIDTHS = (16, 32, 64)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
each_op = pytest.mark.parametrize("op", OPS)


def cases():
    """(dtype, D, offset, deviation): float32 at every pair of the last two, half precision at a sixth of them; every
    width meets every dtype, offset and deviation."""
    widths = itertools.cycle(WIDTHS)
    pairs = list(itertools.product(DEVIATIONS, OFFSETS))
    found = [(F32, next(widths), offset, deviation) for deviation, offset in pairs]
    found += [(dtype, next(widths), *pair[::-1]) for dtype in (BF16, F16) for pair in pairs[2::5]]
    return found


def inputs_of(op, dtype, width, offset, deviation):
    sizes = {"patch_size": 16 if "decoder" in op else 4, "image_size": (1, 32, 32)}
    inputs = testing.random_inputs(op, dtype=dtype, width=width, depth=2, token_width=9, **sizes)
    return testing.with_equal_rows(inputs, offset, deviation)


@functools.cache
def expected(op, *case):
    """(exact, eager), the same for every implementation."""
    inputs = inputs_of(op, *case)
    return testing.exact_results(inputs), testing.eager_results(inputs)


@each_implementation
@pytest.mark.parametrize("op", OPS[:3])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_nearly_equal_channels(implementation, op, case):
    """For a decoder, checks only per-pixel results and the table. The error of a mean is common to the channels of a
    row, so that the errors of the weight gradients depend on as few numbers as the image has channels, and which
    implementation has the smaller error is random."""
    inputs = inputs_of(op, *case)
    rows = testing.compare(inputs, testing.run(inputs, implementation), *expected(op, *case))
    if op == "pixel_decoder":
        rows = [row for row in rows if row.name in ("output 0", "grad image", "grad cond", "grad pixel_table")]
    failed = [str(row) for row in rows if not row.passed]
    assert rows and not failed, "\n".join(failed)


@each_implementation
@each_op
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
def test_equal_channels_normalize_to_zero(implementation, op, dtype, width):
    """Exactly, for any value: 1 / sqrt(eps) = 1,000 would multiply an error of the mean."""
    inputs = small_inputs(op, dtype, width=width, depth=1)
    zero = testing.run(testing.with_equal_rows(inputs, 0.0), implementation)
    for offset in OFFSETS[1:]:
        rows = testing.with_equal_rows(inputs, offset)
        results = testing.run(rows, implementation)
        if op == "adaln_block":  # h' is h plus the same update, rounded once
            h = rows.tensors["h"]
            error = (results.outputs[0].double() - h.double() - zero.outputs[0].double()).abs()
            assert (error <= 1.01 * torch.finfo(dtype).eps * (h.double().abs() + zero.outputs[0].double().abs())).all()
        else:
            assert all(torch.equal(*pair) for pair in zip(results.outputs, zero.outputs, strict=True))
        if implementation != "reference":  # PyTorch's backward computes x rstd - mean rstd
            gradient = results.gradients["head_weight" if "decoder" in op else "norm_weight"]
            assert not gradient.any()


@each_implementation
@each_op
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [1e19, 1e25])
def test_a_variance_that_overflows_gives_nan(implementation, op, dtype, size):
    """Same result as for a NaN pixel. The reference, PyTorch's LayerNorm, may give 0 if no square overflows."""
    if implementation == "reference" and size < 1e20:
        pytest.skip("PyTorch's LayerNorm divides by infinity")
    inputs = small_inputs(op, dtype)
    overflowing, nan = (inputs._replace(tensors=dict(inputs.tensors)) for _ in range(2))
    name = "h" if "h" in inputs.tensors else "image"
    where = (0, 5) if name == "h" else (0, slice(None), 1, 2)
    for changed, factor in ((overflowing, size), (nan, torch.nan)):
        changed.tensors[name] = inputs.tensors[name].clone()
        changed.tensors[name][where] *= factor
    results, exact = testing.run(overflowing, implementation), testing.exact_results(nan)
    assert exact.outputs[0].isnan().any() and not exact.outputs[0].isnan().all()
    for output, wanted in zip(results.outputs, exact.outputs, strict=True):
        assert torch.equal(output.isnan(), wanted.isnan())
    for argument, gradient in results.gradients.items():
        assert torch.equal(gradient.isnan(), exact.gradients[argument].isnan()), argument


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], indirect=True)
def test_a_mean_square_that_overflows_gives_nan(implementation):
    """In the RMS head alone: the variance of equal channels is 0. The reference divides by infinity."""
    inputs = small_inputs("pixel_decoder", query="given", head_norm="rms")
    overflowing, nan = (inputs._replace(tensors=dict(inputs.tensors)) for _ in range(2))
    for changed, value in ((overflowing, 1e20), (nan, torch.nan)):
        changed.tensors["query"] = inputs.tensors["query"].clone()
        changed.tensors["query"][0, 5] = value
    results, exact = testing.run(overflowing, implementation), testing.exact_results(nan)
    assert exact.outputs[0].isnan().sum() == 3
    assert torch.equal(results.outputs[0].isnan(), exact.outputs[0].isnan())
    for argument, gradient in results.gradients.items():
        assert torch.equal(gradient.isnan(), exact.gradients[argument].isnan()), argument


# Patches and images whose last tiles of pixels or tokens are partly empty.
PARTLY_EMPTY = [(1, (1, 7, 11)), (2, (1, 10, 6)), (8, (1, 8, 24))]
HEADS = [(op, None) for op in OPS[:2]] + list(itertools.product((*OPS[2:], "pixel_decoder_loss"), ("layer", "rms")))


def with_one_source_per_pixel(inputs):
    """The same call of a decoder where the odd pixels of each patch, and a patch's only one, have no table, and the
    others neither image nor query: the table's row of one pixel and the image of none make a row of zeros."""
    tensors = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
    table = tensors["pixel_table"]
    if len(table) == 1:
        return inputs._replace(tensors=tensors | {"pixel_table": torch.zeros_like(table)})
    table[1::2] = 0
    tensors["image"][..., 0::2] = 0
    for name, tensor in tensors.items():
        if name == "query":
            tensor[:, 0::2] = 0
        elif name in ("query_weight", "query_bias"):
            tensor.unflatten(0, table.shape)[0::2] = 0
    return inputs._replace(tensors=tensors)


@each_implementation
@pytest.mark.parametrize(("op", "head_norm"), HEADS)
@pytest.mark.parametrize(("dtype", "sizes"), [(F32, (1, (1, 5, 13))), *((BF16, s) for s in PARTLY_EMPTY)], ids=str)
def test_an_eps_of_zero_in_partly_empty_tiles(implementation, op, head_norm, dtype, sizes):
    """A row of zeros has no inverse deviation: nothing of the places that fill a tile may reach a result."""
    patch_size, image_size = sizes
    head = {"head_norm": head_norm, "query": "tokens" if "tokens" in op else "given"} if head_norm else {}
    inputs = small_inputs(op, dtype, width=16, depth=1, patch_size=patch_size, image_size=image_size, **head)
    inputs = inputs._replace(options=inputs.options | {"eps": 0.0})
    if head_norm:
        inputs = with_one_source_per_pixel(inputs)
    rows = testing.compare(inputs, testing.run(inputs, implementation))
    failed = [str(row) for row in rows if not row.passed]
    assert rows and not failed, "\n".join(failed)


@each_implementation
@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens"])
@pytest.mark.parametrize("image_size", [(2, 0, 12), (2, 8, 0)])
def test_images_without_pixels_have_zero_gradients(implementation, op, image_size):
    inputs = small_inputs(op, BF16, image_size=image_size)
    results = testing.run(inputs, implementation)
    assert results.outputs[0].shape == inputs.tensors["image"].shape
    for name, gradient in results.gradients.items():
        assert gradient.shape == inputs.tensors[name].shape and not gradient.any(), name
