"""Backend "cuda" on a GPU: shared cases, agreement with the emulator, graphs, streams, repeatability."""

import pytest
import torch

from deco_kernels import ops, testing
from deco_kernels.backends import chunk_sizes, cuda
from deco_kernels.backends.cuda import pixel_decoder, scaled_product
from deco_kernels.flow import cuda_graphs
from deco_kernels.ops import one_pass
from deco_kernels.testing import emulation
from tests.backends import test_cuda_scaled_product as products
from tests.ops.cases import BF16, CASES, CHOICES, F16, F32, small_inputs, with_choice

pytestmark = pytest.mark.gpu

OPS = tuple(CASES)
each_op = pytest.mark.parametrize("op", OPS)
each_choice = pytest.mark.parametrize(("op", "save_memory"), CHOICES)


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = cuda.unavailable_reason(device)
    if reason is not None:
        pytest.skip(reason)
    return device


def on(device, inputs: testing.Inputs) -> testing.Inputs:
    return inputs._replace(
        tensors={name: tensor.to(device) for name, tensor in inputs.tensors.items()},
        grad_outputs=tuple(gradient.to(device) for gradient in inputs.grad_outputs),
    )


def assert_equal(first: testing.Results, second: testing.Results):
    assert all(torch.equal(*pair) for pair in zip(first.outputs, second.outputs, strict=True))
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op}-{case.label}") for op in OPS for case in CASES[op] if case.dtype is not F32],
)
def test_rule_of_error(device, op, case):
    inputs = on(device, case.inputs(op))
    failed = [str(row) for row in testing.compare(inputs, testing.run(inputs, "cuda")) if not row.passed]
    assert not failed, "\n".join(failed)


@each_op
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("width", [16, 32, 64])
def test_agrees_with_the_emulator(device, emulated, op, dtype, width):
    """Same values up to rounding: tanh and the order of additions of the hardware differ from the emulator's."""
    inputs = testing.random_inputs(op, dtype=dtype, width=width, patch_size=8, image_size=(1, 32, 32))
    there, here = testing.run(on(device, inputs), "cuda"), testing.run(inputs, emulation.BACKEND)
    bound = 2 * torch.finfo(dtype).eps
    for actual, expected in zip(there.outputs, here.outputs, strict=True):
        assert testing.relative_error(actual.cpu(), expected) <= bound
    for name, gradient in there.gradients.items():
        assert testing.relative_error(gradient.cpu(), here.gradients[name]) <= 2 * bound, name


@each_choice
def test_repeated_runs_give_the_same_bits(device, op, save_memory):
    inputs = on(device, next(case for case in CASES[op] if case.dtype is BF16).inputs(op))
    inputs = with_choice(inputs, save_memory)
    assert_equal(testing.run(inputs, "cuda"), testing.run(inputs, "cuda"))


def test_chunks_whose_kernels_overlap_give_the_same_gradients(device, monkeypatch):
    """Many small kernels in a row, each of which may start before the one before it has ended."""
    inputs = on(device, testing.random_inputs("pixel_decoder", dtype=BF16, image_size=(8, 128, 128)))
    whole = testing.run(inputs, "cuda").gradients
    monkeypatch.setattr(chunk_sizes, "chunk_pixels", lambda *_, **__: 2048)
    chunked = testing.run(inputs, "cuda").gradients
    for name in ("image", "cond"):
        assert torch.equal(chunked[name], whole[name]), name
    for name, gradient in chunked.items():
        assert testing.relative_error(gradient, whole[name]) <= 1e-2, name


@each_choice
def test_a_stream_of_the_caller(device, op, save_memory):
    """Work is enqueued on the current stream: results are ordered after a long kernel on it."""
    inputs = on(device, testing.random_inputs(op, dtype=BF16, patch_size=4, image_size=(2, 32, 32)))
    inputs = with_choice(inputs, save_memory)
    expected = testing.run(inputs, "cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = inputs._replace(tensors={name: tensor.clone() for name, tensor in inputs.tensors.items()})
        results = testing.run(late, "cuda")
    torch.cuda.synchronize()
    assert_equal(results, expected)


@each_choice
def test_a_captured_graph_sees_changed_inputs_and_weights(device, op, save_memory):
    """Forward and backward."""
    inputs, changed = (on(device, small_inputs(op, BF16, seed=seed)) for seed in range(2))
    inputs = with_choice(inputs, save_memory)

    def step():
        return testing.run(inputs, "cuda")

    graph, captured = cuda_graphs.capture(step, warm_up=step)
    for name, tensor in inputs.tensors.items():
        tensor.copy_(changed.tensors[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, step())


@each_op
def test_graph_replay_sees_changed_weights(device, op):
    inputs = on(device, testing.random_inputs(op, dtype=BF16, patch_size=4, image_size=(2, 32, 32)))

    def call():
        return getattr(ops, op)(**inputs.tensors, **inputs.options, backend="cuda")

    with torch.no_grad():
        graph, captured = cuda_graphs.capture(call, warm_up=call)
        for scale in (1.0, 0.5):
            inputs.tensors["frequency_weight" if "loss" in op else "mod_weight"].mul_(scale)
            graph.replay()
            fresh = call()
            pairs = zip(captured, fresh, strict=True) if isinstance(captured, tuple) else [(captured, fresh)]
            assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens"])
def test_kept_activations_serve_two_backwards(device, op):
    inputs = on(device, testing.random_inputs(op, dtype=BF16, image_size=(2, 32, 64)))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.tensors.items()}
    velocity = getattr(ops, op)(**leaves, **inputs.options, save_memory=False, backend="cuda")
    gradients = [
        torch.autograd.grad(velocity, list(leaves.values()), inputs.grad_outputs, retain_graph=again)
        for again in (True, False)
    ]
    assert all(map(torch.equal, *gradients))


def test_kept_activations_on_another_device_are_refused(device):
    inputs = on(device, small_inputs("pixel_decoder", BF16))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.tensors.items()}
    shape = pixel_decoder.activation_shape(2 * 8 * 12, 2, 32)
    pack = lambda tensor: tensor.cpu() if tensor.shape == shape else tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = ops.pixel_decoder(**leaves, **inputs.options, save_memory=False, backend="cuda")
    with pytest.raises(ValueError, match=r"activations: expected .*cuda.*, got .*cpu; pass what"):
        velocity.sum().backward()


@pytest.mark.parametrize("count", [*products.COUNTS, (1 << 24) + 5])
def test_products_have_the_bits_of_pytorchs(device, count):
    values = products.numbers(count).to(device)
    for factor in (torch.tensor(number, device=device) for number in products.FACTORS):
        assert scaled_product.supported(values, factor)
        (found,) = one_pass.scaled([values], factor)
        products.assert_product(found, values, factor)
        products.assert_product(torch.mul(values, factor.view(1), out=torch.empty_like(values)), values, factor)
        products.assert_product(one_pass.scaled([values[1:]], factor)[0], values[1:], factor)


def test_graph_replay_sees_another_factor(device):
    """And the product does not wait for the factor on the host."""
    values, factor = products.numbers(4097).to(device), torch.tensor(1.3519, device=device)
    call = lambda: one_pass.scaled([values], factor)[0]  # noqa: E731
    graph, captured = cuda_graphs.capture(call, warm_up=call)
    for number in (0.7, -3.1):
        factor.fill_(number)
        graph.replay()
        products.assert_product(captured, values, factor)
