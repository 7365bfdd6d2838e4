"""The choice between keeping and recomputing condition and activations: what is kept, the same results, and PyTorch
around both."""

import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from deco_kernels import native, ops, testing
from deco_kernels.testing.inputs import KEEPS_COND, SAVE_MEMORY
from tests.conftest import instruction_set
from tests.ops.cases import BACKENDS, BF16, F32, IMPLEMENTATIONS, small_inputs, with_choice

each_op = pytest.mark.parametrize("op", SAVE_MEMORY)
each_op_with_cond = pytest.mark.parametrize("op", KEEPS_COND)
each_backend = pytest.mark.parametrize("implementation", BACKENDS, indirect=True)
each_choice = pytest.mark.parametrize("save_memory", [False, True])


def call(inputs, tensors, **options):
    outputs = getattr(ops, inputs.op)(**tensors, **(inputs.options | options))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def leaves_of(inputs):
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}


def loss(inputs, tensors, **options):
    pairs = zip(call(inputs, tensors, **options), inputs.grad_outputs, strict=True)
    return sum((output.to(F32) * gradient).sum() for output, gradient in pairs)


def call_and_saved(inputs, tensors, **options):
    """Outputs, and the tensors that are kept for the backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        return call(inputs, tensors, **options), saved


def saved_shapes(inputs, tensors, **options):
    return [tensor.shape for tensor in call_and_saved(inputs, tensors, **options)[1]]


def new_shape(inputs):
    """Shape of the condition: two leading sizes that no argument has together."""
    tokens = inputs.tensors["tokens"]
    width = inputs.tensors["norm_weight"].shape[-1]
    return (*tokens.shape[:-1], inputs.tensors["up_weight"].shape[0] // width, width)


@each_backend
@each_op_with_cond
def test_the_condition_is_kept_unless_memory_is_saved(implementation, op):
    inputs = small_inputs(op)
    shape, leaves = new_shape(inputs), leaves_of(inputs)
    given = sum(tensor.shape == shape for tensor in leaves.values())
    for save_memory, count in ((False, 1), (True, 0)):
        shapes = saved_shapes(inputs, leaves, save_memory=save_memory, backend=implementation)
        assert shapes.count(shape) == given + count
    default = saved_shapes(inputs, leaves, backend=implementation).count(shape) - given
    assert default == (op == "upsample_modulate")


@each_op
@each_choice
def test_nothing_is_kept_without_a_gradient(op, save_memory):
    inputs = small_inputs(op)
    assert saved_shapes(inputs, inputs.tensors, save_memory=save_memory) == []
    with torch.no_grad():
        assert saved_shapes(inputs, leaves_of(inputs), save_memory=save_memory) == []


@each_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 0.0), (BF16, 4e-3)])
def test_the_kept_condition_is_the_upsample(implementation, dtype, tolerance):
    inputs = small_inputs("upsample_modulate", dtype)
    operator = torch.ops.deco_kernels.upsample_modulate_with_kept.default
    cond = operator(*inputs.in_order(), 1e-6, implementation)[-1]
    tokens, weight, bias = (inputs.tensors[name].double() for name in ("tokens", "up_weight", "up_bias"))
    expected = tokens @ weight.to(dtype).double().T + bias
    assert cond.shape == inputs.tensors["h"].shape and cond.dtype is dtype
    assert testing.relative_error(cond, expected.view(cond.shape)) <= tolerance + 1e-6


@each_op
def test_both_choices_give_the_same_forward(op):
    inputs = small_inputs(op, BF16)
    leaves = leaves_of(inputs)
    for pair in zip(*(call(inputs, leaves, save_memory=choice) for choice in (False, True)), strict=True):
        assert torch.equal(*pair)


@each_backend
@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results_is_enough(implementation, used):
    inputs = small_inputs("upsample_modulate")
    zeroed = [gradient if index == used else 0 * gradient for index, gradient in enumerate(inputs.grad_outputs)]
    expected = testing.run(inputs._replace(grad_outputs=tuple(zeroed)), implementation).gradients
    leaves = leaves_of(inputs)
    output = call(inputs, leaves, backend=implementation)[used]
    gradients = torch.autograd.grad(output, list(leaves.values()), inputs.grad_outputs[used], allow_unused=True)
    for (name, other), gradient in zip(expected.items(), gradients, strict=True):
        assert testing.relative_error(gradient, other) <= 1e-6, name


@each_op
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_pytorch_around_the_other_choice(op):
    """torch.compile, activation checkpointing, torch.func and a second backward give the gradients of a plain call.

    The tests of all ops do the same with the default.
    """
    torch._dynamo.reset()
    inputs, save_memory = small_inputs(op), op == "upsample_modulate"
    names, values = list(inputs.tensors), list(inputs.tensors.values())

    def function(*tensors):
        return loss(inputs, dict(zip(names, tensors, strict=True)), save_memory=save_memory)

    def gradients(function, **options):
        leaves = [value.detach().requires_grad_() for value in values]
        return torch.autograd.grad(function(*leaves), leaves, **options)

    expected = gradients(function)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mapped = torch.vmap(torch.func.grad(function), (0, *[None] * (len(values) - 1)))(values[0][None], *values[1:])[0]
    leaves = [value.detach().requires_grad_() for value in values]
    value = function(*leaves)
    twice = [torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2)]
    results = {
        "compile": gradients(compiled),
        "checkpoint": gradients(lambda *tensors: checkpoint(function, *tensors, use_reentrant=False)),
        "func": torch.func.grad(function, tuple(range(len(values))))(*values),
        "vmap": [mapped],
        "first": twice[0],
        "second": twice[1],
    }
    for name, found in results.items():
        for gradient, other in zip(found, expected, strict=False):
            assert testing.relative_error(gradient, other) <= 1e-6, name


@each_op
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_choice_that_is_neither(op, value):
    inputs = small_inputs(op)
    with pytest.raises(TypeError, match=f"{op}: save_memory: expected True or False, got {value!r}"):
        call(inputs, inputs.tensors, save_memory=value)


# --- the activations of the decoder ----------------------------------------------------------------------------------


@each_backend
def test_backends_on_the_cpu_keep_no_activations(implementation):
    inputs = small_inputs("pixel_decoder")
    shapes = saved_shapes(inputs, leaves_of(inputs), save_memory=False, backend=implementation)
    assert sorted(shapes) == sorted([*(t.shape for t in inputs.tensors.values() if t is not None), torch.Size([0])])


@pytest.mark.parametrize("backend", [None, "cuda", "cpu", "reference"])
@each_op
def test_tensors_without_data(op, backend):
    """Both choices work on the meta device, also for a backend that this machine cannot run."""
    inputs = small_inputs(op, BF16)
    leaves = {name: tensor.to("meta").requires_grad_() for name, tensor in inputs.tensors.items()}
    for save_memory in (True, False):
        outputs, saved = call_and_saved(inputs, leaves, save_memory=save_memory, backend=backend)
        assert [output.shape for output in outputs] == [gradient.shape for gradient in inputs.grad_outputs]
        outputs[0].sum().backward()
        keeps = op in ("pixel_decoder", "pixel_decoder_from_tokens") and backend == "cuda" and not save_memory
        assert sum(tensor.shape[:2] == (4, 256) for tensor in saved) == keeps


def test_a_gpu_that_is_not_there():
    inputs = small_inputs("pixel_decoder", BF16)
    with FakeTensorMode():
        tensors = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in inputs.in_order()]
        options = (*inputs.options.values(), 1e-6)
        for backend, rows in (("cuda", 256), ("auto", 256 if torch.cuda.is_available() else None)):
            velocity, kept = torch.ops.deco_kernels.pixel_decoder_with_kept(*tensors, *options, backend)
            assert velocity.shape == inputs.grad_outputs[0].shape
            assert kept.shape == ((4, rows, 32) if rows else (0,))


@pytest.mark.parametrize("op", ["pixel_decoder_from_tokens", "upsample_modulate"])
def test_an_exported_program_keeps_nothing(op):
    inputs = small_inputs(op)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parameter = torch.nn.Parameter(inputs.tensors["up_bias"].clone())

        def forward(self, tokens):
            tensors = inputs.tensors | {"tokens": tokens, "up_bias": self.parameter}
            return call(inputs, tensors, save_memory=False)

    program = torch.export.export(Module(), (inputs.tensors["tokens"],))
    names = [str(node.target) for node in program.graph.nodes if "deco_kernels" in str(node.target)]
    assert names == [f"deco_kernels.{op}.default"]


def check_kept_activations(inputs, backend, shape):
    """Activations of this shape are kept unless memory is saved; the backward reads them and may run again."""
    leaves, gradients = leaves_of(inputs), {}
    for save_memory in (True, False):
        (velocity,), saved = call_and_saved(inputs, leaves, save_memory=save_memory, backend=backend)
        assert [tensor.shape for tensor in saved].count(shape) == (not save_memory)
        before = [tensor.clone() for tensor in saved]
        first, second = (
            torch.autograd.grad(velocity, list(leaves.values()), inputs.grad_outputs, retain_graph=True)
            for _ in range(2)
        )
        assert all(map(torch.equal, first, second)) and all(map(torch.equal, before, saved))
        gradients[save_memory] = first
        if not save_memory:
            activations = next(tensor for tensor in saved if tensor.shape == shape)
            activations.zero_()
            read = torch.autograd.grad(velocity, list(leaves.values()), inputs.grad_outputs)
            assert not any(map(torch.equal, read[:2], first))
    for name, kept, again in zip(leaves, gradients[False], gradients[True], strict=True):
        assert testing.relative_error(kept, again) <= 2e-2, name


def check_refused_activations(backend):
    inputs = small_inputs("pixel_decoder", BF16)
    options = (*inputs.options.values(), 1e-6, backend)
    velocity, kept = torch.ops.deco_kernels.pixel_decoder_with_kept(*inputs.in_order(), *options)
    needs = [tensor is not None for tensor in inputs.in_order()]
    for wrong in (kept[:, :16], kept.half(), kept.mT):
        with pytest.raises(ValueError, match=r"activations: expected \[[34], .*; pass what pixel_decoder_with_kept"):
            torch.ops.deco_kernels.pixel_decoder_backward(velocity, *inputs.in_order(), wrong, *options, needs)
    for other in ("reference", "cpu"):
        with pytest.raises(ValueError, match="activations: expected None, for this backend keeps none, got"):
            torch.ops.deco_kernels.pixel_decoder_backward(
                velocity, *inputs.in_order(), kept, *options[:-1], other, needs
            )


# --- the matmul of the upsample on the CPU ---------------------------------------------------------------------------

needs_native = pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason="needs the native CPU module")


@pytest.fixture
def upsample():
    previous = native.current_upsample()
    yield native.select_upsample
    native.select_upsample(previous)


@needs_native
@each_op_with_cond
def test_pytorch_and_the_kernel_upsample_alike(op, upsample, poisoned_memory):
    """Each is chosen by name."""
    inputs = testing.random_inputs(op, dtype=BF16, patch_size=8, depth=1, query="tokens", head_norm="rms")
    exact, eager = testing.exact_results(inputs), testing.eager_results(inputs)
    found = {}
    for name, save_memory in (("kernel", True), ("pytorch", False), ("pytorch", True)):
        upsample(name)
        found[name] = testing.run(with_choice(inputs, save_memory), "cpu")
        failed = [str(row) for row in testing.compare(inputs, found[name], exact, eager) if not row.passed]
        assert not failed, name + "\n".join(failed)
    assert not torch.equal(found["kernel"].outputs[0], found["pytorch"].outputs[0])


@needs_native
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], indirect=True)
@pytest.mark.parametrize("dtype", [F32, BF16])
@each_op_with_cond
def test_the_kernel_computes_the_same_condition_again(implementation, op, dtype, upsample):
    """So both choices give the same gradients, bit by bit."""
    upsample("kernel")
    inputs = small_inputs(op, dtype)
    kept, again = (testing.run(with_choice(inputs, choice), implementation).gradients for choice in (False, True))
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())


@needs_native
@each_op_with_cond
def test_only_bfloat16_upsamples_in_pytorch(op, upsample):
    inputs = small_inputs(op)
    upsample("kernel")
    expected = testing.run(inputs, "cpu")
    upsample("pytorch")
    assert all(map(torch.equal, testing.run(inputs, "cpu").outputs, expected.outputs))


@needs_native
@pytest.mark.parametrize(
    ("value", "reason"), [("pytorch", None), ("mkl", "unknown matmul 'mkl'; use one of auto, kernel")]
)
def test_the_environment_chooses_the_matmul(value, reason, upsample, monkeypatch):
    monkeypatch.setenv(native.UPSAMPLE_VARIABLE, value)
    native.load_cpu.cache_clear()
    try:
        found = native.cpu_unavailable_reason()
        assert (
            native.current_upsample() == value
            if reason is None
            else f"{native.UPSAMPLE_VARIABLE}=mkl: {reason}" in found
        )
    finally:
        monkeypatch.undo()
        native.load_cpu.cache_clear()


@needs_native
def test_the_processor_chooses_the_matmul(upsample):
    upsample("auto")
    for isa in native.cpu().usable_isas():
        with instruction_set(isa):
            only_pytorch_has_amx = native.cpu().has_amx_bf16() and isa != "amx"
            assert native.upsamples_in_pytorch(BF16, 1152, 8192) == only_pytorch_has_amx
    assert "amx_bf16" in open("/proc/cpuinfo").read() or not native.cpu().has_amx_bf16()


def test_sizes_choose_the_matmul_on_amx(upsample, monkeypatch):
    """PyTorch's matmul only for multiples of 32, unless it is chosen by name."""
    module = types.SimpleNamespace(has_amx_bf16=lambda: True, current_isa=lambda: "avx512bf16")
    monkeypatch.setattr(native, "cpu", lambda: module)
    upsample("auto")
    assert native.upsamples_in_pytorch(BF16, 1152, 8192) and not native.upsamples_in_pytorch(torch.float32, 1152, 8192)
    assert not native.upsamples_in_pytorch(BF16, 1152, 48) and not native.upsamples_in_pytorch(BF16, 33, 8192)
    upsample("pytorch")
    assert native.upsamples_in_pytorch(BF16, 33, 48)
    upsample("kernel")
    assert not native.upsamples_in_pytorch(BF16, 1152, 8192)
