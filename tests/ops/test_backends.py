"""Every op on every backend and instruction set: the rule of error, views, empty batches, repeatability."""

import functools

import pytest
import torch

from deco_kernels import ops, testing
from tests.ops.cases import (
    BACKENDS,
    BF16,
    CASES,
    DECODER_CASES,
    F16,
    F32,
    IMPLEMENTATIONS,
    OPS,
    OPS_ON_IMPLEMENTATIONS,
    Case,
    channels_last,
    gradients_one_by_one,
    in_layout,
    offset,
    padded,
    small_inputs,
    transposed,
    uncovered_pairs,
)

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
each_backend = pytest.mark.parametrize("implementation", BACKENDS, indirect=True)
each_op = pytest.mark.parametrize("op", OPS)
each_op_and_implementation = pytest.mark.parametrize(
    ("implementation", "op"), OPS_ON_IMPLEMENTATIONS, indirect=["implementation"]
)


def with_query(op: str) -> dict[str, str]:
    """Arguments of `small_inputs` for a query, from tokens where the op takes them, and an RMS head."""
    return {"query": "tokens" if op.endswith("_from_tokens") else "given", "head_norm": "rms"}


def test_cases_have_all_pairs_of_settings():
    assert not uncovered_pairs(DECODER_CASES)
    assert (("width", 64), ("layout", "padded")) in uncovered_pairs(DECODER_CASES[:3])


@functools.cache
def expected(op: str, case: Case) -> tuple[testing.Results, testing.Results]:
    """(exact, eager), shared by all implementations."""
    inputs = case.inputs(op)
    return testing.exact_results(inputs), testing.eager_results(inputs)


def assert_close(actual: testing.Results, expected: testing.Results, tolerance: float = 1e-5):
    """Two results of the same backend on differently laid out inputs."""
    for output, other in zip(actual.outputs, expected.outputs, strict=True):
        assert testing.relative_error(output, other) <= tolerance
    for name, gradient in actual.gradients.items():
        assert testing.relative_error(gradient, expected.gradients[name]) <= tolerance, name


@pytest.mark.parametrize(
    ("implementation", "op", "case"),
    [
        pytest.param(*pair.values, case, id=f"{pair.id}-{case.label}")
        for pair in OPS_ON_IMPLEMENTATIONS
        for case in CASES[pair.values[1]]
    ],
    indirect=["implementation"],
)
def test_rule_of_error(implementation, op, case, poisoned_memory):
    inputs = case.inputs(op)
    before = {name: None if t is None else t.clone() for name, t in inputs.tensors.items()}
    grads_before = [gradient.clone() for gradient in inputs.grad_outputs]
    results = testing.run(inputs, implementation)
    failed = [str(row) for row in testing.compare(inputs, results, *expected(op, case)) if not row.passed]
    assert not failed, "\n".join(failed)
    for name, tensor in inputs.tensors.items():
        assert tensor is None or torch.equal(tensor, before[name]), f"{name} was changed"
    assert all(torch.equal(*pair) for pair in zip(inputs.grad_outputs, grads_before, strict=True))
    for name, gradient in results.gradients.items():
        tensor = inputs.tensors[name]
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape and gradient.is_contiguous(), name


@each_op_and_implementation
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("view", [transposed, offset, padded, channels_last])
def test_views_give_the_same_result(implementation, op, dtype, view):
    inputs = small_inputs(op, dtype, **(with_query(op) if dtype is F32 else {}))
    expected = testing.run(inputs, implementation)
    assert_close(testing.run(in_layout(inputs, view), implementation), expected)


@each_op_and_implementation
def test_expanded_inputs_and_stride_0_gradients(implementation, op):
    inputs = small_inputs(op, **with_query(op))
    for name, tensor in inputs.tensors.items():
        if name in ("image", "pred", "target", "cond", "h", "query"):
            inputs.tensors[name] = tensor[:1].expand_as(tensor)
    grads = tuple(torch.ones((), dtype=g.dtype).expand_as(g) for g in inputs.grad_outputs)
    inputs = inputs._replace(grad_outputs=grads)
    contiguous = inputs._replace(
        tensors={name: t.contiguous() for name, t in inputs.tensors.items()},
        grad_outputs=tuple(g.contiguous() for g in grads),
    )
    assert_close(testing.run(inputs, implementation), testing.run(contiguous, implementation))


@each_op_and_implementation
def test_empty_batch(implementation, op, poisoned_memory):
    inputs = small_inputs(op, image_size=(0, 8, 16), **with_query(op))
    results = testing.run(inputs, implementation)
    for output, gradient in zip(results.outputs, inputs.grad_outputs, strict=True):
        assert output.shape == gradient.shape
        assert output.dim() > 0 or output.item() == 0
    for name, gradient in results.gradients.items():
        assert gradient.shape == inputs.tensors[name].shape
        assert not gradient.any(), name


@each_op_and_implementation
@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_runs_give_the_same_bits(implementation, op, threads, two_threads):
    torch.set_num_threads(threads)
    inputs = CASES[op][0]._replace(query="tokens", head_norm="rms").inputs(op)
    first, second = testing.run(inputs, implementation), testing.run(inputs, implementation)
    assert all(torch.equal(*pair) for pair in zip(first.outputs, second.outputs, strict=True))
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


@each_op_and_implementation
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(implementation, op, value):
    inputs = small_inputs(op, **(with_query(op) if value == float("inf") else {}))
    name = next(n for n in ("query", "query_tokens", "image", "pred", "h") if n in inputs.tensors)
    inputs.tensors[name].flatten()[5] = value
    results, expected = testing.run(inputs, implementation), testing.exact_results(inputs)
    for actual, exact in zip(results.outputs, expected.outputs, strict=True):
        assert torch.equal(actual.isnan(), exact.isnan())
    for argument, gradient in results.gradients.items():
        assert torch.equal(gradient.isnan(), expected.gradients[argument].isnan()), argument


@each_backend
@each_op
def test_only_the_gradients_asked_for(implementation, op, **sizes):
    inputs = small_inputs(op, **sizes)
    expected = testing.run(inputs, implementation).gradients
    for name, gradient in gradients_one_by_one(inputs, implementation, inputs.tensors):
        assert testing.relative_error(gradient, expected[name]) <= 1e-6


@each_backend
@each_op
def test_weights_changed_in_place_are_seen(implementation, op):
    inputs = small_inputs(op)
    name = next(n for n in ("fc1_weight", "mod_weight", "frequency_weight") if n in inputs.tensors)
    call = getattr(ops, op)

    def outputs():
        result = call(**inputs.tensors, **inputs.options, backend=implementation)
        return result if isinstance(result, tuple) else (result,)

    before = outputs()
    inputs.tensors[name].data.mul_(2)
    after = outputs()
    doubled = testing.run(inputs, "reference").outputs
    assert not torch.equal(before[0], after[0])
    assert all(testing.relative_error(*pair) <= 1e-5 for pair in zip(after, doubled, strict=True))


@each_implementation
def test_float16_extremes_do_not_overflow_inside(implementation):
    """Large cond values saturate SiLU and the gate, but do not overflow the float32 arithmetic."""
    inputs = small_inputs("pixel_decoder", F16)
    inputs.tensors["cond"].mul_(30)
    output, *_ = testing.compare(inputs, testing.run(inputs, implementation))
    assert output.passed, output
