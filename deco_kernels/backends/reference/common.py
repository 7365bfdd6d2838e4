"""Helpers of the reference ops: compute dtype, and gradients by differentiating the formula."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deco_kernels.backends.arguments import Gradients
from deco_kernels.signatures import MATMUL, OPS, Group, flat, grouped


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def prepare(op: str, inputs: Group, activation: torch.Tensor) -> Group:
    """The inputs in the compute dtype; weights of matmuls are first rounded to the dtype of the activation."""
    dtype = compute_dtype(activation)
    tensors = [
        (tensor.to(activation.dtype) if argument.rounding == MATMUL else tensor).to(dtype)
        for argument, tensor in zip(OPS[op].arguments, flat(inputs), strict=True)
    ]
    return grouped(type(inputs), tensors)


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
    options: tuple[float, ...],
    inputs: Group,
    originals: Group,
    needs: Sequence[bool],
    grad_outputs: Sequence[torch.Tensor],
) -> Gradients:
    """Gradients of formula(*inputs, *options), contiguous, each in the dtype of its original; None where not needed.

    `inputs` are `originals` in the compute dtype; an input that is not needed may be None.
    """
    with _recording_gradients():
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(flat(inputs), needs, strict=True)
        ]
        outputs = formula(*grouped(type(inputs), leaves), *options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [pair for pair in zip(outputs, grad_outputs, strict=True) if pair[0].requires_grad]
    outputs = [output for output, _ in used]
    grad_outputs = [gradient.to(output.dtype) for output, gradient in used]
    asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if leaf is not None and need]
    if asked and not used:
        raise RuntimeError(
            "autograd did not record the reference formula: no output depends on the inputs that need gradients"
        )
    found = iter(torch.autograd.grad(outputs, asked, grad_outputs, materialize_grads=True) if asked else ())
    return tuple(
        next(found).to(original.dtype).contiguous() if need else None
        for original, need in zip(flat(originals), needs, strict=True)
    )
