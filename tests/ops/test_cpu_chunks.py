"""The CPU backward of the ops with a fused upsample, cut into chunks of tokens."""

import pytest
import torch

from deco_kernels import native, testing
from deco_kernels.backends import upsample
from deco_kernels.backends.cpu import pixel_decoder_loss_from_tokens
from deco_kernels.testing.inputs import KEEPS_COND
from tests.ops.cases import BF16, F16, F32, padded, small_inputs, with_choice

pytestmark = pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason="needs the native CPU module")


@pytest.fixture
def chunk_size(monkeypatch):
    def set_size(tokens):
        monkeypatch.setattr(upsample, "MIN_TOKENS", tokens)
        monkeypatch.setattr(upsample, "MIN_VALUES", 0)

    return set_size


@pytest.fixture
def upsample_of():
    previous = native.current_upsample()
    yield native.select_upsample
    native.select_upsample(previous)


# 3 images of 2 x 3 tokens: chunks of a row of patches, of an image, of two images and one image
@pytest.mark.parametrize(("tokens", "save_memory"), [(2, True), (5, False), (10, True)])
@pytest.mark.parametrize("op", KEEPS_COND)
@pytest.mark.parametrize(("dtype", "matmul"), [(F32, "kernel"), (BF16, "kernel"), (F16, "kernel"), (BF16, "pytorch")])
def test_chunks_give_the_same_gradients(op, dtype, matmul, tokens, save_memory, chunk_size, upsample_of):
    """Sums over chunks in float32; PyTorch's matmul rounds its products, and those of a chunk, to bfloat16."""
    upsample_of(matmul)
    inputs = with_choice(small_inputs(op, dtype, image_size=(3, 8, 12), query="tokens", head_norm="rms"), save_memory)
    whole = testing.run(inputs, "cpu")
    chunk_size(tokens)
    chunked = testing.run(inputs, "cpu")
    for name, gradient in chunked.gradients.items():
        rounded = matmul == "pytorch" and name in ("up_weight", "query_weight")
        tolerance = torch.finfo(dtype).eps if rounded else 1e-6
        assert testing.relative_error(gradient, whole.gradients[name]) <= tolerance, name


# chunks of lines of an image, of whole images whose borders are reflected, of two images and one image
@pytest.mark.parametrize(
    ("patch_size", "image_size", "tokens"), [(8, (2, 24, 16), 2), (4, (3, 12, 20), 10), (8, (3, 8, 16), 4)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_of_a_loss_add_up(patch_size, image_size, tokens, weighted, monkeypatch):
    """The shares of the chunks, with and without sample_weight; every gradient against the formula."""
    sizes = dict(patch_size=patch_size, image_size=image_size, width=16, depth=1)
    inputs = small_inputs("pixel_decoder_loss_from_tokens", **sizes, query="tokens" if weighted else "given")
    if not weighted:
        inputs.tensors["sample_weight"] = None
    monkeypatch.setattr(pixel_decoder_loss_from_tokens.chunked, "chunk_pixels", tokens * patch_size**2)
    chunked, formula = testing.run(inputs, "cpu"), testing.run(inputs, "reference")
    for loss, other in zip(chunked.outputs, formula.outputs, strict=True):
        assert testing.relative_error(loss, other) <= 1e-6
    for name, gradient in chunked.gradients.items():
        assert gradient.any() and testing.relative_error(gradient, formula.gradients[name]) <= 1e-5, name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_shares_of_16_bit_sample_weights_are_not_rounded(dtype, monkeypatch):
    inputs = small_inputs("pixel_decoder_loss_from_tokens", patch_size=8, image_size=(3, 8, 16), width=16, depth=1)
    inputs.tensors["sample_weight"] = inputs.tensors["sample_weight"].to(dtype)
    monkeypatch.setattr(pixel_decoder_loss_from_tokens.chunked, "chunk_pixels", 4 * 8**2)
    chunked, formula = testing.run(inputs, "cpu"), testing.run(inputs, "reference")
    for loss, other in zip(chunked.outputs, formula.outputs, strict=True):
        assert testing.relative_error(loss, other) <= 1e-6
    for name, gradient in chunked.gradients.items():
        bound = torch.finfo(dtype).eps if name == "sample_weight" else 1e-5
        assert testing.relative_error(gradient, formula.gradients[name]) <= bound, name


@pytest.mark.parametrize("tokens", [2, 10])
def test_views_are_cut_in_place(tokens, chunk_size):
    inputs = small_inputs("pixel_decoder_from_tokens", image_size=(3, 8, 12), query="given")
    chunk_size(tokens)
    expected = testing.run(inputs, "cpu")
    image, velocity_gradient = inputs.tensors["image"], inputs.grad_outputs[0]
    inputs.tensors["query"] = padded(inputs.tensors["query"])
    inputs.tensors["image"] = image.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    inputs = inputs._replace(grad_outputs=(velocity_gradient.mT.contiguous().mT,))
    actual = testing.run(inputs, "cpu")
    assert torch.equal(actual.outputs[0], expected.outputs[0])
    for name, gradient in actual.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name
