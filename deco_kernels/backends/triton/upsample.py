"""Upsample linear from tokens to per-pixel conditions by PyTorch's matmul, in chunks of tokens.

In the forward, the next kernel reads a chunk of conditions while it is in the L2 cache (l2_cache.py). The next chunk
reuses its buffer: the full tensor is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.signatures import UpsampleWeights

from .launching import collapsed_rows


class Upsample:
    """cond = tokens·up_weightᵀ + up_bias and its gradients, in chunks of tokens.

    Args:
        tokens: [..., Z]; cond and its gradient have its dtype.
        up: weights of the upsample.
        shape: (P, D).
    """

    def __init__(self, tokens: torch.Tensor, up: UpsampleWeights, shape: Sequence[int]):
        up_weight, up_bias = up
        self.tokens = collapsed_rows(tokens, 1)
        self.up_weight, self.up_bias, self.shape = up_weight, up_bias, shape
        self.weight, self.bias = up_weight.to(tokens.dtype).contiguous(), up_bias.to(tokens.dtype)
        self.buffer: torch.Tensor | None = None
        self.grad_tokens: torch.Tensor | None = None
        self.weight_sum: torch.Tensor | None = None
        self.bias_sum: torch.Tensor | None = None
        self.token_shape = tokens.shape

    def cond(self, start: int, length: int) -> torch.Tensor:
        """Conditions [length, P, D] of the tokens from `start` onward; valid until the next call."""
        if self.buffer is None:
            self.buffer = self.tokens.new_empty(length, self.weight.shape[0])
        out = self.buffer[:length]
        torch.addmm(self.bias, self.tokens[start : start + length], self.weight.T, out=out)
        return out.view(length, *self.shape)

    def add_gradients(self, start: int, grad_cond: torch.Tensor, needs: Sequence[bool]) -> None:
        """Accumulate from grad_cond [length, P, D] of tokens `start` onward; needs: of (tokens, up_weight, up_bias)."""
        rows = grad_cond.view(grad_cond.shape[0], -1)
        if needs[0]:
            if self.grad_tokens is None:
                self.grad_tokens = torch.empty(self.tokens.shape, dtype=self.tokens.dtype, device=self.tokens.device)
            torch.mm(rows, self.weight, out=self.grad_tokens[start : start + rows.shape[0]])
        if needs[1]:
            self.weight_sum = _added(self.weight_sum, rows.T @ self.tokens[start : start + rows.shape[0]])
        if needs[2]:
            self.bias_sum = _added(self.bias_sum, rows.sum(0, dtype=torch.float32))

    def grads(self, needs: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
        """Gradients of (tokens, up_weight, up_bias); None where not needed, zeros if there are no tokens."""
        sums = (self.grad_tokens, self.weight_sum, self.bias_sum)
        like = (self.tokens, self.up_weight, self.up_bias)
        shapes = (self.token_shape, self.up_weight.shape, self.up_bias.shape)
        return tuple(
            None if not need else _finished(total, tensor.dtype, shape, tensor.device)
            for need, total, tensor, shape in zip(needs, sums, like, shapes, strict=True)
        )


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """total + part in float32; a single chunk keeps the dtype of the matmul."""
    if total is None:
        return part
    return total.add_(part) if total.dtype is torch.float32 else total.float().add_(part)


def _finished(total: torch.Tensor | None, dtype: torch.dtype, shape: torch.Size, device: torch.device) -> torch.Tensor:
    if total is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return total.to(dtype).view(shape)
