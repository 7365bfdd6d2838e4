"""Processes, threads and sizes: a forked child, concurrent callers, tensors beyond 2**31 elements."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deco_kernels import ops, testing
from tests.ops.cases import BF16, IMPLEMENTATIONS, OPS, small_inputs

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
each_op = pytest.mark.parametrize("op", OPS)

FORK = """
import os, signal, sys, torch
from deco_kernels import ops, testing
torch.set_num_threads(2)

inputs = testing.random_inputs("adaln_block", image_size=(1, 32, 32))
torch.ones(2**20).mul_(2)  # starts PyTorch's threads
child = os.fork()
if child == 0:  # the first to load the native module
    signal.alarm(300)  # ends a child that waits for ever, before the test ends its parent
    ops.adaln_block(**inputs.tensors, **inputs.options, backend="cpu")
    os._exit(0)
if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
    sys.exit(f"the child that loads the native module ended with {status}")

for op in ("adaln_block", "pixel_decoder", "flow_matching_loss"):
    inputs = testing.random_inputs(op, image_size=(2, 32, 64))
    before = testing.run(inputs, "cpu")
    child = os.fork()
    if child == 0:
        after = testing.run(inputs, "cpu")
        torch.set_num_threads(1)  # for the comparison
        same = all(torch.equal(*pair) for pair in zip(before.outputs, after.outputs, strict=True))
        same = same and all(torch.equal(before.gradients[name], after.gradients[name]) for name in before.gradients)
        os._exit(0 if same else 1)
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"{op}: the child ended with {status}")
"""


def test_a_forked_child_computes_the_same_bits():
    """Only on the cpu backend: PyTorch's parallel loops do not work after a fork."""
    if len(IMPLEMENTATIONS) == 1:
        pytest.skip("the native CPU module is not built")
    finished = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr


NO_MORE_THREADS = """
import os, resource, sys, torch
from deco_kernels import ops, testing
torch.set_num_threads(2)
inputs = testing.random_inputs("pixel_decoder", patch_size=4, image_size=(1, 32, 32))
before = ops.pixel_decoder(**inputs.tensors, **inputs.options, backend="cpu")
child = os.fork()
if child == 0:
    torch.set_num_threads(16)  # more than the stacks that the child inherits and may use again
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, used + 2**22))  # no room for a thread's stack
    after = ops.pixel_decoder(**inputs.tensors, **inputs.options, backend="cpu")
    os._exit(0 if torch.equal(before, after) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_that_gets_no_threads_computes_alone():
    if len(IMPLEMENTATIONS) == 1:
        pytest.skip("the native CPU module is not built")
    finished = subprocess.run([sys.executable, "-c", NO_MORE_THREADS], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr


@each_implementation
@each_op
def test_concurrent_threads_give_the_same_bits(implementation, op, two_threads):
    inputs = [small_inputs(op, seed=seed, image_size=(2, 16, 16)) for seed in range(4)]
    expected = [testing.run(one, implementation) for one in inputs]
    together = threading.Barrier(len(inputs))

    def work(one, wanted):
        torch.set_num_threads(2)
        together.wait(600)
        for _ in range(5):
            actual = testing.run(one, implementation)
            assert all(map(torch.equal, actual.outputs, wanted.outputs))
            for name, gradient in actual.gradients.items():
                assert torch.equal(gradient, wanted.gradients[name]), name

    with ThreadPoolExecutor(len(inputs)) as pool:
        for done in [pool.submit(work, *pair) for pair in zip(inputs, expected, strict=True)]:
            done.result()


def _far_apart(tensor):
    """The same values, with the halves of the first axis more than 2**31 elements apart in mostly untouched memory."""
    distance = 2**31 + 64
    half = tensor.shape[0] // 2
    storage = torch.empty(distance + half * tensor[0].numel(), dtype=tensor.dtype)
    inner = torch.empty(tensor.shape[1:]).stride()
    view = storage.as_strided((2, half, *tensor.shape[1:]), (distance, tensor[0].numel(), *inner))
    view.copy_(tensor.view(2, half, *tensor.shape[1:]))
    return view.squeeze(1)  # [2, ...] for a batch of two, else [2, half, ...]


@each_implementation
@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_loss", "flow_matching_loss", "adaln_block"])
def test_strides_beyond_31_bits(implementation, op):
    """A batch of two whose second sample, also of the incoming gradient, is beyond 2**31 elements."""
    inputs = small_inputs(op, BF16, image_size=(2, 8, 16), other_dtype=BF16)
    expected = testing.run(inputs, implementation)
    far = [name for name in ("image", "pred", "target", "h") if name in inputs.tensors]
    far += ["cond"] * (op == "adaln_block")
    tensors = inputs.tensors | {name: _far_apart(inputs.tensors[name]) for name in far}
    grads = tuple(_far_apart(g) if g.dim() else g for g in inputs.grad_outputs)
    actual = testing.run(inputs._replace(tensors=tensors, grad_outputs=grads), implementation)
    for pair in zip(actual.outputs, expected.outputs, strict=True):
        assert torch.equal(pair[0].flatten(), pair[1].flatten())
    for name, gradient in actual.gradients.items():
        assert torch.equal(gradient.flatten(), expected.gradients[name].flatten()), name


@pytest.mark.long
def test_more_than_2_to_the_31_elements():
    """cond has more than 2**31 elements (expanded along tokens); the last patch equals the same patch decoded alone."""
    inputs = testing.random_inputs("pixel_decoder", dtype=BF16, image_size=(1, 16, 16), other_dtype=BF16)
    batch = 2**31 // (256 * 32) + 1
    image = inputs.tensors["image"].expand(batch, -1, -1, -1)
    cond = inputs.tensors["cond"].expand(batch, -1, -1)
    assert cond.numel() > 2**31
    velocity = ops.pixel_decoder(**(inputs.tensors | {"image": image, "cond": cond}), **inputs.options)
    alone = ops.pixel_decoder(**inputs.tensors, **inputs.options)
    assert torch.equal(velocity[-1:], alone) and torch.equal(velocity[batch // 2 :][:1], alone)
