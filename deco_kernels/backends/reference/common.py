"""What the reference ops share: the precision they compute in, and gradients by differentiating the formula."""

import contextlib
from collections.abc import Callable, Sequence

import torch

from deco_kernels.signatures import MATMUL_WEIGHTS, TENSORS


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def prepare(op: str, tensors: Sequence[torch.Tensor], activation: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the compute dtype; weights of matmuls are first rounded to the dtype of the activation."""
    dtype = compute_dtype(activation)
    return [
        (tensor.to(activation.dtype) if name in MATMUL_WEIGHTS else tensor).to(dtype)
        for name, tensor in zip(TENSORS[op], tensors, strict=True)
    ]


@contextlib.contextmanager
def _recording_gradients():
    """Autograd records inside, also where the caller runs below the autograd dispatch keys, as compiled graphs do."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def differentiate(
    formula: Callable,
    inputs: Sequence[torch.Tensor],
    originals: Sequence[torch.Tensor],
    needs: Sequence[bool],
    grad_outputs: Sequence[torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of formula(*inputs) where `needs` asks for them, contiguous, each in the dtype of its original.

    `inputs` are `originals` in the compute dtype; an input may be None if it is not needed.
    """
    with _recording_gradients():
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(inputs, needs, strict=True)
        ]
        outputs = formula(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [pair for pair in zip(outputs, grad_outputs, strict=True) if pair[0].requires_grad]
    outputs = [output for output, _ in used]
    grad_outputs = [gradient.to(output.dtype) for output, gradient in used]
    asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if asked and not used:
        raise RuntimeError("autograd did not record the reference formula: no output depends on the inputs asked for")
    found = iter(torch.autograd.grad(outputs, asked, grad_outputs, materialize_grads=True) if asked else ())
    return tuple(
        next(found).to(original.dtype).contiguous() if need else None
        for original, need in zip(originals, needs, strict=True)
    )
