"""The upsample of chunks of tokens and its gradients on the CPU: csrc/cpu/upsample.cpp and upsample_backward.cpp."""

from __future__ import annotations

import functools

import torch

from deco_kernels import native
from deco_kernels.backends import arguments, upsample

MAX_TOKENS = 1024
"""Tokens per call of the backward's kernel, which packs all of them."""


class UpsampleGradients(upsample.UpsampleGradients):
    """Conditions and gradients from the package's kernels, unless upsamples run in PyTorch's matmul.

    The kernels round `up_weight` where they read it, and write the gradients of the weights in their dtypes.
    """

    @functools.cached_property
    def in_pytorch(self) -> bool:
        tokens, weight, _ = self.inputs
        return native.upsamples_in_pytorch(tokens.dtype, *weight.shape)

    @functools.cached_property
    def contiguous_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """up_weight [P*D, Z] and up_bias [P*D], not rounded."""
        return self.inputs[1].contiguous(), self.inputs[2].contiguous()

    def cond(self, part: slice, kept: torch.Tensor | None = None) -> torch.Tensor:
        if self.in_pytorch:
            return super().cond(part, kept)
        rows, (weight, bias) = self.rows[part], self.contiguous_up
        result = rows.new_empty(len(rows), len(weight)) if kept is None else kept[part]
        width = 32 if len(weight) % 32 == 0 else 16  # any that divides P*D gives the same bits
        native.cpu().upsample_forward(
            arguments.upsample_sizes(rows, len(weight) // width, width),
            arguments.rows(rows),
            arguments.arrays((weight, bias)),
            arguments.pixel_rows(result.view(len(rows), len(weight) // width, width)),
            torch.get_num_threads(),
        )
        return result

    def add(self, first: int, grad_cond: torch.Tensor | None) -> None:
        if self.in_pytorch or grad_cond is None:
            super().add(first, grad_cond)
            return
        alone = grad_cond.shape[0] == len(self.rows) <= MAX_TOKENS  # sums over several calls are float32
        for start in range(0, grad_cond.shape[0], MAX_TOKENS):
            part = slice(first + start, first + min(start + MAX_TOKENS, grad_cond.shape[0]))
            self._add(part, grad_cond[start : start + MAX_TOKENS].flatten(1), alone)

    def _add(self, part: slice, grad: torch.Tensor, alone: bool) -> None:
        adds = self.grad_weight is not None or self.grad_bias is not None
        if not adds:
            self.grad_weight, self.grad_bias = (
                torch.empty(tensor.shape, dtype=tensor.dtype if alone else torch.float32) if need else None
                for tensor, need in zip(self.inputs[1:], self.needs[1:], strict=True)
            )
        rows = self.rows[part]
        native.cpu().upsample_backward(
            (*rows.shape, grad.shape[1]),
            arguments.rows(grad),
            arguments.rows(rows),
            arguments.array(self.contiguous_up[0]),
            arguments.array(None if self.grad_tokens is None else self.grad_tokens[part]),
            arguments.arrays((self.grad_weight, self.grad_bias)),
            adds,
            torch.get_num_threads(),
        )
