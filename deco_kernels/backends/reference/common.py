"""What the reference ops share: the precision they compute in, and gradients by differentiating the formula."""

from collections.abc import Callable, Sequence

import torch


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def widen(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Activations, images and norm weights: their own value in the compute dtype."""
    return [tensor.to(compute_dtype(tensor)) for tensor in tensors]


def round_weights(activation: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Weights of matmuls: rounded to the activation dtype, in the compute dtype."""
    return [weight.to(activation.dtype).to(compute_dtype(activation)) for weight in weights]


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
    with torch.enable_grad():
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(inputs, needs, strict=True)
        ]
        outputs = formula(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    grad_outputs = [gradient.to(output.dtype) for gradient, output in zip(grad_outputs, outputs, strict=True)]
    found = iter(torch.autograd.grad(outputs, asked, grad_outputs, materialize_grads=True) if asked else ())
    return tuple(
        next(found).to(original.dtype).contiguous() if need else None
        for original, need in zip(originals, needs, strict=True)
    )
