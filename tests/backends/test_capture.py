"""What a CUDA graph cannot capture is found without a GPU: copies from the host and waits in ops and contenders."""

import os

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.harness.steps import Step, contenders_of, require_gradients
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import Size
from deco_kernels import testing
from deco_kernels.backends.reference.common import constant
from deco_kernels.testing import emulation
from tests.installed import installed
from tests.mock_capture import CaptureRefused, mock_capture
from tests.ops.cases import BF16, KERNEL_OPS, OPS, small_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
each_op = pytest.mark.parametrize("op", OPS)

PLANTED = {
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: x if x.max() > 0 else -x,
    "index": lambda x: [x, -x][x[0, 0].long()],
    "list": lambda x: x.tolist(),
    "copy": lambda x: x.cpu(),
    "array": lambda x: x.numpy(),
    "mask": lambda x: x[x > 0],
    "number of elements": lambda x: x.nonzero(),
    "comparison": lambda x: torch.equal(x, x),
    "tensor": lambda x: x @ torch.tensor([[1.0] * 4] * 4),
    "new tensor": lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0]),
    "tensor of an array": lambda x: x * torch.from_numpy(np.ones(4, np.float32)),
    "copy into a new tensor": lambda x: torch.empty_like(x[0]).copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])),
    "list as index": lambda x: x[[0, 2]],
    "address": lambda x: torch.tensor([1.0]).data_ptr(),
}


@pytest.mark.parametrize("call", PLANTED.values(), ids=PLANTED)
def test_what_cannot_be_captured_is_refused(call):
    x = torch.randn(4, 4)
    with pytest.raises(CaptureRefused), mock_capture():
        call(x)


def test_what_can_be_captured_runs():
    x = torch.randn(4, 4, requires_grad=True)
    with mock_capture():
        y = (x * 2 + torch.arange(4, device=x.device) * torch.tensor(0.5))[1:].to(BF16)
        y.masked_fill(y > 0, 1.0).float().square().sum().backward()
    assert x.grad.any()


def test_a_wait_inside_an_operator_is_refused():
    """The backend for the CPU reads the gradient of the loss on the host."""
    inputs = small_inputs("flow_matching_loss")
    with pytest.raises(CaptureRefused, match="_local_scalar_dense"), mock_capture():
        testing.run(inputs, "cpu")


@each_op
def test_the_reference(op):
    inputs = small_inputs(op, BF16)
    expected = testing.run(inputs, "reference")  # constants are copied in the first call
    with mock_capture():
        results = testing.run(inputs, "reference")
    assert all(torch.equal(*pair) for pair in zip(results.outputs, expected.outputs, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", testing.OPS)
def test_eager_contenders(op, training):
    problem, size = problem_of(op), Size(height=16, width=16, depth=2, patch_size=4)
    operands = problem.make_operands(size, BF16, torch.Generator())
    require_gradients(problem, operands, training)
    for contender in contenders_of(problem, size, backends=("reference",)):
        step = Step(problem, contender, BF16, "cpu", training)
        step(operands)
        with mock_capture():
            step(operands)


class Calling(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def on_fake_tensors(call, like):
    with FakeTensorMode() as mode:
        call(mode.from_tensor(like))


TRACED = {  # the constant is a fake, wrapped or inference tensor, or a part of a program
    "fake": on_fake_tensors,
    "inference": lambda call, like: torch.inference_mode()(call)(like),
    "make_fx": lambda call, like: make_fx(call, tracing_mode="fake")(like),
    "export": lambda call, like: torch.export.export(Calling(call), (like,)),
    "vmap": lambda call, like: torch.func.vmap(call)(like[None]),
    "grad": lambda call, like: torch.func.grad(lambda scale: (call(like) * scale).sum())(torch.ones(())),
}


@pytest.mark.parametrize("run", TRACED.values(), ids=TRACED)
def test_constants_are_copied_once_and_stay_plain_tensors(run):
    like, values = torch.randn(2, 2), ((float(list(TRACED.values()).index(run)), 1.0), (2.0, 3.0))
    run(lambda x: x @ constant(values, x), like)  # no other test has copied these values
    stored = constant(values, like)
    assert type(stored) is torch.Tensor and not stored.is_inference() and torch.equal(stored, torch.tensor(values))
    assert constant(values, like.clone()) is stored
    assert constant(values, like.double()).dtype is torch.float64
    (like.clone().requires_grad_() @ stored).sum().backward()


@pytest.mark.emulate
@each_op
def test_the_cuda_backend(emulated, op):
    inputs = small_inputs(op, BF16)
    with mock_capture():
        testing.run(inputs, emulation.BACKEND)


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="about the host code of compiled kernels")
@pytest.mark.parametrize("op", [op for op in testing.OPS if op in KERNEL_OPS])
def test_the_triton_backend(op):
    """Host code and arguments of the kernels, which are recorded instead of run."""
    installed("triton")
    from benchmarks.static import triton_kernels

    inputs = small_inputs(op, BF16)
    with mock_capture() as on_host:
        launches = triton_kernels.launches_of(inputs, "sm_90")
        tensors = [value for launch in launches for value in launch.args.values() if isinstance(value, torch.Tensor)]
        assert tensors and not any(map(on_host, tensors))
