"""pixel_decoder_loss of backend "triton" in one pass by chunks, its kernels run by Triton's interpreter."""

import pytest
import torch

from deco_kernels import testing
from deco_kernels.backends import chunk_sizes
from tests.interpreted import INTERPRETED
from tests.ops import test_backends as shared
from tests.ops import test_pixel_decoder_loss as one_pass
from tests.ops.cases import BF16, F16, F32, Case, gradients_one_by_one, small_inputs, transposed

pytestmark = INTERPRETED

OP = one_pass.OP
CASES = [
    Case(F32, 32, 1, 8, (2, 16, 32), layout="padded", query="given", head_norm="rms"),
    pytest.param(Case(BF16, 16, 2, 16, (1, 32, 32), weight_dtype=F16), marks=pytest.mark.long),
    pytest.param(
        Case(F16, 64, 1, 8, (1, 24, 40), layout="channels_last", other_dtype=BF16, weight_dtype=BF16),
        marks=pytest.mark.long,
    ),
]


def set_chunk(monkeypatch, pixels):
    monkeypatch.setattr(chunk_sizes, "chunk_pixels", lambda *_, **__: pixels)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_rule_of_error_by_chunks(case, monkeypatch, poisoned_memory):
    set_chunk(monkeypatch, 512)
    shared.test_rule_of_error("triton", OP, case, None)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "patch_size"), [(BF16, 8), (F16, 4)])
def test_agrees_with_the_two_ops(dtype, patch_size):
    one_pass.test_agrees_with_the_two_ops("triton", dtype, patch_size)


def test_from_tokens():
    one_pass.test_from_tokens_agrees_with_the_formula("triton", query="tokens", head_norm="rms")


def test_float16_is_scaled_inside():
    """Unscaled, the gradient of the velocity would be subnormal."""
    inputs = one_pass.block_inputs(F16, image_size=(1, 16, 32), width=16, depth=1)
    factor = 2.0**-12
    _, found = one_pass.losses_and_gradients(one_pass.one_op, inputs, "triton", factor)
    _, expected = one_pass.losses_and_gradients(one_pass.one_op, inputs, "reference", factor)
    for name in ("frequency_weight", "head_weight", "pixel_table"):
        assert testing.relative_error(found[name], expected[name]) <= torch.finfo(F16).eps, name


def test_chunks_give_the_same_results(monkeypatch):
    """Rows of patches, and single images. The same bits again."""
    inputs = small_inputs(OP, BF16, width=16, depth=1, image_size=(2, 16, 16), query="given")
    whole = testing.run(inputs, "triton")
    for pixels in (128, 128, 256):
        set_chunk(monkeypatch, pixels)
        found = testing.run(inputs, "triton")
        shared.assert_close(found, whole, 2e-6)
        for name in ("image", "cond", "query", "target", "sample_weight"):
            assert torch.equal(found.gradients[name], whole.gradients[name]), name


def test_repeated_runs_give_the_same_bits():
    inputs = small_inputs(OP, BF16, width=16, depth=1)
    first, second = testing.run(inputs, "triton"), testing.run(inputs, "triton")
    assert all(torch.equal(*pair) for pair in zip(first.outputs, second.outputs, strict=True))
    assert all(torch.equal(gradient, second.gradients[name]) for name, gradient in first.gradients.items())


def test_views_give_the_same_result():
    shared.test_views_give_the_same_result("triton", OP, BF16, transposed)


def test_empty_batch(poisoned_memory):
    shared.test_empty_batch("triton", OP, None)


def test_nan_propagates():
    shared.test_nan_and_inf_propagate("triton", OP, float("nan"))


def test_only_the_gradients_asked_for():
    inputs = small_inputs(OP, BF16, width=16, depth=1, query="given", head_norm="rms")
    expected = testing.run(inputs, "triton").gradients
    names = ("image", "cond", "query", "target", "fc1_weight", "frequency_weight", "sample_weight")
    for name, gradient in gradients_one_by_one(inputs, "triton", names):
        assert torch.equal(gradient, expected[name]), name


def test_losses_without_gradients(monkeypatch):
    monkeypatch.setattr(chunk_sizes, "MOST_PIXELS", 128)
    for op in (OP, one_pass.FROM_TOKENS):
        one_pass.test_losses_without_gradients("triton", op, BF16)


def test_a_fault_in_the_gradient_of_the_loss_is_caught(monkeypatch):
    """The gradient of the velocity has a slightly larger part of the frequency loss; the losses are right."""
    from deco_kernels.backends.triton.flow_matching_loss import LossCall

    inputs = testing.random_inputs(OP, image_size=(1, 16, 32), depth=1, width=16, patch_size=8)
    write_gradients = LossCall.write_gradients

    def faulty(self, forms, coefficients, *others, **options):
        write_gradients(self, forms, coefficients * torch.tensor([1.0, 1.001, 1.0]), *others, **options)

    exact, eager = (results(inputs) for results in (testing.exact_results, testing.eager_results))

    def passes():
        found = testing.run(inputs, "triton")
        pair = (eager.gradients["cond"], exact.gradients["cond"])
        passed = testing.compare_tensors("cond", found.gradients["cond"], pair, dtype=F32, gradient=True).passed
        return testing.relative_error(found.outputs[0], exact.outputs[0]) <= 1e-6, passed

    assert passes() == (True, True)
    monkeypatch.setattr(LossCall, "write_gradients", faulty)
    assert passes() == (True, False)
