"""A gradient-equivalence check for a project's CI: pytest examples/test_equivalence.py"""

import pytest
import torch

from deco_kernels import ops, testing
from deco_kernels.testing import published  # the code that the op replaces; yours in your project


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_fused_block_is_equivalent(autocast):
    inputs = testing.random_inputs("adaln_block", dtype=autocast or torch.float32).tensors
    testing.assert_equivalent(ops.adaln_block, published.block, inputs, autocast=autocast)
