"""The upsample and its gradients: PyTorch's matmuls, and the kernels of the backend "cpu"."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deco_kernels import native, testing
from deco_kernels.backends.cpu import upsample as kernels
from deco_kernels.backends.upsample import UpsampleGradients
from deco_kernels.signatures import UpsampleWeights
from tests.conftest import instruction_set, threads
from tests.operators import OperatorNames
from tests.ops.cases import IMPLEMENTATIONS, padded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
THREADS = Path("/proc/self/task")
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16])
_PARAMETERS = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], indirect=True)


def each_isa(test):
    return pytest.mark.usefixtures("in_the_kernel")(_PARAMETERS(test))


# (T, P*D, Z) with whole and partly empty tiles, strips, panels, groups and blocks of the kernels
SIZES = [(1, 16, 1), (5, 80, 48), (37, 272, 33), (70, 512, 100), (130, 48, 64)]


@pytest.fixture
def in_the_kernel():
    """Also where the processor would select PyTorch's matmul."""
    previous = native.current_upsample()
    native.select_upsample("kernel")
    yield
    native.select_upsample(previous)


def random_upsample(dtype, sizes, weight_dtype=F32):
    """(tokens [T, Z], the upsample, gradient of the conditions [T, P*D])"""
    tokens, outputs, width = sizes
    up = UpsampleWeights(torch.randn(outputs, width).to(weight_dtype), torch.randn(outputs).to(weight_dtype))
    return torch.randn(tokens, width).to(dtype), up, torch.randn(tokens, outputs).to(F32 if dtype is F16 else dtype)


def gradients(kind, tokens, up, grad, needs=(True,) * 3, chunk=None):
    """Gradients of (tokens, up_weight, up_bias), in chunks of tokens."""
    upsample, chunk = kind(tokens, up, needs), chunk or max(1, len(tokens))
    for first in range(0, len(tokens), chunk):
        upsample.add(first, grad[first : first + chunk].unflatten(1, (-1, 16)))
    return upsample.results()


def exact_gradients(tokens, up, grad):
    weight = up.up_weight.to(tokens.dtype).double()
    return grad.double() @ weight, grad.double().T @ tokens.double(), grad.double().sum(0)


def tolerance(dtype):
    """Sums in float32, rounded once to `dtype`, by at most half a unit in the last place."""
    return 2e-6 if dtype is F32 else 2e-6 + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("kept", [False, True])
@each_dtype
def test_the_matmul_adds_the_bias(dtype, kept):
    """In its own kernel: with a float32 bias and 16-bit tokens, another pass over the conditions would add it."""
    tokens, up, _ = random_upsample(dtype, (6, 80, 48))
    upsample, memory = UpsampleGradients(tokens, up, needs=(False,) * 3), torch.empty(6, 80, dtype=dtype)
    with OperatorNames() as names:
        found = upsample.cond(slice(1, 5), memory if kept else None)
    assert [name.split(".")[1] for name in names if "add" in name or "mm" in name] == ["addmm"]
    weight, bias = (tensor.to(dtype).double() for tensor in up)
    expected = tokens[1:5].double() @ weight.T + bias
    assert found.dtype is dtype
    assert testing.relative_error(found, expected) <= (1e-6 if dtype is F32 else torch.finfo(dtype).eps)
    assert not kept or found.data_ptr() == memory[1:].data_ptr()


@each_isa
@pytest.mark.parametrize("sizes", SIZES)
@each_dtype
def test_conditions_of_the_kernel(implementation, dtype, sizes, poisoned_memory):
    tokens, up, _ = random_upsample(dtype, sizes)
    part = slice(len(tokens) // 3, len(tokens))
    found = kernels.UpsampleGradients(padded(tokens), up, needs=(False,) * 3).cond(part)
    expected = tokens[part].double() @ up.up_weight.to(dtype).double().T + up.up_bias.double()
    assert found.dtype is dtype and testing.relative_error(found, expected) <= tolerance(dtype)


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason=str(native.cpu_unavailable_reason()))
@pytest.mark.parametrize("sizes", [*SIZES, (37, 272, 64), (37, 512, 33), (37, 512, 96)])
def test_what_lies_between_rows_does_not_matter(sizes):
    """With the matmul that is selected here: PyTorch's on AMX multiplies what lies behind odd rows by zero."""
    tokens, up, grad = random_upsample(BF16, sizes)
    upsample = kernels.UpsampleGradients(padded(tokens), up, needs=(True,) * 3)
    assert upsample.cond(slice(0, len(tokens))).isfinite().all()
    upsample.add(0, padded(grad).unflatten(1, (-1, 16)))
    assert all(gradient.isfinite().all() for gradient in upsample.results())


@each_isa
@pytest.mark.parametrize("sizes", SIZES)
@each_dtype
def test_gradients_of_the_kernel(implementation, dtype, sizes, poisoned_memory):
    tokens, up, grad = random_upsample(dtype, sizes)
    found = gradients(kernels.UpsampleGradients, padded(tokens), up, padded(grad))
    for gradient, expected, like in zip(found, exact_gradients(tokens, up, grad), (tokens, *up), strict=True):
        assert gradient.dtype is like.dtype and gradient.shape == like.shape
        assert testing.relative_error(gradient, expected) <= tolerance(like.dtype)


@each_isa
@pytest.mark.parametrize("weight_dtype", [F32, BF16])
def test_gradients_of_the_kernel_in_chunks(implementation, weight_dtype, monkeypatch):
    """Chunks, and calls within a chunk, add to float32 sums that are rounded once."""
    tokens, up, grad = random_upsample(BF16, (70, 272, 33), weight_dtype)
    monkeypatch.setattr(kernels, "MAX_TOKENS", 16)
    found = gradients(kernels.UpsampleGradients, tokens, up, grad, chunk=40)
    for gradient, expected, like in zip(found, exact_gradients(tokens, up, grad), (tokens, *up), strict=True):
        assert gradient.dtype is like.dtype
        assert testing.relative_error(gradient, expected) <= tolerance(like.dtype)


@each_isa
@each_dtype
def test_only_wanted_gradients_of_the_kernel(implementation, dtype):
    tokens, up, grad = random_upsample(dtype, (37, 80, 48))
    expected = gradients(kernels.UpsampleGradients, tokens, up, grad)
    for index in range(3):
        needs = [index == other for other in range(3)]
        found = gradients(kernels.UpsampleGradients, tokens, up, grad, needs)
        assert [gradient is None for gradient in found] == [not need for need in needs]
        assert torch.equal(found[index], expected[index])


@each_isa
@each_dtype
def test_gradients_of_the_kernel_are_the_same_bits_on_any_number_of_threads(implementation, dtype):
    """With more threads than strips of Z, tokens are divided too."""
    tokens, up, grad = random_upsample(dtype, (200, 272, 70))
    results = []
    for count in (1, 2, 7, 16):
        with threads(count):
            results.append(gradients(kernels.UpsampleGradients, tokens, up, grad))
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def threads_started() -> int:
    """Threads that this process starts for gradients on two threads, in every instruction set, with one strip of Z."""
    tokens, up, grad = random_upsample(F32, (256, 32, 8))
    with threads(2):
        before = len(list(THREADS.iterdir()))
        for isa in native.cpu().usable_isas():
            with instruction_set(isa):
                gradients(kernels.UpsampleGradients, tokens, up, grad)
        return len(list(THREADS.iterdir())) - before


@pytest.mark.skipif(not THREADS.is_dir(), reason="needs the list of the process's threads")
@pytest.mark.skipif(not IMPLEMENTATIONS[1:], reason="needs the native CPU module")
def test_gradients_of_the_kernel_start_no_more_threads_than_are_set():
    """In a process without other threads, which end when they like."""
    command = [sys.executable, "-c", f"from {__name__} import threads_started; print(threads_started())"]
    started = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    assert int(started) <= 1


@each_isa
def test_large_gradients_of_the_kernel(implementation):
    """Beyond 4 MiB they are written past the caches, in whole cache lines, with AVX-512."""
    tokens, up, grad = random_upsample(BF16, (8, 8192, 160))
    with threads(2):
        found = gradients(kernels.UpsampleGradients, tokens, up, grad)[1]
    assert testing.relative_error(found, exact_gradients(tokens, up, grad)[1]) <= tolerance(F32)


@each_isa
def test_values_that_are_not_finite_stay_in_their_rows(implementation):
    """Places that fill a tile hold zeros and do not meet the values of others."""
    tokens, up, grad = random_upsample(F32, (5, 80, 48))
    grad[4, 79], tokens[4, 47] = torch.inf, torch.nan
    grad_tokens, grad_weight, grad_bias = gradients(kernels.UpsampleGradients, tokens, up, grad)
    assert grad_tokens[:4].isfinite().all() and not grad_tokens[4].isfinite().any()
    assert grad_weight[:79, :47].isfinite().all() and grad_weight[:, 47].isnan().all()
    assert grad_bias[:79].isfinite().all() and grad_bias[79] == torch.inf


@each_isa
def test_no_tokens(implementation):
    tokens, up, grad = random_upsample(F32, (0, 80, 48))
    assert all(not gradient.any() for gradient in gradients(kernels.UpsampleGradients, tokens, up, grad))
    assert kernels.UpsampleGradients(tokens, up, needs=(False,) * 3).cond(slice(0, 0)).shape == (0, 80)


@pytest.mark.skipif(not IMPLEMENTATIONS[1:], reason="needs the native CPU module")
def test_pytorch_gives_the_same_gradients():
    tokens, up, grad = random_upsample(F32, (37, 272, 33))
    pairs = zip(
        gradients(UpsampleGradients, tokens, up, grad),
        gradients(kernels.UpsampleGradients, tokens, up, grad),
        strict=True,
    )
    assert all(testing.relative_error(*pair) <= 2e-6 for pair in pairs)
