"""Sums of weight gradients over chunks."""

import pytest
import torch

from deco_kernels.backends.arguments import WeightGradients
from tests.operators import OperatorNames

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_sums_of_weight_gradients(chunks):
    """In float32, then in the dtype of the weight; the gradients of the first chunk are not added to zeros."""
    weights = (torch.randn(4, 3), torch.randn(5).to(BF16), torch.randn(2), torch.randn(3, 4).T)
    needs = (True, True, False, True)
    parts = [
        tuple(torch.randn(w.shape) if need else None for w, need in zip(weights, needs, strict=True))
        for _ in range(chunks)
    ]
    sums = WeightGradients(weights, needs)
    with OperatorNames() as names:
        for part in parts:
            written = sums.new_part()
            assert [None if w is None else (w.shape, w.dtype, w.is_contiguous()) for w in written] == [
                (w.shape, F32, True) if need else None for w, need in zip(weights, needs, strict=True)
            ]
            sums.add(tuple(None if g is None else g.clone() for g in part))
        found = sums.results()
    assert len([name for name in names if "add" in name]) == max(0, chunks - 1)
    assert bool([name for name in names if "zero" in name]) == (chunks == 0)
    for gradient, weight, need, *given in zip(found, weights, needs, *parts, strict=True):
        if not need:
            assert gradient is None
            continue
        assert gradient.dtype is weight.dtype and gradient.shape == weight.shape
        assert torch.equal(gradient, sum(given, torch.zeros(weight.shape)).to(weight.dtype))
