"""The upsample by PyTorch's matmul."""

import pytest
import torch

from deco_kernels import testing
from deco_kernels.backends.upsample import UpsampleGradients
from deco_kernels.signatures import UpsampleWeights
from tests.operators import OperatorNames

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_matmul_adds_the_bias(dtype, kept):
    """In its own kernel: with a float32 bias and 16-bit tokens, another pass over the conditions would add it."""
    tokens, up = torch.randn(6, 48).to(dtype), UpsampleWeights(torch.randn(80, 48), torch.randn(80))
    upsample, memory = UpsampleGradients(tokens, up, needs=(False,) * 3), torch.empty(6, 80, dtype=dtype)
    with OperatorNames() as names:
        found = upsample.cond(slice(1, 5), memory if kept else None)
    assert [name.split(".")[1] for name in names if "add" in name or "mm" in name] == ["addmm"]
    weight, bias = (tensor.to(dtype).double() for tensor in up)
    expected = tokens[1:5].double() @ weight.T + bias
    assert found.dtype is dtype
    assert testing.relative_error(found, expected) <= (1e-6 if dtype is F32 else torch.finfo(dtype).eps)
    assert not kept or found.data_ptr() == memory[1:].data_ptr()
