"""Verification: injected faults are refused; eager formulations and the reference pass."""

import dataclasses

import pytest
import torch

from benchmarks.harness import verification
from benchmarks.harness.measure import Options, check_memory, measure
from benchmarks.harness.steps import contenders_of
from benchmarks.harness.verification import verify
from benchmarks.names import BACKWARD_ALONE, BEST_EAGER, FORWARD, OPS, PUBLISHED, TRAINING
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import Size
from deco_kernels import native, testing

SIZE = Size(batch=1, height=64, width=80, depth=2, token_width=48)


def refusals(problem, dtype, training, backends=("reference",)):
    contenders = contenders_of(problem, SIZE, backends)
    return verify(problem, SIZE, dtype, "cpu", training, contenders).refused


@pytest.mark.parametrize("training", (False, True), ids=("forward", "training"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_twins_and_reference_pass(op, dtype, training):
    assert refusals(problem_of(op), dtype, training) == {}


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason="needs the native CPU module")
@pytest.mark.parametrize("op", ("pixel_decoder_loss", "upsample_modulate", "pixel_decoder_from_tokens"))
def test_every_contender_of_a_backend_passes(op):
    problem = problem_of(op)
    names = [contender.name for contender in contenders_of(problem, SIZE, ("cpu",)) if contender.backend]
    assert names[0] == "cpu" and len(names) == 2
    assert refusals(problem, torch.float32, True, ("cpu",)) == {}


class _Scaled(torch.autograd.Function):
    """Identity whose gradient is scaled."""

    @staticmethod
    def forward(ctx, values, factor):
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def planted(op, change):
    """The op's problem with a fault in the backend's results."""
    problem = problem_of(op)

    class Faulty(type(problem)):
        def fused(self, tensors, size, backend, **choice):
            return tuple(change(output) for output in super().fused(tensors, size, backend, **choice))

    return Faulty()


@pytest.mark.parametrize("dtype, factor", ((torch.float32, 1 + 1e-5), (torch.bfloat16, 1.02)), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_wrong_output_is_refused(op, dtype, factor):
    found = refusals(planted(op, lambda output: output * factor), dtype, training=False)
    assert set(found) == {"reference"}
    status, reason = found["reference"]
    assert status == "wrong" and "output 0: relative error" in reason


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_gradient_is_refused(op):
    found = refusals(planted(op, lambda output: _Scaled.apply(output, 1.001)), torch.float32, training=True)
    assert set(found) == {"reference"}
    assert "output" not in found["reference"][1] and "gradient of" in found["reference"][1]


def test_a_biased_output_is_refused():
    problem = planted("adaln_block", lambda output: output + 1.5e-6 * output.square().mean().sqrt())
    found = refusals(problem, torch.float32, training=False)
    assert "bias" in found["reference"][1] and "relative error" not in found["reference"][1]


def test_a_fault_that_needs_the_timed_size_is_refused():
    def fails_on_wide_images(output):
        if output.shape[-1] == SIZE.width:
            output[..., -1] = float("nan")
        return output

    found = refusals(planted("pixel_decoder", fails_on_wide_images), torch.float32, training=False)
    assert "at the timed size" in found["reference"][1]


class _BiasAtTimedSize(type(problem_of("pixel_decoder_loss"))):
    """The gradient of head_bias is multiplied by `factor`, but not at the small size."""

    factor = 1.0

    def fused(self, tensors, size, backend, **choice):
        factor = self.factor if size == SIZE else 1.0
        return super().fused({**tensors, "head_bias": _Scaled.apply(tensors["head_bias"], factor)}, size, backend)


@pytest.mark.parametrize("factor", (1.0, 1.02))
def test_a_sum_that_cancels_more_at_the_timed_size_is_no_fault(monkeypatch, factor):
    """With these values, relative errors of the gradient of head_bias are larger there, also those of best eager."""
    monkeypatch.setattr(verification, "SEED", 23)
    problem = _BiasAtTimedSize()
    problem.factor = factor
    found = refusals(problem, torch.bfloat16, training=True)
    if factor == 1:
        assert found == {}
    else:
        status, reason = found["reference"]
        assert status == "wrong" and reason.startswith("gradient of head_bias: ") and ";" not in reason


@pytest.mark.parametrize("excess", (1.1, 3.0))
def test_results_beyond_the_bounds_of_one_call_are_compared_with_eight_more(monkeypatch, excess):
    """A gradient of 32 elements whose error is `excess` times the bound of its call, which the others double."""
    pooled = []

    def by_chance(name, actual, *pairs, **options):
        row = testing.compare_tensors(name, actual, *pairs, **options)
        if name != "gradient of fc1_bias":
            return row
        pooled.append(len(pairs))
        return row._replace(error=excess * row.bound, bound=row.bound * (1 if len(pairs) == 1 else 2))

    monkeypatch.setattr(verification, "compare_tensors", by_chance)
    found = refusals(problem_of("adaln_block"), torch.bfloat16, training=True)
    assert 9 in pooled and ("reference" in found) == (excess > 2)


def test_a_wrong_published_twin_is_refused():
    class Faulty(type(problem_of("pixel_decoder"))):
        def published(self, tensors, size):
            return super().published({**tensors, "positions": tensors["positions"].flip(0)}, size)

    assert set(refusals(Faulty(), torch.float32, training=False)) == {PUBLISHED}


def test_a_wrong_contender_is_timed_and_flagged():
    problem = planted("flow_matching_loss", lambda output: output * 1.5)
    size = dataclasses.replace(SIZE, height=16, width=16)
    options = Options("cpu", ("reference", "triton"), compiled=(), budget_s=0.0, min_rounds=2)
    rows = {(row["contender"], row["pass"]): row for row in measure(problem, size, torch.float32, FORWARD, options)}
    assert rows["reference", FORWARD]["status"] == "wrong" and rows["reference", FORWARD]["ms"] > 0
    assert rows["triton", FORWARD]["status"] == "unavailable" and "triton" in rows["triton", FORWARD]["reason"]
    assert "ms" not in rows["triton", FORWARD]
    assert rows[PUBLISHED, FORWARD]["ms"] > 0 and rows[BEST_EAGER, FORWARD]["rounds"] == 2


def test_the_backward_alone_is_timed_with_the_training_step():
    size = dataclasses.replace(SIZE, height=16, width=16)
    options = Options("cpu", ("reference",), compiled=(), budget_s=0.0, min_rounds=2)
    rows = measure(problem_of("flow_matching_loss"), size, torch.float32, TRAINING, options)
    alone = [row for row in rows if row["pass"] == BACKWARD_ALONE]
    assert [row["contender"] for row in alone] == ["reference"] and alone[0]["ms"] > 0


def test_the_backward_alone_gives_the_gradient_of_the_training_step():
    problem = problem_of("flow_matching_loss")
    operands = problem.make_operands(SIZE, torch.float32, torch.Generator().manual_seed(0))
    (alone,) = problem.backward_alone(operands, SIZE, "reference")
    pred = operands.activations["pred"].requires_grad_()
    problem.fused(operands.tensors(), SIZE, "reference")[0].backward()
    torch.testing.assert_close(alone, pred.grad, rtol=0, atol=0)


def test_a_size_beyond_the_memory_is_refused():
    with pytest.raises(MemoryError, match="choose a smaller B, H or W"):
        check_memory(problem_of("pixel_decoder"), Size(batch=100_000), "cpu", TRAINING)
