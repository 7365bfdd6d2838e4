"""pixel_decoder_loss of backend "cuda" in one pass by chunks, its kernels run by the emulator."""

import pytest
import torch

from deco_kernels import ops, testing
from deco_kernels.backends import chunk_sizes
from deco_kernels.signatures import BLOCK
from deco_kernels.testing import emulation
from tests.backends import test_cuda_ops as cuda_ops
from tests.ops import test_pixel_decoder_loss as one_pass
from tests.ops.cases import BF16, DECODER_LOSS_CASES, F16, F32, gradients_one_by_one, small_inputs

pytestmark = pytest.mark.emulate

OP, BACKEND = one_pass.OP, emulation.BACKEND
SHARED = [c._replace(query=None, head_norm="layer") for c in DECODER_LOSS_CASES if c.dtype is not F32]
FAST = [case for case in SHARED if case.patch_size >= BLOCK and case.width <= 32]
EXTENDED = ((BF16, 32, 16), (BF16, 32, 4))  # dtype, D, p of cases that get a query and an RMS head: one pass, two ops
OF_A_CHUNK = ["pixel_decoder_keeping_forward", "flow_matching_loss_gradient_and_sums", "pixel_decoder_head"]


def set_chunk(monkeypatch, pixels):
    monkeypatch.setattr(chunk_sizes, "chunk_pixels", lambda *_, **__: pixels)


def names_of_launches(emulated, inputs):
    return [name for name, *_ in emulated.launches_of(lambda: testing.run(inputs, BACKEND))]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.label, marks=[] if case in FAST else pytest.mark.long) for case in SHARED]
)
def test_rule_of_error_by_chunks(emulated, case, monkeypatch, poisoned_memory):
    """Several chunks; float16 also with truncated sums of products and truncated tanh."""
    if (case.dtype, case.width, case.patch_size) in EXTENDED:
        case = case._replace(**cuda_ops.EXTENDED[OP])
    inputs = case.inputs(OP)
    before = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
    set_chunk(monkeypatch, 1500)
    emulated.set_truncating(case.dtype is F16)
    results = testing.run(inputs, BACKEND)
    cuda_ops.assert_rule_of_error(inputs, results)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.tensors.items())
    for name, gradient in results.gradients.items():
        tensor = inputs.tensors[name]
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape, name


@pytest.mark.parametrize(("dtype", "patch_size"), [(BF16, 8), (F16, 16), (F16, 4)])
def test_agrees_with_the_two_ops(emulated, dtype, patch_size):
    """float16 with a query and an RMS head."""
    extension = cuda_ops.EXTENDED[OP] if dtype is F16 else {}
    one_pass.test_agrees_with_the_two_ops(BACKEND, dtype, patch_size, **extension)


def test_float16_with_a_loss_scale_of_2_to_the_16(emulated):
    one_pass.check_loss_scale(BACKEND, patch_size=8)


def test_from_tokens(emulated):
    one_pass.test_from_tokens_agrees_with_the_formula(BACKEND, query="tokens", head_norm="rms")


def test_chunks_give_the_same_results(emulated, monkeypatch):
    """A row of patches, an image, two images, and the batch of three."""
    sizes = {"width": 16, "depth": 2, "patch_size": 8, "image_size": (3, 24, 32)}
    inputs = testing.random_inputs(OP, dtype=BF16, **sizes, **cuda_ops.EXTENDED[OP])
    whole = testing.run(inputs, BACKEND)
    for pixels, chunks in ((1, 9), (512, 6), (768, 3), (1536, 2)):
        set_chunk(monkeypatch, pixels)
        assert names_of_launches(emulated, inputs).count(OF_A_CHUNK[0]) == chunks
        found = testing.run(inputs, BACKEND)
        cuda_ops.assert_close(found, whole, 2e-6)
        for name in ("image", "cond", "query", "target"):
            assert torch.equal(found.gradients[name], whole.gradients[name]), name


def test_a_device_with_little_shared_memory(emulated):
    """The weights of the decoder blocks do not fit at once; the grid has another size."""
    inputs = small_inputs(OP, BF16, width=64, depth=3)
    large = testing.run(inputs, BACKEND)
    emulated.set_device_limits(3, emulation.SMALL_SHARED)
    small = testing.run(inputs, BACKEND)
    cuda_ops.assert_close(small, large, 2e-5)
    assert all(torch.equal(small.gradients[name], large.gradients[name]) for name in ("image", "cond"))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_order_of_warps_does_not_matter(emulated, dtype, monkeypatch):
    inputs = small_inputs(OP, dtype)
    set_chunk(monkeypatch, 128)
    results = []
    for seed in (1, 2):
        emulated.set_seed(seed)
        with emulation.checked_for_races(emulated):
            results.append(testing.run(inputs, BACKEND))
    cuda_ops.assert_equal(*results)


@pytest.mark.parametrize("view", cuda_ops.VIEWS)
def test_views_give_the_same_result(emulated, view):
    cuda_ops.test_views_give_the_same_result(emulated, OP, view)


def test_other_dtypes_of_the_images(emulated):
    """float16 images with bfloat16 activations give the bits of their float32 values."""
    inputs = small_inputs(OP, BF16, other_dtype=F16)
    wide = {name: inputs.tensors[name].float() for name in ("image", "target")}
    found, expected = testing.run(inputs, BACKEND), testing.run(inputs._replace(tensors=inputs.tensors | wide), BACKEND)
    for name, gradient in found.gradients.items():
        assert torch.equal(gradient, expected.gradients[name].to(gradient.dtype)), name


def test_only_the_gradients_asked_for(emulated):
    inputs = cuda_ops.extended_inputs(OP, BF16, depth=1)
    expected = testing.run(inputs, BACKEND).gradients
    names = ("image", "cond", "query", "target", "fc1_weight", "head_bias", "frequency_weight", "sample_weight")
    for name, gradient in gradients_one_by_one(inputs, BACKEND, names):
        assert torch.equal(gradient, expected[name]), name


def test_launches_with_and_without_gradients(emulated):
    inputs = small_inputs(OP, BF16)
    launches = names_of_launches(emulated, inputs)
    assert all(launches.count(name) == 1 for name in OF_A_CHUNK)
    assert "pixel_decoder_forward" not in launches and "pixel_decoder_recompute" not in launches
    call = lambda: ops.pixel_decoder_loss(**inputs.tensors, **inputs.options, backend=BACKEND)  # noqa: E731
    assert [name for name, *_ in emulated.launches_of(call)] == [
        "pack_weights",
        "pixel_decoder_forward",
        "flow_matching_loss_sums",
        "flow_matching_loss",
    ]


def test_losses_without_gradients(emulated, monkeypatch):
    monkeypatch.setattr(chunk_sizes, "MOST_PIXELS", 128)
    for op in (OP, one_pass.FROM_TOKENS):
        one_pass.test_losses_without_gradients(BACKEND, op, BF16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(emulated, value):
    inputs = small_inputs(OP, BF16)
    inputs.tensors["image"].flatten()[5] = value
    results, expected = testing.run(inputs, BACKEND), testing.exact_results(inputs)
    assert all(map(torch.isnan, results.outputs)) and all(map(torch.isnan, expected.outputs))
    for argument, gradient in results.gradients.items():
        assert torch.equal(gradient.isnan(), expected.gradients[argument].isnan()), argument


def test_empty_batch(emulated, poisoned_memory):
    inputs = cuda_ops.extended_inputs(OP, BF16, image_size=(0, 8, 16))
    results = testing.run(inputs, BACKEND)
    assert not any(loss.any() for loss in results.outputs)
    for name, gradient in results.gradients.items():
        assert gradient.shape == inputs.tensors[name].shape and not gradient.any(), name


@pytest.mark.parametrize("architecture", cuda_ops.ONE_OF_EACH_LIMIT)
def test_every_architecture_accepts_the_launches(emulated, architecture):
    cuda_ops.test_every_architecture_accepts_the_launches(emulated, OP, architecture)


def test_failures_name_the_op_and_its_sizes(emulated):
    image, rows, arrays = (0,) * 6, (0, 1, 0, 0), (0,) * 24
    rest = (
        image,
        rows,
        rows,
        image,
        arrays,
        (0,) * 4,
        1.0,
        (0,) * 3,
        1.0,
        image,
        (0,) * 4,
        (0,) * 4,
        image,
        arrays,
        (0,) * 4,
        0,
        1e-6,
        (1, 16),
    )
    small, large = ((shape, *rest) for shape in (cuda_ops.SMALL_SHAPE, cuda_ops.LARGE_SHAPE))
    needed = emulated.pixel_decoder_loss_workspace(0, *small)
    assert needed > 0
    with pytest.raises(RuntimeError, match=r"pixel_decoder_loss on image \[2, 3, 16, 32\].*the workspace is smaller"):
        emulated.pixel_decoder_loss((0, 0, 0, needed - 1), *small)
    with pytest.raises(ValueError, match="pixel_decoder_loss on .*2\\^31 or more pixels in one call; split the batch"):
        emulated.pixel_decoder_loss((0, 0, 0, 1 << 60), *large)
