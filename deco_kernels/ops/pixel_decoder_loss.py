"""pixel_decoder_loss and pixel_decoder_loss_from_tokens: decoder and training loss as one op, gradients included."""

from typing import Any

import torch

from deco_kernels.ops import checks
from deco_kernels.ops.one_pass import define_one_pass_op
from deco_kernels.ops.pixel_decoder import decoder_request
from deco_kernels.ops.registry import Operation, chosen_backend


def pixel_decoder_loss(
    image: torch.Tensor,
    cond: torch.Tensor,
    target: torch.Tensor,
    pixel_weight: torch.Tensor,
    pixel_table: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    mod_weight: torch.Tensor,
    mod_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    frequency_weight: torch.Tensor,
    *,
    patch_size: int,
    frequency_scale: float = 1.0,
    sample_weight: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    head_norm: str = "layer",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flow_matching_loss(pixel_decoder(image, cond, ...), target, ...)` as one op, for training.

    With velocity = pixel_decoder(image, cond, ...):

        total, pixel, frequency = flow_matching_loss(velocity, target, frequency_weight, ...)

    If a gradient is wanted, the forward computes the gradients of `total` and keeps them; the backward multiplies them
    by the incoming gradient. Without gradients only the losses are computed. Activation checkpointing runs the op
    twice.

    Args:
        image: [B, 3, H, W], the noised image, any strides; float32, bfloat16 or float16. H and W at least 5.
        cond: [..., P, D], as in `pixel_decoder`. Its dtype is the activation dtype; under autocast, float32 is cast to
            the autocast dtype.
        target: [B, 3, H, W], any strides; float32, bfloat16 or float16.
        pixel_weight ... head_bias: the weights of `pixel_decoder`, for C = 3.
        frequency_weight: [3, 8, 8] for Y, Cb, Cr; row = vertical frequency. See `jpeg_frequency_weight`.
        patch_size: p, a divisor of H and W.
        frequency_scale: weight of the frequency part.
        sample_weight: [B], or None for ones; not renormalized.
        query, head_norm, eps, backend: as in `pixel_decoder`.

    Returns:
        (total, pixel, frequency), float32 scalars (float64 for float64 arguments); zeros for an empty batch. Only
        `total` is differentiable, with respect to every tensor argument. For gradients of `pixel` or `frequency`, use
        `pixel_decoder` and `flow_matching_loss`.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `pixel_decoder` and `flow_matching_loss`.
    """
    blocks = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    weights = (pixel_weight, pixel_table, *blocks, head_weight, head_bias, frequency_weight)
    name, tensors = "pixel_decoder_loss", (image, cond, target, *weights)
    given = checks.given_query(query)
    options = (patch_size, frequency_scale, head_norm, eps, backend)
    return _losses(name, _pixel_decoder_loss, tensors, sample_weight, given, *options)


def pixel_decoder_loss_from_tokens(
    image: torch.Tensor,
    tokens: torch.Tensor,
    target: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    pixel_weight: torch.Tensor,
    pixel_table: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    mod_weight: torch.Tensor,
    mod_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    frequency_weight: torch.Tensor,
    *,
    patch_size: int,
    frequency_scale: float = 1.0,
    sample_weight: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    query_tokens: torch.Tensor | None = None,
    query_weight: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    head_norm: str = "layer",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`pixel_decoder_loss` with cond = tokens @ up_weight.T + up_bias, which is never stored as a whole.

    Args:
        image, target: [B, 3, H, W], as in `pixel_decoder_loss`.
        tokens: [..., Z]; leading sizes multiply to B*(H/p)*(W/p), patches in row-major order. Its dtype is the
            activation dtype; under autocast, float32 is cast to the autocast dtype.
        up_weight, up_bias: [P*D, Z], [P*D]; row k*D + d belongs to channel d of pixel k.
        query, query_tokens, query_weight, query_bias: as in `pixel_decoder_from_tokens`.

    The other arguments, the results and the errors are those of `pixel_decoder_loss`.
    """
    blocks = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    weights = (up_weight, up_bias, pixel_weight, pixel_table, *blocks, head_weight, head_bias, frequency_weight)
    name, tensors = "pixel_decoder_loss_from_tokens", (image, tokens, target, *weights)
    given = checks.given_query(query, query_tokens, query_weight, query_bias)
    options = (patch_size, frequency_scale, head_norm, eps, backend)
    return _losses(name, _pixel_decoder_loss_from_tokens, tensors, sample_weight, given, *options)


def _losses(
    name: str,
    operation: Operation,
    tensors: tuple[torch.Tensor, ...],
    sample_weight: torch.Tensor | None,
    query: checks.Tensors,
    patch_size: int,
    frequency_scale: float,
    head_norm: str,
    eps: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the arguments of op `name` and call it; `query` comes from `given_query`."""
    given = (*tensors, sample_weight, *query) if query or sample_weight is not None else tensors
    patch_size = checks.check_decoder(name, given, patch_size)
    checks.check_loss_images(name, "image", tensors[0])
    frequency_scale = checks.check_number(name, "frequency_scale", frequency_scale)
    head_norm, eps = checks.check_head_norm(name, head_norm), checks.check_eps(name, eps)
    image, activation, *others = tensors
    activation, queries = checks.check_query(name, activation, query)
    options = (patch_size, frequency_scale, head_norm, eps, chosen_backend(backend))
    total, pixel, frequency = operation(image, activation, *others, sample_weight, *queries, *options)
    return total, pixel, frequency


# --- operators -------------------------------------------------------------------------------------------------------


def _fake_losses(image: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    dtype = torch.float64 if image.dtype is torch.float64 else torch.float32
    return tuple(image.new_empty((), dtype=dtype) for _ in range(3))


def _define(name: str) -> Operation:
    options = "int patch_size, float frequency_scale, str head_norm, float eps"
    request = decoder_request(name, ("image", "target"))
    return define_one_pass_op(name, options, ("total", "pixel", "frequency"), request, _fake_losses)


_pixel_decoder_loss = _define("pixel_decoder_loss")
_pixel_decoder_loss_from_tokens = _define("pixel_decoder_loss_from_tokens")
