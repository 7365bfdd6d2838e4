"""The instruction set amx of backend "cpu": its results, and tile registers shared with PyTorch's matmuls."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from deco_kernels import native, testing
from deco_kernels.testing.inputs import KEEPS_COND
from tests.conftest import instruction_set, threads
from tests.ops.cases import BF16, F16, F32, small_inputs

MISSING = native.cpu_unavailable_reason() or (
    None if "amx" in native.cpu().usable_isas() else "needs AMX for bfloat16, and a module built with it"
)
needs_amx = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
OPS = ("adaln_block", "upsample_modulate", "pixel_decoder", "pixel_decoder_from_tokens", "pixel_decoder_loss")
each_op = pytest.mark.parametrize("op", OPS)

# (D, N, p, image): tiles of every width, whole and partial, one pixel, and every depth.
SIZES = [
    (16, 1, 1, (1, 1, 1)),
    (32, 1, 1, (1, 1, 1)),
    (64, 1, 1, (1, 1, 1)),
    (16, 2, 1, (1, 7, 11)),
    (32, 3, 1, (1, 5, 13)),
    (64, 4, 2, (1, 6, 14)),
    (16, 5, 4, (2, 12, 20)),
    (32, 6, 8, (1, 24, 40)),
    (64, 7, 16, (1, 32, 48)),
    (32, 8, 16, (2, 32, 32)),
]


def sized_inputs(op, dtype, size, **arguments):
    width, depth, patch_size, image_size = size
    if "loss" in op:
        image_size = (image_size[0], *(max(5, side) for side in image_size[1:]))  # its smallest image
    return small_inputs(
        op, dtype, width=width, depth=depth, patch_size=patch_size, image_size=image_size, token_width=33, **arguments
    )


def results(inputs, isa):
    with instruction_set(isa):
        return testing.run(inputs, "cpu")


def assert_equal(found, expected):
    assert all(map(torch.equal, found.outputs, expected.outputs))
    for name, gradient in found.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name


@needs_amx
def test_amx_is_the_fastest():
    assert native.cpu().usable_isas()[:2] == ["amx", "avx512bf16"]


@needs_amx
@pytest.mark.parametrize("size", SIZES, ids=str)
@each_op
def test_results_are_close_to_those_of_avx512bf16(op, size, poisoned_memory):
    """Both round the same factors; only the order of the sums differs, and what is rounded after it."""
    inputs = sized_inputs(op, BF16, size)
    found, expected = results(inputs, "amx"), results(inputs, "avx512bf16")
    for output, other in zip(found.outputs, expected.outputs, strict=True):
        assert testing.relative_error(output, other) <= torch.finfo(BF16).eps
    for name, gradient in found.gradients.items():
        assert testing.relative_error(gradient, expected.gradients[name]) <= torch.finfo(BF16).eps, name


@needs_amx
@pytest.mark.parametrize("dtype", [F32, F16])
@each_op
def test_other_dtypes_give_the_bits_of_avx512bf16(op, dtype):
    inputs = sized_inputs(op, dtype, (32, 2, 4, (2, 12, 20)))
    assert_equal(results(inputs, "amx"), results(inputs, "avx512bf16"))


@needs_amx
@each_op
def test_gradients_of_pixels_do_not_depend_on_the_thread_count(op):
    inputs = sized_inputs(op, BF16, (32, 2, 4, (2, 28, 36)))
    found = []
    for count in (1, 2, 5):
        with threads(count):
            found.append(results(inputs, "amx"))
    for other in found[1:]:
        if "loss" not in op:
            assert all(map(torch.equal, other.outputs, found[0].outputs))
        for name in {"image", "cond", "h", "tokens"} & set(other.gradients):
            assert torch.equal(other.gradients[name], found[0].gradients[name]), name


@needs_amx
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [16, 32, 64])
def test_a_pixel_that_is_not_finite_stays_alone(width, value):
    inputs = sized_inputs("pixel_decoder", BF16, (width, 2, 4, (1, 12, 20)))
    clean = results(inputs, "amx").outputs[0]
    inputs.tensors["cond"].view(-1, width)[37] = value  # pixel 5 of token 2: image pixel (1, 9)
    velocity = results(inputs, "amx").outputs[0]
    changed = (velocity != clean).any(dim=1)
    assert changed.nonzero().tolist() == [[0, 1, 9]]
    assert velocity[0, :, 1, 9].isnan().all()


@needs_amx
@each_op
def test_pytorchs_matmuls_in_between_change_nothing(op):
    """They configure the tile registers of the same threads in their own way."""
    inputs = sized_inputs(op, BF16, (16, 2, 4, (2, 12, 20)))
    a, b = torch.randn(2, 257, 257).to(BF16)
    with threads(2):
        product, expected = a @ b, results(inputs, "amx")
        for _ in range(3):
            assert_equal(results(inputs, "amx"), expected)
            assert torch.equal(a @ b, product)


@needs_amx
def test_widths_alternate_on_concurrent_threads():
    """The tiles of D = 16 have another shape than those of D = 32."""
    all_inputs = [sized_inputs("pixel_decoder", BF16, size) for size in SIZES[6:9]]
    expected = [results(inputs, "amx") for inputs in all_inputs]
    failures = []

    def work():
        try:
            for _ in range(5):
                for inputs, wanted in zip(all_inputs, expected, strict=True):
                    assert_equal(testing.run(inputs, "cpu"), wanted)
        except BaseException as error:
            failures.append(error)

    with instruction_set("amx"):
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures, failures[0]


@needs_amx
@pytest.mark.parametrize("op", KEEPS_COND)
def test_sums_over_many_pixels_are_accurate(op):
    """As accurate as those of avx512bf16, which round the same factors and whose upsample is a kernel here, too."""
    inputs = testing.random_inputs(op, dtype=BF16, depth=1, patch_size=8, image_size=(2, 128, 128), token_width=32)
    native.select_upsample("kernel")
    try:
        found, other = results(inputs, "amx"), results(inputs, "avx512bf16")
    finally:
        native.select_upsample("auto")
    for name, gradient in found.gradients.items():
        assert testing.relative_error(gradient, other.gradients[name]) <= 5e-4, name
    exact, eager = testing.exact_results(inputs), testing.eager_results(inputs)
    failed = [str(row) for row in testing.compare(inputs, found, exact, eager) if not row.passed]
    assert not failed, "\n".join(failed)


FORK = """
import os, sys, torch
from deco_kernels import native, testing
torch.set_num_threads(2)
native.cpu().select_isa("amx")
inputs = testing.random_inputs("pixel_decoder", dtype=torch.bfloat16, patch_size=4, image_size=(2, 32, 64))
before = testing.run(inputs, "cpu")
child = os.fork()
if child == 0:
    after = testing.run(inputs, "cpu")
    torch.set_num_threads(1)  # for the comparison
    same = all(torch.equal(after.gradients[name], before.gradients[name]) for name in before.gradients)
    os._exit(0 if same and torch.equal(after.outputs[0], before.outputs[0]) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_amx
def test_a_forked_child_may_use_the_tiles():
    finished = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr


REFUSED = """
import ctypes, torch
class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)  # too small for the registers that a signal would save
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from deco_kernels import native
module = native.cpu()
print(module.usable_isas()[0], module.has_amx_bf16(), native.upsamples_in_pytorch(torch.bfloat16, 1152, 8192))
"""


@needs_amx
def test_a_process_that_may_not_use_the_tiles():
    """Linux refuses them to a process whose signal stack is too small."""
    command = [sys.executable, "-c", REFUSED]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert finished.stdout.split() == ["avx512bf16", "False", "False"]


@needs_amx
@pytest.mark.parametrize("name", ["amx", "avx512bf16"])
def test_the_environment_selects(name):
    code = "from deco_kernels import native; print(native.cpu().current_isa())"
    environment = os.environ | {native.ISA_VARIABLE: name}
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert finished.stdout.strip() == name


@pytest.mark.skipif(MISSING is None or native.cpu_unavailable_reason() is not None, reason="for modules without AMX")
def test_amx_is_refused_where_it_cannot_run():
    message = r"instruction set 'amx' (is not supported by|was not built)|unknown instruction set 'amx'"
    with pytest.raises(ValueError, match=message):
        native.cpu().select_isa("amx")
