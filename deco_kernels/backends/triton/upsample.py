"""Upsample linear from tokens to per-pixel conditions by PyTorch's matmul, in chunks of tokens.

In the forward, the next chunk reuses the buffer of the conditions unless they are kept for the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends.upsample import added, finished
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
        self.inputs = (tokens, up_weight, up_bias)
        self.tokens, self.shape = collapsed_rows(tokens, 1), shape
        self.weight, self.bias = up_weight.to(tokens.dtype).contiguous(), up_bias.to(tokens.dtype)
        self.buffer: torch.Tensor | None = None
        self.grad_tokens: torch.Tensor | None = None
        self.weight_sum: torch.Tensor | None = None
        self.bias_sum: torch.Tensor | None = None

    def cond(self, part: slice, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Conditions [tokens, P, D] of a part of the tokens; valid until the next call.

        `kept` [T, P*D], of the dtype of tokens: memory for the conditions of all tokens; the result is a part of it.
        """
        tokens = self.tokens[part]
        if kept is not None:
            out = kept[part]
        else:
            if self.buffer is None:
                self.buffer = tokens.new_empty(len(tokens), self.weight.shape[0])
            out = self.buffer[: len(tokens)]
        torch.addmm(self.bias, tokens, self.weight.T, out=out)
        return out.view(-1, *self.shape)

    def add_gradients(self, part: slice, grad_cond: torch.Tensor, needs: Sequence[bool]) -> None:
        """Accumulate from grad_cond [tokens, P, D] of a part of the tokens; needs: of (tokens, up_weight, up_bias)."""
        rows = grad_cond.view(grad_cond.shape[0], -1)
        if needs[0]:
            if self.grad_tokens is None:
                self.grad_tokens = torch.empty(self.tokens.shape, dtype=self.tokens.dtype, device=self.tokens.device)
            torch.mm(rows, self.weight, out=self.grad_tokens[part])
        if needs[1]:
            self.weight_sum = added(self.weight_sum, rows.T @ self.tokens[part])
        if needs[2]:
            self.bias_sum = added(self.bias_sum, rows.sum(0, dtype=torch.float32))

    def grads(self, needs: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
        """Gradients of (tokens, up_weight, up_bias); None where not needed, zeros if there are no tokens."""
        sums = (self.grad_tokens, self.weight_sum, self.bias_sum)
        return tuple(
            finished(total, like) if need else None for need, total, like in zip(needs, sums, self.inputs, strict=True)
        )
