"""The Triton kernels, executed on the CPU by Triton's interpreter: forward and every gradient.

They run only if Python was started with TRITON_INTERPRET=1, which changes all of Triton and needs a separate run.
"""

import pytest
import torch

from deco_kernels import testing
from deco_kernels.backends import chunk_sizes
from deco_kernels.ops.registry import BackendUnavailable
from tests.golden_files import golden_cases
from tests.interpreted import INTERPRETED
from tests.ops import test_backends as shared
from tests.ops import test_equal_rows as equal_rows
from tests.ops import test_flow_matching_loss as losses
from tests.ops import test_kept_gradient as kept
from tests.ops import test_query as queries
from tests.ops import test_save_memory as save_memory
from tests.ops.cases import (
    BF16,
    CASES,
    F32,
    KERNEL_OPS,
    Case,
    channels_last,
    in_layout,
    offset,
    padded,
    small_inputs,
    transposed,
)

pytestmark = INTERPRETED

# About 1,000 pixels each, with rows of patches, several tiles and a partial last tile; of many blocks half as many, if
# these have 1,000 numbers.
SMALL_SIZES = {16: (1, 32, 32), 8: (1, 24, 40), 4: (1, 28, 36), 2: (1, 30, 34), 1: (1, 29, 31)}
SIZES_OF_MANY_BLOCKS = {16: (1, 16, 32), 8: (1, 16, 40), 4: (1, 20, 28), 2: (1, 22, 26), 1: (1, 17, 23)}
DECODERS = ("pixel_decoder", "pixel_decoder_from_tokens")
# Each dtype, width and choice of save_memory: the kernels are those of pixel_decoder, which runs all cases.
FROM_TOKENS = (2, 6, 8, 16)
BLOCKS = ("adaln_block", "upsample_modulate")


def small(case: Case) -> Case:
    if case.width * case.depth == 16:
        return case  # already small enough
    many = SIZES_OF_MANY_BLOCKS if case.depth > 3 else {}
    return case._replace(image_size=many.get(case.patch_size, SMALL_SIZES[case.patch_size]))


def small_cases():
    for op in KERNEL_OPS:
        cases = [CASES[op][i] for i in FROM_TOKENS] if op == "pixel_decoder_from_tokens" else CASES[op]
        for index, case in enumerate(cases[::2] if op in BLOCKS else cases):
            case = case if "loss" in op else small(case)
            if op == "pixel_decoder":  # other kernels
                case = case._replace(save_memory=index % 2 == 0)
            yield pytest.param(op, case, id=f"{op}-{case.label}")


@pytest.fixture
def with_query(monkeypatch):
    """Decoders get a query and an RMS head from `small_inputs` of the shared tests."""

    def inputs(op, dtype=F32, **changes):
        kind = {"query": "tokens" if op == "pixel_decoder_from_tokens" else "given", "head_norm": "rms"}
        return small_inputs(op, dtype, **((kind if op in DECODERS else {}) | changes))

    monkeypatch.setattr(shared, "small_inputs", inputs)


@pytest.mark.parametrize("path", golden_cases("cod_lite_*"))
def test_golden_with_query_and_rms_head(path):
    queries.check_golden(path, "triton")


@pytest.mark.parametrize(("op", "case"), list(small_cases()))
def test_rule_of_error(op, case, poisoned_memory):
    shared.test_rule_of_error("triton", op, case, None)


@pytest.mark.parametrize("op", DECODERS)
def test_activations_are_kept_unless_memory_is_saved(op, with_query, monkeypatch):
    """Inputs of N blocks and of the head."""
    inputs = shared.small_inputs(op, BF16)
    depth, width = inputs.tensors["norm_weight"].shape
    monkeypatch.setattr(chunk_sizes, "chunk_pixels", lambda *_, **__: 64)
    save_memory.check_kept_activations(inputs, "triton", (depth + 1, 192, width))


def test_activations_of_another_call_are_refused():
    save_memory.check_refused_activations("triton")


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_views_give_the_same_result(op, with_query):
    inputs = shared.small_inputs(op, BF16)
    expected = testing.run(inputs, "triton")
    for view in (transposed, offset, padded, channels_last):
        shared.assert_close(testing.run(in_layout(inputs, view), "triton"), expected)


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_expanded_inputs_and_stride_0_gradients(op, with_query):
    shared.test_expanded_inputs_and_stride_0_gradients("triton", op)


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_empty_batch(op, poisoned_memory, with_query):
    shared.test_empty_batch("triton", op, None)


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_nan_propagates(op, with_query):
    shared.test_nan_and_inf_propagate("triton", op, float("nan"))


@pytest.mark.parametrize("op", [op for op in KERNEL_OPS if "loss" not in op])
def test_inf_propagates(op):
    shared.test_nan_and_inf_propagate("triton", op, float("inf"))


@pytest.mark.parametrize("op", ["flow_matching_loss", "frequency_loss"])
def test_inf_makes_losses_infinite(op):
    """The single matmul for DCT, weighting and inverse gives infinity where the three steps give NaN."""
    inputs = small_inputs(op)
    inputs.tensors["pred"].flatten()[5] = float("inf")
    results, expected = testing.run(inputs, "triton"), testing.exact_results(inputs)
    for actual, exact in zip(results.outputs, expected.outputs, strict=True):
        assert actual.item() == exact.item() == float("inf")
    for argument, gradient in results.gradients.items():
        assert torch.equal(gradient.isfinite(), expected.gradients[argument].isfinite()), argument


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_only_the_gradients_asked_for(op, with_query):
    shared.test_only_the_gradients_asked_for("triton", op, width=16, depth=1)


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_weights_changed_in_place_are_seen(op, with_query):
    shared.test_weights_changed_in_place_are_seen("triton", op)


@pytest.mark.parametrize("case", equal_rows.cases()[::8], ids=str)
@pytest.mark.parametrize("op", equal_rows.OPS[:3])
def test_nearly_equal_channels(op, case):
    equal_rows.test_nearly_equal_channels("triton", op, case)


def equal_channels():
    """Every width in float32, one in bfloat16, which the kernels convert as they load. The decoder from tokens has the
    kernels of the decoder."""
    for op in equal_rows.OPS:
        for dtype, width in [*((F32, width) for width in equal_rows.WIDTHS), (BF16, 32)]:
            marks = pytest.mark.long if op == "pixel_decoder_from_tokens" and (dtype, width) != (F32, 32) else ()
            yield pytest.param(op, dtype, width, marks=marks)


@pytest.mark.parametrize(("op", "dtype", "width"), list(equal_channels()))
def test_equal_channels_normalize_to_zero(op, dtype, width):
    equal_rows.test_equal_channels_normalize_to_zero("triton", op, dtype, width)


@pytest.mark.parametrize("size", [1e19, 1e25])
@pytest.mark.parametrize("op", equal_rows.OPS)
def test_a_variance_that_overflows_gives_nan(op, size):
    equal_rows.test_a_variance_that_overflows_gives_nan("triton", op, F32, size)


@pytest.mark.parametrize(("op", "head_norm"), [head for head in equal_rows.HEADS if "tokens" not in head[0]])
def test_an_eps_of_zero_in_partly_empty_tiles(op, head_norm):
    for sizes in equal_rows.PARTLY_EMPTY:
        equal_rows.test_an_eps_of_zero_in_partly_empty_tiles("triton", op, head_norm, BF16, sizes)


@pytest.mark.parametrize("op", DECODERS)
def test_images_without_pixels_have_zero_gradients(op):
    equal_rows.test_images_without_pixels_have_zero_gradients("triton", op, (2, 0, 12))


def test_float16_extremes_do_not_overflow_inside():
    shared.test_float16_extremes_do_not_overflow_inside("triton")


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_repeated_runs_give_the_same_bits(op):
    inputs = small_inputs(op, BF16)
    first, second = testing.run(inputs, "triton"), testing.run(inputs, "triton")
    assert all(torch.equal(*pair) for pair in zip(first.outputs, second.outputs, strict=True))
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens", "upsample_modulate"])
def test_chunks_of_tokens_add_up(op, monkeypatch):
    """Chunks of seven tokens, the last one shorter, in larger chunks of the upsample, vs. all tokens at once."""
    from deco_kernels.backends import chunk_sizes
    from deco_kernels.backends.triton import pixel_decoder

    given = {"query": "given" if op == "pixel_decoder" else "tokens"} if op in DECODERS else {}
    depth = 1 if op == "pixel_decoder_from_tokens" else 2
    inputs = small_inputs(op, image_size=(2, 12, 20), depth=depth, **given)
    whole = testing.run(inputs, "triton")
    pixels = inputs.tensors["pixel_table" if "pixel_table" in inputs.tensors else "h"].shape[-2]
    monkeypatch.setattr(chunk_sizes, "chunk_pixels", lambda *_, **__: 7 * pixels)
    monkeypatch.setattr(chunk_sizes, "MOST_PIXELS", 18 * pixels)
    monkeypatch.setattr(pixel_decoder, "LAUNCH_TOKENS", 11)
    chunked = testing.run(inputs, "triton")
    shared.assert_close(chunked, whole, 2e-6)
    if op == "pixel_decoder":  # the others depend on PyTorch's matmul of a chunk
        for name in ("image", "cond", "query"):
            assert torch.equal(chunked.gradients[name], whole.gradients[name]), name


def test_one_chunk_of_conditions_exists_at_a_time():
    """The buffer of a chunk is reused, so that cond is never materialized for all tokens."""
    from deco_kernels.backends.chunks import slices
    from deco_kernels.backends.triton.upsample import Upsample
    from deco_kernels.signatures import UpsampleWeights

    tokens, up_weight, up_bias = torch.randn(11, 7), torch.randn(4 * 16, 7), torch.randn(4 * 16)
    upsample = Upsample(tokens, UpsampleWeights(up_weight, up_bias), (4, 16))
    expected = (tokens @ up_weight.T + up_bias).view(11, 4, 16)
    buffers = set()
    for part in slices(11, 4):
        cond = upsample.cond(part)
        torch.testing.assert_close(cond, expected[part])
        buffers.add(cond.data_ptr())
    assert len(buffers) == 1


def far_apart(tensor, dim, stride):
    """The same values with this stride; only touched pages of the 4 GB of storage are backed by memory."""
    strides = [stride if d == dim else inner for d, inner in enumerate(tensor.stride())]
    storage = torch.empty(stride * (tensor.shape[dim] - 1) + tensor.numel(), dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


def test_offsets_beyond_2_31_elements():
    """Strides that need 64 bits."""
    inputs = small_inputs("pixel_decoder", BF16, image_size=(2, 4, 4), other_dtype=BF16)
    expected = testing.run(inputs, "triton")
    for name in ("image", "cond"):
        inputs.tensors[name] = far_apart(inputs.tensors[name], 0, 2**31 + 24)
    assert torch.equal(testing.run(inputs, "triton").outputs[0], expected.outputs[0])


@pytest.mark.parametrize(
    "op", ["pixel_decoder", "pixel_decoder_from_tokens", "pixel_decoder_loss", "flow_matching_loss"]
)
def test_strides_whose_products_need_64_bits(op):
    """The third channel of every image is beyond 2^31 elements, as in a batch that is stored channel by channel."""
    inputs = small_inputs(op, BF16, image_size=(1, 8, 8), other_dtype=BF16, width=16, depth=1)
    expected = testing.run(inputs, "triton")
    for name in {"image", "target", "pred"} & set(inputs.tensors):
        inputs.tensors[name] = far_apart(inputs.tensors[name], 1, 2**30 + 24)
    grads = tuple(far_apart(g, 1, 2**30 + 24) if g.dim() == 4 else g for g in inputs.grad_outputs)
    actual = testing.run(inputs._replace(grad_outputs=grads), "triton")
    assert all(map(torch.equal, actual.outputs, expected.outputs))
    for name, gradient in actual.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name


@pytest.mark.parametrize(
    ("op", "changes", "reason"),
    [
        ("pixel_decoder", {"width": 24}, "width D of 16, 32 and 64, not 24"),
        ("pixel_decoder", {"depth": 9}, "1 to 8 blocks, not 9"),
        ("pixel_decoder", {"channels": 2}, "1, 3 and 4 image channels, not 2"),
        ("pixel_decoder_from_tokens", {"patch_size": 32, "image_size": (1, 32, 32)}, "not 32"),
        ("adaln_block", {"width": 8}, "not 8"),
        ("upsample_modulate", {"patch_size": 3, "image_size": (1, 6, 6)}, "square patches of size 1, 2, 4, 8 and 16"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(op, changes, reason):
    inputs = small_inputs(op, **changes)
    with pytest.raises(BackendUnavailable, match=reason):
        testing.run(inputs, "triton")


def test_float64_is_refused_by_name():
    inputs = testing.in_float64(small_inputs("pixel_decoder"))
    with pytest.raises(BackendUnavailable, match="float64"):
        testing.run(inputs, "triton")


# --- the interpreter itself ------------------------------------------------------------------------------------------


def test_conversion_to_bfloat16_rounds_to_nearest_even():
    from tests.backends.small_kernels import to_bfloat16

    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40]
    x = torch.cat([torch.randn(256 - len(special)) * 10, torch.tensor(special)])
    y = torch.empty(256, dtype=BF16)
    to_bfloat16[(1,)](x, y, SIZE=256)
    torch.testing.assert_close(y, x.to(BF16), rtol=0, atol=0, equal_nan=True)


def test_dot_multiplies_bfloat16_values():
    from tests.backends.small_kernels import product

    a, b = torch.randn(2, 16, 16).to(BF16)
    c = torch.empty(16, 16)
    product[(1,)](a, b, c, SIZE=16)
    torch.testing.assert_close(c, a.float() @ b.float())


def test_the_stand_in_for_the_approximate_tanh_has_its_error():
    """tanh.approx.f32 has a specified maximum relative error of 2^-11; the substitute comes close to it."""
    from tests.backends.small_kernels import fast_tanh

    x = torch.linspace(-4, 4, 4096)
    y = torch.empty_like(x)
    fast_tanh[(1,)](x, y, SIZE=4096)
    error = (y / torch.tanh(x) - 1).abs().max().item()
    assert 2**-12 <= error <= 2**-11


def test_loss_gradients_survive_a_float16_loss_scale():
    losses.check_loss_scale("triton", (2, 13, 24), part=2.0**-10)


@pytest.mark.parametrize("op", ["flow_matching_loss", "frequency_loss"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [(2, 16, 40), (1, 13, 24)], ids=["kept", "padded"])
def test_losses_and_gradient_in_one_pass(op, dtype, size):
    """What is kept is left as it is for an incoming gradient of 1, and computed again otherwise."""
    tensors = dict(testing.random_inputs("flow_matching_loss", dtype=dtype, image_size=size).tensors)
    for factor in (1.0, 0.3):
        expected_losses, expected = kept.in_two_passes(op, tensors, factor, "triton")
        pred = tensors["pred"].detach().requires_grad_()
        first, found_losses = kept.first_loss(op, tensors | {"pred": pred}, "triton")
        keeps = size[1] % 8 == 0
        assert hasattr(first.grad_fn, "gradient") == keeps
        if keeps:
            first.grad_fn.gradient[0, 0, 0, 0] = marked = 7.0
        gradients = [torch.autograd.grad(first * factor, pred, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(gradients[1], expected)
        if keeps and factor == 1:
            assert gradients[0][0, 0, 0, 0] == marked
            gradients[0][0, 0, 0, 0] = expected[0, 0, 0, 0]
        assert torch.equal(gradients[0], expected)
        for loss, other in zip(found_losses, expected_losses, strict=True):
            assert testing.relative_error(loss, other) <= 2e-6
