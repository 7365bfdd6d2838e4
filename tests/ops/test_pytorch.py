"""The ops in PyTorch: opcheck, gradcheck, compile, export, autocast, checkpointing, functional transforms."""

import gc
import inspect
import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import deco_kernels
from deco_kernels import ops, testing
from deco_kernels.testing.inputs import SAVE_MEMORY
from tests.operators import OperatorNames
from tests.ops.cases import (
    BACKENDS,
    BF16,
    DEFAULTS,
    F16,
    F32,
    KERNEL_OPS,
    ONE_PASS,
    OPS,
    differentiable,
    small_inputs,
)

each_op = pytest.mark.parametrize("op", OPS)
SAME_CODE = "pixel_decoder_loss_from_tokens"  # its autograd code is that of pixel_decoder_loss
each_code = pytest.mark.parametrize(
    "op", [pytest.param(op, marks=pytest.mark.long) if op == SAME_CODE else op for op in OPS]
)
each_backend = pytest.mark.parametrize("implementation", BACKENDS, indirect=True)
DECODERS = ["adaln_block", "upsample_modulate", "pixel_decoder", "pixel_decoder_from_tokens"]


def loss_of(op, tensors, options, grad_outputs, **changes):
    outputs = getattr(ops, op)(**tensors, **options, **changes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((output.to(F32) * gradient).sum() for output, gradient in zip(outputs, grad_outputs, strict=True))


def gradients_of(function, inputs, **arguments):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    loss = function(inputs.op, leaves, inputs.options, inputs.grad_outputs, **arguments)
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values()))


def assert_same(actual, expected, tolerance=0.0):
    assert testing.relative_error(actual[0], expected[0]) <= tolerance
    for gradient, other in zip(actual[1], expected[1], strict=True):
        assert testing.relative_error(gradient, other) <= tolerance


@each_backend
@each_op
def test_calls_leave_no_reference_cycle(implementation, op):
    """Cycles would hold tensors of a training step until Python's garbage collector runs."""
    inputs = small_inputs(op)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.tensors.items() if tensor is not None}
    found = {name: weakref.ref(leaf) for name, leaf in leaves.items()}
    gc.disable()
    try:
        loss_of(op, inputs.tensors, inputs.options, inputs.grad_outputs, backend=implementation).backward()
        del inputs, leaves
        assert [name for name, reference in found.items() if reference() is not None] == []
    finally:
        gc.enable()


@each_backend
@each_op
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(implementation, op, dtype):
    opcheck(implementation, op, small_inputs(op, dtype))


@each_backend
@pytest.mark.parametrize("op", ONE_PASS)
def test_opcheck_of_the_composition(implementation, op):
    """In float16 its gradients are scaled, and those of bfloat16 tensors keep that dtype."""
    mixed = dict(other_dtype=BF16, weight_dtype=BF16, patch_size=4)
    opcheck(implementation, op, small_inputs(op, F16, **mixed))


def opcheck(implementation, op, inputs):
    """Schema and shapes of operators without a derivative; test_compile_fullgraph traces them with dynamic sizes."""
    operators = torch.ops.deco_kernels
    without_autograd = {"test_utils": ("test_schema", "test_faketensor")}
    tensors = inputs.in_order()
    arguments = (*tensors, *(inputs.options | DEFAULTS[op]).values(), implementation)
    torch.library.opcheck(getattr(operators, op).default, arguments)
    backward = getattr(operators, f"{op}_backward").default
    every = [tensor is not None for tensor in tensors]
    every_second = [given and index % 2 == 0 for index, given in enumerate(every)]
    if op in ONE_PASS:
        pass_with_gradients = getattr(operators, f"{op}_with_gradients").default
        torch.library.opcheck(pass_with_gradients, (*arguments, every_second), **without_autograd)
        kept = pass_with_gradients(*arguments, every_second)[len(inputs.grad_outputs) :]
        torch.library.opcheck(backward, (inputs.grad_outputs[0], *kept), **without_autograd)
        return
    kept_tensors = [()]
    if op in SAVE_MEMORY:
        with_kept = getattr(operators, f"{op}_with_kept").default
        torch.library.opcheck(with_kept, arguments)
        kept = with_kept(*arguments)[len(inputs.grad_outputs) :]
        kept_tensors = [kept, (None,) * len(kept)]
    scalars = arguments[len(tensors) :]
    for needs, kept in zip((every, every_second), 2 * kept_tensors, strict=False):
        torch.library.opcheck(backward, (*inputs.grad_outputs, *tensors, *kept, *scalars, needs), **without_autograd)


@each_op
def test_gradcheck_in_float64(op):
    changes = {"patch_size": 2, "image_size": (2, 4, 2), "width": 4, "depth": 2, "token_width": 3}
    if "loss" in op:
        changes |= {"patch_size": 3, "image_size": (1 if op in ONE_PASS else 2, 9, 6), "width": 2, "depth": 1}
    inputs = small_inputs(op, torch.float64, **changes)
    leaves = [tensor.requires_grad_() for tensor in inputs.tensors.values()]

    def function(*tensors):
        return getattr(ops, op)(**dict(zip(inputs.tensors, tensors, strict=True)), **inputs.options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@each_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(op, dynamic):
    """With dynamic sizes one graph serves two batches; no other size equals the first, so that none is tied to it."""
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 6) if dynamic else (2,):
        inputs = small_inputs(op, image_size=(batch, 8, 16))
        assert_same(gradients_of(compiled, inputs), gradients_of(loss_of, inputs), 1e-6)


@each_code
def test_compile_without_gradients(op):
    torch._dynamo.reset()
    inputs = small_inputs(op)
    compiled = torch.compile(loss_of, fullgraph=True, backend="eager")
    arguments = (op, inputs.tensors, inputs.options, inputs.grad_outputs)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert torch.equal(compiled(*arguments), loss_of(*arguments))


def test_compile_with_inductor():
    torch._dynamo.reset()
    inputs = small_inputs("pixel_decoder")
    compiled = torch.compile(loss_of, fullgraph=True)
    assert_same(gradients_of(compiled, inputs), gradients_of(loss_of, inputs), 1e-6)


def test_compile_sees_the_backend_block():
    torch._dynamo.reset()
    inputs = small_inputs("pixel_decoder")

    @torch.compile(fullgraph=True, backend="eager")
    def call():
        return ops.pixel_decoder(**inputs.tensors, **inputs.options)

    with deco_kernels.use_backend("reference"):
        reference = call()
        assert torch.equal(reference, ops.pixel_decoder(**inputs.tensors, **inputs.options))
    with pytest.raises(deco_kernels.BackendUnavailable), deco_kernels.use_backend("cuda"):
        call()
    assert testing.relative_error(call(), reference) < 1e-5


@each_op
def test_export(op):
    inputs = small_inputs(op)

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return getattr(ops, op)(**tensors, **inputs.options)

    program = torch.export.export(Module(), (inputs.tensors,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert getattr(torch.ops.deco_kernels, op).default in targets
    actual = program.module()(inputs.tensors)
    expected = getattr(ops, op)(**inputs.tensors, **inputs.options)
    for pair in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert torch.equal(*pair)


@each_backend
@each_code
def test_pending_negations_are_resolved(implementation, op):
    """Views such as z.conj().imag have the negative bit: as arguments and as gradients of the outputs."""

    def pending(tensor):
        return torch._neg_view(tensor.neg())

    inputs = small_inputs(op)
    expected = gradients_of(loss_of, inputs, backend=implementation)
    negated = inputs._replace(tensors={name: pending(tensor) for name, tensor in inputs.tensors.items()})
    assert all(tensor.is_neg() for tensor in negated.tensors.values())
    assert_same(gradients_of(loss_of, negated, backend=implementation), expected, 1e-6)

    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors.values()]
    outputs, grad_outputs = differentiable(
        getattr(ops, op)(**dict(zip(inputs.tensors, leaves, strict=True)), **inputs.options, backend=implementation),
        inputs.grad_outputs,
    )
    gradients = torch.autograd.grad(outputs, leaves, [pending(gradient) for gradient in grad_outputs])
    for gradient, other in zip(gradients, expected[1], strict=True):
        assert testing.relative_error(gradient, other) <= 1e-6


@each_backend
@each_code
def test_zeros_without_memory(implementation, op):
    """PyTorch's derivative formulas pass zero tensors without storage."""
    inputs = small_inputs(op)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors.values()]
    outputs, grad_outputs = differentiable(
        getattr(ops, op)(**dict(zip(inputs.tensors, leaves, strict=True)), **inputs.options, backend=implementation),
        inputs.grad_outputs,
    )
    zeros = [torch._efficientzerotensor(gradient.shape) for gradient in grad_outputs]
    assert not any(gradient.any() for gradient in torch.autograd.grad(outputs, leaves, zeros))


@each_backend
@each_code
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(implementation, op):
    inputs = small_inputs(op)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors.values()]
    outputs, grad_outputs = differentiable(
        getattr(ops, op)(**dict(zip(inputs.tensors, leaves, strict=True)), **inputs.options, backend=implementation),
        inputs.grad_outputs,
    )
    stacked = [torch.stack((gradient, 2 * gradient)) for gradient in grad_outputs]
    batched = torch.autograd.grad(outputs, leaves, stacked, is_grads_batched=True, retain_graph=True)
    expected = torch.autograd.grad(outputs, leaves, grad_outputs)
    for gradients, gradient in zip(batched, expected, strict=True):
        assert testing.relative_error(gradients, torch.stack((gradient, 2 * gradient))) <= 1e-6


@each_code
@pytest.mark.parametrize("default", [BF16, torch.float64])
def test_the_default_dtype_changes_nothing(op, default):
    inputs = small_inputs(op)
    expected = gradients_of(loss_of, inputs)
    torch.set_default_dtype(default)
    try:
        actual = gradients_of(loss_of, inputs)
    finally:
        torch.set_default_dtype(F32)
    assert [gradient.dtype for gradient in actual[1]] == [gradient.dtype for gradient in expected[1]]
    assert_same(actual, expected)


@each_code
def test_the_default_device_changes_nothing(op):
    inputs = small_inputs(op)
    expected = gradients_of(loss_of, inputs)
    with torch.device("meta"):
        actual = gradients_of(loss_of, inputs)
    assert_same(actual, expected)


@each_op
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(op, use_reentrant):
    inputs = small_inputs(op)

    def checkpointed(op, tensors, options, grad_outputs):
        names = list(tensors)

        def function(*values):
            return loss_of(op, dict(zip(names, values, strict=True)), options, grad_outputs)

        return checkpoint(function, *tensors.values(), use_reentrant=use_reentrant)

    def backward(function):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
        function(op, leaves, inputs.options, inputs.grad_outputs).backward()
        return torch.zeros(()), [leaf.grad for leaf in leaves.values()]

    assert_same(backward(checkpointed), backward(loss_of))


def test_a_call_does_not_derive_the_signature_of_its_function_anew(monkeypatch):
    """PyTorch asks for it in every call of an autograd function."""
    asked, signature = [], inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda function: asked.append(function) or signature(function))
    for op in testing.OPS:
        inputs = small_inputs(op)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
        results = getattr(ops, op)(**leaves, **inputs.options, backend="reference")
        first = results[0] if isinstance(results, tuple) else results
        torch.autograd.grad(first.sum(), list(leaves.values()), create_graph=True, allow_unused=True)
    ours = [function for function in asked if function.__module__.startswith("deco_kernels")]
    assert len(ours) >= 2 * len(testing.OPS) and all(hasattr(function, "__signature__") for function in ours)


def operators_in_a_dispatch_mode(call):
    with OperatorNames() as seen:
        call()
    return seen


def operators_in_a_function_mode(call):
    from torch.overrides import TorchFunctionMode

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    with Recorder():
        call()
    return seen


def operators_in_a_profile(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name.replace("::", ".") + ".default" for event in profile.events()]


@each_code
@pytest.mark.parametrize(
    "observe", [operators_in_a_dispatch_mode, operators_in_a_function_mode, operators_in_a_profile]
)
def test_observers_see_the_operators(op, observe):
    """Under a mode or the profiler, calls give the same results and the operators are observed."""
    inputs = small_inputs(op)
    results = []
    seen = observe(lambda: results.append(gradients_of(loss_of, inputs)))
    suffix = "_with_gradients" if op in ONE_PASS else "_with_kept" if op == "upsample_modulate" else ""
    assert f"deco_kernels.{op}{suffix}.default" in seen
    # PyTorch runs the backward pass outside function modes.
    assert f"deco_kernels.{op}_backward.default" in seen or observe is operators_in_a_function_mode
    assert_same(results[0], gradients_of(loss_of, inputs))


@pytest.mark.parametrize("op", [op for op in OPS if op not in ONE_PASS])
def test_a_call_without_a_gradient_runs_the_operator_alone(op, monkeypatch):
    inputs = small_inputs(op)

    def refuse(*_):
        raise AssertionError("an autograd function")

    expected = testing.run(inputs, "reference").outputs
    monkeypatch.setattr(torch.autograd.Function, "apply", refuse)
    found = getattr(ops, op)(**inputs.tensors, **inputs.options, backend="reference")
    assert all(map(torch.equal, found if isinstance(found, tuple) else (found,), expected))
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    with torch.no_grad():
        getattr(ops, op)(**leaves, **inputs.options)
    with pytest.raises(AssertionError, match="an autograd function"):
        getattr(ops, op)(**leaves, **inputs.options, backend="reference")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_operator():
    inputs = small_inputs("adaln_block")
    h, *others = inputs.tensors.values()
    traced = torch.jit.trace(lambda h: ops.adaln_block(h, *others), h)
    assert testing.relative_error(traced(2 * h), ops.adaln_block(2 * h, *others)) == 0


@each_code
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_records_the_operators(op, pre_dispatch):
    inputs = small_inputs(op)

    def outputs(*tensors):
        return getattr(ops, op)(**dict(zip(inputs.tensors, tensors, strict=True)), **inputs.options)

    traced = make_fx(outputs, pre_dispatch=pre_dispatch)(*inputs.tensors.values())
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert getattr(torch.ops.deco_kernels, op).default in called


@each_op
def test_functional_grad(op):
    inputs = small_inputs(op)
    actual = torch.func.grad(lambda tensors: loss_of(op, tensors, inputs.options, inputs.grad_outputs))(inputs.tensors)
    expected = gradients_of(loss_of, inputs)[1]
    for pair in zip(actual.values(), expected, strict=True):
        assert torch.equal(*pair)


@each_op
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_keeps_the_gradient(op):
    """Mapped over a factor of an input, and per-sample gradients: the same as in a loop."""
    inputs = small_inputs(op)
    name, factors = next(iter(inputs.tensors)), torch.tensor([1.0, 2.0])

    def loss(value, factor):
        return loss_of(op, inputs.tensors | {name: value * factor}, inputs.options, inputs.grad_outputs)

    def gradient(value, factor):
        leaf = value.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, factor), leaf)[0]

    expected = torch.stack([gradient(inputs.tensors[name], factor) for factor in factors])
    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(inputs.tensors[name], factors)
    assert testing.relative_error(per_sample, expected) <= 1e-6
    leaf = inputs.tensors[name].detach().requires_grad_()
    (summed,) = torch.autograd.grad(torch.vmap(loss, (None, 0))(leaf, factors).sum(), leaf)
    assert testing.relative_error(summed, expected.sum(0)) <= 1e-6


@each_backend
@pytest.mark.parametrize("op", DECODERS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_casts_float32_activations(implementation, op, dtype):
    inputs = small_inputs(op)
    activations = [name for name in ("h", "cond", "tokens") if name in inputs.tensors]
    cast = {name: inputs.tensors[name].to(dtype) for name in activations}
    expected = getattr(ops, op)(**(inputs.tensors | cast), **inputs.options, backend=implementation)
    with torch.autocast("cpu", dtype):
        actual = getattr(ops, op)(**inputs.tensors, **inputs.options, backend=implementation)
        loss, gradients = gradients_of(loss_of, inputs, backend=implementation)
    actual, expected = [x if isinstance(x, tuple) else (x,) for x in (actual, expected)]
    for output, other in zip(actual, expected, strict=True):
        assert output.dtype is dtype and torch.equal(output, other)
    assert loss.isfinite() and all(gradient.dtype is F32 for gradient in gradients)


@each_backend
@pytest.mark.parametrize("op", ["flow_matching_loss", "frequency_loss"])
def test_losses_under_autocast_stay_in_float32(implementation, op):
    inputs = small_inputs(op)
    expected = getattr(ops, op)(**inputs.tensors, **inputs.options, backend=implementation)
    with torch.autocast("cpu", BF16):
        actual = getattr(ops, op)(**inputs.tensors, **inputs.options, backend=implementation)
    actual, expected = [x if isinstance(x, tuple) else (x,) for x in (actual, expected)]
    for output, other in zip(actual, expected, strict=True):
        assert output.dtype is F32 and torch.equal(output, other)


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_backward_outside_the_block_uses_the_backend_of_the_forward(op, monkeypatch):
    from deco_kernels.ops import registry

    seen = []
    serve = registry.serve

    def recording(function, request, device, backend, *arguments, **kept):
        seen.append((function.endswith("backward"), backend))
        return serve(function, request, device, backend, *arguments, **kept)

    monkeypatch.setattr(registry, "serve", recording)
    inputs = small_inputs(op)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.tensors.items()}
    with deco_kernels.use_backend("reference"):
        loss = loss_of(op, leaves, inputs.options, inputs.grad_outputs)
    loss.backward()
    assert seen == [(False, "reference"), (True, "reference")]


def test_fake_tensors_have_the_real_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for op in OPS:
        inputs = small_inputs(op)
        transposed = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in inputs.tensors.items()}
        with FakeTensorMode() as mode:
            tensors = {name: mode.from_tensor(tensor) for name, tensor in transposed.items()}
            fake = getattr(ops, op)(**tensors, **inputs.options)
        real = getattr(ops, op)(**inputs.tensors, **inputs.options)
        for a, b in zip(*[x if isinstance(x, tuple) else (x,) for x in (fake, real)], strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@each_backend
@each_code
def test_anomaly_mode(implementation, op):
    inputs = small_inputs(op)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        gradients_of(loss_of, inputs, backend=implementation)


@each_op
def test_meta_tensors_give_shapes(op):
    """Without FakeTensorMode: outputs and gradients on the meta device have the real shapes and dtypes."""
    inputs = small_inputs(op, BF16)
    meta = inputs._replace(
        tensors={name: tensor.to("meta") for name, tensor in inputs.tensors.items()},
        grad_outputs=tuple(gradient.to("meta") for gradient in inputs.grad_outputs),
    )
    results, expected = testing.run(meta), testing.run(inputs, "reference")
    for output, real in zip(results.outputs, expected.outputs, strict=True):
        assert output.is_meta and (output.shape, output.dtype) == (real.shape, real.dtype)
    for name, gradient in results.gradients.items():
        assert gradient.is_meta and gradient.shape == inputs.tensors[name].shape, name
