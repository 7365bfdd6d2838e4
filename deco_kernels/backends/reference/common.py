"""Helpers of the reference ops: compute dtype, constants, and gradients by differentiating the formula."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deco_kernels.backends.arguments import Gradients, Losses, kept_like
from deco_kernels.backends.execution import is_executed
from deco_kernels.signatures import MATMUL, OPS, Argument, Group, Query, UpsampleWeights, flat, grouped


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def prepare(op: str, inputs: Group, activation: torch.Tensor) -> Group:
    """The inputs in the compute dtype; weights of matmuls are first rounded to the dtype of the activation."""
    dtype = compute_dtype(activation)

    def converted(argument: Argument, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return (tensor.to(activation.dtype) if argument.rounding == MATMUL else tensor).to(dtype)

    return grouped(type(inputs), map(converted, OPS[op].arguments, flat(inputs)))


def upsample(tokens: torch.Tensor, up: UpsampleWeights, shape: Sequence[int]) -> torch.Tensor:
    """Conditions [..., P, D] of tokens [..., Z]; `shape` is (P, D)."""
    return torch.nn.functional.linear(tokens, *up).unflatten(-1, shape)


def query_of(query: Query, shape: Sequence[int]) -> torch.Tensor | None:
    """Query [..., P, D], given or upsampled; None if there is none. `shape` is (P, D)."""
    if query.query_tokens is None:
        return query.query
    assert query.query_weight is not None and query.query_bias is not None
    return upsample(query.query_tokens, UpsampleWeights(query.query_weight, query.query_bias), shape)


Matrix = tuple[tuple[float, ...], ...]

_constants: dict[tuple[Matrix, torch.dtype, torch.device], torch.Tensor] = {}


def constant(values: Matrix, like: torch.Tensor) -> torch.Tensor:
    """A matrix in the dtype and on the device of `like`, copied there once: a CUDA graph cannot capture the copy.

    Where operations are traced or transformed instead of executed, it is a new tensor in every call.
    """
    if not is_executed(like):
        return like.new_tensor(values)
    key = values, like.dtype, like.device
    if key not in _constants:
        with torch.inference_mode(False):
            made = torch.tensor(values, dtype=like.dtype, device=like.device)
        if not is_executed(made):
            return made
        _constants[key] = made
    return _constants[key]


@contextlib.contextmanager
def _recording_gradients() -> Iterator[None]:
    """Context in which autograd records, even if the caller runs below the autograd dispatch keys (compiled graphs)."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def differentiate(
    formula: Callable[..., Any],
    options: tuple[float | str, ...],
    inputs: Group,
    originals: Group,
    needs: Sequence[bool],
    grad_outputs: Sequence[torch.Tensor | None],
) -> Gradients:
    """Gradients of formula(*inputs, *options), contiguous, each in the dtype of its original; None where not needed.

    `inputs` are `originals` in the compute dtype; an input that is not needed may be None, and so may the gradient of
    an output that is not used.
    """
    with _recording_gradients():
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(flat(inputs), needs, strict=True)
        ]
        outputs = formula(*grouped(type(inputs), leaves), *options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = zip(outputs, grad_outputs, strict=True)
    used = [(output, grad.to(output.dtype)) for output, grad in pairs if output.requires_grad and grad is not None]
    asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if leaf is not None and need]
    if asked and not used:
        raise RuntimeError(
            "autograd did not record the reference formula: no output depends on the inputs that need gradients"
        )
    used_outputs, used_grads = zip(*used, strict=True) if used else ((), ())
    found = iter(torch.autograd.grad(used_outputs, asked, used_grads, materialize_grads=True) if asked else ())
    return tuple(
        next(found).to(original.dtype).contiguous() if need else None
        for original, need in zip(flat(originals), needs, strict=True)
    )


class OnePass:
    """The functions of a one-pass op from its formula (tensors, options) -> (total, pixel, frequency).

    The second tensor of the op has the activation dtype.
    """

    def __init__(self, op: str, formula: Callable[..., Losses]):
        self.op, self.formula = op, formula

    def forward(self, inputs: Any, *options: float | str) -> Losses:
        return self.formula(*prepare(self.op, inputs, inputs[1]), *options)

    def forward_with_gradients(self, inputs: Any, *options: Any) -> tuple[Losses, Gradients]:
        """The losses, and the gradients of total in the dtypes in which they are kept; the last argument is `needs`."""
        *scalars, needs = options
        prepared = prepare(self.op, inputs, inputs[1])
        total, pixel, frequency = losses = self.formula(*prepared, *scalars)
        grad_losses = (torch.ones_like(total), torch.zeros_like(pixel), torch.zeros_like(frequency))
        kept = kept_like(self.op, inputs)
        return losses, differentiate(self.formula, tuple(scalars), prepared, kept, needs, grad_losses)
