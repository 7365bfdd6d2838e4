"""The query of chunks of tokens, so that a query made from tokens need not be stored as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends.upsample import UpsampleGradients
from deco_kernels.signatures import Query, UpsampleWeights


class ChunkedQuery:
    """The query of parts of the tokens, given or upsampled, and the gradients of its tensors."""

    def __init__(
        self,
        query: Query,
        shape: Sequence[int],
        needs: Sequence[bool],
        upsample: type[UpsampleGradients] = UpsampleGradients,
    ):
        """`shape`: (P, D). `needs`: which gradients of the four tensors are needed. `upsample`: that of the backend."""
        self.shape, self.needs, self.wanted = tuple(shape), needs, any(needs)
        self.given, self.upsample = None, None
        self.grad_given: torch.Tensor | None = None
        if query.query is not None:
            self.given = query.query.reshape(-1, *self.shape)
            if needs[0]:
                self.grad_given = torch.empty_like(query.query, memory_format=torch.contiguous_format)
        elif query.query_tokens is not None:
            assert query.query_weight is not None and query.query_bias is not None
            up = UpsampleWeights(query.query_weight, query.query_bias)
            self.upsample = upsample(query.query_tokens, up, needs[1:])

    def of(self, part: slice, dtype: torch.dtype) -> torch.Tensor | None:
        """Query [tokens, P, D] of a part of the tokens, in `dtype`; None if there is none."""
        if self.upsample is not None:
            return self.upsample.cond(part).to(dtype).view(-1, *self.shape)
        return None if self.given is None else self.given[part].to(dtype)

    def new_gradient(self, tokens: int) -> torch.Tensor | None:
        """Uninitialized [tokens, P, D] for the gradient of the query of a chunk; None if no gradient needs it."""
        if self.upsample is not None:
            return self.upsample.new_grad_cond(tokens, self.shape[0])
        return None if self.grad_given is None else self.grad_given.new_empty(tokens, *self.shape)

    def add(self, part: slice, gradient: torch.Tensor | None) -> None:
        """Accumulate the gradients from that of the query of a part of the tokens, [tokens, P, D]."""
        if gradient is None:
            return
        if self.upsample is not None:
            self.upsample.add(part.start, gradient)
        elif self.grad_given is not None:
            self.grad_given.view(-1, *self.shape)[part] = gradient

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, query_tokens, query_weight and query_bias; None where not needed."""
        if self.upsample is None:
            return (self.grad_given, None, None, None)
        return (None, *self.upsample.results())
